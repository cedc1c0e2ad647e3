/* The attention kernels of the GPU on a CPU (emulated_gpu.h), both kinds, against plain double precision: whatever a change
 * breaks in their logic shows on a machine without a GPU. Small shapes; tests/test_cuda_attention.h has the large ones.
 *
 *     make emulated        builds and runs it; needs the headers of the CUDA Toolkit */
#include "emulated_gpu.h"
#include "emulated_instructions.h"

#include "../acp_attention.cuh"
#include "check.h"
#include "naive_attention.h"

#include <algorithm>
#include <numeric>
#include <vector>

/* Tensors of one case: q, k and v packed into rows of 3 H D values and some more, as the model has them. */
struct Case {
    AcpShape shape;
    int64_t width, stride;
    std::vector<uint16_t> qkv, dout, o, dq, dk, dv;
    std::vector<float> log_f, lse, dlog_f;
    std::vector<char> saved, work;

    const bf16 *input(int which) const {
        return (const bf16 *)(qkv.data() + which * width);
    }
};

static uint16_t bits_of(double x) {
    return (uint16_t)(pack2((float)x, 0.0f) & 0xffff);
}

static double value_of(uint16_t bits) {
    return (double)__uint_as_float((uint32_t)bits << 16);
}

/* q and k of norm sqrt(D); log f = logsigmoid(x), x ~ N(mu, 1), and now and then a gate that forgets all. */
static Case make_case(int B, int T, int H, int D, AcpMode mode, bool portable, double mu, uint64_t key) {
    Case c;
    c.shape = {B, T, H, D, mode, -10, true, portable};
    c.width = (int64_t)H * D;
    c.stride = 3 * c.width + 64;
    size_t rows = (size_t)B * (size_t)T, size = rows * (size_t)c.width;
    const uint16_t unset = 0x7fc0; /* not a number */
    c.qkv.assign(rows * (size_t)c.stride, unset);
    for (std::vector<uint16_t> *x : {&c.dout, &c.o, &c.dq, &c.dk, &c.dv}) {
        x->assign(size, unset);
    }
    c.lse.assign(rows * (size_t)H, NAN);
    c.dlog_f.assign(rows * (size_t)H, NAN);
    c.log_f.resize(rows * (size_t)H);
    for (size_t head = 0; head < rows * (size_t)H; head++) {
        for (int which = 0; which < 4; which++) {
            size_t at = which < 3 ? head / (size_t)H * (size_t)c.stride + (size_t)(which * c.width) + head % (size_t)H * (size_t)D
                                  : head * (size_t)D;
            double x[128], sum = 0;
            for (int i = 0; i < D; i++) {
                x[i] = fox_normal(key, (head * 4 + (size_t)which) * 128 + (size_t)i);
                sum += x[i] * x[i];
            }
            for (int i = 0; i < D; i++) {
                (which < 3 ? c.qkv : c.dout)[at + (size_t)i] = bits_of(which < 2 ? x[i] * sqrt(D / sum) : x[i]);
            }
        }
        double gate = fox_random(key + 1, head) % 300 == 0 ? -30 : mu + fox_normal(key + 2, head);
        c.log_f[head] = (float)-log1p(exp(-gate));
    }
    c.saved.assign((size_t)acp_saved_bytes(&c.shape), (char)0xee);
    c.work.assign((size_t)acp_workspace_bytes(&c.shape), (char)0xee);
    return c;
}

enum { O, DQ, DK, DV, LSE, DLOG_F, OUTPUTS };

/* Sums of squares of differences from the reference, and of the reference. */
struct Errors {
    double difference[OUTPUTS] = {0}, size[OUTPUTS] = {0};

    void add(int output, double found, double expected) {
        difference[output] += (found - expected) * (found - expected);
        size[output] += expected * expected;
    }
};

/* Head bh of a tensor as floats [T, D]; rows of the tensor are `stride` values apart, its heads begin at `column`. */
static std::vector<float> head_of(const Case &c, int bh, const std::vector<uint16_t> &x, int64_t stride, int64_t column) {
    int T = c.shape.T, H = c.shape.H, D = c.shape.D;
    std::vector<float> head((size_t)(T * D));
    for (int i = 0; i < T * D; i++) {
        head[(size_t)i] = (float)value_of(x[(size_t)((bh / H * T + i / D) * stride + column + bh % H * D + i % D)]);
    }
    return head;
}

/* q, k or v (0, 1, 2) of a head. */
static std::vector<float> input_of(const Case &c, int bh, int which) {
    return head_of(c, bh, c.qkv, c.stride, which * c.width);
}

/* One head against the definition, over the pairs that `first` keeps. */
static void compare_head(const Case &c, int bh, const int *first, Errors *errors) {
    int T = c.shape.T, D = c.shape.D;
    std::vector<float> q = input_of(c, bh, 0), k = input_of(c, bh, 1), v = input_of(c, bh, 2);
    std::vector<float> dout = head_of(c, bh, c.dout, c.width, 0);
    std::vector<double> log_f(c.log_f.begin() + bh * T, c.log_f.begin() + (bh + 1) * T);
    NaiveAttention n = naive_attention(q.data(), k.data(), v.data(), log_f.data(), dout.data(), T, D, first, ACP_BLOCK);
    const std::vector<uint16_t> *found[] = {&c.o, &c.dq, &c.dk, &c.dv};
    const double *expected[] = {n.o, n.dq, n.dk, n.dv};
    for (int output = O; output <= DV; output++) {
        std::vector<float> head = head_of(c, bh, *found[output], c.width, 0);
        for (int i = 0; i < T * D; i++) {
            errors->add(output, (double)head[(size_t)i], expected[output][i]);
        }
    }
    for (int t = 0; t < T; t++) {
        errors->add(LSE, (double)c.lse[(size_t)(bh * T + t)], n.lse[t]);
        errors->add(DLOG_F, (double)c.dlog_f[(size_t)(bh * T + t)], n.dlogf[t]);
    }
    naive_attention_free(&n);
}

/* The ranges of a head are those of cpu/acp.h, but for a block where float32 rounds the tight bound the other way. */
static void check_ranges(Tests *t, const Case &c, const char *what, int bh, AcpNorms most, const int *first, const int *last) {
    int T = c.shape.T, D = c.shape.D, blocks = acp_num_blocks(&c.shape), apart = 0, wrong = 0;
    std::vector<int> expected((size_t)blocks, 0), expected_last((size_t)blocks);
    std::vector<float> q = input_of(c, bh, 0), k = input_of(c, bh, 1);
    const double *decay;
    const int *unused;
    acp_saved_views(&c.shape, (void *)c.saved.data(), &decay, &unused, &unused);
    decay += (int64_t)bh * T;
    AcpHead head = {T, D, q.data(), k.data(), D, decay};
    if (c.shape.mode == ACP_PAPER) {
        double delta = acp_threshold(acp_bound(most, D), T, c.shape.log_tolerance);
        acp_first_blocks_paper(T, decay, delta, ACP_BLOCK, ACP_BLOCK, expected.data());
    } else if (c.shape.mode == ACP_TIGHT) {
        acp_first_blocks_tight(&head, most, c.shape.log_tolerance, ACP_BLOCK, ACP_BLOCK, expected.data());
    }
    acp_last_blocks(T, ACP_BLOCK, ACP_BLOCK, first, expected_last.data());
    for (int m = 0; m < blocks; m++) {
        int difference = abs(first[m] - expected[(size_t)m]);
        bool searched = c.shape.mode == ACP_TIGHT && min(first[m], expected[(size_t)m]) < m - 1; /* else c, in double, decides */
        apart += difference;
        wrong += difference > searched || last[m] != expected_last[(size_t)m];
    }
    check(t, wrong == 0 && apart <= 1, "%s, head %d: ranges, %d wrong, %d blocks apart", what, bh, wrong, apart);
}

/* Forward and backward of one shape by the real launchers. portable: the kernels for every chip; mu: of the gates. */
static void test_case(Tests *t, int B, int T, int H, int D, AcpMode mode, bool portable, double mu) {
    static const char *const names[] = {"o", "dq", "dk", "dv", "lse", "d log f"}, *const modes[] = {"off", "paper", "tight"};
    static const double limits[] = {4e-3, 8e-3, 8e-3, 4e-3, 1e-5, 2e-3};
    char what[100];
    snprintf(what, sizeof what, "%s, %s, B %d T %d H %d D %d, gates %g", portable ? "portable" : "Hopper", modes[mode], B, T, H, D, mu);
    Case c = make_case(B, T, H, D, mode, portable, mu, (uint64_t)(T * 1000 + D * 10 + B));
    std::vector<float> ones((size_t)D, 1.0f);
    std::vector<unsigned long long> counts((size_t)(2 * H), 0);
    AcpCounts counted = {counts.data(), counts.data() + H};
    bf16 *o = (bf16 *)c.o.data();
    const bf16 *dout = (const bf16 *)c.dout.data();
    acp_attention_forward(&c.shape, o, c.lse.data(), c.saved.data(), c.work.data(), &counted, c.input(0), c.input(1), c.input(2),
                          c.stride, c.log_f.data(), ones.data(), ones.data(), 0);
    acp_attention_backward(&c.shape, (bf16 *)c.dq.data(), (bf16 *)c.dk.data(), (bf16 *)c.dv.data(), c.dlog_f.data(), c.saved.data(),
                           c.work.data(), dout, c.input(0), c.input(1), c.input(2), c.stride, o, c.lse.data(), 0);
    const double *decay;
    const int *first, *last;
    acp_saved_views(&c.shape, c.saved.data(), &decay, &first, &last);
    Errors errors;
    std::vector<unsigned long long> skipped((size_t)H, 0);
    int blocks = acp_num_blocks(&c.shape);
    unsigned long long kept = 0, all = (unsigned long long)(blocks * (blocks + 1) / 2);
    for (int bh = 0; bh < B * H; bh++) {
        AcpNorms most = {sqrt((double)D) * ACP_ROUNDING, sqrt((double)D)};
        check_ranges(t, c, what, bh, most, first + bh * blocks, last + bh * blocks);
        compare_head(c, bh, first + bh * blocks, &errors);
        for (int m = 0; m < blocks; m++) {
            skipped[(size_t)(bh % H)] += (unsigned long long)first[bh * blocks + m];
        }
    }
    for (int h = 0; h < H; h++) {
        check(t, counts[(size_t)h] == skipped[(size_t)h] && counts[(size_t)(H + h)] == (unsigned long long)B * all,
              "%s: %llu of %llu blocks of head %d are counted as skipped, expected %llu", what, counts[(size_t)h],
              counts[(size_t)(H + h)], h, skipped[(size_t)h]);
        kept += (unsigned long long)B * all - skipped[(size_t)h];
    }
    for (int i = 0; i < OUTPUTS; i++) {
        /* a sequence of one token has gradients of zero */
        double error = sqrt(errors.difference[i] / (errors.size[i] > 1e-12 ? errors.size[i] : (double)(T * D)));
        check(t, error <= limits[i], "%s: error of %s %.2e, allowed %.0e", what, names[i], error, limits[i]);
    }
    printf("%s: %llu of %llu blocks kept\n", what, kept, (unsigned long long)(B * H) * all);
    fflush(stdout);
}

/* The search of `tight` alone, of heads that forget fast and slowly, one after the other: keys with much in common and some
 * ten times as long. The last four forget only once, more or less: what they keep depends on all of the history since, and on
 * what its keys have in common with the query. weights: the largest norms are known beforehand. */
template <int D>
static void test_search(Tests *t, int T, bool weights) {
    const int H = 10;
    char what[100];
    snprintf(what, sizeof what, "search, T %d D %d, norms %s", T, D, weights ? "known" : "measured");
    Case c = make_case(1, T, H, D, ACP_TIGHT, false, 0, (uint64_t)T);
    AcpNorms longest = {0, 0};
    for (int i = 0; i < T * H; i++) {
        int token = i / H, h = i % H;
        bool only = h >= 6, reset = only ? token == 900 : h == 5 && fox_random(3, (uint64_t)i) % 500 == 0;
        double depth = only ? h + (D == 64 ? 6.5 : 9) : 30, q2 = 0, k2 = 0;
        double gate = reset ? -depth : only ? 12 : 1.5 * h - 3 + fox_normal(4, (uint64_t)i);
        double size = !only && fox_random(5, (uint64_t)i) % 200 == 0 ? 5 : 0.5, sign = only ? (token / 1500 % 2) - 0.5 : 1;
        c.log_f[(size_t)(h * T + token)] = (float)-log1p(exp(-gate));
        for (int j = 0; j < D; j++) {
            size_t at = (size_t)token * (size_t)c.stride + (size_t)(h * D + j);
            double common = h % 2 || only ? sign * fox_normal(6, (uint64_t)j) : 0;
            c.qkv[at] = bits_of(fox_normal(7, (uint64_t)(i * D + j)) + common / 2);
            c.qkv[at + (size_t)c.width] = bits_of(common + size * fox_normal(8, (uint64_t)(i * D + j)));
            q2 += pow(value_of(c.qkv[at]), 2);
            k2 += pow(value_of(c.qkv[at + (size_t)c.width]), 2);
        }
        longest.q = fmax(longest.q, sqrt(q2));
        longest.k = fmax(longest.k, sqrt(k2));
    }
    std::vector<float> wq((size_t)D, (float)(longest.q / sqrt(D))), wk((size_t)D, (float)(longest.k / sqrt(D)));
    AcpNorms known = {longest.q * ACP_ROUNDING, longest.k};
    int64_t bytes;
    int blocks = acp_num_blocks(&c.shape);
    AcpSaved saved = acp_saved(&c.shape, c.saved.data(), &bytes);
    AcpWork work = acp_work(&c.shape, c.work.data(), &bytes);
    AcpInputs in = {c.input(0), c.input(1), c.input(2), c.stride, T, H, blocks, H};
    AcpRanges ranges = acp_ranges(&c.shape, weights ? wq.data() : NULL, weights ? wk.data() : NULL, NULL);
    acp_find_ranges<D>(&c.shape, in, {T, blocks, c.log_f.data(), NULL, saved, work, NULL}, ranges, 0);
    for (int h = 0; h < H; h++) {
        const int *first = saved.first + h * blocks;
        AcpHead head = {T, D, NULL, NULL, D, NULL};
        std::vector<float> q = input_of(c, h, 0), k = input_of(c, h, 1);
        head.q = q.data(), head.k = k.data();
        check_ranges(t, c, what, h, weights ? known : acp_norms_measured(&head), first, saved.last + h * blocks);
        printf("%s, head %d: %lld of %lld blocks skipped\n", what, h, (long long)acp_skipped_blocks(blocks, first),
               (long long)acp_causal_blocks(T, ACP_BLOCK, ACP_BLOCK));
    }
}

/* Thread blocks start longest first (to a 64th of the longest there can be), and otherwise in order; of each kind of tiles
 * all are there. Random ranges. rows: in a tile of each kind. */
static void test_order(Tests *t, int BH, int T, int rows0, int rows1, int rows2) {
    const int rows[3] = {rows0, rows1, rows2};
    AcpShape shape = {1, T, BH, 64, ACP_PAPER, -10, false, false};
    std::vector<char> memory((size_t)acp_saved_bytes(&shape), (char)0xee);
    int64_t bytes;
    int blocks = acp_num_blocks(&shape);
    AcpSaved saved = acp_saved(&shape, memory.data(), &bytes);
    for (int i = 0; i < BH * blocks; i++) {
        int block = i % blocks, draw = (int)(fox_random(7, (uint64_t)i) % 5);
        saved.first[i] = draw == 0 ? 0 : std::max(block - draw, 0);
        saved.last[i] = draw == 1 ? blocks - 1 : std::min(block + draw, blocks - 1);
    }
    acp_run_order({NULL, NULL, NULL, 0, T, BH, blocks, BH}, saved, true, rows0, rows1, rows2, 0);
    for (int which = 0; which < 3; which++) {
        int tiles = (T + rows[which] - 1) / rows[which], wrong = 0;
        auto level = [&](int i) {
            int row = i / tiles * blocks, begin = i % tiles * rows[which], end = std::min(begin + rows[which], T) - 1;
            int first = begin / ACP_BLOCK, last = end / ACP_BLOCK;
            return (which == 1 ? saved.last[row + last] - first : last - saved.first[row + first]) * 64 / blocks;
        };
        std::vector<int> expected((size_t)(BH * tiles));
        std::iota(expected.begin(), expected.end(), 0);
        std::stable_sort(expected.begin(), expected.end(), [&](int a, int b) { return level(a) > level(b); });
        for (int i = 0; i < BH * tiles; i++) {
            wrong += saved.order[which][i] != expected[(size_t)i];
        }
        check(t, wrong == 0, "order of %d tiles of %d rows (kind %d): %d wrong", BH * tiles, rows[which], which, wrong);
    }
}

int main(void) {
    Tests t = {};
    test_order(&t, 1, 1, 192, 128, 128);
    test_order(&t, 7, 25605, 192, 128, 128); /* more tiles than the sort has threads */
    test_order(&t, 33, 4096, 128, 128, 192);
    for (int mode = ACP_OFF; mode <= ACP_TIGHT; mode++) {
        for (int portable = 0; portable < 2; portable++) {
            for (int D = 64; D <= 128; D += 64) {
                test_case(&t, 1, 450, 1, D, (AcpMode)mode, portable != 0, 1.5);
                test_case(&t, 2, 77, 2, D, (AcpMode)mode, portable != 0, 3);
            }
        }
        for (int T : {1, 129, 192}) {
            test_case(&t, 1, T, 1, 64, (AcpMode)mode, false, 4);
        }
    }
    test_case(&t, 1, 700, 1, 64, ACP_PAPER, false, -1);
    for (int weights = 0; weights < 2; weights++) {
        test_search<64>(&t, 9000, weights != 0);
        test_search<128>(&t, 5000, weights != 0);
    }
    printf("%d passed, %d failed\n", t.passed, t.failed);
    return t.failed > 0;
}

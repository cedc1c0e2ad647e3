/* Tests of acp_attention.cuh: outputs and gradients against attention_head_forward and _backward of fox_layers.h in
 * float32 on the same bf16 inputs, ranges against cpu/acp.h, the bound on the pruned mass in double, long sequences
 * against windows in double, and equal bits in equal runs, the second of which comes from a CUDA graph. */
#ifndef FOX_TESTS_CUDA_ATTENTION_H
#define FOX_TESTS_CUDA_ATTENTION_H

#include "../cuda/launchers.h"
#include "../fox_layers.h"
#include "check.h"
#include "test_acp.h"

enum { ACP_TEST_BLOCK = 128 }; /* the GPU's grain of pruning */

enum { GATES_STRONG, GATES_WEAK, GATES_MIXED, GATES_RESET, GATES_SPREAD, GATES_HALF, GATE_KINDS };

typedef struct AttentionCase {
    AcpShape shape;
    int gates;
    bool norms;  /* the bound comes from QK-norm weights, else it is measured */
    bool large;  /* queries four times as long: logits may be so large that forward has to keep running maxima */
    bool packed; /* q, k and v are columns of one product */
    bool graph;  /* forward and backward are recorded in a CUDA graph, which then runs */
    uint64_t seed;
    /* host: what the GPU sees, exactly, as float; [B, T, H*D] and [B, H, T] */
    float *q, *k, *v, *dout, *log_f, *q_norm, *k_norm;
    /* host: what it answered */
    float *o, *lse, *dq, *dk, *dv, *dlog_f;
    double *c;
    int *first, *last;
    unsigned long long *skipped, *total;
} AttentionCase;

typedef struct AttentionErrors {
    double o, lse, dq, dk, dv, dlog_f; /* largest so far */
} AttentionErrors;

static float attention_from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Round to nearest, ties to even; no NaN among the inputs. */
static uint16_t attention_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void attention_cuda(cudaError_t status) {
    if (status != cudaSuccess) {
        fox_die("test of attention: %s", cudaGetErrorString(status));
    }
}

/* Device memory full of NaN bytes; `host` (may be NULL) is copied in. */
static void *attention_device(const void *host, size_t bytes) {
    void *p = NULL;
    attention_cuda(cudaMalloc(&p, bytes));
    attention_cuda(cudaMemset(p, 0xff, bytes));
    if (host != NULL) {
        attention_cuda(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice));
    }
    return p;
}

static void attention_fetch(void *host, const void *device, size_t bytes) {
    attention_cuda(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
}

static double attention_gate(const AttentionCase *a, int h, int64_t at) {
    double x = fox_normal(a->seed + 10, (uint64_t)at);
    switch (a->gates) {
    case GATES_STRONG: return fox_log_sigmoid(x - 1);
    case GATES_WEAK: return fox_log_sigmoid(x + 7);
    case GATES_MIXED: return fox_log_sigmoid(5 * x + 2);
    case GATES_RESET: return at % 97 == 50 ? -100 : fox_log_sigmoid(x + 6);
    case GATES_HALF: return log(0.5);
    default: return fox_log_sigmoid(x - 1 + 9.5 * h / (a->shape.H > 1 ? a->shape.H - 1 : 1));
    }
}

/* Random directions; with norms, as QK-norm leaves them. Rounded to bf16. */
static void attention_fill(AttentionCase *a) {
    int B = a->shape.B, T = a->shape.T, H = a->shape.H, D = a->shape.D;
    int64_t d = H * D, N = (int64_t)B * T * d;
    float **tensors[] = {&a->q, &a->k, &a->v, &a->dout};
    a->q_norm = FOX_NEW(float, d);
    a->k_norm = FOX_NEW(float, d);
    for (int i = 0; i < d; i++) {
        a->q_norm[i] = (float)(1 + 0.2 * fox_normal(a->seed + 20, (uint64_t)i));
        a->k_norm[i] = (float)(1 + 0.2 * fox_normal(a->seed + 21, (uint64_t)i));
    }
    for (int n = 0; n < 4; n++) {
        float *x = FOX_NEW(float, N);
        for (int64_t i = 0; i < N; i++) {
            x[i] = (float)((n == 0 && a->large ? 4 : 1) * fox_normal(a->seed + (uint64_t)n, (uint64_t)i));
        }
        for (int64_t row = 0; n < 2 && a->norms && row < N / D; row++) {
            float *head = x + row * D, scale = (float)(sqrt((double)D) / acp_norm(head, D));
            const float *w = (n == 0 ? a->q_norm : a->k_norm) + (a->shape.shared_norm ? 0 : row % H * D);
            for (int i = 0; i < D; i++) {
                head[i] *= scale * w[i];
            }
        }
        for (int64_t i = 0; i < N; i++) {
            x[i] = attention_from_bf16(attention_to_bf16(x[i]));
        }
        *tensors[n] = x;
    }
    a->log_f = FOX_NEW(float, (int64_t)B *H *T);
    for (int64_t i = 0; i < (int64_t)B * H * T; i++) {
        a->log_f[i] = (float)attention_gate(a, (int)(i / T % H), i);
    }
}

static void *attention_upload(const float *x, int64_t rows, int64_t columns, int64_t stride) {
    uint16_t *packed = FOX_NEW(uint16_t, rows * stride);
    memset(packed, 0xff, sizeof(uint16_t) * (size_t)(rows * stride)); /* NaN between the rows */
    for (int64_t i = 0; i < rows * columns; i++) {
        packed[i / columns * stride + i % columns] = attention_to_bf16(x[i]);
    }
    void *device = attention_device(packed, sizeof(uint16_t) * (size_t)(rows * stride));
    free(packed);
    return device;
}

static float *attention_download(const void *device, int64_t count, uint64_t *hash) {
    uint16_t *x = FOX_NEW(uint16_t, count);
    float *out = FOX_NEW(float, count);
    attention_fetch(x, device, sizeof(uint16_t) * (size_t)count);
    for (int64_t i = 0; i < count; i++) {
        out[i] = attention_from_bf16(x[i]);
    }
    *hash = fox_hash(*hash, x, sizeof(uint16_t) * (size_t)count);
    free(x);
    return out;
}

static float *attention_download_floats(const void *device, int64_t count, uint64_t *hash) {
    float *out = FOX_NEW(float, count);
    attention_fetch(out, device, sizeof(float) * (size_t)count);
    *hash = fox_hash(*hash, out, sizeof(float) * (size_t)count);
    return out;
}

/* q, k and v side by side, with 64 foreign columns, or each alone. */
static void attention_upload_qkv(const AttentionCase *a, void *memory[3], uint16_t *rows[3], int64_t *stride) {
    int64_t d = a->shape.H * a->shape.D, N = (int64_t)a->shape.B * a->shape.T;
    const float *from[] = {a->q, a->k, a->v};
    *stride = a->packed ? 3 * d + 64 : d;
    if (!a->packed) {
        for (int n = 0; n < 3; n++) {
            memory[n] = attention_upload(from[n], N, d, d);
            rows[n] = (uint16_t *)memory[n];
        }
        return;
    }
    float *product = FOX_NEW(float, N **stride);
    for (int64_t i = 0; i < N * 3 * d; i++) {
        product[i / (3 * d) * *stride + i % (3 * d)] = from[i % (3 * d) / d][i / (3 * d) * d + i % d];
    }
    memory[0] = attention_upload(product, N, *stride, *stride);
    memory[1] = memory[2] = NULL;
    for (int n = 0; n < 3; n++) {
        rows[n] = (uint16_t *)memory[0] + n * d;
    }
    free(product);
}

/* Runs what the stream has recorded. */
static void attention_launch_captured(cudaStream_t stream) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    attention_cuda(cudaStreamEndCapture(stream, &graph));
    attention_cuda(cudaGraphInstantiateWithFlags(&executable, graph, 0));
    attention_cuda(cudaGraphLaunch(executable, stream));
    attention_cuda(cudaStreamSynchronize(stream));
    attention_cuda(cudaGraphExecDestroy(executable));
    attention_cuda(cudaGraphDestroy(graph));
}

/* Forward and backward on the GPU; returns a hash of every output. */
static uint64_t attention_run(AttentionCase *a) {
    const AcpShape *shape = &a->shape;
    int B = shape->B, T = shape->T, H = shape->H, blocks = acp_blocks(T, ACP_TEST_BLOCK);
    int64_t d = H * shape->D, N = (int64_t)B * T * d, rows = (int64_t)B * H * T, stride;
    uint64_t hash = 0;
    void *memory[3];
    uint16_t *qkv[3];
    attention_upload_qkv(a, memory, qkv, &stride);
    void *dout = attention_upload(a->dout, (int64_t)B * T, d, d),
         *o = attention_device(NULL, sizeof(uint16_t) * (size_t)N);
    void *dq = attention_device(NULL, sizeof(uint16_t) * (size_t)N),
         *dk = attention_device(NULL, sizeof(uint16_t) * (size_t)N);
    void *dv = attention_device(NULL, sizeof(uint16_t) * (size_t)N),
         *log_f = attention_device(a->log_f, sizeof(float) * (size_t)rows);
    float *lse = (float *)attention_device(NULL, sizeof(float) * (size_t)rows);
    float *dlog_f = (float *)attention_device(NULL, sizeof(float) * (size_t)rows);
    float *q_norm = (float *)attention_device(a->q_norm, sizeof(float) * (size_t)d);
    float *k_norm = (float *)attention_device(a->k_norm, sizeof(float) * (size_t)d);
    void *saved = attention_device(NULL, (size_t)acp_saved_bytes(shape)),
         *work = attention_device(NULL, (size_t)acp_workspace_bytes(shape));
    AcpCounts counts;
    counts.skipped = (unsigned long long *)attention_device(NULL, sizeof(unsigned long long) * (size_t)(2 * H));
    counts.total = counts.skipped + H;
    attention_cuda(cudaMemset(counts.skipped, 0, sizeof(unsigned long long) * (size_t)(2 * H)));

    cudaStream_t stream;
    attention_cuda(cudaStreamCreate(&stream));
    attention_cuda(cudaDeviceSynchronize()); /* what was copied and filled before */
    if (a->graph) {
        attention_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    }
    acp_attention_forward(shape, (bf16 *)o, lse, saved, work, &counts, qkv[0], qkv[1], qkv[2], stride,
                          (const float *)log_f, a->norms ? q_norm : NULL, a->norms ? k_norm : NULL, stream);
    /* nothing may survive there */
    attention_cuda(cudaMemsetAsync(work, 0xff, (size_t)acp_workspace_bytes(shape), stream));
    acp_attention_backward(shape, (bf16 *)dq, (bf16 *)dk, (bf16 *)dv, dlog_f, saved, work, (const bf16 *)dout, qkv[0],
                           qkv[1], qkv[2], stride, (const bf16 *)o, lse, stream);
    if (a->graph) {
        attention_launch_captured(stream);
    }
    attention_cuda(cudaStreamSynchronize(stream));
    attention_cuda(cudaStreamDestroy(stream));

    a->o = attention_download(o, N, &hash);
    a->dq = attention_download(dq, N, &hash);
    a->dk = attention_download(dk, N, &hash);
    a->dv = attention_download(dv, N, &hash);
    a->lse = attention_download_floats(lse, rows, &hash);
    a->dlog_f = attention_download_floats(dlog_f, rows, &hash);
    const double *c;
    const int *first, *last;
    acp_saved_views(shape, saved, &c, &first, &last);
    a->c = FOX_NEW(double, rows);
    a->first = FOX_NEW(int, (int64_t)B *H *blocks);
    a->last = FOX_NEW(int, (int64_t)B *H *blocks);
    a->skipped = FOX_NEW(unsigned long long, 2 * H);
    a->total = a->skipped + H;
    attention_fetch(a->c, c, sizeof(double) * (size_t)rows);
    attention_fetch(a->first, first, sizeof(int) * (size_t)(B * H * blocks));
    attention_fetch(a->last, last, sizeof(int) * (size_t)(B * H * blocks));
    attention_fetch(a->skipped, counts.skipped, sizeof(unsigned long long) * (size_t)(2 * H));
    hash = fox_hash(hash, a->first, sizeof(int) * (size_t)(B * H * blocks));
    void *all[] = {memory[0], memory[1], memory[2], dout,   o,      dq,    dk,   dv,
                   log_f,     lse,       dlog_f,    q_norm, k_norm, saved, work, counts.skipped};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        attention_cuda(cudaFree(all[i]));
    }
    return hash;
}

static void attention_free_outputs(AttentionCase *a) {
    void *all[] = {a->o, a->lse, a->dq, a->dk, a->dv, a->dlog_f, a->c, a->first, a->last, a->skipped};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
}

static void attention_free_inputs(AttentionCase *a) {
    void *all[] = {a->q, a->k, a->v, a->dout, a->log_f, a->q_norm, a->k_norm};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
}

static void attention_name(const AttentionCase *a, char *name, size_t size) {
    static const char *const modes[] = {"off", "paper", "tight"};
    static const char *const gates[] = {"strong", "weak", "mixed", "reset", "spread", "half"};
    snprintf(name, size, "attention B %d T %d H %d D %d, acp %s, gates %s%s%s%s%s", a->shape.B, a->shape.T, a->shape.H,
             a->shape.D, modes[a->shape.mode], gates[a->gates], a->norms ? "" : ", measured bound",
             a->large ? ", large" : "", a->packed ? ", packed" : "", a->shape.portable ? ", portable" : "");
}

/* ||a - ref|| / ||ref||, with `unit` an element as the smallest norm: at T = 1 the gradients of q and k are zero. */
static double attention_error(const float *a, const float *ref, int64_t count, double unit, double *worst) {
    double diff = 0, sum = 0, norm = unit * unit * (double)count;
    for (int64_t i = 0; i < count; i++) {
        double x = (double)a[i], y = (double)ref[i];
        diff += (x - y) * (x - y);
        sum += y * y;
    }
    double error = sqrt(diff / fmax(norm, sum));
    *worst = worse(*worst, error);
    return error;
}

/* The ranges of one head, by cpu/acp.h with a tolerance a little smaller and a little larger. */
static void attention_check_ranges(Tests *t, const AttentionCase *a, const char *name, int bh, const AcpHead *head) {
    int T = a->shape.T, D = a->shape.D, blocks = acp_blocks(T, ACP_TEST_BLOCK), h = bh % a->shape.H,
        *bound = FOX_NEW(int, blocks);
    const int *first = a->first + (int64_t)bh * blocks;
    double slack = 0, U = 0, tolerance = a->shape.log_tolerance, rounding = (1 + 1.0 / 128) * (1 + 1.0 / 128);
    int64_t w = a->shape.shared_norm ? 0 : h * D;
    AcpNorms measured = acp_norms_measured(head), most = measured;
    bool same = true;
    if (a->norms) {
        most = acp_norms_of_weights(a->q_norm + w, a->k_norm + w, D);
        most.q *= rounding;
        check(t, measured.q <= most.q && acp_bound(measured, D) <= acp_bound(most, D), "%s: a logit may exceed its bound", name);
    }
    if (a->shape.mode == ACP_PAPER) {
        U = acp_bound(most, D);
        slack = a->norms ? 1e-6 : 1e-6 + 1e-4 * U;
    } else if (a->shape.mode == ACP_TIGHT) {
        slack = 0.01;
    }
    for (int side = -1; side <= 1; side += 2) { /* -1: prunes a little less */
        memset(bound, 0, sizeof(int) * (size_t)blocks);
        if (a->shape.mode == ACP_PAPER) {
            acp_first_blocks_paper(T, head->c, acp_threshold(U, T, tolerance) + side * slack, ACP_TEST_BLOCK,
                                   ACP_TEST_BLOCK, bound);
        } else if (a->shape.mode == ACP_TIGHT) {
            acp_first_blocks_tight(head, most, tolerance + side * slack, ACP_TEST_BLOCK, ACP_TEST_BLOCK, bound);
        }
        for (int m = 0; m < blocks; m++) {
            same = same && (side < 0 ? first[m] >= bound[m] : first[m] <= bound[m]);
        }
    }
    check(t, same, "%s, head %d: ranges differ from cpu/acp.h", name, bh);
    acp_last_blocks(T, ACP_TEST_BLOCK, ACP_TEST_BLOCK, first, bound);
    check(t, memcmp(bound, a->last + (int64_t)bh * blocks, sizeof(int) * (size_t)blocks) == 0,
          "%s, head %d: the keys' view names other blocks", name, bh);
    double gap = worst_pruned_mass(head, ACP_TEST_BLOCK, ACP_TEST_BLOCK, first, tolerance, 1 + T / 40);
    check(t, gap <= 0, "%s, head %d: pruned mass is %.3g times the allowed", name, bh, exp(gap));
    free(bound);
}

static void attention_check_head(Tests *t, const AttentionCase *a, const char *name, int bh, AttentionErrors *worst) {
    int T = a->shape.T, H = a->shape.H, D = a->shape.D, blocks = acp_blocks(T, FOX_BLOCK),
        *first = FOX_NEW(int, blocks);
    int64_t d = H * D, at = (int64_t)(bh / H) * T * d + bh % H * D, row = (int64_t)bh * T, size = (int64_t)T * D;
    float *o = FOX_NEW(float, size), *dq = FOX_NEW(float, size), *dk = FOX_NEW(float, size), *dv = FOX_NEW(float, size);
    float *qkv[4], *lse = FOX_NEW(float, T), *dlog_f = FOX_NEW(float, T);
    const float *from[] = {a->q, a->k, a->v, a->dout};
    double *c = FOX_NEW(double, T), *dc = FOX_NEW(double, T), sum = 0;
    for (int n = 0; n < 4; n++) {
        qkv[n] = FOX_NEW(float, size);
        for (int i = 0; i < T; i++) {
            memcpy(qkv[n] + i * D, from[n] + at + i * d, sizeof(float) * (size_t)D);
        }
    }
    for (int i = 0; i < T; i++) {
        sum += (double)a->log_f[row + i];
        c[i] = sum;
    }
    double c_error = 0;
    for (int i = 0; i < T; i++) {
        c_error = worse(c_error, fabs(a->c[row + i] - c[i]));
    }
    check_error(t, name, c_error, 1e-9);
    AcpHead head = {T, D, qkv[0], qkv[1], D, c};
    attention_check_ranges(t, a, name, bh, &head);

    for (int i = 0; i < blocks; i++) {
        first[i] = a->first[(int64_t)bh * acp_blocks(T, ACP_TEST_BLOCK) + i / 2] * 2;
    }
    attention_head_forward(o, lse, qkv[0], qkv[1], qkv[2], c, first, T, D, D);
    attention_head_backward(dq, dk, dv, dc, qkv[3], qkv[0], qkv[1], qkv[2], c, o, lse, first, T, D, D);
    sum = 0;
    for (int i = T - 1; i >= 0; i--) {
        sum += dc[i];
        dlog_f[i] = (float)sum;
    }
    const float *gpu[] = {a->o, a->dq, a->dk, a->dv}, *cpu[] = {o, dq, dk, dv};
    double *largest[] = {&worst->o, &worst->dq, &worst->dk, &worst->dv};
    /* delta of a row comes from O in bf16, off by about 2^-9 sqrt(D) whatever the row's gradient: with two keys, one of
     * them dominant, dq = p (dP - delta) k / sqrt(D) is smaller than that error's share. From 64 rows on the others outweigh
     * such rows: of 1,440 heads of 64 to 127 rows in the emulated kernels (make emulated) the worst dq was off by 5.6e-3, of
     * 24 of 200 and 333 rows by 4.2e-3 */
    bool small = T < 64;
    double units[] = {0.03, small ? 0.4 : 0.03, 0.03, 0.03}, allowed[] = {4e-3, small ? 6e-3 : 8e-3, 6e-3, 5e-3};
    static const char *const names[] = {"o", "dq", "dk", "dv"};
    float *copy = FOX_NEW(float, size);
    for (int n = 0; n < 4; n++) {
        for (int i = 0; i < T; i++) {
            memcpy(copy + i * D, gpu[n] + at + i * d, sizeof(float) * (size_t)D);
        }
        double error = attention_error(copy, cpu[n], size, units[n], largest[n]);
        check(t, error <= allowed[n], "%s, head %d: %s off by %.3g", name, bh, names[n], error);
    }
    double lse_error = max_error(a->lse + row, lse, T),
           gate_error = attention_error(a->dlog_f + row, dlog_f, T, 0.03, &worst->dlog_f);
    worst->lse = worse(worst->lse, lse_error);
    check(t, lse_error <= 2e-4, "%s, head %d: lse off by %.3g", name, bh, lse_error);
    check(t, gate_error <= 2e-3, "%s, head %d: d log f off by %.3g", name, bh, gate_error);
    void *all[] = {o, dq, dk, dv, qkv[0], qkv[1], qkv[2], qkv[3], lse, dlog_f, c, dc, first, copy};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
}

static void attention_case_gpu(Tests *t, AttentionCase *a, AttentionErrors *worst, double kept[2]) {
    char name[200];
    int blocks = acp_blocks(a->shape.T, ACP_TEST_BLOCK), BH = a->shape.B * a->shape.H, H = a->shape.H;
    attention_name(a, name, sizeof name);
    attention_fill(a);
    uint64_t hash = attention_run(a);
    attention_free_outputs(a);
    a->graph = true;
    check(t, attention_run(a) == hash, "%s: a second run, from a CUDA graph, differs", name);
    unsigned long long *skipped = FOX_NEW(unsigned long long, H);
    for (int bh = 0; bh < BH; bh++) {
        skipped[bh % H] += (unsigned long long)acp_skipped_blocks(blocks, a->first + (int64_t)bh * blocks);
        if (a->shape.T < 1000 || bh == 0 || bh == BH - 1) {
            attention_check_head(t, a, name, bh, worst);
        }
    }
    unsigned long long causal =
        (unsigned long long)(acp_causal_blocks(a->shape.T, ACP_TEST_BLOCK, ACP_TEST_BLOCK) * a->shape.B);
    for (int h = 0; h < H; h++) {
        check(t, a->skipped[h] == skipped[h] && a->total[h] == causal,
              "%s: head %d counts %llu of %llu blocks, %llu of %llu expected", name, h, a->skipped[h], a->total[h],
              skipped[h], causal);
        kept[0] += (double)(a->total[h] - a->skipped[h]);
        kept[1] += (double)a->total[h];
    }
    free(skipped);
    attention_free_outputs(a);
    attention_free_inputs(a);
}

static AttentionCase attention_case_of(int B, int T, int H, int D, AcpMode mode, int gates, uint64_t seed) {
    AttentionCase a;
    memset(&a, 0, sizeof a);
    a.shape.B = B;
    a.shape.T = T;
    a.shape.H = H;
    a.shape.D = D;
    a.shape.mode = mode;
    a.shape.log_tolerance = -10;
    a.gates = gates;
    a.seed = 1000003 * seed + (uint64_t)(T + D + B + H);
    a.norms = seed % 3 != 0;
    a.large = seed % 6 == 0;
    a.packed = seed % 2 == 0;
    a.shape.shared_norm = seed % 5 == 0;
    a.shape.portable = seed % 7 == 1 || seed % 7 == 2;
    return a;
}

/* Every kind of gate on every length; shapes and layouts vary with them. And so many heads that there are more tiles than
 * multiprocessors: thread blocks that stay take several. */
static void test_attention_grid(Tests *t) {
    static const int lengths[] = {1, 2, 63, 64, 65, 127, 128, 129, 200, 1000, 4097};
    static const char *const modes[] = {"off", "paper", "tight"};
    for (int mode = 0; mode < 3; mode++) {
        AttentionErrors worst = {0, 0, 0, 0, 0, 0};
        double kept[2] = {0, 0};
        uint64_t seed = 1;
        for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i += t->quick ? 4 : 1) { /* quick: 1, 65, 200 */
            for (int gates = 0; gates <= GATES_SPREAD; gates++) {
                int T = lengths[i], B = T < 4097 && seed % 2 ? 3 : 1, H = seed % 4 < 2 || gates == GATES_SPREAD ? 5 : 1;
                AttentionCase a = attention_case_of(B, T, H, seed / 2 % 2 ? 128 : 64, (AcpMode)mode, gates, seed);
                attention_case_gpu(t, &a, &worst, kept);
                seed++;
            }
        }
        for (int D = 64; D <= 128; D += 64) {
            AttentionCase a = attention_case_of(3, 333, 70, D, (AcpMode)mode, GATES_MIXED, (uint64_t)(10 + D / 64));
            attention_case_gpu(t, &a, &worst, kept);
        }
        check(t, mode == ACP_OFF ? kept[0] == kept[1] : t->quick || kept[0] < 0.8 * kept[1],
              "acp %s keeps %g of %g blocks", modes[mode], kept[0], kept[1]);
        printf("attention, acp %-5s o %.1e, lse %.1e, dq %.1e, dk %.1e, dv %.1e, d log f %.1e; %.1f%% of the blocks "
               "kept\n",
               modes[mode], worst.o, worst.lse, worst.dq, worst.dk, worst.dv, worst.dlog_f, 100 * kept[0] / kept[1]);
    }
}

/* One head of a long sequence in double, over the last WINDOW keys before a row: what lies further back weighs nothing.
 * */
enum { ATTENTION_WINDOW = 400 };

static int attention_row(const AttentionCase *a, const double *c, int h, int i, double *p, double *o, double *lse) {
    int D = a->shape.D, start = i > ATTENTION_WINDOW ? i - ATTENTION_WINDOW : 0;
    int64_t d = a->shape.H * D;
    double high = -INFINITY, total = 0;
    memset(o, 0, sizeof(double) * (size_t)D);
    for (int j = start; j <= i; j++) {
        p[j - start] = acp_dot(a->q + i * d + h * D, a->k + j * d + h * D, D) / sqrt((double)D) + c[i] - c[j];
        high = fmax(high, p[j - start]);
    }
    for (int j = start; j <= i; j++) {
        p[j - start] = exp(p[j - start] - high);
        total += p[j - start];
    }
    for (int j = start; j <= i; j++) {
        p[j - start] /= total;
        for (int x = 0; x < D; x++) {
            o[x] += p[j - start] * (double)a->v[j * d + h * D + x];
        }
    }
    *lse = high + log(total);
    return start;
}

/* d log f at t: sum of dS over queries from t on and keys before t. */
static double attention_gate_gradient(const AttentionCase *a, const double *c, int h, int t) {
    int D = a->shape.D, T = a->shape.T;
    int64_t d = a->shape.H * D;
    double p[ATTENTION_WINDOW + 1], o[128], lse, sum = 0;
    for (int i = t; i < T && i < t + ATTENTION_WINDOW; i++) {
        const float *dout = a->dout + i * d + h * D;
        double delta = 0, before = 0;
        int start = attention_row(a, c, h, i, p, o, &lse);
        for (int x = 0; x < D; x++) {
            delta += (double)dout[x] * o[x];
        }
        for (int j = start; j < t; j++) {
            before += p[j - start] * (acp_dot(dout, a->v + j * d + h * D, D) - delta);
        }
        sum += before;
    }
    return sum;
}

/* c reaches 45,000 and 86,000: differences of neighbours must keep their precision. */
static void test_attention_long(Tests *t) {
    static const int kinds[] = {GATES_HALF, GATES_STRONG};
    int T = t->quick ? 1536 : 65536, rows = 60;
    for (int kind = 0; kind < 2; kind++) {
        AttentionCase a =
            attention_case_of(1, T, 2, kind == 0 ? 64 : 128, kind == 0 ? ACP_OFF : ACP_TIGHT, kinds[kind], 14);
        int D = a.shape.D, H = a.shape.H;
        char name[200];
        attention_name(&a, name, sizeof name);
        attention_fill(&a);
        attention_run(&a);
        double *c = FOX_NEW(double, T), lse_error = 0, diff[2] = {0, 0}, norm[2] = {0, 0};
        for (int i = 0; i < T; i++) {
            c[i] = (i > 0 ? c[i - 1] : 0) + (double)a.log_f[T + i]; /* head 1 */
        }
        for (int r = 0; r < rows; r++) {
            int i = r < rows / 2 ? T - 1 - r * 37 : (int)(fox_random(5, (uint64_t)r) % (uint64_t)T);
            double p[ATTENTION_WINDOW + 1], o[128], lse, gate = attention_gate_gradient(&a, c, 1, i);
            attention_row(&a, c, 1, i, p, o, &lse);
            lse_error = worse(lse_error, fabs((double)a.lse[T + i] - lse));
            for (int x = 0; x < D; x++) {
                diff[0] += pow((double)a.o[(int64_t)i * H * D + D + x] - o[x], 2);
                norm[0] += o[x] * o[x];
            }
            diff[1] += pow((double)a.dlog_f[T + i] - gate, 2);
            norm[1] += gate * gate;
        }
        double o_error = sqrt(diff[0] / norm[0]), gate_error = sqrt(diff[1] / norm[1]);
        printf("%s: c ends at %.0f; %d rows in double: o %.1e, lse %.1e, d log f %.1e\n", name, c[T - 1], rows, o_error,
               lse_error, gate_error);
        check_error(t, name, o_error, 2e-3);
        check_error(t, name, gate_error, 2e-3);
        check_error(t, name, lse_error, 2e-4);
        free(c);
        attention_free_outputs(&a);
        attention_free_inputs(&a);
    }
}

/* Whether this chip has kernels of its own: it is a Hopper, and the program was built with the code for it. */
static bool attention_own_kernels(void) {
#ifdef FOX_HOPPER
    int device, major, minor;
    attention_cuda(cudaGetDevice(&device));
    attention_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    attention_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return major == 9 && minor == 0;
#else
    return false;
#endif
}

/* Where there are kernels for the chip itself: they are used, and the same as the ones for every chip, far from the diagonal
 * as well. They sum in another order, so with weak gates a part of the bits of o and dq differs: where none does, the same
 * kernels ran twice. */
static void test_attention_portable(Tests *t) {
    int T = t->quick ? 700 : 16384;
    if (!attention_own_kernels()) {
        skip(t, "attention: Hopper's kernels against the portable ones: another chip, or built without 90a");
        return;
    }
    for (int i = 0; i < 4; i++) {
        AttentionCase a = attention_case_of(1, T, 2, i < 2 ? 64 : 128, i % 2 ? ACP_PAPER : ACP_OFF, GATES_WEAK, 14), b;
        AttentionErrors worst = {0, 0, 0, 0, 0, 0};
        int64_t N = (int64_t)T * a.shape.H * a.shape.D, rows = (int64_t)T * a.shape.H;
        char name[200];
        attention_name(&a, name, sizeof name);
        attention_fill(&a);
        b = a;
        b.shape.portable = true;
        uint64_t own = attention_run(&a), portable = attention_run(&b);
        check(t, own != portable, "%s: Hopper's kernels are not used: the same bits as from the portable ones", name);
        attention_error(a.o, b.o, N, 0, &worst.o);
        attention_error(a.dq, b.dq, N, 0, &worst.dq);
        attention_error(a.dk, b.dk, N, 0, &worst.dk);
        attention_error(a.dv, b.dv, N, 0, &worst.dv);
        attention_error(a.dlog_f, b.dlog_f, rows, 0, &worst.dlog_f);
        worst.lse = max_error(a.lse, b.lse, rows);
        printf("%s, against portable: o %.1e, lse %.1e, dq %.1e, dk %.1e, dv %.1e, d log f %.1e\n", name, worst.o, worst.lse,
               worst.dq, worst.dk, worst.dv, worst.dlog_f);
        check_error(t, name, worst.o, 3e-3);
        check_error(t, name, worst.lse, 1e-4);
        check_error(t, name, worse(worst.dq, worse(worst.dk, worst.dv)), 4e-3);
        check_error(t, name, worst.dlog_f, 2e-3);
        attention_free_outputs(&a);
        attention_free_outputs(&b);
        attention_free_inputs(&a);
    }
}

static void test_cuda_attention(Tests *t) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        skip_without_gpus(t, 1, "attention on a GPU: none here");
        return;
    }
    test_attention_portable(t);
    test_attention_grid(t);
    test_attention_long(t);
}

#endif

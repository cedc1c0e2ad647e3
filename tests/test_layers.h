/* Tests of the model on the CPU: gemm, gradients, attention against a naive one, the fixtures, decoding. */
#ifndef FOX_TESTS_LAYERS_H
#define FOX_TESTS_LAYERS_H

#include "../cpu/decode.h"
#include "check.h"
#include "gradients.h"
#include "naive_attention.h"

#ifdef _OPENMP
#include <omp.h>
#endif

/* A random configuration: every switch of FoxConfig by coin, small sizes. */
static FoxConfig random_config(uint64_t seed) {
    static const int widths[] = {16, 32, 48, 64};
    FoxConfig c;
    memset(&c, 0, sizeof c);
    uint64_t bits = fox_random(seed, 0);
    c.vocab_size = 20 + (int)(bits % 50);
    c.hidden_size = widths[bits >> 8 & 3];
    c.num_hidden_layers = 1 + (int)(bits >> 12 & 1);
    c.num_heads = (bits >> 16 & 1) ? 2 : 4;
    c.intermediate_size = 16 * (1 + (int)(bits >> 20 & 3));
    c.hidden_ratio = 4;
    c.use_forget_gate = (bits >> 24 & 3) != 0;
    c.use_rope = (bits >> 26 & 1) || !c.use_forget_gate;
    c.use_output_gate = bits >> 27 & 1;
    c.use_output_norm = bits >> 28 & 1;
    c.qk_norm = bits >> 29 & 1;
    c.qk_norm_share_param_across_head = c.qk_norm && (bits >> 30 & 1);
    c.use_k_shift = bits >> 31 & 1;
    c.use_v_shift = bits >> 32 & 1;
    c.rope_base = 1000;
    c.norm_eps = 1e-6;
    return c;
}

static FoxConfig pro_config(int vocab, int d, int layers, int heads) {
    FoxConfig c;
    memset(&c, 0, sizeof c);
    c.vocab_size = vocab;
    c.hidden_size = d;
    c.num_hidden_layers = layers;
    c.num_heads = heads;
    c.intermediate_size = 2 * d;
    c.hidden_ratio = 3.5;
    c.use_forget_gate = c.use_output_gate = c.use_output_norm = c.qk_norm = c.use_k_shift = c.use_v_shift = true;
    c.rope_base = 500000;
    c.norm_eps = 1e-6;
    return c;
}

static void random_tokens(int32_t *tokens, int64_t count, int vocab, uint64_t seed) {
    for (int64_t i = 0; i < count; i++) {
        tokens[i] = (int32_t)(fox_random(seed, (uint64_t)i) % (uint64_t)vocab);
    }
}

static float *random_normals(int64_t count, double mean, double deviation, uint64_t seed) {
    float *x = FOX_NEW(float, count);
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)(mean + deviation * fox_normal(seed, (uint64_t)i));
    }
    return x;
}

/* A float32 model with its own parameters, tokens and buffers. */
typedef struct TestModel {
    FoxTable table;
    FoxModel model;
    float *params, *grads, *losses;
    int32_t *tokens, *targets;
} TestModel;

static void test_model_init(TestModel *m, const FoxConfig *config, int B, int T, bool recompute, uint64_t seed) {
    m->table = fox_table_create(config);
    m->params = FOX_NEW(float, m->table.total);
    m->grads = FOX_NEW(float, m->table.total);
    m->losses = FOX_NEW(float, B * T);
    m->tokens = FOX_NEW(int32_t, B * T);
    m->targets = FOX_NEW(int32_t, B * T);
    m->model = fox_model_create(config, &m->table, m->params, m->grads, B, T, recompute);
    random_tokens(m->tokens, B * T, config->vocab_size, seed);
    random_tokens(m->targets, B * T, config->vocab_size, seed + 1);
    fox_init_parameters(&m->table, seed, m->params);
    for (int64_t i = 0; i < m->table.total; i++) {
        m->params[i] *= 4; /* weights large enough for every path to matter */
    }
}

static void test_model_free(TestModel *m) {
    fox_model_free(&m->model);
    fox_table_free(&m->table);
    free(m->params);
    free(m->grads);
    free(m->losses);
    free(m->tokens);
    free(m->targets);
}

static void test_model_run(TestModel *m, AcpMode acp, double log_tolerance) {
    int N = m->model.B * m->model.T;
    m->model.acp = acp;
    m->model.log_tolerance = (float)log_tolerance;
    memset(m->grads, 0, sizeof(float) * (size_t)m->table.total);
    fox_forward_backward(&m->model, m->tokens, m->targets, m->losses, 1.0f / (float)N);
}

/* ---- matrix product ---- */

static void test_gemm(Tests *t) {
    for (uint64_t trial = 0; trial < 60; trial++) {
        int64_t size[3];
        for (uint64_t i = 0; i < 3; i++) {
            size[i] = 1 + (int64_t)(fox_random(trial, i) % (trial % 3 == 0 ? 600 : 70));
        }
        int64_t M = size[0], N = size[1], K = size[2], ldc = N + (int64_t)(trial % 4);
        float *a = random_normals(M * K, 0, 1, trial + 1), *b = random_normals(K * N, 0, 1, trial + 2);
        float *c = random_normals(M * ldc, 0, 1, trial + 3), *ref = FOX_NEW(float, M * ldc);
        MatrixView A = trial & 1 ? matrix(a, K) : transposed(a, M), B = trial & 2 ? matrix(b, N) : transposed(b, K);
        float alpha = 0.5f, beta = trial % 3 == 0 ? 0 : 1.5f;
        for (int64_t i = 0; i < M; i++) {
            for (int64_t j = 0; j < ldc; j++) {
                double sum = 0;
                for (int64_t k = 0; k < K && j < N; k++) {
                    sum += (double)A.data[i * A.row + k * A.col] * (double)B.data[k * B.row + j * B.col];
                }
                double old = (double)c[i * ldc + j];
                ref[i * ldc + j] = (float)(j < N ? 0.5 * sum + (double)beta * old : old);
            }
        }
        if (beta == 0) {
            c[0] = NAN; /* must not be read */
        }
        gemm(M, N, K, alpha, A, B, beta, c, ldc);
        check_error(t, "gemm", relative_error(c, ref, M * ldc), 2e-6);
        free(a);
        free(b);
        free(c);
        free(ref);
    }
}

/* ---- gradients of every variant, in double precision ---- */

static void test_gradients(Tests *t) {
    int cases = t->quick ? 6 : 40;
    double worst_of_all = 0;
    for (int i = 0; i < cases; i++) {
        GradientCase test;
        char worst[80] = "";
        test.config = random_config((uint64_t)i);
        test.B = 1 + i % 2;
        test.T = i % 5 == 0 ? 130 : i % 5 == 1 ? 1 : 2 + i;
        test.recompute = i % 3 == 0;
        test.acp = i % 3;
        test.log_tolerance = -30;
        test.seed = 100 + (uint64_t)i;
        double error = gradients_check(&test, worst);
        worst_of_all = worse(worst_of_all, error);
        check(t, error <= 2e-5, "gradient of %s by finite differences, configuration %d: error %.3g", worst, i, error);
    }
    printf("gradients by finite differences in double precision: %d configurations, worst error %.2g\n", cases, worst_of_all);
}

static double flat_length(const float *x, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += (double)x[i] * (double)x[i];
    }
    return sqrt(sum);
}

/* The float32 model against the same source in double precision. */
static void test_float_model(Tests *t) {
    for (int i = 0; i < (t->quick ? 3 : 10); i++) {
        FoxConfig config = random_config(50 + (uint64_t)i);
        int B = 2, T = 1 + 37 * (i % 5);
        TestModel m;
        test_model_init(&m, &config, B, T, i % 2 == 1, (uint64_t)i);
        float *losses = FOX_NEW(float, B * T), *grads = FOX_NEW(float, m.table.total);
        gradients_truth(&config, m.params, m.tokens, m.targets, B, T, losses, grads);
        test_model_run(&m, ACP_OFF, -10);
        check_error(t, "float32 losses against double", max_error(m.losses, losses, B * T), 1e-4);
        double whole = flat_length(grads, m.table.total);
        for (int k = 0; k < m.table.count; k++) {
            const FoxTensor *tensor = &m.table.tensors[k];
            const float *ref = grads + tensor->offset;
            /* A gradient that cancels to nothing (values before an output norm at T = 1) is judged against the whole. */
            double error = relative_error(m.grads + tensor->offset, ref, tensor->size);
            error *= flat_length(ref, tensor->size) / fmax(flat_length(ref, tensor->size), 1e-3 * whole);
            check(t, error <= 2e-4, "float32 gradient of %s against double: error %.3g", tensor->name, error);
        }
        free(losses);
        free(grads);
        test_model_free(&m);
    }
}

/* Recomputation, the number of threads and the split into batches change nothing. */
static void test_invariances(Tests *t) {
    FoxConfig config = pro_config(61, 64, 3, 2);
    int B = 2, T = 150;
    TestModel a, b, half;
    test_model_init(&a, &config, B, T, false, 7);
    test_model_init(&b, &config, B, T, true, 7);
    size_t bytes = sizeof(float) * (size_t)a.table.total;
    test_model_run(&a, ACP_PAPER, -10);
    test_model_run(&b, ACP_PAPER, -10);
    check(t, memcmp(a.grads, b.grads, bytes) == 0, "recomputed activations give the same gradients, bit for bit");
    for (int i = 0; i < config.num_hidden_layers * config.num_heads; i++) {
        check(t, a.model.total[i] > 0 && a.model.total[i] == b.model.total[i] && a.model.skipped[i] == b.model.skipped[i],
              "head %d: %g of %g blocks skipped, with recomputation %g of %g", i, a.model.skipped[i], a.model.total[i],
              b.model.skipped[i], b.model.total[i]);
    }
#ifdef _OPENMP
    int threads = omp_get_max_threads();
    omp_set_num_threads(threads == 1 ? 3 : 1);
    test_model_run(&b, ACP_PAPER, -10);
    omp_set_num_threads(threads);
    check(t, memcmp(a.grads, b.grads, bytes) == 0, "another number of threads gives the same gradients, bit for bit");
#else
    skip(t, "layers: another number of threads: built without OpenMP");
#endif
    test_model_init(&half, &config, 1, T, false, 7);
    memset(half.grads, 0, bytes);
    for (int i = 0; i < B; i++) {
        fox_forward_backward(&half.model, a.tokens + i * T, a.targets + i * T, half.losses, 1.0f / (float)(B * T));
        check_error(t, "losses do not depend on the batch", max_error(half.losses, a.losses + i * T, T), 1e-6);
    }
    check_error(t, "gradients of two micro-batches add up", relative_error(half.grads, a.grads, a.table.total), 1e-5);
    test_model_free(&a);
    test_model_free(&b);
    test_model_free(&half);
}

/* ---- attention against the definition ---- */

/* Relative, but no smaller unit than 0.03 per element: at T = 1 the gradients of q and k are zero. */
static double error_against(const float *a, const double *ref, int64_t count) {
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        diff += ((double)a[i] - ref[i]) * ((double)a[i] - ref[i]);
        norm += ref[i] * ref[i];
    }
    return sqrt(diff / fmax(norm, 1e-3 * (double)count));
}

/* T long enough for blocks to be pruned; strong, weak and mixed gates, and one that closes and opens again. */
static void attention_case(Tests *t, int T, int D, int gates, AcpMode acp, uint64_t seed, double *skipped, double *total) {
    float *q = random_normals(T * D, 0, 1, seed), *k = random_normals(T * D, 0, 1, seed + 1), *v = random_normals(T * D, 0, 1, seed + 2);
    float *dout = random_normals(T * D, 0, 1, seed + 3), *o = FOX_NEW(float, T * D), *lse = FOX_NEW(float, T), *f = FOX_NEW(float, T);
    float *dq = FOX_NEW(float, T * D), *dk = FOX_NEW(float, T * D), *dv = FOX_NEW(float, T * D), *df = FOX_NEW(float, T);
    double *c = FOX_NEW(double, T), *dc = FOX_NEW(double, T), *logf = FOX_NEW(double, T);
    float bias[1] = {0}, dbias[1] = {0};
    int blocks = acp_blocks(T, FOX_BLOCK), *first = FOX_NEW(int, blocks);
    for (int i = 0; i < T; i++) {
        double x = fox_normal(seed + 4, (uint64_t)i);
        f[i] = (float)(gates == 0 ? x : gates == 1 ? x + 3 : gates == 2 ? 6 * x : i / 100 % 2 ? 12 : i % 100 == 50 ? -100 : 8);
        logf[i] = fox_log_sigmoid((double)f[i]);
    }
    forget_gate_forward(c, f, bias, 1, T, 1);
    AcpHead head = {T, D, q, k, D, c};
    AcpNorms most = acp_norms_measured(&head);
    if (acp == ACP_PAPER) {
        acp_first_blocks_paper(T, c, acp_threshold(acp_bound(most, D), T, -10), FOX_BLOCK, FOX_BLOCK, first);
    } else if (acp == ACP_TIGHT) {
        acp_first_blocks_tight(&head, most, -10, FOX_BLOCK, FOX_BLOCK, first);
    }
    *skipped += (double)acp_skipped_blocks(blocks, first);
    *total += (double)acp_causal_blocks(T, FOX_BLOCK, FOX_BLOCK);

    attention_head_forward(o, lse, q, k, v, c, first, T, D, D);
    attention_head_backward(dq, dk, dv, dc, dout, q, k, v, c, o, lse, first, T, D, D);
    forget_gate_backward(df, dbias, dc, f, 1, T, 1);
    NaiveAttention n = naive_attention(q, k, v, logf, dout, T, D, NULL, 0);
    for (int i = 0; i < T; i++) {
        n.dlogf[i] /= 1 + exp((double)f[i]); /* by the logit */
    }
    /* Pruned mass of at most e^-10 = 4.5e-5 per row moves outputs by that order; float32 alone by 1e-6. */
    double allowed = acp == ACP_OFF ? 5e-6 : 1.2e-4;
    check_error(t, "attention o", error_against(o, n.o, T * D), allowed);
    check_error(t, "attention dq", error_against(dq, n.dq, T * D), 2 * allowed);
    check_error(t, "attention dk", error_against(dk, n.dk, T * D), 2 * allowed);
    check_error(t, "attention dv", error_against(dv, n.dv, T * D), allowed);
    check_error(t, "attention d log f", error_against(df, n.dlogf, T), 5 * allowed);
    float *all[] = {q, k, v, dout, o, lse, f, dq, dk, dv, df};
    double *doubles[] = {c, dc, logf};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
    for (size_t i = 0; i < sizeof doubles / sizeof doubles[0]; i++) {
        free(doubles[i]);
    }
    naive_attention_free(&n);
    free(first);
}

static void test_attention(Tests *t) {
    static const int lengths[] = {1, 2, 63, 64, 65, 128, 200, 1000, 1500};
    for (int acp = 0; acp < 3; acp++) {
        double skipped = 0, total = 0;
        for (int i = 0; i < (t->quick ? 7 : 9); i++) {
            for (int gates = 0; gates < 4; gates++) {
                attention_case(t, lengths[i], gates == 1 && lengths[i] < 1000 ? 64 : 16, gates, (AcpMode)acp, (uint64_t)(1000 * acp + 10 * i + gates),
                               &skipped, &total);
            }
        }
        check(t, acp == ACP_OFF ? skipped == 0 : t->quick || skipped > 0.3 * total, "mode %d skips %g of %g blocks", acp, skipped,
              total);
        printf("attention against the double-precision definition, acp %s: %.1f%% of the blocks skipped\n",
               acp == 0 ? "off" : acp == 1 ? "paper" : "tight", 100 * skipped / total);
    }
}

/* The whole model, heads that forget at very different speeds: pruning must not change losses and gradients beyond its
 * bound, and the fast heads must be the ones that are pruned. */
static void test_model_pruning(Tests *t) {
    FoxConfig config = pro_config(67, 64, 2, 4);
    int B = 2, T = 900, H = config.num_heads;
    TestModel m;
    test_model_init(&m, &config, B, T, false, 3);
    for (int l = 0; l < config.num_hidden_layers; l++) {
        float *bias = fox_layer_weights(&m.table, l, m.params).fgate_bias;
        for (int h = 0; h < H; h++) {
            bias[h] = (float)(-1 + 4 * h); /* -1, 3, 7, 11 */
        }
    }
    test_model_run(&m, ACP_OFF, -10);
    float *losses = FOX_NEW(float, B * T), *grads = FOX_NEW(float, m.table.total);
    memcpy(losses, m.losses, sizeof(float) * (size_t)(B * T));
    memcpy(grads, m.grads, sizeof(float) * (size_t)m.table.total);
    for (int acp = ACP_PAPER; acp <= ACP_TIGHT; acp++) {
        memset(m.model.skipped, 0, sizeof(double) * (size_t)(2 * H));
        memset(m.model.total, 0, sizeof(double) * (size_t)(2 * H));
        test_model_run(&m, (AcpMode)acp, -10);
        check_error(t, "losses with pruning", max_error(m.losses, losses, B * T), 1e-3);
        check_error(t, "gradients with pruning", relative_error(m.grads, grads, m.table.total), 1e-3);
        const double *skipped = m.model.skipped;
        check(t, skipped[0] > 0.5 * m.model.total[0] && skipped[0] > skipped[H - 1], "the fast head is pruned: %g of %g, slow head %g",
              skipped[0], m.model.total[0], skipped[H - 1]);
    }
    free(losses);
    free(grads);
    test_model_free(&m);
}

/* ---- decoding ---- */

/* Decoding token by token gives the losses of the forward pass; with pruning, within its bound, from a smaller cache. */
static void test_decoding(Tests *t) {
    for (int i = 0; i < (t->quick ? 3 : 12); i++) {
        FoxConfig config = i < 2 ? pro_config(41, 64, 2, 2) : random_config(200 + (uint64_t)i);
        int T = i < 2 ? 400 : 90, live = 0, heads = config.num_hidden_layers * config.num_heads;
        TestModel m;
        test_model_init(&m, &config, 1, T, false, 20 + (uint64_t)i);
        float *logits = FOX_NEW(float, config.vocab_size), *losses = FOX_NEW(float, T);
        m.model.acp = ACP_OFF;
        fox_forward(&m.model, m.tokens, m.targets, m.losses);
        m.model.acp = i == 1 ? ACP_PAPER : ACP_OFF;
        FoxDecoder decoder = fox_decoder_create(&m.model, T);
        for (int n = 0; n < T; n++) {
            fox_decode(&decoder, m.tokens[n], logits);
            cross_entropy(losses + n, logits, m.targets + n, 1, config.vocab_size, 0);
        }
        for (int h = 0; h < heads; h++) {
            live += decoder.heads[h].end - decoder.heads[h].start;
        }
        check_error(t, "losses of decoding", max_error(losses, m.losses, T), i == 1 ? 1e-3 : 2e-4);
        check(t, i == 1 ? live < heads * T / 2 : live == heads * T, "decoding keeps %d of %d keys", live, heads * T);
        fox_decoder_free(&decoder);
        free(logits);
        free(losses);
        test_model_free(&m);
    }
}

/* ---- the back end: accumulation, AdamW, the refusal of a non-finite step ---- */

/* One step of AdamW as PyTorch documents it, in double precision. */
static void naive_adamw(double *p, double *m, double *v, double g, const AdamW *a, bool decay) {
    *p -= decay ? a->learning_rate * a->weight_decay * *p : 0;
    *m = a->beta1 * *m + (1 - a->beta1) * g;
    *v = a->beta2 * *v + (1 - a->beta2) * g * g;
    double mhat = *m / (1 - pow(a->beta1, (double)a->step)), vhat = *v / (1 - pow(a->beta2, (double)a->step));
    *p -= a->learning_rate * mhat / (sqrt(vhat) + a->eps);
}

static void test_backend(Tests *t) {
    BackendSpec spec;
    Backend b;
    FoxError err = {{0}};
    Ranks ranks = RANKS_ALONE;
    memset(&spec, 0, sizeof spec);
    spec.config = pro_config(53, 32, 1, 2);
    spec.B = 2;
    spec.T = 20;
    spec.log_tolerance = -10;
    if (!check(t, backend_cpu_open(&b, &spec, &ranks, &err) && b.allocate(&b, &err), "back end: %s", err.text)) {
        return;
    }
    int64_t total = b.table.total;
    float *params = FOX_NEW(float, total), *grads = FOX_NEW(float, total), *after = FOX_NEW(float, total), losses[40];
    double *p = FOX_NEW(double, total), *m = FOX_NEW(double, total), *v = FOX_NEW(double, total);
    int32_t tokens[40], targets[40];
    AdamW adamw = {1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5, 0};
    StepStats stats;
    fox_init_parameters(&b.table, 5, params);
    b.write(&b, FOX_PARAMS, 0, total, params);
    for (int64_t i = 0; i < total; i++) {
        p[i] = (double)params[i];
    }
    for (adamw.step = 1; adamw.step <= 3; adamw.step++) {
        double loss = 0, norm = 0;
        for (int micro = 0; micro < 2; micro++) {
            random_tokens(tokens, 40, 53, (uint64_t)(10 * adamw.step + micro));
            random_tokens(targets, 40, 53, (uint64_t)(10 * adamw.step + micro + 5));
            b.forward_backward(&b, tokens, targets, 0.5);
            b.evaluate(&b, tokens, targets, losses);
            for (int n = 0; n < 40; n++) {
                loss += (double)losses[n] / 80;
            }
        }
        b.read(&b, FOX_GRADS, 0, total, grads);
        for (int64_t i = 0; i < total; i++) {
            norm += (double)grads[i] * (double)grads[i];
        }
        norm = sqrt(norm);
        for (int k = 0; k < b.table.count; k++) {
            const FoxTensor *tensor = &b.table.tensors[k];
            for (int64_t i = tensor->offset; i < tensor->offset + tensor->size; i++) {
                double g = (double)grads[i] * (norm > 0.5 ? 0.5 / norm : 1);
                naive_adamw(&p[i], &m[i], &v[i], g, &adamw, tensor->ndim == 2);
            }
        }
        b.update(&b, &adamw, &stats);
        check(t, fabs(stats.loss - loss) <= 1e-6 && fabs(stats.grad_norm - norm) <= 1e-6 * norm && stats.applied,
              "step %d: loss %.8f (expected %.8f), norm %.8f (expected %.8f)", (int)adamw.step, stats.loss, loss, stats.grad_norm,
              norm);
    }
    b.read(&b, FOX_PARAMS, 0, total, after);
    for (int64_t i = 0; i < total; i++) {
        grads[i] = (float)p[i];
    }
    check_error(t, "parameters after three steps of AdamW", relative_error(after, grads, total), 1e-6);
    check(t, relative_error(after, params, total) > 0.01, "AdamW moved the parameters");

    float nan = NAN;
    b.write(&b, FOX_GRADS, 7, 1, &nan);
    b.update(&b, &adamw, &stats);
    b.read(&b, FOX_PARAMS, 0, total, params);
    b.read(&b, FOX_GRADS, 0, total, grads);
    check(t, !stats.applied && memcmp(params, after, sizeof(float) * (size_t)total) == 0, "a NaN gradient changes no parameter");
    check(t, max_error(grads, grads, total) == 0 && grads[7] == 0, "and leaves the gradients zero");
    free(params);
    free(grads);
    free(after);
    free(p);
    free(m);
    free(v);
    b.free(&b);
}

static void test_layers(Tests *t) {
    test_gemm(t);
    test_gradients(t);
    test_float_model(t);
    test_invariances(t);
    test_attention(t);
    test_model_pruning(t);
    test_decoding(t);
    test_backend(t);
}

#endif

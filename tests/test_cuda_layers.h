/* Every kernel of cuda/ but attention and matrix products against the layers of fox_layers.h, on random inputs.
 *
 * Inputs are rounded to bf16 first where the kernel reads bf16, so the two see the same numbers. Each case runs twice
 * from the same inputs and must give the same bits; outputs start as NaN, and the bytes around each buffer survive. */
#ifndef FOX_TESTS_CUDA_LAYERS_H
#define FOX_TESTS_CUDA_LAYERS_H

#include "../cuda/launchers.h"
#include "../fox_layers.h"
#include "check.h"

enum { GPU_GUARD = 256, GPU_BUFFERS = 40 };

/* Tolerances of ||out - ref|| / ||ref||: bf16 has 8 bits, sums of float32 have 20. */
#define GPU_BF16       3e-3
#define GPU_BF16_ALONE 4e-3 /* one value alone is rounded by up to 2^-8 */
#define GPU_FLOAT      1e-5

/* Device memory of one case. Every buffer lies between guards; all bytes start as 0xff, which is NaN. */
typedef struct Gpu {
    Tests *t;
    const char *what; /* names the case in failures */
    uint64_t seed;    /* of the next random input */
    int count;
    struct {
        char *base;
        size_t bytes;
        bool scratch; /* its bytes may differ from run to run */
    } buffer[GPU_BUFFERS];
} Gpu;

static void gpu_require(cudaError_t status) {
    if (status != cudaSuccess) {
        fox_die("%s", cudaGetErrorString(status));
    }
}

static Gpu gpu_begin(Tests *t, const char *what, uint64_t seed) {
    Gpu g;
    memset(&g, 0, sizeof g);
    g.t = t;
    g.what = what;
    g.seed = seed * 1000;
    return g;
}

static void *gpu_new(Gpu *g, int64_t bytes) {
    char *base = NULL;
    size_t rounded = ((size_t)bytes + 255) / 256 * 256;
    if (g->count == GPU_BUFFERS) {
        fox_die("too many buffers in a test");
    }
    gpu_require(cudaMalloc((void **)&base, rounded + 2 * GPU_GUARD));
    gpu_require(cudaMemset(base, 0xff, rounded + 2 * GPU_GUARD));
    g->buffer[g->count].base = base;
    g->buffer[g->count++].bytes = (size_t)bytes;
    return base + GPU_GUARD;
}

static float *gpu_new_floats(Gpu *g, int64_t count) {
    return (float *)gpu_new(g, 4 * count);
}

static bf16 *gpu_new_bf16(Gpu *g, int64_t count) {
    return (bf16 *)gpu_new(g, 2 * count);
}

static void *gpu_scratch(Gpu *g, int64_t bytes) {
    void *p = gpu_new(g, bytes);
    g->buffer[g->count - 1].scratch = true;
    return p;
}

static void *gpu_copy(Gpu *g, const void *host, int64_t bytes) {
    void *p = gpu_new(g, bytes);
    gpu_require(cudaMemcpy(p, host, (size_t)bytes, cudaMemcpyHostToDevice));
    return p;
}

static float *gpu_floats(Gpu *g, const float *host, int64_t count) {
    return (float *)gpu_copy(g, host, 4 * count);
}

/* Rounds to nearest even, as the GPU does. */
static bf16 to_bf16_host(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bf16_host(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static bf16 *gpu_bf16(Gpu *g, const float *host, int64_t count) {
    bf16 *rounded = FOX_NEW(bf16, count);
#pragma omp parallel for if (count > 100000)
    for (int64_t i = 0; i < count; i++) {
        rounded[i] = to_bf16_host(host[i]);
    }
    bf16 *p = (bf16 *)gpu_copy(g, rounded, 2 * count);
    free(rounded);
    return p;
}

static void *gpu_read_bytes(const void *device, int64_t bytes) {
    char *host = FOX_NEW(char, bytes);
    gpu_require(cudaDeviceSynchronize());
    gpu_require(cudaMemcpy(host, device, (size_t)bytes, cudaMemcpyDeviceToHost));
    return host;
}

static float *gpu_read(const float *device, int64_t count) {
    return (float *)gpu_read_bytes(device, 4 * count);
}

static float *gpu_read_bf16(const bf16 *device, int64_t count) {
    bf16 *raw = (bf16 *)gpu_read_bytes(device, 2 * count);
    float *host = FOX_NEW(float, count);
    for (int64_t i = 0; i < count; i++) {
        host[i] = from_bf16_host(raw[i]);
    }
    free(raw);
    return host;
}

/* ||a - ref|| / ||ref||, but no smaller unit than 0.01 per element: the gradient of a shift is zero on paper where a
 * norm follows and there is no token before. */
static double gpu_error(const float *a, const float *ref, int64_t count) {
    double norm = 0, error = relative_error(a, ref, count);
    for (int64_t i = 0; i < count; i++) {
        norm += (double)ref[i] * (double)ref[i];
    }
    norm = sqrt(norm);
    return error * (norm > 0 ? norm : 1) / fmax(norm, 0.01 * sqrt((double)count));
}

/* Worst errors over all cases, for the printed line. */
typedef struct GpuWorst {
    double bf16, floats;
} GpuWorst;

static void gpu_compare(Gpu *g, GpuWorst *worst, const char *name, double error, double tolerance) {
    double *w = tolerance >= GPU_BF16 ? &worst->bf16 : &worst->floats;
    *w = error > *w || error != error ? error : *w;
    check(g->t, error <= tolerance, "%s, %s: error %.3g, allowed %.3g", g->what, name, error, tolerance);
}

static void gpu_check_floats(Gpu *g, GpuWorst *worst, const char *name, const float *device, const float *ref,
                             int64_t count, double tolerance) {
    float *out = gpu_read(device, count);
    gpu_compare(g, worst, name, relative_error(out, ref, count), tolerance);
    free(out);
}

static void gpu_check_bf16(Gpu *g, GpuWorst *worst, const char *name, const bf16 *device, const float *ref,
                           int64_t count) {
    float *out = gpu_read_bf16(device, count);
    gpu_compare(g, worst, name, relative_error(out, ref, count), GPU_BF16);
    free(out);
}

/* Checks the guards, frees everything, and returns a hash of all buffers that are not scratch. */
static uint64_t gpu_end(Gpu *g) {
    uint64_t hash = 0;
    for (int i = 0; i < g->count; i++) {
        size_t bytes = g->buffer[i].bytes, rounded = (bytes + 255) / 256 * 256, all = rounded + 2 * GPU_GUARD;
        unsigned char *host = (unsigned char *)gpu_read_bytes(g->buffer[i].base, (int64_t)all);
        bool intact = true;
        for (size_t k = 0; k < GPU_GUARD; k++) {
            intact = intact && host[k] == 0xff;
        }
        for (size_t k = GPU_GUARD + bytes; k < all; k++) {
            intact = intact && host[k] == 0xff;
        }
        check(g->t, intact, "%s: memory around buffer %d was written", g->what, i);
        if (!g->buffer[i].scratch) {
            hash = fox_hash(hash, host + GPU_GUARD, bytes);
        }
        free(host);
        gpu_require(cudaFree(g->buffer[i].base));
    }
    return hash;
}

/* Uniform numbers of a given deviation; the next seed of the case. */
static float *gpu_random(Gpu *g, int64_t count, double mean, double deviation) {
    float *x = FOX_NEW(float, count);
    uint64_t seed = g->seed++;
#pragma omp parallel for if (count > 100000)
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)(mean + deviation * 3.4641016 * (fox_uniform(seed, (uint64_t)i) - 0.5));
    }
    return x;
}

/* The same, rounded to bf16. */
static float *gpu_random_bf16(Gpu *g, int64_t count, double mean, double deviation) {
    float *x = gpu_random(g, count, mean, deviation);
    for (int64_t i = 0; i < count; i++) {
        x[i] = from_bf16_host(to_bf16_host(x[i]));
    }
    return x;
}

static float *float_copy(const float *x, int64_t count) {
    float *y = FOX_NEW(float, count);
    memcpy(y, x, sizeof(float) * (size_t)count);
    return y;
}

/* Host memory that a case frees together. */
#define FREE_ALL(...)                                                                                                  \
    do {                                                                                                               \
        void *all_[] = {__VA_ARGS__};                                                                                  \
        for (size_t i_ = 0; i_ < sizeof all_ / sizeof all_[0]; i_++) {                                                 \
            free(all_[i_]);                                                                                            \
        }                                                                                                              \
    } while (0)

/* A shape of the grid; seed chooses inputs and switches. */
typedef struct GpuShape {
    int B, T, H, D;
    uint64_t seed;
} GpuShape;

typedef uint64_t (*GpuCase)(Tests *t, GpuWorst *worst, GpuShape shape);

/* Runs a case twice and wants the same bits; prints the worst errors. */
static void gpu_cases(Tests *t, const char *name, GpuCase run, const GpuShape *shapes, int count, int seeds) {
    GpuWorst worst = {0, 0};
    double start = fox_now();
    for (int i = 0; i < count; i++) {
        for (int s = 0; s < seeds; s++) {
            GpuShape shape = shapes[i];
            shape.seed = (uint64_t)(100 * i + s + 1);
            uint64_t first = run(t, &worst, shape), second = run(t, &worst, shape);
            check(t, first == second, "%s: a second run of B %d, T %d, H %d, D %d differs", name, shape.B, shape.T,
                  shape.H, shape.D);
        }
    }
    printf("cuda %-16s worst error: bf16 %.2e, float32 %.2e (%.1f s)\n", name, worst.bf16, worst.floats,
           fox_now() - start);
}

/* ---- residual stream ---- */

/* branch NULL and not, x_out apart, in place and NULL. */
static uint64_t cuda_norm_case(Tests *t, GpuWorst *worst, GpuShape s) {
    Gpu g = gpu_begin(t, "norm", s.seed);
    int64_t N = (int64_t)s.B * s.T;
    int d = s.H * s.D, mode = (int)(s.seed % 4);
    float eps = 1e-6f;
    float *x = gpu_random(&g, N * d, 0.1, 2), *branch = gpu_random_bf16(&g, N * d, 0, 1),
          *w = gpu_random(&g, d, 1, 0.3);
    float *dh = gpu_random_bf16(&g, N * d, 0, 1), *dx = gpu_random(&g, N * d, 0, 1), *dw = gpu_random(&g, d, 0, 1);
    float *h = FOX_NEW(float, N *d), *rstd = FOX_NEW(float, N);

    float *gx = gpu_floats(&g, x, N * d), *gw = gpu_floats(&g, w, d), *grstd = gpu_new_floats(&g, N);
    bf16 *gbranch = mode < 2 ? gpu_bf16(&g, branch, N * d) : NULL, *gh = gpu_new_bf16(&g, N * d);
    float *gx_out = mode == 0 || mode == 2 ? gpu_new_floats(&g, N * d) : mode == 1 ? gx : NULL;
    for (int64_t i = 0; i < N * d && gbranch != NULL; i++) {
        x[i] += branch[i];
    }
    rmsnorm_forward(h, rstd, x, w, N, 1, d, false, eps);
    cuda_residual_norm_forward(gh, grstd, gx_out, gx, gbranch, gw, N, d, eps, 0);
    gpu_check_bf16(&g, worst, "h", gh, h, N * d);
    gpu_check_floats(&g, worst, "rstd", grstd, rstd, N, GPU_FLOAT);
    float *stream = gx_out != NULL ? gx_out : gx;
    gpu_check_floats(&g, worst, "x_out", stream, x, N * d, GPU_FLOAT);

    float *gdx = gpu_floats(&g, dx, N * d), *gdw = gpu_floats(&g, dw, d);
    float *scratch = (float *)gpu_scratch(&g, 4 * cuda_norm_scratch(d));
    bf16 *gdx_bf16 = gpu_new_bf16(&g, N * d), *gdh = gpu_bf16(&g, dh, N * d);
    rmsnorm_backward(dx, dw, dh, x, rstd, w, N, 1, d, false);
    cuda_norm_backward(gdx, gdx_bf16, gdw, scratch, gdh, stream, grstd, gw, N, d, 0);
    gpu_check_floats(&g, worst, "dx", gdx, dx, N * d, GPU_FLOAT);
    gpu_check_bf16(&g, worst, "bf16 dx", gdx_bf16, dx, N * d);
    gpu_check_floats(&g, worst, "dw", gdw, dw, d, GPU_FLOAT);
    FREE_ALL(x, branch, w, dh, dx, dw, h, rstd);
    return gpu_end(&g);
}

/* ---- embedding ---- */

/* Tokens: spread over the vocabulary, nearly all the same, or all the same. */
static uint64_t cuda_embedding_case(Tests *t, GpuWorst *worst, GpuShape s) {
    Gpu g = gpu_begin(t, "embedding", s.seed);
    int64_t N = (int64_t)s.B * s.T;
    int d = s.H * s.D, V = s.seed % 2 ? 53 : 5021;
    int32_t *tokens = FOX_NEW(int32_t, N);
    for (int64_t n = 0; n < N; n++) {
        double u = fox_uniform(s.seed, (uint64_t)n);
        tokens[n] = (int32_t)(V * (s.seed % 3 == 0 ? u : s.seed % 3 == 1 ? pow(u, 6) : 0.999));
    }
    float *w = gpu_random(&g, (int64_t)V * d, 0, 1), *x = FOX_NEW(float, N *d), *dx = gpu_random(&g, N * d, 0, 1);
    float *dw = gpu_random(&g, (int64_t)V * d, 0, 1);
    float *gw = gpu_floats(&g, w, (int64_t)V * d), *gx = gpu_new_floats(&g, N * d), *gdx = gpu_floats(&g, dx, N * d);
    float *gdw = gpu_floats(&g, dw, (int64_t)V * d);
    int32_t *gtokens = (int32_t *)gpu_copy(&g, tokens, 4 * N),
            *scratch = (int32_t *)gpu_scratch(&g, 4 * cuda_embedding_scratch(N, V));
    embedding_forward(x, tokens, w, N, d);
    cuda_embedding_forward(gx, gtokens, gw, N, d, 0);
    gpu_check_floats(&g, worst, "x", gx, x, N * d, 0);
    embedding_backward(dw, dx, tokens, N, d);
    cuda_embedding_backward(gdw, gdx, gtokens, scratch, N, d, V, 0);
    gpu_check_floats(&g, worst, "dw", gdw, dw, (int64_t)V * d, GPU_FLOAT);
    FREE_ALL(tokens, w, x, dx, dw);
    return gpu_end(&g);
}

/* ---- packed product ---- */

static FoxConfig cuda_test_config(GpuShape s) {
    FoxConfig c;
    uint64_t bits = fox_random(s.seed, 77);
    bool pro = s.seed % 3 == 0; /* every third case is the whole of FoX (Pro) */
    memset(&c, 0, sizeof c);
    c.vocab_size = 50;
    c.hidden_size = s.H * s.D;
    c.num_hidden_layers = 1;
    c.num_heads = s.H;
    c.intermediate_size = 16;
    c.use_forget_gate = pro || (bits & 3) != 0;
    c.use_rope = !pro && ((bits >> 2 & 1) || !c.use_forget_gate);
    c.use_output_gate = pro || (bits >> 3 & 1);
    c.use_output_norm = pro || (bits >> 4 & 1) || !c.use_output_gate;
    c.qk_norm = pro || (bits >> 5 & 1);
    c.qk_norm_share_param_across_head = c.qk_norm && (bits >> 6 & 1);
    c.use_k_shift = pro || (bits >> 7 & 1);
    c.use_v_shift = pro || (bits >> 8 & 1);
    c.rope_base = 1000;
    c.norm_eps = 1e-6;
    return c;
}

/* Columns in the order of the parameters. */
static PackedLayout cuda_test_layout(const FoxConfig *c) {
    int d = c->hidden_size, H = c->num_heads, at = 3 * d;
    PackedLayout p = {0, d, 2 * d, -1, -1, -1, -1, 0, 0};
    if (c->use_output_gate) {
        p.ogate = at;
        at += d;
    }
    if (c->use_k_shift) {
        p.k_shift = at;
        at += H;
    }
    if (c->use_v_shift) {
        p.v_shift = at;
        at += H;
    }
    if (c->use_forget_gate) {
        p.fgate = at;
        at += H;
    }
    p.columns = at;
    p.row = (at + 63) / 64 * 64;
    return p;
}

/* Copies `width` columns of a packed matrix, from `column` (-1: does nothing) on, out or (into) in. */
static void packed_columns(float *packed, const PackedLayout *p, int column, float *x, int64_t N, int width,
                           bool into) {
    for (int64_t n = 0; n < N && column >= 0; n++) {
        float *row = packed + n * p->row + column;
        memcpy(into ? row : x + n * width, into ? x + n * width : row, sizeof(float) * (size_t)width);
    }
}

/* The activations of a layer that meet the packed product, all columns. */
static void packed_activations(float *packed, const PackedLayout *p, const FoxConfig *c, FoxActs *a, int64_t N,
                               bool into) {
    int d = c->hidden_size, H = c->num_heads;
    packed_columns(packed, p, p->q, a->q_lin, N, d, into);
    packed_columns(packed, p, p->k, a->k_lin, N, d, into);
    packed_columns(packed, p, p->v, a->v_lin, N, d, into);
    packed_columns(packed, p, p->k_shift, a->k_alpha, N, H, into);
    packed_columns(packed, p, p->v_shift, a->v_alpha, N, H, into);
    packed_columns(packed, p, p->fgate, a->f, N, H, into);
}

/* What follows attention in fox_block_backward. dlog_f: [B, H, T]. */
static void qkv_backward_reference(const FoxConfig *c, FoxLayerWeights *w, FoxLayerWeights *dw, FoxActs *da,
                                   const FoxActs *a, const float *dlog_f, int B, int T) {
    int H = c->num_heads, D = c->hidden_size / H;
    int64_t N = (int64_t)B * T;
    bool shared = c->qk_norm_share_param_across_head;
    for (int64_t i = 0; i < N * H && c->use_forget_gate; i++) {
        int64_t b = i / H / T, at = i / H % T, h = i % H;
        double grad = (double)dlog_f[(b * H + h) * T + at] / (1 + exp((double)a->f[i]));
        da->f[i] = (float)grad;
        dw->fgate_bias[h] += (float)grad;
    }
    if (c->use_rope) {
        rope(da->q, B, T, H, D, c->rope_base, 0, -1);
        rope(da->k, B, T, H, D, c->rope_base, 0, -1);
    }
    if (c->qk_norm) {
        rmsnorm_backward(da->q_lin, dw->q_norm, da->q, a->q_lin, a->q_rstd, w->q_norm, N, H, D, shared);
        rmsnorm_backward(da->k_mix, dw->k_norm, da->k, a->k_mix, a->k_rstd, w->k_norm, N, H, D, shared);
    }
    if (c->use_k_shift) {
        token_shift_backward(da->k_lin, da->k_alpha, da->k_mix, a->k_lin, a->k_alpha, B, T, H, D);
    }
    if (c->use_v_shift) {
        token_shift_backward(da->v_lin, da->v_alpha, da->v, a->v_lin, a->v_alpha, B, T, H, D);
    }
}

static uint64_t cuda_qkv_case(Tests *t, GpuWorst *worst, GpuShape s) {
    FoxConfig c = cuda_test_config(s);
    PackedLayout p = cuda_test_layout(&c);
    char what[200];
    snprintf(what, sizeof what, "qkv B %d T %d H %d D %d, gate %d rope %d norm %d shared %d shifts %d %d", s.B, s.T,
             s.H, s.D, c.use_forget_gate, c.use_rope, c.qk_norm, c.qk_norm_share_param_across_head, c.use_k_shift,
             c.use_v_shift);
    Gpu g = gpu_begin(t, what, s.seed);
    int H = s.H, d = H * s.D, width = c.qk_norm_share_param_across_head ? s.D : d;
    int64_t N = (int64_t)s.B * s.T, NH = N * H;
    FoxActs a = fox_acts_create(&c, s.B, s.T), da = fox_acts_create(&c, s.B, s.T);
    FoxLayerWeights w, dw;
    float *packed = gpu_random_bf16(&g, N * p.row, 0, 2), *bias = gpu_random(&g, H, 2, 1), *log_f = FOX_NEW(float, NH);
    float *q_norm = gpu_random(&g, width, 1, 0.3), *k_norm = gpu_random(&g, width, 1, 0.3);
    float *dq_norm = gpu_random(&g, width, 0, 1), *dk_norm = gpu_random(&g, width, 0, 1),
          *dbias = gpu_random(&g, H, 0, 1);
    float *dq = gpu_random_bf16(&g, N * d, 0, 1), *dk = gpu_random_bf16(&g, N * d, 0, 1),
          *dv = gpu_random_bf16(&g, N * d, 0, 1);
    float *dlog_f = gpu_random(&g, NH, 0, 1);
    memset(&w, 0, sizeof w);
    memset(&dw, 0, sizeof dw);
    w.q_norm = q_norm, w.k_norm = k_norm, dw.q_norm = float_copy(dq_norm, width),
    dw.k_norm = float_copy(dk_norm, width);
    dw.fgate_bias = float_copy(dbias, H);

    packed_activations(packed, &p, &c, &a, N, false);
    float *f = a.f;
    for (int64_t i = 0; i < NH; i++) {
        int64_t b = i / H / s.T, at = i / H % s.T, h = i % H;
        if (c.use_forget_gate) {
            f[i] += bias[h];
            log_f[(b * H + h) * s.T + at] = (float)fox_log_sigmoid((double)f[i]);
        }
    }
    QkvWeights gw = {NULL, NULL, NULL};
    if (c.qk_norm) {
        gw.q_norm = gpu_floats(&g, q_norm, width);
        gw.k_norm = gpu_floats(&g, k_norm, width);
    }
    gw.fgate_bias = c.use_forget_gate ? gpu_floats(&g, bias, H) : NULL;
    bf16 *gpacked = gpu_bf16(&g, packed, N * p.row), *gq = gpu_new_bf16(&g, N * d), *gk = gpu_new_bf16(&g, N * d);
    bf16 *gv = gpu_new_bf16(&g, N * d);
    float *gq_rstd = gpu_new_floats(&g, NH), *gk_rstd = gpu_new_floats(&g, NH), *glog_f = gpu_new_floats(&g, NH);
    cuda_qkv_forward(gq, gk, gv, gq_rstd, gk_rstd, glog_f, gpacked, &p, &gw, &c, s.B, s.T, 0);

    /* The oracle rotates in place, which must not touch what the backward pass reads. */
    float *q_lin = float_copy(a.q_lin, N * d), *k_lin = float_copy(a.k_lin, N * d);
    fox_shift_and_norm(&c, &w, &a, NULL, NULL, s.B, s.T, 0);
    gpu_check_bf16(&g, worst, "q", gq, a.q, N * d);
    gpu_check_bf16(&g, worst, "k", gk, a.k, N * d);
    gpu_check_bf16(&g, worst, "v", gv, a.v, N * d);
    gpu_check_floats(&g, worst, "log f", glog_f, log_f, NH, GPU_FLOAT);
    if (c.qk_norm) {
        gpu_check_floats(&g, worst, "q rstd", gq_rstd, a.q_rstd, NH, GPU_FLOAT);
        gpu_check_floats(&g, worst, "k rstd", gk_rstd, a.k_rstd, NH, GPU_FLOAT);
    }
    memcpy(a.q_lin, q_lin, sizeof(float) * (size_t)(N * d));
    memcpy(a.k_lin, k_lin, sizeof(float) * (size_t)(N * d));

    float *gdq_norm = gpu_floats(&g, dq_norm, width), *gdk_norm = gpu_floats(&g, dk_norm, width),
          *gdbias = gpu_floats(&g, dbias, H);
    float *gdlog_f = gpu_floats(&g, dlog_f, NH), *scratch = (float *)gpu_scratch(&g, 4 * cuda_qkv_scratch(&c));
    bf16 *gdpacked = gpu_new_bf16(&g, N * p.row);
    cuda_qkv_backward(gdpacked, gdq_norm, gdk_norm, gdbias, scratch, gpu_bf16(&g, dq, N * d), gpu_bf16(&g, dk, N * d),
                      gpu_bf16(&g, dv, N * d), gdlog_f, gpacked, gq_rstd, gk_rstd, &p, &gw, &c, s.B, s.T, 0);
    memcpy(da.q, dq, sizeof(float) * (size_t)(N * d));
    memcpy(da.k, dk, sizeof(float) * (size_t)(N * d));
    memcpy(da.v, dv, sizeof(float) * (size_t)(N * d));
    qkv_backward_reference(&c, &w, &dw, &da, &a, dlog_f, s.B, s.T);

    /* Column by column, since their sizes differ: padding must be zero, the output gate's columns untouched. */
    float *dpacked = gpu_read_bf16(gdpacked, N * p.row), *ours = FOX_NEW(float, N *d);
    const struct {
        const char *name;
        int column, width;
        const float *ref;
    } parts[] = {{"dq", p.q, d, da.q_lin},
                 {"dk", p.k, d, da.k_lin},
                 {"dv", p.v, d, da.v_lin},
                 {"dk shift", p.k_shift, H, da.k_alpha},
                 {"dv shift", p.v_shift, H, da.v_alpha},
                 {"dfgate", p.fgate, H, da.f}};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (parts[i].column >= 0) {
            packed_columns(dpacked, &p, parts[i].column, ours, N, parts[i].width, false);
            gpu_compare(&g, worst, parts[i].name, gpu_error(ours, parts[i].ref, N * parts[i].width),
                        N * parts[i].width < 50 ? GPU_BF16_ALONE : GPU_BF16);
        }
    }
    bool padding = true, gate = true;
    for (int64_t n = 0; n < N; n++) {
        for (int i = p.columns; i < p.row; i++) {
            padding = padding && dpacked[n * p.row + i] == 0;
        }
        for (int i = 0; i < d && p.ogate >= 0; i++) {
            gate = gate && dpacked[n * p.row + p.ogate + i] != dpacked[n * p.row + p.ogate + i];
        }
    }
    check(t, padding && gate, "%s: padding zero %d, output gate untouched %d", what, padding, gate);
    if (c.qk_norm) {
        gpu_check_floats(&g, worst, "dq norm", gdq_norm, dw.q_norm, width, GPU_FLOAT);
        gpu_check_floats(&g, worst, "dk norm", gdk_norm, dw.k_norm, width, GPU_FLOAT);
    }
    if (c.use_forget_gate) {
        gpu_check_floats(&g, worst, "dbias", gdbias, dw.fgate_bias, H, GPU_FLOAT);
    }
    FREE_ALL(packed, bias, log_f, q_norm, k_norm, dq_norm, dk_norm, dbias, dq, dk, dv, dlog_f, dw.q_norm, dw.k_norm,
             dw.fgate_bias, q_lin, k_lin, dpacked, ours, a.memory, da.memory);
    return gpu_end(&g);
}

/* RoPE far from the start, where an angle in float32 is off by 0.01. */
static uint64_t cuda_rope_case(Tests *t, GpuWorst *worst, GpuShape s) {
    Gpu g = gpu_begin(t, "rope at 131072", s.seed);
    FoxConfig c = cuda_test_config(s);
    c.use_forget_gate = c.qk_norm = c.qk_norm_share_param_across_head = c.use_k_shift = c.use_v_shift =
        c.use_output_gate = false;
    c.use_rope = true;
    c.rope_base = 500000;
    PackedLayout p = cuda_test_layout(&c);
    int d = s.H * s.D, last = 100;
    int64_t N = (int64_t)s.B * s.T;
    float *packed = gpu_random_bf16(&g, N * p.row, 0, 1), *tail = FOX_NEW(float, last *d);
    QkvWeights w = {NULL, NULL, NULL};
    bf16 *gpacked = gpu_bf16(&g, packed, N * p.row), *gq = gpu_new_bf16(&g, N * d), *gk = gpu_new_bf16(&g, N * d);
    bf16 *gv = gpu_new_bf16(&g, N * d);
    cuda_qkv_forward(gq, gk, gv, NULL, NULL, gpu_new_floats(&g, N * s.H), gpacked, &p, &w, &c, s.B, s.T, 0);
    packed_columns(packed + (N - last) * p.row, &p, p.k, tail, last, d, false);
    rope(tail, 1, last, s.H, s.D, c.rope_base, s.T - last, 1);
    gpu_check_bf16(&g, worst, "k", gk + (N - last) * d, tail, last * d);
    FREE_ALL(packed, tail);
    return gpu_end(&g);
}

/* ---- output norm and gate ---- */

static uint64_t cuda_output_gate_case(Tests *t, GpuWorst *worst, GpuShape s) {
    Gpu g = gpu_begin(t, "output gate", s.seed);
    FoxConfig c = cuda_test_config(s);
    PackedLayout p = cuda_test_layout(&c);
    int H = s.H, D = s.D, d = H * D;
    int64_t N = (int64_t)s.B * s.T;
    float *o = gpu_random_bf16(&g, N * d, 0, 1), *packed = gpu_random_bf16(&g, N * p.row, 0, 2),
          *w = gpu_random(&g, d, 1, 0.3);
    float *dout = gpu_random_bf16(&g, N * d, 0, 1), *dw = gpu_random(&g, d, 0, 1), *out = FOX_NEW(float, N *d);
    float *gate = FOX_NEW(float, N *d), *dgate = FOX_NEW(float, N *d), *y = float_copy(o, N * d),
          *rstd = FOX_NEW(float, N *H);
    float *dy = FOX_NEW(float, N *d), *d_o = FOX_NEW(float, N *d);

    float *gw = c.use_output_norm ? gpu_floats(&g, w, d) : NULL, *grstd = gpu_new_floats(&g, N * H),
          *gdw = gpu_floats(&g, dw, d);
    float *scratch = (float *)gpu_scratch(&g, 4 * cuda_norm_scratch(d));
    bf16 *go = gpu_bf16(&g, o, N * d), *gpacked = gpu_bf16(&g, packed, N * p.row), *gout = gpu_new_bf16(&g, N * d);
    bf16 *gdpacked = gpu_new_bf16(&g, N * p.row), *gd_o = gpu_new_bf16(&g, N * d), *gdout = gpu_bf16(&g, dout, N * d);
    cuda_output_gate_forward(gout, grstd, go, gpacked, &p, gw, N, H, D, (float)c.norm_eps, 0);
    cuda_output_gate_backward(gd_o, gdpacked, gdw, scratch, gdout, go, grstd, gpacked, &p, gw, N, H, D, 0);

    packed_columns(packed, &p, p.ogate, gate, N, d, false);
    if (c.use_output_norm) {
        rmsnorm_forward(y, rstd, o, w, N, H, D, false, (float)c.norm_eps);
        gpu_check_floats(&g, worst, "rstd", grstd, rstd, N * H, GPU_FLOAT);
    }
    memcpy(out, y, sizeof(float) * (size_t)(N * d));
    memcpy(dy, dout, sizeof(float) * (size_t)(N * d));
    if (c.use_output_gate) {
        gate_forward(out, y, gate, N * d);
        memset(dy, 0, sizeof(float) * (size_t)(N * d));
        gate_backward(dy, dgate, dout, y, gate, N * d);
        float *dpacked = gpu_read_bf16(gdpacked, N * p.row), *ours = FOX_NEW(float, N *d);
        packed_columns(dpacked, &p, p.ogate, ours, N, d, false);
        gpu_compare(&g, worst, "dgate", relative_error(ours, dgate, N * d), GPU_BF16);
        bool others = true;
        for (int64_t i = 0; i < N * p.row; i++) {
            int column = (int)(i % p.row);
            others = others && ((column >= p.ogate && column < p.ogate + d) || dpacked[i] != dpacked[i]);
        }
        check(t, others, "output gate: the other columns of dpacked are untouched");
        FREE_ALL(dpacked, ours);
    }
    gpu_check_bf16(&g, worst, "out", gout, out, N * d);
    if (c.use_output_norm) {
        rmsnorm_backward(d_o, dw, dy, o, rstd, w, N, H, D, false);
    } else {
        memcpy(d_o, dy, sizeof(float) * (size_t)(N * d));
    }
    gpu_check_bf16(&g, worst, "d_o", gd_o, d_o, N * d);
    gpu_check_floats(&g, worst, "dw", gdw, dw, d, GPU_FLOAT);
    FREE_ALL(o, packed, w, dout, dw, out, gate, dgate, y, rstd, dy, d_o);
    return gpu_end(&g);
}

/* ---- MLP ---- */

static uint64_t cuda_swiglu_case(Tests *t, GpuWorst *worst, GpuShape s) {
    Gpu g = gpu_begin(t, "swiglu", s.seed);
    int64_t N = (int64_t)s.B * s.T;
    int F = s.seed % 2 ? 16 * s.H : 8 * (int)(1 + fox_random(s.seed, 3) % (N > 1000 ? 100 : 700));
    float *gu = gpu_random_bf16(&g, N * 2 * F, 0, 2), *out = FOX_NEW(float, N *F),
          *dout = gpu_random_bf16(&g, N * F, 0, 1);
    float *dgu = FOX_NEW(float, N * 2 * F);
    gu[0] = 200, gu[1] = -200, gu[2] = -88; /* saturated gates stay finite */
    bf16 *ggu = gpu_bf16(&g, gu, N * 2 * F), *gout = gpu_new_bf16(&g, N * F), *gdout = gpu_bf16(&g, dout, N * F);
    bf16 *gdgu = gpu_new_bf16(&g, N * 2 * F);
    swiglu_forward(out, gu, N, F);
    swiglu_backward(dgu, dout, gu, N, F);
    cuda_swiglu_forward(gout, ggu, N, F, 0);
    cuda_swiglu_backward(gdgu, gdout, ggu, N, F, 0);
    gpu_check_bf16(&g, worst, "out", gout, out, N * F);
    gpu_check_bf16(&g, worst, "dgu", gdgu, dgu, N * 2 * F);
    FREE_ALL(gu, out, dout, dgu);
    return gpu_end(&g);
}

/* ---- loss ---- */

/* Rows of the vocabulary V; also without gradient, and rows too long for shared memory. */
static uint64_t cuda_entropy_case(Tests *t, GpuWorst *worst, GpuShape s) {
    Gpu g = gpu_begin(t, "cross entropy", s.seed);
    static const int sizes[] = {50257, 61, 8, 1, 256, 130001, 16384};
    int V = sizes[s.seed % 7], row = (V + 63) / 64 * 64;
    int64_t N = s.seed % 7 == 0 || s.seed % 7 == 5 ? (s.T < 100 ? s.T : 100) : fox_min64((int64_t)s.B * s.T, 500);
    float scale = s.seed % 5 == 0 ? 0.0f : 0.37f, *z = gpu_random_bf16(&g, N * row, 1, 4),
          *logits = FOX_NEW(float, N *V);
    float *losses = FOX_NEW(float, N), *ours;
    int32_t *targets = FOX_NEW(int32_t, N);
    double before = 12.5, sum = before;
    for (int64_t n = 0; n < N; n++) {
        targets[n] = n == 0 ? V - 1 : (int32_t)(fox_random(s.seed, (uint64_t)n) % (uint64_t)V);
        memcpy(logits + n * V, z + n * row, sizeof(float) * (size_t)V);
        for (int i = V; i < row; i++) {
            z[n * row + i] = NAN; /* padding must not be read */
        }
    }
    bf16 *gz = gpu_bf16(&g, z, N * row);
    float *glosses = gpu_new_floats(&g, N);
    double *gsum = (double *)gpu_copy(&g, &before, sizeof before);
    cuda_cross_entropy(glosses, gsum, gz, (int32_t *)gpu_copy(&g, targets, 4 * N), N, V, row, scale, 0);
    cross_entropy(losses, logits, targets, N, V, scale);
    for (int64_t n = 0; n < N; n++) {
        sum += (double)losses[n];
    }
    if (V > 1) {
        gpu_check_floats(&g, worst, "losses", glosses, losses, N, GPU_FLOAT);
    }
    double *total = (double *)gpu_read_bytes(gsum, sizeof sum);
    check(t, fabs(*total - sum) <= 1e-5 * sum, "cross entropy: sum of losses %.9g, expected %.9g", *total, sum);
    ours = gpu_read_bf16(gz, N * row);
    bool padding = true;
    for (int64_t n = 0; n < N; n++) {
        for (int i = V; i < row && scale != 0; i++) {
            padding = padding && ours[n * row + i] == 0;
        }
        memmove(ours + n * V, ours + n * row, sizeof(float) * (size_t)V);
    }
    check(t, padding, "cross entropy: padding of the gradient is zero");
    gpu_compare(&g, worst, scale == 0 ? "untouched logits" : "gradient", relative_error(ours, logits, N * V), GPU_BF16);
    FREE_ALL(z, logits, losses, targets, ours, total);
    return gpu_end(&g);
}

/* ---- end of a step ---- */

static uint64_t cuda_adamw_case(Tests *t, GpuWorst *worst, GpuShape s) {
    Gpu g = gpu_begin(t, "AdamW", s.seed);
    int64_t total = 1 + (int64_t)(fox_random(s.seed, 1) % 300000);
    int64_t decay_from = 4 * ((int64_t)(fox_random(s.seed, 2) % 90000) - 5000); /* before, inside and after the array */
    AdamW adamw = {1e-2, 0.9, 0.95, 1e-8, 0.1, s.seed % 3 == 0 ? 0 : 1.5, 1};
    float *p = gpu_random(&g, total, 0, 1), *grad = gpu_random(&g, total, 0, 1), *m = gpu_random(&g, total, 0, 0.1);
    float *v = gpu_random(&g, total, 0, 0.1), *zero = FOX_NEW(float, total);
    for (int64_t i = 0; i < total; i++) {
        v[i] = fabsf(v[i]);
    }
    float *gp = gpu_floats(&g, p, total), *gm = gpu_floats(&g, m, total), *gv = gpu_floats(&g, v, total);
    bf16 *gp16 = gpu_bf16(&g, p, total);
    double *scratch = (double *)gpu_scratch(&g, 8 * cuda_norm_squares_scratch());
    for (adamw.step = 1; adamw.step <= 3; adamw.step++) {
        DeviceStats start = {2.5, 0, 0, 0, 0}, *stats;
        DeviceStats *gstats = (DeviceStats *)gpu_copy(&g, &start, (int64_t)sizeof start);
        float *ggrad = gpu_floats(&g, grad, total);
        int64_t half = total / 8 * 4; /* in two parts, as a rank that owns several pieces does it */
        cuda_add_squares(gstats, scratch, ggrad, half, 0);
        cuda_add_squares(gstats, scratch, ggrad + half, total - half, 0);
        cuda_clip(gstats, adamw.grad_clip, 0);
        cuda_adamw(gp, gp16, gm, gv, ggrad, total, decay_from, &adamw, gstats, 0);
        stats = (DeviceStats *)gpu_read_bytes(gstats, (int64_t)sizeof start);
        double norm = 0, c1 = 1 - pow(adamw.beta1, (double)adamw.step), c2 = 1 - pow(adamw.beta2, (double)adamw.step);
        for (int64_t i = 0; i < total; i++) {
            norm += (double)grad[i] * (double)grad[i];
        }
        norm = sqrt(norm);
        double scale = adamw.grad_clip > 0 && norm > adamw.grad_clip ? adamw.grad_clip / norm : 1;
        check(t,
              fabs(stats->grad_norm - norm) <= 1e-12 * norm && stats->applied == 1 && stats->loss == 2.5 &&
                  fabs((double)stats->grad_scale - scale) <= 1e-7 * scale,
              "AdamW: norm %.15g (expected %.15g), scale %.9g (expected %.9g), applied %d", stats->grad_norm, norm,
              (double)stats->grad_scale, scale, stats->applied);
        for (int64_t i = 0; i < total; i++) {
            double x = (double)grad[i] * scale, first = 0.9 * (double)m[i] + 0.1 * x, second = 0.95 * (double)v[i] + 0.05 * x * x;
            m[i] = (float)first;
            v[i] = (float)second;
            p[i] = (float)((double)p[i] * (i >= decay_from ? 0.999 : 1) - 1e-2 * (first / c1) / (sqrt(second / c2) + 1e-8));
        }
        gpu_check_floats(&g, worst, "grads are zero", ggrad, zero, total, 0);
        free(stats);
        for (int64_t i = 0; i < total; i++) {
            grad[i] = -0.5f * grad[i];
        }
    }
    gpu_check_floats(&g, worst, "params", gp, p, total, GPU_FLOAT);
    gpu_check_floats(&g, worst, "m", gm, m, total, GPU_FLOAT);
    gpu_check_floats(&g, worst, "v", gv, v, total, GPU_FLOAT);
    gpu_check_bf16(&g, worst, "bf16 params", gp16, p, total);
    bf16 *copy = gpu_new_bf16(&g, total);
    cuda_to_bf16(copy, gp, total, 0);
    gpu_check_bf16(&g, worst, "to_bf16", copy, p, total);
    float *back = gpu_floats(&g, zero, total), *rounded = gpu_read_bf16(copy, total);
    cuda_from_bf16(back, copy, total, 0);
    gpu_check_floats(&g, worst, "from_bf16", back, rounded, total, 0);
    free(rounded);
    FREE_ALL(p, grad, m, v, zero);
    return gpu_end(&g);
}

/* A gradient, or a loss, that is not finite changes nothing but the gradient, which becomes zero. */
static void test_cuda_refusal(Tests *t) {
    for (int bad = 0; bad < 3; bad++) {
        Gpu g = gpu_begin(t, "refusal", (uint64_t)bad);
        int64_t total = 5003;
        AdamW adamw = {1e-2, 0.9, 0.95, 1e-8, 0.1, 1, 1};
        DeviceStats start = {bad == 2 ? NAN : 1.0, 0, 0, 0, 1}, *stats;
        float *p = gpu_random(&g, total, 0, 1), *grad = gpu_random(&g, total, 0, 1), *zero = FOX_NEW(float, total);
        grad[total - 2] = bad == 0 ? NAN : bad == 1 ? INFINITY : 1;
        GpuWorst worst = {0, 0};
        float *gp = gpu_floats(&g, p, total), *gm = gpu_floats(&g, p, total), *gv = gpu_floats(&g, p, total);
        float *ggrad = gpu_floats(&g, grad, total);
        bf16 *gp16 = gpu_new_bf16(&g, total);
        DeviceStats *gstats = (DeviceStats *)gpu_copy(&g, &start, (int64_t)sizeof start);
        cuda_add_squares(gstats, (double *)gpu_scratch(&g, 8 * cuda_norm_squares_scratch()), ggrad, total, 0);
        cuda_clip(gstats, 1, 0);
        cuda_adamw(gp, gp16, gm, gv, ggrad, total, 0, &adamw, gstats, 0);
        stats = (DeviceStats *)gpu_read_bytes(gstats, (int64_t)sizeof start);
        check(t, stats->applied == 0, "a step that is not finite is refused");
        gpu_check_floats(&g, &worst, "params", gp, p, total, 0);
        gpu_check_floats(&g, &worst, "m", gm, p, total, 0);
        gpu_check_floats(&g, &worst, "v", gv, p, total, 0);
        gpu_check_floats(&g, &worst, "grads are zero", ggrad, zero, total, 0);
        FREE_ALL(p, grad, zero, stats);
        gpu_end(&g);
    }
}

static void test_cuda_layers(Tests *t) {
    static const GpuShape shapes[] = {
        {1, 1, 1, 64, 0},   {3, 1, 5, 128, 0},    {1, 77, 5, 64, 0},   {3, 77, 12, 64, 0}, {1, 200, 1, 128, 0},
        {3, 200, 5, 64, 0}, {2, 130, 3, 16, 0},   {2, 77, 2, 48, 0},   {1, 61, 3, 256, 0}, {1, 37, 17, 240, 0},
        {3, 19, 64, 64, 0}, {1, 4097, 5, 128, 0}, {1, 4097, 12, 64, 0}};
    static const GpuShape far_away = {1, 131172, 1, 64, 0};
    int devices = 0, all = (int)(sizeof shapes / sizeof shapes[0]), count = t->quick ? all - 2 : all;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        skip_without_gpus(t, 1, "layers on a GPU: none here");
        return;
    }
    gpu_cases(t, "norm", cuda_norm_case, shapes, count, 2);
    gpu_cases(t, "embedding", cuda_embedding_case, shapes, count, 2);
    gpu_cases(t, "qkv", cuda_qkv_case, shapes, all - 2, t->quick ? 2 : 8);
    gpu_cases(t, "qkv, T = 4097", cuda_qkv_case, shapes + all - 2, 2, t->quick ? 0 : 2);
    gpu_cases(t, "rope at 131072", cuda_rope_case, &far_away, 1, 1);
    gpu_cases(t, "output gate", cuda_output_gate_case, shapes, count, 2);
    gpu_cases(t, "swiglu", cuda_swiglu_case, shapes, count, 2);
    gpu_cases(t, "cross entropy", cuda_entropy_case, shapes, count, 2);
    gpu_cases(t, "AdamW", cuda_adamw_case, shapes, 4, 3);
    test_cuda_refusal(t);
}

#endif

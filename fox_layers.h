/* FoX, the Forgetting Transformer (arXiv 2503.02130), in plain C: every layer forward and backward, and the whole model.
 *
 * This is the specification in code, float32 on the CPU: short rather than fast, checked against the official model and
 * against finite differences, and what every GPU kernel is compared with. It is also the CPU back end.
 *
 *     x = E[tokens]                                                     no position embedding
 *     per layer:  x += attention(rmsnorm(x)),  x += swiglu(rmsnorm(x))
 *     loss = mean over tokens of cross_entropy(rmsnorm(x) W_head^T, target)
 *
 *     attention(h), per head:   q, k, v = h Wq^T, h Wk^T, h Wv^T
 *         Pro:  k, v blended with the previous token's (token shift); q, k normalised (QK-norm)
 *         log f[t] = logsigmoid(h Wf^T + b),  c[t] = sum_{l <= t} log f[l]
 *         p[i,j] = softmax_{j <= i}(q_i.k_j / sqrt(D) + c_i - c_j),  o_i = sum_j p_ij v_j
 *         Pro:  o = rmsnorm(o) * sigmoid(h Wg^T)
 *         out = o Wo^T
 *
 * Shapes are row-major: B batch, T context, N = B*T tokens, d width, H heads, D = d/H, F inner width of the MLP, V
 * vocabulary, L layers. Weights are [out, in], as in PyTorch.
 *
 * Conventions. A forward overwrites its outputs. A backward ADDS to every gradient it is asked for (the caller zeroes), so
 * tensors used twice need no special case. dX is the gradient of the loss by X. Every sum has a fixed order: results do
 * not depend on the number of threads. */
#ifndef FOX_LAYERS_H
#define FOX_LAYERS_H

#include "cpu/acp.h"
#include "cpu/gemm.h"
#include "train/backend.h"
#include "train/config.h"

enum { FOX_BLOCK = 64 };  /* queries, and keys, in one block of attention: the grain of pruning on the CPU */
enum { FOX_PARALLEL = 128 }; /* tokens from which starting threads pays */
enum { FOX_COLUMNS = 16 }; /* columns that one thread sums at a time in weight gradients */

/* ------------------------------------------------------------------------------------------------------------------ */
/* Layers                                                                                                              */

static inline float fox_sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

static inline double fox_log_sigmoid(double x) {
    return fmin(x, 0.0) - log1p(exp(-fabs(x)));
}

/* y[N, out] = x[N, in] w[out, in]^T */
static inline void linear_forward(float *y, const float *x, const float *w, int64_t N, int in, int out) {
    gemm(N, out, in, 1, matrix(x, in), transposed(w, in), 0, y, out);
}

/* dx += dy w, dw += dy^T x */
static inline void linear_backward(float *dx, float *dw, const float *dy, const float *x, const float *w, int64_t N, int in,
                                   int out) {
    gemm(N, in, out, 1, matrix(dy, out), matrix(w, in), 1, dx, in);
    gemm(out, in, N, 1, transposed(dy, out), matrix(x, in), 1, dw, in);
}

/* x[N, d] = rows of w[V, d] named by tokens[N]. */
static inline void embedding_forward(float *x, const int32_t *tokens, const float *w, int64_t N, int d) {
#pragma omp parallel for if (N >= FOX_PARALLEL)
    for (int64_t n = 0; n < N; n++) {
        memcpy(x + n * d, w + (int64_t)tokens[n] * d, sizeof(float) * (size_t)d);
    }
}

/* dw[tokens[n]] += dx[n], in the order of n: each thread owns some columns. */
static inline void embedding_backward(float *dw, const float *dx, const int32_t *tokens, int64_t N, int d) {
#pragma omp parallel for if (N >= FOX_PARALLEL)
    for (int j0 = 0; j0 < d; j0 += FOX_COLUMNS) {
        int j1 = (int)fox_min64(j0 + FOX_COLUMNS, d);
        for (int64_t n = 0; n < N; n++) {
            float *row = dw + (int64_t)tokens[n] * d;
            for (int j = j0; j < j1; j++) {
                row[j] += dx[n * d + j];
            }
        }
    }
}

/* RMSNorm over G groups of D values in each row: y = x * rstd * w, rstd = 1 / sqrt(mean(x^2) + eps). G = 1 is the norm of
 * the residual stream, G = H the norms per head. x, y: [N, G*D]; rstd: [N, G]; w: [G*D], or [D] for all groups (shared). */
static inline void rmsnorm_forward(float *y, float *rstd, const float *x, const float *w, int64_t N, int G, int D, bool shared,
                                   float eps) {
#pragma omp parallel for if (N >= FOX_PARALLEL)
    for (int64_t n = 0; n < N * G; n++) {
        const float *row = x + n * D, *weight = shared ? w : w + n % G * D;
        float sum = 0;
        for (int i = 0; i < D; i++) {
            sum += row[i] * row[i];
        }
        rstd[n] = 1.0f / sqrtf(sum / (float)D + eps);
        for (int i = 0; i < D; i++) {
            y[n * D + i] = row[i] * rstd[n] * weight[i];
        }
    }
}

/* With xhat = x * rstd and g = dy * w:  dx += rstd * (g - xhat * mean(g * xhat)),  dw += sum over rows of dy * xhat. */
static inline void rmsnorm_backward(float *dx, float *dw, const float *dy, const float *x, const float *rstd, const float *w,
                                    int64_t N, int G, int D, bool shared) {
#pragma omp parallel for if (N >= FOX_PARALLEL)
    for (int64_t n = 0; n < N * G; n++) {
        const float *row = x + n * D, *grad = dy + n * D, *weight = shared ? w : w + n % G * D;
        float dot = 0, r = rstd[n];
        for (int i = 0; i < D; i++) {
            dot += grad[i] * weight[i] * row[i];
        }
        dot *= r * r / (float)D;
        for (int i = 0; i < D; i++) {
            dx[n * D + i] += r * (grad[i] * weight[i] - row[i] * dot);
        }
    }
    /* A shared weight sees every group as a row of its own. */
    int groups = shared ? 1 : G, width = groups * D;
    int64_t rows = N * G / groups;
#pragma omp parallel for if (N >= FOX_PARALLEL)
    for (int j0 = 0; j0 < width; j0 += FOX_COLUMNS) {
        int columns = (int)fox_min64(FOX_COLUMNS, width - j0);
        double sum[FOX_COLUMNS] = {0};
        for (int64_t n = 0; n < rows; n++) {
            for (int j = 0; j < columns; j++) {
                int64_t at = n * width + j0 + j;
                sum[j] += (double)(dy[at] * x[at] * rstd[n * groups + (j0 + j) / D]);
            }
        }
        for (int j = 0; j < columns; j++) {
            dw[j0 + j] += (float)sum[j];
        }
    }
}

/* Token shift (FoX paper, section 4: data-dependent key and value shift). a = sigmoid(alpha), per token and head:
 *     out[t] = a[t] * z[t-1] + (1 - a[t]) * z[t],  z[-1] = previous (zero where previous is NULL)
 * z, out: [B, T, H*D]; alpha: [B, T, H], before the sigmoid; previous: [B, H*D]. */
static inline void token_shift_forward(float *out, const float *z, const float *alpha, const float *previous, int B, int T, int H,
                                       int D) {
    int d = H * D;
#pragma omp parallel for if ((int64_t)B * T >= FOX_PARALLEL)
    for (int64_t n = 0; n < (int64_t)B * T; n++) {
        const float *before = n % T > 0 ? z + (n - 1) * d : previous ? previous + n / T * d : NULL;
        for (int i = 0; i < d; i++) {
            float a = fox_sigmoid(alpha[n * H + i / D]);
            out[n * d + i] = a * (before ? before[i] : 0) + (1 - a) * z[n * d + i];
        }
    }
}

/* dz[t] += (1 - a[t]) dout[t] + a[t+1] dout[t+1];  dalpha[t] += a (1 - a) * sum_i dout[t] (z[t-1] - z[t]). */
static inline void token_shift_backward(float *dz, float *dalpha, const float *dout, const float *z, const float *alpha, int B,
                                        int T, int H, int D) {
    int d = H * D;
#pragma omp parallel for if ((int64_t)B * T >= FOX_PARALLEL)
    for (int64_t n = 0; n < (int64_t)B * T; n++) {
        bool first = n % T == 0, last = n % T == T - 1;
        for (int h = 0; h < H; h++) {
            float a = fox_sigmoid(alpha[n * H + h]), next = last ? 0 : fox_sigmoid(alpha[(n + 1) * H + h]), dot = 0;
            for (int i = h * D; i < (h + 1) * D; i++) {
                float here = dout[n * d + i];
                dot += here * ((first ? 0 : z[(n - 1) * d + i]) - z[n * d + i]);
                dz[n * d + i] += (1 - a) * here + (last ? 0 : next * dout[(n + 1) * d + i]);
            }
            dalpha[n * H + h] += a * (1 - a) * dot;
        }
    }
}

/* Rotary position embedding in place (baseline only): the pair (x[i], x[i + D/2]) of each head turns by the angle
 * position * base^(-2i/D). direction +1 is the forward pass, -1 its inverse, which is also its gradient. x: [B, T, H*D],
 * the first token of each sequence at `position`. */
static inline void rope(float *x, int B, int T, int H, int D, double base, int position, int direction) {
#pragma omp parallel for if ((int64_t)B * T >= FOX_PARALLEL)
    for (int64_t n = 0; n < (int64_t)B * T; n++) {
        for (int i = 0; i < D / 2; i++) {
            double angle = (double)(position + n % T) * pow(base, -2.0 * i / D);
            float cosine = (float)cos(angle), sine = (float)(sin(angle) * direction);
            for (int h = 0; h < H; h++) {
                float *a = x + (n * H + h) * D + i, *b = a + D / 2;
                float u = *a, v = *b;
                *a = u * cosine - v * sine;
                *b = u * sine + v * cosine;
            }
        }
    }
}

/* Forget gate: f[n, h] += bias[h] gives the logits; c[b, h, t] = sum_{l <= t} logsigmoid(f[b, l, h]) in double precision,
 * because c reaches -45,000 at long contexts while c_i - c_j must be right to 1e-4. */
static inline void forget_gate_forward(double *c, float *f, const float *bias, int B, int T, int H) {
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < H; h++) {
            double sum = 0;
            for (int t = 0; t < T; t++) {
                float *logit = f + ((int64_t)b * T + t) * H + h;
                *logit += bias[h];
                sum += fox_log_sigmoid((double)*logit);
                c[((int64_t)b * H + h) * T + t] = sum;
            }
        }
    }
}

/* d log f[t] = sum_{l >= t} dc[l];  df += dlogf * sigmoid(-f);  dbias += sum df. */
static inline void forget_gate_backward(float *df, float *dbias, const double *dc, const float *f, int B, int T, int H) {
    for (int h = 0; h < H; h++) {
        double total = 0;
        for (int b = 0; b < B; b++) {
            double sum = 0;
            for (int t = T - 1; t >= 0; t--) {
                int64_t n = ((int64_t)b * T + t) * H + h;
                sum += dc[((int64_t)b * H + h) * T + t];
                double grad = sum / (1 + exp((double)f[n]));
                df[n] += (float)grad;
                total += grad;
            }
        }
        dbias[h] += (float)total;
    }
}

/* out = x * sigmoid(g) */
static inline void gate_forward(float *out, const float *x, const float *g, int64_t count) {
#pragma omp parallel for if (count >= FOX_PARALLEL * 64)
    for (int64_t i = 0; i < count; i++) {
        out[i] = x[i] * fox_sigmoid(g[i]);
    }
}

/* With s = sigmoid(g): dx += dout s, dg += dout x s (1 - s). All [count]. */
static inline void gate_backward(float *dx, float *dg, const float *dout, const float *x, const float *g, int64_t count) {
#pragma omp parallel for if (count >= FOX_PARALLEL * 64)
    for (int64_t i = 0; i < count; i++) {
        float s = fox_sigmoid(g[i]);
        dx[i] += dout[i] * s;
        dg[i] += dout[i] * x[i] * s * (1 - s);
    }
}

/* out = silu(g) * u, where each row of gu[N, 2F] holds g, then u. out: [N, F]. silu(x) = x sigmoid(x). */
static inline void swiglu_forward(float *out, const float *gu, int64_t N, int F) {
#pragma omp parallel for if (N >= FOX_PARALLEL)
    for (int64_t n = 0; n < N; n++) {
        const float *g = gu + n * 2 * F, *u = g + F;
        for (int i = 0; i < F; i++) {
            out[n * F + i] = g[i] * fox_sigmoid(g[i]) * u[i];
        }
    }
}

/* With s = sigmoid(g): dg += dout u s (1 + g (1 - s)), du += dout g s. dgu: [N, 2F], g's before u's; dout: [N, F]. */
static inline void swiglu_backward(float *dgu, const float *dout, const float *gu, int64_t N, int F) {
#pragma omp parallel for if (N >= FOX_PARALLEL)
    for (int64_t n = 0; n < N; n++) {
        const float *g = gu + n * 2 * F, *u = g + F;
        float *dg = dgu + n * 2 * F, *du = dg + F;
        for (int i = 0; i < F; i++) {
            float s = fox_sigmoid(g[i]), grad = dout[n * F + i];
            dg[i] += grad * u[i] * s * (1 + g[i] * (1 - s));
            du[i] += grad * g[i] * s;
        }
    }
}

/* losses[n] = log sum_v exp(logits[n, v]) - logits[n, target]. Where scale is not 0, logits become scale * d loss / d logits
 * in place: scale * (softmax - onehot). */
static inline void cross_entropy(float *losses, float *logits, const int32_t *targets, int64_t N, int V, float scale) {
#pragma omp parallel for if (N >= FOX_PARALLEL)
    for (int64_t n = 0; n < N; n++) {
        float *row = logits + n * V, high = row[0];
        double sum = 0;
        for (int v = 1; v < V; v++) {
            high = row[v] > high ? row[v] : high;
        }
        for (int v = 0; v < V; v++) {
            sum += (double)expf(row[v] - high);
        }
        float lse = high + (float)log(sum);
        losses[n] = lse - row[targets[n]];
        if (scale != 0) {
            for (int v = 0; v < V; v++) {
                row[v] = scale * expf(row[v] - lse);
            }
            row[targets[n]] -= scale;
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Forgetting attention                                                                                                */

/* Logits of one tile, queries i0.. (rows) by keys j0.. (columns):
 *     S[r, s] = q_i.k_j / sqrt(D) + c_i - c_j,  -infinity where j > i
 * c enters relative to c[i0], so that the difference keeps its digits however large c is. S: [rows][FOX_BLOCK]. */
static inline void attention_tile(float *S, const float *q, const float *k, const double *c, int i0, int rows, int j0, int columns,
                                  int D, int64_t stride) {
    float key_bias[FOX_BLOCK];
    gemm_serial(rows, columns, D, 1.0f / sqrtf((float)D), matrix(q + i0 * stride, stride), transposed(k + j0 * stride, stride), 0,
                S, FOX_BLOCK);
    for (int s = 0; s < columns; s++) {
        key_bias[s] = (float)(c[i0] - c[j0 + s]);
    }
    for (int r = 0; r < rows; r++) {
        float query_bias = (float)(c[i0 + r] - c[i0]);
        for (int s = 0; s < columns; s++) {
            S[r * FOX_BLOCK + s] = j0 + s <= i0 + r ? S[r * FOX_BLOCK + s] + (query_bias + key_bias[s]) : -INFINITY;
        }
    }
}

/* One head of forgetting attention with online softmax (FlashAttention), skipping the key blocks before first[I].
 * q, k, v, o: rows of D floats, `stride` apart; c: [T]; first: [acp_blocks(T, FOX_BLOCK)]; lse: [T], the row's
 * log-normaliser in units where the row's own decay is 0, log sum_j exp(s_ij + c_i - c_j). */
static inline void attention_head_forward(float *o, float *lse, const float *q, const float *k, const float *v, const double *c,
                                          const int *first, int T, int D, int64_t stride) {
    float S[FOX_BLOCK * FOX_BLOCK], high[FOX_BLOCK], sum[FOX_BLOCK];
    for (int i0 = 0; i0 < T; i0 += FOX_BLOCK) {
        int rows = (int)fox_min64(FOX_BLOCK, T - i0);
        for (int r = 0; r < rows; r++) {
            high[r] = -INFINITY;
            sum[r] = 0;
            memset(o + (i0 + r) * stride, 0, sizeof(float) * (size_t)D);
        }
        for (int j0 = first[i0 / FOX_BLOCK] * FOX_BLOCK; j0 < i0 + rows; j0 += FOX_BLOCK) {
            int columns = (int)fox_min64(FOX_BLOCK, T - j0);
            attention_tile(S, q, k, c, i0, rows, j0, columns, D, stride);
            for (int r = 0; r < rows; r++) {
                float *row = S + r * FOX_BLOCK, *out = o + (i0 + r) * stride, top = high[r];
                for (int s = 0; s < columns; s++) {
                    top = row[s] > top ? row[s] : top;
                }
                float rescale = expf(high[r] - top);
                high[r] = top;
                sum[r] *= rescale;
                for (int i = 0; i < D; i++) {
                    out[i] *= rescale;
                }
                for (int s = 0; s < columns; s++) {
                    row[s] = expf(row[s] - top);
                    sum[r] += row[s];
                }
            }
            gemm_serial(rows, D, columns, 1, matrix(S, FOX_BLOCK), matrix(v + j0 * stride, stride), 1, o + i0 * stride, stride);
        }
        for (int r = 0; r < rows; r++) {
            lse[i0 + r] = high[r] + logf(sum[r]);
            for (int i = 0; i < D; i++) {
                o[(i0 + r) * stride + i] /= sum[r];
            }
        }
    }
}

/* Its gradient. With P from the saved lse, dP = dO V^T and delta_i = dO_i.o_i:
 *     dS = P (dP - delta),  dV += P^T dO,  dQ += dS K / sqrt(D),  dK += dS^T Q / sqrt(D)
 *     dc_t += sum_j dS[t, j] - sum_i dS[i, t]
 * The row sum is zero on paper; the realised one is kept, because its rounding error would otherwise be summed over the
 * rest of the sequence by the gradient of the cumulative sum. Visits the pairs that the forward pass visited. */
static inline void attention_head_backward(float *dq, float *dk, float *dv, double *dc, const float *dout, const float *q,
                                           const float *k, const float *v, const double *c, const float *o, const float *lse,
                                           const int *first, int T, int D, int64_t stride) {
    float P[FOX_BLOCK * FOX_BLOCK], dS[FOX_BLOCK * FOX_BLOCK], delta[FOX_BLOCK], scale = 1.0f / sqrtf((float)D);
    for (int i0 = 0; i0 < T; i0 += FOX_BLOCK) {
        int rows = (int)fox_min64(FOX_BLOCK, T - i0);
        for (int r = 0; r < rows; r++) {
            delta[r] = (float)acp_dot(dout + (i0 + r) * stride, o + (i0 + r) * stride, D);
        }
        for (int j0 = first[i0 / FOX_BLOCK] * FOX_BLOCK; j0 < i0 + rows; j0 += FOX_BLOCK) {
            int columns = (int)fox_min64(FOX_BLOCK, T - j0);
            MatrixView dO = matrix(dout + i0 * stride, stride);
            attention_tile(P, q, k, c, i0, rows, j0, columns, D, stride);
            gemm_serial(rows, columns, D, 1, dO, transposed(v + j0 * stride, stride), 0, dS, FOX_BLOCK);
            for (int r = 0; r < rows; r++) {
                double row_sum = 0;
                for (int s = 0; s < columns; s++) {
                    int at = r * FOX_BLOCK + s;
                    P[at] = expf(P[at] - lse[i0 + r]);
                    dS[at] = P[at] * (dS[at] - delta[r]);
                    row_sum += (double)dS[at];
                    dc[j0 + s] -= (double)dS[at];
                }
                dc[i0 + r] += row_sum;
            }
            gemm_serial(columns, D, rows, 1, transposed(P, FOX_BLOCK), dO, 1, dv + j0 * stride, stride);
            gemm_serial(columns, D, rows, scale, transposed(dS, FOX_BLOCK), matrix(q + i0 * stride, stride), 1, dk + j0 * stride,
                        stride);
            gemm_serial(rows, D, columns, scale, matrix(dS, FOX_BLOCK), matrix(k + j0 * stride, stride), 1, dq + i0 * stride,
                        stride);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* The model                                                                                                           */

/* Pointers to one layer's weights, or to their gradients; NULL where the configuration has none. */
typedef struct FoxLayerWeights {
    float *attn_norm, *q, *k, *v, *ogate, *k_shift, *v_shift, *fgate, *fgate_bias, *q_norm, *k_norm, *output_norm, *o;
    float *mlp_norm, *gate_up, *down;
} FoxLayerWeights;

/* One layer's activations, or their gradients. Layers that a configuration leaves out alias their output to their input. */
typedef struct FoxActs {
    float *h1, *rstd1;           /* [N, d], [N]: rmsnorm(x) */
    float *q_lin, *k_lin, *v_lin; /* [N, d] */
    float *k_alpha, *v_alpha;    /* [N, H], logits of the token shift */
    float *k_mix, *v;            /* [N, d], after the token shift */
    float *q_rstd, *k_rstd;      /* [N, H] */
    float *q, *k;                /* [N, d], after QK-norm and RoPE: what attention sees */
    float *f;                    /* [N, H], logits of the forget gate */
    double *c;                   /* [B, H, T], cumulative log forget gate */
    int *first;                  /* [B, H, blocks], first key block that attention keeps */
    float *o, *lse;              /* [N, d], [B, H, T]: attention */
    float *o_rstd, *o_norm;      /* [N, H], [N, d] */
    float *ogate, *o_gated;      /* [N, d] */
    float *x2;                   /* [N, d], residual stream between attention and MLP */
    float *h2, *rstd2;           /* [N, d], [N]: rmsnorm(x2) */
    float *gate_up, *act;        /* [N, 2F], [N, F] */
    int64_t bytes;               /* of the whole block of memory, */
    void *memory;                /* which starts here */
} FoxActs;

/* A model at work on B sequences of T tokens (N = B T): parameters by name through the table, and all that forward leaves for
 * backward. fox_model_create makes it, fox_forward and fox_forward_backward use it. */
typedef struct FoxModel {
    FoxConfig config;
    const FoxTable *table;
    int B, T;
    AcpMode acp;
    float log_tolerance;
    bool recompute;          /* keep only each block's input, and run its forward again in backward */
    float *params, *grads;   /* flat, table->total floats; not owned; grads may be NULL for a forward-only model */
    float *x;                /* [L + 1, N, d], the residual stream before each layer and after the last */
    FoxActs *acts;           /* [L], or [1] when recomputing */
    FoxActs dacts;           /* gradients of one layer's activations */
    float *dx;               /* [N, d], gradient of the residual stream */
    float *h, *rstd, *dh;    /* [N, d], [N], [N, d]: the last norm */
    float *logits;           /* [FOX_HEAD_ROWS, V] */
    double *skipped, *total; /* [L, H], blocks since they were last zeroed */
    int *first_blocks;       /* NULL, or where forward leaves the ranges of the first sequence: [L, H, blocks]; not owned */
} FoxModel;

enum { FOX_HEAD_ROWS = 1024 }; /* rows of logits in memory at a time: V is large, N too */

/* Where a layer's tensors stand in `base`, a flat space of parameters or of gradients; NULL: the model has no such tensor. */
static inline FoxLayerWeights fox_layer_weights(const FoxTable *table, int layer, float *base) {
    const FoxLayerIds *id = &table->layers[layer];
#define FOX_WEIGHT(index) ((index) < 0 ? NULL : base + table->tensors[index].offset)
    FoxLayerWeights w;
    w.attn_norm = FOX_WEIGHT(id->attn_norm);
    w.q = FOX_WEIGHT(id->q);
    w.k = FOX_WEIGHT(id->k);
    w.v = FOX_WEIGHT(id->v);
    w.ogate = FOX_WEIGHT(id->ogate);
    w.k_shift = FOX_WEIGHT(id->k_shift);
    w.v_shift = FOX_WEIGHT(id->v_shift);
    w.fgate = FOX_WEIGHT(id->fgate);
    w.fgate_bias = FOX_WEIGHT(id->fgate_bias);
    w.q_norm = FOX_WEIGHT(id->q_norm);
    w.k_norm = FOX_WEIGHT(id->k_norm);
    w.output_norm = FOX_WEIGHT(id->output_norm);
    w.o = FOX_WEIGHT(id->o);
    w.mlp_norm = FOX_WEIGHT(id->mlp_norm);
    w.gate_up = FOX_WEIGHT(id->gate_up);
    w.down = FOX_WEIGHT(id->down);
#undef FOX_WEIGHT
    return w;
}

/* Takes `count` floats from a block of memory that is being laid out (base NULL: only counts them). */
static inline float *fox_take(char *base, int64_t *bytes, int64_t count) {
    char *p = base == NULL ? NULL : base + *bytes;
    *bytes += (count * (int64_t)sizeof(float) + 63) / 64 * 64;
    return (float *)(void *)p;
}

/* Lays out one layer's activations for N = B*T tokens in `memory` (NULL: only counts bytes). */
static inline FoxActs fox_acts_layout(const FoxConfig *config, int B, int T, void *memory) {
    FoxActs a;
    char *base = (char *)memory;
    int64_t N = (int64_t)B * T, d = config->hidden_size, H = config->num_heads, F = config->intermediate_size, n = 0;
    memset(&a, 0, sizeof a);
    a.h1 = fox_take(base, &n, N * d);
    a.rstd1 = fox_take(base, &n, N);
    a.q_lin = fox_take(base, &n, N * d);
    a.k_lin = fox_take(base, &n, N * d);
    a.v_lin = fox_take(base, &n, N * d);
    a.k_alpha = fox_take(base, &n, config->use_k_shift ? N * H : 0);
    a.v_alpha = fox_take(base, &n, config->use_v_shift ? N * H : 0);
    a.k_mix = config->use_k_shift ? fox_take(base, &n, N * d) : a.k_lin;
    a.v = config->use_v_shift ? fox_take(base, &n, N * d) : a.v_lin;
    a.q_rstd = fox_take(base, &n, config->qk_norm ? N * H : 0);
    a.k_rstd = fox_take(base, &n, config->qk_norm ? N * H : 0);
    a.q = config->qk_norm ? fox_take(base, &n, N * d) : a.q_lin;
    a.k = config->qk_norm ? fox_take(base, &n, N * d) : a.k_mix;
    a.f = fox_take(base, &n, config->use_forget_gate ? N * H : 0);
    a.c = (double *)(void *)fox_take(base, &n, 2 * N * H) /* doubles */;
    a.first = (int *)(void *)fox_take(base, &n, B * H * acp_blocks(T, FOX_BLOCK));
    a.o = fox_take(base, &n, N * d);
    a.lse = fox_take(base, &n, N * H);
    a.o_rstd = fox_take(base, &n, config->use_output_norm ? N * H : 0);
    a.o_norm = config->use_output_norm ? fox_take(base, &n, N * d) : a.o;
    a.ogate = fox_take(base, &n, config->use_output_gate ? N * d : 0);
    a.o_gated = config->use_output_gate ? fox_take(base, &n, N * d) : a.o_norm;
    a.x2 = fox_take(base, &n, N * d);
    a.h2 = fox_take(base, &n, N * d);
    a.rstd2 = fox_take(base, &n, N);
    a.gate_up = fox_take(base, &n, N * 2 * F);
    a.act = fox_take(base, &n, N * F);
    a.bytes = n;
    a.memory = memory;
    return a;
}

/* The caller frees .memory. */
static inline FoxActs fox_acts_create(const FoxConfig *config, int B, int T) {
    return fox_acts_layout(config, B, T, fox_alloc((size_t)fox_acts_layout(config, B, T, NULL).bytes));
}

/* Bytes that fox_model_create takes beside params and grads. */
static inline int64_t fox_model_bytes(const FoxConfig *config, int B, int T, bool recompute, bool backward) {
    int64_t N = (int64_t)B * T, d = config->hidden_size, L = config->num_hidden_layers;
    int64_t acts = fox_acts_layout(config, B, T, NULL).bytes;
    int64_t rows = fox_min64(N, FOX_HEAD_ROWS);
    return (int64_t)sizeof(float) * ((L + 1) * N * d + N * d + N + rows * config->vocab_size) + (recompute ? 1 : L) * acts +
           (backward ? acts + (int64_t)sizeof(float) * 2 * N * d : 0);
}

/* A model over parameters (and gradients; NULL for forward only) that somebody else owns. Free with fox_model_free. */
static inline FoxModel fox_model_create(const FoxConfig *config, const FoxTable *table, float *params, float *grads, int B, int T,
                                        bool recompute) {
    FoxModel m;
    int64_t N = (int64_t)B * T, d = config->hidden_size, L = config->num_hidden_layers, layers = recompute ? 1 : L;
    int64_t cells = L * config->num_heads, rows = fox_min64(N, FOX_HEAD_ROWS);
    memset(&m, 0, sizeof m);
    m.config = *config;
    m.table = table;
    m.B = B;
    m.T = T;
    m.acp = ACP_OFF;
    m.log_tolerance = -10;
    m.recompute = recompute;
    m.params = params;
    m.grads = grads;
    m.x = FOX_NEW(float, (L + 1) * N * d);
    m.acts = FOX_NEW(FoxActs, layers);
    for (int64_t l = 0; l < layers; l++) {
        m.acts[l] = fox_acts_create(config, B, T);
    }
    m.h = FOX_NEW(float, N * d);
    m.rstd = FOX_NEW(float, N);
    m.logits = FOX_NEW(float, rows * config->vocab_size);
    if (grads != NULL) {
        m.dacts = fox_acts_create(config, B, T);
        m.dx = FOX_NEW(float, N * d);
        m.dh = FOX_NEW(float, N * d);
    }
    m.skipped = FOX_NEW(double, cells);
    m.total = FOX_NEW(double, cells);
    return m;
}

static inline void fox_model_free(FoxModel *m) {
    int layers = m->recompute ? 1 : m->config.num_hidden_layers;
    for (int l = 0; l < layers; l++) {
        free(m->acts[l].memory);
    }
    free(m->dacts.memory);
    free(m->acts);
    free(m->x);
    free(m->dx);
    free(m->h);
    free(m->rstd);
    free(m->dh);
    free(m->logits);
    free(m->skipped);
    free(m->total);
    memset(m, 0, sizeof *m);
}

/* Everything that multiplies the normed input: q, k, v, and the logits of the output gate, forget gate and token shifts. */
static inline void fox_project(const FoxConfig *config, const FoxLayerWeights *w, FoxActs *a, const float *x, int64_t N) {
    int d = config->hidden_size, H = config->num_heads;
    rmsnorm_forward(a->h1, a->rstd1, x, w->attn_norm, N, 1, d, false, (float)config->norm_eps);
    linear_forward(a->q_lin, a->h1, w->q, N, d, d);
    linear_forward(a->k_lin, a->h1, w->k, N, d, d);
    linear_forward(a->v_lin, a->h1, w->v, N, d, d);
    if (config->use_output_gate) {
        linear_forward(a->ogate, a->h1, w->ogate, N, d, d);
    }
    if (config->use_k_shift) {
        linear_forward(a->k_alpha, a->h1, w->k_shift, N, d, H);
    }
    if (config->use_v_shift) {
        linear_forward(a->v_alpha, a->h1, w->v_shift, N, d, H);
    }
    if (config->use_forget_gate) {
        linear_forward(a->f, a->h1, w->fgate, N, d, H);
    }
}

/* From the projections to what attention sees. k_before, v_before: the projections of the token before the first, [B, d];
 * NULL at the start of a sequence. position: of the first token, for RoPE. */
static inline void fox_shift_and_norm(const FoxConfig *config, const FoxLayerWeights *w, FoxActs *a, const float *k_before,
                                      const float *v_before, int B, int T, int position) {
    int H = config->num_heads, D = config->hidden_size / H;
    int64_t N = (int64_t)B * T;
    bool shared = config->qk_norm_share_param_across_head;
    if (config->use_k_shift) {
        token_shift_forward(a->k_mix, a->k_lin, a->k_alpha, k_before, B, T, H, D);
    }
    if (config->use_v_shift) {
        token_shift_forward(a->v, a->v_lin, a->v_alpha, v_before, B, T, H, D);
    }
    if (config->qk_norm) {
        rmsnorm_forward(a->q, a->q_rstd, a->q_lin, w->q_norm, N, H, D, shared, FOX_QK_NORM_EPS);
        rmsnorm_forward(a->k, a->k_rstd, a->k_mix, w->k_norm, N, H, D, shared, FOX_QK_NORM_EPS);
    }
    if (config->use_rope) {
        rope(a->q, B, T, H, D, config->rope_base, position, 1);
        rope(a->k, B, T, H, D, config->rope_base, position, 1);
    }
}

/* From the output of attention to the output of the block: output norm and gate, projection, residual, MLP. */
static inline void fox_output_and_mlp(const FoxConfig *config, const FoxLayerWeights *w, FoxActs *a, const float *x, float *x_out,
                                      int64_t N) {
    int d = config->hidden_size, H = config->num_heads, F = config->intermediate_size;
    if (config->use_output_norm) {
        rmsnorm_forward(a->o_norm, a->o_rstd, a->o, w->output_norm, N, H, d / H, false, (float)config->norm_eps);
    }
    if (config->use_output_gate) {
        gate_forward(a->o_gated, a->o_norm, a->ogate, N * d);
    }
    memcpy(a->x2, x, sizeof(float) * (size_t)(N * d));
    gemm(N, d, d, 1, matrix(a->o_gated, d), transposed(w->o, d), 1, a->x2, d);
    rmsnorm_forward(a->h2, a->rstd2, a->x2, w->mlp_norm, N, 1, d, false, (float)config->norm_eps);
    linear_forward(a->gate_up, a->h2, w->gate_up, N, d, 2 * F);
    swiglu_forward(a->act, a->gate_up, N, F);
    memcpy(x_out, a->x2, sizeof(float) * (size_t)(N * d));
    gemm(N, d, F, 1, matrix(a->act, F), transposed(w->down, F), 1, x_out, d);
}

/* The norms that queries and keys of head h have at most by its QK-norm weights, which there must be. */
static inline AcpNorms fox_norms_of_weights(const FoxConfig *config, const FoxLayerWeights *w, int h) {
    int D = config->hidden_size / config->num_heads, at = config->qk_norm_share_param_across_head ? 0 : h * D;
    return acp_norms_of_weights(w->q_norm + at, w->k_norm + at, D);
}

/* The same with or without QK-norm: without, those that they have. */
static inline AcpNorms fox_most_norms(const FoxConfig *config, const FoxLayerWeights *w, const AcpHead *head, int h) {
    return config->qk_norm ? fox_norms_of_weights(config, w, h) : acp_norms_measured(head);
}

/* First key block that each query block of one head keeps, by the chosen test. */
static inline void fox_first_blocks(const FoxModel *m, const FoxLayerWeights *w, const AcpHead *head, int h, int *first) {
    int T = head->T, D = head->D;
    double tolerance = (double)m->log_tolerance;
    if (m->acp == ACP_OFF || !m->config.use_forget_gate) {
        memset(first, 0, sizeof(int) * (size_t)acp_blocks(T, FOX_BLOCK));
        return;
    }
    AcpNorms most = fox_most_norms(&m->config, w, head, h);
    if (m->acp == ACP_PAPER) {
        acp_first_blocks_paper(T, head->c, acp_threshold(acp_bound(most, D), T, tolerance), FOX_BLOCK, FOX_BLOCK, first);
    } else {
        acp_first_blocks_tight(head, most, tolerance, FOX_BLOCK, FOX_BLOCK, first);
    }
}

/* Attention of all heads of a layer, with pruning, counted into skipped and total if `count`. */
static inline void fox_attention_forward(FoxModel *m, const FoxLayerWeights *w, int layer, FoxActs *a, bool count) {
    int B = m->B, T = m->T, H = m->config.num_heads, d = m->config.hidden_size, D = d / H, blocks = acp_blocks(T, FOX_BLOCK);
    if (m->config.use_forget_gate) {
        forget_gate_forward(a->c, a->f, w->fgate_bias, B, T, H);
    }
#pragma omp parallel for schedule(dynamic) if ((int64_t)B * T >= FOX_PARALLEL)
    for (int bh = 0; bh < B * H; bh++) {
        int64_t at = (int64_t)(bh / H) * T * d + bh % H * D;
        AcpHead head = {T, D, a->q + at, a->k + at, d, a->c + (int64_t)bh * T};
        int *first = a->first + (int64_t)bh * blocks;
        fox_first_blocks(m, w, &head, bh % H, first);
        attention_head_forward(a->o + at, a->lse + (int64_t)bh * T, a->q + at, a->k + at, a->v + at, head.c, first, T, D, d);
    }
    for (int bh = 0; count && bh < B * H; bh++) {
        m->skipped[layer * H + bh % H] += (double)acp_skipped_blocks(blocks, a->first + (int64_t)bh * blocks);
        m->total[layer * H + bh % H] += (double)acp_causal_blocks(T, FOX_BLOCK, FOX_BLOCK);
    }
    if (m->first_blocks != NULL) {
        memcpy(m->first_blocks + (int64_t)layer * H * blocks, a->first, sizeof(int) * (size_t)(H * blocks));
    }
}

/* da->o to da->q, k, v and, with a forget gate, to da->f and its bias; of the pairs of blocks that forward visited (a->first). */
static inline void fox_attention_backward(const FoxModel *m, const FoxLayerWeights *dw, FoxActs *da, const FoxActs *a) {
    int B = m->B, T = m->T, H = m->config.num_heads, d = m->config.hidden_size, D = d / H, blocks = acp_blocks(T, FOX_BLOCK);
#pragma omp parallel for schedule(dynamic) if ((int64_t)B * T >= FOX_PARALLEL)
    for (int bh = 0; bh < B * H; bh++) {
        int64_t at = (int64_t)(bh / H) * T * d + bh % H * D, t = (int64_t)bh * T;
        attention_head_backward(da->q + at, da->k + at, da->v + at, da->c + t, da->o + at, a->q + at, a->k + at, a->v + at, a->c + t,
                                a->o + at, a->lse + t, a->first + (int64_t)bh * blocks, T, D, d);
    }
    if (m->config.use_forget_gate) {
        forget_gate_backward(da->f, dw->fgate_bias, da->c, a->f, B, T, H);
    }
}

/* x[layer + 1] from x[layer]; count: what is pruned, which is not counted again where backward makes a layer anew. */
static inline void fox_block_forward(FoxModel *m, int layer, FoxActs *a, bool count) {
    int64_t N = (int64_t)m->B * m->T, d = m->config.hidden_size;
    const float *x = m->x + layer * N * d;
    FoxLayerWeights w = fox_layer_weights(m->table, layer, m->params);
    fox_project(&m->config, &w, a, x, N);
    fox_shift_and_norm(&m->config, &w, a, NULL, NULL, m->B, m->T, 0);
    fox_attention_forward(m, &w, layer, a, count);
    fox_output_and_mlp(&m->config, &w, a, x, m->x + (layer + 1) * N * d, N);
}

/* m->dx holds the gradient of the block's output and leaves with that of its input: through the residual connections it
 * only needs the branches added. */
static inline void fox_block_backward(FoxModel *m, int layer, const FoxActs *a) {
    const FoxConfig *config = &m->config;
    int d = config->hidden_size, H = config->num_heads, D = d / H, F = config->intermediate_size;
    int64_t N = (int64_t)m->B * m->T;
    bool shared = config->qk_norm_share_param_across_head;
    FoxLayerWeights w = fox_layer_weights(m->table, layer, m->params), dw = fox_layer_weights(m->table, layer, m->grads);
    FoxActs *da = &m->dacts;
    memset(da->memory, 0, (size_t)da->bytes);

    linear_backward(da->act, dw.down, m->dx, a->act, w.down, N, F, d);
    swiglu_backward(da->gate_up, da->act, a->gate_up, N, F);
    linear_backward(da->h2, dw.gate_up, da->gate_up, a->h2, w.gate_up, N, d, 2 * F);
    rmsnorm_backward(m->dx, dw.mlp_norm, da->h2, a->x2, a->rstd2, w.mlp_norm, N, 1, d, false);

    linear_backward(da->o_gated, dw.o, m->dx, a->o_gated, w.o, N, d, d);
    if (config->use_output_gate) {
        gate_backward(da->o_norm, da->ogate, da->o_gated, a->o_norm, a->ogate, N * d);
        linear_backward(da->h1, dw.ogate, da->ogate, a->h1, w.ogate, N, d, d);
    }
    if (config->use_output_norm) {
        rmsnorm_backward(da->o, dw.output_norm, da->o_norm, a->o, a->o_rstd, w.output_norm, N, H, D, false);
    }
    fox_attention_backward(m, &dw, da, a);
    if (config->use_forget_gate) {
        linear_backward(da->h1, dw.fgate, da->f, a->h1, w.fgate, N, d, H);
    }
    if (config->use_rope) {
        rope(da->q, m->B, m->T, H, D, config->rope_base, 0, -1);
        rope(da->k, m->B, m->T, H, D, config->rope_base, 0, -1);
    }
    if (config->qk_norm) {
        rmsnorm_backward(da->q_lin, dw.q_norm, da->q, a->q_lin, a->q_rstd, w.q_norm, N, H, D, shared);
        rmsnorm_backward(da->k_mix, dw.k_norm, da->k, a->k_mix, a->k_rstd, w.k_norm, N, H, D, shared);
    }
    if (config->use_k_shift) {
        token_shift_backward(da->k_lin, da->k_alpha, da->k_mix, a->k_lin, a->k_alpha, m->B, m->T, H, D);
        linear_backward(da->h1, dw.k_shift, da->k_alpha, a->h1, w.k_shift, N, d, H);
    }
    if (config->use_v_shift) {
        token_shift_backward(da->v_lin, da->v_alpha, da->v, a->v_lin, a->v_alpha, m->B, m->T, H, D);
        linear_backward(da->h1, dw.v_shift, da->v_alpha, a->h1, w.v_shift, N, d, H);
    }
    linear_backward(da->h1, dw.q, da->q_lin, a->h1, w.q, N, d, d);
    linear_backward(da->h1, dw.k, da->k_lin, a->h1, w.k, N, d, d);
    linear_backward(da->h1, dw.v, da->v_lin, a->h1, w.v, N, d, d);
    rmsnorm_backward(m->dx, dw.attn_norm, da->h1, m->x + layer * N * d, a->rstd1, w.attn_norm, N, 1, d, false);
}

/* A tensor of `base`, a flat space, by its place in the table. */
static inline float *fox_weight(const FoxModel *m, float *base, int tensor) {
    return base + m->table->tensors[tensor].offset;
}

/* The last norm, the vocabulary projection and the loss of each token, some rows at a time. Where scale is not 0 also
 * their gradients, times scale: the head's weights in grads, the normed stream in m->dh (which must be zero). */
static inline void fox_head(FoxModel *m, const int32_t *targets, float *losses, float scale) {
    int64_t N = (int64_t)m->B * m->T;
    int d = m->config.hidden_size, V = m->config.vocab_size;
    const float *w = fox_weight(m, m->params, m->table->lm_head);
    rmsnorm_forward(m->h, m->rstd, m->x + m->config.num_hidden_layers * N * d, fox_weight(m, m->params, m->table->norm), N, 1, d,
                    false, (float)m->config.norm_eps);
    for (int64_t n = 0; n < N; n += FOX_HEAD_ROWS) {
        int64_t rows = fox_min64(N - n, FOX_HEAD_ROWS);
        linear_forward(m->logits, m->h + n * d, w, rows, d, V);
        cross_entropy(losses + n, m->logits, targets + n, rows, V, scale);
        if (scale != 0) {
            linear_backward(m->dh + n * d, fox_weight(m, m->grads, m->table->lm_head), m->logits, m->h + n * d, w, rows, d, V);
        }
    }
}

/* tokens: [B, T] -> m->x, all layers. */
static inline void fox_body_forward(FoxModel *m, const int32_t *tokens) {
    embedding_forward(m->x, tokens, fox_weight(m, m->params, m->table->embeddings), (int64_t)m->B * m->T, m->config.hidden_size);
    for (int l = 0; l < m->config.num_hidden_layers; l++) {
        fox_block_forward(m, l, &m->acts[m->recompute ? 0 : l], true);
    }
}

/* Losses of every token, [B, T]. */
static inline void fox_forward(FoxModel *m, const int32_t *tokens, const int32_t *targets, float *losses) {
    fox_body_forward(m, tokens);
    fox_head(m, targets, losses, 0);
}

/* Losses of every token, and scale * d(sum of losses) added to m->grads. scale = 1/(B*T) gives the gradient of the mean. */
static inline void fox_forward_backward(FoxModel *m, const int32_t *tokens, const int32_t *targets, float *losses, float scale) {
    int64_t N = (int64_t)m->B * m->T;
    int d = m->config.hidden_size, L = m->config.num_hidden_layers;
    fox_body_forward(m, tokens);
    memset(m->dh, 0, sizeof(float) * (size_t)(N * d));
    memset(m->dx, 0, sizeof(float) * (size_t)(N * d));
    fox_head(m, targets, losses, scale);
    rmsnorm_backward(m->dx, fox_weight(m, m->grads, m->table->norm), m->dh, m->x + L * N * d, m->rstd,
                     fox_weight(m, m->params, m->table->norm), N, 1, d, false);
    for (int l = L - 1; l >= 0; l--) {
        if (m->recompute && l < L - 1) {
            fox_block_forward(m, l, &m->acts[0], false);
        }
        fox_block_backward(m, l, &m->acts[m->recompute ? 0 : l]);
    }
    embedding_backward(fox_weight(m, m->grads, m->table->embeddings), m->dx, tokens, N, d);
}

#endif

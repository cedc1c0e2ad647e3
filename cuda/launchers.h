/* Every GPU kernel of fox.c as a C function: what the CUDA back end calls, and what the tests compare with fox_layers.h.
 *
 * Arrays and DeviceStats are device memory; the other structs (shapes, layouts, configurations) are read on the host, during
 * the call. Every function only enqueues work on `stream`, checks its arguments with a sentence
 * (fox_die) and the launch with the runtime's reason. Shapes are row-major as in fox_layers.h: N = B*T tokens, d = H*D.
 * Precision: products and activations in bf16, the residual stream, gates, statistics and weight gradients in float32,
 * cumulative gates in double. Weight gradients are ADDED to; activation gradients are overwritten unless said otherwise.
 * Nothing here depends on the order of thread blocks: results repeat bit for bit. */
#ifndef FOX_LAUNCHERS_H
#define FOX_LAUNCHERS_H

#include <cuda_runtime_api.h>

#include "../train/backend.h"

/* A failed CUDA call is not something a caller can mend: says what and where, and ends the program. */
#define CUDA_CHECK(call) cuda_check((call), #call, __FILE__, __LINE__)
static inline void cuda_check(cudaError_t status, const char *call, const char *file, int line) {
    if (status != cudaSuccess) {
        fox_die("%s:%d: %s: %s", file, line, call, cudaGetErrorString(status));
    }
}

#ifdef __CUDACC__
#include <cuda_bf16.h>
typedef __nv_bfloat16 bf16;
#else
typedef uint16_t bf16; /* the upper half of a float */
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { CUDA_MOST_WIDTH = 4096, CUDA_MOST_TOKENS = 1 << 26 }; /* d; fewer tokens than that at a time */

/* ---- cuda/norm.cuh: the residual stream and its norms ---- */

/* x_out = x + branch (branch NULL: x_out = x and x_out may be x or NULL), h = rmsnorm(x_out) * w, rstd: [N].
 * x, x_out: float [N, d]; branch, h: bf16 [N, d]; w: float [d]. */
void cuda_residual_norm_forward(bf16 *h, float *rstd, float *x_out, const float *x, const bf16 *branch, const float *w, int64_t N,
                                int d, float eps, cudaStream_t stream);

/* dx += gradient through the norm of x, dx_bf16 = bf16(dx) for the products that follow; dw += . dx: float [N, d];
 * dh, dx_bf16: bf16 [N, d]. scratch: cuda_norm_scratch(d) floats. */
void cuda_norm_backward(float *dx, bf16 *dx_bf16, float *dw, float *scratch, const bf16 *dh, const float *x, const float *rstd,
                        const float *w, int64_t N, int d, cudaStream_t stream);
int64_t cuda_norm_scratch(int d);

/* ---- cuda/embedding.cuh ---- */

/* x[n] = w[tokens[n]], float. */
void cuda_embedding_forward(float *x, const int32_t *tokens, const float *w, int64_t N, int d, cudaStream_t stream);
/* dw[tokens[n]] += dx[n], every row of dw summed in a fixed order. scratch: cuda_embedding_scratch(N, V) int32. */
void cuda_embedding_backward(float *dw, const float *dx, const int32_t *tokens, int32_t *scratch, int64_t N, int d, int V,
                             cudaStream_t stream);
int64_t cuda_embedding_scratch(int64_t N, int V);

/* ---- cuda/qkv.cuh: from the packed product to what attention sees, in one pass, and back ---- */

/* Columns of one row of the packed product: q [d], k [d], v [d], then the output gate [d], the logits of the k shift [H],
 * v shift [H] and forget gate [H], each only if the configuration has it; -1 where absent. `row`: elements from one row to
 * the next, a multiple of 64. */
typedef struct PackedLayout {
    int q, k, v, ogate, k_shift, v_shift, fgate;
    int columns; /* in use */
    int row;
} PackedLayout;

/* What the pass needs of one layer. q_norm, k_norm: float [d] or [D] (shared) or NULL; fgate_bias: float [H] or NULL. */
typedef struct QkvWeights {
    const float *q_norm, *k_norm, *fgate_bias;
} QkvWeights;

/* q, k, v: bf16 [N, d]; q_rstd, k_rstd: float [N, H]; log_f: float [B, H, T], logsigmoid of the gate (0 without a gate).
 * token shift, QK-norm and RoPE as the configuration says; without token shift v is copied. */
void cuda_qkv_forward(bf16 *q, bf16 *k, bf16 *v, float *q_rstd, float *k_rstd, float *log_f, const bf16 *packed,
                      const PackedLayout *layout, const QkvWeights *weights, const FoxConfig *config, int B, int T,
                      cudaStream_t stream);

/* dpacked: bf16 [N, row], all columns but the output gate's are written (padding columns are set to zero); dq_norm, dk_norm,
 * dfgate_bias: float, added to. dq, dk, dv: bf16 [N, d]; dlog_f: float [B, H, T]. scratch: cuda_qkv_scratch(config) floats. */
void cuda_qkv_backward(bf16 *dpacked, float *dq_norm, float *dk_norm, float *dfgate_bias, float *scratch, const bf16 *dq,
                       const bf16 *dk, const bf16 *dv, const float *dlog_f, const bf16 *packed, const float *q_rstd,
                       const float *k_rstd, const PackedLayout *layout, const QkvWeights *weights, const FoxConfig *config, int B,
                       int T, cudaStream_t stream);
int64_t cuda_qkv_scratch(const FoxConfig *config);

/* ---- cuda/output_gate.cuh: o_gated = rmsnorm_per_head(o) * sigmoid(gate) ---- */

/* o, out: bf16 [N, d]; rstd: float [N, H]; w: float [d], NULL without output norm; the gate is the layout's ogate columns of
 * packed, -1 without output gate. Not called when there is neither. */
void cuda_output_gate_forward(bf16 *out, float *rstd, const bf16 *o, const bf16 *packed, const PackedLayout *layout, const float *w,
                              int64_t N, int H, int D, float eps, cudaStream_t stream);
/* d_o: bf16 [N, d]; the gate's columns of dpacked are written; dw += . scratch: cuda_norm_scratch(d) floats. */
void cuda_output_gate_backward(bf16 *d_o, bf16 *dpacked, float *dw, float *scratch, const bf16 *dout, const bf16 *o,
                               const float *rstd, const bf16 *packed, const PackedLayout *layout, const float *w, int64_t N, int H,
                               int D, cudaStream_t stream);

/* ---- cuda/swiglu.cuh ---- gu: bf16 [N, 2F], gate and up of each token; out = silu(gate) * up: bf16 [N, F] */
void cuda_swiglu_forward(bf16 *out, const bf16 *gu, int64_t N, int F, cudaStream_t stream);
/* dgu: bf16 [N, 2F], of gate and up; dout: bf16 [N, F] */
void cuda_swiglu_backward(bf16 *dgu, const bf16 *dout, const bf16 *gu, int64_t N, int F, cudaStream_t stream);

/* ---- cuda/cross_entropy.cuh ---- */

/* losses[n] (float) of each token; where scale is not 0, logits (bf16 [N, row], V columns in use) become scale * (softmax -
 * onehot) in place and padding columns zero; *loss_sum (double) += sum of losses, in a fixed order (NULL: not wanted). */
void cuda_cross_entropy(float *losses, double *loss_sum, bf16 *logits, const int32_t *targets, int64_t N, int V, int row,
                        float scale, cudaStream_t stream);

/* ---- cuda/adamw.cuh ---- */

/* What the device decides at the end of a step; read back only when a number is printed. */
typedef struct DeviceStats {
    double loss;      /* sum over the tokens of the step so far */
    double squares;   /* sum of the squared gradients */
    double grad_norm; /* before clipping */
    float grad_scale; /* of clipping */
    int32_t applied;  /* 0: not finite, nothing was changed */
} DeviceStats;

/* stats->squares += sum of grads[i]^2, in a fixed order. scratch: cuda_norm_squares_scratch() doubles. */
void cuda_add_squares(DeviceStats *stats, double *scratch, const float *grads, int64_t count, cudaStream_t stream);
int64_t cuda_norm_squares_scratch(void);

/* stats->grad_norm, grad_scale and applied from stats->squares and stats->loss. */
void cuda_clip(DeviceStats *stats, double grad_clip, cudaStream_t stream);

/* AdamW on `count` neighbours of the flat space, in one launch; weight decay applies from element decay_from on (a multiple
 * of 4; 0 or less: to all, `count` or more: to none). Writes the bf16 copy too; does nothing when stats->applied is 0. Sets
 * grads to zero either way. The arrays begin at multiples of 16 bytes (params_bf16: of 8). */
void cuda_adamw(float *params, bf16 *params_bf16, float *m, float *v, float *grads, int64_t count, int64_t decay_from,
                const AdamW *adamw, const DeviceStats *stats, cudaStream_t stream);

/* out = bf16(in), and back */
void cuda_to_bf16(bf16 *out, const float *in, int64_t count, cudaStream_t stream);
void cuda_from_bf16(float *out, const bf16 *in, int64_t count, cudaStream_t stream);

/* ---- acp_attention.cuh ---- */

/* Attention of one layer: shapes, pruning, and the memory it works in. */
typedef struct AcpShape {
    int B, T, H, D; /* D is 64 or 128 */
    AcpMode mode;
    double log_tolerance;
    bool shared_norm; /* q_norm and k_norm have length D */
    bool portable;    /* the kernels for every chip, also where there are faster ones */
} AcpShape;

enum { ACP_MOST_HEADS = 65535, ACP_MOST_ROWS = INT32_MAX }; /* B*H, and fewer than that B*H*T */

/* Tokens in the longest sequence that the current device can search for ranges. */
int64_t acp_most_tokens(void);

/* Blocks of attention of each head since they were last zeroed, unsigned 64-bit [H] each. */
typedef struct AcpCounts {
    unsigned long long *skipped, *total;
} AcpCounts;

/* Bytes of `saved` (kept from forward to backward, one per layer: cumulative gates, ranges) and of `workspace` (shared). */
int64_t acp_saved_bytes(const AcpShape *);
int64_t acp_workspace_bytes(const AcpShape *);

/* o: bf16 [B, T, H*D], lse: float [B, H, T]. q, k, v: bf16, rows of the heads' D values, `stride` elements from token to
 * token (head h at column h*D): a multiple of 8, at least H*D; all three at multiples of 16 bytes. log_f: float [B, H, T].
 * q_norm, k_norm: the QK-norm weights that bound the logits, or NULL: the bound is measured. counts may be NULL. T is at most
 * acp_most_tokens(), log_tolerance below 0. Equations: acp_attention.cuh. */
void acp_attention_forward(const AcpShape *, bf16 *o, float *lse, void *saved, void *workspace, AcpCounts *counts, const bf16 *q,
                           const bf16 *k, const bf16 *v, int64_t stride, const float *log_f, const float *q_norm,
                           const float *k_norm, cudaStream_t stream);

/* dq, dk, dv: bf16 [B, T, H*D]; dlog_f: float [B, H, T], of log_f; all are overwritten. The shape, saved, q, k, v and stride
 * that forward was given, o and lse as it left them; dout: bf16 [B, T, H*D]. workspace need not be what forward left. */
void acp_attention_backward(const AcpShape *, bf16 *dq, bf16 *dk, bf16 *dv, float *dlog_f, void *saved, void *workspace,
                            const bf16 *dout, const bf16 *q, const bf16 *k, const bf16 *v, int64_t stride, const bf16 *o,
                            const float *lse, cudaStream_t stream);

/* Views of what a forward pass left in `saved`, for tests and reports: c, cumulative gates [B*H, T]; first and last, the key
 * block and query block ranges [B*H, blocks of 128]. */
void acp_saved_views(const AcpShape *, void *saved, const double **c, const int **first, const int **last);

#ifdef __cplusplus
}
#endif

#endif

/* Matrix products of linear layers on the GPU, through cuBLASLt: bf16 in, float32 accumulation.
 *
 *     forward          y[N, out]  = x[N, in] w[out, in]^T          bf16
 *     backward_input   dx[N, in]  = dy[N, out] w[out, in]          bf16
 *     backward_weight  dw[out, in] += dy[N, out]^T x[N, in]        float32: gradients of micro-batches add up
 *
 * The algorithm of each shape is chosen once: cuBLASLt's heuristic names candidates, and unless the run is deterministic
 * they are timed on the buffers of the call that plans them (matmul_plan). Later calls only enqueue. */
#ifndef FOX_MATMUL_H
#define FOX_MATMUL_H

#include <cublasLt.h>

#include "launchers.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum MatmulKind { MATMUL_FORWARD, MATMUL_BACKWARD_INPUT, MATMUL_BACKWARD_WEIGHT } MatmulKind;

/* One linear layer's product. `ldy`: elements from one row of y (or dy) to the next. */
typedef struct MatmulShape {
    MatmulKind kind;
    int64_t N, in, out, ldy;
} MatmulShape;

typedef struct MatmulPlan {
    MatmulShape shape;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algo;
    size_t workspace;
    double microseconds; /* of the chosen algorithm; 0: not timed */
} MatmulPlan;

typedef struct Matmul {
    cublasLtHandle_t handle;
    void *workspace; /* device memory of matmul_workspace_bytes(), not owned */
    bool deterministic;
    int count, capacity;
    MatmulPlan *plans;
} Matmul;

/* Bytes of the workspace that products use in turn. */
int64_t matmul_workspace_bytes(void);
/* workspace: device memory, the caller's. deterministic: no candidate is timed, so that every run takes the same algorithms. */
void matmul_create(Matmul *, void *workspace, bool deterministic);
/* Frees handle and plans; the workspace stays. */
void matmul_free(Matmul *);

/* result: y, dx or dw; left: x (forward), dy (backward); right: w (forward, backward_input) or x (backward_weight). All in
 * device memory, 16-byte aligned. A shape seen for the first time is planned by the heuristic alone. */
void matmul(Matmul *, const MatmulShape *, void *result, const bf16 *left, const bf16 *right, cudaStream_t stream);

/* Plans a shape by timing candidates on these buffers; the result is overwritten with junk. Synchronous. */
void matmul_plan(Matmul *, const MatmulShape *, void *result, const bf16 *left, const bf16 *right, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif

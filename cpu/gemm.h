/* Float32 matrix product on the CPU: register-blocked, OpenMP over tiles of the result.
 *
 * Every element of the result is summed by one thread in the order of k, so it does not depend on the number of
 * threads. */
#ifndef FOX_GEMM_H
#define FOX_GEMM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A matrix as a view of memory: element (i, j) lies at data[i * row + j * col]. Transposing swaps row and col. */
typedef struct MatrixView {
    const float *data;
    int64_t row, col;
} MatrixView;

static inline MatrixView matrix(const float *data, int64_t leading) {
    MatrixView m = {data, leading, 1};
    return m;
}
static inline MatrixView transposed(const float *data, int64_t leading) {
    MatrixView m = {data, 1, leading};
    return m;
}

/* C[M, N] = alpha * A[M, K] B[K, N] + beta * C, C row-major with leading dimension ldc. beta = 0 does not read C. */
void gemm(int64_t M, int64_t N, int64_t K, float alpha, MatrixView A, MatrixView B, float beta, float *C, int64_t ldc);

/* The same on the calling thread alone: for small tiles inside a parallel loop. */
void gemm_serial(int64_t M, int64_t N, int64_t K, float alpha, MatrixView A, MatrixView B, float beta, float *C, int64_t ldc);

#ifdef __cplusplus
}
#endif

#endif

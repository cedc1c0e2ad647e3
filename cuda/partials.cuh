/* Gradients of weights that every token shares, in two levels and a fixed order:
 *
 *     a persistent grid of `parts` blocks: each sums its own tokens and writes one row of partials[parts, width]
 *     a second kernel:  dw[j] += sum over parts of partials[part, j]
 *
 * `parts` is a constant of the shape, not of the chip, so the same input gives the same bits on every GPU. */
#ifndef FOX_CUDA_PARTIALS_CUH
#define FOX_CUDA_PARTIALS_CUH

#include "common.cuh"

/* Blocks of `threads` threads that keep the 132 multiprocessors of an H100 busy: about 24 warps on each. */
static inline int partial_count(int threads) {
    return 132 * (threads < 768 ? 768 / threads : 1);
}

/* dw[j] += sum_p partials[p * width + j]. A block sums 32 columns: 32 threads share each of them. A template, because
 * this header may be included by several sources. */
template <int COLUMNS> __global__ void sum_partials_kernel(float *dw, const float *partials, int64_t parts, int width) {
    __shared__ float sums[COLUMNS][COLUMNS + 1];
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    float sum = 0;
    if (column < width) {
#pragma unroll 8
        for (int64_t p = threadIdx.y; p < parts; p += COLUMNS) {
            sum += partials[p * width + column];
        }
    }
    sums[threadIdx.x][threadIdx.y] = sum;
    __syncthreads();
    sum = warp_sum(sums[threadIdx.y][threadIdx.x]);
    column = blockIdx.x * COLUMNS + threadIdx.y;
    if (threadIdx.x == 0 && column < width) {
        dw[column] += sum;
    }
}

static inline void sum_partials(float *dw, const float *partials, int64_t parts, int width, cudaStream_t stream) {
    sum_partials_kernel<32><<<(width + 31) / 32, dim3(32, 32), 0, stream>>>(dw, partials, parts, width);
    CUDA_CHECK_LAUNCH();
}

#endif

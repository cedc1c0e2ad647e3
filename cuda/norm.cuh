/* RMSNorm of the residual stream, fused with the addition before it.
 *
 *     forward    x_out = x + branch,  rstd = 1 / sqrt(mean(x_out^2) + eps),  h = x_out * rstd * w
 *     backward   g = dh * w,  xhat = x * rstd
 *                dx += rstd * (g - xhat * mean(g * xhat)),  dw += sum over tokens of dh * xhat
 *
 * The stream x [N, d] and its gradient are float32, branch and h bf16. Each thread owns eight columns, a block one row
 * at a time with the whole of it in registers: every byte is moved once. Per token and column, forward
 * moves 4 + 2 + 4 + 2 bytes, backward 2 + 4 + 8 + 2. */
#ifndef FOX_CUDA_NORM_CUH
#define FOX_CUDA_NORM_CUH

#include "partials.cuh"

/* The sum of x over the block, in every thread. One barrier: calls that follow each other must alternate between two
 * arrays `shared`. */
static __device__ __forceinline__ float norm_block_sum(float x, float (&shared)[32]) {
    int lane = threadIdx.x % 32;
    x = warp_sum(x);
    if (lane == 0) {
        shared[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? shared[lane] : 0.0f);
}

static __global__ void residual_norm_forward_kernel(bf16 *h, float *rstd, float *x_out, const float *x,
                                                    const bf16 *branch, const float *w, int d, float eps) {
    __shared__ float shared[32];
    int column = 8 * threadIdx.x;
    int64_t at = (int64_t)blockIdx.x * d + column;
    float value[8] = {}, add[8], weight[8] = {}, sum = 0;
    Bf16x8 raw = load_raw8(branch + at, column < d && branch != NULL);
    if (column < d) {
        load8(value, x + at);
        load8(weight, w + column);
    }
    unpack8(add, raw);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        value[i] += add[i];
        sum += value[i] * value[i];
    }
    float scale = 1.0f / sqrtf(norm_block_sum(sum, shared) / (float)d + eps);
    if (column < d) {
        if (x_out != NULL) {
            store8(x_out + at, value);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            value[i] *= scale * weight[i];
        }
        store8(h + at, value);
    }
    if (threadIdx.x == 0) {
        rstd[blockIdx.x] = scale;
    }
}

/* Rows blockIdx.x, + gridDim.x, ..; the block's sums of dw go to its row of partials. */
static __global__ void norm_backward_kernel(float *dx, bf16 *dx_bf16, float *partials, const bf16 *dh, const float *x,
                                            const float *rstd, const float *w, int64_t N, int d) {
    __shared__ float shared[2][32];
    int column = 8 * threadIdx.x, half = 0;
    float weight[8] = {}, dw[8] = {};
    if (column < d) {
        load8(weight, w + column);
    }
    for (int64_t n = blockIdx.x; n < N; n += gridDim.x, half ^= 1) {
        int64_t at = n * d + column;
        float value[8] = {}, out[8] = {}, grad[8], scale = rstd[n], dot = 0;
        Bf16x8 raw = load_raw8(dh + at, column < d);
        if (column < d) {
            load8(value, x + at);
            load8(out, dx + at);
        }
        unpack8(grad, raw);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            value[i] *= scale;
            dw[i] += grad[i] * value[i];
            grad[i] *= weight[i];
            dot += grad[i] * value[i];
        }
        float mean = norm_block_sum(dot, shared[half]) / (float)d;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            out[i] += scale * (grad[i] - value[i] * mean);
        }
        if (column < d) {
            store8(dx + at, out);
            if (dx_bf16 != NULL) {
                store8(dx_bf16 + at, out);
            }
        }
    }
    if (column < d) {
        store8(partials + (int64_t)blockIdx.x * d + column, dw);
    }
}

/* ---- launchers ---- */

static inline int norm_threads(int d) {
    return (int)fox_round_up(d / 8, 32);
}

void cuda_residual_norm_forward(bf16 *h, float *rstd, float *x_out, const float *x, const bf16 *branch, const float *w,
                                int64_t N, int d, float eps, cudaStream_t stream) {
    CUDA_REQUIRE(d % 8 == 0 && d > 0 && d <= CUDA_MOST_WIDTH, "the width must be a multiple of 8, up to 4096");
    residual_norm_forward_kernel<<<(unsigned)N, norm_threads(d), 0, stream>>>(h, rstd, x_out, x, branch, w, d, eps);
    CUDA_CHECK_LAUNCH();
}

int64_t cuda_norm_scratch(int d) {
    return (int64_t)partial_count(norm_threads(d)) * d;
}

void cuda_norm_backward(float *dx, bf16 *dx_bf16, float *dw, float *scratch, const bf16 *dh, const float *x,
                        const float *rstd, const float *w, int64_t N, int d, cudaStream_t stream) {
    CUDA_REQUIRE(d % 8 == 0 && d > 0 && d <= CUDA_MOST_WIDTH, "the width must be a multiple of 8, up to 4096");
    int parts = partial_count(norm_threads(d));
    norm_backward_kernel<<<parts, norm_threads(d), 0, stream>>>(dx, dx_bf16, scratch, dh, x, rstd, w, N, d);
    CUDA_CHECK_LAUNCH();
    sum_partials(dw, scratch, parts, d, stream);
}

#endif

/* RMSNorm of the residual stream, fused with the addition before it.
 *
 *     forward    x_out = x + branch,  rstd = 1 / sqrt(mean(x_out^2) + eps),  h = x_out * rstd * w
 *     backward   g = dh * w,  dx += rstd * (g - xhat * mean(g * xhat)),  dw += sum over tokens of dh * xhat,  xhat = x * rstd
 *
 * The stream x [N, d] and its gradient are float32, branch and h bf16. Each thread owns eight columns, a block one row at
 * a time with the whole of it in registers, two rows in flight: every byte is moved once. Per token and column, forward
 * moves 4 + 2 + 4 + 2 bytes, backward 2 + 4 + 8 + 2. */
#ifndef FOX_CUDA_NORM_CUH
#define FOX_CUDA_NORM_CUH

#include "partials.cuh"

enum { NORM_ROWS = 2 };

/* The sums of `sum` over the block for NORM_ROWS rows, in every thread. One barrier: calls that follow each other must
 * alternate between two halves of `shared` [2][NORM_ROWS][32]. */
static __device__ __forceinline__ void norm_block_sum(float (&sum)[NORM_ROWS], float (&shared)[NORM_ROWS][32]) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int r = 0; r < NORM_ROWS; r++) {
        sum[r] = warp_sum(sum[r]);
        if (lane == 0) {
            shared[r][warp] = sum[r];
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < NORM_ROWS; r++) {
        sum[r] = warp_sum(lane < warps ? shared[r][lane] : 0.0f);
    }
}

static __global__ void residual_norm_forward_kernel(bf16 *h, float *rstd, float *x_out, const float *x, const bf16 *branch,
                                                    const float *w, int64_t N, int d, float eps) {
    __shared__ float shared[NORM_ROWS][32];
    int column = 8 * threadIdx.x;
    int64_t first = (int64_t)blockIdx.x * NORM_ROWS;
    float value[NORM_ROWS][8] = {}, weight[8] = {}, sum[NORM_ROWS] = {};
    Bf16x8 add[NORM_ROWS];
    if (column < d) {
        load8(weight, w + column);
    }
#pragma unroll
    for (int r = 0; r < NORM_ROWS; r++) {
        bool wanted = column < d && first + r < N;
        add[r] = load_raw8(branch + (first + r) * d + column, wanted && branch != NULL);
        if (wanted) {
            load8(value[r], x + (first + r) * d + column);
        }
    }
#pragma unroll
    for (int r = 0; r < NORM_ROWS; r++) {
        float more[8];
        unpack8(more, add[r]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            value[r][i] += more[i];
            sum[r] += value[r][i] * value[r][i];
        }
    }
    norm_block_sum(sum, shared);
    if (column >= d) {
        return;
    }
#pragma unroll
    for (int r = 0; r < NORM_ROWS; r++) {
        int64_t n = first + r;
        if (n < N) {
            float scale = 1.0f / sqrtf(sum[r] / (float)d + eps), out[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                out[i] = value[r][i] * scale * weight[i];
            }
            store8(h + n * d + column, out);
            if (x_out != NULL) {
                store8(x_out + n * d + column, value[r]);
            }
            if (threadIdx.x == 0) {
                rstd[n] = scale;
            }
        }
    }
}

static __global__ void norm_backward_kernel(float *dx, bf16 *dx_bf16, float *partials, const bf16 *dh, const float *x,
                                            const float *rstd, const float *w, int64_t N, int d) {
    __shared__ float shared[2][NORM_ROWS][32];
    int column = 8 * threadIdx.x, half = 0;
    float weight[8] = {}, dw[8] = {};
    if (column < d) {
        load8(weight, w + column);
    }
    for (int64_t first = (int64_t)blockIdx.x * NORM_ROWS; first < N; first += (int64_t)gridDim.x * NORM_ROWS) {
        float value[NORM_ROWS][8] = {}, out[NORM_ROWS][8], scale[NORM_ROWS], dot[NORM_ROWS] = {};
        Bf16x8 dy[NORM_ROWS];
#pragma unroll
        for (int r = 0; r < NORM_ROWS; r++) {
            int64_t at = (first + r) * d + column;
            bool wanted = column < d && first + r < N;
            dy[r] = load_raw8(dh + at, wanted);
            scale[r] = wanted ? rstd[first + r] : 0;
            if (wanted) {
                load8(value[r], x + at);
                load8(out[r], dx + at);
            }
        }
#pragma unroll
        for (int r = 0; r < NORM_ROWS; r++) {
            float grad[8];
            unpack8(grad, dy[r]);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                dot[r] += grad[i] * weight[i] * value[r][i];
                dw[i] += grad[i] * value[r][i] * scale[r];
            }
        }
        norm_block_sum(dot, shared[half]);
        half ^= 1;
#pragma unroll
        for (int r = 0; r < NORM_ROWS; r++) {
            if (column < d && first + r < N) {
                int64_t at = (first + r) * d + column;
                float grad[8], mean = dot[r] * scale[r] * scale[r] / (float)d;
                unpack8(grad, dy[r]);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    out[r][i] += scale[r] * (grad[i] * weight[i] - value[r][i] * mean);
                }
                store8(dx + at, out[r]);
                if (dx_bf16 != NULL) {
                    store8(dx_bf16 + at, out[r]);
                }
            }
        }
    }
    if (column < d) {
        store8(partials + (int64_t)blockIdx.x * d + column, dw);
    }
}

/* ---- launchers ---- */

static inline int norm_threads(int d) {
    return (int)round_up(d / 8, 32);
}

void cuda_residual_norm_forward(bf16 *h, float *rstd, float *x_out, const float *x, const bf16 *branch, const float *w, int64_t N,
                                int d, float eps, cudaStream_t stream) {
    CUDA_REQUIRE(d % 8 == 0 && d > 0 && d <= 4096, "the width must be a multiple of 8, up to 4096");
    int blocks = (int)((N + NORM_ROWS - 1) / NORM_ROWS);
    residual_norm_forward_kernel<<<blocks, norm_threads(d), 0, stream>>>(h, rstd, x_out, x, branch, w, N, d, eps);
    CUDA_CHECK_LAUNCH();
}

int64_t cuda_norm_scratch(int d) {
    return (int64_t)partial_count(norm_threads(d)) * d;
}

void cuda_norm_backward(float *dx, bf16 *dx_bf16, float *dw, float *scratch, const bf16 *dh, const float *x, const float *rstd,
                        const float *w, int64_t N, int d, cudaStream_t stream) {
    CUDA_REQUIRE(d % 8 == 0 && d > 0 && d <= 4096, "the width must be a multiple of 8, up to 4096");
    int parts = partial_count(norm_threads(d));
    norm_backward_kernel<<<parts, norm_threads(d), 0, stream>>>(dx, dx_bf16, scratch, dh, x, rstd, w, N, d);
    CUDA_CHECK_LAUNCH();
    sum_partials(dw, scratch, parts, d, stream);
}

#endif

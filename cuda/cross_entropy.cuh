/* Cross entropy of each token and its gradient, written over the logits.
 *
 *     loss[n] = log sum_v exp(z[n, v]) - z[n, target[n]],  dz[n, v] = scale * (softmax(z[n])_v - [v = target[n]])
 *
 * One block a row. The row passes through shared memory (100 KB at V = 50257), so that device memory is read once and
 * written once: 4 bytes an element. A row too long for shared memory is read a second time, mostly from the L2 cache.
 * The sum of exponentials is online: each thread rescales its own when its maximum moves. */
#ifndef FOX_CUDA_CROSS_ENTROPY_CUH
#define FOX_CUDA_CROSS_ENTROPY_CUH

#include "common.cuh"

enum { ENTROPY_THREADS = 512, ENTROPY_BLOCKS = 2 }; /* and blocks on a multiprocessor */
enum { SUM_THREADS = 1024 };

static constexpr float LOG2E = 1.4426950408889634f;

/* 2^x; results below 2^-126 are 0. */
static __device__ __forceinline__ float exp2_quick(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* A running maximum, in units of log 2, and the sum of 2^(x - high). The first maximum is finite: -infinity minus
 * itself would be NaN. */
struct OnlineSum {
    float high, sum;
};

static __device__ __forceinline__ OnlineSum online_merge(OnlineSum a, OnlineSum b) {
    float high = fmaxf(a.high, b.high);
    return {high, a.sum * exp2_quick(a.high - high) + b.sum * exp2_quick(b.high - high)};
}

/* Eight logits from column v on; those past V count as -infinity. */
static __device__ __forceinline__ void unpack_logits(float z[8], const Bf16x8 &raw, int v, int V) {
    unpack8(z, raw);
    if (v + 8 > V) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            z[i] = v + i < V ? z[i] : -INFINITY;
        }
    }
}

static __device__ __forceinline__ OnlineSum online_warp_sum(OnlineSum x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x = online_merge(x, {__shfl_xor_sync(0xffffffffu, x.high, lanes), __shfl_xor_sync(0xffffffffu, x.sum, lanes)});
    }
    return x;
}

/* losses[n], and the gradient where scale is not 0. STAGED: dynamic shared memory holds the row, of which each thread
 * reads only what it wrote itself. */
template <bool STAGED>
static __global__ void __launch_bounds__(ENTROPY_THREADS, ENTROPY_BLOCKS)
    cross_entropy_kernel(float *losses, bf16 *logits, const int32_t *targets, int V, int row, float scale) {
    extern __shared__ __align__(16) unsigned char stage_bytes[];
    __shared__ OnlineSum warps[32];
    bf16 *stage = reinterpret_cast<bf16 *>(stage_bytes), *z = logits + (int64_t)blockIdx.x * row;
    int first = 8 * threadIdx.x, target = targets[blockIdx.x];
    float target_logit = threadIdx.x == 0 ? __bfloat162float(z[target]) : 0; /* before it is overwritten */
    OnlineSum all = {-1e30f, 0};
#pragma unroll 4
    for (int v = first; v < V; v += 8 * ENTROPY_THREADS) {
        float x[8], high = all.high, sum = 0;
        Bf16x8 raw = load_raw8(z + v, true);
        if (STAGED) {
            *reinterpret_cast<Bf16x8 *>(stage + v) = raw;
        }
        unpack_logits(x, raw, v, V);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i] *= LOG2E;
            high = fmaxf(high, x[i]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum += exp2_quick(x[i] - high);
        }
        all = {high, all.sum * exp2_quick(all.high - high) + sum};
    }
    all = online_warp_sum(all);
    if (threadIdx.x % 32 == 0) {
        warps[threadIdx.x / 32] = all;
    }
    __syncthreads();
    all = threadIdx.x % 32 < ENTROPY_THREADS / 32 ? warps[threadIdx.x % 32] : OnlineSum{-1e30f, 0};
    all = online_warp_sum(all);
    float lse = all.high + log2f(all.sum); /* in units of log 2 */
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = lse / LOG2E - target_logit;
    }
#pragma unroll 4
    for (int v = first; scale != 0 && v < row; v += 8 * ENTROPY_THREADS) {
        float x[8] = {};
        if (v < V) {
            unpack_logits(x, load_raw8((STAGED ? stage : z) + v, true), v, V);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                x[i] = scale * exp2_quick(x[i] * LOG2E - lse);
            }
            if ((unsigned)(target - v) < 8) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    x[i] -= v + i == target ? scale : 0;
                }
            }
        }
        store8(z + v, x);
    }
}

/* *total += sum of losses [N], in double precision, by one block: the order is fixed. */
static __global__ void sum_losses_kernel(double *total, const float *losses, int64_t N) {
    __shared__ double sums[SUM_THREADS];
    double sum = 0;
    for (int64_t n = threadIdx.x; n < N; n += SUM_THREADS) {
        sum += (double)losses[n];
    }
    sums[threadIdx.x] = sum;
    for (int half = SUM_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        *total += sums[0];
    }
}

/* ---- launcher ---- */

void cuda_cross_entropy(float *losses, double *loss_sum, bf16 *logits, const int32_t *targets, int64_t N, int V,
                        int row, float scale, cudaStream_t stream) {
    CUDA_REQUIRE(row % 8 == 0 && row >= V && V > 0, "a row of logits must hold V of them and be a multiple of 8 long");
    int device, limit, bytes = row * (int)sizeof(bf16);
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (scale != 0 && bytes + 1024 <= limit) {
        CUDA_CHECK(
            cudaFuncSetAttribute(cross_entropy_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        cross_entropy_kernel<true>
            <<<(unsigned)N, ENTROPY_THREADS, bytes, stream>>>(losses, logits, targets, V, row, scale);
    } else {
        cross_entropy_kernel<false>
            <<<(unsigned)N, ENTROPY_THREADS, 0, stream>>>(losses, logits, targets, V, row, scale);
    }
    CUDA_CHECK_LAUNCH();
    if (loss_sum != NULL) {
        sum_losses_kernel<<<1, SUM_THREADS, 0, stream>>>(loss_sum, losses, N);
        CUDA_CHECK_LAUNCH();
    }
}

#endif

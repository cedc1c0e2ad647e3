/* What every kernel header needs: checked calls, vector loads of bf16, reductions over a warp and a block. */
#ifndef FOX_CUDA_COMMON_CUH
#define FOX_CUDA_COMMON_CUH

#include "launchers.h"

/* A failed CUDA call is not something a caller can mend: says what and where, and ends the program. */
#define CUDA_CHECK(call) cuda_check((call), #call, __FILE__, __LINE__)
static inline void cuda_check(cudaError_t status, const char *call, const char *file, int line) {
    if (status != cudaSuccess) {
        fox_die("%s:%d: %s: %s", file, line, call, cudaGetErrorString(status));
    }
}

/* Checks the kernel launch just made. */
#define CUDA_CHECK_LAUNCH() cuda_check(cudaGetLastError(), __func__, __FILE__, __LINE__)

/* A launcher's precondition, as a sentence. */
#define CUDA_REQUIRE(condition, sentence) ((condition) ? (void)0 : fox_die("%s: %s", __func__, (sentence)))

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, lanes);
    }
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    }
    return x;
}

/* Eight bf16 in one 16-byte access; the address must be a multiple of 16 bytes. */
struct alignas(16) Bf16x8 {
    __nv_bfloat162 pair[4];
};

static __device__ __forceinline__ void load8(float out[8], const bf16 *p) {
    Bf16x8 x = *reinterpret_cast<const Bf16x8 *>(p);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 f = __bfloat1622float2(x.pair[i]);
        out[2 * i] = f.x;
        out[2 * i + 1] = f.y;
    }
}

static __device__ __forceinline__ void store8(bf16 *p, const float in[8]) {
    Bf16x8 x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x.pair[i] = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    }
    *reinterpret_cast<Bf16x8 *>(p) = x;
}

static __device__ __forceinline__ float device_sigmoid(float x) {
    return 1.0f / (1.0f + __expf(-x));
}

#endif

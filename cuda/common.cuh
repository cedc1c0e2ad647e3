/* What every kernel header needs: checked launches, vector loads of bf16, reductions over a warp and a block. */
#ifndef FOX_CUDA_COMMON_CUH
#define FOX_CUDA_COMMON_CUH

#include "launchers.h"

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

/* Eight bf16, loaded by one 16-byte access; the address must be a multiple of 16 bytes. As words: a struct of
 * __nv_bfloat162, which has a copy constructor, the compiler takes apart into four loads. */
typedef uint4 Bf16x8;

/* Zeros where not wanted, so that lanes past the end of a row take part in sums without harm. */
static __device__ __forceinline__ Bf16x8 load_raw8(const bf16 *p, bool wanted) {
    return wanted ? *reinterpret_cast<const uint4 *>(p) : make_uint4(0, 0, 0, 0);
}

static __device__ __forceinline__ void unpack8(float out[8], const Bf16x8 &x) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) { /* a bf16 is the upper half of a float */
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

static __device__ __forceinline__ void load8(float out[8], const bf16 *p) {
    unpack8(out, load_raw8(p, true));
}

static __device__ __forceinline__ void load8(float out[8], const float *p) {
    float4 a = reinterpret_cast<const float4 *>(p)[0], b = reinterpret_cast<const float4 *>(p)[1];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
    out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}

static __device__ __forceinline__ uint32_t pack2(float low, float high) {
    __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&x);
}

static __device__ __forceinline__ void store8(bf16 *p, const float in[8]) {
    *reinterpret_cast<uint4 *>(p) =
        make_uint4(pack2(in[0], in[1]), pack2(in[2], in[3]), pack2(in[4], in[5]), pack2(in[6], in[7]));
}

static __device__ __forceinline__ void store8(float *p, const float in[8]) {
    reinterpret_cast<float4 *>(p)[0] = make_float4(in[0], in[1], in[2], in[3]);
    reinterpret_cast<float4 *>(p)[1] = make_float4(in[4], in[5], in[6], in[7]);
}

/* 1 / (1 + exp(-x)); the quick division returns 0 where exp(-x) is beyond 2^126, which is right. */
static __device__ __forceinline__ float device_sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

#endif

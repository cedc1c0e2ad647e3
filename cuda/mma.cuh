/* Instructions of every chip from sm_80 on that C++ has no word for, behind names: copies into shared memory, loads of
 * fragments, products of a warp. tests/emulated_instructions.h says in C++ what they do. */
#ifndef FOX_CUDA_MMA_CUH
#define FOX_CUDA_MMA_CUH

#include "common.cuh"

/* The address of what lies in shared memory. */
static __device__ __forceinline__ uint32_t acp_shared(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* 16 bytes, asynchronously; zeros where not valid. */
static __device__ __forceinline__ void acp_copy16(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

/* All of this thread's copies so far have landed. */
static __device__ __forceinline__ void acp_copies_done(void) {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Writes a word after all that this thread knows to be written: whoever sees the word by acp_await sees that too. */
static __device__ __forceinline__ void acp_publish(uint64_t *to, uint64_t word) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

/* The word, as soon as it is no longer `unset`. */
static __device__ __forceinline__ uint64_t acp_await(const uint64_t *from, uint64_t unset) {
    uint64_t word;
    do {
        asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    } while (word == unset);
    return word;
}

/* ldmatrix: four 8 x 8 matrices of 16-bit values, lane l names row l % 8 of matrix l / 8 and gets two neighbours of row l / 4 of
 * each; of the transposed matrices in the second form. */
static __device__ __forceinline__ void acp_load_matrices(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

static __device__ __forceinline__ void acp_load_transposed(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

/* c[16, 8] += A[16, 16] B[16, 8] of a warp, fragments as tiles.cuh draws them. */
static __device__ __forceinline__ void acp_mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* 2^x, to about 2 units in the last place; results below 2^-126 are 0. */
static __device__ __forceinline__ float acp_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif

/* Hopper's own instructions (sm_90a) behind names: bulk copies by the tensor memory accelerator (TMA), the barriers
 * they complete on, and matrix products of a warpgroup (wgmma). Kernels contain no assembly; what they build from these
 * stands in hopper_tiles.cuh, and tests/emulated_instructions.h says in C++ what each does.
 *
 * Both TMA and wgmma see 64 columns of a tile as a panel [rows][64] of 16-bit values: a row is 128 bytes, its eight
 * 16-byte pieces stored in the order piece ^ (row % 8) (the 128-byte swizzle); panels begin at multiples of 1024 bytes.
 *
 * Accumulators of a product with 64 rows and N columns: thread t of a warpgroup, with g = t % 32 / 4 and p = t % 4,
 * holds
 *
 *     acc[4 i + 0, 1]    row 16 (t / 32) + g,        columns 8 i + 2 p, 8 i + 2 p + 1
 *     acc[4 i + 2, 3]    row 16 (t / 32) + g + 8,    the same columns
 *
 * Rounded to bf16 and packed in this order they are the A operand of the next product. */
#ifndef FOX_HOPPER_CUH
#define FOX_HOPPER_CUH

#include <cuda.h>

#include "mma.cuh"

/* True where a kernel may use what stands here: only code for sm_90a itself knows these instructions. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE 1
#else
#define HOPPER_CODE 0
#endif

enum {
    HOPPER_WARPGROUP = 128, /* threads */
    HOPPER_PANEL = 64,      /* 16-bit values in a row of a panel */
    HOPPER_BOX = 64,        /* rows that one copy moves */
};

/* ---- barriers in shared memory, for copies and the threads that wait for them ---- */

static __device__ __forceinline__ uint32_t hopper_shared(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

static __device__ __forceinline__ void hopper_barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(hopper_shared(barrier)), "r"(arrivals) : "memory");
}

/* Makes initialised barriers known to copies; a __syncthreads() makes them known to the other threads. */
static __device__ __forceinline__ void hopper_barriers_ready(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void hopper_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(hopper_shared(barrier)) : "memory");
}

/* Arrives; the phase also waits for `bytes` bytes of copies. */
static __device__ __forceinline__ void hopper_arrive_bytes(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(hopper_shared(barrier)), "r"(bytes)
                 : "memory");
}

/* Waits for the end of the phase of this parity: 0 is the first phase, and 1 the one before it, which has ended. */
static __device__ __forceinline__ void hopper_wait(uint64_t *barrier, int parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(hopper_shared(barrier)), "r"(parity)
            : "memory");
    } while (!done);
}

/* Barriers among whole warpgroups, each id always with the same number of threads: wait, or only arrive. */
static __device__ __forceinline__ void hopper_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

static __device__ __forceinline__ void hopper_pass(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- copies ---- */

/* A box of 64 rows and 64 columns into a panel: rows t .. of head h of sequence b. */
static __device__ __forceinline__ void hopper_load_box(void *panel, const CUtensorMap &map, int column, int b, int h,
                                                       int t, uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
                 "%4, %5}], [%6];" ::"r"(hopper_shared(panel)),
                 "l"(&map), "r"(column), "r"(t), "r"(h), "r"(b), "r"(hopper_shared(barrier))
                 : "memory");
}

/* Floats i .. i + 63 of a vector. (Copies without a map would do, but tools that look for races do not know them.) */
static __device__ __forceinline__ void hopper_load_vector(float *to, const CUtensorMap &map, int i, uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2}], "
                 "[%3];" ::"r"(hopper_shared(to)),
                 "l"(&map), "r"(i), "r"(hopper_shared(barrier))
                 : "memory");
}

/* 64 rows of a panel, written by ordinary stores before a hopper_stores_visible() of every writer and a barrier. */
static __device__ __forceinline__ void hopper_store_box(const CUtensorMap &map, const void *panel, int column, int b,
                                                        int h, int t) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
                 "r"(column), "r"(t), "r"(h), "r"(b), "r"(hopper_shared(panel))
                 : "memory");
}

/* Waits until this thread's stores have read their shared memory. */
static __device__ __forceinline__ void hopper_stores_read(void) {
    asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group.read 0;" ::: "memory");
}

/* Ordinary writes of this thread to shared memory, before it passes a barrier, become visible to copies and products.
 */
static __device__ __forceinline__ void hopper_stores_visible(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Four 8 x 8 matrices from accumulator layout to shared memory; lane l gives the address of row l % 8 of matrix l / 8.
 */
static __device__ __forceinline__ void hopper_store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                                             uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

/* ---- products ---- */

/* Registers of each thread of a warpgroup, from here on. */
template <int REGISTERS>
static __device__ __forceinline__ void hopper_more_registers(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
static __device__ __forceinline__ void hopper_fewer_registers(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* Before the first product of a batch, and after registers that it uses were touched. */
static __device__ __forceinline__ void hopper_products_begin(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* Ends a batch. */
static __device__ __forceinline__ void hopper_products_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most PENDING of the newest batches are unfinished. */
template <int PENDING>
static __device__ __forceinline__ void hopper_products_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Keeps the compiler from moving reads and writes of registers across: products use them while it is not looking, and
 * what is computed while they run must not be put off until after the wait. */
template <int N>
static __device__ __forceinline__ void hopper_hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(x[i])::"memory");
    }
}

template <int N>
static __device__ __forceinline__ void hopper_hold(uint32_t (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+r"(x[i])::"memory");
    }
}

#define HOPPER_LIST8(i)                                                                                                \
    "%" #i "0, %" #i "1, %" #i "2, %" #i "3, %" #i "4, %" #i "5, %" #i "6, %" #i "7, %" #i "8, %" #i "9, "
#define HOPPER_ACC32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " HOPPER_LIST8(1) HOPPER_LIST8(2) "%30, %31}"
#define HOPPER_ACC64                                                                                                   \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " HOPPER_LIST8(1) HOPPER_LIST8(2) HOPPER_LIST8(3) HOPPER_LIST8(4)        \
        HOPPER_LIST8(5) "%60, %61, %62, %63}"
#define HOPPER_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HOPPER_16(d, i) HOPPER_4(d, i), HOPPER_4(d, i + 4), HOPPER_4(d, i + 8), HOPPER_4(d, i + 12)

/* acc[64, N] (+)= A[64, 16] B[16, N]: one step along the sum. A from shared memory, summed along columns (K-major), or
 * from registers; B along columns, or along rows (B_ROWS). N is 64 or 128, twice the length of acc. */
template <bool B_ROWS>
static __device__ __forceinline__ void hopper_product(float (&d)[32], uint64_t a, uint64_t b, bool add) {
#if HOPPER_CODE
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, "
                 "0;\n\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " HOPPER_ACC32
                 ", %32, %33, p, 1, 1, 0, %35;\n\t}"
                 : HOPPER_16(d, 0), HOPPER_16(d, 16)
                 : "l"(a), "l"(b), "r"((int)add), "n"(B_ROWS));
#endif
}

template <bool B_ROWS>
static __device__ __forceinline__ void hopper_product(float (&d)[64], uint64_t a, uint64_t b, bool add) {
#if HOPPER_CODE
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, "
                 "0;\n\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " HOPPER_ACC64
                 ", %64, %65, p, 1, 1, 0, %67;\n\t}"
                 : HOPPER_16(d, 0), HOPPER_16(d, 16), HOPPER_16(d, 32), HOPPER_16(d, 48)
                 : "l"(a), "l"(b), "r"((int)add), "n"(B_ROWS));
#endif
}

template <bool B_ROWS>
static __device__ __forceinline__ void hopper_product(float (&d)[32], const uint32_t *a, uint64_t b, bool add) {
#if HOPPER_CODE
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, "
                 "0;\n\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " HOPPER_ACC32
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n\t}"
                 : HOPPER_16(d, 0), HOPPER_16(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(B_ROWS));
#endif
}

template <bool B_ROWS>
static __device__ __forceinline__ void hopper_product(float (&d)[64], const uint32_t *a, uint64_t b, bool add) {
#if HOPPER_CODE
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, "
                 "0;\n\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " HOPPER_ACC64
                 ", {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n\t}"
                 : HOPPER_16(d, 0), HOPPER_16(d, 16), HOPPER_16(d, 32), HOPPER_16(d, 48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(B_ROWS));
#endif
}

#undef HOPPER_LIST8
#undef HOPPER_ACC32
#undef HOPPER_ACC64
#undef HOPPER_4
#undef HOPPER_16

#endif

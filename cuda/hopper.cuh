/* Hopper's own instructions (sm_90a) behind names: bulk copies by the tensor memory accelerator (TMA), the barriers
 * they complete on, and matrix products of a warpgroup (wgmma). Kernels that use them contain no assembly.
 *
 * A tile of 16-bit values is [rows][D], held as D / 64 panels of [rows][64]: a row of a panel is 128 bytes, its eight
 * 16-byte pieces stored in the order piece ^ (row % 8). That is TMA's and wgmma's 128-byte swizzle; panels begin at
 * multiples of 1024 bytes. The same tile serves as an operand in both directions, so nothing is ever transposed:
 *
 *     summed along columns    A or B of S = Q K^T             hopper_product_abt
 *     summed along rows       B of O = P V, dQ = dS K, ...    hopper_product_ab
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

#include "tiles.cuh"

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

/* A condition known to the compiler, to pass to a lambda. */
template <bool VALUE>
struct HopperFlag {
    __host__ __device__ constexpr operator bool() const {
        return VALUE;
    }
};

/* ---- tensor maps (host) ---- */

static inline CUtensorMap hopper_encode(CUtensorMapDataType type, int rank, const void *x, const cuuint64_t *sizes,
                                        const cuuint64_t *strides, const cuuint32_t *box, CUtensorMapSwizzle swizzle) {
    void *encode = NULL;
    cudaDriverEntryPointQueryResult found;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found));
    CUDA_REQUIRE(found == cudaDriverEntryPointSuccess, "a driver of CUDA 12 or newer expected");
    CUtensorMap map;
    cuuint32_t steps[4] = {1, 1, 1, 1};
    CUresult status = ((decltype(&cuTensorMapEncodeTiled))encode)(
        &map, type, (cuuint32_t)rank, const_cast<void *>(x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    CUDA_REQUIRE(status == CUDA_SUCCESS, "the driver refused a tensor map");
    return map;
}

/* How TMA sees the tensor [B, T, H, D] whose row t of head h of sequence b begins at x + (b T + t) stride + h D: boxes
 * of 64 rows and 64 columns of one head; rows from T on read as zeros and are not written. Lives in a kernel's
 * parameters. */
static inline CUtensorMap hopper_tensor_map(const bf16 *x, int B, int T, int H, int D, int64_t stride) {
    cuuint64_t sizes[4] = {(cuuint64_t)D, (cuuint64_t)T, (cuuint64_t)H, (cuuint64_t)B};
    cuuint64_t strides[3] = {(cuuint64_t)stride * 2, (cuuint64_t)D * 2, (cuuint64_t)stride * 2 * (cuuint64_t)T};
    cuuint32_t box[4] = {HOPPER_PANEL, HOPPER_BOX, 1, 1};
    return hopper_encode(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, x, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

/* The same for a vector of floats, in boxes of 64. */
static inline CUtensorMap hopper_vector_map(const float *x, int64_t count) {
    cuuint64_t size = (cuuint64_t)count, stride = 0;
    cuuint32_t box = HOPPER_BOX;
    return hopper_encode(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 1, x, &size, &stride, &box, CU_TENSOR_MAP_SWIZZLE_NONE);
}

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

/* Barriers among whole warpgroups, each id always with the same number of threads: one for the turn of each warpgroup,
 * one for its own threads. */
enum { HOPPER_TURN = 1, HOPPER_OWN = 4 };

static __device__ __forceinline__ void hopper_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

static __device__ __forceinline__ void hopper_pass(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* A value that is the same in all threads of a warp, as one that the compiler knows to be. */
static __device__ __forceinline__ int hopper_uniform(int x) {
    return __shfl_sync(0xffffffffu, x, 0);
}

/* Tiles on their way from the thread that copies to the warps that compute: the tile of step i = 0, 1, 2, ... lies in
 * place i % STAGES. Both sides take the same steps. */
template <int STAGES>
struct HopperRing {
    uint64_t full[STAGES], empty[STAGES];

    /* By one thread. warps: that compute. */
    __device__ __forceinline__ void init(int warps) {
        for (int s = 0; s < STAGES; s++) {
            hopper_barrier_init(&full[s], 1);
            hopper_barrier_init(&empty[s], warps);
        }
    }
    /* The copying thread: waits until the place of step i is free and announces `bytes` of copies, which complete on
     * the barrier returned. */
    __device__ __forceinline__ uint64_t *refill(int i, int bytes) {
        hopper_wait(&empty[i % STAGES], i / STAGES % 2 ^ 1);
        hopper_arrive_bytes(&full[i % STAGES], bytes);
        return &full[i % STAGES];
    }
    /* A computing warp: waits for the tile; gives its place back. */
    __device__ __forceinline__ void await(int i) {
        hopper_wait(&full[i % STAGES], i / STAGES % 2);
    }
    __device__ __forceinline__ void release(int i) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            hopper_arrive(&empty[i % STAGES]);
        }
    }
    __device__ __forceinline__ void skip(int i) {
        await(i);
        release(i);
    }
};

/* Warpgroups take turns: each passes the turn as often as it takes it, once a step. */
template <int WARPGROUPS>
struct HopperTurns {
    int group;

    __device__ __forceinline__ HopperTurns(int own) : group(own) {
        if (group == WARPGROUPS - 1) {
            pass(); /* the first turn is the first warpgroup's */
        }
    }
    __device__ __forceinline__ void take(void) {
        hopper_sync(HOPPER_TURN + group, 2 * HOPPER_WARPGROUP);
    }
    __device__ __forceinline__ void pass(void) {
        hopper_pass(HOPPER_TURN + (group + 1) % WARPGROUPS, 2 * HOPPER_WARPGROUP);
    }
};

/* ---- copies ---- */

/* Rows t .. t + ROWS - 1 of head h of sequence b into a tile. */
template <int D, int ROWS>
static __device__ __forceinline__ void hopper_load_tile(void *tile, const CUtensorMap &map, int b, int h, int t,
                                                        uint64_t *barrier) {
#pragma unroll
    for (int box = 0; box < D / HOPPER_PANEL * (ROWS / HOPPER_BOX); box++) {
        int panel = box / (ROWS / HOPPER_BOX), row = box % (ROWS / HOPPER_BOX) * HOPPER_BOX;
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
            "%5}], [%6];" ::"r"(hopper_shared(tile) + panel * ROWS * 128 + row * 128),
            "l"(&map), "r"(panel * HOPPER_PANEL), "r"(t + row), "r"(h), "r"(b), "r"(hopper_shared(barrier))
            : "memory");
    }
}

/* Floats i .. i + COUNT - 1 of a vector. (Copies without a map would do, but tools that look for races do not know
 * them.) */
template <int COUNT>
static __device__ __forceinline__ void hopper_load_floats(float *to, const CUtensorMap &map, int i, uint64_t *barrier) {
#pragma unroll
    for (int box = 0; box < COUNT; box += HOPPER_BOX) {
        asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
                     "{%2}], [%3];" ::"r"(hopper_shared(to + box)),
                     "l"(&map), "r"(i + box), "r"(hopper_shared(barrier))
                     : "memory");
    }
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

/* The keys and values of one head on their way: blocks of KEYS rows, last to first, each K with its lift. */
template <int D, int KEYS, int STAGES>
struct alignas(1024) HopperKeys {
    static constexpr int TILE = KEYS * D * 2;
    unsigned char k[STAGES][TILE], v[STAGES][TILE];
    float lift[STAGES][KEYS];
    HopperRing<STAGES> k_ring, v_ring;

    __device__ __forceinline__ void init(int warps) {
        k_ring.init(warps);
        v_ring.init(warps);
    }
    /* The copying thread: blocks end, end - 1, ... begin of head h of sequence b, whose lift begins at `row`. The first
     * is under way before `begin` is needed, which may still be on its way from memory. */
    __device__ __forceinline__ void copy(const CUtensorMap &k_map, const CUtensorMap &v_map,
                                         const CUtensorMap &lift_map, int b, int h, int row, int begin, int end) {
        int i = 0;
        do {
            int stage = i % STAGES, key = (end - i) * KEYS;
            uint64_t *full = k_ring.refill(i, TILE + (int)sizeof lift[0]);
            hopper_load_tile<D, KEYS>(k[stage], k_map, b, h, key, full);
            hopper_load_floats<KEYS>(lift[stage], lift_map, row + key, full);
            hopper_load_tile<D, KEYS>(v[stage], v_map, b, h, key, v_ring.refill(i, TILE));
        } while (++i <= end - begin);
    }
    __device__ __forceinline__ void skip(int i) {
        k_ring.skip(i);
        v_ring.skip(i);
    }
};

/* ---- products ---- */

template <int REGISTERS>
static __device__ __forceinline__ void hopper_more_registers(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
static __device__ __forceinline__ void hopper_fewer_registers(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* An operand in shared memory: the lower half of its descriptor, made from the address of the first row (a multiple of
 * 8 rows into a tile) and the bytes from one panel to the next. Other tiles of the same shape lie hopper_apart(bytes)
 * further. The upper half is the same for all: 1024 bytes from 8 rows to the next 8, 128-byte swizzle. */
static __device__ __forceinline__ uint32_t hopper_operand(uint32_t address, int panel_bytes) {
    return (uint32_t)(panel_bytes >> 4) << 16 | (address & 0x3ffff) >> 4;
}

static constexpr __device__ __forceinline__ int hopper_apart(int bytes) {
    return bytes >> 4;
}

static __device__ __forceinline__ uint64_t hopper_descriptor(uint32_t operand) {
    return (uint64_t)(1u << 30 | 1024 >> 4) << 32 | operand;
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

/* acc[64, N] = A B^T, summed along the D columns of both: operands in shared memory, with panels of A_ROWS and B_ROWS
 * rows. */
template <int D, int A_ROWS, int B_ROWS, int ACC>
static __device__ __forceinline__ void hopper_product_abt(float (&acc)[ACC], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        int panel = k / HOPPER_PANEL, inside = k % HOPPER_PANEL * 2;
        hopper_product<false>(acc, hopper_descriptor(a + hopper_apart(panel * A_ROWS * 128 + inside)),
                              hopper_descriptor(b + hopper_apart(panel * B_ROWS * 128 + inside)), k > 0);
    }
}

/* The same with A packed in registers: A[64, 16] of step k at a + k / 4. */
template <int D, int B_ROWS, int ACC>
static __device__ __forceinline__ void hopper_product_abt(float (&acc)[ACC], const uint32_t *a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        int panel = k / HOPPER_PANEL, inside = k % HOPPER_PANEL * 2;
        hopper_product<false>(acc, a + k / 4, hopper_descriptor(b + hopper_apart(panel * B_ROWS * 128 + inside)),
                              k > 0);
    }
}

/* Takes a warpgroup's 64 rows of a tile [., 64] into registers, as such an A. */
static __device__ __forceinline__ void hopper_take_rows(uint32_t (&a)[16], uint32_t tile) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        acp_load_matrices(a + 4 * k,
                          (tile + threadIdx.x % HOPPER_WARPGROUP / 32 * 16 * 128 + acp_lane_a<64>()) ^ (k << 5));
    }
}

/* acc[64, D] += A B, summed along the ROWS rows of B in shared memory; A [64, ROWS] packed in registers. */
template <int ROWS, int ACC>
static __device__ __forceinline__ void hopper_product_ab(float (&acc)[ACC], const uint32_t *a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < ROWS; k += 16) {
        hopper_product<true>(acc, a + k / 4, hopper_descriptor(b + hopper_apart(k * 128)), true);
    }
}

/* Accumulators of a product as the A operand of the next. */
template <int N>
static __device__ __forceinline__ void hopper_pack(uint32_t (&p)[N / 2], const float (&s)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        p[i / 2] = pack2(s[i], s[i + 1]);
    }
}

/* A warpgroup's 64 rows, times scale[] of each thread's two, as bf16 to rows t .. of a tensor, by way of 64 rows of a
 * tile that only this warpgroup still uses. barrier: of its own threads. */
template <int D>
static __device__ __forceinline__ void hopper_store_rows(const float (&acc)[D / 2], const float scale[2],
                                                         unsigned char *tile, int panel_bytes, const CUtensorMap &map,
                                                         int b, int h, int t, int barrier) {
    int thread = threadIdx.x % HOPPER_WARPGROUP, lane = thread % 32;
    int row = thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8; /* of the matrix whose address this lane gives */
    uint32_t to = hopper_shared(tile) + row * 128;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t piece = i % 4 * 2 + lane / 16;
        const float *x = &acc[i * 8];
        hopper_store_matrices(to + i / 4 * panel_bytes + ((piece ^ (row % 8)) << 4),
                              pack2(x[0] * scale[0], x[1] * scale[0]), pack2(x[2] * scale[1], x[3] * scale[1]),
                              pack2(x[4] * scale[0], x[5] * scale[0]), pack2(x[6] * scale[1], x[7] * scale[1]));
    }
    hopper_stores_visible();
    hopper_sync(barrier, HOPPER_WARPGROUP);
    if (thread == 0) {
#pragma unroll
        for (int panel = 0; panel < D / HOPPER_PANEL; panel++) {
            hopper_store_box(map, tile + panel * panel_bytes, panel * HOPPER_PANEL, b, h, t);
        }
        hopper_stores_read();
    }
}

#undef HOPPER_LIST8
#undef HOPPER_ACC32
#undef HOPPER_ACC64
#undef HOPPER_4
#undef HOPPER_16

#endif

/* What the Hopper kernels are built from: tiles in shared memory, rings of tiles on their way, turns of warpgroups,
 * products of whole tiles. The instructions stand in hopper.cuh.
 *
 * A tile of 16-bit values is [rows][D], held as D / 64 panels. The same tile serves as an operand in both directions, so
 * nothing is ever transposed:
 *
 *     summed along columns    A or B of S = Q K^T             hopper_product_abt
 *     summed along rows       B of O = P V, dQ = dS K, ...    hopper_product_ab */
#ifndef FOX_HOPPER_TILES_CUH
#define FOX_HOPPER_TILES_CUH

#include "hopper.cuh"
#include "tiles.cuh"

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

/* ---- the threads of a block ---- */

/* A value that is the same in all threads of a warp, as one that the compiler knows to be. */
static __device__ __forceinline__ int hopper_uniform(int x) {
    return __shfl_sync(0xffffffffu, x, 0);
}

/* Ids of barriers among warpgroups: one for the turn of each, one for its own threads. */
enum { HOPPER_TURN = 1, HOPPER_OWN = 4 };

/* Tiles on their way from the thread that copies to the warps that compute: the tile of step i = 0, 1, 2, ... lies in
 * place i % STAGES. Both sides take the same steps. */
template <int STAGES>
struct HopperRing {
    uint64_t full[STAGES], empty[STAGES];

    /* By one thread. releases: of a place, by all who compute. */
    __device__ __forceinline__ void init(int releases) {
        for (int s = 0; s < STAGES; s++) {
            hopper_barrier_init(&full[s], 1);
            hopper_barrier_init(&empty[s], releases);
        }
    }
    /* The copying thread: waits until the place of step i is free. */
    __device__ __forceinline__ void await_free(int i) {
        hopper_wait(&empty[i % STAGES], i / STAGES % 2 ^ 1);
    }
    /* Then announces `bytes` of copies, which complete on the barrier returned. */
    __device__ __forceinline__ uint64_t *announce(int i, int bytes) {
        hopper_arrive_bytes(&full[i % STAGES], bytes);
        return &full[i % STAGES];
    }
    __device__ __forceinline__ uint64_t *refill(int i, int bytes) {
        await_free(i);
        return announce(i, bytes);
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

/* What a thread block computes: a tile of rows of one head, and the blocks of rows that stream by for it. */
struct HopperTile {
    int bh, b, h, start; /* row of attention, sequence, head; first row of the tile. bh < 0: no tile is left */
    int edge, step;      /* the last block to stream by; step of the first one in the rings */
};

/* The tiles of a thread block that stays until all are taken. While one is computed, the next is chosen and what it
 * needs first is copied, so that products need not wait for the end of one tile and the beginning of the next. Tile j
 * lies in place j % BUFFERS. */
template <int BUFFERS>
struct HopperTiles {
    HopperRing<BUFFERS> ring;
    uint64_t known[BUFFERS]; /* which tile it is, before it is there */
    HopperTile told[BUFFERS];

    /* By one thread. threads: that compute. */
    __device__ __forceinline__ void init(int threads) {
        ring.init(threads);
        for (int i = 0; i < BUFFERS; i++) {
            hopper_barrier_init(&known[i], 1);
        }
    }
    /* The copying thread: takes the next tile out of `order`, the longest first; a head's tiles are of `rows` rows.
     * `next` is 0 again when all thread blocks have found that none is left. None has a tile of its own to begin with:
     * one whose multiprocessor is busy with something else would begin it last. */
    static __device__ __forceinline__ HopperTile take(const AcpInputs &in, const int *order, unsigned *next, int rows) {
        int tiles = (in.T + rows - 1) / rows, count = tiles * in.BH;
        int i = (int)atomicInc(next, (unsigned)count + gridDim.x - 1);
        int tile = i < count ? order[i] : 0, bh = tile / tiles;
        return {i < count ? bh : -1, bh / in.H, bh % in.H, tile % tiles * rows, 0, 0};
    }
    /* The copying thread: tells the others of tile j as soon as there is a place for it. */
    __device__ __forceinline__ void tell(int j, const HopperTile &tile) {
        ring.await_free(j);
        told[j % BUFFERS] = tile;
        hopper_arrive(&known[j % BUFFERS]);
    }
    /* The others: tile j, until every one of their threads has released it. */
    __device__ __forceinline__ const HopperTile &await_told(int j) {
        hopper_wait(&known[j % BUFFERS], j / BUFFERS % 2);
        return told[j % BUFFERS];
    }
    __device__ __forceinline__ void release(int j) {
        hopper_arrive(&ring.empty[j % BUFFERS]);
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
static __device__ __forceinline__ void hopper_load_tile(unsigned char *tile, const CUtensorMap &map, int b, int h,
                                                        int t, uint64_t *barrier) {
#pragma unroll
    for (int box = 0; box < D / HOPPER_PANEL * (ROWS / HOPPER_BOX); box++) {
        int panel = box / (ROWS / HOPPER_BOX), row = box % (ROWS / HOPPER_BOX) * HOPPER_BOX;
        hopper_load_box(tile + panel * ROWS * 128 + row * 128, map, panel * HOPPER_PANEL, b, h, t + row, barrier);
    }
}

/* Floats i .. i + COUNT - 1 of a vector. */
template <int COUNT>
static __device__ __forceinline__ void hopper_load_floats(float *to, const CUtensorMap &map, int i, uint64_t *barrier) {
#pragma unroll
    for (int box = 0; box < COUNT; box += HOPPER_BOX) {
        hopper_load_vector(to + box, map, i + box, barrier);
    }
}

/* Keys and values on their way: blocks of KEYS rows of one head, last to first, each K with its lift. */
template <int D, int KEYS, int STAGES>
struct HopperKeys { /* at a multiple of 1024 bytes */
    static constexpr int TILE = KEYS * D * 2;
    unsigned char k[STAGES][TILE], v[STAGES][TILE];
    float lift[STAGES][KEYS];
    HopperRing<STAGES> k_ring, v_ring;

    __device__ __forceinline__ void init(int warps) {
        k_ring.init(warps);
        v_ring.init(warps);
    }
    /* The copying thread: blocks end, end - 1, ... begin of head h of sequence b, whose lift begins at `row`, as steps
     * from, from + 1, ...; returns the step behind them. The first is under way before `begin` is needed, which may
     * still be on its way from memory. */
    __device__ __forceinline__ int copy(const CUtensorMap &k_map, const CUtensorMap &v_map, const CUtensorMap &lift_map,
                                        int b, int h, int row, int begin, int end, int from) {
        int i = 0;
        do {
            int stage = (from + i) % STAGES, key = (end - i) * KEYS;
            uint64_t *full = k_ring.refill(from + i, TILE + (int)sizeof lift[0]);
            hopper_load_tile<D, KEYS>(k[stage], k_map, b, h, key, full);
            hopper_load_floats<KEYS>(lift[stage], lift_map, row + key, full);
            hopper_load_tile<D, KEYS>(v[stage], v_map, b, h, key, v_ring.refill(from + i, TILE));
        } while (++i <= end - begin);
        return from + i;
    }
    __device__ __forceinline__ void skip(int i) {
        k_ring.skip(i);
        v_ring.skip(i);
    }
};

/* ---- products ---- */

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
 * tile that only this warpgroup still uses, until hopper_rows_stored(). barrier: of its own threads. */
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
    }
}

/* Before a tile is released from which rows were stored. */
static __device__ __forceinline__ void hopper_rows_stored(void) {
    if (threadIdx.x % HOPPER_WARPGROUP == 0) {
        hopper_stores_read();
    }
}

#endif

/* Portable tensor-core pieces of attention (sm_80 and newer): tiles in shared memory, loads, products.
 *
 * A tile is [rows][D] bf16. The 16-byte pieces of a row are stored in the order piece ^ (row % 8), so that the eight
 * rows that one ldmatrix reads lie in different banks. Fragments, with g = lane / 4 and p = lane % 4:
 *     accumulator of m16n8:  elements 0, 1: row g, columns 2p, 2p + 1;  2, 3: row g + 8
 *     A of m16k16:           four accumulator-like halves: two neighbouring accumulators, packed, are an A operand. */
#ifndef FOX_CUDA_TILES_CUH
#define FOX_CUDA_TILES_CUH

#include "mma.cuh"

/* ROWS rows of D values, `stride` apart, into a tile; rows from `valid` on become zero. */
template <int D, int ROWS, int THREADS>
static __device__ __forceinline__ void acp_load_tile(uint32_t tile, const bf16 *rows, int64_t stride, int valid) {
    constexpr int PIECES = D / 8, STEP = THREADS / PIECES;
    int piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
    const bf16 *from = rows + row * stride + piece * 8;
    uint32_t to = tile + row * (2 * D) + ((piece ^ (row % 8)) << 4);
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) {
        acp_copy16(to + i * STEP * 2 * D, from + i * STEP * stride, row + i * STEP < valid);
    }
}

/* COUNT floats, a multiple of 4. */
template <int COUNT>
static __device__ __forceinline__ void acp_load_floats(uint32_t to, const float *from) {
    if (threadIdx.x < COUNT / 4) {
        acp_copy16(to + threadIdx.x * 16, from + threadIdx.x * 4, true);
    }
}

/* This lane's place in a 16 x 16 fragment for ldmatrix: of an A operand, or of a B operand stored [k][n] (transposed);
 * and of a B operand stored [n][k]. Add the tile; go on by 16 columns with ^ 32, by 16 rows with + 16 * 2 D. */
template <int D>
static __device__ __forceinline__ uint32_t acp_lane_a(void) {
    uint32_t lane = threadIdx.x % 32, row = lane % 16, piece = lane / 16;
    return row * (2 * D) + ((piece ^ (row % 8)) << 4);
}

template <int D>
static __device__ __forceinline__ uint32_t acp_lane_b(void) {
    uint32_t lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, piece = lane / 8 % 2;
    return row * (2 * D) + ((piece ^ (row % 8)) << 4);
}

template <int MT, int NT>
static __device__ __forceinline__ void acp_zero(float acc[MT][NT][4]) {
#pragma unroll
    for (int i = 0; i < MT * NT * 4; i++) {
        acc[i / (4 * NT)][i / 4 % NT][i % 4] = 0;
    }
}

/* The rows [16 MT, D] of a warp as an A operand, read where they are used, or once and kept in registers. */
template <int D, int MT, bool KEEP>
struct AcpRows {
    uint32_t address;

    __device__ __forceinline__ void init(uint32_t a) {
        address = a;
    }
    __device__ __forceinline__ void get(uint32_t fragment[MT][4], int kk) {
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            acp_load_matrices(fragment[mt], (address ^ (kk << 5)) + mt * 32 * D);
        }
    }
};

template <int D, int MT>
struct AcpRows<D, MT, true> {
    uint32_t kept[D / 16][MT][4];

    __device__ __forceinline__ void init(uint32_t a) {
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                acp_load_matrices(kept[kk][mt], (a ^ (kk << 5)) + mt * 32 * D);
            }
        }
    }
    __device__ __forceinline__ void get(uint32_t fragment[MT][4], int kk) {
#pragma unroll
        for (int i = 0; i < MT * 4; i++) {
            fragment[i / 4][i % 4] = kept[kk][i / 4][i % 4];
        }
    }
};

/* acc[16 MT, 8 NT] = A[16 MT, D] B[8 NT, D]^T */
template <int D, int MT, int NT, typename Rows>
static __device__ __forceinline__ void acp_product_abt(float acc[MT][NT][4], Rows &a, uint32_t b) {
    acp_zero<MT, NT>(acc);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        uint32_t fa[MT][4], fb[4];
        a.get(fa, kk);
#pragma unroll
        for (int np = 0; np < NT / 2; np++) {
            acp_load_matrices(fb, (b ^ (kk << 5)) + np * 32 * D);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                acp_mma(acc[mt][2 * np], fa[mt], fb[0], fb[1]);
                acp_mma(acc[mt][2 * np + 1], fa[mt], fb[2], fb[3]);
            }
        }
    }
}

/* acc[16 MT, D] += W[16 MT, columns 16 ks .. 16 ks + 15] B[rows 16 ks .. 16 ks + 15, D]; W are accumulators of an
 * earlier product, rounded to bf16. */
template <int D, int MT, int NT>
static __device__ __forceinline__ void acp_product_ab(float acc[MT][D / 8][4], const float w[MT][NT][4], int ks,
                                                      uint32_t b) {
    uint32_t a[MT][4];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[mt][i] = pack2(w[mt][2 * ks + i / 2][i % 2 * 2], w[mt][2 * ks + i / 2][i % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (int np = 0; np < D / 16; np++) {
        uint32_t fb[4];
        acp_load_transposed(fb, (b ^ (np << 5)) + ks * 32 * D);
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            acp_mma(acc[mt][2 * np], a[mt], fb[0], fb[1]);
            acp_mma(acc[mt][2 * np + 1], a[mt], fb[2], fb[3]);
        }
    }
}

/* Logits of pairs with key after query become -inf. row0, column0: the tile's place in the sequence; rows are queries,
 * or keys (KEY_ROWS). */
template <int MT, int NT, bool KEY_ROWS>
static __device__ __forceinline__ void acp_mask(float acc[MT][NT][4], int row0, int column0) {
    int row = row0 + threadIdx.x % 32 / 4, column = column0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < MT * NT * 4; i++) {
        int mt = i / (4 * NT), nt = i / 4 % NT, e = i % 4;
        int r = row + mt * 16 + e / 2 * 8, s = column + nt * 8 + e % 2;
        if (KEY_ROWS ? r > s : s > r) {
            acc[mt][nt][e] = -INFINITY;
        }
    }
}

/* Writes a warp's rows, times scale[], as bf16: through the warp's own rows of a tile, so that global memory sees 16
 * bytes a lane. out: the first of these rows, `stride` apart; only `valid` rows exist. */
template <int D, int MT>
static __device__ __forceinline__ void acp_store_rows(const float acc[MT][D / 8][4], const float scale[MT][2],
                                                      unsigned char *tile, int row0, bf16 *out, int64_t stride,
                                                      int valid) {
    int lane = threadIdx.x % 32, g = lane / 4;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MT * (D / 8) * 2; i++) {
        int mt = i / (D / 8 * 2), nt = i / 2 % (D / 8), half = i % 2, row = row0 + mt * 16 + half * 8 + g;
        *reinterpret_cast<uint32_t *>(tile + row * (2 * D) + ((nt ^ (row % 8)) << 4) + lane % 4 * 4) =
            pack2(acc[mt][nt][2 * half] * scale[mt][half], acc[mt][nt][2 * half + 1] * scale[mt][half]);
    }
    __syncwarp();
    constexpr int PIECES = D / 8, STEP = 32 / PIECES;
    int piece = lane % PIECES;
#pragma unroll
    for (int r = lane / PIECES; r < 16 * MT; r += STEP) {
        int row = row0 + r;
        if (r < valid) {
            *reinterpret_cast<uint4 *>(out + r * stride + piece * 8) =
                *reinterpret_cast<const uint4 *>(tile + row * (2 * D) + ((piece ^ (row % 8)) << 4));
        }
    }
}

static __device__ __forceinline__ float acp_quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

static __device__ __forceinline__ float acp_quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

#endif

/* Forgetting attention on the GPU, with Adaptive Computation Pruning: thresholds, ranges, forward, backward, counts.
 *
 * For one head of one sequence, with s_ij = q_i.k_j / sqrt(D), cumulative log gates c (never increasing) and j <= i,
 *
 *     p_ij = exp(s_ij + c_i - c_j) / Z_i,      o_i = sum_j p_ij v_j,      lse_i = log Z_i.
 *
 * The T x T matrix is cut into blocks of 128 queries and 128 keys. Far from the diagonal the decay c_i - c_j has made
 * every weight negligible; those blocks are never touched:
 *
 *     key block       0   1   2   3   4   5
 *                   +---+---+---+---+---+---+     #  computed            \  on the diagonal: computed and masked,
 *     query block 0 | \ |   |   |   |   |   |     .  pruned                  never pruned
 *                 1 | # | \ |   |   |   |   |    (blank: above the causal edge, j > i)
 *                 2 | . | # | \ |   |   |   |
 *                 3 | . | . | # | \ |   |   |     pruned edge:  first[3] = 2, never decreasing from row to row
 *                 4 | . | . | # | # | \ |   |     the same edge seen from the keys: last[2] = 4
 *                 5 | . | . | . | . | # | \ |
 *                   +---+---+---+---+---+---+
 *
 *     acp_forward_kernel   one thread block per query block:  row, from the diagonal leftwards to first[m]   O, lse
 *     acp_dq_kernel        one thread block per query block:  row, from the diagonal leftwards to first[m]   dQ, delta
 *     acp_dkdv_kernel      one thread block per key block:    column, from the diagonal down to last[n]      dK, dV, dc
 *
 * What is lost: for every row, sum over pruned j of p_ij <= eps = exp(log_tolerance), so an output changes by at most
 * 2 eps max|v|. Two tests find the edge (cpu/acp.h is their reference in double precision, with proofs):
 *     paper  block (m, n) is pruned when c_(first row of m) - c_(last key of n) < -2U - log T + log_tolerance,
 *            U >= |s_ij|, from the QK-norm weights or measured;
 *     tight  the longest prefix of key blocks whose summed mass, bounded block by block, stays below eps.
 * The edge is found on the device before each forward pass; grids do not depend on it, so the host never waits. Tiles
 * are taken in the order of their work, the longest first.
 *
 * Decay in float32. c reaches 10^5 while c_i - c_j matters to 10^-4, so c itself is only ever held in double. In units
 * of log 2, with the first row of every block as its base, a pair of blocks (m, n) sees
 *     (c_i - c_j) log2(e) = -lift_i + (base_m - base_n) + lift_j,     lift_t = (c_(block start) - c_t) log2(e) >= 0:
 * lift is a float vector, base a pair of floats per block (its rounded value and the rest): differences of the first
 * parts are exact where they are small enough to matter. Double arithmetic would wait for the tensor cores, whose pipe
 * it shares.
 *
 * Backward, with P rebuilt from lse and delta_i = dO_i.o_i:
 *     dS = P (dO V^T - delta),   dV = P^T dO,   dQ = dS K / sqrt(D),   dK = dS^T Q / sqrt(D)
 *     dc_t = sum_j dS[t, j] - sum_i dS[i, t],    d log f_t = sum_{i >= t} dc_i  (in double)
 * On paper row sums of dS are zero, because delta_i = sum_j p_ij dP_ij. With O rounded to bf16 they are not, and the
 * cumulative sum would spread that error over the whole sequence. acp_dq_kernel, which runs first, therefore corrects
 * delta by the row sum it finds: for acp_dkdv_kernel, which rebuilds P and dP in float32, row sums are then zero to
 * float32 rounding, and dc is minus the column sums.
 *
 * c is summed up in cuda/gate_sums.cuh, `tight` searches in cuda/tight_search.cuh, tiles are put in order in cuda/tile_order.cuh.
 * The kernels above stand in cuda/portable_attention.cuh, for every chip from sm_80 on, and in cuda/hopper_forward.cuh and
 * hopper_backward.cuh (other tiles, the same pairs), chosen in acp_on_hopper. Outputs are the same bits in every run:
 * no sum depends on the order of thread blocks. */
#ifndef ACP_ATTENTION_CUH
#define ACP_ATTENTION_CUH

#include "cuda/common.cuh"
#include "cuda/tiles.cuh"

enum {
    ACP_BLOCK = 128,         /* queries, and keys, in a block: the grain of pruning */
    ACP_CHUNK = 2048,        /* steps that one thread block of a scan covers: 256 threads, 8 each */
    ACP_RANGES_SHARED = 20,  /* bytes of shared memory that the search for ranges needs for each block */
    ACP_MOST_BLOCKS = 11000, /* 1.4 million tokens; where shared memory is smaller fewer: acp_most_tokens */
};

/* Stats of a key block that is not described yet. */
#define ACP_UNDESCRIBED (~(uint64_t)0)

#define ACP_LOG2E 1.4426950408889634
#define ACP_LN2 0.6931471805599453

/* Under QK-norm |q| <= max|w| sqrt(D) before q is rounded to bf16, which adds at most 2^-8 of it (twice that, were it
 * rounded twice); the same for k. */
#define ACP_ROUNDING ((1.0 + 1.0 / 128) * (1.0 + 1.0 / 128))

/* Kept from forward to backward. BH = B*H rows, `blocks` = ceil(T / 128), `padded` = 128 * blocks. */
typedef struct AcpSaved {
    double *c;    /* [BH, T], cumulative log gates */
    float2 *base; /* [BH, blocks], log2(e) * c at the first row of each block, as a sum of two floats */
    float *lift;  /* [BH, padded], log2(e) * (c at the block's first row - c_t); 0 beyond T */
    int *first;   /* [BH, blocks], first key block of each query block */
    int *last;    /* [BH, blocks], last query block of each key block */
    float *bound; /* [BH], on |s_ij| */
    /* [BH * blocks] each, the longest first: row * tiles + tile; of queries (forward), of keys, of queries (dQ) */
    int *order[3];
    unsigned *next; /* [3], of each order: how far thread blocks that stay have come; 0 between launches */
} AcpSaved;

/* Shared by all layers. What finds the ranges and what backward needs lie in the same bytes: never both are needed. */
typedef struct AcpWork {
    double2 *edges; /* [BH, blocks], c at the first and at the last row of each block */
    float2 *norms;  /* [BH, blocks], max |q_i| and max |k_j| of each block; without QK-norm */
    /* tight: cuda/tight_search.cuh */
    float *most_q;       /* [BH], no |q_i| exceeds it */
    double *threshold;   /* [BH], of the paper's test */
    float *centre;       /* [BH, D], what keys have in common; below, keys are meant without it */
    uint64_t *key_stats; /* [BH, blocks], of each key block: log W, norm K; before that ACP_UNDESCRIBED */
    float *key_means;    /* [BH, blocks, D], sum_j w_j k_j / W */
    int *first_raw;      /* [BH, blocks], before the minimum over later blocks */
    unsigned *ticket;    /* how many blocks thread blocks have taken */
    /* backward */
    float *offset; /* [BH, padded], of each query -lift - lse in units of log 2; -inf from T to a multiple of 64 */
    float *delta;  /* [BH, padded], of each query dO.o plus what the row of dS, in float32, then lacks to a sum of 0; 0 as far */
    float *dc;     /* [BH, padded], of each key minus the column sum of dS: the row sums are in delta */
} AcpWork;

static inline int acp_num_blocks(const AcpShape *s) {
    return (s->T + ACP_BLOCK - 1) / ACP_BLOCK;
}

/* Takes `count` elements of `size` bytes from the memory at `start` (NULL: only measures), 256-byte aligned. */
static inline void *acp_take(char *start, int64_t *used, int64_t count, size_t size) {
    char *p = start == NULL ? NULL : start + *used;
    *used += (count * (int64_t)size + 255) / 256 * 256;
    return p;
}

static inline AcpSaved acp_saved(const AcpShape *shape, void *memory, int64_t *bytes) {
    int64_t used = 0, BH = (int64_t)shape->B * shape->H, blocks = acp_num_blocks(shape);
    char *start = (char *)memory;
    AcpSaved s;
    s.c = (double *)acp_take(start, &used, BH * shape->T, sizeof(double));
    s.base = (float2 *)acp_take(start, &used, BH * blocks, sizeof(float2));
    s.lift = (float *)acp_take(start, &used, BH * blocks * ACP_BLOCK, sizeof(float));
    s.first = (int *)acp_take(start, &used, BH * blocks, sizeof(int));
    s.last = (int *)acp_take(start, &used, BH * blocks, sizeof(int));
    s.bound = (float *)acp_take(start, &used, BH, sizeof(float));
    for (int i = 0; i < 3; i++) {
        s.order[i] = (int *)acp_take(start, &used, BH * blocks, sizeof(int));
    }
    s.next = (unsigned *)acp_take(start, &used, 3, sizeof(unsigned));
    *bytes = used;
    return s;
}

static inline AcpWork acp_work(const AcpShape *shape, void *memory, int64_t *bytes) {
    int64_t used = 0, BH = (int64_t)shape->B * shape->H, blocks = acp_num_blocks(shape), padded = blocks * ACP_BLOCK;
    char *start = (char *)memory;
    AcpWork w;
    w.edges = (double2 *)acp_take(start, &used, BH * blocks, sizeof(double2));
    w.norms = (float2 *)acp_take(start, &used, BH * blocks, sizeof(float2));
    w.most_q = (float *)acp_take(start, &used, BH, sizeof(float));
    w.threshold = (double *)acp_take(start, &used, BH, sizeof(double));
    w.centre = (float *)acp_take(start, &used, BH * shape->D, sizeof(float));
    w.key_stats = (uint64_t *)acp_take(start, &used, BH * blocks, sizeof(uint64_t));
    w.key_means = (float *)acp_take(start, &used, BH * blocks * shape->D, sizeof(float));
    w.first_raw = (int *)acp_take(start, &used, BH * blocks, sizeof(int));
    w.ticket = (unsigned *)acp_take(start, &used, 1, sizeof(unsigned));
    int64_t forward = used;
    used = 0; /* the backward pass no longer needs what found the ranges */
    w.offset = (float *)acp_take(start, &used, BH * padded, sizeof(float));
    w.delta = (float *)acp_take(start, &used, BH * padded, sizeof(float));
    w.dc = (float *)acp_take(start, &used, BH * padded, sizeof(float));
    *bytes = used > forward ? used : forward;
    return w;
}

/* A kernel that is launched early (see acp_launch) lets the next kernel's thread blocks take their places, as soon as one thread
 * of each of its own has said so or has ended, */
static __device__ __forceinline__ void acp_let_next_begin(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* and waits until all that came before it in the stream is done. */
static __device__ __forceinline__ void acp_await_earlier(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The first words of most of them. */
static __device__ __forceinline__ void acp_begin(void) {
    acp_let_next_begin();
    acp_await_earlier();
}

#include "cuda/gate_sums.cuh"

/* ------------------------------------------------------------------------------------------------------------------ */
/* Ranges */

/* q, k and v as attention reads them: row t of head h of sequence b starts at (b T + t) stride + h D. */
struct AcpInputs {
    const bf16 *q, *k, *v;
    int64_t stride;
    int T, H, blocks, BH;
};

template <int D>
static __device__ __forceinline__ int64_t acp_row(int64_t bh, int t, int T, int H, int64_t stride) {
    int row = (int)bh; /* acp_check: it fits; dividing 64 bits costs a hundred instructions */
    return (int64_t)(row / H * T + t) * stride + row % H * D;
}

/* Sum over the D/8 neighbouring lanes that share a row. */
template <int D>
static __device__ __forceinline__ float acp_row_sum(float x) {
#pragma unroll
    for (int lanes = D / 16; lanes > 0; lanes /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, lanes);
    }
    return x;
}

static __device__ __forceinline__ float acp_dot8(const float a[8], const float b[8]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sum = fmaf(a[i], b[i], sum);
    }
    return sum;
}

/* Largest value of a block of 128 threads; scratch: [4]. */
static __device__ __forceinline__ float acp_block_max(float x, float *scratch) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return fmaxf(fmaxf(fmaxf(scratch[0], scratch[1]), scratch[2]), scratch[3]);
}

/* Largest norms of each block. grid (blocks, BH), 128 threads; reads Q and K once. */
template <int D>
static __global__ void acp_norms_kernel(AcpInputs in, float2 *norms) {
    __shared__ float scratch[4];
    constexpr int LANES = D / 8, ROWS = 128 / LANES;
    int64_t bh = blockIdx.y;
    int column = threadIdx.x % LANES * 8;
    float q2 = 0, k2 = 0;
    acp_begin();
#pragma unroll 8
    for (int r = threadIdx.x / LANES; r < ACP_BLOCK; r += ROWS) {
        int t = min(blockIdx.x * ACP_BLOCK + r, in.T - 1); /* rows beyond the end repeat the last */
        int64_t at = acp_row<D>(bh, t, in.T, in.H, in.stride) + column;
        float q[8], k[8];
        load8(q, in.q + at);
        load8(k, in.k + at);
        q2 = fmaxf(q2, acp_row_sum<D>(acp_dot8(q, q)));
        k2 = fmaxf(k2, acp_row_sum<D>(acp_dot8(k, k)));
    }
    q2 = acp_block_max(q2, scratch);
    k2 = acp_block_max(k2, scratch);
    if (threadIdx.x == 0) {
        norms[bh * in.blocks + blockIdx.x] = make_float2(sqrtf(q2), sqrtf(k2));
    }
}

struct AcpRanges {
    AcpMode mode;
    int T, H, D, blocks;
    /* with max|q| and max|k|, measured or, under QK-norm, of its weights: U = scale max|q| max|k|; |q_i| <= q_scale max|q| */
    double scale, q_scale;
    double log_spread;            /* log_tolerance - log T */
    const float *q_norm, *k_norm; /* NULL: work.norms */
    bool shared_norm;
    unsigned long long *skipped, *total; /* [H] or NULL */
};

static inline AcpRanges acp_ranges(const AcpShape *shape, const float *q_norm, const float *k_norm, const AcpCounts *counts) {
    double root = sqrt((double)shape->D), rounding = 1 + 1e-5; /* of a sum of squares in float32 */
    return {shape->mode,
            shape->T,
            shape->H,
            shape->D,
            acp_num_blocks(shape),
            q_norm != NULL ? root * ACP_ROUNDING : rounding / root,
            q_norm != NULL ? root * ACP_ROUNDING : rounding,
            shape->log_tolerance - log((double)shape->T),
            q_norm,
            k_norm,
            shape->shared_norm,
            counts != NULL ? counts->skipped : NULL,
            counts != NULL ? counts->total : NULL};
}

/* Of one row, by the lanes of a warp: max|q| and max|k| where norms were measured, else max of both QK-norm weights. */
static __device__ __forceinline__ float2 acp_largest_norms(const AcpRanges &r, const AcpWork &work, int64_t bh, int h, int lane) {
    float q = 0, k = 0;
    int offset = r.shared_norm ? 0 : h * r.D;
    for (int i = lane; i < (r.q_norm != NULL ? r.D : r.blocks); i += 32) {
        float2 norm = r.q_norm == NULL ? work.norms[bh * r.blocks + i]
                                       : make_float2(fabsf(r.q_norm[offset + i]), fabsf(r.k_norm[offset + i]));
        q = fmaxf(q, norm.x);
        k = fmaxf(k, norm.y);
    }
    return make_float2(warp_max(q), warp_max(k));
}

#include "cuda/tight_search.cuh"

/* What the ranges follow from: sums of gates, and for `tight` what is known of heads. grid (chunks and, for `tight`, one more;
 * BH), 256 threads. The search, when it begins, may rely on all before this kernel, and on tickets from 0 on. */
template <int D>
static __global__ void __launch_bounds__(256) acp_sum_gates_kernel(AcpScan s, AcpInputs in, AcpRanges r) {
    acp_await_earlier();
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        if (threadIdx.x == 0) {
            *s.work.ticket = 0;
            __threadfence();
        }
        __syncthreads();
    }
    acp_let_next_begin();
    if ((int)blockIdx.x * ACP_CHUNK < s.T) {
        acp_scan_chunk<false>(s);
    } else {
        acp_describe_head<D>(in, r, s.work, (int)blockIdx.y);
    }
}

/* The paper's test: first key block, up to `high`, whose last key is not far enough behind the first query of block m. */
static __device__ __forceinline__ int acp_first_block(const double *begins, const double *ends, int m, int high, double delta) {
    int low = 0;
    while (low < high) {
        int n = (low + high) / 2;
        if (begins[m] - ends[n] < delta) {
            low = n + 1;
        } else {
            high = n;
        }
    }
    return low;
}

/* The last query block whose range begins at key block n or before; first[n] <= n. */
static __device__ __forceinline__ int acp_last_block(const int *first, int n, int blocks) {
    int low = n, high = blocks - 1;
    while (low < high) {
        int m = (low + high + 1) / 2;
        if (first[m] <= n) {
            low = m;
        } else {
            high = m - 1;
        }
    }
    return low;
}

/* first and last of one row, and its share of the counts. grid (BH), 256 threads, ACP_RANGES_SHARED bytes for each
 * block; the threads take query blocks from the last to the first, so that the minimum over all later blocks is a scan
 * over threads. */
static __global__ void acp_ranges_kernel(AcpRanges r, AcpSaved saved, AcpWork work) {
    enum { LAST_WARP = 224 };
    __shared__ int scan[8], lowest;
    __shared__ unsigned skipped; /* fewer than ACP_MOST_BLOCKS^2; adding 64 bits would wait in line */
    __shared__ float bound[2];
    extern __shared__ double begins[];                     /* c of the first row of each block */
    double *ends = begins + r.blocks;                      /* and of the last */
    int *first = reinterpret_cast<int *>(ends + r.blocks); /* of this row */
    int64_t bh = blockIdx.x;
    int h = (int)blockIdx.x % r.H, tid = threadIdx.x;
    unsigned own_skipped = 0;
    acp_begin();
    if (tid == 0) {
        lowest = r.blocks;
        skipped = 0;
    }
    if (tid >= LAST_WARP) { /* it has the least to load below */
        float2 largest = acp_largest_norms(r, work, bh, h, tid - LAST_WARP);
        if (tid == LAST_WARP) {
            bound[0] = largest.x;
            bound[1] = largest.y;
        }
    }
    if (r.mode == ACP_PAPER) {
#pragma unroll 4
        for (int n = tid; n < r.blocks; n += 256) {
            double2 edges = work.edges[bh * r.blocks + n];
            begins[n] = edges.x;
            ends[n] = edges.y;
        }
    }
    __syncthreads();
    double U = r.scale * (double)bound[0] * (double)bound[1], delta = -2.0 * U + r.log_spread;
    if (tid == 0) {
        saved.bound[bh] = (float)U;
    }
    for (int end = r.blocks; end > 0; end -= 256) {
        int m = end - 1 - tid, value = r.blocks;
        if (m >= 0 && r.mode == ACP_TIGHT) {
            value = work.first_raw[bh * r.blocks + m];
        } else if (m >= 0) {
            value = acp_first_block(begins, ends, m, r.mode == ACP_PAPER ? m : 0, delta);
        }
        int later = lowest;
        value = min(acp_block_scan(value, scan, AcpMin()), later);
        if (m >= 0) {
            first[m] = value;
            saved.first[bh * r.blocks + m] = value;
            own_skipped += (unsigned)value;
        }
        __syncthreads();
        if (tid == 255) {
            lowest = value;
        }
        __syncthreads();
    }
    for (int n = tid; n < r.blocks; n += 256) {
        saved.last[bh * r.blocks + n] = acp_last_block(first, n, r.blocks);
    }
    if (r.skipped != NULL) {
        own_skipped = __reduce_add_sync(0xffffffffu, own_skipped);
        if (tid % 32 == 0) {
            atomicAdd(&skipped, own_skipped);
        }
        __syncthreads();
        if (tid == 0) {
            atomicAdd(&r.skipped[h], (unsigned long long)skipped);
            atomicAdd(&r.total[h], (unsigned long long)r.blocks * (unsigned long long)(r.blocks + 1) / 2);
        }
    }
}

#include "cuda/tile_order.cuh"

/* base_m - base_n */
static __device__ __forceinline__ float acp_shift(float2 m, float2 n) {
    return (m.x - n.x) + (m.y - n.y);
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* What the kernels of a pass are given, and what both their kinds share */

struct AcpForward {
    AcpInputs in;
    AcpSaved saved;
    bf16 *o;
    float *lse;
};

struct AcpBackward {
    AcpInputs in;
    AcpSaved saved;
    AcpWork work;
    const bf16 *dout, *o; /* [B, T, H*D] */
    const float *lse;
    bf16 *dq, *dk, *dv;
};

/* Of query t of row bh: (-lift - lse) in units of log 2; beyond the end -inf. */
static __device__ __forceinline__ float acp_query_offset(const AcpBackward &p, int64_t bh, int t) {
    int row = min(t, p.in.T - 1); /* loaded in any case: without a branch the loads of several queries overlap */
    float offset = -p.saved.lift[bh * p.in.blocks * ACP_BLOCK + row] - p.lse[bh * p.in.T + row] * (float)ACP_LOG2E;
    return t < p.in.T ? offset : -INFINITY;
}

/* 1 / sqrt(D) */
template <int D>
static __device__ constexpr float acp_root() {
    return D == 64 ? 0.125f : 0.08838834764831845f;
}

/* P = exp2(s scale + (offset + key)), key = lift_j + shift and offset that of the query; where it is cheaper, shift
 * stands with offset instead. */
static __device__ __forceinline__ float acp_weight(float s, float scale, float offset, float key) {
    return acp_exp2(fmaf(s, scale, offset + key));
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Kernels for every chip and for Hopper; launchers */

#include "cuda/portable_attention.cuh"

#include "cuda/hopper_forward.cuh"

#include "cuda/hopper_backward.cuh"

/* Launches a kernel. early: it calls acp_await_earlier() before it touches what earlier ones write, and its thread blocks may
 * take their places while the kernel before it still runs, which hides what a launch costs. Where all kernels of attention are short, that is much of
 * their time. */
template <typename... Parameters, typename... Args>
static void acp_launch(bool early, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                       cudaStream_t stream, const Args &...args) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

/* Whether the Hopper kernels can be used: the chip is one, and the program has its code for it. */
static bool acp_on_hopper(const AcpShape *shape) {
    cudaFuncAttributes kernel;
    CUDA_CHECK(cudaFuncGetAttributes(&kernel, hopper_dq_kernel<64>));
    /* ptxVersion 80: compiled by the driver for another chip. Few registers: for sm_90 without Hopper's own
     * instructions (sm_90a has them), and so empty. */
    return !shape->portable && kernel.ptxVersion == 90 && kernel.numRegs >= 100;
}

/* How many thread blocks stay until all `tiles` are taken: `each` for each multiprocessor of this device, if there are as
 * many tiles. */
static unsigned acp_staying(int tiles, int each) {
    int device, processors;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    return (unsigned)(tiles < each * processors ? tiles : each * processors);
}

/* The order of thread blocks for the kernels that follow, in forward and backward. */
static void acp_run_order(const AcpInputs &in, const AcpSaved &saved, bool early, int queries, int keys, int dq_queries,
                          cudaStream_t stream) {
    AcpOrder order = {in.T, in.blocks, in.BH, {queries, keys, dq_queries}, saved};
    acp_launch(early, acp_order_kernel, 3, 1024, 0, stream, order);
}

/* The one place where a forward kernel is chosen. */
template <int D>
static void acp_run_forward(const AcpShape *shape, const AcpForward &args, cudaStream_t stream) {
    if (!acp_on_hopper(shape)) {
        acp_run_order(args.in, args.saved, false, ACP_BLOCK, ACP_BLOCK, ACP_BLOCK, stream);
        acp_launch(false, acp_forward_kernel<D>, args.in.BH * args.in.blocks, 128, sizeof(AcpForwardShared<D>), stream,
                   args);
        return;
    }
    using Traits = HopperForward<D>;
    acp_run_order(args.in, args.saved, true, Traits::QUERIES, HopperDkdv<D>::KEYS, HopperDq<D>::QUERIES, stream);
    int tiles = (args.in.T + Traits::QUERIES - 1) / Traits::QUERIES;
    acp_launch(true, hopper_forward_kernel<D>, acp_staying(args.in.BH * tiles, 1), Traits::THREADS,
               sizeof(HopperForwardShared<D>), stream, hopper_forward_args<D>(shape, args));
}

/* The one place where backward kernels are chosen: dq, with offset and delta; then dk, dv and work.dc. */
template <int D>
static void acp_run_dq(const AcpShape *shape, const AcpBackward &args, cudaStream_t stream) {
    if (!acp_on_hopper(shape)) {
        acp_launch(false, acp_dq_kernel<D>, args.in.BH * args.in.blocks, 128, sizeof(AcpDqShared<D>), stream, args);
        return;
    }
    int tiles = (args.in.T + HopperDq<D>::QUERIES - 1) / HopperDq<D>::QUERIES;
    acp_launch(true, hopper_dq_kernel<D>, acp_staying(args.in.BH * tiles, 1), HopperDq<D>::THREADS, sizeof(HopperDqShared<D>), stream,
               hopper_backward_args<D>(shape, args));
}

template <int D>
static void acp_run_dkdv(const AcpShape *shape, const AcpBackward &args, cudaStream_t stream) {
    if (!acp_on_hopper(shape)) {
        acp_launch(false, acp_dkdv_kernel<D>, args.in.BH * args.in.blocks, AcpDkdvTraits<D>::THREADS,
                   sizeof(AcpDkdvShared<D>), stream, args);
        return;
    }
    int tiles = (args.in.T + HopperDkdv<D>::KEYS - 1) / HopperDkdv<D>::KEYS;
    acp_launch(true, hopper_dkdv_kernel<D>, acp_staying(args.in.BH * tiles, 1), HopperDkdv<D>::THREADS,
               sizeof(HopperDkdvShared<D>), stream, hopper_backward_args<D>(shape, args));
}

template <int D>
static void acp_run_backward(const AcpShape *shape, const AcpBackward &args, cudaStream_t stream) {
    acp_run_dq<D>(shape, args, stream);
    acp_run_dkdv<D>(shape, args, stream);
}

/* c, base, lift, bound and the ranges of all heads. */
template <int D>
static void acp_find_ranges(const AcpShape *shape, const AcpInputs &in, const AcpScan &scan, const AcpRanges &ranges,
                            cudaStream_t stream) {
    const AcpSaved &saved = scan.saved;
    const AcpWork &work = scan.work;
    unsigned heads = (unsigned)in.BH, chunks = (unsigned)((in.T + ACP_CHUNK - 1) / ACP_CHUNK);
    bool early = acp_on_hopper(shape), tight = shape->mode == ACP_TIGHT;
    if (ranges.q_norm == NULL) {
        acp_launch(early, acp_norms_kernel<D>, dim3((unsigned)in.blocks, heads), 128, 0, stream, in, work.norms);
    }
    acp_launch(early, acp_sum_gates_kernel<D>, dim3(chunks + tight, heads), 256, 0, stream, scan, in, ranges);
    if (tight) {
        float log_budget = (float)(shape->log_tolerance - 0.02); /* the same allowance for float32 as in cpu/acp.h */
        acp_launch(early, acp_search_kernel<D>, acp_staying(in.BH * in.blocks, acp_searching<D>()), 128,
                   sizeof(AcpSearchShared<D>), stream, in, saved, work, log_budget);
    }
    acp_launch(early, acp_ranges_kernel, heads, 256, (size_t)in.blocks * ACP_RANGES_SHARED, stream, ranges, saved, work);
}

/* d log f from dc */
static void acp_run_gate_gradient(const AcpShape *shape, const AcpScan &scan, cudaStream_t stream) {
    dim3 grid((unsigned)((scan.T + ACP_CHUNK - 1) / ACP_CHUNK), (unsigned)(shape->B * shape->H));
    acp_launch(acp_on_hopper(shape), acp_sum_dc_kernel, grid, 256, 0, stream, scan);
}

extern "C" int64_t acp_most_tokens(void) {
    int device, shared;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    int64_t blocks = (shared - 1024) / ACP_RANGES_SHARED; /* its other shared memory needs less than 1024 bytes */
    return ACP_BLOCK * fox_min64(blocks, ACP_MOST_BLOCKS);
}

static void acp_check(const AcpShape *s, int64_t stride, const void *q, const void *k, const void *v) {
    CUDA_REQUIRE(s->D == 64 || s->D == 128, "heads of 64 or 128 values expected");
    CUDA_REQUIRE(s->B >= 1 && s->T >= 1 && s->H >= 1, "B, T and H of at least 1 expected");
    CUDA_REQUIRE((int64_t)s->B * s->H <= ACP_MOST_HEADS, "fewer heads in all sequences together expected");
    CUDA_REQUIRE((int64_t)s->B * s->H * s->T < ACP_MOST_ROWS, "fewer than 2^31 rows of attention expected");
    CUDA_REQUIRE(s->T <= acp_most_tokens(), "a sequence whose ranges fit in shared memory expected");
    CUDA_REQUIRE(s->log_tolerance < 0, "a negative log_tolerance expected");
    CUDA_REQUIRE(stride % 8 == 0 && stride >= (int64_t)s->H * s->D,
                 "a stride that is a multiple of 8 and at least H*D expected");
    CUDA_REQUIRE(((uintptr_t)q | (uintptr_t)k | (uintptr_t)v) % 16 == 0, "q, k and v aligned to 16 bytes expected");
}

extern "C" int64_t acp_saved_bytes(const AcpShape *shape) {
    int64_t bytes;
    acp_saved(shape, NULL, &bytes);
    return bytes;
}

extern "C" int64_t acp_workspace_bytes(const AcpShape *shape) {
    int64_t bytes;
    acp_work(shape, NULL, &bytes);
    return bytes;
}

/* Where `saved` holds the cumulative gates (double [B, H, T]), the first key block of each query block and the last
 * query block of each key block (int [B, H, ceil(T / 128)]): for tests and reports. */
extern "C" void acp_saved_views(const AcpShape *shape, void *memory, const double **c, const int **first,
                                const int **last) {
    int64_t bytes;
    AcpSaved saved = acp_saved(shape, memory, &bytes);
    *c = saved.c;
    *first = saved.first;
    *last = saved.last;
}

extern "C" void acp_attention_forward(const AcpShape *shape, bf16 *o, float *lse, void *saved_memory, void *workspace,
                                      AcpCounts *counts, const bf16 *q, const bf16 *k, const bf16 *v, int64_t stride,
                                      const float *log_f, const float *q_norm, const float *k_norm,
                                      cudaStream_t stream) {
    acp_check(shape, stride, q, k, v);
    CUDA_REQUIRE((q_norm == NULL) == (k_norm == NULL), "both QK-norm weights or neither expected");
    int64_t bytes;
    int BH = shape->B * shape->H;
    AcpSaved saved = acp_saved(shape, saved_memory, &bytes);
    AcpWork work = acp_work(shape, workspace, &bytes);
    AcpInputs in = {q, k, v, stride, shape->T, shape->H, acp_num_blocks(shape), BH};
    AcpScan scan = {in.T, in.blocks, log_f, NULL, saved, work, NULL};
    AcpRanges ranges = acp_ranges(shape, q_norm, k_norm, counts);
    AcpForward args = {in, saved, o, lse};
    if (shape->D == 64) {
        acp_find_ranges<64>(shape, in, scan, ranges, stream);
        acp_run_forward<64>(shape, args, stream);
    } else {
        acp_find_ranges<128>(shape, in, scan, ranges, stream);
        acp_run_forward<128>(shape, args, stream);
    }
}

extern "C" void acp_attention_backward(const AcpShape *shape, bf16 *dq, bf16 *dk, bf16 *dv, float *dlog_f,
                                       void *saved_memory, void *workspace, const bf16 *dout, const bf16 *q,
                                       const bf16 *k, const bf16 *v, int64_t stride, const bf16 *o, const float *lse,
                                       cudaStream_t stream) {
    acp_check(shape, stride, q, k, v);
    int64_t bytes;
    int BH = shape->B * shape->H;
    AcpSaved saved = acp_saved(shape, saved_memory, &bytes);
    AcpWork work = acp_work(shape, workspace, &bytes);
    AcpInputs in = {q, k, v, stride, shape->T, shape->H, acp_num_blocks(shape), BH};
    AcpBackward args = {in, saved, work, dout, o, lse, dq, dk, dv};
    AcpScan scan = {in.T, in.blocks, NULL, work.dc, saved, work, dlog_f};
    if (shape->D == 64) {
        acp_run_backward<64>(shape, args, stream);
    } else {
        acp_run_backward<128>(shape, args, stream);
    }
    acp_run_gate_gradient(shape, scan, stream);
}

#endif

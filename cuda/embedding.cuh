/* Token embedding: x[n] = w[tokens[n]], and its gradient dw[tokens[n]] += dx[n] with every row summed in a fixed order.
 *
 * The gradient needs the positions of each token, in order. They are sorted by counting, in integers:
 *     count      arrival[n] = how many of n's token came before, by an atomic counter: some order
 *     segments   each token in use takes a stretch of `list` and a place in `used`: some order again
 *     place      n into its token's stretch, at its arrival
 *     rank       n again into `sorted`, after the positions of its token that are smaller: now in order
 * Only where a stretch lies depends on the order of threads, never what is in it. Then eight warps take eight tokens
 * for 256 columns: a token with few positions is one warp's, one with many (a common word) is shared by all eight.
 * x, w and their gradients: float [.., d]. Forward moves 8 bytes an element, backward 4, and 8 for each row in use. */
#ifndef FOX_CUDA_EMBEDDING_CUH
#define FOX_CUDA_EMBEDDING_CUH

#include "common.cuh"

enum { EMBEDDING_WARPS = 8, EMBEDDING_COLUMNS = 256 }; /* of a block */
enum { EMBEDDING_SHARED = 16 };                        /* positions from which a token is shared */

static __global__ void embedding_forward_kernel(float *x, const int32_t *tokens, const float *w, int d) {
    const float4 *from = reinterpret_cast<const float4 *>(w + (int64_t)tokens[blockIdx.x] * d);
    float4 *to = reinterpret_cast<float4 *>(x + (int64_t)blockIdx.x * d);
#pragma unroll 4
    for (int i = threadIdx.x; i < d / 4; i += blockDim.x) {
        to[i] = from[i];
    }
}

/* The scratch of the backward pass. */
struct EmbeddingSort {
    int32_t *taken;                                /* [2]: tokens in use, positions given out */
    int32_t *counts, *starts;                      /* [V] */
    int32_t *used_token, *used_start, *used_count; /* [min(N, V)] */
    int32_t *arrival, *list, *sorted;              /* [N] */
};

static __global__ void embedding_count_kernel(EmbeddingSort sort, const int32_t *tokens, int64_t N) {
    int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) {
        sort.arrival[n] = atomicAdd(&sort.counts[tokens[n]], 1);
    }
}

static __global__ void embedding_segments_kernel(EmbeddingSort sort, int V) {
    int v = blockIdx.x * blockDim.x + threadIdx.x;
    if (v < V && sort.counts[v] > 0) {
        int used = atomicAdd(&sort.taken[0], 1), start = atomicAdd(&sort.taken[1], sort.counts[v]);
        sort.used_token[used] = v;
        sort.used_start[used] = sort.starts[v] = start;
        sort.used_count[used] = sort.counts[v];
    }
}

static __global__ void embedding_place_kernel(EmbeddingSort sort, const int32_t *tokens, int64_t N) {
    int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) {
        sort.list[sort.starts[tokens[n]] + sort.arrival[n]] = (int32_t)n;
    }
}

/* One warp a position. */
static __global__ void embedding_rank_kernel(EmbeddingSort sort, const int32_t *tokens, int64_t N) {
    int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) {
        return;
    }
    int token = tokens[n], count = sort.counts[token], rank = 0;
    const int32_t *list = sort.list + sort.starts[token];
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < count; i += 32) {
        rank += list[i] < n;
    }
    rank = __reduce_add_sync(0xffffffffu, rank);
    if (threadIdx.x % 32 == 0) {
        sort.sorted[sort.starts[token] + rank] = (int32_t)n;
    }
}

/* The columns of a lane: four, and four more 128 further on. */
struct EmbeddingSum {
    float4 low, high;
};

static __device__ __forceinline__ void add4(float4 &sum, float4 x) {
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}

static __device__ __forceinline__ EmbeddingSum load_row(const float *row, bool low, bool high) {
    const float4 zero = make_float4(0, 0, 0, 0);
    return {low ? *reinterpret_cast<const float4 *>(row) : zero,
            high ? *reinterpret_cast<const float4 *>(row + 128) : zero};
}

/* sum += dx at positions[first], positions[first + step], .. below count. */
static __device__ __forceinline__ void embedding_sum(EmbeddingSum &sum, const float *dx, const int32_t *positions,
                                                     int first, int step, int count, int d, bool low, bool high) {
#pragma unroll 4
    for (int i = first; i < count; i += step) {
        EmbeddingSum x = load_row(dx + (int64_t)positions[i] * d, low, high);
        add4(sum.low, x.low);
        add4(sum.high, x.high);
    }
}

static __device__ __forceinline__ void store_row(float *row, const EmbeddingSum &sum, bool low, bool high) {
    if (low) {
        *reinterpret_cast<float4 *>(row) = sum.low;
    }
    if (high) {
        *reinterpret_cast<float4 *>(row + 128) = sum.high;
    }
}

/* blockIdx.y: EMBEDDING_COLUMNS columns; each block takes eight of the tokens in use at a time. */
static __global__ void embedding_backward_kernel(float *dw, const float *dx, EmbeddingSort sort, int d) {
    __shared__ EmbeddingSum sums[EMBEDDING_WARPS][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.y * EMBEDDING_COLUMNS + 4 * lane;
    int used = sort.taken[0], stride = gridDim.x;
    bool low = column < d, high = column + 128 < d;
    for (int first = blockIdx.x; first < used; first += stride * EMBEDDING_WARPS) {
        int mine = first + warp * stride, count = mine < used ? sort.used_count[mine] : 0;
        if (count > 0 && count < EMBEDDING_SHARED) {
            float *row = dw + (int64_t)sort.used_token[mine] * d + column;
            EmbeddingSum sum = load_row(row, low, high);
            embedding_sum(sum, dx + column, sort.sorted + sort.used_start[mine], 0, 1, count, d, low, high);
            store_row(row, sum, low, high);
        }
        for (int w = 0; w < EMBEDDING_WARPS && first + w * stride < used; w++) {
            int i = first + w * stride;
            count = sort.used_count[i]; /* the same for the whole block */
            if (count >= EMBEDDING_SHARED) {
                float *row = dw + (int64_t)sort.used_token[i] * d + column;
                EmbeddingSum sum = load_row(row, low && warp == 0, high && warp == 0);
                embedding_sum(sum, dx + column, sort.sorted + sort.used_start[i], warp, EMBEDDING_WARPS, count, d, low,
                              high);
                sums[warp][lane] = sum;
                __syncthreads();
                if (warp == 0) {
                    for (int other = 1; other < EMBEDDING_WARPS; other++) {
                        add4(sum.low, sums[other][lane].low);
                        add4(sum.high, sums[other][lane].high);
                    }
                    store_row(row, sum, low, high);
                }
                __syncthreads();
            }
        }
    }
}

/* ---- launchers ---- */

void cuda_embedding_forward(float *x, const int32_t *tokens, const float *w, int64_t N, int d, cudaStream_t stream) {
    CUDA_REQUIRE(d % 4 == 0 && d > 0, "the width must be a multiple of 4");
    embedding_forward_kernel<<<(unsigned)N, d / 4 < 128 ? (unsigned)fox_round_up(d / 4, 32) : 128, 0, stream>>>(x, tokens,
                                                                                                            w, d);
    CUDA_CHECK_LAUNCH();
}

int64_t cuda_embedding_scratch(int64_t N, int V) {
    return 2 + 2 * (int64_t)V + 3 * fox_min64(N, V) + 3 * N;
}

static inline EmbeddingSort embedding_sort(int32_t *scratch, int64_t N, int V) {
    EmbeddingSort sort;
    sort.taken = scratch;
    sort.counts = sort.taken + 2;
    sort.starts = sort.counts + V;
    sort.used_token = sort.starts + V;
    sort.used_start = sort.used_token + fox_min64(N, V);
    sort.used_count = sort.used_start + fox_min64(N, V);
    sort.arrival = sort.used_count + fox_min64(N, V);
    sort.list = sort.arrival + N;
    sort.sorted = sort.list + N;
    return sort;
}

void cuda_embedding_backward(float *dw, const float *dx, const int32_t *tokens, int32_t *scratch, int64_t N, int d,
                             int V, cudaStream_t stream) {
    CUDA_REQUIRE(d % 4 == 0 && d > 0, "the width must be a multiple of 4");
    CUDA_REQUIRE(N < CUDA_MOST_TOKENS, "too many tokens at once");
    EmbeddingSort sort = embedding_sort(scratch, N, V);
    unsigned blocks = (unsigned)((N + 255) / 256),
             columns = (unsigned)((d + EMBEDDING_COLUMNS - 1) / EMBEDDING_COLUMNS);
    CUDA_CHECK(cudaMemsetAsync(scratch, 0, sizeof(int32_t) * (size_t)(2 + V), stream));
    embedding_count_kernel<<<blocks, 256, 0, stream>>>(sort, tokens, N);
    CUDA_CHECK_LAUNCH();
    embedding_segments_kernel<<<(unsigned)(V + 255) / 256, 256, 0, stream>>>(sort, V);
    CUDA_CHECK_LAUNCH();
    embedding_place_kernel<<<blocks, 256, 0, stream>>>(sort, tokens, N);
    CUDA_CHECK_LAUNCH();
    embedding_rank_kernel<<<(unsigned)((N + 7) / 8), 256, 0, stream>>>(sort, tokens, N);
    CUDA_CHECK_LAUNCH();
    /* About eight blocks for each of 132 multiprocessors, whatever the width. */
    dim3 grid(columns < 132 * 8 ? 132 * 8 / columns : 1, columns);
    embedding_backward_kernel<<<grid, 32 * EMBEDDING_WARPS, 0, stream>>>(dw, dx, sort, d);
    CUDA_CHECK_LAUNCH();
}

#endif

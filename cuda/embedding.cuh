/* Token embedding: x[n] = w[tokens[n]], and its gradient dw[tokens[n]] += dx[n] with every row summed in a fixed order.
 *
 * The gradient needs the positions of each token, in order. They are sorted by counting, in integers:
 *     count      arrival[n] = how many of n's token came before, by an atomic counter: some order
 *     segments   each token in use takes a stretch of `list` and a place in `used`: some order again
 *     place      n into its token's stretch, at its arrival
 *     rank       n again into `sorted`, after the positions of its token that are smaller: now in order
 * Only where a stretch lies depends on the order of threads, never what is in it. Then eight warps take eight tokens for
 * 128 columns: a token with few positions is one warp's, one with many (the commonest words) is shared by all eight.
 * x, w and their gradients: float [.., d]. Forward moves 8 bytes an element, backward 4, and 8 for each row in use. */
#ifndef FOX_CUDA_EMBEDDING_CUH
#define FOX_CUDA_EMBEDDING_CUH

#include "common.cuh"

enum { EMBEDDING_WARPS = 8, EMBEDDING_SHARED = 16 }; /* positions from which a token is shared */

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
    int32_t *taken;             /* [2]: tokens in use, positions given out */
    int32_t *counts, *starts;   /* [V] */
    int32_t *used;              /* [min(N, V)] tokens */
    int32_t *arrival, *list, *sorted; /* [N] */
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
        sort.used[atomicAdd(&sort.taken[0], 1)] = v;
        sort.starts[v] = atomicAdd(&sort.taken[1], sort.counts[v]);
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

/* Sum of dx over positions[first], positions[first + step], .. below count, four columns a lane. */
static __device__ __forceinline__ float4 embedding_sum(const float *dx, const int32_t *positions, int first, int step, int count,
                                                       int d) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int i = first; i < count; i += step) {
        float4 x = *reinterpret_cast<const float4 *>(dx + (int64_t)positions[i] * d);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    return sum;
}

static __device__ __forceinline__ void add_to(float *p, float4 x) {
    float4 *to = reinterpret_cast<float4 *>(p), y = *to;
    *to = make_float4(y.x + x.x, y.y + x.y, y.z + x.z, y.w + x.w);
}

/* blockIdx.y: 128 columns; each block takes eight of the tokens in use at a time. */
static __global__ void embedding_backward_kernel(float *dw, const float *dx, EmbeddingSort sort, int d) {
    __shared__ float4 sums[EMBEDDING_WARPS][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.y * 128 + 4 * lane, used = sort.taken[0];
    bool active = column < d;
    for (int first = blockIdx.x; first < used; first += gridDim.x * EMBEDDING_WARPS) {
        int mine = first + warp * gridDim.x;
        if (mine < used && active) {
            int token = sort.used[mine], count = sort.counts[token];
            if (count < EMBEDDING_SHARED) {
                add_to(dw + (int64_t)token * d + column, embedding_sum(dx + column, sort.sorted + sort.starts[token], 0, 1, count, d));
            }
        }
        for (int i = first; i < used && i < first + (int)gridDim.x * EMBEDDING_WARPS; i += gridDim.x) {
            int token = sort.used[i], count = sort.counts[token];
            if (count >= EMBEDDING_SHARED) { /* the same for the whole block */
                if (active) {
                    sums[warp][lane] =
                        embedding_sum(dx + column, sort.sorted + sort.starts[token], warp, EMBEDDING_WARPS, count, d);
                }
                __syncthreads();
                if (warp == 0 && active) {
                    float4 sum = sums[0][lane];
                    for (int w = 1; w < EMBEDDING_WARPS; w++) {
                        float4 x = sums[w][lane];
                        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
                    }
                    add_to(dw + (int64_t)token * d + column, sum);
                }
                __syncthreads();
            }
        }
    }
}

/* ---- launchers ---- */

void cuda_embedding_forward(float *x, const int32_t *tokens, const float *w, int64_t N, int d, cudaStream_t stream) {
    CUDA_REQUIRE(d % 4 == 0 && d > 0, "the width must be a multiple of 4");
    embedding_forward_kernel<<<(unsigned)N, d / 4 < 128 ? (unsigned)round_up(d / 4, 32) : 128, 0, stream>>>(x, tokens, w, d);
    CUDA_CHECK_LAUNCH();
}

int64_t cuda_embedding_scratch(int64_t N, int V) {
    return 2 + 2 * (int64_t)V + fox_min64(N, V) + 3 * N;
}

static inline EmbeddingSort embedding_sort(int32_t *scratch, int64_t N, int V) {
    EmbeddingSort sort;
    sort.taken = scratch;
    sort.counts = sort.taken + 2;
    sort.starts = sort.counts + V;
    sort.used = sort.starts + V;
    sort.arrival = sort.used + fox_min64(N, V);
    sort.list = sort.arrival + N;
    sort.sorted = sort.list + N;
    return sort;
}

void cuda_embedding_backward(float *dw, const float *dx, const int32_t *tokens, int32_t *scratch, int64_t N, int d, int V,
                             cudaStream_t stream) {
    CUDA_REQUIRE(d % 4 == 0 && d > 0, "the width must be a multiple of 4");
    CUDA_REQUIRE(N < (int64_t)1 << 26, "too many tokens at once");
    EmbeddingSort sort = embedding_sort(scratch, N, V);
    unsigned blocks = (unsigned)((N + 255) / 256), columns = (unsigned)((d + 127) / 128);
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

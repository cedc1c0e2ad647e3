/* `tight`: which key blocks each query block can do without. cpu/acp.h has the same test in double precision.
 *
 * Of a head, before all its rows are read (acp_describe_head, beside the sums of gates): the centre of its keys, without which
 * they are meant below (it adds the same to all logits of a row, so no p_ij changes); the longest query that there can be; the
 * threshold of the paper's test. Where that test alone leaves no more than a query block's own keys and the block before them,
 * there is hardly anything to gain: such a block is not searched, and keys that no searched block needs are not read.
 *
 * Of a key block n, cl being c at its last key:
 *     W = sum_j w_j,  w_j = exp(cl - c_j);    kbar = sum_j w_j k_j / W;
 *     K = log(sum_j w_j exp(a |k_j|) / W) / a,  a = (longest query) / sqrt(D).
 * By Jensen's inequality sum_j w_j exp(q.k_j / sqrt(D)) <= W exp(|q| K / sqrt(D)) for every query: x -> x^(|q| / longest) is
 * concave. So a row's mass in block n is, with L_i <= log Z_i, at most
 *     exp(rho_i + |q_i| K / sqrt(D) + (C - cl) + log W),    rho_i = c_i - C - L_i,  C = c at the query block's first row.
 *
 * Of a query block m: L_i is the sum, in logarithms, of the row's own key and of its history, all keys before the block. By
 * Jensen's inequality again these weigh at least
 *     exp(c_i - c_b) V exp(q_i.h / sqrt(D)),    V = sum_n exp(c_b - cl_n) W_n,  h = sum_n exp(c_b - cl_n) W_n kbar_n / V,
 * where c_b is c at the row before the block; leaving out blocks of about e^-25 of a key's weight only makes it smaller.
 * The worst row differs from K to K. It is known at K0, that of the block before, and from there |q_i| K changes by at most
 * (K - K0) Q, where Q is the largest |q_i| upwards and the smallest downwards:
 *     near = max_i (rho_i + |q_i| K0 / sqrt(D)),    x_mn = near + (K_n - K0) Q / sqrt(D) + (C - cl_n) + log W_n.
 * The longest prefix of key blocks with sum_n exp(x_mn) <= eps is given up.
 *
 * One kernel reads every row once: a thread block describes the keys of its block for the later ones, then waits until all
 * earlier ones of its head are described. Blocks are taken in order, with tickets, and described before anything is waited for;
 * the ticket of the next is taken when nothing is left to wait for. So of all blocks taken and not yet done, the first goes on in
 * any case, and whoever waits, waits for blocks that are taken. */
#ifndef FOX_TIGHT_SEARCH_CUH
#define FOX_TIGHT_SEARCH_CUH

#include "tiles.cuh"

/* Of one head, by 256 threads: work.most_q, threshold, centre. */
template <int D>
static __device__ __forceinline__ void acp_describe_head(const AcpInputs &in, const AcpRanges &r, const AcpWork &work, int bh) {
    __shared__ __align__(16) float partial[256 * 8];
    constexpr int LANES = D / 8, ROWS = 256 / LANES;
    int tid = threadIdx.x, samples = min(in.T, 256);
    float sum[8] = {0};
#pragma unroll 8
    for (int s = tid / LANES; s < samples; s += ROWS) {
        float k[8];
        load8(k, in.k + acp_row<D>(bh, s * in.T / samples, in.T, in.H, in.stride) + tid % LANES * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum[i] += k[i];
        }
    }
    store8(&partial[tid * 8], sum); /* [ROWS][D] */
    if (tid < 32) {
        float2 most = acp_largest_norms(r, work, bh, bh % in.H, tid);
        if (tid == 0) {
            work.most_q[bh] = most.x * (float)r.q_scale;
            work.threshold[bh] = -2.0 * r.scale * (double)most.x * (double)most.y + r.log_spread;
        }
    }
    __syncthreads();
    if (tid < D) {
        float total = 0;
        for (int g = 0; g < ROWS; g++) {
            total += partial[g * D + tid];
        }
        work.centre[(int64_t)bh * D + tid] = total / (float)samples;
    }
}

/* What is published of a key block: log W and K in one word, never ACP_UNDESCRIBED. */
static __device__ __forceinline__ uint64_t acp_pack_stats(float log_W, float K) {
    return ((uint64_t)__float_as_uint(log_W) << 32 | __float_as_uint(K)) & ~(uint64_t)1;
}

static __device__ __forceinline__ float2 acp_unpack_stats(uint64_t stats) {
    return make_float2(__uint_as_float((uint32_t)(stats >> 32)), __uint_as_float((uint32_t)stats));
}

/* The blocks of one head. */
struct AcpSearchHead {
    const double2 *edges;
    double threshold;
    uint64_t *stats;

    __device__ __forceinline__ bool is_searched(int n) const {
        return n >= 2 && !(edges[n].x - edges[n - 2].y < threshold);
    }
};

/* Memory of a thread block: thread t stands for row t of the block that it has taken, and for every 128th of the earlier ones. */
template <int D>
struct AcpSearchShared {
    static constexpr int COLUMNS = D / 4, GROUPS = 128 / COLUMNS; /* of the history: 4 columns of every GROUPS-th mean for a thread */
    unsigned char q[ACP_BLOCK * D * 2];
    union {
        unsigned char k[ACP_BLOCK * D * 2];
        float4 partial[GROUPS][COLUMNS]; /* later: sums over means */
    };
    float centre[D], history[D];
    float weight[ACP_BLOCK]; /* w_j */
    uint16_t parts[3][ACP_BLOCK]; /* as the sum of two bf16; zeros */
    float share[ACP_BLOCK];   /* weights of 128 earlier blocks in the history */
    float2 nearest[ACP_BLOCK]; /* stats of block m - 1 - i */
    float mass[GROUPS];
    float2 grown[4]; /* of the rows of each warp: longest key, sum_j w_j exp(a (|k_j| - longest)) */
    float3 rows[4];  /* and near, most, -least */
    int ticket;
};

/* Thread blocks that fit on a multiprocessor of Hopper at once. */
template <int D>
static constexpr int acp_searching(void) {
    return D == 64 ? 6 : 3;
}

/* Sends for the keys of the block that a ticket stands for, and for its queries. */
template <int D>
static __device__ __forceinline__ void acp_load_block(AcpSearchShared<D> &shared, const AcpInputs &in, int item, bool queries) {
    int start = item / in.BH * ACP_BLOCK;
    int64_t row = acp_row<D>(item % in.BH, start, in.T, in.H, in.stride);
    acp_load_tile<D, ACP_BLOCK, 128>(acp_shared(shared.k), in.k + row, in.stride, in.T - start);
    if (queries) {
        acp_load_tile<D, ACP_BLOCK, 128>(acp_shared(shared.q), in.q + row, in.stride, in.T - start);
    }
}

/* This thread's row: |k|^2, q.k and |q|^2; the last two if `searched`. */
template <int D>
static __device__ __forceinline__ float3 acp_row_products(const AcpSearchShared<D> &shared, bool searched) {
    float3 sum = make_float3(0, 0, 0);
    int row = threadIdx.x;
#pragma unroll
    for (int piece = 0; piece < D / 8; piece++) {
        int place = row * (2 * D) + ((piece ^ (row % 8)) << 4);
        float k[8], q[8], centre[8];
        load8(k, reinterpret_cast<const bf16 *>(shared.k + place));
        load8(centre, &shared.centre[piece * 8]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            k[i] -= centre[i];
        }
        sum.x += acp_dot8(k, k);
        if (searched) {
            load8(q, reinterpret_cast<const bf16 *>(shared.q + place));
            sum.y += acp_dot8(q, k);
            sum.z += acp_dot8(q, q);
        }
    }
    return sum;
}

/* q.h of this thread's row. */
template <int D>
static __device__ __forceinline__ float acp_row_history(const AcpSearchShared<D> &shared) {
    float sum = 0;
    int row = threadIdx.x;
#pragma unroll
    for (int piece = 0; piece < D / 8; piece++) {
        float q[8], h[8];
        load8(q, reinterpret_cast<const bf16 *>(shared.q + row * (2 * D) + ((piece ^ (row % 8)) << 4)));
        load8(h, &shared.history[piece * 8]);
        sum += acp_dot8(q, h);
    }
    return sum;
}

/* kbar of the block, to mean[D]: sum_j w_j k_j by the tensor cores, whose 16-bit operands hold w_j in two parts, as rows 0 and 1 of
 * a matrix whose other rows are zero. A warp has 16 of 64 columns. */
template <int D>
static __device__ __forceinline__ void acp_mean_key(const AcpSearchShared<D> &shared, float W, float *mean) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, p = lane % 4;
    const uint32_t *weights = reinterpret_cast<const uint32_t *>(shared.parts[min(g, 2)]) + p; /* two in a word */
    uint32_t keys = acp_shared(shared.k) + acp_lane_a<D>();
#pragma unroll
    for (int column = 16 * warp; column < D; column += 64) {
        float sum[2][4] = {{0}};
#pragma unroll
        for (int row = 0; row < ACP_BLOCK; row += 16) {
            uint32_t a[4] = {weights[row / 2], 0, weights[row / 2 + 4], 0}, b[4];
            acp_load_transposed(b, (keys ^ (column << 1)) + row * 2 * D);
            acp_mma(sum[0], a, b[0], b[1]);
            acp_mma(sum[1], a, b[2], b[3]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = sum[half][0] + __shfl_xor_sync(0xffffffffu, sum[half][0], 4); /* both parts of w_j: rows 0 and 1 */
            float y = sum[half][1] + __shfl_xor_sync(0xffffffffu, sum[half][1], 4);
            int c = column + 8 * half + 2 * p;
            if (g == 0) {
                *reinterpret_cast<float2 *>(&mean[c]) = make_float2(x / W - shared.centre[c], y / W - shared.centre[c + 1]);
            }
        }
    }
}

/* Describes key block m for the later ones. norm: |k| of this thread's row; means: of the head. */
template <int D>
static __device__ __forceinline__ void acp_describe_keys(AcpSearchShared<D> &shared, const AcpSearchHead &head, int m, float norm,
                                                         float most_q, float *means) {
    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const float a = fmaxf(most_q * rsqrtf((float)D), 1e-6f), w = shared.weight[tid];
    float longest = warp_max(norm), grown = warp_sum(norm == longest ? w : w * __expf(a * (norm - longest)));
    const float *four = &shared.weight[4 * lane];
    float W = warp_sum((four[0] + four[1]) + (four[2] + four[3]));
    if (lane == 0) {
        shared.grown[warp] = make_float2(longest, grown);
    }
    acp_mean_key<D>(shared, W, means + (int64_t)m * D);
    __syncthreads(); /* what all have written is published by one */
    if (tid == 0) {
        float sum = 0;
        for (int i = 0; i < 4; i++) {
            longest = fmaxf(longest, shared.grown[i].x);
        }
        for (int i = 0; i < 4; i++) {
            float2 of_warp = shared.grown[i];
            sum += of_warp.x == longest ? of_warp.y : of_warp.y * __expf(a * (of_warp.x - longest));
        }
        float mean = sum / W;
        acp_publish(&head.stats[m], acp_pack_stats(logf(W), longest + logf(mean < 1e-30f ? 1e-30f : mean) / a));
    }
}

/* h of query block m, to shared.history, and the stats of the nearest blocks, to shared.nearest. Returns log V. Waits until all
 * earlier blocks are described, since acp_give_up needs them. */
template <int D>
static __device__ __forceinline__ float acp_history(AcpSearchShared<D> &shared, const AcpSearchHead &head, int m, const float *means) {
    constexpr int COLUMNS = AcpSearchShared<D>::COLUMNS, GROUPS = AcpSearchShared<D>::GROUPS, AHEAD = 8;
    int tid = threadIdx.x, group = tid / COLUMNS;
    const double before = head.edges[m - 1].y;
    const float4 *columns = reinterpret_cast<const float4 *>(means) + tid % COLUMNS;
    float4 sum = make_float4(0, 0, 0, 0);
    float mass = 0, last = 1; /* of the last share so far */
    for (int n0 = m - 1; n0 >= 0; n0 -= ACP_BLOCK) {
        int n = n0 - tid;
        float2 key = make_float2(0, 0);
        float weight = 0;
        if (n >= 0) {
            double end = head.edges[n].y;
            key = acp_unpack_stats(acp_await(&head.stats[n], ACP_UNDESCRIBED));
            float x = (float)(before - end) + key.x;
            weight = x < -25.0f ? 0.0f : __expf(x);
        }
        if (n0 == m - 1) {
            shared.nearest[tid] = key;
        } else {
            __syncthreads(); /* nobody needs the last shares any more */
        }
        shared.share[tid] = weight;
        __syncthreads();
        if (!(last > 0)) {
            continue; /* the blocks before hardly weigh more */
        }
        last = shared.share[ACP_BLOCK - 1];
        for (int i0 = group; i0 < min(ACP_BLOCK, n0 + 1); i0 += AHEAD * GROUPS) {
            float4 mean[AHEAD];
            float part[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) { /* all on their way before the first is waited for */
                int j = i0 + i * GROUPS;
                part[i] = j < ACP_BLOCK ? shared.share[j] : 0.0f; /* of block n0 - j; 0 where there is none */
                mean[i] = part[i] > 0 ? __ldcg(&columns[(int64_t)(n0 - j) * COLUMNS]) : make_float4(0, 0, 0, 0);
            }
            if (!(part[0] > 0)) {
                break;
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                mass += part[i];
                sum.x = fmaf(part[i], mean[i].x, sum.x);
                sum.y = fmaf(part[i], mean[i].y, sum.y);
                sum.z = fmaf(part[i], mean[i].z, sum.z);
                sum.w = fmaf(part[i], mean[i].w, sum.w);
            }
        }
    }
    shared.partial[group][tid % COLUMNS] = sum;
    shared.mass[group] = mass;
    __syncthreads();
    mass = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        mass += shared.mass[g];
    }
    if (tid < D) {
        float total = 0;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            total += reinterpret_cast<const float *>(shared.partial[g])[tid];
        }
        shared.history[tid] = total / mass;
    }
    __syncthreads();
    return logf(mass);
}

/* How many key blocks query block m can do without: from the left, while the sum of what they weigh at most stays in the budget. By
 * one warp; a lane has four neighbours of 128. rows: near, most, -least. */
template <int D>
static __device__ __forceinline__ int acp_give_up(const AcpSearchShared<D> &shared, const AcpSearchHead &head, int m, float3 rows,
                                                  float log_budget) {
    const float scale = rsqrtf((float)D), K0 = shared.nearest[0].y;
    const double C = head.edges[m].x;
    int lane = threadIdx.x % 32;
    float upto = 0;
    for (int n0 = 0; n0 < m; n0 += ACP_BLOCK) {
        float spent[4], sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int n = n0 + 4 * lane + i;
            float lost = 0;
            if (n < m) {
                float2 key = n >= m - ACP_BLOCK ? shared.nearest[m - 1 - n] : acp_unpack_stats(head.stats[n]);
                float more = key.y - K0, norm = more >= 0 ? rows.y : -rows.z;
                lost = __expf(rows.x + scale * more * norm + (float)(C - head.edges[n].y) + key.x - log_budget);
            }
            spent[i] = sum += lost;
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            float before = __shfl_up_sync(0xffffffffu, sum, step);
            sum = lane >= step ? before + sum : sum;
        }
        float before = __shfl_up_sync(0xffffffffu, sum, 1);
        before = upto + (lane > 0 ? before : 0.0f);
        int within = 0; /* in units of the budget, which may itself be too small for float32 */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            within += before + spent[i] <= 1.0f;
        }
        unsigned beyond = __ballot_sync(0xffffffffu, within < 4);
        if (beyond != 0) {
            int first = __ffs((int)beyond) - 1;
            return min(m, n0 + 4 * first + __shfl_sync(0xffffffffu, within, first));
        }
        upto += __shfl_sync(0xffffffffu, sum, 31);
    }
    return m;
}

/* Fills work.first_raw. 128 threads; thread blocks, as many as fit, share the blocks of all heads. */
template <int D>
static __global__ void __launch_bounds__(128, acp_searching<D>()) acp_search_kernel(AcpInputs in, AcpSaved saved, AcpWork work,
                                                                                  float log_budget) {
    extern __shared__ __align__(1024) unsigned char memory[];
    AcpSearchShared<D> &shared = *reinterpret_cast<AcpSearchShared<D> *>(memory);
    enum { TAKER = 96 }; /* the thread that takes tickets: its warp has the least to do */
    const float scale = rsqrtf((float)D);
    int tid = threadIdx.x, count = in.BH * in.blocks;
    acp_let_next_begin();
    if (tid == TAKER) {
        shared.ticket = (int)atomicAdd(work.ticket, 1u);
    }
    shared.parts[2][tid] = 0;
    __syncthreads();
    int item = shared.ticket;
    if (item < count) { /* to be on its way while sums of gates are made, whether it will be needed or not; only by way of L2 */
        acp_load_block<D>(shared, in, item, true);
    }
    acp_await_earlier();
    for (bool loaded = true; item < count; item = shared.ticket, loaded = false) {
        int m = item / in.BH, bh = item % in.BH, start = m * ACP_BLOCK, ticket = 0;
        AcpSearchHead head = {work.edges + (int64_t)bh * in.blocks, work.threshold[bh], work.key_stats + (int64_t)bh * in.blocks};
        float *means = work.key_means + (int64_t)bh * in.blocks * D;
        bool searched = head.is_searched(m), needed = false;
        if (searched && !loaded) {
            acp_load_block<D>(shared, in, item, true);
        }
        for (int n = m + 1 + tid; n < in.blocks && !needed; n += 128) {
            needed = head.is_searched(n);
        }
        if (!searched) {
            if (tid == TAKER) {
                ticket = (int)atomicAdd(work.ticket, 1u); /* on its way meanwhile */
            }
            if (tid == 0) {
                bool alone = m == 0 || head.edges[m].x - head.edges[m - 1].y < head.threshold;
                work.first_raw[bh * in.blocks + m] = alone ? m : m - 1;
            }
            needed = __syncthreads_or(needed);
            if (needed && !loaded) {
                acp_load_block<D>(shared, in, item, false);
            }
        }
        if (searched || needed) {
            double c = saved.c[(int64_t)bh * in.T + min(start + tid, in.T - 1)];
            float w = __expf((float)(head.edges[m].y - c)), most_q = work.most_q[bh];
            uint32_t upper = pack2(0.0f, w), lower = pack2(0.0f, w - __uint_as_float(upper)); /* the bits of floats, too */
            shared.weight[tid] = __uint_as_float(upper) + __uint_as_float(lower);
            shared.parts[0][tid] = (uint16_t)(upper >> 16);
            shared.parts[1][tid] = (uint16_t)(lower >> 16);
            if (tid < D) {
                shared.centre[tid] = work.centre[(int64_t)bh * D + tid];
            }
            acp_copies_done();
            needed = __syncthreads_or(needed);
            float3 products = acp_row_products<D>(shared, searched);
            if (needed) { /* then the block is whole: it is not the last */
                acp_describe_keys<D>(shared, head, m, sqrtf(products.x), most_q, means);
            }
            if (searched) {
                float decay = (float)(c - head.edges[m].x), norm = sqrtf(products.z), own = scale * products.y;
                float past = decay + (float)(head.edges[m].x - head.edges[m - 1].y);
                past += acp_history<D>(shared, head, m, means);
                past += scale * acp_row_history<D>(shared);
                bool more = own > past;
                float high = more ? own : past, log_Z = high + __logf(1.0f + __expf((more ? past : own) - high));
                float near = decay - log_Z + scale * norm * shared.nearest[0].y;
                bool exists = start + tid < in.T;
                near = warp_max(!exists ? -INFINITY : near == near ? near : INFINITY); /* what is not a number keeps all */
                float most = warp_max(exists ? norm : -INFINITY), least = warp_max(exists ? -norm : -INFINITY);
                if (tid % 32 == 0) {
                    shared.rows[tid / 32] = make_float3(near, most, least);
                }
                __syncthreads();
                if (tid == TAKER) {
                    ticket = (int)atomicAdd(work.ticket, 1u); /* only now: who holds a ticket no longer waits for others */
                }
                if (tid < 32) {
                    float3 rows = shared.rows[0];
                    for (int i = 1; i < 4; i++) {
                        float3 more = shared.rows[i];
                        rows = make_float3(fmaxf(rows.x, more.x), fmaxf(rows.y, more.y), fmaxf(rows.z, more.z));
                    }
                    int first = acp_give_up<D>(shared, head, m, rows, log_budget);
                    if (tid == 0) {
                        work.first_raw[bh * in.blocks + m] = first;
                    }
                }
            }
        }
        if (tid == TAKER) {
            shared.ticket = ticket;
        }
        acp_copies_done(); /* even if nobody needed them */
        __syncthreads();
    }
}

#endif

/* `tight`: which key blocks each query block can do without. cpu/acp.h has the same test in double precision.
 *
 * Of a head, before its rows are read (acp_describe_head, beside the sums of gates): the centre of its keys, without which
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
 * where c_b is c at the row before the block; leaving out blocks of less than e^-25 of a key's weight only makes it smaller.
 * The worst row differs from K to K. It is known at K0, that of the block before, and from there |q_i| K changes by at most
 * (K - K0) Q, where Q is the largest |q_i| upwards and the smallest downwards:
 *     near = max_i (rho_i + |q_i| K0 / sqrt(D)),    x_mn = near + (K_n - K0) Q / sqrt(D) + (C - cl_n) + log W_n.
 * The longest prefix of key blocks with sum_n exp(x_mn) <= eps is given up.
 *
 * One kernel reads every row once: a thread block describes the keys of its block for the later ones, then waits until all
 * earlier ones of its head are described. Blocks are taken in order, with tickets, and described before anything is waited for:
 * whoever waits, waits for thread blocks that run and that wait, if at all, for still earlier ones. The first always goes on. */
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

/* Three maxima over a block of 128 threads; scratch: [3][4]. */
static __device__ __forceinline__ float3 acp_block_max3(float3 x, float *scratch) {
    int warp = threadIdx.x / 32;
    x = make_float3(warp_max(x.x), warp_max(x.y), warp_max(x.z));
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        scratch[warp] = x.x, scratch[4 + warp] = x.y, scratch[8 + warp] = x.z;
    }
    __syncthreads();
    auto most = [&](const float *of) { return fmaxf(fmaxf(of[0], of[1]), fmaxf(of[2], of[3])); };
    return make_float3(most(scratch), most(scratch + 4), most(scratch + 8));
}

/* What is published of a key block: log W and K in one word, never ACP_UNDESCRIBED. */
static __device__ __forceinline__ uint64_t acp_pack_stats(float log_W, float K) {
    return ((uint64_t)__float_as_uint(log_W) << 32 | __float_as_uint(K)) & ~(uint64_t)1;
}

static __device__ __forceinline__ float2 acp_unpack_stats(uint64_t stats) {
    return make_float2(__uint_as_float((uint32_t)(stats >> 32)), __uint_as_float((uint32_t)stats));
}

/* Bytes of dynamic shared memory. */
template <int D>
static constexpr size_t acp_search_shared(void) {
    return (size_t)2 * ACP_BLOCK * D * sizeof(bf16);
}

/* Thread blocks that fit on a multiprocessor of Hopper at once. */
template <int D>
static constexpr int acp_searching(void) {
    return D == 64 ? 6 : 3;
}

/* Fills work.first_raw. 128 threads: thread t stands for row t of the block, and for every 128th of the earlier blocks. Thread
 * blocks, as many as fit, share the blocks of all heads. */
template <int D>
static __global__ void __launch_bounds__(128, acp_searching<D>()) acp_search_kernel(AcpInputs in, AcpSaved saved, AcpWork work,
                                                                                  float log_budget) {
    constexpr int PIECES = D / 8, ROWS = 128 / PIECES;  /* sums over rows: 8 columns of every ROWS-th row for a thread */
    constexpr int COLUMNS = D / 4, GROUPS = 128 / COLUMNS; /* history: 4 columns of every GROUPS-th mean */
    constexpr int AHEAD = 8;
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(16) float centre[D], history[D];
    __shared__ float weight[ACP_BLOCK], scratch[12], upto;
    __shared__ float4 partial[128];
    __shared__ float2 nearest[ACP_BLOCK]; /* stats of block m - 1 - i */
    __shared__ int ticket, stop;
    const float scale = rsqrtf((float)D);
    unsigned char *q_tile = memory, *k_tile = memory + ACP_BLOCK * D * sizeof(bf16);
    int tid = threadIdx.x;
    acp_begin();
    if (tid == 0) {
        ticket = (int)atomicAdd(work.ticket, 1u);
    }
    __syncthreads();
    for (int item = ticket, following = 0; item < in.BH * in.blocks; item = ticket) {
        int m = item / in.BH, bh = item % in.BH, start = m * ACP_BLOCK, at = bh * in.blocks + m;
        const double2 *edges = work.edges + (int64_t)bh * in.blocks;
        uint64_t *stats = work.key_stats + (int64_t)bh * in.blocks;
        double threshold = work.threshold[bh];
        if (tid == 0) {
            following = (int)atomicAdd(work.ticket, 1u); /* on its way during all of the block */
        }
        auto is_searched = [&](int n) { return n >= 2 && !(edges[n].x - edges[n - 2].y < threshold); };
        bool searched = is_searched(m), needed = false;
        for (int n = m + 1 + tid; n < in.blocks; n += 128) {
            needed = needed || is_searched(n);
        }
        needed = __syncthreads_or(needed);
        if (!searched && tid == 0) {
            work.first_raw[at] = m == 0 || edges[m].x - edges[m - 1].y < threshold ? m : m - 1;
        }
        if (searched || needed) {
            int64_t row = acp_row<D>(bh, start, in.T, in.H, in.stride);
            acp_load_tile<D, ACP_BLOCK, 128>(acp_shared(k_tile), in.k + row, in.stride, in.T - start);
            if (searched) {
                acp_load_tile<D, ACP_BLOCK, 128>(acp_shared(q_tile), in.q + row, in.stride, in.T - start);
            }
            double own_c = saved.c[(int64_t)bh * in.T + min(start + tid, in.T - 1)], C = edges[m].x;
            float most_q = work.most_q[bh];
            if (tid < D) {
                centre[tid] = work.centre[(int64_t)bh * D + tid];
            }
            weight[tid] = expf((float)(edges[m].y - own_c));
            acp_copies_done();
            __syncthreads();

            float k2 = 0, q2 = 0, own = 0; /* of this thread's row: |k|^2, |q|^2, q.k */
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                int place = tid * (2 * D) + ((piece ^ (tid % 8)) << 4);
                float k[8], q[8], middle[8];
                load8(k, reinterpret_cast<const bf16 *>(k_tile + place));
                load8(middle, &centre[piece * 8]);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    k[i] -= middle[i];
                }
                k2 += acp_dot8(k, k);
                if (searched) {
                    load8(q, reinterpret_cast<const bf16 *>(q_tile + place));
                    own += acp_dot8(q, k);
                    q2 += acp_dot8(q, q);
                }
            }
            if (needed) { /* a whole block: it is not the last */
                float sum[8] = {0};
#pragma unroll 8
                for (int r = tid / PIECES; r < ACP_BLOCK; r += ROWS) {
                    float k[8], w = weight[r];
                    load8(k, reinterpret_cast<const bf16 *>(k_tile + r * (2 * D) + ((tid % PIECES ^ (r % 8)) << 4)));
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        sum[i] = fmaf(w, k[i], sum[i]);
                    }
                }
#pragma unroll
                for (int i = 0; i < 8; i++) { /* over the lanes of a warp that have the same columns */
#pragma unroll
                    for (int lanes = PIECES; lanes < 32; lanes *= 2) {
                        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], lanes);
                    }
                }
                float *sums = reinterpret_cast<float *>(partial); /* [4 warps][D] */
                if (tid % 32 < PIECES) {
                    store8(&sums[tid / 32 * D + tid % 32 * 8], sum);
                }
                float norm = sqrtf(k2), longest = acp_block_max(norm, scratch), a = fmaxf(most_q * scale, 1e-6f);
                float grown = norm < longest ? weight[tid] * expf(a * (norm - longest)) : weight[tid];
                float W = acp_block_sum(weight[tid], scratch), mean = acp_block_sum(grown, scratch) / W;
                if (tid < D) {
                    float total = (sums[tid] + sums[D + tid]) + (sums[2 * D + tid] + sums[3 * D + tid]);
                    work.key_means[(int64_t)at * D + tid] = total / W - centre[tid];
                }
                __syncthreads(); /* what all have written is published by one */
                if (tid == 0) {
                    acp_publish(&stats[m], acp_pack_stats(logf(W), longest + logf(fmaxf(mean, 1e-30f)) / a));
                }
            }
            if (searched) {
                const double before = edges[m - 1].y;
                const float4 *means = reinterpret_cast<const float4 *>(work.key_means + (int64_t)(at - m) * D) + tid % COLUMNS;
                /* the history, from the nearest block on; all of them are waited for, since the last step needs them */
                float4 sum = make_float4(0, 0, 0, 0);
                float mass = 0;
                bool counts = true;
                for (int n0 = m - 1; n0 >= 0; n0 -= ACP_BLOCK) {
                    int n = n0 - tid;
                    float2 key = make_float2(0, 0);
                    float w = 0;
                    if (n >= 0) {
                        key = acp_unpack_stats(acp_await(&stats[n], ACP_UNDESCRIBED));
                        float x = (float)(before - edges[n].y) + key.x;
                        w = x < -25.0f ? 0.0f : __expf(x);
                    }
                    if (n0 == m - 1) {
                        nearest[tid] = key;
                    }
                    counts = counts && __syncthreads_or(w > 0); /* also: nobody needs the last weights any more */
                    if (!counts) {
                        continue;
                    }
                    weight[tid] = w;
                    mass += w;
                    __syncthreads();
                    for (int i0 = tid / COLUMNS; i0 < min(ACP_BLOCK, n0 + 1); i0 += AHEAD * GROUPS) {
                        float4 mean[AHEAD];
                        float part[AHEAD];
#pragma unroll
                        for (int i = 0; i < AHEAD; i++) { /* all on their way before the first is waited for */
                            int j = i0 + i * GROUPS;
                            part[i] = j < ACP_BLOCK ? weight[j] : 0.0f; /* of block n0 - j; 0 where there is none */
                            mean[i] = part[i] > 0 ? __ldcg(&means[(int64_t)(n0 - j) * COLUMNS]) : make_float4(0, 0, 0, 0);
                        }
#pragma unroll
                        for (int i = 0; i < AHEAD; i++) {
                            sum.x = fmaf(part[i], mean[i].x, sum.x);
                            sum.y = fmaf(part[i], mean[i].y, sum.y);
                            sum.z = fmaf(part[i], mean[i].z, sum.z);
                            sum.w = fmaf(part[i], mean[i].w, sum.w);
                        }
                    }
                }
                mass = acp_block_sum(mass, scratch);
                partial[tid] = sum; /* [GROUPS][D] */
                if (tid == 0) {
                    stop = m;
                    upto = 0;
                }
                __syncthreads();
                if (tid < D) {
                    float total = 0;
#pragma unroll
                    for (int g = 0; g < GROUPS; g++) {
                        total += reinterpret_cast<const float *>(partial)[g * D + tid];
                    }
                    history[tid] = total / mass;
                }
                __syncthreads();

                float past = 0, K0 = nearest[0].y;
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++) {
                    float q[8], mean[8];
                    load8(q, reinterpret_cast<const bf16 *>(q_tile + tid * (2 * D) + ((piece ^ (tid % 8)) << 4)));
                    load8(mean, &history[piece * 8]);
                    past += acp_dot8(q, mean);
                }
                float decay = (float)(own_c - C), norm = sqrtf(q2);
                own *= scale;
                past = decay + ((float)(C - before) + logf(mass)) + scale * past;
                float log_Z = fmaxf(own, past) + __logf(1.0f + __expf(fminf(own, past) - fmaxf(own, past)));
                bool exists = start + tid < in.T;
                float3 of_rows = acp_block_max3(exists ? make_float3(decay - log_Z + scale * norm * K0, norm, -norm)
                                                       : make_float3(-INFINITY, -INFINITY, -INFINITY),
                                                scratch);
                float near = of_rows.x, most = of_rows.y, least = -of_rows.z;
                for (int n0 = 0; n0 < stop; n0 += ACP_BLOCK) { /* from the left, until what is spent exceeds the budget */
                    int n = n0 + tid;
                    float lost = 0, spent = upto;
                    if (n < m) {
                        float2 key = n >= m - ACP_BLOCK ? nearest[m - 1 - n] : acp_unpack_stats(stats[n]);
                        float more = key.y - K0;
                        lost = expf(near + scale * more * (more >= 0 ? most : least) + (float)(C - edges[n].y) + key.x - log_budget);
                    }
                    spent += acp_block_scan(lost, scratch, AcpAdd());
                    if (!(spent <= 1.0f)) { /* in units of the budget, which may itself be too small for float32 */
                        atomicMin(&stop, n);
                    }
                    __syncthreads();
                    if (stop < m) {
                        break;
                    }
                    if (tid == ACP_BLOCK - 1) {
                        upto = spent;
                    }
                    __syncthreads();
                }
                if (tid == 0) {
                    work.first_raw[at] = stop;
                }
            }
        }
        if (tid == 0) {
            ticket = following;
        }
        __syncthreads();
    }
}

#endif

/* Forgetting attention on every chip from sm_80 on: the kernels of acp_attention.cuh on mma.sync m16n8k16 (tiles.cuh).
 * Included there, after AcpForward, AcpBackward and what they hold. Written to be read: the Hopper kernels compute the
 * same, and the tests compare them with these.
 * Thread blocks start in the order of AcpSaved.order: the longest first. */
#ifndef FOX_PORTABLE_ATTENTION_CUH
#define FOX_PORTABLE_ATTENTION_CUH

#include "tiles.cuh"

template <int D>
struct AcpForwardTraits {
    static constexpr int KEYS = D == 64 ? 64 : 32; /* per step; more would not fit the registers */
};

template <int D>
struct alignas(1024) AcpForwardShared {
    unsigned char q[ACP_BLOCK * D * 2];
    unsigned char k[2][AcpForwardTraits<D>::KEYS * D * 2], v[2][AcpForwardTraits<D>::KEYS * D * 2];
    float lift[2][AcpForwardTraits<D>::KEYS];
};

/* Starts to copy step n of row bh's keys into its stage of two: K, V and lift. All 128 threads; acp_copies_done waits. */
template <int D, int KEYS, typename Shared>
static __device__ __forceinline__ void acp_load_keys(Shared &shared, const AcpInputs &in, const AcpSaved &saved,
                                                     int64_t bh, int n) {
    int stage = n % 2, j = n * KEYS;
    int64_t start = acp_row<D>(bh, 0, in.T, in.H, in.stride) + j * in.stride;
    acp_load_tile<D, KEYS, 128>(acp_shared(shared.k[stage]), in.k + start, in.stride, in.T - j);
    acp_load_tile<D, KEYS, 128>(acp_shared(shared.v[stage]), in.v + start, in.stride, in.T - j);
    acp_load_floats<KEYS>(acp_shared(shared.lift[stage]), saved.lift + bh * in.blocks * ACP_BLOCK + j);
}

/* One query block; 4 warps with 32 rows each. Online softmax in units of log 2, relative to the block's base: with t_ij
 * = s_ij log2(e) + lift_j and shift = base_m - base_n, the running maximum is that of t_ij + shift. A row's own decay
 * -lift_i cancels; only lse needs it. From the diagonal leftwards, so that the maximum hardly changes after the start.
 * */
template <int D>
static __global__ void __launch_bounds__(128, 2) acp_forward_kernel(AcpForward p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    AcpForwardShared<D> &shared = *reinterpret_cast<AcpForwardShared<D> *>(memory);
    constexpr int MT = 2, KEYS = AcpForwardTraits<D>::KEYS, NT = KEYS / 8, TILE = KEYS * D * 2;
    const AcpInputs &in = p.in;
    const float scale = (float)ACP_LOG2E * acp_root<D>();
    int place = p.saved.order[0][blockIdx.x], m = place % in.blocks;
    int64_t bh = place / in.blocks;
    int q0 = m * ACP_BLOCK, row0 = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    int end = (min(in.T, q0 + ACP_BLOCK) - 1) / KEYS, begin = p.saved.first[bh * in.blocks + m] * (ACP_BLOCK / KEYS);
    const float *lift = p.saved.lift + bh * in.blocks * ACP_BLOCK;
    const float2 *base = p.saved.base + bh * in.blocks;
    const float2 own_base = base[m];
    uint32_t sk = acp_shared(shared.k), sv = acp_shared(shared.v);

    auto load = [&](int n) {
        acp_load_keys<D, KEYS>(shared, in, p.saved, bh, n);
    };
    acp_load_tile<D, ACP_BLOCK, 128>(acp_shared(shared.q), in.q + acp_row<D>(bh, q0, in.T, in.H, in.stride), in.stride,
                                     in.T - q0);
    load(end);
    acp_copies_done();
    __syncthreads();

    AcpRows<D, MT, D == 64> q;
    q.init(acp_shared(shared.q) + row0 * 2 * D + acp_lane_a<D>());
    float o[MT][D / 8][4], high[MT][2], sum[MT][2];
    acp_zero<MT, D / 8>(o);
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        high[i / 2][i % 2] = -INFINITY;
        sum[i / 2][i % 2] = 0;
    }
    for (int n = end; n >= begin; n--) {
        acp_copies_done();
        __syncthreads();
        if (n > begin) {
            load(n - 1);
        }
        if (n * KEYS > q0 + row0 + 31) {
            continue; /* all keys after all of this warp's queries */
        }
        int stage = n % 2;
        float shift = acp_shift(own_base, base[n * KEYS / ACP_BLOCK]);
        float s[MT][NT][4];
        acp_product_abt<D, MT, NT>(s, q, sk + stage * TILE + acp_lane_b<D>());
        if (n * KEYS + KEYS - 1 > q0 + row0) {
            acp_mask<MT, NT, false>(s, q0 + row0, n * KEYS);
        }
        float top[MT][2];
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            float2 key = *reinterpret_cast<const float2 *>(&shared.lift[stage][nt * 8 + lane % 4 * 2]);
#pragma unroll
            for (int i = 0; i < MT * 2; i++) {
                int mt = i / 2, half = i % 2;
                float x = fmaf(s[mt][nt][2 * half], scale, key.x), y = fmaf(s[mt][nt][2 * half + 1], scale, key.y);
                s[mt][nt][2 * half] = x;
                s[mt][nt][2 * half + 1] = y;
                top[mt][half] = nt == 0 ? fmaxf(x, y) : fmaxf(top[mt][half], fmaxf(x, y));
            }
        }
        bool raised = false;
#pragma unroll
        for (int i = 0; i < MT * 2; i++) {
            float reach = acp_quad_max(top[i / 2][i % 2]) + shift;
            raised = raised || reach > high[i / 2][i % 2];
            top[i / 2][i % 2] = fmaxf(high[i / 2][i % 2], reach);
        }
        if (__any_sync(0xffffffffu, raised)) {
#pragma unroll
            for (int i = 0; i < MT * 2; i++) {
                int mt = i / 2, half = i % 2;
                float fade = acp_exp2(high[mt][half] - top[mt][half]);
                high[mt][half] = top[mt][half];
                sum[mt][half] *= fade;
#pragma unroll
                for (int nt = 0; nt < D / 8; nt++) {
                    o[mt][nt][2 * half] *= fade;
                    o[mt][nt][2 * half + 1] *= fade;
                }
            }
        }
#pragma unroll
        for (int ks = 0; ks < NT / 2; ks++) { /* the exponentials of 16 keys while the 16 before are multiplied */
#pragma unroll
            for (int i = 0; i < MT * 4; i++) {
                int mt = i / 4, nt = 2 * ks + i / 2 % 2, half = i % 2;
                float offset = shift - high[mt][half];
                float x = acp_exp2(s[mt][nt][2 * half] + offset), y = acp_exp2(s[mt][nt][2 * half + 1] + offset);
                s[mt][nt][2 * half] = x;
                s[mt][nt][2 * half + 1] = y;
                sum[mt][half] += x + y;
            }
            acp_product_ab<D, MT, NT>(o, s, ks, sv + stage * TILE + acp_lane_a<D>());
        }
    }

    float inverse[MT][2];
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        int mt = i / 2, half = i % 2, t = q0 + row0 + mt * 16 + half * 8 + lane / 4;
        float total = acp_quad_sum(sum[mt][half]);
        inverse[mt][half] = 1.0f / total;
        if (lane % 4 == 0 && t < in.T) {
            p.lse[bh * in.T + t] = (float)ACP_LN2 * ((high[mt][half] - lift[t]) + log2f(total));
        }
    }
    int64_t d = (int64_t)in.H * D;
    acp_store_rows<D, MT>(o, inverse, shared.q, row0, p.o + acp_row<D>(bh, q0 + row0, in.T, in.H, d), d,
                          in.T - q0 - row0);
}

template <int D>
struct AcpDqTraits {
    static constexpr int KEYS = D == 64 ? 64 : 32; /* per step; with D = 64 two thread blocks fit where a multiprocessor has 164 KB */
};

template <int D>
struct alignas(1024) AcpDqShared {
    unsigned char q[ACP_BLOCK * D * 2], dout[ACP_BLOCK * D * 2];
    unsigned char k[2][AcpDqTraits<D>::KEYS * D * 2], v[2][AcpDqTraits<D>::KEYS * D * 2];
    float lift[2][AcpDqTraits<D>::KEYS];
};
static_assert(sizeof(AcpDqShared<128>) <= 99 * 1024, "chips of 8.6 and 8.9 give a thread block 99 KB");

/* Of query t of row bh, by the four neighbouring lanes that have it: each lane's share of delta = dO.o (acp_quad_sum adds
 * them up); beyond the end 0. */
template <int D>
static __device__ __forceinline__ float acp_query_delta(const AcpBackward &p, int64_t bh, int t) {
    int64_t at = acp_row<D>(bh, min(t, p.in.T - 1), p.in.T, p.in.H, (int64_t)p.in.H * D) + threadIdx.x % 4 * 8;
    float delta = 0;
#pragma unroll
    for (int i = 0; i < D; i += 32) {
        float o[8], dout[8];
        load8(o, p.o + at + i);
        load8(dout, p.dout + at + i);
        delta += acp_dot8(o, dout);
    }
    return t < p.in.T ? delta : 0.0f;
}

/* One query block; 4 warps with 32 rows each, 32 keys at a time. Writes offset, and delta corrected, for
 * acp_dkdv_kernel. */
template <int D>
static __global__ void __launch_bounds__(128, 2) acp_dq_kernel(AcpBackward p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    AcpDqShared<D> &shared = *reinterpret_cast<AcpDqShared<D> *>(memory);
    constexpr int MT = 2, NT = 4, KEYS = AcpDqTraits<D>::KEYS, TILE = KEYS * D * 2;
    const AcpInputs &in = p.in;
    const float root = acp_root<D>(), scale = (float)ACP_LOG2E * root;
    int place = p.saved.order[2][blockIdx.x], m = place % in.blocks;
    int64_t bh = place / in.blocks, d = (int64_t)in.H * D;
    int q0 = m * ACP_BLOCK, row0 = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    int end = (min(in.T, q0 + ACP_BLOCK) - 1) / KEYS, begin = p.saved.first[bh * in.blocks + m] * (ACP_BLOCK / KEYS);
    const float2 *base = p.saved.base + bh * in.blocks;
    const float2 own_base = base[m];
    uint32_t sk = acp_shared(shared.k), sv = acp_shared(shared.v);

    auto load = [&](int n) {
        acp_load_keys<D, KEYS>(shared, in, p.saved, bh, n);
    };
    acp_load_tile<D, ACP_BLOCK, 128>(acp_shared(shared.q), in.q + acp_row<D>(bh, q0, in.T, in.H, in.stride), in.stride,
                                     in.T - q0);
    acp_load_tile<D, ACP_BLOCK, 128>(acp_shared(shared.dout), p.dout + acp_row<D>(bh, q0, in.T, in.H, d), d, in.T - q0);
    load(end);
    float offset[MT][2], delta[MT][2], sum[MT][2];
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        int query = q0 + row0 + i * 8 + lane / 4;
        offset[i / 2][i % 2] = acp_query_offset(p, bh, query);
        delta[i / 2][i % 2] = acp_query_delta<D>(p, bh, query);
        sum[i / 2][i % 2] = 0;
    }
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        delta[i / 2][i % 2] = acp_quad_sum(delta[i / 2][i % 2]);
        if (lane % 4 == 0) {
            p.work.offset[bh * in.blocks * ACP_BLOCK + q0 + row0 + i * 8 + lane / 4] = offset[i / 2][i % 2];
        }
    }
    acp_copies_done();
    __syncthreads();

    AcpRows<D, MT, D == 64> q, dout;
    q.init(acp_shared(shared.q) + row0 * 2 * D + acp_lane_a<D>());
    dout.init(acp_shared(shared.dout) + row0 * 2 * D + acp_lane_a<D>());
    float dq[MT][D / 8][4];
    acp_zero<MT, D / 8>(dq);
    for (int n = end; n >= begin; n--) {
        acp_copies_done();
        __syncthreads();
        if (n > begin) {
            load(n - 1);
        }
        int stage = n % 2;
        float shift = acp_shift(own_base, base[n * KEYS / ACP_BLOCK]);
#pragma unroll
        for (int part = 0; part < KEYS / 32; part++) {
            int j = n * KEYS + part * 32;
            if (j > q0 + row0 + 31) {
                continue;
            }
            uint32_t tile = stage * TILE + part * 32 * 2 * D;
            float s[MT][NT][4], dp[MT][NT][4];
            acp_product_abt<D, MT, NT>(s, q, sk + tile + acp_lane_b<D>());
            if (j + 31 > q0 + row0) {
                acp_mask<MT, NT, false>(s, q0 + row0, j);
            }
            acp_product_abt<D, MT, NT>(dp, dout, sv + tile + acp_lane_b<D>());
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                float2 key = *reinterpret_cast<const float2 *>(&shared.lift[stage][part * 32 + nt * 8 + lane % 4 * 2]);
                key.x += shift;
                key.y += shift;
#pragma unroll
                for (int i = 0; i < MT * 4; i++) { /* dS, in place of the logits */
                    int mt = i / 4, e = i % 4;
                    float weight = acp_weight(s[mt][nt][e], scale, offset[mt][e / 2], e % 2 ? key.y : key.x);
                    s[mt][nt][e] = weight * (dp[mt][nt][e] - delta[mt][e / 2]);
                    sum[mt][e / 2] += s[mt][nt][e];
                }
            }
#pragma unroll
            for (int ks = 0; ks < NT / 2; ks++) {
                acp_product_ab<D, MT, NT>(dq, s, ks, sk + tile + acp_lane_a<D>());
            }
        }
    }
    float roots[MT][2];
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        float error = acp_quad_sum(sum[i / 2][i % 2]);
        roots[i / 2][i % 2] = root;
        if (lane % 4 == 0) {
            p.work.delta[bh * in.blocks * ACP_BLOCK + q0 + row0 + i * 8 + lane / 4] = delta[i / 2][i % 2] + error;
        }
    }
    acp_store_rows<D, MT>(dq, roots, shared.q, row0, p.dq + acp_row<D>(bh, q0 + row0, in.T, in.H, d), d,
                          in.T - q0 - row0);
}

/* Queries per step, and how many of them at a time; 16-row fragments of keys per warp. Shared memory stays below the 99
 * KiB that sm_86, sm_89 and sm_120 have. */
template <int D>
struct AcpDkdvTraits {
    static constexpr int QUERIES = D == 64 ? 64 : 32, PART = 32, MT = D == 64 ? 2 : 1,
                         THREADS = ACP_BLOCK / (16 * MT) * 32;
    static constexpr int RESIDENT = D == 64 ? 2 : 1; /* thread blocks on a multiprocessor */
};

template <int D>
struct alignas(1024) AcpDkdvShared {
    unsigned char k[ACP_BLOCK * D * 2], v[ACP_BLOCK * D * 2];
    unsigned char q[2][AcpDkdvTraits<D>::QUERIES * D * 2], dout[2][AcpDkdvTraits<D>::QUERIES * D * 2];
    float offset[2][AcpDkdvTraits<D>::QUERIES], delta[2][AcpDkdvTraits<D>::QUERIES];
};
static_assert(sizeof(AcpDkdvShared<128>) <= 99 * 1024, "as above");

/* One key block. Logits are computed transposed (rows are keys), so that P^T and dS^T leave the tensor cores as the A
 * operands of dV and dK. */
template <int D>
static __global__ void __launch_bounds__(AcpDkdvTraits<D>::THREADS, AcpDkdvTraits<D>::RESIDENT)
    acp_dkdv_kernel(AcpBackward p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    AcpDkdvShared<D> &shared = *reinterpret_cast<AcpDkdvShared<D> *>(memory);
    using Traits = AcpDkdvTraits<D>;
    constexpr int MT = Traits::MT, QUERIES = Traits::QUERIES, PART = Traits::PART, NT = PART / 8,
                  THREADS = Traits::THREADS;
    constexpr int TILE = QUERIES * D * 2;
    const AcpInputs &in = p.in;
    const float root = acp_root<D>(), scale = (float)ACP_LOG2E * root;
    int place = p.saved.order[1][blockIdx.x], n = place % in.blocks;
    int64_t bh = place / in.blocks, d = (int64_t)in.H * D;
    int k0 = n * ACP_BLOCK, row0 = threadIdx.x / 32 * (16 * MT), lane = threadIdx.x % 32;
    int begin = k0 / QUERIES, end = (min(in.T, (p.saved.last[bh * in.blocks + n] + 1) * ACP_BLOCK) - 1) / QUERIES;
    const bf16 *q = in.q + acp_row<D>(bh, 0, in.T, in.H, in.stride), *dout = p.dout + acp_row<D>(bh, 0, in.T, in.H, d);
    const float *offset = p.work.offset + bh * in.blocks * ACP_BLOCK,
                *delta = p.work.delta + bh * in.blocks * ACP_BLOCK;
    const float2 *base = p.saved.base + bh * in.blocks;
    const float2 own_base = base[n];
    uint32_t sq = acp_shared(shared.q), sdout = acp_shared(shared.dout);

    auto load = [&](int m) {
        int stage = m % 2, i = m * QUERIES;
        acp_load_tile<D, QUERIES, THREADS>(sq + stage * TILE, q + i * in.stride, in.stride, in.T - i);
        acp_load_tile<D, QUERIES, THREADS>(sdout + stage * TILE, dout + i * d, d, in.T - i);
        acp_load_floats<QUERIES>(acp_shared(shared.offset[stage]), offset + i);
        acp_load_floats<QUERIES>(acp_shared(shared.delta[stage]), delta + i);
    };
    int64_t at = acp_row<D>(bh, k0, in.T, in.H, in.stride);
    acp_load_tile<D, ACP_BLOCK, THREADS>(acp_shared(shared.k), in.k + at, in.stride, in.T - k0);
    acp_load_tile<D, ACP_BLOCK, THREADS>(acp_shared(shared.v), in.v + at, in.stride, in.T - k0);
    load(begin);
    float lift[MT][2], sum[MT][2];
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        lift[i / 2][i % 2] = p.saved.lift[bh * in.blocks * ACP_BLOCK + k0 + row0 + i * 8 + lane / 4];
        sum[i / 2][i % 2] = 0;
    }
    acp_copies_done();
    __syncthreads();

    AcpRows<D, MT, false> k, v;
    k.init(acp_shared(shared.k) + row0 * 2 * D + acp_lane_a<D>());
    v.init(acp_shared(shared.v) + row0 * 2 * D + acp_lane_a<D>());
    float dk[MT][D / 8][4], dv[MT][D / 8][4];
    acp_zero<MT, D / 8>(dk);
    acp_zero<MT, D / 8>(dv);
    for (int m = begin; m <= end; m++) {
        acp_copies_done();
        __syncthreads();
        if (m < end) {
            load(m + 1);
        }
        int stage = m % 2;
        float shift = acp_shift(base[m * QUERIES / ACP_BLOCK], own_base), key[MT][2];
#pragma unroll
        for (int i = 0; i < MT * 2; i++) {
            key[i / 2][i % 2] = lift[i / 2][i % 2] + shift;
        }
#pragma unroll
        for (int part = 0; part < QUERIES / PART; part++) {
            int i0 = m * QUERIES + part * PART;
            if (i0 + PART - 1 < k0 + row0) {
                continue; /* all queries before all of this warp's keys */
            }
            uint32_t tile = stage * TILE + part * PART * 2 * D;
            float s[MT][NT][4], dp[MT][NT][4];
            acp_product_abt<D, MT, NT>(s, k, sq + tile + acp_lane_b<D>());
            if (i0 < k0 + row0 + 16 * MT - 1) {
                acp_mask<MT, NT, true>(s, k0 + row0, i0);
            }
            const float *offsets = &shared.offset[stage][part * PART + lane % 4 * 2];
            const float *deltas = &shared.delta[stage][part * PART + lane % 4 * 2];
            acp_product_abt<D, MT, NT>(dp, v, sdout + tile + acp_lane_b<D>());
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                float2 query = *reinterpret_cast<const float2 *>(&offsets[nt * 8]); /* two neighbours */
                float2 sums = *reinterpret_cast<const float2 *>(&deltas[nt * 8]);
#pragma unroll
                for (int i = 0; i < MT * 4; i++) { /* P in place of the logits, dS in place of dP */
                    int mt = i / 4, e = i % 4;
                    s[mt][nt][e] = acp_weight(s[mt][nt][e], scale, e % 2 ? query.y : query.x, key[mt][e / 2]);
                    dp[mt][nt][e] = s[mt][nt][e] * (dp[mt][nt][e] - (e % 2 ? sums.y : sums.x));
                    sum[mt][e / 2] += dp[mt][nt][e];
                }
            }
#pragma unroll
            for (int ks = 0; ks < NT / 2; ks++) {
                acp_product_ab<D, MT, NT>(dv, s, ks, sdout + tile + acp_lane_a<D>());
                acp_product_ab<D, MT, NT>(dk, dp, ks, sq + tile + acp_lane_a<D>());
            }
        }
    }
    float roots[MT][2], ones[MT][2];
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        float total = acp_quad_sum(sum[i / 2][i % 2]);
        roots[i / 2][i % 2] = root;
        ones[i / 2][i % 2] = 1;
        if (lane % 4 == 0) {
            p.work.dc[bh * in.blocks * ACP_BLOCK + k0 + row0 + i * 8 + lane / 4] = -total;
        }
    }
    int64_t out = acp_row<D>(bh, k0 + row0, in.T, in.H, d);
    acp_store_rows<D, MT>(dk, roots, shared.k, row0, p.dk + out, d, in.T - k0 - row0);
    acp_store_rows<D, MT>(dv, ones, shared.v, row0, p.dv + out, d, in.T - k0 - row0);
}

#endif

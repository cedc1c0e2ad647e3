/* Forgetting attention on Hopper: the backward pass of acp_attention.cuh on wgmma and TMA. Included there.
 *
 * Two kernels, so that no sum depends on the order of thread blocks and nothing is added up in memory:
 *
 *     dQ        a tile of queries stays, key blocks stream by:    S = Q K^T,   dP = dO V^T,   dQ += dS K
 *     dK, dV    a block of keys stays, queries stream by:         S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
 *
 * One kernel for all would need five products for seven here, but dS would go through shared memory and dQ through atomic sums in
 * memory. As it is, P and dS never leave the registers: they are made there as the left operands of what follows. The first kernel
 * also finds the row sums of dS, which correct delta for the second (see acp_attention.cuh). */
#ifndef FOX_HOPPER_BACKWARD_CUH
#define FOX_HOPPER_BACKWARD_CUH

#include "hopper.cuh"

struct HopperBackwardArgs {
    CUtensorMap q, k, v, dout, dq, dk, dv;
    AcpBackward p;
};

template <int D>
static inline HopperBackwardArgs hopper_backward_args(const AcpShape *shape, const AcpBackward &p) {
    int B = shape->B, T = shape->T, H = shape->H;
    int64_t d = (int64_t)H * D;
    return {hopper_tensor_map(p.in.q, B, T, H, D, p.in.stride),
            hopper_tensor_map(p.in.k, B, T, H, D, p.in.stride),
            hopper_tensor_map(p.in.v, B, T, H, D, p.in.stride),
            hopper_tensor_map(p.dout, B, T, H, D, d),
            hopper_tensor_map(p.dq, B, T, H, D, d),
            hopper_tensor_map(p.dk, B, T, H, D, d),
            hopper_tensor_map(p.dv, B, T, H, D, d),
            p};
}

template <int D>
struct HopperDq {
    static constexpr int WARPGROUPS = 2, THREADS = (WARPGROUPS + 1) * HOPPER_WARPGROUP, STAGES = D == 64 ? 4 : 2;
    static constexpr int PANEL = ACP_BLOCK * 128, TILE = ACP_BLOCK * D * 2;
    static constexpr bool OVERLAP = D == 64; /* dQ of one block under the weights of the next, where registers allow it */
};

template <int D>
struct alignas(1024) HopperDqShared {
    using Traits = HopperDq<D>;
    unsigned char q[Traits::TILE], dout[Traits::TILE]; /* q: then dQ */
    unsigned char k[Traits::STAGES][Traits::TILE], v[Traits::STAGES][Traits::TILE];
    float lift[Traits::STAGES][ACP_BLOCK];
    uint64_t q_full, k_full[Traits::STAGES], k_empty[Traits::STAGES], v_full[Traits::STAGES], v_empty[Traits::STAGES];
};

template <int D>
static __global__ void __launch_bounds__(HopperDq<D>::THREADS, 1)
    hopper_dq_kernel(const __grid_constant__ HopperBackwardArgs args) {
#if HOPPER_CODE
    using Traits = HopperDq<D>;
    constexpr int WARPGROUPS = Traits::WARPGROUPS, STAGES = Traits::STAGES, TILE = Traits::TILE;
    extern __shared__ __align__(1024) unsigned char memory[];
    HopperDqShared<D> &shared = *reinterpret_cast<HopperDqShared<D> *>(memory);
    const AcpBackward &p = args.p;
    const AcpInputs &in = p.in;
    int place = p.saved.order[0][blockIdx.x], end = place % in.blocks, bh = place / in.blocks, b = bh / in.H, h = bh % in.H;
    int begin = p.saved.first[place], q0 = end * ACP_BLOCK;
    if (threadIdx.x == 0) {
        hopper_barrier_init(&shared.q_full, 1);
        for (int s = 0; s < STAGES; s++) {
            hopper_barrier_init(&shared.k_full[s], 1);
            hopper_barrier_init(&shared.v_full[s], 1);
            hopper_barrier_init(&shared.k_empty[s], 4 * WARPGROUPS);
            hopper_barrier_init(&shared.v_empty[s], 4 * WARPGROUPS);
        }
        hopper_barriers_ready();
    }
    __syncthreads();

    int group = threadIdx.x / HOPPER_WARPGROUP;
    if (group == WARPGROUPS) {
        hopper_fewer_registers<24>();
        if (threadIdx.x % HOPPER_WARPGROUP == 0) {
            const float *lift = p.saved.lift + (int64_t)bh * in.blocks * ACP_BLOCK;
            hopper_arrive_bytes(&shared.q_full, 2 * TILE);
            hopper_load_tile<D, ACP_BLOCK>(shared.q, args.q, b, h, q0, &shared.q_full);
            hopper_load_tile<D, ACP_BLOCK>(shared.dout, args.dout, b, h, q0, &shared.q_full);
            for (int n = end; n >= begin; n--) {
                int stage = (end - n) % STAGES, parity = (end - n) / STAGES % 2 ^ 1;
                hopper_wait(&shared.k_empty[stage], parity);
                hopper_arrive_bytes(&shared.k_full[stage], TILE + (int)sizeof shared.lift[0]);
                hopper_load_tile<D, ACP_BLOCK>(shared.k[stage], args.k, b, h, n * ACP_BLOCK, &shared.k_full[stage]);
                hopper_load_bytes(shared.lift[stage], lift + n * ACP_BLOCK, sizeof shared.lift[0], &shared.k_full[stage]);
                hopper_wait(&shared.v_empty[stage], parity);
                hopper_arrive_bytes(&shared.v_full[stage], TILE);
                hopper_load_tile<D, ACP_BLOCK>(shared.v[stage], args.v, b, h, n * ACP_BLOCK, &shared.v_full[stage]);
            }
        }
    } else {
        hopper_more_registers<240>();
        const float root = D == 64 ? 0.125f : 0.08838834764831845f, scale = (float)(ACP_LOG2E)*root;
        const double *base = p.saved.base + (int64_t)bh * in.blocks;
        const double own_base = base[end];
        int thread = threadIdx.x % HOPPER_WARPGROUP, lane = thread % 32;
        int row = group * 64 + thread / 32 * 16 + lane / 4; /* this thread's rows of the tile: this and this + 8 */
        uint32_t q = hopper_shared(shared.q) + group * 64 * 128, dout = hopper_shared(shared.dout) + group * 64 * 128;
        uint32_t k = hopper_shared(shared.k), v = hopper_shared(shared.v);
        float2 *stats = p.work.stats + (int64_t)place * ACP_BLOCK + row;
        float s[64], dp[64], dq[D / 2], sum[2] = {0, 0};
        float2 of_row[2] = {stats[0], stats[8]};
        uint32_t ds[32];
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            dq[i] = 0;
        }
        auto release = [&](uint64_t *empty) {
            __syncwarp();
            if (lane == 0) {
                hopper_arrive(empty);
            }
        };
        auto add_dq = [&](int n) {
            hopper_product_ab<ACP_BLOCK>(dq, ds, k + (end - n) % STAGES * TILE, Traits::PANEL, true);
            hopper_products_commit();
        };
        /* One key block: dS, with the product dQ of the block before it under way (`behind`). */
        auto step = [&](int n, auto diagonal, auto behind) {
            int stage = (end - n) % STAGES, parity = (end - n) / STAGES % 2;
            float shift = (float)(own_base - base[n]);
            const float *lift = shared.lift[stage] + lane % 4 * 2;
            hopper_wait(&shared.k_full[stage], parity);
            hopper_products_begin();
            hopper_product_abt<D>(s, q, Traits::PANEL, k + stage * TILE, Traits::PANEL);
            hopper_products_commit();
            hopper_wait(&shared.v_full[stage], parity);
            hopper_products_begin();
            hopper_product_abt<D>(dp, dout, Traits::PANEL, v + stage * TILE, Traits::PANEL);
            hopper_products_commit();
            if (behind) {
                add_dq(n + 1);
            }
            hopper_products_wait<behind ? 2 : 1>();
            hopper_hold(s);
            float offset[2] = {of_row[0].x + shift, of_row[1].x + shift};
#pragma unroll
            for (int i = 0; i < 64; i += 4) {
                float2 key = *reinterpret_cast<const float2 *>(lift + i * 2);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[i + e] = acp_weight(s[i + e], scale, offset[e / 2], e % 2 ? key.y : key.x);
                    if (diagonal && lane % 4 * 2 + i * 2 + e % 2 > row + e / 2 * 8) {
                        s[i + e] = 0;
                    }
                }
            }
            hopper_products_wait<behind ? 1 : 0>();
            hopper_hold(dp);
            release(&shared.v_empty[stage]);
#pragma unroll
            for (int i = 0; i < 64; i++) {
                s[i] *= dp[i] - of_row[i / 2 % 2].y;
                sum[i / 2 % 2] += s[i];
            }
            if (behind) {
                hopper_products_wait<0>();
                hopper_hold(dq);
                hopper_hold(ds);
                release(&shared.k_empty[(end - n - 1) % STAGES]);
            }
            hopper_pack(ds, s);
        };
        auto finish_dq = [&](int n) {
            hopper_hold(dq);
            hopper_hold(ds);
            hopper_products_begin();
            add_dq(n);
            hopper_products_wait<0>();
            hopper_hold(dq);
            hopper_hold(ds);
            release(&shared.k_empty[(end - n) % STAGES]);
        };
        using Yes = HopperFlag<true>;
        using No = HopperFlag<false>;
        hopper_wait(&shared.q_full, 0);
        step(end, Yes(), No());
        for (int n = end - 1; n >= begin; n--) {
            if (!Traits::OVERLAP) {
                finish_dq(n + 1);
            }
            step(n, No(), HopperFlag<Traits::OVERLAP>());
        }
        finish_dq(begin);

        float roots[2] = {root, root};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float error = acp_quad_sum(sum[i]);
            if (lane % 4 == 0) {
                stats[i * 8].y = of_row[i].y + error;
            }
        }
        hopper_store_rows<D>(dq, roots, shared.q + group * 64 * 128, Traits::PANEL, args.dq, b, h, q0 + group * 64, 1 + group);
    }
#endif
}

template <int D>
struct HopperDkdv {
    static constexpr int WARPGROUPS = 2, THREADS = (WARPGROUPS + 1) * HOPPER_WARPGROUP;
    static constexpr int QUERIES = 64, STAGES = D == 64 ? 6 : 4; /* per step; steps in flight */
    static constexpr int PANEL = ACP_BLOCK * 128, TILE = ACP_BLOCK * D * 2;
    static constexpr int Q_PANEL = QUERIES * 128, Q_TILE = QUERIES * D * 2;
    static constexpr bool KEEP = D == 64; /* K and V in registers: a product of 64 columns is bound by its reads */
};

template <int D>
struct alignas(1024) HopperDkdvShared {
    using Traits = HopperDkdv<D>;
    unsigned char k[Traits::TILE], v[Traits::TILE]; /* then dK, dV */
    unsigned char q[Traits::STAGES][Traits::Q_TILE], dout[Traits::STAGES][Traits::Q_TILE];
    float2 stats[Traits::STAGES][Traits::QUERIES];
    uint64_t k_full, q_full[Traits::STAGES], q_empty[Traits::STAGES], dout_full[Traits::STAGES], dout_empty[Traits::STAGES];
};

template <int D>
static __global__ void __launch_bounds__(HopperDkdv<D>::THREADS, 1)
    hopper_dkdv_kernel(const __grid_constant__ HopperBackwardArgs args) {
#if HOPPER_CODE
    using Traits = HopperDkdv<D>;
    constexpr int WARPGROUPS = Traits::WARPGROUPS, STAGES = Traits::STAGES, QUERIES = Traits::QUERIES, N = QUERIES / 2;
    static_assert(QUERIES == 64, "a warpgroup's keys meet their own queries in one step");
    extern __shared__ __align__(1024) unsigned char memory[];
    HopperDkdvShared<D> &shared = *reinterpret_cast<HopperDkdvShared<D> *>(memory);
    const AcpBackward &p = args.p;
    const AcpInputs &in = p.in;
    int place = p.saved.order[1][blockIdx.x], n = place % in.blocks, bh = place / in.blocks, b = bh / in.H, h = bh % in.H;
    int k0 = n * ACP_BLOCK, begin = k0 / QUERIES, end = (min(in.T, (p.saved.last[place] + 1) * ACP_BLOCK) - 1) / QUERIES;
    if (threadIdx.x == 0) {
        hopper_barrier_init(&shared.k_full, 1);
        for (int s = 0; s < STAGES; s++) {
            hopper_barrier_init(&shared.q_full[s], 1);
            hopper_barrier_init(&shared.dout_full[s], 1);
            hopper_barrier_init(&shared.q_empty[s], 4 * WARPGROUPS);
            hopper_barrier_init(&shared.dout_empty[s], 4 * WARPGROUPS);
        }
        hopper_barriers_ready();
    }
    __syncthreads();

    int group = threadIdx.x / HOPPER_WARPGROUP;
    if (group == WARPGROUPS) {
        hopper_fewer_registers<24>();
        if (threadIdx.x % HOPPER_WARPGROUP == 0) {
            const float2 *stats = p.work.stats + (int64_t)bh * in.blocks * ACP_BLOCK;
            hopper_arrive_bytes(&shared.k_full, 2 * Traits::TILE);
            hopper_load_tile<D, ACP_BLOCK>(shared.k, args.k, b, h, k0, &shared.k_full);
            hopper_load_tile<D, ACP_BLOCK>(shared.v, args.v, b, h, k0, &shared.k_full);
            for (int m = begin; m <= end; m++) {
                int stage = (m - begin) % STAGES, parity = (m - begin) / STAGES % 2 ^ 1;
                hopper_wait(&shared.q_empty[stage], parity);
                hopper_arrive_bytes(&shared.q_full[stage], Traits::Q_TILE + (int)sizeof shared.stats[0]);
                hopper_load_tile<D, QUERIES>(shared.q[stage], args.q, b, h, m * QUERIES, &shared.q_full[stage]);
                hopper_load_bytes(shared.stats[stage], stats + m * QUERIES, sizeof shared.stats[0], &shared.q_full[stage]);
                hopper_wait(&shared.dout_empty[stage], parity);
                hopper_arrive_bytes(&shared.dout_full[stage], Traits::Q_TILE);
                hopper_load_tile<D, QUERIES>(shared.dout[stage], args.dout, b, h, m * QUERIES, &shared.dout_full[stage]);
            }
        }
    } else {
        hopper_more_registers<240>();
        const float root = D == 64 ? 0.125f : 0.08838834764831845f, scale = (float)(ACP_LOG2E)*root;
        const double *base = p.saved.base + (int64_t)bh * in.blocks;
        const double own_base = base[n];
        int thread = threadIdx.x % HOPPER_WARPGROUP, lane = thread % 32;
        int row = group * 64 + thread / 32 * 16 + lane / 4; /* this thread's keys of the block: this and this + 8 */
        uint32_t k = hopper_shared(shared.k) + group * 64 * 128, v = hopper_shared(shared.v) + group * 64 * 128;
        uint32_t q = hopper_shared(shared.q), dout = hopper_shared(shared.dout);
        const float *lifts = p.saved.lift + (int64_t)place * ACP_BLOCK + row;
        const float lift[2] = {lifts[0], lifts[8]};
        float s[N], dp[N], dk[D / 2], dv[D / 2], sum[2] = {0, 0};
        uint32_t weights[N / 2], ds[N / 2], k_rows[16], v_rows[16];
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            dk[i] = 0;
            dv[i] = 0;
        }
        auto release = [&](uint64_t *empty) {
            __syncwarp();
            if (lane == 0) {
                hopper_arrive(empty);
            }
        };
        auto stage_of = [&](int m) { return (m - begin) % STAGES; };
        auto parity_of = [&](int m) { return (m - begin) / STAGES % 2; };
        auto start = [&](float(&acc)[N], uint32_t rows, const uint32_t(&kept)[16], uint32_t tiles, uint64_t *full, int m) {
            hopper_wait(&full[stage_of(m)], parity_of(m));
            hopper_products_begin();
            if (Traits::KEEP) {
                hopper_product_abt<D>(acc, kept, tiles + stage_of(m) * Traits::Q_TILE, Traits::Q_PANEL);
            } else {
                hopper_product_abt<D>(acc, rows, Traits::PANEL, tiles + stage_of(m) * Traits::Q_TILE, Traits::Q_PANEL);
            }
            hopper_products_commit();
        };
        auto add_dk = [&](int m) {
            hopper_products_begin();
            hopper_product_ab<QUERIES>(dk, ds, q + stage_of(m) * Traits::Q_TILE, Traits::Q_PANEL, true);
            hopper_products_commit();
        };
        /* Some queries: P and dV, dS; with the product dK of the step before under way (`behind`). */
        auto step = [&](int m, auto diagonal, auto behind) {
            int stage = stage_of(m);
            float shift = (float)(base[m * QUERIES / ACP_BLOCK] - own_base), key[2] = {lift[0] + shift, lift[1] + shift};
            const float2 *stats = shared.stats[stage] + lane % 4 * 2;
            int column = m * QUERIES - k0 + lane % 4 * 2;
            start(s, k, k_rows, q, shared.q_full, m);
            if (behind) {
                add_dk(m - 1);
            }
            start(dp, v, v_rows, dout, shared.dout_full, m);
            hopper_products_wait<behind && Traits::KEEP ? 2 : 1>();
            hopper_hold(s);
#pragma unroll
            for (int i = 0; i < N; i += 4) {
                float4 pair = *reinterpret_cast<const float4 *>(stats + i * 2);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[i + e] = acp_weight(s[i + e], scale, e % 2 ? pair.z : pair.x, key[e / 2]);
                    if (diagonal && row + e / 2 * 8 > column + i * 2 + e % 2) {
                        s[i + e] = 0;
                    }
                }
            }
            hopper_pack(weights, s);
            hopper_hold(weights);
            hopper_products_begin();
            hopper_product_ab<QUERIES>(dv, weights, dout + stage * Traits::Q_TILE, Traits::Q_PANEL, true);
            hopper_products_commit();
            hopper_products_wait<1>();
            hopper_hold(dp);
            hopper_hold(ds);
            if (behind) {
                release(&shared.q_empty[stage_of(m - 1)]);
            }
#pragma unroll
            for (int i = 0; i < N; i += 4) {
                float4 pair = *reinterpret_cast<const float4 *>(stats + i * 2);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[i + e] *= dp[i + e] - (e % 2 ? pair.w : pair.y);
                    sum[e / 2] += s[i + e];
                }
            }
            hopper_pack(ds, s);
            hopper_products_wait<0>();
            hopper_hold(dv);
            hopper_hold(weights);
            release(&shared.dout_empty[stage]);
        };
        using Yes = HopperFlag<true>;
        using No = HopperFlag<false>;
        hopper_wait(&shared.k_full, 0);
        if (Traits::KEEP) {
            hopper_take_rows(k_rows, k);
            hopper_take_rows(v_rows, v);
        }
        int m = begin;
        if (group == 1) { /* the first queries come before this warpgroup's keys */
            hopper_wait(&shared.q_full[0], 0);
            release(&shared.q_empty[0]);
            hopper_wait(&shared.dout_full[0], 0);
            release(&shared.dout_empty[0]);
            m++;
        }
        if (m <= end) {
            step(m, Yes(), No());
            for (m++; m <= end; m++) {
                step(m, No(), Yes());
            }
            hopper_hold(dk);
            hopper_hold(ds);
            add_dk(end);
            hopper_products_wait<0>();
            hopper_hold(dk);
            hopper_hold(ds);
        }

        float roots[2] = {root, root}, ones[2] = {1, 1};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float total = acp_quad_sum(sum[i]);
            if (lane % 4 == 0) {
                p.work.dc[(int64_t)place * ACP_BLOCK + row + i * 8] = -total;
            }
        }
        hopper_store_rows<D>(dk, roots, shared.k + group * 64 * 128, Traits::PANEL, args.dk, b, h, k0 + group * 64, 1 + group);
        hopper_store_rows<D>(dv, ones, shared.v + group * 64 * 128, Traits::PANEL, args.dv, b, h, k0 + group * 64, 1 + group);
    }
#endif
}

#endif

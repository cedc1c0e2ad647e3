/* Forgetting attention on Hopper: the backward pass of acp_attention.cuh on wgmma and TMA. Included there.
 *
 * Two kernels, so that no sum depends on the order of thread blocks and nothing is added up in memory:
 *
 *     dQ        a tile of queries stays, key blocks stream by:
 *                   S = Q K^T,   dP = dO V^T,   dQ += dS K
 *     dK, dV    a block of keys stays, queries stream by:
 *                   S^T = K Q^T,   dP^T = V dO^T,   dV += P^T dO,   dK += dS^T Q
 *
 * One kernel for all would need five products for seven here, but dS would go through shared memory and dQ through
 * atomic sums in memory. As it is, P and dS never leave the registers: they are made there as the left operands of what
 * follows. The first kernel also finds the row sums of dS, which correct delta for the second (see acp_attention.cuh).
 *
 * Thread blocks stay and take one tile after the other. The first kernel has no register to spare beside its accumulators: what
 * it needs of a tile before and after the loop over keys, it looks up twice. */
#ifndef FOX_HOPPER_BACKWARD_CUH
#define FOX_HOPPER_BACKWARD_CUH

#include "hopper_tiles.cuh"

/* Starts acc = A B^T as a batch, with A in shared memory or, KEEP, in registers (`rows`). */
template <int D, int A_ROWS, int B_ROWS, bool KEEP, int ACC>
static __device__ __forceinline__ void hopper_start_abt(float (&acc)[ACC], uint32_t a, const uint32_t (&rows)[16],
                                                        uint32_t b) {
    hopper_products_begin();
    if (KEEP) {
        hopper_product_abt<D, B_ROWS>(acc, rows, b);
    } else {
        hopper_product_abt<D, A_ROWS, B_ROWS>(acc, a, b);
    }
    hopper_products_commit();
}

/* What belongs to this thread's columns, read before the product that it will meet has ended: from x, 8 floats apart.
 */
template <int N>
static __device__ __forceinline__ void hopper_columns(float2 (&columns)[N], const float *x) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        columns[i] = *reinterpret_cast<const float2 *>(x + i * 8);
    }
}

struct HopperBackwardArgs {
    CUtensorMap q, k, v, o, dout, dq, dk, dv, lift, offset, delta;
    AcpBackward p;
};

template <int D>
static inline HopperBackwardArgs hopper_backward_args(const AcpShape *shape, const AcpBackward &p) {
    int B = shape->B, T = shape->T, H = shape->H;
    int64_t d = (int64_t)H * D, rows = (int64_t)B * H * p.in.blocks * ACP_BLOCK;
    return {hopper_tensor_map(p.in.q, B, T, H, D, p.in.stride),
            hopper_tensor_map(p.in.k, B, T, H, D, p.in.stride),
            hopper_tensor_map(p.in.v, B, T, H, D, p.in.stride),
            hopper_tensor_map(p.o, B, T, H, D, d),
            hopper_tensor_map(p.dout, B, T, H, D, d),
            hopper_tensor_map(p.dq, B, T, H, D, d),
            hopper_tensor_map(p.dk, B, T, H, D, d),
            hopper_tensor_map(p.dv, B, T, H, D, d),
            hopper_vector_map(p.saved.lift, rows),
            hopper_vector_map(p.work.offset, rows),
            hopper_vector_map(p.work.delta, rows),
            p};
}

template <int D>
struct HopperDq {
    static constexpr int WARPGROUPS = 2, THREADS = (WARPGROUPS + 1) * HOPPER_WARPGROUP, REGISTERS = 240,
                         COPY_REGISTERS = 24;
    static constexpr int QUERIES = 64 * WARPGROUPS, KEYS = ACP_BLOCK, STAGES = D == 64 ? 4 : 2; /* keys per step */
    static constexpr int TILE = QUERIES * D * 2, K_TILE = KEYS * D * 2, BUFFERS = D == 64 ? 2 : 1; /* of queries */
    /* where registers allow it: dQ of one step under the weights of the next; on the diagonal only half of the keys for
     * the first queries */
    static constexpr bool OVERLAP = D == 64, HALVES = D == 64;
    static_assert(QUERIES == ACP_BLOCK, "a tile has one range");
};

template <int D>
struct alignas(1024) HopperDqShared {
    using Traits = HopperDq<D>;
    unsigned char q[Traits::BUFFERS][Traits::TILE], o[Traits::BUFFERS][Traits::TILE], /* q: then dQ */
        dout[Traits::BUFFERS][Traits::TILE];
    HopperKeys<D, Traits::KEYS, Traits::STAGES> keys;
    HopperTiles<Traits::BUFFERS> tiles;
};

/* This lane's share of the product of a row of two tiles, whose panels are panel_bytes apart; the four neighbouring lanes
 * have a row. */
template <int D>
static __device__ __forceinline__ float hopper_dot(const unsigned char *a, const unsigned char *b, int panel_bytes, int row) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        int piece = i * 4 + threadIdx.x % 4, at = piece / 8 * panel_bytes + row * 128 + ((piece % 8 ^ row % 8) << 4);
        float x[8], y[8];
        load8(x, reinterpret_cast<const bf16 *>(a + at));
        load8(y, reinterpret_cast<const bf16 *>(b + at));
        sum += acp_dot8(x, y);
    }
    return sum;
}

/* The producer, one thread: takes tile after tile, tells the others, and copies what they need, as far ahead as rings reach. */
template <int D>
static __device__ __forceinline__ void hopper_dq_copies(const HopperBackwardArgs &args, HopperDqShared<D> &shared) {
    using Traits = HopperDq<D>;
    const AcpInputs &in = args.p.in;
    const AcpSaved &saved = args.p.saved;
    for (int j = 0, step = 0;; j++) {
        HopperTile t = shared.tiles.take(in, saved.order[2], saved.next + 2, Traits::QUERIES);
        t.edge = t.bh < 0 ? 0 : saved.first[t.bh * in.blocks + t.start / ACP_BLOCK];
        t.step = step;
        shared.tiles.tell(j, t);
        if (t.bh < 0) {
            return;
        }
        uint64_t *there = shared.tiles.ring.announce(j, 3 * Traits::TILE);
        hopper_load_tile<D, Traits::QUERIES>(shared.q[j % Traits::BUFFERS], args.q, t.b, t.h, t.start, there);
        hopper_load_tile<D, Traits::QUERIES>(shared.o[j % Traits::BUFFERS], args.o, t.b, t.h, t.start, there);
        hopper_load_tile<D, Traits::QUERIES>(shared.dout[j % Traits::BUFFERS], args.dout, t.b, t.h, t.start, there);
        step = shared.keys.copy(args.k, args.v, args.lift, t.b, t.h, t.bh * in.blocks * ACP_BLOCK, t.edge,
                                t.start / ACP_BLOCK, step);
    }
}

template <int D>
static __global__ void __launch_bounds__(HopperDq<D>::THREADS, 1)
    hopper_dq_kernel(const __grid_constant__ HopperBackwardArgs args) {
#if HOPPER_CODE
    using Traits = HopperDq<D>;
    constexpr int WARPGROUPS = Traits::WARPGROUPS, STAGES = Traits::STAGES, KEYS = Traits::KEYS, N = KEYS / 2;
    extern __shared__ __align__(1024) unsigned char memory[];
    HopperDqShared<D> &shared = *reinterpret_cast<HopperDqShared<D> *>(memory);
    const AcpBackward &p = args.p;
    const AcpInputs &in = p.in;
    if (threadIdx.x == 0) {
        shared.tiles.init(HOPPER_WARPGROUP * WARPGROUPS);
        shared.keys.init(4 * WARPGROUPS);
        hopper_barriers_ready();
    }
    acp_begin();
    __syncthreads();

    int group = hopper_uniform(threadIdx.x / HOPPER_WARPGROUP);
    if (group == WARPGROUPS) {
        hopper_fewer_registers<Traits::COPY_REGISTERS>();
        if (threadIdx.x % HOPPER_WARPGROUP == 0) {
            hopper_dq_copies<D>(args, shared);
        }
        return;
    }
    hopper_more_registers<Traits::REGISTERS>();
    HopperTurns<WARPGROUPS> turns(group);
    for (int j = 0;; j++) {
        const HopperTile &t = shared.tiles.await_told(j);
        if (t.bh < 0) {
            break;
        }
        const int bh = hopper_uniform(t.bh), q0 = hopper_uniform(t.start);
        unsigned char *own_q = shared.q[j % Traits::BUFFERS] + group * 64 * 128,
                      *own_o = shared.o[j % Traits::BUFFERS] + group * 64 * 128,
                      *own_dout = shared.dout[j % Traits::BUFFERS] + group * 64 * 128;
        const float root = acp_root<D>(), scale = (float)ACP_LOG2E * root;
        const float2 *base = p.saved.base + (int64_t)bh * in.blocks;
        int thread = threadIdx.x % HOPPER_WARPGROUP, lane = thread % 32;
        int row0 = q0 + group * 64,
            row = thread / 32 * 16 + lane / 4; /* this thread's queries: row0 + row, and 8 further */
        float own[2], delta[2]; /* of rows beyond the end too: they weigh nothing */
        const float2 own_base = base[q0 / ACP_BLOCK];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            own[i] = acp_query_offset(p, bh, row0 + row + i * 8);
        }
        int n = q0 / ACP_BLOCK, last = hopper_uniform(t.step) + n; /* block n: step last - n of the rings */
        int begin = hopper_uniform(t.edge);
        uint32_t q = hopper_operand(hopper_shared(own_q), Traits::QUERIES * 128);
        uint32_t dout = hopper_operand(hopper_shared(own_dout), Traits::QUERIES * 128);
        uint32_t k = hopper_operand(hopper_shared(shared.keys.k), KEYS * 128),
                 v = hopper_operand(hopper_shared(shared.keys.v), KEYS * 128);
        float s[N], dp[N], dq[D / 2], sum[2] = {0, 0};
        uint32_t ds[N / 2];
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            dq[i] = 0;
        }
        auto add_dq = [&](int n) {
            hopper_products_begin();
            hopper_product_ab<KEYS>(dq, ds, k + (last - n) % STAGES * hopper_apart(Traits::K_TILE));
            hopper_products_commit();
        };
        auto finish_dq = [&](int n) {
            hopper_hold(dq);
            hopper_hold(ds);
            add_dq(n);
            hopper_products_wait<0>();
            hopper_hold(dq);
            hopper_hold(ds);
            shared.keys.k_ring.release(last - n);
        };
        /* Some keys: dS, with the product dQ of the step before under way (`behind`). half: all queries come before the
         * second half of the keys. */
        auto step = [&](int n, auto diagonal, auto half, auto behind) {
            constexpr int SEEN = half ? N / 2 : N; /* of s, of this thread */
            auto &s_seen = reinterpret_cast<float(&)[SEEN]>(s);
            auto &dp_seen = reinterpret_cast<float(&)[SEEN]>(dp);
            int stage = (last - n) % STAGES, column = lane % 4 * 2 - group * 64; /* on the diagonal, from the first query */
            float shift = acp_shift(own_base, base[n]);
            const float *lift = shared.keys.lift[stage] + lane % 4 * 2;
            shared.keys.k_ring.await(last - n);
            turns.take();
            hopper_products_begin();
            hopper_product_abt<D, Traits::QUERIES, KEYS>(s_seen, q, k + stage * hopper_apart(Traits::K_TILE));
            hopper_products_commit();
            shared.keys.v_ring.await(last - n);
            hopper_products_begin();
            hopper_product_abt<D, Traits::QUERIES, KEYS>(dp_seen, dout, v + stage * hopper_apart(Traits::K_TILE));
            hopper_products_commit();
            if (behind) {
                add_dq(n + 1);
            }
            turns.pass();
            hopper_products_wait<behind ? 2 : 1>();
            hopper_hold(s_seen);
            float offset[2] = {own[0] + shift, own[1] + shift};
#pragma unroll
            for (int i = 0; i < SEEN; i += 4) {
                float2 key = *reinterpret_cast<const float2 *>(lift + i * 2);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[i + e] = acp_weight(s[i + e], scale, offset[e / 2], e % 2 ? key.y : key.x);
                    if (diagonal && column + i * 2 + e % 2 > row + e / 2 * 8) {
                        s[i + e] = 0;
                    }
                }
            }
            hopper_products_wait<behind ? 1 : 0>();
            hopper_hold(dp_seen);
            shared.keys.v_ring.release(last - n);
#pragma unroll
            for (int i = 0; i < SEEN; i++) {
                s[i] *= dp[i] - delta[i / 2 % 2];
                sum[i / 2 % 2] += s[i];
            }
#pragma unroll
            for (int i = SEEN; i < N; i++) {
                s[i] = 0;
            }
            if (behind) {
                hopper_products_wait<0>();
                hopper_hold(dq);
                hopper_hold(ds);
                shared.keys.k_ring.release(last - n - 1);
            }
            hopper_pack(ds, s);
        };
        shared.tiles.ring.await(j);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            delta[i] = acp_quad_sum(hopper_dot<D>(own_o, own_dout, Traits::QUERIES * 128, row + i * 8));
            if (lane % 4 == 0) {
                p.work.offset[(int64_t)bh * in.blocks * ACP_BLOCK + row0 + row + i * 8] = own[i];
            }
        }
        using Yes = HopperFlag<true>;
        using No = HopperFlag<false>;
        if (Traits::HALVES && group == 0) {
            step(n, Yes(), HopperFlag<Traits::HALVES>(), No());
        } else {
            step(n, Yes(), No(), No());
        }
        for (n--; n >= begin; n--) {
            if (!Traits::OVERLAP) {
                finish_dq(n + 1);
            }
            step(n, No(), No(), HopperFlag<Traits::OVERLAP>());
        }
        finish_dq(begin);

        float roots[2] = {root, root};
        int first_row = t.start + group * 64;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float error = acp_quad_sum(sum[i]);
            if (lane % 4 == 0) {
                p.work.delta[(int64_t)t.bh * in.blocks * ACP_BLOCK + first_row + row + i * 8] = delta[i] + error;
            }
        }
        hopper_store_rows<D>(dq, roots, shared.q[j % Traits::BUFFERS] + group * 64 * 128, Traits::QUERIES * 128, args.dq, t.b,
                             t.h, first_row, HOPPER_OWN + group);
        hopper_rows_stored();
        shared.tiles.release(j);
    }
#endif
}

template <int D>
struct HopperDkdv {
    static constexpr int WARPGROUPS = 2, THREADS = (WARPGROUPS + 1) * HOPPER_WARPGROUP, REGISTERS = 240,
                         COPY_REGISTERS = 24;
    static constexpr int KEYS = 64 * WARPGROUPS, QUERIES = 64,
                         STAGES = D == 64 ? 6 : 4; /* queries per step; steps in flight */
    static constexpr int TILE = KEYS * D * 2, PANEL = KEYS * 128, Q_PANEL = QUERIES * 128, Q_TILE = QUERIES * D * 2,
                         BUFFERS = D == 64 ? 2 : 1; /* of keys and values */
    /* where registers allow it: S of the next step is computed under the weights of this one; K stays in registers */
    static constexpr bool AHEAD = D == 64, KEEP = D == 64;
};

template <int D>
struct alignas(1024) HopperDkdvShared {
    using Traits = HopperDkdv<D>;
    unsigned char k[Traits::BUFFERS][Traits::TILE], v[Traits::BUFFERS][Traits::TILE]; /* then dK, dV */
    unsigned char q[Traits::STAGES][Traits::Q_TILE], dout[Traits::STAGES][Traits::Q_TILE];
    float offset[Traits::STAGES][Traits::QUERIES], delta[Traits::STAGES][Traits::QUERIES]; /* with Q, with dO */
    HopperRing<Traits::STAGES> q_ring, dout_ring;
    HopperTiles<Traits::BUFFERS> tiles;
};

/* Last step with queries that see this key; the first is that of a tile's own rows. */
template <int D>
static __device__ __forceinline__ int hopper_last_step(const AcpBackward &p, int bh, int key) {
    int last = p.saved.last[bh * p.in.blocks + min(key, p.in.T - 1) / ACP_BLOCK];
    return (min(p.in.T, (last + 1) * ACP_BLOCK) - 1) / HopperDkdv<D>::QUERIES;
}

/* The producer, one thread: takes tile after tile, tells the others, and copies what they need, as far ahead as rings reach. */
template <int D>
static __device__ __forceinline__ void hopper_dkdv_copies(const HopperBackwardArgs &args, HopperDkdvShared<D> &shared) {
    using Traits = HopperDkdv<D>;
    constexpr int QUERIES = Traits::QUERIES;
    const AcpBackward &p = args.p;
    const AcpInputs &in = p.in;
    for (int j = 0, i = 0;; j++) {
        HopperTile t = shared.tiles.take(in, p.saved.order[1], p.saved.next + 1, Traits::KEYS);
        t.edge = t.bh < 0 ? 0 : hopper_last_step<D>(p, t.bh, t.start + Traits::KEYS - 1);
        t.step = i;
        shared.tiles.tell(j, t);
        if (t.bh < 0) {
            return;
        }
        int row = t.bh * in.blocks * ACP_BLOCK, buffer = j % Traits::BUFFERS, m = t.start / QUERIES;
        uint64_t *there = shared.tiles.ring.announce(j, 2 * Traits::TILE);
        hopper_load_tile<D, Traits::KEYS>(shared.k[buffer], args.k, t.b, t.h, t.start, there);
        hopper_load_tile<D, Traits::KEYS>(shared.v[buffer], args.v, t.b, t.h, t.start, there);
        do { /* the first is under way before the edge is needed */
            int stage = i % Traits::STAGES, query = m * QUERIES;
            uint64_t *full = shared.q_ring.refill(i, Traits::Q_TILE + (int)sizeof shared.offset[0]);
            hopper_load_tile<D, QUERIES>(shared.q[stage], args.q, t.b, t.h, query, full);
            hopper_load_floats<QUERIES>(shared.offset[stage], args.offset, row + query, full);
            full = shared.dout_ring.refill(i, Traits::Q_TILE + (int)sizeof shared.delta[0]);
            hopper_load_tile<D, QUERIES>(shared.dout[stage], args.dout, t.b, t.h, query, full);
            hopper_load_floats<QUERIES>(shared.delta[stage], args.delta, row + query, full);
            i++;
        } while (++m <= t.edge);
    }
}

template <int D>
static __global__ void __launch_bounds__(HopperDkdv<D>::THREADS, 1)
    hopper_dkdv_kernel(const __grid_constant__ HopperBackwardArgs args) {
#if HOPPER_CODE
    using Traits = HopperDkdv<D>;
    constexpr int WARPGROUPS = Traits::WARPGROUPS, STAGES = Traits::STAGES, QUERIES = Traits::QUERIES, N = QUERIES / 2;
    extern __shared__ __align__(1024) unsigned char memory[];
    HopperDkdvShared<D> &shared = *reinterpret_cast<HopperDkdvShared<D> *>(memory);
    const AcpBackward &p = args.p;
    const AcpInputs &in = p.in;
    if (threadIdx.x == 0) {
        shared.tiles.init(HOPPER_WARPGROUP * WARPGROUPS);
        shared.q_ring.init(4 * WARPGROUPS);
        shared.dout_ring.init(4 * WARPGROUPS);
        hopper_barriers_ready();
    }
    acp_begin();
    __syncthreads();

    int group = hopper_uniform(threadIdx.x / HOPPER_WARPGROUP);
    if (group == WARPGROUPS) {
        hopper_fewer_registers<Traits::COPY_REGISTERS>();
        if (threadIdx.x % HOPPER_WARPGROUP == 0) {
            hopper_dkdv_copies<D>(args, shared);
        }
        return;
    }
    hopper_more_registers<Traits::REGISTERS>();
    for (int j = 0;; j++) {
        const HopperTile &t = shared.tiles.await_told(j);
        if (t.bh < 0) {
            break;
        }
        const int bh = hopper_uniform(t.bh), k0 = hopper_uniform(t.start);
        unsigned char *own_k = shared.k[j % Traits::BUFFERS] + group * 64 * 128,
                      *own_v = shared.v[j % Traits::BUFFERS] + group * 64 * 128;
        const float root = acp_root<D>(), scale = (float)ACP_LOG2E * root;
        const float2 *base = p.saved.base + (int64_t)bh * in.blocks;
        int thread = threadIdx.x % HOPPER_WARPGROUP, lane = thread % 32;
        int row0 = k0 + group * 64,
            row = thread / 32 * 16 + lane / 4; /* this thread's keys: row0 + row, and 8 further */
        bool inside = row0 < in.T;
        /* what is looked up, all on its way before the first is waited for */
        int own_last = hopper_last_step<D>(p, bh, row0);
        const float2 own_base = base[inside ? row0 / ACP_BLOCK : 0];
        const float *lifts = p.saved.lift + (int64_t)bh * in.blocks * ACP_BLOCK + (inside ? row0 + row : 0);
        const float lift[2] = {lifts[0], lifts[8]};
        int m = k0 / QUERIES, first = m - hopper_uniform(t.step); /* queries m: step m - first of the rings */
        int end = hopper_uniform(t.edge);
        int own_end = m - 1; /* when its keys lie beyond the end */
        uint32_t k = hopper_operand(hopper_shared(own_k), Traits::PANEL);
        uint32_t v = hopper_operand(hopper_shared(own_v), Traits::PANEL);
        uint32_t q = hopper_operand(hopper_shared(shared.q), Traits::Q_PANEL);
        uint32_t dout = hopper_operand(hopper_shared(shared.dout), Traits::Q_PANEL);
        float even[N], odd[N], dp[N], dk[D / 2], dv[D / 2], sum[2] = {0, 0};
        uint32_t weights[N / 2], ds[N / 2], k_rows[16];
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            dk[i] = 0;
            dv[i] = 0;
        }
        auto skip = [&](int m) {
            shared.q_ring.skip(m - first);
            shared.dout_ring.skip(m - first);
        };
        auto add_dk = [&](int m) {
            hopper_products_begin();
            hopper_product_ab<QUERIES>(dk, ds, q + (m - first) % STAGES * hopper_apart(Traits::Q_TILE));
            hopper_products_commit();
        };
        auto finish_dk = [&](int m) {
            hopper_hold(dk);
            hopper_hold(ds);
            add_dk(m);
            hopper_products_wait<0>();
            hopper_hold(dk);
            hopper_hold(ds);
            shared.q_ring.release(m - first);
        };
        auto start_s = [&](auto &acc, int m) {
            shared.q_ring.await(m - first);
            hopper_start_abt<D, Traits::KEYS, QUERIES, Traits::KEEP>(
                acc, k, k_rows, q + (m - first) % STAGES * hopper_apart(Traits::Q_TILE));
        };
        /* Some queries: P and dV, dS; with the product dK of the step before under way (`behind`). Ahead, s is there at
         * the start, and S of the step after is computed into `after`; behind the last, once more its own. */
        auto step = [&](int m, auto &s, auto &after, auto diagonal, auto behind) {
            int stage = (m - first) % STAGES;
            float shift = acp_shift(base[m * QUERIES / ACP_BLOCK], own_base),
                  key[2] = {lift[0] + shift, lift[1] + shift};
            const float *offsets = shared.offset[stage] + lane % 4 * 2, *deltas = shared.delta[stage] + lane % 4 * 2;
            if (!Traits::AHEAD) {
                start_s(s, m);
                if (behind) {
                    add_dk(m - 1);
                }
            }
            shared.dout_ring.await(m - first);
            hopper_start_abt<D, Traits::KEYS, QUERIES, false>(dp, v, k_rows,
                                                              dout + stage * hopper_apart(Traits::Q_TILE));
            if (Traits::AHEAD) {
                if (behind) {
                    add_dk(m - 1);
                }
                start_s(after, min(m + 1, own_end));
            }
            float2 query[N / 4];
            hopper_columns(query, offsets);
            if (!Traits::AHEAD) {
                hopper_products_wait<1>();
                hopper_hold(s);
            }
#pragma unroll
            for (int i = 0; i < N; i += 4) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[i + e] = acp_weight(s[i + e], scale, e % 2 ? query[i / 4].y : query[i / 4].x, key[e / 2]);
                    if (diagonal && row + e / 2 * 8 > lane % 4 * 2 + i * 2 + e % 2) {
                        s[i + e] = 0;
                    }
                }
            }
            hopper_pack(weights, s);
            hopper_hold(weights);
            hopper_products_begin();
            hopper_product_ab<QUERIES>(dv, weights, dout + stage * hopper_apart(Traits::Q_TILE));
            hopper_products_commit();
            hopper_columns(query, deltas);
            hopper_products_wait<Traits::AHEAD ? 2 : 1>(); /* dP, and dK of the step before; ahead, S of the next may
                                                              run on */
            hopper_hold(dp);
            hopper_hold(ds);
            if (behind) {
                shared.q_ring.release(m - 1 - first);
            }
#pragma unroll
            for (int i = 0; i < N; i += 4) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[i + e] *= dp[i + e] - (e % 2 ? query[i / 4].y : query[i / 4].x);
                    sum[e / 2] += s[i + e];
                }
            }
            hopper_pack(ds, s);
            hopper_hold(ds);
            hopper_products_wait<0>();
            hopper_hold(dv);
            hopper_hold(weights);
            hopper_hold(after);
            shared.dout_ring.release(m - first);
        };
        shared.tiles.ring.await(j);
        if (Traits::KEEP) {
            hopper_take_rows(k_rows, hopper_shared(own_k));
        }
        for (; m < row0 / QUERIES && m <= end; m++) {
            skip(m);
        }
        if (inside) {
            using Yes = HopperFlag<true>;
            using No = HopperFlag<false>;
            if (Traits::AHEAD) {
                start_s(even, m);
                own_end = hopper_uniform(own_last);
                hopper_products_wait<0>();
                hopper_hold(even);
                step(m, even, odd, Yes(), No());
                for (m++; m < own_end; m += 2) {
                    step(m, odd, even, No(), Yes());
                    step(m + 1, even, odd, No(), Yes());
                }
                if (m == own_end) {
                    step(m, odd, even, No(), Yes());
                }
            } else {
                own_end = hopper_uniform(own_last);
                step(m, even, even, Yes(), No());
                for (m++; m <= own_end; m++) {
                    step(m, even, even, No(), Yes());
                }
            }
            finish_dk(own_end);
            m = own_end + 1;

            float roots[2] = {root, root}, ones[2] = {1, 1};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float total = acp_quad_sum(sum[i]);
                if (lane % 4 == 0) {
                    p.work.dc[(int64_t)bh * in.blocks * ACP_BLOCK + row0 + row + i * 8] = -total;
                }
            }
            hopper_store_rows<D>(dk, roots, own_k, Traits::PANEL, args.dk, t.b, t.h, row0, HOPPER_OWN + group);
            hopper_store_rows<D>(dv, ones, own_v, Traits::PANEL, args.dv, t.b, t.h, row0, HOPPER_OWN + group);
        }
        for (; m <= end; m++) {
            skip(m);
        }
        hopper_rows_stored();
        shared.tiles.release(j);
    }
#endif
}

#endif

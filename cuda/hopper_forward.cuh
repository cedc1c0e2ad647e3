/* Forgetting attention on Hopper: the forward pass of acp_attention.cuh on wgmma and TMA. Included there.
 *
 * A thread block stays and takes one tile of queries after the other: one warpgroup copies (the producer), the others
 * compute, 64 queries each.
 *
 *     producer     Q;  then, from the diagonal leftwards to the pruned edge, K (with its lift) and V of each key block
 *     warpgroups   S = Q K^T of block n;  O += P V of block n + 1, while P of block n is made;  ...  O / sum, lse
 *
 * A step issues two products together, S of block n and O += P V of block n + 1. The exponentials of block n run while the
 * second is still under way and, since the warpgroups issue in turn, under another one's products. Every warpgroup has the range of
 * its own block of queries: tiles need not be aligned to the blocks of pruning, and exactly the pairs of the ranges are
 * computed. */
#ifndef FOX_HOPPER_FORWARD_CUH
#define FOX_HOPPER_FORWARD_CUH

#include "hopper_tiles.cuh"

template <int D>
struct HopperForward {
    static constexpr int WARPGROUPS = D == 64 ? 3 : 2; /* that compute */
    static constexpr int QUERIES = 64 * WARPGROUPS, STAGES = D == 64 ? 4 : 2;
    static constexpr int THREADS = (WARPGROUPS + 1) * HOPPER_WARPGROUP;
    /* of a computing thread and of a copying one: together what all threads have at the start */
    static constexpr int REGISTERS = D == 64 ? 160 : 240, COPY_REGISTERS = D == 64 ? 32 : 24;
    static constexpr int Q_PANEL = QUERIES * 128, K_PANEL = ACP_BLOCK * 128, BUFFERS = 2; /* of queries */
};

template <int D>
struct alignas(1024) HopperForwardShared {
    using Traits = HopperForward<D>;
    unsigned char q[Traits::BUFFERS][Traits::QUERIES * D * 2]; /* then O */
    HopperKeys<D, ACP_BLOCK, Traits::STAGES> keys;
    HopperTiles<Traits::BUFFERS> tiles;
};

/* Softmax may be taken relative to anything while nothing overflows. With |s_ij| <= U, no logit exceeds the largest of
 * its row on the diagonal block by more than 2U (decay only lowers it): up to this U, a row's sum stays below T exp(2U)
 * < 1e33. No running maximum is needed then; finding it costs as much as the exponentials. */
enum { HOPPER_FIXED = 30 };

struct HopperForwardArgs {
    CUtensorMap q, k, v, o, lift;
    AcpForward p;
};

template <int D>
static inline HopperForwardArgs hopper_forward_args(const AcpShape *shape, const AcpForward &p) {
    int B = shape->B, T = shape->T, H = shape->H;
    return {hopper_tensor_map(p.in.q, B, T, H, D, p.in.stride),
            hopper_tensor_map(p.in.k, B, T, H, D, p.in.stride),
            hopper_tensor_map(p.in.v, B, T, H, D, p.in.stride),
            hopper_tensor_map(p.o, B, T, H, D, (int64_t)H * D),
            hopper_vector_map(p.saved.lift, (int64_t)B * H * p.in.blocks * ACP_BLOCK),
            p};
}

/* P = exp2(t + offset), in place; adds to the row sums. */
template <int N>
static __device__ __forceinline__ void hopper_weights(float (&s)[N], const float offset[2], float sum[2]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        s[i] = acp_exp2(s[i] + offset[0]);
        s[i + 1] = acp_exp2(s[i + 1] + offset[0]);
        s[i + 2] = acp_exp2(s[i + 2] + offset[1]);
        s[i + 3] = acp_exp2(s[i + 3] + offset[1]);
        sum[0] += s[i] + s[i + 1];
        sum[1] += s[i + 2] + s[i + 3];
    }
}

/* Logits become t = s scale + lift_j, in units of log 2; masked where the key is after the query; high, if HIGH: the
 * largest of both rows, over the lanes that share them. */
template <bool MASKED, bool HIGH, int N>
static __device__ __forceinline__ void hopper_decay(float (&s)[N], const float *lift, float scale, int row, int column,
                                                    float high[2]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float2 key = *reinterpret_cast<const float2 *>(lift + i * 2);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[i + e] = fmaf(s[i + e], scale, e % 2 ? key.y : key.x);
            if (MASKED && column + i * 2 + e % 2 > row + e / 2 * 8) {
                s[i + e] = -INFINITY;
            }
            if (HIGH) {
                high[e / 2] = fmaxf(high[e / 2], s[i + e]);
            }
        }
    }
    if (HIGH) {
        high[0] = acp_quad_max(high[0]);
        high[1] = acp_quad_max(high[1]);
    }
}

/* Last key block of the tile of queries that begins at `query`. */
template <int D>
static __device__ __forceinline__ int hopper_last_block(const AcpInputs &in, int query) {
    return (min(in.T, query + HopperForward<D>::QUERIES) - 1) / ACP_BLOCK;
}

/* The producer, one thread: takes tile after tile, tells the others, and copies what they need, as far ahead as rings reach. */
template <int D>
static __device__ __forceinline__ void hopper_forward_copies(const HopperForwardArgs &args, HopperForwardShared<D> &shared) {
    using Traits = HopperForward<D>;
    const AcpInputs &in = args.p.in;
    const AcpSaved &saved = args.p.saved;
    for (int j = 0, step = 0;; j++) {
        HopperTile t = shared.tiles.take(in, saved.order[0], saved.next, Traits::QUERIES);
        t.edge = t.bh < 0 ? 0 : saved.first[t.bh * in.blocks + t.start / ACP_BLOCK];
        t.step = step;
        shared.tiles.tell(j, t);
        if (t.bh < 0) {
            return;
        }
        hopper_load_tile<D, Traits::QUERIES>(shared.q[j % Traits::BUFFERS], args.q, t.b, t.h, t.start,
                                             shared.tiles.ring.announce(j, sizeof shared.q[0]));
        step = shared.keys.copy(args.k, args.v, args.lift, t.b, t.h, t.bh * in.blocks * ACP_BLOCK, t.edge,
                                hopper_last_block<D>(in, t.start), step);
    }
}

template <int D>
static __global__ void __launch_bounds__(HopperForward<D>::THREADS, 1)
    hopper_forward_kernel(const __grid_constant__ HopperForwardArgs args) {
#if HOPPER_CODE
    using Traits = HopperForward<D>;
    constexpr int WARPGROUPS = Traits::WARPGROUPS, STAGES = Traits::STAGES, TILE = ACP_BLOCK * D * 2;
    extern __shared__ __align__(1024) unsigned char memory[];
    HopperForwardShared<D> &shared = *reinterpret_cast<HopperForwardShared<D> *>(memory);
    const AcpInputs &in = args.p.in;
    const AcpSaved &saved = args.p.saved;
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
            hopper_forward_copies<D>(args, shared);
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
        unsigned char *own_q = shared.q[j % Traits::BUFFERS] + group * 64 * 128;
        const float scale = (float)ACP_LOG2E * acp_root<D>();
        const float2 *base = saved.base + (int64_t)bh * in.blocks;
        int thread = threadIdx.x % HOPPER_WARPGROUP, lane = thread % 32, warp = thread / 32;
        int row0 = q0 + group * 64, row = row0 + warp * 16 + lane / 4;
        bool inside = row0 < in.T;
        int block = inside ? row0 / ACP_BLOCK : 0;
        /* what is looked up, all on its way before the first is waited for */
        int own_first = saved.first[bh * in.blocks + block];
        const float2 own_base = base[block];
        bool fixed = saved.bound[bh] <= (float)HOPPER_FIXED;
        int n = hopper_last_block<D>(in, q0), last = hopper_uniform(t.step) + n; /* block n: step last - n of the rings */
        int begin = hopper_uniform(t.edge);
        /* this warpgroup's key blocks begin at the top; there are none when its queries lie beyond the end */
        int top = inside ? block : begin - 1;
        auto skip = [&](int n) {
            turns.take();
            turns.pass();
            shared.keys.skip(last - n);
        };
        uint32_t q = hopper_operand(hopper_shared(own_q), Traits::Q_PANEL);
        uint32_t k = hopper_operand(hopper_shared(shared.keys.k), Traits::K_PANEL),
                 v = hopper_operand(hopper_shared(shared.keys.v), Traits::K_PANEL);
        shared.tiles.ring.await(j);
        for (; n > top; n--) {
            skip(n);
        }
        if (inside) {
            float s[64], o[D / 2], high[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
            uint32_t p[32];
            /* The block on the diagonal. half: all queries come before the second half of its keys. */
            auto diagonal = [&](auto half) {
                constexpr int SEEN = half ? 32 : 64; /* of s, of this thread */
                auto &seen = reinterpret_cast<float(&)[SEEN]>(s);
                int stage = (last - n) % STAGES;
                shared.keys.k_ring.await(last - n);
                turns.take();
                hopper_products_begin();
                hopper_product_abt<D, Traits::QUERIES, ACP_BLOCK>(seen, q, k + stage * hopper_apart(TILE));
                hopper_products_commit();
                turns.pass();
                hopper_products_wait<0>();
                hopper_hold(seen);
                hopper_decay<true, true>(seen, shared.keys.lift[stage] + lane % 4 * 2, scale, row,
                                         n * ACP_BLOCK + lane % 4 * 2, high);
                shared.keys.k_ring.release(last - n);
                float offset[2] = {-high[0], -high[1]};
                hopper_weights(seen, offset, sum);
#pragma unroll
                for (int i = SEEN; i < 64; i++) {
                    s[i] = 0;
                }
                hopper_pack(p, s);
            };
            if (row0 % ACP_BLOCK == 0) {
                diagonal(HopperFlag<true>());
            } else {
                diagonal(HopperFlag<false>());
            }
#pragma unroll
            for (int i = 0; i < D / 2; i++) {
                o[i] = 0;
            }
            /* One key block; `fixed`: relative to the largest logit of the block on the diagonal, not of all so far. */
            auto step = [&](auto fixed) {
                int stage = (last - n) % STAGES, behind = (last - n - 1) % STAGES;
                float shift = acp_shift(own_base, base[n]);
                shared.keys.k_ring.await(last - n);
                turns.take();
                hopper_hold(o);
                hopper_hold(p);
                hopper_products_begin();
                hopper_product_abt<D, Traits::QUERIES, ACP_BLOCK>(s, q, k + stage * hopper_apart(TILE));
                hopper_products_commit();
                shared.keys.v_ring.await(last - n - 1);
                hopper_products_begin();
                hopper_product_ab<ACP_BLOCK>(o, p, v + behind * hopper_apart(TILE));
                hopper_products_commit();
                turns.pass();
                hopper_products_wait<1>();
                hopper_hold(s);
                float offset[2] = {shift - high[0], shift - high[1]}, fade[2] = {1, 1},
                      reach[2] = {-INFINITY, -INFINITY};
                hopper_decay<false, !fixed>(s, shared.keys.lift[stage] + lane % 4 * 2, scale, 0, 0, reach);
                shared.keys.k_ring.release(last - n);
                if (!fixed) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float raised = fmaxf(high[i], reach[i] + shift);
                        fade[i] = acp_exp2(high[i] - raised);
                        high[i] = raised;
                        offset[i] = shift - raised;
                        sum[i] *= fade[i];
                    }
                }
                hopper_weights(s, offset, sum);
                hopper_hold(s);
                hopper_products_wait<0>();
                hopper_hold(o);
                hopper_hold(p);
                shared.keys.v_ring.release(last - n - 1);
                if (!fixed) {
#pragma unroll
                    for (int i = 0; i < D / 2; i++) {
                        o[i] *= fade[i / 2 % 2];
                    }
                }
                hopper_pack(p, s);
            };
            int bottom = hopper_uniform(own_first); /* looked up meanwhile */
            if (fixed) {
                for (n--; n >= bottom; n--) {
                    step(HopperFlag<true>());
                }
            } else {
                for (n--; n >= bottom; n--) {
                    step(HopperFlag<false>());
                }
            }
            float lift[2]; /* of this thread's queries, on its way during the last product */
#pragma unroll
            for (int i = 0; i < 2; i++) {
                lift[i] = saved.lift[(int64_t)bh * in.blocks * ACP_BLOCK + row + i * 8];
            }
            shared.keys.v_ring.await(last - n - 1);
            hopper_hold(o);
            hopper_hold(p);
            hopper_products_begin();
            hopper_product_ab<ACP_BLOCK>(o, p, v + (last - n - 1) % STAGES * hopper_apart(TILE));
            hopper_products_commit();
            hopper_products_wait<0>();
            hopper_hold(o);
            shared.keys.v_ring.release(last - n - 1);

#pragma unroll
            for (int i = 0; i < 2; i++) {
                float total = acp_quad_sum(sum[i]);
                int query = row + i * 8;
                if (lane % 4 == 0 && query < in.T) {
                    args.p.lse[(int64_t)bh * in.T + query] = (float)ACP_LN2 * ((high[i] - lift[i]) + log2f(total));
                }
                sum[i] = 1.0f / total;
            }
            hopper_store_rows<D>(o, sum, own_q, Traits::Q_PANEL, args.o, t.b, t.h, row0, HOPPER_OWN + group);
        }
        for (; n >= begin; n--) {
            skip(n);
        }
        hopper_rows_stored();
        shared.tiles.release(j);
    }
#endif
}

#endif

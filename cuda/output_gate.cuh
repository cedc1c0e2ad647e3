/* Between attention and its output projection (Pro), per token and head:
 *
 *     forward    y = o * rstd * w (y = o without output norm),  out = y * sigmoid(gate) (out = y without output gate)
 *     backward   dy = dout * s,  dgate = dout * y * s * (1 - s),  s = sigmoid(gate)
 *                d_o = rstd * (dy * w - xhat * mean(dy * w * xhat)),  xhat = o * rstd
 *                dw += sum over tokens of dy * xhat
 *
 * o, out and their gradients: bf16 [N, H*D]; the gate lies in the packed product of the layer. Eight columns a lane,
 * one pass: forward moves 6 bytes per token and column, backward 10. */
#ifndef FOX_CUDA_OUTPUT_GATE_CUH
#define FOX_CUDA_OUTPUT_GATE_CUH

#include "heads.cuh"
#include "partials.cuh"

enum { GATE_TOKENS = 2 }; /* in flight in a block of the forward pass */

/* gate: the column's place in row 0 of the packed product, NULL without output gate. */
static __global__ void __launch_bounds__(HEAD_THREADS)
    output_gate_forward_kernel(bf16 *out, float *rstd, const bf16 *o, const bf16 *gate, int row, const float *w,
                               int64_t N, int H, int D, int lanes, float eps) {
    HeadLane at = head_lane(lanes, H, D);
    int64_t first = (int64_t)blockIdx.x * GATE_TOKENS;
    Bf16x8 raw[GATE_TOKENS], raw_gate[GATE_TOKENS];
    float weight[8] = {};
#pragma unroll
    for (int r = 0; r < GATE_TOKENS; r++) {
        bool wanted = at.active && first + r < N;
        raw[r] = load_raw8(o + (first + r) * H * D + at.column, wanted);
        raw_gate[r] = load_raw8(gate + (first + r) * row + at.column, wanted && gate != NULL);
    }
    if (w != NULL && at.active) {
        load8(weight, w + at.column);
    }
#pragma unroll
    for (int r = 0; r < GATE_TOKENS; r++) {
        bool wanted = at.active && first + r < N;
        float x[8];
        unpack8(x, raw[r]);
        if (w != NULL) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum += x[i] * x[i];
            }
            float scale = 1.0f / sqrtf(team_sum(sum, lanes) / (float)D + eps);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                x[i] *= scale * weight[i];
            }
            if (at.leader && wanted) {
                rstd[(first + r) * H + at.head] = scale;
            }
        }
        if (gate != NULL) {
            float g[8];
            unpack8(g, raw_gate[r]);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                x[i] *= device_sigmoid(g[i]);
            }
        }
        if (wanted) {
            store8(out + (first + r) * H * D + at.column, x);
        }
    }
}

struct GateToken {
    Bf16x8 dout, o, gate;
    float rstd;
};

/* Tokens blockIdx.x, + gridDim.x, ..; the block's sums of dw go to its row of partials. */
static __global__ void __launch_bounds__(HEAD_THREADS)
    output_gate_backward_kernel(bf16 *d_o, bf16 *dgate, float *partials, const bf16 *dout, const bf16 *o,
                                const float *rstd, const bf16 *gate, int row, const float *w, int64_t N, int H, int D,
                                int lanes) {
    HeadLane at = head_lane(lanes, H, D);
    float weight[8] = {}, dw[8] = {};
    if (w != NULL && at.active) {
        load8(weight, w + at.column);
    }
    auto load = [&](int64_t n) { /* one token ahead of the arithmetic */
                                 bool wanted = at.active && n < N;
                                 int64_t place = n * H * D + at.column;
                                 return GateToken{load_raw8(dout + place, wanted), load_raw8(o + place, wanted),
                                                  load_raw8(gate + n * row + at.column, wanted && gate != NULL),
                                                  w != NULL && wanted ? rstd[n * H + at.head] : 1};
    };
    GateToken next = load(blockIdx.x);
    for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
        int64_t place = n * H * D + at.column;
        float x[8], dy[8], g[8], scale = next.rstd;
        unpack8(dy, next.dout);
        unpack8(x, next.o);
        unpack8(g, next.gate);
        next = load(n + gridDim.x);
        if (gate != NULL) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float s = device_sigmoid(g[i]), y = w != NULL ? x[i] * scale * weight[i] : x[i];
                g[i] = dy[i] * y * s * (1 - s);
                dy[i] *= s;
            }
            if (at.active) {
                store8(dgate + n * row + at.column, g);
            }
        }
        if (w != NULL) {
            float dot = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                dw[i] += dy[i] * x[i] * scale;
                dy[i] *= weight[i];
                dot += dy[i] * x[i];
            }
            dot = team_sum(dot, lanes) * scale * scale / (float)D;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                dy[i] = scale * (dy[i] - x[i] * dot);
            }
        }
        if (at.active) {
            store8(d_o + place, dy);
        }
    }
    if (w != NULL && at.active) {
        store8(partials + (int64_t)blockIdx.x * H * D + at.column, dw);
    }
}

/* ---- launchers ---- */

/* Blocks of the backward pass: no more rows of partials than cuda_norm_scratch(d) holds, which knows d alone. */
static inline int output_gate_parts(int d) {
    return partial_count((int)fox_round_up(d / 8, 32));
}

void cuda_output_gate_forward(bf16 *out, float *rstd, const bf16 *o, const bf16 *packed, const PackedLayout *layout,
                              const float *w, int64_t N, int H, int D, float eps, cudaStream_t stream) {
    CUDA_REQUIRE(w != NULL || layout->ogate >= 0, "there is neither an output norm nor an output gate");
    CUDA_REQUIRE(layout->ogate < 0 || (layout->ogate % 8 == 0 && layout->row % 8 == 0),
                 "the gate must start at a multiple of 8");
    HeadGrid heads = head_grid(H, D);
    dim3 grid((unsigned)((N + GATE_TOKENS - 1) / GATE_TOKENS), (unsigned)heads.groups);
    const bf16 *gate = layout->ogate < 0 ? NULL : packed + layout->ogate;
    output_gate_forward_kernel<<<grid, heads.threads, 0, stream>>>(out, rstd, o, gate, layout->row, w, N, H, D,
                                                                   heads.lanes, eps);
    CUDA_CHECK_LAUNCH();
}

void cuda_output_gate_backward(bf16 *d_o, bf16 *dpacked, float *dw, float *scratch, const bf16 *dout, const bf16 *o,
                               const float *rstd, const bf16 *packed, const PackedLayout *layout, const float *w,
                               int64_t N, int H, int D, cudaStream_t stream) {
    CUDA_REQUIRE(w != NULL || layout->ogate >= 0, "there is neither an output norm nor an output gate");
    CUDA_REQUIRE(layout->ogate < 0 || (layout->ogate % 8 == 0 && layout->row % 8 == 0),
                 "the gate must start at a multiple of 8");
    HeadGrid heads = head_grid(H, D);
    int parts = output_gate_parts(H * D);
    const bf16 *gate = layout->ogate < 0 ? NULL : packed + layout->ogate;
    bf16 *dgate = layout->ogate < 0 ? NULL : dpacked + layout->ogate;
    dim3 grid((unsigned)parts, (unsigned)heads.groups);
    output_gate_backward_kernel<<<grid, heads.threads, 0, stream>>>(d_o, dgate, scratch, dout, o, rstd, gate,
                                                                    layout->row, w, N, H, D, heads.lanes);
    CUDA_CHECK_LAUNCH();
    if (w != NULL) {
        sum_partials(dw, scratch, parts, H * D, stream);
    }
}

#endif

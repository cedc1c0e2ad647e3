/* From the packed product to what attention sees, and back (FoX paper, sections 3 and 4).
 *
 *     z = q, k, v columns of packed [N, row]
 *     shift (k, v)             m[t] = a[t] z[t-1] + (1 - a[t]) z[t],  a = sigmoid(logit), z[-1] = 0
 *     norm (q, k), per head    y = m * rstd * w,  rstd = 1 / sqrt(mean(m^2) + 1e-5);  then RoPE (q, k, baseline only)
 *     forget gate              log f[b, h, t] = logsigmoid(logit + bias)
 *
 * backward, with g[t] the gradient of m[t]:
 *     g = rstd (dy w - mhat mean(dy w mhat)),  dw += sum over tokens of dy mhat,  mhat = m * rstd
 *     dz[t] = (1 - a[t]) g[t] + a[t+1] g[t+1],  dlogit[t] = a (1 - a) sum_i g[t] (z[t-1] - z[t])
 *
 * The three parts q, k, v never meet, so each is a block of its own (blockIdx.x % 3), with the same code and a row of a
 * table (QkvPart) for what differs. A block is one row of heads (heads.cuh) that walks down its stretch of tokens with
 * the previous token in registers; the backward walk writes dz[t-1] once g[t] is known, and goes one token past its end
 * for the last. Forward moves 12 bytes per token and column of q, backward 18. */
#ifndef FOX_CUDA_QKV_CUH
#define FOX_CUDA_QKV_CUH

#include "heads.cuh"
#include "partials.cuh"

enum { QKV_TOKENS = 16 }; /* of a block of the forward pass */

/* Turns per token of each pair of columns, base^(-2i/D) / (2 pi); in double: a float is off by 0.01 at 131072. */
struct RopeTable {
    double turns[128];
};

struct QkvPart {
    int column;        /* of the first head in a packed row */
    int logit;         /* column of the first head's logit: of the shift (k, v) or the forget gate (q); -1: none */
    const float *norm; /* weights or NULL */
    float *rstd;       /* [N, H] */
    bf16 *y;           /* [N, d]: the result, or in backward its gradient */
    float *partials;   /* backward: [parts, d] of the norm's weights */
};

/* Everything a launch needs besides the big pointers. */
struct QkvTask {
    QkvPart part[3];  /* q, k, v */
    int columns, row; /* of the packed layout */
    const float *fgate_bias;
    bool shared; /* one norm weight for all heads */
    int N, T, H, D, lanes;
    int tokens; /* of a block */
};

/* Turns the pairs (x[i], x[i + D/2]) of a head by position * base^(-2i/D); direction -1 turns back. */
static __device__ __forceinline__ void rotate_head(float x[8], const RopeTable &table, const HeadLane &at, int D,
                                                   int lanes, int position, float direction) {
    bool low = at.within < D / 2;
    int from = threadIdx.x % 32 / lanes * lanes + (low ? at.within + D / 2 : at.within - D / 2) / 8 % lanes;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float partner = __shfl_sync(0xffffffffu, x[i], from), sine, cosine;
        double turns = position * table.turns[(at.within + i) % (D / 2)];
        sincospif(2 * (float)(turns - rint(turns)), &sine, &cosine);
        x[i] = x[i] * cosine + (low ? -direction : direction) * partner * sine;
    }
}

static __device__ __forceinline__ float log_sigmoid(float x) {
    return fminf(x, 0.0f) - log1pf(expf(-fabsf(x)));
}

/* Place of (sequence, head, t) in an array [B, H, T], for a head, token by token. */
static __device__ __forceinline__ int64_t log_f_next(int64_t place, int t, const QkvTask &task) {
    return place + 1 + (t + 1 < task.T ? 0 : (int64_t)(task.H - 1) * task.T);
}

/* What a token brings; loaded one token ahead, so that its way through memory hides behind the arithmetic. */
struct QkvToken {
    Bf16x8 z, dy;
    float logit, rstd, dlog_f;
};

static __device__ __forceinline__ float load_logit(const bf16 *packed_row, const QkvPart &part, const HeadLane &at,
                                                   bool wanted) {
    return wanted && at.active && part.logit >= 0 ? __bfloat162float(packed_row[part.logit + at.head]) : 0;
}

template <int PART, bool ROPE>
static __device__ __forceinline__ void qkv_forward_part(float *log_f, const bf16 *packed, const QkvTask &task,
                                                        const RopeTable &table) {
    HeadLane at = head_lane(task.lanes, task.H, task.D);
    const QkvPart &part = task.part[PART];
    const bool shifts = PART != 0 && part.logit >= 0, norms = PART != 2 && part.norm != NULL;
    int first = blockIdx.x / 3 * task.tokens, end = min(first + task.tokens, task.N), t = first % task.T,
        d = task.H * task.D;
    int64_t place = ((int64_t)(first / task.T) * task.H + at.head) * task.T + t;
    bool gate = PART == 0 && at.leader;
    float weight[8] = {}, bias = gate && part.logit >= 0 ? task.fgate_bias[at.head] : 0;
    const bf16 *row = packed + (int64_t)first * task.row;
    Bf16x8 before = load_raw8(row - task.row + part.column + at.column, at.active && t > 0 && shifts);
    QkvToken next;
    next.z = load_raw8(row + part.column + at.column, at.active);
    next.logit = load_logit(row, part, at, true);
    if (norms && at.active) {
        load8(weight, part.norm + (task.shared ? at.within : at.column));
    }
    for (int n = first; n < end; n++) {
        Bf16x8 here = next.z;
        float logit = next.logit, x[8];
        row += task.row;
        next.z = load_raw8(row + part.column + at.column, at.active && n + 1 < end);
        next.logit = load_logit(row, part, at, n + 1 < end);
        unpack8(x, here);
        if (shifts) {
            float a = device_sigmoid(logit), old[8];
            unpack8(old, before);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                x[i] = a * (t > 0 ? old[i] : 0) + (1 - a) * x[i];
            }
            before = here;
        }
        if (norms) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum += x[i] * x[i];
            }
            float scale = 1.0f / sqrtf(team_sum(sum, task.lanes) / (float)task.D + FOX_QK_NORM_EPS);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                x[i] *= scale * weight[i];
            }
            if (at.leader) {
                part.rstd[(int64_t)n * task.H + at.head] = scale;
            }
        }
        if (ROPE && PART != 2) {
            rotate_head(x, table, at, task.D, task.lanes, t, 1);
        }
        if (at.active) {
            store8(part.y + (int64_t)n * d + at.column, x);
        }
        if (gate) {
            log_f[place] = part.logit >= 0 ? log_sigmoid(logit + bias) : 0;
        }
        place = log_f_next(place, t, task);
        t = t + 1 < task.T ? t + 1 : 0;
    }
}

/* One grid for all three parts, block by block in turn, so that every multiprocessor has a mix of them. */
template <bool ROPE>
static __global__ void __launch_bounds__(HEAD_THREADS, 5)
    qkv_forward_kernel(float *log_f, const bf16 *packed, const __grid_constant__ QkvTask task,
                       const __grid_constant__ RopeTable table) {
    if (blockIdx.x % 3 == 0) {
        qkv_forward_part<0, ROPE>(log_f, packed, task, table);
    } else if (blockIdx.x % 3 == 1) {
        qkv_forward_part<1, ROPE>(log_f, packed, task, table);
    } else {
        qkv_forward_part<2, ROPE>(log_f, packed, task, table);
    }
}

/* Token n of a part for the backward pass; zeros where not wanted. */
static __device__ __forceinline__ QkvToken load_token(const QkvTask &task, const QkvPart &part, const HeadLane &at,
                                                      const bf16 *packed, const float *dlog_f, int n, bool wanted) {
    QkvToken token;
    const bf16 *row = packed + (int64_t)n * task.row;
    token.z = load_raw8(row + part.column + at.column, at.active && wanted);
    token.dy = load_raw8(part.y + (int64_t)n * task.H * task.D + at.column, at.active && wanted);
    token.logit = load_logit(row, part, at, wanted);
    token.rstd = at.active && wanted && part.norm != NULL ? part.rstd[(int64_t)n * task.H + at.head] : 0;
    token.dlog_f = at.leader && wanted && dlog_f != NULL ? *dlog_f : 0;
    return token;
}

/* y of a part holds dy. dlog_f: NULL without forget gate. bias_partials: [parts, H]. */
template <int PART, bool ROPE>
static __device__ __forceinline__ void qkv_backward_part(bf16 *dpacked, float *bias_partials, const float *dlog_f,
                                                         const bf16 *packed, const QkvTask &task,
                                                         const RopeTable &table) {
    HeadLane at = head_lane(task.lanes, task.H, task.D);
    const QkvPart &part = task.part[PART];
    const bool gate = PART == 0, shifts = PART != 0 && part.logit >= 0, norms = PART != 2 && part.norm != NULL;
    int first = blockIdx.x / 3 * task.tokens, end = min(first + task.tokens, task.N), t = first % task.T,
        d = task.H * task.D;
    float carry[8] = {}, dw[8] = {}, dbias = 0,
          bias = gate && at.leader && part.logit >= 0 ? task.fgate_bias[at.head] : 0;
    const float *norm = part.norm + (task.shared ? at.within : at.column);
    const float *dlog =
        gate && dlog_f != NULL ? dlog_f + ((int64_t)(first / task.T) * task.H + at.head) * task.T + t : NULL;
    Bf16x8 before = load_raw8(packed + ((int64_t)first - 1) * task.row + part.column + at.column,
                              at.active && t > 0 && first < end && shifts);
    QkvToken next = load_token(task, part, at, packed, dlog, first, first < end);
    for (int n = first; n <= end && first < end; n++) {
        QkvToken token = next;
        int t_next = t + 1 < task.T ? t + 1 : 0;
        if (dlog != NULL) {
            dlog += log_f_next(0, t, task);
        }
        next = load_token(task, part, at, packed, dlog, n + 1, n + 1 < end || (n + 1 == end && shifts && t_next > 0));
        float g[8], m[8], z[8], a = shifts ? device_sigmoid(token.logit) : 0;
        unpack8(g, token.dy);
        unpack8(z, token.z);
        unpack8(m, before);
        before = token.z;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            m[i] = (shifts && t > 0 ? m[i] : 0) - z[i]; /* z[t-1] - z[t] */
        }
        if (ROPE && PART != 2) {
            rotate_head(g, table, at, task.D, task.lanes, t, -1);
        }
        if (norms) {
            float dot = 0, weight[8] = {}, counts = n < end ? token.rstd : 0;
            if (at.active) {
                load8(weight, norm);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float mixed = z[i] + a * m[i];
                dw[i] += g[i] * mixed * counts;
                g[i] *= weight[i];
                dot += g[i] * mixed;
            }
            dot = team_sum(dot, task.lanes) * token.rstd * token.rstd / (float)task.D;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                g[i] = token.rstd * (g[i] - (z[i] + a * m[i]) * dot);
            }
        }
        if (at.active && n > first) {
            float spill = t > 0 ? a : 0; /* of this token's gradient to the one before it */
#pragma unroll
            for (int i = 0; i < 8; i++) {
                carry[i] += spill * g[i];
            }
            store8(dpacked + (int64_t)(n - 1) * task.row + part.column + at.column, carry);
        }
        if (n == end) {
            break;
        }
        bf16 *drow = dpacked + (int64_t)n * task.row;
        if (shifts) {
            float dot = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                dot += g[i] * m[i];
            }
            dot = team_sum(dot, task.lanes);
            if (at.leader) {
                drow[part.logit + at.head] = __float2bfloat16(a * (1 - a) * dot);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            carry[i] = (1 - a) * g[i];
        }
        if (gate && at.leader && part.logit >= 0) {
            float grad = token.dlog_f / (1.0f + expf(token.logit + bias));
            drow[part.logit + at.head] = __float2bfloat16(grad);
            dbias += grad;
        }
        if (gate && blockIdx.y == 0) { /* padding */
            for (int c = task.columns + threadIdx.x; c < task.row; c += blockDim.x) {
                drow[c] = __float2bfloat16(0.0f);
            }
        }
        t = t_next;
    }
    if (norms && at.active) {
        store8(part.partials + (int64_t)(blockIdx.x / 3) * d + at.column, dw);
    }
    if (gate && at.leader) {
        bias_partials[(int64_t)(blockIdx.x / 3) * task.H + at.head] = dbias;
    }
}

template <bool ROPE>
static __global__ void __launch_bounds__(HEAD_THREADS, 3)
    qkv_backward_kernel(bf16 *dpacked, float *bias_partials, const float *dlog_f, const bf16 *packed,
                        const __grid_constant__ QkvTask task, const __grid_constant__ RopeTable table) {
    if (blockIdx.x % 3 == 0) {
        qkv_backward_part<0, ROPE>(dpacked, bias_partials, dlog_f, packed, task, table);
    } else if (blockIdx.x % 3 == 1) {
        qkv_backward_part<1, ROPE>(dpacked, bias_partials, dlog_f, packed, task, table);
    } else {
        qkv_backward_part<2, ROPE>(dpacked, bias_partials, dlog_f, packed, task, table);
    }
}

/* ---- launchers ---- */

/* The parts' columns, weights and results; statistics and gradients of the norms are the caller's to add. */
static inline QkvTask qkv_task(const PackedLayout *layout, const QkvWeights *weights, const FoxConfig *config,
                               const HeadGrid *heads, const bf16 *q, const bf16 *k, const bf16 *v, const float *q_rstd,
                               const float *k_rstd, int B, int T) {
    CUDA_REQUIRE(layout->q % 8 == 0 && layout->k % 8 == 0 && layout->v % 8 == 0 && layout->row % 8 == 0,
                 "q, k, v and the rows of the packed product must start at multiples of 8");
    CUDA_REQUIRE((int64_t)B * T < (int64_t)1 << 30, "too many tokens at once");
    QkvTask task;
    memset(&task, 0, sizeof task);
    task.part[0] = {layout->q, layout->fgate, weights->q_norm, (float *)q_rstd, (bf16 *)q, NULL};
    task.part[1] = {layout->k, layout->k_shift, weights->k_norm, (float *)k_rstd, (bf16 *)k, NULL};
    task.part[2] = {layout->v, layout->v_shift, NULL, NULL, (bf16 *)v, NULL};
    task.columns = layout->columns;
    task.row = layout->row;
    task.fgate_bias = weights->fgate_bias;
    task.shared = config->qk_norm_share_param_across_head;
    task.N = B * T;
    task.T = T;
    task.H = config->num_heads;
    task.D = config->hidden_size / config->num_heads;
    task.lanes = heads->lanes;
    return task;
}

static inline RopeTable rope_table(const FoxConfig *config) {
    RopeTable table;
    int D = config->hidden_size / config->num_heads;
    memset(&table, 0, sizeof table);
    for (int i = 0; i < D / 2 && config->use_rope; i++) {
        table.turns[i] = pow(config->rope_base, -2.0 * i / D) / 6.283185307179586;
    }
    return table;
}

static inline HeadGrid qkv_heads(const FoxConfig *config) {
    return head_grid(config->num_heads, config->hidden_size / config->num_heads);
}

static inline int qkv_parts(const FoxConfig *config) {
    HeadGrid heads = qkv_heads(config);
    return partial_count(heads.threads * heads.groups);
}

void cuda_qkv_forward(bf16 *q, bf16 *k, bf16 *v, float *q_rstd, float *k_rstd, float *log_f, const bf16 *packed,
                      const PackedLayout *layout, const QkvWeights *weights, const FoxConfig *config, int B, int T,
                      cudaStream_t stream) {
    HeadGrid heads = qkv_heads(config);
    QkvTask task = qkv_task(layout, weights, config, &heads, q, k, v, q_rstd, k_rstd, B, T);
    task.tokens = QKV_TOKENS;
    dim3 grid((unsigned)((task.N + QKV_TOKENS - 1) / QKV_TOKENS * 3), (unsigned)heads.groups);
    auto kernel = config->use_rope ? qkv_forward_kernel<true> : qkv_forward_kernel<false>;
    kernel<<<grid, heads.threads, 0, stream>>>(log_f, packed, task, rope_table(config));
    CUDA_CHECK_LAUNCH();
}

int64_t cuda_qkv_scratch(const FoxConfig *config) {
    return (int64_t)qkv_parts(config) * (2 * config->hidden_size + fox_round_up(config->num_heads, 4));
}

void cuda_qkv_backward(bf16 *dpacked, float *dq_norm, float *dk_norm, float *dfgate_bias, float *scratch,
                       const bf16 *dq, const bf16 *dk, const bf16 *dv, const float *dlog_f, const bf16 *packed,
                       const float *q_rstd, const float *k_rstd, const PackedLayout *layout, const QkvWeights *weights,
                       const FoxConfig *config, int B, int T, cudaStream_t stream) {
    HeadGrid heads = qkv_heads(config);
    int parts = qkv_parts(config), d = config->hidden_size, H = config->num_heads;
    QkvTask task = qkv_task(layout, weights, config, &heads, dq, dk, dv, q_rstd, k_rstd, B, T);
    task.tokens = (task.N + parts - 1) / parts;
    task.part[0].partials = scratch;
    task.part[1].partials = scratch + (int64_t)parts * d;
    float *bias_partials = scratch + (int64_t)parts * 2 * d;
    auto kernel = config->use_rope ? qkv_backward_kernel<true> : qkv_backward_kernel<false>;
    dim3 grid((unsigned)parts * 3, (unsigned)heads.groups);
    kernel<<<grid, heads.threads, 0, stream>>>(dpacked, bias_partials, config->use_forget_gate ? dlog_f : NULL, packed,
                                               task, rope_table(config));
    CUDA_CHECK_LAUNCH();
    if (config->qk_norm) {
        /* A shared weight sees every head as a row of its own. */
        int groups = task.shared ? H : 1;
        sum_partials(dq_norm, task.part[0].partials, (int64_t)parts * groups, d / groups, stream);
        sum_partials(dk_norm, task.part[1].partials, (int64_t)parts * groups, d / groups, stream);
    }
    if (config->use_forget_gate) {
        sum_partials(dfgate_bias, bias_partials, parts, H, stream);
    }
}

#endif

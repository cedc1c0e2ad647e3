/* The model on a rank's GPU: the calls of fox_layers.h in the same order, on the kernels of cuda/launchers.h.
 *
 * All device memory is one block, laid out once (cuda_layout) and reported by purpose before it is taken. What a layer
 * keeps from forward to backward depends on the recompute level:
 *     0  everything
 *     1  not what is cheap to make again: the normed inputs, q k v, the gated output, the SwiGLU output
 *     2  only the residual stream before the layer
 * What is not kept lives in buffers that all layers share and is made again in backward. */
#include "exchange.h"
#include "matmul.h"

#include <ctype.h>

enum { HEAD_ROWS = 4096 }; /* rows of logits in memory at a time */
enum { PADDING = 64 };     /* columns of packed and logit rows, and rows of lm_head, are a multiple of this */

/* One layer's activations; N = B*T tokens. */
typedef struct CudaActs {
    float *x, *rstd1, *x2, *rstd2;           /* [N, d], [N]: residual stream before attention and before the MLP */
    bf16 *h1, *packed, *q, *k, *v, *o, *o_gated, *h2, *gate_up, *act;
    float *q_rstd, *k_rstd, *lse, *o_rstd; /* [N, H] */
    void *saved;                           /* of attention */
} CudaActs;

/* Gradients of one layer's activations, and what passes between layers. */
typedef struct CudaScratch {
    bf16 *branch;                       /* [N, d], output of o_proj or down_proj before it joins the residual stream */
    float *dx;                          /* [N, d] */
    bf16 *dx_bf16, *dh, *dq, *dk, *dv;  /* [N, d] */
    bf16 *d_o, *dout;                   /* [N, d] */
    bf16 *dpacked, *dgate_up, *dact;    /* [N, row], [N, 2F], [N, F] */
    float *log_f, *dlog_f;              /* [N, H] */
    float *norm, *qkv;                  /* partial sums of weight gradients */
    int32_t *embedding;
    double *squares;
    void *attention, *matmul;
} CudaScratch;

typedef struct CudaBackend {
    const Ranks *ranks;
    cudaStream_t stream;
    cudaEvent_t tokens_sent;
    char device[256];
    size_t free_bytes, free_at_first; /* when the memory was laid out; before anything was taken */
    Exchange exchange;                /* with the other ranks */
    int micro_batches;                /* of this step so far */
    Matmul matmul;
    PackedLayout packed;
    AcpShape attention;
    int padded_vocab;

    void *memory;                                     /* everything below, on the device */
    float *params; /* flat; of a sharded optimizer the front of the flat space, then this rank's share of the rest */
    float *grads;                                     /* flat */
    float *adam_m, *adam_v;                           /* this rank's share */
    bf16 *params_bf16, *grads_bf16;                   /* flat; one bucket or NULL */
    CudaActs *acts;                                   /* [L], on the host; the pointers are the device's */
    CudaScratch scratch;
    float *x_final, *rstd_final;                      /* [N, d], [N] */
    bf16 *h_final, *dh_final, *logits;                /* [N, d], [N, d], [HEAD_ROWS, padded V] */
    float *losses;                                    /* [N] */
    int32_t *tokens, *targets;                        /* [N] */
    unsigned long long *skipped, *total;              /* [L, H] */
    DeviceStats *stats;

    int32_t *pinned;                                  /* [2, N], host */
    double loss_scale;                                /* from the sum of losses to the step's mean */
    int32_t *prefix;                                  /* tokens being decoded, host */
    int prefix_length, prefix_limit;
} CudaBackend;

static CudaBackend *cuda(Backend *b) {
    return (CudaBackend *)b->self;
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Memory                                                                                                              */

/* Bytes by purpose, in the order of the report. */
typedef enum Purpose {
    FOR_PARAMETERS,
    FOR_MASTER,
    FOR_GRADIENTS,
    FOR_ADAM,
    FOR_RESIDUAL,
    FOR_ATTENTION,
    FOR_MLP,
    FOR_SHARED,
    FOR_LOGITS,
    FOR_WORKSPACE,
    FOR_EXCHANGE,
    PURPOSES
} Purpose;

static const char *const purpose_names[PURPOSES] = {
    "parameters (bf16)",     "master weights",  "gradients",         "Adam moments", "residual stream", "attention activations",
    "MLP activations", "shared activations and their gradients", "logits",       "workspace", "exchange with other ranks",
};

/* The block of memory while it is laid out; base NULL only counts. */
typedef struct Arena {
    char *base;
    int64_t used, by_purpose[PURPOSES];
} Arena;

static void *take(Arena *a, Purpose purpose, int64_t bytes) {
    char *p = a->base == NULL ? NULL : a->base + a->used;
    bytes = (bytes + 255) / 256 * 256;
    a->used += bytes;
    a->by_purpose[purpose] += bytes;
    return p;
}

static PackedLayout packed_layout(const FoxConfig *c) {
    PackedLayout p;
    int d = c->hidden_size, H = c->num_heads, at = 3 * d;
    p.q = 0;
    p.k = d;
    p.v = 2 * d;
    p.ogate = c->use_output_gate ? at : -1;
    at += c->use_output_gate ? d : 0;
    p.k_shift = c->use_k_shift ? at : -1;
    at += c->use_k_shift ? H : 0;
    p.v_shift = c->use_v_shift ? at : -1;
    at += c->use_v_shift ? H : 0;
    p.fgate = c->use_forget_gate ? at : -1;
    at += c->use_forget_gate ? H : 0;
    p.columns = at;
    p.row = (int)fox_round_up(at, PADDING);
    return p;
}

/* Rows of the packed weights, those of padding (zeros) included. */
static int64_t packed_rows(const PackedLayout *p) {
    return fox_round_up(p->columns, FOX_PACKED_ROWS);
}

/* Buckets of the flat space at its beginning whose float32 parameters every rank keeps whole; the others are sharded. */
static int front_buckets(const Backend *b) {
    return exchange_front(&b->owned, backend_sharded(b), b->table.matrices);
}

/* Floats of this rank's parameters. */
static int64_t kept_params(const Backend *b) {
    const Partition *p = &b->owned;
    int64_t front = partition_start(p, front_buckets(b));
    return front + partition_share(p) - front / p->ranks;
}

/* Takes the buffers that every layer has for itself at this recompute level or, if `shared`, those that all layers use in turn.
 * `level`: from this recompute level on a buffer is shared. */
static void layer_layout(const BackendSpec *spec, const CudaBackend *s, Arena *a, CudaActs *acts, bool shared) {
    const FoxConfig *c = &spec->config;
    int64_t N = (int64_t)spec->B * spec->T, d = c->hidden_size, H = c->num_heads, F = c->intermediate_size;
#define TAKE(member, level, purpose, bytes)                                             \
    if ((spec->recompute >= (level)) == shared) {                                       \
        *(void **)&acts->member = take(a, shared ? FOR_SHARED : (purpose), (bytes));    \
    }
    TAKE(x, 3, FOR_RESIDUAL, 4 * N * d)
    TAKE(x2, 2, FOR_RESIDUAL, 4 * N * d)
    TAKE(rstd1, 2, FOR_RESIDUAL, 4 * N)
    TAKE(rstd2, 2, FOR_RESIDUAL, 4 * N)
    TAKE(h1, 1, FOR_ATTENTION, 2 * N * d)
    TAKE(packed, 2, FOR_ATTENTION, 2 * N * s->packed.row)
    TAKE(q, 1, FOR_ATTENTION, 2 * N * d)
    TAKE(k, 1, FOR_ATTENTION, 2 * N * d)
    TAKE(v, 1, FOR_ATTENTION, 2 * N * d)
    TAKE(q_rstd, 2, FOR_ATTENTION, 4 * N * H)
    TAKE(k_rstd, 2, FOR_ATTENTION, 4 * N * H)
    TAKE(o, 2, FOR_ATTENTION, 2 * N * d)
    TAKE(lse, 2, FOR_ATTENTION, 4 * N * H)
    TAKE(saved, 2, FOR_ATTENTION, acp_saved_bytes(&s->attention))
    TAKE(o_rstd, 2, FOR_ATTENTION, 4 * N * H)
    TAKE(o_gated, 1, FOR_ATTENTION, 2 * N * d)
    TAKE(h2, 1, FOR_MLP, 2 * N * d)
    TAKE(gate_up, 2, FOR_MLP, 4 * N * F)
    TAKE(act, 1, FOR_MLP, 2 * N * F)
#undef TAKE
}

/* Lays out everything in `base` (NULL: only counts). */
static Arena cuda_layout(const Backend *b, CudaBackend *s, char *base) {
    const FoxConfig *c = &b->spec.config;
    Arena a;
    memset(&a, 0, sizeof a);
    a.base = base;
    int64_t N = (int64_t)b->spec.B * b->spec.T, d = c->hidden_size, H = c->num_heads, F = c->intermediate_size;
    int64_t L = c->num_hidden_layers, extra = (s->padded_vocab - c->vocab_size) * d, flat = b->table.total + extra;
    flat = flat > b->partition.padded ? flat : b->partition.padded;
    int64_t rows = fox_min64(N, HEAD_ROWS);
    CudaScratch *z = &s->scratch;
    CudaActs shared;
    memset(&shared, 0, sizeof shared);

    s->params_bf16 = (bf16 *)take(&a, FOR_PARAMETERS, 2 * flat);
    s->params = (float *)take(&a, FOR_MASTER, 4 * kept_params(b));
    s->grads = (float *)take(&a, FOR_GRADIENTS, 4 * flat);
    s->adam_m = (float *)take(&a, FOR_ADAM, 4 * partition_share(&b->owned));
    s->adam_v = (float *)take(&a, FOR_ADAM, 4 * partition_share(&b->owned));
    if (b->spec.grad_bf16 && s->ranks->size > 1) {
        s->grads_bf16 = (bf16 *)take(&a, FOR_EXCHANGE, 2 * b->partition.bucket);
    }

    layer_layout(&b->spec, s, &a, &shared, true);
    for (int64_t l = 0; l < L; l++) {
        s->acts[l] = shared;
        layer_layout(&b->spec, s, &a, &s->acts[l], false);
    }
    s->x_final = (float *)take(&a, FOR_RESIDUAL, 4 * N * d);
    s->rstd_final = (float *)take(&a, FOR_RESIDUAL, 4 * N);
    s->h_final = (bf16 *)take(&a, FOR_RESIDUAL, 2 * N * d);

    z->branch = (bf16 *)take(&a, FOR_SHARED, 2 * N * d);
    z->dx = (float *)take(&a, FOR_SHARED, 4 * N * d);
    z->dx_bf16 = (bf16 *)take(&a, FOR_SHARED, 2 * N * d);
    z->dh = (bf16 *)take(&a, FOR_SHARED, 2 * N * d);
    z->dq = (bf16 *)take(&a, FOR_SHARED, 2 * N * d);
    z->dk = (bf16 *)take(&a, FOR_SHARED, 2 * N * d);
    z->dv = (bf16 *)take(&a, FOR_SHARED, 2 * N * d);
    z->d_o = (bf16 *)take(&a, FOR_SHARED, 2 * N * d);
    z->dout = (bf16 *)take(&a, FOR_SHARED, 2 * N * d);
    z->dpacked = (bf16 *)take(&a, FOR_SHARED, 2 * N * s->packed.row);
    z->dgate_up = (bf16 *)take(&a, FOR_SHARED, 4 * N * F);
    z->dact = (bf16 *)take(&a, FOR_SHARED, 2 * N * F);
    z->log_f = (float *)take(&a, FOR_SHARED, 4 * N * H);
    z->dlog_f = (float *)take(&a, FOR_SHARED, 4 * N * H);
    s->dh_final = z->dh; /* the last norm's gradient is used up before the first layer's begins */

    s->logits = (bf16 *)take(&a, FOR_LOGITS, 2 * rows * s->padded_vocab);
    s->losses = (float *)take(&a, FOR_LOGITS, 4 * N);

    z->norm = (float *)take(&a, FOR_WORKSPACE, 4 * cuda_norm_scratch((int)d));
    z->qkv = (float *)take(&a, FOR_WORKSPACE, 4 * cuda_qkv_scratch(c));
    z->embedding = (int32_t *)take(&a, FOR_WORKSPACE, 4 * cuda_embedding_scratch(N, c->vocab_size));
    z->squares = (double *)take(&a, FOR_WORKSPACE, 8 * cuda_norm_squares_scratch());
    z->attention = take(&a, FOR_WORKSPACE, acp_workspace_bytes(&s->attention));
    z->matmul = take(&a, FOR_WORKSPACE, matmul_workspace_bytes());
    s->tokens = (int32_t *)take(&a, FOR_WORKSPACE, 4 * N);
    s->targets = (int32_t *)take(&a, FOR_WORKSPACE, 4 * N);
    s->skipped = (unsigned long long *)take(&a, FOR_WORKSPACE, 8 * L * H);
    s->total = (unsigned long long *)take(&a, FOR_WORKSPACE, 8 * L * H);
    s->stats = (DeviceStats *)take(&a, FOR_WORKSPACE, (int64_t)sizeof(DeviceStats));
    return a;
}

/* What the runtime says is gone since this back end was opened: the table below, NCCL's buffers and the code of the kernels. */
static int64_t cuda_memory(const Backend *b) {
    const CudaBackend *s = (const CudaBackend *)b->self;
    size_t now = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&now, &total));
    return (int64_t)s->free_at_first - (int64_t)now;
}

static void cuda_report(const Backend *b, FILE *out) {
    CudaBackend *s = (CudaBackend *)b->self;
    Arena a = cuda_layout(b, s, (char *)s->memory);
    double nccl = (double)s->free_at_first - (double)s->free_bytes;
    char peak[64] = "no mfu: its peak is not listed";
    if (b->peak_flops > 0) {
        snprintf(peak, sizeof peak, "mfu is of %.0f TFLOP/s", 1e-12 * b->peak_flops);
    }
    fprintf(out, "device              %s, bf16 with float32 master weights; %s\n", s->device, peak);
    for (int i = 0; i < PURPOSES; i++) {
        bool share = backend_sharded(b) && (i == FOR_MASTER || i == FOR_ADAM);
        if (a.by_purpose[i] > 0) {
            fprintf(out, "%9.1f MiB   %s%s\n", (double)a.by_purpose[i] / 0x1p20, purpose_names[i], share ? ", this rank's share" : "");
        }
    }
    if (s->ranks->size > 1) {
        fprintf(out, "%9.1f MiB   NCCL, taken already\n", nccl / 0x1p20);
    }
    fprintf(out, "%9.1f MiB   in all, of %.1f MiB free; %.2fM parameters, %d x %d tokens, recompute %d\n",
            ((double)a.used + nccl) / 0x1p20, (double)s->free_at_first / 0x1p20, (double)b->table.parameters / 1e6, b->spec.B, b->spec.T,
            b->spec.recompute);
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* The model                                                                                                           */

/* Where a tensor lies in a flat buffer; NULL for a tensor the configuration has not. */
static float *at(const Backend *b, float *flat, int tensor) {
    return tensor < 0 ? NULL : flat + b->table.tensors[tensor].offset;
}

static bf16 *at_bf16(const Backend *b, bf16 *flat, int tensor) {
    return flat + b->table.tensors[tensor].offset;
}

static MatmulShape product(MatmulKind kind, int64_t N, int64_t in, int64_t out, int64_t ldy) {
    MatmulShape shape = {kind, N, in, out, ldy};
    return shape;
}

/* y[N, out] = x[N, in] w^T for the weight tensor `w`, which may stand for the packed rows that begin with it. */
static void linear(Backend *b, bf16 *y, const bf16 *x, int w, int64_t N, int64_t in, int64_t out, int64_t ldy) {
    CudaBackend *s = cuda(b);
    MatmulShape shape = product(MATMUL_FORWARD, N, in, out, ldy);
    matmul(&s->matmul, &shape, y, x, at_bf16(b, s->params_bf16, w), s->stream);
}

/* dw += dy^T x, dx = dy w */
static void linear_back(Backend *b, bf16 *dx, const bf16 *dy, const bf16 *x, int w, int64_t N, int64_t in, int64_t out,
                        int64_t ldy) {
    CudaBackend *s = cuda(b);
    MatmulShape weight = product(MATMUL_BACKWARD_WEIGHT, N, in, out, ldy), input = product(MATMUL_BACKWARD_INPUT, N, in, out, ldy);
    matmul(&s->matmul, &weight, at(b, s->grads, w), dy, x, s->stream);
    matmul(&s->matmul, &input, dx, dy, at_bf16(b, s->params_bf16, w), s->stream);
}

/* The extent of one pass: training uses the whole of B and T, decoding one short sequence. */
typedef struct Extent {
    int B, T;
    int64_t N;
} Extent;

static QkvWeights qkv_weights(const Backend *b, const FoxLayerIds *id) {
    const CudaBackend *s = (const CudaBackend *)b->self;
    QkvWeights w = {at(b, s->params, id->q_norm), at(b, s->params, id->k_norm), at(b, s->params, id->fgate_bias)};
    return w;
}

static void norm_attention(Backend *b, int l, Extent e, const float *x, const bf16 *branch) {
    CudaBackend *s = cuda(b);
    CudaActs *a = &s->acts[l];
    cuda_residual_norm_forward(a->h1, a->rstd1, branch ? a->x : NULL, x, branch, at(b, s->params, b->table.layers[l].attn_norm), e.N,
                               b->spec.config.hidden_size, (float)b->spec.config.norm_eps, s->stream);
}

static void shift_and_norm(Backend *b, int l, Extent e) {
    CudaBackend *s = cuda(b);
    CudaActs *a = &s->acts[l];
    QkvWeights w = qkv_weights(b, &b->table.layers[l]);
    cuda_qkv_forward(a->q, a->k, a->v, a->q_rstd, a->k_rstd, s->scratch.log_f, a->packed, &s->packed, &w, &b->spec.config, e.B, e.T,
                     s->stream);
}

static bool has_output_gate(const FoxConfig *c) {
    return c->use_output_norm || c->use_output_gate;
}

/* What o_proj multiplies: the gated output, or o itself in models without gate and norm. */
static bf16 *gated(const FoxConfig *c, const CudaActs *a) {
    return has_output_gate(c) ? a->o_gated : a->o;
}

static void gate_output(Backend *b, int l, Extent e) {
    CudaBackend *s = cuda(b);
    CudaActs *a = &s->acts[l];
    const FoxConfig *c = &b->spec.config;
    if (has_output_gate(c)) {
        cuda_output_gate_forward(a->o_gated, a->o_rstd, a->o, a->packed, &s->packed,
                                 at(b, s->params, b->table.layers[l].output_norm), e.N, c->num_heads, c->hidden_size / c->num_heads,
                                 (float)c->norm_eps, s->stream);
    }
}

static void norm_mlp(Backend *b, int l, Extent e, const float *x, const bf16 *branch) {
    CudaBackend *s = cuda(b);
    CudaActs *a = &s->acts[l];
    cuda_residual_norm_forward(a->h2, a->rstd2, branch ? a->x2 : NULL, x, branch, at(b, s->params, b->table.layers[l].mlp_norm), e.N,
                               b->spec.config.hidden_size, (float)b->spec.config.norm_eps, s->stream);
}

/* Where a layer's matrices begin in the flat space, and where they end. */
static int64_t layer_start(const Backend *b, int l) {
    return b->table.tensors[b->table.layers[l].q].offset;
}

static int64_t layer_end(const Backend *b, int l) {
    return l + 1 < b->spec.config.num_hidden_layers ? layer_start(b, l + 1) : b->table.tensors[b->table.lm_head].offset;
}

/* The work that follows on the stream reads parameters before `until`. */
static void need_params(Backend *b, int64_t until) {
    exchange_need(&cuda(b)->exchange, until, cuda(b)->stream);
}

/* The work on the stream so far completes the gradients from `from` on: in the last micro-batch of a step they may leave. */
static void gradients_done(Backend *b, int64_t from) {
    if (cuda(b)->micro_batches == b->spec.micro_batches) {
        exchange_gradients(&cuda(b)->exchange, from, cuda(b)->stream);
    }
}

/* Fetches the ranges of layer l's first sequence to where somebody wants them. */
static void fetch_ranges(Backend *b, int l, const AcpShape *shape, void *saved) {
    const double *c;
    const int *first, *last;
    int64_t count = (int64_t)shape->H * ((shape->T + b->block - 1) / b->block);
    acp_saved_views(shape, saved, &c, &first, &last);
    CUDA_CHECK(cudaMemcpyAsync(b->first_blocks + l * count, first, sizeof(int) * (size_t)count, cudaMemcpyDeviceToHost, cuda(b)->stream));
    CUDA_CHECK(cudaStreamSynchronize(cuda(b)->stream));
}

/* From a->x (branch NULL), or from x + branch, which becomes a->x, to the output of the MLP in scratch.branch. */
static void block_forward(Backend *b, int l, Extent e, const float *x, const bf16 *branch, bool count) {
    CudaBackend *s = cuda(b);
    CudaActs *a = &s->acts[l];
    const FoxConfig *c = &b->spec.config;
    const FoxLayerIds *id = &b->table.layers[l];
    int64_t d = c->hidden_size, F = c->intermediate_size, H = c->num_heads;
    AcpShape shape = s->attention;
    AcpCounts counts = {s->skipped + l * H, s->total + l * H};
    shape.B = e.B;
    shape.T = e.T;
    norm_attention(b, l, e, x, branch);
    linear(b, a->packed, a->h1, id->q, e.N, d, packed_rows(&s->packed), s->packed.row);
    shift_and_norm(b, l, e);
    acp_attention_forward(&shape, a->o, a->lse, a->saved, s->scratch.attention, count ? &counts : NULL, a->q, a->k, a->v, d,
                          s->scratch.log_f, at(b, s->params, id->q_norm), at(b, s->params, id->k_norm), s->stream);
    if (b->first_blocks != NULL) {
        fetch_ranges(b, l, &shape, a->saved);
    }
    gate_output(b, l, e);
    linear(b, s->scratch.branch, gated(c, a), id->o, e.N, d, d, d);
    norm_mlp(b, l, e, a->x, s->scratch.branch);
    linear(b, a->gate_up, a->h2, id->gate_up, e.N, d, 2 * F, 2 * F);
    cuda_swiglu_forward(a->act, a->gate_up, e.N, (int)F, s->stream);
    linear(b, s->scratch.branch, a->act, id->down, e.N, F, d, d);
}

/* Makes again what this recompute level did not keep. */
static void recompute(Backend *b, int l, Extent e) {
    CudaBackend *s = cuda(b);
    CudaActs *a = &s->acts[l];
    if (b->spec.recompute == 2) {
        block_forward(b, l, e, a->x, NULL, false);
    } else if (b->spec.recompute == 1) {
        norm_attention(b, l, e, a->x, NULL);
        shift_and_norm(b, l, e);
        gate_output(b, l, e);
        norm_mlp(b, l, e, a->x2, NULL);
        cuda_swiglu_forward(a->act, a->gate_up, e.N, b->spec.config.intermediate_size, s->stream);
    }
}

/* scratch.dx and dx_bf16 hold the gradient of the block's output and leave with that of its input. */
static void block_backward(Backend *b, int l, Extent e) {
    CudaBackend *s = cuda(b);
    CudaActs *a = &s->acts[l];
    CudaScratch *z = &s->scratch;
    const FoxConfig *c = &b->spec.config;
    const FoxLayerIds *id = &b->table.layers[l];
    int d = c->hidden_size, F = c->intermediate_size, H = c->num_heads;
    QkvWeights w = qkv_weights(b, id);

    linear_back(b, z->dact, z->dx_bf16, a->act, id->down, e.N, F, d, d);
    cuda_swiglu_backward(z->dgate_up, z->dact, a->gate_up, e.N, F, s->stream);
    linear_back(b, z->dh, z->dgate_up, a->h2, id->gate_up, e.N, d, 2 * F, 2 * F);
    cuda_norm_backward(z->dx, z->dx_bf16, at(b, s->grads, id->mlp_norm), z->norm, z->dh, a->x2, a->rstd2,
                       at(b, s->params, id->mlp_norm), e.N, d, s->stream);

    bf16 *d_o = has_output_gate(c) ? z->dout : z->d_o;
    linear_back(b, d_o, z->dx_bf16, gated(c, a), id->o, e.N, d, d, d);
    if (has_output_gate(c)) {
        cuda_output_gate_backward(z->d_o, z->dpacked, at(b, s->grads, id->output_norm), z->norm, z->dout, a->o, a->o_rstd, a->packed,
                                  &s->packed, at(b, s->params, id->output_norm), e.N, H, d / H, s->stream);
    }
    acp_attention_backward(&s->attention, z->dq, z->dk, z->dv, z->dlog_f, a->saved, z->attention, z->d_o, a->q, a->k, a->v, d, a->o,
                           a->lse, s->stream);
    cuda_qkv_backward(z->dpacked, at(b, s->grads, id->q_norm), at(b, s->grads, id->k_norm), at(b, s->grads, id->fgate_bias), z->qkv,
                      z->dq, z->dk, z->dv, z->dlog_f, a->packed, a->q_rstd, a->k_rstd, &s->packed, &w, c, e.B, e.T, s->stream);
    linear_back(b, z->dh, z->dpacked, a->h1, id->q, e.N, d, packed_rows(&s->packed), s->packed.row);
    cuda_norm_backward(z->dx, z->dx_bf16, at(b, s->grads, id->attn_norm), z->norm, z->dh, a->x, a->rstd1,
                       at(b, s->params, id->attn_norm), e.N, d, s->stream);
}

/* tokens (device) -> h_final, all layers and the last norm. */
static void body_forward(Backend *b, Extent e, const int32_t *tokens, bool count) {
    CudaBackend *s = cuda(b);
    int L = b->spec.config.num_hidden_layers, d = b->spec.config.hidden_size;
    need_params(b, b->table.matrices);
    cuda_embedding_forward(s->acts[0].x, tokens, at(b, s->params, b->table.embeddings), e.N, d, s->stream);
    for (int l = 0; l < L; l++) {
        const float *x = l == 0 ? s->acts[0].x : s->acts[l - 1].x2;
        need_params(b, layer_end(b, l));
        block_forward(b, l, e, x, l == 0 ? NULL : s->scratch.branch, count);
    }
    cuda_residual_norm_forward(s->h_final, s->rstd_final, s->x_final, s->acts[L - 1].x2, s->scratch.branch,
                               at(b, s->params, b->table.norm), e.N, d, (float)b->spec.config.norm_eps, s->stream);
}

/* Logits and losses, some rows at a time; where scale is not 0 also the gradients of lm_head and of h_final. */
static void head(Backend *b, Extent e, float scale) {
    CudaBackend *s = cuda(b);
    int d = b->spec.config.hidden_size, V = b->spec.config.vocab_size;
    need_params(b, b->table.total);
    for (int64_t n = 0; n < e.N; n += HEAD_ROWS) {
        int64_t rows = fox_min64(e.N - n, HEAD_ROWS);
        linear(b, s->logits, s->h_final + n * d, b->table.lm_head, rows, d, s->padded_vocab, s->padded_vocab);
        cuda_cross_entropy(s->losses + n, scale != 0 ? &s->stats->loss : NULL, s->logits, s->targets + n, rows, V, s->padded_vocab,
                           scale, s->stream);
        if (scale != 0) {
            linear_back(b, s->dh_final + n * d, s->logits, s->h_final + n * d, b->table.lm_head, rows, d, s->padded_vocab,
                        s->padded_vocab);
        }
    }
}

/* Sends a batch through pinned memory, so that the host may reuse its own arrays at once. */
static void send_tokens(Backend *b, const int32_t *tokens, const int32_t *targets) {
    CudaBackend *s = cuda(b);
    size_t N = (size_t)b->spec.B * (size_t)b->spec.T, bytes = sizeof(int32_t) * N;
    CUDA_CHECK(cudaEventSynchronize(s->tokens_sent));
    memcpy(s->pinned, tokens, bytes);
    memcpy(s->pinned + N, targets, bytes);
    CUDA_CHECK(cudaMemcpyAsync(s->tokens, s->pinned, bytes, cudaMemcpyHostToDevice, s->stream));
    CUDA_CHECK(cudaMemcpyAsync(s->targets, s->pinned + N, bytes, cudaMemcpyHostToDevice, s->stream));
    CUDA_CHECK(cudaEventRecord(s->tokens_sent, s->stream));
}

static Extent whole(const Backend *b) {
    Extent e = {b->spec.B, b->spec.T, (int64_t)b->spec.B * b->spec.T};
    return e;
}

static void forward_backward_on_device(Backend *b, float scale) {
    CudaBackend *s = cuda(b);
    Extent e = whole(b);
    int L = b->spec.config.num_hidden_layers, d = b->spec.config.hidden_size;
    body_forward(b, e, s->tokens, true);
    head(b, e, scale);
    gradients_done(b, b->table.tensors[b->table.lm_head].offset);
    CUDA_CHECK(cudaMemsetAsync(s->scratch.dx, 0, sizeof(float) * (size_t)e.N * (size_t)d, s->stream));
    cuda_norm_backward(s->scratch.dx, s->scratch.dx_bf16, at(b, s->grads, b->table.norm), s->scratch.norm, s->dh_final, s->x_final,
                       s->rstd_final, at(b, s->params, b->table.norm), e.N, d, s->stream);
    for (int l = L - 1; l >= 0; l--) {
        recompute(b, l, e);
        block_backward(b, l, e);
        gradients_done(b, layer_start(b, l));
    }
    cuda_embedding_backward(at(b, s->grads, b->table.embeddings), s->scratch.dx, s->tokens, s->scratch.embedding, e.N, d,
                            b->spec.config.vocab_size, s->stream);
    gradients_done(b, 0);
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* The interface                                                                                                       */

/* This rank's float32 parameters of its piece of a bucket of b->owned. */
static float *piece_params(const Backend *b, int bucket, Piece piece) {
    const CudaBackend *s = (const CudaBackend *)b->self;
    int64_t front = partition_start(&b->owned, front_buckets(b));
    return s->params + (bucket < front_buckets(b) || !backend_sharded(b) ? piece.start : front + piece.local - front / b->owned.ranks);
}

/* What a rank keeps of one bucket of a buffer: `count` floats of the flat space from `start`, at `device`. */
typedef struct Kept {
    int64_t start, count;
    float *device;
} Kept;

static Kept kept(const Backend *b, FoxBuffer buffer, int bucket) {
    const CudaBackend *s = (const CudaBackend *)b->self;
    const Partition *p = &b->owned;
    Piece piece = partition_piece(p, bucket, b->owner);
    int64_t start = partition_start(p, bucket), end = fox_min64(partition_start(p, bucket + 1), p->total);
    Kept whole = {start, end - start, (buffer == FOX_GRADS ? s->grads : s->params) + start};
    Kept share = {piece.start, piece.count, NULL};
    if (buffer == FOX_GRADS || (buffer == FOX_PARAMS && bucket < front_buckets(b))) {
        return whole;
    }
    share.device = buffer == FOX_PARAMS ? piece_params(b, bucket, piece) : (buffer == FOX_ADAM_M ? s->adam_m : s->adam_v) + piece.local;
    return share;
}

/* Copies between `memory`, which stands for `count` floats of the flat space from `start`, and what this rank keeps of them. */
static void copy_kept(Backend *b, FoxBuffer buffer, int64_t start, int64_t count, float *memory, bool to_memory) {
    for (int k = partition_find(&b->owned, start); count > 0 && k <= partition_find(&b->owned, start + count - 1); k++) {
        Kept mine = kept(b, buffer, k);
        int64_t from = mine.start > start ? mine.start : start, end = fox_min64(mine.start + mine.count, start + count);
        if (from < end) {
            float *device = mine.device + (from - mine.start), *other = memory + (from - start);
            CUDA_CHECK(cudaMemcpyAsync(to_memory ? other : device, to_memory ? device : other, sizeof(float) * (size_t)(end - from),
                                       cudaMemcpyDefault, cuda(b)->stream));
        }
    }
}

static void *cuda_allocate_host(Backend *b, int64_t bytes) {
    void *memory = NULL;
    (void)b;
    return cudaMallocHost(&memory, (size_t)bytes) == cudaSuccess ? memory : NULL;
}

static void cuda_free_host(Backend *b, void *memory) {
    (void)b;
    cudaFreeHost(memory);
}

static void cuda_read(Backend *b, FoxBuffer buffer, int64_t start, int64_t count, float *host) {
    need_params(b, b->table.total);
    copy_kept(b, buffer, start, count, host, true);
    CUDA_CHECK(cudaStreamSynchronize(cuda(b)->stream));
}

/* The bf16 parameters are whole on every rank. They are made from all that is written, which passes through the gradients'
 * place where the float32 parameters are not kept; gradients are zero between steps. */
static void write_bf16(Backend *b, int64_t start, int64_t count, const float *host) {
    CudaBackend *s = cuda(b);
    size_t bytes = sizeof(float) * (size_t)count;
    const float *device = s->params + start;
    if (backend_sharded(b)) {
        CUDA_CHECK(cudaMemcpyAsync(s->grads + start, host, bytes, cudaMemcpyHostToDevice, s->stream));
        device = s->grads + start;
    }
    cuda_to_bf16(s->params_bf16 + start, device, count, s->stream);
    if (backend_sharded(b)) {
        CUDA_CHECK(cudaMemsetAsync(s->grads + start, 0, bytes, s->stream));
    }
}

static void cuda_write(Backend *b, FoxBuffer buffer, int64_t start, int64_t count, const float *host) {
    need_params(b, b->table.total);
    copy_kept(b, buffer, start, count, (float *)(uintptr_t)host, false);
    if (buffer == FOX_PARAMS) {
        write_bf16(b, start, count, host);
    }
    CUDA_CHECK(cudaStreamSynchronize(cuda(b)->stream));
}

static void cuda_forward_backward(Backend *b, const int32_t *tokens, const int32_t *targets, double scale) {
    CudaBackend *s = cuda(b);
    s->loss_scale = scale / (double)whole(b).N;
    s->micro_batches++;
    send_tokens(b, tokens, targets);
    forward_backward_on_device(b, (float)s->loss_scale);
}

/* Sums gradients, loss and squares over the ranks, and decides what the update is scaled with. */
static void reduce(Backend *b, const AdamW *adamw) {
    CudaBackend *s = cuda(b);
    Exchange *x = &s->exchange;
    need_params(b, b->table.total);
    exchange_gradients(x, 0, s->stream);
    exchange_await_gradients(x, s->stream);
    for (int k = 0; k < b->owned.buckets; k++) {
        Piece piece = backend_piece(b, k);
        if (piece.count > 0) {
            cuda_add_squares(s->stats, s->scratch.squares, s->grads + piece.start, piece.count, s->stream);
        }
    }
    exchange_numbers(x, &s->stats->loss, backend_sharded(b) ? 2 : 1, s->stream); // where not sharded, squares are of all gradients
    cuda_clip(s->stats, adamw->grad_clip, s->stream);
}

/* AdamW on what this rank owns; gradients are zero afterwards. */
static void update_params(Backend *b, const AdamW *adamw) {
    CudaBackend *s = cuda(b);
    for (int k = 0; k < b->owned.buckets; k++) {
        Piece piece = backend_piece(b, k);
        if (piece.count > 0) {
            cuda_adamw(piece_params(b, k, piece), s->params_bf16 + piece.start, s->adam_m + piece.local, s->adam_v + piece.local,
                       s->grads + piece.start, piece.count, b->table.decayed - piece.start, adamw, s->stats, s->stream);
        }
    }
    exchange_parameters(&s->exchange, s->stream);
    if (backend_sharded(b)) { // what was sent, and what others own
        CUDA_CHECK(cudaMemsetAsync(s->grads, 0, sizeof(float) * (size_t)b->partition.padded, s->stream));
    }
}

static void cuda_update(Backend *b, const AdamW *adamw, StepStats *stats) {
    CudaBackend *s = cuda(b);
    DeviceStats device;
    memset(stats, 0, sizeof *stats);
    reduce(b, adamw);
    update_params(b, adamw);
    CUDA_CHECK(cudaMemcpyAsync(&device, s->stats, sizeof device, cudaMemcpyDeviceToHost, s->stream));
    CUDA_CHECK(cudaMemsetAsync(s->stats, 0, sizeof device, s->stream));
    CUDA_CHECK(cudaStreamSynchronize(s->stream));
    s->micro_batches = 0;
    stats->loss = device.loss * s->loss_scale;
    stats->grad_norm = device.grad_norm;
    stats->applied = device.applied != 0;
    exchange_measure(&s->exchange, stats);
}

/* Gradients that left already wait for a rank whose gradients never come. */
static void cuda_abandon(Backend *b) {
    need_params(b, b->table.total);
    CUDA_CHECK(cudaStreamSynchronize(cuda(b)->stream));
    exchange_abandon(&cuda(b)->exchange);
}

static void cuda_evaluate(Backend *b, const int32_t *tokens, const int32_t *targets, float *losses) {
    CudaBackend *s = cuda(b);
    Extent e = whole(b);
    send_tokens(b, tokens, targets);
    body_forward(b, e, s->tokens, true);
    head(b, e, 0);
    CUDA_CHECK(cudaMemcpyAsync(losses, s->losses, sizeof(float) * (size_t)e.N, cudaMemcpyDeviceToHost, s->stream));
    CUDA_CHECK(cudaStreamSynchronize(s->stream));
}

static void cuda_pruning(Backend *b, double *skipped, double *total) {
    CudaBackend *s = cuda(b);
    int cells = b->spec.config.num_hidden_layers * b->spec.config.num_heads;
    size_t bytes = sizeof(unsigned long long) * (size_t)cells;
    unsigned long long *counts = FOX_NEW(unsigned long long, 2 * cells);
    CUDA_CHECK(cudaMemcpyAsync(counts, s->skipped, bytes, cudaMemcpyDeviceToHost, s->stream));
    CUDA_CHECK(cudaMemcpyAsync(counts + cells, s->total, bytes, cudaMemcpyDeviceToHost, s->stream));
    CUDA_CHECK(cudaMemsetAsync(s->skipped, 0, bytes, s->stream));
    CUDA_CHECK(cudaMemsetAsync(s->total, 0, bytes, s->stream));
    CUDA_CHECK(cudaStreamSynchronize(s->stream));
    for (int i = 0; i < cells; i++) {
        skipped[i] = (double)counts[i];
        total[i] = (double)counts[cells + i];
    }
    free(counts);
}

/* Decoding runs the forward pass over the text so far: more work than a cache, but no second set of kernels. Beyond B*T
 * tokens only the newest are looked at. */
static void cuda_decode_begin(Backend *b, int max_tokens) {
    CudaBackend *s = cuda(b);
    s->prefix = FOX_NEW(int32_t, max_tokens + PADDING);
    s->prefix_length = 0;
    s->prefix_limit = max_tokens;
}

static void cuda_decode(Backend *b, int32_t token, float *logits) {
    CudaBackend *s = cuda(b);
    int V = b->spec.config.vocab_size, d = b->spec.config.hidden_size;
    int room = (int)fox_min64(whole(b).N, acp_most_tokens()), start = 0;
    if (s->prefix_length == s->prefix_limit) {
        fox_die("decoding more tokens than decode_begin was told");
    }
    s->prefix[s->prefix_length++] = token;
    start = s->prefix_length > room ? s->prefix_length - room : 0;
    int length = s->prefix_length - start;
    /* Few different lengths, so that few products need planning; what comes after the last token changes nothing before but which
     * negligible blocks are pruned. */
    int T = (int)fox_min64((length + PADDING - 1) / PADDING * PADDING, room);
    Extent e = {1, T, T};
    uint16_t *row = FOX_NEW(uint16_t, V);
    CUDA_CHECK(cudaMemcpyAsync(s->tokens, s->prefix + start, sizeof(int32_t) * (size_t)T, cudaMemcpyHostToDevice, s->stream));
    body_forward(b, e, s->tokens, false);
    need_params(b, b->table.total);
    linear(b, s->logits, s->h_final + (int64_t)(length - 1) * d, b->table.lm_head, 1, d, s->padded_vocab, s->padded_vocab);
    CUDA_CHECK(cudaMemcpyAsync(row, s->logits, sizeof(uint16_t) * (size_t)V, cudaMemcpyDeviceToHost, s->stream));
    CUDA_CHECK(cudaStreamSynchronize(s->stream));
    for (int v = 0; v < V; v++) {
        uint32_t bits = (uint32_t)row[v] << 16;
        memcpy(&logits[v], &bits, sizeof bits);
    }
    free(row);
}

static void cuda_decode_end(Backend *b) {
    free(cuda(b)->prefix);
    cuda(b)->prefix = NULL;
}

/* Chooses the algorithm of every product of a step, on the real buffers, and leaves junk in them. */
static void plan_products(Backend *b) {
    CudaBackend *s = cuda(b);
    const FoxConfig *c = &b->spec.config;
    const FoxLayerIds *id = &b->table.layers[0];
    const CudaActs *a = &s->acts[0];
    CudaScratch *z = &s->scratch;
    int64_t N = whole(b).N, d = c->hidden_size, F = c->intermediate_size, V = s->padded_vocab;
    int64_t rows = fox_min64(N, HEAD_ROWS), last_rows = N % rows == 0 ? rows : N % rows;
    struct {
        int weight;
        int64_t rows, in, out, ldy;
        bf16 *x, *y, *dx;
    } layers[] = {
        {id->q, N, d, packed_rows(&s->packed), s->packed.row, a->h1, z->dpacked, z->dh},
        {id->o, N, d, d, d, a->h2, z->branch, z->dh},
        {id->gate_up, N, d, 2 * F, 2 * F, a->h2, z->dgate_up, z->dh},
        {id->down, N, F, d, d, a->act, z->branch, z->dact},
        {b->table.lm_head, rows, d, V, V, s->h_final, s->logits, z->dh},
        {b->table.lm_head, last_rows, d, V, V, s->h_final, s->logits, z->dh},
    };
    for (size_t i = 0; i < sizeof layers / sizeof layers[0]; i++) {
        const bf16 *w = at_bf16(b, s->params_bf16, layers[i].weight);
        for (int kind = MATMUL_FORWARD; kind <= MATMUL_BACKWARD_WEIGHT; kind++) {
            MatmulShape shape = product((MatmulKind)kind, layers[i].rows, layers[i].in, layers[i].out, layers[i].ldy);
            void *result = kind == MATMUL_FORWARD ? (void *)layers[i].y
                           : kind == MATMUL_BACKWARD_INPUT ? (void *)layers[i].dx
                                                           : (void *)at(b, s->grads, layers[i].weight);
            const bf16 *left = kind == MATMUL_FORWARD ? layers[i].x : layers[i].y;
            const bf16 *right = kind == MATMUL_BACKWARD_WEIGHT ? layers[i].x : w;
            matmul_plan(&s->matmul, &shape, result, left, right, s->stream);
        }
    }
}

static bool cuda_allocate(Backend *b, FoxError *err) {
    CudaBackend *s = cuda(b);
    int64_t bytes = cuda_layout(b, s, NULL).used, N = whole(b).N;
    cudaError_t status = cudaMalloc(&s->memory, (size_t)bytes);
    if (status != cudaSuccess) {
        return fox_fail(err, "the model needs %.1f GiB of GPU memory, %.1f are free (%s); lower -b (micro-batch) or -T (context), or "
                        "set -r 1 or -r 2 (recompute)", (double)bytes / 0x1p30, (double)s->free_bytes / 0x1p30,
                        cudaGetErrorString(status));
    }
    cuda_layout(b, s, (char *)s->memory);
    CUDA_CHECK(cudaMemsetAsync(s->memory, 0, (size_t)bytes, s->stream));
    CUDA_CHECK(cudaMallocHost((void **)&s->pinned, sizeof(int32_t) * 2 * (size_t)N));
    matmul_create(&s->matmul, s->scratch.matmul, b->spec.deterministic);
    plan_products(b);
    CUDA_CHECK(cudaMemsetAsync(s->memory, 0, (size_t)bytes, s->stream));
    exchange_prepare(&s->exchange, &b->partition, backend_sharded(b), b->table.matrices, s->grads, s->grads_bf16, s->params,
                     s->params_bf16);
    CUDA_CHECK(cudaStreamSynchronize(s->stream));
    return true;
}

static void cuda_free(Backend *b) {
    CudaBackend *s = cuda(b);
    exchange_close(&s->exchange);
    matmul_free(&s->matmul);
    cudaFree(s->memory);
    cudaFreeHost(s->pinned);
    cudaEventDestroy(s->tokens_sent);
    cudaStreamDestroy(s->stream);
    free(s->prefix);
    free(s->acts);
    free(s);
    fox_table_free(&b->table);
    memset(b, 0, sizeof *b);
}

bool backend_cuda_available(char why[256]) {
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0) {
        snprintf(why, 256, "%s", status != cudaSuccess ? cudaGetErrorString(status) : "no GPU");
        return false;
    }
    return true;
}

/* Dense bf16 FLOP/s with float32 accumulation from the data sheets, by a part of the device's name; 0: not listed. */
static double peak_flops(const char *device) {
    static const struct {
        const char *name;
        double teraflops;
    } peaks[] = {
        {"H200", 989}, {"GH200", 989}, {"H100 PCIe", 756}, {"H100 NVL", 835},  {"H100", 989}, {"H800", 989},
        {"A100", 312}, {"A800", 312},  {"A30", 165},       {"L40S", 362},      {"L40", 181},  {"L4", 121},
        {"A40", 150},  {"A10", 125},   {"RTX 4090", 165},  {"RTX 3090", 71},
    };
    for (size_t i = 0; i < sizeof peaks / sizeof peaks[0]; i++) {
        const char *found = strstr(device, peaks[i].name);
        if (found != NULL && !isalnum((unsigned char)found[strlen(peaks[i].name)])) { // "A100" is not "RTX A1000"
            return 1e12 * peaks[i].teraflops;
        }
    }
    return 0;
}

/* What the kernels cannot do on the current device is refused, with the option to change, before any memory is taken; the
 * launchers check it again. */
static bool check_sizes(const BackendSpec *spec, FoxError *err) {
    const FoxConfig *c = &spec->config;
    int head_width = c->hidden_size / c->num_heads;
    int64_t tokens = (int64_t)spec->B * spec->T, most = fox_min64(CUDA_MOST_TOKENS, ACP_MOST_ROWS / c->num_heads);
    if (head_width != 64 && head_width != 128) {
        return fox_fail(err, "the GPU kernels know heads of 64 and 128 values, this model has %d; use --device cpu", head_width);
    }
    if (c->hidden_size > CUDA_MOST_WIDTH || c->intermediate_size % 8 != 0) {
        return fox_fail(err, "the GPU kernels know widths up to %d and inner widths that are multiples of 8, this model has %d and %d; "
                        "use --device cpu", CUDA_MOST_WIDTH, c->hidden_size, c->intermediate_size);
    }
    if (spec->T > acp_most_tokens()) {
        return fox_fail(err, "-T %d: this GPU has shared memory for %lld tokens in a sequence", spec->T, (long long)acp_most_tokens());
    }
    if ((int64_t)spec->B * c->num_heads > ACP_MOST_HEADS) {
        return fox_fail(err, "-b %d: a GPU takes at most %d sequences of %d heads at a time; give a smaller -b", spec->B,
                        ACP_MOST_HEADS / c->num_heads, c->num_heads);
    }
    return tokens < most || fox_fail(err, "-b %d: a GPU takes fewer than %lld tokens of %d heads at a time; give a smaller -b", spec->B,
                                     (long long)most, c->num_heads);
}

/* Takes this rank's GPU: the ranks of a machine take its GPUs in order, or each the one that its launcher lets it see. */
static bool take_device(const BackendSpec *spec, const Ranks *ranks, struct cudaDeviceProp *device, FoxError *err) {
    char why[256];
    int count = 0;
    if (!fox_config_check(&spec->config, err)) {
        return false;
    }
    if (!backend_cuda_available(why)) {
        return fox_fail(err, "--device cuda: %s; use --device cpu", why);
    }
    CUDA_CHECK(cudaGetDeviceCount(&count));
    CUDA_CHECK(cudaSetDevice(ranks->local_rank % count));
    CUDA_CHECK(cudaGetDeviceProperties(device, ranks->local_rank % count));
    if (device->major < 8) {
        return fox_fail(err, "%s has compute capability %d.%d; 8.0 or newer is needed; use --device cpu", device->name, device->major,
                        device->minor);
    }
    return check_sizes(spec, err);
}

bool backend_cuda_open(Backend *b, const BackendSpec *spec, const Ranks *ranks, FoxError *err) {
    struct cudaDeviceProp device;
    Exchange exchange;
    size_t total, free_at_first;
    memset(b, 0, sizeof *b);
    if (!ranks_everyone(ranks, take_device(spec, ranks, &device, err), err)) {
        return false;
    }
    ranks_share_cores(ranks);
    CUDA_CHECK(cudaMemGetInfo(&free_at_first, &total));
    if (!exchange_open(&exchange, ranks, err)) {
        return false;
    }
    b->name = "cuda";
    b->spec = *spec;
    b->table = fox_table_create(&spec->config);
    backend_divide(b, ranks);
    b->whole_params = !backend_sharded(b);
    b->block = 128; /* of acp_saved_views */
    b->report = cuda_report;
    b->allocate = cuda_allocate;
    b->memory = cuda_memory;
    b->allocate_host = cuda_allocate_host;
    b->free_host = cuda_free_host;
    b->read = cuda_read;
    b->write = cuda_write;
    b->forward_backward = cuda_forward_backward;
    b->update = cuda_update;
    b->abandon = cuda_abandon;
    b->evaluate = cuda_evaluate;
    b->pruning = cuda_pruning;
    b->decode_begin = cuda_decode_begin;
    b->decode = cuda_decode;
    b->decode_end = cuda_decode_end;
    b->free = cuda_free;

    CudaBackend *s = FOX_NEW(CudaBackend, 1);
    b->self = s;
    s->ranks = ranks;
    s->exchange = exchange;
    s->free_at_first = free_at_first;
    snprintf(s->device, sizeof s->device, "%s", device.name);
    b->peak_flops = peak_flops(device.name);
    CUDA_CHECK(cudaMemGetInfo(&s->free_bytes, &total));
    CUDA_CHECK(cudaStreamCreate(&s->stream));
    CUDA_CHECK(cudaEventCreateWithFlags(&s->tokens_sent, cudaEventDisableTiming));
    s->packed = packed_layout(&spec->config);
    s->padded_vocab = (spec->config.vocab_size + PADDING - 1) / PADDING * PADDING;
    s->acts = FOX_NEW(CudaActs, spec->config.num_hidden_layers);
    s->attention.B = spec->B;
    s->attention.T = spec->T;
    s->attention.H = spec->config.num_heads;
    s->attention.D = spec->config.hidden_size / spec->config.num_heads;
    s->attention.mode = spec->config.use_forget_gate ? spec->acp : ACP_OFF;
    s->attention.log_tolerance = (double)spec->log_tolerance;
    s->attention.shared_norm = spec->config.qk_norm_share_param_across_head;
    return true;
}

/* The back end: the one interface between the training loop and the machine that computes.
 *
 * Two implementations: cpu/backend_cpu.c (float32, fox_layers.h) and CUDA (bf16). The loop, checkpoints, logs and tests
 * know only this table of functions. A Backend owns parameters, gradients, Adam's moments and activations; everybody
 * else moves floats in and out of the flat parameter space of train/config.h with read() and write().
 *
 * One step of the loop:
 *     for each micro-batch: forward_backward(x, y, scale)   gradients and loss accumulate, each times `scale`
 *     update(&adamw, &stats)                                sum over ranks, clip, AdamW; then both are zero again
 * with scale = 1 / (micro-batches of all ranks in the step), so loss and gradient are means over the step's tokens.
 *
 * Several ranks. Each has its own back end and its own micro-batches; update() adds up the gradients of all, bucket by bucket
 * (train/partition.h). Without `zero` every rank then updates everything. With it each rank keeps only its share of Adam's
 * moments (and a GPU also of the float32 weights), updates that, and gives the others its new weights. */
#ifndef FOX_BACKEND_H
#define FOX_BACKEND_H

#include "config.h"
#include "partition.h"
#include "ranks.h"

/* How attention is pruned (cpu/acp.h has the tests and their bounds). All three lose at most exp(log_tolerance) of any row's mass. */
typedef enum AcpMode { ACP_OFF, ACP_PAPER, ACP_TIGHT } AcpMode;

typedef struct BackendSpec {
    FoxConfig config;
    int B; /* sequences in a micro-batch */
    int T; /* context */
    AcpMode acp;
    float log_tolerance; /* natural logarithm of the pruned mass allowed per row */
    int recompute;       /* 0: keep every activation; 1: recompute the cheap layers; 2: whole blocks */
    bool deterministic;
    int micro_batches; /* of a rank in a step, so that gradients may leave during the last backward; 0: not known */
    bool zero;         /* of several ranks each owns a share of the optimizer's state */
    bool grad_bf16;    /* gradients travel in bf16, not float32 */
} BackendSpec;

/* What read() and write() address; each is table->total floats. */
typedef enum FoxBuffer { FOX_PARAMS, FOX_GRADS, FOX_ADAM_M, FOX_ADAM_V } FoxBuffer;

typedef struct AdamW {
    double learning_rate, beta1, beta2, eps, weight_decay;
    double grad_clip; /* largest gradient norm; 0: no clipping */
    int64_t step;     /* 1 for the first update: bias correction */
} AdamW;

typedef struct StepStats {
    double loss;      /* mean cross entropy of the step, over all ranks */
    double grad_norm; /* before clipping, over all ranks */
    bool applied;     /* false: loss or norm was not finite, and nothing was changed but the gradients, now zero */
    /* Of several ranks: */
    double exchanged;      /* bytes of gradients and parameters that every rank sent */
    double exchange_ms;    /* time that took; 0: not measured */
    double exposed_ms;     /* of it, time in which nothing was computed meanwhile */
} StepStats;

typedef struct Backend {
    const char *name; /* "cpu", "cuda" */
    FoxTable table;   /* of the model; owned by the back end */
    BackendSpec spec;
    Partition partition; /* of the flat space among the ranks: how gradients travel, and who writes what of a checkpoint */
    Partition owned;     /* among the ranks that share the optimizer's state: the same, or (not sharded) one that owns all; */
    int owner;           /* this rank keeps share number `owner` of it */
    bool whole_params;   /* every rank keeps all parameters in float32 */
    int block;           /* queries, and keys, in a block of attention: the grain of pruning */
    int *first_blocks;   /* NULL, or where evaluate() writes the first key block that each query block of its first sequence
                            keeps: [L, H, ceil(T / block)]; the caller sets and owns it */
    double peak_flops; /* matrix products per second that the device is sold for; 0: unknown */
    void *self;        /* the implementation's own state */

    /* Prints the device and the memory that allocate() will take, by purpose. */
    void (*report)(const struct Backend *, FILE *out);
    /* Takes that memory, all at once; call it before any function below. Everything starts at zero: fill the parameters
     * with write(). Fails, saying which options need less, where the machine has not so much. */
    bool (*allocate)(struct Backend *, FoxError *);
    /* Bytes of device memory (cuda) or main memory (cpu) the back end holds. */
    int64_t (*memory)(const struct Backend *);

    /* Main memory that read() fills fastest, or NULL where there is not enough; release with free_host. */
    void *(*allocate_host)(struct Backend *, int64_t bytes);
    void (*free_host)(struct Backend *, void *);

    /* Copies `count` floats of a buffer from `start` to `host`, or back. Of what this rank does not keep (Adam's moments outside
     * its share; on a GPU also parameters) nothing is read, and what is written there is passed over: so all ranks may write the
     * same whole arrays. */
    void (*read)(struct Backend *, FoxBuffer, int64_t start, int64_t count, float *host);
    void (*write)(struct Backend *, FoxBuffer, int64_t start, int64_t count, const float *host);

    /* Forward and backward of one micro-batch. tokens, targets: [B, T], each in [0, V). */
    void (*forward_backward)(struct Backend *, const int32_t *tokens, const int32_t *targets, double scale);
    /* Ends the step: all ranks call it together. Synchronous. */
    void (*update)(struct Backend *, const AdamW *, StepStats *);
    /* Instead of update(), when a rank failed: what the step has under way with the others is given up. Only read() and free()
     * may follow. NULL where nothing is under way. */
    void (*abandon)(struct Backend *);
    /* Forward only; losses: [B, T], cross entropy of each token. */
    void (*evaluate)(struct Backend *, const int32_t *tokens, const int32_t *targets, float *losses);

    /* Blocks of causal attention skipped, and all of them, per [layer, head], summed over the micro-batches since the
     * last call; then starts again from zero. Both are L*H long. This rank only. */
    void (*pruning)(struct Backend *, double *skipped, double *total);

    /* Decoding, one token at a time, up to max_tokens tokens. decode(): feeds the next token, logits: [V] for the one
     * after. The CPU keeps a key/value cache, out of which keys go that ACP prunes for good; a GPU runs the forward pass
     * over the text so far (its newest B*T tokens). */
    void (*decode_begin)(struct Backend *, int max_tokens);
    void (*decode)(struct Backend *, int32_t token, float *logits);
    void (*decode_end)(struct Backend *);

    void (*free)(struct Backend *);
} Backend;

/* Decides who owns what; for the back ends. */
static inline void backend_divide(Backend *b, const Ranks *ranks) {
    bool sharded = b->spec.zero && ranks->size > 1;
    b->partition = partition_create(b->table.total, ranks->size);
    b->owned = partition_create(b->table.total, sharded ? ranks->size : 1);
    b->owner = sharded ? ranks->rank : 0;
}

static inline bool backend_sharded(const Backend *b) {
    return b->owned.ranks > 1;
}

/* This rank's piece of bucket `bucket` of b->owned. */
static inline Piece backend_piece(const Backend *b, int bucket) {
    return partition_piece(&b->owned, bucket, b->owner);
}

/* Opens the CPU back end: checks the configuration and makes its table; takes no memory for it yet. `ranks` must outlive
 * it. */
bool backend_cpu_open(Backend *, const BackendSpec *, const Ranks *ranks, FoxError *);

#ifdef FOX_CUDA
/* The same on this rank's GPU (bf16, float32 master weights). */
bool backend_cuda_open(Backend *, const BackendSpec *, const Ranks *ranks, FoxError *);
/* True where a GPU can be used; otherwise `why` says what is missing. */
bool backend_cuda_available(char why[256]);
#endif

#endif

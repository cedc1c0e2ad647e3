#include "decode.h"

#include <unistd.h>

/* Everything the CPU back end owns. */
typedef struct CpuBackend {
    const Ranks *ranks;
    FoxModel model;
    FoxDecoder decoder;
    float *params, *grads;                   /* flat, partition.padded floats each */
    float *adam_m, *adam_v;                  /* this rank's share, partition_share(&owned) floats each */
    float *losses;                           /* [B, T] */
    double loss;                             /* of the step so far, this rank's part */
} CpuBackend;

static CpuBackend *cpu(Backend *b) {
    return (CpuBackend *)b->self;
}

/* Parameters and gradients are whole on every rank; of the moments each keeps its share. */
static void cpu_copy(Backend *b, FoxBuffer buffer, int64_t start, int64_t count, float *to_host, const float *from_host) {
    CpuBackend *s = cpu(b);
    float *whole = buffer == FOX_PARAMS ? s->params : buffer == FOX_GRADS ? s->grads : NULL;
    float *share = buffer == FOX_ADAM_M ? s->adam_m : s->adam_v;
    for (int k = 0; k < (whole != NULL ? 1 : b->owned.buckets); k++) {
        Piece all = {start, count, start}, piece = whole != NULL ? all : partition_within(backend_piece(b, k), start, count);
        if (piece.count == 0) {
            continue;
        }
        float *mine = (whole != NULL ? whole : share) + piece.local;
        size_t bytes = sizeof(float) * (size_t)piece.count;
        if (to_host != NULL) {
            memcpy(to_host + (piece.start - start), mine, bytes);
        } else {
            memcpy(mine, from_host + (piece.start - start), bytes);
        }
    }
}

static void cpu_read(Backend *b, FoxBuffer buffer, int64_t start, int64_t count, float *host) {
    cpu_copy(b, buffer, start, count, host, NULL);
}

static void cpu_write(Backend *b, FoxBuffer buffer, int64_t start, int64_t count, const float *host) {
    cpu_copy(b, buffer, start, count, NULL, host);
}

static void *cpu_allocate_host(Backend *b, int64_t bytes) {
    (void)b;
    return malloc((size_t)bytes);
}

static void cpu_free_host(Backend *b, void *memory) {
    (void)b;
    free(memory);
}

static int64_t cpu_activation_bytes(const BackendSpec *spec) {
    return fox_model_bytes(&spec->config, spec->B, spec->T, spec->recompute > 0, true);
}

static int64_t cpu_memory(const Backend *b) {
    return (int64_t)sizeof(float) * 2 * (b->partition.padded + partition_share(&b->owned)) + cpu_activation_bytes(&b->spec);
}

static void cpu_report(const Backend *b, FILE *out) {
    double MiB = 1048576.0, flat = (double)b->partition.padded * sizeof(float) / MiB;
    double share = (double)partition_share(&b->owned) * sizeof(float) / MiB;
    fprintf(out, "device              cpu, float32\n");
    fprintf(out, "parameters          %9.1f MiB   (%.2fM)\n", flat, (double)b->table.parameters / 1e6);
    fprintf(out, "gradients           %9.1f MiB\n", flat);
    fprintf(out, "Adam moments        %9.1f MiB%s\n", 2 * share, backend_sharded(b) ? "   (this rank's share)" : "");
    fprintf(out, "activations         %9.1f MiB   (%d x %d tokens, recompute %d)\n", (double)cpu_activation_bytes(&b->spec) / MiB,
            b->spec.B, b->spec.T, b->spec.recompute);
}

/* The memory is touched as it is used, and a machine that runs out of it kills the process without a word: so ask first. */
static bool cpu_allocate(Backend *b, FoxError *err) {
    CpuBackend *s = cpu(b);
    const BackendSpec *spec = &b->spec;
    double need = (double)cpu_memory(b) * s->ranks->local_size;
    double have = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    if (need > have) {
        return fox_fail(err, "the model needs %.1f GiB of memory, this machine has %.1f; lower -b (micro-batch) or -T (context), "
                        "set -r 2 (recompute), or take a smaller -e (model)", need / 0x1p30, have / 0x1p30);
    }
    s->params = FOX_NEW(float, b->partition.padded);
    s->grads = FOX_NEW(float, b->partition.padded);
    s->adam_m = FOX_NEW(float, partition_share(&b->owned));
    s->adam_v = FOX_NEW(float, partition_share(&b->owned));
    s->losses = FOX_NEW(float, (int64_t)spec->B * spec->T);
    s->model = fox_model_create(&spec->config, &b->table, s->params, s->grads, spec->B, spec->T, spec->recompute > 0);
    s->model.acp = spec->acp;
    s->model.log_tolerance = spec->log_tolerance;
    return true;
}

static void cpu_forward_backward(Backend *b, const int32_t *tokens, const int32_t *targets, double scale) {
    CpuBackend *s = cpu(b);
    int64_t N = (int64_t)b->spec.B * b->spec.T;
    double sum = 0;
    fox_forward_backward(&s->model, tokens, targets, s->losses, (float)(scale / (double)N));
    for (int64_t n = 0; n < N; n++) {
        sum += (double)s->losses[n];
    }
    s->loss += scale * sum / (double)N;
}

static void cpu_evaluate(Backend *b, const int32_t *tokens, const int32_t *targets, float *losses) {
    FoxModel *m = &cpu(b)->model;
    m->first_blocks = b->first_blocks;
    fox_forward(m, tokens, targets, losses);
    m->first_blocks = NULL;
}

/* Adds up the gradients of all ranks; of a sharded optimizer only where it is this rank's. */
static void reduce_gradients(Backend *b) {
    CpuBackend *s = cpu(b);
    const Partition *p = &b->partition;
    for (int k = 0; k < p->buckets; k++) {
        float *bucket = s->grads + partition_start(p, k);
        int64_t piece = partition_piece_length(p, k);
        if (backend_sharded(b)) {
            ranks_scatter_sum(s->ranks, bucket, piece);
        } else {
            ranks_sum_float(s->ranks, bucket, piece * p->ranks);
        }
    }
}

/* Norm of the gradient. It is summed grain by grain, so that it does not depend on the number of threads, nor on which rank
 * owns a grain. */
static double gradient_norm(Backend *b) {
    CpuBackend *s = cpu(b);
    int64_t grains = b->partition.padded / PARTITION_GRAIN;
    double *sums = FOX_NEW(double, grains), total = 0;
    for (int k = 0; k < b->owned.buckets; k++) {
        Piece piece = backend_piece(b, k);
        int64_t first = piece.start / PARTITION_GRAIN, count = (piece.count + PARTITION_GRAIN - 1) / PARTITION_GRAIN;
#pragma omp parallel for
        for (int64_t g = first; g < first + count; g++) {
            double sum = 0;
            for (int64_t i = g * PARTITION_GRAIN; i < fox_min64(b->table.total, (g + 1) * PARTITION_GRAIN); i++) {
                sum += (double)s->grads[i] * (double)s->grads[i];
            }
            sums[g] = sum;
        }
    }
    if (backend_sharded(b)) {
        ranks_sum_double(s->ranks, sums, grains);
    }
    for (int64_t g = 0; g < grains; g++) {
        total += sums[g];
    }
    free(sums);
    return sqrt(total);
}

/* AdamW (Loshchilov, Hutter 2019) on `count` parameters, of which those from decay_from on decay; the gradient is multiplied by
 * grad_scale first. */
static void adamw_update(float *params, float *m, float *v, const float *grads, int64_t count, int64_t decay_from,
                         const AdamW *adamw, double grad_scale) {
    double correct_m = 1 - pow(adamw->beta1, (double)adamw->step), correct_v = 1 - pow(adamw->beta2, (double)adamw->step);
    float beta1 = (float)adamw->beta1, beta2 = (float)adamw->beta2, scale = (float)grad_scale;
    float rate = (float)(adamw->learning_rate / correct_m), v_scale = (float)(1 / correct_v), eps = (float)adamw->eps;
    float shrink = (float)(1 - adamw->learning_rate * adamw->weight_decay);
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) {
        float g = grads[i] * scale;
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        params[i] = params[i] * (i >= decay_from ? shrink : 1) - rate * m[i] / (sqrtf(v[i] * v_scale) + eps);
    }
}

/* AdamW on what this rank owns; then every rank gives the others its new parameters. */
static void update_parameters(Backend *b, const AdamW *adamw, double grad_scale) {
    CpuBackend *s = cpu(b);
    const Partition *p = &b->partition;
    for (int k = 0; k < b->owned.buckets; k++) {
        Piece piece = backend_piece(b, k);
        adamw_update(s->params + piece.start, s->adam_m + piece.local, s->adam_v + piece.local, s->grads + piece.start, piece.count,
                     b->table.decayed - piece.start, adamw, grad_scale);
    }
    for (int k = 0; backend_sharded(b) && k < p->buckets; k++) {
        ranks_gather(s->ranks, s->params + partition_start(p, k), partition_piece_length(p, k) * (int64_t)sizeof(float));
    }
}

static void cpu_update(Backend *b, const AdamW *adamw, StepStats *stats) {
    CpuBackend *s = cpu(b);
    memset(stats, 0, sizeof *stats);
    ranks_sum_double(s->ranks, &s->loss, 1);
    reduce_gradients(b);
    stats->loss = s->loss;
    stats->grad_norm = gradient_norm(b);
    stats->applied = isfinite(stats->loss) && isfinite(stats->grad_norm);
    if (stats->applied) {
        bool clip = adamw->grad_clip > 0 && stats->grad_norm > adamw->grad_clip;
        update_parameters(b, adamw, clip ? adamw->grad_clip / stats->grad_norm : 1);
    }
    memset(s->grads, 0, sizeof(float) * (size_t)b->partition.padded);
    s->loss = 0;
}

static void cpu_pruning(Backend *b, double *skipped, double *total) {
    FoxModel *m = &cpu(b)->model;
    size_t bytes = sizeof(double) * (size_t)(m->config.num_hidden_layers * m->config.num_heads);
    memcpy(skipped, m->skipped, bytes);
    memcpy(total, m->total, bytes);
    memset(m->skipped, 0, bytes);
    memset(m->total, 0, bytes);
}

static void cpu_decode_begin(Backend *b, int max_tokens) {
    cpu(b)->decoder = fox_decoder_create(&cpu(b)->model, max_tokens);
}

static void cpu_decode(Backend *b, int32_t token, float *logits) {
    fox_decode(&cpu(b)->decoder, token, logits);
}

static void cpu_decode_end(Backend *b) {
    fox_decoder_free(&cpu(b)->decoder);
}

static void cpu_free(Backend *b) {
    CpuBackend *s = cpu(b);
    fox_model_free(&s->model);
    free(s->params);
    free(s->grads);
    free(s->adam_m);
    free(s->adam_v);
    free(s->losses);
    free(s);
    fox_table_free(&b->table);
    memset(b, 0, sizeof *b);
}

bool backend_cpu_open(Backend *b, const BackendSpec *spec, const Ranks *ranks, FoxError *err) {
    if (!fox_config_check(&spec->config, err)) {
        return false;
    }
    if (spec->grad_bf16) {
        return fox_fail(err, "--grad-dtype bf16 is for GPUs; the CPU adds gradients in float32");
    }
    memset(b, 0, sizeof *b);
    b->name = "cpu";
    b->spec = *spec;
    b->block = FOX_BLOCK;
    b->whole_params = true;
    b->table = fox_table_create(&spec->config);
    backend_divide(b, ranks);
    b->report = cpu_report;
    b->allocate = cpu_allocate;
    b->memory = cpu_memory;
    b->allocate_host = cpu_allocate_host;
    b->free_host = cpu_free_host;
    b->read = cpu_read;
    b->write = cpu_write;
    b->forward_backward = cpu_forward_backward;
    b->update = cpu_update;
    b->evaluate = cpu_evaluate;
    b->pruning = cpu_pruning;
    b->decode_begin = cpu_decode_begin;
    b->decode = cpu_decode;
    b->decode_end = cpu_decode_end;
    b->free = cpu_free;

    ranks_share_cores(ranks);
    CpuBackend *s = FOX_NEW(CpuBackend, 1);
    b->self = s;
    s->ranks = ranks;
    return true;
}

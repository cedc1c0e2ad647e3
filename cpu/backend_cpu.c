#include "decode.h"

#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* Everything the CPU back end owns. */
typedef struct CpuBackend {
    const Ranks *ranks;
    FoxModel model;
    FoxDecoder decoder;
    float *params, *grads, *adam_m, *adam_v; /* flat, table.total floats each */
    float *losses;                           /* [B, T] */
    double loss;                             /* of the step so far, this rank's part */
} CpuBackend;

static CpuBackend *cpu(Backend *b) {
    return (CpuBackend *)b->self;
}

static float *cpu_buffer(Backend *b, FoxBuffer buffer) {
    CpuBackend *s = cpu(b);
    switch (buffer) {
    case FOX_GRADS:
        return s->grads;
    case FOX_ADAM_M:
        return s->adam_m;
    case FOX_ADAM_V:
        return s->adam_v;
    default:
        return s->params;
    }
}

static void cpu_read(Backend *b, FoxBuffer buffer, int64_t start, int64_t count, float *host) {
    memcpy(host, cpu_buffer(b, buffer) + start, sizeof(float) * (size_t)count);
}

static void cpu_write(Backend *b, FoxBuffer buffer, int64_t start, int64_t count, const float *host) {
    memcpy(cpu_buffer(b, buffer) + start, host, sizeof(float) * (size_t)count);
}

static int64_t cpu_activation_bytes(const BackendSpec *spec) {
    return fox_model_bytes(&spec->config, spec->B, spec->T, spec->recompute > 0, true);
}

static int64_t cpu_memory(const Backend *b) {
    return 4 * (int64_t)sizeof(float) * b->table.total + cpu_activation_bytes(&b->spec);
}

static void cpu_report(const Backend *b, FILE *out) {
    double MiB = 1048576.0, flat = (double)b->table.total * sizeof(float) / MiB;
    fprintf(out, "device              cpu, float32\n");
    fprintf(out, "parameters          %9.1f MiB   (%.2fM)\n", flat, (double)b->table.parameters / 1e6);
    fprintf(out, "gradients           %9.1f MiB\n", flat);
    fprintf(out, "Adam moments        %9.1f MiB\n", 2 * flat);
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
    s->params = FOX_NEW(float, b->table.total);
    s->grads = FOX_NEW(float, b->table.total);
    s->adam_m = FOX_NEW(float, b->table.total);
    s->adam_v = FOX_NEW(float, b->table.total);
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
    fox_forward(&cpu(b)->model, tokens, targets, losses);
}

/* Norm of a flat buffer, summed in pieces of fixed size so that it does not depend on the number of threads. */
static double flat_norm(const float *x, int64_t count) {
    enum { PIECE = 4096 };
    int64_t pieces = (count + PIECE - 1) / PIECE;
    double *sums = FOX_NEW(double, pieces), total = 0;
#pragma omp parallel for
    for (int64_t p = 0; p < pieces; p++) {
        double sum = 0;
        for (int64_t i = p * PIECE; i < fox_min64(count, (p + 1) * PIECE); i++) {
            sum += (double)x[i] * (double)x[i];
        }
        sums[p] = sum;
    }
    for (int64_t p = 0; p < pieces; p++) {
        total += sums[p];
    }
    free(sums);
    return sqrt(total);
}

/* AdamW (Loshchilov, Hutter 2019) on `count` parameters; the gradient is multiplied by grad_scale first. */
static void adamw_update(float *params, float *m, float *v, const float *grads, int64_t count, const AdamW *adamw, bool decay,
                         double grad_scale) {
    double correct_m = 1 - pow(adamw->beta1, (double)adamw->step), correct_v = 1 - pow(adamw->beta2, (double)adamw->step);
    float beta1 = (float)adamw->beta1, beta2 = (float)adamw->beta2, scale = (float)grad_scale;
    float rate = (float)(adamw->learning_rate / correct_m), v_scale = (float)(1 / correct_v), eps = (float)adamw->eps;
    float shrink = (float)(1 - (decay ? adamw->learning_rate * adamw->weight_decay : 0));
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) {
        float g = grads[i] * scale;
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        params[i] = params[i] * shrink - rate * m[i] / (sqrtf(v[i] * v_scale) + eps);
    }
}

static void cpu_update(Backend *b, const AdamW *adamw, StepStats *stats) {
    CpuBackend *s = cpu(b);
    ranks_sum_double(s->ranks, &s->loss, 1);
    ranks_sum_float(s->ranks, s->grads, b->table.total);
    stats->loss = s->loss;
    stats->grad_norm = flat_norm(s->grads, b->table.total);
    stats->applied = isfinite(stats->loss) && isfinite(stats->grad_norm);
    if (stats->applied) {
        bool clip = adamw->grad_clip > 0 && stats->grad_norm > adamw->grad_clip;
        double grad_scale = clip ? adamw->grad_clip / stats->grad_norm : 1;
        for (int t = 0; t < b->table.count; t++) {
            const FoxTensor *tensor = &b->table.tensors[t];
            int64_t at = tensor->offset;
            adamw_update(s->params + at, s->adam_m + at, s->adam_v + at, s->grads + at, tensor->size, adamw, tensor->decay,
                         grad_scale);
        }
    }
    memset(s->grads, 0, sizeof(float) * (size_t)b->table.total);
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

/* Ranks on one machine share its cores: more threads than cores would wait for each other. OMP_NUM_THREADS overrides. */
static void share_cores(const Ranks *ranks) {
#ifdef _OPENMP
    int share = (int)sysconf(_SC_NPROCESSORS_ONLN) / ranks->local_size;
    if (ranks->local_size > 1 && getenv("OMP_NUM_THREADS") == NULL && omp_get_max_threads() > share) {
        omp_set_num_threads(share > 1 ? share : 1);
    }
#else
    (void)ranks;
#endif
}

bool backend_cpu_open(Backend *b, const BackendSpec *spec, const Ranks *ranks, FoxError *err) {
    if (!fox_config_check(&spec->config, err)) {
        return false;
    }
    memset(b, 0, sizeof *b);
    b->name = "cpu";
    b->spec = *spec;
    b->table = fox_table_create(&spec->config);
    b->report = cpu_report;
    b->allocate = cpu_allocate;
    b->memory = cpu_memory;
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

    share_cores(ranks);
    CpuBackend *s = FOX_NEW(CpuBackend, 1);
    b->self = s;
    s->ranks = ranks;
    return true;
}

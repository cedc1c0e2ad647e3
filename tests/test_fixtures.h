/* Cases of the official PyTorch model: weights, tokens, per-token losses and the gradient of every parameter. */
#ifndef FOX_TESTS_FIXTURES_H
#define FOX_TESTS_FIXTURES_H

#include "../train/checkpoint.h"
#include "../train/safetensors.h"
#include "check.h"

/* Copies every parameter out of a fixture; `prefix` is "" for weights, "grad." for gradients. */
static bool fixture_read(const SafeTensors *file, const FoxTable *table, const char *prefix, float *out, FoxError *err) {
    for (int i = 0; i < table->count; i++) {
        const FoxTensor *tensor = &table->tensors[i];
        char name[100];
        snprintf(name, sizeof name, "%s%s", prefix, tensor->name);
        const SafeTensor *stored = safetensors_find(file, name);
        if (stored == NULL || stored->count != tensor->size) {
            return fox_fail(err, "%s: no tensor %s with %lld elements", file->path, name, (long long)tensor->size);
        }
        if (!safetensors_read_float(file, stored, 0, tensor->size, out + tensor->offset, err)) {
            return false;
        }
    }
    return true;
}

/* A fixture in memory: the official model's weights, a batch, and what it made of it. Weights and gradients are flat. */
typedef struct Fixture {
    FoxConfig config;
    int B, T;
    int32_t *tokens, *targets;       /* [B, T] */
    float *losses, *params, *grads;
} Fixture;

static void fixture_close(Fixture *f) {
    free(f->tokens);
    free(f->targets);
    free(f->losses);
    free(f->params);
    free(f->grads);
    memset(f, 0, sizeof *f);
}

static bool fixture_load(const SafeTensors *file, Fixture *f, FoxError *err) {
    const SafeTensor *ids = safetensors_find(file, "input_ids"), *labels = safetensors_find(file, "labels");
    const SafeTensor *loss = safetensors_find(file, "loss");
    if (!(ids && labels && loss && ids->ndim == 2 && labels->count == ids->count && loss->count == ids->count)) {
        return fox_fail(err, "%s: input_ids, labels and loss of one shape [B, T] expected", file->path);
    }
    if (!checkpoint_config_from_metadata(file, &f->config, err)) {
        return false;
    }
    FoxTable table = fox_table_create(&f->config);
    f->B = (int)ids->shape[0];
    f->T = (int)ids->shape[1];
    f->tokens = FOX_NEW(int32_t, ids->count);
    f->targets = FOX_NEW(int32_t, ids->count);
    f->losses = FOX_NEW(float, ids->count);
    f->params = FOX_NEW(float, table.total);
    f->grads = FOX_NEW(float, table.total);
    bool ok = safetensors_read_int32(file, ids, f->tokens, err) && safetensors_read_int32(file, labels, f->targets, err) &&
              safetensors_read_float(file, loss, 0, loss->count, f->losses, err) && fixture_read(file, &table, "", f->params, err) &&
              fixture_read(file, &table, "grad.", f->grads, err);
    fox_table_free(&table);
    return ok;
}

/* Reads a fixture; close it with fixture_close. */
static bool fixture_open(const char *path, Fixture *f, FoxError *err) {
    SafeTensors file;
    memset(f, 0, sizeof *f);
    if (!safetensors_open(path, &file, err)) {
        return false;
    }
    bool ok = fixture_load(&file, f, err);
    safetensors_close(&file);
    if (!ok) {
        fixture_close(f);
    }
    return ok;
}

/* One run of the fixture on a back end: losses within `loss_limit`, every gradient within `gradient_limit` relative. */
static void fixture_compare(Tests *t, const char *name, Backend *b, const Fixture *f, double loss_limit, double gradient_limit) {
    int N = b->spec.B * b->spec.T;
    float *losses = FOX_NEW(float, N), *grads = FOX_NEW(float, b->table.total);
    b->evaluate(b, f->tokens, f->targets, losses);
    memset(grads, 0, sizeof(float) * (size_t)b->table.total);
    b->write(b, FOX_GRADS, 0, b->table.total, grads);
    b->forward_backward(b, f->tokens, f->targets, 1.0);
    b->read(b, FOX_GRADS, 0, b->table.total, grads);
    double loss_error = max_error(losses, f->losses, N), worst = 0;
    const char *worst_name = "";
    check(t, loss_error <= loss_limit, "%s: loss off by %.3g", name, loss_error);
    for (int i = 0; i < b->table.count; i++) {
        const FoxTensor *tensor = &b->table.tensors[i];
        double error = relative_error(grads + tensor->offset, f->grads + tensor->offset, tensor->size);
        check(t, error <= gradient_limit, "%s: gradient of %s off by %.3g", name, tensor->name, error);
        if (!(error <= worst) && worst == worst) {
            worst = error;
            worst_name = tensor->name;
        }
    }
    static const char *const modes[] = {"off", "paper", "tight"};
    printf("%s on %s, acp %s: loss within %.1e, gradients within %.1e (%s)\n", name, b->name, modes[b->spec.acp], loss_error, worst,
           worst_name);
    free(losses);
    free(grads);
}

/* Any file of the fixtures' form, with and without pruning: in float32 on the CPU, and where there is a GPU in bf16 there
 * (whose error against the official model's own bf16 error tests/test_cuda_model.h judges). */
static void test_fixture_file(Tests *t, const char *path) {
    FoxError err = {{0}};
    Fixture f;
    static const Ranks alone = RANKS_ALONE;
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    if (!check(t, fixture_open(path, &f, &err), "%s", err.text)) {
        return;
    }
    bool gpu = false;
#ifdef FOX_CUDA
    char why[256];
    gpu = backend_cuda_available(why);
#endif
    for (int run = 0; run < (gpu ? 6 : 3); run++) {
        BackendSpec spec;
        Backend b;
        bool (*open)(Backend *, const BackendSpec *, const Ranks *, FoxError *) = backend_cpu_open;
#ifdef FOX_CUDA
        open = run < 3 ? backend_cpu_open : backend_cuda_open;
#endif
        memset(&spec, 0, sizeof spec);
        spec.config = f.config;
        spec.B = f.B;
        spec.T = f.T;
        spec.acp = (AcpMode)(run % 3);
        spec.log_tolerance = -10;
        if (check(t, open(&b, &spec, &alone, &err) && b.allocate(&b, &err), "%s: %s", name, err.text)) {
            b.write(&b, FOX_PARAMS, 0, b.table.total, f.params);
            fixture_compare(t, name, &b, &f, run < 3 ? 1e-4 : 0.2, run < 3 ? 1e-4 : 0.1);
            b.free(&b);
        }
    }
    fixture_close(&f);
}

static const char *const fixture_names[] = {"fox_pro_d64", "fox_llama_d64", "transformer_llama_d64"};

static void test_fixtures(Tests *t) {
    for (size_t i = 0; i < sizeof fixture_names / sizeof fixture_names[0]; i++) {
        char path[1100];
        snprintf(path, sizeof path, "%s/fixtures/%s.safetensors", t->data, fixture_names[i]);
        test_fixture_file(t, path);
    }
}

#endif

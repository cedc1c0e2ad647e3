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

/* One run of the fixture on a back end: losses within 1e-4, every gradient within 1e-4 relative. */
static void fixture_compare(Tests *t, const char *name, Backend *b, const int32_t *tokens, const int32_t *targets,
                            const float *losses_ref, const float *grads_ref) {
    int N = b->spec.B * b->spec.T;
    float *losses = FOX_NEW(float, N), *grads = FOX_NEW(float, b->table.total);
    b->evaluate(b, tokens, targets, losses);
    memset(grads, 0, sizeof(float) * (size_t)b->table.total);
    b->write(b, FOX_GRADS, 0, b->table.total, grads);
    b->forward_backward(b, tokens, targets, 1.0);
    b->read(b, FOX_GRADS, 0, b->table.total, grads);
    double loss_error = max_error(losses, losses_ref, N), worst = 0;
    const char *worst_name = "";
    check(t, loss_error <= 1e-4, "%s: loss off by %.3g", name, loss_error);
    for (int i = 0; i < b->table.count; i++) {
        const FoxTensor *tensor = &b->table.tensors[i];
        double error = relative_error(grads + tensor->offset, grads_ref + tensor->offset, tensor->size);
        check(t, error <= 1e-4, "%s: gradient of %s off by %.3g", name, tensor->name, error);
        if (!(error <= worst)) {
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

/* Any file of the fixtures' form, on every back end, with and without pruning. */
static void test_fixture_file(Tests *t, const char *path) {
    SafeTensors file;
    FoxError err = {{0}};
    FoxConfig config;
    Ranks ranks = {0, 1, 0, 1};
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    if (!check(t, safetensors_open(path, &file, &err), "%s", err.text)) {
        return;
    }
    const SafeTensor *ids = safetensors_find(&file, "input_ids"), *labels = safetensors_find(&file, "labels");
    const SafeTensor *loss = safetensors_find(&file, "loss");
    bool complete = ids && labels && loss && ids->ndim == 2 && labels->count == ids->count && loss->count == ids->count;
    if (!check(t, complete, "%s: input_ids, labels and loss of one shape [B, T] expected", path) ||
        !check(t, checkpoint_config_from_metadata(&file, &config, &err), "%s", err.text)) {
        safetensors_close(&file);
        return;
    }
    FoxTable table = fox_table_create(&config);
    int N = (int)ids->count;
    int32_t *tokens = FOX_NEW(int32_t, N), *targets = FOX_NEW(int32_t, N);
    float *losses = FOX_NEW(float, N), *params = FOX_NEW(float, table.total), *grads = FOX_NEW(float, table.total);
    bool read = safetensors_read_int32(&file, ids, tokens, &err) && safetensors_read_int32(&file, labels, targets, &err) &&
                safetensors_read_float(&file, loss, 0, N, losses, &err) && fixture_read(&file, &table, "", params, &err) &&
                fixture_read(&file, &table, "grad.", grads, &err);
    check(t, read, "%s", err.text);
    for (int acp = 0; read && acp < 3; acp++) {
        BackendSpec spec;
        Backend b;
        memset(&spec, 0, sizeof spec);
        spec.config = config;
        spec.B = (int)ids->shape[0];
        spec.T = (int)ids->shape[1];
        spec.acp = (AcpMode)acp;
        spec.log_tolerance = -10;
        if (check(t, backend_cpu_open(&b, &spec, &ranks, &err) && b.allocate(&b, &err), "%s", err.text)) {
            b.write(&b, FOX_PARAMS, 0, table.total, params);
            fixture_compare(t, name, &b, tokens, targets, losses, grads);
            b.free(&b);
        }
    }
    fox_table_free(&table);
    safetensors_close(&file);
    free(tokens);
    free(targets);
    free(losses);
    free(params);
    free(grads);
}

static void test_fixtures(Tests *t) {
    static const char *const names[] = {"fox_pro_d64", "fox_llama_d64", "transformer_llama_d64"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[1100];
        snprintf(path, sizeof path, "%s/fixtures/%s.safetensors", t->data, names[i]);
        test_fixture_file(t, path);
    }
}

#endif

/* The CUDA back end against the CPU one: losses, gradients, training steps, decoding, recomputation, repeatability. */
#ifndef FOX_TESTS_CUDA_MODEL_H
#define FOX_TESTS_CUDA_MODEL_H

#include "../train/backend.h"
#include "../train/json.h"
#include "check.h"
#include "test_fixtures.h"
#include "test_layers.h"

static bool open_both(Tests *t, const BackendSpec *spec, Backend *cpu_side, Backend *gpu_side, uint64_t seed) {
    static const Ranks alone = RANKS_ALONE;
    FoxError err = {{0}};
    bool ok = backend_cpu_open(cpu_side, spec, &alone, &err) && cpu_side->allocate(cpu_side, &err);
    if (!check(t, ok, "%s", err.text)) {
        return false;
    }
    ok = backend_cuda_open(gpu_side, spec, &alone, &err) && gpu_side->allocate(gpu_side, &err);
    if (!check(t, ok, "%s", err.text)) {
        cpu_side->free(cpu_side);
        return false;
    }
    int64_t total = cpu_side->table.total;
    float *params = FOX_NEW(float, total);
    fox_init_parameters(&cpu_side->table, seed, params);
    cpu_side->write(cpu_side, FOX_PARAMS, 0, total, params);
    gpu_side->write(gpu_side, FOX_PARAMS, 0, total, params);
    free(params);
    return true;
}

/* Configurations that the GPU computes: heads of 64 or 128 values, every switch by coin. */
static FoxConfig random_gpu_config(uint64_t seed) {
    FoxConfig c = random_config(seed);
    int D = fox_random(seed, 99) & 1 ? 64 : 128;
    c.num_heads = 1 + (int)(fox_random(seed, 98) % 3);
    c.hidden_size = D * c.num_heads;
    c.intermediate_size = 64 * (2 + (int)(fox_random(seed, 97) % 4));
    return c;
}

static BackendSpec random_spec(uint64_t seed) {
    static const int lengths[] = {1, 77, 200, 64, 333};
    BackendSpec spec;
    memset(&spec, 0, sizeof spec);
    spec.config = random_gpu_config(seed);
    spec.B = seed % 2 ? 3 : 1;
    spec.T = lengths[seed % 5];
    spec.acp = (AcpMode)(seed % 3);
    spec.log_tolerance = -10;
    spec.recompute = (int)(seed / 3 % 3);
    return spec;
}

static void read_gradients(Backend *b, const int32_t *tokens, const int32_t *targets, float *grads) {
    memset(grads, 0, sizeof(float) * (size_t)b->table.total);
    b->write(b, FOX_GRADS, 0, b->table.total, grads);
    b->forward_backward(b, tokens, targets, 1.0);
    b->read(b, FOX_GRADS, 0, b->table.total, grads);
}

/* One random model: losses of each token and every gradient, in bf16 against float32. */
static void compare_models(Tests *t, uint64_t seed, double *worst) {
    BackendSpec spec = random_spec(seed);
    Backend c, g;
    spec.deterministic = t->quick; /* cuBLASLt's first choice, else a sanitizer sees hundreds of its kernels, not ours */
    int N = spec.B * spec.T;
    if (!open_both(t, &spec, &c, &g, seed)) {
        return;
    }
    int64_t total = c.table.total;
    int32_t *tokens = FOX_NEW(int32_t, N), *targets = FOX_NEW(int32_t, N);
    float *loss_c = FOX_NEW(float, N), *loss_g = FOX_NEW(float, N), *grad_c = FOX_NEW(float, total), *grad_g = FOX_NEW(float, total);
    random_tokens(tokens, N, spec.config.vocab_size, seed);
    random_tokens(targets, N, spec.config.vocab_size, seed + 1);
    c.evaluate(&c, tokens, targets, loss_c);
    g.evaluate(&g, tokens, targets, loss_g);
    check(t, max_error(loss_g, loss_c, N) <= 0.1, "model %d: loss off by %.3g", (int)seed, max_error(loss_g, loss_c, N));
    check(t, relative_error(loss_g, loss_c, N) <= 5e-3, "model %d: losses off by %.3g", (int)seed, relative_error(loss_g, loss_c, N));
    read_gradients(&c, tokens, targets, grad_c);
    read_gradients(&g, tokens, targets, grad_g);
    double whole = flat_length(grad_c, total);
    for (int i = 0; i < c.table.count; i++) {
        const FoxTensor *tensor = &c.table.tensors[i];
        const float *ref = grad_c + tensor->offset;
        double length = flat_length(ref, tensor->size), error = relative_error(grad_g + tensor->offset, ref, tensor->size);
        error *= length / fmax(length, 0.02 * whole); /* small gradients, which cancel, are judged against the whole */
        check(t, error <= 0.05, "model %d: gradient of %s off by %.3g", (int)seed, tensor->name, error);
        *worst = worse(*worst, error);
    }
    free(tokens);
    free(targets);
    free(loss_c);
    free(loss_g);
    free(grad_c);
    free(grad_g);
    c.free(&c);
    g.free(&g);
}

/* Twenty steps of training (quick: eight) from the same weights on the same batches: the losses stay together. */
static void compare_training(Tests *t) {
    BackendSpec spec;
    Backend c, g;
    AdamW adamw = {1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, 0};
    StepStats sc, sg;
    enum { B = 2, T = 128 };
    int32_t tokens[B * T], targets[B * T];
    int steps = t->quick ? 8 : 20; /* racecheck takes tens of milliseconds for a launch */
    double worst = 0;
    memset(&spec, 0, sizeof spec);
    spec.config = pro_config(61, 128, 2, 2);
    spec.B = B;
    spec.T = T;
    spec.acp = ACP_PAPER;
    spec.log_tolerance = -10;
    spec.deterministic = t->quick;
    if (!open_both(t, &spec, &c, &g, 11)) {
        return;
    }
    for (adamw.step = 1; adamw.step <= steps; adamw.step++) {
        for (int micro = 0; micro < 2; micro++) {
            for (int i = 0; i < B * T; i++) { /* something to learn: the next token follows from this one */
                tokens[i] = (int32_t)(fox_random((uint64_t)(2 * adamw.step + micro), (uint64_t)i) % 61);
                targets[i] = (tokens[i] * 7 + 3) % 61;
            }
            c.forward_backward(&c, tokens, targets, 0.5);
            g.forward_backward(&g, tokens, targets, 0.5);
        }
        c.update(&c, &adamw, &sc);
        g.update(&g, &adamw, &sg);
        check(t, sg.applied && fabs(sg.grad_norm - sc.grad_norm) <= 0.03 * sc.grad_norm, "step %d: gradient norm %g, on the CPU %g",
              (int)adamw.step, sg.grad_norm, sc.grad_norm);
        worst = worse(worst, fabs(sg.loss - sc.loss));
    }
    check_error(t, "losses of training steps, GPU against CPU", worst, 0.02);
    check(t, t->quick || sg.loss < 3.5, "training on the GPU learns: loss %g", sg.loss);
    printf("training %d steps: losses of GPU and CPU within %.2g, last loss %.3f\n", steps, worst, sg.loss);

    float nan = NAN, *before = FOX_NEW(float, g.table.total), *after = FOX_NEW(float, g.table.total);
    g.read(&g, FOX_PARAMS, 0, g.table.total, before);
    g.forward_backward(&g, tokens, targets, 1.0);
    g.write(&g, FOX_GRADS, 5, 1, &nan);
    g.update(&g, &adamw, &sg);
    g.read(&g, FOX_PARAMS, 0, g.table.total, after);
    check(t, !sg.applied && memcmp(before, after, sizeof(float) * (size_t)g.table.total) == 0, "a NaN gradient changes no parameter");
    g.read(&g, FOX_GRADS, 0, g.table.total, after);
    check(t, max_error(after, after, g.table.total) == 0 && after[5] == 0, "and leaves the gradients zero");
    free(before);
    free(after);
    c.free(&c);
    g.free(&g);
}

/* Recomputation changes no bit of the gradients, and neither does repeating. */
static void compare_recompute(Tests *t) {
    BackendSpec spec;
    enum { B = 2, T = 300, N = B * T };
    int32_t tokens[N], targets[N];
    int different = 0;
    float *first = NULL;
    memset(&spec, 0, sizeof spec);
    spec.config = pro_config(97, 256, 3, 4);
    spec.B = B;
    spec.T = T;
    spec.acp = ACP_TIGHT;
    spec.log_tolerance = -10;
    spec.deterministic = true;
    random_tokens(tokens, N, 97, 1);
    random_tokens(targets, N, 97, 2);
    for (int run = 0; run < 4; run++) {
        Backend c, g;
        spec.recompute = run % 3;
        if (!open_both(t, &spec, &c, &g, 17)) {
            return;
        }
        size_t bytes = sizeof(float) * (size_t)g.table.total;
        float *grads = FOX_NEW(float, g.table.total);
        read_gradients(&g, tokens, targets, grads);
        if (first == NULL) {
            first = FOX_NEW(float, g.table.total);
            memcpy(first, grads, bytes);
        }
        different += !check(t, memcmp(first, grads, bytes) == 0, "recompute level %d gives the same gradients, bit for bit", spec.recompute);
        read_gradients(&g, tokens, targets, grads);
        different += !check(t, memcmp(first, grads, bytes) == 0, "repeating gives the same gradients, bit for bit");
        free(grads);
        c.free(&c);
        g.free(&g);
    }
    free(first);
    printf("recompute levels 0 to 2: %d of 8 gradients differ\n", different);
}

/* Decoding gives the losses of the forward pass. */
static void compare_decoding(Tests *t) {
    BackendSpec spec;
    Backend c, g;
    enum { T = 150, V = 61 };
    int32_t tokens[T], targets[T];
    float evaluated[T], decoded[T], logits[V];
    int length = t->quick ? 24 : T;
    memset(&spec, 0, sizeof spec);
    spec.config = pro_config(V, 128, 2, 2);
    spec.B = 1;
    spec.T = T;
    spec.acp = ACP_PAPER;
    spec.log_tolerance = -10;
    spec.deterministic = t->quick;
    random_tokens(tokens, T, V, 5);
    random_tokens(targets, T, V, 6);
    if (!open_both(t, &spec, &c, &g, 23)) {
        return;
    }
    g.evaluate(&g, tokens, targets, evaluated);
    g.decode_begin(&g, T);
    for (int n = 0; n < length; n++) {
        g.decode(&g, tokens[n], logits);
        cross_entropy(decoded + n, logits, targets + n, 1, V, 0);
    }
    g.decode_end(&g);
    check_error(t, "losses of decoding on the GPU", max_error(decoded, evaluated, length), 0.05);
    printf("decoding %d tokens: losses within %.2g of the forward pass\n", length, max_error(decoded, evaluated, length));
    c.free(&c);
    g.free(&g);
}

/* The official cases in bf16. The yardstick is the official model's own error under bf16 autocast, the largest of several
 * draws, as dev/parity_official.py --truth measured it: ours may be 1.2 times as large. */
static void compare_fixture(Tests *t, const char *name, const Json *cases) {
    char path[1100];
    snprintf(path, sizeof path, "%s/fixtures/%s.safetensors", t->data, name);
    static const Ranks alone = RANKS_ALONE;
    const Json *official = json_get(json_get(cases, name), "largest"), *allowed = json_get(official, "gradients");
    Fixture f;
    Backend b;
    BackendSpec spec;
    FoxError err = {{0}};
    if (!check(t, fixture_open(path, &f, &err), "%s", err.text)) {
        return;
    }
    memset(&spec, 0, sizeof spec);
    spec.config = f.config;
    spec.B = f.B;
    spec.T = f.T;
    spec.log_tolerance = -10;
    spec.deterministic = t->quick;
    for (int acp = 0; acp < 3; acp++) {
        spec.acp = (AcpMode)acp;
        if (!check(t, backend_cuda_open(&b, &spec, &alone, &err) && b.allocate(&b, &err), "%s", err.text)) {
            break;
        }
        int N = f.B * f.T;
        float *losses = FOX_NEW(float, N), *grads = FOX_NEW(float, b.table.total);
        double worst = 0;
        b.write(&b, FOX_PARAMS, 0, b.table.total, f.params);
        b.evaluate(&b, f.tokens, f.targets, losses);
        double loss_error = relative_error(losses, f.losses, N), loss_allowed = json_get(official, "loss")->number;
        check(t, loss_error <= 1.2 * loss_allowed, "%s: losses off by %.3g, the official model in bf16 by %.3g", name, loss_error,
              loss_allowed);
        read_gradients(&b, f.tokens, f.targets, grads);
        for (int i = 0; i < b.table.count; i++) {
            const FoxTensor *tensor = &b.table.tensors[i];
            double error = relative_error(grads + tensor->offset, f.grads + tensor->offset, tensor->size);
            const Json *limit = json_get(allowed, tensor->name);
            check(t, limit != NULL && error <= 1.2 * limit->number, "%s: gradient of %s off by %.3g, the official model's by %.3g", name,
                  tensor->name, error, limit ? limit->number : 0);
            worst = worse(worst, limit ? error / limit->number : INFINITY);
        }
        printf("%s on the GPU, acp mode %d: losses off by %.2e (official bf16: %.2e); gradients at most %.2f of the official error\n",
               name, acp, loss_error, loss_allowed, worst);
        free(losses);
        free(grads);
        b.free(&b);
    }
    fixture_close(&f);
}

static void compare_fixtures(Tests *t) {
    char path[1100];
    JsonDocument document;
    FoxError err = {{0}};
    snprintf(path, sizeof path, "%s/fixtures/official_bf16_error.json", t->data);
    if (!check(t, json_parse_file(path, &document, &err), "%s", err.text)) {
        return;
    }
    for (size_t i = 0; i < sizeof fixture_names / sizeof fixture_names[0]; i++) {
        compare_fixture(t, fixture_names[i], json_get(document.root, "cases"));
    }
    json_free(&document);
}

static void test_cuda_model(Tests *t) {
    char why[256];
    if (!backend_cuda_available(why)) {
        skip_without_gpus(t, 1, "models on a GPU: none can be used (%s)", why);
        return;
    }
    compare_fixtures(t);
    double worst = 0;
    int models = t->quick ? 6 : 30;
    for (int i = 0; i < models; i++) {
        compare_models(t, (uint64_t)i, &worst);
    }
    printf("%d random models on the GPU against the CPU: gradients within %.2g\n", models, worst);
    compare_training(t);
    compare_recompute(t);
    compare_decoding(t);
}

#endif

/* What pruning loses inside a trained model, against its promise: of no row more than exp(log tolerance).
 *
 *     make tools && build/release/check_mass CHECKPOINT SHARD CONTEXT [LOG_TOLERANCE] [EVAL.jsonl]
 *
 * The model's forward pass on the first window of the shard, in float32 on the CPU and without pruning, gives every
 * layer's real q, k and gates. From them come the ranges of `paper` and of `tight` by cpu/acp.h, with the GPU's blocks of
 * 128; EVAL.jsonl, of `train_fox -e CHECKPOINT -j SHARD -T CONTEXT --eval --acp paper` (or tight), adds those that the
 * GPU found. Each row's pruned mass is the sum of its exact weights. Printed: the blocks kept in each layer, and the
 * largest mass of any row, in units of what is allowed. Exit status 1 when one is above 1 or NaN, and when a test prunes
 * nothing: then its promise was not tried.
 *
 * 125M at T = 16384 takes about a minute on 16 cores. */
#include "../dataloader.h"
#include "../fox_layers.h"
#include "../tests/check.h"
#include "../train/checkpoint.h"
#include "../train/json.h"

enum { BLOCK = 128, TESTS = 3 };
static const char *const tests[TESTS] = {"paper", "tight", "GPU"};

/* Of one test in one layer: block pairs kept, of all heads; the largest mass. */
typedef struct Found {
    double kept, worst;
} Found;

/* Largest pruned mass of a row. Key blocks so far behind that they could not add a millionth of `allowed` are passed over. */
static double largest_mass(const AcpHead *head, const float *lse, double U, double allowed, const int *first) {
    double scale = 1 / sqrt((double)head->D), worst = 0;
    for (int i = 0; i < head->T; i++) {
        const float *q = head->q + i * head->stride;
        double mass = 0;
        for (int n = first[i / BLOCK] - 1; n >= 0; n--) {
            if (head->c[i] - head->c[(n + 1) * BLOCK - 1] + U - (double)lse[i] + log((double)head->T) < log(allowed) - 14) {
                break; // c does not increase: blocks further left weigh even less
            }
            for (int j = n * BLOCK; j < (n + 1) * BLOCK; j++) {
                mass += exp(acp_dot(q, head->k + j * head->stride, head->D) * scale + (head->c[i] - head->c[j]) - (double)lse[i]);
            }
        }
        worst = worse(worst, mass);
    }
    return worst;
}

static void check_head(const AcpHead *head, const float *lse, AcpNorms most, double log_tolerance, const int *of_gpu, Found found[TESTS]) {
    int blocks = acp_blocks(head->T, BLOCK);
    int *first = FOX_NEW(int, blocks);
    double U = acp_bound(most, head->D);
    for (int test = 0; test < TESTS; test++) {
        if (test == 0) {
            acp_first_blocks_paper(head->T, head->c, acp_threshold(U, head->T, log_tolerance), BLOCK, BLOCK, first);
        } else if (test == 1) {
            acp_first_blocks_tight(head, most, log_tolerance, BLOCK, BLOCK, first);
        } else if (of_gpu != NULL) {
            memcpy(first, of_gpu, sizeof(int) * (size_t)blocks);
        } else {
            continue;
        }
        double kept = (double)(acp_causal_blocks(head->T, BLOCK, BLOCK) - acp_skipped_blocks(blocks, first));
        double worst = largest_mass(head, lse, U, exp(log_tolerance), first);
#pragma omp critical
        {
            found[test].kept += kept;
            found[test].worst = worse(found[test].worst, worst);
        }
    }
    free(first);
}

/* The first `ranges` record of eval.jsonl: [L, H, blocks]. */
static int *read_ranges(const char *path, const FoxConfig *c, int T, FoxError *err) {
    int64_t count = (int64_t)c->num_hidden_layers * c->num_heads * acp_blocks(T, BLOCK), at = 0;
    int *ranges = FOX_NEW(int, count);
    char *text, *line;
    size_t length;
    if (!file_read(path, (size_t)1 << 30, &text, &length, err)) {
        return NULL;
    }
    for (line = strtok(text, "\n"); line != NULL && strncmp(line, "{\"kind\": \"ranges\"", 17) != 0; line = strtok(NULL, "\n")) {
    }
    JsonDocument document;
    if (line == NULL || !json_parse(line, strlen(line), path, &document, err)) {
        fox_fail(err, "%s has no record of ranges", path);
        return NULL;
    }
    for (const Json *layer = json_get(document.root, "first")->first; layer != NULL; layer = layer->next) {
        for (const Json *head = layer->first; head != NULL; head = head->next) {
            for (const Json *first = head->first; first != NULL && at < count; first = first->next) {
                ranges[at++] = (int)first->integer;
            }
        }
    }
    const Json *block = json_get(document.root, "block"), *context = json_get(document.root, "context");
    bool fits = at == count && block->integer == BLOCK && context->integer == T;
    json_free(&document);
    free(text);
    if (!fits) {
        fox_fail(err, "%s: the ranges are not of blocks of %d at T = %d in this model", path, BLOCK, T);
        return NULL;
    }
    return ranges;
}

/* The parameters of a checkpoint; *table is the back end's. */
static float *load(const char *dir, Backend *b, FoxError *err) {
    BackendSpec spec;
    Ranks ranks = RANKS_ALONE;
    memset(&spec, 0, sizeof spec);
    spec.B = spec.T = 1;
    if (!checkpoint_read_config(dir, &spec.config, err) || !backend_cpu_open(b, &spec, &ranks, err) || !b->allocate(b, err) ||
        !checkpoint_load_model(dir, b, &ranks, err)) {
        return NULL;
    }
    float *params = FOX_NEW(float, b->table.total);
    b->read(b, FOX_PARAMS, 0, b->table.total, params);
    return params;
}

static int32_t *first_window(const char *shard, int T, FoxError *err) {
    DataLoader loader;
    DataSpec spec = {T, 1, 0, false, 0, 0, 0, 1};
    int32_t *tokens = FOX_NEW(int32_t, 2 * (int64_t)T);
    bool ok = dataloader_open(&loader, shard, "*", &spec, err) && dataloader_next(&loader, tokens, tokens + T, err);
    dataloader_close(&loader);
    return ok ? tokens : NULL;
}

/* Every layer, as it is computed. Returns whether every test prunes something and no row loses more than is allowed. */
static bool check_layers(FoxModel *m, const int32_t *tokens, double log_tolerance, const int *of_gpu) {
    int L = m->config.num_hidden_layers, H = m->config.num_heads, d = m->config.hidden_size, T = m->T;
    double allowed = exp(log_tolerance), all = (double)H * (double)acp_causal_blocks(T, BLOCK, BLOCK);
    int blocks = acp_blocks(T, BLOCK), shown = of_gpu != NULL ? TESTS : TESTS - 1;
    Found whole[TESTS] = {{0, 0}};
    bool prunes[TESTS] = {false}, ok = true;
    embedding_forward(m->x, tokens, fox_weight(m, m->params, m->table->embeddings), T, d);
    for (int l = 0; l < L; l++) {
        FoxActs *a = &m->acts[0];
        FoxLayerWeights w = fox_layer_weights(m->table, l, m->params);
        Found found[TESTS] = {{0, 0}};
        fox_block_forward(m, l, a, true);
#pragma omp parallel for schedule(dynamic)
        for (int h = 0; h < H; h++) {
            AcpHead head = {T, d / H, a->q + h * (d / H), a->k + h * (d / H), d, a->c + (int64_t)h * T};
            const int *first = of_gpu != NULL ? of_gpu + ((int64_t)l * H + h) * blocks : NULL;
            check_head(&head, a->lse + (int64_t)h * T, fox_most_norms(&m->config, &w, &head, h), log_tolerance, first, found);
        }
        printf("layer %2d ", l);
        for (int test = 0; test < shown; test++) {
            printf("  %s keeps %6.2f%%, loses %.3g", tests[test], 100 * found[test].kept / all, found[test].worst / allowed);
            whole[test].kept += found[test].kept / L;
            whole[test].worst = worse(whole[test].worst, found[test].worst);
            prunes[test] = prunes[test] || found[test].kept < all;
        }
        printf("\n");
    }
    double worst = 0;
    for (int test = 0; test < shown; test++) {
        printf("%s keeps %.2f%% of the blocks; the largest mass that a row loses is %.3g of the allowed %.3g\n", tests[test],
               100 * whole[test].kept / all, whole[test].worst / allowed, allowed);
        worst = worse(worst, whole[test].worst / allowed);
        ok = ok && prunes[test];
    }
    printf("tight keeps %.1f%% fewer blocks than paper\n", 100 * (1 - whole[1].kept / whole[0].kept));
    return ok && worst <= 1;
}

int main(int argc, char **argv) {
    FoxError err = {{0}};
    Backend backend;
    int T = argc >= 4 ? atoi(argv[3]) : 0, *of_gpu = NULL;
    double log_tolerance = argc >= 5 ? atof(argv[4]) : -10;
    if (argc < 4 || argc > 6 || T < 1 || log_tolerance >= 0) {
        fox_die("usage: check_mass CHECKPOINT SHARD CONTEXT [LOG_TOLERANCE] [EVAL.jsonl]");
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    memset(&backend, 0, sizeof backend);
    float *params = load(argv[1], &backend, &err);
    int32_t *tokens = params != NULL ? first_window(argv[2], T, &err) : NULL;
    if (tokens == NULL) {
        fox_die("%s", err.text);
    }
    if (argc == 6 && (of_gpu = read_ranges(argv[5], &backend.spec.config, T, &err)) == NULL) {
        fox_die("%s", err.text);
    }
    if (!backend.spec.config.use_forget_gate) {
        fox_die("%s has no forget gates: nothing is pruned", argv[1]);
    }
    FoxModel model = fox_model_create(&backend.spec.config, &backend.table, params, NULL, 1, T, true);
    bool ok = check_layers(&model, tokens, log_tolerance, of_gpu);
    fox_model_free(&model);
    backend.free(&backend);
    free(params);
    free(tokens);
    free(of_gpu);
    return !ok;
}

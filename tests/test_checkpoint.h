/* Tests of what a model is and how a run is kept: configuration, the table of parameters, checkpoints. */
#ifndef FOX_TESTS_CHECKPOINT_H
#define FOX_TESTS_CHECKPOINT_H

#include "test_files.h"

/* ---- configuration and table ----------------------------------------------------------------------------------- */

/* Facts of the presets, counted by hand and independent of the table: inner widths, and the sum over matrices. */
static void test_checkpoint_presets(Tests *t) {
    const FoxPreset *p;
    int count = 0;
    for (; (p = fox_preset(count)) != NULL; count++) {
        FoxConfig c = fox_preset_config(p, 50257);
        FoxError err = {""};
        if (!check(t, fox_config_check(&c, &err), "%s: %s", p->name, err.text)) {
            continue;
        }
        check(t, fox_find_preset(p->name) == p, "%s is not found", p->name);
        int64_t d = p->hidden_size, L = p->num_hidden_layers, H = p->num_heads, inner = 0;
        switch (d) {
        case 128: inner = 512; break; /* 298.67 up to 512 */
        case 768: inner = p->pro ? 1792 : 2048; break;
        case 1024: inner = p->pro ? 2560 : 2816; break;
        case 1536: inner = p->pro ? 3584 : 4096; break;
        default: break;
        }
        int64_t square = p->pro ? 5 : 4, per_head = (p->pro ? 2 : 0) + (p->fox ? 1 : 0), vectors = p->pro ? 5 : 2;
        int64_t want = (2 * 50257 + 1) * d + L * (square * d * d + 3 * inner * d + per_head * H * d + vectors * d);
        want += p->fox ? L * H : 0;
        FoxTable table = fox_table_create(&c);
        check(t, table.parameters == want, "%s has %" PRId64 " parameters, expected %" PRId64, p->name,
              table.parameters, want);
        check(t, c.use_rope == !p->fox && c.use_forget_gate == p->fox && c.qk_norm == p->pro, "%s: switches", p->name);
        check(t, p->batch_tokens % p->context == 0 && p->learning_rate >= 5e-4 && p->learning_rate <= 3e-3,
              "%s: recipe", p->name);
        fox_table_free(&table);
    }
    check(t, count == 13 && fox_preset(-1) == NULL && fox_find_preset("fox") == NULL, "%d presets", count);
    p = fox_find_preset("transformer-pro-760m");
    check(t, p != NULL && p->num_heads == 12 && p->learning_rate == 1e-3 && p->context == 16384 &&
          p->batch_tokens == 524288 && p->tokens_in_papers == 16106127360.0, "transformer-pro-760m");
    p = fox_find_preset("fox-pro-360m");
    check(t, p != NULL && p->num_heads == 16 && p->learning_rate == 2e-3 && p->tokens_in_papers == 7516192768.0,
          "fox-pro-360m");
}

/* A small configuration of one of 32 kinds. */
static FoxConfig files_config(FilesRandom *r) {
    static const int heads[] = {1, 2, 4};
    uint64_t kind = files_random(r);
    FoxConfig c = fox_preset_config(fox_find_preset("fox-pro-tiny"), 20 + files_below(r, 40));
    c.hidden_size = 16 * (1 + files_below(r, 3));
    c.num_heads = heads[files_below(r, 3)];
    c.num_hidden_layers = 1 + files_below(r, 3);
    c.intermediate_size = 5 + files_below(r, 60);
    c.use_forget_gate = kind & 1;
    c.use_rope = kind & 2;
    c.use_output_gate = kind & 4;
    c.use_output_norm = kind & 8;
    c.qk_norm = kind & 16;
    c.qk_norm_share_param_across_head = kind & 32;
    c.use_k_shift = kind & 64;
    c.use_v_shift = kind & 128;
    c.rope_base = 10000.0 + files_below(r, 1000) / 7.0;
    c.norm_eps = 1e-6 * (1 + files_below(r, 100));
    return c;
}

/* The tensor that follows another in the flat space: the one with the smallest offset from `end`; -1 for none. */
static int checkpoint_next(const FoxTable *table, int64_t end) {
    int next = -1;
    for (int i = 0; i < table->count; i++) {
        int64_t offset = table->tensors[i].offset;
        next = offset >= end && (next < 0 || offset < table->tensors[next].offset) ? i : next;
    }
    return next;
}

/* The flat space: no gap but padding, vectors and embeddings before `matrices`, then matrices as the table has them. */
static void checkpoint_check_places(Tests *t, const FoxTable *table) {
    int64_t end = 0, width = table->tensors[table->embeddings].shape[1];
    int seen = 0, last = -1;
    for (int i; (i = checkpoint_next(table, end)) >= 0; seen++) {
        const FoxTensor *s = &table->tensors[i];
        bool after_packed = strstr(s->name, "o_proj") != NULL; // rows of padding before it: see test_checkpoint_table
        /* the start of the matrices, and with it every matrix of a model whose width allows it, is a multiple of 256 bytes in bf16 */
        int unit = i == table->embeddings || (s->ndim == 2 && width % 128 == 0) ? 128 : 16;
        check(t, s->offset % unit == 0 && (after_packed || s->offset - end < unit), "%s: offset", s->name);
        check(t, (s->offset < table->matrices) == (s->ndim == 1 || i == table->embeddings), "%s: in the wrong part", s->name);
        check(t, s->offset < table->matrices || i > last, "%s: matrices out of order", s->name);
        last = s->offset < table->matrices ? -1 : i;
        end = s->offset + s->size;
    }
    check(t, seen == table->count && last == table->lm_head, "every tensor has a place, lm_head the last");
    check(t, table->total % 16 == 0 && table->total >= end && table->total - end < 16, "total %" PRId64, table->total);
}

static void test_checkpoint_table(Tests *t, FilesRandom *r) {
    for (int round = 0; round < 50; round++) {
        FoxConfig c = files_config(r);
        FoxError err = {""};
        check(t, fox_config_check(&c, &err), "a random configuration: %s", err.text);
        FoxTable table = fox_table_create(&c);
        int64_t parameters = 0;
        checkpoint_check_places(t, &table);
        for (int i = 0; i < table.count; i++) {
            const FoxTensor *s = &table.tensors[i];
            check(t, s->size == s->shape[0] * s->shape[1] && s->decay == (s->ndim == 2), "%s: size or decay", s->name);
            check(t, fox_table_find(&table, s->name) == i, "%s: not found by its name", s->name);
            parameters += s->size;
        }
        check(t, parameters == table.parameters, "%" PRId64 " parameters", parameters);
        check(t, fox_table_find(&table, "model.layers.0.attn.q_proj") == -1, "a name that is not there");
        for (int layer = 0; layer < c.num_hidden_layers; layer++) {
            const FoxLayerIds *ids = &table.layers[layer];
            const int packed[] = {ids->q, ids->k, ids->v, ids->ogate, ids->k_shift, ids->v_shift, ids->fgate};
            int64_t at = table.tensors[ids->q].offset;
            for (int i = 0; i < 7; i++) {
                if (packed[i] >= 0) {
                    check(t, table.tensors[packed[i]].offset == at, "packed matrix %d has a hole", i);
                    at += table.tensors[packed[i]].size;
                }
            }
            int64_t start = table.tensors[ids->q].offset, rows = (at - start) / c.hidden_size, padded = (rows + 7) / 8 * 8;
            check(t, table.tensors[ids->o].offset == start + padded * c.hidden_size, "%" PRId64 " packed rows: padding", rows);
            check(t, (ids->fgate >= 0) == c.use_forget_gate && (ids->fgate_bias >= 0) == c.use_forget_gate &&
                  (ids->ogate >= 0) == c.use_output_gate && (ids->q_norm >= 0) == c.qk_norm &&
                  (ids->k_shift >= 0) == c.use_k_shift && (ids->v_shift >= 0) == c.use_v_shift &&
                  (ids->output_norm >= 0) == c.use_output_norm, "layer %d: optional tensors", layer);
            int D = c.hidden_size / c.num_heads;
            check(t, !c.qk_norm || table.tensors[ids->k_norm].size ==
                  (c.qk_norm_share_param_across_head ? D : c.hidden_size), "layer %d: length of k_norm", layer);
        }
        fox_table_free(&table);
    }
}

/* Values depend on seed and name only; their moments are those of N(0, 0.02). */
static void test_checkpoint_init(Tests *t, FilesRandom *r) {
    FoxConfig c = fox_preset_config(fox_find_preset("fox-pro-tiny"), 257), other = c;
    other.num_hidden_layers = 1;
    other.use_output_gate = false;
    FoxTable table = fox_table_create(&c), small = fox_table_create(&other);
    float *a = FOX_NEW(float, table.total), *b = FOX_NEW(float, table.total), *s = FOX_NEW(float, small.total);
    uint64_t seed = files_random(r);
    memset(a, 255, sizeof(float) * (size_t)table.total);
    fox_init_parameters(&table, seed, a);
    fox_init_parameters(&table, seed + 1, b);
    fox_init_parameters(&small, seed, s);
    int64_t used = 0;
    double all = 0, all_squares = 0;
    for (int i = 0; i < table.count; i++) {
        const FoxTensor *p = &table.tensors[i];
        const float *w = a + p->offset;
        double sum = 0, squares = 0, same = 0;
        for (int64_t j = 0; j < p->size; j++) {
            sum += (double)w[j];
            squares += (double)w[j] * (double)w[j];
            same += w[j] == b[p->offset + j];
        }
        double n = (double)p->size, mean = sum / n, deviation = sqrt(squares / n - mean * mean);
        bool bias = strstr(p->name, ".bias") != NULL;
        if (p->ndim == 2) {
            all += n;
            all_squares += squares;
            /* five standard errors of a mean and of a deviation */
            check(t, fabs(mean) < 5 * 0.02 / sqrt(n) && fabs(deviation - 0.02) < 5 * 0.02 / sqrt(2 * n) && same < 10,
                  "%s: mean %g, deviation %g, %g equal under another seed", p->name, mean, deviation, same);
        } else {
            check(t, sum == (bias ? 0 : n) && squares == sum, "%s: sum %g of %g", p->name, sum, n);
        }
        int k = fox_table_find(&small, p->name);
        check(t, k < 0 || memcmp(w, s + small.tensors[k].offset, sizeof(float) * (size_t)p->size) == 0,
              "%s depends on the rest of the model", p->name);
        used += p->size;
        int next = checkpoint_next(&table, p->offset + p->size);
        int64_t end = next >= 0 ? table.tensors[next].offset : table.total;
        for (int64_t j = p->offset + p->size; j < end; j++, used++) {
            check(t, a[j] == 0, "padding after %s is %g", p->name, (double)a[j]);
        }
    }
    double deviation = sqrt(all_squares / all);
    check(t, fabs(deviation - 0.02) < 5 * 0.02 / sqrt(2 * all), "deviation %g over %g weights", deviation, all);
    check(t, used == table.total, "tensors and padding fill the flat space");
    const FoxTensor *q = &table.tensors[table.layers[0].q], *k = &table.tensors[table.layers[0].k];
    check(t, memcmp(a + q->offset, a + k->offset, 64) != 0, "q and k begin alike");
    free(a), free(b), free(s);
    fox_table_free(&table);
    fox_table_free(&small);
}

/* What config.json may not say. Each is put into an otherwise good one. */
static const struct {
    const char *text, *error;
} config_cases[] = {
    {"\"hidden_size\": 768.5", "hidden_size is 768.5, expected a whole number"},
    {"\"hidden_size\": 32.0", "hidden_size is 32, expected a whole number"},
    {"\"hidden_size\": \"32\"", "hidden_size is \"32\", expected a whole number"},
    {"\"hidden_size\": 0", "hidden_size is 0"},
    {"\"hidden_size\": -32", "hidden_size is -32"},
    {"\"hidden_size\": 4294967328", "hidden_size is"},
    {"\"hidden_size\": 1000000", "hidden_size is 1000000"},
    {"\"hidden_size\": 40", "multiple of 16"},
    {"\"num_heads\": 3", "multiple of num_heads"},
    {"\"num_heads\": 32", "even number"},
    {"\"num_heads\": 0", "num_heads is 0"},
    {"\"num_heads\": null", "num_heads is null"},
    {"\"vocab_size\": 0", "vocab_size is 0"},
    {"\"vocab_size\": 1e4", "vocab_size is 10000, expected a whole number"},
    {"\"num_hidden_layers\": 100000", "num_hidden_layers is 100000"},
    {"\"intermediate_size\": 0", "intermediate_size is 0"},
    {"\"intermediate_size\": 2000000", "intermediate_size is 2000000"},
    {"\"hidden_ratio\": -1", "intermediate_size is 0"},
    {"\"hidden_ratio\": 1e300", "intermediate_size is 0"},
    {"\"hidden_ratio\": \"4\"", "hidden_ratio is \"4\""},
    {"\"norm_eps\": 0", "norm_eps is 0"},
    {"\"norm_eps\": -1e-6", "norm_eps is -1e-06"},
    {"\"norm_eps\": 1e-300", "norm_eps is 1e-300"},
    {"\"rope_base\": 0", "rope_base is 0"},
    {"\"rope_base\": 1e300", "rope_base is 1e+300"},
    {"\"qk_norm_eps\": 1e-6", "qk_norm_eps is 1e-06"},
    {"\"use_rope\": 1", "use_rope is 1, expected true or false"},
    {"\"qk_norm\": \"true\"", "qk_norm is \"true\""},
    {"\"window_size\": 128", "window_size is 128"},
    {"\"num_kv_heads\": 1", "num_kv_heads is 1"},
    {"\"fgate_type\": \"bias_only\"", "fgate_type is \"bias_only\""},
    {"\"fgate_type\": \"fixed\"", "fgate_type is \"fixed\""},
    {"\"fgate_type\": null", "fgate_type is null"},
    {"\"fgate_bias_init\": true", "fgate_bias_init is true"},
    {"\"decay_time_min\": 2", "decay_time_min is 2"},
    {"\"use_output_gate\": true, \"ogate_act\": \"silu\"", "ogate_act is \"silu\""},
    {"\"hidden_act\": \"sigmoid\"", "hidden_act is \"sigmoid\""},
    {"\"hidden_act\": \"sw\\nish\"", "hidden_act is \"sw?ish\""},
    {"\"attention_bias\": true", "attention_bias is true"},
    {"\"tie_word_embeddings\": true", "tie_word_embeddings is true"},
    {"\"elementwise_affine\": false", "elementwise_affine is false"},
    {"\"model_type\": \"llama\"", "model_type is \"llama\""},
    {"\"model_type\": 3", "model_type is 3"},
    {"\"vocab_size\": 16777216, \"hidden_size\": 65536, \"num_heads\": 256", "parameters"},
};

static bool files_read_config(Tests *t, const char *members, FoxConfig *c, FoxError *err) {
    char path[512], text[1024];
    make_directories(files_path(t, path, "config"), NULL);
    snprintf(text, sizeof text, "{\"architectures\": [\"ForgettingTransformerForCausalLM\"]%s%s}", *members ? ", " : "",
             members);
    files_write_text(files_path(t, path, "config/config.json"), text);
    err->text[0] = '\0';
    return checkpoint_read_config(files_path(t, path, "config"), c, err);
}

static void test_checkpoint_config(Tests *t, FilesRandom *r) {
    static const char *const base[] = {"\"hidden_size\": 32", "\"num_heads\": 2", "\"vocab_size\": 40"};
    FoxConfig c;
    FoxError err;
    for (size_t i = 0; i < sizeof config_cases / sizeof config_cases[0]; i++) {
        char text[900];
        snprintf(text, sizeof text, "%s", config_cases[i].text);
        for (int k = 0; k < 3; k++) {
            char key[32];
            snprintf(key, sizeof key, "%.*s", (int)(strchr(base[k], ':') - base[k]), base[k]);
            if (strstr(text, key) == NULL) {
                snprintf(text + strlen(text), sizeof text - strlen(text), ", %s", base[k]);
            }
        }
        files_failed(t, files_read_config(t, text, &c, &err), &err, config_cases[i].error, config_cases[i].text);
        check(t, strstr(err.text, "config.json") != NULL, "%s: the error does not name the file: %s", text, err.text);
    }
    /* the official defaults, and null where the official code allows it */
    check(t,
          files_read_config(t, "", &c, &err) && c.vocab_size == 32000 && c.hidden_size == 2048 && c.num_heads == 32 &&
              c.num_hidden_layers == 24 && c.intermediate_size == 5632 && c.use_forget_gate && !c.use_rope &&
              !c.qk_norm && !c.use_output_gate && c.rope_base == 500000.0 && c.norm_eps == 1e-6,
          "defaults: %s", err.text);
    check(t, files_read_config(t, "\"hidden_ratio\": null, \"intermediate_size\": null, \"num_kv_heads\": 32, "
                                  "\"ogate_act\": \"silu\", \"hidden_size\": 1024", &c, &err) &&
          c.intermediate_size == 2816, "nulls: %s", err.text);
    check(t, files_read_config(t, "\"hidden_ratio\": 3.5, \"hidden_size\": 768, \"num_heads\": 12", &c, &err) &&
          c.intermediate_size == 1792, "ratio 3.5: %s", err.text);
    check(t, files_read_config(t, "\"model_type\": \"transformer-project_fox\"", &c, &err) && c.use_rope &&
          !c.use_forget_gate, "the baseline: %s", err.text);

    /* what is written reads back the same */
    char path[512], *text = NULL;
    size_t size = 0;
    for (int round = 0; round < 100; round++) {
        FoxConfig want = files_config(r);
        FILE *out = open_memstream(&text, &size);
        checkpoint_write_config(out, &want, round % 2 ? -10.0 : (double)NAN);
        fclose(out);
        files_write(files_path(t, path, "config/config.json"), text, size);
        bool ok = checkpoint_read_config(files_path(t, path, "config"), &c, &err);
        check(t, ok && memcmp(&c, &want, sizeof c) == 0, "configuration round trip: %s\n%s", err.text, text);
        check(t, strstr(text, round % 2 ? "\"log_pruning_tolerance\": -10" : "\"log_pruning_tolerance\": null") != NULL,
              "log_pruning_tolerance");
        free(text);
    }
}

/* The fixtures: configuration from the metadata, and exactly the tensors of the table. */
static void test_checkpoint_fixtures(Tests *t) {
    static const char *const names[] = {"fox_pro_d64", "fox_llama_d64", "transformer_llama_d64"};
    for (int i = 0; i < 3; i++) {
        char path[1024];
        snprintf(path, sizeof path, "%s/fixtures/%s.safetensors", t->data, names[i]);
        SafeTensors st;
        FoxConfig c;
        FoxError err = {""};
        if (!check(t, safetensors_open(path, &st, &err), "%s", err.text)) {
            continue;
        }
        if (check(t, checkpoint_config_from_metadata(&st, &c, &err), "%s", err.text)) {
            check(t,
                  c.hidden_size == 128 && c.num_heads == 2 && c.num_hidden_layers == 2 && c.vocab_size == 128 &&
                      c.intermediate_size == 192 && c.qk_norm == (i == 0) && c.use_output_gate == (i == 0) &&
                      c.use_forget_gate == (i < 2) && c.use_rope == (i == 2) && c.norm_eps == 1e-6,
                  "%s: settings", names[i]);
            FoxTable table = fox_table_create(&c);
            check(t, st.count == 2 * table.count + 4, "%s: %d tensors, expected %d", names[i], st.count,
                  2 * table.count + 4);
            for (int k = 0; k < table.count; k++) {
                const FoxTensor *want = &table.tensors[k];
                char grad[100];
                snprintf(grad, sizeof grad, "grad.%s", want->name);
                for (int j = 0; j < 2; j++) {
                    const SafeTensor *s = safetensors_find(&st, j ? grad : want->name);
                    check(t, s != NULL && s->ndim == want->ndim && s->shape[0] == want->shape[0] &&
                          (s->ndim == 1 || s->shape[1] == want->shape[1]) && strcmp(s->dtype, "F32") == 0,
                          "%s: %s", names[i], j ? grad : want->name);
                }
            }
            const SafeTensor *ids = safetensors_find(&st, "input_ids");
            int32_t tokens[400];
            if (check(t, ids != NULL && ids->count == 400 && safetensors_read_int32(&st, ids, tokens, &err),
                      "input_ids")) {
                int wrong = 0;
                for (int k = 0; k < 400; k++) {
                    wrong += tokens[k] < 0 || tokens[k] >= 128;
                }
                check(t, wrong == 0, "%s: %d tokens outside the vocabulary", names[i], wrong);
            }
            fox_table_free(&table);
        }
        safetensors_close(&st);
    }
}

/* ---- checkpoints ------------------------------------------------------------------------------------------------ */

/* A back end that only stores: the four buffers in main memory. */
static void files_fake_read(Backend *b, FoxBuffer buffer, int64_t start, int64_t count, float *host) {
    memcpy(host, ((float **)b->self)[buffer] + start, sizeof(float) * (size_t)count);
}

static void files_fake_write(Backend *b, FoxBuffer buffer, int64_t start, int64_t count, const float *host) {
    memcpy(((float **)b->self)[buffer] + start, host, sizeof(float) * (size_t)count);
}

static void *files_fake_allocate(Backend *b, int64_t bytes) {
    (void)b;
    return malloc((size_t)bytes);
}

static void files_fake_free(Backend *b, void *memory) {
    (void)b;
    free(memory);
}

static const Ranks files_alone = RANKS_ALONE;

static Backend files_fake_open(const FoxConfig *c) {
    Backend b;
    memset(&b, 0, sizeof b);
    b.name = "fake";
    b.table = fox_table_create(c);
    b.spec.config = *c;
    b.spec.acp = ACP_PAPER;
    b.spec.log_tolerance = -10;
    backend_divide(&b, &files_alone);
    b.allocate_host = files_fake_allocate;
    b.free_host = files_fake_free;
    b.read = files_fake_read;
    b.write = files_fake_write;
    float **buffers = FOX_NEW(float *, 4);
    for (int i = 0; i < 4; i++) {
        buffers[i] = FOX_NEW(float, b.table.total);
    }
    b.self = buffers;
    return b;
}

static void files_fake_close(Backend *b) {
    for (int i = 0; i < 4; i++) {
        free(((float **)b->self)[i]);
    }
    free(b->self);
    fox_table_free(&b->table);
}

/* Random floats in parameters and moments; padding stays zero. */
static void files_fake_fill(Backend *b, FilesRandom *r) {
    for (int i = 0; i < b->table.count; i++) {
        const FoxTensor *s = &b->table.tensors[i];
        for (int64_t j = s->offset; j < s->offset + s->size; j++) {
            uint64_t word = files_random(r);
            ((float **)b->self)[FOX_PARAMS][j] = (float)((int)(word & 0xffff) - 0x8000) * 0x1p-15f;
            ((float **)b->self)[FOX_ADAM_M][j] = (float)(int32_t)(word >> 32) * 1e-12f;
            ((float **)b->self)[FOX_ADAM_V][j] = (float)(word >> 16 & 0xffff) * 1e-9f;
        }
    }
}

static bool files_fake_same(const Backend *a, const Backend *b, FoxBuffer buffer) {
    return a->table.total == b->table.total && memcmp(((float **)a->self)[buffer], ((float **)b->self)[buffer],
                                                      sizeof(float) * (size_t)a->table.total) == 0;
}

static TrainState files_state(FilesRandom *r, int64_t step) {
    TrainState s;
    memset(&s, 0, sizeof s);
    s.step = step;
    s.tokens = (int64_t)(files_random(r) >> 1);
    s.seed = files_random(r);
    s.next_window = (int64_t)(files_random(r) >> 1);
    s.windows = (int64_t)(files_random(r) >> 1);
    s.data_hash = files_random(r);
    s.skipped_in_a_row = files_below(r, 5);
    s.best_val_loss = files_below(r, 2) ? (double)NAN : fox_uniform(r->key, r->counter++) * 10;
    return s;
}

/* Saves and dies when that fails: for tests of something else. */
static void files_save(const char *dir, Backend *b, FilesRandom *r, int64_t step) {
    TrainState s = files_state(r, step);
    FoxError err = {""};
    if (!checkpoint_save(dir, b, &files_alone, &s, NULL, NULL, &err)) {
        fox_die("%s", err.text);
    }
}

/* Loads a checkpoint into a fresh back end of the configuration in it. */
static bool files_load(const char *dir, Backend *b, TrainState *s, FoxError *err) {
    FoxConfig c;
    if (!checkpoint_read_config(dir, &c, err)) {
        return false;
    }
    *b = files_fake_open(&c);
    if (checkpoint_load_model(dir, b, &files_alone, err) && checkpoint_load_state(dir, b, &files_alone, s, err)) {
        return true;
    }
    files_fake_close(b);
    return false;
}

static void test_checkpoint_round_trip(Tests *t, FilesRandom *r) {
    char dir[512], path[1024];
    for (int round = 0; round < (t->quick ? 6 : 20); round++) {
        FoxConfig c = files_config(r);
        Backend a = files_fake_open(&c), b;
        files_fake_fill(&a, r);
        TrainState s = files_state(r, files_below(r, 3) ? round : 123456789012 + round), back;
        FoxError err = {""};
        files_path(t, dir, "runs/round_trip");
        bool ok = checkpoint_save(dir, &a, &files_alone, &s, "{\"lr\": 0.001}", path, &err);
        if (check(t, ok, "checkpoint_save: %s", err.text) &&
            check(t, files_load(path, &b, &back, &err), "loading a checkpoint: %s", err.text)) {
            check(t, files_fake_same(&a, &b, FOX_PARAMS) && files_fake_same(&a, &b, FOX_ADAM_M) &&
                  files_fake_same(&a, &b, FOX_ADAM_V), "the buffers came back otherwise");
            check(t, memcmp(&b.spec.config, &c, sizeof c) == 0, "the configuration came back otherwise");
            bool loss = isnan(s.best_val_loss) ? isnan(back.best_val_loss) : s.best_val_loss == back.best_val_loss;
            check(t, back.step == s.step && back.tokens == s.tokens && back.seed == s.seed && loss &&
                  back.next_window == s.next_window && back.windows == s.windows && back.data_hash == s.data_hash &&
                  back.skipped_in_a_row == s.skipped_in_a_row && back.param_hash == checkpoint_param_hash(&a, &files_alone),
                  "the state came back otherwise");
            ((float **)b.self)[FOX_PARAMS][b.table.tensors[1].offset] += 1;
            check(t, checkpoint_param_hash(&b, &files_alone) != back.param_hash, "the hash does not see a changed parameter");
            files_fake_close(&b);
        }
        files_fake_close(&a);
    }
}

/* Damages to one file of a checkpoint and the words of the error. */
static void test_checkpoint_damage(Tests *t, FilesRandom *r) {
    static const struct {
        const char *file, *from, *to, *error;
    } cases[] = {
        {"model.safetensors", "model.norm.weight", "model.form.weight", "unexpected tensor model.form.weight"},
        {"model.safetensors", "\"dtype\":\"F32\"", "\"dtype\":\"I32\"", "has dtype I32, expected F32, BF16 or F16"},
        {"model.safetensors", "\"shape\":[32,16]", "\"shape\":[16,32]", "has shape [16, 32], expected [32, 16]"},
        {"model.safetensors", "\"shape\":[32,16]", "\"shape\":[512  ]", "has shape [512], expected [32, 16]"},
        {"model.safetensors", "\"pt\"", "\"p\"", "expected the end"},
        {"config.json", "\"vocab_size\": 32", "\"vocab_size\": 31", "has shape [32, 16], expected [31, 16]"},
        {"config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3",
         "model.layers.2.attn_norm.weight is missing"},
        {"config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", "unexpected tensor model.layers.1."},
        {"config.json", "\"use_k_shift\": true", "\"use_k_shift\": false", "unexpected tensor"},
        {"config.json", "\"fgate_type\": \"full\"", "\"fgate_type\": \"none\"", "unexpected tensor"},
        {"config.json", "{", "", "config.json: line 2, column 18: expected the end"},
        {"state.json", "\"step\"", "\"stop\"", "step is missing"},
        {"state.json", "\"seed\": \"0x", "\"seed\": \"zz", "seed is"},
        {"state.json", "\"seed\": \"0x", "\"seed\": \"0x00", "expected a string of hexadecimal digits"},
        {"state.json", "\"tokens\": ", "\"tokens\": -", "tokens is -"},
        {"state.json", "\"param_hash\": \"0x", "\"param_hash\": \"0x0000000000000001\", \"x\": \"",
         "the checkpoint is damaged"},
        {"state.json", "\"optimizer_files\": 1", "\"optimizer_files\": 0", "out of range"},
        {"state.json", "\"optimizer_files\": 1", "\"optimizer_files\": 2",
         "optimizer-00000-of-00002.safetensors: cannot open"},
        {"state.json", "}", "", "state.json: line"},
        {"optimizer-00000-of-00001.safetensors", "exp_avg_sq", "exp_avg_mq", "expected a tensor exp_avg_sq"},
        {"optimizer-00000-of-00001.safetensors", "\"start\":\"0\"", "\"start\":\"1\"", "expected from 0"},
        {"optimizer-00000-of-00001.safetensors", "\"start\":\"0\"", "\"start\":\"-\"", "no whole number 'start'"},
        {"optimizer-00000-of-00001.safetensors", "\"length\"", "\"lenght\"", "no whole number 'length'"},
        {"optimizer-00000-of-00001.safetensors", "\"total\":\"", "\"total\":\"1", "bytes, the tensors only"},
        {"optimizer-00000-of-00001.safetensors", "\"layout\"", "\"layowt\"", "model of other parameters"},
    };
    FoxConfig c = fox_preset_config(fox_find_preset("fox-pro-tiny"), 32);
    c.hidden_size = 16;
    c.num_hidden_layers = 2;
    c.intermediate_size = 8;
    Backend a = files_fake_open(&c), b;
    files_fake_fill(&a, r);
    char dir[512], checkpoint[600], path[1024];
    files_path(t, dir, "runs/damage");
    snprintf(checkpoint, sizeof checkpoint, "%s/step_00000007", dir);
    TrainState s;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        files_save(dir, &a, r, 7); /* over the damaged one */
        snprintf(path, sizeof path, "%s/%s", checkpoint, cases[i].file);
        files_replace(path, cases[i].from, cases[i].to);
        FoxError err = {""};
        files_failed(t, files_load(checkpoint, &b, &s, &err), &err, cases[i].error, cases[i].to);
        check(t, strstr(err.text, "step_00000007") != NULL, "the error does not name its place: %s", err.text);
    }
    static const char *const files[] = {"config.json", "model.safetensors", "state.json",
                                        "optimizer-00000-of-00001.safetensors"};
    for (int i = 0; i < 4; i++) {
        files_save(dir, &a, r, 7);
        snprintf(path, sizeof path, "%s/%s", checkpoint, files[i]);
        unlink(path);
        FoxError err = {""};
        files_failed(t, files_load(checkpoint, &b, &s, &err), &err, i == 2 ? "no run to resume" : "No such file",
                     files[i]);
        err.text[0] = '\0';
        files_failed(t, checkpoint_latest(dir, path, &err), &err, "no other checkpoint", files[i]);
    }
    files_fake_close(&a);
}

/* Writes `count` floats of `data` as 1-D tensor or table tensors: what other programs' files look like. */
static void files_write_moments(const char *dir, int index, int of, const Backend *b, int64_t start, int64_t count) {
    static const char *const names[] = {"exp_avg", "exp_avg_sq"};
    static const int ndim[] = {1, 1};
    const int64_t shapes[2][2] = {{count, 1}, {count, 1}};
    float *data[2] = {((float **)b->self)[FOX_ADAM_M] + start, ((float **)b->self)[FOX_ADAM_V] + start};
    char path[1100], numbers[3][32], layout[64];
    /* the layout's hash, from the file that checkpoint_save wrote */
    SafeTensors st;
    snprintf(path, sizeof path, "%s/optimizer-00000-of-00001.safetensors", dir);
    if (!safetensors_open(path, &st, NULL)) {
        fox_die("%s: the test cannot read it", path);
    }
    snprintf(layout, sizeof layout, "%s", safetensors_metadata(&st, "layout"));
    safetensors_close(&st);
    const int64_t values[] = {start, count, b->table.total};
    for (int i = 0; i < 3; i++) {
        snprintf(numbers[i], sizeof numbers[i], "%" PRId64, values[i]);
    }
    const char *const metadata[] = {"start",    numbers[0], "length", numbers[1], "total",
                                    numbers[2], "layout",   layout,   NULL};
    snprintf(path, sizeof path, "%s/optimizer-%05d-of-%05d.safetensors", dir, index, of);
    FoxError err = {""};
    if (!files_write_tensors(path, 2, names, ndim, shapes, metadata, data, &err)) {
        fox_die("%s", err.text);
    }
}

/* Optimizer in several files, model in several files, model in bfloat16. */
static void test_checkpoint_shards(Tests *t, FilesRandom *r) {
    FoxConfig c = files_config(r);
    Backend a = files_fake_open(&c), b;
    files_fake_fill(&a, r);
    char dir[512], checkpoint[1024], path[1200];
    TrainState s;
    FoxError err = {""};
    files_path(t, dir, "runs/shards");
    files_save(dir, &a, r, 1);
    snprintf(checkpoint, sizeof checkpoint, "%s/step_00000001", dir);
    int64_t total = a.table.total, one = total / 3, two = total - 5;
    const int64_t cuts[] = {0, one, two, total};
    for (int i = 0; i < 3; i++) {
        files_write_moments(checkpoint, i, 3, &a, cuts[i], cuts[i + 1] - cuts[i]);
    }
    snprintf(path, sizeof path, "%s/state.json", checkpoint);
    files_replace(path, "\"optimizer_files\": 1", "\"optimizer_files\": 3");
    if (check(t, files_load(checkpoint, &b, &s, &err), "three optimizer files: %s", err.text)) {
        check(t, files_fake_same(&a, &b, FOX_ADAM_M) && files_fake_same(&a, &b, FOX_ADAM_V),
              "moments from three files");
        files_fake_close(&b);
    }
    files_write_moments(checkpoint, 1, 3, &a, one + 1, two - one - 1);
    files_failed(t, files_load(checkpoint, &b, &s, &err), &err, "expected from", "a gap between optimizer files");
    files_write_moments(checkpoint, 1, 3, &a, one, two - one);
    files_write_moments(checkpoint, 2, 3, &a, two, 4);
    err.text[0] = '\0';
    files_failed(t, files_load(checkpoint, &b, &s, &err), &err, "optimizer files end at",
                 "optimizer files that end early");

    /* the model: even tensors in one file (bfloat16), odd ones in another (float32) */
    snprintf(path, sizeof path, "%s/model.safetensors", checkpoint);
    unlink(path);
    char *header[2] = {NULL, NULL}, *index = NULL;
    size_t header_size[2], index_size;
    FILE *out[2] = {open_memstream(&header[0], &header_size[0]), open_memstream(&header[1], &header_size[1])};
    FILE *map = open_memstream(&index, &index_size);
    unsigned char *data[2] = {FOX_NEW(unsigned char, 4 * total), FOX_NEW(unsigned char, 4 * total)};
    int64_t used[2] = {0, 0};
    fputs("{\"metadata\":{\"total_size\":1},\"weight_map\":{", map);
    for (int i = 0; i < a.table.count; i++) {
        const FoxTensor *p = &a.table.tensors[i];
        int k = i % 2;
        float *w = ((float **)a.self)[FOX_PARAMS] + p->offset;
        fprintf(out[k], "%c\"%s\":{\"dtype\":\"%s\",\"shape\":[%" PRId64, used[k] ? ',' : '{', p->name,
                k ? "F32" : "BF16", p->shape[0]);
        fprintf(out[k], p->ndim == 2 ? ",%" PRId64 "]" : "]", p->shape[1]);
        fprintf(out[k], ",\"data_offsets\":[%" PRId64 ",", used[k]);
        for (int64_t j = 0; j < p->size; j++) {
            uint32_t bits;
            if (k == 0) {
                w[j] = (float)((int)(w[j] * 128)); /* representable in bfloat16 */
            }
            memcpy(&bits, &w[j], 4);
            for (int byte = k ? 0 : 2; byte < 4; byte++) {
                data[k][used[k]++] = (unsigned char)(bits >> (8 * byte));
            }
        }
        fprintf(out[k], "%" PRId64 "]}", used[k]);
        fprintf(map, "%s\"%s\":\"model-0000%d-of-00002.safetensors\"", i ? "," : "", p->name, k + 1);
    }
    fputs("}}", map);
    fclose(map);
    for (int k = 0; k < 2; k++) {
        fputs("}", out[k]);
        fclose(out[k]);
        snprintf(path, sizeof path, "%s/model-0000%d-of-00002.safetensors", checkpoint, k + 1);
        files_write_safetensors(path, header[k], data[k], (size_t)used[k]);
        free(header[k]);
        free(data[k]);
    }
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", checkpoint);
    files_write(path, index, index_size);
    free(index);
    b = files_fake_open(&c);
    err.text[0] = '\0';
    check(t, checkpoint_load_model(checkpoint, &b, &files_alone, &err) && files_fake_same(&a, &b, FOX_PARAMS), "a sharded model: %s",
          err.text);
    files_replace(path, "model-00001-of-00002.safetensors", "../model-00001-of-00002.safetensors");
    files_failed(t, checkpoint_load_model(checkpoint, &b, &files_alone, &err), &err, "same directory", "a file name with a path");
    files_write_text(path, "{\"weight_map\":{\"lm_head.weight\":\"model-00001-of-00002.safetensors\"}}");
    err.text[0] = '\0';
    files_failed(t, checkpoint_load_model(checkpoint, &b, &files_alone, &err), &err, "is missing",
                 "an index without the second file");
    files_write_text(path, "{\"weight_map\":[]}");
    err.text[0] = '\0';
    files_failed(t, checkpoint_load_model(checkpoint, &b, &files_alone, &err), &err, "no weight_map", "an index without a map");
    files_fake_close(&a);
    files_fake_close(&b);
}

static bool files_is_there(const char *dir, const char *name) {
    char path[1200];
    struct stat info;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return lstat(path, &info) == 0;
}

/* checkpoint_latest finds the directory `name` and says `warnings` lines on stderr. */
static void files_check_latest(Tests *t, const char *dir, const char *name, int warnings) {
    char path[1024], log[512], *text = NULL;
    size_t length = 0;
    FoxError err = {""};
    FILE *to = fopen(files_path(t, log, "stderr.txt"), "w");
    int saved = dup(2);
    fflush(stderr);
    dup2(fileno(to), 2);
    bool found = checkpoint_latest(dir, path, &err);
    fflush(stderr);
    dup2(saved, 2);
    close(saved);
    fclose(to);
    file_read(log, 100000, &text, &length, &err);
    int lines = 0;
    for (size_t i = 0; i < length; i++) {
        lines += text[i] == '\n';
    }
    check(t, found && strcmp(strrchr(path, '/') + 1, name) == 0, "latest is %s, found '%s' %s", name, path, err.text);
    check(t, lines == warnings && (warnings == 0 || strstr(text, "fox: warning: damaged checkpoint") == text),
          "expected %d warnings, found: %s", warnings, text ? text : "");
    free(text);
}

/* latest and prune among leftovers, damage, and things that only look like checkpoints. */
static void test_checkpoint_directory(Tests *t, FilesRandom *r) {
    char dir[512], path[1024], other[1200];
    FoxConfig c = files_config(r);
    Backend a = files_fake_open(&c);
    files_fake_fill(&a, r);
    FoxError err = {""};
    files_path(t, dir, "runs/latest");
    check(t, !checkpoint_latest(dir, path, &err) && err.text[0] == '\0', "no directory, no error: %s", err.text);
    checkpoint_prune(dir, 1);
    make_directories(dir, NULL);
    check(t, !checkpoint_latest(dir, path, &err) && err.text[0] == '\0', "empty directory, no error: %s", err.text);
    for (int step = 10; step <= 60; step += 10) {
        files_save(dir, &a, r, step);
    }
    static const char *const strange[] = {"tmp_step_00000070",  "step_0000080",  "step_00000x90",
                                          "step_000000100",     "steps",         "tmp_step_00000075",
                                          "old_step_00000099x", "step_-0000001", "step_99999999999999999999999999"};
    for (int i = 0; i < 9; i++) {
        snprintf(other, sizeof other, "%s/%s", dir, strange[i]);
        make_directories(other, NULL);
    }
    snprintf(other, sizeof other, "%s/tmp_step_00000070/config.json", dir);
    files_write_text(other, "{");
    snprintf(other, sizeof other, "%s/tmp_step_00000075/mine.txt", dir);
    files_write_text(other, "mine");
    snprintf(other, sizeof other, "%s/step_00000098", dir);
    files_write_text(other, "a file");
    snprintf(other, sizeof other, "%s/step_00000097", dir);
    check(t, symlink("step_00000010", other) == 0 && symlink("nowhere", strcat(other, "9")) == 0, "symlink");
    files_check_latest(t, dir, "step_00000060", 0);

    /* the newest two damaged in turn: cut off, and without state.json */
    snprintf(other, sizeof other, "%s/step_00000060/model.safetensors", dir);
    check(t, truncate(other, 200) == 0, "truncate");
    files_check_latest(t, dir, "step_00000050", 1);
    snprintf(other, sizeof other, "%s/step_00000050/state.json", dir);
    check(t, unlink(other) == 0, "unlink");
    files_check_latest(t, dir, "step_00000040", 1);

    /* a user's file in a checkpoint keeps it from being removed */
    snprintf(other, sizeof other, "%s/step_00000010/notes.txt", dir);
    files_write_text(other, "mine");
    checkpoint_prune(dir, 0);
    check(t, !files_is_there(dir, "tmp_step_00000070") && files_is_there(dir, "tmp_step_00000075") &&
          files_is_there(dir, "step_00000020"), "prune that keeps all");
    checkpoint_prune(dir, 2);
    check(t,
          files_is_there(dir, "step_00000060") && files_is_there(dir, "step_00000050") &&
              files_is_there(dir, "step_00000040") && files_is_there(dir, "step_00000030"),
          "prune keeps the newest whole ones");
    check(t, !files_is_there(dir, "step_00000020") && files_is_there(dir, "step_00000010/notes.txt"), "prune removes");
    for (int i = 1; i < 9; i++) {
        check(t, files_is_there(dir, strange[i]), "prune touched %s", strange[i]);
    }
    check(t, files_is_there(dir, "step_00000098") && files_is_there(dir, "step_00000097") &&
          files_is_there(dir, "step_00000010/model.safetensors"), "prune followed a link");
    checkpoint_prune(dir, 1);
    check(t, files_is_there(dir, "step_00000040") && !files_is_there(dir, "step_00000030"), "prune to one");

    /* killed between the two renames of a save over an existing step */
    char from[1200];
    snprintf(from, sizeof from, "%s/step_00000040", dir);
    snprintf(other, sizeof other, "%s/old_step_00000040", dir);
    check(t, rename(from, other) == 0, "rename");
    files_check_latest(t, dir, "old_step_00000040", 1);
    checkpoint_prune(dir, 1);
    check(t, files_is_there(dir, "old_step_00000040"), "prune keeps the only whole one");
    files_save(dir, &a, r, 40);
    check(t, files_is_there(dir, "step_00000040") && !files_is_there(dir, "old_step_00000040") &&
          !files_is_there(dir, "tmp_step_00000040"), "saving again tidies up");
    check(t, rename(from, other) == 0, "rename");
    files_save(dir, &a, r, 45);
    check(t, rename(other, from) == 0, "rename");
    files_save(dir, &a, r, 40); /* over it */
    files_check_latest(t, dir, "step_00000045", 1);
    snprintf(other, sizeof other, "%s/old_step_00000045", dir);
    check(t, make_directories(other, NULL), "make_directories");
    checkpoint_prune(dir, 0);
    check(t, !files_is_there(dir, "old_step_00000045") && files_is_there(dir, "step_00000045"),
          "prune of a replaced one");
    files_fake_close(&a);
}

/* A disk that is full: simulated by the largest file size the process may write. */
static void test_checkpoint_full(Tests *t, FilesRandom *r) {
    char dir[512], path[1024];
    FoxConfig c = files_config(r);
    c.vocab_size = 4000;
    Backend a = files_fake_open(&c), b;
    files_fake_fill(&a, r);
    files_path(t, dir, "runs/full");
    files_save(dir, &a, r, 1);
    struct rlimit before, small;
    getrlimit(RLIMIT_FSIZE, &before);
    small = before;
    small.rlim_cur = 100000;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    FoxError err = {""}, again = {""};
    TrainState s = files_state(r, 2);
    setrlimit(RLIMIT_FSIZE, &small);
    bool new_step = checkpoint_save(dir, &a, &files_alone, &s, NULL, NULL, &err);
    s.step = 1;
    bool same_step = checkpoint_save(dir, &a, &files_alone, &s, NULL, NULL, &again);
    setrlimit(RLIMIT_FSIZE, &before);
    signal(SIGXFSZ, handler);
    files_failed(t, new_step, &err, "cannot write", "a full disk");
    files_failed(t, same_step, &again, "cannot write", "a full disk, over an existing step");
    check(t, !files_is_there(dir, "tmp_step_00000002") && !files_is_there(dir, "tmp_step_00000001") &&
          !files_is_there(dir, "step_00000002"), "leftovers on a full disk");
    err.text[0] = '\0';
    if (check(t, checkpoint_latest(dir, path, &err) && files_load(path, &b, &s, &err), "full disk: %s", err.text)) {
        check(t, s.step == 1, "the earlier checkpoint stands");
        files_fake_close(&b);
    }
    err.text[0] = '\0';
    files_failed(t, checkpoint_save(dir, &a, &files_alone, &s, "{\"a\":", NULL, &err), &err, "settings",
                 "bad settings");
    err.text[0] = '\0';
    char file[700];
    snprintf(file, sizeof file, "%s/step_00000001/state.json", dir);
    files_failed(t, checkpoint_save(file, &a, &files_alone, &s, NULL, NULL, &err), &err, "cannot create the directory",
                 "a file for a directory");
    files_fake_close(&a);
}

/* A process that saves and prunes without pause is killed at random moments: there is always a whole checkpoint, no
 * older than the last one it reported as saved, and it loads with the right hash. */
static void test_checkpoint_kill(Tests *t, FilesRandom *r) {
    char dir[512], path[1024];
    FoxConfig c = files_config(r);
    Backend a = files_fake_open(&c);
    files_path(t, dir, "runs/kill");
    files_fake_fill(&a, r);
    files_save(dir, &a, r, 1);
    int64_t last = 1;
    for (int round = 0; round < (t->quick ? 20 : 200); round++) {
        int report[2];
        if (pipe(report) != 0) {
            fox_die("pipe: %s", strerror(errno));
        }
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            for (int64_t step = last;; step += files_below(r, 2)) { /* half of them over the step before */
                files_fake_fill(&a, r);
                files_save(dir, &a, r, step);
                checkpoint_prune(dir, 1);
                if (write(report[1], &step, sizeof step) != (ssize_t)sizeof step) {
                    _exit(1);
                }
            }
        }
        close(report[1]);
        usleep((useconds_t)files_below(r, 20000));
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        r->counter += 1000000; /* the child used numbers of its own */
        for (int64_t step; read(report[0], &step, sizeof step) == (ssize_t)sizeof step;) {
            last = step;
        }
        close(report[0]);
        Backend b;
        TrainState s;
        FoxError err = {""};
        bool ok = checkpoint_latest(dir, path, &err) && files_load(path, &b, &s, &err);
        if (check(t, ok, "killed at random, round %d: %s", round, err.text)) {
            check(t, s.step >= last, "step %" PRId64 " is older than %" PRId64, s.step, last);
            last = s.step;
            files_fake_close(&b);
        }
        checkpoint_prune(dir, 1);
        check(t, files_is_there(dir, strrchr(path, '/') + 1), "prune removed the newest");
    }
    files_fake_close(&a);
}

static void test_checkpoint(Tests *t) {
    FilesRandom r = files_fresh();
    int failed = t->failed;
    char path[512];
    make_directories(files_path(t, path, "runs"), NULL);
    test_checkpoint_presets(t);
    test_checkpoint_table(t, &r);
    test_checkpoint_init(t, &r);
    test_checkpoint_config(t, &r);
    test_checkpoint_fixtures(t);
    test_checkpoint_round_trip(t, &r);
    test_checkpoint_damage(t, &r);
    test_checkpoint_shards(t, &r);
    test_checkpoint_directory(t, &r);
    test_checkpoint_full(t, &r);
    test_checkpoint_kill(t, &r);
    if (t->failed > failed) {
        printf("test_checkpoint: the random key was 0x%016" PRIx64 "\n", r.key);
    }
}

#endif

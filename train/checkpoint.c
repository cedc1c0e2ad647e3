#include "checkpoint.h"

#include "files.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_SIZE 1024
#define PIECE (1 << 20) /* floats moved between a file and the back end at a time; a multiple of PARTITION_GRAIN */
#define MODEL_TYPE "forgetting_transformer-project_fox"
#define BASELINE_TYPE "transformer-project_fox" /* the official Transformer (LLaMA): the same tensors, RoPE, no gate */

/* directory/name; fails when that is too long. */
static bool join(char path[PATH_SIZE], const char *directory, const char *name, FoxError *err) {
    int length = snprintf(path, PATH_SIZE, "%s/%s", directory, name);
    return (length >= 0 && length < PATH_SIZE) ||
           fox_fail(err, "%.64s...: the path is longer than %d bytes", directory, PATH_SIZE - 1);
}

/* ---- config.json ------------------------------------------------------------------------------------------------- */

/* A value as it may stand in an error message: short, on one line. */
static const char *show(const Json *v, char text[64]) {
    switch (v->type) {
    case JSON_NULL: return "null";
    case JSON_BOOL: return v->boolean ? "true" : "false";
    case JSON_NUMBER: snprintf(text, 64, "%.9g", v->number); return text;
    case JSON_ARRAY: return "an array";
    case JSON_OBJECT: return "an object";
    default: break;
    }
    snprintf(text, 64, "\"%.48s\"", v->string);
    for (char *c = text; *c != '\0'; c++) {
        *c = (unsigned char)*c < 0x20 ? '?' : *c;
    }
    return text;
}

static bool wrong_value(const char *what, const char *key, const Json *v, const char *expected, FoxError *err) {
    char text[64];
    return fox_fail(err, "%s: %s is %s, expected %s", what, key, show(v, text), expected);
}

static bool is_null(const Json *v) {
    return v == NULL || v->type == JSON_NULL;
}

static bool is_string(const Json *v, const char *s) {
    return v->type == JSON_STRING && strcmp(v->string, s) == 0;
}

/* The get_ functions leave *out, the default, alone where the key is missing. */
static bool get_bool(const Json *root, const char *what, const char *key, bool *out, FoxError *err) {
    const Json *v = json_get(root, key);
    if (v != NULL && v->type != JSON_BOOL) {
        return wrong_value(what, key, v, "true or false", err);
    }
    *out = v != NULL ? v->boolean : *out;
    return true;
}

static bool get_int(const Json *root, const char *what, const char *key, int *out, FoxError *err) {
    const Json *v = json_get(root, key);
    if (v != NULL && (!v->is_integer || v->integer < INT_MIN || v->integer > INT_MAX)) {
        return wrong_value(what, key, v, "a whole number", err);
    }
    *out = v != NULL ? (int)v->integer : *out;
    return true;
}

static bool get_double(const Json *root, const char *what, const char *key, double *out, FoxError *err) {
    const Json *v = json_get(root, key);
    if (v != NULL && v->type != JSON_NUMBER) {
        return wrong_value(what, key, v, "a number", err);
    }
    *out = v != NULL ? v->number : *out;
    return true;
}

/* Options of the official code that change what is computed and that this program has only one value of. Missing keys
 * have that value by default. */
static bool check_unsupported(const Json *root, const char *what, const FoxConfig *c, FoxError *err) {
    static const char *const must_be_null[] = {"window_size", "decay_time_min", "decay_time_max"};
    static const char *const must_be_false[] = {"attention_bias", "tie_word_embeddings", "fgate_bias_init"};
    for (int i = 0; i < 3; i++) {
        const Json *v = json_get(root, must_be_null[i]);
        if (!is_null(v)) {
            return wrong_value(what, must_be_null[i], v, "null: this program has no such option", err);
        }
        v = json_get(root, must_be_false[i]);
        if (v != NULL && (v->type != JSON_BOOL || v->boolean)) {
            return wrong_value(what, must_be_false[i], v, "false: this program has no such option", err);
        }
    }
    const Json *v = json_get(root, "num_kv_heads");
    if (!is_null(v) && !(v->is_integer && v->integer == c->num_heads)) {
        return wrong_value(what, "num_kv_heads", v, "null: every head has its own keys and values here", err);
    }
    v = json_get(root, "hidden_act");
    if (v != NULL && !is_string(v, "swish")) {
        return wrong_value(what, "hidden_act", v, "\"swish\"", err);
    }
    v = json_get(root, "ogate_act");
    if (v != NULL && c->use_output_gate && !is_string(v, "sigmoid")) {
        return wrong_value(what, "ogate_act", v, "\"sigmoid\"", err);
    }
    v = json_get(root, "elementwise_affine");
    if (v != NULL && (v->type != JSON_BOOL || !v->boolean)) {
        return wrong_value(what, "elementwise_affine", v, "true", err);
    }
    v = json_get(root, "qk_norm_eps");
    if (v != NULL && !(fabs(v->number - (double)FOX_QK_NORM_EPS) < 1e-9)) {
        return wrong_value(what, "qk_norm_eps", v, "1e-05", err);
    }
    return true;
}

/* model_type and fgate_type, which set or override defaults of the other keys. */
static bool get_kinds(const Json *root, const char *what, FoxConfig *c, FoxError *err) {
    const Json *type = json_get(root, "model_type"), *gate = json_get(root, "fgate_type");
    bool baseline = type != NULL && is_string(type, BASELINE_TYPE);
    if (type != NULL && !baseline && !is_string(type, MODEL_TYPE)) {
        return wrong_value(what, "model_type", type, "\"" MODEL_TYPE "\"", err);
    }
    c->use_forget_gate = gate != NULL ? is_string(gate, "full") : !baseline;
    c->use_rope = baseline;
    return gate == NULL || c->use_forget_gate || is_string(gate, "none") ||
           wrong_value(what, "fgate_type", gate, "\"full\" or \"none\"", err);
}

/* Official keys and defaults to a checked configuration. `what` names the source in errors. */
static bool config_from_json(const Json *root, const char *what, FoxConfig *c, FoxError *err) {
    memset(c, 0, sizeof *c);
    if (root->type != JSON_OBJECT) {
        return fox_fail(err, "%s: is not a JSON object", what);
    }
    c->vocab_size = 32000;
    c->hidden_size = 2048;
    c->num_hidden_layers = 24;
    c->num_heads = 32;
    c->hidden_ratio = 4.0;
    c->rope_base = 500000.0;
    c->norm_eps = 1e-6;
    bool ok = get_kinds(root, what, c, err) && get_int(root, what, "vocab_size", &c->vocab_size, err) &&
              get_int(root, what, "hidden_size", &c->hidden_size, err) &&
              get_int(root, what, "num_hidden_layers", &c->num_hidden_layers, err) &&
              get_int(root, what, "num_heads", &c->num_heads, err) &&
              (is_null(json_get(root, "hidden_ratio")) ||
               get_double(root, what, "hidden_ratio", &c->hidden_ratio, err)) &&
              get_double(root, what, "rope_base", &c->rope_base, err) &&
              get_double(root, what, "norm_eps", &c->norm_eps, err) &&
              get_bool(root, what, "use_rope", &c->use_rope, err) &&
              get_bool(root, what, "use_output_gate", &c->use_output_gate, err) &&
              get_bool(root, what, "use_output_norm", &c->use_output_norm, err) &&
              get_bool(root, what, "qk_norm", &c->qk_norm, err) &&
              get_bool(root, what, "qk_norm_share_param_across_head", &c->qk_norm_share_param_across_head, err) &&
              get_bool(root, what, "use_k_shift", &c->use_k_shift, err) &&
              get_bool(root, what, "use_v_shift", &c->use_v_shift, err) && check_unsupported(root, what, c, err);
    if (!ok) {
        return false;
    }
    c->intermediate_size = fox_intermediate_size(c->hidden_ratio, c->hidden_size);
    if (!is_null(json_get(root, "intermediate_size")) &&
        !get_int(root, what, "intermediate_size", &c->intermediate_size, err)) {
        return false;
    }
    FoxError why = {""};
    return fox_config_check(c, &why) || fox_fail(err, "%s: %s", what, why.text);
}

bool checkpoint_read_config(const char *dir, FoxConfig *config, FoxError *err) {
    char path[PATH_SIZE];
    JsonDocument document;
    if (!join(path, dir, "config.json", err) || !json_parse_file(path, &document, err)) {
        return false;
    }
    bool ok = config_from_json(document.root, path, config, err);
    json_free(&document);
    return ok;
}

/* Writes a metadata string as the JSON value that Python's str() made it from. */
static void write_metadata_value(FILE *out, const char *s) {
    JsonDocument number;
    if (strcmp(s, "True") == 0 || strcmp(s, "False") == 0) {
        fputs(*s == 'T' ? "true" : "false", out);
    } else if (strcmp(s, "None") == 0) {
        fputs("null", out);
    } else if ((isdigit((unsigned char)*s) || *s == '-') && json_parse(s, strlen(s), "", &number, NULL)) {
        json_free(&number);
        fputs(s, out);
    } else {
        json_write_string(out, s);
    }
}

bool checkpoint_config_from_metadata(const SafeTensors *st, FoxConfig *config, FoxError *err) {
    const Json *metadata = json_get(st->header.root, "__metadata__");
    if (metadata == NULL) {
        return fox_fail(err, "%s: has no metadata that describes its model", st->path);
    }
    JsonText text;
    json_text_begin(&text);
    FILE *out = text.stream;
    fputc('{', out);
    for (const Json *m = metadata->first; m != NULL; m = m->next) {
        json_write_string(out, m->key);
        fputc(':', out);
        write_metadata_value(out, m->string);
        fputs(m->next != NULL ? "," : "", out);
    }
    fputc('}', out);
    JsonDocument document;
    json_text_end(&text);
    bool ok = json_parse(text.text, text.length, st->path, &document, err);
    free(text.text);
    if (ok) {
        ok = config_from_json(document.root, st->path, config, err);
        json_free(&document);
    }
    return ok;
}

static void write_number(FILE *out, const char *key, double value) {
    fprintf(out, "  \"%s\": ", key);
    json_write_number(out, value);
    fputs(",\n", out);
}

static void write_bool(FILE *out, const char *key, bool value) {
    fprintf(out, "  \"%s\": %s,\n", key, value ? "true" : "false");
}

void checkpoint_write_config(FILE *out, const FoxConfig *c, double log_tolerance) {
    fputs("{\n  \"architectures\": [\"ForgettingTransformerForCausalLM\"],\n", out);
    fputs("  \"model_type\": \"" MODEL_TYPE "\",\n", out);
    fputs("  \"torch_dtype\": \"float32\",\n", out);
    fprintf(out, "  \"vocab_size\": %d,\n", c->vocab_size);
    fprintf(out, "  \"hidden_size\": %d,\n", c->hidden_size);
    fprintf(out, "  \"num_hidden_layers\": %d,\n", c->num_hidden_layers);
    fprintf(out, "  \"num_heads\": %d,\n", c->num_heads);
    fputs("  \"num_kv_heads\": null,\n", out);
    write_number(out, "hidden_ratio", c->hidden_ratio);
    fprintf(out, "  \"intermediate_size\": %d,\n", c->intermediate_size);
    fputs("  \"hidden_act\": \"swish\",\n", out);
    fprintf(out, "  \"fgate_type\": \"%s\",\n", c->use_forget_gate ? "full" : "none");
    write_bool(out, "fgate_bias_init", false);
    write_bool(out, "use_output_gate", c->use_output_gate);
    fputs("  \"ogate_act\": \"sigmoid\",\n", out);
    write_bool(out, "use_output_norm", c->use_output_norm);
    write_bool(out, "qk_norm", c->qk_norm);
    write_bool(out, "qk_norm_share_param_across_head", c->qk_norm_share_param_across_head);
    write_bool(out, "use_k_shift", c->use_k_shift);
    write_bool(out, "use_v_shift", c->use_v_shift);
    write_bool(out, "use_rope", c->use_rope);
    write_number(out, "rope_base", c->rope_base);
    write_number(out, "norm_eps", c->norm_eps);
    write_number(out, "initializer_range", FOX_INIT_STD);
    write_bool(out, "elementwise_affine", true);
    write_bool(out, "attention_bias", false);
    write_bool(out, "tie_word_embeddings", false);
    write_number(out, "log_pruning_tolerance", log_tolerance);
    fputs("  \"window_size\": null,\n  \"bos_token_id\": null,\n  \"eos_token_id\": null,\n", out);
    fputs("  \"pad_token_id\": null\n}\n", out);
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

/* "[256, 128]" */
static const char *show_shape(int ndim, const int64_t *shape, char text[200]) {
    size_t used = 0;
    text[0] = '\0';
    for (int i = 0; i < ndim; i++) {
        used += (size_t)snprintf(text + used, 200 - used, "%s%" PRId64, i ? ", " : "", shape[i]);
    }
    return text;
}

/* Is t, found in a file, what the table wants? */
static bool check_tensor(const SafeTensors *st, const SafeTensor *t, const FoxTensor *want, FoxError *err) {
    bool same = t->ndim == want->ndim;
    for (int i = 0; same && i < t->ndim; i++) {
        same = t->shape[i] == want->shape[i];
    }
    if (!same) {
        char found[200], expected[200];
        return fox_fail(err, "%s: tensor %s has shape [%s], expected [%s] from the configuration", st->path, t->name,
                        show_shape(t->ndim, t->shape, found), show_shape(want->ndim, want->shape, expected));
    }
    return strcmp(t->dtype, "F32") == 0 || strcmp(t->dtype, "BF16") == 0 || strcmp(t->dtype, "F16") == 0 ||
           fox_fail(err, "%s: tensor %s has dtype %s, expected F32, BF16 or F16", st->path, t->name, t->dtype);
}

/* Of grains of the flat space, the last of which may be shorter; grains add up in any order. all_cores: nothing else computes
 * meanwhile. */
static uint64_t hash_grains(int64_t start, int64_t count, const float *values, bool all_cores) {
    uint64_t hash = 0;
    int64_t grains = (count + PARTITION_GRAIN - 1) / PARTITION_GRAIN;
    (void)all_cores; // without OpenMP
#pragma omp parallel for reduction(+ : hash) if (all_cores && grains > 1)
    for (int64_t g = 0; g < grains; g++) {
        int64_t done = g * PARTITION_GRAIN, n = fox_min64(count - done, PARTITION_GRAIN);
        hash += fox_hash((uint64_t)(start + done) + 1, values + done, sizeof(float) * (size_t)n);
    }
    return hash;
}

/* Room for a piece on its way to or from the back end. */
static float *take_piece(Backend *backend) {
    float *values = (float *)backend->allocate_host(backend, (int64_t)sizeof(float) * PIECE);
    if (values == NULL) {
        fox_die("no memory for a piece of the weights");
    }
    return values;
}

/* What becomes of the floats that are read. */
typedef struct Loading {
    Backend *backend;
    float *values; /* room for a piece */
    bool hashed;
    uint64_t hash; /* of all that was read, if `hashed` */
} Loading;

static Loading loading_begin(Backend *backend, bool hashed) {
    Loading l = {backend, take_piece(backend), hashed, 0};
    return l;
}

static void loading_end(Loading *l) {
    l->backend->free_host(l->backend, l->values);
}

/* Copies `count` floats from `from` of tensor t to a buffer of the back end at `offset`. */
static bool load_floats(Loading *l, const SafeTensors *st, const SafeTensor *t, int64_t from, int64_t count, FoxBuffer buffer,
                        int64_t offset, FoxError *err) {
    for (int64_t done = 0; done < count; done += PIECE) {
        int64_t n = fox_min64(count - done, PIECE);
        if (!safetensors_read_float(st, t, from + done, n, l->values, err)) {
            return false;
        }
        l->backend->write(l->backend, buffer, offset + done, n, l->values);
        if (l->hashed) {
            l->hash += hash_grains(offset + done, n, l->values, true);
        }
    }
    return true;
}

/* Loads every tensor of one file and marks it in `loaded`. */
static bool load_model_file(const char *path, Loading *l, bool *loaded, FoxError *err) {
    const FoxTable *table = &l->backend->table;
    SafeTensors st;
    if (!safetensors_open(path, &st, err)) {
        return false;
    }
    bool ok = true;
    for (int i = 0; ok && i < st.count; i++) {
        const SafeTensor *t = &st.tensors[i];
        int index = fox_table_find(table, t->name);
        if (index < 0) {
            ok = fox_fail(err, "%s: unexpected tensor %s: the configuration has none of that name", path, t->name);
        } else if (loaded[index]) {
            ok = fox_fail(err, "%s: tensor %s was in another file of this checkpoint already", path, t->name);
        } else {
            ok = check_tensor(&st, t, &table->tensors[index], err) &&
                 load_floats(l, &st, t, 0, t->count, FOX_PARAMS, table->tensors[index].offset, err);
            loaded[index] = true;
        }
    }
    safetensors_close(&st);
    return ok;
}

static int compare_strings(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Loads the files that the index of a sharded checkpoint names, each once. */
static bool load_model_shards(const char *dir, const Json *root, const char *what, Loading *l, bool *loaded, FoxError *err) {
    const Json *map = json_get(root, "weight_map");
    if (map == NULL || map->type != JSON_OBJECT || map->count == 0) {
        return fox_fail(err, "%s: has no weight_map of tensor names to file names", what);
    }
    const char **names = FOX_NEW(const char *, map->count);
    int count = 0;
    bool ok = true;
    for (const Json *m = map->first; ok && m != NULL; m = m->next) {
        if (m->type != JSON_STRING || m->string[0] == '.' || strchr(m->string, '/') != NULL) {
            ok = wrong_value(what, "a value of weight_map", m, "the name of a file in the same directory", err);
        } else {
            names[count++] = m->string;
        }
    }
    qsort(names, (size_t)count, sizeof *names, compare_strings);
    for (int i = 0; ok && i < count; i++) {
        char path[PATH_SIZE];
        if (i == 0 || strcmp(names[i - 1], names[i]) != 0) {
            ok = join(path, dir, names[i], err) && load_model_file(path, l, loaded, err);
        }
    }
    free(names);
    return ok;
}

static bool load_model(const char *dir, Loading *l, FoxError *err) {
    char path[PATH_SIZE], index_path[PATH_SIZE];
    if (!join(path, dir, "model.safetensors", err) || !join(index_path, dir, "model.safetensors.index.json", err)) {
        return false;
    }
    const FoxTable *table = &l->backend->table;
    bool *loaded = FOX_NEW(bool, table->count);
    JsonDocument index;
    bool ok;
    if (access(path, F_OK) == 0 || access(index_path, F_OK) != 0) {
        ok = load_model_file(path, l, loaded, err);
    } else if ((ok = json_parse_file(index_path, &index, err))) {
        ok = load_model_shards(dir, index.root, index_path, l, loaded, err);
        json_free(&index);
    }
    for (int i = 0; ok && i < table->count; i++) {
        char shape[200];
        const FoxTensor *t = &table->tensors[i];
        ok = loaded[i] || fox_fail(err, "%s: tensor %s is missing, expected shape [%s]", dir, t->name,
                                   show_shape(t->ndim, t->shape, shape));
    }
    free(loaded);
    return ok;
}

bool checkpoint_load_model(const char *dir, Backend *backend, const Ranks *ranks, FoxError *err) {
    Loading l = loading_begin(backend, ranks->size > 1);
    bool ok = ranks_everyone(ranks, load_model(dir, &l, err), err);
    loading_end(&l);
    return ok && ranks_everyone(ranks, ranks_agree(ranks, l.hash) ||
                                fox_fail(err, "%s: the ranks read different weights there; is the folder the same for all of "
                                         "them?", dir), err);
}

/* The sum over the ranks. */
static uint64_t sum_hashes(const Ranks *ranks, uint64_t mine) {
    uint64_t *all = FOX_NEW(uint64_t, ranks->size), sum = 0;
    all[ranks->rank] = mine;
    ranks_gather(ranks, all, sizeof mine);
    for (int r = 0; r < ranks->size; r++) {
        sum += all[r];
    }
    free(all);
    return sum;
}

/* Of the part of `what` that `rank` owns. */
static uint64_t hash_share(Backend *backend, FoxBuffer what, const Partition *p, int rank) {
    float *values = take_piece(backend);
    uint64_t hash = 0;
    for (int k = 0; k < p->buckets; k++) {
        Piece piece = partition_piece(p, k, rank);
        for (int64_t done = 0; done < piece.count; done += PIECE) {
            int64_t n = fox_min64(piece.count - done, PIECE);
            backend->read(backend, what, piece.start + done, n, values);
            hash += hash_grains(piece.start + done, n, values, true);
        }
    }
    backend->free_host(backend, values);
    return hash;
}

uint64_t checkpoint_param_hash(Backend *backend, const Ranks *ranks) {
    return sum_hashes(ranks, hash_share(backend, FOX_PARAMS, &backend->partition, ranks->rank));
}

static uint64_t moment_hash(Backend *backend, const Ranks *ranks) {
    return sum_hashes(ranks, hash_share(backend, FOX_ADAM_M, &backend->partition, ranks->rank) +
                                 3 * hash_share(backend, FOX_ADAM_V, &backend->partition, ranks->rank));
}

bool checkpoint_same_params(Backend *backend, const Ranks *ranks) {
    Partition everything = partition_create(backend->table.total, 1);
    return ranks->size == 1 || !backend->whole_params || ranks_agree(ranks, hash_share(backend, FOX_PARAMS, &everything, 0));
}

/* ---- the state --------------------------------------------------------------------------------------------------- */

/* Where every parameter lies in the flat space: moments are meaningless under another layout. */
static uint64_t layout_hash(const FoxTable *table) {
    uint64_t hash = 0;
    for (int i = 0; i < table->count; i++) {
        const FoxTensor *t = &table->tensors[i];
        hash = fox_hash(hash, t->name, strlen(t->name));
        hash = fox_hash(hash, &t->offset, sizeof t->offset);
        hash = fox_hash(hash, t->shape, sizeof t->shape);
    }
    return hash;
}

static bool get_count(const Json *root, const char *what, const char *key, int64_t *out, FoxError *err) {
    const Json *v = json_get(root, key);
    if (v == NULL) {
        return fox_fail(err, "%s: %s is missing", what, key);
    }
    *out = v->integer;
    return (v->is_integer && v->integer >= 0) || wrong_value(what, key, v, "a whole number from 0", err);
}

/* A string of up to 16 hexadecimal digits, with or without 0x; *out is untouched when it is none. */
static bool parse_hex(const char *s, uint64_t *out) {
    s += strncmp(s, "0x", 2) == 0 ? 2 : 0;
    size_t length = strspn(s, "0123456789abcdefABCDEF");
    if (length == 0 || length > 16 || s[length] != '\0') {
        return false;
    }
    *out = strtoull(s, NULL, 16);
    return true;
}

static bool get_hex(const Json *root, const char *what, const char *key, uint64_t *out, FoxError *err) {
    const Json *v = json_get(root, key);
    if (v == NULL) {
        return fox_fail(err, "%s: %s is missing", what, key);
    }
    return (v->type == JSON_STRING && parse_hex(v->string, out)) ||
           wrong_value(what, key, v, "a string of hexadecimal digits", err);
}

static bool state_from_json(const Json *root, const char *what, TrainState *s, int64_t *files, FoxError *err) {
    int64_t skipped = 0;
    const Json *best = json_get(root, "best_val_loss");
    bool ok = get_count(root, what, "step", &s->step, err) && get_count(root, what, "tokens", &s->tokens, err) &&
              get_hex(root, what, "seed", &s->seed, err) &&
              get_count(root, what, "next_window", &s->next_window, err) &&
              get_count(root, what, "windows", &s->windows, err) &&
              get_hex(root, what, "data_hash", &s->data_hash, err) &&
              get_count(root, what, "skipped_in_a_row", &skipped, err) &&
              get_hex(root, what, "param_hash", &s->param_hash, err) &&
              (json_get(root, "moment_hash") == NULL || get_hex(root, what, "moment_hash", &s->moment_hash, err)) &&
              get_count(root, what, "optimizer_files", files, err);
    if (!ok) {
        return false;
    }
    if (!is_null(best) && best->type != JSON_NUMBER) {
        return wrong_value(what, "best_val_loss", best, "a number or null", err);
    }
    if (skipped > INT_MAX || *files < 1 || *files > 99999) {
        return fox_fail(err, "%s: skipped_in_a_row or optimizer_files is out of range", what);
    }
    s->skipped_in_a_row = (int)skipped;
    s->best_val_loss = is_null(best) ? (double)NAN : best->number;
    return true;
}

/* Reads state.json; *files: number of optimizer files. */
static bool read_state(const char *dir, TrainState *state, int64_t *files, FoxError *err) {
    char path[PATH_SIZE];
    memset(state, 0, sizeof *state);
    if (!join(path, dir, "state.json", err)) {
        return false;
    }
    if (access(path, F_OK) != 0 && errno == ENOENT) {
        return fox_fail(err, "%s: holds no state.json: it may be a model to start from (--model), but no run to resume",
                        dir);
    }
    JsonDocument document;
    if (!json_parse_file(path, &document, err)) {
        return false;
    }
    bool ok = state_from_json(document.root, path, state, files, err);
    json_free(&document);
    return ok;
}

bool checkpoint_read_state(const char *dir, TrainState *state, FoxError *err) {
    char path[PATH_SIZE];
    int64_t files;
    memset(state, 0, sizeof *state);
    return join(path, dir, "state.json", err) &&
           ((access(path, F_OK) != 0 && errno == ENOENT) || read_state(dir, state, &files, err));
}

static bool write_state(const char *dir, const TrainState *s, uint64_t param_hash, uint64_t moments, const char *settings,
                        FoxError *err) {
    char path[PATH_SIZE];
    if (!join(path, dir, "state.json", err)) {
        return false;
    }
    FILE *out = fopen(path, "we");
    if (out != NULL) {
        fprintf(out, "{\n  \"step\": %" PRId64 ",\n  \"tokens\": %" PRId64 ",\n", s->step, s->tokens);
        fprintf(out, "  \"seed\": \"0x%016" PRIx64 "\",\n", s->seed);
        fprintf(out, "  \"next_window\": %" PRId64 ",\n  \"windows\": %" PRId64 ",\n", s->next_window, s->windows);
        fprintf(out, "  \"data_hash\": \"0x%016" PRIx64 "\",\n", s->data_hash);
        fprintf(out, "  \"skipped_in_a_row\": %d,\n  \"best_val_loss\": ", s->skipped_in_a_row);
        json_write_number(out, s->best_val_loss);
        fprintf(out, ",\n  \"param_hash\": \"0x%016" PRIx64 "\",\n  \"moment_hash\": \"0x%016" PRIx64 "\",\n", param_hash, moments);
        fprintf(out, "  \"optimizer_files\": 1,\n");
        fprintf(out, "  \"settings\": %s\n}\n", settings);
    }
    return file_finish(out, path, err);
}

/* ---- the optimizer ----------------------------------------------------------------------------------------------- */

static bool optimizer_path(char path[PATH_SIZE], const char *dir, int64_t index, int64_t count, FoxError *err) {
    char name[64];
    snprintf(name, sizeof name, "optimizer-%05d-of-%05d.safetensors", (int)index, (int)count);
    return join(path, dir, name, err);
}

static const char *const moment_names[] = {"exp_avg", "exp_avg_sq"};

/* A decimal number in the metadata. */
static bool metadata_count(const SafeTensors *st, const char *key, int64_t *out, FoxError *err) {
    const char *s = safetensors_metadata(st, key);
    size_t length = s != NULL ? strspn(s, "0123456789") : 0;
    if (length == 0 || length > 18 || s[length] != '\0') {
        return fox_fail(err, "%s: its metadata has no whole number '%s'", st->path, key);
    }
    *out = strtoll(s, NULL, 10);
    return true;
}

/* Loads the moments of one open file, which must begin at *at of the flat space, and moves *at to its end. */
static bool load_moments(Loading *l, const SafeTensors *st, int64_t *at, FoxError *err) {
    const Backend *backend = l->backend;
    int64_t start = 0, length = 0, total = 0;
    if (!metadata_count(st, "start", &start, err) || !metadata_count(st, "length", &length, err) ||
        !metadata_count(st, "total", &total, err)) {
        return false;
    }
    uint64_t layout = 0;
    const char *layout_text = safetensors_metadata(st, "layout");
    bool known = layout_text != NULL && parse_hex(layout_text, &layout) && layout == layout_hash(&backend->table);
    if (!known || total != backend->table.total) {
        return fox_fail(err, "%s: belongs to a model of other parameters: %" PRId64 " floats, expected %" PRId64
                        " and the same layout", st->path, total, backend->table.total);
    }
    if (start != *at || length > total - start) {
        return fox_fail(err, "%s: covers %" PRId64 " floats from %" PRId64 ", expected from %" PRId64
                        " and up to %" PRId64, st->path, length, start, *at, total);
    }
    for (int i = 0; i < 2; i++) {
        const SafeTensor *t = safetensors_find(st, moment_names[i]);
        if (t == NULL || t->ndim != 1 || t->count != length || strcmp(t->dtype, "F32") != 0) {
            return fox_fail(err, "%s: expected a tensor %s of shape [%" PRId64 "] and dtype F32, found %s", st->path,
                            moment_names[i], length, t == NULL ? "none" : "another shape or dtype");
        }
        for (int k = 0; k < backend->owned.buckets; k++) {
            Piece piece = partition_within(backend_piece(backend, k), start, length);
            if (!load_floats(l, st, t, piece.start - start, piece.count, i == 0 ? FOX_ADAM_M : FOX_ADAM_V, piece.start, err)) {
                return false;
            }
        }
    }
    *at = start + length;
    return true;
}

static bool load_optimizer(const char *dir, int64_t files, Loading *l, FoxError *err) {
    int64_t total = l->backend->table.total;
    int64_t at = 0;
    for (int64_t i = 0; i < files; i++) {
        char path[PATH_SIZE];
        SafeTensors st;
        if (!optimizer_path(path, dir, i, files, err) || !safetensors_open(path, &st, err)) {
            return false;
        }
        bool ok = load_moments(l, &st, &at, err);
        safetensors_close(&st);
        if (!ok) {
            return false;
        }
    }
    return at == total || fox_fail(err, "%s: its optimizer files end at %" PRId64 ", expected %" PRId64, dir, at, total);
}

bool checkpoint_load_state(const char *dir, Backend *backend, const Ranks *ranks, TrainState *state, FoxError *err) {
    int64_t files;
    Loading l = loading_begin(backend, false);
    bool ok = read_state(dir, state, &files, err) && load_optimizer(dir, files, &l, err);
    loading_end(&l);
    if (!ranks_everyone(ranks, ok, err)) {
        return false;
    }
    if (!ranks_agree(ranks, fox_hash(state->param_hash, &state->step, sizeof state->step))) {
        return ranks_everyone(ranks, fox_fail(err, "%s: the ranks found different checkpoints there; is the folder the same for all of "
                                              "them?", dir), err);
    }
    uint64_t hash = checkpoint_param_hash(backend, ranks);
    return ranks_everyone(ranks, hash == state->param_hash ||
                          fox_fail(err, "%s: the parameters have hash %016" PRIx64 ", state.json says %016" PRIx64
                                   ": the checkpoint is damaged; remove it and -y goes on from the one before", dir, hash,
                                   state->param_hash), err) &&
           (state->moment_hash == 0 ||
            ranks_everyone(ranks, moment_hash(backend, ranks) == state->moment_hash ||
                           fox_fail(err, "%s: its optimizer file is damaged: the moments have another hash than state.json says; remove "
                                    "the checkpoint and -y goes on from the one before", dir), err));
}

/* ---- saving ------------------------------------------------------------------------------------------------------ */

static bool write_config(const char *dir, const Backend *backend, FoxError *err) {
    char path[PATH_SIZE];
    if (!join(path, dir, "config.json", err)) {
        return false;
    }
    FILE *out = fopen(path, "we");
    if (out != NULL) {
        double tolerance = backend->spec.acp == ACP_OFF ? (double)NAN : (double)backend->spec.log_tolerance;
        checkpoint_write_config(out, &backend->spec.config, tolerance);
    }
    return file_finish(out, path, err);
}

bool checkpoint_create_model(const char *path, const FoxTable *table, FoxError *err) {
    static const char *const metadata[] = {"format", "pt", NULL};
    const char **names = FOX_NEW(const char *, table->count);
    int *ndim = FOX_NEW(int, table->count);
    int64_t(*shapes)[2] = (int64_t(*)[2])fox_alloc(sizeof *shapes * (size_t)table->count);
    for (int i = 0; i < table->count; i++) {
        names[i] = table->tensors[i].name;
        ndim[i] = table->tensors[i].ndim;
        memcpy(shapes[i], table->tensors[i].shape, sizeof shapes[i]);
    }
    bool ok = safetensors_create(path, table->count, names, ndim, (const int64_t(*)[2])shapes, metadata, err);
    free(names);
    free(ndim);
    free(shapes);
    return ok;
}

static bool create_optimizer(const char *path, const FoxTable *table, FoxError *err) {
    static const int ndim[] = {1, 1};
    const int64_t shapes[2][2] = {{table->total, 1}, {table->total, 1}};
    char length[32], layout[32];
    snprintf(length, sizeof length, "%" PRId64, table->total);
    snprintf(layout, sizeof layout, "%016" PRIx64, layout_hash(table));
    const char *const metadata[] = {"start", "0", "length", length, "total", length, "layout", layout, NULL};
    return safetensors_create(path, 2, moment_names, ndim, shapes, metadata, err);
}

static bool exists(const char *path) {
    struct stat info;
    return lstat(path, &info) == 0;
}

static bool remove_leftover(const char *path, FoxError *err) {
    return !exists(path) || remove_directory(path) ||
           fox_fail(err, "%s: is in the way and cannot be removed; move it", path);
}

static bool move(const char *from, const char *to, FoxError *err) {
    return rename(from, to) == 0 || fox_fail(err, "%s: cannot rename to %s: %s", from, to, strerror(errno));
}

/* Does the directory hold nothing but files this program writes into checkpoints? */
static bool holds_only_ours(const char *path) {
    static const char *const names[] = {".", "..", "config.json", "model.safetensors", "state.json"};
    DIR *dir = opendir(path);
    bool ours = dir != NULL;
    for (struct dirent *item; ours && (item = readdir(dir)) != NULL;) {
        int index, of, end = 0;
        ours = sscanf(item->d_name, "optimizer-%5d-of-%5d.safetensors%n", &index, &of, &end) == 2 && end > 0 &&
               item->d_name[end] == '\0';
        for (size_t i = 0; !ours && i < sizeof names / sizeof names[0]; i++) {
            ours = strcmp(item->d_name, names[i]) == 0;
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return ours;
}

/* Puts the complete `tmp` in the place of `final`. At every moment one of final and old is a whole checkpoint. */
static bool publish(const char *tmp, const char *final, const char *old, FoxError *err) {
    if (!exists(final)) {
        return move(tmp, final, err);
    }
    if (!remove_leftover(old, err) || !move(final, old, err)) {
        return false;
    }
    if (!move(tmp, final, err)) {
        move(old, final, NULL);
        return false;
    }
    return true;
}

/* The names a checkpoint has in its life: while it is written, whole, and while a new one of the same step replaces it. */
typedef struct Names {
    char tmp[PATH_SIZE], final[PATH_SIZE], old[PATH_SIZE];
} Names;

static bool names_of(Names *n, const char *out_dir, int64_t step, FoxError *err) {
    char name[64];
    snprintf(name, sizeof name, "tmp_step_%08" PRId64, step);
    if (!join(n->tmp, out_dir, name, err) || !join(n->final, out_dir, name + 4, err)) {
        return false;
    }
    memcpy(name, "old", 3);
    return join(n->old, out_dir, name, err);
}

static bool data_paths(const char *dir, char model[PATH_SIZE], char optimizer[PATH_SIZE], FoxError *err) {
    return join(model, dir, "model.safetensors", err) && optimizer_path(optimizer, dir, 0, 1, err);
}

/* Rank 0 makes the files, with room for everybody's part. */
static bool create_files(const CheckpointWriter *w, FoxError *err) {
    Names n;
    char model[PATH_SIZE], optimizer[PATH_SIZE];
    if (!names_of(&n, w->out_dir, w->state.step, err) || !make_directories(w->out_dir, err) || !remove_leftover(n.tmp, err)) {
        return false;
    }
    if (mkdir(n.tmp, 0777) != 0) {
        return fox_fail(err, "%s: cannot create the directory: %s", n.tmp, strerror(errno));
    }
    return data_paths(n.tmp, model, optimizer, err) && checkpoint_create_model(model, &w->backend->table, err) &&
           create_optimizer(optimizer, &w->backend->table, err);
}

static bool open_files(CheckpointWriter *w, FoxError *err) {
    Names n;
    char model[PATH_SIZE], optimizer[PATH_SIZE];
    if (!names_of(&n, w->out_dir, w->state.step, err) || !data_paths(n.tmp, model, optimizer, err)) {
        return false;
    }
    if (access(model, F_OK) != 0) {
        return fox_fail(err, "%s: what rank 0 created there is not seen by rank %d; -o must be a folder that all machines share", n.tmp,
                        w->ranks->rank);
    }
    if (!safetensors_edit(model, &w->model, err)) {
        return false;
    }
    if (!safetensors_edit(optimizer, &w->optimizer, err)) {
        safetensors_close(&w->model);
        return false;
    }
    return true;
}

static void close_files(CheckpointWriter *w) {
    safetensors_close(&w->model);
    safetensors_close(&w->optimizer);
}

/* A checkpoint that did not come about. */
static void discard_files(const CheckpointWriter *w) {
    Names n;
    if (w->ranks->rank == 0 && names_of(&n, w->out_dir, w->state.step, NULL)) {
        remove_directory(n.tmp);
    }
}

/* This rank's share of one of the three arrays. */
static float *copy_of(const CheckpointWriter *w, FoxBuffer buffer) {
    int64_t share = partition_share(&w->backend->partition);
    return w->copy + (buffer == FOX_PARAMS ? 0 : buffer == FOX_ADAM_M ? share : 2 * share);
}

static void copy_state(CheckpointWriter *w) {
    static const FoxBuffer buffers[] = {FOX_PARAMS, FOX_ADAM_M, FOX_ADAM_V};
    Backend *b = w->backend;
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < b->partition.buckets; k++) {
            Piece piece = partition_piece(&b->partition, k, w->ranks->rank);
            if (piece.count > 0) {
                b->read(b, buffers[i], piece.start, piece.count, copy_of(w, buffers[i]) + piece.local);
            }
        }
    }
}

/* A piece of the parameters into the tensors it lies in. */
static bool write_params(CheckpointWriter *w, Piece piece, FoxError *err) {
    const FoxTable *table = &w->backend->table;
    for (int i = 0; i < table->count; i++) {
        const FoxTensor *tensor = &table->tensors[i];
        Piece part = partition_within(piece, tensor->offset, tensor->size);
        const SafeTensor *t = part.count > 0 ? safetensors_find(&w->model, tensor->name) : NULL;
        if (t != NULL && !safetensors_write_float(&w->model, t, part.start - tensor->offset, part.count,
                                                  copy_of(w, FOX_PARAMS) + part.local, err)) {
            return false;
        }
    }
    return true;
}

/* This rank's part of the checkpoint, from the copy to the disk; *hash: of its parameters. */
static bool write_part(CheckpointWriter *w, uint64_t *hash, uint64_t *moment_hash, FoxError *err) {
    const Partition *p = &w->backend->partition;
    *hash = *moment_hash = 0;
    for (int k = 0; k < p->buckets; k++) {
        Piece piece = partition_piece(p, k, w->ranks->rank);
        *hash += hash_grains(piece.start, piece.count, copy_of(w, FOX_PARAMS) + piece.local, false); // training goes on
        if (!write_params(w, piece, err)) {
            return false;
        }
        for (int i = 0; i < 2; i++) {
            const float *moments = copy_of(w, i == 0 ? FOX_ADAM_M : FOX_ADAM_V) + piece.local;
            *moment_hash += (i == 0 ? 1 : 3) * hash_grains(piece.start, piece.count, moments, false);
            const SafeTensor *t = safetensors_find(&w->optimizer, moment_names[i]);
            if (!safetensors_write_float(&w->optimizer, t, piece.start, piece.count, moments, err)) {
                return false;
            }
        }
    }
    return safetensors_sync(&w->model, err) && safetensors_sync(&w->optimizer, err);
}

/* Rank 0, when all parts are written: the last files, then the name. */
static bool publish_files(const CheckpointWriter *w, FoxError *err) {
    Names n;
    if (!names_of(&n, w->out_dir, w->state.step, err) || !write_config(n.tmp, w->backend, err) ||
        !write_state(n.tmp, &w->state, w->hash, w->moment_hash, w->settings, err) || !sync_directory(n.tmp, err) ||
        !publish(n.tmp, n.final, n.old, err) || !sync_directory(w->out_dir, err)) {
        return false;
    }
    if (holds_only_ours(n.old)) {
        remove_directory(n.old); // only now: until the rename is on the disk a power cut may bring the old name back
    }
    return true;
}

/* What a rank's thread does: first its part, then, when all have written theirs and rank 0, the publishing. */
static void *work_in_thread(void *context) {
    CheckpointWriter *w = (CheckpointWriter *)context;
    double start = fox_now();
    FoxError why;
    why.text[0] = '\0';
    bool ok = !w->publishing ? write_part(w, &w->hash, &w->moment_hash, &why) : w->ranks->rank != 0 || publish_files(w, &why);
    pthread_mutex_lock(&w->mutex);
    w->ok = ok;
    w->why = why;
    w->seconds += fox_now() - start;
    w->rests = true;
    pthread_mutex_unlock(&w->mutex);
    return NULL;
}

static void start_thread(CheckpointWriter *w) {
    w->rests = false;
    int code = pthread_create(&w->thread, NULL, work_in_thread, w);
    if (code != 0) {
        fox_die("the thread that writes checkpoints cannot be started: %s", strerror(code));
    }
}

/* Waits for the threads of all ranks; true when all did well. */
static bool join_threads(CheckpointWriter *w, FoxError *err) {
    pthread_join(w->thread, NULL);
    return ranks_everyone(w->ranks, w->ok || fox_fail(err, "%s", w->why.text), err);
}

static bool check_settings(const char *settings, FoxError *err) {
    JsonDocument document;
    if (!json_parse(settings, strlen(settings), "settings", &document, err)) {
        return false;
    }
    bool ok = document.root->type == JSON_OBJECT || fox_fail(err, "settings: not a JSON object");
    json_free(&document);
    return ok;
}

bool checkpoint_open(CheckpointWriter *w, const char *out_dir, Backend *backend, const Ranks *ranks, const char *settings,
                     FoxError *err) {
    memset(w, 0, sizeof *w);
    w->backend = backend;
    w->ranks = ranks;
    w->out_dir = out_dir;
    w->settings = settings != NULL ? settings : "{}";
    int64_t bytes = 3 * (int64_t)sizeof(float) * partition_share(&backend->partition);
    bool ok = check_settings(w->settings, err);
    if (ok && (w->copy = (float *)backend->allocate_host(backend, bytes)) == NULL) {
        ok = fox_fail(err, "checkpoints need %.1f GiB of main memory on every rank, for the copy that is written while training goes on; "
                      "this machine has not so much free", (double)bytes / 0x1p30);
    }
    pthread_mutex_init(&w->mutex, NULL);
    return ranks_everyone(ranks, ok, err);
}

bool checkpoint_begin(CheckpointWriter *w, const TrainState *state, FoxError *err) {
    double start = fox_now();
    w->state = *state;
    bool ok = ranks_everyone(w->ranks, w->ranks->rank != 0 || create_files(w, err), err);
    if (ok) {
        bool opened = open_files(w, err);
        ok = ranks_everyone(w->ranks, opened, err);
        if (opened && !ok) {
            close_files(w);
        }
    }
    if (!ok) {
        discard_files(w);
        return false;
    }
    double copying = fox_now();
    copy_state(w);
    w->copying = fox_now() - copying;
    w->publishing = false;
    w->seconds = 0;
    start_thread(w);
    w->busy = true;
    w->stall = fox_now() - start;
    return true;
}

bool checkpoint_rests(CheckpointWriter *w) {
    pthread_mutex_lock(&w->mutex);
    bool rests = w->rests;
    pthread_mutex_unlock(&w->mutex);
    return rests;
}

bool checkpoint_advance(CheckpointWriter *w, bool wait, FoxError *err) {
    double start = fox_now();
    bool written = w->publishing, ok = true;
    if (!written) {
        ok = join_threads(w, err);
        close_files(w);
        if (ok) {
            w->hash = sum_hashes(w->ranks, w->hash);
            w->moment_hash = sum_hashes(w->ranks, w->moment_hash);
            w->publishing = true;
            start_thread(w);
        }
    }
    if (ok && (written || wait)) {
        ok = join_threads(w, err);
        w->busy = false;
    }
    if (!ok) {
        discard_files(w);
        w->busy = false;
    }
    w->stall += fox_now() - start;
    return ok;
}

void checkpoint_close(CheckpointWriter *w) {
    if (w->backend == NULL) {
        return;
    }
    if (w->busy) {
        pthread_join(w->thread, NULL);
        if (!w->publishing) {
            close_files(w);
            discard_files(w);
        }
    }
    pthread_mutex_destroy(&w->mutex);
    w->backend->free_host(w->backend, w->copy);
    memset(w, 0, sizeof *w);
}

bool checkpoint_save(const char *out_dir, Backend *backend, const Ranks *ranks, const TrainState *state,
                     const char *settings, char path[1024], FoxError *err) {
    CheckpointWriter w;
    Names n;
    bool ok = checkpoint_open(&w, out_dir, backend, ranks, settings, err) && checkpoint_begin(&w, state, err) &&
              checkpoint_advance(&w, true, err);
    checkpoint_close(&w);
    if (ok && path != NULL) {
        ok = names_of(&n, out_dir, state->step, err);
        snprintf(path, 1024, "%s", n.final);
    }
    return ok;
}

/* ---- the directory of checkpoints -------------------------------------------------------------------------------- */

typedef enum EntryKind { ENTRY_STEP, ENTRY_OLD, ENTRY_TMP } EntryKind;

typedef struct Entry {
    char name[40];
    EntryKind kind;
    int64_t step;
} Entry;

/* step_N, old_step_N or tmp_step_N, with N written exactly as this program writes it. */
static bool parse_entry(const char *name, Entry *e) {
    static const char *const prefixes[] = {"step_", "old_step_", "tmp_step_"};
    for (int kind = 0; kind < 3; kind++) {
        size_t prefix = strlen(prefixes[kind]), length = strlen(name);
        if (strncmp(name, prefixes[kind], prefix) != 0 || length < prefix + 8 || length > prefix + 18 ||
            strspn(name + prefix, "0123456789") != length - prefix) {
            continue;
        }
        e->kind = (EntryKind)kind;
        e->step = strtoll(name + prefix, NULL, 10);
        snprintf(e->name, sizeof e->name, "%s%08" PRId64, prefixes[kind], e->step);
        return strcmp(e->name, name) == 0;
    }
    return false;
}

/* Newest first; of one step the finished one first. */
static int compare_entries(const void *a, const void *b) {
    const Entry *x = (const Entry *)a, *y = (const Entry *)b;
    if (x->step != y->step) {
        return x->step > y->step ? -1 : 1;
    }
    return (int)x->kind - (int)y->kind;
}

/* The entries of out_dir that are directories (not links); none when it cannot be read. The caller frees them. */
static Entry *list_entries(const char *out_dir, int *count) {
    Entry *entries = NULL;
    *count = 0;
    DIR *dir = opendir(out_dir);
    if (dir == NULL) {
        return NULL;
    }
    Entry e;
    for (struct dirent *item; (item = readdir(dir)) != NULL;) {
        char path[PATH_SIZE];
        struct stat info;
        if (!parse_entry(item->d_name, &e) || !join(path, out_dir, e.name, NULL) || lstat(path, &info) != 0 ||
            !S_ISDIR(info.st_mode)) {
            continue;
        }
        entries = (Entry *)realloc(entries, sizeof e * ((size_t)*count + 1));
        if (entries == NULL) {
            fox_die("out of memory for a list of %d checkpoints", *count + 1);
        }
        entries[(*count)++] = e;
    }
    closedir(dir);
    if (*count > 0) {
        qsort(entries, (size_t)*count, sizeof e, compare_entries);
    }
    return entries;
}

static bool safetensors_whole(const char *path, FoxError *err) {
    SafeTensors st;
    bool ok = safetensors_open(path, &st, err);
    if (ok) {
        safetensors_close(&st);
    }
    return ok;
}

/* Are all files of a checkpoint there, of the right length and readable? Does not read the weights. */
static bool is_whole(const char *dir, int64_t step, FoxError *err) {
    FoxConfig config;
    TrainState state;
    int64_t files;
    char path[PATH_SIZE];
    if (!checkpoint_read_config(dir, &config, err) || !read_state(dir, &state, &files, err) ||
        !join(path, dir, "model.safetensors", err) || !safetensors_whole(path, err)) {
        return false;
    }
    for (int64_t i = 0; i < files; i++) {
        if (!optimizer_path(path, dir, i, files, err) || !safetensors_whole(path, err)) {
            return false;
        }
    }
    return state.step == step || fox_fail(err, "%s: its state.json is of step %" PRId64, dir, state.step);
}

bool checkpoint_latest(const char *out_dir, char path[1024], FoxError *err) {
    int count;
    Entry *entries = list_entries(out_dir, &count);
    FoxError damage = {""}; // of the newest; later ones do not overwrite it
    bool found = false;
    for (int i = 0; i < count && !found; i++) {
        found = entries[i].kind != ENTRY_TMP && join(path, out_dir, entries[i].name, &damage) &&
                is_whole(path, entries[i].step, &damage);
    }
    free(entries);
    if (!found) {
        path[0] = '\0';
        return damage.text[0] != '\0' && fox_fail(err, "%s; there is no other checkpoint to fall back on", damage.text);
    }
    if (damage.text[0] != '\0') {
        fprintf(stderr, "fox: warning: damaged checkpoint: %s; falling back on %s\n", damage.text, path);
    }
    return true;
}

/* Renames to tmp_ first: a half removed directory never bears the name of a checkpoint. */
static void discard(const char *out_dir, const Entry *e) {
    char path[PATH_SIZE], tmp[PATH_SIZE], name[64];
    snprintf(name, sizeof name, "tmp_step_%08" PRId64, e->step);
    if (!join(path, out_dir, e->name, NULL) || !join(tmp, out_dir, name, NULL) || !holds_only_ours(path)) {
        return;
    }
    if (e->kind == ENTRY_TMP || rename(path, tmp) == 0) {
        remove_directory(tmp);
    }
}

void checkpoint_prune(const char *out_dir, int keep) {
    int count, whole = 0;
    int64_t finished = -1; // step of the last whole step_N met: the old_step_N after it is a leftover
    Entry *entries = list_entries(out_dir, &count);
    for (int i = 0; i < count; i++) {
        if (entries[i].kind == ENTRY_TMP) {
            discard(out_dir, &entries[i]);
        }
    }
    for (int i = 0; i < count; i++) {
        const Entry *e = &entries[i];
        char path[PATH_SIZE];
        if (e->kind == ENTRY_TMP || !join(path, out_dir, e->name, NULL)) {
            continue;
        }
        if ((keep > 0 && whole >= keep) || finished == e->step) {
            discard(out_dir, e);
        } else if (is_whole(path, e->step, NULL)) {
            finished = e->step;
            whole++;
        }
    }
    free(entries);
}

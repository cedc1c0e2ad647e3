/* The model, the state of a run and the optimizer: loading, hashes. */
#include "checkpoint_parts.h"

#include "files.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <unistd.h>

#define PIECE (1 << 20) /* floats moved between a file and the back end at a time; a multiple of PARTITION_GRAIN */

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

uint64_t checkpoint_hash_grains(int64_t start, int64_t count, const float *values, bool all_cores) {
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
            l->hash += checkpoint_hash_grains(offset + done, n, l->values, true);
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
            ok = checkpoint_wrong_value(what, "a value of weight_map", m, "the name of a file in the same directory", err);
        } else {
            names[count++] = m->string;
        }
    }
    qsort(names, (size_t)count, sizeof *names, compare_strings);
    for (int i = 0; ok && i < count; i++) {
        char path[PATH_SIZE];
        if (i == 0 || strcmp(names[i - 1], names[i]) != 0) {
            ok = path_join(path, dir, names[i], err) && load_model_file(path, l, loaded, err);
        }
    }
    free(names);
    return ok;
}

static bool load_model(const char *dir, Loading *l, FoxError *err) {
    char path[PATH_SIZE], index_path[PATH_SIZE];
    if (!path_join(path, dir, "model.safetensors", err) || !path_join(index_path, dir, "model.safetensors.index.json", err)) {
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

uint64_t checkpoint_sum_hashes(const Ranks *ranks, uint64_t mine) {
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
            hash += checkpoint_hash_grains(piece.start + done, n, values, true);
        }
    }
    backend->free_host(backend, values);
    return hash;
}

uint64_t checkpoint_param_hash(Backend *backend, const Ranks *ranks) {
    return checkpoint_sum_hashes(ranks, hash_share(backend, FOX_PARAMS, &backend->partition, ranks->rank));
}

static uint64_t moment_hash(Backend *backend, const Ranks *ranks) {
    return checkpoint_sum_hashes(ranks, hash_share(backend, FOX_ADAM_M, &backend->partition, ranks->rank) +
                                 3 * hash_share(backend, FOX_ADAM_V, &backend->partition, ranks->rank));
}

bool checkpoint_same_params(Backend *backend, const Ranks *ranks) {
    Partition everything = partition_create(backend->table.total, 1);
    return ranks->size == 1 || !backend->whole_params || ranks_agree(ranks, hash_share(backend, FOX_PARAMS, &everything, 0));
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
    return (v->is_integer && v->integer >= 0) || checkpoint_wrong_value(what, key, v, "a whole number from 0", err);
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
           checkpoint_wrong_value(what, key, v, "a string of hexadecimal digits", err);
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
    if (!checkpoint_is_null(best) && best->type != JSON_NUMBER) {
        return checkpoint_wrong_value(what, "best_val_loss", best, "a number or null", err);
    }
    if (skipped > INT_MAX || *files < 1 || *files > 99999) {
        return fox_fail(err, "%s: skipped_in_a_row or optimizer_files is out of range", what);
    }
    s->skipped_in_a_row = (int)skipped;
    s->best_val_loss = checkpoint_is_null(best) ? (double)NAN : best->number;
    return true;
}

bool checkpoint_read_run(const char *dir, TrainState *state, int64_t *files, FoxError *err) {
    char path[PATH_SIZE];
    memset(state, 0, sizeof *state);
    if (!path_join(path, dir, "state.json", err)) {
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
    return path_join(path, dir, "state.json", err) &&
           ((access(path, F_OK) != 0 && errno == ENOENT) || checkpoint_read_run(dir, state, &files, err));
}

bool checkpoint_write_state(const char *dir, const TrainState *s, uint64_t param_hash, uint64_t moments, const char *settings,
                            FoxError *err) {
    char path[PATH_SIZE];
    if (!path_join(path, dir, "state.json", err)) {
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

bool checkpoint_optimizer_path(char path[PATH_SIZE], const char *dir, int64_t index, int64_t count, FoxError *err) {
    char name[64];
    snprintf(name, sizeof name, "optimizer-%05d-of-%05d.safetensors", (int)index, (int)count);
    return path_join(path, dir, name, err);
}

const char *const checkpoint_moment_names[] = {"exp_avg", "exp_avg_sq"};

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
        const SafeTensor *t = safetensors_find(st, checkpoint_moment_names[i]);
        if (t == NULL || t->ndim != 1 || t->count != length || strcmp(t->dtype, "F32") != 0) {
            return fox_fail(err, "%s: expected a tensor %s of shape [%" PRId64 "] and dtype F32, found %s", st->path,
                            checkpoint_moment_names[i], length, t == NULL ? "none" : "another shape or dtype");
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
        if (!checkpoint_optimizer_path(path, dir, i, files, err) || !safetensors_open(path, &st, err)) {
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
    bool ok = checkpoint_read_run(dir, state, &files, err) && load_optimizer(dir, files, &l, err);
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

bool checkpoint_create_optimizer(const char *path, const FoxTable *table, FoxError *err) {
    static const int ndim[] = {1, 1};
    const int64_t shapes[2][2] = {{table->total, 1}, {table->total, 1}};
    char length[32], layout[32];
    snprintf(length, sizeof length, "%" PRId64, table->total);
    snprintf(layout, sizeof layout, "%016" PRIx64, layout_hash(table));
    const char *const metadata[] = {"start", "0", "length", length, "total", length, "layout", layout, NULL};
    return safetensors_create(path, 2, checkpoint_moment_names, ndim, shapes, metadata, err);
}

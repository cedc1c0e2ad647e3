/* Checkpoints come and go: written beside training, put in their place, found again, removed. */
#include "checkpoint_parts.h"

#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- saving ------------------------------------------------------------------------------------------------------ */

static bool write_config(const char *dir, const Backend *backend, FoxError *err) {
    char path[PATH_SIZE];
    if (!path_join(path, dir, "config.json", err)) {
        return false;
    }
    FILE *out = fopen(path, "we");
    if (out != NULL) {
        double tolerance = backend->spec.acp == ACP_OFF ? (double)NAN : (double)backend->spec.log_tolerance;
        checkpoint_write_config(out, &backend->spec.config, tolerance);
    }
    return file_finish(out, path, err);
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
    if (!path_join(n->tmp, out_dir, name, err) || !path_join(n->final, out_dir, name + 4, err)) {
        return false;
    }
    memcpy(name, "old", 3);
    return path_join(n->old, out_dir, name, err);
}

static bool data_paths(const char *dir, char model[PATH_SIZE], char optimizer[PATH_SIZE], FoxError *err) {
    return path_join(model, dir, "model.safetensors", err) && checkpoint_optimizer_path(optimizer, dir, 0, 1, err);
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
           checkpoint_create_optimizer(optimizer, &w->backend->table, err);
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
        *hash += checkpoint_hash_grains(piece.start, piece.count, copy_of(w, FOX_PARAMS) + piece.local, false); // training goes on
        if (!write_params(w, piece, err)) {
            return false;
        }
        for (int i = 0; i < 2; i++) {
            const float *moments = copy_of(w, i == 0 ? FOX_ADAM_M : FOX_ADAM_V) + piece.local;
            *moment_hash += (i == 0 ? 1 : 3) * checkpoint_hash_grains(piece.start, piece.count, moments, false);
            const SafeTensor *t = safetensors_find(&w->optimizer, checkpoint_moment_names[i]);
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
        !checkpoint_write_state(n.tmp, &w->state, w->hash, w->moment_hash, w->settings, err) || !sync_directory(n.tmp, err) ||
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
            w->hash = checkpoint_sum_hashes(w->ranks, w->hash);
            w->moment_hash = checkpoint_sum_hashes(w->ranks, w->moment_hash);
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
        if (!parse_entry(item->d_name, &e) || !path_join(path, out_dir, e.name, NULL) || lstat(path, &info) != 0 ||
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
    if (!checkpoint_read_config(dir, &config, err) || !checkpoint_read_run(dir, &state, &files, err) ||
        !path_join(path, dir, "model.safetensors", err) || !safetensors_whole(path, err)) {
        return false;
    }
    for (int64_t i = 0; i < files; i++) {
        if (!checkpoint_optimizer_path(path, dir, i, files, err) || !safetensors_whole(path, err)) {
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
        found = entries[i].kind != ENTRY_TMP && path_join(path, out_dir, entries[i].name, &damage) &&
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
    if (!path_join(path, out_dir, e->name, NULL) || !path_join(tmp, out_dir, name, NULL) || !holds_only_ours(path)) {
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
        if (e->kind == ENTRY_TMP || !path_join(path, out_dir, e->name, NULL)) {
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

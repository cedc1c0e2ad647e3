/* The data loader: shards in, batches out.
 *
 * A shard is llm.c's format: 256 little-endian int32, then the tokens as little-endian uint16, and nothing after them:
 *     [0] = 20240520   [1] = 1   [2] = number of tokens   [3] = vocabulary size (0: 50257)   the others: not looked at
 *     [1] = 2: the tokens are windows, each by itself, of [4] tokens, and [4] must be T + 1
 *
 * A shard of n tokens holds floor((n - 1) / T) windows. Window k starts at s = k*T: its input is tokens[s .. s+T), its
 * targets the same shifted by one, so neighbours share one token and every token but the first is predicted once.
 *
 *     shard 0                        shard 1                N windows in all, numbered through
 *     |  0  |  1  |  2  |rest|       |  3  |  4  |rest|
 *
 * In a shard of windows neighbours share nothing: window k starts at k*(T+1). So a window may begin with a token that stands
 * for nothing before it (scripts/data_longcrawl64.py).
 *
 * One global order. g = 0, 1, 2, ... counts windows over the whole run; its epoch is g / N, and a keyed permutation of
 * [0, N) turns g % N into the window of that moment (without `shuffle` it is window g % N). A step of W windows takes g = s*W .. s*W + W-1, and rank r of n
 * the contiguous share [r*W/n, (r+1)*W/n) of them, B at a time. What a step sees therefore depends on the seed and the
 * step alone, not on the number of ranks, and the whole state of the loader is one number, the next g.
 *
 * Batches are read ahead by one thread, with pread and not mmap: a file that shrinks while we run must be an error
 * message and not a SIGBUS. Files are opened for each window, so that any number of shards will do. */
#ifndef FOX_DATALOADER_H
#define FOX_DATALOADER_H

#include "train/common.h"
#include "train/files.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#define DATALOADER_MAGIC 20240520
#define DATALOADER_VERSION 1
#define DATALOADER_VERSION_WINDOWS 2
#define DATALOADER_HEADER_BYTES 1024
#define DATALOADER_DEFAULT_VOCAB 50257
#define DATALOADER_TRAIN_PATTERN "*train*.bin"
#define DATALOADER_VAL_PATTERN "*val*.bin"
#define DATALOADER_SLOTS 4         /* micro-batches read ahead */
#define DATALOADER_SHUFFLE_ROUNDS 64
#define DATALOADER_END ((int64_t)1 << 62) /* positions stay below it, so that sums of them cannot overflow */

/* What a loader is asked for. */
typedef struct DataSpec {
    int T;                    /* tokens in a window */
    int B;                    /* windows in a micro-batch */
    uint64_t seed;            /* of the order */
    bool shuffle;             /* false: the windows in file order */
    int64_t windows_per_step; /* W, over all ranks; 0: a step is one whole epoch (validation) */
    int64_t max_windows;      /* an epoch is the first so many windows of the shards; 0: all of them */
    int rank, size;
} DataSpec;

typedef struct DataShard {
    const char *path;
    int64_t tokens;
    int64_t stride;       /* tokens from window to window: T, or T + 1 in a shard of windows */
    int64_t first_window; /* number of its first window: the windows of the shards before it */
    uint64_t sample;      /* hash of some of its tokens */
} DataShard;

/* A point in the run: the step that begins at window `step_start` of the global order, and a micro-batch in it. */
typedef struct DataCursor {
    int64_t step_start;
    int64_t batch; /* in [0, batches_per_step) */
} DataCursor;

/* One micro-batch as the thread prepares it. */
typedef struct DataBatch {
    int windows;      /* real ones; the rows after them are zero */
    int32_t *tokens;  /* [B, T] */
    int32_t *targets; /* [B, T] */
} DataBatch;

/* Lives at one address from open to close (its thread points to it). The caller reads the first part only. */
typedef struct DataLoader {
    DataSpec spec;
    int vocab_size;
    int shard_count;
    DataShard *shards;
    int64_t tokens;           /* in all shards */
    int64_t windows;          /* N, in one epoch */
    int64_t windows_per_step; /* W */
    int64_t batches_per_step; /* micro-batches of every rank in a step */
    int batch_windows;        /* real windows in the micro-batch that dataloader_next gave last */

    PathList paths;
    uint8_t *raw;      /* [2 * (T+1)] bytes of one window; the thread's */
    DataCursor taking; /* the next micro-batch to give; the caller's */
    DataBatch slots[DATALOADER_SLOTS];
    bool running; /* the thread exists */
    pthread_t thread;
    pthread_mutex_t mutex;        /* guards what follows */
    pthread_cond_t room;          /* for the thread: a slot is free, or seek, or close */
    pthread_cond_t arrived;       /* for the caller: a batch or an error */
    DataCursor reading;           /* the next micro-batch to read */
    uint64_t generation;          /* number of seeks: a batch begun before a seek is thrown away */
    int head, ready;              /* slots [head, head + ready) mod DATALOADER_SLOTS are full */
    bool closing, failed;
    FoxError error; /* of the thread, where failed */
} DataLoader;

/* ------------------------------------------------------------------------------------------------ the global order */

/* Where `index` of [0, n) goes in the permutation of that key: the "swap or not" shuffle (Hoang, Morris, Rogaway 2012).
 * Each round pairs every x with pivot - x (mod n) and swaps each pair or not, by a coin that both partners see, so a
 * round is a bijection for any n, and needs no memory. 64 rounds leave a bias of about n * 2^-64. */
static inline int64_t dataloader_shuffle(uint64_t key, int64_t n, int64_t index) {
    uint64_t size = (uint64_t)n, x = (uint64_t)index;
    for (uint64_t round = 0; round < DATALOADER_SHUFFLE_ROUNDS; round++) {
        uint64_t round_key = fox_mix64(key + round);
        uint64_t pivot = round_key % size;
        uint64_t partner = pivot >= x ? pivot - x : pivot + size - x;
        uint64_t pair = x > partner ? x : partner;
        if (fox_random(round_key, pair) >> 63) {
            x = partner;
        }
    }
    return (int64_t)x;
}

/* The window that the global order shows at position g >= 0: its shard and the token it starts at. */
static inline void dataloader_window(const DataLoader *loader, int64_t g, int *shard, int64_t *start) {
    int64_t window = g % loader->windows;
    if (loader->spec.shuffle) {
        uint64_t epoch = (uint64_t)(g / loader->windows);
        window = dataloader_shuffle(fox_random(loader->spec.seed, epoch), loader->windows, window);
    }
    int low = 0, high = loader->shard_count; /* the last shard whose first_window <= window is in [low, high) */
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (loader->shards[middle].first_window <= window) {
            low = middle;
        } else {
            high = middle;
        }
    }
    *shard = low;
    *start = (window - loader->shards[low].first_window) * loader->shards[low].stride;
}

/* Fingerprint of what positions are counted in: the shards' sizes in their order and some of their tokens, T, the vocabulary,
 * shuffled or not. A resumed run compares it; names and folders may change. */
static inline uint64_t dataloader_hash(const DataLoader *loader) {
    int64_t head[4] = {loader->spec.T, loader->vocab_size, loader->shard_count, loader->windows};
    uint64_t hash = fox_hash(0, head, sizeof head);
    for (int i = 0; i < loader->shard_count; i++) {
        hash = fox_hash(hash, &loader->shards[i].tokens, sizeof loader->shards[i].tokens);
        hash = fox_hash(hash, &loader->shards[i].sample, sizeof loader->shards[i].sample);
    }
    return loader->spec.shuffle ? hash : fox_mix64(hash);
}

/* ---------------------------------------------------------------------------------------------------------- shards */

/* What a file's name says last: 't' for "train", 'v' for "val", '\0' for neither. A whole word counts before what is part of one:
 * train_retrieval.bin is for training. */
static inline char dataloader_kind(const char *path) {
    static const char *const words[] = {"train", "training", "val", "valid", "validation"};
    const char *name = strrchr(path, '/');
    char part = '\0', whole = '\0';
    for (name = name != NULL ? name + 1 : path; *name != '\0'; name++) {
        part = strncmp(name, "train", 5) == 0 ? 't' : strncmp(name, "val", 3) == 0 ? 'v' : part;
        size_t length = 0;
        while (isalpha((unsigned char)name[length])) {
            length++;
        }
        bool begins = name == path || !isalpha((unsigned char)name[-1]);
        for (size_t w = 0; begins && w < sizeof words / sizeof words[0]; w++) {
            whole = strlen(words[w]) == length && strncmp(name, words[w], length) == 0 ? words[w][0] : whole;
        }
    }
    return whole != '\0' ? whole : part;
}

/* path_list (train/files.h) for shards; `pattern` is DATALOADER_TRAIN_PATTERN or DATALOADER_VAL_PATTERN. Of a folder, only those
 * of the pattern's own kind: medieval_train_0.bin is not for validation. Fails when none is there. */
static inline bool dataloader_list(const char *where, const char *pattern, PathList *list, FoxError *err) {
    if (!path_list(where, pattern, list, err)) {
        return false;
    }
    int kept = 0;
    bool folder = is_directory(where);
    for (int i = 0; i < list->count; i++) {
        if (folder && dataloader_kind(list->paths[i]) != dataloader_kind(pattern)) {
            free(list->paths[i]);
        } else {
            list->paths[kept++] = list->paths[i];
        }
    }
    list->count = kept;
    if (kept == 0) {
        path_list_free(list);
        return fox_fail(err, "%s: no shard there; expected files like %s", where, pattern);
    }
    return true;
}

/* Opens a shard's file and finds its size; -1 and the error when it is not a file that can be read. */
static inline int dataloader_open_file(const char *path, int64_t *bytes, FoxError *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* non-blocking: opening a pipe must not hang */
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0) {
        fox_fail(err, "%s: cannot read the shard: %s", path, strerror(errno));
    } else if (!S_ISREG(status.st_mode)) {
        fox_fail(err, "%s: a shard must be a regular file, found a %s", path,
                 S_ISDIR(status.st_mode) ? "directory" : "special file");
    } else {
        *bytes = (int64_t)status.st_size;
        return fd;
    }
    if (fd >= 0) {
        close(fd);
    }
    return -1;
}

static inline int32_t dataloader_int32(const uint8_t *header, int index) {
    const uint8_t *p = header + 4 * index;
    return (int32_t)((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
}

/* Checks a shard's header against its size. Fills the number of tokens, the vocabulary size, and the tokens of a window where it
 * is a shard of windows, else 0. */
static inline bool dataloader_check_header(const char *path, const uint8_t *header, int64_t bytes, int64_t *tokens,
                                           int *vocab_size, int *window, FoxError *err) {
    int32_t magic = dataloader_int32(header, 0), version = dataloader_int32(header, 1);
    int32_t count = dataloader_int32(header, 2), vocab = dataloader_int32(header, 3);
    if (magic != DATALOADER_MAGIC) {
        return fox_fail(err, "%s: not a token shard: expected the magic number %d, found %d", path, DATALOADER_MAGIC,
                        magic);
    }
    if (version != DATALOADER_VERSION && version != DATALOADER_VERSION_WINDOWS) {
        return fox_fail(err, "%s: expected shard version %d or %d, found %d", path, DATALOADER_VERSION,
                        DATALOADER_VERSION_WINDOWS, version);
    }
    if (count < 0) {
        return fox_fail(err, "%s: the header's token count is negative: %d", path, count);
    }
    int64_t expected = DATALOADER_HEADER_BYTES + 2 * (int64_t)count;
    if (bytes != expected) {
        return fox_fail(err, "%s: a shard of %d tokens has %lld bytes, found %lld; the file is %s", path, count,
                        (long long)expected, (long long)bytes, bytes < expected ? "truncated" : "too long");
    }
    if (vocab < 0 || vocab > 65536) {
        return fox_fail(err, "%s: the header's vocabulary size must be in 0..65536, found %d", path, vocab);
    }
    *window = version == DATALOADER_VERSION ? 0 : dataloader_int32(header, 4);
    if (version == DATALOADER_VERSION_WINDOWS && (*window < 2 || count % *window != 0)) {
        return fox_fail(err, "%s: version %d is windows of two tokens or more; the header says %d tokens in windows of %d",
                        path, version, count, *window);
    }
    *tokens = count;
    *vocab_size = vocab == 0 ? DATALOADER_DEFAULT_VOCAB : vocab;
    return true;
}

/* Hash of up to 512 tokens each at the beginning, in the middle and at the end: tells whether a shard still holds the same. */
static inline bool dataloader_sample(int fd, const char *path, int64_t tokens, uint64_t *hash, FoxError *err) {
    uint8_t raw[1024];
    int64_t count = tokens < 512 ? tokens : 512;
    *hash = 0;
    for (int i = 0; i < 3; i++) {
        int64_t start = (tokens - count) * i / 2;
        if (!file_read_at(fd, path, DATALOADER_HEADER_BYTES + 2 * start, 2 * count, raw, err)) {
            return false;
        }
        *hash = fox_hash(*hash, raw, (size_t)(2 * count));
    }
    return true;
}

/* Opens and checks one shard; reads its header and a sample. */
static inline bool dataloader_read_header(const char *path, int64_t *tokens, int *vocab_size, int *window, uint64_t *sample,
                                          FoxError *err) {
    int64_t bytes = 0;
    int fd = dataloader_open_file(path, &bytes, err);
    if (fd < 0) {
        return false;
    }
    uint8_t header[DATALOADER_HEADER_BYTES];
    bool ok;
    if (bytes < DATALOADER_HEADER_BYTES) {
        ok = fox_fail(err, "%s: a shard begins with a header of %d bytes, found a file of %lld", path,
                      DATALOADER_HEADER_BYTES, (long long)bytes);
    } else {
        ok = file_read_at(fd, path, 0, DATALOADER_HEADER_BYTES, header, err) &&
             dataloader_check_header(path, header, bytes, tokens, vocab_size, window, err) &&
             dataloader_sample(fd, path, *tokens, sample, err);
    }
    close(fd);
    return ok;
}

/* Fills loader->shards and the sums over them from loader->paths. */
static inline bool dataloader_read_headers(DataLoader *loader, FoxError *err) {
    loader->shard_count = loader->paths.count;
    if (loader->shard_count == 0) {
        return fox_fail(err, "no token shards found");
    }
    loader->shards = FOX_NEW(DataShard, loader->shard_count);
    int T = loader->spec.T;
    for (int i = 0; i < loader->shard_count; i++) {
        DataShard *shard = &loader->shards[i];
        int vocab_size = 0, window = 0;
        shard->path = loader->paths.paths[i];
        if (!dataloader_read_header(shard->path, &shard->tokens, &vocab_size, &window, &shard->sample, err)) {
            return false;
        }
        if (window > 0 && window != (int64_t)T + 1) {
            return fox_fail(err, "%s: made for -T %d (windows of %d tokens, each by itself), found -T %d; make the shard "
                            "again for this -T", shard->path, window - 1, window, T);
        }
        if (shard->tokens < (int64_t)T + 1) {
            return fox_fail(err, "%s: a window of T = %d needs %lld tokens, found %lld; lower -T or leave the file out",
                            shard->path, T, (long long)T + 1, (long long)shard->tokens);
        }
        if (i > 0 && vocab_size != loader->vocab_size) {
            return fox_fail(err, "%s: expected a vocabulary of %d as in %s, found %d; shards of one run must agree",
                            shard->path, loader->vocab_size, loader->shards[0].path, vocab_size);
        }
        loader->vocab_size = vocab_size;
        shard->first_window = loader->windows;
        loader->tokens += shard->tokens;
        shard->stride = window > 0 ? window : T;
        loader->windows += window > 0 ? shard->tokens / window : (shard->tokens - 1) / T;
    }
    return true;
}

/* ----------------------------------------------------------------------------------------- batches, in the thread */

/* Reads window g of the global order into one row of tokens and targets, [T] each. */
static inline bool dataloader_read_window(const DataLoader *loader, int64_t g, int32_t *tokens, int32_t *targets,
                                          FoxError *err) {
    int index, T = loader->spec.T;
    int64_t start, bytes = 0;
    dataloader_window(loader, g, &index, &start);
    const DataShard *shard = &loader->shards[index];
    int64_t expected = DATALOADER_HEADER_BYTES + 2 * shard->tokens;
    int fd = dataloader_open_file(shard->path, &bytes, err);
    if (fd < 0) {
        return false;
    }
    bool ok = true;
    if (bytes != expected) {
        ok = fox_fail(err, "%s: the file changed while we run: expected %lld bytes, found %lld", shard->path,
                      (long long)expected, (long long)bytes);
    }
    ok = ok &&
         file_read_at(fd, shard->path, DATALOADER_HEADER_BYTES + 2 * start, 2 * ((int64_t)T + 1), loader->raw, err);
    close(fd);
    for (int t = 0; ok && t <= T; t++) {
        int32_t token = loader->raw[2 * (int64_t)t] | loader->raw[2 * (int64_t)t + 1] << 8;
        if (token >= loader->vocab_size) {
            ok = fox_fail(err, "%s: token %d at position %lld, expected tokens below the vocabulary size %d",
                          shard->path, token, (long long)(start + t), loader->vocab_size);
            break;
        }
        if (t < T) {
            tokens[t] = token;
        }
        if (t > 0) {
            targets[t - 1] = token;
        }
    }
    return ok;
}

/* Reads the micro-batch at `at`: this rank's windows there, zeros in the rows past its share of the step. */
static inline bool dataloader_read_batch(const DataLoader *loader, DataCursor at, DataBatch *batch, FoxError *err) {
    const DataSpec *spec = &loader->spec;
    int64_t begin = spec->rank * loader->windows_per_step / spec->size + at.batch * spec->B;
    int64_t end = (spec->rank + 1) * loader->windows_per_step / spec->size;
    batch->windows = 0;
    for (int row = 0; row < spec->B; row++) {
        int32_t *tokens = batch->tokens + (int64_t)row * spec->T, *targets = batch->targets + (int64_t)row * spec->T;
        if (begin + row >= end) {
            memset(tokens, 0, sizeof *tokens * (size_t)spec->T);
            memset(targets, 0, sizeof *targets * (size_t)spec->T);
            continue;
        }
        if (!dataloader_read_window(loader, at.step_start + begin + row, tokens, targets, err)) {
            return false;
        }
        batch->windows++;
    }
    return true;
}

static inline DataCursor dataloader_advance(const DataLoader *loader, DataCursor at) {
    at.batch++;
    if (at.batch == loader->batches_per_step) {
        at.batch = 0;
        at.step_start += loader->windows_per_step;
    }
    return at;
}

/* The thread: keeps the slots full until it fails or is asked to end. After a failure it waits for a seek. */
static inline void *dataloader_thread(void *argument) {
    DataLoader *loader = (DataLoader *)argument;
    pthread_mutex_lock(&loader->mutex);
    while (!loader->closing) {
        if (loader->failed || loader->ready == DATALOADER_SLOTS) {
            pthread_cond_wait(&loader->room, &loader->mutex);
            continue;
        }
        DataCursor at = loader->reading;
        uint64_t generation = loader->generation;
        DataBatch *slot = &loader->slots[(loader->head + loader->ready) % DATALOADER_SLOTS];
        FoxError error;
        error.text[0] = '\0';
        pthread_mutex_unlock(&loader->mutex); /* the slot is ours: the caller looks at full ones only */
        bool ok = dataloader_read_batch(loader, at, slot, &error);
        pthread_mutex_lock(&loader->mutex);
        if (generation != loader->generation) {
            continue;
        }
        if (ok) {
            loader->ready++;
            loader->reading = dataloader_advance(loader, at);
        } else {
            loader->failed = true;
            loader->error = error;
        }
        pthread_cond_signal(&loader->arrived);
    }
    pthread_mutex_unlock(&loader->mutex);
    return NULL;
}

/* Starts the thread with every signal blocked: signals are the main thread's. */
static inline bool dataloader_start(DataLoader *loader, FoxError *err) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_mutex_init(&loader->mutex, NULL);
    pthread_cond_init(&loader->room, NULL);
    pthread_cond_init(&loader->arrived, NULL);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int code = pthread_create(&loader->thread, NULL, dataloader_thread, loader);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (code != 0) {
        pthread_mutex_destroy(&loader->mutex);
        pthread_cond_destroy(&loader->room);
        pthread_cond_destroy(&loader->arrived);
        return fox_fail(err, "cannot start the data thread: %s", strerror(code));
    }
    loader->running = true;
    return true;
}

/* ------------------------------------------------------------------------------------------------- for the caller */

/* Stops the thread and frees everything. Safe at any moment, on a loader whose open failed, and twice. */
static inline void dataloader_close(DataLoader *loader) {
    if (loader->running) {
        pthread_mutex_lock(&loader->mutex);
        loader->closing = true;
        pthread_cond_signal(&loader->room);
        pthread_mutex_unlock(&loader->mutex);
        pthread_join(loader->thread, NULL);
        pthread_mutex_destroy(&loader->mutex);
        pthread_cond_destroy(&loader->room);
        pthread_cond_destroy(&loader->arrived);
    }
    for (int i = 0; i < DATALOADER_SLOTS; i++) {
        free(loader->slots[i].tokens);
        free(loader->slots[i].targets);
    }
    free(loader->raw);
    free(loader->shards);
    path_list_free(&loader->paths);
    memset(loader, 0, sizeof *loader);
}

static inline bool dataloader_check_spec(const DataSpec *spec, FoxError *err) {
    if (spec->T < 1 || spec->B < 1 || spec->size < 1 || spec->rank < 0 || spec->rank >= spec->size ||
        spec->max_windows < 0 || spec->windows_per_step < 0 || spec->windows_per_step > INT32_MAX) {
        return fox_fail(err, "data loader: T = %d, B = %d, rank %d of %d, %lld windows a step, at most %lld windows: "
                        "expected sizes of at least 1, and at most 2^31 windows a step", spec->T, spec->B, spec->rank,
                        spec->size, (long long)spec->windows_per_step, (long long)spec->max_windows);
    }
    return true;
}

/* Opens the shards of `where` (a folder, in which `pattern` selects; a glob; or one file), checks every header against the
 * file's size, hashes a few tokens of each shard (for dataloader_hash), and starts to read ahead from position 0. On failure
 * the loader is closed. */
static inline bool dataloader_open(DataLoader *loader, const char *where, const char *pattern, const DataSpec *spec,
                                   FoxError *err) {
    memset(loader, 0, sizeof *loader);
    loader->spec = *spec;
    bool ok = dataloader_check_spec(spec, err) && dataloader_list(where, pattern, &loader->paths, err) &&
              dataloader_read_headers(loader, err);
    if (ok) {
        if (spec->max_windows > 0 && spec->max_windows < loader->windows) {
            loader->windows = spec->max_windows;
        }
        int64_t W = spec->windows_per_step > 0 ? spec->windows_per_step : loader->windows;
        int64_t largest_share = (W + spec->size - 1) / spec->size;
        loader->windows_per_step = W;
        loader->batches_per_step = (largest_share + spec->B - 1) / spec->B;
        loader->raw = FOX_NEW(uint8_t, 2 * ((int64_t)spec->T + 1));
        for (int i = 0; i < DATALOADER_SLOTS; i++) {
            loader->slots[i].tokens = FOX_NEW(int32_t, (int64_t)spec->B * spec->T);
            loader->slots[i].targets = FOX_NEW(int32_t, (int64_t)spec->B * spec->T);
        }
        ok = dataloader_start(loader, err);
    }
    if (!ok) {
        dataloader_close(loader);
    }
    return ok;
}

/* Goes to a position of the global order (dataloader_position of an earlier run, or 0): the next micro-batch is the
 * first of a step that begins there. Clears an earlier error of the loader. */
static inline bool dataloader_seek(DataLoader *loader, int64_t next_window, FoxError *err) {
    if (next_window < 0 || next_window >= DATALOADER_END) {
        return fox_fail(err, "data loader: position %lld in the data is not in 0..2^62", (long long)next_window);
    }
    if (!loader->running) {
        return fox_fail(err, "data loader: seek before open");
    }
    loader->taking.step_start = next_window;
    loader->taking.batch = 0;
    pthread_mutex_lock(&loader->mutex);
    loader->generation++;
    loader->reading = loader->taking;
    loader->ready = 0;
    loader->failed = false;
    loader->error.text[0] = '\0';
    pthread_cond_signal(&loader->room);
    pthread_mutex_unlock(&loader->mutex);
    return true;
}

/* Gives this rank's next micro-batch: tokens and targets, [B, T] each. Every rank has batches_per_step of them in a
 * step; where W is not a multiple of B * ranks, some hold fewer than B windows: loader->batch_windows counts the real
 * rows, and the rows after them are zero. An error of the thread is reported here, after the batches that came before
 * it, and again at every further call until a seek. */
static inline bool dataloader_next(DataLoader *loader, int32_t *tokens, int32_t *targets, FoxError *err) {
    if (!loader->running) {
        return fox_fail(err, "data loader: next before open");
    }
    pthread_mutex_lock(&loader->mutex);
    while (loader->ready == 0 && !loader->failed) {
        pthread_cond_wait(&loader->arrived, &loader->mutex);
    }
    if (loader->ready == 0) {
        fox_fail(err, "%s", loader->error.text);
        pthread_mutex_unlock(&loader->mutex);
        return false;
    }
    const DataBatch *slot = &loader->slots[loader->head];
    pthread_mutex_unlock(&loader->mutex); /* a full slot is ours until we give it back */
    size_t bytes = sizeof *tokens * (size_t)loader->spec.B * (size_t)loader->spec.T;
    memcpy(tokens, slot->tokens, bytes);
    memcpy(targets, slot->targets, bytes);
    loader->batch_windows = slot->windows;
    loader->taking = dataloader_advance(loader, loader->taking);
    pthread_mutex_lock(&loader->mutex);
    loader->head = (loader->head + 1) % DATALOADER_SLOTS;
    loader->ready--;
    pthread_cond_signal(&loader->room);
    pthread_mutex_unlock(&loader->mutex);
    return true;
}

/* Position in the global order at which the next step begins, the same on every rank: what a checkpoint keeps. Inside a
 * step it is that step's beginning. */
static inline int64_t dataloader_position(const DataLoader *loader) {
    return loader->taking.step_start;
}

#endif

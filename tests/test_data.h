/* Tests of dataloader.h: the global order, batches against the shards in memory, resume, ranks, bad files. */
#ifndef FOX_TEST_DATA_H
#define FOX_TEST_DATA_H

#include "../dataloader.h"
#include "check.h"

#define DATA_MAX_SHARDS 8

/* Shards written to a folder, and their tokens in memory: the oracle for what a loader must give. */
typedef struct DataFixture {
    char dir[512];
    int count;
    int vocab;
    int64_t sizes[DATA_MAX_SHARDS];
    uint16_t *tokens[DATA_MAX_SHARDS];
} DataFixture;

/* Writes a shard with any header; tokens may be NULL for count 0. Returns false when the file cannot be written. */
static bool data_write_shard(const char *path, int32_t magic, int32_t version, int32_t count, int32_t vocab,
                             const uint16_t *tokens, int64_t real_count, int extra_bytes) {
    int32_t header[256] = {magic, version, count, vocab};
    for (int i = 4; i < 256; i++) {
        header[i] = -1 - i; /* a reader must not care */
    }
    FILE *file = fopen(path, "wb");
    if (file == NULL) {
        return false;
    }
    bool ok = fwrite(header, sizeof header, 1, file) == 1;
    ok = ok && (real_count == 0 || fwrite(tokens, 2, (size_t)real_count, file) == (size_t)real_count);
    for (int i = 0; i < extra_bytes; i++) {
        ok = ok && fputc(7, file) != EOF;
    }
    return fclose(file) == 0 && ok;
}

/* A fresh number at every call and every run. */
static uint64_t data_fresh(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return fox_mix64((uint64_t)now.tv_sec * 1000000007u + (uint64_t)now.tv_nsec);
}

static void data_fixture_path(const DataFixture *fixture, int shard, char path[600]) {
    snprintf(path, 600, "%s/text_train_%02d.bin", fixture->dir, shard);
}

/* Writes `count` shards of those sizes, of random tokens below vocab, to t->scratch/name. */
static bool data_fixture_create(Tests *t, DataFixture *fixture, const char *name, int vocab, int count,
                                const int64_t *sizes) {
    FoxError err = {{0}};
    uint64_t key = data_fresh();
    memset(fixture, 0, sizeof *fixture);
    snprintf(fixture->dir, sizeof fixture->dir, "%s/%s", t->scratch, name);
    bool ok = make_directories(fixture->dir, &err);
    fixture->count = count;
    fixture->vocab = vocab;
    for (int i = 0; i < count; i++) {
        char path[600];
        fixture->sizes[i] = sizes[i];
        fixture->tokens[i] = FOX_NEW(uint16_t, sizes[i]);
        for (int64_t k = 0; k < sizes[i]; k++) {
            fixture->tokens[i][k] = (uint16_t)(fox_random(key, (uint64_t)(k * DATA_MAX_SHARDS + i)) % (uint64_t)vocab);
        }
        data_fixture_path(fixture, i, path);
        ok = ok && data_write_shard(path, 20240520, 1, (int32_t)sizes[i], vocab, fixture->tokens[i], sizes[i], 0);
    }
    return check(t, ok, "data: cannot write shards to %s", fixture->dir);
}

static void data_fixture_free(DataFixture *fixture) {
    for (int i = 0; i < fixture->count; i++) {
        char path[600];
        data_fixture_path(fixture, i, path);
        remove(path);
        free(fixture->tokens[i]);
    }
    rmdir(fixture->dir);
}

static DataSpec data_spec(int T, int B, uint64_t seed, bool shuffle, int64_t windows_per_step, int rank, int size) {
    DataSpec spec = {T, B, seed, shuffle, windows_per_step, 0, rank, size};
    return spec;
}

/* True when the rows are the T tokens at `start` of the shard and those one later. */
static bool data_row_equals(const DataFixture *fixture, int shard, int64_t start, int T, const int32_t *tokens,
                            const int32_t *targets) {
    if (shard < 0 || shard >= fixture->count || start < 0 || start + T + 1 > fixture->sizes[shard]) {
        return false;
    }
    for (int k = 0; k < T; k++) {
        if (tokens[k] != fixture->tokens[shard][start + k] || targets[k] != fixture->tokens[shard][start + k + 1]) {
            return false;
        }
    }
    return true;
}

/* ------------------------------------------------------------------------------------------------ the permutation */

/* The permutation of [0, n) as a table; NULL when it is none. */
static int32_t *data_permutation(uint64_t key, int32_t n) {
    int32_t *image = FOX_NEW(int32_t, n);
    uint8_t *seen = FOX_NEW(uint8_t, n);
    bool ok = true;
    for (int32_t i = 0; i < n && ok; i++) {
        int64_t x = dataloader_shuffle(key, n, i);
        ok = x >= 0 && x < n && !seen[x];
        if (ok) {
            seen[x] = 1;
            image[i] = (int32_t)x;
        }
    }
    free(seen);
    if (!ok) {
        free(image);
        return NULL;
    }
    return image;
}

static void data_test_bijection(Tests *t) {
    int32_t large = t->quick ? (1 << 15) + 7 : (1 << 20) + 7;
    int32_t sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000, 1024, 4097, large};
    uint64_t key = data_fresh();
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        int32_t n = sizes[i];
        int32_t *a = data_permutation(key, n), *b = data_permutation(fox_mix64(key), n);
        check(t, a != NULL && b != NULL, "shuffle: n = %d, key %llu: not a permutation", n, (unsigned long long)key);
        if (a != NULL && b != NULL && n >= 63) { /* 1/63! is as good as never */
            check(t, memcmp(a, b, sizeof *a * (size_t)n) != 0, "shuffle: n = %d: two keys give the same order", n);
        }
        free(a);
        free(b);
    }
}

/* The order of one key, written down: it may never change, or old runs would resume in another order. */
static void data_test_known_order(Tests *t) {
    static const int expected[10] = {7, 6, 8, 5, 9, 3, 0, 1, 2, 4};
    for (int i = 0; i < 10; i++) {
        int64_t x = dataloader_shuffle(2024, 10, i);
        check(t, x == expected[i], "shuffle: key 2024, n = 10: %d goes to %lld, expected %d", i, (long long)x,
              expected[i]);
    }
}

/* Chi-square of counts against a uniform distribution must stay below mean + 8 standard deviations. */
static void data_check_uniform(Tests *t, const char *what, const int *counts, int bins, int total) {
    double expected = (double)total / bins, chi = 0;
    for (int i = 0; i < bins; i++) {
        chi += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    double limit = (bins - 1) + 8 * sqrt(2.0 * (bins - 1));
    check(t, chi <= limit, "shuffle: %s: chi-square %.1f of %d bins, allowed %.1f", what, chi, bins, limit);
}

static void data_test_shuffle_small(Tests *t) {
    int trials = t->quick ? 4000 : 40000;
    int orders[256] = {0}, compact[24], used = 0, place[20] = {0};
    uint64_t seed = data_fresh();
    for (int i = 0; i < trials; i++) {
        uint64_t key = fox_random(seed, (uint64_t)i);
        int code = 0;
        for (int k = 0; k < 4; k++) {
            code = code * 4 + (int)dataloader_shuffle(key, 4, k);
        }
        orders[code]++;
        place[dataloader_shuffle(key, 1000, 123) / 50]++;
    }
    for (int i = 0; i < 256; i++) {
        if (orders[i] > 0 && used < 24) {
            compact[used++] = orders[i];
        }
    }
    if (check(t, used == 24, "shuffle: n = 4 over %d keys shows %d of the 24 orders", trials, used)) {
        data_check_uniform(t, "the 24 orders of 4", compact, 24, trials);
    }
    data_check_uniform(t, "place of one window of 1000", place, 20, trials);
}

/* A large permutation has no memory of the order it came from: bounds are 6 standard deviations. */
static void data_test_shuffle_large(Tests *t) {
    int32_t n = t->quick ? (1 << 15) + 7 : (1 << 20) + 7;
    int32_t *image = data_permutation(data_fresh(), n);
    if (!check(t, image != NULL, "shuffle: n = %d: not a permutation", n)) {
        return;
    }
    double middle = (n - 1) / 2.0, correlation = 0, distance = 0;
    int ascents = 0, fixed = 0;
    for (int32_t i = 0; i < n; i++) {
        correlation += (i - middle) * (image[i] - middle);
        fixed += image[i] == i;
        if (i > 0) {
            ascents += image[i] > image[i - 1];
            distance += fabs((double)image[i] - image[i - 1]);
        }
    }
    correlation /= (double)n * ((double)n * n - 1) / 12;
    check_error(t, "shuffle: correlation of index and image", fabs(correlation), 6 / sqrt(n));
    check_error(t, "shuffle: ascents", fabs(ascents - n / 2.0), 6 * sqrt(n / 12.0));
    check_error(t, "shuffle: mean step, against n/3", fabs(distance / n / n - 1.0 / 3), 6 / sqrt(n));
    check(t, fixed <= 20, "shuffle: %d of %d stay where they are, expected about 1", fixed, n);
    free(image);
}

/* ------------------------------------------------------------------------------------------------- order, batches */

/* Every window exactly once an epoch, at the start of a window of its shard; epochs and seeds differ. */
static void data_test_epochs(Tests *t, const DataFixture *fixture, int T) {
    DataLoader loader, other;
    FoxError err = {{0}};
    uint64_t seed = data_fresh();
    DataSpec spec = data_spec(T, 1, seed, true, 1, 0, 1), spec2 = data_spec(T, 1, seed + 1, true, 1, 0, 1);
    bool ok = dataloader_open(&loader, fixture->dir, DATALOADER_TRAIN_PATTERN, &spec, &err) &&
              dataloader_open(&other, fixture->dir, DATALOADER_TRAIN_PATTERN, &spec2, &err);
    if (!check(t, ok, "data: open: %s", err.text)) {
        return;
    }
    int64_t N = 0, tokens = 0;
    int64_t first[DATA_MAX_SHARDS];
    for (int i = 0; i < fixture->count; i++) {
        first[i] = N;
        N += (fixture->sizes[i] - 1) / T;
        tokens += fixture->sizes[i];
    }
    check(t,
          loader.windows == N && loader.tokens == tokens && loader.vocab_size == fixture->vocab &&
              loader.shard_count == fixture->count,
          "data: T = %d: %lld windows of %lld tokens in %d shards, expected %lld", T, (long long)loader.windows,
          (long long)loader.tokens, loader.shard_count, (long long)N);
    uint8_t *seen = FOX_NEW(uint8_t, N);
    int64_t same_epoch = 0, same_seed = 0;
    for (int epoch = 0; epoch < 3; epoch++) {
        int64_t wrong = 0;
        for (int64_t k = 0; k < N; k++) {
            int shard, shard2;
            int64_t start, start2, g = epoch * N + k;
            dataloader_window(&loader, g, &shard, &start);
            bool valid = shard >= 0 && shard < fixture->count && start >= 0 && start % T == 0 &&
                         start + T + 1 <= fixture->sizes[shard];
            int64_t window = valid ? first[shard] + start / T : 0;
            wrong += !valid || seen[window] != epoch;
            seen[window] = (uint8_t)(epoch + 1);
            dataloader_window(&loader, g + N, &shard2, &start2);
            same_epoch += shard == shard2 && start == start2;
            dataloader_window(&other, g, &shard2, &start2);
            same_seed += shard == shard2 && start == start2;
        }
        check(t, wrong == 0, "data: T = %d, epoch %d: %lld of %lld windows missing, twice or misplaced", T, epoch,
              (long long)wrong, (long long)N);
    }
    if (N >= 100) {
        check(t, same_epoch < 3 * N / 2 && same_seed < 3 * N / 2, "data: T = %d: epochs or seeds show the same order",
              T);
    }
    free(seen);
    dataloader_close(&loader);
    dataloader_close(&other);
}

/* A loader without shuffling against a naive reader that walks the shards, over more than one epoch. */
static void data_test_file_order(Tests *t, const DataFixture *fixture, int T, int B) {
    DataLoader loader;
    FoxError err = {{0}};
    DataSpec spec = data_spec(T, B, 0, false, B, 0, 1);
    if (!check(t, dataloader_open(&loader, fixture->dir, DATALOADER_TRAIN_PATTERN, &spec, &err), "data: %s",
               err.text)) {
        return;
    }
    int32_t *tokens = FOX_NEW(int32_t, B * T), *targets = FOX_NEW(int32_t, B * T);
    int shard = 0, wrong = 0, row = B;
    int64_t start = 0, total = loader.windows + loader.windows / 2 + 1;
    for (int64_t g = 0; g < total; g++) {
        if (row == B) {
            row = 0;
            if (!check(t, dataloader_next(&loader, tokens, targets, &err), "data: next: %s", err.text)) {
                break;
            }
        }
        wrong += !data_row_equals(fixture, shard, start, T, tokens + row * T, targets + row * T);
        row++;
        start += T;
        while (start + T + 1 > fixture->sizes[shard]) {
            start = 0;
            shard = (shard + 1) % fixture->count;
        }
    }
    check(t, wrong == 0, "data: T = %d, B = %d: %d of %lld windows in file order are wrong", T, B, wrong,
          (long long)total);
    free(tokens);
    free(targets);
    dataloader_close(&loader);
}

/* Shares of n ranks, one after the other, are the global order of the step; rows beyond a share are zero. */
static void data_test_ranks(Tests *t, const DataFixture *fixture, int T, int B, int W, int size, uint64_t seed) {
    DataLoader *loaders = FOX_NEW(DataLoader, size);
    FoxError err = {{0}};
    int32_t *tokens = FOX_NEW(int32_t, B * T), *targets = FOX_NEW(int32_t, B * T);
    bool ok = true;
    for (int r = 0; r < size; r++) {
        DataSpec spec = data_spec(T, B, seed, true, W, r, size);
        ok = ok && dataloader_open(&loaders[r], fixture->dir, DATALOADER_TRAIN_PATTERN, &spec, &err);
    }
    check(t, ok, "data: rank open: %s", err.text);
    int steps = (int)(2 * loaders[0].windows / W) + 2, wrong = 0;
    int64_t g = 0;
    for (int step = 0; step < steps && ok; step++) {
        for (int r = 0; r < size; r++) {
            wrong += dataloader_position(&loaders[r]) != (int64_t)step * W;
            for (int64_t batch = 0; batch < loaders[r].batches_per_step && ok; batch++) {
                ok = dataloader_next(&loaders[r], tokens, targets, &err);
                for (int row = 0; row < B && ok; row++) {
                    int shard;
                    int64_t start;
                    if (row < loaders[r].batch_windows) {
                        dataloader_window(&loaders[0], g++, &shard, &start);
                        wrong += !data_row_equals(fixture, shard, start, T, tokens + row * T, targets + row * T);
                    } else {
                        for (int k = 0; k < T; k++) {
                            wrong += tokens[row * T + k] != 0 || targets[row * T + k] != 0;
                        }
                    }
                }
            }
        }
        wrong += g != (int64_t)(step + 1) * W;
    }
    check(t, ok && wrong == 0, "data: W = %d, B = %d, %d ranks: %d differences from the global order %s", W, B, size,
          wrong, err.text);
    for (int r = 0; r < size; r++) {
        dataloader_close(&loaders[r]);
    }
    free(loaders);
    free(tokens);
    free(targets);
}

/* A run that stops after any step and goes on in a new loader, with another step size too, sees what one run sees. */
static void data_test_resume(Tests *t, const DataFixture *fixture, int T) {
    enum { B = 2, W = 6 };
    DataLoader loader, again;
    memset(&again, 0, sizeof again);
    FoxError err = {{0}};
    uint64_t seed = data_fresh();
    DataSpec spec = data_spec(T, B, seed, true, W, 0, 1), spec2 = data_spec(T, 1, seed, true, 5, 0, 1);
    int32_t *tokens = FOX_NEW(int32_t, B * T), *targets = FOX_NEW(int32_t, B * T);
    int32_t *tokens2 = FOX_NEW(int32_t, B * T), *targets2 = FOX_NEW(int32_t, B * T);
    size_t bytes = sizeof *tokens * (size_t)(B * T);
    bool ok = dataloader_open(&loader, fixture->dir, DATALOADER_TRAIN_PATTERN, &spec, &err);
    int64_t steps = ok ? 2 * loader.windows / W + 2 : 0, wrong = 0;
    for (int64_t step = 0; step < steps && ok; step++) {
        int64_t position = dataloader_position(&loader);
        ok = dataloader_open(&again, fixture->dir, DATALOADER_TRAIN_PATTERN, &spec, &err) &&
             dataloader_seek(&again, position, &err);
        for (int batch = 0; batch < W / B && ok; batch++) {
            ok = dataloader_next(&loader, tokens, targets, &err) && dataloader_next(&again, tokens2, targets2, &err);
            wrong += memcmp(tokens, tokens2, bytes) != 0 || memcmp(targets, targets2, bytes) != 0;
        }
        wrong += dataloader_position(&again) != dataloader_position(&loader) ||
                 dataloader_position(&loader) != position + W || dataloader_hash(&again) != dataloader_hash(&loader);
        dataloader_close(&again);
    }
    int shard;
    int64_t start, position = 3 * W;
    ok = ok && dataloader_open(&again, fixture->dir, DATALOADER_TRAIN_PATTERN, &spec2, &err) &&
         dataloader_seek(&again, position, &err);
    for (int64_t g = position; g < position + 12 && ok; g++) {
        ok = dataloader_next(&again, tokens, targets, &err);
        dataloader_window(&loader, g, &shard, &start);
        wrong += !data_row_equals(fixture, shard, start, T, tokens, targets);
    }
    wrong += ok && dataloader_position(&again) != position + 10; /* two steps of 5; the third has begun */
    check(t, ok && steps > 4 && wrong == 0, "data: resume, T = %d: %lld differences %s", T, (long long)wrong, err.text);
    dataloader_close(&again);
    dataloader_close(&loader);
    free(tokens);
    free(targets);
    free(tokens2);
    free(targets2);
}

/* Seeks at random moments, forwards and back, in one loader: what is read ahead never leaks through. */
static void data_test_seeks(Tests *t, const DataFixture *fixture, int T) {
    DataLoader loader;
    FoxError err = {{0}};
    uint64_t seed = data_fresh();
    DataSpec spec = data_spec(T, 1, seed, true, 4, 0, 1);
    int32_t *tokens = FOX_NEW(int32_t, T), *targets = FOX_NEW(int32_t, T);
    bool ok = dataloader_open(&loader, fixture->dir, DATALOADER_TRAIN_PATTERN, &spec, &err);
    int wrong = 0, rounds = t->quick ? 200 : 2000;
    for (int i = 0; i < rounds && ok; i++) {
        int64_t g = (int64_t)(fox_random(seed, (uint64_t)i) % (uint64_t)(3 * loader.windows));
        ok = dataloader_seek(&loader, g, &err);
        for (int k = (int)(fox_random(~seed, (uint64_t)i) % 7); k > 0 && ok; k--, g++) {
            int shard;
            int64_t start;
            ok = dataloader_next(&loader, tokens, targets, &err);
            dataloader_window(&loader, g, &shard, &start);
            wrong += !data_row_equals(fixture, shard, start, T, tokens, targets);
        }
    }
    check(t, ok && wrong == 0, "data: %d of the windows after %d seeks are wrong %s", wrong, rounds, err.text);
    check(t, !dataloader_seek(&loader, -1, NULL) && !dataloader_seek(&loader, INT64_MAX, NULL),
          "data: seek takes a position outside of the data's order");
    if (check(t, dataloader_seek(&loader, DATALOADER_END - 1, &err), "data: seek to the far end: %s", err.text)) {
        check(t, dataloader_next(&loader, tokens, targets, &err), "data: next at the far end: %s", err.text);
    }
    dataloader_close(&loader);
    free(tokens);
    free(targets);
}

/* Validation: a limited number of windows in file order, all of them one step, split over ranks. */
static void data_test_validation(Tests *t, const DataFixture *fixture, int T, int64_t limit, int size) {
    FoxError err = {{0}};
    enum { B = 3 };
    int32_t *tokens = FOX_NEW(int32_t, B * T), *targets = FOX_NEW(int32_t, B * T);
    int64_t g = 0, wrong = 0, expected = 0;
    for (int i = 0; i < fixture->count; i++) {
        expected += (fixture->sizes[i] - 1) / T;
    }
    expected = limit > 0 && limit < expected ? limit : expected;
    bool ok = true;
    for (int r = 0; r < size && ok; r++) {
        DataLoader loader;
        DataSpec spec = data_spec(T, B, 0, false, 0, r, size);
        spec.max_windows = limit;
        ok = dataloader_open(&loader, fixture->dir, DATALOADER_TRAIN_PATTERN, &spec, &err);
        for (int pass = 0; pass < 2 && ok; pass++) { /* a second validation sees the same again */
            int64_t from = g;
            ok = dataloader_seek(&loader, 0, &err);
            for (int64_t batch = 0; batch < loader.batches_per_step && ok; batch++) {
                ok = dataloader_next(&loader, tokens, targets, &err);
                for (int row = 0; row < loader.batch_windows && ok; row++, g++) {
                    int64_t window = g;
                    int shard = 0;
                    while (window >= (fixture->sizes[shard] - 1) / T) {
                        window -= (fixture->sizes[shard++] - 1) / T;
                    }
                    wrong += !data_row_equals(fixture, shard, window * T, T, tokens + row * T, targets + row * T);
                }
            }
            if (pass == 0) {
                g = from;
            }
        }
        dataloader_close(&loader);
    }
    check(t, ok && wrong == 0 && g == expected,
          "data: validation of %lld windows on %d ranks: %lld wrong, %lld seen %s", (long long)expected, size,
          (long long)wrong, (long long)g, err.text);
    free(tokens);
    free(targets);
}

static void data_test_good(Tests *t) {
    static const int64_t sizes[] = {1000, 17, 333, 34, 2048};
    DataFixture fixture;
    uint64_t seed = data_fresh();
    if (!data_fixture_create(t, &fixture, "data_good", 50257, 5, sizes)) {
        return;
    }
    static const int contexts[] = {1, 2, 7, 16};
    for (int i = 0; i < 4; i++) {
        data_test_epochs(t, &fixture, contexts[i]);
        data_test_file_order(t, &fixture, contexts[i], 1 + 2 * i);
    }
    static const int cases[][3] = {{8, 1, 1}, {8, 1, 2}, {8, 2, 4},   {8, 1, 8}, {24, 3, 4},
                                   {7, 2, 4}, {3, 1, 4}, {300, 5, 2}, {10, 2, 2}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        data_test_ranks(t, &fixture, 16, cases[i][1], cases[i][0], cases[i][2], seed);
    }
    data_test_resume(t, &fixture, 16);
    data_test_resume(t, &fixture, 5);
    data_test_seeks(t, &fixture, 9);
    static const int64_t limits[] = {0, 1, 5, 64, 211, 212, 213, 1000000}; /* there are 212 windows of 16 */
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        for (int size = 1; size <= 4; size *= 2) {
            data_test_validation(t, &fixture, 16, limits[i], size);
        }
    }
    data_fixture_free(&fixture);
}

/* Where -i may point, and the fingerprint. */
static void data_test_places(Tests *t) {
    static const int64_t sizes[] = {100, 200, 300};
    static const uint16_t val[95] = {1, 2, 3}; /* as many windows of 10 as the shard of 100 */
    DataFixture fixture;
    char path[600], glob[600], first[600];
    if (!data_fixture_create(t, &fixture, "data_places", 300, 3, sizes)) {
        return;
    }
    snprintf(path, sizeof path, "%s/text_val_00.bin", fixture.dir);
    snprintf(glob, sizeof glob, "%s/*_0[12].bin", fixture.dir);
    data_fixture_path(&fixture, 0, first);
    data_write_shard(path, 20240520, 1, 95, 300, val, 95, 0);
    struct { const char *where, *pattern; int shards; int64_t tokens; } cases[] = {
        {fixture.dir, DATALOADER_TRAIN_PATTERN, 3, 600}, {fixture.dir, DATALOADER_VAL_PATTERN, 1, 95},
        {glob, DATALOADER_TRAIN_PATTERN, 2, 500},        {path, DATALOADER_TRAIN_PATTERN, 1, 95},
        {first, DATALOADER_VAL_PATTERN, 1, 100},
    };
    uint64_t hashes[8];
    int count = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        DataLoader loader;
        FoxError err = {{0}};
        DataSpec spec = data_spec(10, 2, 1, true, 4, 0, 1);
        bool ok = dataloader_open(&loader, cases[i].where, cases[i].pattern, &spec, &err);
        check(t, ok && loader.shard_count == cases[i].shards && loader.tokens == cases[i].tokens,
              "data: %s: %d shards of %lld tokens %s", cases[i].where, loader.shard_count, (long long)loader.tokens,
              err.text);
        if (ok && i != 3) { /* [1] and [3] are the same shard */
            hashes[count++] = dataloader_hash(&loader);
        }
        dataloader_close(&loader);
    }
    for (int T = 9; T <= 11; T += 2) {
        DataLoader loader;
        DataSpec spec = data_spec(T, 2, 1, true, 4, 0, 1);
        if (check(t, dataloader_open(&loader, fixture.dir, DATALOADER_TRAIN_PATTERN, &spec, NULL), "data: T = %d", T)) {
            hashes[count++] = dataloader_hash(&loader);
            dataloader_close(&loader);
        }
    }
    for (int i = 0; i < count; i++) {
        for (int k = 0; k < i; k++) {
            check(t, hashes[i] != hashes[k], "data: different data or T with the same fingerprint (%d, %d)", i, k);
        }
    }
    DataLoader a, b;
    DataSpec one = data_spec(10, 2, 1, true, 4, 0, 1), two = data_spec(10, 1, 99, true, 8, 1, 2);
    if (check(t, dataloader_open(&a, fixture.dir, DATALOADER_TRAIN_PATTERN, &one, NULL) &&
              dataloader_open(&b, fixture.dir, DATALOADER_TRAIN_PATTERN, &two, NULL), "data: open twice")) {
        check(t, dataloader_hash(&a) == dataloader_hash(&b), "data: the fingerprint depends on more than data, T and order");
        dataloader_close(&a);
        dataloader_close(&b);
    }
    remove(path);
    data_fixture_free(&fixture);
}

/* ----------------------------------------------------------------------------------------------------- bad shards */

/* The error is one line that names the file (or folder) and says the expected words. */
static void data_check_message(Tests *t, const char *what, bool failed, const FoxError *err, const char *path,
                               const char *words) {
    check(t,
          failed && strstr(err->text, path) != NULL && strstr(err->text, words) != NULL &&
              strchr(err->text, '\n') == NULL,
          "data: %s: expected an error with '%s' and '%s', found '%s'", what, path, words,
          failed ? err->text : "success");
}

/* Opens `where` and takes one batch: fails at one or the other, or not at all. */
static bool data_open_and_next(const char *where, int T, FoxError *err) {
    DataLoader loader;
    DataSpec spec = data_spec(T, 1, 3, false, 1, 0, 1);
    if (!dataloader_open(&loader, where, DATALOADER_TRAIN_PATTERN, &spec, err)) {
        return false;
    }
    int32_t *tokens = FOX_NEW(int32_t, T), *targets = FOX_NEW(int32_t, T);
    bool ok = dataloader_next(&loader, tokens, targets, err);
    free(tokens);
    free(targets);
    dataloader_close(&loader);
    return ok;
}

/* A shard of `count` tokens in windows of `window`, beside an ordinary one. */
static bool data_write_windows(const char *path, int count, int window, const uint16_t *tokens) {
    int32_t header[256] = {20240520, 2, count, 300, window};
    FILE *file = fopen(path, "wb");
    bool ok = file != NULL && fwrite(header, sizeof header, 1, file) == 1 &&
              fwrite(tokens, 2, (size_t)count, file) == (size_t)count;
    return file != NULL && fclose(file) == 0 && ok;
}

/* Windows that stand by themselves come out as they are, in file order or shuffled; other lengths and counts are refused. */
static void data_test_windows(Tests *t) {
    enum { T = 8, SINGLE = 5, STREAM = 30, COUNT = SINGLE + (STREAM - 1) / T };
    uint16_t single[SINGLE * (T + 1)], stream[STREAM];
    char dir[512], path[600];
    uint64_t key = data_fresh();
    for (int i = 0; i < SINGLE * (T + 1) + STREAM; i++) {
        *(i < SINGLE * (T + 1) ? single + i : stream + i - SINGLE * (T + 1)) = (uint16_t)(fox_random(key, (uint64_t)i) % 300);
    }
    snprintf(dir, sizeof dir, "%s/windows", t->scratch);
    snprintf(path, sizeof path, "%s/a_train.bin", dir);
    bool ok = make_directories(dir, NULL) && data_write_windows(path, SINGLE * (T + 1), T + 1, single);
    snprintf(path, sizeof path, "%s/b_train.bin", dir);
    check(t, ok && data_write_shard(path, 20240520, 1, STREAM, 300, stream, STREAM, 0), "data: cannot write to %s", dir);
    uint64_t hashes[2] = {0, 0};
    for (int shuffle = 0; shuffle < 2; shuffle++) {
        DataLoader loader;
        FoxError err = {{0}};
        DataSpec spec = data_spec(T, 1, 5, shuffle == 1, 4, 0, 1);
        int32_t x[T], y[T];
        int seen[COUNT] = {0}, wrong = 0;
        ok = dataloader_open(&loader, dir, DATALOADER_TRAIN_PATTERN, &spec, &err);
        check(t, ok && loader.windows == COUNT, "data: %d windows of two kinds, found %lld %s", COUNT, (long long)loader.windows,
              err.text);
        hashes[shuffle] = ok ? dataloader_hash(&loader) : 0;
        for (int i = 0; ok && i < 2 * COUNT; i++) {
            ok = dataloader_next(&loader, x, y, &err);
            int found = -1;
            for (int w = 0; w < COUNT; w++) {
                const uint16_t *at = w < SINGLE ? single + w * (T + 1) : stream + (w - SINGLE) * T;
                bool same = true;
                for (int k = 0; k < T; k++) {
                    same = same && x[k] == at[k] && y[k] == at[k + 1];
                }
                found = same ? w : found;
            }
            wrong += found < 0 || (shuffle == 0 && found != i % COUNT);
            seen[found < 0 ? 0 : found]++;
        }
        for (int w = 0; w < COUNT; w++) {
            wrong += seen[w] != 2;
        }
        check(t, ok && wrong == 0, "data: windows that stand by themselves, shuffle %d: %d are wrong %s", shuffle, wrong, err.text);
        dataloader_close(&loader);
    }
    check(t, hashes[0] != hashes[1], "data: the fingerprint tells shuffled windows from those in file order");
    static const struct {
        int count, window;
        const char *words;
    } bad[] = {{2 * (T + 1), T, "in windows of 8"}, {2 * (T + 1), 6, "made for -T 5"}, {2 * (T + 1), 1, "windows of 1"},
               {2 * (T + 1), 0, "windows of 0"}, {2 * (T + 1), 18, "made for -T 17"}};
    snprintf(path, sizeof path, "%s/bad.bin", dir);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        FoxError err = {{0}};
        data_write_windows(path, bad[i].count, bad[i].window, single);
        ok = data_open_and_next(path, T, &err);
        data_check_message(t, "bad windows", !ok, &err, path, bad[i].words);
    }
    remove_directory(dir);
}

static void data_test_bad_headers(Tests *t) {
    static const struct {
        const char *what;
        int32_t magic, version, count, vocab;
        int real;   /* tokens in the file */
        int extra;  /* bytes after them */
        int last;   /* value of the token at position 8; the others are 0 */
        const char *words; /* of the message; NULL: the shard is good */
    } cases[] = {
        {"a good shard", 20240520, 1, 20, 257, 20, 0, 256, NULL},
        {"vocabulary 0 means 50257", 20240520, 1, 20, 0, 20, 0, 50256, NULL},
        {"vocabulary 65536", 20240520, 1, 20, 65536, 20, 0, 65535, NULL},
        {"vocabulary 1", 20240520, 1, 20, 1, 20, 0, 0, NULL},
        {"exactly T + 1 tokens", 20240520, 1, 9, 257, 9, 0, 0, NULL},
        {"wrong magic", 20240521, 1, 20, 257, 20, 0, 0, "20240521"},
        {"big-endian magic", 0x18d83401, 1, 20, 257, 20, 0, 0, "expected the magic number 20240520"},
        {"zero magic", 0, 1, 20, 257, 20, 0, 0, "found 0"},
        {"version 0", 20240520, 0, 20, 257, 20, 0, 0, "expected shard version 1 or 2, found 0"},
        {"version 2, a negative window", 20240520, 2, 20, 257, 20, 0, 0, "20 tokens in windows of -5"},
        {"version 3", 20240520, 3, 20, 257, 20, 0, 0, "expected shard version 1 or 2, found 3"},
        {"count too large", 20240520, 1, 21, 257, 20, 0, 0, "truncated"},
        {"count far too large", 20240520, 1, 2147483647, 257, 20, 0, 0, "truncated"},
        {"count too small", 20240520, 1, 19, 257, 20, 0, 0, "too long"},
        {"count 0 with tokens", 20240520, 1, 0, 257, 20, 0, 0, "too long"},
        {"count negative", 20240520, 1, -1, 257, 20, 0, 0, "negative: -1"},
        {"count most negative", 20240520, 1, -2147483647 - 1, 257, 20, 0, 0, "negative"},
        {"one trailing byte", 20240520, 1, 20, 257, 20, 1, 0, "found 1065"},
        {"half a token short", 20240520, 1, 20, 257, 19, 1, 0, "1064 bytes, found 1063"},
        {"no tokens", 20240520, 1, 0, 257, 0, 0, 0, "found 0"},
        {"one token", 20240520, 1, 1, 257, 1, 0, 0, "T = 8 needs 9 tokens, found 1"},
        {"exactly T tokens", 20240520, 1, 8, 257, 8, 0, 0, "T = 8 needs 9 tokens, found 8"},
        {"vocabulary negative", 20240520, 1, 20, -5, 20, 0, 0, "found -5"},
        {"vocabulary too large", 20240520, 1, 20, 65537, 20, 0, 0, "found 65537"},
        {"token = vocabulary", 20240520, 1, 20, 257, 20, 0, 257, "token 257 at position 8"},
        {"token = 50257, vocabulary 0", 20240520, 1, 20, 0, 20, 0, 50257, "token 50257 at position 8"},
        {"token 65535", 20240520, 1, 20, 257, 20, 0, 65535, "token 65535 at position 8, expected tokens below"},
    };
    char path[600];
    snprintf(path, sizeof path, "%s/bad_train.bin", t->scratch);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint16_t tokens[32] = {0};
        FoxError err = {{0}};
        tokens[8] = (uint16_t)cases[i].last;
        if (!check(t, data_write_shard(path, cases[i].magic, cases[i].version, cases[i].count, cases[i].vocab, tokens,
                                       cases[i].real, cases[i].extra), "data: cannot write %s", path)) {
            continue;
        }
        bool ok = data_open_and_next(path, 8, &err);
        if (cases[i].words == NULL) {
            check(t, ok, "data: %s: %s", cases[i].what, err.text);
        } else {
            data_check_message(t, cases[i].what, !ok, &err, path, cases[i].words);
        }
    }
    static const int lengths[] = {0, 1, 4, 12, 1023};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        FoxError err = {{0}};
        uint16_t none = 0;
        data_write_shard(path, 20240520, 1, 0, 0, &none, 0, 0);
        bool ok = truncate(path, lengths[i]) == 0 && data_open_and_next(path, 8, &err);
        data_check_message(t, "truncated header", !ok, &err, path, "header of 1024 bytes");
    }
    remove(path);
}

static void data_test_bad_places(Tests *t) {
    char dir[512], path[600], other[600];
    uint16_t tokens[20] = {0};
    FoxError err = {{0}};
    snprintf(dir, sizeof dir, "%s/data_places_bad", t->scratch);
    snprintf(path, sizeof path, "%s/a_train.bin", dir);
    snprintf(other, sizeof other, "%s/b_train.bin", dir);
    check(t, make_directories(dir, &err), "data: %s", err.text);
    data_check_message(t, "empty folder", !data_open_and_next(dir, 8, &err), &err, dir, "train");
    err.text[0] = '\0';
    data_check_message(t, "no such file", !data_open_and_next(path, 8, &err), &err, path, "");
    mkdir(path, 0777);
    err.text[0] = '\0';
    data_check_message(t, "a folder named like a shard", !data_open_and_next(dir, 8, &err), &err, dir, "train");
    rmdir(path);
    /* A link to nowhere cannot be read by anybody, root included. */
    if (symlink("/nowhere/to/be/found", path) == 0) {
        err.text[0] = '\0';
        data_check_message(t, "unreadable file", !data_open_and_next(dir, 8, &err), &err, path, "cannot read");
        remove(path);
    }
    if (mkfifo(path, 0600) == 0) {
        err.text[0] = '\0';
        data_check_message(t, "a pipe", !data_open_and_next(dir, 8, &err), &err, path, "special file");
        remove(path);
    }
    err.text[0] = '\0';
    data_check_message(t, "a device", !data_open_and_next("/dev/null", 8, &err), &err, "/dev/null", "special file");
    data_write_shard(path, 20240520, 1, 20, 257, tokens, 20, 0);
    if (geteuid() == 0) {
        skip(t, "data: a shard without permission to read: root may read it");
    } else if (chmod(path, 0) == 0) {
        err.text[0] = '\0';
        data_check_message(t, "no permission", !data_open_and_next(dir, 8, &err), &err, path, "Permission");
        chmod(path, 0600);
    }
    data_write_shard(other, 20240520, 1, 20, 300, tokens, 20, 0);
    err.text[0] = '\0';
    data_check_message(t, "mixed vocabularies", !data_open_and_next(dir, 8, &err), &err, other,
                       "expected a vocabulary of 257");
    data_write_shard(other, 20240520, 1, 5, 257, tokens, 5, 0);
    err.text[0] = '\0';
    data_check_message(t, "second shard too short", !data_open_and_next(dir, 8, &err), &err, other, "found 5");
    remove(other);
    err.text[0] = '\0';
    check(t, data_open_and_next(dir, 8, &err), "data: the folder without the bad shards: %s", err.text);
    static const int specs[][4] = {{0, 1, 0, 1},  {8, 0, 0, 1}, {8, 1, 1, 1},
                                   {8, 1, -1, 1}, {8, 1, 0, 0}, {-8, 1, 0, 1}};
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        DataLoader loader;
        DataSpec spec = data_spec(specs[i][0], specs[i][1], 0, true, 1, specs[i][2], specs[i][3]);
        check(t, !dataloader_open(&loader, dir, DATALOADER_TRAIN_PATTERN, &spec, NULL), "data: bad spec %d opens",
              (int)i);
    }
    remove(path);
    rmdir(dir);
}

/* ------------------------------------------------------------------------------------------- thread and big files */

/* A bad token ends the data where it stands and no earlier, stays an error, and a seek goes past it. */
static void data_test_bad_token_late(Tests *t) {
    enum { T = 10, COUNT = 201, BAD = 125 };
    uint16_t data[COUNT];
    char path[600];
    int32_t tokens[T], targets[T];
    DataLoader loader;
    FoxError err = {{0}};
    for (int i = 0; i < COUNT; i++) {
        data[i] = i == BAD ? 999 : (uint16_t)i;
    }
    snprintf(path, sizeof path, "%s/late_train.bin", t->scratch);
    data_write_shard(path, 20240520, 1, COUNT, 257, data, COUNT, 0);
    DataSpec spec = data_spec(T, 1, 0, false, 1, 0, 1);
    if (!check(t, dataloader_open(&loader, path, "*", &spec, &err), "data: %s", err.text)) {
        return;
    }
    for (int i = 0; i < BAD / T; i++) {
        check(t, dataloader_next(&loader, tokens, targets, &err) && tokens[0] == i * T, "data: window %d: %s", i,
              err.text);
    }
    for (int i = 0; i < 3; i++) {
        err.text[0] = '\0';
        bool ok = dataloader_next(&loader, tokens, targets, &err);
        data_check_message(t, "bad token", !ok, &err, path, "token 999 at position 125");
        check(t, dataloader_position(&loader) == BAD / T, "data: the position moved past an error");
    }
    err.text[0] = '\0';
    bool ok = dataloader_seek(&loader, BAD / T + 1, &err) && dataloader_next(&loader, tokens, targets, &err);
    check(t, ok && tokens[0] == (BAD / T + 1) * T, "data: seek past a bad token: %s", err.text);
    dataloader_close(&loader);
    remove(path);
}

/* Waits until the thread has filled every slot. */
static bool data_wait_full(DataLoader *loader) {
    for (int i = 0; i < 10000; i++) {
        pthread_mutex_lock(&loader->mutex);
        bool full = loader->ready == DATALOADER_SLOTS;
        pthread_mutex_unlock(&loader->mutex);
        if (full) {
            return true;
        }
        usleep(1000);
    }
    return false;
}

/* Batches are read ahead; a file that shrinks, grows, or goes away while we run is an error and never a crash. */
static void data_test_file_changes(Tests *t) {
    static const int64_t sizes[] = {5000};
    enum { T = 10, B = 2 };
    DataFixture fixture;
    DataLoader loader;
    char path[600];
    int32_t tokens[B * T], targets[B * T];
    FoxError err = {{0}};
    DataSpec spec = data_spec(T, B, 0, false, B, 0, 1);
    if (!data_fixture_create(t, &fixture, "data_changes", 257, 1, sizes) ||
        !check(t, dataloader_open(&loader, fixture.dir, DATALOADER_TRAIN_PATTERN, &spec, &err), "data: %s", err.text)) {
        return;
    }
    data_fixture_path(&fixture, 0, path);
    static const char *words[] = {"changed while we run", "changed while we run", "changed while we run",
                                  "cannot read"};
    for (int i = 0; i < 4; i++) {
        int64_t start = 0;
        check(t, data_wait_full(&loader), "data: the thread does not read ahead");
        bool changed = i < 3 ? truncate(path, i == 0 ? 3000 : i == 1 ? 0 : 20000) == 0 : remove(path) == 0;
        check(t, changed, "data: cannot change %s", path);
        for (int k = 0; k < DATALOADER_SLOTS; k++, start += B * T) {
            err.text[0] = '\0';
            bool ok = dataloader_next(&loader, tokens, targets, &err);
            check(t, ok && data_row_equals(&fixture, 0, start, T, tokens, targets), "data: read ahead: %s", err.text);
        }
        bool ok = dataloader_next(&loader, tokens, targets, &err);
        data_check_message(t, "a file that changes", !ok, &err, path, words[i]);
        data_write_shard(path, 20240520, 1, 5000, 257, fixture.tokens[0], 5000, 0);
        err.text[0] = '\0';
        ok = dataloader_seek(&loader, 0, &err);
        check(t, ok, "data: seek after an error: %s", err.text);
    }
    dataloader_close(&loader);
    data_fixture_free(&fixture);
}

/* Close at any moment: just opened, reading, full, after an error; a second close and a failed open do no harm. */
static void data_test_shutdown(Tests *t) {
    static const int64_t sizes[] = {4000, 4000};
    DataFixture fixture;
    FoxError err = {{0}};
    uint64_t key = data_fresh();
    int rounds = t->quick ? 100 : 1000, failures = 0;
    if (!data_fixture_create(t, &fixture, "data_shutdown", 257, 2, sizes)) {
        return;
    }
    int32_t *tokens = FOX_NEW(int32_t, 300 * 4), *targets = FOX_NEW(int32_t, 300 * 4);
    for (int i = 0; i < rounds; i++) {
        DataLoader loader;
        uint64_t random = fox_random(key, (uint64_t)i);
        DataSpec spec =
            data_spec(1 + (int)((random >> 8) % 300), 1 + (int)((random >> 20) % 4), random, random & 1, 8, 0, 1);
        failures += !dataloader_open(&loader, fixture.dir, DATALOADER_TRAIN_PATTERN, &spec, &err);
        if (random & 2) {
            usleep((useconds_t)((random >> 30) % 200));
        }
        for (uint64_t k = (random >> 40) % 6; k > 0; k--) {
            failures += !dataloader_next(&loader, tokens, targets, &err);
        }
        if (random & 4) {
            failures += !dataloader_seek(&loader, (int64_t)(random >> 44), &err);
        }
        dataloader_close(&loader);
        dataloader_close(&loader);
        failures += dataloader_next(&loader, tokens, targets, NULL) || dataloader_seek(&loader, 0, NULL); /* closed */
    }
    check(t, failures == 0, "data: %d failures in %d rounds of open, next, seek, close: %s", failures, rounds,
          err.text);
    free(tokens);
    free(targets);
    data_fixture_free(&fixture);
}

/* A shard of 2^31 - 1 tokens, 4 GiB, sparse: positions beyond 2 GiB and 2^31 bytes, read where they are. */
static void data_test_big_shard(Tests *t) {
    enum { T = 1000 };
    const int64_t count = 2147483647, bytes = 1024 + 2 * count, last = (count - 1) / T - 1;
    char path[600];
    uint16_t data[T + 1];
    int32_t tokens[T], targets[T], header[4] = {20240520, 1, (int32_t)count, 60000};
    FoxError err = {{0}};
    snprintf(path, sizeof path, "%s/big_train.bin", t->scratch);
    for (int i = 0; i <= T; i++) {
        data[i] = (uint16_t)(i * 7 % 60000);
    }
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    bool written = fd >= 0 && ftruncate(fd, (off_t)bytes) == 0 &&
                   pwrite(fd, header, sizeof header, 0) == sizeof header &&
                   pwrite(fd, data, sizeof data, (off_t)(1024 + 2 * last * T)) == (ssize_t)sizeof data;
    struct stat status;
    bool sparse = written && fstat(fd, &status) == 0 && status.st_blocks < 100000;
    if (fd >= 0) {
        close(fd);
    }
    if (!sparse) {
        skip(t, "data: a sparse shard of 4 GiB, which the file system of %s does not take", t->scratch);
        remove(path);
        return;
    }
    DataLoader loader;
    DataSpec spec = data_spec(T, 1, 0, false, 1, 0, 1);
    bool ok = dataloader_open(&loader, path, "*", &spec, &err);
    check(t, ok && loader.tokens == count && loader.windows == last + 1,
          "data: 4 GiB shard: %lld tokens, %lld windows %s", (long long)loader.tokens, (long long)loader.windows,
          err.text);
    ok = ok && dataloader_seek(&loader, last, &err) && dataloader_next(&loader, tokens, targets, &err);
    int wrong = 0;
    for (int i = 0; i < T && ok; i++) {
        wrong += tokens[i] != data[i] || targets[i] != data[i + 1];
    }
    check(t, ok && wrong == 0, "data: last window of a 4 GiB shard: %d tokens wrong %s", wrong, err.text);
    dataloader_close(&loader);
    remove(path);
}

/* In a folder the last of "train" and "val" in a name decides, whole words first. */
static void data_test_kinds(Tests *t) {
    static const struct {
        const char *name;
        char kind;
    } cases[] = {{"train_0.bin", 't'},          {"a/val.bin", 'v'},   {"medieval_train_0.bin", 't'}, {"constrained_val_0.bin", 'v'},
                 {"train/interval_val.bin", 'v'}, {"val/other.bin", 0}, {"*train*.bin", 't'}, {"*val*.bin", 'v'},
                 {"train_retrieval.bin", 't'}, {"train-values.bin", 't'}, {"medieval.bin", 'v'}, {"pretrain7.bin", 't'},
                 {"x_validation_0.bin", 'v'}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        check(t, dataloader_kind(cases[i].name) == cases[i].kind, "data: kind of %s", cases[i].name);
    }
    DataFixture fixture;
    char path[2][1000];
    PathList list;
    const int64_t sizes[] = {100};
    uint16_t val[95] = {0};
    if (!data_fixture_create(t, &fixture, "data_kinds", 300, 1, sizes)) {
        return;
    }
    static const char *const names[] = {"medieval_train.bin", "constrained_val.bin"};
    static const char *const patterns[] = {DATALOADER_TRAIN_PATTERN, DATALOADER_VAL_PATTERN};
    for (int i = 0; i < 2; i++) {
        snprintf(path[i], sizeof path[i], "%s/%s", fixture.dir, names[i]);
        data_write_shard(path[i], 20240520, 1, 95, 300, val, 95, 0);
    }
    for (int i = 0; i < 2; i++) {
        bool ok = dataloader_list(fixture.dir, patterns[i], &list, NULL);
        check(t, ok && list.count == 2 - i && strcmp(list.paths[0], path[i]) == 0, "data: %s has %d shards of its kind", patterns[i],
              ok ? list.count : -1);
        path_list_free(&list);
    }
    remove(path[0]);
    remove(path[1]);
    data_fixture_free(&fixture);
}

static void test_data(Tests *t) {
    data_test_kinds(t);
    data_test_bijection(t);
    data_test_known_order(t);
    data_test_shuffle_small(t);
    data_test_shuffle_large(t);
    data_test_good(t);
    data_test_places(t);
    data_test_windows(t);
    data_test_bad_headers(t);
    data_test_bad_places(t);
    data_test_bad_token_late(t);
    data_test_file_changes(t);
    data_test_shutdown(t);
    data_test_big_shard(t);
}

#endif

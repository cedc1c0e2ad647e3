/* Tests of the file side: files, JSON, safetensors. */
#ifndef FOX_TESTS_FILES_H
#define FOX_TESTS_FILES_H

#include "check.h"

#include "../train/checkpoint.h"
#include "../train/files.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- helpers ---------------------------------------------------------------------------------------------------- */

/* A fresh random word per call; the key changes from run to run and is printed, so that a failure can be repeated. */
typedef struct FilesRandom {
    uint64_t key, counter;
} FilesRandom;

static uint64_t files_random(FilesRandom *r) {
    return fox_random(r->key, r->counter++);
}

static int files_below(FilesRandom *r, int n) {
    return (int)(files_random(r) % (uint64_t)n);
}

/* scratch/files/NAME; the buffer is the caller's. */
static const char *files_path(const Tests *t, char path[512], const char *name) {
    snprintf(path, 512, "%s/files/%s", t->scratch, name);
    return path;
}

static void files_write(const char *path, const void *data, size_t size) {
    FILE *out = fopen(path, "wb");
    if (out == NULL || fwrite(data, 1, size, out) != size || fclose(out) != 0) {
        fox_die("%s: the test cannot write its file", path);
    }
}

static void files_write_text(const char *path, const char *text) {
    files_write(path, text, strlen(text));
}

/* Failure with a message of one line that holds `part`. */
static bool files_failed(Tests *t, bool ok, const FoxError *err, const char *part, const char *name) {
    return check(t, !ok && strstr(err->text, part) != NULL && strchr(err->text, '\n') == NULL,
                 "%s: expected an error with '%s', found %s '%s'", name, part, ok ? "success," : "error", err->text);
}

/* Replaces the first `from` in the file by `to`. */
static void files_replace(const char *path, const char *from, const char *to) {
    char *text;
    size_t length, from_length = strlen(from);
    FoxError err = {""};
    if (!file_read(path, (size_t)1 << 30, &text, &length, &err)) {
        fox_die("%s", err.text);
    }
    size_t at = 0;
    while (at + from_length <= length && memcmp(text + at, from, from_length) != 0) {
        at++;
    }
    if (at + from_length > length) {
        fox_die("%s: the test does not find '%s'", path, from);
    }
    FILE *out = fopen(path, "wb");
    fwrite(text, 1, at, out);
    fputs(to, out);
    fwrite(text + at + from_length, 1, length - at - from_length, out);
    fclose(out);
    free(text);
}

/* ---- files ------------------------------------------------------------------------------------------------------ */

static void test_files_basics(Tests *t) {
    char dir[512], path[512], link[512];
    FoxError err = {""};
    files_path(t, dir, "basics/a/b");
    check(t, make_directories(dir, &err) && make_directories(dir, &err), "make_directories twice: %s", err.text);
    files_write(files_path(t, path, "basics/a/b/x_train_2.bin"), "two", 3);
    check(t, !make_directories(path, &err) && strstr(err.text, "cannot create"), "make_directories over a file");
    files_write(files_path(t, path, "basics/a/b/x_train_1.bin"), "o\0e", 3);
    files_write(files_path(t, path, "basics/a/b/x_val_1.bin"), "", 0);
    check(t, make_directories(files_path(t, path, "basics/a/b/y_train_0.bin"), NULL), "a directory named like a shard");

    PathList list;
    err.text[0] = '\0';
    check(t, path_list(dir, "*train*.bin", &list, &err) && list.count == 2 && strstr(list.paths[0], "x_train_1.bin") &&
          strstr(list.paths[1], "x_train_2.bin"), "path_list of a directory: %d, %s", list.count, err.text);
    path_list_free(&list);
    check(t, path_list(files_path(t, path, "basics/*/b/x_*_1.bin"), "?", &list, &err) && list.count == 2 &&
          strstr(list.paths[1], "x_val_1.bin"), "path_list of a glob: %d, %s", list.count, err.text);
    path_list_free(&list);
    check(t, path_list(files_path(t, path, "basics/a/b/x_val_1.bin"), "?", &list, &err) && list.count == 1,
          "path_list of a file: %d, %s", list.count, err.text);
    path_list_free(&list);
    files_failed(t, path_list(dir, "*test*.bin", &list, &err), &err, "named like", "path_list without a match");
    err.text[0] = '\0';
    files_failed(t, path_list(files_path(t, path, "basics/none"), "*", &list, &err), &err, "no such file", "path_list");

    char *text;
    size_t length;
    err.text[0] = '\0';
    check(t, file_read(files_path(t, path, "basics/a/b/x_train_1.bin"), 3, &text, &length, &err) && length == 3 &&
          memcmp(text, "o\0e", 4) == 0, "file_read: %s", err.text);
    free(text);
    files_failed(t, file_read(path, 2, &text, &length, &err), &err, "at most 2", "file_read over its limit");
    err.text[0] = '\0';
    files_failed(t, file_read(dir, 100, &text, &length, &err), &err, "regular file", "file_read of a directory");
    err.text[0] = '\0';
    if (check(t, mkfifo(files_path(t, path, "basics/pipe"), 0600) == 0, "mkfifo")) {
        files_failed(t, file_read(path, 100, &text, &length, &err), &err, "regular file", "file_read of a pipe");
    }
    err.text[0] = '\0';
    files_failed(t, file_read("", 100, &text, &length, &err), &err, "cannot open", "file_read of no name");

    check(t, symlink("a/b", files_path(t, link, "basics/link")) == 0, "symlink");
    check(t, !remove_directory(link) && access(files_path(t, path, "basics/a/b/x_val_1.bin"), F_OK) == 0,
          "remove_directory does not follow a link");
    check(t, !remove_directory(dir), "remove_directory reports a subdirectory that stays");
    check(t, remove_directory(files_path(t, path, "basics/a/b/y_train_0.bin")) && remove_directory(dir) &&
          access(dir, F_OK) != 0, "remove_directory");
    err.text[0] = '\0';
    check(t, !sync_directory(dir, &err) && sync_directory(t->scratch, NULL), "sync_directory");
    err.text[0] = '\0';
    FILE *full = fopen("/dev/full", "w");
    if (full != NULL) {
        fputs("something", full);
        files_failed(t, file_finish(full, "/dev/full", &err), &err, "No space", "file_finish on a full disk");
    }
}

/* ---- JSON ------------------------------------------------------------------------------------------------------- */

static const char *const json_good[] = {
    "0",
    "-0",
    " 1 ",
    "1e5",
    "-1.25E-3",
    "[]",
    "{}",
    "[[],{}]",
    "true",
    "false",
    "null",
    "\"\"",
    "\"\\u0000\"",
    "{\"a\":1,\"A\":1,\"\":1}",
    "\"\\ud83e\\udd8a\"",
    "\"\xf0\x9f\xa6\x8a\"",
    "\t\r\n[1 , 2]\n",
    "123456789012345678901234567890",
    "1e-9999",
    "\"\x7f\"",
    "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"",
};

static const struct {
    const char *text, *error;
} json_bad[] = {
    {"", "found the end"},
    {"  ", "found the end"},
    {"nul", "expected a value"},
    {"nulll", "expected the end"},
    {"True", "expected a value"},
    {"NaN", "expected a value"},
    {"Infinity", "expected a value"},
    {"-", "a digit"},
    {"+1", "expected a value"},
    {"01", "expected the end"},
    {"1.", "after the decimal point"},
    {".5", "expected a value"},
    {"1e", "in the exponent"},
    {"1e+", "in the exponent"},
    {"1e999", "too large"},
    {"-1e999", "too large"},
    {"0x10", "expected the end"},
    {"[1,]", "expected a value"},
    {"[1 2]", "',' or ']'"},
    {"[", "expected a value"},
    {"]", "expected a value"},
    {"[}", "expected a value"},
    {"{", "a key in quotes"},
    {"{\"a\"}", "':'"},
    {"{\"a\":}", "expected a value"},
    {"{\"a\":1,}", "a key in quotes"},
    {"{a:1}", "a key in quotes"},
    {"{\"a\":1 \"b\":2}", "',' or '}'"},
    {"{\"a\":1,\"b\":2,\"a\":3}", "twice"},
    {"{\"a\":1,\"\\u0061\":2}", "twice"},
    {"\"a", "does not end"},
    {"\"\\", "an escape"},
    {"\"\\x41\"", "an escape"},
    {"\"\\u12\"", "four hexadecimal"},
    {"\"\\u12g4\"", "four hexadecimal"},
    {"\"\\ud83e\"", "without the second"},
    {"\"\\ud83e\\n\"", "without the second"},
    {"\"\\ud83e\\u0041\"", "no surrogate pair"},
    {"\"\\udd8a\"", "without the first"},
    {"\"\n\"", "control character"},
    {"\"\xff\"", "no UTF-8"},
    {"\"\x80\"", "no UTF-8"},
    {"\"\xc0\xaf\"", "no UTF-8"},         /* overlong */
    {"\"\xe0\x80\xaf\"", "no UTF-8"},
    {"\"\xf0\x80\x80\xaf\"", "no UTF-8"},
    {"\"\xed\xa0\x80\"", "no UTF-8"},     /* surrogate */
    {"\"\xf4\x90\x80\x80\"", "no UTF-8"}, /* beyond Unicode */
    {"\"\xe2\x82", "no UTF-8"},
    {"\xef\xbb\xbf{}", "byte 0xef"},
    {"1 2", "expected the end"},
    {"[1,\n 2,\n  x]", "line 3, column 3"},
    {"{\"a\nb\":1}", "line 1, column 4"},
};

/* `depth` arrays in one another. */
static bool files_parse_nested(int depth, FoxError *err) {
    char text[512];
    memset(text, '[', (size_t)depth);
    memset(text + depth, ']', (size_t)depth);
    JsonDocument document;
    bool ok = json_parse(text, (size_t)depth * 2, "nested", &document, err);
    json_free(&document);
    return ok;
}

/* A string of random characters from all of Unicode, controls included. */
static void files_random_text(FilesRandom *r, char *out, int characters) {
    for (int i = 0; i < characters; i++) {
        uint32_t c = 0;
        while (c == 0 || (c >= 0xd800 && c < 0xe000)) {
            int bits = 1 + files_below(r, 21);
            c = (uint32_t)files_random(r) & ((1u << bits) - 1);
            c = c > 0x10ffff ? 0 : c;
        }
        /* an independent encoder: the leading byte's prefix and six bits for every byte after it */
        int bytes = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        static const unsigned char prefixes[] = {0, 0, 0xc0, 0xe0, 0xf0};
        for (int b = bytes - 1; b >= 0; b--) {
            unsigned char prefix = b == bytes - 1 ? prefixes[bytes] : 0x80;
            *out++ = (char)(prefix | (c >> (6 * b) & (b == bytes - 1 ? 0x7f : 0x3f)));
        }
    }
    *out = '\0';
}

static void test_files_json_round_trip(Tests *t, FilesRandom *r) {
    for (int i = 0; i < (t->quick ? 300 : 3000); i++) {
        char text[256], *written = NULL;
        size_t size = 0;
        uint64_t bits = files_random(r);
        double number;
        memcpy(&number, &bits, 8);
        number = isfinite(number) ? number : (double)(int64_t)bits;
        files_random_text(r, text, files_below(r, 60));
        FILE *out = open_memstream(&written, &size);
        fputs("{", out);
        json_write_string(out, text);
        fputs(":[", out);
        json_write_number(out, number);
        fprintf(out, ",%" PRId64 ",", (int64_t)bits);
        json_write_string(out, text);
        fputs("]}", out);
        fclose(out);
        JsonDocument d;
        FoxError err = {""};
        if (check(t, json_parse(written, size, "round trip", &d, &err), "JSON round trip: %s", err.text)) {
            const Json *list = json_get(d.root, text);
            const Json *a = list ? list->first : NULL, *b = a ? a->next : NULL, *c = b ? b->next : NULL;
            check(t, c != NULL && memcmp(&a->number, &number, 8) == 0 && b->is_integer && b->integer == (int64_t)bits &&
                  c->string_length == strlen(text) && strcmp(c->string, text) == 0, "JSON round trip of %s", written);
            json_free(&d);
        }
        free(written);
    }
}

static void test_files_json(Tests *t, FilesRandom *r) {
    JsonDocument d;
    for (size_t i = 0; i < sizeof json_good / sizeof json_good[0]; i++) {
        FoxError err = {""};
        check(t, json_parse(json_good[i], strlen(json_good[i]), "good", &d, &err), "%s: %s", json_good[i], err.text);
        json_free(&d);
    }
    for (size_t i = 0; i < sizeof json_bad / sizeof json_bad[0]; i++) {
        FoxError err = {""};
        /* an exact copy, so that a sanitizer sees a read past the end */
        size_t length = strlen(json_bad[i].text);
        char *copy = (char *)malloc(length ? length : 1);
        memcpy(copy, json_bad[i].text, length);
        files_failed(t, json_parse(copy, length, "bad", &d, &err), &err, json_bad[i].error, json_bad[i].text);
        free(copy);
    }
    FoxError err = {""};
    check(t, files_parse_nested(64, &err), "64 deep: %s", err.text);
    files_failed(t, files_parse_nested(65, &err), &err, "nested more than 64", "65 deep");

    const char *fox = "{\"n\":-12,\"x\":2.5,\"s\":\"a\\u0000b\\ud83e\\udd8a\",\"big\":9223372036854775808}";
    if (check(t, json_parse(fox, strlen(fox), "fox", &d, NULL), "json_parse")) {
        const Json *n = json_get(d.root, "n"), *x = json_get(d.root, "x"), *s = json_get(d.root, "s");
        const Json *big = json_get(d.root, "big");
        check(t, d.root->count == 4 && n->is_integer && n->integer == -12 && !x->is_integer && x->number == 2.5 &&
              !big->is_integer && big->number == 0x1p63, "numbers");
        check(t, s->string_length == 7 && memcmp(s->string, "a\0b\xf0\x9f\xa6\x8a", 8) == 0, "string with a zero byte");
        check(t, json_get(d.root, "none") == NULL && json_get(NULL, "n") == NULL && json_get(n, "n") == NULL,
              "json_get");
        json_free(&d);
    }

    /* Many keys: with a quadratic search for duplicates this would take minutes. */
    int keys = 200000;
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    for (int i = 0; i < keys; i++) {
        fprintf(out, "%c\"k%d\":%d", i ? ',' : '{', i * 7, i);
    }
    fputs("}", out);
    fclose(out);
    double start = fox_now();
    bool ok = json_parse(text, size, "many keys", &d, &err);
    check(t, ok && d.root->count == keys && fox_now() - start < 10, "200,000 keys: %s, %.1f s", err.text,
          fox_now() - start);
    json_free(&d);
    free(text);

    /* Invalid UTF-8 is written as replacement characters. */
    out = open_memstream(&text, &size);
    json_write_string(out, "a\xff\xe2\x82z\x01");
    json_write_number(out, (double)NAN);
    fclose(out);
    check(t, strcmp(text, "\"a\\ufffd\\ufffd\\ufffdz\\u0001\"null") == 0, "json_write_string: %s", text);
    free(text);
    test_files_json_round_trip(t, r);
}

/* ---- safetensors ------------------------------------------------------------------------------------------------ */

static void files_write_safetensors(const char *path, const char *header, const void *data, size_t size) {
    FILE *out = fopen(path, "wb");
    uint64_t length = strlen(header);
    fwrite(&length, 8, 1, out);
    fputs(header, out);
    fwrite(data, 1, size, out);
    fclose(out);
}

#define ONE(dtype, shape, offsets) "{\"a\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"
#define TWO(a, b) \
    "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":" a "}," \
    "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":" b "}}"

static const struct {
    const char *header;
    int size; /* bytes of data */
    const char *error; /* NULL: a good file */
} safetensors_cases[] = {
    {ONE("F32", "[2]", "[0,8]"), 8, NULL},
    {ONE("F32", "[]", "[0,4]"), 4, NULL},
    {ONE("F32", "[0,7]", "[0,0]"), 0, NULL},
    {ONE("BF16", "[2,2]", "[0,8]") "   \n", 8, NULL},
    {TWO("[8,16]", "[0,8]"), 16, NULL},
    {"{\"z\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[4,4]},"
     "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
     "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
     8, NULL},
    {"{}", 0, NULL},
    {"{\"__metadata__\":{\"format\":\"pt\"}}", 0, NULL},
    {"{}", 1, "the tensors only 0"},
    {"[]", 0, "not a JSON object"},
    {"{", 0, "key in quotes"},
    {"", 0, "found the end"},
    {"{\"a\":1}", 0, "expected an object"},
    {"{\"a\":{}}", 0, "no dtype"},
    {"{\"a\\nb\":{}}", 0, "control character"},
    {"{\"__metadata__\":{\"x\":1}}", 0, "object of strings"},
    {"{\"__metadata__\":\"pt\"}", 0, "object of strings"},
    {ONE("F33", "[2]", "[0,8]"), 8, "unknown dtype"},
    {ONE("FLOAT32LONGNAME", "[2]", "[0,8]"), 8, "unknown dtype"},
    {ONE("F32", "2", "[0,8]"), 8, "no shape"},
    {ONE("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "no shape"},
    {ONE("F32", "[2.0]", "[0,8]"), 8, "whole numbers"},
    {ONE("F32", "[-2]", "[0,8]"), 8, "whole numbers"},
    {ONE("F32", "[\"2\"]", "[0,8]"), 8, "whole numbers"},
    {ONE("F32", "[4294967296,4294967296,2]", "[0,8]"), 8, "whole numbers"}, /* 2^65 wraps to 0 */
    {ONE("F32", "[9223372036854775808]", "[0,8]"), 8, "whole numbers"},
    {ONE("F32", "[4611686018427387904]", "[0,0]"), 0, "elements"}, /* 2^62 floats wrap to 0 bytes */
    {ONE("F32", "[2]", "[0,4]"), 8, "2 elements of F32 but 4 bytes"},
    {ONE("F32", "[2]", "[0,9]"), 9, "2 elements of F32 but 9 bytes"},
    {ONE("F32", "[2]", "[0,8]"), 7, "cut off"},
    {ONE("F32", "[2]", "[0,8]"), 9, "the tensors only 8"},
    {ONE("F32", "[2]", "[8,0]"), 8, "cut off"},
    {ONE("F32", "[2]", "[-8,0]"), 8, "cut off"},
    {ONE("F32", "[2]", "[0,9223372036854775807]"), 8, "cut off"},
    {ONE("F32", "[2]", "[0]"), 8, "data_offsets"},
    {ONE("F32", "[2]", "[0,8,8]"), 8, "data_offsets"},
    {ONE("F32", "[2]", "[0,8e0]"), 8, "data_offsets"},
    {ONE("F32", "[2]", "[4,12]"), 12, "leaving a gap"},
    {TWO("[0,8]", "[4,12]"), 12, "before the other's end"},
    {TWO("[0,8]", "[0,8]"), 8, "before the other's end"},
    {TWO("[0,8]", "[12,20]"), 20, "leaving a gap"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
     "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}",
     16, "twice"},
    {"{\"a\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", 0,
     "nested more than"},
};

/* Files that go wrong before their header: its length, or no file at all. */
static void test_files_safetensors_lengths(Tests *t) {
    static const struct {
        uint64_t length;
        int size; /* bytes of the whole file */
        const char *error;
    } cases[] = {
        {2, 0, "too few"},
        {2, 7, "too few"},
        {3, 10, "claims a header"},
        {(uint64_t)1 << 63, 10, "claims a header"},
        {UINT64_MAX, 10, "claims a header"},
        {UINT64_MAX - 7, 10, "claims a header"},
        {200000000, 10, "claims a header"},
        {0, 10, "found the end"},
    };
    char path[512], bytes[10] = "........{}";
    SafeTensors st;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        FoxError err = {""};
        memcpy(bytes, &cases[i].length, 8);
        files_write(files_path(t, path, "length.safetensors"), bytes, (size_t)cases[i].size);
        files_failed(t, safetensors_open(path, &st, &err), &err, cases[i].error, "header length");
    }
    FoxError err = {""};
    files_failed(t, safetensors_open(files_path(t, path, "none.safetensors"), &st, &err), &err, "No such file", "none");
    err.text[0] = '\0';
    files_failed(t, safetensors_open(t->scratch, &st, &err), &err, "regular file", "a directory");
}

/* A whole file: created, then filled, every tensor in two parts, the later one first. */
static bool files_write_tensors(const char *path, int count, const char *const *names, const int *ndim, const int64_t (*shapes)[2],
                        const char *const *metadata, float **data, FoxError *err) {
    SafeTensors st;
    if (!safetensors_create(path, count, names, ndim, shapes, metadata, err) || !safetensors_edit(path, &st, err)) {
        return false;
    }
    bool ok = true;
    for (int i = 0; ok && i < count; i++) {
        const SafeTensor *s = safetensors_find(&st, names[i]);
        int64_t half = s != NULL ? s->count / 2 : 0;
        ok = s != NULL && safetensors_write_float(&st, s, half, s->count - half, data[i] + half, err) &&
             safetensors_write_float(&st, s, 0, half, data[i], err);
    }
    ok = ok && safetensors_sync(&st, err);
    safetensors_close(&st);
    return ok;
}

/* Random tensors, names and metadata through a file and back, bit for bit (NaNs with their payload too). */
static void test_files_safetensors_round_trip(Tests *t, FilesRandom *r) {
    char path[512];
    files_path(t, path, "round.safetensors");
    for (int round = 0; round < (t->quick ? 10 : 100); round++) {
        enum { MAX = 12 };
        int count = files_below(r, MAX + 1), ndim[MAX];
        int64_t shapes[MAX][2], sizes[MAX];
        char names[MAX][200], text[200];
        const char *name_list[MAX];
        float *data[MAX];
        for (int i = 0; i < count; i++) {
            ndim[i] = 1 + files_below(r, 2);
            shapes[i][0] = files_below(r, 5) == 0 ? 0 : 1 + files_below(r, files_below(r, 4) == 0 ? 70000 : 40);
            shapes[i][1] = ndim[i] == 2 ? 1 + files_below(r, 9) : 1;
            sizes[i] = shapes[i][0] * shapes[i][1];
            snprintf(names[i], sizeof names[i], "%d\"\xc3\xa9\\.weight", files_below(r, 10) + 10 * i);
            name_list[i] = names[i];
            data[i] = FOX_NEW(float, sizes[i]);
            for (int64_t j = 0; j < sizes[i]; j++) {
                uint32_t bits = (uint32_t)files_random(r);
                memcpy(&data[i][j], &bits, 4);
            }
        }
        files_random_text(r, text, 20);
        const char *const metadata[] = {"format", "pt", "text", text, NULL};
        FoxError err = {""};
        SafeTensors st;
        bool ok = files_write_tensors(path, count, name_list, ndim, (const int64_t(*)[2])shapes, metadata, data, &err) &&
                  safetensors_open(path, &st, &err);
        if (check(t, ok, "safetensors round trip: %s", err.text)) {
            check(t, st.count == count && st.data_start % 8 == 0, "count and alignment");
            const char *back = safetensors_metadata(&st, "text");
            check(t, back != NULL && strcmp(back, text) == 0 && safetensors_metadata(&st, "x") == NULL, "metadata");
            for (int i = 0; i < count; i++) {
                const SafeTensor *s = safetensors_find(&st, names[i]);
                float *copy = FOX_NEW(float, sizes[i] + 1);
                int64_t cut = sizes[i] / 3;
                ok = s != NULL && s->ndim == ndim[i] && s->shape[0] == shapes[i][0] && s->count == sizes[i] &&
                     (ndim[i] == 1 || s->shape[1] == shapes[i][1]) &&
                     safetensors_read_float(&st, s, 0, cut, copy, &err) &&
                     safetensors_read_float(&st, s, cut, sizes[i] - cut, copy + cut, &err) &&
                     memcmp(copy, data[i], sizeof(float) * (size_t)sizes[i]) == 0;
                check(t, ok, "tensor %s came back otherwise: %s", names[i], err.text);
                check(t, s == NULL || !safetensors_read_float(&st, s, cut, sizes[i] - cut + 1, copy, NULL),
                      "read past the end");
                free(copy);
            }
            safetensors_close(&st);
        }
        for (int i = 0; i < count; i++) {
            free(data[i]);
        }
    }
}

/* All 65,536 values of both narrow types against arithmetic on their fields. */
static void test_files_safetensors_narrow(Tests *t) {
    static const char *const dtypes[] = {"F16", "BF16"};
    static const int fraction_bits[] = {10, 7}, bias[] = {15, 127};
    char path[512], header[200];
    uint16_t *bits = FOX_NEW(uint16_t, 65536);
    float *values = FOX_NEW(float, 65536);
    for (int i = 0; i < 65536; i++) {
        bits[i] = (uint16_t)i;
    }
    for (int k = 0; k < 2; k++) {
        snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"%s\",\"shape\":[65536],\"data_offsets\":[0,131072]}}",
                 dtypes[k]);
        files_write_safetensors(files_path(t, path, "narrow.safetensors"), header, bits, 131072);
        SafeTensors st;
        FoxError err = {""};
        if (!check(t, safetensors_open(path, &st, &err), "%s", err.text)) {
            continue;
        }
        check(t, safetensors_read_float(&st, &st.tensors[0], 0, 65536, values, &err), "%s", err.text);
        check(t, !safetensors_read_int32(&st, &st.tensors[0], (int32_t *)values + 1, NULL), "int32 from %s", dtypes[k]);
        int wrong = 0, fractions = 1 << fraction_bits[k], top = (1 << (15 - fraction_bits[k])) - 1;
        for (int i = 0; i < 65536; i++) {
            int fraction = i % fractions, exponent = i / fractions & top;
            double want = exponent == 0 ? ldexp(fraction, 1 - bias[k] - fraction_bits[k])
                                        : ldexp(fractions + fraction, exponent - bias[k] - fraction_bits[k]);
            want = exponent < top ? want : fraction == 0 ? (double)INFINITY : (double)NAN;
            double found = (double)values[i];
            bool same = isnan(want) ? isnan(found) : fabs(found) == want && !signbit(found) == (i < 32768);
            wrong += !same;
        }
        check(t, wrong == 0, "%s: %d of 65536 values are wrong", dtypes[k], wrong);
        safetensors_close(&st);
    }
    free(bits);
    free(values);
}

/* Single bytes of a good file changed at random: it opens or fails cleanly, and what opens can be read. */
static void test_files_safetensors_mutations(Tests *t, FilesRandom *r) {
    char path[512];
    const char *header = TWO("[8,16]", "[0,8]");
    char bytes[512];
    uint64_t length = strlen(header);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, length);
    memset(bytes + 8 + length, 7, 16);
    for (int i = 0; i < (t->quick ? 200 : 2000); i++) {
        char copy[512];
        memcpy(copy, bytes, sizeof copy);
        int at = files_below(r, (int)length + 8);
        copy[at] = (char)(files_below(r, 2) ? '0' + files_below(r, 10) : (int)files_random(r));
        files_write(files_path(t, path, "mutated.safetensors"), copy, length + 24);
        SafeTensors st;
        FoxError err = {""};
        if (!safetensors_open(path, &st, &err)) {
            check(t, err.text[0] != '\0' && strchr(err.text, '\n') == NULL, "byte %d: no clean error: %s", at,
                  err.text);
            continue;
        }
        for (int k = 0; k < st.count; k++) {
            float out[16];
            const SafeTensor *s = &st.tensors[k];
            check(t, s->count <= 16 && s->end <= st.data_size, "byte %d: too many elements", at);
            bool narrow = strcmp(s->dtype, "F32") == 0 || strcmp(s->dtype, "F16") == 0 || strcmp(s->dtype, "BF16") == 0;
            check(t, safetensors_read_float(&st, s, 0, s->count, out, &err) == narrow, "byte %d: %s", at, err.text);
        }
        safetensors_close(&st);
    }
}

static void test_files_safetensors(Tests *t, FilesRandom *r) {
    char path[512];
    static const char data[32];
    files_path(t, path, "case.safetensors");
    for (size_t i = 0; i < sizeof safetensors_cases / sizeof safetensors_cases[0]; i++) {
        FoxError err = {""};
        SafeTensors st;
        const char *header = safetensors_cases[i].header, *error = safetensors_cases[i].error;
        files_write_safetensors(path, header, data, (size_t)safetensors_cases[i].size);
        bool ok = safetensors_open(path, &st, &err);
        if (error == NULL) {
            check(t, ok, "%s: %s", header, err.text);
            for (int k = 1; ok && k < st.count; k++) {
                check(t, strcmp(st.tensors[k - 1].name, st.tensors[k].name) < 0, "%s: not sorted by name", header);
            }
        } else {
            files_failed(t, ok, &err, error, header);
        }
        if (ok) {
            safetensors_close(&st);
        }
    }
    FoxError err = {""};
    const char *names[] = {"a"};
    const int ndim[] = {1};
    const int64_t shapes[][2] = {{100000, 1}};
    float zeros[2] = {0, 0};
    SafeTensors st;
    files_failed(t, safetensors_create("/dev/full", 1, names, ndim, shapes, NULL, &err), &err, "No space", "a full disk");
    err.text[0] = '\0';
    files_failed(t, safetensors_create(files_path(t, path, "none/x"), 1, names, ndim, shapes, NULL, &err), &err, "cannot create",
                 "no directory");
    err.text[0] = '\0';
    bool ok = safetensors_create(files_path(t, path, "x"), 1, names, ndim, shapes, NULL, &err) && safetensors_edit(path, &st, &err);
    if (check(t, ok, "a file to write into: %s", err.text)) {
        files_failed(t, safetensors_write_float(&st, &st.tensors[0], 99999, 2, zeros, &err), &err, "from number 99999",
                     "writing past the end");
        safetensors_close(&st);
    }
    test_files_safetensors_lengths(t);
    test_files_safetensors_round_trip(t, r);
    test_files_safetensors_narrow(t);
    test_files_safetensors_mutations(t, r);
}

/* A generator of its own for every run; the key is printed when something fails. */
static FilesRandom files_fresh(void) {
    FilesRandom r = {fox_mix64((uint64_t)time(NULL) ^ (uint64_t)getpid() << 32), 0};
    return r;
}

static void test_files(Tests *t) {
    FilesRandom r = files_fresh();
    int failed = t->failed;
    test_files_basics(t);
    test_files_json(t, &r);
    test_files_safetensors(t, &r);
    if (t->failed > failed) {
        printf("test_files: the random key was 0x%016" PRIx64 "\n", r.key);
    }
}

#endif

#include "safetensors.h"

#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sys/stat.h>
#include <unistd.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors files are little-endian, and this code copies their numbers as they are"
#endif

#define MAX_HEADER_BYTES 100000000 /* the format's own limit */
#define PIECE 65536                /* elements converted at a time */

static const struct {
    const char *name;
    int bytes;
} dtypes[] = {
    {"F32", 4}, {"BF16", 2}, {"F16", 2},     {"I32", 4},     {"I64", 8},     {"U8", 1},  {"BOOL", 1}, {"F64", 8},
    {"I8", 1},  {"I16", 2},  {"U16", 2},     {"U32", 4},     {"U64", 8},     {"C64", 8}, {"F8_E4M3", 1},
    {"F8_E5M2", 1}, {"F8_E8M0", 1},
};

/* Bytes of an element, 0 for an unknown name. */
static int dtype_bytes(const char *name) {
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        if (strcmp(dtypes[i].name, name) == 0) {
            return dtypes[i].bytes;
        }
    }
    return 0;
}

/* dtype of one entry of the header. */
static bool parse_dtype(const SafeTensors *st, const Json *entry, SafeTensor *t, FoxError *err) {
    const Json *dtype = json_get(entry, "dtype");
    if (dtype == NULL || dtype->type != JSON_STRING) {
        return fox_fail(err, "%s: tensor %s has no dtype", st->path, t->name);
    }
    if (dtype->string_length >= sizeof t->dtype || dtype_bytes(dtype->string) == 0) {
        return fox_fail(err, "%s: tensor %s has an unknown dtype, expected F32, BF16, F16, I32 or the like", st->path,
                        t->name);
    }
    memcpy(t->dtype, dtype->string, dtype->string_length + 1);
    return true;
}

static bool parse_shape(const SafeTensors *st, const Json *entry, SafeTensor *t, FoxError *err) {
    const Json *shape = json_get(entry, "shape");
    if (shape == NULL || shape->type != JSON_ARRAY || shape->count > SAFETENSORS_MAX_DIMS) {
        return fox_fail(err, "%s: tensor %s has no shape of at most %d numbers", st->path, t->name,
                        SAFETENSORS_MAX_DIMS);
    }
    t->count = 1;
    for (const Json *n = shape->first; n != NULL; n = n->next) {
        if (n->type != JSON_NUMBER || !n->is_integer || n->integer < 0 ||
            __builtin_mul_overflow(t->count, n->integer, &t->count)) {
            return fox_fail(err, "%s: the shape of tensor %s is not made of whole numbers of sensible size", st->path,
                            t->name);
        }
        t->shape[t->ndim++] = n->integer;
    }
    return true;
}

static bool parse_offsets(const SafeTensors *st, const Json *entry, SafeTensor *t, FoxError *err) {
    const Json *offsets = json_get(entry, "data_offsets");
    const Json *begin = offsets != NULL && offsets->type == JSON_ARRAY && offsets->count == 2 ? offsets->first : NULL;
    const Json *end = begin != NULL ? begin->next : NULL;
    if (end == NULL || !begin->is_integer || !end->is_integer) {
        return fox_fail(err, "%s: tensor %s has no data_offsets of two whole numbers", st->path, t->name);
    }
    t->begin = begin->integer;
    t->end = end->integer;
    if (t->begin < 0 || t->end < t->begin || t->end > st->data_size) {
        return fox_fail(err, "%s: tensor %s lies at bytes %" PRId64 " to %" PRId64 " of the data, which has %" PRId64
                        " bytes; the file is cut off or damaged", st->path, t->name, t->begin, t->end, st->data_size);
    }
    int64_t bytes;
    if (__builtin_mul_overflow(t->count, (int64_t)dtype_bytes(t->dtype), &bytes) || bytes != t->end - t->begin) {
        return fox_fail(err, "%s: tensor %s has %" PRId64 " elements of %s but %" PRId64 " bytes", st->path, t->name,
                        t->count, t->dtype, t->end - t->begin);
    }
    return true;
}

static bool parse_tensor(const SafeTensors *st, const Json *entry, SafeTensor *t, FoxError *err) {
    for (size_t i = 0; i < entry->key_length; i++) {
        if ((unsigned char)entry->key[i] < 0x20) {
            return fox_fail(err, "%s: the name of a tensor holds a control character", st->path);
        }
    }
    t->name = entry->key;
    if (entry->type != JSON_OBJECT) {
        return fox_fail(err, "%s: tensor %s: expected an object with dtype, shape and data_offsets", st->path, t->name);
    }
    return parse_dtype(st, entry, t, err) && parse_shape(st, entry, t, err) && parse_offsets(st, entry, t, err);
}

static bool check_metadata(const SafeTensors *st, const Json *metadata, FoxError *err) {
    bool ok = metadata->type == JSON_OBJECT;
    for (const Json *m = metadata->first; ok && m != NULL; m = m->next) {
        ok = m->type == JSON_STRING;
    }
    return ok || fox_fail(err, "%s: __metadata__ is not an object of strings", st->path);
}

static int compare_places(const void *a, const void *b) {
    const SafeTensor *x = (const SafeTensor *)a, *y = (const SafeTensor *)b;
    if (x->begin != y->begin) {
        return x->begin < y->begin ? -1 : 1;
    }
    return (x->end > y->end) - (x->end < y->end);
}

static int compare_names(const void *a, const void *b) {
    return strcmp(((const SafeTensor *)a)->name, ((const SafeTensor *)b)->name);
}

/* Every byte of the data belongs to exactly one tensor. Leaves the tensors sorted by place. */
static bool check_tiling(SafeTensors *st, FoxError *err) {
    qsort(st->tensors, (size_t)st->count, sizeof *st->tensors, compare_places);
    int64_t at = 0;
    for (int i = 0; i < st->count; i++) {
        const SafeTensor *t = &st->tensors[i];
        if (t->begin != at) {
            return fox_fail(err, "%s: tensor %s begins at byte %" PRId64 " of the data, %s byte %" PRId64, st->path,
                            t->name, t->begin, t->begin < at ? "before the other's end at" : "leaving a gap from", at);
        }
        at = t->end;
    }
    return at == st->data_size || fox_fail(err, "%s: the data has %" PRId64 " bytes, the tensors only %" PRId64,
                                           st->path, st->data_size, at);
}

static bool parse_header(SafeTensors *st, FoxError *err) {
    const Json *root = st->header.root;
    if (root->type != JSON_OBJECT) {
        return fox_fail(err, "%s: the header is not a JSON object", st->path);
    }
    st->tensors = FOX_NEW(SafeTensor, root->count);
    for (const Json *entry = root->first; entry != NULL; entry = entry->next) {
        if (strcmp(entry->key, "__metadata__") == 0) {
            if (!check_metadata(st, entry, err)) {
                return false;
            }
        } else if (!parse_tensor(st, entry, &st->tensors[st->count++], err)) {
            return false;
        }
    }
    if (!check_tiling(st, err)) {
        return false;
    }
    qsort(st->tensors, (size_t)st->count, sizeof *st->tensors, compare_names);
    return true;
}

/* Reads and parses the header of the open file. */
static bool read_header(SafeTensors *st, FoxError *err) {
    struct stat info;
    if (fstat(st->fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        return fox_fail(err, "%s: is not a regular file", st->path);
    }
    int64_t size = (int64_t)info.st_size;
    if (size < 8) {
        return fox_fail(err, "%s: has %" PRId64 " bytes, too few for a safetensors file", st->path, size);
    }
    uint64_t header_size;
    if (!file_read_at(st->fd, st->path, 0, 8, &header_size, err)) {
        return false;
    }
    if (header_size > MAX_HEADER_BYTES || (int64_t)header_size > size - 8) {
        return fox_fail(err, "%s: claims a header of %" PRIu64 " bytes in a file of %" PRId64
                        "; it is cut off or no safetensors file", st->path, header_size, size);
    }
    st->data_start = 8 + (int64_t)header_size;
    st->data_size = size - st->data_start;
    char *text = FOX_NEW(char, header_size + 1);
    char what[sizeof st->path + 16];
    snprintf(what, sizeof what, "%s (header)", st->path);
    bool ok = file_read_at(st->fd, st->path, 8, (int64_t)header_size, text, err) &&
              json_parse(text, header_size, what, &st->header, err) && parse_header(st, err);
    free(text);
    return ok;
}

static bool open_as(const char *path, int mode, SafeTensors *st, FoxError *err) {
    memset(st, 0, sizeof *st);
    st->fd = -1;
    if (strlen(path) >= sizeof st->path) {
        return fox_fail(err, "%.64s...: the path is longer than %zu bytes", path, sizeof st->path - 1);
    }
    memcpy(st->path, path, strlen(path) + 1);
    st->fd = open(path, mode | O_CLOEXEC | O_NONBLOCK); // a named pipe must not make open() wait
    if (st->fd < 0) {
        return fox_fail(err, "%s: cannot open: %s", path, strerror(errno));
    }
    if (!read_header(st, err)) {
        safetensors_close(st);
        return false;
    }
    return true;
}

bool safetensors_open(const char *path, SafeTensors *st, FoxError *err) {
    return open_as(path, O_RDONLY, st, err);
}

bool safetensors_edit(const char *path, SafeTensors *st, FoxError *err) {
    return open_as(path, O_RDWR, st, err);
}

void safetensors_close(SafeTensors *st) {
    if (st->fd >= 0) {
        close(st->fd);
    }
    free(st->tensors);
    json_free(&st->header);
    memset(st, 0, sizeof *st);
    st->fd = -1;
}

const SafeTensor *safetensors_find(const SafeTensors *st, const char *name) {
    int low = 0, high = st->count;
    while (low < high) {
        int middle = low + (high - low) / 2;
        int order = strcmp(name, st->tensors[middle].name);
        if (order == 0) {
            return &st->tensors[middle];
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

const char *safetensors_metadata(const SafeTensors *st, const char *key) {
    const Json *value = json_get(json_get(st->header.root, "__metadata__"), key);
    return value != NULL ? value->string : NULL;
}

static float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Exact: every half is a float. */
static float float_from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 0) {
        float magnitude = (float)fraction * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return float_from_bits(sign | wide << 23 | fraction << 13);
}

/* BF16 or F16, which are half as wide as what they become. */
static bool read_narrow(const SafeTensors *st, const SafeTensor *t, int64_t start, int64_t count, float *out,
                        FoxError *err) {
    bool bf16 = strcmp(t->dtype, "BF16") == 0;
    uint16_t *piece = FOX_NEW(uint16_t, count < PIECE ? count : PIECE);
    bool ok = true;
    while (ok && count > 0) {
        int64_t n = count < PIECE ? count : PIECE;
        ok = file_read_at(st->fd, st->path, st->data_start + t->begin + 2 * start, 2 * n, piece, err);
        for (int64_t i = 0; ok && i < n; i++) {
            out[i] = bf16 ? float_from_bits((uint32_t)piece[i] << 16) : float_from_half(piece[i]);
        }
        start += n;
        out += n;
        count -= n;
    }
    free(piece);
    return ok;
}

bool safetensors_read_float(const SafeTensors *st, const SafeTensor *t, int64_t start, int64_t count, float *out,
                            FoxError *err) {
    if (start < 0 || count < 0 || start > t->count || count > t->count - start) {
        return fox_fail(err, "%s: tensor %s has %" PRId64 " elements, %" PRId64 " were asked for from number %" PRId64,
                        st->path, t->name, t->count, count, start);
    }
    if (strcmp(t->dtype, "F32") == 0) {
        return file_read_at(st->fd, st->path, st->data_start + t->begin + 4 * start, 4 * count, out, err);
    }
    if (strcmp(t->dtype, "BF16") == 0 || strcmp(t->dtype, "F16") == 0) {
        return read_narrow(st, t, start, count, out, err);
    }
    return fox_fail(err, "%s: tensor %s has dtype %s, expected F32, BF16 or F16", st->path, t->name, t->dtype);
}

bool safetensors_read_int32(const SafeTensors *st, const SafeTensor *t, int32_t *out, FoxError *err) {
    if (strcmp(t->dtype, "I32") != 0) {
        return fox_fail(err, "%s: tensor %s has dtype %s, expected I32", st->path, t->name, t->dtype);
    }
    return file_read_at(st->fd, st->path, st->data_start + t->begin, 4 * t->count, out, err);
}

/* The JSON header, padded with spaces so that the data starts at a multiple of 8. The caller frees *text. */
static bool format_header(int count, const char *const *names, const int *ndim, const int64_t (*shapes)[2],
                          const char *const *metadata, char **text, size_t *size) {
    FILE *out = open_memstream(text, size);
    if (out == NULL) {
        return false;
    }
    const char *separator = "";
    fputc('{', out);
    if (metadata != NULL && metadata[0] != NULL) {
        fputs("\"__metadata__\":{", out);
        for (int i = 0; metadata[i] != NULL; i += 2, separator = ",") {
            fputs(separator, out);
            json_write_string(out, metadata[i]);
            fputc(':', out);
            json_write_string(out, metadata[i + 1]);
        }
        fputc('}', out);
        separator = ",";
    }
    int64_t at = 0;
    for (int i = 0; i < count; i++, separator = ",") {
        int64_t bytes = 4 * shapes[i][0] * (ndim[i] == 2 ? shapes[i][1] : 1);
        fputs(separator, out);
        json_write_string(out, names[i]);
        fprintf(out, ":{\"dtype\":\"F32\",\"shape\":[%" PRId64, shapes[i][0]);
        if (ndim[i] == 2) {
            fprintf(out, ",%" PRId64, shapes[i][1]);
        }
        fprintf(out, "],\"data_offsets\":[%" PRId64 ",%" PRId64 "]}", at, at + bytes);
        at += bytes;
    }
    fputc('}', out);
    for (long length = ftell(out); length % 8 != 0; length++) {
        fputc(' ', out);
    }
    bool ok = !ferror(out);
    return fclose(out) == 0 && ok;
}

bool safetensors_create(const char *path, int count, const char *const *names, const int *ndim, const int64_t (*shapes)[2],
                        const char *const *metadata, FoxError *err) {
    char *header = NULL;
    size_t header_size = 0;
    if (!format_header(count, names, ndim, shapes, metadata, &header, &header_size)) {
        free(header);
        return fox_fail(err, "%s: out of memory for the header", path);
    }
    FILE *out = fopen(path, "wbe");
    uint64_t length = header_size;
    int64_t bytes = 8 + (int64_t)header_size;
    for (int i = 0; i < count; i++) {
        bytes += 4 * shapes[i][0] * (ndim[i] == 2 ? shapes[i][1] : 1);
    }
    bool ok = out == NULL || (fwrite(&length, 8, 1, out) == 1 && fwrite(header, 1, header_size, out) == header_size &&
                              fflush(out) == 0 && ftruncate(fileno(out), (off_t)bytes) == 0);
    if (!ok) {
        fox_fail(err, "%s: cannot write: %s", path, strerror(errno));
    }
    free(header);
    return file_close(out, path, err) && ok;
}

bool safetensors_write_float(const SafeTensors *st, const SafeTensor *t, int64_t start, int64_t count, const float *values,
                             FoxError *err) {
    if (strcmp(t->dtype, "F32") != 0 || start < 0 || count < 0 || start > t->count || count > t->count - start) {
        return fox_fail(err, "%s: tensor %s has %" PRId64 " elements of %s, %" PRId64 " floats were to be written from number %" PRId64,
                        st->path, t->name, t->count, t->dtype, count, start);
    }
    const char *p = (const char *)values;
    int64_t bytes = 4 * count, offset = st->data_start + t->begin + 4 * start;
    while (bytes > 0) {
        ssize_t n = pwrite(st->fd, p, (size_t)fox_min64(bytes, 1 << 24), (off_t)offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return fox_fail(err, "%s: cannot write: %s", st->path, strerror(n < 0 ? errno : ENOSPC));
        }
        p += n;
        offset += n;
        bytes -= n;
    }
    return true;
}

bool safetensors_sync(const SafeTensors *st, FoxError *err) {
    return fsync(st->fd) == 0 || fox_fail(err, "%s: cannot write: %s", st->path, strerror(errno));
}

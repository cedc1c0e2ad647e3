/* Fuzzes the safetensors reader: any file opens or fails cleanly; of what opens, the tensors tile the data exactly and
 * every element can be read. The input's first byte chooses what the rest is: a whole file; a header; or a header in
 * shorthand, where small bytes stand for the pieces that headers are made of, so that inputs reach the checks behind
 * the JSON reader without a corpus of seeds. */
#define _GNU_SOURCE
#include "../train/checkpoint.h"

#include <sys/mman.h>
#include <unistd.h>

static void require(bool ok) {
    if (!ok) {
        abort();
    }
}

static void write_all(int fd, const void *data, size_t size) {
    require(write(fd, data, size) == (ssize_t)size);
}

static void check_open(SafeTensors *st) {
    int64_t covered = 0;
    for (int i = 0; i < st->count; i++) {
        const SafeTensor *t = &st->tensors[i];
        require(t->begin >= 0 && t->begin <= t->end && t->end <= st->data_size && t->ndim <= SAFETENSORS_MAX_DIMS);
        require(safetensors_find(st, t->name) == t && (i == 0 || strcmp(t[-1].name, t->name) < 0));
        covered += t->end - t->begin;
        FoxError err = {""};
        require(t->count <= 1 << 20 || t->end == t->begin + t->count);
        float *values = FOX_NEW(float, t->count);
        bool narrow = strcmp(t->dtype, "F32") == 0 || strcmp(t->dtype, "BF16") == 0 || strcmp(t->dtype, "F16") == 0;
        require(safetensors_read_float(st, t, 0, t->count, values, &err) == narrow);
        require(!safetensors_read_float(st, t, 1, t->count, values, NULL));
        bool int32 = strcmp(t->dtype, "I32") == 0;
        require(safetensors_read_int32(st, t, (int32_t *)values, NULL) == int32);
        free(values);
    }
    require(covered == st->data_size);
    FoxConfig config;
    FoxError err = {""};
    if (checkpoint_config_from_metadata(st, &config, &err)) {
        require(fox_config_check(&config, NULL));
    } else {
        require(err.text[0] != '\0' && strchr(err.text, '\n') == NULL);
    }
}

static const char *const shorthand[] = {
    "{",
    "}",
    ",",
    "\"a\":",
    "\"b\":",
    "\"c\":",
    "{\"dtype\":\"F32\",\"shape\":[",
    "{\"dtype\":\"BF16\",\"shape\":[",
    "{\"dtype\":\"I32\",\"shape\":[",
    "{\"dtype\":\"U8\",\"shape\":[",
    "],\"data_offsets\":[",
    "]}",
    "0",
    "1",
    "2",
    "4",
    "8",
    "16",
    "64",
    "4294967296",
    "9223372036854775807",
    "\"__metadata__\":{",
    "\"hidden_size\":\"32\"",
    "\"num_heads\":\"2\"",
    "\"qk_norm\":\"True\"",
    "\"vocab_size\":\"",
};

/* Writes a file with `size` bytes of header and `data_size` bytes of data. */
static void write_file(int fd, const void *header, uint64_t size, size_t data_size) {
    static const uint8_t zeros[256];
    write_all(fd, &size, 8);
    write_all(fd, header, size);
    write_all(fd, zeros, data_size);
}

static void write_shorthand(int fd, const uint8_t *data, size_t size, size_t data_size) {
    char *header = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&header, &length);
    for (size_t i = 0; i < size; i++) {
        if (data[i] < sizeof shorthand / sizeof shorthand[0]) {
            fputs(shorthand[data[i]], out);
        } else {
            fputc(data[i], out);
        }
    }
    fclose(out);
    write_file(fd, header, length, data_size);
    free(header);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) {
        return 0;
    }
    int fd = memfd_create("fuzz", MFD_CLOEXEC), mode = data[0] % 3;
    size_t data_size = data[0] / 3; /* 0 to 85 */
    require(fd >= 0);
    if (mode == 0) {
        write_all(fd, data + 1, size - 1);
    } else if (mode == 1) {
        write_file(fd, data + 1, size - 1, data_size);
    } else {
        write_shorthand(fd, data + 1, size - 1, data_size);
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    SafeTensors st;
    FoxError err = {""};
    if (safetensors_open(path, &st, &err)) {
        check_open(&st);
        safetensors_close(&st);
    } else {
        require(err.text[0] != '\0' && strchr(err.text, '\n') == NULL && st.fd == -1 && st.tensors == NULL);
    }
    close(fd);
    return 0;
}

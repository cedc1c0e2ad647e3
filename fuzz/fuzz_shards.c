/* Fuzzes the shard reader: any bytes as a shard are refused with one line, or give batches of tokens in range.
 *
 * Input: 8 bytes of settings (T, B, step, ranks, seek, what to repair), then the file. Repairing the header lets inputs
 * past the size check, which random bytes hardly ever pass. */
#define _GNU_SOURCE
#include "../dataloader.h"

#include <sys/mman.h>

enum { SETTINGS = 8, REPAIR_MAGIC = 1, REPAIR_COUNT = 2, REPAIR_VOCAB = 4, SHUFFLE = 8, SHRINK = 16, WINDOWS = 32 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok, const char *what) {
    if (!ok) {
        fprintf(stderr, "fuzz_shards: %s\n", what);
        abort();
    }
}

/* A memory file of the bytes, with its header repaired as asked. */
static int write_shard(const uint8_t *bytes, size_t size, int repair) {
    uint8_t *copy = (uint8_t *)malloc(size + 1);
    memcpy(copy, bytes, size);
    if (size >= DATALOADER_HEADER_BYTES) {
        int32_t start[2] = {DATALOADER_MAGIC, repair & WINDOWS ? DATALOADER_VERSION_WINDOWS : DATALOADER_VERSION};
        int32_t count = (int32_t)((size - DATALOADER_HEADER_BYTES) / 2), vocab = 65536;
        if (repair & REPAIR_MAGIC) {
            memcpy(copy, start, 8);
        }
        if (repair & REPAIR_COUNT) {
            memcpy(copy + 8, &count, 4);
        }
        if (repair & REPAIR_VOCAB) {
            memcpy(copy + 12, &vocab, 4);
        }
    }
    int fd = memfd_create("shard", MFD_CLOEXEC);
    require(fd >= 0 && write(fd, copy, size) == (ssize_t)size, "cannot write the memory file");
    free(copy);
    return fd;
}

static void take_batches(DataLoader *loader, int count, int fd, bool shrink) {
    int64_t cells = (int64_t)loader->spec.B * loader->spec.T;
    int32_t *tokens = FOX_NEW(int32_t, cells), *targets = FOX_NEW(int32_t, cells);
    for (int i = 0; i < count; i++) {
        FoxError err = {{0}};
        if (!dataloader_next(loader, tokens, targets, &err)) {
            require(err.text[0] != '\0' && strchr(err.text, '\n') == NULL, "an error must be one line");
            break;
        }
        for (int64_t k = 0; k < cells; k++) {
            require(tokens[k] >= 0 && tokens[k] < loader->vocab_size && targets[k] >= 0 &&
                        targets[k] < loader->vocab_size,
                    "a token is out of range");
        }
        if (shrink && i == count / 2) {
            require(ftruncate(fd, DATALOADER_HEADER_BYTES / 2) == 0, "cannot shrink the memory file");
        }
    }
    free(tokens);
    free(targets);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < SETTINGS) {
        return 0;
    }
    int flags = data[5];
    DataSpec spec = {1 + data[0], 1 + data[1] % 8, data[2], (flags & SHUFFLE) != 0,
                     data[2],     data[6],         0,       1 + data[4] % 4};
    spec.rank = data[3] % spec.size;
    char path[64];
    int fd = write_shard(data + SETTINGS, size - SETTINGS, flags);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    DataLoader loader;
    FoxError err = {{0}};
    if (dataloader_open(&loader, path, DATALOADER_TRAIN_PATTERN, &spec, &err)) {
        take_batches(&loader, data[7] % 8, fd, (flags & SHRINK) != 0);
        bool sought = dataloader_seek(&loader, (int64_t)((uint64_t)data[7] << 56 | data[6]), &err);
        take_batches(&loader, sought ? 3 : 1, fd, false);
        dataloader_close(&loader);
    } else {
        require(err.text[0] != '\0' && strchr(err.text, '\n') == NULL, "an error must be one line");
    }
    close(fd);
    return 0;
}

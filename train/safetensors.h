/* safetensors files: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, data.
 * The reader trusts nothing: every offset and shape is checked against the file before a byte of data is used. */
#ifndef FOX_SAFETENSORS_H
#define FOX_SAFETENSORS_H

#include "json.h"

#define SAFETENSORS_MAX_DIMS 8

typedef struct SafeTensor {
    const char *name;
    char dtype[8]; /* "F32", "BF16", "I32", ... */
    int ndim;
    int64_t shape[SAFETENSORS_MAX_DIMS];
    int64_t count;      /* elements */
    int64_t begin, end; /* bytes from the start of the data */
} SafeTensor;

typedef struct SafeTensors {
    char path[1024];
    int fd;
    int count;
    SafeTensor *tensors; /* sorted by name */
    int64_t data_start, data_size;
    JsonDocument header; /* json_get(header.root, "__metadata__") holds the metadata */
} SafeTensors;

/* Opens and checks a file: header length, JSON, dtypes, shapes against byte counts, no overlap, no gap, no data past
 * the end. Close with safetensors_close. */
bool safetensors_open(const char *path, SafeTensors *, FoxError *);
void safetensors_close(SafeTensors *);

/* The tensor of that name or NULL. */
const SafeTensor *safetensors_find(const SafeTensors *, const char *name);

/* A metadata string, or NULL. */
const char *safetensors_metadata(const SafeTensors *, const char *key);

/* Reads `count` elements from `start` of a tensor as float32 (F32, or BF16 and F16 widened). Other dtypes fail. */
bool safetensors_read_float(const SafeTensors *, const SafeTensor *, int64_t start, int64_t count, float *out,
                            FoxError *);
/* Reads a whole I32 tensor. */
bool safetensors_read_int32(const SafeTensors *, const SafeTensor *, int32_t *out, FoxError *);

/* Creates a float32 file with room for its tensors: names, shapes ([count][2], ndim 1 or 2) and metadata (pairs key, value,
 * ..., NULL) are written, the data is to follow. Fails with the system's reason; the caller removes what was written. */
bool safetensors_create(const char *path, int count, const char *const *names, const int *ndim, const int64_t (*shapes)[2],
                        const char *const *metadata, FoxError *);

/* Opens a file of safetensors_create to write into it. Several processes may, each its own floats. */
bool safetensors_edit(const char *path, SafeTensors *, FoxError *);
/* Writes `count` floats from `start` of an F32 tensor. Fails with the system's reason (a full disk, say). */
bool safetensors_write_float(const SafeTensors *, const SafeTensor *, int64_t start, int64_t count, const float *, FoxError *);
/* Waits until the disk has what was written. */
bool safetensors_sync(const SafeTensors *, FoxError *);

#endif

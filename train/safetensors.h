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

/* What the writer asks for while it streams: fill `out` with `count` floats of tensor `index` from element `start`. */
typedef bool (*SafeTensorsSource)(void *context, int index, int64_t start, int64_t count, float *out);

/* Writes a float32 file: names, shapes ([count][2], ndim 1 or 2) and metadata (pairs key, value, ..., NULL) given, data
 * from the source in pieces, so that no second copy of a model is needed. Syncs the file. Fails with the system's
 * reason (a full disk, say); the caller removes what was written. */
bool safetensors_write(const char *path, int count, const char *const *names, const int *ndim,
                       const int64_t (*shapes)[2], const char *const *metadata, SafeTensorsSource source, void *context,
                       FoxError *err);

#endif

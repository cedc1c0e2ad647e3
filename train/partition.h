/* How the flat parameter space is divided among ranks.
 *
 *     bucket 0            bucket 1            ...      the last, shorter
 *     | 0 | 1 | 2 | 3 |   | 0 | 1 | 2 | 3 |            | 0 | 1 | 2 | 3 |      pieces of ranks 0 to 3
 *
 * Gradients travel bucket by bucket, so that the first ones leave while backward still makes the others; within a bucket every
 * rank owns one piece of the same length, so that all links carry the same. What a rank owns of an array (its share) is kept
 * densely: its piece of bucket 0, then of bucket 1, and so on. The last pieces reach past the end of the space: arrays that
 * buckets are exchanged in are `padded` long, and a rank may own nothing of the last bucket. For one rank there is one bucket:
 * everything. */
#ifndef FOX_PARTITION_H
#define FOX_PARTITION_H

#include "common.h"

#define PARTITION_GRAIN 4096          /* floats; the length of every piece is a multiple */
#define PARTITION_BUCKET (16 << 20)   /* floats in a bucket at most, about: 64 MiB of float32 */
#define PARTITION_BUCKETS 8           /* that a small space is cut into, where pieces do not get shorter than a grain */

typedef struct Partition {
    int64_t total;  /* floats in the space */
    int64_t bucket; /* floats in every bucket but the last */
    int64_t padded; /* floats in all buckets together */
    int ranks, buckets;
} Partition;

/* `count` floats of the space from `start`, which lie at `local` of the owner's share. */
typedef struct Piece {
    int64_t start, count, local;
} Piece;

static inline Partition partition_create(int64_t total, int ranks) {
    Partition p;
    int64_t unit = (int64_t)ranks * PARTITION_GRAIN;
    p.total = total;
    p.ranks = ranks;
    p.bucket = fox_round_up(fox_min64(PARTITION_BUCKET, (total + PARTITION_BUCKETS - 1) / PARTITION_BUCKETS), unit);
    p.padded = fox_round_up(total, unit);
    p.bucket = ranks == 1 ? p.padded : p.bucket;
    p.buckets = (int)((p.padded + p.bucket - 1) / p.bucket);
    return p;
}

static inline int64_t partition_start(const Partition *p, int bucket) {
    return fox_min64(bucket * p->bucket, p->padded);
}

/* Length of each rank's piece of a bucket, with what reaches past the end. */
static inline int64_t partition_piece_length(const Partition *p, int bucket) {
    return (partition_start(p, bucket + 1) - partition_start(p, bucket)) / p->ranks;
}

/* What a rank owns of a bucket, without what reaches past the end; count may be 0. */
static inline Piece partition_piece(const Partition *p, int bucket, int rank) {
    Piece piece;
    int64_t length = partition_piece_length(p, bucket);
    piece.start = fox_min64(partition_start(p, bucket) + rank * length, p->total);
    piece.count = fox_min64(length, p->total - piece.start);
    piece.local = bucket * (p->bucket / p->ranks);
    return piece;
}

/* Length of a share, the same for every rank. */
static inline int64_t partition_share(const Partition *p) {
    return p->padded / p->ranks;
}

/* The part of a piece within `count` floats from `start`; its count is 0 when there is none. */
static inline Piece partition_within(Piece piece, int64_t start, int64_t count) {
    int64_t low = piece.start > start ? piece.start : start, high = fox_min64(piece.start + piece.count, start + count);
    piece.local += low - piece.start;
    piece.start = low;
    piece.count = high > low ? high - low : 0;
    return piece;
}

/* The bucket that float `at` lies in. */
static inline int partition_find(const Partition *p, int64_t at) {
    return (int)(at / p->bucket);
}

#endif

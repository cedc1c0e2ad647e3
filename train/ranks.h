/* The processes of a run: who I am, how many we are, and the few things we do together.
 *
 * train/launch.h finds out who we are. Then every rank has two TCP connections to rank 0: one for what the main threads do
 * together (a star: rank 0 receives, adds in rank order, sends), one for the watch (train/watch.h), which ends all ranks when
 * one is lost. GPUs exchange gradients and parameters among themselves (cuda/collectives.h) and use these for the rest.
 *
 * With one rank every function here is trivial. Functions are collective unless they say otherwise: every rank calls them in
 * the same order. They return when done; a rank that is lost meanwhile ends the process. */
#ifndef FOX_RANKS_H
#define FOX_RANKS_H

#include "common.h"

typedef struct Ranks {
    int rank, size;             /* of the whole run */
    int local_rank, local_size; /* among the ranks of this machine */
    struct RanksLinks *links;   /* NULL: one rank */
} Ranks;

#define RANKS_ALONE {0, 1, 0, 1, NULL}

/* Finds out who started us, and meets the other ranks. Call once, before anything prints. */
bool ranks_init(Ranks *, int *argc, char ***argv, FoxError *);
/* Leaves together. */
void ranks_finish(Ranks *);

/* ---- together */

/* In place sums over ranks, added in the order of the ranks, the same result on every rank. */
void ranks_sum_float(const Ranks *, float *values, int64_t count);
void ranks_sum_double(const Ranks *, double *values, int64_t count);
/* values: [size, piece]. Row r of the sum over ranks goes to rank r, the other rows are junk afterwards. The same order. */
void ranks_scatter_sum(const Ranks *, float *values, int64_t piece);
/* bytes: [size, piece]. Every rank gives its own row and gets all rows. */
void ranks_gather(const Ranks *, void *bytes, int64_t piece);
/* Largest of the ranks' values. */
int ranks_max_int(const Ranks *, int value);
/* Copies root 0's bytes to all. */
void ranks_broadcast(const Ranks *, void *bytes, int64_t count);
/* Returns when all ranks have come here. */
void ranks_barrier(const Ranks *);
/* True on every rank when `value` is the same on all of them. */
bool ranks_agree(const Ranks *, uint64_t value);
/* True on every rank when `ok` is true on all of them. Otherwise only the lowest rank that failed keeps its message. */
bool ranks_everyone(const Ranks *, bool ok, FoxError *);

/* ---- alone */

/* "rank 3 (host)". */
void ranks_name(const Ranks *, int rank, char text[96]);

/* Ranks on one machine share its cores: more threads than cores would wait for each other. OMP_NUM_THREADS overrides. */
void ranks_share_cores(const Ranks *);

/* What no caller can mend: ends all ranks, with one line that names this one. */
FOX_PRINTF(2, 3) FOX_NORETURN void ranks_fail(const Ranks *, const char *format, ...);

/* What the watch is told. The main thread made progress (in a step, a validation): from here to the next call of either a long
 * pause is a hang. Or it does something that may take thirty times as long. */
void ranks_working(const Ranks *, int64_t step);
void ranks_resting(const Ranks *);
/* When a rank counts as hung: so many seconds without progress, and `more`, beyond four times its longest pause so far (0: never; so
 * it is until the first call); a rest makes thirty times of the first. And when as stopped: so many seconds of silence (0: never).
 * forget: the pauses so far are not the usual ones. */
void ranks_patience(const Ranks *, double progress, double more, double silence, bool forget);

/* A device's part in the watch. Both are called from the watch's thread. */
typedef struct RanksGuard {
    void *context;
    bool (*check)(void *context, FoxError *); /* false: the device failed */
    void (*abort)(void *context);             /* the process ends: let go of the other ranks' devices */
} RanksGuard;
/* From now on the watch calls it, each second; NULL: no more. */
void ranks_guard(const Ranks *, const RanksGuard *);

#endif

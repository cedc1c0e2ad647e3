/* The processes of a run: who I am, how many we are, and the few things we do together.
 *
 * With Open MPI (built with FOX_MPI) mpirun starts the ranks; without it there is one rank and every function here is
 * trivial. All functions are collective: every rank calls them in the same order. They return when done. */
#ifndef FOX_RANKS_H
#define FOX_RANKS_H

#include "common.h"

typedef struct Ranks {
    int rank, size;             /* of the whole run */
    int local_rank, local_size; /* among the ranks of this machine */
} Ranks;

/* Starts MPI if it is built in. Call once, before anything prints. Fails when several ranks were started but the
 * program was built without MPI (each would believe to be alone and they would write the same files). */
bool ranks_init(Ranks *, int *argc, char ***argv, FoxError *);
/* Leaves MPI in good order. */
void ranks_finish(Ranks *);
/* Ends every rank at once with this exit code; does not return. */
void ranks_abort(const Ranks *, int code);

/* In place sums over ranks, the same result on every rank, in a fixed order. */
void ranks_sum_float(const Ranks *, float *values, int64_t count);
void ranks_sum_double(const Ranks *, double *values, int count);
/* Largest of the ranks' values. */
int ranks_max_int(const Ranks *, int value);
/* Copies root 0's bytes to all. */
void ranks_broadcast(const Ranks *, void *bytes, int64_t count);
void ranks_barrier(const Ranks *);
/* True on every rank when `value` is the same on all of them. */
bool ranks_agree(const Ranks *, uint64_t value);

#endif

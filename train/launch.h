/* Who started this process, and as which rank: Open MPI's mpirun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the
 * environment (the convention of torchrun), or nobody, and then there is one rank.
 *
 * MPI is asked for the number of this rank and carries the address of rank 0 to the others; then it is left. Everything
 * else goes over TCP (train/ranks.h), the same way whoever started the ranks. */
#ifndef FOX_LAUNCH_H
#define FOX_LAUNCH_H

#include "common.h"

typedef struct Launch {
    int rank, size;
    char address[256]; /* of rank 0, as this rank reaches it */
    int port;
    int listener;    /* rank 0 of several: its socket; -1 elsewhere */
    uint64_t cookie; /* the same on all ranks of one run: strangers are told apart by it */
    bool by_mpi;     /* mpirun is our parent or its daemon is: without it the run is over */
} Launch;

/* Fails when the launcher's variables make no sense, when rank 0 cannot listen, and when several processes were started
 * that have no way to find each other (each would believe to be alone, and they would write the same files). */
bool launch_find(Launch *, int *argc, char ***argv, FoxError *);

#endif

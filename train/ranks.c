/* Ranks: MPI when it is built in and a launcher started us, one rank otherwise.
 *
 * MPI is started only under a launcher. Alone, the program must not depend on a working MPI installation, and starts
 * faster. MPI itself remembers whether it runs (MPI_Initialized), so nothing is kept here. */
#include "ranks.h"

#ifdef FOX_MPI
#include <mpi.h>
#endif

/* The number of processes a launcher says it started: Open MPI's mpirun, Hydra and PMI-2, Slurm's srun. 1: none. */
static int launched_size(const char **variable) {
    const char *names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *value = getenv(names[i]);
        if (value != NULL && atoi(value) > 1) {
            *variable = names[i];
            return atoi(value);
        }
    }
    return 1;
}

#ifdef FOX_MPI

/* One message of the sums holds at most this many floats from each rank: bounds the scratch memory, and keeps MPI's
 * int counts far from their end. */
#define SUM_SLICE (1 << 20)

static bool launched(void) {
    const char *variable;
    return getenv("OMPI_COMM_WORLD_SIZE") != NULL || getenv("PMIX_RANK") != NULL || getenv("PMI_RANK") != NULL ||
           launched_size(&variable) > 1;
}

static bool mpi_runs(void) {
    int initialized = 0, finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    return initialized && !finalized;
}

bool ranks_init(Ranks *ranks, int *argc, char ***argv, FoxError *err) {
    ranks->rank = ranks->local_rank = 0;
    ranks->size = ranks->local_size = 1;
    if (!launched()) {
        return true;
    }
    int provided;
    if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) {
        return fox_fail(err, "MPI does not start; does mpirun belong to the MPI this program was built with?");
    }
    MPI_Comm machine;
    MPI_Comm_rank(MPI_COMM_WORLD, &ranks->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks->size);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, ranks->rank, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &ranks->local_rank);
    MPI_Comm_size(machine, &ranks->local_size);
    MPI_Comm_free(&machine);
    const char *variable = "";
    int expected = launched_size(&variable);
    if (ranks->size == 1 && expected > 1) {
        return fox_fail(
            err,
            "%s says that %d processes were started, but MPI sees one; start them with the mpirun of the MPI "
            "this program was built with (srun: --mpi=pmix)",
            variable, expected);
    }
    return true;
}

void ranks_finish(Ranks *ranks) {
    (void)ranks;
    if (mpi_runs()) {
        MPI_Finalize();
    }
}

void ranks_abort(const Ranks *ranks, int code) {
    (void)ranks;
    if (mpi_runs()) {
        MPI_Abort(MPI_COMM_WORLD, code);
    }
    _Exit(code);
}

/* Length of rank's slice when `count` elements are cut into `size` slices, the first ones longer by one. */
static int slice_length(int count, int size, int rank) {
    return count / size + (rank < count % size ? 1 : 0);
}

/* MPI_Allreduce may add in another order from run to run. Here slice r of the values goes to rank r, which adds what
 * it got in rank order, and everybody receives that one result. */
void ranks_sum_float(const Ranks *ranks, float *values, int64_t count) {
    int n = ranks->size, me = ranks->rank;
    if (n == 1) {
        return;
    }
    int *lengths = FOX_NEW(int, n), *starts = FOX_NEW(int, n);
    int *mine_from_each = FOX_NEW(int, n), *received_starts = FOX_NEW(int, n);
    int round_max = SUM_SLICE < INT32_MAX / n ? SUM_SLICE : INT32_MAX / n;
    int64_t round = (int64_t)round_max * n;
    float *received = FOX_NEW(float, round < count ? round : count + n);
    for (int64_t done = 0; done < count; done += round) {
        int now = (int)(count - done < round ? count - done : round);
        for (int r = 0, start = 0; r < n; r++) {
            lengths[r] = slice_length(now, n, r);
            starts[r] = start;
            start += lengths[r];
            mine_from_each[r] = slice_length(now, n, me);
            received_starts[r] = r * mine_from_each[r];
        }
        int mine = lengths[me];
        MPI_Alltoallv(values + done, lengths, starts, MPI_FLOAT, received, mine_from_each, received_starts, MPI_FLOAT,
                      MPI_COMM_WORLD);
        for (int r = 1; r < n; r++) {
            for (int i = 0; i < mine; i++) {
                received[i] += received[(int64_t)r * mine + i];
            }
        }
        MPI_Allgatherv(received, mine, MPI_FLOAT, values + done, lengths, starts, MPI_FLOAT, MPI_COMM_WORLD);
    }
    free(lengths);
    free(starts);
    free(mine_from_each);
    free(received_starts);
    free(received);
}

void ranks_sum_double(const Ranks *ranks, double *values, int count) {
    if (ranks->size == 1) {
        return;
    }
    double *all = FOX_NEW(double, (size_t)count * (size_t)ranks->size);
    MPI_Allgather(values, count, MPI_DOUBLE, all, count, MPI_DOUBLE, MPI_COMM_WORLD);
    for (int i = 0; i < count; i++) {
        values[i] = all[i];
        for (int r = 1; r < ranks->size; r++) {
            values[i] += all[(size_t)r * (size_t)count + (size_t)i];
        }
    }
    free(all);
}

int ranks_max_int(const Ranks *ranks, int value) {
    int largest = value;
    if (ranks->size > 1) {
        MPI_Allreduce(&value, &largest, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    }
    return largest;
}

void ranks_broadcast(const Ranks *ranks, void *bytes, int64_t count) {
    const int64_t piece = 1 << 28;
    for (int64_t done = 0; ranks->size > 1 && done < count; done += piece) {
        int now = (int)(count - done < piece ? count - done : piece);
        MPI_Bcast((char *)bytes + done, now, MPI_BYTE, 0, MPI_COMM_WORLD);
    }
}

void ranks_barrier(const Ranks *ranks) {
    if (ranks->size > 1) {
        MPI_Barrier(MPI_COMM_WORLD);
    }
}

bool ranks_agree(const Ranks *ranks, uint64_t value) {
    uint64_t first = value;
    ranks_broadcast(ranks, &first, sizeof first);
    return ranks_max_int(ranks, value != first) == 0;
}

#else

bool ranks_init(Ranks *ranks, int *argc, char ***argv, FoxError *err) {
    (void)argc;
    (void)argv;
    ranks->rank = ranks->local_rank = 0;
    ranks->size = ranks->local_size = 1;
    const char *variable = "";
    int expected = launched_size(&variable);
    if (expected > 1) {
        return fox_fail(
            err,
            "%d processes were started (%s), but this program is built without MPI: each would train alone; "
            "install Open MPI and run make again, or start one process",
            expected, variable);
    }
    return true;
}

void ranks_finish(Ranks *ranks) {
    (void)ranks;
}

void ranks_abort(const Ranks *ranks, int code) {
    (void)ranks;
    _Exit(code);
}

void ranks_sum_float(const Ranks *ranks, float *values, int64_t count) {
    (void)ranks;
    (void)values;
    (void)count;
}

void ranks_sum_double(const Ranks *ranks, double *values, int count) {
    (void)ranks;
    (void)values;
    (void)count;
}

int ranks_max_int(const Ranks *ranks, int value) {
    (void)ranks;
    return value;
}

void ranks_broadcast(const Ranks *ranks, void *bytes, int64_t count) {
    (void)ranks;
    (void)bytes;
    (void)count;
}

void ranks_barrier(const Ranks *ranks) {
    (void)ranks;
}

bool ranks_agree(const Ranks *ranks, uint64_t value) {
    (void)ranks;
    (void)value;
    return true;
}

#endif

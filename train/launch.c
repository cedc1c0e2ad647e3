#include "launch.h"

#include "sockets.h"

#include <errno.h>
#include <unistd.h>

#ifdef FOX_MPI
#include <mpi.h>
#endif

/* Names that launchers give to a rank and the number of ranks. Only the first pair is meant for programs like this one:
 * srun and mpirun also set theirs where MPI is to be asked. */
static const char *const launchers[][2] = {
    {"RANK", "WORLD_SIZE"},
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"},
    {"PMI_RANK", "PMI_SIZE"},
    {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"},
};
enum { LAUNCHERS = sizeof launchers / sizeof launchers[0] };

/* The whole number in a variable of the environment. */
static bool number(const char *name, int low, int high, int *value, FoxError *err) {
    const char *text = getenv(name);
    char *end;
    errno = 0;
    long found = text != NULL ? strtol(text, &end, 10) : 0;
    if (text == NULL || end == text || *end != '\0' || errno != 0 || found < low || found > high) {
        return fox_fail(err, "%s is '%.40s', expected a number from %d to %d in the environment", name, text ? text : "", low, high);
    }
    *value = (int)found;
    return true;
}

/* The launcher whose variables name more than one rank; -1: none. */
static int find_launcher(void) {
    for (int i = 0; i < LAUNCHERS; i++) {
        const char *size = getenv(launchers[i][1]);
        if (size != NULL && atoi(size) > 1) {
            return i;
        }
    }
    return -1;
}

/* Whether it is the address of a listener that only this machine reaches (socket_listen). Others, as 127.0.1.1 and ::1, need one
 * at every address. */
static bool is_this_machine(const char *address) {
    return strcmp(address, "localhost") == 0 || strcmp(address, "127.0.0.1") == 0;
}

static bool from_environment(Launch *l, int launcher, FoxError *err) {
    const char *address = getenv("MASTER_ADDR"), *job = getenv("SLURM_JOB_ID");
    if (!number(launchers[launcher][1], 1, 1 << 20, &l->size, err) ||
        !number(launchers[launcher][0], 0, l->size - 1, &l->rank, err) || !number("MASTER_PORT", 1, 65535, &l->port, err)) {
        return false;
    }
    if (address == NULL || strlen(address) >= sizeof l->address) {
        return fox_fail(err, "MASTER_ADDR is missing: the address of rank 0, as the other ranks reach it");
    }
    snprintf(l->address, sizeof l->address, "%s", address);
    const char *agent = getenv("TORCHELASTIC_USE_AGENT_STORE"); // torchrun itself listens on MASTER_PORT then
    l->port += agent != NULL && strcmp(agent, "True") == 0 ? (l->port < 65535 ? 1 : -1) : 0;
    uint64_t numbers[2] = {(uint64_t)l->size, (uint64_t)l->port};
    l->cookie = fox_hash(fox_hash(0, numbers, sizeof numbers), job != NULL ? job : "", job != NULL ? strlen(job) : 0);
    if (l->rank == 0) {
        l->listener = socket_listen(is_this_machine(address), &l->port, err);
    }
    return l->rank != 0 || l->listener >= 0;
}

#ifdef FOX_MPI

/* What rank 0 tells the others; its failure must not leave them waiting. */
typedef struct Meeting {
    char host[256];
    int port;
    uint64_t cookie;
    FoxError why;
} Meeting;

static Meeting call_meeting(Launch *l) {
    Meeting m;
    const char *address = getenv("MASTER_ADDR");
    memset(&m, 0, sizeof m);
    if (address != NULL) {
        snprintf(m.host, sizeof m.host, "%s", address);
    } else {
        gethostname(m.host, sizeof m.host - 1);
    }
    m.cookie = fox_random((uint64_t)time(NULL), (uint64_t)getpid() ^ (uint64_t)(1e9 * fox_now()));
    l->listener = socket_listen(false, &m.port, &m.why);
    return m;
}

static bool from_mpi(Launch *l, int *argc, char ***argv, FoxError *err) {
    int provided;
    if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) {
        return fox_fail(err, "MPI does not start; does mpirun belong to the MPI this program was built with?");
    }
    Meeting m;
    memset(&m, 0, sizeof m);
    MPI_Comm_rank(MPI_COMM_WORLD, &l->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &l->size);
    if (l->rank == 0 && l->size > 1) {
        m = call_meeting(l);
    }
    MPI_Bcast(&m, (int)sizeof m, MPI_BYTE, 0, MPI_COMM_WORLD);
    MPI_Finalize();
    char here[256] = "";
    gethostname(here, sizeof here - 1);
    snprintf(l->address, sizeof l->address, "%s", strcmp(here, m.host) == 0 ? "127.0.0.1" : m.host);
    l->port = m.port;
    l->cookie = m.cookie;
    l->by_mpi = true;
    return m.why.text[0] == '\0' || fox_fail(err, "%s", m.why.text);
}

#endif

bool launch_find(Launch *l, int *argc, char ***argv, FoxError *err) {
    memset(l, 0, sizeof *l);
    l->size = 1;
    l->listener = -1;
    int launcher = find_launcher();
    if (launcher < 0) {
        return true;
    }
    if (launcher == 0) {
        return from_environment(l, launcher, err);
    }
    int expected = atoi(getenv(launchers[launcher][1]));
#ifdef FOX_MPI
    if (!from_mpi(l, argc, argv, err)) {
        return false;
    }
    if (l->size > 1) {
        return true;
    }
#else
    (void)argc;
    (void)argv;
    if (getenv("MASTER_ADDR") != NULL && getenv("MASTER_PORT") != NULL) {
        return from_environment(l, launcher, err);
    }
#endif
    return fox_fail(err, "%d processes were started (%s), but each would train alone: %s; or set MASTER_ADDR and MASTER_PORT, and RANK "
                    "and WORLD_SIZE for each of them", expected, launchers[launcher][1],
#ifdef FOX_MPI
                    "use the mpirun of the MPI this program was built with (srun: --mpi=pmix)"
#else
                    "install Open MPI and run make again"
#endif
    );
}

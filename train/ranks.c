#include "ranks.h"

#include "launch.h"
#include "sockets.h"
#include "watch.h"

#include <limits.h>
#include <signal.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#define MEETING_SECONDS 50 /* in which all ranks must have come */
#define GREETING_SECONDS 5 /* in which who connects must say who he is */
#define HOST_SIZE 64
#define SLICE 262144 /* bytes that rank 0 receives before it adds them */

typedef struct RanksLinks {
    int *data;             /* rank 0: a socket to every rank (its own -1); elsewhere [0] is the one to rank 0 */
    char (*hosts)[HOST_SIZE]; /* [size] */
    Watch *watch;
} RanksLinks;

/* ---- the meeting */

#define GREETING_MAGIC 0x666f782072616e6bu /* "fox rank" */
enum { DATA, CONTROL, CONNECTIONS };

/* The first bytes on a connection to rank 0. */
typedef struct Greeting {
    uint64_t magic, cookie;
    int32_t rank, size, connection;
    char host[HOST_SIZE];
    uint64_t machine; /* ranks of one machine have the same */
} Greeting;

/* The machine, as far as containers on it look alike: its boot and the host's name. */
static uint64_t machine_id(const char *host) {
    char boot[64] = "";
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (file != NULL) {
        if (fgets(boot, sizeof boot, file) == NULL) {
            boot[0] = '\0';
        }
        fclose(file);
    }
    return fox_hash(fox_hash(0, boot, strlen(boot)), host, strlen(host));
}

static Greeting greeting_of(const Launch *launch) {
    Greeting g;
    memset(&g, 0, sizeof g);
    g.magic = GREETING_MAGIC;
    g.cookie = launch->cookie;
    g.rank = launch->rank;
    g.size = launch->size;
    if (gethostname(g.host, sizeof g.host - 1) != 0 || g.host[0] == '\0') {
        snprintf(g.host, sizeof g.host, "%s", "unknown host");
    }
    g.machine = machine_id(g.host);
    return g;
}

/* Rank 0: takes the connections of all others, [CONNECTIONS][size], and their greetings. Strangers are turned away. */
static bool receive_all(const Launch *launch, int *sockets[CONNECTIONS], Greeting *greetings, FoxError *err) {
    double deadline = fox_now() + MEETING_SECONDS;
    int size = launch->size;
    for (int missing = CONNECTIONS * (size - 1); missing > 0;) {
        Greeting g;
        int fd = socket_accept(launch->listener, deadline);
        if (fd < 0) {
            int first = 1;
            while (sockets[DATA][first] >= 0 && sockets[CONTROL][first] >= 0) {
                first++;
            }
            return fox_fail(err, "rank %d of %d did not come within %d s, nor did %d more connections; did it start?", first, size,
                            MEETING_SECONDS, missing - 1);
        }
        socket_limit(fd, GREETING_SECONDS);
        bool known = socket_receive(fd, &g, sizeof g) && g.magic == GREETING_MAGIC && g.cookie == launch->cookie;
        if (!known) {
            close(fd);
            continue;
        }
        if (g.size != size || g.rank < 1 || g.rank >= size || g.connection < 0 || g.connection >= CONNECTIONS ||
            sockets[g.connection][g.rank] >= 0) {
            close(fd);
            return fox_fail(err, "a process came as rank %d of %d: expected each of the ranks 1 to %d once", g.rank, g.size, size - 1);
        }
        socket_limit(fd, 0);
        g.host[HOST_SIZE - 1] = '\0';
        sockets[g.connection][g.rank] = fd;
        greetings[g.rank] = g;
        missing--;
    }
    return true;
}

/* The others: both connections to rank 0. */
static bool connect_both(const Launch *launch, Greeting g, int *sockets[CONNECTIONS], FoxError *err) {
    double deadline = fox_now() + MEETING_SECONDS;
    for (g.connection = 0; g.connection < CONNECTIONS; g.connection++) {
        int fd = socket_connect(launch->address, launch->port, deadline, err);
        if (fd < 0) {
            return false;
        }
        sockets[g.connection][0] = fd;
        socket_limit(fd, MEETING_SECONDS + 2 * GREETING_SECONDS); // until all have met; another program at that port would say nothing
        if (!socket_send(fd, &g, sizeof g)) {
            return fox_fail(err, "rank 0 at %s, port %d, turned rank %d away", launch->address, launch->port, launch->rank);
        }
    }
    return true;
}

/* What everybody learns from rank 0, when all have come: the greetings of all. */
static bool share_greetings(const Launch *launch, int *sockets[CONNECTIONS], Greeting *greetings, FoxError *err) {
    int64_t bytes = (int64_t)sizeof(Greeting) * launch->size;
    if (launch->rank != 0) {
        if (!socket_receive(sockets[DATA][0], greetings, bytes)) {
            return fox_fail(err, "rank 0 at %s, port %d, gave up before all ranks had come, or another program has that port", launch->address,
                            launch->port);
        }
        for (int c = 0; c < CONNECTIONS; c++) {
            socket_limit(sockets[c][0], 0);
        }
        return true;
    }
    for (int r = 1; r < launch->size; r++) {
        if (!socket_send(sockets[DATA][r], greetings, bytes)) {
            return fox_fail(err, "rank %d (%s) was lost at the start", r, greetings[r].host);
        }
    }
    return true;
}

/* The place among the ranks of this machine, and everybody's host. */
static void learn(Ranks *ranks, const Greeting *greetings) {
    ranks->local_rank = 0;
    ranks->local_size = 0;
    for (int r = 0; r < ranks->size; r++) {
        memcpy(ranks->links->hosts[r], greetings[r].host, HOST_SIZE);
        if (greetings[r].machine == greetings[ranks->rank].machine) {
            ranks->local_rank += r < ranks->rank;
            ranks->local_size++;
        }
    }
}

static bool meet(Ranks *ranks, const Launch *launch, FoxError *err) {
    int size = launch->size, *sockets[CONNECTIONS];
    Greeting *greetings = FOX_NEW(Greeting, size);
    RanksLinks *links = FOX_NEW(RanksLinks, 1);
    links->hosts = (char(*)[HOST_SIZE])fox_alloc(HOST_SIZE * (size_t)size);
    for (int c = 0; c < CONNECTIONS; c++) {
        sockets[c] = FOX_NEW(int, size);
        memset(sockets[c], -1, sizeof(int) * (size_t)size);
    }
    greetings[launch->rank] = greeting_of(launch);
    bool met = launch->rank == 0 ? receive_all(launch, sockets, greetings, err)
                                 : connect_both(launch, greetings[launch->rank], sockets, err);
    if (launch->listener >= 0) {
        close(launch->listener);
    }
    if (met && share_greetings(launch, sockets, greetings, err)) {
        ranks->links = links;
        links->data = sockets[DATA];
        learn(ranks, greetings);
        links->watch = watch_start(ranks, sockets[CONTROL], launch->by_mpi);
    } else {
        free(sockets[DATA]); // the process ends: its connections close with it
        free(links->hosts);
        free(links);
    }
    free(sockets[CONTROL]);
    free(greetings);
    return ranks->links != NULL;
}

bool ranks_init(Ranks *ranks, int *argc, char ***argv, FoxError *err) {
    Launch launch;
    memset(ranks, 0, sizeof *ranks);
    ranks->size = ranks->local_size = 1;
    if (!launch_find(&launch, argc, argv, err)) {
        return false;
    }
    ranks->rank = launch.rank;
    ranks->size = launch.size;
    if (launch.size == 1 || meet(ranks, &launch, err)) {
        return true;
    }
    ranks->size = 1; // nobody to talk to any more
    return false;
}

void ranks_finish(Ranks *ranks) {
    RanksLinks *links = ranks->links;
    if (links == NULL) {
        return;
    }
    ranks_barrier(ranks);
    watch_stop(links->watch);
    for (int r = 0; r < (ranks->rank == 0 ? ranks->size : 1); r++) {
        if (links->data[r] >= 0) {
            close(links->data[r]);
        }
    }
    free(links->data);
    free(links->hosts);
    free(links);
    ranks->links = NULL;
}

/* ---- a message of the main threads */

/* Goes before every message: ranks that do different things must not read one another's numbers. */
typedef struct Envelope {
    int64_t kind, count;
} Envelope;

typedef enum MessageKind { REDUCE = 1, BROADCAST, SCATTER, GATHER } MessageKind;

static void put(const Ranks *ranks, int to, MessageKind kind, const void *bytes, int64_t count) {
    Envelope e = {kind, count};
    int fd = ranks->links->data[to];
    if (!socket_send(fd, &e, sizeof e) || !socket_send(fd, bytes, count)) {
        watch_lost(ranks->links->watch, to);
    }
}

/* The envelope of the next message; its bytes are to be taken next. */
static void expect(const Ranks *ranks, int from, MessageKind kind, int64_t count) {
    Envelope e;
    watch_wait_for(ranks->links->watch, from);
    if (!socket_receive(ranks->links->data[from], &e, sizeof e)) {
        watch_lost(ranks->links->watch, from);
    }
    if (e.kind != kind || e.count != count) {
        char name[96];
        ranks_name(ranks, from, name);
        watch_fail(ranks->links->watch, "%s does something else than rank %d (%lld, %lld bytes; here %d, %lld bytes): were all started "
                   "with the same options?", name, ranks->rank, (long long)e.kind, (long long)e.count, (int)kind, (long long)count);
    }
}

static void take(const Ranks *ranks, int from, void *bytes, int64_t count) {
    if (!socket_receive(ranks->links->data[from], bytes, count)) {
        watch_lost(ranks->links->watch, from);
    }
}

static void get(const Ranks *ranks, int from, MessageKind kind, void *bytes, int64_t count) {
    expect(ranks, from, kind, count);
    take(ranks, from, bytes, count);
}

/* ---- what collectives are made of; several ranks */

/* into += from, `bytes` of them */
typedef void (*Add)(void *into, const void *from, int64_t bytes);

static void add_float(void *into, const void *from, int64_t bytes) {
    float *a = (float *)into;
    const float *b = (const float *)from;
    for (int64_t i = 0; i < bytes / (int64_t)sizeof(float); i++) {
        a[i] += b[i];
    }
}

static void add_double(void *into, const void *from, int64_t bytes) {
    double *a = (double *)into;
    const double *b = (const double *)from;
    for (int64_t i = 0; i < bytes / (int64_t)sizeof(double); i++) {
        a[i] += b[i];
    }
}

static void add_max_int(void *into, const void *from, int64_t bytes) {
    int *a = (int *)into;
    const int *b = (const int *)from;
    for (int64_t i = 0; i < bytes / (int64_t)sizeof(int); i++) {
        a[i] = b[i] > a[i] ? b[i] : a[i];
    }
}

/* Rank 0 holds the sum afterwards, added in the order of the ranks. */
static void reduce(const Ranks *ranks, void *values, int64_t bytes, Add add) {
    if (ranks->rank != 0) {
        put(ranks, 0, REDUCE, values, bytes);
        watch_sent(ranks->links->watch);
        return;
    }
    char *slice = FOX_NEW(char, SLICE);
    for (int r = 1; r < ranks->size; r++) {
        expect(ranks, r, REDUCE, bytes);
        for (int64_t done = 0; done < bytes; done += SLICE) {
            int64_t now = fox_min64(bytes - done, SLICE);
            take(ranks, r, slice, now);
            add((char *)values + done, slice, now);
        }
    }
    free(slice);
}

static void broadcast(const Ranks *ranks, void *bytes, int64_t count) {
    if (ranks->rank != 0) {
        get(ranks, 0, BROADCAST, bytes, count);
        return;
    }
    for (int r = 1; r < ranks->size; r++) {
        put(ranks, r, BROADCAST, bytes, count);
    }
}

static void sum(const Ranks *ranks, void *values, int64_t bytes, Add add) {
    if (ranks->links == NULL) {
        return;
    }
    watch_begin(ranks->links->watch);
    reduce(ranks, values, bytes, add);
    broadcast(ranks, values, bytes);
    watch_end(ranks->links->watch);
}

/* ---- the collectives */

void ranks_sum_float(const Ranks *ranks, float *values, int64_t count) {
    sum(ranks, values, count * (int64_t)sizeof(float), add_float);
}

void ranks_sum_double(const Ranks *ranks, double *values, int64_t count) {
    sum(ranks, values, count * (int64_t)sizeof(double), add_double);
}

int ranks_max_int(const Ranks *ranks, int value) {
    sum(ranks, &value, sizeof value, add_max_int);
    return value;
}

void ranks_scatter_sum(const Ranks *ranks, float *values, int64_t piece) {
    if (ranks->links == NULL) {
        return;
    }
    int64_t bytes = piece * (int64_t)sizeof(float);
    watch_begin(ranks->links->watch);
    reduce(ranks, values, bytes * ranks->size, add_float);
    if (ranks->rank != 0) {
        get(ranks, 0, SCATTER, values + ranks->rank * piece, bytes);
    }
    for (int r = 1; ranks->rank == 0 && r < ranks->size; r++) {
        put(ranks, r, SCATTER, values + r * piece, bytes);
    }
    watch_end(ranks->links->watch);
}

void ranks_gather(const Ranks *ranks, void *bytes, int64_t piece) {
    if (ranks->links == NULL) {
        return;
    }
    char *rows = (char *)bytes;
    watch_begin(ranks->links->watch);
    if (ranks->rank != 0) {
        put(ranks, 0, GATHER, rows + ranks->rank * piece, piece);
        watch_sent(ranks->links->watch);
    }
    for (int r = 1; ranks->rank == 0 && r < ranks->size; r++) {
        get(ranks, r, GATHER, rows + r * piece, piece);
    }
    broadcast(ranks, bytes, piece * ranks->size);
    watch_end(ranks->links->watch);
}

void ranks_broadcast(const Ranks *ranks, void *bytes, int64_t count) {
    if (ranks->links != NULL) {
        watch_begin(ranks->links->watch);
        broadcast(ranks, bytes, count);
        watch_end(ranks->links->watch);
    }
}

void ranks_barrier(const Ranks *ranks) {
    ranks_max_int(ranks, 0);
}

bool ranks_agree(const Ranks *ranks, uint64_t value) {
    uint64_t first = value;
    ranks_broadcast(ranks, &first, sizeof first);
    return ranks_max_int(ranks, value != first) == 0;
}

bool ranks_everyone(const Ranks *ranks, bool ok, FoxError *err) {
    int size = ranks->size, rank = ranks->rank;
    // who has a message goes before who has none: the failure may have been agreed on before
    int worst = ranks_max_int(ranks, ok ? 0 : size - rank + (err->text[0] != '\0' ? size : 0));
    if (worst == 0) {
        return true;
    }
    if (rank != (worst > size ? 2 * size : size) - worst) {
        err->text[0] = '\0';
    }
    return false;
}

/* ---- alone */

void ranks_share_cores(const Ranks *ranks) {
#ifdef _OPENMP
    int share = (int)sysconf(_SC_NPROCESSORS_ONLN) / ranks->local_size;
    if (ranks->local_size > 1 && getenv("OMP_NUM_THREADS") == NULL && omp_get_max_threads() > share) {
        omp_set_num_threads(share > 1 ? share : 1);
    }
#else
    (void)ranks;
#endif
}

void ranks_name(const Ranks *ranks, int rank, char text[96]) {
    snprintf(text, 96, "rank %d (%s)", rank, ranks->links != NULL ? ranks->links->hosts[rank] : "alone");
}

void ranks_fail(const Ranks *ranks, const char *format, ...) {
    char text[400], name[96];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (ranks->links == NULL) {
        fox_die("%s", text);
    }
    ranks_name(ranks, ranks->rank, name);
    watch_fail(ranks->links->watch, "%s, step %lld: %s", name, (long long)watch_step(ranks->links->watch) + 1, text);
}

void ranks_working(const Ranks *ranks, int64_t step) {
    if (ranks->links != NULL) {
        watch_working(ranks->links->watch, step);
    }
}

void ranks_resting(const Ranks *ranks) {
    if (ranks->links != NULL) {
        watch_resting(ranks->links->watch);
    }
}

void ranks_patience(const Ranks *ranks, double progress, double more, double silence, bool forget) {
    if (ranks->links != NULL) {
        watch_patience(ranks->links->watch, progress, more, silence, forget);
    }
}

void ranks_guard(const Ranks *ranks, const RanksGuard *guard) {
    if (ranks->links != NULL) {
        watch_guard(ranks->links->watch, guard);
    }
}

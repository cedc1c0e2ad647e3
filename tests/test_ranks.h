/* Tests of runs on several ranks, started by mpirun and by scripts/launch.sh (TCP alone): the same losses on 1, 2 and 4 of
 * them, with and without a sharded optimizer; checkpoints go from any number to any other; a rank that is killed, stopped or
 * hangs ends them all, and what counts as hanging; whatever rank is killed whenever, the run goes on; signals save;
 * refusals. */
#ifndef FOX_TEST_RANKS_H
#define FOX_TEST_RANKS_H

#include "../train/partition.h"
#include "../train/ranks.h"
#include "../train/sockets.h"
#include "run_fixture.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <sys/ptrace.h>

enum { RANKS_MAX = 8 };

typedef struct RankFixture {
    RunFixture run;
    char launch[600];           /* scripts/launch.sh, absolute */
    const char *launchers[2];   /* beginnings of a command; the number of ranks follows */
    int count;
    int ranks; /* of the runs that are disturbed */
} RankFixture;

static bool ranks_fixture_create(Tests *t, RankFixture *f, int ranks, bool gpu) {
    memset(f, 0, sizeof *f);
    f->ranks = ranks;
    f->run.gpu = gpu;
    char *script = realpath("scripts/launch.sh", NULL);
    if (!check(t, script != NULL, "scripts/launch.sh is there") || !run_fixture_create(t, &f->run)) {
        free(script);
        return false;
    }
    snprintf(f->launch, sizeof f->launch, "%s", script);
    free(script);
    f->launchers[f->count++] = f->launch;
#ifdef FOX_MPI
    if (t->quick) { // MPI itself does not pass the leak checker
        skip(t, "ranks started by mpirun: quick tests");
    } else if (system("mpirun --version >/dev/null 2>&1") == 0) {
        f->launchers[f->count++] = "mpirun --oversubscribe -np";
    } else {
        skip(t, "ranks started by mpirun: it is not there");
    }
#else
    skip(t, "ranks started by mpirun: built without MPI");
#endif
    return true;
}

/* ---- the partition of the flat space */

/* Every float has one owner; a share is dense; pieces of a bucket are equally long. */
static void test_ranks_partition(Tests *t) {
    uint64_t key = data_fresh();
    for (uint64_t round = 0; round < 300; round++) {
        int64_t total = 1 + (int64_t)(fox_random(key, 3 * round) % (round % 3 == 0 ? 200000000u : 300000u));
        int ranks = 1 + (int)(fox_random(key, 3 * round + 1) % 9);
        Partition p = partition_create(total, ranks);
        int64_t next = 0, *local = FOX_NEW(int64_t, ranks);
        bool ok = p.padded >= total && partition_start(&p, p.buckets) == p.padded && (ranks > 1 || p.buckets == 1);
        for (int k = 0; k < p.buckets; k++) {
            ok = ok && partition_piece_length(&p, k) % PARTITION_GRAIN == 0 && partition_find(&p, partition_start(&p, k)) == k;
            for (int r = 0; r < ranks; r++) {
                Piece piece = partition_piece(&p, k, r);
                ok = ok && piece.start == next && piece.count >= 0 && (piece.count == 0 || piece.local == local[r]);
                next += piece.count;
                local[r] += piece.count;
                int64_t from = (int64_t)(fox_random(key, 1000 + round) % (uint64_t)total), count = total / 3 + 1;
                Piece part = partition_within(piece, from, count);
                int64_t low = piece.start > from ? piece.start : from, high = fox_min64(piece.start + piece.count, from + count);
                ok = ok && part.count == (high > low ? high - low : 0) &&
                     (part.count == 0 || (part.start == low && part.local - piece.local == low - piece.start));
            }
        }
        for (int r = 0; r < ranks; r++) {
            ok = ok && local[r] <= partition_share(&p);
        }
        free(local);
        check(t, ok && next == total, "partition of %lld floats among %d ranks", (long long)total, ranks);
    }
}

/* ---- the watch */

/* What the main thread of one of two ranks does, while the other waits for it at a barrier; both are given WATCH_PATIENCE seconds. */
typedef struct WatchCase {
    const char *what;
    int rank;       /* that does it */
    double pause;   /* first so many seconds of work, or of rest, before patience begins */
    bool rests;     /* that pause is a rest */
    bool forget;    /* patience begins with no pause known */
    double idle;    /* then so many seconds more */
    bool idle_rest; /* of rest */
    double limit;   /* seconds after which that is a hang; 0: it is none */
    double stopped; /* before it idles: its whole process, for so many seconds */
    double more;    /* of patience, however long a rest may be */
} WatchCase;

enum { WATCH_PATIENCE = 1 };

static void watch_mark(const Ranks *ranks, bool rests, int64_t step) {
    if (rests) {
        ranks_resting(ranks);
    } else {
        ranks_working(ranks, step);
    }
}

/* One of the two processes. */
FOX_NORETURN static void watch_process(const Tests *t, const WatchCase *c, int rank, int port, int index) {
    char text[1100];
    Ranks ranks;
    FoxError err = {{0}};
    snprintf(text, sizeof text, "%s/watch_%d_%d", t->scratch, index, rank);
    if (freopen(text, "w", stderr) == NULL) {
        _exit(3);
    }
    snprintf(text, sizeof text, "%d", rank);
    setenv("RANK", text, 1);
    snprintf(text, sizeof text, "%d", port);
    setenv("MASTER_PORT", text, 1);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("WORLD_SIZE", "2", 1);
    if (!ranks_init(&ranks, NULL, NULL, &err)) {
        fprintf(stderr, "%s\n", err.text);
        _exit(3);
    }
    ranks_patience(&ranks, rank == c->rank ? 0 : WATCH_PATIENCE, 0, 60, false); // who has waited longer than the other idles is no suspect
    if (rank == c->rank) {
        watch_mark(&ranks, c->rests, 5);
        run_sleep(c->pause);
        watch_mark(&ranks, c->idle_rest, 6);
        ranks_patience(&ranks, WATCH_PATIENCE, c->more, 60, c->forget);
        if (c->stopped > 0) { // the main thread may be the first to run again
            if (fork() == 0) {
                run_sleep(c->stopped);
                kill(getppid(), SIGCONT);
                _exit(0);
            }
            raise(SIGSTOP);
            watch_mark(&ranks, false, 6);
        }
        run_sleep(c->idle);
        watch_mark(&ranks, c->idle_rest, 7);
    }
    ranks_finish(&ranks); // with a barrier
    _exit(0);
}

/* A rank counts as hung after WATCH_PATIENCE seconds and four times its longest pause, thirty times as long where it rests: all cases
 * side by side, each of two processes. Statuses travel, and are judged, once a second. */
static void test_ranks_watch(Tests *t) {
    static const WatchCase cases[] = {
        {"no pause, idle for 8 s", 1, 0, false, false, 8, false, 1, 0, 0},
        {"a pause of 1.5 s, idle for 4 s", 1, 1.5, false, false, 4, false, 0, 0, 0},
        {"a pause of 1.5 s of rank 0, idle for 4 s", 0, 1.5, false, false, 4, false, 0, 0, 0},
        {"a pause of 1.5 s, idle for 12 s", 1, 1.5, false, false, 12, false, 7, 0, 0},
        {"a pause of 1.5 s of rank 0, idle for 12 s", 0, 1.5, false, false, 12, false, 7, 0, 0},
        {"a forgotten pause of 1.5 s, idle for 8 s", 1, 1.5, false, true, 8, false, 1, 0, 0},
        {"a rest of 1.5 s is no pause, idle for 8 s", 1, 1.5, true, false, 8, false, 1, 0, 0},
        {"a rest of 8 s", 1, 0, false, false, 8, true, 0, 0, 0},
        {"a rest of 8 s of rank 0", 0, 0, false, false, 8, true, 0, 0, 0},
        /* which thread runs first then is chance: more than once */
        {"a process that was stopped for 6 s, idle for 12 s", 1, 0, false, false, 12, false, 1, 6, 0},
        {"a process that was stopped for 6.5 s, idle for 12 s", 1, 0, false, false, 12, false, 1, 6.5, 0},
        {"a process that was stopped for 7 s, idle for 12 s", 1, 0, false, false, 12, false, 1, 7, 0},
        {"a process of rank 0 that was stopped for 7 s, idle for 12 s", 0, 0, false, false, 12, false, 1, 7, 0},
        {"five more seconds of patience, idle for 12 s", 1, 0, false, false, 12, false, 6, 0, 5},
    };
    enum { CASES = sizeof cases / sizeof cases[0] };
    pid_t processes[CASES][2];
    int port = 20000 + (int)(data_fresh() % 12000);
    fflush(stdout);
    for (int i = 0; i < 2 * CASES; i++) {
        pid_t child = fork();
        if (child == 0) {
            watch_process(t, &cases[i / 2], i % 2, port + i / 2, i / 2);
        }
        processes[i / 2][i % 2] = child;
    }
    for (int i = 0; i < CASES; i++) {
        const WatchCase *c = &cases[i];
        int codes[2] = {run_wait(processes[i][0]), run_wait(processes[i][1])};
        char path[1100], name[32], *text = NULL;
        size_t length;
        snprintf(path, sizeof path, "%s/watch_%d_0", t->scratch, i); // rank 0 says what there is to say
        snprintf(name, sizeof name, "error: rank %d (", c->rank);
        if (!check(t, file_read(path, 1 << 20, &text, &length, NULL), "watch, %s: %s is there", c->what, path)) {
            continue;
        }
        const char *found = strstr(text, "made no progress for ");
        double seconds = found != NULL ? atof(found + strlen("made no progress for ")) : 0;
        if (c->limit == 0) {
            check(t, codes[0] == 0 && codes[1] == 0 && length == 0, "watch, %s is no hang: codes %d and %d, %s", c->what, codes[0],
                  codes[1], text);
        } else { // in whole seconds
            check(t, codes[0] == 1 && codes[1] == 1 && strstr(text, name) != NULL && strstr(text, " in step 7 (") != NULL,
                  "watch, %s: expected code 1 and a line that names rank and step, found %d, %d: %s", c->what, codes[0], codes[1], text);
            check(t, seconds >= c->limit - 0.5 && seconds <= c->limit + 4, "watch, %s: a hang after %.0f s, expected %.0f", c->what,
                  seconds, c->limit);
        }
        free(text);
    }
}

/* ---- runs */

static void ranks_command(const RankFixture *f, int launcher, int ranks, const char *out, const char *more, char command[8192]) {
    char train[4096];
    run_train_command(&f->run, out, more, train);
    snprintf(command, 8192, "%s %d %s", f->launchers[launcher], ranks, train);
}

static int ranks_run(const RankFixture *f, int launcher, int ranks, const char *out, const char *more) {
    char command[8192];
    ranks_command(f, launcher, ranks, out, more, command);
    return run_command(&f->run, command);
}

static const char *ranks_launcher(int launcher) {
    return launcher == 0 ? "TCP" : "MPI";
}

/* 1, 2 and 4 ranks: the same losses, gradient norms and validations to 1e-5. For one number of ranks every run, with -z 0 and
 * -z 1, by either launcher, ends with the same parameters bit for bit. */
static void test_ranks_same(Tests *t, const RankFixture *f) {
    const char *options = "-x 20 -n 0 -b 1 -l 1e-3";
    char command[4096], more[200], what[100], first[20], hash[20];
    RunLog one, log;
    run_train_command(&f->run, "one", options, command);
    if (!run_expect(t, &f->run, "one rank", run_command(&f->run, command), 0)) {
        return;
    }
    run_read_log(&f->run, "one", &one);
    for (int ranks = 2; ranks <= 4; ranks += 2) {
        first[0] = '\0';
        for (int i = 0; i < 2 * f->count; i++) {
            int zero = i % 2, launcher = i / 2;
            snprintf(what, sizeof what, "%d ranks (%s, -z %d) against 1", ranks, ranks_launcher(launcher), zero);
            snprintf(more, sizeof more, "%s -z %d", options, zero);
            run_expect(t, &f->run, what, ranks_run(f, launcher, ranks, "many", more), 0);
            run_hash(&f->run, hash);
            run_read_log(&f->run, "many", &log);
            run_compare_logs(t, what, &one, &log, 20, 1e-5);
            check(t, strlen(hash) == 16 && (first[0] == '\0' || strcmp(first, hash) == 0), "%s: hash %s, other runs had %s", what,
                  hash, first);
            snprintf(first, sizeof first, "%s", hash);
            run_remove(&f->run, "many");
        }
    }
}

/* The speed that a run of several ranks records is that of all of them together. */
static void test_ranks_speed(Tests *t, const RankFixture *f) {
    char more[64];
    RunLog log;
    int steps = run_speed_options(t, more);
    double start = fox_now();
    run_expect(t, &f->run, "2 ranks that are timed", ranks_run(f, 0, 2, "speed", more), 0);
    double wall = fox_now() - start;
    run_read_log(&f->run, "speed", &log);
    run_check_speed(t, "2 ranks", &log, steps, RUN_SPEED_TOKENS, wall);
    run_remove(&f->run, "speed");
}

/* 5 steps each on 1, 4, 2 and 1 ranks, against 20 on one. */
static void test_ranks_reshard(Tests *t, const RankFixture *f) {
    static const int numbers[] = {1, 4, 2, 1};
    char dir[700], command[4096], more[200];
    RunLog one, log;
    run_read_log(&f->run, "one", &one);
    for (int i = 0; i < 4; i++) {
        snprintf(more, sizeof more, "-x 20 -n 5 -b 1 -l 1e-3 -y -z %d", i == 2 ? 0 : 1);
        run_train_command(&f->run, "reshard", more, command);
        int code = numbers[i] == 1 ? run_command(&f->run, command) : ranks_run(f, i % f->count, numbers[i], "reshard", more);
        run_expect(t, &f->run, "one of 1, 4, 2, 1 ranks", code, 0);
        for (int step = 5 * (i + 2); step <= 20; step += 5) { // the schedule is of 20 steps: drop what came too early
            snprintf(dir, sizeof dir, "%s/reshard/step_%08d", f->run.root, step);
            check(t, remove_directory(dir), "%s can be removed", dir);
        }
    }
    run_read_log(&f->run, "reshard", &log);
    check(t, log.starts == 4, "1, 4, 2, 1 ranks: four starts, found %d", log.starts);
    run_compare_logs(t, "1, 4, 2, 1 ranks against 1", &one, &log, 20, 1e-5);
}

/* ---- processes */

/* A number in a process's environment; -1: not there. */
static int ranks_environment(pid_t process, const char *name) {
    char path[64], text[65536];
    snprintf(path, sizeof path, "/proc/%d/environ", (int)process);
    FILE *file = fopen(path, "r");
    size_t length = file != NULL ? fread(text, 1, sizeof text - 1, file) : 0, at = strlen(name);
    if (file != NULL) {
        fclose(file);
    }
    text[length] = '\0';
    for (size_t i = 0; i < length; i += strlen(text + i) + 1) {
        if (strncmp(text + i, name, at) == 0 && text[i + at] == '=') {
            return atoi(text + i + at + 1);
        }
    }
    return -1;
}

/* The parent of a process; -1 where there is no such process. state: its letter (Z: it has ended), NULL: not wanted. */
static pid_t ranks_parent(pid_t process, char *state) {
    char path[64], line[512], letter;
    int parent = -1;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)process);
    FILE *file = fopen(path, "r");
    if (file != NULL) {
        const char *end = fgets(line, sizeof line, file) != NULL ? strrchr(line, ')') : NULL;
        if (end == NULL || sscanf(end + 1, " %c %d", &letter, &parent) != 2) {
            parent = -1;
        } else if (state != NULL) {
            *state = letter;
        }
        fclose(file);
    }
    return parent;
}

/* The processes of the ranks that `launcher` started; false while not all are there. */
static bool ranks_find(pid_t launcher, int count, pid_t processes[RANKS_MAX]) {
    int found = 0;
    DIR *dir = opendir("/proc");
    for (struct dirent *item; dir != NULL && (item = readdir(dir)) != NULL;) {
        pid_t process = (pid_t)atoi(item->d_name);
        if (process <= 0 || ranks_parent(process, NULL) != launcher) {
            continue;
        }
        int rank = ranks_environment(process, "RANK");
        rank = rank >= 0 ? rank : ranks_environment(process, "OMPI_COMM_WORLD_RANK");
        if (rank >= 0 && rank < count) {
            processes[rank] = process;
            found++;
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return found == count;
}

/* Starts a long run and waits until it has made `steps` steps. */
static pid_t ranks_start(Tests *t, const RankFixture *f, int launcher, int count, const char *out, const char *more, int steps,
                         pid_t processes[RANKS_MAX]) {
    char command[8192];
    RunLog log;
    ranks_command(f, launcher, count, out, more, command);
    pid_t child = run_start(&f->run, command, 1, 0);
    double deadline = fox_now() + 60;
    do {
        run_sleep(0.01);
        run_read_log(&f->run, out, &log);
    } while (log.last < steps && fox_now() < deadline);
    check(t, log.last >= steps && ranks_find(child, count, processes), "%d ranks run (%s), step %d", count, ranks_launcher(launcher),
          log.last);
    return child;
}

/* None of the ranks is left, a zombie neither. */
static void ranks_check_gone(Tests *t, const char *what, const pid_t *processes, int count) {
    double deadline = fox_now() + 15;
    int left = 1;
    while (left > 0 && fox_now() < deadline) {
        left = 0;
        for (int r = 0; r < count; r++) {
            left += processes[r] > 0 && kill(processes[r], 0) == 0;
        }
        run_sleep(left > 0 ? 0.05 : 0);
    }
    check(t, left == 0, "%s: %d processes are left", what, left);
    for (int r = 0; r < count; r++) {
        if (processes[r] > 0 && left > 0) {
            kill(processes[r], SIGKILL);
        }
    }
}

/* Seconds from `start` until all ranks but `except` (-1: all) have ended; more than `limit` when they have not by then. *first:
 * seconds until the first of them has, -1 if none has. scripts/launch.sh kills what is left 10 s later, mpirun at once. */
static double ranks_await_end(const pid_t *processes, int count, int except, double start, double limit, double *first) {
    double now;
    int left, all = count - (except >= 0);
    *first = -1;
    do {
        run_sleep(0.02);
        left = 0;
        for (int r = 0; r < count; r++) {
            char state = 'Z';
            left += r != except && ranks_parent(processes[r], &state) > 0 && state != 'Z' && state != 'X';
        }
        now = fox_now() - start;
        *first = left < all && *first < 0 ? now : *first;
    } while (left > 0 && now <= limit);
    return now;
}

enum {
    RANKS_PATIENCE = 3, /* seconds */
    RANKS_APART = 7,    /* seconds from the first end to the last; scripts/launch.sh kills 10 s after the first */
};
#define RANKS_LONG "-x 400 -n 4 -b 1 -l 1e-3 --hang-timeout 3" /* of steps that take some milliseconds */

/* Goes on from what a lost run left, to its end: nothing is missing. hash: NULL where two runs may differ. */
static void ranks_check_rest(Tests *t, const RankFixture *f, const char *what, const char *hash) {
    char found[20];
    run_expect(t, &f->run, what, ranks_run(f, 0, f->ranks, "lost", RANKS_LONG " -y"), 0);
    run_hash(&f->run, found);
    check(t, hash == NULL || strcmp(hash, found) == 0, "%s, then resumed: hash %s, expected %s", what, found, hash ? hash : "any");
    run_remove(&f->run, "lost");
}

/* Waits until a checkpoint is whole, which is some steps after its own, and until training has gone on from there. */
static void ranks_await_checkpoint(Tests *t, const RankFixture *f, const char *what) {
    RunLog log;
    int last = RUN_MAX_STEPS; // step at which it was whole
    double deadline = fox_now() + 20;
    do {
        run_sleep(0.005);
        run_read_log(&f->run, "lost", &log);
        last = log.checkpoints > 0 && log.last < last ? log.last : last;
    } while (log.last <= last && fox_now() < deadline);
    check(t, log.last > last, "%s: a checkpoint is whole before step %d", what, log.last);
}

typedef enum Loss { LOSS_KILL, LOSS_STOP, LOSS_HANG } Loss;

/* Stops one thread of a process, not the others: a main thread that hangs. A child of ours traces it, until it is gone. */
static bool ranks_hang(pid_t process) {
    int report[2];
    char ok = 0;
    if (pipe(report) != 0) {
        return false;
    }
    fflush(stdout);
    if (fork() == 0) {
        int status;
        ok = ptrace(PTRACE_SEIZE, process, NULL, NULL) == 0 && ptrace(PTRACE_INTERRUPT, process, NULL, NULL) == 0;
        if (write(report[1], &ok, 1) == 1) {
            while (ok && waitpid(process, &status, 0) >= 0 && !WIFEXITED(status) && !WIFSIGNALED(status)) {
            }
        }
        _exit(0);
    }
    bool told = read(report[0], &ok, 1) == 1;
    close(report[0]);
    close(report[1]);
    return told && ok;
}

/* A rank is lost: within the limit all end, with an error and a line that names it, and the last checkpoint is whole. */
static void ranks_lose(Tests *t, const RankFixture *f, int launcher, int victim, Loss loss, const char *hash) {
    static const char *const words[] = {"was lost", "was silent", "made no progress"};
    static const char *const names[] = {"killed", "stopped", "hung"};
    pid_t processes[RANKS_MAX] = {0};
    char what[100], name[32], dir[600], path[1024];
    RunLog log;
    FoxError err = {{0}};
    snprintf(what, sizeof what, "rank %d of %d %s (%s)", victim, f->ranks, names[loss], ranks_launcher(launcher));
    snprintf(name, sizeof name, "error: rank %d (", victim);
    /* while a checkpoint is written more time passes before a pause is a hang: hang where none is */
    bool hang = loss == LOSS_HANG;
    pid_t child = ranks_start(t, f, launcher, f->ranks, "lost", hang ? RANKS_LONG " -n 150" : RANKS_LONG, hang ? 151 : 12, processes);
    snprintf(dir, sizeof dir, "%s/lost", f->run.root);
    ranks_await_checkpoint(t, f, what);
    double start = fox_now();
    if (loss == LOSS_HANG && !ranks_hang(processes[victim])) {
        skip(t, "ranks: a main thread that hangs: no ptrace here (%s)", strerror(errno));
        kill(child, SIGTERM);
        run_wait(child);
        run_remove(&f->run, "lost");
        return;
    }
    if (loss != LOSS_HANG) {
        kill(processes[victim], loss == LOSS_KILL ? SIGKILL : SIGSTOP);
    }
    run_read_log(&f->run, "lost", &log);
    double patience = RANKS_PATIENCE + (f->run.gpu ? 8 : 5), first; // a GPU takes its time to end
    double limit = loss == LOSS_KILL ? 8 : patience;
    double longest = 0; // a busy machine has long steps, and four times that is no hang; the first does not count
    for (int step = 2; step <= log.last; step++) {
        longest = fmax(longest, log.step_ms[step]);
    }
    limit += hang ? 4e-3 * longest : 0;
    double alone = ranks_await_end(processes, f->ranks, hang ? -1 : victim, start, limit, &first);
    check(t, alone <= limit && alone - first <= RANKS_APART, "%s: the others end by themselves within %.1f s, the first after %.1f, "
          "the last after %.1f (unless the limit was before)", what, limit, first, alone);
    int code = run_wait(child);
    double seconds = fox_now() - start;
    char *text = run_output(&f->run, "stderr");
    check(t, code != 0 && seconds < (loss == LOSS_KILL ? 15 : 40), "%s: code %d after %.1f s", what, code, seconds);
    check(t, strstr(text, name) != NULL && strstr(text, words[loss]) != NULL && strstr(text, " in step ") != NULL,
          "%s: a line with rank, host and step, found: %s", what, text);
    ranks_check_gone(t, what, processes, f->ranks);
    check(t, checkpoint_latest(dir, path, &err), "%s: the last checkpoint is whole, found %s %s", what, path, err.text);
    const char *line = strstr(text, name);
    printf("ranks: %s: the others ended after %.1f to %.1f s, all after %.1f s, longest step %.0f ms: %.*s\n", what, first, alone, seconds,
           longest, line != NULL ? (int)strcspn(line, "\n") : 0, line);
    free(text);
    ranks_check_rest(t, f, what, hash);
}

static void test_ranks_loss(Tests *t, const RankFixture *f, const char *hash) {
    int other = f->count - 1;
    ranks_lose(t, f, 0, 2, LOSS_KILL, hash);
    ranks_lose(t, f, other, 2, LOSS_STOP, hash);
    if (!t->quick) {
        ranks_lose(t, f, 0, 0, LOSS_KILL, hash); // mpirun would end the others itself
        ranks_lose(t, f, other, 0, LOSS_KILL, hash);
        ranks_lose(t, f, other, 0, LOSS_STOP, hash);
        ranks_lose(t, f, 0, 1, LOSS_STOP, hash);
        ranks_lose(t, f, 0, 3, LOSS_HANG, hash);
        ranks_lose(t, f, other, 0, LOSS_HANG, hash);
    }
}

/* Random ranks are killed at random moments of a run that checkpoints at every step: it always goes on, and ends as one that
 * was left alone. $FOX_RANK_KILLS of them, or 4 (quick: 1). */
static void test_ranks_killed(Tests *t) {
    RankFixture fixture, *f = &fixture;
    if (!ranks_fixture_create(t, f, 4, false)) {
        return;
    }
    const char *wish = getenv("FOX_RANK_KILLS"), *options = "-x 20 -n 1 -b 1 -y";
    int kills = wish != NULL ? atoi(wish) : t->quick ? 1 : 4, killed = 0, finished = 0;
    uint64_t key = data_fresh();
    char command[8192], hash[20], found[20];
    double started = fox_now();
    run_expect(t, &f->run, "4 ranks left alone", ranks_run(f, 0, 4, "alone4", options), 0);
    double duration = fox_now() - started;
    run_hash(&f->run, hash);
    bool ok = true;
    for (uint64_t i = 0; ok && (killed < kills || finished == 0); i++) {
        pid_t processes[RANKS_MAX] = {0};
        bool strike = killed < kills;
        ranks_command(f, (int)(i % (uint64_t)f->count), 4, "killed4", options, command);
        pid_t child = run_start(&f->run, command, 1, 0);
        if (strike) {
            run_sleep(duration * fox_uniform(key, 2 * i));
            ranks_find(child, 4, processes);
            pid_t victim = processes[fox_random(key, 2 * i + 1) % 4];
            strike = victim > 0 && kill(victim, SIGKILL) == 0;
        }
        int code = run_wait(child);
        ranks_check_gone(t, "after a random kill", processes, 4);
        if (strike && code != 0) {
            killed++;
            continue;
        }
        ok = run_expect(t, &f->run, "a run whose ranks were killed before", code, 0);
        run_hash(&f->run, found);
        ok = check(t, strcmp(hash, found) == 0, "after %d kills of ranks the hash is %s, expected %s", killed, found, hash) && ok;
        run_remove(&f->run, "killed4");
        finished++;
    }
    run_remove(&f->run, "alone4");
    printf("ranks: %d kills of random ranks, %d runs came to their end, all with hash %s\n", killed, finished, hash);
}

/* ---- signals */

/* A signal to one rank, or to the launcher: all finish the step, one checkpoint is saved, the exit code is 0 (mpirun, which
 * answers SIGTERM with 1, apart), and the rest of the run ends as if nothing had been. */
static void ranks_signal(Tests *t, const RankFixture *f, int launcher, int victim, int number, int expected, const char *hash) {
    pid_t processes[RANKS_MAX] = {0};
    char what[100], dir[600], path[1024];
    RunLog log;
    FoxError err = {{0}};
    snprintf(what, sizeof what, "signal %d to %s (%s)", number, victim >= 0 ? "a rank" : "the launcher", ranks_launcher(launcher));
    for (int attempt = 0; attempt == 0 || (log.last == 400 && attempt < 5); attempt++) { // again when it was over too soon
        run_remove(&f->run, "lost");
        pid_t child = ranks_start(t, f, launcher, f->ranks, "lost", RANKS_LONG, 12, processes);
        if (victim >= 0) {
            kill(processes[victim], number);
        } else { // a launcher takes its time to pass it on; a rank that stands still keeps the run from ending meanwhile
            kill(processes[0], SIGSTOP);
            kill(child, number);
            run_sleep(1.5);
            kill(processes[0], SIGCONT);
        }
        run_expect(t, &f->run, what, run_wait(child), expected);
        ranks_check_gone(t, what, processes, f->ranks);
        run_read_log(&f->run, "lost", &log);
    }
    snprintf(dir, sizeof dir, "%s/lost", f->run.root);
    bool saved = checkpoint_latest(dir, path, &err);
    check(t, log.last < 400 && saved && atoi(strrchr(path, '_') + 1) == log.last, "%s: checkpoint of step %d, found %s %s", what,
          log.last, path, err.text);
    ranks_check_rest(t, f, what, hash);
}

/* Whether mpirun passes SIGUSR1 on to its ranks, as its manual says: not every build does. */
static bool ranks_passes_on(Tests *t, const RankFixture *f) {
    char command[1200];
    run_put(&f->run, "ask.sh", "trap 'exit 0' USR1\nkill -USR1 $PPID\nfor i in 1 2 3 4; do sleep 0.5; done\nexit 7\n", 0);
    snprintf(command, sizeof command, "mpirun --oversubscribe -np 1 /bin/sh %s/ask.sh", f->run.root);
    bool passes = run_command(&f->run, command) == 0;
    if (!passes) {
        skip(t, "ranks: SIGUSR1 to mpirun, which does not pass it on here");
    }
    return passes;
}

static void test_ranks_signals(Tests *t, const RankFixture *f, const char *hash) {
    ranks_signal(t, f, 0, 3, SIGTERM, 0, hash);
    ranks_signal(t, f, 0, -1, SIGTERM, 0, hash);
    if (f->count > 1) {
        ranks_signal(t, f, 1, 0, SIGTERM, 0, hash);
        if (ranks_passes_on(t, f)) {
            ranks_signal(t, f, 1, -1, SIGUSR1, 0, hash);
        }
        ranks_signal(t, f, 1, -1, SIGTERM, 1, hash);
        ranks_signal(t, f, 1, -1, SIGKILL, -SIGKILL, hash); // the ranks notice that mpirun is gone
    }
}

/* ---- refusals */

/* Two ranks of which the second is another: it adds options, or stands in another folder. One line says what differs. */
static void test_ranks_refusals(Tests *t, const RankFixture *f) {
    static const struct {
        const char *what, *extra, *folder, *arguments, *expected;
    } cases[] = {
        {"other options", "--lr 0.5", ".", "", "different options"},
        {"an unknown option", "--worm", ".", "", "--worm"},
        {"other data", "", "elsewhere", "", "different shards"},
        {"other weights", "", "elsewhere", "-i here -j val -e start", "different weights"},
        {"another checkpoint", "", "elsewhere", "-i here -j val -e start -o run -y", "different weights"},
        {"no data", "-i none", ".", "", "none"},
    };
    const RunFixture *run = &f->run;
    char script[4000], command[8192], train[4096], path[1400];
    /* elsewhere/data: other shards; elsewhere/here, elsewhere/val: the same; elsewhere/start, elsewhere/run: other weights */
    snprintf(command, sizeof command, "/bin/sh %s/elsewhere.sh", run->root);
    snprintf(script, sizeof script,
             "mkdir -p elsewhere/data elsewhere/run && cp data/a_train.bin data/val.bin elsewhere/data && ln -s ../data elsewhere/here && "
             "ln -s data here && ln -s data/val.bin val && ln -s ../data/val.bin elsewhere/val && cp -r %s start && cp -r %s "
             "elsewhere/start\n", run->model, run->model);
    run_put(run, "elsewhere.sh", script, 0);
    run_expect(t, run, "two folders that differ", run_command(run, command), 0);
    snprintf(path, sizeof path, "%s/elsewhere/start/model.safetensors", run->root);
    FILE *file = fopen(path, "r+b"); // the last number of the last tensor
    check(t, file != NULL && fseek(file, -4, SEEK_END) == 0 && fwrite("\0\0\0\1", 4, 1, file) == 1 && fclose(file) == 0, "%s", path);
    run_train_command(run, "run", "-x 4 -i here -j val -e start -b 1", command);
    run_expect(t, run, "a run to resume", run_command(run, command), 0);
    snprintf(command, sizeof command, "cp -r %s/run %s/elsewhere", run->root, run->root);
    run_command(run, command);
    snprintf(path, sizeof path, "%s/elsewhere/run/step_00000004/model.safetensors", run->root);
    file = fopen(path, "r+b");
    check(t, file != NULL && fseek(file, -4, SEEK_END) == 0 && fwrite("\0\0\0\1", 4, 1, file) == 1 && fclose(file) == 0, "%s", path);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        snprintf(script, sizeof script, "if [ \"$RANK\" = 1 ]; then cd %s && exec \"$@\" %s; fi\nexec \"$@\"\n", cases[i].folder,
                 cases[i].extra);
        run_put(run, "odd.sh", script, 0);
        char more[300];
        snprintf(more, sizeof more, "-x 8 -n 0 -b 1 %s", cases[i].arguments);
        run_train_command(run, "odd", more, train);
        snprintf(command, sizeof command, "%s 2 /bin/sh %s/odd.sh %s", f->launch, run->root, train);
        int code = run_command(run, command);
        char *text = run_output(run, "stderr");
        check(t, code == 1 && run_count(text, "train_fox: error: rank ") == 1 && run_count(text, "\n") == 1 &&
                     strstr(text, cases[i].expected) != NULL,
              "%s: expected code 1 and one line with '%s', found code %d: %s", cases[i].what, cases[i].expected, code, text);
        free(text);
    }
    run_train_command(run, "odd", "-x 8 -b 3", train);
    snprintf(command, sizeof command, "%s 2 %s", f->launch, train);
    int code = run_command(run, command);
    char *text = run_output(run, "stderr");
    check(t, code == 1 && run_count(text, "\n") == 1 && strstr(text, "x 2 ranks); -d 96 would work") != NULL,
          "a step that 2 ranks cannot share: code %d: %s", code, text);
    free(text);
}

/* Variables of the environment that make no sense. */
static void test_ranks_environment(Tests *t, const RankFixture *f) {
    static const struct {
        const char *variables, *expected;
    } cases[] = {
        {"WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29999", "RANK is ''"},
        {"WORLD_SIZE=2 RANK=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29999", "RANK is '2'"},
        {"WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1", "MASTER_PORT is ''"},
        {"WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=70000", "MASTER_PORT is '70000'"},
        {"WORLD_SIZE=2 RANK=0 MASTER_PORT=29999", "MASTER_ADDR is missing"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char command[4300], train[4096];
        run_train_command(&f->run, "odd", "-x 2", train);
        snprintf(command, sizeof command, "env %s %s", cases[i].variables, train);
        int code = run_command(&f->run, command);
        char *text = run_output(&f->run, "stderr");
        check(t, code == 1 && run_count(text, "\n") == 1 && strstr(text, cases[i].expected) != NULL,
              "%s: expected code 1 and one line with '%s', found %d: %s", cases[i].variables, cases[i].expected, code, text);
        free(text);
    }
}

/* While rank 0 waits for rank 1, a stranger connects and talks: it is turned away. */
static void test_ranks_stranger(Tests *t, const RankFixture *f) {
    char command[4300], train[4096];
    int port = 20000 + (int)(data_fresh() % 12000);
    struct sockaddr_in address;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    run_train_command(&f->run, "stranger", "-x 2 -b 1", train);
    snprintf(command, sizeof command, "env WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=%d %s", port, train);
    pid_t first = run_start(&f->run, command, 1, 0);
    double deadline = fox_now() + 20;
    int fd = -1;
    while (fd < 0 && fox_now() < deadline) {
        fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
            close(fd);
            fd = -1;
            run_sleep(0.02);
        }
    }
    char noise[4096];
    memset(noise, 'x', sizeof noise);
    check(t, fd >= 0 && send(fd, noise, sizeof noise, MSG_NOSIGNAL) > 0, "a stranger can connect");
    snprintf(command, sizeof command, "env WORLD_SIZE=2 RANK=1 MASTER_ADDR=localhost MASTER_PORT=%d %s", port, train);
    pid_t second = run_start(&f->run, command, 1, 0);
    run_expect(t, &f->run, "rank 1 beside a stranger", run_wait(second), 0);
    run_expect(t, &f->run, "rank 0 beside a stranger", run_wait(first), 0);
    close(fd);
}

/* A host that does not answer, here a queue of connections that is full, is given up at the deadline: by itself connect() waits
 * for minutes. */
static void test_ranks_deadline(Tests *t) {
    enum { QUEUE = 3 };
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0), queue[QUEUE];
    bool ok = listener >= 0 && bind(listener, (struct sockaddr *)&address, size) == 0 && listen(listener, 0) == 0 &&
              getsockname(listener, (struct sockaddr *)&address, &size) == 0;
    if (!check(t, ok, "ranks: a listener: %s", strerror(errno))) {
        return;
    }
    for (int i = 0; i < QUEUE; i++) {
        queue[i] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        (void)!connect(queue[i], (struct sockaddr *)&address, size);
    }
    FoxError err = {{0}};
    double start = fox_now();
    int fd = socket_connect("127.0.0.1", ntohs(address.sin_port), start + 0.5, &err);
    double waited = fox_now() - start;
    check(t, fd < 0 && waited >= 0.4 && waited < 5, "ranks: a host that does not answer: %d after %.1f s", fd, waited);
    check(t, strstr(err.text, "timed out") != NULL, "ranks: a host that does not answer: '%s'", err.text);
    for (int i = 0; i < QUEUE; i++) {
        close(queue[i]);
    }
    close(listener);
    if (fd >= 0) {
        close(fd);
    }
}

static void test_ranks(Tests *t) {
    RankFixture f;
    char hash[20];
    test_ranks_partition(t);
    test_ranks_deadline(t);
    test_ranks_watch(t);
    if (!ranks_fixture_create(t, &f, 4, false)) {
        return;
    }
    test_ranks_same(t, &f);
    test_ranks_reshard(t, &f);
    test_ranks_speed(t, &f);
    test_ranks_environment(t, &f);
    test_ranks_stranger(t, &f);
    test_ranks_refusals(t, &f);
    run_expect(t, &f.run, "4 ranks left alone", ranks_run(&f, 0, 4, "reference", RANKS_LONG), 0);
    run_hash(&f.run, hash);
    test_ranks_signals(t, &f, hash);
    test_ranks_loss(t, &f, hash);
}

#ifdef FOX_CUDA
#include <cuda_runtime_api.h>

/* On two GPUs: the losses of one; -z 0 and -z 1, and each again, end with the same bits (of two numbers there is one sum);
 * checkpoints go from 1 to 2 and back; more ranks than GPUs are refused; losses of ranks as above. */
static void test_cuda_ranks(Tests *t) {
    static const char *const zero[] = {"-z 0", "-z 1", "-z 1", "-z 1 --grad-dtype bf16"};
    RankFixture f;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices < 2) {
        skip_without_gpus(t, 2, "ranks on GPUs: two are needed, %d here", devices);
        return;
    }
    if (!ranks_fixture_create(t, &f, 2, true)) {
        return;
    }
    char command[8192], more[200], what[100], hash[20], first[20] = "";
    RunLog one, log;
    const char *options = "-x 20 -n 0 -b 1 -l 1e-3 --device cuda --deterministic";
    run_train_command(&f.run, "one", options, command);
    run_expect(t, &f.run, "one GPU", run_command(&f.run, command), 0);
    run_read_log(&f.run, "one", &one);
    for (int i = 0; i < 4; i++) {
        snprintf(what, sizeof what, "2 GPUs, %s, against one", zero[i]);
        snprintf(more, sizeof more, "%s %s", options, zero[i]);
        run_expect(t, &f.run, what, ranks_run(&f, i % f.count, 2, "many", more), 0);
        run_hash(&f.run, hash);
        run_read_log(&f.run, "many", &log);
        run_compare_rounded(t, what, &one, &log, 20, 5e-3, 1e-2); // bf16
        check(t, strlen(hash) == 16 && (i == 0 || i == 3 || strcmp(first, hash) == 0), "%s: hash %s, other runs had %s", what, hash, first);
        if (i < 3) {
            snprintf(first, sizeof first, "%s", hash);
        }
        run_remove(&f.run, "many");
    }
    for (int i = 0; i < 3; i++) { // 5 steps each on 1, 2 and 1 GPUs
        char dir[700];
        run_train_command(&f.run, "reshard", "-x 20 -n 5 -b 1 -l 1e-3 --device cuda --deterministic -y", command);
        int code = i != 1 ? run_command(&f.run, command)
                          : ranks_run(&f, 0, 2, "reshard", "-x 20 -n 5 -b 1 -l 1e-3 --device cuda --deterministic -y");
        run_expect(t, &f.run, "one of 1, 2, 1 GPUs", code, 0);
        for (int step = 5 * (i + 2); i < 2 && step <= 20; step += 5) {
            snprintf(dir, sizeof dir, "%s/reshard/step_%08d", f.run.root, step);
            check(t, remove_directory(dir), "%s can be removed", dir);
        }
    }
    run_read_log(&f.run, "reshard", &log);
    run_compare_rounded(t, "1, 2, 1 GPUs against one", &one, &log, 20, 5e-3, 1e-2);

    snprintf(more, sizeof more, "-x 2 -b 1 --device cuda -d %d", 16 * (devices + 1));
    int code = ranks_run(&f, 0, devices + 1, "crowd", more);
    char *text = run_output(&f.run, "stderr");
    check(t, code == 1 && run_count(text, "train_fox: error: ") == 1 && strstr(text, "the same GPU as rank 0") != NULL,
          "%d ranks on %d GPUs: one line, found code %d: %s", devices + 1, devices, code, text);
    free(text);

    ranks_lose(t, &f, 0, 1, LOSS_KILL, NULL);
    ranks_lose(t, &f, 0, 0, LOSS_KILL, NULL);
    ranks_lose(t, &f, 0, 1, LOSS_STOP, NULL);
    ranks_lose(t, &f, 0, 1, LOSS_HANG, NULL);
}
#endif

#endif

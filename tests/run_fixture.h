/* What tests of whole runs share: train_fox as a child process on a small model and small shards written here, what it printed, and
 * what it recorded in metrics.jsonl. Used by test_runs.h, test_eval.h and test_ranks.h. */
#ifndef FOX_RUN_FIXTURE_H
#define FOX_RUN_FIXTURE_H

#include "../train/checkpoint.h"
#include "../train/metrics.h"
#include "check.h"
#include "test_data.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define RUN_MAX_ARGS 64
#define RUN_VOCAB 61
#define RUN_MODEL_VOCAB 64

/* Where the tests of runs keep their things. */
typedef struct RunFixture {
    char root[512];  /* scratch folder of this area, absolute; children work in it */
    char program[512]; /* train_fox, absolute */
    char data[600];  /* shards: 41 windows of 16 tokens in three files, and 9 for validation */
    char model[1024]; /* checkpoint of a small model */
    bool gpu;            /* children may use a GPU; the others do not see it */
} RunFixture;

/* ---- children */

/* Splits a command at blanks, in place. %s in the words is not special: build the command with snprintf. */
static void run_split(char *command, char *argv[RUN_MAX_ARGS]) {
    int count = 0;
    for (char *word = strtok(command, " "); word != NULL && count < RUN_MAX_ARGS - 1; word = strtok(NULL, " ")) {
        argv[count++] = strcmp(word, "''") == 0 ? word + 2 : word;
    }
    argv[count] = NULL;
}

/* Starts a command; stdout and stderr go to the files ROOT/stdout and ROOT/stderr. largest_file: limit for every file
 * that the child writes, 0 for none. Children work in ROOT. Returns its process number. */
static pid_t run_start(const RunFixture *f, const char *command, int threads, int64_t largest_file) {
    char text[8192], out[600], err[600], count[16], *argv[RUN_MAX_ARGS];
    snprintf(text, sizeof text, "%s", command);
    snprintf(out, sizeof out, "%s/stdout", f->root);
    snprintf(err, sizeof err, "%s/stderr", f->root);
    snprintf(count, sizeof count, "%d", threads);
    run_split(text, argv);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (chdir(f->root) != 0) {
            _exit(127);
        }
        dup2(open(out, O_WRONLY | O_CREAT | O_TRUNC, 0666), STDOUT_FILENO);
        dup2(open(err, O_WRONLY | O_CREAT | O_TRUNC, 0666), STDERR_FILENO);
        setenv("OMP_NUM_THREADS", count, 1);
        if (!f->gpu) {
            setenv("CUDA_VISIBLE_DEVICES", "", 1);
        }
        setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1); // in a container the tests run as root
        setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
        signal(SIGINT, SIG_DFL); // a shell starts what runs in the background without it
        signal(SIGUSR1, SIG_IGN); // as some start us: the trainer takes it all the same
        sigset_t blocked; // some block signals too, and so for mpirun, which would pass none on
        sigemptyset(&blocked);
        if (strstr(argv[0], "mpirun") == NULL) {
            sigaddset(&blocked, SIGUSR1);
        }
        sigprocmask(SIG_SETMASK, &blocked, NULL);
        if (largest_file > 0) {
            struct rlimit limit = {(rlim_t)largest_file, (rlim_t)largest_file};
            setrlimit(RLIMIT_FSIZE, &limit);
        }
        execvp(argv[0], argv);
        _exit(127);
    }
    return child;
}

static void run_sleep(double seconds) {
    struct timespec time = {(time_t)seconds, (long)(1e9 * (seconds - floor(seconds)))};
    nanosleep(&time, NULL);
}

enum { RUN_LONGEST = 240 }; /* seconds; some mpirun, one of whose ranks was killed while it connected, waits for itself forever */

/* Waits for the end. Returns the exit code, or minus the number of the signal that ended it: SIGKILL for what does not end. */
static int run_wait(pid_t child) {
    int status;
    pid_t ended;
    double start = fox_now();
    while ((ended = waitpid(child, &status, WNOHANG)) == 0 || (ended < 0 && errno == EINTR)) {
        run_sleep(0.001);
        if (fox_now() - start > RUN_LONGEST) {
            fprintf(stderr, "test_fox: process %d does not end: killed after %d s\n", (int)child, RUN_LONGEST);
            kill(child, SIGKILL);
            start = fox_now();
        }
    }
    return ended < 0 ? 127 : WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int run_command(const RunFixture *f, const char *command) {
    return run_wait(run_start(f, command, 1, 0));
}

/* ROOT/name as text; "" when it is not there. The caller frees it. */
static char *run_output(const RunFixture *f, const char *name) {
    char path[1300], *text = NULL;
    size_t length;
    snprintf(path, sizeof path, "%s/%s", f->root, name);
    return file_read(path, (size_t)1 << 30, &text, &length, NULL) ? text : (char *)calloc(1, 1);
}

/* Checks the exit code of the last child, and shows what it said when it is another one. */
static bool run_expect(Tests *t, const RunFixture *f, const char *what, int code, int expected) {
    if (code == expected) {
        return check(t, true, "%s", what);
    }
    char *err = run_output(f, "stderr");
    check(t, false, "%s: exit code %d, expected %d; stderr: %.600s", what, code, expected, err);
    free(err);
    return false;
}

/* The hash in the last child's output; "" when there is none. */
static void run_hash(const RunFixture *f, char hash[20]) {
    char *out = run_output(f, "stdout"), *found = strstr(out, "parameter hash ");
    snprintf(hash, 20, "%.16s", found != NULL ? found + strlen("parameter hash ") : "");
    free(out);
}

static int run_count(const char *text, const char *word) {
    int count = 0;
    for (const char *p = text; (p = strstr(p, word)) != NULL; p += strlen(word)) {
        count++;
    }
    return count;
}

/* ---- the model, the shards */

static bool run_make_model(RunFixture *f, FoxError *err) {
    BackendSpec spec;
    memset(&spec, 0, sizeof spec);
    spec.config = fox_preset_config(fox_find_preset("fox-pro-tiny"), RUN_MODEL_VOCAB);
    spec.config.hidden_size = f->gpu ? 128 : 32; /* the GPU knows heads of 64 values */
    spec.config.num_hidden_layers = 2;
    spec.config.num_heads = 2;
    spec.config.intermediate_size = 48;
    spec.B = 1;
    spec.T = 1;
    Ranks ranks = RANKS_ALONE;
    Backend backend;
    if (!backend_cpu_open(&backend, &spec, &ranks, err) || !backend.allocate(&backend, err)) {
        return false;
    }
    float *params = FOX_NEW(float, backend.table.total);
    fox_init_parameters(&backend.table, 7, params);
    backend.write(&backend, FOX_PARAMS, 0, backend.table.total, params);
    free(params);
    TrainState state;
    memset(&state, 0, sizeof state);
    bool ok = checkpoint_save(f->root, &backend, &ranks, &state, "{}", f->model, err);
    backend.free(&backend);
    return ok;
}

static bool run_write_tokens(const char *path, int64_t count, int vocab, uint64_t key) {
    uint16_t *tokens = FOX_NEW(uint16_t, count);
    for (int64_t i = 0; i < count; i++) { // a token is mostly the last one plus one: something to learn
        bool jump = i == 0 || fox_uniform(key, (uint64_t)i) < 0.2;
        tokens[i] = (uint16_t)(jump ? fox_random(key + 1, (uint64_t)i) % (uint64_t)vocab
                                    : (tokens[i - 1] + 1u) % (uint64_t)vocab);
    }
    bool ok = data_write_shard(path, DATALOADER_MAGIC, DATALOADER_VERSION, (int32_t)count, vocab, tokens, count, 0);
    free(tokens);
    return ok;
}

static bool run_fixture_create(Tests *t, RunFixture *f) {
    static const struct {
        const char *name;
        int windows, rest;
    } shards[] = {{"a_train.bin", 13, 5}, {"b_train.bin", 21, 1}, {"c_train.bin", 7, 16}, {"val.bin", 9, 2}};
    FoxError err = {{0}};
    char *scratch = realpath(t->scratch, NULL), *program = realpath(t->train_fox, NULL);
    bool found = check(t, scratch != NULL && program != NULL, "%s and %s are there", t->scratch, t->train_fox);
    snprintf(f->root, sizeof f->root, "%s/runs_XXXXXX", found ? scratch : ""); // a new one each time: groups use the same names in it
    snprintf(f->program, sizeof f->program, "%s", found ? program : "");
    free(scratch);
    free(program);
    if (!found || !check(t, mkdtemp(f->root) != NULL, "a folder for the tests of runs: %s", strerror(errno))) {
        return false;
    }
    snprintf(f->data, sizeof f->data, "%s/data", f->root);
    bool ok = make_directories(f->data, &err) && run_make_model(f, &err);
    uint64_t key = data_fresh();
    for (int i = 0; ok && i < 4; i++) {
        char path[700];
        snprintf(path, sizeof path, "%s/%s", f->data, shards[i].name);
        ok = run_write_tokens(path, 16 * shards[i].windows + shards[i].rest, RUN_VOCAB, key + (uint64_t)i);
    }
    return check(t, ok, "shards and model for the tests of runs: %s", err.text);
}

/* The command of a run into ROOT/out: steps of four windows of 16 tokens. */
static void run_train_command(const RunFixture *f, const char *out, const char *more, char command[4096]) {
    snprintf(command, 4096, "%s -i data -o %s -e %s -T 16 -d 64 -l 1e-2 -v 7 --val-batches 3 --keep 0 %s", f->program,
             out, f->model, more);
}

/* ---- metrics.jsonl of a run */

enum { RUN_MAX_STEPS = 512 };

typedef struct RunLog {
    int count[RUN_MAX_STEPS];       /* lines of each step */
    double loss[RUN_MAX_STEPS], grad_norm[RUN_MAX_STEPS];
    double validation[RUN_MAX_STEPS]; /* 0: none after this step */
    double tokens[RUN_MAX_STEPS], tokens_per_s[RUN_MAX_STEPS], step_ms[RUN_MAX_STEPS];
    int last;                       /* largest step */
    int starts, checkpoints;        /* "run" lines; "checkpoint" lines */
} RunLog;

/* That member's number; NaN when there is none: null stands for what is not finite. */
static double run_number(const Json *record, const char *key) {
    const Json *value = json_get(record, key);
    return value != NULL && value->type == JSON_NUMBER ? value->number : NAN;
}

/* A step's loss or norm that is not finite is NaN there, and fails every comparison. */
static void run_read_log(const RunFixture *f, const char *out, RunLog *log) {
    char name[600];
    memset(log, 0, sizeof *log);
    snprintf(name, sizeof name, "%s/metrics.jsonl", out);
    char *text = run_output(f, name);
    for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        JsonDocument document;
        if (!json_parse(line, strlen(line), "line", &document, NULL)) {
            continue; // a child that was killed may leave part of a line
        }
        const Json *kind = json_get(document.root, "kind"), *step = json_get(document.root, "step");
        const char *name_of_kind = kind != NULL && kind->type == JSON_STRING ? kind->string : "";
        bool is_step = step != NULL && strcmp(name_of_kind, "step") == 0;
        if (is_step && step->integer > 0 && step->integer < RUN_MAX_STEPS) {
            int s = (int)step->integer;
            log->count[s]++;
            log->loss[s] = run_number(document.root, "loss");
            log->grad_norm[s] = run_number(document.root, "grad_norm");
            log->tokens[s] = run_number(document.root, "tokens");
            log->tokens_per_s[s] = run_number(document.root, "tokens_per_s");
            log->step_ms[s] = run_number(document.root, "step_ms");
            log->last = s > log->last ? s : log->last;
        } else if (step != NULL && strcmp(name_of_kind, "validation") == 0 && step->integer > 0 && step->integer < RUN_MAX_STEPS) {
            log->validation[step->integer] = run_number(document.root, "loss");
        }
        log->starts += strcmp(name_of_kind, "run") == 0;
        log->checkpoints += strcmp(name_of_kind, "checkpoint") == 0;
        json_free(&document);
    }
    free(text);
}

/* Every step once; losses, of validations too, differ by loss_tolerance at most, gradient norms by norm_tolerance times their
 * size. A run that was resumed may have more validations: of those both have, the last step's among them. */
static void run_compare_rounded(Tests *t, const char *what, const RunLog *a, const RunLog *b, int steps, double loss_tolerance,
                                double norm_tolerance) {
    double loss = 0, norm = 0;
    bool once = true;
    for (int s = 1; s <= steps; s++) {
        once = once && a->count[s] == 1 && b->count[s] == 1;
        double d = fabs(a->loss[s] - b->loss[s]), n = fabs(a->grad_norm[s] - b->grad_norm[s]) / fabs(a->grad_norm[s]);
        double v = a->validation[s] != 0 && b->validation[s] != 0 ? fabs(a->validation[s] - b->validation[s]) : 0;
        loss = worse(loss, worse(d, v));
        norm = worse(norm, n);
    }
    check(t, once && a->last == steps && b->last == steps, "%s: steps 1 to %d, each once", what, steps);
    check(t, (a->validation[steps] != 0) == (b->validation[steps] != 0), "%s: both or neither end with a validation", what);
    check(t, loss <= loss_tolerance, "%s: loss differs by %.3g, allowed %.3g", what, loss, loss_tolerance);
    check(t, norm <= norm_tolerance, "%s: gradient norm differs by %.3g of it, allowed %.3g", what, norm, norm_tolerance);
    if (loss_tolerance > 0) {
        printf("runs: %s: losses differ by %.2g at most, gradient norms by %.2g of them\n", what, loss, norm);
    }
}

/* The same with one bound for both; 0: the same bits. */
static void run_compare_logs(Tests *t, const char *what, const RunLog *a, const RunLog *b, int steps, double tolerance) {
    run_compare_rounded(t, what, a, b, steps, tolerance, tolerance);
}

static void run_remove(const RunFixture *f, const char *out) {
    char command[700];
    snprintf(command, sizeof command, "rm -rf %s/%s", f->root, out);
    run_wait(run_start(f, command, 1, 0));
}

/* Writes ROOT/name: bytes, or a text of length strlen when length is 0. */
static void run_put(const RunFixture *f, const char *name, const void *bytes, size_t length) {
    char path[2000], *slash;
    snprintf(path, sizeof path, "%s/%s", f->root, name);
    slash = strrchr(path, '/');
    *slash = '\0';
    make_directories(path, NULL);
    *slash = '/';
    FILE *file = fopen(path, "wb");
    if (file != NULL) {
        fwrite(bytes, 1, length > 0 ? length : strlen((const char *)bytes), file);
        fclose(file);
    }
}

/* ---- speed */

/* The records of the steps of a run that took `wall` seconds from its start to its end, and computed nearly all of them. */
static void run_check_speed(Tests *t, const char *what, const RunLog *log, int steps, int batch_tokens, double wall) {
    double sum = 0, worst = 0;
    bool counted = log->last == steps;
    for (int s = 1; s <= steps; s++) {
        double ms = log->step_ms[s], rate = log->tokens_per_s[s];
        double rounding = 0.05 * ms / 1e3 + rate * 0.0005 / 1e3; // tokens_per_s to a tenth, step_ms to a microsecond
        double off = fabs(rate * ms / 1e3 - batch_tokens) / (1.01 * rounding + 1e-6 * batch_tokens);
        worst = worse(worst, off);
        counted = counted && log->count[s] == 1 && log->tokens[s] == (double)batch_tokens * s;
        sum += ms / 1e3;
    }
    check(t, counted, "%s: %d steps, after each as many tokens as were trained on", what, steps);
    check(t, worst <= 1, "%s: tokens_per_s * step_ms is off the tokens of a step by %.3g of what rounding may do", what, worst);
    check(t, sum >= 0.3 * wall && sum <= wall, "%s: the steps took %.3f s of the %.3f s of the run", what, sum, wall);
    printf("runs: %s: the steps took %.0f%% of the run's %.1f s\n", what, 100 * sum / wall, wall);
}

enum { RUN_SPEED_TOKENS = 1024 }; /* a step: many micro-batches, of which a clock could miss all but one */

/* The options of a run that is timed. Returns its steps. */
static int run_speed_options(const Tests *t, char more[64]) {
    int steps = t->quick ? 8 : 60;
    snprintf(more, 64, "-x %d -n -1 -v 0 -b 1 -d %d", steps, RUN_SPEED_TOKENS);
    return steps;
}

#endif

/* Tests of whole runs: train_fox is started as a child on a small model and small shards written here.
 *
 * Resume bit for bit, recorded speed, samples, SIGKILL at random moments, SIGTERM, a full disk, bad input. Several ranks:
 * tests/test_ranks.h. */
#ifndef FOX_TEST_RUNS_H
#define FOX_TEST_RUNS_H

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
    snprintf(f->root, sizeof f->root, "%s/runs", found ? scratch : "");
    snprintf(f->program, sizeof f->program, "%s", found ? program : "");
    free(scratch);
    free(program);
    if (!found) {
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

/* ---- resume */

/* 20 steps = 10 + resume + 10, bit for bit. With 41 windows an epoch ends inside step 11; the shuffled order crosses
 * shards all the time. The resumed half runs on another number of threads. */
static void test_run_resume(Tests *t, const RunFixture *f, const char *batch) {
    char command[4096], more[200], dir[600], path[1024], hash[20], resumed[20];
    FoxError err = {{0}};
    RunLog whole, halves;
    snprintf(more, sizeof more, "-x 20 -n 10 %s", batch);
    run_remove(f, "whole");
    run_train_command(f, "whole", more, command);
    if (!run_expect(t, f, "20 steps", run_command(f, command), 0)) {
        return;
    }
    run_hash(f, hash);
    run_read_log(f, "whole", &whole);
    check(t, strlen(hash) == 16 && strspn(hash, "0123456789abcdef") == 16, "a hash of 16 digits, found '%s'", hash);
    check(t, whole.loss[20] < whole.loss[1] - 0.2, "it learns: loss %.3f, then %.3f", whole.loss[1], whole.loss[20]);

    snprintf(path, sizeof path, "%s/whole/step_00000020", f->root);
    check(t, remove_directory(path), "%s can be removed", path);
    snprintf(dir, sizeof dir, "%s/whole", f->root);
    check(t, checkpoint_latest(dir, path, &err) && strstr(path, "step_00000010") != NULL,
          "the checkpoint of step 10 is there");
    snprintf(more, sizeof more, "-x 20 -n 10 %s -y", batch);
    run_train_command(f, "whole", more, command);
    run_expect(t, f, "10 more steps", run_wait(run_start(f, command, 2, 0)), 0);
    run_hash(f, resumed);
    run_read_log(f, "whole", &halves);
    check(t, halves.starts == 2, "two starts in metrics.jsonl, found %d", halves.starts);
    check(t, strcmp(hash, resumed) == 0, "20 steps (%s) end with hash %s, 10 + 10 with %s", batch, hash, resumed);
    run_compare_logs(t, "20 steps against 10 + 10", &whole, &halves, 20, 0);
    char *text = run_output(f, "stdout");
    check(t, strstr(text, "changed") == NULL, "the same settings, found %s", text);
    free(text);

    snprintf(more, sizeof more, "-x 21 -n 10 %s -l 0.0625 -y", batch);
    run_train_command(f, "whole", more, command);
    run_expect(t, f, "a step with another rate", run_wait(run_start(f, command, 2, 0)), 0);
    text = run_output(f, "stdout");
    check(t, strstr(text, "changed   steps: 21, was 20\n") != NULL && strstr(text, "changed   lr: 0.0625, was ") != NULL, "changed settings are said, found %s", text);
    free(text);
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
        worst = off <= worst ? worst : off;
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

static void test_run_speed(Tests *t, const RunFixture *f) {
    char command[4096], more[64];
    RunLog log;
    int steps = run_speed_options(t, more);
    run_train_command(f, "speed", more, command);
    double start = fox_now();
    run_expect(t, f, "a run that is timed", run_command(f, command), 0);
    double wall = fox_now() - start;
    run_read_log(f, "speed", &log);
    run_check_speed(t, "one process", &log, steps, RUN_SPEED_TOKENS, wall);
    run_remove(f, "speed");
}

/* ---- samples */

enum { RUN_BYTES_VOCAB = 257, RUN_SAMPLE_TOKENS = 24 };

/* The text of the sample after a step, between its lines "---"; "" when there is none. The caller frees it. */
static char *run_sample(const RunFixture *f, int step) {
    char head[64];
    snprintf(head, sizeof head, "step %d, a sample:\n---\n", step);
    char *out = run_output(f, "stdout"), *from = strstr(out, head);
    from = from != NULL ? from + strlen(head) : out;
    char *end = from != out ? strstr(from, "\n---\n") : NULL;
    char *text = strndup(from, end != NULL ? (size_t)(end - from) : 0);
    free(out);
    return text;
}

/* Samples of a run on bytes: the prompt, and what is likeliest after it; the same in the same run again. Training goes on as in
 * a run without samples. */
static void test_run_samples(Tests *t, const RunFixture *f) {
    static const char *const more[] = {"-s 2", "-s 2", "-s 0"};
    char command[4096], path[700], hash[3][20];
    char *texts[2][2] = {{NULL, NULL}, {NULL, NULL}};
    FoxError err = {{0}};
    snprintf(path, sizeof path, "%s/bytes", f->root);
    bool ok = make_directories(path, &err);
    snprintf(path, sizeof path, "%s/bytes/a_train.bin", f->root);
    // always the same text: of some the likeliest first token is the end of the text
    check(t, ok && run_write_tokens(path, 1000, RUN_BYTES_VOCAB, 1), "%s can be written", path);
    for (int i = 0; i < 3; i++) {
        snprintf(command, sizeof command, "%s -i bytes -o bytes_out -e fox-pro-tiny -T 32 -b 2 -d 64 -x 4 -n -1 -v 0 "
                 "--sample-temperature 0 --sample-tokens %d --sample-prompt fox %s", f->program, RUN_SAMPLE_TOKENS, more[i]);
        run_expect(t, f, "a run on bytes", run_command(f, command), 0);
        run_hash(f, hash[i]);
        char *out = run_output(f, "stdout");
        int samples = run_count(out, ", a sample:\n");
        check(t, samples == (i < 2 ? 2 : 0), "%s of 4 steps: found %d samples", more[i], samples);
        free(out);
        for (int k = 0; i < 2 && k < 2; k++) {
            texts[i][k] = run_sample(f, 2 + 2 * k);
        }
        run_remove(f, "bytes_out");
    }
    for (int k = 0; k < 2; k++) {
        const char *text = texts[0][k];
        int characters = 0;
        for (const char *p = text; *p != '\0'; p++) {
            characters += (*p & 0xc0) != 0x80;
        }
        bool longer = characters > 3 && characters <= 3 + RUN_SAMPLE_TOKENS; // a character has a byte or more
        check(t, strncmp(text, "fox", 3) == 0 && longer, "the sample after step %d: the prompt and more, found '%s'", 2 + 2 * k,
              text);
        check(t, strcmp(text, texts[1][k]) == 0, "the sample after step %d: '%s', then '%s'", 2 + 2 * k, text, texts[1][k]);
        free(texts[0][k]);
        free(texts[1][k]);
    }
    check(t, strlen(hash[0]) == 16 && strcmp(hash[0], hash[1]) == 0 && strcmp(hash[0], hash[2]) == 0,
          "samples do not change a run: hashes %s, %s, %s", hash[0], hash[1], hash[2]);
}

/* ---- signals */

/* Kills a run that checkpoints at every step, again and again, at random moments: it always resumes, and every run that
 * comes to its end has the hash and the steps of one that was left alone. */
static void test_run_kill(Tests *t, const RunFixture *f) {
    const char *wish = getenv("FOX_KILLS");
    int kills = wish != NULL ? atoi(wish) : t->quick ? 5 : 20, killed = 0, finished = 0;
    char command[4096], hash[20], found[20];
    RunLog reference, log;
    run_train_command(f, "alone", "-x 20 -n 1 -b 2", command);
    double started = fox_now();
    if (!run_expect(t, f, "a run left alone", run_command(f, command), 0)) {
        return;
    }
    double duration = fox_now() - started;
    run_hash(f, hash);
    run_read_log(f, "alone", &reference);
    run_train_command(f, "killed", "-x 20 -n 1 -b 2 -y", command);
    uint64_t key = data_fresh();
    bool ok = true;
    for (int i = 0; ok && (killed < kills || finished == 0); i++) {
        pid_t child = run_start(f, command, 1, 0);
        if (killed < kills) {
            run_sleep(duration * 0.6 * fox_uniform(key, (uint64_t)i));
            kill(child, SIGKILL);
        }
        int code = run_wait(child);
        killed += code == -SIGKILL;
        if (code == -SIGKILL) {
            continue;
        }
        ok = run_expect(t, f, "a run that was killed before", code, 0);
        run_hash(f, found);
        bool same = strcmp(hash, found) == 0;
        ok = check(t, same, "after %d kills the hash is %s, expected %s", killed, found, hash) && ok;
        run_read_log(f, "killed", &log);
        run_compare_logs(t, "killed runs", &reference, &log, 20, 0);
        run_remove(f, "killed");
        finished++;
    }
    check(t, !ok || killed == kills, "%d kills, expected %d", killed, kills);
    printf("runs: %d kills at random moments, %d runs came to their end, all with hash %s\n", killed, finished, hash);
}

/* SIGTERM in the middle: the step is finished and saved, exit code 0; the rest of the run ends with the same hash. */
static void test_run_stop(Tests *t, const RunFixture *f, int number) {
    char command[4096], hash[20], found[20], path[1024], dir[600];
    RunLog log;
    FoxError err = {{0}};
    run_remove(f, "stopped");
    run_train_command(f, "stopped", "-x 300 -n 0 -b 2", command);
    run_expect(t, f, "300 steps", run_command(f, command), 0);
    run_hash(f, hash);
    for (int attempt = 0; attempt < 5 && (attempt == 0 || log.last == 300); attempt++) { // a busy machine may be late
        run_remove(f, "stopped");
        pid_t child = run_start(f, command, 1, 0);
        double deadline = fox_now() + 60;
        do {
            run_sleep(0.002);
            run_read_log(f, "stopped", &log);
        } while (log.last < 3 && fox_now() < deadline);
        kill(child, number);
        run_expect(t, f, "a stopped run", run_wait(child), 0);
        run_read_log(f, "stopped", &log);
    }
    snprintf(dir, sizeof dir, "%s/stopped", f->root);
    bool saved = checkpoint_latest(dir, path, &err);
    check(t, log.last >= 3 && log.last < 300, "signal %d stops it before its end: %d steps", number, log.last);
    check(t, saved && atoi(strrchr(path, '_') + 1) == log.last, "signal %d: checkpoint of step %d, found %s %s", number,
          log.last, path, err.text);
    run_train_command(f, "stopped", "-x 300 -n 0 -b 2 -y", command);
    run_expect(t, f, "the rest of a stopped run", run_command(f, command), 0);
    run_hash(f, found);
    check(t, strcmp(hash, found) == 0, "stopped at step %d, the hash is %s, expected %s", log.last, found, hash);
}

/* Whether a process has a handler for a signal. */
static bool run_handles(pid_t process, int number) {
    char path[64], line[256];
    unsigned long long caught = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)process);
    FILE *file = fopen(path, "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, "SigCgt:", 7) == 0) {
            caught = strtoull(line + 7, NULL, 16);
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return (caught >> (number - 1) & 1) != 0;
}

/* A child's exit code, as of run_wait, if it ends within so many seconds; otherwise it goes on, and false. */
static bool run_ends(pid_t child, double seconds, int *code) {
    siginfo_t info;
    double deadline = fox_now() + seconds;
    do {
        info.si_pid = 0;
        if (waitid(P_PID, (id_t)child, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == child) {
            *code = run_wait(child);
            return true;
        }
        run_sleep(0.01);
    } while (fox_now() < deadline);
    return false;
}

/* In a step that takes far longer than the test: a second signal soon after the first changes nothing, one more than 3 seconds
 * after it ends the run at once, and nothing is saved. */
static void test_run_impatience(Tests *t, const RunFixture *f) {
    char command[4096], dir[600], path[1024];
    int code = 0;
    FoxError err = {{0}};
    run_train_command(f, "long", "-x 2 -n 1 -b 1 -d 16777216", command); // a million micro-batches: several minutes
    pid_t child = run_start(f, command, 1, 0);
    double deadline = fox_now() + 60;
    while (!run_handles(child, SIGTERM) && fox_now() < deadline) {
        run_sleep(0.01);
    }
    bool ended = false, told = false;
    double first = fox_now();
    kill(child, SIGTERM);
    do {
        run_sleep(0.02);
        char *text = run_output(f, "stdout");
        told = strstr(text, "stops after this step") != NULL;
        free(text);
    } while (!told && fox_now() < first + 10);
    double seen = fox_now(); // the first signal had been taken by then
    check(t, told, "the first signal is answered");
    run_sleep(fmax(0, first + 1 - seen));
    kill(child, SIGTERM);
    if (fox_now() - first < 2.5) { // else this machine stood still, and it is another wish
        ended = run_ends(child, 1, &code);
        check(t, !ended, "a second signal after 1 s changes nothing, found code %d", code);
    }
    run_sleep(fmax(0, seen + 3.5 - fox_now()));
    kill(child, SIGTERM);
    ended = ended || run_ends(child, 5, &code);
    if (!ended) {
        kill(child, SIGKILL);
        code = run_wait(child);
    }
    check(t, code == 128 + SIGTERM, "a signal after more than 3 s ends at once: expected code %d, found %d", 128 + SIGTERM, code);
    snprintf(dir, sizeof dir, "%s/long", f->root);
    check(t, !checkpoint_latest(dir, path, &err) && err.text[0] == '\0', "nothing is saved, found %s %s", path, err.text);
    run_remove(f, "long");
}

/* ---- a full disk */

/* After a run into ROOT/full, where only the checkpoint of step 5 fitted: it is there, whole, and the run goes on from
 * it when there is room again. */
static void run_check_full(Tests *t, const RunFixture *f, int code, const char *what) {
    char path[1024], dir[600];
    FoxError err = {{0}};
    char *text = run_output(f, "stderr");
    run_expect(t, f, what, code, 1);
    check(t, run_count(text, "train_fox: error: ") == 1, "%s: one error line, found: %s", what, text);
    check(t, run_count(text, "train_fox: warning: no checkpoint at step 10: ") == 1, "%s: one warning: %s", what, text);
    free(text);
    snprintf(dir, sizeof dir, "%s/full", f->root);
    check(t, checkpoint_latest(dir, path, &err) && strstr(path, "step_00000005") != NULL,
          "%s: step 5 is the newest, found %s %s", what, path, err.text);
}

static void test_run_full_disk(Tests *t, const RunFixture *f) {
    char command[4096], hash[20], found[20], dir[600], path[1024];
    RunLog reference, log;
    run_train_command(f, "roomy", "-x 15 -n 5 -b 2", command);
    run_expect(t, f, "15 steps", run_command(f, command), 0);
    run_hash(f, hash);
    run_read_log(f, "roomy", &reference);
    snprintf(path, sizeof path, "%s/roomy/step_00000005/model.safetensors", f->root);
    struct stat status;
    int64_t model_bytes = stat(path, &status) == 0 ? (int64_t)status.st_size : 0;
    snprintf(dir, sizeof dir, "%s/full", f->root);
    FoxError err = {{0}};
    make_directories(dir, &err);
    char options[64];
    int64_t room = model_bytes * 9 / 2; // one checkpoint is three times a model
    snprintf(options, sizeof options, "size=%lld", (long long)room);
    bool mounted = mount("tmpfs", dir, "tmpfs", 0, options) == 0;
    run_train_command(f, "full", "-x 15 -n 5 -b 2", command);
    if (mounted) {
        run_check_full(t, f, run_command(f, command), "a full disk");
        snprintf(options, sizeof options, "size=%lld", (long long)(model_bytes * 40));
        check(t, mount("tmpfs", dir, "tmpfs", MS_REMOUNT, options) == 0, "the small disk grows");
    } else {
        skip(t, "runs: a full disk: no tmpfs can be mounted here (%s); files that may not grow are tested", strerror(errno));
        run_train_command(f, "full", "-x 5 -n 5 -b 2", command);
        run_expect(t, f, "5 steps", run_command(f, command), 0);
        run_train_command(f, "full", "-x 15 -n 5 -b 2 -y", command);
        run_check_full(t, f, run_wait(run_start(f, command, 1, model_bytes / 2)), "files that may not grow");
    }
    run_train_command(f, "full", "-x 15 -n 5 -b 2 -y", command);
    run_expect(t, f, "after the disk was full", run_command(f, command), 0);
    run_hash(f, found);
    run_read_log(f, "full", &log);
    if (mounted) {
        check(t, strcmp(hash, found) == 0, "after the disk was full the hash is %s, expected %s", found, hash);
        run_compare_logs(t, "after the disk was full", &reference, &log, 15, 0);
        check(t, umount(dir) == 0, "the small disk is unmounted");
    }
}

/* The same disk, but there is room again before the run ends: it ends as one that never lacked any. */
static void test_run_room_again(Tests *t, const RunFixture *f) {
    enum { STEPS = 200, EVERY = 20 };
    char command[4096], more[64], hash[20], found[20], dir[600], path[1100], newest[1024], options[64];
    FoxError err = {{0}};
    struct stat status;
    RunLog reference, log;
    snprintf(path, sizeof path, "%s/model.safetensors", f->model);
    int64_t model_bytes = stat(path, &status) == 0 ? (int64_t)status.st_size : 0;
    snprintf(dir, sizeof dir, "%s/small", f->root);
    make_directories(dir, &err);
    snprintf(options, sizeof options, "size=%lld", (long long)(model_bytes * 9 / 2)); // one checkpoint, not two
    if (mount("tmpfs", dir, "tmpfs", 0, options) != 0) {
        printf("runs: a disk that grows is skipped: no tmpfs can be mounted here (%s)\n", strerror(errno));
        return;
    }
    snprintf(more, sizeof more, "-x %d -n %d -b 1 -d 512", STEPS, EVERY); // a second or more is left when the disk is full
    run_remove(f, "roomy");
    run_train_command(f, "roomy", more, command);
    run_expect(t, f, "a run with room", run_command(f, command), 0);
    run_hash(f, hash);
    run_read_log(f, "roomy", &reference);
    snprintf(path, sizeof path, "%s/small/metrics.jsonl", f->root); // elsewhere: a record may come while the disk is full
    check(t, symlink("../small_metrics.jsonl", path) == 0, "%s can be a link", path);
    run_train_command(f, "small", more, command);
    pid_t child = run_start(f, command, 1, 0);
    double deadline = fox_now() + 60;
    bool warned = false;
    do {
        run_sleep(0.002);
        char *text = run_output(f, "stderr");
        warned = strstr(text, "train_fox: warning: no checkpoint at step ") != NULL;
        free(text);
    } while (!warned && kill(child, 0) == 0 && fox_now() < deadline);
    kill(child, SIGSTOP); // it waits for the room
    snprintf(options, sizeof options, "size=%lld", (long long)(model_bytes * 4 * STEPS / EVERY + (4 << 20)));
    check(t, warned && mount("tmpfs", dir, "tmpfs", MS_REMOUNT, options) == 0, "the disk is full, and grows");
    kill(child, SIGCONT);
    run_expect(t, f, "a disk that was full for a while", run_wait(child), 0);
    run_hash(f, found);
    run_read_log(f, "small", &log);
    char *text = run_output(f, "stderr");
    check(t, run_count(text, "train_fox: error: ") == 0 && run_count(text, "\n") == run_count(text, "train_fox: warning: "),
          "a disk that was full for a while: warnings alone, found: %s", text);
    free(text);
    check(t, strlen(hash) == 16 && strcmp(hash, found) == 0, "with a disk that was full the hash is %s, expected %s", found, hash);
    run_compare_logs(t, "with a disk that was full for a while", &reference, &log, STEPS, 0);
    snprintf(path, sizeof path, "%s/small/step_%08d", f->root, 2 * EVERY);
    check(t, access(path, F_OK) != 0, "the second checkpoint did not fit");
    check(t, checkpoint_latest(dir, newest, &err) && atoi(strrchr(newest, '_') + 1) == STEPS,
          "the last checkpoint is of step %d, found %s %s", STEPS, newest, err.text);
    run_train_command(f, "small", more, command);
    strncat(command, " -y", sizeof command - strlen(command) - 1);
    run_expect(t, f, "resumed where it had ended", run_command(f, command), 0);
    run_hash(f, found);
    check(t, strcmp(hash, found) == 0, "the last checkpoint has hash %s, expected %s", found, hash);
    check(t, umount(dir) == 0, "the small disk is unmounted");
}

/* ---- bad input */

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

/* Copies FROM/name to TO/name with the first `old` replaced by `new_text` (NULL: no change). */
static void run_copy(Tests *t, const RunFixture *f, const char *from, const char *to, const char *name, const char *old,
                     const char *new_text) {
    char path[1300], *text, *at = NULL;
    size_t length;
    FoxError err = {{0}};
    snprintf(path, sizeof path, "%s/%s", from, name);
    if (!check(t, file_read(path, (size_t)1 << 30, &text, &length, &err), "%s", err.text)) {
        return;
    }
    snprintf(path, sizeof path, "%s/%s", to, name);
    if (old == NULL) {
        run_put(f, path, text, length);
        free(text);
        return;
    }
    size_t cut = strlen(old), add = strlen(new_text);
    for (size_t i = 0; at == NULL && i + cut <= length; i++) {
        at = memcmp(text + i, old, cut) == 0 ? text + i : NULL;
    }
    if (check(t, at != NULL, "%s/%s holds %s", from, name, old)) {
        char *copy = (char *)malloc(length + add);
        size_t before = (size_t)(at - text);
        memcpy(copy, text, before);
        memcpy(copy + before, new_text, add);
        memcpy(copy + before + add, at + cut, length - before - cut);
        run_put(f, path, copy, length - cut + add);
        free(copy);
    }
    free(text);
}

/* A copy of the model in ROOT/to, with one text replaced in config.json or in the header of model.safetensors. */
static void run_copy_model(Tests *t, const RunFixture *f, const char *to, const char *config_old,
                           const char *config_new, const char *header_old, const char *header_new) {
    run_copy(t, f, f->model, to, "config.json", config_old, config_new);
    run_copy(t, f, f->model, to, "model.safetensors", header_old, header_new);
}

/* A shard of `count` tokens that are all `token`, with any header. */
static void run_bad_shard(const RunFixture *f, const char *name, int magic, int version, int count, int vocab,
                          int real_count, int token, int extra_bytes) {
    char path[1300];
    uint16_t tokens[256];
    for (int i = 0; i < 256; i++) {
        tokens[i] = (uint16_t)token;
    }
    snprintf(path, sizeof path, "%s/bad/%s.bin", f->root, name);
    data_write_shard(path, magic, version, count, vocab, tokens, real_count, extra_bytes);
}

static void run_bad_shards(const RunFixture *f) {
    const int M = DATALOADER_MAGIC, V = RUN_VOCAB;
    run_put(f, "bad/short_header.bin", "only this", 0);
    run_bad_shard(f, "magic", 20240521, 1, 100, V, 100, 1, 0);
    run_bad_shard(f, "version", M, 2, 100, V, 100, 1, 0);
    run_bad_shard(f, "count_large", M, 1, 101, V, 100, 1, 0);
    run_bad_shard(f, "count_small", M, 1, 99, V, 100, 1, 0);
    run_bad_shard(f, "count_negative", M, 1, -100, V, 100, 1, 0);
    run_bad_shard(f, "odd_byte", M, 1, 100, V, 100, 1, 1);
    run_bad_shard(f, "vocabulary_large", M, 1, 100, 70000, 100, 1, 0);
    run_bad_shard(f, "vocabulary_negative", M, 1, 100, -1, 100, 1, 0);
    run_bad_shard(f, "shorter_than_window", M, 1, 16, V, 16, 1, 0);
    run_bad_shard(f, "token", M, 1, 100, V, 100, V, 0);
    run_bad_shard(f, "other_vocabulary", M, 1, 100, V - 1, 100, 1, 0);
    run_bad_shard(f, "gpt2", M, 1, 100, 0, 100, 1, 0);
    run_put(f, "bad/mixed/x", "", 0);
    run_bad_shard(f, "mixed/train_1", M, 1, 100, V, 100, 1, 0);
    run_bad_shard(f, "mixed/train_2", M, 1, 100, V - 1, 100, 1, 0);
    run_put(f, "bad/no_shards/readme", "nothing", 0);
    run_put(f, "bad/folder.bin/x", "nothing", 0);
    char link_path[1300];
    snprintf(link_path, sizeof link_path, "%s/bad/dangling.bin", f->root);
    if (symlink("nowhere", link_path) != 0) {
        run_put(f, "bad/dangling.bin", "no links here: a short file does as well", 0);
    }
}

static void run_bad_models(Tests *t, const RunFixture *f) {
    static const struct {
        const char *name, *config_old, *config_new, *header_old, *header_new;
    } copies[] = {
        {"bad/window", "\"window_size\": null", "\"window_size\": 128", NULL, NULL},
        {"bad/other_width", "\"hidden_size\": 32", "\"hidden_size\": 16", NULL, NULL},
        {"bad/uneven_heads", "\"num_heads\": 2", "\"num_heads\": 3", NULL, NULL},
        {"bad/no_heads", "\"num_heads\": 2", "\"num_heads\": 0", NULL, NULL},
        {"bad/giant", "\"hidden_size\": 32", "\"hidden_size\": 65536", NULL, NULL},
        {"bad/many_layers", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 2000000000", NULL, NULL},
        {"bad/one_layer_more", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", NULL, NULL},
        {"bad/width_is_text", "\"hidden_size\": 32", "\"hidden_size\": \"32\"", NULL, NULL},
        {"bad/width_is_huge", "\"hidden_size\": 32", "\"hidden_size\": 1e999", NULL, NULL},
        {"bad/small_vocabulary", "\"vocab_size\": 64", "\"vocab_size\": 60", NULL, NULL},
        {"bad/other_type", "forgetting_transformer-project_fox", "llama", NULL, NULL},
        {"bad/twice", "\"hidden_size\": 32", "\"hidden_size\": 32, \"hidden_size\": 32", NULL, NULL},
        {"bad/missing_tensor", NULL, NULL, "model.norm.weight", "model.worm.weight"},
        {"bad/dtype", NULL, NULL, "F32", "I32"},
        {"bad/dtype_unknown", NULL, NULL, "F32", "Q99"},
        {"bad/shape", NULL, NULL, "[64,32]", "[32,64]"},
        {"bad/offsets", NULL, NULL, "[8192,8320]", "[8191,8319]"},
        {"bad/no_metadata_json", NULL, NULL, "__metadata__\":{", "__metadata__\":["},
    };
    for (size_t i = 0; i < sizeof copies / sizeof *copies; i++) {
        run_copy_model(t, f, copies[i].name, copies[i].config_old, copies[i].config_new, copies[i].header_old,
                       copies[i].header_new);
    }
    char deep[3000];
    memset(deep, '[', sizeof deep);
    run_put(f, "bad/deep/config.json", deep, sizeof deep);
    run_put(f, "bad/broken/config.json", "{\"hidden_size\": 32,", 0);
    run_put(f, "bad/no_config/x", "nothing", 0);
    run_put(f, "bad/array/config.json", "[1, 2, 3]", 0);
    run_copy(t, f, f->model, "bad/no_weights", "config.json", NULL, NULL);
    static const char *const weights[][2] = {
        {"bad/header_length", "\0\0\0\0\0\0\0\x80{}"}, {"bad/header_long", "\xff\xff\0\0\0\0\0\0{}"},
        {"bad/header_text", "\x08\0\0\0\0\0\0\0nonsense"}};
    for (size_t i = 0; i < 3; i++) {
        char name[64];
        char *bytes = (char *)calloc(1, 1 << 18); // as long as the weights, so that the header is what is wrong
        memcpy(bytes, weights[i][1], 10);
        memcpy(bytes + 8, i == 2 ? "nonsense" : "{}      ", 8);
        snprintf(name, sizeof name, "%s/model.safetensors", weights[i][0]);
        run_put(f, name, bytes, 1 << 18);
        run_copy(t, f, f->model, weights[i][0], "config.json", NULL, NULL);
        free(bytes);
    }
    char path[1300];
    run_copy_model(t, f, "bad/truncated", NULL, NULL, NULL, NULL);
    snprintf(path, sizeof path, "%s/bad/truncated/model.safetensors", f->root);
    struct stat status;
    check(t, stat(path, &status) == 0 && truncate(path, status.st_size - 100) == 0, "%s can be cut", path);
}

/* Copies of a run's only checkpoint, each with something wrong. */
static void run_bad_runs(Tests *t, const RunFixture *f) {
    static const struct {
        const char *out, *file, *old, *new_text;
    } copies[] = {
        {"bad/run_state", "state.json", "\"step\"", "\"stop\""},
        {"bad/run_state_negative", "state.json", "\"step\": 2", "\"step\": -2"},
        {"bad/run_state_cut", "state.json", "}", ""},
        {"bad/run_state_position", "state.json", "\"next_window\": 8", "\"next_window\": 7"},
        {"bad/run_tensor", "model.safetensors", "model.norm.weight", "model.worm.weight"},
        {"bad/run_optimizer", "optimizer-00000-of-00001.safetensors", "exp_avg\"", "exp_axg\""},
        {"bad/run_hash", "state.json", "\"param_hash\": \"0x", "\"param_hash\": \"0x1"},
    };
    static const char *const files[] = {"config.json", "model.safetensors", "optimizer-00000-of-00001.safetensors",
                                        "state.json"};
    char command[4096], from[600], to[600];
    run_train_command(f, "good_run", "-x 2 -n 0 -b 2", command);
    run_expect(t, f, "a run to be damaged", run_command(f, command), 0);
    snprintf(from, sizeof from, "%s/good_run/step_00000002", f->root);
    for (size_t i = 0; i < sizeof copies / sizeof *copies; i++) {
        snprintf(to, sizeof to, "%s/step_00000002", copies[i].out);
        for (size_t k = 0; k < 4; k++) {
            bool here = strcmp(copies[i].file, files[k]) == 0;
            run_copy(t, f, from, to, files[k], here ? copies[i].old : NULL, here ? copies[i].new_text : NULL);
        }
    }
}

/* Each row is added to a command that works; a later option wins over an earlier one. */
static const struct {
    const char *what, *arguments, *expected;
} run_bad_cases[] = {
    {"unknown option", "--frobnicate 1", "--frobnicate"},
    {"unknown letter", "-Q 1", "-Q"},
    {"no option at all", "stray", "stray"},
    {"missing value", "-T", "-T"},
    {"empty data", "-i ''", "-i"},
    {"empty model", "-e ''", "-e"},
    {"empty out", "-o ''", "-o"},
    {"context below", "-T -1", "0..1048576"},
    {"context above", "-T 1048577", "0..1048576"},
    {"micro-batch below", "-b -1", "0..65536"},
    {"decay beyond zero", "-l 1 --weight-decay 1.5", "--weight-decay"},
    {"micro-batch above", "-b 65537", "0..65536"},
    {"micro-batch too large for a step", "-b 5", "-d 64"},
    {"batch tokens below", "-d -1", "0.."},
    {"batch tokens above", "-d 1073741825", "0..1073741824"},
    {"batch tokens not a multiple", "-d 72", "-d 72"},
    {"steps below", "-x -1", "0..1000000000"},
    {"steps above", "-x 1000000001", "0..1000000000"},
    {"steps of many digits", "-x 99999999999999999999", "0..1000000000"},
    {"steps no number", "-x ten", "ten"},
    {"steps no whole number", "-x 1.5", "1.5"},
    {"learning rate below", "-l -1", "0..1"},
    {"learning rate above", "-l 1.5", "0..1"},
    {"learning rate NaN", "-l nan", "nan"},
    {"warm-up below", "--warmup-tokens -2", "--warmup-tokens"},
    {"final rate above", "--final-lr 2", "0..1"},
    {"final rate above the peak", "--final-lr 0.5", "--final-lr"},
    {"weight decay below", "--weight-decay -0.1", "0..10"},
    {"weight decay above", "--weight-decay 11", "0..10"},
    {"clip below", "--grad-clip -1", "0..1000000"},
    {"seed below", "--seed -1", "--seed"},
    {"seed above", "--seed 9223372036854775808", "--seed"},
    {"unknown pruning", "--acp fast", "off|paper|tight"},
    {"log tolerance zero", "--log-tolerance 0", "-100..-0.1"},
    {"log tolerance below", "--log-tolerance -101", "-100..-0.1"},
    {"unknown device", "--device tpu", "auto|cuda|cpu"},
    {"recompute above", "-r 3", "0..2"},
    {"checkpoint-every below", "-n -2", "-1.."},
    {"keep below", "--keep -1", "--keep"},
    {"val-every below", "-v -1", "0.."},
    {"val-batches below", "--val-batches -1", "--val-batches"},
    {"sample-every below", "-s -1", "0.."},
    {"sample-tokens zero", "--sample-tokens 0", "1..1048576"},
    {"temperature below", "--sample-temperature -1", "0..100"},
    {"top-k above", "--sample-top-k 65537", "0..65536"},
    {"resume not a bool", "-y 2", "0|1"},
    {"samples without a vocabulary", "-s 1", "--vocab"},
    {"vocabulary not there", "-s 1 --vocab bad/none", "bad/none"},
    {"vocabulary is nonsense", "-s 1 --vocab bad/short_header.bin", "bad/short_header.bin"},

    {"data not there", "-i bad/none", "bad/none"},
    {"data without shards", "-i bad/no_shards", "bad/no_shards"},
    {"data pattern without a match", "-i bad/*.none", "bad/*.none"},
    {"data is a folder named as a shard", "-i bad/folder.bin", "bad/folder.bin"},
    {"data is a dangling link", "-i bad/dangling.bin", "bad/dangling.bin"},
    {"data empty", "-i /dev/null", "/dev/null"},
    {"shard header cut", "-i bad/short_header.bin", "1024"},
    {"shard magic", "-i bad/magic.bin", "20240520"},
    {"shard version", "-i bad/version.bin", "version"},
    {"shard count too large", "-i bad/count_large.bin", "truncated"},
    {"shard count too small", "-i bad/count_small.bin", "too long"},
    {"shard count negative", "-i bad/count_negative.bin", "negative"},
    {"shard with an odd byte", "-i bad/odd_byte.bin", "too long"},
    {"shard vocabulary too large", "-i bad/vocabulary_large.bin", "70000"},
    {"shard vocabulary negative", "-i bad/vocabulary_negative.bin", "-1"},
    {"shard shorter than a window", "-i bad/shorter_than_window.bin", "17"},
    {"shard token out of range", "-i bad/token.bin", "token 61"},
    {"shards of two vocabularies", "-i bad/mixed", "vocabulary"},
    {"vocabulary larger than the model's", "-i bad/gpt2.bin", "50257"},
    {"validation not there", "-j bad/none", "bad/none"},
    {"validation of another vocabulary", "-j bad/other_vocabulary.bin", "60"},
    {"validation token out of range", "-j bad/token.bin", "token 61"},

    {"model neither preset nor folder", "-e fox-pro-huge", "fox-pro-huge"},
    {"model is a file", "-e bad/magic.bin", "bad/magic.bin"},
    {"model is a run", "-e good_run", "-e good_run/step_00000002"},
    {"model without config.json", "-e bad/no_config", "config.json"},
    {"config broken", "-e bad/broken", "config.json"},
    {"config deep", "-e bad/deep", "config.json"},
    {"config an array", "-e bad/array", "config.json"},
    {"config with a key twice", "-e bad/twice", "hidden_size"},
    {"config with a window", "-e bad/window", "window_size"},
    {"config of another model", "-e bad/other_type", "llama"},
    {"config with a text for a number", "-e bad/width_is_text", "hidden_size"},
    {"config with 1e999", "-e bad/width_is_huge", "config.json"},
    {"config with uneven heads", "-e bad/uneven_heads", "num_heads"},
    {"config without heads", "-e bad/no_heads", "num_heads"},
    {"config of many layers", "-e bad/many_layers", "num_hidden_layers"},
    {"config of a giant", "-e bad/giant", "bad/giant"},
    {"config against the tensors", "-e bad/other_width", "shape"},
    {"config with a layer more", "-e bad/one_layer_more", "bad/one_layer_more"},
    {"model vocabulary too small", "-e bad/small_vocabulary", "61"},
    {"weights missing", "-e bad/no_weights", "bad/no_weights"},
    {"weights cut", "-e bad/truncated", "bad/truncated"},
    {"weights of header length 2^63", "-e bad/header_length", "bad/header_length"},
    {"weights of header length 65535", "-e bad/header_long", "bad/header_long"},
    {"weights of header nonsense", "-e bad/header_text", "bad/header_text"},
    {"weights of wrong metadata", "-e bad/no_metadata_json", "bad/no_metadata_json"},
    {"weights without a tensor", "-e bad/missing_tensor", "worm"},
    {"weights of another dtype", "-e bad/dtype", "I32"},
    {"weights of unknown dtype", "-e bad/dtype_unknown", "unknown dtype"},
    {"weights of another shape", "-e bad/shape", "32, 64"},
    {"weights with overlap", "-e bad/offsets", "bad/offsets"},

    {"out is a file", "-o bad/magic.bin", "bad/magic.bin"},
    {"out below a file", "-o bad/magic.bin/out", "bad/magic.bin"},
    {"out holds a run", "-o good_run", "-y"},
    {"resume with another seed", "-o good_run -y --seed 3", "--seed"},
    {"resume with another context", "-o good_run -y -T 32", "-T"},
    {"resume with other data", "-o good_run -y -i data/a_train.bin", "shards"},
    {"resume with another step size", "-o good_run -y -d 32 -b 1", "-d"},
    {"resume as another model", "-o good_run -y -e fox-pro-tiny", "fox-pro-tiny"},
    {"resume without a key", "-o bad/run_state -y", "step"},
    {"resume from a negative step", "-o bad/run_state_negative -y", "step"},
    {"resume from half a state", "-o bad/run_state_cut -y", "state.json"},
    {"resume from another position", "-o bad/run_state_position -y", "-d"},
    {"resume without a tensor", "-o bad/run_tensor -y", "worm"},
    {"resume without moments", "-o bad/run_optimizer -y", "exp_a"},
    {"resume with another hash", "-o bad/run_hash -y", "hash"},
};

/* Each case ends with code 1 and exactly one line that names the cause, without a sanitizer's report. */
static void test_run_bad_input(Tests *t, const RunFixture *f) {
    run_bad_shards(f);
    run_bad_models(t, f);
    run_bad_runs(t, f);
    int count = (int)(sizeof run_bad_cases / sizeof *run_bad_cases);
    for (int i = 0; i < count; i++) {
        char command[4096];
        const char *what = run_bad_cases[i].what;
        run_train_command(f, "bad/out", "-x 2 -n 0 -v 1", command);
        strncat(command, " ", sizeof command - strlen(command) - 1);
        strncat(command, run_bad_cases[i].arguments, sizeof command - strlen(command) - 1);
        int code = run_command(f, command);
        char *text = run_output(f, "stderr");
        bool report = strstr(text, "Sanitizer") != NULL || strstr(text, "runtime error") != NULL;
        bool one_line = run_count(text, "\n") == 1 && strncmp(text, "train_fox: error: ", 18) == 0;
        check(t, code == 1 && !report && one_line && strstr(text, run_bad_cases[i].expected) != NULL,
              "bad input, %s (%s): expected code 1 and one line with '%s', found code %d: %s", what,
              run_bad_cases[i].arguments, run_bad_cases[i].expected, code, text);
        free(text);
        run_remove(f, "bad/out");
    }
    printf("runs: %d kinds of bad input\n", count);
}

/* ---- numbers that are not finite */

/* A model with a NaN in it: no step is applied, and the run stops after several, with nothing written over. */
static void test_run_not_finite(Tests *t, const RunFixture *f) {
    char command[4096], path[1300], dir[600];
    const uint32_t nan_bits = 0x7fc00000;
    run_copy_model(t, f, "bad/nan", NULL, NULL, NULL, NULL);
    snprintf(path, sizeof path, "%s/bad/nan/model.safetensors", f->root);
    FILE *file = fopen(path, "r+b"); // the last number of the last tensor, lm_head's
    bool ok = file != NULL && fseek(file, -4, SEEK_END) == 0 && fwrite(&nan_bits, 4, 1, file) == 1;
    check(t, file != NULL && fclose(file) == 0 && ok, "%s can be changed", path);
    run_train_command(f, "nan", "-e bad/nan -x 20 -n 1 -b 2", command);
    int code = run_command(f, command);
    char *text = run_output(f, "stderr");
    check(t, code == 1 && run_count(text, "train_fox: warning: step ") == 4 && run_count(text, "train_fox: error: ") == 1 &&
                 strstr(text, "5 steps in a row") != NULL, "a NaN: 4 warnings and an error, found code %d: %s", code, text);
    free(text);
    text = run_output(f, "nan/metrics.jsonl");
    check(t, run_count(text, "\"loss\": null") == 5 && run_count(text, "\"applied\": false") == 5,
          "a NaN: 5 refused steps in metrics.jsonl, found %s", text);
    free(text);
    snprintf(dir, sizeof dir, "%s/nan/step_00000005", f->root);
    check(t, access(dir, F_OK) != 0, "a NaN: no checkpoint of the last refused step");
}

/* Changes the byte of ROOT/name that is so many before its end (0: in the middle). */
static void run_damage(Tests *t, const RunFixture *f, const char *name, long before_end) {
    char path[1300];
    snprintf(path, sizeof path, "%s/%s", f->root, name);
    FILE *file = fopen(path, "r+b");
    if (check(t, file != NULL && fseek(file, 0, SEEK_END) == 0, "%s can be opened", path)) {
        long at = before_end > 0 ? ftell(file) - before_end : ftell(file) / 2;
        fseek(file, at, SEEK_SET);
        int byte = fgetc(file);
        fseek(file, at, SEEK_SET);
        fputc(byte ^ 0x40, file);
        fclose(file);
    }
}

static void run_expect_error(Tests *t, const RunFixture *f, const char *what, const char *command, const char *words) {
    int code = run_command(f, command);
    char *text = run_output(f, "stderr");
    check(t, code == 1 && strstr(text, words) != NULL, "%s: expected code 1 and '%s', found code %d: %s", what, words, code, text);
    free(text);
}

/* What would be lost without a word: moments that changed on the disk, weights that did, records of an earlier run, and a
 * folder that two runs write into. */
static void test_run_nothing_lost(Tests *t, const RunFixture *f) {
    char command[4096];
    run_train_command(f, "damaged", "-x 4 -n 4", command);
    run_expect(t, f, "4 steps", run_command(f, command), 0);
    run_damage(t, f, "damaged/step_00000004/optimizer-00000-of-00001.safetensors", 0);
    run_train_command(f, "damaged", "-x 8 -n 4 -y", command);
    run_expect_error(t, f, "damaged moments", command, "optimizer file is damaged");
    run_damage(t, f, "damaged/step_00000004/model.safetensors", 0);
    run_expect_error(t, f, "damaged weights", command, "the checkpoint is damaged");
    snprintf(command, sizeof command, "%s -i data -o damaged -e damaged/step_00000004 -T 16 --eval", f->program);
    run_expect_error(t, f, "--eval of damaged weights", command, "the checkpoint is damaged");

    snprintf(command, sizeof command, "%s -i data -o from_damaged -e damaged/step_00000004 -T 16 -d 64 -l 1e-3 -x 2", f->program);
    run_expect_error(t, f, "training from damaged weights", command, "the checkpoint is damaged");

    snprintf(command, sizeof command, "cp -r %s/data %s/other_text", f->root, f->root);
    run_expect(t, f, "a copy of the data", run_command(f, command), 0);
    run_train_command(f, "same_text", "-i other_text -x 2 -n 2", command);
    run_expect(t, f, "2 steps on the copy", run_command(f, command), 0);
    run_damage(t, f, "other_text/a_train.bin", 2);
    run_train_command(f, "same_text", "-i other_text -x 4 -y", command);
    run_expect_error(t, f, "resume with other text", command, "shards of other sizes or text");

    run_train_command(f, "again", "-x 2 -n -1", command);
    run_expect(t, f, "a run without checkpoints", run_command(f, command), 0);
    char *first = run_output(f, "again/metrics.jsonl");
    run_expect(t, f, "the same again", run_command(f, command), 0);
    char *kept = run_output(f, "again/metrics-1.jsonl");
    check(t, strlen(first) > 100 && strcmp(first, kept) == 0, "the records of the earlier run are kept: '%s'", kept);
    free(first);
    free(kept);

    run_train_command(f, "shared", "-x 100000 -n 0", command);
    pid_t child = run_start(f, command, 1, 0);
    RunLog log;
    double deadline = fox_now() + 60;
    do {
        run_sleep(0.02);
        run_read_log(f, "shared", &log);
    } while (log.last < 2 && fox_now() < deadline);
    run_expect_error(t, f, "a second run in the same folder", command, "another run is writing there");
    kill(child, SIGKILL);
    run_wait(child);
    run_train_command(f, "shared", "-x 2 -n 0 -y", command);
    run_expect(t, f, "after its end", run_command(f, command), 0);
}

static void test_runs(Tests *t) {
    RunFixture f;
    memset(&f, 0, sizeof f);
    if (!run_fixture_create(t, &f)) {
        return;
    }
    test_run_resume(t, &f, "-b 4");
    test_run_resume(t, &f, "-b 1"); // four micro-batches a step
    test_run_speed(t, &f);
    test_run_samples(t, &f);
    test_run_kill(t, &f);
    test_run_stop(t, &f, SIGTERM);
    test_run_stop(t, &f, SIGINT);
    test_run_full_disk(t, &f);
    if (!t->quick) {
        test_run_impatience(t, &f);
        test_run_room_again(t, &f);
    }
    test_run_bad_input(t, &f);
    test_run_not_finite(t, &f);
    test_run_nothing_lost(t, &f);
}

#ifdef FOX_CUDA
/* Whole runs on the GPU: resume is exact, and a checkpoint goes from the CPU to the GPU and back. */
static void test_cuda_runs(Tests *t) {
    RunFixture f;
    RunLog cpu_only, mixed;
    char why[256], command[4096];
    if (!backend_cuda_available(why)) {
        skip_without_gpus(t, 1, "runs on a GPU: none can be used (%s)", why);
        return;
    }
    memset(&f, 0, sizeof f);
    f.gpu = true;
    if (!run_fixture_create(t, &f)) {
        return;
    }
    test_run_resume(t, &f, "-b 2 --device cuda --deterministic");
    test_run_resume(t, &f, "-b 1 --device cuda -r 2 --deterministic");

    static const char *const devices[] = {"cpu", "cuda", "cpu"};
    run_train_command(&f, "cpu_only", "-x 30 -n 10 -l 1e-3 --device cpu", command);
    run_expect(t, &f, "30 steps on the CPU", run_command(&f, command), 0);
    for (int i = 0; i < 3; i++) {
        char more[200];
        snprintf(more, sizeof more, "-x 30 -n 10 -l 1e-3 -y --device %s", devices[i]);
        run_train_command(&f, "mixed", more, command);
        run_expect(t, &f, "10 of 30 steps on one device, then the other", run_command(&f, command), 0);
        char dir[700];
        for (int step = 10 * (i + 2); step <= 30; step += 10) { /* the schedule is of 30 steps: drop what came too early */
            snprintf(dir, sizeof dir, "%s/mixed/step_%08d", f.root, step);
            remove_directory(dir);
        }
    }
    run_read_log(&f, "cpu_only", &cpu_only);
    run_read_log(&f, "mixed", &mixed);
    double worst = 0;
    for (int step = 1; step <= 30; step++) {
        worst = worse(worst, fabs(cpu_only.loss[step] - mixed.loss[step]));
    }
    check(t, mixed.starts == 3 && mixed.last == 30, "three starts and 30 steps, found %d and %d", mixed.starts, mixed.last);
    check_error(t, "10 steps on the CPU, 10 on the GPU, 10 on the CPU, against 30 on the CPU", worst, 0.03);
    printf("runs: CPU, GPU, CPU against the CPU alone: losses within %.2g\n", worst);
}
#endif

#endif

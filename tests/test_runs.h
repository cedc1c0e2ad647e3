/* Tests of whole runs: train_fox is started as a child on a small model and small shards (run_fixture.h).
 *
 * Resume bit for bit, recorded speed, samples, SIGKILL at random moments, SIGTERM, a full disk; bad input: test_run_input.h. Several
 * ranks: test_ranks.h. */
#ifndef FOX_TEST_RUNS_H
#define FOX_TEST_RUNS_H

#include "run_fixture.h"
#include "test_run_input.h"

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
    check(t, strstr(text, "recipe    learning rate 0.0625 to ") != NULL && strstr(text, "nothing ") == NULL, "the recipe is said, found %s", text);
    free(text);
    run_hash(f, hash);

    snprintf(more, sizeof more, "-x 15 -n 10 %s -y", batch);
    run_train_command(f, "whole", more, command);
    run_expect(t, f, "fewer steps than there are", run_wait(run_start(f, command, 2, 0)), 0);
    text = run_output(f, "stdout");
    run_hash(f, resumed);
    check(t, strstr(text, "nothing   is left to do up to step 15; a larger -x goes on\n") != NULL && strcmp(hash, resumed) == 0,
          "a run that is beyond its end stays as it is, found %s", text);
    free(text);
}

/* ---- speed */

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

/* ---- presets */

static void run_expect_error(Tests *t, const RunFixture *f, const char *what, const char *command, const char *words) {
    int code = run_command(f, command);
    char *text = run_output(f, "stderr");
    check(t, code == 1 && strstr(text, words) != NULL, "%s: expected code 1 and '%s', found code %d: %s", what, words, code, text);
    free(text);
}

/* A run of a preset goes on where config.json gives the same model, and in no other. */
static void test_run_preset(Tests *t, const RunFixture *f) {
    static const char *const eps[] = {"9.999999974752427e-07", "1e-5"}; /* the first is 1e-6 as a float */
    char command[4096], edit[2048];
    for (int i = 0; i < 2; i++) {
        snprintf(command, sizeof command, "%s -i bytes -o preset -e fox-pro-tiny -T 32 -b 2 -d 64 -x %d -n 1 -v 0 -y", f->program, 1 + i);
        run_expect(t, f, "a run of a preset", run_command(f, command), 0);
        snprintf(edit, sizeof edit, "sed -i.was s/1e-06/%s/ %s/preset/step_%08d/config.json", eps[i], f->root, 1 + i);
        run_expect(t, f, "another config.json", run_command(f, edit), 0);
        snprintf(command, sizeof command, "grep -q norm_eps.*%s %s/preset/step_%08d/config.json", eps[i], f->root, 1 + i);
        run_expect(t, f, "an epsilon of 1e-6 is written as such", run_command(f, command), 0);
    }
    snprintf(command, sizeof command, "%s -i bytes -o preset -e fox-pro-tiny -T 32 -b 2 -d 64 -x 3 -n 1 -v 0 -y", f->program);
    run_expect_error(t, f, "resume with another epsilon", command, "is not a fox-pro-tiny");
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
        skip(t, "runs: a disk that grows: no tmpfs can be mounted here (%s)", strerror(errno));
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
    test_run_preset(t, &f);
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

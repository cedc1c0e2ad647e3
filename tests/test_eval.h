/* Tests of validations: loss by position, and --eval, which repeats one from its checkpoint. */
#ifndef FOX_TEST_EVAL_H
#define FOX_TEST_EVAL_H

#include "run_fixture.h"

/* The bins hold every position once, grow, and have the powers of two as edges; sums go where they belong. */
static void eval_test_bins(Tests *t) {
    static const int lengths[] = {1, 2, 3, 7, 16, 77, 1000, 4096, 65536, 1048576};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        int T = lengths[i], powers = 0, wanted = 1;
        PositionBins bins = positions_create(T);
        float *losses = FOX_NEW(float, T);
        bool rises = bins.edges[0] == 0 && bins.edges[bins.count] == T;
        for (int b = 0; b < bins.count; b++) {
            rises = rises && bins.edges[b] < bins.edges[b + 1];
            powers += (bins.edges[b] & (bins.edges[b] - 1)) == 0;
        }
        for (int64_t power = 1; power < T; power *= 2) {
            wanted++;
        }
        check(t, rises && bins.count <= POSITION_BINS, "eval: the edges of the bins rise from 0 to %d", T);
        check(t, powers == wanted, "eval: T = %d: 0 and %d powers of two are edges, found %d", T, wanted - 1, powers - 1);
        for (int p = 0; p < T; p++) {
            losses[p] = (float)(p % 1024);
        }
        positions_add(&bins, losses);
        positions_add(&bins, losses);
        double worst = 0;
        for (int b = 0; b < bins.count; b++) {
            double sum = 0;
            for (int64_t p = bins.edges[b]; p < bins.edges[b + 1]; p++) {
                sum += 2.0 * (double)(p % 1024);
            }
            worst = worse(worst, fabs(sum - bins.losses[b]) + fabs(2.0 * (double)(bins.edges[b + 1] - bins.edges[b]) - bins.tokens[b]));
        }
        check(t, worst == 0, "eval: T = %d: a bin is off by %g", T, worst);
        free(losses);
    }
}

/* Line number `index` of that kind in ROOT/name, without its newline; "" when it is not there. The caller frees it. */
static char *eval_record(const RunFixture *f, const char *name, const char *kind, int index) {
    char *text = run_output(f, name), start[64], *found = (char *)calloc(1, 1);
    snprintf(start, sizeof start, "{\"kind\": \"%s\"", kind);
    for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        if (strncmp(line, start, strlen(start)) == 0 && index-- == 0) {
            free(found);
            found = strdup(line);
        }
    }
    free(text);
    return found;
}

/* The numbers of an array, at most `most` of them; their count, -1 when one is null: what is not finite. */
static int eval_numbers(const JsonDocument *document, const char *key, double *out, int most) {
    const Json *array = json_get(document->root, key);
    int count = 0;
    for (const Json *v = array != NULL ? array->first : NULL; v != NULL && count < most; v = v->next) {
        if (v->type != JSON_NUMBER) {
            return -1;
        }
        out[count++] = v->number;
    }
    return count;
}

/* The loss of a validation: a number better than twice that of guessing. NaN when it is not there. */
static double eval_loss(Tests *t, const JsonDocument *record) {
    double loss = run_number(record->root, "loss");
    check(t, loss > 0 && loss < 2 * log(RUN_MODEL_VOCAB), "eval: a loss of %g", loss);
    return loss;
}

/* Mean losses of the windows of ROOT/data/val.bin that a validation sees, by position: from the weights in `dir`. */
static bool eval_by_hand(const RunFixture *f, const char *dir, int T, int windows, double *by_position) {
    Backend backend;
    DataLoader loader;
    BackendSpec spec;
    DataSpec data = data_spec(T, 1, 0, false, 0, 0, 1);
    Ranks ranks = RANKS_ALONE;
    FoxError err = {{0}};
    char path[700];
    int32_t x[64], y[64];
    float losses[64];
    memset(&spec, 0, sizeof spec);
    spec.B = 1;
    spec.T = T;
    spec.acp = ACP_OFF;
    snprintf(path, sizeof path, "%s/val.bin", f->data);
    bool ok = checkpoint_read_config(dir, &spec.config, &err) && backend_cpu_open(&backend, &spec, &ranks, &err) &&
              backend.allocate(&backend, &err) && checkpoint_load_model(dir, &backend, &ranks, &err) &&
              dataloader_open(&loader, path, "*", &data, &err);
    memset(by_position, 0, sizeof(double) * (size_t)T);
    for (int w = 0; ok && w < windows; w++) {
        ok = dataloader_next(&loader, x, y, &err);
        backend.evaluate(&backend, x, y, losses);
        for (int p = 0; p < T; p++) {
            by_position[p] += (double)losses[p] / windows;
        }
    }
    dataloader_close(&loader);
    backend.free(&backend);
    return ok;
}

/* The record's loss is the mean over its bins, and they are what the model gives position by position. */
static void eval_check_positions(Tests *t, const RunFixture *f, const char *dir, const char *record, int T, int windows) {
    JsonDocument document;
    FoxError err = {{0}};
    double edges[POSITION_BINS + 1], means[POSITION_BINS], tokens[POSITION_BINS], by_position[64];
    if (!check(t, json_parse(record, strlen(record), "record", &document, &err), "eval: %s: %s", record, err.text)) {
        return;
    }
    int count = eval_numbers(&document, "position_edges", edges, POSITION_BINS + 1) - 1;
    bool ok = count > 0 && eval_numbers(&document, "position_loss", means, POSITION_BINS) == count &&
              eval_numbers(&document, "position_tokens", tokens, POSITION_BINS) == count;
    double sum = 0, all = 0, worst = 0, loss = eval_loss(t, &document);
    ok = check(t, ok && eval_by_hand(f, dir, T, windows, by_position), "eval: %d bins: %s", count, record);
    for (int b = 0; ok && b < count; b++) {
        double mean = 0;
        for (int p = (int)edges[b]; p < (int)edges[b + 1]; p++) {
            mean += by_position[p] / (edges[b + 1] - edges[b]);
        }
        worst = worse(worst, fabs(mean - means[b]));
        sum += means[b] * tokens[b];
        all += tokens[b];
        check(t, tokens[b] == windows * (edges[b + 1] - edges[b]), "eval: bin %d counts %g tokens", b, tokens[b]);
    }
    check(t, ok && all == (double)(T * windows), "eval: the bins hold %g tokens of %d", all, T * windows);
    check_error(t, "eval: the bins' mean against the loss", fabs(sum / all - loss), 1e-12);
    check_error(t, "eval: the bins against the model by hand", worst, f->gpu ? 0.03 : 1e-5);
    json_free(&document);
}

static void eval_command(const RunFixture *f, const char *model, const char *out, const char *more, char command[4096]) {
    snprintf(command, 4096, "%s -i data -o %s -e %s -T 16 --eval %s", f->program, out, model, more);
}

/* A run prints and records validations; --eval of each checkpoint repeats them bit for bit, and changes nothing else. */
static void eval_test_runs(Tests *t, const RunFixture *f) {
    const char *same = f->gpu ? "--deterministic" : ""; /* else matrix products are chosen by their speed at that time */
    char command[4096], dir[64], path[800], more[200];
    run_command(f, "rm -rf evaluated"); /* another device's */
    snprintf(more, sizeof more, "-x 20 -n 10 -b 2 -v 10 --val-batches 4 %s", same);
    run_train_command(f, "evaluated", more, command);
    if (!run_expect(t, f, "a run that validates", run_command(f, command), 0)) {
        return;
    }
    char *metrics = run_output(f, "evaluated/metrics.jsonl");
    for (int i = 0; i < 2; i++) {
        snprintf(dir, sizeof dir, "evaluated/step_%08d", 10 * (i + 1));
        snprintf(more, sizeof more, "-b 2 --val-batches 4 %s", same);
        eval_command(f, dir, "evaluated", more, command);
        run_expect(t, f, "--eval", run_command(f, command), 0);
        char *trained = eval_record(f, "evaluated/metrics.jsonl", "validation", i);
        char *alone = eval_record(f, "evaluated/eval.jsonl", "validation", i);
        check(t, trained[0] != '\0' && strcmp(trained, alone) == 0, "--eval of step %d: expected %s found %s", 10 * (i + 1), trained,
              alone);
        snprintf(path, sizeof path, "%s/%s", f->root, dir);
        eval_check_positions(t, f, path, alone, 16, 8);
        free(trained);
        free(alone);
    }
    char *after = run_output(f, "evaluated/metrics.jsonl"), *out = run_output(f, "stdout");
    check(t, strcmp(metrics, after) == 0, "--eval leaves metrics.jsonl as it was");
    check(t, strstr(out, "validation loss") != NULL && strstr(out, "parameter hash") == NULL, "--eval prints the loss: %s", out);
    free(metrics);
    free(after);
    free(out);

    run_command(f, "rm -rf elsewhere");
    eval_command(f, "evaluated/step_00000020", "elsewhere", "-j data/val.bin -i '' --val-batches 0 -b 3", command);
    run_expect(t, f, "--eval without -i", run_command(f, command), 0);
    PathList files;
    snprintf(path, sizeof path, "%s/elsewhere", f->root);
    bool listed = path_list(path, "*", &files, NULL);
    check(t, listed && files.count == 1 && strstr(files.paths[0], "eval.jsonl") != NULL, "--eval writes eval.jsonl and nothing else");
    if (listed) {
        path_list_free(&files);
    }
    char *one = eval_record(f, "elsewhere/eval.jsonl", "validation", 0), *steps = eval_record(f, "elsewhere/eval.jsonl", "step", 0);
    snprintf(path, sizeof path, "%s/evaluated/step_00000020", f->root);
    eval_check_positions(t, f, path, one, 16, 9);
    check(t, steps[0] == '\0', "--eval makes no step: %s", steps);
    free(one);
    free(steps);
}

/* On two ranks the same loss, from the same windows. */
static void eval_test_ranks(Tests *t, const RunFixture *f) {
    char alone[4096], command[8192], *script = realpath("scripts/launch.sh", NULL);
    double loss[2] = {0, 1};
    run_command(f, "rm -rf elsewhere");
    eval_command(f, "evaluated/step_00000020", "elsewhere", "-b 1 --val-batches 7 --device cpu", alone);
    run_expect(t, f, "--eval on one rank", run_command(f, alone), 0);
    snprintf(command, sizeof command, "%s 2 %s", script, alone);
    run_expect(t, f, "--eval on two ranks", run_command(f, command), 0);
    for (int i = 0; i < 2; i++) {
        JsonDocument document;
        char *record = eval_record(f, "elsewhere/eval.jsonl", "validation", i);
        if (check(t, json_parse(record, strlen(record), "record", &document, NULL), "eval: record %d: '%s'", i, record)) {
            loss[i] = eval_loss(t, &document);
            json_free(&document);
        }
        free(record);
    }
    check_error(t, "eval: two ranks against one", fabs(loss[0] - loss[1]), 1e-12);
    free(script);
}

/* The ranges of a longer window: each head's first blocks do not decrease, stay causal, and skip what the record of pruning
 * says of one window. */
static void eval_test_ranges(Tests *t, const RunFixture *f) {
    enum { T = 640 };
    const int BLOCK = f->gpu ? 128 : 64, BLOCKS = T / BLOCK;
    char command[4096], path[700];
    snprintf(path, sizeof path, "%s/long_val.bin", f->root);
    run_write_tokens(path, T + 1, RUN_VOCAB, data_fresh());
    run_command(f, "rm -rf elsewhere");
    snprintf(command, sizeof command, "%s -j long_val.bin -o elsewhere -e evaluated/step_00000020 -T %d --eval", f->program, T);
    run_expect(t, f, "--eval of a long window", run_command(f, command), 0);
    char *record = eval_record(f, "elsewhere/eval.jsonl", "ranges", 0), *pruning = eval_record(f, "elsewhere/eval.jsonl", "pruning", 0);
    JsonDocument document, report;
    bool ok = json_parse(record, strlen(record), "record", &document, NULL);
    if (check(t, ok && json_parse(pruning, strlen(pruning), "record", &report, NULL), "eval: '%s' '%s'", record, pruning)) {
        const Json *layer = json_get(document.root, "first")->first, *skipped = json_get(report.root, "layers")->first;
        int heads = 0, wrong = 0;
        double worst = 0, most = 0;
        check(t, json_get(document.root, "block")->integer == BLOCK && json_get(document.root, "context")->integer == T, "%s", record);
        for (; layer != NULL && skipped != NULL; layer = layer->next, skipped = skipped->next) {
            const Json *head = layer->first, *part = skipped->first;
            for (; head != NULL && part != NULL; head = head->next, part = part->next, heads++) {
                int64_t I = 0, before = 0, sum = 0;
                for (const Json *first = head->first; first != NULL; first = first->next, I++) {
                    wrong += first->integer < before || first->integer > I;
                    before = first->integer;
                    sum += before;
                }
                wrong += I != BLOCKS || part->type != JSON_NUMBER;
                worst = worse(worst, fabs((double)sum / (BLOCKS * (BLOCKS + 1) / 2) - part->number));
                most = fmax(most, part->number);
            }
        }
        check(t, heads == 4 && wrong == 0, "eval: ranges of %d heads, %d are wrong", heads, wrong);
        check(t, most > 0.1, "eval: something is skipped: %g", most);
        check_error(t, "eval: ranges against the report of pruning", worst, 1e-12);
        json_free(&report);
    }
    if (ok) {
        json_free(&document);
    }
    free(record);
    free(pruning);
}

/* One window on two ranks: rank 0, which writes, has none, and so no ranges to tell of; the loss is that of one rank. */
static void eval_test_no_window(Tests *t, const RunFixture *f) {
    char alone[4096], command[8192], *script = realpath("scripts/launch.sh", NULL);
    run_command(f, "rm -rf elsewhere");
    snprintf(alone, sizeof alone, "%s -j long_val.bin -o elsewhere -e evaluated/step_00000020 -T 640 --eval --device cpu", f->program);
    run_expect(t, f, "--eval of one window on one rank", run_command(f, alone), 0);
    char *one = eval_record(f, "elsewhere/eval.jsonl", "validation", 0);
    run_command(f, "rm -rf elsewhere");
    snprintf(command, sizeof command, "%s 2 %s", script, alone);
    run_expect(t, f, "--eval of one window on two ranks", run_command(f, command), 0);
    char *two = eval_record(f, "elsewhere/eval.jsonl", "validation", 0), *ranges = eval_record(f, "elsewhere/eval.jsonl", "ranges", 0);
    check(t, one[0] != '\0' && strcmp(one, two) == 0, "eval of one window: on one rank '%s', on two '%s'", one, two);
    check(t, ranges[0] == '\0', "eval: ranges of a rank without a window: %s", ranges);
    free(one);
    free(two);
    free(ranges);
    free(script);
}

static void eval_test_bad(Tests *t, const RunFixture *f) {
    static const struct {
        const char *what, *arguments, *expected;
    } cases[] = {
        {"a preset", "-e fox-pro-tiny", "preset fox-pro-tiny"},
        {"no such folder", "-e nowhere", "nowhere"},
        {"no validation data", "-i data/a_train.bin", "no validation data"},
        {"resume", "-y", "-y"},
        {"no context", "-T 0", "-T"},
        {"data of another vocabulary", "-j bad_val.bin", "50257"},
    };
    uint16_t tokens[64] = {0};
    char path[700], command[4096];
    snprintf(path, sizeof path, "%s/bad_val.bin", f->root);
    data_write_shard(path, DATALOADER_MAGIC, 1, 64, 0, tokens, 64, 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        eval_command(f, "evaluated/step_00000020", "bad_eval", cases[i].arguments, command);
        int code = run_command(f, command);
        char *text = run_output(f, "stderr");
        check(t, code == 1 && run_count(text, "\n") == 1 && strstr(text, cases[i].expected) != NULL,
              "--eval, %s: expected code 1 and one line with '%s', found code %d: %s", cases[i].what, cases[i].expected, code, text);
        free(text);
    }
}

/* Shards in file order: steps see other windows than shuffled, and a run goes on in the order it began with. */
static void eval_test_order(Tests *t, const RunFixture *f) {
    char command[4096];
    RunLog shuffled, ordered, resumed;
    run_train_command(f, "shuffled", "-x 3 -n 0 -v 0 --pruning-every 0", command);
    run_expect(t, f, "3 shuffled steps", run_command(f, command), 0);
    run_train_command(f, "ordered", "-x 3 -n 2 -v 0 --data-order file", command);
    run_expect(t, f, "3 steps in file order", run_command(f, command), 0);
    run_read_log(f, "shuffled", &shuffled);
    run_read_log(f, "ordered", &ordered);
    check(t, fabs(shuffled.loss[1] - ordered.loss[1]) > 0, "eval: file order has other losses than shuffled");
    run_command(f, "rm -rf ordered/step_00000003");
    run_train_command(f, "ordered", "-x 3 -n 2 -v 0 -y", command);
    int code = run_command(f, command);
    char *text = run_output(f, "stderr");
    check(t, code == 1 && strstr(text, "--data-order") != NULL, "eval: resumed in another order, found code %d: %s", code, text);
    free(text);
    run_train_command(f, "ordered", "-x 3 -n 2 -v 0 -y --data-order file", command);
    run_expect(t, f, "resumed in file order", run_command(f, command), 0);
    run_read_log(f, "ordered", &resumed);
    run_compare_logs(t, "file order, resumed", &ordered, &resumed, 3, 0);
}

#ifdef FOX_CUDA
static void test_cuda_eval(Tests *t) {
    RunFixture f;
    char why[256];
    if (!backend_cuda_available(why)) {
        skip_without_gpus(t, 1, "validations on a GPU: none can be used (%s)", why);
        return;
    }
    memset(&f, 0, sizeof f);
    f.gpu = true;
    if (run_fixture_create(t, &f)) {
        eval_test_runs(t, &f);
        eval_test_ranges(t, &f);
    }
}
#endif

static void test_eval(Tests *t) {
    RunFixture f;
    memset(&f, 0, sizeof f);
    eval_test_bins(t);
    if (!run_fixture_create(t, &f)) {
        return;
    }
    eval_test_runs(t, &f);
    eval_test_ranks(t, &f);
    eval_test_ranges(t, &f);
    eval_test_no_window(t, &f);
    eval_test_bad(t, &f);
    eval_test_order(t, &f);
}

#endif

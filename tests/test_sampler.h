/* Tests of train/sampler.h and of metrics.jsonl. */
#ifndef FOX_TEST_SAMPLER_H
#define FOX_TEST_SAMPLER_H

#include "../train/metrics.h"
#include "../train/sampler.h"
#include "check.h"

/* The frequencies of many draws against softmax(logits / temperature) over the top_k, by a chi-squared statistic. */
static void test_sample_distribution(Tests *t, double temperature, int top_k, uint64_t key) {
    enum { V = 13, DRAWS = 40000 };
    float logits[V];
    double expected[V], sum = 0, statistic = 0;
    int seen[V] = {0}, kept = 0, foreign = 0;
    for (int i = 0; i < V; i++) {
        logits[i] = (float)fox_normal(key, (uint64_t)i);
    }
    for (int i = 0; i < V; i++) {
        int larger = 0;
        for (int j = 0; j < V; j++) {
            larger += logits[j] > logits[i];
        }
        expected[i] = top_k == 0 || larger < top_k ? exp(logits[i] / temperature) : 0;
        sum += expected[i];
    }
    SampleSettings settings = {temperature, top_k, 0};
    for (int n = 0; n < DRAWS; n++) {
        int32_t token = sample_token(logits, V, &settings, fox_uniform(key + 1, (uint64_t)n));
        if (token < 0 || token >= V) {
            check(t, false, "sample: token %d of %d", token, V);
            return;
        }
        seen[token]++;
    }
    for (int i = 0; i < V; i++) {
        double mean = DRAWS * expected[i] / sum;
        foreign += mean > 0 ? 0 : seen[i];
        if (mean > 1) { // rarer ones are not normally distributed
            statistic += (seen[i] - mean) * (seen[i] - mean) / mean;
            kept++;
        }
    }
    check(t, foreign == 0, "sample: %d draws are not among the %d likeliest tokens", foreign, top_k);
    // Mean kept - 1, variance 2 (kept - 1): 8 standard deviations are never reached by chance.
    check(t, statistic < kept + 8 * sqrt(2.0 * kept), "sample: temperature %g, top %d: chi squared %.1f for %d tokens",
          temperature, top_k, statistic, kept);
}

static void test_sample_edges(Tests *t) {
    float logits[5] = {1, 3, 3, -INFINITY, NAN};
    SampleSettings greedy = {0, 0, 0}, one = {1, 1, 0}, all = {1, 0, 0};
    check(t, sample_token(logits, 5, &greedy, 0.99) == 1, "sample: greedy takes the first of the largest");
    check(t, sample_token(logits, 5, &one, 0.99) == 1, "sample: top 1 is greedy");
    check(t, sample_token(logits, 5, &all, 0.0) == 0, "sample: u = 0 takes the first token");
    check(t, sample_token(logits, 5, &all, 1 - 0x1p-53) == 2,
          "sample: u just below 1 takes the last token with weight");
    float hopeless[2] = {NAN, -INFINITY};
    int32_t token = sample_token(hopeless, 2, &all, 0.5);
    check(t, token == 0 || token == 1, "sample: all NaN gives a token of the vocabulary, found %d", token);
}

static void test_printable(Tests *t) {
    static const struct {
        const char *bytes;
        size_t count;
        const char *expected;
    } cases[] = {
        {"plain\ttext\n", 11, "plain\ttext\n"},
        {"\xe4\xbd\xa0\xf0\x9f\x98\x80\xc3\xa9", 9, "\xe4\xbd\xa0\xf0\x9f\x98\x80\xc3\xa9"},
        {"a\x1b[2Jb\0z", 8, "a\xef\xbf\xbd[2Jb\xef\xbf\xbdz"},
        {"\xe4\xbd", 2, "\xef\xbf\xbd\xef\xbf\xbd"}, // cut
        {"\xc0\xaf", 2, "\xef\xbf\xbd\xef\xbf\xbd"}, // overlong
        {"\xed\xa0\x80", 3, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}, // surrogate
        {"\xc2\x85z", 3, "\xef\xbf\xbdz"}, // a control character of two bytes
        {"", 0, ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *text = printable_utf8((const uint8_t *)cases[i].bytes, cases[i].count);
        check(t, strcmp(text, cases[i].expected) == 0, "printable: case %zu gives '%s'", i, text);
        free(text);
    }
}

/* Number of lines of that kind; checks that every line is a JSON object with a step up to `last`. */
static int count_lines(Tests *t, const char *path, const char *kind, int64_t last) {
    FILE *file = fopen(path, "r");
    char line[4096];
    int count = 0;
    while (check(t, file != NULL, "%s: not there", path) && fgets(line, sizeof line, file) != NULL) {
        JsonDocument document;
        FoxError err = {{0}};
        if (!check(t, json_parse(line, strlen(line), "line", &document, &err), "metrics: %s in %s", err.text, line)) {
            continue;
        }
        const Json *step = json_get(document.root, "step"), *found = json_get(document.root, "kind");
        check(t, step != NULL && step->is_integer && step->integer <= last, "metrics: a step up to %d in %s", (int)last,
              line);
        count += found != NULL && found->type == JSON_STRING && strcmp(found->string, kind) == 0;
        json_free(&document);
    }
    if (file != NULL) {
        fclose(file);
    }
    return count;
}

/* A run of 7 steps that is killed inside a line and resumed at step 4. */
static void test_metrics_resume(Tests *t) {
    char path[1100], dir[1024];
    FoxError err = {{0}};
    snprintf(dir, sizeof dir, "%s/metrics", t->scratch);
    snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
    if (!check(t, make_directories(dir, &err), "%s", err.text)) {
        return;
    }
    Metrics m;
    StepRecord r;
    memset(&r, 0, sizeof r);
    r.steps = 1000;
    r.step_tokens = 64;
    r.seconds = 1;
    r.loss = r.mfu = r.pruned = (double)NAN;
    r.gpu_memory = -1;
    for (int64_t from = 0; from <= 4; from += 4) {
        metrics_begin(&m, true);
        m.terminal = false;
        m.last_line = fox_now(); // so that nothing is due on the screen
        check(t, metrics_open(&m, dir, from, &err), "%s", err.text);
        metrics_run(&m, from, "{\"a\": \"b\"}");
        for (r.step = from + 1; r.step <= 7; r.step++) {
            metrics_step(&m, &r);
        }
        double skipped[4] = {1, 2, 0, 3}, total[4] = {2, 4, 0, 3};
        metrics_pruning(&m, 7, 2, 2, skipped, total);
        PositionBins bins = positions_create(8);
        metrics_validation(&m, 7, 448, 2.5, 0.5, &bins);
        metrics_close(&m);
        check(t, count_lines(t, path, "step", 7) == 7, "metrics: 7 steps after a start at %d", (int)from);
        check(t, count_lines(t, path, "run", 7) == (from > 0 ? 2 : 1), "metrics: a line for each start");
        check(t, count_lines(t, path, "validation", 7) == 1, "metrics: one validation");
        check(t, count_lines(t, path, "pruning", 7) == 1, "metrics: one pruning report");
        FILE *file = fopen(path, "a");
        fputs("{\"kind\": \"step\", \"step\": 2, \"los", file);
        fclose(file);
    }
    metrics_begin(&m, true);
    check(t, metrics_open(&m, dir, 4, &err), "%s", err.text);
    metrics_close(&m);
    check(t, count_lines(t, path, "step", 4) == 4, "metrics: cut back to 4 steps");
}

static void test_sampler(Tests *t) {
    uint64_t key = (uint64_t)(fox_now() * 1e9);
    for (int top_k = 0; top_k <= 4; top_k += 2) {
        for (double temperature = 0.5; temperature <= 2; temperature *= 2) {
            test_sample_distribution(t, temperature, top_k, fox_mix64(key + (uint64_t)top_k));
        }
    }
    test_sample_edges(t);
    test_printable(t);
    test_metrics_resume(t);
}

#endif

/* Tests of train/sampler.h, alone and on a model that counts, and of metrics.jsonl. */
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

/* ---- a model that counts: after token n comes n + 1, of SAMPLE_VOCAB tokens. It notes what it is fed. */

enum { SAMPLE_VOCAB = 260, SAMPLE_MOST = 64 }; /* three tokens more than the byte vocabulary has */

typedef struct Counter {
    int begins, ends, room; /* calls of decode_begin and decode_end; max_tokens of the last */
    int count;
    int32_t fed[SAMPLE_MOST];
} Counter;

static void counter_begin(Backend *backend, int max_tokens) {
    Counter *c = (Counter *)backend->self;
    c->begins++;
    c->room = max_tokens;
    c->count = 0;
}

static void counter_decode(Backend *backend, int32_t token, float *logits) {
    Counter *c = (Counter *)backend->self;
    c->fed[c->count++ % SAMPLE_MOST] = token;
    for (int i = 0; i < SAMPLE_VOCAB; i++) {
        logits[i] = i == (token + 1) % SAMPLE_VOCAB ? 50.0f : -0.01f * (float)i;
    }
}

static void counter_end(Backend *backend) {
    ((Counter *)backend->self)->ends++;
}

static Backend counter_backend(Counter *c) {
    Backend backend;
    memset(c, 0, sizeof *c);
    memset(&backend, 0, sizeof backend);
    backend.self = c;
    backend.spec.config.vocab_size = SAMPLE_VOCAB;
    backend.decode_begin = counter_begin;
    backend.decode = counter_decode;
    backend.decode_end = counter_end;
    return backend;
}

/* Whether the model was fed first, first + 1, ...: `count` tokens in one go, for which it had room. */
static bool counter_fed(const Counter *c, int first, int count) {
    bool ok = c->begins == 1 && c->ends == 1 && c->count == count && c->room >= count;
    for (int i = 0; i < count && i < SAMPLE_MOST; i++) {
        ok = ok && c->fed[i] == first + i;
    }
    return ok;
}

/* The prompt is fed in its order, then each new token; it ends after so many, or before `stop`. */
static void test_sample_generate(Tests *t, const SampleSettings *settings) {
    static const int32_t prompt[] = {10, 11, 12};
    int32_t out[21];
    Counter c;
    Backend backend = counter_backend(&c);
    memset(out, -1, sizeof out);
    int made = sample_generate(&backend, settings, prompt, 3, -1, 20, out);
    bool ok = made == 20 && out[20] == -1;
    for (int i = 0; i < 20; i++) {
        ok = ok && out[i] == 13 + i;
    }
    check(t, ok, "sample: 20 tokens, 13 and up: found %d, from %d to %d", made, out[0], out[19]);
    check(t, counter_fed(&c, 10, 22), "sample: the prompt and all new tokens but the last are fed, found %d from %d", c.count,
          c.fed[0]);

    backend = counter_backend(&c);
    memset(out, -1, sizeof out);
    made = sample_generate(&backend, settings, prompt, 3, 17, 20, out);
    check(t, made == 4 && out[0] == 13 && out[3] == 16 && out[4] == -1, "sample: ends before token 17, found %d tokens", made);
    check(t, counter_fed(&c, 10, 7), "sample: nothing is fed after the end, found %d", c.count);

    backend = counter_backend(&c);
    made = sample_generate(&backend, settings, prompt, 3, 13, 20, out);
    check(t, made == 0 && counter_fed(&c, 10, 3), "sample: ends at once, found %d tokens", made);
}

/* Whole texts of the byte vocabulary, in which end of text is 256: it comes before the prompt, and ends the sample. */
static void test_sample_text(Tests *t, const SampleSettings *settings) {
    static const struct {
        const char *what, *prompt;
        int max_tokens;
        const char *expected;
        int fed;
    } cases[] = {
        {"letters", "say abc", 5, "say abcdefgh", 12},
        {"a sample of one token", "a", 1, "ab", 2},
        {"a character, then bytes that are none", "\xc3\xa9", 2, "\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd", 4},
        {"up to the end of text", "\xfd", 40, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd", 4},
        {"no prompt; 257 to 259 have no text, 0 and 1 none to show", "", 5, "\xef\xbf\xbd\xef\xbf\xbd", 5},
    };
    FoxError err = {{0}};
    Tokenizer tokenizer;
    if (!check(t, tokenizer_open(NULL, &tokenizer, &err), "sample: the byte vocabulary opens: %s", err.text)) {
        return;
    }
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Counter c;
        Backend backend = counter_backend(&c);
        char *text = sample_text(&backend, &tokenizer, settings, cases[i].prompt, cases[i].max_tokens);
        check(t, strcmp(text, cases[i].expected) == 0, "sample: %s: found '%s'", cases[i].what, text);
        check(t, c.fed[0] == tokenizer.end_of_text && c.count == cases[i].fed, "sample: %s: %d tokens are fed, from %d",
              cases[i].what, c.count, c.fed[0]);
        free(text);
    }
    tokenizer_free(&tokenizer);
}

/* ---- what is shown */

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
    static const SampleSettings certain[] = {{0, 0, 0}, {0.8, 50, 7}}; // the next number is so likely that no draw takes another
    for (int i = 0; i < 2; i++) {
        test_sample_generate(t, &certain[i]);
        test_sample_text(t, &certain[i]);
    }
    test_printable(t);
    test_metrics_resume(t);
}

#endif

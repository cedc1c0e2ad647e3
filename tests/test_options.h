/* Tests of train/options.h and train/schedule.h: every option at its edges, what is refused and how, help, JSON. */
#ifndef FOX_TEST_OPTIONS_H
#define FOX_TEST_OPTIONS_H

#include "../train/json.h"
#include "../train/options.h"
#include "../train/schedule.h"
#include "check.h"

#define OPTIONS_MAX_WORDS 16

/* Parses "-i data" and the words of `line`, which are split at blanks; "''" is an empty one. `words` keeps the text. */
static bool options_parse_line(Options *options, const char *line, char words[1024], FoxError *err) {
    static char program[] = "train_fox", letter[] = "-i", data[] = "data", nothing[] = "";
    char *argv[OPTIONS_MAX_WORDS + 1] = {program, letter, data};
    int argc = 3;
    snprintf(words, 1024, "%s", line);
    for (char *save, *word = strtok_r(words, " ", &save); word != NULL && argc < OPTIONS_MAX_WORDS;
         word = strtok_r(NULL, " ", &save)) {
        argv[argc++] = strcmp(word, "''") == 0 ? nothing : word;
    }
    err->text[0] = '\0';
    return options_parse(options, argc, argv, err);
}

/* Every option: its letter, what it is at rest, and its edges. An independent copy of what users are promised. */
typedef struct OptionCase {
    const char *name;
    char letter;
    const char *initial;       /* as JSON */
    const char *low, *high;    /* allowed; the next ones are not: */
    const char *below, *above; /* refused */
} OptionCase;

static const OptionCase option_numbers[] = {
    {"context", 'T', "0", "0", "1048576", "-1", "1048577"},
    {"micro-batch", 'b', "0", "0", "65536", "-1", "65537"},
    {"batch-tokens", 'd', "0", "0", "1073741824", "-1", "1073741825"},
    {"steps", 'x', "0", "0", "1000000000", "-1", "1000000001"},
    {"lr", 'l', "0", "0", "1", "-1e-9", "1.0000001"},
    {"warmup-tokens", 0, "-1", "-1", "1000000000000000", "-2", "1000000000000001"},
    {"final-lr", 0, "0", "0", "1", "-0.5", "1.5"},
    {"weight-decay", 0, "0.1", "0", "10", "-0.1", "10.5"},
    {"grad-clip", 0, "1", "0", "1000000", "-1", "1000001"},
    {"seed", 0, "0", "0", "9223372036854775807", "-1", "9223372036854775808"},
    {"log-tolerance", 0, "-10", "-100", "-0.1", "-100.5", "-0.09"},
    {"recompute", 'r', "0", "0", "2", "-1", "3"},
    {"zero", 'z', "1", "0", "1", "-1", "2"},
    {"hang-timeout", 0, "40", "0", "1000000", "-1", "1000001"},
    {"checkpoint-every", 'n', "1000", "-1", "1000000000", "-2", "1000000001"},
    {"keep", 0, "3", "0", "1000000", "-1", "1000001"},
    {"val-every", 'v', "250", "0", "1000000000", "-1", "1000000001"},
    {"val-batches", 0, "20", "0", "1000000000", "-1", "1000000001"},
    {"pruning-every", 0, "250", "0", "1000000000", "-1", "1000000001"},
    {"sample-every", 's', "0", "0", "1000000000", "-1", "1000000001"},
    {"sample-tokens", 0, "256", "1", "1048576", "0", "1048577"},
    {"sample-temperature", 0, "0.8", "0", "100", "-0.1", "100.1"},
    {"sample-top-k", 0, "50", "0", "65536", "-1", "65537"},
    {"deterministic", 0, "false", "0", "1", "-1", "2"},
    {"resume", 'y', "false", "0", "1", "-1", "2"},
    {"eval", 0, "false", "0", "1", "-1", "2"},
};

static const OptionCase option_words[] = {
    /* low and high: two allowed words; below and above: refused, NULL: none is */
    {"data", 'i', "\"data\"", "a/b", "*.bin", NULL, NULL},
    {"val-data", 'j', "\"\"", "a/b", "''", NULL, NULL},
    {"vocab", 0, "\"\"", "gpt2.tiktoken", "v", NULL, NULL},
    {"out", 'o', "\"out\"", "runs/1", "o", "''", NULL},
    {"model", 'e', "\"fox-pro-125m\"", "fox-pro-tiny", "out/step_00000010", "''", NULL},
    {"sample-prompt", 0, "\"\"", "Once", "-dash", NULL, NULL},
    {"acp", 0, "\"tight\"", "off", "paper", "on", "paper|tight"},
    {"grad-dtype", 0, "\"float32\"", "bf16", "float32", "fp32", "0"},
    {"data-order", 0, "\"shuffle\"", "file", "shuffle", "files", "1"},
    {"device", 0, "\"auto\"", "cpu", "cuda", "gpu", "''"},
};

#define OPTION_NUMBERS ((int)(sizeof option_numbers / sizeof option_numbers[0]))
#define OPTION_WORDS ((int)(sizeof option_words / sizeof option_words[0]))

/* The settings as JSON, parsed. Returns the document; root is NULL when it is no JSON. */
static JsonDocument options_document(Tests *t, const Options *options) {
    char *text = NULL;
    size_t length = 0;
    FoxError err = {{0}};
    JsonDocument document = {NULL, NULL};
    FILE *out = open_memstream(&text, &length);
    options_write_json(out, options);
    fclose(out);
    check(t, json_parse(text, length, "settings", &document, &err), "options: JSON %s: %s", text, err.text);
    check(t, strchr(text, '\n') == NULL, "options: the JSON has more than one line");
    free(text);
    return document;
}

/* True when the setting of that option is `expected`, written as JSON or as a word of the command line. */
static bool options_value_is(Tests *t, const Options *options, const char *name, const char *expected) {
    char key[64];
    snprintf(key, sizeof key, "%s", name);
    for (char *p = key; *p != '\0'; p++) {
        *p = *p == '-' ? '_' : *p;
    }
    JsonDocument document = options_document(t, options);
    const Json *value = json_get(document.root, key);
    bool same = false;
    if (value != NULL && value->type == JSON_STRING) {
        bool quoted = expected[0] == '"';
        size_t length = strlen(expected) - (quoted ? 2 : 0);
        if (strcmp(expected, "''") == 0) {
            length = 0;
        }
        same = value->string_length == length && memcmp(value->string, expected + quoted, length) == 0;
    } else if (value != NULL && value->type == JSON_BOOL) {
        same = value->boolean == (strcmp(expected, "true") == 0 || strcmp(expected, "1") == 0);
    } else if (value != NULL && value->type == JSON_NUMBER) {
        same = value->is_integer ? value->integer == strtoll(expected, NULL, 10) && strpbrk(expected, ".e") == NULL
                                 : value->number == strtod(expected, NULL);
    }
    json_free(&document);
    return same;
}

/* Accepted, and the value is there. */
static void options_check_good(Tests *t, const char *name, const char *line, const char *expected) {
    char words[1024];
    Options options;
    FoxError err;
    bool ok = options_parse_line(&options, line, words, &err);
    check(t, ok && options_value_is(t, &options, name, expected), "options: '%s': expected %s to be %s; %s", line, name,
          expected, ok ? "it is not" : err.text);
}

/* Refused, in one line that holds the words. */
static void options_check_bad(Tests *t, const char *line, const char *expected, const char *expected2) {
    char words[1024];
    Options options;
    FoxError err;
    bool ok = options_parse_line(&options, line, words, &err);
    check(t,
          !ok && strstr(err.text, expected) != NULL && strstr(err.text, expected2) != NULL &&
              strchr(err.text, '\n') == NULL,
          "options: '%s': expected an error with '%s' and '%s', found '%s'", line, expected, expected2,
          ok ? "success" : err.text);
}

/* One option with one value, in all ways to write it: --name value, --name=value, -n value. */
static void options_check_value(Tests *t, const OptionCase *option, const char *value, const char *range) {
    char lines[3][200];
    int count = 2;
    snprintf(lines[0], sizeof lines[0], "--%s %s", option->name, value);
    snprintf(lines[1], sizeof lines[1], "--%s=%s", option->name, strcmp(value, "''") == 0 ? "" : value);
    if (option->letter != 0) {
        snprintf(lines[count++], sizeof lines[2], "-%c %s", option->letter, value);
    }
    for (int i = 0; i < count; i++) {
        if (range == NULL) {
            options_check_good(t, option->name, lines[i], value);
        } else {
            options_check_bad(t, lines[i], range, strcmp(value, "''") == 0 ? "" : value);
        }
    }
}

static void options_test_edges(Tests *t) {
    static const char *garbage[] = {"nan", "inf", "-inf",  "1x", "0x1",   "1e", "e5",
                                    "5,",  "--5", "1e999", "''", "1.0.0", ".",  "99999999999999999999999"};
    for (int i = 0; i < OPTION_NUMBERS; i++) {
        const OptionCase *option = &option_numbers[i];
        char range[64], line[200];
        bool boolean = strcmp(option->initial, "false") == 0;
        snprintf(range, sizeof range, boolean ? "%s|%s" : "%s..%s", option->low, option->high);
        options_check_good(t, option->name, "", option->initial);
        options_check_value(t, option, option->low, NULL);
        options_check_value(t, option, option->high, NULL);
        options_check_value(t, option, option->below, range);
        options_check_value(t, option, option->above, range);
        for (size_t k = 0; k < sizeof garbage / sizeof garbage[0]; k++) {
            snprintf(line, sizeof line, "--%s=%s", option->name, strcmp(garbage[k], "''") == 0 ? "" : garbage[k]);
            options_check_bad(t, line, option->name, range);
        }
        if (!boolean) {
            snprintf(line, sizeof line, "--%s", option->name);
            options_check_bad(t, line, "needs a value", range);
            snprintf(line, sizeof line, "--%s --acp off", option->name);
            options_check_bad(t, line, "needs a value", option->name);
        }
        snprintf(line, sizeof line, "--%s %s --%s %s", option->name, option->low, option->name, option->high);
        options_check_good(t, option->name, line, option->high);
    }
    for (int i = 0; i < OPTION_WORDS; i++) {
        const OptionCase *option = &option_words[i];
        char line[200];
        options_check_good(t, option->name, "", option->initial);
        options_check_value(t, option, option->low, NULL);
        options_check_value(t, option, option->high, NULL);
        snprintf(line, sizeof line, "--%s", option->name);
        options_check_bad(t, line, "needs a value", option->name);
        if (option->below != NULL) {
            options_check_value(t, option, option->below, "");
        }
        if (option->above != NULL) {
            options_check_value(t, option, option->above, "");
        }
    }
}

static void options_test_forms(Tests *t) {
    options_check_good(t, "resume", "-y", "true");
    options_check_good(t, "resume", "-y -T 8", "true");
    options_check_good(t, "context", "-y -T 8", "8");
    options_check_good(t, "resume", "-y 0", "false");
    options_check_good(t, "deterministic", "--deterministic --log-tolerance -5", "true");
    options_check_good(t, "log-tolerance", "--deterministic --log-tolerance -5", "-5");
    options_check_good(t, "lr", "-l 6e-4", "0.0006");
    options_check_good(t, "lr", "-l .5", "0.5");
    options_check_good(t, "context", "-T +7", "7");
    options_check_good(t, "out", "--out=a=b", "a=b");
    options_check_bad(t, "-T 1.5", "-T: expected a whole number in 0..1048576", "1.5");
    options_check_bad(t, "-T 1e3", "whole number", "1e3");
    options_check_bad(t, "-y yes", "0|1", "yes");
    options_check_bad(t, "--help=1", "takes no value", "--help");
    options_check_bad(t, "--contxt 5", "unknown option --contxt", "--context?");
    options_check_bad(t, "-context 5", "unknown option -context", "--context?");
    options_check_bad(t, "--batch_tokens 5", "unknown option", "--batch-tokens?");
    options_check_bad(t, "--pruning-evry=5", "unknown option --pruning-evry;", "--pruning-every?");
    options_check_bad(t, "--zzzzzzzzzz 5", "unknown option --zzzzzzzzzz", "--help");
    options_check_bad(t, "-q 5", "unknown option -q", "--help");
    options_check_bad(t, "-T512", "unknown option -T512", "--help");
    options_check_bad(t, "--", "unknown option --", "--help");
    options_check_bad(t, "--=5", "unknown option --", "--help");
    options_check_bad(t, "-", "unexpected argument '-'", "");
    options_check_bad(t, "data2", "unexpected argument 'data2'", "");
    options_check_bad(t, "-T 5 6", "unexpected argument '6'", "");
    options_check_bad(t, "''", "unexpected argument ''", "");
    options_check_bad(t, "--zeros 1", "unknown option --zero", "");
    options_check_bad(t, "-i ''", "no data", "-i");
    options_check_bad(t, "--eval -i ''", "no data", "-i");
    options_check_good(t, "val-data", "--eval -i '' -j val.bin", "val.bin");
    options_check_bad(t, "--eval -y", "-y", "--eval");

    char words[1024], huge[900];
    Options options;
    FoxError err;
    memset(huge, 'x', sizeof huge);
    huge[0] = huge[1] = '-';
    huge[sizeof huge - 1] = '\0';
    options_check_bad(t, huge, "unknown option", "--help");
    check(t, options_parse_line(&options, "--help --nonsense", words, &err) && options.help, "options: --help: %s",
          err.text);
    check(t, options_parse_line(&options, "-h", words, &err) && options.help, "options: -h: %s", err.text);
    check(t, options_parse_line(&options, "--version", words, &err) && options.version && !options.help,
          "options: --version: %s", err.text);
    char program[] = "train_fox", help[] = "--help";
    char *alone[] = {program, NULL}, *with_help[] = {program, help, NULL};
    err.text[0] = '\0';
    check(t, !options_parse(&options, 1, alone, &err) && strstr(err.text, "-i") != NULL, "options: no data: %s",
          err.text);
    err.text[0] = '\0';
    check(t, options_parse(&options, 2, with_help, &err) && options.help, "options: only --help: %s", err.text);
}

/* Random command lines of options, values and noise never crash; what is accepted gives valid JSON. */
static void options_test_noise(Tests *t) {
    static const char *noise[] = {
        "-T", "--lr", "5", "-1", "=", "--acp=off", "--acp=", "-", "--", "1e-5", "-y", "--seed", "x", "--out", "''",
        "--vocab=\"\\", "-b", "--keep=2", "--sample-prompt", "\x01\xff\xc3", "-i", "1"};
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t key = (uint64_t)now.tv_nsec;
    int accepted = 0, rounds = t->quick ? 2000 : 20000;
    for (int i = 0; i < rounds; i++) {
        char line[512] = "", words[1024];
        Options options;
        FoxError err;
        for (int k = 0, count = (int)(fox_random(key, (uint64_t)i) % 8); k < count; k++) {
            uint64_t pick = fox_random(key + 1, (uint64_t)(i * 8 + k)) % (sizeof noise / sizeof noise[0]);
            strcat(strcat(line, noise[pick]), " ");
        }
        if (options_parse_line(&options, line, words, &err)) {
            accepted++;
            JsonDocument document = options_document(t, &options);
            json_free(&document);
        } else {
            check(t, err.text[0] != '\0', "options: '%s' fails without a word", line);
        }
    }
    check(t, accepted > rounds / 100 && accepted < rounds, "options: %d of %d noisy lines accepted", accepted, rounds);
}

static int options_count(const char *text, const char *word) {
    int count = 0;
    for (const char *p = text; (p = strstr(p, word)) != NULL; p++) {
        count++;
    }
    return count;
}

/* The help holds every option once, with its range and default. */
static void options_test_help(Tests *t) {
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    options_help(out);
    fclose(out);
    int lines = 0, longest = 0;
    for (const char *p = text; *p != '\0'; p += strcspn(p, "\n") + 1, lines++) {
        longest = (int)strcspn(p, "\n") > longest ? (int)strcspn(p, "\n") : longest;
    }
    check(t, longest <= 120, "options: a line of the help has %d characters", longest);
    for (int i = 0; i < OPTION_NUMBERS + OPTION_WORDS; i++) {
        const OptionCase *option = i < OPTION_NUMBERS ? &option_numbers[i] : &option_words[i - OPTION_NUMBERS];
        char row[80];
        snprintf(row, sizeof row, "\n%c%c%c --%s ", option->letter ? '-' : ' ', option->letter ? option->letter : ' ',
                 option->letter ? ',' : ' ', option->name);
        check(t, options_count(text, row) == 1, "options: the help has %d rows for --%s", options_count(text, row),
              option->name);
        const char *found = strstr(text, row);
        if (found != NULL && i < OPTION_NUMBERS) {
            char range[64], line[300];
            bool boolean = strcmp(option->initial, "false") == 0;
            snprintf(line, sizeof line, "%.*s", (int)strcspn(found + 1, "\n"), found + 1);
            snprintf(range, sizeof range, boolean ? " %s|%s " : " %s..%s ", option->low, option->high);
            const char *at = strstr(line, range);
            check(t, at != NULL && strtod(at + strlen(range), NULL) == strtod(boolean ? "0" : option->initial, NULL),
                  "options: the help's row has not the range%sand the default %s: %s", range, option->initial, line);
        }
    }
    int rows = options_count(text, "\n-") + options_count(text, "\n    --");
    check(t, rows == OPTION_NUMBERS + OPTION_WORDS + 2, "options: the help has %d rows, expected %d", rows,
          OPTION_NUMBERS + OPTION_WORDS + 2);
    check(t, options_count(text, " --help ") == 1 && options_count(text, " --version ") == 1, "options: help on help");
    for (int i = 0; fox_preset(i) != NULL; i++) {
        check(t, strstr(text, fox_preset(i)->name) != NULL, "options: the help does not name %s", fox_preset(i)->name);
    }
    free(text);
}

/* Values that are hard to write as JSON come back the same. */
static void options_test_json(Tests *t) {
    static const char *strings[] = {"a\"b\\c", "tab\tnew\nline", "\x01\x1f", "h\xc3\xa9llo \xf0\x9f\xa6\x8a", ""};
    char words[1024];
    FoxError err;
    Options options;
    check(t, options_parse_line(&options, "--lr 0.0123456789012345678 --seed 9007199254740993", words, &err), "%s",
          err.text);
    for (size_t i = 0; i < sizeof strings / sizeof strings[0]; i++) {
        options.sample_prompt = strings[i];
        JsonDocument document = options_document(t, &options);
        const Json *prompt = json_get(document.root, "sample_prompt"), *lr = json_get(document.root, "lr");
        const Json *seed = json_get(document.root, "seed");
        check(t, prompt != NULL && prompt->type == JSON_STRING && strcmp(prompt->string, strings[i]) == 0,
              "options: the prompt '%s' changed in JSON", strings[i]);
        check(t, lr != NULL && lr->number == 0.0123456789012345678, "options: the rate changed in JSON");
        check(t, seed != NULL && seed->integer == 9007199254740993, "options: the seed changed in JSON");
        check(t, document.root != NULL && document.root->count == OPTION_NUMBERS + OPTION_WORDS,
              "options: the JSON has %d members", document.root ? document.root->count : -1);
        json_free(&document);
    }
    options.sample_prompt = "\xff\xfe";
    JsonDocument document = options_document(t, &options);
    json_free(&document);
}

/* ------------------------------------------------------------------------------------------- what depends on what */

static void options_test_resolve(Tests *t) {
    static const struct {
        const char *line;
        int ranks;
        int64_t T, B, d; /* expected; 0: refused, */
        const char *words; /* with these words */
    } cases[] = {
        {"", 1, 16384, 1, 524288, NULL},
        {"-T 16384", 4, 16384, 1, 524288, NULL},
        {"-T 4096", 1, 4096, 4, 524288, NULL},
        {"-T 4096", 64, 4096, 2, 524288, NULL},      /* the step stays as it is: smaller micro-batches */
        {"-T 4096", 1000, 4096, 1, 4096000, NULL},   /* one sequence a rank is the least */
        {"-T 1048576", 1, 1048576, 1, 1048576, NULL},
        {"-T 16384", 3, 16384, 1, 540672, NULL},     /* 33 windows are nearer than 30 */
        {"-T 3000 -b 2", 1, 3000, 2, 522000, NULL},
        {"-e fox-pro-tiny", 1, 512, 16, 8192, NULL},
        {"-e fox-pro-tiny", 2, 512, 8, 8192, NULL},
        {"-e fox-pro-tiny -T 1", 1, 1, 8192, 8192, NULL},
        {"-d 30000 -T 1000", 1, 1000, 15, 30000, NULL}, /* the largest B that divides */
        {"-d 17000 -T 1000", 1, 1000, 1, 17000, NULL},  /* 17 is prime */
        {"-d 32768 -T 1024 -b 4", 8, 1024, 4, 32768, NULL},
        {"-d 32768 -T 1024 -b 8", 8, 0, 0, 0, "-d 65536 would work"},
        {"-d 30001 -T 1000", 1, 0, 0, 0, "-d 30000 would work"},
        {"-d 1 -T 1000", 2, 0, 0, 0, "-d 2000 would work"},
        {"-d 30000 -T 1000 -b 4", 2, 0, 0, 0, "multiple of 8000"},
        {"-T 1048576 -b 65536", 1, 0, 0, 0, "lower -b or -T"},
        {"--final-lr 0.5", 1, 0, 0, 0, "--final-lr 0.5"},
        {"--final-lr 0.5 -l 0.5", 1, 16384, 1, 524288, NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char words[1024];
        Options options;
        FoxError err;
        bool ok = options_parse_line(&options, cases[i].line, words, &err);
        const FoxPreset *preset = fox_find_preset(options.model);
        double rate = options.learning_rate;
        ok = ok && options_resolve(&options, preset, cases[i].ranks, &err);
        if (cases[i].words != NULL) {
            check(t, !ok && strstr(err.text, cases[i].words) != NULL && strchr(err.text, '\n') == NULL,
                  "options: '%s' on %d ranks: expected '%s', found '%s'", cases[i].line, cases[i].ranks, cases[i].words,
                  err.text);
            continue;
        }
        check(t,
              ok && options.context == cases[i].T && options.micro_batch == cases[i].B &&
                  options.batch_tokens == cases[i].d &&
                  options.learning_rate == (rate > 0 ? rate : preset->learning_rate),
              "options: '%s' on %d ranks: T %lld, B %lld, d %lld, lr %g %s", cases[i].line, cases[i].ranks,
              (long long)options.context, (long long)options.micro_batch, (long long)options.batch_tokens,
              options.learning_rate, err.text);
        Options again = options;
        check(t, options_resolve(&again, preset, cases[i].ranks, &err) && memcmp(&again, &options, sizeof again) == 0,
              "options: '%s': resolving twice changes values %s", cases[i].line, err.text);
    }
}

/* Whatever is asked for: the parts divide, what was given is kept, and the value that a refusal suggests works. */
static void options_test_resolve_random(Tests *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t key = (uint64_t)now.tv_nsec;
    int good = 0, suggested = 0, rounds = t->quick ? 2000 : 20000;
    for (int i = 0; i < rounds; i++) {
        uint64_t random = fox_random(key, (uint64_t)i);
        char words[1024];
        Options options, asked;
        FoxError err;
        options_parse_line(&options, "", words, &err);
        options.context = random % 3 == 0 ? 0 : 1 + (int64_t)((random >> 8) % 40000);
        options.micro_batch = random % 5 < 2 ? 0 : 1 + (int64_t)((random >> 24) % 64);
        options.batch_tokens = random % 7 < 3 ? 0 : 1 + (int64_t)((random >> 32) % 2000000);
        int ranks = 1 + (int)((random >> 60) % 8);
        asked = options;
        const FoxPreset *preset = fox_preset((int)(random >> 50) % 13);
        bool ok = options_resolve(&options, preset, ranks, &err);
        const char *suggestion = strstr(err.text, "; -d ");
        if (!ok && check(t, suggestion != NULL, "options: no suggestion in '%s'", err.text)) {
            options = asked;
            options.batch_tokens = strtoll(suggestion + 5, NULL, 10);
            asked.batch_tokens = options.batch_tokens;
            ok = options_resolve(&options, preset, ranks, &err);
            suggested++;
        }
        good++;
        check(t, ok && options.context > 0 && options.micro_batch > 0 && options.batch_tokens > 0 &&
              options.batch_tokens % (options.context * options.micro_batch * ranks) == 0 &&
              (asked.context == 0 || asked.context == options.context) &&
              (asked.micro_batch == 0 || asked.micro_batch == options.micro_batch) &&
              (asked.batch_tokens == 0 || asked.batch_tokens == options.batch_tokens) &&
              (asked.micro_batch != 0 || options.micro_batch == 1 || options.micro_batch * options.context <= 16384),
              "options: T %lld, b %lld, d %lld, %d ranks became %lld, %lld, %lld %s", (long long)asked.context,
              (long long)asked.micro_batch, (long long)asked.batch_tokens, ranks, (long long)options.context,
              (long long)options.micro_batch, (long long)options.batch_tokens, err.text);
    }
    check(t, good > 0 && suggested > 0, "options: random relations: %d good, %d suggestions", good, suggested);
}

static void options_test_resolve_rest(Tests *t) {
    char words[1024];
    Options options;
    FoxError err;
    options_parse_line(&options, "-e out/step_00000010", words, &err);
    check(t, !options_resolve(&options, NULL, 1, &err) && strstr(err.text, "-T") && strstr(err.text, "-d") &&
          strstr(err.text, "-l"), "options: a checkpoint alone: %s", err.text);
    options_parse_line(&options, "-e out/step_00000010 -T 512 -l 1e-3", words, &err);
    check(t, !options_resolve(&options, NULL, 1, &err) && !strstr(err.text, "-T") && strstr(err.text, "-d"),
          "options: a checkpoint, -T and -l: %s", err.text);
    options_parse_line(&options, "-e out/step_00000010 -T 512 -l 1e-3 -d 4096", words, &err);
    check(t, options_resolve(&options, NULL, 1, &err) && options.micro_batch == 8, "options: a checkpoint: %s",
          err.text);

    static const struct { const char *line; int64_t windows, steps, warmup; } cases[] = {
        {"-T 1024 -d 8192", 800, 100, 81920},
        {"-T 1024 -d 8192", 807, 100, 81920},
        {"-T 1024 -d 8192", 8, 1, 819},
        {"-T 1024 -d 8192", 3, 1, 819},
        {"-T 1024 -d 8192 -x 7", 800, 7, 5734},
        {"-T 1024 -d 8192 -x 7 --warmup-tokens 0", 800, 7, 0},
        {"-T 1024 -d 8192 --warmup-tokens 99999999", 800, 100, 99999999},
        {"", 3200000, 100000, 268435456},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bool ok = options_parse_line(&options, cases[i].line, words, &err) &&
                  options_resolve(&options, fox_find_preset(options.model), 1, &err);
        options_resolve_steps(&options, cases[i].windows);
        check(t, ok && options.steps == cases[i].steps && options.warmup_tokens == cases[i].warmup,
              "options: '%s' with %lld windows: %lld steps, warm-up %lld %s", cases[i].line,
              (long long)cases[i].windows, (long long)options.steps, (long long)options.warmup_tokens, err.text);
    }
}

static void test_schedule(Tests *t) {
    const double peak = 2e-3, last = 1e-4;
    const int64_t warmup = 1000, total = 11000;
    static const struct { int64_t tokens; double expected; } points[] = {
        {-5, 0}, {0, 0}, {1, 2e-6}, {500, 1e-3}, {999, 1.998e-3}, {1000, 2e-3}, {6000, 1.05e-3},
        {3500, 1e-4 + 1.9e-3 * (0.5 + 0.35355339059327379)}, {8500, 1e-4 + 1.9e-3 * (0.5 - 0.35355339059327379)},
        {11000, 1e-4}, {11001, 1e-4}, {INT64_MAX, 1e-4},
    };
    for (size_t i = 0; i < sizeof points / sizeof points[0]; i++) {
        double rate = schedule_lr(peak, last, warmup, total, points[i].tokens);
        check(t, fabs(rate - points[i].expected) <= 1e-15, "schedule: at %lld tokens %.17g, expected %.17g",
              (long long)points[i].tokens, rate, points[i].expected);
    }
    int wrong = 0;
    for (int64_t k = 1; k <= total; k++) { /* up, then down, never a jump */
        double change = schedule_lr(peak, last, warmup, total, k) - schedule_lr(peak, last, warmup, total, k - 1);
        wrong += k <= warmup ? !(change > 0) : !(change < 0);
        wrong += !(fabs(change) <= 2.1e-6);
    }
    check(t, wrong == 0, "schedule: %d steps in the wrong direction or too large", wrong);
    check(t, schedule_lr(peak, 0, 0, 100, 0) == peak, "schedule: without a warm-up it begins at the peak");
    check(t, schedule_lr(peak, 0, 0, 100, 100) == 0, "schedule: without a final rate it ends at 0");
    check(t, fabs(schedule_lr(peak, 0, 200, 100, 100) - peak / 2) <= 1e-15,
          "schedule: a run that ends inside its warm-up");
    check(t, schedule_lr(peak, 0, 100, 100, 100) == 0, "schedule: a run that is all warm-up");
    check(t, schedule_lr(peak, 0, 0, 0, 0) == 0, "schedule: an empty run");
}

static void test_options(Tests *t) {
    options_test_edges(t);
    options_test_forms(t);
    options_test_noise(t);
    options_test_help(t);
    options_test_json(t);
    options_test_resolve(t);
    options_test_resolve_random(t);
    options_test_resolve_rest(t);
    test_schedule(t);
}

#endif

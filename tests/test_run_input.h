/* Tests of bad input to train_fox: options, shards, models and earlier runs that it must refuse with one line of error and an exit
 * code that is not 0. */
#ifndef FOX_TEST_RUN_INPUT_H
#define FOX_TEST_RUN_INPUT_H

#include "run_fixture.h"

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

#endif

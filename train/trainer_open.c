#include "trainer.h"

#include "json.h"
#include "stop.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>

#define BYTE_VOCABULARY 257 /* bytes and end of text */

/* What a writer of JSON writes, as a string. The caller frees it. */
static char *options_json(const Options *options) {
    JsonText text;
    json_text_begin(&text);
    options_write_json(text.stream, options);
    return json_text_end(&text);
}

/* Of numbers as layers compute with them: a float of 1e-6 may once have been written in full, as 9.999999974752427e-07. */
static char *config_json(const FoxConfig *config) {
    FoxConfig as_computed = *config;
    JsonText text;
    as_computed.norm_eps = (double)(float)config->norm_eps;
    json_text_begin(&text);
    checkpoint_write_config(text.stream, &as_computed, (double)NAN);
    return json_text_end(&text);
}

static bool same_config(const FoxConfig *a, const FoxConfig *b) {
    char *x = config_json(a), *y = config_json(b);
    bool same = strcmp(x, y) == 0;
    free(x);
    free(y);
    return same;
}

/* ---- options */

static bool read_options(Trainer *t, int argc, char **argv, FoxError *err) {
    Options *o = &t->options;
    if (!options_parse(o, argc, argv, err) || o->help || o->version) {
        return err->text[0] == '\0';
    }
    const FoxPreset *preset = fox_find_preset(o->model);
    if (preset == NULL && !is_directory(o->model)) {
        return fox_fail(err, "-e %s: neither a preset (--help lists them) nor a checkpoint folder", o->model);
    }
    if (preset != NULL && o->eval) {
        return fox_fail(err, "--eval needs the folder of a checkpoint: -e FOLDER; found the preset %s", o->model);
    }
    // How much is validated must not change with the number of ranks, so it is counted in micro-batches of one rank.
    Options alone = *o;
    if (!options_resolve(o, preset, t->ranks.size, err) || !options_resolve(&alone, preset, 1, err)) {
        return false;
    }
    t->val_windows = o->val_batches * alone.micro_batch;
    t->micro_batches = (int)(o->batch_tokens / (o->context * o->micro_batch * t->ranks.size));
    return true;
}

bool trainer_start(Trainer *t, int *argc, char ***argv, FoxError *err) {
    memset(t, 0, sizeof *t);
    memset(err, 0, sizeof *err);
    t->saved_step = -1;
    for (int fd = 0; fd < 3; fd++) { // where the caller closed one, the next file opened would take its place
        if (fcntl(fd, F_GETFD) < 0) {
            open("/dev/null", O_RDWR);
        }
    }
    signal(SIGPIPE, SIG_IGN); // a reader of our output that is gone must not end the run
    signal(SIGXFSZ, SIG_IGN); // nor a limit on the size of files: writing fails then as on a full disk
    bool ok = ranks_init(&t->ranks, argc, argv, err);
    metrics_begin(&t->metrics, t->ranks.rank == 0);
    ok = ok && ranks_everyone(&t->ranks, read_options(t, *argc, *argv, err), err);
    trainer_set_patience(t);
    return ok;
}

/* ---- data */

static DataSpec data_spec_of(const Trainer *t) {
    DataSpec spec;
    memset(&spec, 0, sizeof spec);
    spec.T = (int)t->options.context;
    spec.B = (int)t->options.micro_batch;
    spec.seed = (uint64_t)t->options.seed;
    spec.rank = t->ranks.rank;
    spec.size = t->ranks.size;
    return spec;
}

static bool open_train_shards(Trainer *t, FoxError *err) {
    Options *o = &t->options;
    DataSpec spec = data_spec_of(t);
    spec.shuffle = o->data_order == ORDER_SHUFFLE;
    spec.windows_per_step = o->batch_tokens / o->context;
    if (!dataloader_open(&t->train, o->data, DATALOADER_TRAIN_PATTERN, &spec, err)) {
        return false;
    }
    options_resolve_steps(o, t->train.windows);
    return true;
}

static bool open_val_shards(Trainer *t, FoxError *err) {
    const Options *o = &t->options;
    const char *where = o->val_data;
    PathList found;
    if (where[0] == '\0' && is_directory(o->data) && dataloader_list(o->data, DATALOADER_VAL_PATTERN, &found, NULL)) {
        path_list_free(&found);
        where = o->data;
    }
    if (o->eval && where[0] == '\0') {
        return fox_fail(err, "--eval: no validation data: no " DATALOADER_VAL_PATTERN " in -i %s, and no -j", o->data);
    }
    if (where[0] == '\0' || (o->val_every == 0 && !o->eval)) {
        return true;
    }
    DataSpec spec = data_spec_of(t);
    spec.max_windows = t->val_windows;
    if (!dataloader_open(&t->val, where, DATALOADER_VAL_PATTERN, &spec, err)) {
        return false;
    }
    if (t->train.shards != NULL && t->val.vocab_size != t->train.vocab_size) {
        return fox_fail(err, "validation data has a vocabulary of %d tokens, training data of %d; expected the same",
                        t->val.vocab_size, t->train.vocab_size);
    }
    return true;
}

static bool open_shards(Trainer *t, FoxError *err) {
    if ((!t->options.eval && !open_train_shards(t, err)) || !open_val_shards(t, err)) {
        return false;
    }
    t->vocab_size = t->train.shards != NULL ? t->train.vocab_size : t->val.vocab_size;
    return true;
}

/* The vocabulary that samples are written in. */
static bool open_tokenizer(Trainer *t, FoxError *err) {
    const Options *o = &t->options;
    int V = t->vocab_size;
    if (o->sample_every == 0 || o->eval) {
        return true;
    }
    if (o->vocab[0] == '\0' && V != BYTE_VOCABULARY) {
        return fox_fail(
            err, "-s: the data has a vocabulary of %d tokens, not the %d of bytes; --vocab FILE says what they are", V,
            BYTE_VOCABULARY);
    }
    if (!tokenizer_open(o->vocab[0] ? o->vocab : NULL, &t->tokenizer, err)) {
        return false;
    }
    if (t->tokenizer.vocab_size > V) {
        return fox_fail(err, "%s: a vocabulary of %d tokens, the data has one of %d; it must not be larger", o->vocab,
                        t->tokenizer.vocab_size, V);
    }
    return true;
}

bool trainer_open_data(Trainer *t, FoxError *err) {
    if (!ranks_everyone(&t->ranks, open_shards(t, err) && open_tokenizer(t, err), err)) {
        return false;
    }
    int64_t count = t->options.micro_batch * t->options.context;
    t->tokens = FOX_NEW(int32_t, count);
    t->targets = FOX_NEW(int32_t, count);
    t->settings = options_json(&t->options);
    if (!ranks_agree(&t->ranks, fox_hash(0, t->settings, strlen(t->settings)))) {
        fox_fail(err, "the ranks were started with different options; start all with the same command line");
        return ranks_everyone(&t->ranks, false, err);
    }
    uint64_t data = t->train.shards != NULL ? dataloader_hash(&t->train) : 0;
    data = t->val.shards != NULL ? fox_hash(data, &t->val.tokens, sizeof t->val.tokens) : data;
    if (!ranks_agree(&t->ranks, data)) {
        fox_fail(err, "the ranks see different shards in %s; give all the same data", t->options.data);
        return ranks_everyone(&t->ranks, false, err);
    }
    return true;
}

/* ---- model */

/* One run at a time writes into a folder: the lock on it is held until the process ends. File systems without locks go without. */
static bool lock_output(const char *out, FoxError *err) {
    int fd = make_directories(out, err) ? open(out, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        close(fd);
        return fox_fail(err, "%s: another run is writing there; wait for its end, or choose another -o", out);
    }
    return err->text[0] == '\0';
}

/* Looks for the run to resume. Only rank 0 looks, so that all go on from the same checkpoint. */
static bool find_run(Trainer *t, FoxError *err) {
    const Options *o = &t->options;
    if (t->ranks.rank == 0 && !lock_output(o->out, err)) {
        return false;
    }
    bool found = t->ranks.rank == 0 && checkpoint_latest(o->out, t->resume_dir, err);
    if (!found) {
        t->resume_dir[0] = '\0';
    }
    if (err->text[0] != '\0') {
        return false;
    }
    if (found && !o->resume) {
        return fox_fail(err, "%s already holds a run (%s); -y goes on with it, another -o begins a new one", o->out,
                        t->resume_dir);
    }
    return true;
}

/* A config.json may claim any size. Before memory is taken for the model, its weights must at least be there, in two
 * bytes a parameter or more. */
static bool check_weights(const char *dir, const FoxConfig *config, FoxError *err) {
    PathList files;
    if (!path_list(dir, "*.safetensors", &files, err)) {
        return false;
    }
    int64_t bytes = 0;
    for (int i = 0; i < files.count; i++) {
        struct stat status;
        bytes += stat(files.paths[i], &status) == 0 ? (int64_t)status.st_size : 0;
    }
    path_list_free(&files);
    FoxTable table = fox_table_create(config);
    int64_t parameters = table.parameters;
    fox_table_free(&table);
    return bytes / 2 >= parameters ||
           fox_fail(err,
                    "%s: config.json describes %lld parameters, but the weights are %lld bytes; expected at least %lld",
                    dir, (long long)parameters, (long long)bytes, (long long)(2 * parameters));
}

static bool read_model(Trainer *t, FoxError *err) {
    const Options *o = &t->options;
    const FoxPreset *preset = fox_find_preset(o->model);
    const char *dir = t->resume_dir[0] ? t->resume_dir : preset == NULL ? o->model : NULL;
    char newest[1024];
    FoxError why = {""};
    if (dir != NULL && !checkpoint_read_config(dir, &t->config, &why)) {
        return dir == o->model && checkpoint_latest(dir, newest, NULL)
                   ? fox_fail(err, "%s is the folder of a run; give one of its checkpoints: -e %s", dir, newest)
                   : fox_fail(err, "%s", why.text);
    }
    if (preset != NULL) {
        FoxConfig config = fox_preset_config(preset, t->vocab_size);
        if (dir != NULL && !same_config(&config, &t->config)) {
            return fox_fail(err,
                            "%s is not a %s with a vocabulary of %d; resume a run with the -e and data it began with",
                            dir, o->model, t->vocab_size);
        }
        t->config = config;
    }
    if (!fox_config_check(&t->config, err) || (dir != NULL && !check_weights(dir, &t->config, err))) {
        return false;
    }
    if (t->vocab_size > t->config.vocab_size) {
        return fox_fail(err,
                        "%s: the data has a vocabulary of %d tokens, the model of %d; the data's must not be larger",
                        dir, t->vocab_size, t->config.vocab_size);
    }
    return true;
}

bool trainer_open_model(Trainer *t, FoxError *err) {
    if (!t->options.eval && !ranks_everyone(&t->ranks, find_run(t, err), err)) {
        return false;
    }
    ranks_broadcast(&t->ranks, t->resume_dir, sizeof t->resume_dir);
    return ranks_everyone(&t->ranks, read_model(t, err), err);
}

/* ---- back end */

/* Checks that the checkpoint's position means the same in this run's data and steps. */
static bool check_resumed(const Trainer *t, FoxError *err) {
    const TrainState *s = &t->state;
    const Options *o = &t->options;
    const char *dir = t->resume_dir;
    int64_t windows_per_step = t->train.windows_per_step;
    if (s->seed != (uint64_t)o->seed) {
        return fox_fail(err, "%s: the run began with --seed %llu, found --seed %lld; resume with the same", dir,
                        (unsigned long long)s->seed, (long long)o->seed);
    }
    if (s->data_hash != dataloader_hash(&t->train) || s->windows != t->train.windows) {
        return fox_fail(
            err,
            "%s: the run used shards of other sizes or text, or another -T or --data-order (it had %lld windows, now %lld); resume with "
            "the same, or "
            "begin a new run from its weights: -e %s and another -o",
            dir, (long long)s->windows, (long long)t->train.windows, dir);
    }
    if (s->step < 0 || s->tokens != s->step * o->batch_tokens || s->next_window != s->step * windows_per_step) {
        return fox_fail(
            err,
            "%s: %lld tokens after %lld steps do not fit steps of -d %lld; resume with the same -d, or begin "
            "a new run from its weights: -e %s and another -o",
            dir, (long long)s->tokens, (long long)s->step, (long long)o->batch_tokens, dir);
    }
    return true;
}

/* The weights of the checkpoint -e; hash: of its state.json, 0 where it is a model alone. */
static bool load_weights(Trainer *t, uint64_t hash, FoxError *err) {
    const char *dir = t->options.model;
    return checkpoint_load_model(dir, &t->backend, &t->ranks, err) &&
           (hash == 0 || ranks_everyone(&t->ranks, checkpoint_param_hash(&t->backend, &t->ranks) == hash ||
            fox_fail(err, "%s: the weights are not those that its state.json tells of: the checkpoint is damaged", dir), err));
}

/* Fills the parameters: from the run to resume, from a checkpoint, or afresh from the seed. */
static bool fill_backend(Trainer *t, FoxError *err) {
    Backend *b = &t->backend;
    if (t->resume_dir[0]) {
        return checkpoint_load_model(t->resume_dir, b, &t->ranks, err) &&
               checkpoint_load_state(t->resume_dir, b, &t->ranks, &t->state, err) &&
               ranks_everyone(&t->ranks, check_resumed(t, err) && dataloader_seek(&t->train, t->state.next_window, err), err);
    }
    if (t->options.eval) {
        return ranks_everyone(&t->ranks, checkpoint_read_state(t->options.model, &t->state, err), err) &&
               load_weights(t, t->state.param_hash, err);
    }
    t->state.seed = (uint64_t)t->options.seed;
    t->state.windows = t->train.windows;
    t->state.data_hash = dataloader_hash(&t->train);
    t->state.best_val_loss = (double)NAN;
    if (fox_find_preset(t->options.model) == NULL) {
        TrainState theirs;
        return ranks_everyone(&t->ranks, checkpoint_read_state(t->options.model, &theirs, err), err) &&
               load_weights(t, theirs.param_hash, err);
    }
    float *params = FOX_NEW(float, b->table.total);
    fox_init_parameters(&b->table, t->state.seed, params);
    b->write(b, FOX_PARAMS, 0, b->table.total, params);
    free(params);
    return true;
}

/* Opens the back end that --device asks for; "auto" takes a GPU where there is one, and says so where there is none. */
static bool open_device(Trainer *t, const BackendSpec *spec, FoxError *err) {
    const Options *o = &t->options;
#ifdef FOX_CUDA
    char why[256] = "";
    bool gpu = o->device == DEVICE_CUDA || (o->device == DEVICE_AUTO && backend_cuda_available(why));
    if (!ranks_agree(&t->ranks, gpu)) {
        return fox_fail(err, "some ranks find a GPU and others do not; --device cpu takes the CPU on all of them");
    }
    if (gpu) {
        return backend_cuda_open(&t->backend, spec, &t->ranks, err);
    }
    if (o->device == DEVICE_AUTO) {
        metrics_say(&t->metrics, "no GPU can be used (%s): computing on the CPU", why);
    }
#else
    if (o->device == DEVICE_CUDA) {
        return fox_fail(err, "--device cuda: this program is built without CUDA; use --device cpu or auto");
    }
#endif
    return backend_cpu_open(&t->backend, spec, &t->ranks, err);
}

bool trainer_open_backend(Trainer *t, FoxError *err) {
    const Options *o = &t->options;
    BackendSpec spec;
    memset(&spec, 0, sizeof spec);
    spec.config = t->config;
    spec.B = (int)o->micro_batch;
    spec.T = (int)o->context;
    spec.acp = (AcpMode)o->acp;
    spec.log_tolerance = (float)o->log_tolerance;
    spec.recompute = (int)o->recompute;
    spec.deterministic = o->deterministic;
    spec.micro_batches = t->micro_batches;
    spec.zero = o->zero != 0;
    spec.grad_bf16 = o->grad_type == GRAD_BF16;
    ranks_working(&t->ranks, 0);
    if (!ranks_everyone(&t->ranks, open_device(t, &spec, err), err)) {
        return false;
    }
    if (t->ranks.rank == 0) {
        t->backend.report(&t->backend, stdout);
    }
    if (!ranks_everyone(&t->ranks, t->backend.allocate(&t->backend, err), err)) {
        return false;
    }
    int64_t cells = (int64_t)t->config.num_hidden_layers * t->config.num_heads;
    t->step_skipped = FOX_NEW(double, cells);
    t->step_blocks = FOX_NEW(double, cells);
    t->skipped = FOX_NEW(double, cells);
    t->blocks = FOX_NEW(double, cells);
    if (o->eval && o->acp != ACP_OFF && t->config.use_forget_gate) {
        t->ranges = FOX_NEW(int, cells * ((o->context + t->backend.block - 1) / t->backend.block));
    }
    ranks_resting(&t->ranks); // reading a checkpoint may take long
    if (!fill_backend(t, err)) {
        return false;
    }
    t->saved_step = t->resume_dir[0] ? t->state.step : -1;
    return true;
}

/* ---- output */

/* The record of what this run is, for metrics.jsonl. */
static void record_run(Trainer *t) {
    JsonText text;
    json_text_begin(&text);
    fprintf(text.stream, "{\"options\": %s, \"parameters\": %lld, \"ranks\": %d, \"device\": \"%s\", \"windows\": %lld, "
            "\"validation_windows\": %lld}", t->settings, (long long)t->backend.table.parameters, t->ranks.size,
            t->backend.name, (long long)t->train.windows, (long long)t->val.windows);
    metrics_run(&t->metrics, t->state.step, json_text_end(&text));
    free(text.text);
}

/* A setting as text. */
static void format_setting(const Json *value, char text[200]) {
    if (value->type == JSON_STRING) {
        snprintf(text, 200, "%s", value->string);
    } else if (value->type == JSON_NUMBER) {
        value->is_integer ? snprintf(text, 200, "%lld", (long long)value->integer) : snprintf(text, 200, "%.15g", value->number);
    } else {
        snprintf(text, 200, "%s", value->type == JSON_BOOL && value->boolean ? "on" : "off");
    }
}

/* One line for each setting that a resumed run takes up with another value than its checkpoint was written with. */
static void say_changes(Trainer *t) {
    char path[1100], was[200], is[200];
    JsonDocument state, now;
    snprintf(path, sizeof path, "%s/state.json", t->resume_dir);
    if (t->ranks.rank != 0 || !json_parse_file(path, &state, NULL)) {
        return;
    }
    if (json_parse(t->settings, strlen(t->settings), "settings", &now, NULL)) {
        const Json *before = json_get(state.root, "settings");
        for (const Json *setting = now.root->first; setting != NULL; setting = setting->next) {
            const Json *old = json_get(before, setting->key);
            if (old == NULL || strcmp(setting->key, "resume") == 0) {
                continue;
            }
            format_setting(setting, is);
            format_setting(old, was);
            if (strcmp(is, was) != 0) {
                metrics_say(&t->metrics, "changed   %s: %s, was %s", setting->key, is, was);
            }
        }
        json_free(&now);
    }
    json_free(&state);
}

static void print_plan(Trainer *t) {
    const Options *o = &t->options;
    Metrics *m = &t->metrics;
    metrics_say(m, "model     %s: %.1fM parameters, vocabulary %d", o->model,
                1e-6 * (double)t->backend.table.parameters, t->config.vocab_size);
    if (o->eval) {
        metrics_say(m, "validates %s, of step %lld, on %lld windows of %lld tokens", o->model, (long long)t->state.step,
                    (long long)t->val.windows, (long long)o->context);
        return;
    }
    metrics_say(m, "data      %lld windows of %lld tokens in %d shard%s; validation: %lld windows",
                (long long)t->train.windows, (long long)o->context, t->train.shard_count,
                t->train.shard_count == 1 ? "" : "s", (long long)t->val.windows);
    metrics_say(m, "run       %lld steps of %lld tokens: %d x %lld sequences on %d rank%s", (long long)o->steps,
                (long long)o->batch_tokens, t->micro_batches, (long long)o->micro_batch, t->ranks.size,
                t->ranks.size == 1 ? "" : "s");
    metrics_say(m, "recipe    learning rate %g to %g, warm-up over %lld tokens; weight decay %g, clipping %g, seed %lld",
                o->learning_rate, o->final_lr, (long long)o->warmup_tokens, o->weight_decay, o->grad_clip,
                (long long)o->seed);
    if (t->resume_dir[0]) {
        metrics_say(m, "resumes   %s at step %lld", t->resume_dir, (long long)t->state.step);
        say_changes(t);
        if (t->state.step >= o->steps) {
            metrics_say(m, "nothing   is left to do up to step %lld; a larger -x goes on", (long long)o->steps);
        }
    } else if (o->resume) {
        metrics_say(m, "resumes   nothing: no checkpoint in %s yet, a new run begins", o->out);
    }
}

bool trainer_open_output(Trainer *t, FoxError *err) {
    const char *out = t->options.out;
    bool eval = t->options.eval;
    bool ok = t->ranks.rank != 0 || (make_directories(out, err) && (eval ? metrics_open_eval(&t->metrics, out, err)
                                                                         : metrics_open(&t->metrics, out, t->state.step, err)));
    if (!ranks_everyone(&t->ranks, ok, err)) {
        return false;
    }
    if (!eval && t->options.checkpoint_every >= 0 &&
        !checkpoint_open(&t->writer, out, &t->backend, &t->ranks, t->settings, err)) {
        return false;
    }
    print_plan(t);
    record_run(t);
    if (!eval) {
        stop_take_signals(t->ranks.rank == 0);
    }
    return true;
}

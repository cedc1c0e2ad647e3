#include "trainer.h"

#include "json.h"
#include "schedule.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>

#define ADAM_BETA1 0.9
#define ADAM_BETA2 0.95
#define ADAM_EPS 1e-8
#define START_SECONDS 600   /* that opening the devices, and the first step, may take longer than others before they count as hung */
#define BYTE_VOCABULARY 257 /* bytes and end of text */

#define IMPATIENCE_SECONDS 3

/* Set by a signal; a handler can reach nothing but a global. */
static volatile sig_atomic_t stop_requested = 0, stop_tells = 0;
static volatile double stop_time = 0;

/* The first signal asks for the end after this step. Another one a while later ends at once; launchers and terminals may send
 * the same wish twice, and so may the watch (train/watch.h), whose launcher is gone. */
static void on_signal(int number, siginfo_t *info, void *context) {
    static const char told[] = "\nstops after this step; the same signal 3 seconds later ends at once, and saves nothing\n";
    double now = fox_now();
    (void)context;
    if (stop_requested && now - stop_time > IMPATIENCE_SECONDS && info->si_pid != getpid()) {
        _Exit(128 + number);
    }
    if (!stop_requested) {
        stop_time = now;
        stop_requested = 1;
        if (stop_tells && write(STDOUT_FILENO, told, sizeof told - 1) < 0) {
            stop_tells = 0; // nobody reads
        }
    }
}

/* True on every rank when `ok` is true on all of them. Otherwise only the lowest rank that failed keeps its message. */
static bool everyone(const Trainer *t, bool ok, FoxError *err) {
    return ranks_everyone(&t->ranks, ok, err);
}

/* What a writer of JSON writes, as a string. The caller frees it. */
static char *options_json(const Options *options) {
    JsonText text;
    json_text_begin(&text);
    options_write_json(text.stream, options);
    return json_text_end(&text);
}

static char *config_json(const FoxConfig *config) {
    JsonText text;
    json_text_begin(&text);
    checkpoint_write_config(text.stream, config, (double)NAN);
    return json_text_end(&text);
}

static bool same_config(const FoxConfig *a, const FoxConfig *b) {
    char *x = config_json(a), *y = config_json(b);
    bool same = strcmp(x, y) == 0;
    free(x);
    free(y);
    return same;
}

/* ---- start */

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

/* How long another rank may give no sign of life. The start and the first step take what no other step takes; the second has as much
 * time, and shows how long pauses usually are. */
static void set_patience(const Trainer *t) {
    double seconds = (double)t->options.hang_timeout;
    ranks_patience(&t->ranks, seconds, t->steps_made < 2 ? START_SECONDS : 0, seconds, t->steps_made < 2);
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
    ok = ok && everyone(t, read_options(t, *argc, *argv, err), err);
    set_patience(t);
    return ok;
}

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
    if (!everyone(t, open_shards(t, err) && open_tokenizer(t, err), err)) {
        return false;
    }
    int64_t count = t->options.micro_batch * t->options.context;
    t->tokens = FOX_NEW(int32_t, count);
    t->targets = FOX_NEW(int32_t, count);
    t->settings = options_json(&t->options);
    if (!ranks_agree(&t->ranks, fox_hash(0, t->settings, strlen(t->settings)))) {
        return everyone(t, fox_fail(err, "the ranks were started with different options; start all with the same command line"), err);
    }
    uint64_t data = t->train.shards != NULL ? dataloader_hash(&t->train) : 0;
    data = t->val.shards != NULL ? fox_hash(data, &t->val.tokens, sizeof t->val.tokens) : data;
    if (!ranks_agree(&t->ranks, data)) {
        return everyone(t, fox_fail(err, "the ranks see different shards in %s; give all the same data", t->options.data), err);
    }
    return true;
}

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
    if (!t->options.eval && !everyone(t, find_run(t, err), err)) {
        return false;
    }
    ranks_broadcast(&t->ranks, t->resume_dir, sizeof t->resume_dir);
    return everyone(t, read_model(t, err), err);
}

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
           (hash == 0 || everyone(t, checkpoint_param_hash(&t->backend, &t->ranks) == hash ||
            fox_fail(err, "%s: the weights are not those that its state.json tells of: the checkpoint is damaged", dir), err));
}

/* Fills the parameters: from the run to resume, from a checkpoint, or afresh from the seed. */
static bool fill_backend(Trainer *t, FoxError *err) {
    Backend *b = &t->backend;
    if (t->resume_dir[0]) {
        return checkpoint_load_model(t->resume_dir, b, &t->ranks, err) &&
               checkpoint_load_state(t->resume_dir, b, &t->ranks, &t->state, err) &&
               everyone(t, check_resumed(t, err) && dataloader_seek(&t->train, t->state.next_window, err), err);
    }
    if (t->options.eval) {
        return everyone(t, checkpoint_read_state(t->options.model, &t->state, err), err) &&
               load_weights(t, t->state.param_hash, err);
    }
    t->state.seed = (uint64_t)t->options.seed;
    t->state.windows = t->train.windows;
    t->state.data_hash = dataloader_hash(&t->train);
    t->state.best_val_loss = (double)NAN;
    if (fox_find_preset(t->options.model) == NULL) {
        TrainState theirs;
        return everyone(t, checkpoint_read_state(t->options.model, &theirs, err), err) && load_weights(t, theirs.param_hash, err);
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
    if (!everyone(t, open_device(t, &spec, err), err)) {
        return false;
    }
    if (t->ranks.rank == 0) {
        t->backend.report(&t->backend, stdout);
    }
    if (!everyone(t, t->backend.allocate(&t->backend, err), err)) {
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

/* SIGUSR1 is what mpirun passes on and srun --signal sends; SIGHUP comes when a terminal, or mpirun's, goes. SIGINT and SIGHUP stay
 * ignored where the caller ignored them (nohup, a shell's background). The other two are never anything but a wish, and some
 * that start programs ignore or block SIGUSR1 themselves. */
static void take_signals(bool tells) {
    static const int signals[] = {SIGINT, SIGTERM, SIGUSR1, SIGHUP};
    struct sigaction action, before;
    sigset_t ours;
    stop_tells = tells;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_RESTART | SA_SIGINFO;
    sigemptyset(&ours);
    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++) {
        bool wish = signals[i] == SIGTERM || signals[i] == SIGUSR1;
        sigaddset(&ours, signals[i]);
        if (sigaction(signals[i], NULL, &before) == 0 && (wish || before.sa_handler != SIG_IGN)) {
            sigaction(signals[i], &action, NULL);
        }
    }
    pthread_sigmask(SIG_UNBLOCK, &ours, NULL);
}

bool trainer_open_output(Trainer *t, FoxError *err) {
    const char *out = t->options.out;
    bool eval = t->options.eval;
    bool ok = t->ranks.rank != 0 || (make_directories(out, err) && (eval ? metrics_open_eval(&t->metrics, out, err)
                                                                         : metrics_open(&t->metrics, out, t->state.step, err)));
    if (!everyone(t, ok, err)) {
        return false;
    }
    if (!eval && t->options.checkpoint_every >= 0 &&
        !checkpoint_open(&t->writer, out, &t->backend, &t->ranks, t->settings, err)) {
        return false;
    }
    print_plan(t);
    record_run(t);
    if (!eval) {
        take_signals(t->ranks.rank == 0);
    }
    return true;
}

/* ---- checkpoints */

/* The checkpoint that is being written goes on; `wait`: to its end. There the oldest ones go. */
static bool advance_save(Trainer *t, bool wait, FoxError *err) {
    CheckpointWriter *w = &t->writer;
    ranks_resting(&t->ranks); // a disk may be slow
    if (!checkpoint_advance(w, wait, err)) {
        return false;
    }
    if (!w->busy) {
        t->saved_step = w->state.step;
        if (t->ranks.rank == 0 && w->state.skipped_in_a_row == 0) { // else the weights may be what is not finite
            checkpoint_prune(t->options.out, (int)t->options.keep);
        }
        metrics_checkpoint(&t->metrics, w->state.step, w->stall, w->copying, w->seconds);
    }
    return true;
}

static void warn_of_save(Trainer *t, bool ok, const FoxError *err) {
    if (!ok && err->text[0] != '\0') {
        metrics_warn(&t->metrics, "no checkpoint at step %lld: %s; earlier ones stand, training goes on",
                     (long long)t->writer.state.step, err->text);
    }
}

/* Sees to the checkpoint that is being written, if there is one; `wait`: until it is whole, otherwise only when no rank would
 * have to wait. */
static void attend_save(Trainer *t, bool wait) {
    FoxError err;
    err.text[0] = '\0';
    if (t->writer.busy && (wait || ranks_max_int(&t->ranks, !checkpoint_rests(&t->writer)) == 0)) {
        warn_of_save(t, advance_save(t, wait, &err), &err);
    }
}

void trainer_begin_save(Trainer *t) {
    FoxError err;
    err.text[0] = '\0';
    attend_save(t, true);
    if (t->state.skipped_in_a_row > 0) {
        return; // the weights may be what is not finite: the earlier checkpoints must not make way for them
    }
    ranks_resting(&t->ranks);
    warn_of_save(t, checkpoint_begin(&t->writer, &t->state, &err), &err);
}

/* ---- a step */

bool trainer_stops(const Trainer *t) {
    return ranks_max_int(&t->ranks, stop_requested != 0) != 0;
}

bool trainer_ended(const Trainer *t) {
    return trainer_stops(t) || t->state.step >= t->options.steps;
}

bool trainer_due(const Trainer *t, int64_t every) {
    return every > 0 && (t->state.step % every == 0 || t->state.step == t->options.steps);
}

bool trainer_forward_backward(Trainer *t, FoxError *err) {
    if (t->step_started == 0) {
        t->step_started = fox_now();
    }
    ranks_working(&t->ranks, t->state.step);
    if (!dataloader_next(&t->train, t->tokens, t->targets, err)) {
        return false;
    }
    t->backend.forward_backward(&t->backend, t->tokens, t->targets, 1.0 / ((double)t->micro_batches * t->ranks.size));
    return true;
}

static AdamW adamw_of_step(const Trainer *t) {
    const Options *o = &t->options;
    AdamW a;
    a.learning_rate = schedule_lr(o->learning_rate, o->final_lr, o->warmup_tokens, o->steps * o->batch_tokens,
                                  t->state.tokens + o->batch_tokens / 2);
    a.beta1 = ADAM_BETA1;
    a.beta2 = ADAM_BETA2;
    a.eps = ADAM_EPS;
    a.weight_decay = o->weight_decay;
    a.grad_clip = o->grad_clip;
    a.step = t->state.step + 1;
    return a;
}

/* Fraction of the causal attention blocks that were skipped since the last call, over all ranks; NAN where none was counted.
 * step_skipped and step_blocks get this rank's part. */
static double count_pruning(Trainer *t) {
    double sums[2] = {0, 0};
    t->backend.pruning(&t->backend, t->step_skipped, t->step_blocks);
    for (int i = 0; i < t->config.num_hidden_layers * t->config.num_heads; i++) {
        sums[0] += t->step_skipped[i];
        sums[1] += t->step_blocks[i];
    }
    ranks_sum_double(&t->ranks, sums, 2);
    return sums[1] > 0 ? sums[0] / sums[1] : (double)NAN;
}

/* Floating-point operations of a step that a model needs, forward and backward: 6 for each parameter of a matrix and token
 * (the embedding is looked up, not multiplied), and 14 * D for each pair of query and key that attention keeps, of which a
 * causal row of length T has T/2 on average. Recomputation is not counted. */
static double step_flops(const Trainer *t, double pruned) {
    const FoxTable *table = &t->backend.table;
    double matrices = 0, kept = 1 - (pruned == pruned ? pruned : 0);
    for (int i = 0; i < table->count; i++) {
        matrices += table->tensors[i].ndim == 2 && i != table->embeddings ? (double)table->tensors[i].size : 0;
    }
    double attention = 7.0 * (double)t->options.context * t->config.hidden_size * t->config.num_hidden_layers * kept;
    return (double)t->options.batch_tokens * (6 * matrices + attention);
}

static void record_step(Trainer *t, const AdamW *adamw, const StepStats *stats) {
    StepRecord r;
    memset(&r, 0, sizeof r);
    r.step = t->state.step;
    r.steps = t->options.steps;
    r.tokens = t->state.tokens;
    r.step_tokens = t->options.batch_tokens;
    r.loss = stats->loss;
    r.learning_rate = adamw->learning_rate;
    r.grad_norm = stats->grad_norm;
    r.applied = stats->applied;
    r.pruned = count_pruning(t);
    for (int i = 0; i < t->config.num_hidden_layers * t->config.num_heads; i++) {
        t->skipped[i] += t->step_skipped[i];
        t->blocks[i] += t->step_blocks[i];
    }
    r.exchanged = stats->exchanged;
    r.exchange_ms = stats->exchange_ms;
    r.exposed_ms = stats->exposed_ms;
    r.gpu_memory = strcmp(t->backend.name, "cuda") == 0 ? t->backend.memory(&t->backend) : -1;
    r.seconds = fox_now() - t->step_started; /* with what the record itself takes: a busy driver may answer late */
    r.mfu = (double)NAN;                     /* unknown */
    if (t->backend.peak_flops > 0) {
        r.mfu = step_flops(t, r.pruned) / (r.seconds * t->backend.peak_flops * t->ranks.size);
    }
    ranks_resting(&t->ranks); // whoever reads what is printed may be slow
    metrics_step(&t->metrics, &r);
    ranks_working(&t->ranks, t->state.step);
}

bool trainer_update(Trainer *t, bool ok, FoxError *err) {
    if (!everyone(t, ok, err)) {
        if (t->backend.abandon != NULL) {
            t->backend.abandon(&t->backend);
        }
        return false;
    }
    AdamW adamw = adamw_of_step(t);
    StepStats stats;
    t->backend.update(&t->backend, &adamw, &stats);
    t->state.step++;
    t->state.tokens += t->options.batch_tokens;
    t->state.next_window = dataloader_position(&t->train);
    t->state.skipped_in_a_row = stats.applied ? 0 : t->state.skipped_in_a_row + 1;
    record_step(t, &adamw, &stats);
    attend_save(t, false);
    t->step_started = 0;
    ranks_working(&t->ranks, t->state.step);
    t->steps_made++;
    set_patience(t);
    if (stats.applied) {
        return true;
    }
    if (t->state.skipped_in_a_row < TRAINER_REFUSED_LIMIT) {
        if (t->ranks.rank == 0) {
            metrics_warn(&t->metrics, "step %lld: loss %g, gradient norm %g: not finite, the weights stay as they were",
                         (long long)t->state.step, stats.loss, stats.grad_norm);
        }
        return true;
    }
    t->diverged = true;
    return everyone(
        t,
        fox_fail(err,
                 "loss or gradient norm was not finite in %d steps in a row, up to step %lld; no checkpoint "
                 "is written; lower the learning rate (-l) and resume from an earlier one with -y",
                 t->state.skipped_in_a_row, (long long)t->state.step),
        err);
}

/* ---- what is due now and then */

/* Where a micro-batch holds fewer windows than rows, the other rows repeat them: so what is pruned is of these windows. */
static void repeat_windows(Trainer *t, int windows) {
    int64_t T = t->options.context;
    size_t bytes = sizeof(int32_t) * (size_t)T;
    for (int64_t row = windows; windows > 0 && row < t->options.micro_batch; row++) {
        memcpy(t->tokens + row * T, t->tokens + (row - windows) * T, bytes);
        memcpy(t->targets + row * T, t->targets + (row - windows) * T, bytes);
    }
}

/* This rank's part of a validation: sums[0] += losses, sums[1] += tokens; the same by position. The first window of rank 0
 * leaves its ranges in t->ranges, if they are wanted. */
static bool validate_share(Trainer *t, double sums[2], PositionBins *bins, FoxError *err) {
    int64_t T = t->options.context;
    float *losses = FOX_NEW(float, t->options.micro_batch * T);
    t->backend.first_blocks = t->ranges;
    bool ok = dataloader_seek(&t->val, 0, err);
    for (int64_t i = 0; ok && i < t->val.batches_per_step; i++) {
        ranks_working(&t->ranks, t->state.step);
        ok = dataloader_next(&t->val, t->tokens, t->targets, err);
        int64_t count = ok ? t->val.batch_windows * T : 0;
        if (count > 0) {
            repeat_windows(t, t->val.batch_windows);
            t->backend.evaluate(&t->backend, t->tokens, t->targets, losses);
            t->backend.first_blocks = NULL;
        }
        for (int64_t k = 0; k < count; k++) {
            sums[0] += losses[k];
        }
        for (int64_t k = 0; k < count; k += T) {
            positions_add(bins, losses + k);
        }
        sums[1] += (double)count;
    }
    free(losses);
    if (t->backend.first_blocks != NULL) { // no window came to this rank: it has no ranges
        t->backend.first_blocks = NULL;
        free(t->ranges);
        t->ranges = NULL;
    }
    ranks_working(&t->ranks, t->state.step);
    return ok;
}

bool trainer_validate(Trainer *t, FoxError *err) {
    if (t->val.shards == NULL) {
        return true;
    }
    double sums[2] = {0, 0};
    PositionBins bins = positions_create(t->options.context);
    if (!everyone(t, validate_share(t, sums, &bins, err), err)) {
        return false;
    }
    ranks_sum_double(&t->ranks, sums, 2);
    ranks_sum_double(&t->ranks, bins.losses, bins.count);
    ranks_sum_double(&t->ranks, bins.tokens, bins.count);
    double loss = sums[0] / sums[1], pruned = count_pruning(t);
    ranks_resting(&t->ranks); // whoever reads what is printed may be slow
    metrics_validation(&t->metrics, t->state.step, t->state.tokens, loss, pruned, &bins);
    if (t->options.eval) {
        metrics_say(&t->metrics, "step %lld: validation loss %.6f", (long long)t->state.step, loss);
        return true;
    }
    if (loss < t->state.best_val_loss || t->state.best_val_loss != t->state.best_val_loss) {
        t->state.best_val_loss = loss;
    }
    metrics_say(&t->metrics, "step %lld: validation loss %.4f (best %.4f)", (long long)t->state.step, loss,
                t->state.best_val_loss);
    return true;
}

bool trainer_evaluate(Trainer *t, FoxError *err) {
    int layers = t->config.num_hidden_layers, heads = t->config.num_heads;
    if (!trainer_validate(t, err)) {
        return false;
    }
    memcpy(t->skipped, t->step_skipped, sizeof(double) * (size_t)(layers * heads));
    memcpy(t->blocks, t->step_blocks, sizeof(double) * (size_t)(layers * heads));
    trainer_report_pruning(t);
    if (t->ranges != NULL) {
        metrics_ranges(&t->metrics, t->state.step, layers, heads, t->options.context, t->backend.block, t->ranges);
    }
    return everyone(t, !t->metrics.write_failed || fox_fail(err, "%s/eval.jsonl: the records cannot be written; make room, or choose "
                    "another -o", t->options.out), err);
}

void trainer_report_pruning(Trainer *t) {
    int layers = t->config.num_hidden_layers, heads = t->config.num_heads;
    ranks_sum_double(&t->ranks, t->skipped, layers * heads);
    ranks_sum_double(&t->ranks, t->blocks, layers * heads);
    ranks_resting(&t->ranks); // a disk may be slow
    metrics_pruning(&t->metrics, t->state.step, layers, heads, t->skipped, t->blocks);
    memset(t->skipped, 0, sizeof(double) * (size_t)(layers * heads));
    memset(t->blocks, 0, sizeof(double) * (size_t)(layers * heads));
}

void trainer_sample(Trainer *t) {
    const Options *o = &t->options;
    if (t->ranks.rank != 0) {
        return;
    }
    ranks_resting(&t->ranks);
    SampleSettings settings;
    settings.temperature = o->sample_temperature;
    settings.top_k = (int)o->sample_top_k;
    settings.seed = fox_random((uint64_t)o->seed, (uint64_t)t->state.step);
    char *text = sample_text(&t->backend, &t->tokenizer, &settings, o->sample_prompt, (int)o->sample_tokens);
    metrics_say(&t->metrics, "step %lld, a sample:\n---\n%s\n---", (long long)t->state.step, text);
    free(text);
}

/* ---- end */

static bool save_the_end(Trainer *t, FoxError *err) {
    ranks_resting(&t->ranks);
    attend_save(t, true);
    if (t->writer.backend == NULL || t->diverged || t->state.step == 0 || t->saved_step == t->state.step) {
        return true;
    }
    if (t->state.skipped_in_a_row > 0 && t->ranks.rank == 0) {
        metrics_warn(&t->metrics, "the last %d steps were not finite: their checkpoint is kept beside the ones before",
                     t->state.skipped_in_a_row);
    }
    return checkpoint_begin(&t->writer, &t->state, err) && advance_save(t, true, err);
}

bool trainer_finish(Trainer *t, bool ok, FoxError *err) {
    bool saved = save_the_end(t, err);
    uint64_t hash = checkpoint_param_hash(&t->backend, &t->ranks);
    if (!checkpoint_same_params(&t->backend, &t->ranks) && ok && saved) {
        return everyone(t, fox_fail(err, "the ranks' parameters differ after step %lld", (long long)t->state.step),
                        err);
    }
    if (ok && saved) {
        bool done = t->state.step >= t->options.steps;
        metrics_say(&t->metrics, "%s at step %lld of %lld, %lld tokens; parameter hash %016llx", done ? "done" : "stopped",
                    (long long)t->state.step, (long long)(done ? t->state.step : t->options.steps), (long long)t->state.tokens,
                    (unsigned long long)hash);
    }
    return ok && saved;
}

int trainer_close(Trainer *t, bool ok, const FoxError *err) {
    metrics_close(&t->metrics);
    if (!ok && err->text[0] != '\0') {
        if (t->ranks.size > 1) {
            char name[96];
            ranks_name(&t->ranks, t->ranks.rank, name);
            fprintf(stderr, "train_fox: error: %s, step %lld: %s\n", name, (long long)t->state.step + 1, err->text);
        } else {
            fprintf(stderr, "train_fox: error: %s\n", err->text);
        }
    }
    dataloader_close(&t->train);
    dataloader_close(&t->val);
    checkpoint_close(&t->writer);
    if (t->tokenizer.spans != NULL) {
        tokenizer_free(&t->tokenizer);
    }
    if (t->backend.free != NULL) {
        t->backend.free(&t->backend);
    }
    free(t->settings);
    free(t->tokens);
    free(t->targets);
    free(t->step_skipped);
    free(t->step_blocks);
    free(t->ranges);
    free(t->skipped);
    free(t->blocks);
    ranks_finish(&t->ranks);
    return ok ? 0 : 1;
}

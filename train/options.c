#include "options.h"

#include "backend.h"
#include "json.h"

#include <errno.h>

_Static_assert(ACP_OFF == 0 && ACP_PAPER == 1 && ACP_TIGHT == 2, "the choices of --acp in the table follow AcpMode");
_Static_assert(DEVICE_AUTO == 0 && DEVICE_CUDA == 1 && DEVICE_CPU == 2, "the choices of --device follow FoxDevice");
_Static_assert(ORDER_SHUFFLE == 0 && ORDER_FILE == 1, "the choices of --data-order follow DataOrder");
_Static_assert(GRAD_FLOAT32 == 0 && GRAD_BF16 == 1, "the choices of --grad-dtype follow GradType");

typedef enum OptionType { OPTION_FLAG, OPTION_BOOL, OPTION_INT, OPTION_REAL, OPTION_CHOICE, OPTION_STRING } OptionType;

typedef struct Option {
    const char *group; // heading in the help, where a group begins
    char letter;       // 0: long name only
    const char *name;
    OptionType type;
    size_t field;           // offset in Options
    const char *low, *high; // allowed range, as a user would type it; of a choice: low = "a|b|c", numbered from 0
    const char *initial;    // default, as a user would type it
    const char *help;
} Option;

#define FIELD(name) offsetof(Options, name)
#define NO_RANGE NULL, NULL
#define MAX_TOKENS "1073741824" // in a step; T * B * ranks stays in range of an int
#define MAX_COUNT "1000000000"

static const Option table[] = {
    {"Data and model", 'i', "data", OPTION_STRING, FIELD(data), NO_RANGE, "",
     "training shards: folder (its *train*.bin), glob or file"},
    {NULL, 'j', "val-data", OPTION_STRING, FIELD(val_data), NO_RANGE, "",
     "validation shards; not given: *val*.bin of -i"},
    {NULL, 0, "vocab", OPTION_STRING, FIELD(vocab), NO_RANGE, "",
     "of samples; not given: bytes, if the data has 257 tokens"},
    {NULL, 'o', "out", OPTION_STRING, FIELD(out), NO_RANGE, "out", "folder for checkpoints and metrics.jsonl"},
    {NULL, 'e', "model", OPTION_STRING, FIELD(model), NO_RANGE, "fox-pro-125m",
     "a preset's name or a checkpoint folder"},
    {NULL, 'T', "context", OPTION_INT, FIELD(context), "0", "1048576", "0", "tokens in a sequence; 0: the preset's"},

    {"Training", 'b', "micro-batch", OPTION_INT, FIELD(micro_batch), "0", "65536", "0",
     "sequences at a time on each rank; 0: up to 16384 tokens"},
    {NULL, 'd', "batch-tokens", OPTION_INT, FIELD(batch_tokens), "0", MAX_TOKENS, "0",
     "tokens in a step, over all ranks; 0: the preset's"},
    {NULL, 'x', "steps", OPTION_INT, FIELD(steps), "0", MAX_COUNT, "0", "steps of the run; 0: one pass over the data"},
    {NULL, 'l', "lr", OPTION_REAL, FIELD(learning_rate), "0", "1", "0", "peak learning rate; 0: the preset's"},
    {NULL, 0, "warmup-tokens", OPTION_INT, FIELD(warmup_tokens), "-1", "1000000000000000", "-1",
     "of linear warm-up; -1: 256Mi, at most a tenth of all"},
    {NULL, 0, "final-lr", OPTION_REAL, FIELD(final_lr), "0", "1", "0", "learning rate at the end of the cosine"},
    {NULL, 0, "weight-decay", OPTION_REAL, FIELD(weight_decay), "0", "10", "0.1", "of matrices and embeddings"},
    {NULL, 0, "grad-clip", OPTION_REAL, FIELD(grad_clip), "0", "1000000", "1", "largest gradient norm; 0: no clipping"},
    {NULL, 0, "seed", OPTION_INT, FIELD(seed), "0", "9223372036854775807", "0", "of weights, data order and samples"},
    {NULL, 0, "data-order", OPTION_CHOICE, FIELD(data_order), "shuffle|file", NULL, "shuffle",
     "windows shuffled anew each epoch, or as in the shards"},

    {"Attention and machine", 0, "acp", OPTION_CHOICE, FIELD(acp), "off|paper|tight", NULL, "tight",
     "how attention is pruned"},
    {NULL, 0, "log-tolerance", OPTION_REAL, FIELD(log_tolerance), "-100", "-0.1", "-10",
     "ln of the attention mass that pruning may lose in a row"},
    {NULL, 0, "device", OPTION_CHOICE, FIELD(device), "auto|cuda|cpu", NULL, "auto", "where to compute"},
    {NULL, 'r', "recompute", OPTION_INT, FIELD(recompute), "0", "2", "0",
     "trade time for memory: 1 cheap layers, 2 whole blocks"},
    {NULL, 0, "deterministic", OPTION_BOOL, FIELD(deterministic), "0", "1", "0", "the same bits at every run on a GPU too"},

    {"Several ranks", 'z', "zero", OPTION_INT, FIELD(zero), "0", "1", "1",
     "0: every rank updates all weights; 1: its share"},
    {NULL, 0, "grad-dtype", OPTION_CHOICE, FIELD(grad_type), "float32|bf16", NULL, "float32",
     "what gradients travel as between GPUs"},
    {NULL, 0, "hang-timeout", OPTION_INT, FIELD(hang_timeout), "0", "1000000", "40",
     "seconds without a sign of life; 0: never ends a run"},

    {"Checkpoints", 'y', "resume", OPTION_BOOL, FIELD(resume), "0", "1", "0", "go on from the newest checkpoint in -o"},
    {NULL, 'n', "checkpoint-every", OPTION_INT, FIELD(checkpoint_every), "-1", MAX_COUNT, "1000",
     "steps between checkpoints; 0: at the end; -1: none"},
    {NULL, 0, "keep", OPTION_INT, FIELD(keep), "0", "1000000", "3", "newest checkpoints to keep; 0: all"},

    {"Reports", 0, "eval", OPTION_BOOL, FIELD(eval), "0", "1", "0",
     "validate the checkpoint -e into OUT/eval.jsonl; no training"},
    {NULL, 'v', "val-every", OPTION_INT, FIELD(val_every), "0", MAX_COUNT, "250",
     "steps between validations; 0: never"},
    {NULL, 0, "val-batches", OPTION_INT, FIELD(val_batches), "0", MAX_COUNT, "20",
     "micro-batches a validation, over all ranks; 0: all data"},
    {NULL, 0, "pruning-every", OPTION_INT, FIELD(pruning_every), "0", MAX_COUNT, "250",
     "steps between reports by layer and head; 0: never"},
    {NULL, 's', "sample-every", OPTION_INT, FIELD(sample_every), "0", MAX_COUNT, "0",
     "steps between samples; 0: never"},
    {NULL, 0, "sample-tokens", OPTION_INT, FIELD(sample_tokens), "1", "1048576", "256", "length of a sample"},
    {NULL, 0, "sample-temperature", OPTION_REAL, FIELD(sample_temperature), "0", "100", "0.8",
     "0: always the likeliest token"},
    {NULL, 0, "sample-top-k", OPTION_INT, FIELD(sample_top_k), "0", "65536", "50",
     "draw from the k likeliest tokens; 0: from all"},
    {NULL, 0, "sample-prompt", OPTION_STRING, FIELD(sample_prompt), NO_RANGE, "", "text that a sample begins with"},

    {"Help", 'h', "help", OPTION_FLAG, FIELD(help), NO_RANGE, NULL, "print this"},
    {NULL, 0, "version", OPTION_FLAG, FIELD(version), NO_RANGE, NULL, "print the version"},
};

#define TABLE_SIZE ((int)(sizeof table / sizeof table[0]))

/* ------------------------------------------------------------------------------------------------ values and texts */

/* What a value must be, for messages and the help: "0..65536", "off|paper|tight", "0|1", "" where anything goes. */
static void allowed_text(const Option *option, char *out, size_t size) {
    if (option->low == NULL) {
        snprintf(out, size, "%s", "");
    } else if (option->type == OPTION_CHOICE) {
        snprintf(out, size, "%s", option->low);
    } else {
        snprintf(out, size, "%s%s%s", option->low, option->type == OPTION_BOOL ? "|" : "..", option->high);
    }
}

/* A whole number, all of the text. */
static bool parse_int(const char *text, int64_t *value) {
    char *end;
    if (strspn(text, "+-0123456789") != strlen(text)) {
        return false;
    }
    errno = 0;
    long long parsed = strtoll(text, &end, 10);
    *value = parsed;
    return end != text && *end == '\0' && errno == 0;
}

/* A finite decimal number, all of the text. */
static bool parse_real(const char *text, double *value) {
    char *end;
    if (strspn(text, "+-.eE0123456789") != strlen(text)) { // no hexadecimal, nan, inf or blanks
        return false;
    }
    *value = strtod(text, &end);
    return end != text && *end == '\0' && isfinite(*value);
}

/* Number of `text` in "a|b|c"; -1 when it is none of them. */
static int find_choice(const char *choices, const char *text) {
    size_t length = strlen(text);
    int number = 0;
    for (const char *p = choices;; p++, number++) {
        size_t word = strcspn(p, "|");
        if (word == length && strncmp(p, text, length) == 0) {
            return number;
        }
        p += word;
        if (*p == '\0') {
            return -1;
        }
    }
}

static bool set_int(const Option *option, const char *text, int64_t *field) {
    int64_t value, low, high;
    bool ok = parse_int(text, &value) && parse_int(option->low, &low) && parse_int(option->high, &high);
    if (ok && value >= low && value <= high) {
        *field = value;
        return true;
    }
    return false;
}

static bool set_real(const Option *option, const char *text, double *field) {
    double value, low, high;
    bool ok = parse_real(text, &value) && parse_real(option->low, &low) && parse_real(option->high, &high);
    if (ok && value >= low && value <= high) {
        *field = value;
        return true;
    }
    return false;
}

/* Stores a value given as text. `given` is what the user typed as the option's name, for the message. */
static bool set_value(Options *options, const Option *option, const char *given, const char *text, FoxError *err) {
    char *field = (char *)options + option->field;
    int64_t number;
    bool ok = true;
    switch (option->type) {
    case OPTION_FLAG:
        *(bool *)field = true;
        break;
    case OPTION_BOOL:
        ok = set_int(option, text, &number);
        if (ok) {
            *(bool *)field = number != 0;
        }
        break;
    case OPTION_INT:
        ok = set_int(option, text, (int64_t *)field);
        break;
    case OPTION_REAL:
        ok = set_real(option, text, (double *)field);
        break;
    case OPTION_CHOICE:
        number = find_choice(option->low, text);
        ok = number >= 0;
        if (ok) {
            *(int *)field = (int)number;
        }
        break;
    case OPTION_STRING:
        *(const char **)field = text;
        break;
    }
    if (!ok) {
        char allowed[128];
        bool whole = option->type == OPTION_INT, real = option->type == OPTION_REAL;
        const char *kind = whole ? "a whole number in " : real ? "a number in " : "";
        allowed_text(option, allowed, sizeof allowed);
        return fox_fail(err, "%s: expected %s%s, found '%.100s'", given, kind, allowed, text);
    }
    return true;
}

/* The value as a user would type it. Strings may be cut at `size`. */
static void value_text(const Options *options, const Option *option, char *out, size_t size) {
    const char *field = (const char *)options + option->field;
    const char *choice = option->low;
    switch (option->type) {
    case OPTION_FLAG:
    case OPTION_BOOL:
        snprintf(out, size, "%d", *(const bool *)field);
        break;
    case OPTION_INT:
        snprintf(out, size, "%lld", (long long)*(const int64_t *)field);
        break;
    case OPTION_REAL:
        snprintf(out, size, "%g", *(const double *)field);
        break;
    case OPTION_CHOICE:
        for (int i = *(const int *)field; i > 0; i--) {
            choice = strchr(choice, '|') + 1;
        }
        snprintf(out, size, "%.*s", (int)strcspn(choice, "|"), choice);
        break;
    case OPTION_STRING:
        snprintf(out, size, "%s", *(const char *const *)field);
        break;
    }
}

/* ---------------------------------------------------------------------------------------------------- command line */

static int least(int a, int b) {
    return a < b ? a : b;
}

/* Edits (insert, delete, replace a letter) between two words; words longer than 31 letters count by their first 31. */
static int edit_distance(const char *a, const char *b) {
    int row[32];
    int columns = least((int)strlen(b), 31);
    for (int j = 0; j <= columns; j++) {
        row[j] = j;
    }
    for (int i = 1; a[i - 1] != '\0' && i <= 31; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= columns; j++) {
            int replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = least(replaced, least(row[j - 1], row[j]) + 1);
        }
    }
    return row[columns];
}

static bool fail_unknown(const char *given, FoxError *err) {
    const char *word = given + strspn(given, "-");
    int best = 0, best_distance = 1000, length = (int)strlen(word);
    for (int i = 0; i < TABLE_SIZE; i++) {
        int distance = edit_distance(word, table[i].name);
        if (distance < best_distance) {
            best = i;
            best_distance = distance;
        }
    }
    if (length > 1 && best_distance <= 3 && best_distance < length) {
        return fox_fail(err, "unknown option %.100s; did you mean --%s? --help lists them all", given,
                        table[best].name);
    }
    return fox_fail(err, "unknown option %.100s; --help lists them all", given);
}

/* The option an argument names, exactly ("-T", "--context"); NULL when it names none. */
static const Option *find_option(const char *argument, size_t length) {
    for (int i = 0; i < TABLE_SIZE; i++) {
        const char *name = table[i].name;
        bool is_letter = length == 2 && argument[0] == '-' && table[i].letter != 0 && argument[1] == table[i].letter;
        bool is_name = length == strlen(name) + 2 && strncmp(argument, "--", 2) == 0 &&
                       strncmp(argument + 2, name, length - 2) == 0;
        if (is_letter || is_name) {
            return &table[i];
        }
    }
    return NULL;
}

/* True for what must be an option and not a value: "--anything" or a known letter. */
static bool looks_like_option(const char *argument) {
    return strncmp(argument, "--", 2) == 0 || find_option(argument, strlen(argument)) != NULL;
}

static void set_defaults(Options *options) {
    memset(options, 0, sizeof *options);
    for (int i = 0; i < TABLE_SIZE; i++) {
        FoxError err = {{0}};
        if (table[i].type != OPTION_FLAG && !set_value(options, &table[i], table[i].name, table[i].initial, &err)) {
            fox_die("wrong default: %s", err.text);
        }
    }
}

/* Reads the option at argv[*at] and moves *at past it and its value. */
static bool parse_one(Options *options, int argc, char *const *argv, int *at, FoxError *err) {
    const char *argument = argv[(*at)++];
    if (argument[0] != '-' || argument[1] == '\0') {
        return fox_fail(err, "unexpected argument '%.100s': options begin with - or --, as in -i DATA", argument);
    }
    bool is_long = argument[1] == '-';
    size_t length = is_long ? strcspn(argument, "=") : strlen(argument);
    const Option *option = find_option(argument, length);
    char given[64];
    snprintf(given, sizeof given, "%.*s", (int)length, argument);
    if (option == NULL) {
        return fail_unknown(given, err);
    }
    const char *value = argument[length] == '=' ? argument + length + 1 : NULL;
    if (option->type == OPTION_FLAG && value != NULL) {
        return fox_fail(err, "%s takes no value, found '%.100s'", given, value);
    }
    if (option->type != OPTION_FLAG && value == NULL) {
        if (*at < argc && !looks_like_option(argv[*at])) {
            value = argv[(*at)++];
        } else if (option->type == OPTION_BOOL) {
            value = "1";
        } else {
            char allowed[128];
            allowed_text(option, allowed, sizeof allowed);
            return fox_fail(err, "%s needs a value%s%s: --%s VALUE or --%s=VALUE", given, allowed[0] ? " in " : "",
                            allowed, option->name, option->name);
        }
    }
    return set_value(options, option, given, value, err);
}

bool options_parse(Options *options, int argc, char *const *argv, FoxError *err) {
    set_defaults(options);
    for (int at = 1; at < argc;) {
        if (!parse_one(options, argc, argv, &at, err)) {
            return false;
        }
        if (options->help || options->version) {
            return true;
        }
    }
    if (options->eval && options->resume) {
        return fox_fail(err, "--eval trains nothing, so there is nothing to resume: leave -y out");
    }
    if (options->data[0] == '\0' && !(options->eval && options->val_data[0] != '\0')) {
        return fox_fail(err, "no data: give -i a folder, glob or file of token shards; --help lists all options");
    }
    if (options->model[0] == '\0' || options->out[0] == '\0') {
        return fox_fail(err, "%s is empty: expected a name", options->out[0] ? "-e (--model)" : "-o (--out)");
    }
    return true;
}

/* --------------------------------------------------------------------------------------------- what depends on what */

/* The multiple of `unit` nearest to `value`, at least one unit. */
static int64_t nearest_multiple(int64_t value, int64_t unit) {
    int64_t multiple = (value + unit / 2) / unit * unit;
    return multiple > 0 ? multiple : unit;
}

/* Fills the 0 of -T, -d, -l from the preset; false when there is none to ask. *batch_tokens is its wish, if -d is 0. */
static bool resolve_preset(Options *options, const FoxPreset *preset, int64_t *batch_tokens, FoxError *err) {
    bool T = options->context == 0, d = options->batch_tokens == 0, l = options->learning_rate == 0;
    if (options->eval) { // steps and rates are of no interest: any batch will do
        if (T) {
            return fox_fail(err, "--eval: the command line must say -T (context)");
        }
        *batch_tokens = !d ? options->batch_tokens : options->context < 16384 ? 16384 : options->context;
        return true;
    }
    if (preset == NULL && (T || d || l)) {
        return fox_fail(err, "%s is a checkpoint and no preset, so the command line must say%s%s%s", options->model,
                        T ? " -T (context)" : "", d ? " -d (tokens in a step)" : "", l ? " -l (learning rate)" : "");
    }
    *batch_tokens = d ? preset->batch_tokens : options->batch_tokens;
    options->context = T ? preset->context : options->context;
    options->learning_rate = l ? preset->learning_rate : options->learning_rate;
    return true;
}

bool options_resolve(Options *options, const FoxPreset *preset, int ranks, FoxError *err) {
    int64_t wish = 0, largest = 0;
    if (!resolve_preset(options, preset, &wish, err) || !parse_int(MAX_TOKENS, &largest)) {
        return false;
    }
    if (options->final_lr > options->learning_rate) {
        return fox_fail(err, "--final-lr %g is above the peak learning rate %g (-l); expected at most that",
                        options->final_lr, options->learning_rate);
    }
    if (options->learning_rate * options->weight_decay > 1) {
        return fox_fail(err, "-l %g times --weight-decay %g is more than 1: weights would change sign at every step", options->learning_rate,
                        options->weight_decay);
    }
    // One sequence on every rank is the least a step can be. B may be chosen freely where it was not given.
    int64_t T = options->context, row = T * ranks;
    int64_t most = T < 16384 ? 16384 / T : 1;
    int64_t B = options->micro_batch;
    if (B == 0 && options->batch_tokens == 0) {
        B = wish / row < 1 ? 1 : wish / row < most ? wish / row : most;
    } else if (B == 0) {
        for (B = most; B > 1 && wish % (row * B) != 0; B--) {
        }
    }
    int64_t unit = row * B;
    int64_t tokens = nearest_multiple(wish, unit);
    if (tokens > largest) {
        return fox_fail(err,
                        "-T %lld x -b %lld x %d ranks: a step would have %lld tokens, at most %lld are possible; lower "
                        "-b or -T",
                        (long long)T, (long long)B, ranks, (long long)tokens, (long long)largest);
    }
    if (options->batch_tokens != 0 && options->batch_tokens != tokens) {
        return fox_fail(err,
                        "-d %lld: a step must be a multiple of %lld tokens (-T %lld x -b %lld x %d rank%s); -d %lld "
                        "would work",
                        (long long)options->batch_tokens, (long long)unit, (long long)T, (long long)B, ranks,
                        ranks == 1 ? "" : "s", (long long)tokens);
    }
    options->micro_batch = B;
    options->batch_tokens = tokens;
    return true;
}

void options_resolve_steps(Options *options, int64_t windows) {
    int64_t windows_per_step = options->batch_tokens / options->context;
    if (options->steps == 0) {
        options->steps = windows < windows_per_step ? 1 : windows / windows_per_step;
    }
    if (options->warmup_tokens < 0) {
        int64_t tenth = options->steps * options->batch_tokens / 10;
        int64_t papers = (int64_t)256 << 20;
        options->warmup_tokens = tenth < papers ? tenth : papers;
    }
}

/* ------------------------------------------------------------------------------------------------------- printing */

void options_help(FILE *out) {
    fputs("train_fox: pretrains Forgetting Transformers (FoX) with adaptive computation pruning.\n"
          "usage: train_fox -i DATA [options]       values: --context 512, --context=512 or -T 512\n", out);
    for (int i = 0; i < TABLE_SIZE; i++) {
        const Option *option = &table[i];
        char names[40], allowed[128];
        if (option->group != NULL) {
            fprintf(out, "\n%-24s %-22s %s\n", option->group, "allowed", "default");
        }
        snprintf(names, sizeof names, "%c%c%c --%s", option->letter ? '-' : ' ', option->letter ? option->letter : ' ',
                 option->letter ? ',' : ' ', option->name);
        allowed_text(option, allowed, sizeof allowed);
        fprintf(out, "%-24s %-22s %-12s %s\n", names, allowed, option->initial ? option->initial : "", option->help);
    }
    fputs("\nModels (-e):", out);
    for (int i = 0; fox_preset(i) != NULL; i++) {
        fprintf(out, "%s%s", i % 4 == 0 ? "\n    " : "  ", fox_preset(i)->name);
    }
    fputs("\n", out);
}

void options_write_json(FILE *out, const Options *options) {
    const char *separator = "{";
    for (int i = 0; i < TABLE_SIZE; i++) {
        const Option *option = &table[i];
        const char *field = (const char *)options + option->field;
        char text[64];
        if (option->type == OPTION_FLAG) {
            continue;
        }
        fprintf(out, "%s\"", separator);
        for (const char *p = option->name; *p != '\0'; p++) {
            fputc(*p == '-' ? '_' : *p, out);
        }
        fputs("\": ", out);
        if (option->type == OPTION_STRING) {
            json_write_string(out, *(const char *const *)field);
        } else if (option->type == OPTION_REAL) {
            json_write_number(out, *(const double *)field);
        } else if (option->type == OPTION_BOOL) {
            fputs(*(const bool *)field ? "true" : "false", out);
        } else {
            value_text(options, option, text, sizeof text);
            fprintf(out, option->type == OPTION_CHOICE ? "\"%s\"" : "%s", text);
        }
        separator = ", ";
    }
    fputs("}", out);
}

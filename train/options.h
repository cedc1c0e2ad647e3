/* The options of a run. One table in options.c (name, letter, type, range, default, help, field) does everything: it
 * parses the command line, prints --help, and writes the settings as JSON.
 *
 * Zero (or -1) stands for "the model's preset decides" where a preset has an opinion; options_resolve replaces these by
 * values, once the preset and the number of ranks are known, and options_resolve_steps, once the data is open. */
#ifndef FOX_OPTIONS_H
#define FOX_OPTIONS_H

#include "config.h"

typedef enum FoxDevice { DEVICE_AUTO, DEVICE_CUDA, DEVICE_CPU } FoxDevice;
typedef enum GradType { GRAD_FLOAT32, GRAD_BF16 } GradType;
typedef enum DataOrder { ORDER_SHUFFLE, ORDER_FILE } DataOrder;

/* Strings point into argv, which must outlive this. */
typedef struct Options {
    bool help, version;

    const char *data;     /* folder, glob or file of training shards */
    const char *val_data; /* "": the folder of `data`, when that is one */
    const char *vocab;    /* vocabulary file; "": bytes, when the data's vocabulary has 257 tokens */
    const char *out;
    const char *model; /* preset or checkpoint directory */
    int64_t context;   /* T */

    int64_t micro_batch;  /* B, sequences */
    int64_t batch_tokens; /* per step, all ranks */
    int64_t steps;        /* updates of the whole run */
    double learning_rate; /* peak */
    int64_t warmup_tokens;
    double final_lr;
    double weight_decay;
    double grad_clip; /* 0: none */
    int64_t seed;
    int data_order; /* DataOrder */

    int acp; /* AcpMode of backend.h */
    double log_tolerance;
    int device; /* FoxDevice */
    int64_t recompute;
    bool deterministic;

    int64_t zero;         /* 0: every rank keeps all of the optimizer's state; 1: its share */
    int grad_type;        /* GradType: what gradients travel as */
    int64_t hang_timeout; /* seconds; 0: never */

    bool resume;
    int64_t checkpoint_every; /* 0: at the end only; -1: none at all */
    int64_t keep;             /* 0: all */

    bool eval;           /* nothing but a validation of the checkpoint `model` */
    int64_t val_every;   /* 0: never */
    int64_t val_batches; /* micro-batches, all ranks together; 0: all validation data */
    int64_t pruning_every;
    int64_t sample_every;
    int64_t sample_tokens;
    double sample_temperature; /* 0: the likeliest token */
    int64_t sample_top_k;      /* 0: all */
    const char *sample_prompt;
} Options;

/* Reads a command line (argv[0] is the program). Starts from the defaults; an option given twice: the last wins. At
 * --help or --version it stops and returns true with that field set. Otherwise fails with one line that names the
 * option, what it found and what is allowed. */
bool options_parse(Options *, int argc, char *const *argv, FoxError *);

/* Decides context, micro_batch, batch_tokens and learning_rate (unless eval) where they are 0, and checks that they fit together:
 * afterwards batch_tokens is a multiple of context * micro_batch * ranks. What was given is kept or is an error, which
 * says a value that would work. preset: NULL when the model is a checkpoint, which has no opinion; the options it
 * leaves open must then be given. */
bool options_resolve(Options *, const FoxPreset *preset, int ranks, FoxError *);

/* Decides steps (0: one pass over `windows` windows, at least one step) and warmup_tokens (-1: 256Mi tokens or a tenth
 * of the run, whichever is less). Needs options_resolve before. */
void options_resolve_steps(Options *, int64_t windows);

/* Prints the help: every option with its range and default. */
void options_help(FILE *);

/* Writes the settings as one JSON object on one line, without a newline. Keys are the long names with _ for -; whatever
 * the strings hold, it is valid JSON. */
void options_write_json(FILE *, const Options *);

#endif

/* A training run, as the calls that main() strings together. trainer_open.c has the start, trainer.c the rest.
 *
 *     start:  options -> shards -> model -> back end, weights -> output folder
 *     a step: forward_backward x micro_batches, update, then what is due: validate, report, sample, save
 *     end:    save, hash of the parameters
 *     --eval: start, a validation, and nothing else
 *
 * A run is a function of its options, its shards and the state in its checkpoint; the number of ranks only decides who
 * computes what. Functions that return bool are collective and return the same on every rank. When one rank fails all
 * return false, and the FoxError is filled on one rank only: the lowest that failed. */
#ifndef FOX_TRAINER_H
#define FOX_TRAINER_H

#include "../dataloader.h"
#include "checkpoint.h"
#include "metrics.h"
#include "options.h"
#include "sampler.h"

#define TRAINER_REFUSED_LIMIT 5 /* steps in a row with a loss or norm that is not finite; then the run stops */

typedef struct Trainer {
    Options options;
    Ranks ranks;
    Backend backend;
    DataLoader train, val; /* val.shards == NULL: no validation data; train.shards == NULL: --eval */
    int vocab_size;        /* of the shards */
    Tokenizer tokenizer; /* for samples; spans == NULL: none are wanted */
    Metrics metrics;
    TrainState state;
    FoxConfig config;
    char resume_dir[1024];    /* checkpoint that the run goes on from; "": a new run */
    char *settings;           /* options as JSON */
    int micro_batches;        /* of this rank, in a step */
    int64_t val_windows;      /* windows in a validation, over all ranks; 0: all */
    int32_t *tokens, *targets; /* [B, T], the micro-batch at work */
    double step_started;      /* fox_now() when the step at work began; 0 between steps */
    double *step_skipped, *step_blocks; /* [L, H] attention blocks of the last step or validation, this rank */
    int *ranges;              /* [L, H, blocks] that --eval finds in the first window; NULL: not wanted */
    double *skipped, *blocks; /* [L, H], since the last pruning report */
    CheckpointWriter writer;  /* backend NULL: not open yet */
    int64_t saved_step;       /* step of the newest whole checkpoint; -1: none yet */
    int64_t steps_made;       /* by this process */
    bool diverged;            /* stopped by non-finite steps: no checkpoint is written any more */
} Trainer;

/* Prepares an empty trainer, starts the ranks and reads the options. */
bool trainer_start(Trainer *, int *argc, char ***argv, FoxError *);

/* Opens training and validation shards. From here the vocabulary and the number of steps are known. */
bool trainer_open_data(Trainer *, FoxError *);

/* Decides which model this is: the checkpoint in -o that is to be resumed, a checkpoint folder (-e), or a preset. */
bool trainer_open_model(Trainer *, FoxError *);

/* Opens the back end, reports its memory, and fills the parameters (and on resume the moments, and goes to the place in
 * the data). */
bool trainer_open_backend(Trainer *, FoxError *);

/* Makes -o, opens metrics.jsonl, prints what will be done, and, but with --eval, takes charge of SIGINT, SIGTERM,
 * SIGUSR1 and SIGHUP. */
bool trainer_open_output(Trainer *, FoxError *);

/* True when a signal asked for the end. Collective. */
bool trainer_stops(const Trainer *);

/* True when all steps are done, or a signal asked for the end. Collective. */
bool trainer_ended(const Trainer *);

/* Forward and backward of this rank's next micro-batch. Not collective: hand the verdict to trainer_update. */
bool trainer_forward_backward(Trainer *, FoxError *);

/* Ends the step: all ranks agree that their micro-batches worked (`ok`), update, record. A step whose loss or gradient
 * norm is not finite changes nothing; after several in a row the run fails. */
bool trainer_update(Trainer *, bool ok, FoxError *);

/* True when something that happens every `every` steps is due after the step just made (never when 0). */
bool trainer_due(const Trainer *, int64_t every);

/* Mean loss over the first --val-batches of the validation shards, the same windows whatever the number of ranks. */
bool trainer_validate(Trainer *, FoxError *);

/* What --eval asks for: the same, and what was pruned there, into eval.jsonl. */
bool trainer_evaluate(Trainer *, FoxError *);

/* Writes the pruned fraction by layer and head since the last report to metrics.jsonl. */
void trainer_report_pruning(Trainer *);

/* Prints a sample of the model's text (rank 0). */
void trainer_sample(Trainer *);

/* Begins a checkpoint, which a thread writes while training goes on; the steps that follow see to its end. Failing is
 * reported, and training goes on until the next one is due. None while updates are refused as not finite: it would
 * displace an earlier one. */
void trainer_begin_save(Trainer *);

/* The end of a run that had begun, `ok` or not: the last checkpoint, unless it is there already or the run diverged,
 * and the hash of the parameters. True when all is well: `ok`, and the checkpoint was written. */
bool trainer_finish(Trainer *, bool ok, FoxError *);

/* Prints the error, if any is this rank's to print, frees everything, leaves MPI. Returns the exit code. */
int trainer_close(Trainer *, bool ok, const FoxError *);

/* Of this module alone: says how long another rank may give no sign of life. The start and the first step take what no other step
 * takes; the second has as much time, and shows how long pauses usually are. */
void trainer_set_patience(const Trainer *);

#endif

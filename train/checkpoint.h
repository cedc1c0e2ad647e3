/* Checkpoints: a directory that the official PyTorch FoX loads with from_pretrained, and that a run resumes from.
 *
 *   OUT/step_00001000/config.json              the official keys
 *                     model.safetensors        float32 master weights under the official names
 *                     optimizer-00000-of-00001.safetensors   "exp_avg", "exp_avg_sq": a range of the flat space;
 *                                              its start, length, total and the layout's hash in the metadata. This
 *                                              program writes one; it also reads several, in the order of their numbers
 *                     state.json               step, tokens, data position, options of the run; numbers of 64 bits
 *                                              without sign as hexadecimal strings
 *
 * A checkpoint is written whole into OUT/tmp_step_..., synced, then renamed: a reader sees a whole one or none. One
 * that stands there already under the same name is first renamed to OUT/old_step_..., which counts as a checkpoint as
 * long as it exists, so that a kill between the two renames loses nothing.
 *
 * Several ranks write the same files at the same time, each what it owns of the flat space (train/partition.h), and read
 * what they need: nothing in a checkpoint depends on their number. They need a folder that all of them share. Writing takes
 * two steps: the state is copied to main memory, and a thread brings it to the disk while training goes on. A directory holding only config.json and
 * model.safetensors (an official one) loads as a model, not as a run. */
#ifndef FOX_CHECKPOINT_H
#define FOX_CHECKPOINT_H

#include "backend.h"
#include "json.h"
#include "ranks.h"
#include "safetensors.h"

#include <pthread.h>

/* Where a run stands; everything needed to continue it exactly. */
typedef struct TrainState {
    int64_t step;          /* updates done */
    int64_t tokens;        /* tokens seen */
    uint64_t seed;         /* of the data order and the initial weights */
    int64_t next_window;   /* position in the global order of windows, over all epochs */
    int64_t windows;       /* windows in one epoch, */
    uint64_t data_hash;    /* and the fingerprint of shards and context they are counted in (dataloader_hash) */
    int skipped_in_a_row;  /* updates refused for a non-finite loss or norm just before */
    double best_val_loss;  /* smallest validation loss so far; NAN when there was none */
    uint64_t param_hash;   /* hash of the parameters; CheckpointWriter computes it, checkpoint_load_state checks it */
    uint64_t moment_hash;  /* the same of Adam's moments; 0: an older checkpoint, which has none */
} TrainState;

/* Reads config.json of a checkpoint directory. Missing optional keys take the official defaults; an option this program
 * does not compute (a window, grouped heads, fixed gates ...) is an error that names the key and its value. */
bool checkpoint_read_config(const char *dir, FoxConfig *, FoxError *);

/* The same from the metadata of a safetensors file, where every value is a string ("128", "True", "1e-06", "none"). */
bool checkpoint_config_from_metadata(const SafeTensors *, FoxConfig *, FoxError *);

/* Where the run stood that wrote the checkpoint. All zero, and true, where the directory holds a model and no run. */
bool checkpoint_read_state(const char *dir, TrainState *, FoxError *);

/* Writes config.json's text. log_tolerance: NAN writes null. */
void checkpoint_write_config(FILE *out, const FoxConfig *, double log_tolerance);

/* Creates model.safetensors with room for the table's tensors. */
bool checkpoint_create_model(const char *path, const FoxTable *, FoxError *);

/* Loads model.safetensors into the back end's parameters. Every tensor of the table must be there with its shape, and
 * no other; errors print expected and found. A sharded official checkpoint (model.safetensors.index.json) loads too.
 * Collective: fails when the ranks found different weights there. */
bool checkpoint_load_model(const char *dir, Backend *, const Ranks *, FoxError *);

/* Loads the optimizer's moments and state.json, after checkpoint_load_model. Collective. Fails when the directory holds only a
 * model, and when the back end's parameters, or the moments read, are not the ones the state was saved with. */
bool checkpoint_load_state(const char *dir, Backend *, const Ranks *, TrainState *, FoxError *);

/* Writes checkpoints beside training, in two parts: all ranks write what is theirs, then rank 0 gives the whole its name. A
 * thread of each rank does that; training waits only for the copy. Collective but for checkpoint_rests. */
typedef struct CheckpointWriter {
    Backend *backend;
    const Ranks *ranks;
    const char *out_dir, *settings;
    float *copy; /* [3, share]: this rank's parameters, exp_avg and exp_avg_sq */
    bool busy;   /* from checkpoint_begin until checkpoint_advance has come to the end */
    /* of the last checkpoint: what the caller waited for it in all, and of that for the copy; what the thread took */
    double stall, copying, seconds;

    TrainState state;
    SafeTensors model, optimizer;
    bool publishing;            /* all parts are written */
    uint64_t hash, moment_hash; /* of the parameters and of Adam's moments: of this rank's part, when publishing of all */
    pthread_t thread;
    pthread_mutex_t mutex; /* guards what follows */
    bool rests, ok;        /* the thread has done its present part; well */
    FoxError why;
} CheckpointWriter;

/* Takes the main memory for the copy: three floats a parameter, over all ranks. `settings` is a JSON object of the run's
 * options, kept in state.json for the reader (NULL: none). Both strings must outlive the writer. */
bool checkpoint_open(CheckpointWriter *, const char *out_dir, Backend *, const Ranks *, const char *settings, FoxError *);
/* Copies the state and begins to write OUT/step_%08d. Not while busy. */
bool checkpoint_begin(CheckpointWriter *, const TrainState *, FoxError *);
/* True when checkpoint_advance would not wait for this rank. */
bool checkpoint_rests(CheckpointWriter *);
/* Waits for the present part and goes on to the next; `wait`: to the end, which is when w->busy is false. The directory then has
 * its name: it is there whole, or not at all. On failure, the end too, the message (on one rank) says why, the temporary
 * directory is gone and earlier checkpoints stand. */
bool checkpoint_advance(CheckpointWriter *, bool wait, FoxError *);
/* Waits for the thread, throws an unfinished checkpoint away, frees everything. Safe on a zeroed writer. Not collective. */
void checkpoint_close(CheckpointWriter *);

/* All of it at once. Fills path (may be NULL) with the directory's name. */
bool checkpoint_save(const char *out_dir, Backend *, const Ranks *, const TrainState *, const char *settings,
                     char path[1024], FoxError *);

/* The newest whole checkpoint in out_dir: its directory in path. Warns on stderr when a newer one is damaged. Returns
 * false with no error text when there is none, and false with an error when there are only damaged ones. Links and
 * everything not named exactly as this program names it are passed over. */
bool checkpoint_latest(const char *out_dir, char path[1024], FoxError *);

/* Removes all but the newest `keep` whole checkpoints (keep <= 0: keeps all) and any leftovers of unfinished ones. Only
 * directories of exactly the form this program writes are touched: one that holds any other file stays. */
void checkpoint_prune(const char *out_dir, int keep);

/* Hash of the parameters, the same for any number of ranks; each adds what it owns. Collective. */
uint64_t checkpoint_param_hash(Backend *, const Ranks *);
/* True on every rank when all hold the same parameters; also where each holds only its share. Collective. */
bool checkpoint_same_params(Backend *, const Ranks *);

#endif

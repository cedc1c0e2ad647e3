/* What the three files behind checkpoint.h share: checkpoint_config.c (config.json), checkpoint.c (model, state and optimizer:
 * loading, hashes), checkpoint_writer.c (saving, and the folder of checkpoints). Nobody else includes it. Where a function can
 * fail it returns false, with the reason in FoxError. */
#ifndef FOX_CHECKPOINT_PARTS_H
#define FOX_CHECKPOINT_PARTS_H

#include "checkpoint.h"

/* Fails with "WHAT: KEY is VALUE, expected EXPECTED"; what: the file. */
bool checkpoint_wrong_value(const char *what, const char *key, const Json *v, const char *expected, FoxError *);

/* Missing, or null. */
bool checkpoint_is_null(const Json *v);

/* Hash of `count` values that begin at `start` of the flat space: the sum of hashes of grains, the last of which may be shorter.
 * Parts that begin at multiples of PARTITION_GRAIN add up to the hash of the whole, in any order. all_cores: nothing else
 * computes meanwhile. */
uint64_t checkpoint_hash_grains(int64_t start, int64_t count, const float *values, bool all_cores);

/* The sum over the ranks. Collective. */
uint64_t checkpoint_sum_hashes(const Ranks *, uint64_t mine);

/* Reads state.json, which must be there; *files: number of optimizer files. */
bool checkpoint_read_run(const char *dir, TrainState *, int64_t *files, FoxError *);

/* Writes state.json. moments: their hash; settings: a JSON object. */
bool checkpoint_write_state(const char *dir, const TrainState *, uint64_t param_hash, uint64_t moments, const char *settings,
                            FoxError *);

/* Path of optimizer file `index` of `count`. Fails where it is too long. */
bool checkpoint_optimizer_path(char path[1024], const char *dir, int64_t index, int64_t count, FoxError *);

/* Creates the one optimizer file that this program writes, with room for the moments of the whole table. */
bool checkpoint_create_optimizer(const char *path, const FoxTable *, FoxError *);

/* The two tensors of an optimizer file. */
extern const char *const checkpoint_moment_names[2];

#endif

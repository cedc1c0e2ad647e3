/* What a run writes about itself: metrics.jsonl for programs, the live line for people.
 *
 * metrics.jsonl holds one JSON object a line. Every one has "kind" and "step":
 *   run         at each start: settings, model, data, ranks
 *   step        tokens, loss, lr, grad_norm, applied, step_ms, tokens_per_s, mfu, pruned, gpu_mem_bytes; with several
 *               GPUs exchanged_bytes, exchange_ms, exposed_ms
 *   validation  tokens, loss, pruned; by position in the window (train/positions.h): position_edges, position_loss,
 *               position_tokens
 *   pruning     fraction of causal attention blocks skipped since the last report: all, and [layer][head]
 *   checkpoint  stall_ms, copy_ms, write_ms
 *   ranges      first key block that each query block keeps in one window: context, block (tokens), [layer][head][query block]
 * eval.jsonl, which --eval writes, holds run, validation, pruning (of the validation) and ranges.
 * A value that is unknown or not finite is null.
 *
 * A line is written whole by one write(), or not at all. A failing disk is reported once and training goes on; lines
 * are written again when it recovers. Only rank 0 writes; on the other ranks these functions do nothing. */
#ifndef FOX_METRICS_H
#define FOX_METRICS_H

#include "positions.h"

typedef struct Metrics {
    bool active;         /* rank 0 */
    int fd;              /* of metrics.jsonl */
    bool write_failed;   /* the last line could not be written, and the reader was told */
    bool terminal;       /* stdout is one: a live line, else a plain line every so often */
    int live_width;      /* characters of the live line now on the terminal */
    double last_line;    /* when the last plain line was printed, in seconds */
    double step_seconds; /* moving average over recent steps; 0 before the first */
} Metrics;

typedef struct StepRecord {
    int64_t step, steps; /* updates done, and of the whole run */
    int64_t tokens;      /* seen so far */
    int64_t step_tokens; /* in this step, all ranks */
    double loss, learning_rate, grad_norm;
    bool applied;   /* false: the update was refused because loss or norm was not finite */
    double seconds; /* wall time of the step */
    double mfu;     /* fraction of the device's peak in [0, 1]; NAN when the peak is unknown */
    double pruned;  /* fraction of causal blocks skipped; NAN when nothing was counted */
    double exchanged, exchange_ms, exposed_ms; /* between GPUs, see StepStats; 0: nothing */
    int64_t gpu_memory; /* bytes; -1 without a GPU */
} StepRecord;

/* Prepares the screen; no file yet. */
void metrics_begin(Metrics *, bool active);
/* Opens OUT/metrics.jsonl. step 0 starts it anew, and an earlier one becomes metrics-1.jsonl (-2, ...); a resumed run (step > 0) appends, after the lines of later steps and
 * unfinished lines have been cut (into a temporary file, renamed when whole). */
bool metrics_open(Metrics *, const char *out_dir, int64_t step, FoxError *);
/* Opens OUT/eval.jsonl, to append. */
bool metrics_open_eval(Metrics *, const char *out_dir, FoxError *);
/* Leaves the screen in order and closes the file. Safe after metrics_begin alone. */
void metrics_close(Metrics *);

/* `settings`: a JSON object, written as it is. */
void metrics_run(Metrics *, int64_t step, const char *settings);
/* Writes the line and updates what is on the screen. */
void metrics_step(Metrics *, const StepRecord *);
/* stall: seconds that training waited for a checkpoint, copy: of that, for the copy; write: seconds until it was on the disk. */
void metrics_checkpoint(Metrics *, int64_t step, double stall, double copy, double write);
/* pruned: fraction of the blocks; NAN when nothing was counted. */
void metrics_validation(Metrics *, int64_t step, int64_t tokens, double loss, double pruned, const PositionBins *);
/* skipped, total: blocks, [layers, heads]. Nothing is written when no block was counted. */
void metrics_pruning(Metrics *, int64_t step, int layers, int heads, const double *skipped, const double *total);
/* first: [layers, heads, blocks of `block` tokens]. */
void metrics_ranges(Metrics *, int64_t step, int layers, int heads, int64_t context, int block, const int *first);

/* Prints a line on stdout, after taking the live line away. */
FOX_PRINTF(2, 3) void metrics_say(Metrics *, const char *format, ...);
/* The same on stderr, as "train_fox: warning: ..."; on any rank. */
FOX_PRINTF(2, 3) void metrics_warn(Metrics *, const char *format, ...);

#endif

#include "trainer.h"

#include "schedule.h"
#include "stop.h"

#define ADAM_BETA1 0.9
#define ADAM_BETA2 0.95
#define ADAM_EPS 1e-8
#define START_SECONDS 600 /* that opening the devices, and the first step, may take longer than others before they count as hung */

void trainer_set_patience(const Trainer *t) {
    double seconds = (double)t->options.hang_timeout;
    ranks_patience(&t->ranks, seconds, t->steps_made < 2 ? START_SECONDS : 0, seconds, t->steps_made < 2);
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
    return ranks_max_int(&t->ranks, stop_wanted()) != 0;
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
    if (!ranks_everyone(&t->ranks, ok, err)) {
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
    trainer_set_patience(t);
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
    fox_fail(err,
             "loss or gradient norm was not finite in %d steps in a row, up to step %lld; no checkpoint is written; lower the learning "
             "rate (-l) and resume from an earlier one with -y",
             t->state.skipped_in_a_row, (long long)t->state.step);
    return ranks_everyone(&t->ranks, false, err);
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
    if (!ranks_everyone(&t->ranks, validate_share(t, sums, &bins, err), err)) {
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
    bool written = !t->metrics.write_failed ||
                   fox_fail(err, "%s/eval.jsonl: the records cannot be written; make room, or choose another -o", t->options.out);
    return ranks_everyone(&t->ranks, written, err);
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
        fox_fail(err, "the ranks' parameters differ after step %lld", (long long)t->state.step);
        return ranks_everyone(&t->ranks, false, err);
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

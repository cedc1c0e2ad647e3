/* train_fox: pretrains a Forgetting Transformer. This is the story of a run; train/trainer.h has its chapters. */
#include "train/trainer.h"

#define FOX_VERSION "0.1"

/* --help and --version. */
static int answer(Trainer *t, FoxError *err) {
    if (t->ranks.rank == 0 && t->options.help) {
        options_help(stdout);
    } else if (t->ranks.rank == 0) {
        puts("train_fox " FOX_VERSION);
    }
    return trainer_close(t, true, err);
}

int main(int argc, char **argv) {
    Trainer t;
    FoxError err;
    bool ok = trainer_start(&t, &argc, &argv, &err);
    if (ok && (t.options.help || t.options.version)) {
        return answer(&t, &err);
    }
    ok = ok && trainer_open_data(&t, &err)     // the shards decide vocabulary and number of steps
            && trainer_open_model(&t, &err)    // a preset, a checkpoint, or the run to resume
            && trainer_open_backend(&t, &err)  // memory, then weights
            && trainer_open_output(&t, &err);  // -o, metrics.jsonl
    const Options *o = &t.options;
    if (o->eval) {
        ok = ok && trainer_evaluate(&t, &err); // a validation is all
        return trainer_close(&t, ok, &err);
    }
    bool began = ok;

    while (ok && !trainer_ended(&t)) {
        for (int i = 0; ok && i < t.micro_batches; i++) {
            ok = trainer_forward_backward(&t, &err); // gradients add up
        }
        ok = trainer_update(&t, ok, &err); // sum over ranks, clip, AdamW, log
        if (ok && trainer_due(&t, o->pruning_every)) {
            trainer_report_pruning(&t);
        }
        if (ok && trainer_due(&t, o->val_every) && !trainer_stops(&t)) { // who asks to stop will not wait for long
            ok = trainer_validate(&t, &err);
        }
        if (ok && trainer_due(&t, o->sample_every) && !trainer_stops(&t)) {
            trainer_sample(&t);
        }
        if (ok && trainer_due(&t, o->checkpoint_every)) {
            trainer_begin_save(&t); // a full disk does not end a run
        }
    }
    if (began) {
        ok = trainer_finish(&t, ok, &err); // last checkpoint, hash of the parameters
    }
    return trainer_close(&t, ok, &err);
}

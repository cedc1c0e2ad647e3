/* Prints what train_fox would do, without a model. dev/train_official.py does the same with the official one.
 *
 *     plan OPTIONS OF train_fox
 *
 * One JSON object: the settings as metrics.jsonl has them; the shards; for every step its learning rate and its windows
 * as [shard, first token]; the windows of a validation; and the names of the tensors that decay. A window's input is
 * tokens [first, first + T) of its shard, its targets the same shifted by one. The model's configuration is a preset's.
 *
 *     cc -O2 -std=gnu11 -pthread -o plan dev/plan.c train/options.c train/config.c train/files.c train/json.c -lm */
#include "../dataloader.h"
#include "../train/json.h"
#include "../train/options.h"
#include "../train/schedule.h"

static void print_shards(const char *key, const DataLoader *loader) {
    printf(",\n\"%s\": [", key);
    for (int i = 0; i < loader->shard_count; i++) {
        fputs(i > 0 ? ", " : "", stdout);
        json_write_string(stdout, loader->shards[i].path);
    }
    fputs("]", stdout);
}

/* Windows [begin, end) of the global order. */
static void print_windows(const DataLoader *loader, int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) {
        int shard;
        int64_t start;
        dataloader_window(loader, g, &shard, &start);
        printf("%s[%d, %lld]", g == begin ? "[" : ", ", shard, (long long)start);
    }
    fputs("]", stdout);
}

static void print_steps(const Options *o, const DataLoader *train) {
    int64_t W = train->windows_per_step;
    fputs(",\n\"steps\": [", stdout);
    for (int64_t s = 0; s < o->steps; s++) {
        double rate = schedule_lr(o->learning_rate, o->final_lr, o->warmup_tokens, o->steps * o->batch_tokens,
                                  s * o->batch_tokens + o->batch_tokens / 2);
        printf("%s\n{\"lr\": %.17g, \"windows\": ", s > 0 ? "," : "", rate);
        print_windows(train, s * W, (s + 1) * W);
        fputs("}", stdout);
    }
    fputs("]", stdout);
}

static void print_decayed(const FoxConfig *config) {
    FoxTable table = fox_table_create(config);
    const char *separator = ",\n\"decay\": [";
    for (int i = 0; i < table.count; i++) {
        if (table.tensors[i].decay) {
            printf("%s\"%s\"", separator, table.tensors[i].name);
            separator = ", ";
        }
    }
    fputs("]", stdout);
    fox_table_free(&table);
}

static bool plan(int argc, char **argv, FoxError *err) {
    Options o;
    DataLoader train, val;
    if (!options_parse(&o, argc, argv, err)) {
        return false;
    }
    const FoxPreset *preset = fox_find_preset(o.model);
    if (preset == NULL) {
        return fox_fail(err, "-e %s: expected the name of a preset", o.model);
    }
    if (!options_resolve(&o, preset, 1, err)) {
        return false;
    }
    DataSpec spec;
    memset(&spec, 0, sizeof spec);
    spec.T = (int)o.context;
    spec.B = (int)o.micro_batch;
    spec.seed = (uint64_t)o.seed;
    spec.shuffle = o.data_order == ORDER_SHUFFLE;
    spec.windows_per_step = o.batch_tokens / o.context;
    spec.size = 1;
    if (!dataloader_open(&train, o.data, DATALOADER_TRAIN_PATTERN, &spec, err)) {
        return false;
    }
    options_resolve_steps(&o, train.windows);
    spec.shuffle = false;
    spec.windows_per_step = 0;
    spec.max_windows = o.val_batches * o.micro_batch;
    if (!dataloader_open(&val, o.val_data[0] ? o.val_data : o.data, DATALOADER_VAL_PATTERN, &spec, err)) {
        return false;
    }
    FoxConfig config = fox_preset_config(preset, train.vocab_size);
    fputs("{\"settings\": ", stdout);
    options_write_json(stdout, &o);
    printf(",\n\"vocab_size\": %d, \"windows\": %lld", train.vocab_size, (long long)train.windows);
    print_shards("shards", &train);
    print_steps(&o, &train);
    print_shards("val_shards", &val);
    fputs(",\n\"validation\": ", stdout);
    print_windows(&val, 0, val.windows);
    print_decayed(&config);
    puts("}");
    dataloader_close(&train);
    dataloader_close(&val);
    return true;
}

int main(int argc, char **argv) {
    FoxError err;
    err.text[0] = '\0';
    if (!plan(argc, argv, &err)) {
        fprintf(stderr, "plan: %s\n", err.text);
        return 1;
    }
    return 0;
}

/* Writes the weights that train_fox starts from: config.json and model.safetensors.
 *
 *     build/release/fresh_weights PRESET VOCABULARY SEED FOLDER
 *
 * dev/official.py runs it (fresh_weights). A run of one step would leave the same weights in its checkpoint, but
 * with Adam's moments beside them, which are twice as large, and from a GPU. */
#include "../train/checkpoint.h"

static void write_config(const char *path, const FoxConfig *config) {
    FILE *out = fopen(path, "w");
    if (out == NULL) {
        fox_die("%s: cannot be written", path);
    }
    checkpoint_write_config(out, config, (double)NAN);
    if (ferror(out) || fclose(out) != 0) {
        fox_die("%s: writing failed", path);
    }
}

static bool write_weights(const char *path, const FoxTable *table, const float *params, FoxError *err) {
    SafeTensors st;
    if (!checkpoint_create_model(path, table, err) || !safetensors_edit(path, &st, err)) {
        return false;
    }
    bool ok = true;
    for (int i = 0; ok && i < table->count; i++) {
        const FoxTensor *t = &table->tensors[i];
        ok = safetensors_write_float(&st, safetensors_find(&st, t->name), 0, t->size, params + t->offset, err);
    }
    safetensors_close(&st);
    return ok;
}

int main(int argc, char **argv) {
    FoxError err = {""};
    char path[1024];
    const FoxPreset *preset = argc == 5 ? fox_find_preset(argv[1]) : NULL;
    if (preset == NULL) {
        fox_die("usage: fresh_weights PRESET VOCABULARY SEED FOLDER");
    }
    FoxConfig config = fox_preset_config(preset, atoi(argv[2]));
    if (!fox_config_check(&config, &err)) {
        fox_die("%s", err.text);
    }
    FoxTable table = fox_table_create(&config);
    float *params = FOX_NEW(float, table.total);
    fox_init_parameters(&table, strtoull(argv[3], NULL, 10), params);
    snprintf(path, sizeof path, "%s/config.json", argv[4]);
    write_config(path, &config);
    snprintf(path, sizeof path, "%s/model.safetensors", argv[4]);
    if (!write_weights(path, &table, params, &err)) {
        fox_die("%s", err.text);
    }
    free(params);
    fox_table_free(&table);
    return 0;
}

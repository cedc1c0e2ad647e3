#include "config.h"

#define PAPER_TOKENS_125M 2684354560.0
#define PAPER_TOKENS_360M 7516192768.0
#define PAPER_TOKENS_760M 16106127360.0

#define ALIGNMENT 16 /* floats; the start of every tensor */
/* Elements; the start of the matrices. cuBLASLt takes addresses to be multiples of 256 bytes when it proposes algorithms; where
 * d is a multiple of 128, as in all presets, so is the start of every matrix, in bf16 too. */
#define MATRIX_ALIGNMENT 128

/* The learning rates of the 760m models are those of the 16e9-token runs. */
static const FoxPreset presets[] = {
    /* name                     fox    pro    d     L   H   lr    context batch   tokens */
    {"fox-pro-125m",           true,  true,   768, 12, 12, 2e-3, 16384, 524288, PAPER_TOKENS_125M},
    {"fox-llama-125m",         true,  false,  768, 12, 12, 2e-3, 16384, 524288, PAPER_TOKENS_125M},
    {"transformer-pro-125m",   false, true,   768, 12, 12, 2e-3, 16384, 524288, PAPER_TOKENS_125M},
    {"transformer-llama-125m", false, false,  768, 12, 12, 2e-3, 16384, 524288, PAPER_TOKENS_125M},
    {"fox-pro-360m",           true,  true,  1024, 24, 16, 2e-3, 16384, 524288, PAPER_TOKENS_360M},
    {"fox-llama-360m",         true,  false, 1024, 24, 16, 2e-3, 16384, 524288, PAPER_TOKENS_360M},
    {"transformer-pro-360m",   false, true,  1024, 24, 16, 2e-3, 16384, 524288, PAPER_TOKENS_360M},
    {"transformer-llama-360m", false, false, 1024, 24, 16, 2e-3, 16384, 524288, PAPER_TOKENS_360M},
    {"fox-pro-760m",           true,  true,  1536, 24, 24, 1e-3, 16384, 524288, PAPER_TOKENS_760M},
    {"fox-llama-760m",         true,  false, 1536, 24, 24, 1e-3, 16384, 524288, PAPER_TOKENS_760M},
    {"transformer-pro-760m",   false, true,  1536, 24, 12, 1e-3, 16384, 524288, PAPER_TOKENS_760M},
    {"transformer-llama-760m", false, false, 1536, 24, 12, 1e-3, 16384, 524288, PAPER_TOKENS_760M},
    {"fox-pro-tiny",           true,  true,   128,  4,  2, 3e-3,   512,   8192, 0},
};

const FoxPreset *fox_preset(int index) {
    int count = (int)(sizeof presets / sizeof presets[0]);
    return index >= 0 && index < count ? &presets[index] : NULL;
}

const FoxPreset *fox_find_preset(const char *name) {
    const FoxPreset *preset;
    for (int i = 0; (preset = fox_preset(i)) != NULL; i++) {
        if (strcmp(preset->name, name) == 0) {
            return preset;
        }
    }
    return NULL;
}

int fox_intermediate_size(double hidden_ratio, int hidden_size) {
    double inner = (double)hidden_size * hidden_ratio * 2 / 3;
    if (!(inner >= 1 && inner < 1e9)) {
        return 0; // which fox_config_check refuses
    }
    return ((int)inner + 255) / 256 * 256;
}

FoxConfig fox_preset_config(const FoxPreset *preset, int vocab_size) {
    FoxConfig c;
    memset(&c, 0, sizeof c);
    c.vocab_size = vocab_size;
    c.hidden_size = preset->hidden_size;
    c.num_hidden_layers = preset->num_hidden_layers;
    c.num_heads = preset->num_heads;
    c.hidden_ratio = preset->pro ? 3.5 : 4.0;
    c.intermediate_size = fox_intermediate_size(c.hidden_ratio, c.hidden_size);
    c.use_forget_gate = preset->fox;
    c.use_rope = !preset->fox;
    c.use_output_gate = c.use_output_norm = c.qk_norm = c.use_k_shift = c.use_v_shift = preset->pro;
    c.rope_base = 500000.0f;
    c.norm_eps = 1e-6;
    return c;
}

/* Number of parameters in int64: every factor was checked to be small enough before. */
static int64_t count_parameters(const FoxConfig *c) {
    int64_t d = c->hidden_size, H = c->num_heads, inner = c->intermediate_size;
    int64_t layer = 4 * d * d + 3 * d * inner + 2 * d;
    layer += c->use_output_gate ? d * d : 0;
    layer += c->use_forget_gate ? H * d + H : 0;
    layer += (c->use_k_shift ? H * d : 0) + (c->use_v_shift ? H * d : 0);
    layer += c->qk_norm ? 2 * (c->qk_norm_share_param_across_head ? d / H : d) : 0;
    layer += c->use_output_norm ? d : 0;
    return 2 * (int64_t)c->vocab_size * d + c->num_hidden_layers * layer + d;
}

static bool check_range(FoxError *err, const char *key, int value, int low, int high) {
    return (value >= low && value <= high) || fox_fail(err, "%s is %d, expected %d to %d", key, value, low, high);
}

/* Bounded so that the value is an ordinary number as a float, too. */
static bool check_positive(FoxError *err, const char *key, double value) {
    return (value >= 1e-30 && value <= 1e30) ||
           fox_fail(err, "%s is %g, expected a positive number from 1e-30 to 1e30", key, value);
}

bool fox_config_check(const FoxConfig *c, FoxError *err) {
    if (!check_range(err, "vocab_size", c->vocab_size, 1, 1 << 24) ||
        !check_range(err, "hidden_size", c->hidden_size, 16, 1 << 16) ||
        !check_range(err, "num_hidden_layers", c->num_hidden_layers, 1, 1024) ||
        !check_range(err, "num_heads", c->num_heads, 1, 1 << 12) ||
        !check_range(err, "intermediate_size", c->intermediate_size, 1, 1 << 20) ||
        !check_positive(err, "hidden_ratio", c->hidden_ratio) || !check_positive(err, "rope_base", c->rope_base) ||
        !check_positive(err, "norm_eps", c->norm_eps)) {
        return false;
    }
    if (c->hidden_size % ALIGNMENT != 0) {
        return fox_fail(err, "hidden_size is %d, expected a multiple of %d", c->hidden_size, ALIGNMENT);
    }
    if (c->hidden_size % c->num_heads != 0) {
        return fox_fail(err, "hidden_size is %d, expected a multiple of num_heads, which is %d", c->hidden_size,
                        c->num_heads);
    }
    int D = c->hidden_size / c->num_heads;
    if (D % 2 != 0 || D > 256) {
        return fox_fail(err, "a head is hidden_size %d / num_heads %d = %d wide, expected an even number up to 256",
                        c->hidden_size, c->num_heads, D);
    }
    int64_t parameters = count_parameters(c);
    if (parameters >= (int64_t)1 << 40) {
        return fox_fail(err, "the model would have %.3g parameters, expected fewer than 2^40", (double)parameters);
    }
    return true;
}

/* Appends a tensor of [rows, cols] (cols 0: a vector of `rows`) and returns its index. A matrix starts as noise, with
 * weight decay; vectors pass their own initialisation. */
static int add_tensor(FoxTable *table, const char *prefix, const char *name, FoxInit init, int64_t rows, int64_t cols) {
    FoxTensor *t = &table->tensors[table->count];
    snprintf(t->name, sizeof t->name, "%s%s", prefix, name);
    t->ndim = cols > 0 ? 2 : 1;
    t->shape[0] = rows;
    t->shape[1] = cols > 0 ? cols : 1;
    t->size = t->shape[0] * t->shape[1];
    t->decay = t->ndim == 2;
    t->init = init;
    table->parameters += t->size;
    return table->count++;
}

static int add_matrix(FoxTable *table, const char *prefix, const char *name, int64_t rows, int64_t cols) {
    return add_tensor(table, prefix, name, FOX_INIT_NORMAL, rows, cols);
}

static int add_norm(FoxTable *table, const char *prefix, const char *name, int64_t length) {
    return add_tensor(table, prefix, name, FOX_INIT_ONES, length, 0);
}

static void place(FoxTable *table, int tensor) {
    FoxTensor *t = &table->tensors[tensor];
    t->offset = table->total;
    table->total += fox_round_up(t->size, ALIGNMENT);
}

/* Decides the offsets: vectors, embeddings, then the other matrices layer by layer, lm_head last. */
static void place_all(FoxTable *table, const FoxConfig *c) {
    for (int i = 0; i < table->count; i++) {
        if (table->tensors[i].ndim == 1) {
            place(table, i);
        }
    }
    table->total = fox_round_up(table->total, MATRIX_ALIGNMENT);
    table->decayed = table->total;
    place(table, table->embeddings);
    table->matrices = table->total;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        const FoxLayerIds *ids = &table->layers[l];
        int64_t start = table->total, rows = (int64_t)FOX_PACKED_ROWS * c->hidden_size;
        for (int i = ids->q; i <= ids->down; i++) {
            if (i == ids->o) { // all packed rows are placed
                table->total = start + fox_round_up(table->total - start, rows);
            }
            if (table->tensors[i].ndim == 2) {
                place(table, i);
            }
        }
    }
    place(table, table->lm_head);
}

/* From q to fgate the rows multiply the same input and follow each other without padding between them, because each has
 * a multiple of d elements and d is a multiple of ALIGNMENT: together they are one matrix with rows of length d. */
static FoxLayerIds add_layer(FoxTable *table, const FoxConfig *c, int layer) {
    int64_t d = c->hidden_size, H = c->num_heads, inner = c->intermediate_size;
    int64_t qk_norm = c->qk_norm_share_param_across_head ? d / H : d;
    char at[32];
    snprintf(at, sizeof at, "model.layers.%d.", layer);
    FoxLayerIds ids;
    memset(&ids, -1, sizeof ids); // every index -1
    ids.attn_norm = add_norm(table, at, "attn_norm.weight", d);
    ids.q = add_matrix(table, at, "attn.q_proj.weight", d, d);
    ids.k = add_matrix(table, at, c->use_k_shift ? "attn.k_proj.linear.weight" : "attn.k_proj.weight", d, d);
    ids.v = add_matrix(table, at, c->use_v_shift ? "attn.v_proj.linear.weight" : "attn.v_proj.weight", d, d);
    if (c->use_output_gate) {
        ids.ogate = add_matrix(table, at, "attn.ogate_proj.weight", d, d);
    }
    if (c->use_k_shift) {
        ids.k_shift = add_matrix(table, at, "attn.k_proj.shift_proj.weight", H, d);
    }
    if (c->use_v_shift) {
        ids.v_shift = add_matrix(table, at, "attn.v_proj.shift_proj.weight", H, d);
    }
    if (c->use_forget_gate) {
        ids.fgate = add_matrix(table, at, "attn.fgate_proj.weight", H, d);
        ids.fgate_bias = add_tensor(table, at, "attn.fgate_proj.bias", FOX_INIT_ZEROS, H, 0);
    }
    if (c->qk_norm) {
        ids.q_norm = add_norm(table, at, "attn.q_norm.weight", qk_norm);
        ids.k_norm = add_norm(table, at, "attn.k_norm.weight", qk_norm);
    }
    if (c->use_output_norm) {
        ids.output_norm = add_norm(table, at, "attn.output_norm.weight", d);
    }
    ids.o = add_matrix(table, at, "attn.o_proj.weight", d, d);
    ids.mlp_norm = add_norm(table, at, "mlp_norm.weight", d);
    ids.gate_up = add_matrix(table, at, "mlp.gate_proj.weight", 2 * inner, d);
    ids.down = add_matrix(table, at, "mlp.down_proj.weight", d, inner);
    return ids;
}

FoxTable fox_table_create(const FoxConfig *c) {
    int L = c->num_hidden_layers, per_layer = (int)(sizeof(FoxLayerIds) / sizeof(int));
    FoxTable table;
    memset(&table, 0, sizeof table);
    table.tensors = FOX_NEW(FoxTensor, L * per_layer + 3);
    table.layers = FOX_NEW(FoxLayerIds, L);
    table.embeddings = add_matrix(&table, "", "model.embeddings.weight", c->vocab_size, c->hidden_size);
    for (int layer = 0; layer < L; layer++) {
        table.layers[layer] = add_layer(&table, c, layer);
    }
    table.norm = add_norm(&table, "", "model.norm.weight", c->hidden_size);
    table.lm_head = add_matrix(&table, "", "lm_head.weight", c->vocab_size, c->hidden_size);
    place_all(&table, c);
    return table;
}

void fox_table_free(FoxTable *table) {
    free(table->tensors);
    free(table->layers);
    memset(table, 0, sizeof *table);
}

int fox_table_find(const FoxTable *table, const char *name) {
    for (int i = 0; i < table->count; i++) {
        if (strcmp(table->tensors[i].name, name) == 0) {
            return i;
        }
    }
    return -1;
}

void fox_init_parameters(const FoxTable *table, uint64_t seed, float *params) {
    memset(params, 0, sizeof(float) * (size_t)table->total);
    for (int i = 0; i < table->count; i++) {
        const FoxTensor *t = &table->tensors[i];
        float *w = params + t->offset;
        uint64_t key = fox_random(seed, fox_hash(0, t->name, strlen(t->name)));
        if (t->init == FOX_INIT_NORMAL) {
#pragma omp parallel for
            for (int64_t j = 0; j < t->size; j++) {
                w[j] = (float)(FOX_INIT_STD * fox_normal(key, (uint64_t)j));
            }
        } else if (t->init == FOX_INIT_ONES) {
            for (int64_t j = 0; j < t->size; j++) {
                w[j] = 1.0f;
            }
        }
    }
}

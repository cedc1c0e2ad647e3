/* What a model is: its configuration, the named presets, and the table of its parameters.
 *
 * The table is the one place that knows a parameter's name, shape, initialisation and weight decay. Allocation, the
 * optimizer, checkpoints, sharding and the tests all walk it; no parameter is known by a number.
 *
 * All parameters lie in one flat float32 space, tensor after tensor at `offset`, in three parts:
 *     vectors of all layers, embeddings | matrices of layer 0, layer 1, ... | lm_head
 * The first part, `matrices` floats, is what a forward pass reads in float32 whatever the precision of its products.
 * Backward completes gradients from the end of the space towards its beginning. Inside a layer the rows that multiply the
 * same input (q, k, v, output gate, both shift projections, forget gate) are neighbours, so a back end may see them as one
 * packed matrix; rows of padding make theirs a multiple of FOX_PACKED_ROWS, without which cuBLASLt takes slower
 * kernels. Gradients and Adam's moments use the same offsets. */
#ifndef FOX_CONFIG_H
#define FOX_CONFIG_H

#include "common.h"

#define FOX_QK_NORM_EPS 1e-5f /* epsilon of q_norm and k_norm; the other norms take FoxConfig.norm_eps */
#define FOX_INIT_STD 0.02
#define FOX_PACKED_ROWS 8 /* 16 bytes in bf16: what tensor cores load at once */

/* The keys of the official config.json that decide what is computed. */
typedef struct FoxConfig {
    int vocab_size;        /* V */
    int hidden_size;       /* d */
    int num_hidden_layers; /* L */
    int num_heads;         /* H; the head width is D = d / H */
    int intermediate_size; /* inner width of the MLP */
    double hidden_ratio;   /* r, from which intermediate_size was made; kept for config.json */
    bool use_forget_gate;  /* fgate_type "full" (true) or "none" (false) */
    bool use_output_gate;
    bool use_output_norm;
    bool qk_norm;
    bool qk_norm_share_param_across_head; /* one weight of length D for all heads: released checkpoints */
    bool use_k_shift;
    bool use_v_shift;
    bool use_rope;
    double rope_base;
    double norm_eps;
} FoxConfig;

/* A preset: a model and the recipe its paper trained it with. */
typedef struct FoxPreset {
    const char *name;
    bool fox; /* forget gate (true), or the RoPE Transformer baseline */
    bool pro; /* token shift, QK-norm, output norm and gate, r = 3.5; else LLaMA, r = 4 */
    int hidden_size, num_hidden_layers, num_heads;
    double learning_rate;    /* peak */
    int context;             /* T */
    int batch_tokens;        /* per step, all ranks */
    double tokens_in_papers; /* 0: not in the papers */
} FoxPreset;

typedef enum FoxInit { FOX_INIT_NORMAL, FOX_INIT_ONES, FOX_INIT_ZEROS } FoxInit;

typedef struct FoxTensor {
    char name[80]; /* as in model.safetensors */
    int ndim;      /* 1 or 2 */
    int64_t shape[2];
    int64_t size;   /* number of elements */
    int64_t offset; /* of the first element in the flat space; a multiple of 16, of matrices of 128 where hidden_size is one */
    bool decay;     /* weight decay applies: matrices and embeddings, not norms and biases */
    FoxInit init;
} FoxTensor;

/* Indices into FoxTable.tensors of one layer's parameters; -1 where the config has none. */
typedef struct FoxLayerIds {
    int attn_norm, q, k, v, ogate, k_shift, v_shift, fgate, fgate_bias, q_norm, k_norm, output_norm, o;
    int mlp_norm, gate_up, down;
} FoxLayerIds;

typedef struct FoxTable {
    int count;
    FoxTensor *tensors;
    int64_t parameters; /* number of real parameters */
    int64_t total;      /* length of the flat space: parameters and the padding between tensors (always zero) */
    int64_t decayed;    /* weight decay applies from here on: the vectors lie before it */
    int64_t matrices;   /* where the matrices of layer 0 begin: the vectors and the embeddings lie before it */
    int embeddings, norm, lm_head;
    FoxLayerIds *layers; /* [L] */
} FoxTable;

/* The table of presets; NULL past the end. */
const FoxPreset *fox_preset(int index);

/* The preset of that name, or NULL. */
const FoxPreset *fox_find_preset(const char *name);

/* Inner width of the MLP: 256 * ceil(int(2 r d / 3) / 256), as the official code rounds it. */
int fox_intermediate_size(double hidden_ratio, int hidden_size);

/* The configuration of a preset for a vocabulary of V tokens. */
FoxConfig fox_preset_config(const FoxPreset *preset, int vocab_size);

/* Checks ranges and divisibility; says which key is wrong. */
bool fox_config_check(const FoxConfig *config, FoxError *err);

/* Builds the table of a checked configuration. Free with fox_table_free. */
FoxTable fox_table_create(const FoxConfig *config);
void fox_table_free(FoxTable *table);

/* Index of the tensor of that name, -1 if there is none. */
int fox_table_find(const FoxTable *table, const char *name);

/* Fills params (flat, table->total floats) with the initial weights: N(0, 0.02) for matrices and embeddings, ones for
 * norms, zeros for biases. A function of the seed and the tensor names alone, whatever the machine. */
void fox_init_parameters(const FoxTable *table, uint64_t seed, float *params);

#endif

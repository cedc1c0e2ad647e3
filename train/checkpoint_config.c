/* config.json of a checkpoint: what the official model calls its options, and which of them this program computes. */
#include "checkpoint_parts.h"

#include "files.h"

#include <ctype.h>
#include <limits.h>

#define MODEL_TYPE "forgetting_transformer-project_fox"
#define BASELINE_TYPE "transformer-project_fox" /* the official Transformer (LLaMA): the same tensors, RoPE, no gate */

/* A value as it may stand in an error message: short, on one line. */
static const char *show(const Json *v, char text[64]) {
    switch (v->type) {
    case JSON_NULL: return "null";
    case JSON_BOOL: return v->boolean ? "true" : "false";
    case JSON_NUMBER: snprintf(text, 64, "%.9g", v->number); return text;
    case JSON_ARRAY: return "an array";
    case JSON_OBJECT: return "an object";
    default: break;
    }
    snprintf(text, 64, "\"%.48s\"", v->string);
    for (char *c = text; *c != '\0'; c++) {
        *c = (unsigned char)*c < 0x20 ? '?' : *c;
    }
    return text;
}

bool checkpoint_wrong_value(const char *what, const char *key, const Json *v, const char *expected, FoxError *err) {
    char text[64];
    return fox_fail(err, "%s: %s is %s, expected %s", what, key, show(v, text), expected);
}

bool checkpoint_is_null(const Json *v) {
    return v == NULL || v->type == JSON_NULL;
}

static bool is_string(const Json *v, const char *s) {
    return v->type == JSON_STRING && strcmp(v->string, s) == 0;
}

/* The get_ functions leave *out, the default, alone where the key is missing. */
static bool get_bool(const Json *root, const char *what, const char *key, bool *out, FoxError *err) {
    const Json *v = json_get(root, key);
    if (v != NULL && v->type != JSON_BOOL) {
        return checkpoint_wrong_value(what, key, v, "true or false", err);
    }
    *out = v != NULL ? v->boolean : *out;
    return true;
}

static bool get_int(const Json *root, const char *what, const char *key, int *out, FoxError *err) {
    const Json *v = json_get(root, key);
    if (v != NULL && (!v->is_integer || v->integer < INT_MIN || v->integer > INT_MAX)) {
        return checkpoint_wrong_value(what, key, v, "a whole number", err);
    }
    *out = v != NULL ? (int)v->integer : *out;
    return true;
}

static bool get_double(const Json *root, const char *what, const char *key, double *out, FoxError *err) {
    const Json *v = json_get(root, key);
    if (v != NULL && v->type != JSON_NUMBER) {
        return checkpoint_wrong_value(what, key, v, "a number", err);
    }
    *out = v != NULL ? v->number : *out;
    return true;
}

/* Options of the official code that change what is computed and that this program has only one value of. Missing keys
 * have that value by default. */
static bool check_unsupported(const Json *root, const char *what, const FoxConfig *c, FoxError *err) {
    static const char *const must_be_null[] = {"window_size", "decay_time_min", "decay_time_max"};
    static const char *const must_be_false[] = {"attention_bias", "tie_word_embeddings", "fgate_bias_init"};
    for (int i = 0; i < 3; i++) {
        const Json *v = json_get(root, must_be_null[i]);
        if (!checkpoint_is_null(v)) {
            return checkpoint_wrong_value(what, must_be_null[i], v, "null: this program has no such option", err);
        }
        v = json_get(root, must_be_false[i]);
        if (v != NULL && (v->type != JSON_BOOL || v->boolean)) {
            return checkpoint_wrong_value(what, must_be_false[i], v, "false: this program has no such option", err);
        }
    }
    const Json *v = json_get(root, "num_kv_heads");
    if (!checkpoint_is_null(v) && !(v->is_integer && v->integer == c->num_heads)) {
        return checkpoint_wrong_value(what, "num_kv_heads", v, "null: every head has its own keys and values here", err);
    }
    v = json_get(root, "hidden_act");
    if (v != NULL && !is_string(v, "swish")) {
        return checkpoint_wrong_value(what, "hidden_act", v, "\"swish\"", err);
    }
    v = json_get(root, "ogate_act");
    if (v != NULL && c->use_output_gate && !is_string(v, "sigmoid")) {
        return checkpoint_wrong_value(what, "ogate_act", v, "\"sigmoid\"", err);
    }
    v = json_get(root, "elementwise_affine");
    if (v != NULL && (v->type != JSON_BOOL || !v->boolean)) {
        return checkpoint_wrong_value(what, "elementwise_affine", v, "true", err);
    }
    v = json_get(root, "qk_norm_eps");
    if (v != NULL && !(fabs(v->number - (double)FOX_QK_NORM_EPS) < 1e-9)) {
        return checkpoint_wrong_value(what, "qk_norm_eps", v, "1e-05", err);
    }
    return true;
}

/* model_type and fgate_type, which set or override defaults of the other keys. */
static bool get_kinds(const Json *root, const char *what, FoxConfig *c, FoxError *err) {
    const Json *type = json_get(root, "model_type"), *gate = json_get(root, "fgate_type");
    bool baseline = type != NULL && is_string(type, BASELINE_TYPE);
    if (type != NULL && !baseline && !is_string(type, MODEL_TYPE)) {
        return checkpoint_wrong_value(what, "model_type", type, "\"" MODEL_TYPE "\"", err);
    }
    c->use_forget_gate = gate != NULL ? is_string(gate, "full") : !baseline;
    c->use_rope = baseline;
    return gate == NULL || c->use_forget_gate || is_string(gate, "none") ||
           checkpoint_wrong_value(what, "fgate_type", gate, "\"full\" or \"none\"", err);
}

/* Official keys and defaults to a checked configuration. `what` names the source in errors. */
static bool config_from_json(const Json *root, const char *what, FoxConfig *c, FoxError *err) {
    memset(c, 0, sizeof *c);
    if (root->type != JSON_OBJECT) {
        return fox_fail(err, "%s: is not a JSON object", what);
    }
    c->vocab_size = 32000;
    c->hidden_size = 2048;
    c->num_hidden_layers = 24;
    c->num_heads = 32;
    c->hidden_ratio = 4.0;
    c->rope_base = 500000.0;
    c->norm_eps = 1e-6;
    bool ok = get_kinds(root, what, c, err) && get_int(root, what, "vocab_size", &c->vocab_size, err) &&
              get_int(root, what, "hidden_size", &c->hidden_size, err) &&
              get_int(root, what, "num_hidden_layers", &c->num_hidden_layers, err) &&
              get_int(root, what, "num_heads", &c->num_heads, err) &&
              (checkpoint_is_null(json_get(root, "hidden_ratio")) ||
               get_double(root, what, "hidden_ratio", &c->hidden_ratio, err)) &&
              get_double(root, what, "rope_base", &c->rope_base, err) &&
              get_double(root, what, "norm_eps", &c->norm_eps, err) &&
              get_bool(root, what, "use_rope", &c->use_rope, err) &&
              get_bool(root, what, "use_output_gate", &c->use_output_gate, err) &&
              get_bool(root, what, "use_output_norm", &c->use_output_norm, err) &&
              get_bool(root, what, "qk_norm", &c->qk_norm, err) &&
              get_bool(root, what, "qk_norm_share_param_across_head", &c->qk_norm_share_param_across_head, err) &&
              get_bool(root, what, "use_k_shift", &c->use_k_shift, err) &&
              get_bool(root, what, "use_v_shift", &c->use_v_shift, err) && check_unsupported(root, what, c, err);
    if (!ok) {
        return false;
    }
    c->intermediate_size = fox_intermediate_size(c->hidden_ratio, c->hidden_size);
    if (!checkpoint_is_null(json_get(root, "intermediate_size")) &&
        !get_int(root, what, "intermediate_size", &c->intermediate_size, err)) {
        return false;
    }
    FoxError why = {""};
    return fox_config_check(c, &why) || fox_fail(err, "%s: %s", what, why.text);
}

bool checkpoint_read_config(const char *dir, FoxConfig *config, FoxError *err) {
    char path[PATH_SIZE];
    JsonDocument document;
    if (!path_join(path, dir, "config.json", err) || !json_parse_file(path, &document, err)) {
        return false;
    }
    bool ok = config_from_json(document.root, path, config, err);
    json_free(&document);
    return ok;
}

/* Writes a metadata string as the JSON value that Python's str() made it from. */
static void write_metadata_value(FILE *out, const char *s) {
    JsonDocument number;
    if (strcmp(s, "True") == 0 || strcmp(s, "False") == 0) {
        fputs(*s == 'T' ? "true" : "false", out);
    } else if (strcmp(s, "None") == 0) {
        fputs("null", out);
    } else if ((isdigit((unsigned char)*s) || *s == '-') && json_parse(s, strlen(s), "", &number, NULL)) {
        json_free(&number);
        fputs(s, out);
    } else {
        json_write_string(out, s);
    }
}

bool checkpoint_config_from_metadata(const SafeTensors *st, FoxConfig *config, FoxError *err) {
    const Json *metadata = json_get(st->header.root, "__metadata__");
    if (metadata == NULL) {
        return fox_fail(err, "%s: has no metadata that describes its model", st->path);
    }
    JsonText text;
    json_text_begin(&text);
    FILE *out = text.stream;
    fputc('{', out);
    for (const Json *m = metadata->first; m != NULL; m = m->next) {
        json_write_string(out, m->key);
        fputc(':', out);
        write_metadata_value(out, m->string);
        fputs(m->next != NULL ? "," : "", out);
    }
    fputc('}', out);
    JsonDocument document;
    json_text_end(&text);
    bool ok = json_parse(text.text, text.length, st->path, &document, err);
    free(text.text);
    if (ok) {
        ok = config_from_json(document.root, st->path, config, err);
        json_free(&document);
    }
    return ok;
}

static void write_number(FILE *out, const char *key, double value) {
    fprintf(out, "  \"%s\": ", key);
    json_write_number(out, value);
    fputs(",\n", out);
}

static void write_bool(FILE *out, const char *key, bool value) {
    fprintf(out, "  \"%s\": %s,\n", key, value ? "true" : "false");
}

void checkpoint_write_config(FILE *out, const FoxConfig *c, double log_tolerance) {
    fputs("{\n  \"architectures\": [\"ForgettingTransformerForCausalLM\"],\n", out);
    fputs("  \"model_type\": \"" MODEL_TYPE "\",\n", out);
    fputs("  \"torch_dtype\": \"float32\",\n", out);
    fprintf(out, "  \"vocab_size\": %d,\n", c->vocab_size);
    fprintf(out, "  \"hidden_size\": %d,\n", c->hidden_size);
    fprintf(out, "  \"num_hidden_layers\": %d,\n", c->num_hidden_layers);
    fprintf(out, "  \"num_heads\": %d,\n", c->num_heads);
    fputs("  \"num_kv_heads\": null,\n", out);
    write_number(out, "hidden_ratio", c->hidden_ratio);
    fprintf(out, "  \"intermediate_size\": %d,\n", c->intermediate_size);
    fputs("  \"hidden_act\": \"swish\",\n", out);
    fprintf(out, "  \"fgate_type\": \"%s\",\n", c->use_forget_gate ? "full" : "none");
    write_bool(out, "fgate_bias_init", false);
    write_bool(out, "use_output_gate", c->use_output_gate);
    fputs("  \"ogate_act\": \"sigmoid\",\n", out);
    write_bool(out, "use_output_norm", c->use_output_norm);
    write_bool(out, "qk_norm", c->qk_norm);
    write_bool(out, "qk_norm_share_param_across_head", c->qk_norm_share_param_across_head);
    write_bool(out, "use_k_shift", c->use_k_shift);
    write_bool(out, "use_v_shift", c->use_v_shift);
    write_bool(out, "use_rope", c->use_rope);
    write_number(out, "rope_base", c->rope_base);
    write_number(out, "norm_eps", c->norm_eps);
    write_number(out, "initializer_range", FOX_INIT_STD);
    write_bool(out, "elementwise_affine", true);
    write_bool(out, "attention_bias", false);
    write_bool(out, "tie_word_embeddings", false);
    write_number(out, "log_pruning_tolerance", log_tolerance);
    fputs("  \"window_size\": null,\n  \"bos_token_id\": null,\n  \"eos_token_id\": null,\n", out);
    fputs("  \"pad_token_id\": null\n}\n", out);
}

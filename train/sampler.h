/* Text from the model: choose a token from logits, feed it back, decode.
 *
 *   p_i = softmax(logits / temperature)_i over the top_k largest logits; token = the i where the running sum of p
 *   passes u, u uniform in [0, 1) from a counter: a seed and the logits decide the text. */
#ifndef FOX_SAMPLER_H
#define FOX_SAMPLER_H

#include "../tokenizer.h"
#include "backend.h"

typedef struct SampleSettings {
    double temperature; /* 0: always the likeliest token */
    int top_k;          /* 0: all tokens */
    uint64_t seed;
} SampleSettings;

/* The token that u in [0, 1) selects from logits [V]. Among equal logits the smaller token comes first. NaN counts as
 * minus infinity. Deterministic. */
int32_t sample_token(const float *logits, int V, const SampleSettings *, double u);

/* Feeds the prompt (at least one token) and samples until `max_tokens` tokens were made or `stop` was drawn (-1: none;
 * it is not part of the result). out: room for max_tokens. Returns the number of tokens made. This rank alone. */
int sample_generate(Backend *, const SampleSettings *, const int32_t *prompt, int prompt_count, int32_t stop,
                    int max_tokens, int32_t *out);

/* The prompt and what the model makes of it, as printable UTF-8. The prompt follows an end-of-text token, as documents
 * do; the tokenizer's vocabulary must not be larger than the model's. The caller frees the result. This rank alone. */
char *sample_text(Backend *, const Tokenizer *, const SampleSettings *, const char *prompt, int max_tokens);

/* Valid, printable UTF-8 from any bytes: broken sequences and control characters other than tab and newline become
 * U+FFFD. The caller frees the result (0-terminated). */
char *printable_utf8(const uint8_t *bytes, size_t count);

#endif

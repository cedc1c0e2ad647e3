#include "sampler.h"

typedef struct Candidate {
    float logit;
    int32_t token;
} Candidate;

/* Larger logits first, then smaller tokens: a total order, so the result does not depend on the sort. */
static int by_logit(const void *a, const void *b) {
    const Candidate *x = (const Candidate *)a, *y = (const Candidate *)b;
    if (x->logit != y->logit) {
        return x->logit > y->logit ? -1 : 1;
    }
    return (x->token > y->token) - (x->token < y->token);
}

int32_t sample_token(const float *logits, int V, const SampleSettings *settings, double u) {
    Candidate *candidates = FOX_NEW(Candidate, V);
    Candidate best = {-INFINITY, 0};
    for (int i = 0; i < V; i++) {
        candidates[i].token = i;
        candidates[i].logit = logits[i] == logits[i] ? logits[i] : -INFINITY;
        if (candidates[i].logit > best.logit) {
            best = candidates[i];
        }
    }
    int32_t token = best.token;
    if (settings->temperature > 0 && best.logit > -INFINITY && best.logit < INFINITY) {
        int count = V;
        if (settings->top_k > 0 && settings->top_k < V) {
            qsort(candidates, (size_t)V, sizeof *candidates, by_logit);
            count = settings->top_k;
        }
        double sum = 0;
        for (int i = 0; i < count; i++) {
            sum += exp(((double)candidates[i].logit - best.logit) / settings->temperature);
        }
        double target = u * sum, passed = 0;
        for (int i = 0; i < count; i++) {
            double weight = exp(((double)candidates[i].logit - best.logit) / settings->temperature);
            passed += weight;
            if (weight > 0) {
                token = candidates[i].token; // the last one with weight when rounding keeps the sum below target
            }
            if (passed > target) {
                break;
            }
        }
    }
    free(candidates);
    return token;
}

int sample_generate(Backend *backend, const SampleSettings *settings, const int32_t *prompt, int prompt_count, int32_t stop,
                    int max_tokens, int32_t *out) {
    int V = backend->spec.config.vocab_size, made = 0;
    float *logits = FOX_NEW(float, V);
    backend->decode_begin(backend, prompt_count + max_tokens);
    for (int i = 0; i < prompt_count; i++) {
        backend->decode(backend, prompt[i], logits);
    }
    while (made < max_tokens) {
        int32_t token = sample_token(logits, V, settings, fox_uniform(settings->seed, (uint64_t)made));
        if (token == stop) {
            break;
        }
        out[made++] = token;
        if (made < max_tokens) {
            backend->decode(backend, token, logits);
        }
    }
    backend->decode_end(backend);
    free(logits);
    return made;
}

/* Length of the valid, printable UTF-8 sequence at s, 0 when there is none. Overlong forms, surrogates and values over
 * U+10FFFF are invalid. */
static size_t sequence_length(const uint8_t *s, size_t available) {
    if (s[0] < 0x80) {
        return s[0] == '\n' || s[0] == '\t' || (s[0] >= 0x20 && s[0] != 0x7f) ? 1 : 0;
    }
    size_t length = s[0] >= 0xc2 && s[0] <= 0xdf ? 2 : (s[0] & 0xf0) == 0xe0 ? 3 : s[0] >= 0xf0 && s[0] <= 0xf4 ? 4 : 0;
    if (length == 0 || length > available) {
        return 0;
    }
    for (size_t i = 1; i < length; i++) {
        if ((s[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    bool overlong = (s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xf0 && s[1] < 0x90);
    bool surrogate = s[0] == 0xed && s[1] >= 0xa0;
    bool too_large = s[0] == 0xf4 && s[1] >= 0x90;
    bool control = s[0] == 0xc2 && s[1] < 0xa0;
    return overlong || surrogate || too_large || control ? 0 : length;
}

char *printable_utf8(const uint8_t *bytes, size_t count) {
    char *text = (char *)fox_alloc(3 * count + 1); // each byte becomes at most the three of U+FFFD
    size_t length = 0;
    for (size_t i = 0; i < count;) {
        size_t valid = sequence_length(bytes + i, count - i);
        if (valid > 0) {
            memcpy(text + length, bytes + i, valid);
            length += valid;
            i += valid;
        } else {
            memcpy(text + length, "\xef\xbf\xbd", 3);
            length += 3;
            i++;
        }
    }
    return text;
}

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

int sample_generate(Backend *backend, const SampleSettings *settings, const int32_t *prompt, int prompt_count,
                    int32_t stop, int max_tokens, int32_t *out) {
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

char *sample_text(Backend *backend, const Tokenizer *tokenizer, const SampleSettings *settings, const char *prompt,
                  int max_tokens) {
    TokenList list = {NULL, 0, 0};
    token_list_push(&list, tokenizer->end_of_text); // every document begins with it
    tokenizer_encode(tokenizer, prompt, strlen(prompt), &list);
    int prompt_count = (int)list.count;
    int32_t *tokens = FOX_NEW(int32_t, prompt_count + max_tokens);
    for (int i = 0; i < prompt_count; i++) {
        tokens[i] = list.tokens[i];
    }
    free(list.tokens);
    int count = prompt_count + sample_generate(backend, settings, tokens, prompt_count, tokenizer->end_of_text,
                                               max_tokens, tokens + prompt_count);
    size_t total = 0, length;
    for (int i = 1; i < count; i++) {
        tokenizer_token_bytes(tokenizer, tokens[i], &length);
        total += length;
    }
    uint8_t *bytes = FOX_NEW(uint8_t, total);
    total = 0;
    for (int i = 1; i < count; i++) {
        const uint8_t *token = tokenizer_token_bytes(tokenizer, tokens[i], &length);
        if (length > 0) { // a model may have more ids than its vocabulary has texts
            memcpy(bytes + total, token, length);
            total += length;
        }
    }
    char *text = printable_utf8(bytes, total);
    free(bytes);
    free(tokens);
    return text;
}

char *printable_utf8(const uint8_t *bytes, size_t count) {
    char *text = (char *)fox_alloc(3 * count + 1), *out = text; // each byte becomes at most the three of U+FFFD
    const uint8_t *p = bytes, *end = bytes + count;
    while (p < end) {
        uint32_t c = 0;
        int length = utf8_decode(p, end, &c);
        bool control = c < 0x20 ? c != '\n' && c != '\t' : c >= 0x7f && c < 0xa0;
        if (length > 0 && !control) {
            memcpy(out, p, (size_t)length);
            out += length;
        } else {
            out += utf8_encode(0xfffd, (uint8_t *)out);
        }
        p += length > 0 ? length : 1;
    }
    return text;
}

/* Decoding on the CPU: one token at a time, with a key/value cache that forgets what the forget gate has forgotten.
 *
 * Every head keeps only its live keys. The decay c_t - c_j of an old key never recovers, so once it is below the paper's
 * threshold (with T the longest sequence of this decoder) the key is dropped for good: by the bound in cpu/acp.h, all that
 * is ever dropped weighs at most exp(log_tolerance) of any later row. That needs an upper bound of all later logits, which
 * QK-norm gives; without it nothing is dropped. */
#ifndef FOX_DECODE_H
#define FOX_DECODE_H

#include "../fox_layers.h"

/* The live keys of one head, oldest first: rows start .. end-1. */
typedef struct FoxHeadCache {
    int start, end, capacity;
    float *k, *v; /* [capacity, D] */
    double *c;    /* [capacity] */
} FoxHeadCache;

typedef struct FoxDecoder {
    FoxConfig config;
    const FoxTable *table;
    float *params; /* not owned */
    bool prune;
    double log_tolerance;
    int position, max_tokens;
    FoxActs acts;                /* of one token */
    float *x, *x_next;           /* [d] */
    float *k_before, *v_before;  /* [L, d], projections of the last token, for the token shift */
    double *c;                   /* [L, H] */
    FoxHeadCache *heads;         /* [L, H] */
    float *weights;              /* [H, max_tokens], softmax of one row */
} FoxDecoder;

/* An empty cache for up to max_tokens of one sequence; m's parameters are used, its activations are not. */
static inline FoxDecoder fox_decoder_create(const FoxModel *m, int max_tokens) {
    FoxDecoder s;
    int64_t L = m->config.num_hidden_layers, H = m->config.num_heads, d = m->config.hidden_size;
    memset(&s, 0, sizeof s);
    s.config = m->config;
    s.table = m->table;
    s.params = m->params;
    s.prune = m->acp != ACP_OFF && m->config.qk_norm && m->config.use_forget_gate;
    s.log_tolerance = (double)m->log_tolerance;
    s.max_tokens = max_tokens;
    s.acts = fox_acts_create(&s.config, 1, 1);
    s.x = FOX_NEW(float, d);
    s.x_next = FOX_NEW(float, d);
    s.k_before = FOX_NEW(float, L * d);
    s.v_before = FOX_NEW(float, L * d);
    s.c = FOX_NEW(double, L * H);
    s.heads = FOX_NEW(FoxHeadCache, L * H);
    s.weights = FOX_NEW(float, H * max_tokens);
    return s;
}

static inline void fox_decoder_free(FoxDecoder *s) {
    for (int i = 0; i < s->config.num_hidden_layers * s->config.num_heads; i++) {
        free(s->heads[i].k);
        free(s->heads[i].v);
        free(s->heads[i].c);
    }
    free(s->acts.memory);
    free(s->x);
    free(s->x_next);
    free(s->k_before);
    free(s->v_before);
    free(s->c);
    free(s->heads);
    free(s->weights);
    memset(s, 0, sizeof *s);
}

/* Makes room for one more row: first over the dropped ones, then by doubling. */
static inline void fox_head_reserve(FoxHeadCache *cache, int D) {
    if (cache->end < cache->capacity) {
        return;
    }
    int live = cache->end - cache->start;
    if (live > cache->capacity / 2) {
        FoxHeadCache grown = *cache;
        grown.capacity = 2 * cache->capacity;
        grown.k = FOX_NEW(float, (int64_t)grown.capacity * D);
        grown.v = FOX_NEW(float, (int64_t)grown.capacity * D);
        grown.c = FOX_NEW(double, grown.capacity);
        memcpy(grown.k, cache->k + (int64_t)cache->start * D, sizeof(float) * (size_t)live * (size_t)D);
        memcpy(grown.v, cache->v + (int64_t)cache->start * D, sizeof(float) * (size_t)live * (size_t)D);
        memcpy(grown.c, cache->c + cache->start, sizeof(double) * (size_t)live);
        free(cache->k);
        free(cache->v);
        free(cache->c);
        *cache = grown;
    } else if (cache->capacity > 0) {
        memmove(cache->k, cache->k + (int64_t)cache->start * D, sizeof(float) * (size_t)live * (size_t)D);
        memmove(cache->v, cache->v + (int64_t)cache->start * D, sizeof(float) * (size_t)live * (size_t)D);
        memmove(cache->c, cache->c + cache->start, sizeof(double) * (size_t)live);
    } else {
        cache->capacity = FOX_BLOCK;
        cache->k = FOX_NEW(float, FOX_BLOCK * D);
        cache->v = FOX_NEW(float, FOX_BLOCK * D);
        cache->c = FOX_NEW(double, FOX_BLOCK);
    }
    cache->start = 0;
    cache->end = live;
}

/* One row of attention of one head over its live keys, the new one included. */
static inline void fox_decode_head(FoxHeadCache *cache, float *o, float *weights, const float *q, const float *k, const float *v,
                                   double c, double threshold, int D) {
    fox_head_reserve(cache, D);
    memcpy(cache->k + (int64_t)cache->end * D, k, sizeof(float) * (size_t)D);
    memcpy(cache->v + (int64_t)cache->end * D, v, sizeof(float) * (size_t)D);
    cache->c[cache->end++] = c;
    while (cache->start < cache->end - 1 && c - cache->c[cache->start] < threshold) {
        cache->start++;
    }
    double scale = 1 / sqrt((double)D), high = -INFINITY, sum = 0;
    for (int j = cache->start; j < cache->end; j++) {
        double logit = scale * acp_dot(q, cache->k + (int64_t)j * D, D) + (c - cache->c[j]);
        weights[j - cache->start] = (float)logit;
        high = fmax(high, logit);
    }
    for (int i = 0; i < D; i++) {
        o[i] = 0;
    }
    for (int j = cache->start; j < cache->end; j++) {
        float p = expf(weights[j - cache->start] - (float)high);
        sum += (double)p;
        for (int i = 0; i < D; i++) {
            o[i] += p * cache->v[(int64_t)j * D + i];
        }
    }
    for (int i = 0; i < D; i++) {
        o[i] /= (float)sum;
    }
}

static inline void fox_decode_attention(FoxDecoder *s, const FoxLayerWeights *w, int layer) {
    int H = s->config.num_heads, D = s->config.hidden_size / H;
    FoxActs *a = &s->acts;
#pragma omp parallel for if (s->position > FOX_BLOCK)
    for (int h = 0; h < H; h++) {
        double *c = &s->c[layer * H + h], threshold = -INFINITY;
        if (s->config.use_forget_gate) {
            *c += fox_log_sigmoid((double)(a->f[h] + w->fgate_bias[h]));
        }
        if (s->prune) {
            threshold = acp_threshold(acp_bound(fox_norms_of_weights(&s->config, w, h), D), s->max_tokens, s->log_tolerance);
        }
        fox_decode_head(&s->heads[layer * H + h], a->o + h * D, s->weights + (int64_t)h * s->max_tokens, a->q + h * D, a->k + h * D,
                        a->v + h * D, *c, threshold, D);
    }
}

/* Feeds one token; logits: [V], of the next one. At most max_tokens calls. */
static inline void fox_decode(FoxDecoder *s, int32_t token, float *logits) {
    int d = s->config.hidden_size;
    FoxActs *a = &s->acts;
    embedding_forward(s->x, &token, s->params + s->table->tensors[s->table->embeddings].offset, 1, d);
    for (int l = 0; l < s->config.num_hidden_layers; l++) {
        FoxLayerWeights w = fox_layer_weights(s->table, l, s->params);
        fox_project(&s->config, &w, a, s->x, 1);
        fox_shift_and_norm(&s->config, &w, a, s->k_before + (int64_t)l * d, s->v_before + (int64_t)l * d, 1, 1, s->position);
        memcpy(s->k_before + (int64_t)l * d, a->k_lin, sizeof(float) * (size_t)d);
        memcpy(s->v_before + (int64_t)l * d, a->v_lin, sizeof(float) * (size_t)d);
        fox_decode_attention(s, &w, l);
        fox_output_and_mlp(&s->config, &w, a, s->x, s->x_next, 1);
        memcpy(s->x, s->x_next, sizeof(float) * (size_t)d);
    }
    rmsnorm_forward(s->x_next, a->rstd1, s->x, s->params + s->table->tensors[s->table->norm].offset, 1, 1, d, false,
                    (float)s->config.norm_eps);
    linear_forward(logits, s->x_next, s->params + s->table->tensors[s->table->lm_head].offset, 1, d, s->config.vocab_size);
    s->position++;
}

#endif

/* Adaptive Computation Pruning (arXiv 2504.06949): which blocks of the attention matrix need not be computed.
 *
 * For one head of one sequence, with logits s_ij = q_i.k_j / sqrt(D), cumulative log gates c and j <= i,
 *
 *     p_ij = exp(s_ij + c_i - c_j) / Z_i,      Z_i = sum_{l <= i} exp(s_il + c_i - c_l).
 *
 * c never increases, so the weight of a key fades with distance. Queries are grouped in blocks of block_q rows and keys
 * in blocks of block_k columns; query block I keeps the key blocks first[I] .. (the one of its last row) and skips the
 * prefix before:
 *
 *              key block  0   1   2   3   4
 *     query block 0       #                       # computed
 *                 1       #   #                   . skipped: the decay from its last key to the first row of
 *                 2       .   #   #                 the query block is already too strong
 *                 3       .   .   #   #
 *                 4       .   .   #   #   #
 *
 * Guarantee of both tests below: for every row, sum over skipped j of p_ij <= eps = exp(log_tolerance). The block of the
 * diagonal is never skipped, so every row keeps at least itself.
 *
 * first[] never decreases, so the kept pairs can also be walked from the keys' side: key block J is needed by the query
 * blocks from the diagonal to last[J] (acp_last_blocks). Both views name the same pairs.
 *
 * This is the reference in double precision, written to be read; the GPU kernels are compared with it. */
#ifndef FOX_ACP_H
#define FOX_ACP_H

#include "../train/common.h"

/* One head of one sequence. */
typedef struct AcpHead {
    int T, D;
    const float *q, *k; /* row t starts at q + t * stride */
    int64_t stride;
    const double *c; /* [T], cumulative log forget gates, not increasing */
} AcpHead;

/* Blocks of T rows: ceil(T / block). */
static inline int acp_blocks(int T, int block) {
    return (T + block - 1) / block;
}

/* Last row of block `index`. */
static inline int acp_last_row(int T, int block, int index) {
    int end = (index + 1) * block;
    return (end < T ? end : T) - 1;
}

/* Number of causal blocks: pairs (I, J) with at least one j <= i. */
static inline int64_t acp_causal_blocks(int T, int block_q, int block_k) {
    int64_t count = 0;
    for (int I = 0; I < acp_blocks(T, block_q); I++) {
        count += acp_last_row(T, block_q, I) / block_k + 1;
    }
    return count;
}

static inline double acp_dot(const float *x, const float *y, int D) {
    double sum = 0;
    for (int i = 0; i < D; i++) {
        sum += (double)x[i] * (double)y[i];
    }
    return sum;
}

static inline double acp_norm(const float *x, int D) {
    return sqrt(acp_dot(x, x, D));
}

/* The largest norms that queries and keys of a head have, or can have. */
typedef struct AcpNorms {
    double q, k;
} AcpNorms;

/* Under QK-norm, from the weights of one head, wq and wk: [D]. A vector after RMSNorm has norm at most max|w| sqrt(D). */
static inline AcpNorms acp_norms_of_weights(const float *wq, const float *wk, int D) {
    AcpNorms most = {0, 0};
    for (int i = 0; i < D; i++) {
        most.q = fmax(most.q, sqrt((double)D) * fabs((double)wq[i]));
        most.k = fmax(most.k, sqrt((double)D) * fabs((double)wk[i]));
    }
    return most;
}

/* Of one head of one sequence. */
static inline AcpNorms acp_norms_measured(const AcpHead *head) {
    AcpNorms most = {0, 0};
    for (int t = 0; t < head->T; t++) {
        most.q = fmax(most.q, acp_norm(head->q + t * head->stride, head->D));
        most.k = fmax(most.k, acp_norm(head->k + t * head->stride, head->D));
    }
    return most;
}

/* Upper bound U of |q_i.k_j| / sqrt(D). */
static inline double acp_bound(AcpNorms most, int D) {
    return most.q * most.k / sqrt((double)D);
}

/* Threshold of the paper (its section 3): delta = -2U - log T + log_tolerance. A pair with c_i - c_j < delta weighs less
 * than exp(U + delta) against Z_i >= exp(s_ii) >= exp(-U), and there are fewer than T of them. */
static inline double acp_threshold(double U, int T, double log_tolerance) {
    return -2.0 * U - log((double)T) + log_tolerance;
}

/* First kept key block of every query block by the paper's test: block J, whose last key is j, is skipped for query
 * block I, whose first row is i, when c_i - c_j < delta. first: [acp_blocks(T, block_q)]. Two pointers: both i and j
 * only move forward. delta must be negative (it is, for any tolerance below 1). */
static inline void acp_first_blocks_paper(int T, const double *c, double delta, int block_q, int block_k, int *first) {
    int J = 0;
    for (int I = 0; I < acp_blocks(T, block_q); I++) {
        int i = I * block_q;
        while (acp_last_row(T, block_k, J) < i && c[i] - c[acp_last_row(T, block_k, J)] < delta) {
            J++;
        }
        first[I] = J;
    }
}

static inline double acp_log_add(double a, double b) {
    double high = a > b ? a : b, low = a > b ? b : a; /* one of them may be no number: then the sum is none */
    return low == -INFINITY ? high : high + log1p(exp(low - high));
}

/* What the tight test knows of a key block n; cl is c at its last key. */
typedef struct AcpKeyBlock {
    double cl;
    double log_mass; /* log W, W = sum_j w_j, w_j = exp(cl - c_j): its keys counted with their decay, instead of log T */
    double norm;     /* K: for every query with |q| <= most_q, sum_j w_j exp(q.k_j / sqrt(D)) <= W exp(|q| K / sqrt(D)) */
} AcpKeyBlock;

/* What it knows of a query block m; C is c at its first row. With rho_i = c_i - C - L_i, L_i <= log Z_i, a row's mass in key
 * block n is at most exp(rho_i + |q_i| K / sqrt(D) + (C - cl) + log W). The worst row differs from K to K; it is known where
 * K = K0, and from there |q_i| K changes by no more than the longest query allows, or, downwards, no less than the shortest. */
typedef struct AcpQueryBlock {
    double C;
    double K0;          /* the norm K of the key block before, which others are like */
    double near;        /* max_i (rho_i + |q_i| K0 / sqrt(D)) */
    double most, least; /* of |q_i| */
} AcpQueryBlock;

/* The keys of a head as shorter vectors, [T, D]: minus their common part, the mean of up to 256 of them. It adds the same
 * to all logits of a row, so no p_ij changes, while trained keys, which share much, become far shorter. */
static inline float *acp_centred_keys(const AcpHead *head) {
    int T = head->T, D = head->D, samples = T < 256 ? T : 256;
    float *keys = FOX_NEW(float, (int64_t)T * D);
    for (int d = 0; d < D; d++) {
        double mean = 0;
        for (int s = 0; s < samples; s++) {
            mean += (double)head->k[(int64_t)s * T / samples * head->stride + d] / samples;
        }
        for (int t = 0; t < T; t++) {
            keys[(int64_t)t * D + d] = (float)((double)head->k[t * head->stride + d] - mean);
        }
    }
    return keys;
}

/* k: [T, D], the keys. Fills blocks[acp_blocks(T, block_k)]. max |k_j| would do for K, but one long key in a block would
 * set it. Less does: with a = most_q / sqrt(D) and M the mean of exp(a |k_j|), each counted w_j / W, K = log(M) / a; for
 * |q| = x most_q, x <= 1, Jensen's inequality gives mean exp(x a |k_j|) <= M^x = exp(|q| K / sqrt(D)).
 * most_q: no query is longer. */
static inline void acp_key_blocks(const AcpHead *head, const float *k, double most_q, int block_k, AcpKeyBlock *blocks) {
    double a = fmax(most_q / sqrt((double)head->D), 1e-6), *norm = FOX_NEW(double, block_k);
    for (int n = 0; n < acp_blocks(head->T, block_k); n++) {
        int start = n * block_k, last = acp_last_row(head->T, block_k, n);
        double W = 0, longest = 0, sum = 0;
        for (int j = start; j <= last; j++) {
            norm[j - start] = acp_norm(k + (int64_t)j * head->D, head->D);
            longest = fmax(longest, norm[j - start]);
        }
        for (int j = start; j <= last; j++) {
            double w = exp(head->c[last] - head->c[j]);
            W += w;
            sum += norm[j - start] == longest ? w : w * exp(a * (norm[j - start] - longest));
        }
        double mean = sum / W < 1e-30 ? 1e-30 : sum / W; /* float32 on the GPU has no smaller one */
        blocks[n].cl = head->c[last];
        blocks[n].log_mass = log(W);
        blocks[n].norm = longest + log(mean) / a;
    }
    free(norm);
}

/* The row's own normaliser from below. Every earlier key contributes to Z_i; with weights w_j = exp(c_b - c_j) of the
 * keys before the block (b its first row minus one), W their sum and kbar their mean, Jensen's inequality gives
 *     Z_i >= exp(s_ii) + exp(c_i - c_b) * W * exp(q_i.kbar / sqrt(D)).
 * k: [T, D], the keys; keys: [acp_blocks(T, block_k)], their blocks. Fills blocks[acp_blocks(T, block_q)]. */
static inline void acp_query_blocks(const AcpHead *head, const float *k, int block_q, int block_k, const AcpKeyBlock *keys,
                                    AcpQueryBlock *blocks) {
    int T = head->T, D = head->D;
    double scale = 1.0 / sqrt((double)D), mass = 0; /* W, and W * kbar: decayed to the row before the block */
    float *mean = FOX_NEW(float, D);
    double *sum = FOX_NEW(double, D);
    for (int m = 0; m < acp_blocks(T, block_q); m++) {
        int start = m * block_q, last = acp_last_row(T, block_q, m);
        double C = head->c[start], before = start > 0 ? head->c[start - 1] : 0;
        AcpQueryBlock *block = &blocks[m];
        *block = (AcpQueryBlock){C, start > 0 ? keys[(start - 1) / block_k].norm : 0, -INFINITY, 0, INFINITY};
        for (int d = 0; d < D; d++) {
            mean[d] = mass > 0 ? (float)(sum[d] / mass) : 0;
        }
        for (int i = start; i <= last; i++) {
            const float *q = head->q + i * head->stride;
            double norm = acp_norm(q, D), L = scale * acp_dot(q, k + (int64_t)i * D, D);
            if (mass > 0) {
                L = acp_log_add(L, head->c[i] - before + log(mass) + scale * acp_dot(q, mean, D));
            }
            double near = head->c[i] - C - L + scale * norm * block->K0;
            block->near = isnan(near) ? INFINITY : fmax(block->near, near); /* what is not a number keeps all */
            block->most = fmax(block->most, norm);
            block->least = fmin(block->least, norm);
        }
        double decay = start > 0 ? exp(head->c[last] - before) : 0;
        mass *= decay;
        for (int d = 0; d < D; d++) {
            sum[d] *= decay;
        }
        for (int j = start; j <= last; j++) {
            double w = exp(head->c[last] - head->c[j]);
            mass += w;
            for (int d = 0; d < D; d++) {
                sum[d] += w * (double)k[(int64_t)j * D + d];
            }
        }
    }
    free(mean);
    free(sum);
}

/* First kept key block of every query block by the tight test: the same guarantee, fewer blocks.
 *
 * For query block m and an earlier key block n, any row's mass in n is at most
 *     exp(c_i - cl) * W * exp(|q_i| K / sqrt(D)) / Z_i <= exp(x_mn),
 *     x_mn = near + (K - K0) Q / sqrt(D) + (C - cl) + log W,   Q = most where K >= K0, least elsewhere.
 * The longest prefix of key blocks with sum exp(x_mn) <= eps is skipped. Nothing assumes that x grows with n: every
 * skipped block is paid for in the sum. Taking the minimum over all later query blocks makes first[] non-decreasing,
 * which only keeps more.
 *
 * Where the paper's test alone leaves no more than the diagonal's block and the one before it, there is hardly anything to
 * gain, and its answer stands.
 *
 * Backward uses the same ranges. It could use sharper ones, since it knows Z_i, but they kept hardly fewer blocks (0.2%
 * of all in 12,000 random and adversarial heads, docs/results/cpu.md). The 0.02 covers float32 rounding of the same
 * computation on the GPU.
 * most: what no norm exceeds. first: [acp_blocks(T, block_q)]. */
static inline void acp_first_blocks_tight(const AcpHead *head, AcpNorms most, double log_tolerance, int block_q, int block_k,
                                          int *first) {
    int T = head->T, D = head->D, nq = acp_blocks(T, block_q), nk = acp_blocks(T, block_k);
    double scale = 1.0 / sqrt((double)D), budget = exp(log_tolerance - 0.02);
    AcpKeyBlock *keys = FOX_NEW(AcpKeyBlock, nk);
    AcpQueryBlock *queries = FOX_NEW(AcpQueryBlock, nq);
    float *k = acp_centred_keys(head);
    acp_key_blocks(head, k, most.q, block_k, keys);
    acp_query_blocks(head, k, block_q, block_k, keys, queries);
    acp_first_blocks_paper(T, head->c, acp_threshold(acp_bound(most, D), T, log_tolerance), block_q, block_k, first);
    for (int m = 0; m < nq; m++) {
        const AcpQueryBlock *query = &queries[m];
        double spent = 0;
        int n = 0;
        if (first[m] >= m * block_q / block_k - 1) {
            continue;
        }
        for (; acp_last_row(T, block_k, n) < m * block_q; n++) {
            const AcpKeyBlock *key = &keys[n];
            double more = key->norm - query->K0, norm = more >= 0 ? query->most : query->least;
            spent += exp(query->near + scale * more * norm + (query->C - key->cl) + key->log_mass);
            if (!(spent <= budget)) {
                break;
            }
        }
        first[m] = n;
    }
    for (int m = nq - 2; m >= 0; m--) {
        first[m] = first[m] < first[m + 1] ? first[m] : first[m + 1];
    }
    free(keys);
    free(queries);
    free(k);
}

/* Last query block that needs each key block, from first[] (non-decreasing). last: [acp_blocks(T, block_k)]. */
static inline void acp_last_blocks(int T, int block_q, int block_k, const int *first, int *last) {
    int nq = acp_blocks(T, block_q), I = 0;
    for (int J = 0; J < acp_blocks(T, block_k); J++) {
        while (I + 1 < nq && first[I + 1] <= J) {
            I++;
        }
        last[J] = I;
    }
}

/* Blocks skipped, of acp_causal_blocks. */
static inline int64_t acp_skipped_blocks(int nq, const int *first) {
    int64_t skipped = 0;
    for (int I = 0; I < nq; I++) {
        skipped += first[I];
    }
    return skipped;
}

#endif

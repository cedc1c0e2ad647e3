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

/* Upper bound U of |q_i.k_j| / sqrt(D) under QK-norm, from the weights of one head, wq and wk: [D]. A vector after
 * RMSNorm has norm at most max|w| * sqrt(D). */
static inline double acp_bound_qk_norm(const float *wq, const float *wk, int D) {
    double q = 0, k = 0;
    for (int i = 0; i < D; i++) {
        q = fmax(q, fabs((double)wq[i]));
        k = fmax(k, fabs((double)wk[i]));
    }
    return q * k * sqrt((double)D);
}

/* The same bound measured on one head of one sequence: max|q_i| * max|k_j| / sqrt(D). */
static inline double acp_bound_measured(const AcpHead *head) {
    double q = 0, k = 0;
    for (int t = 0; t < head->T; t++) {
        q = fmax(q, acp_norm(head->q + t * head->stride, head->D));
        k = fmax(k, acp_norm(head->k + t * head->stride, head->D));
    }
    return q * k / sqrt((double)head->D);
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
    double high = fmax(a, b), low = fmin(a, b);
    return low == -INFINITY ? high : high + log1p(exp(low - high));
}

/* What the tight test knows of a key block n; cl is c at its last key. */
typedef struct AcpKeyBlock {
    double cl;
    double log_mass; /* log W, W = sum_j exp(cl - c_j): the block's keys counted with their decay, instead of log T */
    double norm;     /* K = max |k_j| */
} AcpKeyBlock;

/* What it knows of a query block m; C is c at its first row. */
typedef struct AcpQueryBlock {
    double C;
    double slack; /* rho = max_i (c_i - C - L_i), L_i <= log Z_i */
    double norm;  /* Q = max |q_i| */
} AcpQueryBlock;

/* Fills blocks[acp_blocks(T, block_k)]. */
static inline void acp_key_blocks(const AcpHead *head, int block_k, AcpKeyBlock *blocks) {
    for (int n = 0; n < acp_blocks(head->T, block_k); n++) {
        int last = acp_last_row(head->T, block_k, n);
        double mass = 0, norm = 0;
        for (int j = n * block_k; j <= last; j++) {
            mass += exp(head->c[last] - head->c[j]);
            norm = fmax(norm, acp_norm(head->k + j * head->stride, head->D));
        }
        blocks[n].cl = head->c[last];
        blocks[n].log_mass = log(mass);
        blocks[n].norm = norm;
    }
}

/* The row's own normaliser from below. Every earlier key contributes to Z_i; with weights w_j = exp(c_b - c_j) of the
 * keys before the block (b its first row minus one), W their sum and kbar their mean, Jensen's inequality gives
 *     Z_i >= exp(s_ii) + exp(c_i - c_b) * W * exp(q_i.kbar / sqrt(D)).
 * Fills blocks[acp_blocks(T, block_q)]. */
static inline void acp_query_blocks(const AcpHead *head, int block_q, AcpQueryBlock *blocks) {
    int T = head->T, D = head->D;
    double scale = 1.0 / sqrt((double)D), mass = 0; /* W, and W * kbar: decayed to the row before the block */
    float *mean = FOX_NEW(float, D);
    double *sum = FOX_NEW(double, D);
    for (int m = 0; m < acp_blocks(T, block_q); m++) {
        int start = m * block_q, last = acp_last_row(T, block_q, m);
        double C = head->c[start], before = start > 0 ? head->c[start - 1] : 0;
        blocks[m].C = C;
        blocks[m].slack = -INFINITY;
        blocks[m].norm = 0;
        for (int d = 0; d < D; d++) {
            mean[d] = mass > 0 ? (float)(sum[d] / mass) : 0;
        }
        for (int i = start; i <= last; i++) {
            const float *q = head->q + i * head->stride;
            double norm = acp_norm(q, D), L = scale * acp_dot(q, head->k + i * head->stride, D);
            if (mass > 0) {
                L = acp_log_add(L, head->c[i] - before + log(mass) + scale * acp_dot(q, mean, D));
            }
            blocks[m].slack = fmax(blocks[m].slack, head->c[i] - C - L);
            blocks[m].norm = fmax(blocks[m].norm, norm);
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
                sum[d] += w * (double)head->k[j * head->stride + d];
            }
        }
    }
    free(mean);
    free(sum);
}

/* First kept key block of every query block by the tight test: the same guarantee, fewer blocks.
 *
 * For query block m and an earlier key block n, any row's mass in n is at most
 *     exp(c_i - cl) * W * exp(Q K / sqrt(D)) / Z_i <= exp(x_mn),   x_mn = rho + (C - cl) + log W + Q K / sqrt(D).
 * The longest prefix of key blocks with sum exp(x_mn) <= eps is skipped. Nothing assumes that x grows with n: every
 * skipped block is paid for in the sum. Taking the minimum over all later query blocks makes first[] non-decreasing,
 * which only keeps more.
 *
 * Backward uses the same ranges. It could use sharper ones, since it knows Z_i, but they keep hardly fewer blocks (0.2% of
 * all in 12,000 random and adversarial heads). The 0.02 covers float32 rounding of the same computation on the GPU.
 * first: [acp_blocks(T, block_q)]. */
static inline void acp_first_blocks_tight(const AcpHead *head, double log_tolerance, int block_q, int block_k, int *first) {
    int T = head->T, nq = acp_blocks(T, block_q), nk = acp_blocks(T, block_k);
    double scale = 1.0 / sqrt((double)head->D), budget = exp(log_tolerance - 0.02);
    AcpKeyBlock *keys = FOX_NEW(AcpKeyBlock, nk);
    AcpQueryBlock *queries = FOX_NEW(AcpQueryBlock, nq);
    acp_key_blocks(head, block_k, keys);
    acp_query_blocks(head, block_q, queries);
    for (int m = 0; m < nq; m++) {
        const AcpQueryBlock *query = &queries[m];
        double spent = 0;
        int n = 0;
        for (; acp_last_row(T, block_k, n) < m * block_q; n++) {
            const AcpKeyBlock *key = &keys[n];
            spent += exp(query->slack + (query->C - key->cl) + key->log_mass + scale * query->norm * key->norm);
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

/* Forgetting attention and its gradients by the definition, in double precision: what every implementation is compared with. */
#ifndef FOX_TESTS_NAIVE_ATTENTION_H
#define FOX_TESTS_NAIVE_ATTENTION_H

#include "../cpu/acp.h"

/* One head. o, dq, dk, dv: [T, D]; lse: [T], log sum_j exp(s_ij + c_i - c_j); dlogf: [T], by the log gates. */
typedef struct NaiveAttention {
    double *o, *dq, *dk, *dv, *lse, *dlogf;
} NaiveAttention;

/* q, k, v, dout: [T, D]; logf: [T]. first: of each block of `block` queries the first block of keys that counts; NULL: all do. */
static NaiveAttention naive_attention(const float *q, const float *k, const float *v, const double *logf, const float *dout, int T, int D,
                                      const int *first, int block) {
    NaiveAttention n = {FOX_NEW(double, T * D), FOX_NEW(double, T * D), FOX_NEW(double, T * D),
                        FOX_NEW(double, T * D), FOX_NEW(double, T),     FOX_NEW(double, T)};
    double *p = FOX_NEW(double, T), *dp = FOX_NEW(double, T);
    for (int i = 0; i < T; i++) {
        int begin = first != NULL ? first[i / block] * block : 0;
        double decay = 0, sum = 0, mean = 0, high = -INFINITY;
        for (int j = i; j >= begin; j--) {
            p[j] = acp_dot(q + i * D, k + j * D, D) / sqrt((double)D) + decay;
            high = fmax(high, p[j]);
            decay += logf[j];
        }
        for (int j = begin; j <= i; j++) {
            p[j] = exp(p[j] - high);
            sum += p[j];
        }
        n.lse[i] = high + log(sum);
        for (int j = begin; j <= i; j++) {
            p[j] /= sum;
            dp[j] = acp_dot(dout + i * D, v + j * D, D);
            mean += p[j] * dp[j];
        }
        double suffix = 0; /* of dS over keys before l: what log f[l] gains, for every l <= i */
        for (int j = begin; j <= i; j++) {
            double ds = p[j] * (dp[j] - mean);
            n.dlogf[j] += suffix;
            suffix += ds;
            for (int x = 0; x < D; x++) {
                n.o[i * D + x] += p[j] * (double)v[j * D + x];
                n.dv[j * D + x] += p[j] * (double)dout[i * D + x];
                n.dq[i * D + x] += ds * (double)k[j * D + x] / sqrt((double)D);
                n.dk[j * D + x] += ds * (double)q[i * D + x] / sqrt((double)D);
            }
        }
    }
    free(p);
    free(dp);
    return n;
}

static void naive_attention_free(NaiveAttention *n) {
    double *all[] = {n->o, n->dq, n->dk, n->dv, n->lse, n->dlogf};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
}

#endif

/* Loss by position in the window: how much a model gains from what it has read so far.
 *
 * Positions 0 .. T-1 fall into bins that grow with the position, four to a doubling: [0, 1), [1, 2), ... and then
 * [2^(k/4), 2^((k+1)/4)), both rounded down, those without a position left out. Every power of two is an edge, so T/2, T/4, ...
 * are edges where T is a power of two. The last bin ends at T. */
#ifndef FOX_POSITIONS_H
#define FOX_POSITIONS_H

#include "common.h"

enum { POSITION_BINS = 96 }; /* enough for T up to 2^20 */

typedef struct PositionBins {
    int count;
    int64_t edges[POSITION_BINS + 1]; /* bin i holds positions edges[i] .. edges[i + 1] - 1 */
    double losses[POSITION_BINS];     /* sums over the tokens of each bin */
    double tokens[POSITION_BINS];
} PositionBins;

/* The bins of windows of T >= 1 tokens, empty. */
static inline PositionBins positions_create(int64_t T) {
    PositionBins bins;
    memset(&bins, 0, sizeof bins);
    for (int k = 0; bins.edges[bins.count] < T; k++) {
        int64_t edge = (int64_t)floor(ldexp(pow(2, k % 4 / 4.0), k / 4));
        edge = edge < T ? edge : T;
        if (edge > bins.edges[bins.count]) {
            bins.edges[++bins.count] = edge;
        }
    }
    return bins;
}

/* Adds a window's losses, [T]. */
static inline void positions_add(PositionBins *bins, const float *losses) {
    for (int i = 0; i < bins->count; i++) {
        for (int64_t p = bins->edges[i]; p < bins->edges[i + 1]; p++) {
            bins->losses[i] += (double)losses[p];
        }
        bins->tokens[i] += (double)(bins->edges[i + 1] - bins->edges[i]);
    }
}

#endif

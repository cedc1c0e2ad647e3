/* The learning rate: from 0 up to the peak in a straight line, then down to its final value along half a cosine.
 *
 *     peak          ..--..              tokens <= warmup:  peak * tokens / warmup
 *               .-'        '-.          then, with x = (tokens - warmup) / (total - warmup):
 *     final  .'                '-.__        final + (peak - final) * (1 + cos(pi x)) / 2
 *            0   warmup          total */
#ifndef FOX_SCHEDULE_H
#define FOX_SCHEDULE_H

#include "common.h"

/* The rate at a point of the run, in tokens of all ranks; the final rate from `total` on. Ask for the middle of a step
 * (tokens before it plus half its own): then neither the first nor the last step is made with a rate of 0. */
static inline double schedule_lr(double peak, double final, int64_t warmup, int64_t total, int64_t tokens) {
    if (tokens < warmup) {
        return peak * (double)(tokens > 0 ? tokens : 0) / (double)warmup;
    }
    if (tokens >= total) {
        return final;
    }
    double x = (double)(tokens - warmup) / (double)(total - warmup);
    return final + (peak - final) * 0.5 * (1.0 + cos(3.14159265358979323846 * x));
}

#endif

/* The model of fox_layers.h compiled in double precision (tests/gradients.c): its gradients against finite differences, and
 * its losses and gradients as the truth that rounding errors are measured against. */
#ifndef FOX_TESTS_GRADIENTS_H
#define FOX_TESTS_GRADIENTS_H

#include "../train/config.h"

typedef float Float32; /* gradients.c redefines `float` */

typedef struct GradientCase {
    FoxConfig config;
    int B, T;
    bool recompute;
    int acp; /* an AcpMode */
    double log_tolerance;
    uint64_t seed; /* of parameters, tokens and directions */
} GradientCase;

/* For each tensor the derivative of the mean loss along a random direction, by central differences and by the backward
 * pass. Returns the worst |difference| / |gradient norm of the tensor|; `worst` receives that tensor's name. */
double gradients_check(const GradientCase *, char worst[80]);

/* Losses [B, T] and the gradient of their mean (flat, in the table's layout) for the given parameters, computed in double
 * precision without pruning and rounded once. */
void gradients_truth(const FoxConfig *config, const Float32 *params, const int32_t *tokens, const int32_t *targets, int B, int T,
                     Float32 *losses, Float32 *grads);

#endif

#include "gradients.h"

/* From here on every `float` is a double. The functions with external linkage get other names, so that both precisions
 * fit into one program. */
#define float double
#define expf exp
#define logf log
#define sqrtf sqrt
#define gemm fox64_gemm
#define gemm_serial fox64_gemm_serial
#define fox_preset fox64_preset
#define fox_find_preset fox64_find_preset
#define fox_intermediate_size fox64_intermediate_size
#define fox_preset_config fox64_preset_config
#define fox_config_check fox64_config_check
#define fox_table_create fox64_table_create
#define fox_table_free fox64_table_free
#define fox_table_find fox64_table_find
#define fox_init_parameters fox64_init_parameters

#include "../fox_layers.h"

#include "../train/config.c"

/* The plain triple loop: the layers are judged here, not the fast product. */
void gemm_serial(int64_t M, int64_t N, int64_t K, double alpha, MatrixView A, MatrixView B, double beta, double *C, int64_t ldc) {
    for (int64_t i = 0; i < M; i++) {
        for (int64_t j = 0; j < N; j++) {
            double sum = 0;
            for (int64_t k = 0; k < K; k++) {
                sum += A.data[i * A.row + k * A.col] * B.data[k * B.row + j * B.col];
            }
            C[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * C[i * ldc + j]);
        }
    }
}

void gemm(int64_t M, int64_t N, int64_t K, double alpha, MatrixView A, MatrixView B, double beta, double *C, int64_t ldc) {
    gemm_serial(M, N, K, alpha, A, B, beta, C, ldc);
}

static double mean_loss(FoxModel *m, const int32_t *tokens, const int32_t *targets, double *losses) {
    int N = m->B * m->T;
    double sum = 0;
    fox_forward(m, tokens, targets, losses);
    for (int n = 0; n < N; n++) {
        sum += losses[n];
    }
    return sum / N;
}

/* Values far from the initial ones, so that every path carries weight: norms around 1, matrices and biases of order 1. */
static void random_parameters(const FoxTable *table, uint64_t seed, double *params) {
    for (int t = 0; t < table->count; t++) {
        const FoxTensor *tensor = &table->tensors[t];
        double mean = tensor->init == FOX_INIT_ONES ? 1 : 0;
        double spread = tensor->ndim == 2 ? 1.0 / sqrt((double)tensor->shape[1]) : 0.3;
        for (int64_t i = 0; i < tensor->size; i++) {
            params[tensor->offset + i] = mean + spread * fox_normal(seed + 1, (uint64_t)(tensor->offset + i));
        }
    }
}

double gradients_check(const GradientCase *test, char worst[80]) {
    int N = test->B * test->T;
    FoxTable table = fox_table_create(&test->config);
    double *params = FOX_NEW(double, table.total), *grads = FOX_NEW(double, table.total), *losses = FOX_NEW(double, N);
    int32_t *tokens = FOX_NEW(int32_t, N), *targets = FOX_NEW(int32_t, N);
    FoxModel m = fox_model_create(&test->config, &table, params, grads, test->B, test->T, test->recompute);
    double worst_error = 0, h = 1e-5;
    m.acp = (AcpMode)test->acp;
    m.log_tolerance = test->log_tolerance;
    random_parameters(&table, test->seed, params);
    for (int n = 0; n < N; n++) {
        tokens[n] = (int32_t)(fox_random(test->seed + 2, (uint64_t)n) % (uint64_t)test->config.vocab_size);
        targets[n] = (int32_t)(fox_random(test->seed + 3, (uint64_t)n) % (uint64_t)test->config.vocab_size);
    }
    fox_forward_backward(&m, tokens, targets, losses, 1.0 / N);
    for (int t = 0; t < table.count; t++) {
        const FoxTensor *tensor = &table.tensors[t];
        double *p = params + tensor->offset, *g = grads + tensor->offset, loss[2], dot = 0, norm = 0;
        double *direction = FOX_NEW(double, tensor->size), *saved = FOX_NEW(double, tensor->size);
        for (int64_t i = 0; i < tensor->size; i++) {
            direction[i] = fox_normal(test->seed + 4, (uint64_t)(tensor->offset + i));
            saved[i] = p[i];
            dot += direction[i] * g[i];
            norm += g[i] * g[i];
        }
        for (int side = 0; side < 2; side++) {
            for (int64_t i = 0; i < tensor->size; i++) {
                p[i] = saved[i] + (side == 0 ? h : -h) * direction[i];
            }
            loss[side] = mean_loss(&m, tokens, targets, losses);
        }
        double error = fabs((loss[0] - loss[1]) / (2 * h) - dot) / (norm > 0 ? sqrt(norm) : 1); // at T = 1 some are zero
        if (!(error <= worst_error) && worst_error == worst_error) { // the first NaN stays
            worst_error = error;
            snprintf(worst, 80, "%s", tensor->name);
        }
        memcpy(p, saved, sizeof(double) * (size_t)tensor->size);
        free(direction);
        free(saved);
    }
    fox_model_free(&m);
    fox_table_free(&table);
    free(params);
    free(grads);
    free(losses);
    free(tokens);
    free(targets);
    return worst_error;
}

void gradients_truth(const FoxConfig *config, const Float32 *params, const int32_t *tokens, const int32_t *targets, int B, int T,
                     Float32 *losses, Float32 *grads) {
    int64_t N = (int64_t)B * T;
    FoxTable table = fox_table_create(config);
    double *p = FOX_NEW(double, table.total), *g = FOX_NEW(double, table.total), *l = FOX_NEW(double, N);
    FoxModel m = fox_model_create(config, &table, p, g, B, T, false);
    for (int64_t i = 0; i < table.total; i++) {
        p[i] = (double)params[i];
    }
    fox_forward_backward(&m, tokens, targets, l, 1.0 / (double)N);
    for (int64_t n = 0; n < N; n++) {
        losses[n] = (Float32)l[n];
    }
    for (int64_t i = 0; i < table.total; i++) {
        grads[i] = (Float32)g[i];
    }
    fox_model_free(&m);
    fox_table_free(&table);
    free(p);
    free(g);
    free(l);
}

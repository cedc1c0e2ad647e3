#include "matmul.h"

enum { CANDIDATES = 12, REPEATS = 5 };

#define CUBLAS_CHECK(call) cublas_check((call), #call)
static void cublas_check(cublasStatus_t status, const char *call) {
    if (status != CUBLAS_STATUS_SUCCESS) {
        fox_die("%s: %s", call, cublasLtGetStatusString(status));
    }
}

int64_t matmul_workspace_bytes(void) {
    return 64 << 20; /* what cuBLASLt's Hopper kernels ask for at most, doubled */
}

void matmul_create(Matmul *m, void *workspace, bool deterministic) {
    memset(m, 0, sizeof *m);
    CUBLAS_CHECK(cublasLtCreate(&m->handle));
    m->workspace = workspace;
    m->deterministic = deterministic;
}

void matmul_free(Matmul *m) {
    for (int i = 0; i < m->count; i++) {
        cublasLtMatmulDescDestroy(m->plans[i].operation);
        cublasLtMatrixLayoutDestroy(m->plans[i].a);
        cublasLtMatrixLayoutDestroy(m->plans[i].b);
        cublasLtMatrixLayoutDestroy(m->plans[i].d);
    }
    free(m->plans);
    if (m->handle != NULL) {
        cublasLtDestroy(m->handle);
    }
    memset(m, 0, sizeof *m);
}

static cublasLtMatrixLayout_t layout(cudaDataType_t type, int64_t rows, int64_t columns, int64_t leading) {
    cublasLtMatrixLayout_t made;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&made, type, (uint64_t)rows, (uint64_t)columns, leading));
    return made;
}

/* cuBLASLt is column-major: a row-major matrix is its transpose there, so every product is computed transposed,
 * D^T = op(A) op(B) with
 *     forward          y^T  = (w^T)^T x^T      A = w, transposed      B = x
 *     backward_input   dx^T = w^T dy^T         A = w                  B = dy
 *     backward_weight  dw^T = x^T dy           A = x                  B = dy, transposed */
static MatmulPlan describe(const MatmulShape *s) {
    MatmulPlan p;
    cublasOperation_t ta = s->kind == MATMUL_FORWARD ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t tb = s->kind == MATMUL_BACKWARD_WEIGHT ? CUBLAS_OP_T : CUBLAS_OP_N;
    memset(&p, 0, sizeof p);
    p.shape = *s;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&p.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(p.operation, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(p.operation, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb));
    switch (s->kind) {
    case MATMUL_FORWARD:
        p.a = layout(CUDA_R_16BF, s->in, s->out, s->in);
        p.b = layout(CUDA_R_16BF, s->in, s->N, s->in);
        p.d = layout(CUDA_R_16BF, s->out, s->N, s->ldy);
        break;
    case MATMUL_BACKWARD_INPUT:
        p.a = layout(CUDA_R_16BF, s->in, s->out, s->in);
        p.b = layout(CUDA_R_16BF, s->out, s->N, s->ldy);
        p.d = layout(CUDA_R_16BF, s->in, s->N, s->in);
        break;
    default:
        p.a = layout(CUDA_R_16BF, s->in, s->N, s->in);
        p.b = layout(CUDA_R_16BF, s->out, s->N, s->ldy);
        p.d = layout(CUDA_R_32F, s->in, s->out, s->in);
    }
    return p;
}

static cublasStatus_t enqueue(const Matmul *m, const MatmulPlan *p, const cublasLtMatmulAlgo_t *algo, void *result,
                              const bf16 *left, const bf16 *right, cudaStream_t stream) {
    /* A is the weight, or x in the weight gradient: always the right operand of the row-major product. */
    float one = 1, beta = p->shape.kind == MATMUL_BACKWARD_WEIGHT ? 1 : 0;
    return cublasLtMatmul(m->handle, p->operation, &one, right, p->a, left, p->b, &beta, result, p->d, result, p->d, algo,
                          m->workspace, (size_t)matmul_workspace_bytes(), stream);
}

/* Best of a few timed runs in microseconds; infinite for an algorithm that this shape refuses. */
static double time_algorithm(const Matmul *m, const MatmulPlan *p, const cublasLtMatmulAlgo_t *algo, void *result, const bf16 *left,
                             const bf16 *right, cudaStream_t stream) {
    cudaEvent_t start, stop;
    double best = INFINITY;
    if (enqueue(m, p, algo, result, left, right, stream) != CUBLAS_STATUS_SUCCESS) {
        return INFINITY;
    }
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    for (int i = 0; i < REPEATS; i++) {
        float milliseconds;
        CUDA_CHECK(cudaEventRecord(start, stream));
        CUBLAS_CHECK(enqueue(m, p, algo, result, left, right, stream));
        CUDA_CHECK(cudaEventRecord(stop, stream));
        CUDA_CHECK(cudaEventSynchronize(stop));
        CUDA_CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
        best = fmin(best, 1e3 * (double)milliseconds);
    }
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaEventDestroy(stop));
    return best;
}

static MatmulPlan *find(const Matmul *m, const MatmulShape *s) {
    for (int i = 0; i < m->count; i++) {
        const MatmulShape *t = &m->plans[i].shape;
        if (t->kind == s->kind && t->N == s->N && t->in == s->in && t->out == s->out && t->ldy == s->ldy) {
            return &m->plans[i];
        }
    }
    return NULL;
}

static MatmulPlan *add_plan(Matmul *m, const MatmulShape *s, bool timed, void *result, const bf16 *left, const bf16 *right,
                            cudaStream_t stream) {
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found[CANDIDATES];
    MatmulPlan plan = describe(s);
    size_t workspace = (size_t)matmul_workspace_bytes();
    int count = 0;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                      sizeof workspace));
    CUBLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(m->handle, plan.operation, plan.a, plan.b, plan.d, plan.d, preference,
                                                timed ? CANDIDATES : 1, found, &count));
    cublasLtMatmulPreferenceDestroy(preference);
    if (count == 0) {
        fox_die("cuBLASLt has no algorithm for a product of %lld x %lld x %lld", (long long)s->N, (long long)s->in,
                (long long)s->out);
    }
    plan.algo = found[0].algo;
    if (timed) {
        plan.microseconds = INFINITY;
        for (int i = 0; i < count; i++) {
            double time = time_algorithm(m, &plan, &found[i].algo, result, left, right, stream);
            if (time < plan.microseconds) {
                plan.microseconds = time;
                plan.algo = found[i].algo;
            }
        }
    }
    if (m->count == m->capacity) {
        m->capacity = 2 * m->capacity + 32;
        m->plans = (MatmulPlan *)realloc(m->plans, sizeof(MatmulPlan) * (size_t)m->capacity);
        if (m->plans == NULL) {
            fox_die("out of memory");
        }
    }
    m->plans[m->count] = plan;
    return &m->plans[m->count++];
}

void matmul_plan(Matmul *m, const MatmulShape *s, void *result, const bf16 *left, const bf16 *right, cudaStream_t stream) {
    if (find(m, s) == NULL) {
        add_plan(m, s, !m->deterministic, result, left, right, stream);
    }
}

void matmul(Matmul *m, const MatmulShape *s, void *result, const bf16 *left, const bf16 *right, cudaStream_t stream) {
    MatmulPlan *plan = find(m, s);
    if (plan == NULL) {
        plan = add_plan(m, s, false, result, left, right, stream);
    }
    CUBLAS_CHECK(enqueue(m, plan, &plan->algo, result, left, right, stream));
}

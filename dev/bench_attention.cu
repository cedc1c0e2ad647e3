/* Time of acp_attention.cuh on the gates of every comparison of this project: log f = logsigmoid(x), x ~ N(mu_h, 1),
 * mu = linspace(-1, 8.5, H), q and k of norm sqrt(D), log_tolerance -10, H*D = 1536.
 *
 *   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I. -o bench_attention dev/bench_attention.cu
 *   ./bench_attention            all shapes; ./bench_attention 16384 only that context; --kernels: each kernel's share
 *   ./bench_attention --portable   the kernels for every chip
 *   ./bench_attention --gates tests/data/gates/trained_gates_125m.safetensors    the gates of a trained model, sum of its
 *                                  layers, D = 64; with --kernels before it too. The file's one tensor is c, float32
 *                                  [layers, 12, 16384]
 *
 * Milliseconds are medians of repeats between CUDA events, after a warm-up. TFLOP/s are those of dense causal attention
 * in the same time (forward 2 B H T^2 D, backward 2.5 times that), so that pruning shows as speed. */
#include "../acp_attention.cuh"

typedef struct Shape {
    int B, T, H, D;
} Shape;

typedef struct Buffers {
    bf16 *q, *k, *v, *o, *dout, *dq, *dk, *dv;
    float *log_f, *lse, *dlog_f, *ones;
    void *saved, *work;
    AcpCounts counts;
} Buffers;

static __device__ float bench_normal(uint64_t key, uint64_t i) {
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15u ^ key * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    float u = ((float)(x >> 40) + 1) * 0x1p-24f, v = (float)(x & 0xffffff) * 0x1p-24f;
    return sqrtf(-2 * logf(u)) * cosf(6.2831853f * v);
}

/* One warp per row of D values; with `unit`, of norm sqrt(D). */
static __global__ void bench_fill_kernel(bf16 *x, int64_t rows, int D, uint64_t key, bool unit) {
    int64_t row = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / 32;
    if (row >= rows) {
        return;
    }
    float sum = 0;
    for (int i = threadIdx.x % 32; i < D; i += 32) {
        float y = bench_normal(key, (uint64_t)(row * D + i));
        sum += y * y;
    }
    float scale = unit ? sqrtf((float)D / warp_sum(sum)) : 1;
    for (int i = threadIdx.x % 32; i < D; i += 32) {
        x[row * D + i] = __float2bfloat16(scale * bench_normal(key, (uint64_t)(row * D + i)));
    }
}

static __global__ void bench_gates_kernel(float *log_f, int64_t count, int T, int H) {
    int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (i < count) {
        float x = bench_normal(9, (uint64_t)i) - 1 + 9.5f * (float)(i / T % H) / (float)(H - 1);
        log_f[i] = fminf(x, 0) - log1pf(expf(-fabsf(x)));
    }
}

static __global__ void bench_ones_kernel(float *x, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        x[i] = 1;
    }
}

template <typename Type>
static Type *bench_alloc(int64_t count) {
    void *p;
    CUDA_CHECK(cudaMalloc(&p, (size_t)count * sizeof(Type)));
    return (Type *)p;
}

static Buffers bench_buffers(const Shape *s) {
    int64_t rows = (int64_t)s->B * s->T * s->H, N = rows * s->D;
    AcpShape shape = {s->B, s->T, s->H, s->D, ACP_OFF, -10, false, false};
    Buffers b;
    bf16 **tensors[] = {&b.q, &b.k, &b.v, &b.dout, &b.o, &b.dq, &b.dk, &b.dv};
    for (int i = 0; i < 8; i++) {
        *tensors[i] = bench_alloc<bf16>(N);
        bench_fill_kernel<<<(unsigned)((rows + 7) / 8), 256>>>(*tensors[i], rows, s->D, (uint64_t)i + 1, i < 2);
    }
    b.log_f = bench_alloc<float>(rows);
    b.lse = bench_alloc<float>(rows);
    b.dlog_f = bench_alloc<float>(rows);
    b.ones = bench_alloc<float>(s->H * s->D);
    b.saved = bench_alloc<char>(acp_saved_bytes(&shape));
    b.work = bench_alloc<char>(acp_workspace_bytes(&shape));
    b.counts.skipped = bench_alloc<unsigned long long>(2 * s->H);
    b.counts.total = b.counts.skipped + s->H;
    bench_gates_kernel<<<(unsigned)((rows + 255) / 256), 256>>>(b.log_f, rows, s->T, s->H);
    bench_ones_kernel<<<1, 256>>>(b.ones, s->H * s->D);
    CUDA_CHECK(cudaDeviceSynchronize());
    return b;
}

static void bench_free(Buffers *b) {
    void *all[] = {b->q,      b->k,    b->v,     b->o,    b->dout,          b->dq, b->dk, b->dv, b->log_f, b->lse,
                   b->dlog_f, b->ones, b->saved, b->work, b->counts.skipped};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        CUDA_CHECK(cudaFree(all[i]));
    }
}

static int bench_compare(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Median milliseconds of `work`. */
template <typename Work>
static float bench_time(Work work) {
    enum { REPEATS = 11 };
    float ms[REPEATS];
    cudaEvent_t start, stop;
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    work();
    work();
    for (int i = 0; i < REPEATS; i++) {
        CUDA_CHECK(cudaEventRecord(start));
        work();
        CUDA_CHECK(cudaEventRecord(stop));
        CUDA_CHECK(cudaEventSynchronize(stop));
        CUDA_CHECK(cudaEventElapsedTime(&ms[i], start, stop));
    }
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaEventDestroy(stop));
    qsort(ms, REPEATS, sizeof ms[0], bench_compare);
    return ms[REPEATS / 2];
}

enum { BENCH_KERNELS = 5 };

static void bench_print_kernels(const float *ms) {
    printf("    ranges %.3f  forward %.3f | dq %.3f  dkdv %.3f  gates %.3f\n", ms[0], ms[1], ms[2], ms[3], ms[4]);
}

/* The kernels of one pass, each alone: adds to ms[BENCH_KERNELS]. After a forward pass. */
template <int D>
static void bench_kernels(const AcpShape *shape, const Buffers *b, float *ms) {
    int64_t bytes;
    int BH = shape->B * shape->H, T = shape->T, blocks = acp_num_blocks(shape);
    int64_t stride = (int64_t)shape->H * D;
    AcpSaved saved = acp_saved(shape, b->saved, &bytes);
    AcpWork work = acp_work(shape, b->work, &bytes);
    AcpInputs in = {b->q, b->k, b->v, stride, T, shape->H, blocks, BH};
    AcpForward forward = {in, saved, b->o, b->lse};
    AcpBackward backward = {in, saved, work, b->dout, b->o, b->lse, b->dq, b->dk, b->dv};
    AcpScan scan = {T, blocks, b->log_f, work.dc, saved, work, b->dlog_f};
    AcpRanges ranges = acp_ranges(shape, b->ones, b->ones, NULL);
    ms[0] += bench_time([&] { acp_find_ranges<D>(shape, in, scan, ranges, 0); });
    ms[1] += bench_time([&] { acp_run_forward<D>(shape, forward, 0); });
    ms[2] += bench_time([&] { acp_run_dq<D>(shape, backward, 0); });
    ms[3] += bench_time([&] { acp_run_dkdv<D>(shape, backward, 0); });
    ms[4] += bench_time([&] { acp_run_gate_gradient(shape, scan, 0); });
}

/* Forward and backward of every layer of a trained model's gates. */
static bool bench_gates(const char *path, bool kernels, bool portable) {
    static const char *const modes[] = {"off", "paper", "tight"};
    Shape s = {1, 16384, 12, 64};
    int64_t count = (int64_t)s.T * s.H, stride = s.H * s.D;
    FILE *f = fopen(path, "rb");
    float *log_f = FOX_NEW(float, count);
    uint64_t header;
    if (f == NULL || fread(&header, sizeof header, 1, f) != 1 || header > 1 << 20) {
        fprintf(stderr, "bench_attention: error: %s is not a safetensors file\n", path);
        return false;
    }
    Buffers b = bench_buffers(&s);
    for (int mode = 0; mode < 3; mode++) {
        AcpShape shape = {s.B, s.T, s.H, s.D, (AcpMode)mode, -10, false, portable};
        float forward = 0, backward = 0, ms[BENCH_KERNELS] = {0};
        int layers = 0;
        fseek(f, (long)(sizeof header + header), SEEK_SET);
        for (; fread(log_f, sizeof(float), (size_t)count, f) == (size_t)count; layers++) {
            for (int64_t i = count - 1; i > 0; i--) { /* c to log f, in place */
                log_f[i] -= i % s.T > 0 ? log_f[i - 1] : 0;
            }
            CUDA_CHECK(cudaMemcpy(b.log_f, log_f, sizeof(float) * (size_t)count, cudaMemcpyHostToDevice));
            forward += bench_time([&] {
                acp_attention_forward(&shape, b.o, b.lse, b.saved, b.work, NULL, b.q, b.k, b.v, stride, b.log_f, b.ones,
                                      b.ones, 0);
            });
            backward += bench_time([&] {
                acp_attention_backward(&shape, b.dq, b.dk, b.dv, b.dlog_f, b.saved, b.work, b.dout, b.q, b.k, b.v,
                                       stride, b.o, b.lse, 0);
            });
            if (kernels) {
                bench_kernels<64>(&shape, &b, ms);
            }
        }
        printf("%s, %d layers, %-5s  forward %7.3f  backward %7.3f  both %7.3f ms\n", path, layers, modes[mode],
               forward, backward, forward + backward);
        if (kernels) {
            bench_print_kernels(ms);
        }
    }
    bench_free(&b);
    free(log_f);
    fclose(f);
    return true;
}

static void bench_shape(const Shape *s, bool kernels, bool portable) {
    static const char *const modes[] = {"off", "paper", "tight"};
    Buffers b = bench_buffers(s);
    double flops = 2.0 * s->B * s->H * (double)s->T * s->T * s->D;
    int64_t stride = (int64_t)s->H * s->D;
    for (int mode = 0; mode < 3; mode++) {
        AcpShape shape = {s->B, s->T, s->H, s->D, (AcpMode)mode, -10, false, portable};
        auto forward = [&](AcpCounts *counts) {
            acp_attention_forward(&shape, b.o, b.lse, b.saved, b.work, counts, b.q, b.k, b.v, stride, b.log_f, b.ones,
                                  b.ones, 0);
        };
        auto backward = [&] {
            acp_attention_backward(&shape, b.dq, b.dk, b.dv, b.dlog_f, b.saved, b.work, b.dout, b.q, b.k, b.v, stride,
                                   b.o, b.lse, 0);
        };
        unsigned long long *counts = FOX_NEW(unsigned long long, 2 * s->H), skipped = 0, total = 0;
        CUDA_CHECK(cudaMemset(b.counts.skipped, 0, sizeof(unsigned long long) * (size_t)(2 * s->H)));
        forward(&b.counts);
        CUDA_CHECK(cudaMemcpy(counts, b.counts.skipped, sizeof(unsigned long long) * (size_t)(2 * s->H),
                              cudaMemcpyDeviceToHost));
        for (int h = 0; h < s->H; h++) {
            skipped += counts[h];
            total += counts[s->H + h];
        }
        float ms_forward = bench_time([&] { forward(NULL); }), ms_backward = bench_time(backward);
        printf("D %3d  T %6d x %d  %-5s  kept %5.1f%%  forward %7.3f  backward %7.3f  both %7.3f ms  dense-equivalent "
               "%5.0f %5.0f TFLOP/s\n",
               s->D, s->T, s->B, modes[mode], 100.0 * (double)(total - skipped) / (double)total, ms_forward,
               ms_backward, ms_forward + ms_backward, flops / ms_forward * 1e-9, 2.5 * flops / ms_backward * 1e-9);
        float ms[BENCH_KERNELS] = {0};
        if (kernels) {
            (s->D == 64 ? bench_kernels<64> : bench_kernels<128>)(&shape, &b, ms);
            bench_print_kernels(ms);
        }
        free(counts);
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    bench_free(&b);
}

int main(int argc, char **argv) {
    static const Shape shapes[] = {{4, 4096, 24, 64},  {2, 8192, 24, 64},  {1, 16384, 24, 64},
                                   {1, 32768, 24, 64}, {1, 65536, 24, 64}, {1, 16384, 12, 128}};
    bool kernels = false, portable = false;
    int only = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--kernels") == 0) {
            kernels = true;
        } else if (strcmp(argv[i], "--portable") == 0) {
            portable = true;
        } else if (strcmp(argv[i], "--gates") == 0 && i + 1 < argc) {
            return bench_gates(argv[i + 1], kernels, portable) ? 0 : 1;
        } else if ((only = atoi(argv[i])) <= 0) {
            fprintf(stderr,
                    "bench_attention: usage: bench_attention [--portable] [--kernels] [CONTEXT] | --gates FILE\n");
            return 1;
        }
    }
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        if (only == 0 || shapes[i].T == only) {
            bench_shape(&shapes[i], kernels, portable);
        }
    }
    return 0;
}

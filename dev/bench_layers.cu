/* Time of every kernel of cuda/ (attention: bench_attention.cu), beside what the device can do, measured here too: the
 * rate of a copy for the memory-bound ones, the rate of a large matrix product for the products.
 *
 *     nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a dev/bench_layers.cu -o build/bench_layers -lcublasLt
 *     build/bench_layers [--json FILE]
 *
 * One layer of a 760M model and 32768 tokens; 8 GB of device memory, 26 GB for AdamW. Bytes are those that must move:
 * every input once, every output once; operations of a product are 2 for each multiply-add. Median of the repetitions,
 * each on data that has left the cache. The file holds one object: device, copy_gb_per_s, matmul_tflop_per_s, and
 * kernels, each with name, us, and bytes, gb_per_s, of_copy or flops, tflop_per_s, of_matmul. */
#include <algorithm>
#include <functional>
#include <vector>

#include "../cuda/kernels.cu"
#include "../cuda/matmul.c"

static __global__ void fill_kernel(uint32_t *p, int64_t words, uint32_t seed, int kind) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (int64_t)gridDim.x * blockDim.x) {
        uint64_t x = (uint64_t)i * 0x9e3779b97f4a7c15u + seed;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        float u = (float)(x >> 40) * 0x1p-24f, v = (float)(x >> 8 & 0xffffff) * 0x1p-24f;
        if (kind == 0) {
            p[i] = __float_as_uint(2 * u - 1);
        } else if (kind == 1) {
            __nv_bfloat162 pair = __floats2bfloat162_rn(4 * u - 2, 4 * v - 2);
            p[i] = *reinterpret_cast<uint32_t *>(&pair);
        } else {
            p[i] = (uint32_t)(kind * (u * u * u)); /* tokens below `kind`, the low ones common */
        }
    }
}

enum { FLOATS = 0, BF16 = 1 };

static void *fresh(int64_t bytes, int kind) {
    void *p;
    static uint32_t seed;
    CUDA_CHECK(cudaMalloc(&p, (size_t)bytes));
    fill_kernel<<<1024, 256>>>((uint32_t *)p, bytes / 4, ++seed, kind);
    CUDA_CHECK_LAUNCH();
    return p;
}

static float *floats(int64_t count) {
    return (float *)fresh(4 * count, FLOATS);
}

static bf16 *bf16s(int64_t count) {
    return (bf16 *)fresh(2 * count, BF16);
}

/* One measured kernel: `bytes` moved, or floating-point operations. */
typedef struct Row {
    const char *name;
    double us, bytes, flops;
} Row;

/* What was measured so far, and how. */
struct Bench {
    double copy_rate = 0, matmul_rate = 0; /* per second; 0: not known yet */
    std::vector<Row> rows;

    /* Median time of `work` in microseconds. */
    static double time(const std::function<void()> &work) {
        enum { WARM_UP = 3, TIMED = 15 };
        std::vector<float> times;
        cudaEvent_t event[WARM_UP + TIMED + 1];
        for (cudaEvent_t &e : event) { /* all queued at once: the host's part of a launch stays out of the numbers */
            CUDA_CHECK(cudaEventCreate(&e));
        }
        for (int i = 0; i <= WARM_UP + TIMED; i++) {
            CUDA_CHECK(cudaEventRecord(event[i]));
            if (i < WARM_UP + TIMED) {
                work();
            }
        }
        CUDA_CHECK(cudaDeviceSynchronize());
        for (int i = WARM_UP; i < WARM_UP + TIMED; i++) {
            float ms;
            CUDA_CHECK(cudaEventElapsedTime(&ms, event[i], event[i + 1]));
            times.push_back(ms);
        }
        for (cudaEvent_t e : event) {
            CUDA_CHECK(cudaEventDestroy(e));
        }
        std::sort(times.begin(), times.end());
        return 1e3 * times[TIMED / 2];
    }

    /* A kernel that must move `bytes`. Returns bytes per second. */
    double memory(const char *name, double bytes, const std::function<void()> &work) {
        double us = time(work), rate = 1e6 * bytes / us;
        rows.push_back({name, us, bytes, 0});
        printf("%-28s %9.1f us %8.0f MB %7.0f GB/s", name, us, bytes * 1e-6, rate * 1e-9);
        printf(copy_rate > 0 ? "  %3.0f%% of copy\n" : "\n", 100 * rate / copy_rate);
        return rate;
    }

    /* A product of `flops` operations. Returns operations per second. */
    double product(const char *name, double flops, const std::function<void()> &work) {
        double us = time(work), rate = 1e6 * flops / us;
        rows.push_back({name, us, 0, flops});
        printf("%-28s %9.1f us %8.0f GFLOP %5.0f TFLOP/s", name, us, flops * 1e-9, rate * 1e-12);
        printf(matmul_rate > 0 ? "  %3.0f%% of 8192^3\n" : "\n", 100 * rate / matmul_rate);
        return rate;
    }

    void write_json(const char *path, const char *device) const {
        FILE *out = fopen(path, "w");
        if (out == NULL) {
            fox_die("%s: cannot write", path);
        }
        fprintf(out, "{\"device\": \"%s\", \"copy_gb_per_s\": %.1f, \"matmul_tflop_per_s\": %.1f, \"kernels\": [",
                device, 1e-9 * copy_rate, 1e-12 * matmul_rate);
        for (size_t i = 0; i < rows.size(); i++) {
            const Row &r = rows[i];
            const char *name = r.name + strspn(r.name, " ");
            fprintf(out, "%s\n{\"name\": \"%s\", \"us\": %.2f, ", i > 0 ? "," : "", name, r.us);
            if (r.flops > 0) {
                double rate = 1e6 * r.flops / r.us;
                fprintf(out, "\"flops\": %.0f, \"tflop_per_s\": %.1f, \"of_matmul\": %.3f}", r.flops, 1e-12 * rate,
                        rate / matmul_rate);
            } else {
                double rate = 1e6 * r.bytes / r.us;
                fprintf(out, "\"bytes\": %.0f, \"gb_per_s\": %.1f, \"of_copy\": %.3f}", r.bytes, 1e-9 * rate,
                        rate / copy_rate);
            }
        }
        fputs("]}\n", out);
        fclose(out);
    }
};

static FoxConfig bench_config(bool pro) {
    FoxConfig c;
    memset(&c, 0, sizeof c);
    c.vocab_size = 50257;
    c.hidden_size = 1536;
    c.num_heads = 24;
    c.use_forget_gate = c.use_output_gate = c.use_output_norm = c.qk_norm = c.use_k_shift = c.use_v_shift = pro;
    c.use_rope = !pro;
    c.rope_base = 500000;
    c.norm_eps = 1e-6;
    return c;
}

static void bench_stream(Bench &bench, int64_t N, int d, int V) {
    double Nd = (double)N * d;
    float *x = floats(N * d), *x_out = floats(N * d), *w = floats(d), *rstd = floats(N), *dw = floats(d),
          *table = floats((int64_t)V * d);
    float *scratch = floats(cuda_norm_scratch(d));
    bf16 *branch = bf16s(N * d), *h = bf16s(N * d);
    int32_t *tokens = (int32_t *)fresh(4 * N, V), *sort = (int32_t *)fresh(4 * cuda_embedding_scratch(N, V), FLOATS);
    int32_t *same = (int32_t *)fresh(4 * N, 2);
    CUDA_CHECK(cudaMemset(same, 0, (size_t)(4 * N)));
    std::vector<int32_t> host((size_t)N), seen((size_t)V, 0);
    CUDA_CHECK(cudaMemcpy(host.data(), tokens, 4 * (size_t)N, cudaMemcpyDeviceToHost));
    double used = 0;
    for (int32_t token : host) {
        used += seen[(size_t)token]++ == 0;
    }
    bench.memory("residual + norm forward", Nd * 12,
                 [&] { cuda_residual_norm_forward(h, rstd, x_out, x, branch, w, N, d, 1e-6f, 0); });
    bench.memory("norm backward", Nd * 16,
                 [&] { cuda_norm_backward(x_out, h, dw, scratch, branch, x, rstd, w, N, d, 0); });
    bench.memory("embedding forward", Nd * 8, [&] { cuda_embedding_forward(x, tokens, table, N, d, 0); });
    bench.memory("embedding backward", Nd * 4 + used * d * 8,
                 [&] { cuda_embedding_backward(table, x, tokens, sort, N, d, V, 0); });
    bench.memory("embedding backward, one token", Nd * 4,
                 [&] { cuda_embedding_backward(table, x, same, sort, N, d, V, 0); });
    for (void *p : {(void *)x, (void *)x_out, (void *)w, (void *)rstd, (void *)dw, (void *)table, (void *)scratch,
                    (void *)branch, (void *)h, (void *)tokens, (void *)sort, (void *)same}) {
        CUDA_CHECK(cudaFree(p));
    }
}

static void bench_heads(Bench &bench, int B, int T, bool pro) {
    FoxConfig c = bench_config(pro);
    int d = c.hidden_size, H = c.num_heads, D = d / H, row = (int)fox_round_up(4 * d + 3 * H, 64);
    int64_t N = (int64_t)B * T;
    double Nd = (double)N * d;
    PackedLayout layout = {0, d, 2 * d, 3 * d, 4 * d, 4 * d + H, 4 * d + 2 * H, 4 * d + 3 * H, row};
    if (!pro) {
        layout = {0, d, 2 * d, -1, -1, -1, -1, 3 * d, 3 * d};
    }
    bf16 *packed = bf16s(N * row), *dpacked = bf16s(N * row), *q = bf16s(N * d), *k = bf16s(N * d), *v = bf16s(N * d);
    float *q_rstd = floats(N * H), *k_rstd = floats(N * H), *log_f = floats(N * H), *w = floats(d), *dw = floats(d),
          *bias = floats(H);
    float *scratch = floats(cuda_qkv_scratch(&c)), *norm_scratch = floats(cuda_norm_scratch(d));
    QkvWeights weights = {pro ? w : NULL, pro ? w : NULL, pro ? bias : NULL};
    bench.memory(pro ? "qkv forward" : "qkv forward (rope)", Nd * 12,
                 [&] { cuda_qkv_forward(q, k, v, q_rstd, k_rstd, log_f, packed, &layout, &weights, &c, B, T, 0); });
    bench.memory(pro ? "qkv backward" : "qkv backward (rope)", Nd * 18, [&] {
        cuda_qkv_backward(dpacked, dw, dw, bias, scratch, q, k, v, log_f, packed, q_rstd, k_rstd, &layout, &weights, &c,
                          B, T, 0);
    });
    if (pro) {
        bench.memory("output gate forward", Nd * 6,
                     [&] { cuda_output_gate_forward(q, q_rstd, k, packed, &layout, w, N, H, D, 1e-6f, 0); });
        bench.memory("output gate backward", Nd * 10, [&] {
            cuda_output_gate_backward(q, dpacked, dw, norm_scratch, k, v, q_rstd, packed, &layout, w, N, H, D, 0);
        });
    }
    for (void *p : {(void *)packed, (void *)dpacked, (void *)q, (void *)k, (void *)v, (void *)q_rstd, (void *)k_rstd,
                    (void *)log_f, (void *)w, (void *)dw, (void *)bias, (void *)scratch, (void *)norm_scratch}) {
        CUDA_CHECK(cudaFree(p));
    }
}

static void bench_mlp_and_loss(Bench &bench, int64_t N, int F, int V) {
    int row = (int)fox_round_up(V, 64), chunk = 4096;
    bf16 *gu = bf16s(N * 2 * F), *dgu = bf16s(N * 2 * F), *out = bf16s(N * F), *logits = bf16s((int64_t)chunk * row);
    float *losses = floats(chunk);
    double *sum = (double *)fresh(8, FLOATS);
    int32_t *targets = (int32_t *)fresh(4 * chunk, V);
    bench.memory("swiglu forward", (double)N * F * 6, [&] { cuda_swiglu_forward(out, gu, N, F, 0); });
    bench.memory("swiglu backward", (double)N * F * 10, [&] { cuda_swiglu_backward(dgu, out, gu, N, F, 0); });
    bench.memory("cross entropy, 4096 rows", (double)chunk * V * 4,
                 [&] { cuda_cross_entropy(losses, sum, logits, targets, chunk, V, row, 1e-4f, 0); });
    bench.memory("cross entropy, loss only", (double)chunk * V * 2,
                 [&] { cuda_cross_entropy(losses, sum, logits, targets, chunk, V, row, 0, 0); });
    for (void *p :
         {(void *)gu, (void *)dgu, (void *)out, (void *)logits, (void *)losses, (void *)sum, (void *)targets}) {
        CUDA_CHECK(cudaFree(p));
    }
}

static void bench_update(Bench &bench, int64_t total) {
    float *p = floats(total), *m = floats(total), *v = floats(total), *g = floats(total);
    bf16 *p16 = bf16s(total);
    double *scratch = (double *)fresh(8 * cuda_norm_squares_scratch(), FLOATS);
    DeviceStats *stats = (DeviceStats *)fresh((int64_t)sizeof(DeviceStats), FLOATS);
    AdamW adamw = {1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 1};
    CUDA_CHECK(cudaMemset(stats, 0, sizeof *stats));
    CUDA_CHECK(cudaMemset(v, 0, (size_t)total * 4));
    bench.memory("gradient norm, 760M", (double)total * 4, [&] { cuda_add_squares(stats, scratch, g, total, 0); });
    bench.memory("clip", 0, [&] { cuda_clip(stats, 1, 0); });
    bench.memory("AdamW, 760M", (double)total * 34,
                 [&] { cuda_adamw(p, p16, m, v, g, total, total / 2 / 4 * 4, &adamw, stats, 0); });
    bench.memory("float32 to bf16, 760M", (double)total * 6, [&] { cuda_to_bf16(p16, p, total, 0); });
}

/* The products of one layer and of 4096 rows of logits, as backend_cuda.c plans them. */
static void bench_products(Bench &bench, int64_t N, int d, int H, int F, int V) {
    enum { HEAD_ROWS = 4096, RATE_SIZE = 8192 };
    int packed = (int)fox_round_up(4 * d + 3 * H, FOX_PACKED_ROWS), packed_row = (int)fox_round_up(packed, 64), logits_row = (int)fox_round_up(V, 64);
    const struct {
        const char *names[3]; /* by MatmulKind */
        int64_t N, in, out, ldy;
    } layers[] = {
        {{"product, 8192^3", NULL, NULL}, RATE_SIZE, RATE_SIZE, RATE_SIZE, RATE_SIZE},
        {{"packed q k v gates", "packed, to input", "packed, to weights"}, N, d, packed, packed_row},
        {{"o_proj", "o_proj, to input", "o_proj, to weights"}, N, d, d, d},
        {{"gate and up", "gate and up, to input", "gate and up, to weights"}, N, d, 2 * F, 2 * F},
        {{"down", "down, to input", "down, to weights"}, N, F, d, d},
        {{"lm_head, 4096 rows", "lm_head, to input", "lm_head, to weights"}, HEAD_ROWS, d, logits_row, logits_row},
    };
    Matmul m;
    matmul_create(&m, fresh(matmul_workspace_bytes(), FLOATS), false);
    for (const auto &l : layers) {
        bf16 *x = bf16s(l.N * l.in), *y = bf16s(l.N * l.ldy), *w = bf16s(l.out * l.in);
        float *dw = floats(l.out * l.in);
        for (int kind = MATMUL_FORWARD; kind <= MATMUL_BACKWARD_WEIGHT; kind++) {
            if (l.names[kind] == NULL) {
                continue;
            }
            MatmulShape shape = {(MatmulKind)kind, l.N, l.in, l.out, l.ldy};
            void *result = kind == MATMUL_FORWARD ? (void *)y : kind == MATMUL_BACKWARD_INPUT ? (void *)x : (void *)dw;
            const bf16 *left = kind == MATMUL_FORWARD ? x : y, *right = kind == MATMUL_BACKWARD_WEIGHT ? x : w;
            matmul_plan(&m, &shape, result, left, right, 0);
            double rate = bench.product(l.names[kind], 2.0 * (double)l.N * (double)l.in * (double)l.out,
                                        [&] { matmul(&m, &shape, result, left, right, 0); });
            bench.matmul_rate = bench.matmul_rate > 0 ? bench.matmul_rate : rate; /* the first is the yardstick */
        }
        for (void *p : {(void *)x, (void *)y, (void *)w, (void *)dw}) {
            CUDA_CHECK(cudaFree(p));
        }
    }
    CUDA_CHECK(cudaFree(m.workspace));
    matmul_free(&m);
}

int main(int argc, char **argv) {
    cudaDeviceProp device;
    Bench bench;
    int64_t bytes = (int64_t)1 << 30;
    if (argc != 1 && !(argc == 3 && strcmp(argv[1], "--json") == 0)) {
        fox_die("usage: bench_layers [--json FILE]");
    }
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
    char *from = (char *)fresh(bytes, FLOATS), *to = (char *)fresh(bytes, FLOATS);
    bench.copy_rate = bench.memory("copy", 2.0 * (double)bytes, [&] {
        CUDA_CHECK(cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDeviceToDevice));
    });
    CUDA_CHECK(cudaFree(from));
    CUDA_CHECK(cudaFree(to));
    bench_stream(bench, 32768, 1536, 50257);
    bench_heads(bench, 2, 16384, true);
    bench_heads(bench, 2, 16384, false);
    bench_mlp_and_loss(bench, 32768, 3584, 50257);
    bench_update(bench, 760000000);
    bench_products(bench, 32768, 1536, 24, 3584, 50257);
    if (argc == 3) {
        bench.write_json(argv[2], device.name);
    }
    return 0;
}

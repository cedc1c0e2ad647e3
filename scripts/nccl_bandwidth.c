/* How fast the GPUs of several ranks exchange data, as NCCL's own tests count it: run it before a long training run.
 *
 *     scripts/launch.sh 2 ./nccl_bandwidth            or: mpirun -np 8 --hostfile hosts ./nccl_bandwidth
 *
 * For each size and operation: time of one, and bus bandwidth: bytes that every GPU must send, over the time. On NVLink
 * expect hundreds of GB/s at 64 MiB (the size of a bucket of gradients), on PCIe tens, between nodes what the network has.
 * Results are checked too. */
#include "../cuda/collectives.h"

/* On a buffer of [ranks, piece] floats. */
typedef void (*Operation)(const Ranks *, Collectives *, void *, int64_t piece);

static void all_reduce(const Ranks *ranks, Collectives *c, void *values, int64_t piece) {
    collectives_sum(c, values, piece * ranks->size, COLLECTIVE_FLOAT, NULL);
}

static void reduce_scatter(const Ranks *ranks, Collectives *c, void *values, int64_t piece) {
    (void)ranks;
    collectives_scatter_sum(c, values, piece, COLLECTIVE_FLOAT, NULL);
}

static void all_gather(const Ranks *ranks, Collectives *c, void *values, int64_t piece) {
    (void)ranks;
    collectives_gather(c, values, piece, COLLECTIVE_FLOAT, NULL);
}

/* Milliseconds of one operation, the mean of `times`. */
static double measure(const Ranks *ranks, Collectives *c, Operation run, void *values, int64_t piece, int times) {
    cudaEvent_t begin, end;
    float ms = 0;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    run(ranks, c, values, piece);
    cudaStreamSynchronize(NULL);
    ranks_barrier(ranks);
    cudaEventRecord(begin, NULL);
    for (int i = 0; i < times; i++) {
        run(ranks, c, values, piece);
    }
    cudaEventRecord(end, NULL);
    cudaEventSynchronize(end);
    cudaEventElapsedTime(&ms, begin, end);
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return (double)ms / times;
}

/* Rank r gives r + 1 everywhere: every sum is n (n + 1) / 2, and row r gathered is r + 1. */
static bool check_results(const Ranks *ranks, Collectives *c, void *device) {
    enum { PIECE = 1000 };
    int n = ranks->size, wrong = 0;
    float *host = FOX_NEW(float, (int64_t)PIECE * n);
    for (int what = 0; what < 3; what++) {
        Operation operations[] = {all_reduce, reduce_scatter, all_gather};
        for (int i = 0; i < PIECE * n; i++) {
            host[i] = (float)(ranks->rank + 1);
        }
        cudaMemcpy(device, host, sizeof(float) * PIECE * (size_t)n, cudaMemcpyHostToDevice);
        operations[what](ranks, c, device, PIECE);
        cudaMemcpy(host, device, sizeof(float) * PIECE * (size_t)n, cudaMemcpyDeviceToHost);
        for (int i = 0; i < PIECE * n; i++) {
            bool mine = i / PIECE == ranks->rank;
            double expected = what == 2 ? i / PIECE + 1 : 0.5 * n * (n + 1);
            wrong += (what != 1 || mine) && (double)host[i] != expected;
        }
    }
    free(host);
    return ranks_max_int(ranks, wrong) == 0;
}

static void print_table(const Ranks *ranks, Collectives *c, void *values, int64_t largest) {
    static const char *const names[] = {"all-reduce", "reduce-scatter", "all-gather"};
    Operation operations[] = {all_reduce, reduce_scatter, all_gather};
    double others = (double)(ranks->size - 1) / ranks->size;
    if (ranks->rank == 0) {
        printf("%10s %16s %12s %12s\n", "MiB", "operation", "ms", "bus GB/s");
    }
    for (int64_t bytes = 1 << 20; bytes <= largest; bytes *= 4) {
        for (int i = 0; i < 3; i++) {
            int64_t piece = bytes / (int64_t)sizeof(float) / ranks->size;
            double ms = measure(ranks, c, operations[i], values, piece, bytes < 1 << 26 ? 50 : 20);
            double sent = (double)(piece * ranks->size) * sizeof(float) * others * (i == 0 ? 2 : 1);
            if (ranks->rank == 0) {
                printf("%10lld %16s %12.3f %12.1f\n", (long long)(bytes >> 20), names[i], ms, sent / ms / 1e6);
            }
        }
    }
}

int main(int argc, char **argv) {
    const int64_t largest = (int64_t)1 << 30;
    Ranks ranks;
    FoxError err;
    int devices = 0;
    void *values = NULL;
    err.text[0] = '\0';
    bool ok = ranks_init(&ranks, &argc, &argv, &err);
    if (ok) {
        ranks_patience(&ranks, 60, 0, 40, true); // exchanges that never end
        ranks_working(&ranks, 0);
        bool ready = ranks.size > 1 && cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 &&
                     cudaSetDevice(ranks.local_rank % devices) == cudaSuccess && cudaMalloc(&values, (size_t)largest) == cudaSuccess;
        ok = ranks_everyone(&ranks, ready || fox_fail(&err, "needs two ranks or more, and a GPU with 1 GiB free for each"), &err);
    }
    Collectives *c = ok ? collectives_open(&ranks, &err) : NULL;
    if (c != NULL) {
        ok = check_results(&ranks, c, values) || fox_fail(&err, "NCCL's results are wrong");
        print_table(&ranks, c, values, largest);
    }
    collectives_close(c);
    cudaFree(values);
    if (err.text[0] != '\0') {
        fprintf(stderr, "nccl_bandwidth: error: %s\n", err.text);
    }
    ranks_finish(&ranks);
    return ok && c != NULL ? 0 : 1;
}

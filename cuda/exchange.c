#include "exchange.h"

#define CUDA(x, call) check_cuda((x), (call), #call)
static void check_cuda(const Exchange *x, cudaError_t status, const char *call) {
    if (status != cudaSuccess) {
        ranks_fail(x->ranks, "%s: %s", call, cudaGetErrorString(status));
    }
}

bool exchange_open(Exchange *x, const Ranks *ranks, FoxError *err) {
    memset(x, 0, sizeof *x);
    x->ranks = ranks;
    if (ranks->size == 1) {
        return true;
    }
    x->net = collectives_open(ranks, err);
    return x->net != NULL;
}

int exchange_front(const Partition *p, bool sharded, int64_t matrices) {
    return sharded ? partition_find(p, matrices - 1) + 1 : 0;
}

static cudaEvent_t *new_events(const Exchange *x, int count, unsigned flags) {
    cudaEvent_t *events = FOX_NEW(cudaEvent_t, count);
    for (int i = 0; i < count; i++) {
        CUDA(x, cudaEventCreateWithFlags(&events[i], flags));
    }
    return events;
}

void exchange_prepare(Exchange *x, const Partition *partition, bool sharded, int64_t matrices, float *grads, bf16 *grads_bf16,
                      float *params, bf16 *params_bf16) {
    if (x->net == NULL) {
        return;
    }
    int least, greatest, n = partition->buckets;
    x->partition = *partition;
    x->sharded = sharded;
    x->matrices = matrices;
    x->front = exchange_front(partition, sharded, matrices);
    x->grads = grads;
    x->grads_bf16 = grads_bf16;
    x->params = params;
    x->params_bf16 = params_bf16;
    x->unsent = x->present = n;
    CUDA(x, cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA(x, cudaStreamCreateWithPriority(&x->stream, cudaStreamNonBlocking, greatest)); // what is ready to leave leaves at once
    CUDA(x, cudaEventCreateWithFlags(&x->computed, cudaEventDisableTiming));
    CUDA(x, cudaEventCreateWithFlags(&x->exchanged, cudaEventDisableTiming));
    x->came = new_events(x, n, cudaEventDisableTiming);
    x->gradient_time = new_events(x, 2 * n, cudaEventDefault);
    x->parameter_time[0] = new_events(x, 2 * n, cudaEventDefault);
    x->parameter_time[1] = new_events(x, 2 * n, cudaEventDefault);
    x->wait_time = new_events(x, 2 * (n + 1), cudaEventDefault);
}

static void free_events(cudaEvent_t *events, int count) {
    for (int i = 0; events != NULL && i < count; i++) {
        cudaEventDestroy(events[i]);
    }
    free(events);
}

void exchange_close(Exchange *x) {
    int n = x->partition.buckets;
    if (x->net == NULL) {
        return;
    }
    if (x->stream != NULL) {
        cudaStreamSynchronize(x->stream);
        cudaStreamDestroy(x->stream);
        cudaEventDestroy(x->computed);
        cudaEventDestroy(x->exchanged);
    }
    free_events(x->came, n);
    free_events(x->gradient_time, 2 * n);
    free_events(x->parameter_time[0], 2 * n);
    free_events(x->parameter_time[1], 2 * n);
    free_events(x->wait_time, 2 * (n + 1));
    collectives_close(x->net);
    memset(x, 0, sizeof *x);
}

void exchange_abandon(Exchange *x) {
    if (x->net != NULL) {
        collectives_abandon(x->net);
    }
}

/* `later` goes on when `earlier` has done what it holds now. */
static void follow(const Exchange *x, cudaStream_t later, cudaStream_t earlier, cudaEvent_t event) {
    CUDA(x, cudaEventRecord(event, earlier));
    CUDA(x, cudaStreamWaitEvent(later, event, 0));
}

/* The computing stream waits for an event, by the clock. */
static void await(Exchange *x, cudaEvent_t event, cudaStream_t compute) {
    cudaEvent_t *time = x->wait_time + 2 * x->waits++;
    CUDA(x, cudaEventRecord(time[0], compute));
    CUDA(x, cudaStreamWaitEvent(compute, event, 0));
    CUDA(x, cudaEventRecord(time[1], compute));
}

/* ---- gradients */

static void send_gradients(Exchange *x, int bucket) {
    const Partition *p = &x->partition;
    int64_t start = partition_start(p, bucket), piece = partition_piece_length(p, bucket), count = piece * p->ranks;
    int64_t mine = x->sharded ? x->ranks->rank * piece : 0;
    float *grads = x->grads + start;
    CollectiveType type = x->grads_bf16 != NULL ? COLLECTIVE_BF16 : COLLECTIVE_FLOAT;
    void *values = x->grads_bf16 != NULL ? (void *)x->grads_bf16 : (void *)grads;
    CUDA(x, cudaEventRecord(x->gradient_time[2 * bucket], x->stream));
    if (x->grads_bf16 != NULL) {
        cuda_to_bf16(x->grads_bf16, grads, count, x->stream);
    }
    if (x->sharded) {
        collectives_scatter_sum(x->net, values, piece, type, x->stream);
    } else {
        collectives_sum(x->net, values, count, type, x->stream);
    }
    if (x->grads_bf16 != NULL) {
        cuda_from_bf16(grads + mine, x->grads_bf16 + mine, x->sharded ? piece : count, x->stream);
    }
    CUDA(x, cudaEventRecord(x->gradient_time[2 * bucket + 1], x->stream));
}

void exchange_gradients(Exchange *x, int64_t from, cudaStream_t compute) {
    if (x->net == NULL || x->unsent == 0 || partition_start(&x->partition, x->unsent - 1) < from) {
        return;
    }
    follow(x, x->stream, compute, x->computed);
    while (x->unsent > 0 && partition_start(&x->partition, x->unsent - 1) >= from) {
        send_gradients(x, --x->unsent);
    }
}

void exchange_await_gradients(Exchange *x, cudaStream_t compute) {
    if (x->net != NULL) {
        CUDA(x, cudaEventRecord(x->exchanged, x->stream));
        await(x, x->exchanged, compute);
        x->unsent = x->partition.buckets;
    }
}

void exchange_numbers(Exchange *x, double *values, int count, cudaStream_t compute) {
    if (x->net != NULL) {
        follow(x, x->stream, compute, x->computed);
        collectives_sum(x->net, values, count, COLLECTIVE_DOUBLE, x->stream);
        follow(x, compute, x->stream, x->exchanged);
    }
}

/* ---- parameters */

static void gather_parameters(Exchange *x, int bucket) {
    const Partition *p = &x->partition;
    int64_t start = partition_start(p, bucket), piece = partition_piece_length(p, bucket), end = start + piece * p->ranks;
    cudaEvent_t *time = x->parameter_time[x->turn] + 2 * bucket;
    CUDA(x, cudaEventRecord(time[0], x->stream));
    if (bucket < x->front) {
        collectives_gather(x->net, x->params + start, piece, COLLECTIVE_FLOAT, x->stream);
        int64_t from = x->matrices > start ? x->matrices : start; // matrices that share a bucket with the embeddings
        if (from < end) {
            cuda_to_bf16(x->params_bf16 + from, x->params + from, end - from, x->stream);
        }
    } else {
        collectives_gather(x->net, x->params_bf16 + start, piece, COLLECTIVE_BF16, x->stream);
    }
    CUDA(x, cudaEventRecord(time[1], x->stream));
    CUDA(x, cudaEventRecord(x->came[bucket], x->stream));
}

void exchange_parameters(Exchange *x, cudaStream_t compute) {
    if (x->net == NULL || !x->sharded) {
        return;
    }
    follow(x, x->stream, compute, x->computed);
    x->turn = !x->turn;
    for (int k = 0; k < x->partition.buckets; k++) {
        gather_parameters(x, k);
    }
    x->present = 0;
}

void exchange_need(Exchange *x, int64_t until, cudaStream_t compute) {
    int bucket = x->net != NULL ? partition_find(&x->partition, until - 1) : -1;
    if (bucket >= x->present) { // buckets come in order: the last one is the last to come
        await(x, x->came[bucket], compute);
        x->present = bucket + 1;
    }
}

/* ---- clocks */

/* Milliseconds between pairs of events; those that were never recorded do not count. */
static double elapsed(const cudaEvent_t *pairs, int count) {
    double sum = 0;
    for (int i = 0; i < count; i++) {
        float ms;
        sum += cudaEventElapsedTime(&ms, pairs[2 * i], pairs[2 * i + 1]) == cudaSuccess ? (double)ms : 0;
    }
    cudaGetLastError(); // the refusals are not errors
    return sum;
}

void exchange_measure(Exchange *x, StepStats *stats) {
    const Partition *p = &x->partition;
    if (x->net == NULL) {
        return;
    }
    double others = (double)(p->ranks - 1) / p->ranks, front = (double)partition_start(p, x->front);
    double gradients = (double)p->padded * (x->grads_bf16 != NULL ? 2 : 4) * others;
    double parameters = (4 * front + 2 * ((double)p->padded - front)) * others;
    stats->exchanged = x->sharded ? gradients + parameters : 2 * gradients;
    stats->exchange_ms = elapsed(x->gradient_time, p->buckets) + elapsed(x->parameter_time[!x->turn], p->buckets);
    stats->exposed_ms = elapsed(x->wait_time, x->waits);
    x->waits = 0;
}

/* How the ranks' GPUs exchange gradients and parameters, bucket by bucket of the flat space (train/partition.h), on a stream of
 * its own beside what is computed.
 *
 *     computed    ... backward: layer L-1 | layer L-2 | ... | layer 0 | embeddings |norm| AdamW |forward: layer 0 | layer 1 ...
 *     exchanged                  gradients of the last bucket | ... | of bucket 0 |     | new parameters of bucket 0 | 1 | ...
 *
 * The flat space is laid out so that backward completes it from its end, and forward reads it from its beginning. Gradients are
 * summed on all ranks, or (sharded) scattered: each rank gets the sum of its piece. Parameters are only exchanged when
 * sharded: bf16, but for the front, the buckets with vectors and embeddings, which every rank keeps in float32.
 *
 * With one rank nothing is exchanged, and every call returns at once. */
#ifndef FOX_EXCHANGE_H
#define FOX_EXCHANGE_H

#include "collectives.h"
#include "launchers.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct Exchange {
    const Ranks *ranks;
    Collectives *net; /* NULL: one rank */
    cudaStream_t stream;
    cudaEvent_t computed, exchanged; /* one stream waits for the other */
    Partition partition;
    bool sharded;
    int front;        /* buckets that are gathered in float32 */
    int64_t matrices; /* from here on bf16 copies are in use */
    float *grads, *params; /* params: at least the front of the space */
    bf16 *params_bf16, *grads_bf16; /* grads_bf16: one bucket, where gradients travel in bf16; else NULL */

    int unsent;   /* gradients of buckets from here on are under way */
    int present;  /* parameters of buckets below it have come, as far as the computing stream has asked */
    cudaEvent_t *came; /* [buckets] their parameters have */

    /* Clocks: begin and end of each bucket of gradients and of parameters on this stream, [buckets, 2] (parameters of two steps,
     * which take turns, since they are still under way at a step's end), and of the waits of the computing stream,
     * [buckets + 1, 2]. */
    cudaEvent_t *gradient_time, *parameter_time[2], *wait_time;
    int turn, waits;
} Exchange;

/* Connects the ranks' GPUs. Collective. */
bool exchange_open(Exchange *, const Ranks *, FoxError *);
/* Buckets that hold a part of the front; 0 when not sharded. */
int exchange_front(const Partition *, bool sharded, int64_t matrices);
/* Says what is exchanged; the arrays have partition->padded elements (params of a sharded exchange: the front). */
void exchange_prepare(Exchange *, const Partition *, bool sharded, int64_t matrices, float *grads, bf16 *grads_bf16, float *params,
                      bf16 *params_bf16);
void exchange_close(Exchange *);
/* Gives up the sums and copies under way, without the other ranks; only exchange_close may follow. */
void exchange_abandon(Exchange *);

/* Gradients from element `from` on are complete as soon as `compute` has done what it holds now: they may leave. */
void exchange_gradients(Exchange *, int64_t from, cudaStream_t compute);
/* `compute` waits until all gradients have come. All must have been sent. */
void exchange_await_gradients(Exchange *, cudaStream_t compute);
/* Sums a few numbers over the ranks. */
void exchange_numbers(Exchange *, double *values, int count, cudaStream_t compute);
/* This rank's new parameters are complete as soon as `compute` has done what it holds now: they leave, others come. */
void exchange_parameters(Exchange *, cudaStream_t compute);
/* `compute` waits until the parameters of the first `until` elements have come. */
void exchange_need(Exchange *, int64_t until, cudaStream_t compute);

/* After a step's end on `compute`: what the gradients of this step and the parameters of the one before took. */
void exchange_measure(Exchange *, StepStats *);

#ifdef __cplusplus
}
#endif

#endif

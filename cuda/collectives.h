/* What GPUs of several ranks do together, through NCCL. Everything is enqueued on a stream, in the same order on all ranks.
 * Rows of a buffer lie one after the other: [ranks, piece]; every operation works in place. */
#ifndef FOX_COLLECTIVES_H
#define FOX_COLLECTIVES_H

#include <cuda_runtime_api.h>

#include "../train/ranks.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum CollectiveType { COLLECTIVE_FLOAT, COLLECTIVE_BF16, COLLECTIVE_DOUBLE } CollectiveType;

typedef struct Collectives Collectives;

/* Connects the current devices of all ranks, and has the watch look after them. NULL and an error when the program is built
 * without NCCL or two ranks have the same GPU; what NCCL itself reports ends all ranks. Collective. */
Collectives *collectives_open(const Ranks *, FoxError *);
/* Ends what is under way here, with wrong results, without the other ranks; only collectives_close may follow. */
void collectives_abandon(Collectives *);
/* Safe on NULL. */
void collectives_close(Collectives *);

/* values [count] = sum over the ranks, on all of them. */
void collectives_sum(Collectives *, void *values, int64_t count, CollectiveType, cudaStream_t);
/* Row r of the sum goes to rank r; the other rows are junk afterwards. */
void collectives_scatter_sum(Collectives *, void *values, int64_t piece, CollectiveType, cudaStream_t);
/* Every rank gives its own row and gets all rows. */
void collectives_gather(Collectives *, void *values, int64_t piece, CollectiveType, cudaStream_t);

#ifdef __cplusplus
}
#endif

#endif

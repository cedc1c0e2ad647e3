#include "collectives.h"

#ifdef FOX_NCCL

#include <nccl.h>

struct Collectives {
    const Ranks *ranks;
    ncclComm_t comm;
};

#define NCCL(c, call) check_nccl((c), (call), #call)
static void check_nccl(const Collectives *c, ncclResult_t status, const char *call) {
    if (status != ncclSuccess && status != ncclInProgress) {
        ranks_fail(c->ranks, "%s: %s (%s)", call, ncclGetErrorString(status), ncclGetLastError(c->comm));
    }
}

static size_t type_bytes(CollectiveType type) {
    return type == COLLECTIVE_DOUBLE ? 8 : type == COLLECTIVE_FLOAT ? 4 : 2;
}

static ncclDataType_t nccl_type(CollectiveType type) {
    return type == COLLECTIVE_DOUBLE ? ncclDouble : type == COLLECTIVE_FLOAT ? ncclFloat : ncclBfloat16;
}

/* For the watch: has a rank, or the way to it, failed meanwhile? */
static bool healthy(void *context, FoxError *err) {
    Collectives *c = (Collectives *)context;
    ncclResult_t state = ncclSuccess;
    ncclResult_t asked = ncclCommGetAsyncError(c->comm, &state);
    ncclResult_t worst = asked != ncclSuccess ? asked : state;
    return worst == ncclSuccess || worst == ncclInProgress ||
           fox_fail(err, "NCCL: %s (%s)", ncclGetErrorString(worst), ncclGetLastError(c->comm));
}

static void let_go(void *context) {
    ncclCommAbort(((Collectives *)context)->comm);
}

/* NCCL connects at the first use: so that its memory is taken before ours is counted. */
static void warm_up(Collectives *c) {
    int64_t piece = 1 << 20;
    void *values = NULL;
    if (cudaMalloc(&values, sizeof(float) * (size_t)(piece * c->ranks->size)) != cudaSuccess) {
        ranks_fail(c->ranks, "no GPU memory is left for NCCL");
    }
    cudaMemset(values, 0, sizeof(float) * (size_t)(piece * c->ranks->size));
    collectives_sum(c, values, piece * c->ranks->size, COLLECTIVE_FLOAT, NULL);
    collectives_scatter_sum(c, values, piece, COLLECTIVE_FLOAT, NULL);
    collectives_gather(c, values, piece, COLLECTIVE_BF16, NULL);
    collectives_sum(c, values, 2, COLLECTIVE_DOUBLE, NULL);
    cudaError_t status = cudaStreamSynchronize(NULL);
    if (status != cudaSuccess) {
        ranks_fail(c->ranks, "the first exchange between the GPUs: %s", cudaGetErrorString(status));
    }
    cudaFree(values);
}

/* Every rank needs a GPU of its own. */
static bool check_devices(const Ranks *ranks, FoxError *err) {
    int device = 0, count = 0;
    struct cudaDeviceProp mine;
    cudaGetDevice(&device);
    cudaGetDeviceCount(&count);
    cudaGetDeviceProperties(&mine, device);
    cudaUUID_t *all = FOX_NEW(cudaUUID_t, ranks->size);
    all[ranks->rank] = mine.uuid;
    ranks_gather(ranks, all, sizeof *all);
    bool ok = true;
    for (int r = 0; ok && r < ranks->rank; r++) {
        if (memcmp(&all[r], &mine.uuid, sizeof mine.uuid) == 0) {
            char other[96];
            ranks_name(ranks, r, other);
            ok = fox_fail(err, "the same GPU as %s: this machine shows %d for its %d ranks; start one rank for each GPU", other, count,
                          ranks->local_size);
        }
    }
    free(all);
    return ranks_everyone(ranks, ok, err);
}

Collectives *collectives_open(const Ranks *ranks, FoxError *err) {
    if (!check_devices(ranks, err)) {
        return NULL;
    }
    Collectives *c = FOX_NEW(Collectives, 1);
    ncclUniqueId id;
    c->ranks = ranks;
    memset(&id, 0, sizeof id);
    if (ranks->rank == 0) {
        NCCL(c, ncclGetUniqueId(&id));
    }
    ranks_broadcast(ranks, &id, sizeof id);
    NCCL(c, ncclCommInitRank(&c->comm, ranks->size, id, ranks->rank));
    RanksGuard guard = {c, healthy, let_go};
    ranks_guard(ranks, &guard);
    warm_up(c);
    return c;
}

void collectives_abandon(Collectives *c) {
    ranks_guard(c->ranks, NULL);
    ncclCommAbort(c->comm);
    c->comm = NULL;
}

void collectives_close(Collectives *c) {
    if (c != NULL) {
        ranks_guard(c->ranks, NULL);
        if (c->comm != NULL) {
            ncclCommDestroy(c->comm);
        }
        free(c);
    }
}

void collectives_sum(Collectives *c, void *values, int64_t count, CollectiveType type, cudaStream_t stream) {
    NCCL(c, ncclAllReduce(values, values, (size_t)count, nccl_type(type), ncclSum, c->comm, stream));
}

void collectives_scatter_sum(Collectives *c, void *values, int64_t piece, CollectiveType type, cudaStream_t stream) {
    char *mine = (char *)values + (size_t)(c->ranks->rank * piece) * type_bytes(type);
    NCCL(c, ncclReduceScatter(values, mine, (size_t)piece, nccl_type(type), ncclSum, c->comm, stream));
}

void collectives_gather(Collectives *c, void *values, int64_t piece, CollectiveType type, cudaStream_t stream) {
    char *mine = (char *)values + (size_t)(c->ranks->rank * piece) * type_bytes(type);
    NCCL(c, ncclAllGather(mine, values, (size_t)piece, nccl_type(type), c->comm, stream));
}

#else /* without NCCL there is none to call the others with */

Collectives *collectives_open(const Ranks *ranks, FoxError *err) {
    (void)ranks;
    fox_fail(err, "several GPUs need NCCL, and this program is built without it; install it (nccl.h, libnccl) and run make again");
    return NULL;
}

void collectives_abandon(Collectives *c) {
    (void)c;
}

void collectives_close(Collectives *c) {
    (void)c;
}

void collectives_sum(Collectives *c, void *values, int64_t count, CollectiveType type, cudaStream_t stream) {
    (void)c, (void)values, (void)count, (void)type, (void)stream;
}

void collectives_scatter_sum(Collectives *c, void *values, int64_t piece, CollectiveType type, cudaStream_t stream) {
    (void)c, (void)values, (void)piece, (void)type, (void)stream;
}

void collectives_gather(Collectives *c, void *values, int64_t piece, CollectiveType type, cudaStream_t stream) {
    (void)c, (void)values, (void)piece, (void)type, (void)stream;
}

#endif

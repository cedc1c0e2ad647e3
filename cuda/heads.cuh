/* How the kernels that work head by head divide a token: a team of lanes of one warp owns a head, eight columns a lane.
 *
 *     D = 64: 8 lanes, four heads a warp     D = 128: 16 lanes     D = 48: 8 lanes, of which 6 have columns
 *
 * A team has a power of two of lanes, so sums over a head are a few shuffles and need no barrier. A block is one row of
 * teams that walks down its tokens; blockIdx.y counts groups of heads where they do not fit in one block. */
#ifndef FOX_CUDA_HEADS_CUH
#define FOX_CUDA_HEADS_CUH

#include "common.cuh"

enum { HEAD_THREADS = 256 }; /* most threads of a block */

struct HeadGrid {
    int lanes;   /* of a team */
    int threads; /* of a block */
    int groups;  /* of heads */
};

static inline HeadGrid head_grid(int H, int D) {
    CUDA_REQUIRE(D % 16 == 0 && D > 0 && D <= 256, "the head width must be a multiple of 16, up to 256");
    HeadGrid grid = {2, 0, 0};
    while (8 * grid.lanes < D) {
        grid.lanes *= 2;
    }
    int heads = HEAD_THREADS / grid.lanes;
    grid.groups = (H + heads - 1) / heads;
    grid.threads = (int)fox_round_up((int64_t)(H + grid.groups - 1) / grid.groups * grid.lanes, 32);
    return grid;
}

/* The place of a thread. Lanes without columns take part in shuffles with zeros. */
struct HeadLane {
    int head;
    int within; /* first column, counted in the head */
    int column; /* first column, counted in the row */
    bool active, leader;
};

static __device__ __forceinline__ HeadLane head_lane(int lanes, int H, int D) {
    HeadLane at;
    int heads = blockDim.x / lanes;
    at.head = blockIdx.y * heads + threadIdx.x / lanes;
    at.within = threadIdx.x % lanes * 8;
    at.column = at.head * D + at.within;
    at.active = at.head < H && at.within < D;
    at.leader = at.active && at.within == 0;
    return at;
}

static __device__ __forceinline__ float team_sum(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, step);
    }
    return x;
}

#endif

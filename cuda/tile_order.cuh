/* The order in which tiles of attention are taken. Part of acp_attention.cuh. */
#ifndef FOX_CUDA_TILE_ORDER_CUH
#define FOX_CUDA_TILE_ORDER_CUH

/* The order in which thread blocks start: the longest first, else a long one that starts last is waited for; among
 * equals, neighbours of one head, which share keys and values in the cache. Sorted by length in 64 levels, stable.
 * rows: in a tile, as in AcpSaved.order, multiples of 64, so that a tile may begin in the middle of a block. */
struct AcpOrder {
    int T, blocks, BH, rows[3];
    AcpSaved saved;

    __device__ int tiles(int which) const {
        return (T + rows[which] - 1) / rows[which];
    }
    /* Blocks that tile i has to visit, less one. */
    __device__ int length(int which, int i) const {
        int row = i / tiles(which) * blocks, start = i % tiles(which) * rows[which];
        int own[2] = {start / ACP_BLOCK, (min(T, start + rows[which]) - 1) / ACP_BLOCK}; /* first and last block */
        return which == 1 ? saved.last[row + own[1]] - own[0] : own[1] - saved.first[row + own[0]];
    }
};

/* A counting sort: every warp has one stretch of tiles, and a column of `place`: how many of its tiles have a level,
 * then where the next of them goes. grid (3), 1024 threads */
static __global__ void __launch_bounds__(1024) acp_order_kernel(const __grid_constant__ AcpOrder o) {
    enum { LEVELS = 64, WARPS = 32, AHEAD = 4 };
    __shared__ int place[LEVELS][WARPS + 1], scratch[WARPS]; /* a word more: levels of a warp in different banks */
    int which = blockIdx.x, count = o.BH * o.tiles(which), tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int stretch = (count + 1023) / 1024 * 32, begin = warp * stretch, end = min(begin + stretch, count);
    /* Takes a place for every tile of this warp, in their order: use(tile, place). */
    auto take_places = [&](auto use) {
        for (int i0 = begin; i0 < end; i0 += 32 * AHEAD) {
            int levels[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) { /* looked up together: all on their way before the first is waited for */
                int i = i0 + 32 * a + lane, level = o.length(which, min(i, end - 1)) * LEVELS / o.blocks;
                levels[a] = i < end ? level : -1;
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                int level = levels[a];
                unsigned same = __match_any_sync(0xffffffffu, level), before = same & ((1u << lane) - 1);
                int at = level >= 0 ? place[level][warp] : 0;
                __syncwarp();
                if (level >= 0) {
                    use(i0 + 32 * a + lane, at + __popc(before));
                }
                if (level >= 0 && before == 0) {
                    place[level][warp] = at + __popc(same);
                }
                __syncwarp();
            }
        }
    };
    place[warp][lane] = place[warp + 32][lane] = 0;
    acp_begin();
    if (tid == 0) {
        o.saved.next[which] = 0;
    }
    __syncthreads();
    take_places([](int, int) {});
    __syncthreads();
    /* where each begins: two numbers a thread, from the longest level's first warp on */
    int *own = &place[LEVELS - 1 - tid / 16][tid % 16 * 2], counts[2] = {own[0], own[1]};
    int end_of_own = acp_block_scan(counts[0] + counts[1], scratch, AcpAdd());
    own[1] = end_of_own - counts[1];
    own[0] = own[1] - counts[0];
    __syncthreads();
    take_places([&](int tile, int at) { o.saved.order[which][at] = tile; });
}

#endif

/* CUDA on a CPU, so that a machine without a GPU can test kernels: they are compiled as C++, and the threads of a block
 * take turns as coroutines, each running until it has to wait for others.
 *
 *     #include "emulated_gpu.h"             the language and the runtime: keywords, threadIdx, shuffles, launches
 *     #include "emulated_instructions.h"    instead of cuda/mma.cuh and cuda/hopper.cuh: what stands there as assembly
 *     #include "../acp_attention.cuh"       as it is
 *
 * Tests logic and arithmetic, and finds threads that wait for ever. It cannot find races: one thread runs at a time, and a
 * copy or a product is done where it is issued. Blocks run one after the other; float32 sums are in another order. */
#ifndef FOX_TESTS_EMULATED_GPU_H
#define FOX_TESTS_EMULATED_GPU_H

#include <cuda_runtime.h>
#include <cuda_bf16.h>

#include <cstring>
#include <functional>
#include <setjmp.h>
#include <ucontext.h>

#include "../train/common.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ thread_local /* a block has all of it, and there is one thread of the CPU */
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

/* Shared memory whose size a launch gives; kernels declare it by these names. */
alignas(1024) thread_local unsigned char memory[232448];
thread_local double begins[sizeof memory / sizeof(double)];

namespace emulated {

enum { WARP = 32, MOST_THREADS = 1024, STACK = 256 << 10, NAMED_BARRIERS = 16 };

/* Threads that meet: the last one to arrive lets all go on. */
struct Meeting {
    int arrived, round;
};

/* The block that runs. */
struct Block {
    jmp_buf scheduler, context[MOST_THREADS]; /* unlike swapcontext, jumps make no system calls */
    bool ended[MOST_THREADS];
    int threads, current, left, rounds;
    int64_t events, before; /* that others may wait for; at the start of this round */
    Meeting all, warp[MOST_THREADS / WARP], named[NAMED_BARRIERS];
    uint64_t exchange[2][MOST_THREADS]; /* by turns: what is read may not be written yet */
    std::function<void()> kernel;
};

static Block *block;

/* Lets the other threads run until `ready`. */
template <typename Ready>
static void wait_until(Ready ready) {
    while (!ready()) {
        if (_setjmp(block->context[block->current]) == 0) {
            _longjmp(block->scheduler, 1);
        }
    }
}

/* Counts this thread; goes on at once. threads: that meet. */
static void arrive(Meeting *m, int threads) {
    block->events++;
    if (++m->arrived == threads) {
        m->arrived = 0;
        m->round++;
    }
}

/* Counts this thread and waits for the others. */
static void meet(Meeting *m, int threads) {
    int round = m->round;
    arrive(m, threads);
    wait_until([=] { return m->round != round; });
}

/* A thread from begin to end, on its own stack; never returns. */
static void run_thread(void) {
    block->kernel();
    block->events++;
    block->left--;
    block->ended[block->current] = true;
    _longjmp(block->scheduler, 1);
}

/* Begins the current thread on a stack of STACK bytes; never returns: the scheduler goes on where it was set. */
static void begin_thread(char *stack) {
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack;
    start.uc_stack.ss_size = STACK;
    start.uc_link = NULL;
    makecontext(&start, run_thread, 0);
    setcontext(&start);
}

/* Runs all threads to their end. stacks: STACK bytes for each. */
static void run_block(char *stacks) {
    memset(memory, 0xff, sizeof memory); /* not numbers, where a kernel reads what it has not written */
    memset(begins, 0xff, sizeof begins);
    memset(&block->all, 0, sizeof block->all);
    memset(block->warp, 0, sizeof block->warp);
    memset(block->named, 0, sizeof block->named);
    memset(block->ended, 0, sizeof block->ended);
    block->left = block->threads;
    for (block->rounds = 0; block->left > 0; block->rounds++) {
        block->before = block->events;
        for (block->current = 0; block->current < block->threads; block->current++) {
            if (block->ended[block->current]) {
                continue;
            }
            threadIdx.x = (unsigned)block->current;
            if (_setjmp(block->scheduler) == 0) {
                if (block->rounds == 0) {
                    begin_thread(stacks + (size_t)block->current * STACK);
                }
                _longjmp(block->context[block->current], 1);
            }
        }
        if (block->left > 0 && block->events == block->before) {
            fox_die("block %u: %d threads wait for what never comes", blockIdx.x, block->left);
        }
    }
}

/* cudaLaunchKernelEx: runs every block to its end, one after the other. One-dimensional blocks, two-dimensional grids; fox_die
 * where the launch is larger than a block may be, or its threads wait for ever. */
template <typename... Parameters, typename... Args>
static cudaError_t launch(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...), const Args &...args) {
    static char *stacks = FOX_NEW(char, (int64_t)MOST_THREADS * STACK); /* only what is used takes memory */
    Block running;
    block = &running;
    block->threads = (int)config->blockDim.x;
    block->events = 0;
    block->kernel = [&] { kernel(args...); };
    blockDim = config->blockDim;
    gridDim = config->gridDim;
    if (block->threads > MOST_THREADS || config->dynamicSmemBytes > sizeof memory) {
        fox_die("a launch of %d threads and %zu bytes of shared memory", block->threads, config->dynamicSmemBytes);
    }
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++) {
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
            run_block(stacks);
        }
    }
    return cudaSuccess;
}

/* A value of every lane of a warp. */
template <typename Value>
struct Lanes {
    Value of[WARP];
};

/* What every lane of this warp calls it with; all 32 must call it. */
template <typename Value>
static Lanes<Value> gather(const Value &x) {
    static_assert(sizeof(Value) <= sizeof(uint64_t), "values of at most 8 bytes expected");
    Lanes<Value> lanes;
    Meeting *warp = &block->warp[block->current / WARP];
    uint64_t *exchange = block->exchange[warp->round % 2];
    memcpy(&exchange[block->current], &x, sizeof x);
    meet(warp, WARP);
    for (int i = 0; i < WARP; i++) {
        memcpy(&lanes.of[i], &exchange[block->current / WARP * WARP + i], sizeof x);
    }
    return lanes;
}

static int lane(void) {
    return block->current % WARP;
}

/* What cudaFuncGetAttributes says of kernels for Hopper. */
static cudaError_t attributes(cudaFuncAttributes *found) {
    found->ptxVersion = 90;
    found->numRegs = 255;
    return cudaSuccess;
}

} /* namespace emulated */

/* ---- the runtime ---- */

#define cudaLaunchKernelEx emulated::launch
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaFuncGetAttributes(found, kernel) emulated::attributes(found)
#define cudaGetDevice(device) (*(device) = 0, cudaSuccess)
#define cudaDeviceGetAttribute(value, attribute, device) \
    ((void)(device), *(value) = (attribute) == cudaDevAttrMultiProcessorCount ? 2 : 101376, cudaSuccess) /* or bytes */
#define cudaGetErrorString(status) "an error"

/* ---- what device code has ---- */

static inline void __syncthreads(void) {
    emulated::meet(&emulated::block->all, emulated::block->threads);
}

static inline void __threadfence(void) {
}

static inline int __syncthreads_or(int x) {
    static int any;
    __syncthreads();
    any = 0;
    __syncthreads();
    any |= x;
    __syncthreads();
    return any != 0;
}

static inline void __syncwarp(void) {
    emulated::gather(0);
}

template <typename Value>
static Value __shfl_sync(unsigned, Value x, int from) {
    return emulated::gather(x).of[from % emulated::WARP];
}

template <typename Value>
static Value __shfl_xor_sync(unsigned, Value x, int mask) {
    return emulated::gather(x).of[emulated::lane() ^ mask];
}

template <typename Value>
static Value __shfl_up_sync(unsigned, Value x, int step) {
    int lane = emulated::lane();
    return emulated::gather(x).of[lane >= step ? lane - step : lane];
}

static inline int __any_sync(unsigned, int x) {
    int any = 0;
    for (int y : emulated::gather(x).of) {
        any |= y;
    }
    return any;
}

static inline unsigned __ballot_sync(unsigned, int x) {
    unsigned lanes = 0;
    auto all = emulated::gather(x);
    for (int i = 0; i < emulated::WARP; i++) {
        lanes |= (unsigned)(all.of[i] != 0) << i;
    }
    return lanes;
}

static inline unsigned __match_any_sync(unsigned, int x) {
    unsigned same = 0;
    auto all = emulated::gather(x);
    for (int i = 0; i < emulated::WARP; i++) {
        same |= (unsigned)(all.of[i] == x) << i;
    }
    return same;
}

static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}

static inline int __ffs(int x) {
    return __builtin_ffs(x);
}

static inline unsigned __reduce_add_sync(unsigned, unsigned x) {
    unsigned sum = 0;
    for (unsigned y : emulated::gather(x).of) {
        sum += y;
    }
    return sum;
}

static inline unsigned atomicInc(unsigned *p, unsigned most) {
    unsigned old = *p;
    *p = old >= most ? 0 : old + 1;
    return old;
}

template <typename Value>
static Value atomicAdd(Value *p, Value x) {
    Value old = *p;
    *p += x;
    return old;
}

/* the C library has functions of its own by these names */
#define __expf(x) expf(x)
#define __logf(x) logf(x)

static inline float __fdividef(float x, float y) {
    return x / y;
}

static inline float rsqrtf(float x) {
    return 1 / sqrtf(x);
}

static inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}

static inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, sizeof y);
    return y;
}

template <typename Value>
static Value __ldcg(const Value *p) {
    return *p;
}

static inline int min(int a, int b) {
    return a < b ? a : b;
}

static inline int max(int a, int b) {
    return a > b ? a : b;
}

#endif

/* Cumulative sums in double, over few long rows: of log gates forward, of their gradients backward. Part of acp_attention.cuh. */
#ifndef FOX_CUDA_GATE_SUMS_CUH
#define FOX_CUDA_GATE_SUMS_CUH

/* Result of `combine` over threads 0..tid of a block (inclusive); scratch: a value for each warp. */
template <typename Value, typename Combine>
static __device__ __forceinline__ Value acp_block_scan(Value x, Value *scratch, Combine combine) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        Value before = __shfl_up_sync(0xffffffffu, x, step);
        x = lane >= step ? combine(before, x) : x;
    }
    __syncthreads();
    if (lane == 31) {
        scratch[warp] = x;
    }
    __syncthreads();
    if (warp > 0) {
        Value before = scratch[0];
        for (int w = 1; w < warp; w++) {
            before = combine(before, scratch[w]);
        }
        x = combine(before, x);
    }
    return x;
}

struct AcpAdd {
    template <typename Value>
    __device__ Value operator()(Value a, Value b) const {
        return a + b;
    }
};

struct AcpMin {
    __device__ int operator()(int a, int b) const {
        return a < b ? a : b;
    }
};

/* What is summed: log f from the start (c), or dc from the end (d log f). */
struct AcpScan {
    int T, blocks;
    const float *log_f, *dc;
    AcpSaved saved;
    AcpWork work;
    float *dlog_f;
};

/* Element e of what is summed; backward they are counted from the end. */
template <bool BACKWARD>
static __device__ __forceinline__ double acp_scan_value(const AcpScan &s, int64_t bh, int e) {
    if (e >= s.T) {
        return 0;
    }
    return (double)(BACKWARD ? s.dc[bh * s.blocks * ACP_BLOCK + s.T - 1 - e] : s.log_f[bh * s.T + e]);
}

/* This thread's share of the sum of x[0 .. count), read 16 bytes at a time where they are aligned. */
static __device__ __forceinline__ double acp_share_of_sum(const float *x, int count) {
    int tid = threadIdx.x, odd = min(count, (int)(-(uintptr_t)x / sizeof(float) % 4));
    double sum = tid < odd ? (double)x[tid] : 0.0;
    const float4 *fours = reinterpret_cast<const float4 *>(x + odd);
    count -= odd;
#pragma unroll 16
    for (int i = tid; i < count / 4; i += 256) {
        float4 y = fours[i];
        sum += ((double)y.x + (double)y.y) + ((double)y.z + (double)y.w);
    }
    return sum + (tid < count % 4 ? (double)x[odd + count - 1 - tid] : 0.0);
}

/* Forward: c, base, lift and work.edges, and a clean slate for the search of `tight`. Backward: d log f. A thread block of 256
 * writes one chunk, and adds up all before it by itself: that costs less than waiting for others. */
template <bool BACKWARD>
static __device__ __forceinline__ void acp_scan_chunk(const AcpScan &s) {
    enum { EACH = ACP_CHUNK / 256 }; /* elements of a thread, neighbours */
    __shared__ double scratch[8], values[ACP_CHUNK + 256], start;
    auto value = [&](int i) -> double & {
        return values[i + i / EACH]; /* so that threads meet in different banks */
    };
    int64_t bh = blockIdx.y;
    int e0 = blockIdx.x * ACP_CHUNK, tid = threadIdx.x;
    double own = 0;
#pragma unroll
    for (int i = tid; i < ACP_CHUNK; i += 256) {
        value(i) = acp_scan_value<BACKWARD>(s, bh, e0 + i);
    }
    const float *earlier = BACKWARD ? s.dc + bh * s.blocks * ACP_BLOCK + s.T - e0 : s.log_f + bh * s.T;
    double before = acp_block_scan(acp_share_of_sum(earlier, e0), scratch, AcpAdd());
    if (tid == 255) {
        start = before;
    }
    for (int i = 0; i < EACH; i++) {
        own += value(tid * EACH + i);
    }
    double sum = acp_block_scan(own, scratch, AcpAdd()) - own;
    sum += start; /* written before the barriers of the scan */
    for (int i = 0; i < EACH; i++) {
        sum += value(tid * EACH + i);
        value(tid * EACH + i) = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = tid; i < ACP_CHUNK; i += 256) {
        int e = e0 + i;
        if (BACKWARD) {
            if (e < s.T) {
                s.dlog_f[bh * s.T + s.T - 1 - e] = (float)value(i);
            }
            continue;
        }
        double block_start = value(i / ACP_BLOCK * ACP_BLOCK);
        if (e < s.T) {
            s.saved.c[bh * s.T + e] = value(i);
        }
        if (e < s.blocks * ACP_BLOCK) {
            s.saved.lift[bh * s.blocks * ACP_BLOCK + e] =
                e < s.T ? (float)((block_start - value(i)) * ACP_LOG2E) : 0.0f;
        }
        if (i % ACP_BLOCK == 0 && e < s.T) {
            double base = block_start * ACP_LOG2E;
            int64_t block = bh * s.blocks + e / ACP_BLOCK;
            s.saved.base[block] = make_float2((float)base, (float)(base - (double)(float)base));
            s.work.edges[block] = make_double2(block_start, value(min(i + ACP_BLOCK, s.T - e0) - 1));
            s.work.key_stats[block] = ACP_UNDESCRIBED;
        }
    }
}

/* grid (chunks, BH), 256 threads */
static __global__ void __launch_bounds__(256) acp_sum_dc_kernel(AcpScan s) {
    acp_begin();
    acp_scan_chunk<true>(s);
}

#endif

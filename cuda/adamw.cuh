/* The end of a step: norm of the gradient, clipping, and AdamW (Loshchilov, Hutter 2019), all decided on the device.
 *
 *     norm = sqrt(sum g^2) in double;  applied = loss and norm are finite;  grad_scale = min(1, clip / norm)
 *     g = grad * grad_scale,  m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
 *     p = p (1 - lr * decay) - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps),  then grad = 0
 *
 * The norm reads 4 bytes a parameter, the update moves 34: p, m, v and the gradient in and out, and the bf16 copy. */
#ifndef FOX_CUDA_ADAMW_CUH
#define FOX_CUDA_ADAMW_CUH

#include "common.cuh"

enum { SQUARES_BLOCKS = 1056, SQUARES_THREADS = 256 };
enum { ADAMW_THREADS = 256 };

/* Sum of x over the block, valid in thread 0; the order is fixed. */
static __device__ __forceinline__ double block_sum_double(double x) {
    __shared__ double sums[SQUARES_THREADS];
    sums[threadIdx.x] = x;
    for (int half = SQUARES_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
        }
    }
    return sums[0];
}

static __global__ void squares_kernel(double *partials, const float *x, int64_t count) {
    double sum = 0;
    int64_t thread = (int64_t)blockIdx.x * SQUARES_THREADS + threadIdx.x,
            threads = (int64_t)SQUARES_BLOCKS * SQUARES_THREADS;
#pragma unroll 4
    for (int64_t i = thread; i < count / 4; i += threads) {
        float4 v = reinterpret_cast<const float4 *>(x)[i];
        sum += (double)v.x * v.x + (double)v.y * v.y + ((double)v.z * v.z + (double)v.w * v.w);
    }
    if (thread < count % 4) {
        double last = x[count / 4 * 4 + thread];
        sum += last * last;
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = sum;
    }
}

/* stats->squares += the partial sums, in a fixed order. */
static __global__ void add_squares_kernel(DeviceStats *stats, const double *partials) {
    double sum = 0;
    for (int i = threadIdx.x; i < SQUARES_BLOCKS; i += SQUARES_THREADS) {
        sum += partials[i];
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) {
        stats->squares += sum;
    }
}

static __global__ void clip_kernel(DeviceStats *stats, double grad_clip) {
    double norm = sqrt(stats->squares);
    stats->grad_norm = norm;
    stats->grad_scale = (float)(grad_clip > 0 && norm > grad_clip ? grad_clip / norm : 1.0);
    stats->applied = isfinite(norm) && isfinite(stats->loss);
}

/* The numbers of one step in the precision of the update. */
struct AdamWStep {
    float beta1, beta2, rate, v_scale, eps, shrink; /* shrink: what decay takes of a parameter */
};

static __device__ __forceinline__ void adamw_one(float &p, float &m, float &v, float grad, float grad_scale,
                                                 float keep, const AdamWStep &step) {
    float g = grad * grad_scale;
    m = step.beta1 * m + (1 - step.beta1) * g;
    v = step.beta2 * v + (1 - step.beta2) * g * g;
    p = p * keep - step.rate * m / (sqrtf(v * step.v_scale) + step.eps);
}

/* Four parameters a thread. Of the last ones there may be fewer. */
static __global__ void __launch_bounds__(ADAMW_THREADS)
    adamw_kernel(float *params, bf16 *params_bf16, float *m, float *v, float *grads, int64_t count, int64_t decay_from,
                 AdamWStep step, const DeviceStats *stats) {
    int64_t i = 4 * ((int64_t)blockIdx.x * ADAMW_THREADS + threadIdx.x);
    bool applied = stats->applied != 0;
    float grad_scale = stats->grad_scale, keep = i >= decay_from ? 1 - step.shrink : 1.0f;
    if (i + 4 <= count) {
        if (applied) {
            float4 p4 = *reinterpret_cast<float4 *>(params + i), m4 = *reinterpret_cast<float4 *>(m + i);
            float4 v4 = *reinterpret_cast<float4 *>(v + i), g4 = *reinterpret_cast<float4 *>(grads + i);
            adamw_one(p4.x, m4.x, v4.x, g4.x, grad_scale, keep, step);
            adamw_one(p4.y, m4.y, v4.y, g4.y, grad_scale, keep, step);
            adamw_one(p4.z, m4.z, v4.z, g4.z, grad_scale, keep, step);
            adamw_one(p4.w, m4.w, v4.w, g4.w, grad_scale, keep, step);
            *reinterpret_cast<float4 *>(params + i) = p4;
            *reinterpret_cast<float4 *>(m + i) = m4;
            *reinterpret_cast<float4 *>(v + i) = v4;
            __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(p4.x, p4.y), __floats2bfloat162_rn(p4.z, p4.w)};
            *reinterpret_cast<uint2 *>(params_bf16 + i) = *reinterpret_cast<uint2 *>(pair);
        }
        *reinterpret_cast<float4 *>(grads + i) = make_float4(0, 0, 0, 0);
        return;
    }
    for (; i < count; i++) {
        if (applied) {
            adamw_one(params[i], m[i], v[i], grads[i], grad_scale, keep, step);
            params_bf16[i] = __float2bfloat16(params[i]);
        }
        grads[i] = 0;
    }
}

/* float32 to bf16, or back. */
template <typename Out, typename In>
static __global__ void convert_kernel(Out *out, const In *in, int64_t count) {
    int64_t i = 8 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i + 8 <= count) {
        float x[8];
        load8(x, in + i);
        store8(out + i, x);
    } else {
        for (; i < count; i++) {
            out[i] = (Out)(float)in[i];
        }
    }
}

/* ---- launchers ---- */

int64_t cuda_norm_squares_scratch(void) {
    return SQUARES_BLOCKS;
}

void cuda_add_squares(DeviceStats *stats, double *scratch, const float *grads, int64_t count, cudaStream_t stream) {
    squares_kernel<<<SQUARES_BLOCKS, SQUARES_THREADS, 0, stream>>>(scratch, grads, count);
    CUDA_CHECK_LAUNCH();
    add_squares_kernel<<<1, SQUARES_THREADS, 0, stream>>>(stats, scratch);
    CUDA_CHECK_LAUNCH();
}

void cuda_clip(DeviceStats *stats, double grad_clip, cudaStream_t stream) {
    clip_kernel<<<1, 1, 0, stream>>>(stats, grad_clip);
    CUDA_CHECK_LAUNCH();
}

void cuda_adamw(float *params, bf16 *params_bf16, float *m, float *v, float *grads, int64_t count, int64_t decay_from,
                const AdamW *adamw, const DeviceStats *stats, cudaStream_t stream) {
    double correct_m = 1 - pow(adamw->beta1, (double)adamw->step),
           correct_v = 1 - pow(adamw->beta2, (double)adamw->step);
    AdamWStep step = {(float)adamw->beta1,    (float)adamw->beta2, (float)(adamw->learning_rate / correct_m),
                      (float)(1 / correct_v), (float)adamw->eps,   (float)(adamw->learning_rate * adamw->weight_decay)};
    int64_t block = 4 * ADAMW_THREADS;
    CUDA_REQUIRE(count > 0 && decay_from % 4 == 0, "weight decay begins at a multiple of 4 parameters");
    adamw_kernel<<<(unsigned)((count + block - 1) / block), ADAMW_THREADS, 0, stream>>>(
        params, params_bf16, m, v, grads, count, decay_from, step, stats);
    CUDA_CHECK_LAUNCH();
}

void cuda_to_bf16(bf16 *out, const float *in, int64_t count, cudaStream_t stream) {
    convert_kernel<<<(unsigned)((count + 2047) / 2048), 256, 0, stream>>>(out, in, count);
    CUDA_CHECK_LAUNCH();
}

void cuda_from_bf16(float *out, const bf16 *in, int64_t count, cudaStream_t stream) {
    convert_kernel<<<(unsigned)((count + 2047) / 2048), 256, 0, stream>>>(out, in, count);
    CUDA_CHECK_LAUNCH();
}

#endif

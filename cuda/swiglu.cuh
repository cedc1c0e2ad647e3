/* SwiGLU: out = silu(g) * u, silu(x) = x * sigmoid(x); each row of gu [N, 2F] holds g, then u.
 *
 *     backward   dg = dout * u * s * (1 + g * (1 - s)),  du = dout * g * s,  s = sigmoid(g)
 *
 * bf16 in and out, eight columns a thread. Per token and inner column: forward 6 bytes, backward 10. */
#ifndef FOX_CUDA_SWIGLU_CUH
#define FOX_CUDA_SWIGLU_CUH

#include "common.cuh"

enum { SWIGLU_ROWS = 2, SWIGLU_THREADS = 512 }; /* rows in flight in a block, and most threads of one */

static __global__ void swiglu_forward_kernel(bf16 *out, const bf16 *gu, int64_t N, int F) {
    int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    int64_t first = (int64_t)blockIdx.x * SWIGLU_ROWS;
    Bf16x8 gate[SWIGLU_ROWS], up[SWIGLU_ROWS];
#pragma unroll
    for (int r = 0; r < SWIGLU_ROWS; r++) {
        bool wanted = column < F && first + r < N;
        const bf16 *row = gu + (first + r) * 2 * F + column;
        gate[r] = load_raw8(row, wanted);
        up[r] = load_raw8(row + F, wanted);
    }
#pragma unroll
    for (int r = 0; r < SWIGLU_ROWS; r++) {
        if (column < F && first + r < N) {
            float g[8], u[8];
            unpack8(g, gate[r]);
            unpack8(u, up[r]);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                u[i] *= g[i] * device_sigmoid(g[i]);
            }
            store8(out + (first + r) * F + column, u);
        }
    }
}

static __global__ void swiglu_backward_kernel(bf16 *dgu, const bf16 *dout, const bf16 *gu, int64_t N, int F) {
    int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    int64_t first = (int64_t)blockIdx.x * SWIGLU_ROWS;
    Bf16x8 gate[SWIGLU_ROWS], up[SWIGLU_ROWS], grad[SWIGLU_ROWS];
#pragma unroll
    for (int r = 0; r < SWIGLU_ROWS; r++) {
        bool wanted = column < F && first + r < N;
        const bf16 *row = gu + (first + r) * 2 * F + column;
        gate[r] = load_raw8(row, wanted);
        up[r] = load_raw8(row + F, wanted);
        grad[r] = load_raw8(dout + (first + r) * F + column, wanted);
    }
#pragma unroll
    for (int r = 0; r < SWIGLU_ROWS; r++) {
        if (column < F && first + r < N) {
            float g[8], u[8], dy[8];
            unpack8(g, gate[r]);
            unpack8(u, up[r]);
            unpack8(dy, grad[r]);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float s = device_sigmoid(g[i]), dg = dy[i] * u[i] * s * (1 + g[i] * (1 - s));
                u[i] = dy[i] * g[i] * s;
                g[i] = dg;
            }
            bf16 *row = dgu + (first + r) * 2 * F + column;
            store8(row, g);
            store8(row + F, u);
        }
    }
}

/* ---- launchers ---- */

/* Blocks along the rows and along the columns, and threads: the columns are split evenly. */
static inline int swiglu_shape(dim3 *grid, int64_t N, int F) {
    int pieces = (F / 8 + SWIGLU_THREADS - 1) / SWIGLU_THREADS;
    *grid = dim3((unsigned)((N + SWIGLU_ROWS - 1) / SWIGLU_ROWS), (unsigned)pieces);
    return (int)fox_round_up((F / 8 + pieces - 1) / pieces, 32);
}

void cuda_swiglu_forward(bf16 *out, const bf16 *gu, int64_t N, int F, cudaStream_t stream) {
    CUDA_REQUIRE(F % 8 == 0 && F > 0, "the inner width must be a multiple of 8");
    dim3 grid;
    int threads = swiglu_shape(&grid, N, F);
    swiglu_forward_kernel<<<grid, threads, 0, stream>>>(out, gu, N, F);
    CUDA_CHECK_LAUNCH();
}

void cuda_swiglu_backward(bf16 *dgu, const bf16 *dout, const bf16 *gu, int64_t N, int F, cudaStream_t stream) {
    CUDA_REQUIRE(F % 8 == 0 && F > 0, "the inner width must be a multiple of 8");
    dim3 grid;
    int threads = swiglu_shape(&grid, N, F);
    swiglu_backward_kernel<<<grid, threads, 0, stream>>>(dgu, dout, gu, N, F);
    CUDA_CHECK_LAUNCH();
}

#endif

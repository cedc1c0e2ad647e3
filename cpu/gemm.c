#include "gemm.h"

#include "../train/common.h"

/* A tile of C, MB x NB, is computed from panels of A and B that are first copied ("packed") into the order in which the
 * kernel reads them, KB columns of A at a time. The kernel keeps an MR x NR piece of C in vector registers: MR rows by
 * two vectors. MR is what the register file of each instruction set holds. */
#if defined(__AVX512F__)
enum { LANES = 16, MR = 12 };
#elif defined(__AVX__)
enum { LANES = 8, MR = 6 };
#else
enum { LANES = 4, MR = 4 };
#endif
enum { NR = 2 * LANES, MB = 8 * MR, NB = 256, KB = 256 };

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVector __attribute__((vector_size(LANES * 4), aligned(4)));

/* Copies rows x K of a view into panels of `width` rows, k-major inside a panel, zeros past the last row. */
static void pack(MatrixView m, int64_t rows, int64_t K, int width, float *out) {
    for (int64_t r0 = 0; r0 < rows; r0 += width) {
        int64_t n = fox_min64(width, rows - r0);
        for (int64_t r = 0; r < width; r++) {
            const float *source = m.data + (r0 + r) * m.row;
            if (r < n) {
                for (int64_t k = 0; k < K; k++) {
                    out[k * width + r] = source[k * m.col];
                }
            } else {
                for (int64_t k = 0; k < K; k++) {
                    out[k * width + r] = 0;
                }
            }
        }
        out += K * width;
    }
}

/* The same where neighbouring rows of the panel are neighbours in memory (m.row == 1): copies along them. */
static void pack_contiguous(MatrixView m, int64_t rows, int64_t K, int width, float *out) {
    for (int64_t r0 = 0; r0 < rows; r0 += width) {
        int64_t n = fox_min64(width, rows - r0);
        for (int64_t k = 0; k < K; k++) {
            const float *source = m.data + r0 + k * m.col;
            for (int64_t r = 0; r < n; r++) {
                out[k * width + r] = source[r];
            }
            for (int64_t r = n; r < width; r++) {
                out[k * width + r] = 0;
            }
        }
        out += K * width;
    }
}

static void pack_panels(MatrixView m, int64_t rows, int64_t K, int width, float *out) {
    if (m.row == 1) {
        pack_contiguous(m, rows, K, width, out);
    } else {
        pack(m, rows, K, width, out);
    }
}

/* acc[MR][NR] = A panel (K x MR) times B panel (K x NR). */
static void kernel(int64_t K, const float *a, const float *b, float *acc) {
    Vector c[MR][2] = {{{0}}};
    for (int64_t k = 0; k < K; k++) {
        Vector b0 = *(const Vector *)(b + k * NR);
        Vector b1 = *(const Vector *)(b + k * NR + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            float x = a[k * MR + i];
            c[i][0] += x * b0;
            c[i][1] += x * b1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        *(UnalignedVector *)(acc + i * NR) = c[i][0];
        *(UnalignedVector *)(acc + i * NR + LANES) = c[i][1];
    }
}

/* One tile of C, at most MB x NB. */
static void gemm_tile(int64_t M, int64_t N, int64_t K, float alpha, MatrixView A, MatrixView B, float beta, float *C,
                      int64_t ldc) {
    _Alignas(64) float a_packed[MB * KB];
    _Alignas(64) float b_packed[(NB + NR) * KB];
    _Alignas(64) float acc[MR * NR];
    MatrixView Bt = {B.data, B.col, B.row}; /* panels of B run along its columns */
    for (int64_t k0 = 0; k0 < K || k0 == 0; k0 += KB) {
        int64_t kb = fox_min64(KB, K - k0);
        MatrixView a = {A.data + k0 * A.col, A.row, A.col};
        MatrixView b = {Bt.data + k0 * Bt.col, Bt.row, Bt.col};
        float keep = k0 == 0 ? beta : 1;
        pack_panels(a, M, kb, MR, a_packed);
        pack_panels(b, N, kb, NR, b_packed);
        for (int64_t j = 0; j < N; j += NR) {
            int64_t n = fox_min64(NR, N - j);
            for (int64_t i = 0; i < M; i += MR) {
                int64_t m = fox_min64(MR, M - i);
                kernel(kb, a_packed + i * kb, b_packed + j * kb, acc);
                for (int64_t r = 0; r < m; r++) {
                    float *row = C + (i + r) * ldc + j;
                    const float *sum = acc + r * NR;
                    if (keep == 0) {
                        for (int64_t s = 0; s < n; s++) {
                            row[s] = alpha * sum[s];
                        }
                    } else {
                        for (int64_t s = 0; s < n; s++) {
                            row[s] = keep * row[s] + alpha * sum[s];
                        }
                    }
                }
            }
        }
    }
}

static void gemm_tile_at(int64_t i, int64_t j, int64_t M, int64_t N, int64_t K, float alpha, MatrixView A, MatrixView B,
                         float beta, float *C, int64_t ldc) {
    MatrixView a = {A.data + i * A.row, A.row, A.col};
    MatrixView b = {B.data + j * B.col, B.row, B.col};
    gemm_tile(fox_min64(MB, M - i), fox_min64(NB, N - j), K, alpha, a, b, beta, C + i * ldc + j, ldc);
}

void gemm_serial(int64_t M, int64_t N, int64_t K, float alpha, MatrixView A, MatrixView B, float beta, float *C,
                 int64_t ldc) {
    for (int64_t i = 0; i < M; i += MB) {
        for (int64_t j = 0; j < N; j += NB) {
            gemm_tile_at(i, j, M, N, K, alpha, A, B, beta, C, ldc);
        }
    }
}

void gemm(int64_t M, int64_t N, int64_t K, float alpha, MatrixView A, MatrixView B, float beta, float *C, int64_t ldc) {
#pragma omp parallel for collapse(2) schedule(dynamic) if (M * N * K > 1 << 18)
    for (int64_t i = 0; i < M; i += MB) {
        for (int64_t j = 0; j < N; j += NB) {
            gemm_tile_at(i, j, M, N, K, alpha, A, B, beta, C, ldc);
        }
    }
}

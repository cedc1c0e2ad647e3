/* What cuda/mma.cuh and cuda/hopper.cuh have as assembly, in C++, for tests on a CPU (emulated_gpu.h). Included before
 * them it takes their place. Shared memory has the addresses of the array `memory`. */
#ifndef FOX_TESTS_EMULATED_INSTRUCTIONS_H
#define FOX_TESTS_EMULATED_INSTRUCTIONS_H

#define FOX_CUDA_MMA_CUH
#define FOX_HOPPER_CUH
#define HOPPER_CODE 1

#include <cuda.h>

#include "../cuda/common.cuh"

enum { HOPPER_WARPGROUP = 128, HOPPER_PANEL = 64, HOPPER_BOX = 64 };

namespace emulated {

/* The value of bf16 number i of packed ones. */
static float unpack(const uint32_t *packed, int i) {
    return __uint_as_float((packed[i / 2] >> i % 2 * 16) << 16);
}

static uint32_t address_of(const void *p) {
    size_t at = (size_t)((const unsigned char *)p - memory);
    if (at >= sizeof memory) {
        fox_die("an address that is not in shared memory");
    }
    return (uint32_t)at;
}

static float read_bf16(uint32_t address) {
    uint16_t bits;
    memcpy(&bits, memory + address, sizeof bits);
    return __uint_as_float((uint32_t)bits << 16);
}

/* Four 8 x 8 matrices whose rows the lanes name: lane l row l % 8 of matrix l / 8. A lane gets row l / 4, columns
 * 2 (l % 4) and the next; of the transposed matrix, if transposed. */
static void load_matrices(uint32_t r[4], uint32_t address, bool transposed) {
    Lanes<uint32_t> rows = gather(address);
    int outer = lane() / 4, inner = lane() % 4 * 2;
    for (int i = 0; i < 4; i++) {
        uint16_t bits[2];
        for (int e = 0; e < 2; e++) {
            int row = transposed ? inner + e : outer, column = transposed ? outer : inner + e;
            memcpy(&bits[e], memory + rows.of[8 * i + row] + column * 2, sizeof bits[e]);
        }
        r[i] = bits[0] | (uint32_t)bits[1] << 16;
    }
}

/* Rows g and g + 8 of an A operand [16, 16] that a warp holds in registers, g = lane / 4. */
static void rows_of_a(float rows[2][16], const uint32_t a[4]) {
    for (int i = 0; i < 4; i++) {
        Lanes<uint32_t> lanes = gather(a[i]);
        for (int k = 0; k < 8; k++) {
            rows[i % 2][i / 2 * 8 + k] = unpack(&lanes.of[lane() / 4 * 4], k);
        }
    }
}

} /* namespace emulated */

/* ---- cuda/mma.cuh ---- */

static inline uint32_t acp_shared(const void *p) {
    return emulated::address_of(p);
}

static inline void acp_copy16(uint32_t to, const void *from, bool valid) {
    static const char zeros[16] = {0};
    memcpy(memory + to, valid ? from : zeros, sizeof zeros);
}

static inline void acp_copies_done(void) {
}

static inline void acp_publish(uint64_t *to, uint64_t word) {
    *to = word;
}

static inline uint64_t acp_await(const uint64_t *from, uint64_t unset) {
    if (*from == unset) {
        fox_die("thread block %u waits for a later one", blockIdx.x);
    }
    return *from;
}

static inline void acp_load_matrices(uint32_t r[4], uint32_t address) {
    emulated::load_matrices(r, address, false);
}

static inline void acp_load_transposed(uint32_t r[4], uint32_t address) {
    emulated::load_matrices(r, address, true);
}

static inline void acp_mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    float rows[2][16];
    emulated::rows_of_a(rows, a);
    emulated::Lanes<uint32_t> low = emulated::gather(b0), high = emulated::gather(b1); /* of lane 4 n + k / 2: column n */
    for (int e = 0; e < 4; e++) {
        int column = (emulated::lane() % 4 * 2 + e % 2) * 4;
        for (int k = 0; k < 16; k++) {
            c[e] += rows[e / 2][k] * emulated::unpack(&(k < 8 ? low : high).of[column], k % 8);
        }
    }
}

static inline float acp_exp2(float x) {
    return exp2f(x);
}

/* ---- cuda/hopper.cuh: barriers ---- */

namespace emulated {

/* A barrier in shared memory. */
struct Phase {
    uint16_t arrivals, missing; /* of a phase; still to come in this one */
    unsigned parity : 1, bytes : 31;
};
static_assert(sizeof(Phase) == sizeof(uint64_t), "a barrier has 8 bytes");

static Phase *phase_of(uint64_t *barrier) {
    address_of(barrier);
    return (Phase *)barrier;
}

static void advance(Phase *p) {
    block->events++;
    if (p->missing == 0 && p->bytes == 0) {
        p->parity ^= 1;
        p->missing = p->arrivals;
    }
}

static void arrive_at(uint64_t *barrier, int bytes) {
    Phase *p = phase_of(barrier);
    if (p->missing == 0) {
        fox_die("more arrivals than a barrier expects");
    }
    p->missing--;
    p->bytes += (unsigned)bytes;
    advance(p);
}

/* Bytes of a copy have come. */
static void complete(uint64_t *barrier, int bytes) {
    Phase *p = phase_of(barrier);
    if ((int)p->bytes < bytes) {
        fox_die("a copy of more bytes than a barrier expects");
    }
    p->bytes -= (unsigned)bytes;
    advance(p);
}

} /* namespace emulated */

static inline uint32_t hopper_shared(const void *p) {
    return emulated::address_of(p);
}

static inline void hopper_barrier_init(uint64_t *barrier, int arrivals) {
    *emulated::phase_of(barrier) = {(uint16_t)arrivals, (uint16_t)arrivals, 0, 0};
}

static inline void hopper_barriers_ready(void) {
}

static inline void hopper_arrive(uint64_t *barrier) {
    emulated::arrive_at(barrier, 0);
}

static inline void hopper_arrive_bytes(uint64_t *barrier, int bytes) {
    emulated::arrive_at(barrier, bytes);
}

static inline void hopper_wait(uint64_t *barrier, int parity) {
    const emulated::Phase *p = emulated::phase_of(barrier);
    emulated::wait_until([=] { return (int)p->parity != parity; });
}

static inline void hopper_sync(int id, int threads) {
    emulated::meet(&emulated::block->named[id], threads);
}

static inline void hopper_pass(int id, int threads) {
    emulated::arrive(&emulated::block->named[id], threads);
}

/* ---- copies ---- */

namespace emulated {

/* What a tensor map holds here: of dimension i the size and, but for the first, the bytes from one to the next. */
struct Tensor {
    char *start;
    cuuint64_t sizes[4], strides[4];
};

/* cuTensorMapEncodeTiled */
static CUresult CUDAAPI encode(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank, void *start, const cuuint64_t *sizes,
                               const cuuint64_t *strides, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                               CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    Tensor t = {(char *)start, {1, 1, 1, 1}, {0}};
    for (cuuint32_t i = 0; i < rank; i++) {
        t.sizes[i] = sizes[i];
        t.strides[i] = i > 0 ? strides[i - 1] : 0;
    }
    static_assert(sizeof t <= sizeof *map, "it fits");
    memcpy((void *)map, &t, sizeof t);
    return CUDA_SUCCESS;
}

static cudaError_t entry_point(void **function, cudaDriverEntryPointQueryResult *found) {
    *function = (void *)encode;
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

static Tensor tensor_of(const CUtensorMap &map) {
    Tensor t;
    memcpy(&t, (const void *)&map, sizeof t);
    return t;
}

/* Row t of head h of sequence b from a column on; NULL beyond the end. */
static char *row_of(const Tensor &x, int column, int b, int h, int t) {
    return t >= 0 && (cuuint64_t)t < x.sizes[1]
               ? x.start + column * 2 + t * x.strides[1] + h * x.strides[2] + b * x.strides[3]
               : NULL;
}

/* Where the 128-byte swizzle puts what has this address otherwise. */
static uint32_t swizzled(uint32_t address) {
    return address ^ (address >> 7 & 7) << 4;
}

} /* namespace emulated */

#define cudaGetDriverEntryPointByVersion(name, function, version, flags, found) emulated::entry_point(function, found)

static inline void hopper_load_box(void *panel, const CUtensorMap &map, int column, int b, int h, int t, uint64_t *barrier) {
    uint32_t to = emulated::address_of(panel);
    static const char zeros[128] = {0};
    for (int i = 0; i < HOPPER_BOX; i++) {
        const char *from = emulated::row_of(emulated::tensor_of(map), column, b, h, t + i);
        for (int piece = 0; piece < 128; piece += 16) {
            memcpy(memory + emulated::swizzled(to + (uint32_t)(i * 128 + piece)), (from != NULL ? from : zeros) + piece, 16);
        }
    }
    emulated::complete(barrier, HOPPER_BOX * HOPPER_PANEL * 2);
}

static inline void hopper_load_vector(float *to, const CUtensorMap &map, int i, uint64_t *barrier) {
    emulated::Tensor x = emulated::tensor_of(map);
    for (int k = 0; k < HOPPER_BOX; k++) {
        to[k] = (cuuint64_t)(i + k) < x.sizes[0] ? ((const float *)x.start)[i + k] : 0;
    }
    emulated::complete(barrier, HOPPER_BOX * (int)sizeof(float));
}

static inline void hopper_store_box(const CUtensorMap &map, const void *panel, int column, int b, int h, int t) {
    uint32_t from = emulated::address_of(panel);
    for (int i = 0; i < HOPPER_BOX; i++) {
        char *to = emulated::row_of(emulated::tensor_of(map), column, b, h, t + i);
        for (int piece = 0; to != NULL && piece < 128; piece += 16) {
            memcpy(to + piece, memory + emulated::swizzled(from + (uint32_t)(i * 128 + piece)), 16);
        }
    }
}

static inline void hopper_stores_read(void) {
}

static inline void hopper_stores_visible(void) {
}

static inline void hopper_store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    emulated::Lanes<uint32_t> rows = emulated::gather(address);
    const uint32_t pairs[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        memcpy(memory + rows.of[8 * i + emulated::lane() / 4] + emulated::lane() % 4 * 4, &pairs[i], sizeof pairs[i]);
    }
}

/* ---- products ---- */

template <int REGISTERS>
static void hopper_more_registers(void) {
}

template <int REGISTERS>
static void hopper_fewer_registers(void) {
}

static inline void hopper_products_begin(void) {
}

static inline void hopper_products_commit(void) {
}

template <int PENDING>
static void hopper_products_wait(void) {
}

template <typename Registers>
static void hopper_hold(Registers &) {
}

namespace emulated {

/* The fields of an operand's descriptor, in bytes. */
struct Operand {
    uint32_t start, apart; /* first row; from a panel to the next */

    explicit Operand(uint64_t descriptor)
        : start((uint32_t)(descriptor & 0x3fff) << 4), apart((uint32_t)(descriptor >> 16 & 0x3fff) << 4) {
        if (descriptor >> 32 != (1u << 30 | 1024 >> 4)) {
            fox_die("an operand with another swizzle");
        }
    }
    /* Row i of eight after eight rows, 1024 bytes apart; a value of it. */
    float at(int row, int column) const {
        return read_bf16(swizzled(start + (uint32_t)(column / HOPPER_PANEL) * apart + (uint32_t)(row / 8 * 1024 + row % 8 * 128) +
                                  (uint32_t)(column % HOPPER_PANEL * 2)));
    }
};

/* This thread's values of acc[64, N] (+)= A[64, 16] B[16, N], from its two rows of A. */
template <bool B_ROWS, int ACC>
static void product(float (&acc)[ACC], const float rows[2][16], const Operand &b, bool add) {
    for (int i = 0; i < ACC; i++) {
        int column = i / 4 * 8 + lane() % 4 * 2 + i % 2;
        float sum = add ? acc[i] : 0;
        for (int k = 0; k < 16; k++) {
            sum += rows[i / 2 % 2][k] * (B_ROWS ? b.at(k, column) : b.at(column, k));
        }
        acc[i] = sum;
    }
}

} /* namespace emulated */

template <bool B_ROWS, int ACC>
static void hopper_product(float (&acc)[ACC], uint64_t a, uint64_t b, bool add) {
    emulated::Operand from(a);
    float rows[2][16];
    for (int i = 0; i < 32; i++) {
        int row = emulated::block->current % HOPPER_WARPGROUP / 32 * 16 + emulated::lane() / 4 + i / 16 * 8;
        rows[i / 16][i % 16] = from.at(row, i % 16);
    }
    emulated::product<B_ROWS>(acc, rows, emulated::Operand(b), add);
}

template <bool B_ROWS, int ACC>
static void hopper_product(float (&acc)[ACC], const uint32_t *a, uint64_t b, bool add) {
    float rows[2][16];
    emulated::rows_of_a(rows, a);
    emulated::product<B_ROWS>(acc, rows, emulated::Operand(b), add);
}

#endif

/* What the parts of the native kernels share: formats, descriptors, and the table of row kernels that
   each instruction set fills in. Knows slots and matrices; loaded with ctypes, needs no Python headers. */
#ifndef OUTRIDER_H
#define OUTRIDER_H

#include <stdint.h>

enum { FP32, BF16, FP16, INT8, INT4, NF4, NUM_FORMATS };
enum { SILU, GELU, GELU_TANH, RELU, RELU2, CLAMPED_SWIGLU };
enum { OK, BAD_TOKEN, BAD_SLOT, BAD_ROW, NO_MEMORY, TIED, MISSING, PENDING };

enum { GROUP = 64 };         /* weights that share a scale in INT4 and NF4 */
enum { MAX_ROW_TOKENS = 4 }; /* tokens that one pass over a row serves */

/* Which kernels compute a call: `rows`, four tokens at a time, or tiles (`pairs` where they serve). A
   token's bits depend on that choice and on the token alone. BY_COUNT: tiles for more than four. */
enum { BY_COUNT, STREAMED, TILED };
static inline int is_tiled(int32_t way, int64_t num_tokens) {
    return way == TILED || (way == BY_COUNT && num_tokens > MAX_ROW_TOKENS);
}

/* One [n, k] matrix in every slot. Strides are bytes from slot to slot. scale: INT8 fp32 [n],
   INT4 bf16 [n, groups], NF4 fp32 [n * k / 64], else NULL. bias: `bias_format` [n] or NULL. */
typedef struct {
    const uint8_t *weight, *scale, *bias;
    int64_t weight_stride, scale_stride, bias_stride;
    int64_t n, k;
    int32_t format, bias_format;
} Matrix;

typedef struct {
    Matrix gate_up, down;
    int64_t num_slots;
    int32_t activation, is_concatenated;
} Experts;

/* A run of rows of one matrix: what a kernel streams. */
typedef struct {
    const uint8_t *weight, *scale; /* of the first row */
    int64_t rows, k;
} Run;

/* Inputs of one token as a kernel wants them: permuted, padded with zeros, scaled by powers of two. */
typedef struct {
    const float *values;
    const float *sums; /* INT4: 8 x the sum of each group, else unused */
    const uint16_t *pairs; /* the inputs in bf16, where `pairs` serves */
} Prepared;

typedef struct {
    const char *name;
    int (*available)(void);
    int64_t lanes;
    /* floats that `values` of k inputs takes, and that `sums` takes */
    int64_t (*values_size)(int32_t format, int64_t k);
    int64_t (*sums_size)(int32_t format, int64_t k);
    /* natural inputs [from, to) -> values, sums; `from` is a multiple of 128, and so is `to` or it is k */
    void (*prepare)(int32_t format, const float *x, int64_t k, int64_t from, int64_t to,
                    float *values, float *sums);
    /* out[m * stride + r] = row r . token m, scales applied; scratch holds 16 (k / 64 + 32) floats */
    void (*rows[NUM_FORMATS][MAX_ROW_TOKENS])(const Run *run, const Prepared *tokens, float *scratch,
                                              float *out, int64_t stride);
    /* the same for any number of tokens, through a buffer of dequantised weights and partial sums */
    void (*tiles)(int32_t format, const Run *run, const Prepared *tokens, int64_t num_tokens,
                  float *scratch, float *out, int64_t stride);
    int64_t tiles_scratch; /* floats */
    /* tiles of bf16 inputs by products of bf16 pairs; NULL where the processor or the format has none.
       pairs_size: bf16 numbers that `pairs` of k inputs takes */
    int64_t (*pairs_size)(int64_t k);
    void (*prepare_pairs)(int32_t format, const float *x, int64_t k, uint16_t *pairs);
    void (*pairs[NUM_FORMATS])(const Run *run, const Prepared *tokens, int64_t num_tokens,
                               float *scratch, float *out, int64_t stride);
    void (*activate)(int32_t activation, const float *gate, const float *up, int64_t count,
                     float *out);
    void (*softmax)(float *scores, int64_t count, float scaling);
    void (*widen)(int32_t format, const void *in, int64_t count, float *out);
    void (*narrow)(int32_t format, const float *in, int64_t count, void *out);
    float (*read)(const uint8_t *bytes, int64_t count);
} Kernels;

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 11)
#define HAS_BF16_PAIRS /* the compiler knows the instructions and how to ask for them */
#endif
extern const Kernels kernels_avx512_bf16, kernels_avx512_vnni, kernels_avx512, kernels_avx2, kernels_neon,
    kernels_generic;

/* Bytes of one row of weights and of its scales. */
static inline int64_t row_bytes(int32_t format, int64_t k) {
    switch (format) {
    case FP32: return 4 * k;
    case BF16:
    case FP16: return 2 * k;
    case INT8: return k;
    case INT4: return (k + GROUP - 1) / GROUP * (GROUP / 2);
    default: return k / 2;
    }
}

static inline int64_t scale_bytes(int32_t format, int64_t k) {
    switch (format) {
    case INT8: return 4;
    case INT4: return 2 * ((k + GROUP - 1) / GROUP);
    case NF4: return 4 * (k / GROUP);
    default: return 0;
    }
}

/* Run body(context, thread) on up to num_threads threads, the caller as thread 0; returns when the work
   is done. A body takes pieces of work from a counter until there are none: others may come late or not
   at all, and nobody waits for who has not begun. */
typedef void (*Body)(void *context, int32_t thread);
void run_parallel(Body body, void *context, int32_t num_threads);

/* The same for products of matrices, whose time is added up: `outrider_product_ns`. */
void run_products(Body body, void *context, int32_t num_threads);

/* Call call(context) with threads at hand, so that each run_parallel in it wakes nobody up. */
void with_team(void (*call)(void *context), void *context, int32_t num_threads);

#endif

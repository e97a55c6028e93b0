/* The row kernels of one instruction set, written once in vectors of W floats: dot products of weight
   rows with a few tokens (decode), register tiles for many tokens (prefill). The includer sets W, the
   ISA macro, KERNELS (the table's symbol), KERNELS_NAME and AVAILABLE.

   Weights are taken as they lie, W 32-bit lanes at a time, and split into floats inside the lane; the
   inputs are permuted to match once per token (`prepare`). An integer left in place, q x 2^s, is exact
   as a float, and the input is scaled by 2^-s, exactly. */
#include "outrider.h"
#include "simd.h"

#define BLOCK (8 * W)                          /* weights between two of `prepare`'s periods */
#define PERIOD 128                             /* after which the permutation repeats */
#define PADDED (BLOCK > GROUP ? BLOCK : GROUP) /* inputs are padded with zeros to a multiple */

static int16_t source_offset[NUM_FORMATS][PERIOD];
static float source_factor[NUM_FORMATS][PERIOD];

/* Natural index, within a period, of the input that meets lane `lane` of vector `vector`. */
static int source(int32_t format, int vector, int lane) {
    int unit, byte, nibble;
    switch (format) {
    case BF16: return vector / 2 * 2 * W + 2 * lane + vector % 2;
    case INT8: return vector / 4 * 4 * W + 4 * lane + vector % 4;
    case INT4:
    case NF4:
        unit = vector / 8;
        nibble = format == NF4 ? nf4_nibble(vector % 8, lane) : 8 * lane + vector % 8;
        byte = unit * 4 * W + nibble / 2;
        if (format == NF4) return 2 * byte + 1 - nibble % 2;
        return byte / 32 * GROUP + byte % 32 + 32 * (nibble % 2);
    default: return vector * W + lane;
    }
}

static int setup(void) {
    if (!AVAILABLE) return 0;
    for (int format = 0; format < NUM_FORMATS; format++)
        for (int i = 0; i < PERIOD; i++) {
            int vector = i / W, shift = 0;
            if (format == INT8) shift = 24;
            if (format == INT4 && vector % 8 < 7) shift = 4 * (vector % 8);
            source_offset[format][i] = (int16_t)source(format, vector, i % W);
            source_factor[format][i] = ldexpf(1.0f, -shift);
        }
    return 1;
}

/* Vectors that one load of weights gives, and its bytes. */
INLINE int unit_vectors(int32_t format) { return format == BF16 ? 2 : format == INT8 ? 4 : 1; }
INLINE int unit_bytes(int32_t format) { return format == FP16 ? 2 * W : 4 * W; }
INLINE int block_bytes(int32_t format) {
    return format == INT4 || format == NF4 ? 4 * W : 8 / unit_vectors(format) * unit_bytes(format);
}

INLINE void decode_unit(int32_t format, const uint8_t *p, vf out[4]) {
    vi v, top = (vi)((vu){0} + 0xff000000u);
    switch (format) {
    case BF16:
        v = load_int(p);
        KEEP(v);
        out[0] = (vf)shift_left(v, 16);
        out[1] = (vf)(v & (vi)((vu){0} + 0xffff0000u));
        break;
    case FP16: out[0] = load_half(p); break;
    case INT8:
        v = load_int(p);
        KEEP(v);
        out[0] = to_float(shift_left(v, 24));
        out[1] = to_float(shift_left(v, 16) & top);
        out[2] = to_float(shift_left(v, 8) & top);
        out[3] = to_float(v & top);
        break;
    default: out[0] = load((const float *)p);
    }
}

#define UNROLL _Pragma("GCC unroll 16")

/* Rows far apart in memory are read side by side: each is one more stream for the hardware to run ahead
   in (one stream a thread reaches 0.8 of what four do). */
INLINE int streams(int tokens) { return tokens == 4 ? 2 : 4; }

/* One load of weights of each row, against inputs [at, at + ...). */
INLINE void plain_unit(int32_t format, int rows, int tokens, const uint8_t *p, int64_t apart,
                       const float *const *x, int64_t at, vf acc[][MAX_ROW_TOKENS]) {
    UNROLL for (int r = 0; r < rows; r++) {
        vf w[4];
        decode_unit(format, p + r * apart, w);
        UNROLL for (int v = 0; v < unit_vectors(format); v++)
            UNROLL for (int m = 0; m < tokens; m++)
                acc[r][m] = fma_(w[v], load(x[m] + at + v * W), acc[r][m]);
    }
}

enum { UNITS = 4 };

/* Rows first, first + apart, ...: their sums into out. */
INLINE void plain_row(int32_t format, int rows, int tokens, const Run *run, int64_t first,
                      int64_t apart, const float *const *x, float *out, int64_t stride) {
    int64_t bytes = row_bytes(format, run->k), width = unit_vectors(format) * W, at = 0;
    int64_t units = bytes / unit_bytes(format), rest = bytes % unit_bytes(format);
    const uint8_t *p = run->weight + first * bytes;
    vf acc[4][MAX_ROW_TOKENS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int m = 0; m < tokens; m++) acc[r][m] = (vf){0};
    for (; units >= UNITS; units -= UNITS)
        UNROLL for (int u = 0; u < UNITS; u++, at += width, p += unit_bytes(format))
            plain_unit(format, rows, tokens, p, apart * bytes, x, at, acc);
    for (; units; units--, at += width, p += unit_bytes(format))
        plain_unit(format, rows, tokens, p, apart * bytes, x, at, acc);
    if (rest) {
        uint8_t last[4][4 * W] = {{0}};
        for (int r = 0; r < rows; r++) memcpy(last[r], p + r * apart * bytes, (size_t)rest);
        plain_unit(format, rows, tokens, last[0], sizeof last[0], x, at, acc);
    }
    UNROLL for (int r = 0; r < rows; r++) {
        float scale = 1;
        if (format == INT8) memcpy(&scale, run->scale + 4 * (first + r * apart), 4);
        UNROLL for (int m = 0; m < tokens; m++)
            out[m * stride + first + r * apart] = sum(acc[r][m]) * scale;
    }
}

INLINE void plain_rows(int32_t format, int tokens, const Run *run, const Prepared *inputs,
                       float *out, int64_t stride) {
    int64_t apart = run->rows / streams(tokens);
    const float *x[MAX_ROW_TOKENS];
    for (int m = 0; m < tokens; m++) x[m] = inputs[m].values;
    for (int64_t r = 0; r < apart; r++)
        plain_row(format, streams(tokens), tokens, run, r, apart, x, out, stride);
    for (int64_t r = apart * streams(tokens); r < run->rows; r++)
        plain_row(format, 1, tokens, run, r, 0, x, out, stride);
}

#include "grouped.h"

static int64_t sums_size(int32_t format, int64_t k) {
    return format == INT4 ? (k + PERIOD - 1) / PERIOD * PERIOD / GROUP + W : 0;
}

#if defined(ISA_AVX2) || defined(ISA_VNNI)
#define WHOLE_NUMBERS
#include "whole.h"
#endif
#if defined(ISA_AVX2)
#include "fixed.h"
#elif defined(ISA_VNNI)
#include "vnni.h"
#endif

static int64_t values_size(int32_t format, int64_t k) {
    int64_t floats = (k + PERIOD - 1) / PERIOD * PERIOD;
#if defined(WHOLE_NUMBERS)
    if (format == INT8 || format == INT4) floats += fixed_size(format, k);
#endif
    return (floats + 15) / 16 * 16;
}

static void prepare(int32_t format, const float *x, int64_t k, int64_t from, int64_t to,
                    float *values, float *sums) {
    const int16_t *offset = source_offset[format];
    const float *factor = source_factor[format];
    for (int64_t base = from; base < to; base += PERIOD) {
        if (base + PERIOD <= k)
            for (int i = 0; i < PERIOD; i++) values[base + i] = x[base + offset[i]] * factor[i];
        else
            for (int i = 0; i < PERIOD; i++)
                values[base + i] = base + offset[i] < k ? x[base + offset[i]] * factor[i] : 0;
    }
#if defined(WHOLE_NUMBERS)
    if (format == INT8) fix_int8(x, k, from, to, values);
    if (format == INT4) fix_int4(x, k, from, to, values, sums);
#else
    if (format != INT4) return;
    for (int64_t base = from; base < to; base += GROUP) {
        float total = 0;
        for (int64_t i = base; i < base + GROUP && i < k; i++) total += x[i];
        sums[base / GROUP] = 8 * total;
    }
    if (to == k)
        for (int64_t g = (k + GROUP - 1) / GROUP; g < sums_size(format, k); g++) sums[g] = 0;
#endif
}

#include "slices.h"
#include "elementwise.h"
#include "tiles.h"
#if defined(ISA_BF16)
#include "pairs.h"
#endif

#define ROW_ARGUMENTS                                                                             \
    const Run *run, const Prepared *inputs, float *scratch, float *out, int64_t stride
#define ROWS(name, format, tokens, body, ...)                                                     \
    static void name##_##tokens(ROW_ARGUMENTS) {                                                  \
        (void)scratch;                                                                            \
        body(format, tokens, run, inputs, __VA_ARGS__ out, stride);                               \
    }
#define MANY(name, format, body, ...)                                                             \
    ROWS(name, format, 2, body, __VA_ARGS__)                                                      \
    ROWS(name, format, 3, body, __VA_ARGS__)                                                      \
    ROWS(name, format, 4, body, __VA_ARGS__)

ROWS(fp32, FP32, 1, plain_rows, )
MANY(fp32, FP32, plain_rows, )
ROWS(bf16, BF16, 1, plain_rows, )
MANY(bf16, BF16, plain_rows, )
ROWS(fp16, FP16, 1, plain_rows, )
MANY(fp16, FP16, plain_rows, )
ROWS(nf4, NF4, 1, grouped_rows, scratch, )
MANY(nf4, NF4, grouped_rows, scratch, )
#if defined(WHOLE_NUMBERS)
#define WHOLE(name, tokens, ...)                                                                  \
    static void name##_##tokens(ROW_ARGUMENTS) {                                                  \
        (void)scratch, (void)stride;                                                              \
        __VA_ARGS__;                                                                              \
    }
#endif
#if defined(ISA_VNNI)
#define BOTH(tokens)                                                                              \
    WHOLE(int8, tokens, vnni_int8_rows(tokens, run, inputs, scratch, out, stride))                \
    WHOLE(int4, tokens, vnni_int4_rows(tokens, run, inputs, scratch, out, stride))
BOTH(1)
BOTH(2)
BOTH(3)
BOTH(4)
#else
#if defined(ISA_AVX2)
WHOLE(int8, 1, fixed_int8_rows(1, run, inputs, out, stride))
WHOLE(int8, 2, fixed_int8_rows(2, run, inputs, out, stride))
WHOLE(int8, 3, fixed_int8_rows(3, run, inputs, out, stride))
WHOLE(int8, 4, fixed_int8_rows(4, run, inputs, out, stride))
WHOLE(int4, 1, fixed_int4_rows(1, run, inputs, scratch, out, stride))
WHOLE(int4, 2, fixed_int4_rows(2, run, inputs, scratch, out, stride))
WHOLE(int4, 3, fixed_int4_rows(3, run, inputs, scratch, out, stride))
WHOLE(int4, 4, fixed_int4_rows(4, run, inputs, scratch, out, stride))
#else
ROWS(int8, INT8, 1, plain_rows, )
MANY(int8, INT8, plain_rows, )
ROWS(int4, INT4, 1, grouped_rows, scratch, )
MANY(int4, INT4, grouped_rows, scratch, )
#endif
#endif

#define TABLE(name) {name##_1, name##_2, name##_3, name##_4}

const Kernels KERNELS = {
    .name = KERNELS_NAME,
    .available = setup,
    .lanes = W,
    .values_size = values_size,
    .sums_size = sums_size,
    .prepare = prepare,
    .rows = {TABLE(fp32), TABLE(bf16), TABLE(fp16), TABLE(int8), TABLE(int4), TABLE(nf4)},
    .tiles = tiles,
#if defined(ISA_BF16)
    .tiles_scratch = TILE_ROWS * (PAIR_SLICE / 2 + PAIR_SLICE / PAIR_BLOCK * W),
    .pairs_size = pairs_size,
    .prepare_pairs = prepare_pairs,
    .pairs = {[BF16] = bf16_pairs, [INT8] = int8_pairs, [INT4] = int4_pairs},
#else
    .tiles_scratch = TILE_ROWS * SLICE,
#endif
    .activate = activate,
    .softmax = softmax,
    .widen = widen,
    .narrow = narrow,
    .read = read_bytes,
};

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
#define PREFETCH_BYTES 2048 /* of weights below 16 bits; wider ones are read by the hardware's own */

enum { TILE_ROWS = 3, PANEL_ROWS = 12, PANEL_K = 512, TILE_TOKENS = 256 };

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

static int64_t values_size(int32_t format, int64_t k) {
    (void)format;
    return (k + PERIOD - 1) / PERIOD * PERIOD;
}

static int64_t sums_size(int32_t format, int64_t k) {
    return format == INT4 ? (k + GROUP - 1) / GROUP + W : 0;
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
    if (format != INT4) return;
    for (int64_t base = from; base < to; base += GROUP) {
        float total = 0;
        for (int64_t i = base; i < base + GROUP && i < k; i++) total += x[i];
        sums[base / GROUP] = 8 * total;
    }
    if (to == k)
        for (int64_t g = (k + GROUP - 1) / GROUP; g < sums_size(format, k); g++) sums[g] = 0;
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

/* Nibble j of each lane, in place but for the highest, which would carry the sign. */
INLINE vf nibble(vi v, int j) {
    return to_float(j == 7 ? shift_right(v, 28) : v & (vi)((vu){0} + (0xfu << (4 * j))));
}

#define UNROLL _Pragma("GCC unroll 16")

INLINE int accumulators(int tokens) { return tokens == 1 ? 8 : tokens < 4 ? 4 : 2; }

INLINE void plain_block(int32_t format, int tokens, const uint8_t *p, const float *const *x,
                        int64_t at, vf acc[][8]) {
    int vectors = unit_vectors(format);
    UNROLL for (int u = 0; u < 8 / vectors; u++) {
        vf w[4];
        decode_unit(format, p + u * unit_bytes(format), w);
        UNROLL for (int v = 0; v < vectors; v++) {
            int j = u * vectors + v;
            UNROLL for (int m = 0; m < tokens; m++) {
                vf *a = &acc[m][j % accumulators(tokens)];
                *a = fma_(w[v], load(x[m] + at + j * W), *a);
            }
        }
    }
}

INLINE void plain_rows(int32_t format, int tokens, const Run *run, const Prepared *inputs,
                       float *out, int64_t stride) {
    int64_t bytes = row_bytes(format, run->k), full = run->k / BLOCK;
    int64_t rest = bytes - full * block_bytes(format);
    const float *x[MAX_ROW_TOKENS];
    for (int m = 0; m < tokens; m++) x[m] = inputs[m].values;
    for (int64_t r = 0; r < run->rows; r++) {
        const uint8_t *p = run->weight + r * bytes;
        vf acc[MAX_ROW_TOKENS][8] = {0};
        for (int64_t b = 0; b < full; b++, p += block_bytes(format)) {
            if (format == INT8) __builtin_prefetch(p + PREFETCH_BYTES, 0, 3);
            plain_block(format, tokens, p, x, b * BLOCK, acc);
        }
        if (rest) {
            uint8_t last[BLOCK * 4] = {0};
            memcpy(last, p, (size_t)rest);
            plain_block(format, tokens, last, x, full * BLOCK, acc);
        }
        float scale = 1;
        if (format == INT8) memcpy(&scale, run->scale + 4 * r, 4);
        UNROLL for (int m = 0; m < tokens; m++) {
            UNROLL for (int step = 1; step < accumulators(tokens); step *= 2)
                UNROLL for (int i = 0; i + step < accumulators(tokens); i += 2 * step)
                    acc[m][i] += acc[m][i + step];
            out[m * stride + r] = sum(acc[m][0]) * scale;
        }
    }
}

/* Scales of one row as floats, padded with zeros to whole vectors and one more. */
INLINE void widen_scales(int32_t format, const uint8_t *scale, int64_t groups, float *out) {
    if (format == NF4)
        memcpy(out, scale, (size_t)groups * 4);
    else
        for (int64_t g = 0; g < groups; g++) {
            uint16_t half;
            memcpy(&half, scale + 2 * g, 2);
            uint32_t bits = (uint32_t)half << 16;
            memcpy(out + g, &bits, 4);
        }
    for (int i = 0; i < W; i++) out[groups + i] = 0;
}

/* The scale of each lane's group in block `b`. */
INLINE vf block_scale(const float *scales, int64_t b) {
#if W < 8
    return splat(scales[b * BLOCK / GROUP]);
#elif W == 8
    return splat(scales[b]);
#else
    vf scale = splat(scales[2 * b]), high = splat(scales[2 * b + 1]);
    vi upper;
    for (int i = 0; i < W; i++) upper[i] = i < 8 ? 0 : -1;
    return (vf)(((vi)scale & ~upper) | ((vi)high & upper));
#endif
}

/* `units` blocks at once: enough independent chains of multiply-adds to hide their latency. */
INLINE void int4_blocks(int units, int tokens, const uint8_t *p, const float *const *x, int64_t b,
                        const float *scales, vf acc[][2]) {
    vi v[6];
    vf s[6][MAX_ROW_TOKENS];
    UNROLL for (int u = 0; u < units; u++) {
        v[u] = load_int(p + u * 4 * W);
        KEEP(v[u]);
    }
    UNROLL for (int j = 0; j < 8; j++) {
        UNROLL for (int u = 0; u < units; u++) {
            vf w = nibble(v[u], j);
            UNROLL for (int m = 0; m < tokens; m++) {
                vf in = load(x[m] + (b + u) * BLOCK + j * W);
                s[u][m] = j ? fma_(w, in, s[u][m]) : w * in;
            }
        }
    }
    UNROLL for (int u = 0; u < units; u++)
        UNROLL for (int m = 0; m < tokens; m++) {
            vf *a = &acc[m][tokens == 1 ? u % 2 : 0];
            *a = fma_(block_scale(scales, b + u), s[u][m], *a);
        }
}

INLINE void nf4_block(int tokens, const uint8_t *p, Levels levels, const float *const *x, int64_t b,
                      const float *scales, vf acc[][2]) {
    vf w[8];
    decode_nf4(load_int(p), levels, w);
    UNROLL for (int m = 0; m < tokens; m++) {
        vf s[2];
        UNROLL for (int j = 0; j < 8; j++) {
            vf in = load(x[m] + b * BLOCK + j * W);
            s[j % 2] = j < 2 ? w[j] * in : fma_(w[j], in, s[j % 2]);
        }
        acc[m][b % 2] = fma_(block_scale(scales, b), s[0] + s[1], acc[m][b % 2]);
    }
}

INLINE void grouped_rows(int32_t format, int tokens, const Run *run, const Prepared *inputs,
                         float *scales, float *out, int64_t stride) {
    int64_t bytes = row_bytes(format, run->k), groups = (run->k + GROUP - 1) / GROUP;
    int64_t full = bytes / (4 * W), rest = bytes % (4 * W);
    int units = tokens == 1 ? 6 : tokens == 2 ? 3 : 2;
    Levels levels = load_levels();
    const float *x[MAX_ROW_TOKENS];
    for (int m = 0; m < tokens; m++) x[m] = inputs[m].values;
    for (int64_t r = 0; r < run->rows; r++) {
        const uint8_t *p = run->weight + r * bytes;
        vf acc[MAX_ROW_TOKENS][2] = {0};
        int64_t b = 0;
        widen_scales(format, run->scale + r * scale_bytes(format, run->k), groups, scales);
        if (format == NF4) {
            for (; b + 2 <= full; b += 2, p += 8 * W) {
                __builtin_prefetch(p + PREFETCH_BYTES, 0, 3);
                nf4_block(tokens, p, levels, x, b, scales, acc);
                nf4_block(tokens, p + 4 * W, levels, x, b + 1, scales, acc);
            }
            if (b < full) nf4_block(tokens, p, levels, x, b, scales, acc);
        } else {
            for (; b + units <= full; b += units, p += units * 4 * W) {
                for (int i = 0; i < units * 4 * W; i += 64)
                    __builtin_prefetch(p + i + PREFETCH_BYTES, 0, 3);
                int4_blocks(units, tokens, p, x, b, scales, acc);
            }
            for (; b + 2 <= full; b += 2, p += 2 * 4 * W)
                int4_blocks(2, tokens, p, x, b, scales, acc);
            if (b < full) int4_blocks(1, tokens, p, x, b, scales, acc);
        }
        if (rest) {
            uint8_t last[4 * W] = {0};
            memcpy(last, run->weight + r * bytes + full * 4 * W, (size_t)rest);
            if (format == NF4)
                nf4_block(tokens, last, levels, x, full, scales, acc);
            else
                int4_blocks(1, tokens, last, x, full, scales, acc);
        }
        UNROLL for (int m = 0; m < tokens; m++) {
            vf total = acc[m][0] + acc[m][1];
            if (format == INT4) {
                vf zero = {0};
                for (int64_t g = 0; g < groups; g += W)
                    zero = fma_(load(scales + g), load(inputs[m].sums + g), zero);
                total -= zero;
            }
            out[m * stride + r] = sum(total);
        }
    }
}

#include "tiles.h"
#include "elementwise.h"

#define ROWS(name, format, tokens, body, ...)                                                     \
    static void name##_##tokens(const Run *run, const Prepared *inputs, float *scratch,           \
                                float *out, int64_t stride) {                                     \
        (void)scratch;                                                                            \
        body(format, tokens, run, inputs, __VA_ARGS__ out, stride);                               \
    }
#define PLAIN_ROWS(name, format)                                                                  \
    ROWS(name, format, 1, plain_rows, )                                                           \
    ROWS(name, format, 2, plain_rows, )                                                           \
    ROWS(name, format, 3, plain_rows, )                                                           \
    ROWS(name, format, 4, plain_rows, )
#define GROUPED_ROWS(name, format)                                                                \
    ROWS(name, format, 1, grouped_rows, scratch, )                                                \
    ROWS(name, format, 2, grouped_rows, scratch, )                                                \
    ROWS(name, format, 3, grouped_rows, scratch, )                                                \
    ROWS(name, format, 4, grouped_rows, scratch, )

PLAIN_ROWS(fp32, FP32)
PLAIN_ROWS(bf16, BF16)
PLAIN_ROWS(fp16, FP16)
PLAIN_ROWS(int8, INT8)
GROUPED_ROWS(int4, INT4)
GROUPED_ROWS(nf4, NF4)

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
    .tiles_scratch = PANEL_ROWS * PANEL_K + TILE_TOKENS * PANEL_ROWS * W + 512,
    .activate = activate,
    .widen = widen,
    .narrow = narrow,
    .read = read_bytes,
};

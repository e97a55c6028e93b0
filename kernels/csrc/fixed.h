/* int8 and int4 rows on AVX2 in whole numbers; part of rows.h.

   Turning each weight into a float costs more than memory does. Here the inputs of a block are held as
   whole numbers of one power of two, cut into digits of two bytes (int8) or one (int4), and products
   are summed exactly in integers, 16 or 32 to an operation; the sum meets its scale as a float.
   int8: 30 bits in blocks of 128. int4: 22 bits in groups of 64 where the activations are fp32 (the
   error of either is that of fp32 sums), 15 bits where they are bf16 or fp16: within 2^-15 of the
   group's largest, which keeps all of a bf16 down to 1/128 of that and is a hundred times finer than
   rounding to bf16. A block holding NaN or infinity gives NaN. */

enum { WIDE_BITS = 30, DIGIT_BYTES = 3 * GROUP };

typedef struct {
    float scale, factor; /* to whole numbers and back */
} Unit;

/* The power of two that gives the largest of `count` inputs (a multiple of 8) `bits` bits. */
INLINE Unit unit_of(const float *x, int count, int bits) {
    __m256i largest = _mm256_setzero_si256(), magnitude = _mm256_set1_epi32(0x7fffffff);
    int32_t lane[8], top = 0, power;
    for (int i = 0; i < count; i += 8) {
        __m256i raw = _mm256_loadu_si256((const __m256i *)(x + i));
        largest = _mm256_max_epi32(largest, _mm256_and_si256(raw, magnitude));
    }
    memcpy(lane, &largest, sizeof lane);
    for (int i = 0; i < 8; i++) top = lane[i] > top ? lane[i] : top;
    if (top >= 0x7f800000) return (Unit){0, NAN};
    /* Fifteen bits are two signed bytes but for the topmost values: those move to the next power. */
    if (bits == 15 && (top & 0x7fffff) > 0x7e0000) top += 0x800000;
    power = bits - (top >> 23);
    if (power > bits - 40) power = bits - 40; /* the rest is zero beside any product */
    int32_t up = (power + 126 + 127) << 23, down = (127 - power - 126) << 23;
    Unit unit;
    memcpy(&unit.scale, &up, 4);
    memcpy(&unit.factor, &down, 4);
    return unit;
}

INLINE __m256i whole_numbers(const float *x, Unit unit) {
    if (unit.scale == 0) return _mm256_setzero_si256(); /* a NaN has no whole number */
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(unit.scale)));
}

INLINE int32_t sum_ints(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

/* What a format's inputs take behind the `values` that tiles use: digits, then factors, then (int4)
   the number of digits. Counted in floats. */
INLINE int64_t blocks(int64_t k) { return (k + PERIOD - 1) / PERIOD; }
INLINE int64_t digits_size(int32_t format, int64_t k) {
    return blocks(k) * (format == INT8 ? PERIOD : 2 * DIGIT_BYTES / 4);
}
INLINE int64_t fixed_size(int32_t format, int64_t k) {
    return digits_size(format, k) + 2 * blocks(k) + W + 1;
}
INLINE const uint8_t *fixed_digits(const float *values, int64_t k) {
    return (const uint8_t *)(values + blocks(k) * PERIOD);
}
INLINE const float *fixed_factors(int32_t format, const float *values, int64_t k) {
    return values + blocks(k) * PERIOD + digits_size(format, k);
}
INLINE float *fixed_count(float *values, int64_t k) {
    return (float *)fixed_factors(INT4, values, k) + 2 * blocks(k) + W;
}

/* Up to `count` inputs from x, zeros after them. */
INLINE const float *padded(const float *x, int64_t left, int64_t count, float *buffer) {
    if (left >= count) return x;
    memset(buffer, 0, sizeof(float) * (size_t)count);
    memcpy(buffer, x, sizeof(float) * (size_t)left);
    return buffer;
}

/* int8: of each 16 inputs the high and the low 16 bits; factors of the high and the low sums. */
static void fix_int8(const float *x, int64_t k, int64_t from, int64_t to, float *values) {
    uint8_t *digits = (uint8_t *)fixed_digits(values, k);
    float *factors = (float *)fixed_factors(INT8, values, k);
    for (int64_t base = from; base < to; base += PERIOD) {
        float buffer[PERIOD];
        const float *block = padded(x + base, k - base, PERIOD, buffer);
        Unit unit = unit_of(block, PERIOD, WIDE_BITS);
        factors[2 * (base / PERIOD)] = unit.factor * 65536;
        factors[2 * (base / PERIOD) + 1] = unit.factor;
        for (int i = 0; i < PERIOD; i += 16) {
            __m256i a = whole_numbers(block + i, unit), b = whole_numbers(block + i + 8, unit);
            __m256i round = _mm256_set1_epi32(0x8000);
            __m256i high = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_add_epi32(a, round), 16),
                                              _mm256_srai_epi32(_mm256_add_epi32(b, round), 16));
            __m256i low = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_slli_epi32(a, 16), 16),
                                             _mm256_srai_epi32(_mm256_slli_epi32(b, 16), 16));
            __m256i *out = (__m256i *)(digits + 4 * (base + i));
            _mm256_storeu_si256(out, _mm256_permute4x64_epi64(high, 0xd8));
            _mm256_storeu_si256(out + 1, _mm256_permute4x64_epi64(low, 0xd8));
        }
    }
}

/* 32 ints that fit a byte, in order */
INLINE __m256i pack_bytes(const __m256i *v) {
    __m256i low = _mm256_packs_epi32(v[0], v[1]), high = _mm256_packs_epi32(v[2], v[3]);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* One group -> three digits, the highest first (zero if two do); returns 8 x its sum. */
INLINE float fix_group(const float *x, Unit unit, int count, uint8_t *digits) {
    __m256i whole[8], total = _mm256_setzero_si256();
    for (int i = 0; i < 8; i++) {
        whole[i] = whole_numbers(x + 8 * i, unit);
        total = _mm256_add_epi32(total, whole[i]);
    }
    memset(digits, 0, GROUP);
    for (int d = 2; d > 2 - count; d--) {
        __m256i digit[8];
        for (int i = 0; i < 8; i++) {
            digit[i] = d > 3 - count ? _mm256_srai_epi32(_mm256_slli_epi32(whole[i], 24), 24)
                                     : whole[i];
            whole[i] = _mm256_srai_epi32(_mm256_sub_epi32(whole[i], digit[i]), 8);
        }
        _mm256_storeu_si256((__m256i *)(digits + d * GROUP), pack_bytes(digit));
        _mm256_storeu_si256((__m256i *)(digits + d * GROUP + 32), pack_bytes(digit + 4));
    }
    return 8.0f * (float)sum_ints(total);
}

static void fix_int4(int fine, const float *x, int64_t k, int64_t from, int64_t to, float *values,
                     float *sums) {
    uint8_t *digits = (uint8_t *)fixed_digits(values, k);
    float *factors = (float *)fixed_factors(INT4, values, k);
    int count = fine ? 3 : 2;
    for (int64_t base = from; base < to; base += GROUP) {
        int64_t g = base / GROUP;
        float buffer[GROUP];
        const float *group = padded(x + base, k - base, GROUP, buffer);
        Unit unit = unit_of(group, GROUP, count == 2 ? 15 : 22);
        factors[g] = unit.factor;
        sums[g] = fix_group(group, unit, count, digits + g * DIGIT_BYTES);
    }
    if (to == k) {
        int64_t groups = (k + GROUP - 1) / GROUP, rest = groups % W;
        float *last = sums + 2 * blocks(k);
        for (int64_t g = groups; g < 2 * blocks(k) + W; g++) factors[g] = 0;
        for (int i = 0; i < W; i++) last[i] = 0;
        for (int64_t i = 0; i < rest; i++)
            last[(groups < W ? 0 : W - rest) + i] = sums[groups - rest + i];
        *fixed_count(values, k) = (float)count;
    }
}

INLINE void fixed_int8_row(int rows, const Run *run, int64_t first, int64_t apart,
                           const float *values, float *out) {
    int64_t k = run->k;
    const uint8_t *p = run->weight + first * k, *digits = fixed_digits(values, k);
    const float *factors = fixed_factors(INT8, values, k);
    vf acc[4];
    UNROLL for (int r = 0; r < rows; r++) acc[r] = (vf){0};
    for (int64_t base = 0; base < k; base += PERIOD, p += PERIOD) {
        __m256i high[4], low[4];
        uint8_t last[4][PERIOD];
        const uint8_t *from = p;
        int64_t step = apart * k, width = PERIOD;
        UNROLL for (int r = 0; r < rows; r++) high[r] = low[r] = _mm256_setzero_si256();
        if (k - base < PERIOD) {
            width = (k - base + 15) / 16 * 16;
            memset(last, 0, sizeof last);
            for (int r = 0; r < rows; r++)
                memcpy(last[r], p + r * apart * k, (size_t)(k - base));
            from = last[0];
            step = PERIOD;
        }
        for (int64_t i = 0; i < width; i += 16) {
            const __m256i *in = (const __m256i *)(digits + 4 * (base + i));
            __m256i x_high = _mm256_loadu_si256(in), x_low = _mm256_loadu_si256(in + 1);
            UNROLL for (int r = 0; r < rows; r++) {
                __m256i w = _mm256_cvtepi8_epi16(
                    _mm_loadu_si128((const __m128i *)(from + r * step + i)));
                high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(w, x_high));
                low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(w, x_low));
            }
        }
        UNROLL for (int r = 0; r < rows; r++) {
            acc[r] = fma_(to_float((vi)high[r]), splat(factors[0]), acc[r]);
            acc[r] = fma_(to_float((vi)low[r]), splat(factors[1]), acc[r]);
        }
        factors += 2;
    }
    UNROLL for (int r = 0; r < rows; r++) {
        float scale;
        memcpy(&scale, run->scale + 4 * (first + r * apart), 4);
        out[first + r * apart] = sum(acc[r]) * scale;
    }
}

/* The scales of eight groups from `g` on, as floats. */
INLINE vf eight_scales(const uint8_t *scale, int64_t g) {
    __m128i half = _mm_loadu_si128((const __m128i *)(scale + 2 * g));
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
}

/* Scales of one row times a token's factors, into `own`; returns what the nibbles' offset of 8 adds.
   A last part of eight is read so that it ends where the row ends, and its sums are set for that. */
INLINE vf fixed_scales(const uint8_t *scale, int64_t k, const Prepared *input, float *own) {
    int64_t groups = (k + GROUP - 1) / GROUP, g = 0;
    const float *factors = fixed_factors(INT4, input->values, k);
    vf offset = {0};
    for (; g + W <= groups; g += W) {
        vf scaled = eight_scales(scale, g) * load(factors + g);
        store(own + g, scaled);
        offset = fma_(scaled, load(input->sums + g), offset);
    }
    if (g < groups) {
        int64_t last = groups < W ? 0 : groups - W;
        uint8_t few[2 * W] = {0};
        if (groups < W) memcpy(few, scale, 2 * (size_t)groups);
        vf scaled = eight_scales(groups < W ? few : scale, last) * load(factors + last);
        store(own + last, scaled);
        offset = fma_(scaled, load(input->sums + 2 * blocks(k)), offset);
    }
    return offset;
}

INLINE __m256i digit_sum(__m256i low, __m256i high, const uint8_t *digit) {
    __m256i a = _mm256_maddubs_epi16(low, _mm256_loadu_si256((const __m256i *)digit));
    __m256i b = _mm256_maddubs_epi16(high, _mm256_loadu_si256((const __m256i *)(digit + 32)));
    return _mm256_add_epi16(a, b);
}

INLINE void fixed_int4_row(int count, int rows, int tokens, const Run *run, int64_t first,
                           int64_t apart, const Prepared *inputs, float *restrict scales,
                           float *restrict out, int64_t stride) {
    int64_t k = run->k, bytes = row_bytes(INT4, k), groups = (k + GROUP - 1) / GROUP;
    int64_t scales_apart = groups + W;
    const uint8_t *p = run->weight + first * bytes, *digits[MAX_ROW_TOKENS];
    __m256i nibbles = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    __m256i base = _mm256_set1_epi16(256);
    vf acc[4][MAX_ROW_TOKENS];
    UNROLL for (int m = 0; m < tokens; m++) digits[m] = fixed_digits(inputs[m].values, k);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int m = 0; m < tokens; m++)
            acc[r][m] = -fixed_scales(run->scale + (first + r * apart) * scale_bytes(INT4, k), k,
                                      &inputs[m], scales + (r * tokens + m) * scales_apart);
    for (int64_t g = 0; g < groups; g++, p += GROUP / 2)
        UNROLL for (int r = 0; r < rows; r++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(p + r * apart * bytes));
            __m256i low = _mm256_and_si256(v, nibbles);
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibbles);
            UNROLL for (int m = 0; m < tokens; m++) {
                const uint8_t *d = digits[m] + g * DIGIT_BYTES;
                __m256i t = _mm256_madd_epi16(digit_sum(low, high, d + 2 * GROUP), one);
                __m256i upper = _mm256_madd_epi16(digit_sum(low, high, d + GROUP),
                                                  count == 2 ? base : one);
                if (count == 3) {
                    __m256i top = _mm256_madd_epi16(digit_sum(low, high, d), base);
                    upper = _mm256_slli_epi32(_mm256_add_epi32(top, upper), 8);
                }
                t = _mm256_add_epi32(t, upper);
                acc[r][m] = fma_(splat(scales[(r * tokens + m) * scales_apart + g]),
                                 to_float((vi)t), acc[r][m]);
            }
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int m = 0; m < tokens; m++)
            out[m * stride + first + r * apart] = sum(acc[r][m]);
}

INLINE void fixed_int4_rows(int count, int tokens, const Run *run, const Prepared *inputs,
                            float *scratch, float *out, int64_t stride) {
    int64_t apart = run->rows / 4;
    for (int64_t r = 0; r < apart; r++)
        fixed_int4_row(count, 4, tokens, run, r, apart, inputs, scratch, out, stride);
    for (int64_t r = apart * 4; r < run->rows; r++)
        fixed_int4_row(count, 1, tokens, run, r, 0, inputs, scratch, out, stride);
}

static void int4_1(const Run *run, const Prepared *inputs, float *scratch, float *out,
                         int64_t stride) {
    if (*fixed_count((float *)inputs->values, run->k) == 2)
        fixed_int4_rows(2, 1, run, inputs, scratch, out, stride);
    else
        fixed_int4_rows(3, 1, run, inputs, scratch, out, stride);
}

/* More tokens than one take three digits: a first digit of zero adds nothing, so the bits stay. */
#define INT4_ROWS(tokens)                                                                        \
    static void int4_##tokens(const Run *run, const Prepared *inputs, float *scratch,       \
                                    float *out, int64_t stride) {                                 \
        fixed_int4_rows(3, tokens, run, inputs, scratch, out, stride);                            \
    }
INT4_ROWS(2)
INT4_ROWS(3)
INT4_ROWS(4)

static void int8_1(const Run *run, const Prepared *inputs, float *scratch, float *out,
                         int64_t stride) {
    int64_t apart = run->rows / 4;
    (void)scratch;
    (void)stride;
    for (int64_t r = 0; r < apart; r++)
        fixed_int8_row(4, run, r, apart, inputs->values, out);
    for (int64_t r = apart * 4; r < run->rows; r++)
        fixed_int8_row(1, run, r, 0, inputs->values, out);
}

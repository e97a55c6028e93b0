/* int8 and int4 rows on AVX2 in whole numbers (whole.h); part of rows.h. */

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

/* Lanes [from, to) of eight floats, the others 0 and not read. */
INLINE vf load_lanes(const float *p, int from, int to) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i begun = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(from - 1));
    return (vf)_mm256_maskload_ps(
        p, _mm256_and_si256(begun, _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane)));
}

/* Scales of one row times a token's factors, into `own`; returns what the nibbles' offset of 8 adds.
   A last part of eight is read so that it ends where the row ends, without the sums met before. */
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
        offset = fma_(scaled, load_lanes(input->sums + last, (int)(g - last), (int)(groups - last)),
                      offset);
    }
    return offset;
}

INLINE __m256i digit_sum(__m256i low, __m256i high, const uint8_t *digit) {
    __m256i a = _mm256_maddubs_epi16(low, _mm256_loadu_si256((const __m256i *)digit));
    __m256i b = _mm256_maddubs_epi16(high, _mm256_loadu_si256((const __m256i *)(digit + 32)));
    return _mm256_add_epi16(a, b);
}

INLINE void fixed_int4_row(int rows, int tokens, const Run *run, int64_t first,
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
                __m256i middle = _mm256_madd_epi16(digit_sum(low, high, d + GROUP), one);
                __m256i top = _mm256_madd_epi16(digit_sum(low, high, d), base);
                t = _mm256_add_epi32(t, _mm256_slli_epi32(_mm256_add_epi32(top, middle), 8));
                acc[r][m] = fma_(splat(scales[(r * tokens + m) * scales_apart + g]),
                                 to_float((vi)t), acc[r][m]);
            }
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int m = 0; m < tokens; m++)
            out[m * stride + first + r * apart] = sum(acc[r][m]);
}

INLINE void fixed_int4_rows(int tokens, const Run *run, const Prepared *inputs, float *scratch,
                            float *out, int64_t stride) {
    int64_t apart = run->rows / 4;
    for (int64_t r = 0; r < apart; r++)
        fixed_int4_row(4, tokens, run, r, apart, inputs, scratch, out, stride);
    for (int64_t r = apart * 4; r < run->rows; r++)
        fixed_int4_row(1, tokens, run, r, 0, inputs, scratch, out, stride);
}

INLINE void fixed_int8_rows(int tokens, const Run *run, const Prepared *inputs, float *out,
                            int64_t stride) {
    int64_t apart = run->rows / 4;
    for (int m = 0; m < tokens; m++, out += stride) {
        for (int64_t r = 0; r < apart; r++)
            fixed_int8_row(4, run, r, apart, inputs[m].values, out);
        for (int64_t r = apart * 4; r < run->rows; r++)
            fixed_int8_row(1, run, r, 0, inputs[m].values, out);
    }
}

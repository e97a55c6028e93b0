/* int8 and int4 rows in whole numbers (whole.h) on AVX-512 with byte products; part of rows.h.

   A product takes unsigned bytes by signed ones, four to a lane, summed exactly in 32 bits. int4 gives
   its nibbles as they lie and takes 8 x the inputs' sum off at the end of the row; int8 gives weight +
   128 and starts from -128 x the sum of the digits that meet the lane. */

enum { INT8_BLOCK_BYTES = 4 * PERIOD }; /* three digits of 128 inputs, two vectors of starts */

INLINE __m512i load512(const void *p) { return _mm512_loadu_si512(p); }
INLINE __m512i byte_products(__m512i sum, __m512i weights, __m512i digits) {
    return _mm512_dpbusd_epi32(sum, weights, digits);
}

/* -128 x the sum of each four of 128 signed bytes, the two halves added */
INLINE __m512i start_of(const uint8_t *digits) {
    __m512i ones = _mm512_set1_epi8(1), sum = _mm512_setzero_si512();
    sum = byte_products(sum, ones, load512(digits));
    sum = byte_products(sum, ones, load512(digits + 64));
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7));
}

static void fix_int8(const float *x, int64_t k, int64_t from, int64_t to, float *values) {
    uint8_t *digits = (uint8_t *)fixed_digits(values, k);
    float *factors = (float *)fixed_factors(INT8, values, k);
    for (int64_t base = from; base < to; base += PERIOD) {
        float buffer[PERIOD];
        const float *block = padded(x + base, k - base, PERIOD, buffer);
        uint8_t *out = digits + base / PERIOD * INT8_BLOCK_BYTES;
        Unit unit = unit_of(block, PERIOD, FINE_BITS);
        factors[2 * (base / PERIOD)] = unit.factor * 65536;
        factors[2 * (base / PERIOD) + 1] = unit.factor;
        for (int i = 0; i < PERIOD; i += 32) {
            __m256i whole[4], digit[4];
            for (int j = 0; j < 4; j++) whole[j] = whole_numbers(block + i + 8 * j, unit);
            for (int d = 2; d >= 0; d--) {
                for (int j = 0; j < 4; j++) digit[j] = take_digit(&whole[j]);
                _mm256_storeu_si256((__m256i *)(out + d * PERIOD + i), pack_bytes(digit));
            }
        }
        __m512i middle = _mm512_slli_epi32(start_of(out + PERIOD), 8);
        __m512i low = _mm512_add_epi32(middle, start_of(out + 2 * PERIOD));
        _mm512_storeu_si512(out + 3 * PERIOD, start_of(out));
        _mm512_storeu_si512(out + 3 * PERIOD + 64, low);
    }
}

INLINE void vnni_int8_row(int rows, int tokens, const Run *run, int64_t first, int64_t apart,
                          const Prepared *inputs, float *out, int64_t stride) {
    int64_t k = run->k, full = k / PERIOD, step = apart * k;
    const uint8_t *p = run->weight + first * k, *digits[MAX_ROW_TOKENS];
    const float *factors[MAX_ROW_TOKENS];
    __m512i offset = _mm512_set1_epi8((char)0x80);
    uint8_t last[4][PERIOD];
    vf acc[4][MAX_ROW_TOKENS];
    UNROLL for (int m = 0; m < tokens; m++) {
        digits[m] = fixed_digits(inputs[m].values, k);
        factors[m] = fixed_factors(INT8, inputs[m].values, k);
        UNROLL for (int r = 0; r < rows; r++) acc[r][m] = (vf){0};
    }
    for (int64_t b = 0; b <= full; b++, p += PERIOD) {
        if (b == full) {
            if (k == full * PERIOD) break;
            memset(last, 0, sizeof last);
            for (int r = 0; r < rows; r++)
                memcpy(last[r], p + r * step, (size_t)(k - full * PERIOD));
            p = last[0];
            step = PERIOD;
        }
        __m512i high[4][MAX_ROW_TOKENS], middle[4][MAX_ROW_TOKENS], low[4][MAX_ROW_TOKENS];
        UNROLL for (int half = 0; half < 2; half++)
            UNROLL for (int m = 0; m < tokens; m++) {
                const uint8_t *d = digits[m] + b * INT8_BLOCK_BYTES;
                __m512i d0 = load512(d + 64 * half), d1 = load512(d + PERIOD + 64 * half);
                __m512i d2 = load512(d + 2 * PERIOD + 64 * half);
                UNROLL for (int r = 0; r < rows; r++) {
                    __m512i w = _mm512_xor_si512(load512(p + r * step + 64 * half), offset);
                    if (!half) {
                        high[r][m] = load512(d + 3 * PERIOD);
                        low[r][m] = load512(d + 3 * PERIOD + 64);
                        middle[r][m] = _mm512_setzero_si512();
                    }
                    high[r][m] = byte_products(high[r][m], w, d0);
                    middle[r][m] = byte_products(middle[r][m], w, d1);
                    low[r][m] = byte_products(low[r][m], w, d2);
                }
            }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int m = 0; m < tokens; m++) {
                __m512i rest = _mm512_add_epi32(low[r][m], _mm512_slli_epi32(middle[r][m], 8));
                vf *a = &acc[r][m];
                *a = fma_(to_float((vi)high[r][m]), splat(factors[m][2 * b]), *a);
                *a = fma_(to_float((vi)rest), splat(factors[m][2 * b + 1]), *a);
            }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        float scale;
        memcpy(&scale, run->scale + 4 * (first + r * apart), 4);
        UNROLL for (int m = 0; m < tokens; m++)
            out[m * stride + first + r * apart] = sum(acc[r][m]) * scale;
    }
}

/* Scales of one row times a token's factors, into `own`, zeros up to whole vectors; returns what the
   nibbles' offset of 8 adds. */
INLINE vf vnni_scales(const uint8_t *scale, int64_t groups, const float *factors, const float *sums,
                      float *own) {
    vf offset = {0};
    for (int64_t g = 0; g < groups; g += W) {
        __mmask16 there = groups - g >= W ? 0xffff : (__mmask16)((1u << (groups - g)) - 1);
        __m512i half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, scale + 2 * g));
        vf scaled = (vf)_mm512_slli_epi32(half, 16) *
                    (vf)_mm512_maskz_loadu_ps(there, factors + g);
        store(own + g, scaled);
        offset = fma_(scaled, (vf)_mm512_maskz_loadu_ps(there, sums + g), offset);
    }
    return offset;
}

/* Two groups: their bytes by a token's digits there, scaled by `scale`. */
INLINE vf two_groups(__m512i v, const uint8_t *d, vf scale, vf acc) {
    __m512i nibbles = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    __m512i low = _mm512_and_si512(v, nibbles);
    __m512i high = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibbles);
    __m512i digit[3];
    UNROLL for (int i = 0; i < 3; i++) {
        digit[i] = byte_products(zero, low, load512(d + 2 * i * GROUP));
        digit[i] = byte_products(digit[i], high, load512(d + (2 * i + 1) * GROUP));
    }
    digit[1] = _mm512_add_epi32(digit[1], _mm512_slli_epi32(digit[0], 8));
    digit[2] = _mm512_add_epi32(digit[2], _mm512_slli_epi32(digit[1], 8));
    return fma_(to_float((vi)digit[2]), scale, acc);
}

INLINE void vnni_int4_row(int rows, int tokens, const Run *run, int64_t first, int64_t step,
                          const Prepared *inputs, float *restrict scales, float *restrict out,
                          int64_t stride) {
    int64_t k = run->k, groups = (k + GROUP - 1) / GROUP, apart = (groups + W) / W * W;
    int64_t bytes = row_bytes(INT4, k);
    const uint8_t *p = run->weight + first * bytes, *digits[MAX_ROW_TOKENS];
    vf acc[4][MAX_ROW_TOKENS];
    UNROLL for (int m = 0; m < tokens; m++) {
        digits[m] = fixed_digits(inputs[m].values, k);
        UNROLL for (int r = 0; r < rows; r++)
            acc[r][m] = -vnni_scales(run->scale + (first + r * step) * scale_bytes(INT4, k), groups,
                                     fixed_factors(INT4, inputs[m].values, k), inputs[m].sums,
                                     scales + (r * tokens + m) * apart);
    }
    for (int64_t g = 0; g < groups; g += 2)
        UNROLL for (int r = 0; r < rows; r++) {
            const uint8_t *from = p + r * step * bytes + g * (GROUP / 2);
            __m512i v = g + 1 < groups ? load512(from)
                                       : _mm512_zextsi256_si512(
                                             _mm256_loadu_si256((const __m256i *)from));
            UNROLL for (int m = 0; m < tokens; m++) {
                const float *own = scales + (r * tokens + m) * apart + g;
                __m512 pair = _mm512_mask_mov_ps(_mm512_set1_ps(own[0]), 0xff00,
                                                 _mm512_set1_ps(own[1]));
                acc[r][m] = two_groups(v, digits[m] + g * DIGIT_BYTES, (vf)pair, acc[r][m]);
            }
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int m = 0; m < tokens; m++)
            out[m * stride + first + r * step] = sum(acc[r][m]);
}

INLINE void vnni_int8_rows(int tokens, const Run *run, const Prepared *inputs, float *scratch,
                           float *out, int64_t stride) {
    int64_t apart = run->rows / streams(tokens);
    (void)scratch;
    for (int64_t r = 0; r < apart; r++)
        vnni_int8_row(streams(tokens), tokens, run, r, apart, inputs, out, stride);
    for (int64_t r = apart * streams(tokens); r < run->rows; r++)
        vnni_int8_row(1, tokens, run, r, 0, inputs, out, stride);
}

INLINE void vnni_int4_rows(int tokens, const Run *run, const Prepared *inputs, float *scratch,
                           float *out, int64_t stride) {
    int64_t apart = run->rows / streams(tokens);
    for (int64_t r = 0; r < apart; r++)
        vnni_int4_row(streams(tokens), tokens, run, r, apart, inputs, scratch, out, stride);
    for (int64_t r = apart * streams(tokens); r < run->rows; r++)
        vnni_int4_row(1, tokens, run, r, 0, inputs, scratch, out, stride);
}

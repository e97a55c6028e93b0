/* Inputs of int8 and int4 rows as whole numbers, for fixed.h and vnni.h; part of rows.h.

   Turning each weight into a float costs more than memory does. Here the inputs of a block are held as
   whole numbers of one power of two, cut into digits of two bytes (int8 on AVX2) or one, and products
   are summed exactly in integers, 16 to 64 to an operation; the sum meets its scale as a float.
   int8: 30 bits in blocks of 128 on AVX2, 23 with byte products (vnni.h). int4: 23 bits in groups of
   64. An input keeps 2^-24 of its block's largest, which is what sums in fp32 keep of their largest
   term; where that is below 2^-87, inputs keep 2^-111. A block holding NaN or infinity gives NaN. */

enum { WIDE_BITS = 30, FINE_BITS = 23, DIGIT_BYTES = 3 * GROUP };

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
    /* 23 bits are three signed bytes but for the topmost values: those move to the next power. */
    if (bits == FINE_BITS && (top & 0x7fffff) > 0x7e0000) top += 0x800000;
    power = bits - (top >> 23);
    /* Below 2^-87 the unit shrinks no further: times a small scale it would be denormal. */
    if (power > bits - 40) power = bits - 40;
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

/* What a format's inputs take behind the `values` that tiles use: digits, then factors. Counted in
   floats. */
INLINE int64_t blocks(int64_t k) { return (k + PERIOD - 1) / PERIOD; }
INLINE int64_t digits_size(int32_t format, int64_t k) {
    return blocks(k) * (format == INT8 ? PERIOD : 2 * DIGIT_BYTES / 4);
}
INLINE int64_t fixed_size(int32_t format, int64_t k) {
    return digits_size(format, k) + 2 * blocks(k) + W;
}
INLINE const uint8_t *fixed_digits(const float *values, int64_t k) {
    return (const uint8_t *)(values + blocks(k) * PERIOD);
}
INLINE const float *fixed_factors(int32_t format, const float *values, int64_t k) {
    return values + blocks(k) * PERIOD + digits_size(format, k);
}
/* Up to `count` inputs from x, zeros after them. */
INLINE const float *padded(const float *x, int64_t left, int64_t count, float *buffer) {
    if (left >= count) return x;
    memset(buffer, 0, sizeof(float) * (size_t)count);
    memcpy(buffer, x, sizeof(float) * (size_t)left);
    return buffer;
}

/* 32 ints that fit a byte, in order */
INLINE __m256i pack_bytes(const __m256i *v) {
    __m256i low = _mm256_packs_epi32(v[0], v[1]), high = _mm256_packs_epi32(v[2], v[3]);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* Where digit d (0 is the highest) of 32 inputs lies: the first half of group g or its second. Byte
   products take two groups at once. */
INLINE uint8_t *digit_at(uint8_t *digits, int64_t g, int d, int half) {
#if defined(ISA_VNNI)
    return digits + g / 2 * 2 * DIGIT_BYTES + (2 * d + half) * GROUP + g % 2 * 32;
#else
    return digits + g * DIGIT_BYTES + d * GROUP + half * 32;
#endif
}

/* Whole numbers -> their lowest signed byte, and what is left above it. */
INLINE __m256i take_digit(__m256i *whole) {
    __m256i digit = _mm256_srai_epi32(_mm256_slli_epi32(*whole, 24), 24);
    *whole = _mm256_srai_epi32(_mm256_sub_epi32(*whole, digit), 8);
    return digit;
}

/* One group -> its three digits; returns 8 x its sum. */
INLINE float fix_group(const float *x, Unit unit, int64_t g, uint8_t *digits) {
    __m256i whole[8], total = _mm256_setzero_si256();
    for (int i = 0; i < 8; i++) {
        whole[i] = whole_numbers(x + 8 * i, unit);
        total = _mm256_add_epi32(total, whole[i]);
    }
    for (int d = 2; d >= 0; d--) {
        __m256i digit[8];
        for (int i = 0; i < 8; i++) digit[i] = take_digit(&whole[i]);
        _mm256_storeu_si256((__m256i *)digit_at(digits, g, d, 0), pack_bytes(digit));
        _mm256_storeu_si256((__m256i *)digit_at(digits, g, d, 1), pack_bytes(digit + 4));
    }
    return 8.0f * (float)sum_ints(total);
}

static void fix_int4(const float *x, int64_t k, int64_t from, int64_t to, float *values,
                     float *sums) {
    uint8_t *digits = (uint8_t *)fixed_digits(values, k);
    float *factors = (float *)fixed_factors(INT4, values, k);
    for (int64_t base = from; base < to; base += GROUP) {
        int64_t g = base / GROUP;
        float buffer[GROUP];
        const float *group = padded(x + base, k - base, GROUP, buffer);
        Unit unit = unit_of(group, GROUP, FINE_BITS);
        factors[g] = unit.factor;
        sums[g] = fix_group(group, unit, g, digits);
    }
    if (to != k) return;
    int64_t groups = (k + GROUP - 1) / GROUP;
    for (int64_t g = groups; g < 2 * blocks(k) + W; g++) factors[g] = 0;
#if defined(ISA_VNNI)
    for (int64_t g = groups; g < sums_size(INT4, k); g++) sums[g] = 0;
#endif
}

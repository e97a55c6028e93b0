/* Vectors of W floats in the compiler's vector extension, and the few operations that each instruction
   set spells differently. W and one of ISA_AVX512, ISA_AVX2, ISA_NEON (or none) are set by the includer. */
#include <math.h>
#include <string.h>

#if defined(ISA_AVX512) || defined(ISA_AVX2)
#include <immintrin.h>
#elif defined(ISA_NEON)
#include <arm_neon.h>
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

#define INLINE static inline __attribute__((always_inline, unused))

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE vi load_int(const void *p) {
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf splat(float s) { return s - (vf){0}; }
INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
INLINE vi shift_right(vi v, int bits) { return (vi)((vu)v >> bits); }
INLINE vi shift_left(vi v, int bits) { return (vi)((vu)v << bits); }

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    uint32_t bits;
    float f;
    if (exponent == 0) {
        f = (float)fraction * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    memcpy(&f, &bits, 4);
    return f;
}

/* Sum of the lanes in one fixed order: halves, quarters, ... */
#if defined(ISA_AVX512) || defined(ISA_AVX2)
INLINE float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#endif
#if defined(ISA_AVX512)
INLINE float sum(vf v) {
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1));
    return sum8(_mm256_add_ps(_mm512_castps512_ps256((__m512)v), high));
}
#elif defined(ISA_AVX2)
INLINE float sum(vf v) { return sum8((__m256)v); }
#else
INLINE float sum(vf v) {
    float lane[W];
    store(lane, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}
#endif

#if defined(ISA_AVX512)
INLINE vf fma_(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vf load_half(const uint8_t *p) {
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
#elif defined(ISA_AVX2)
INLINE vf fma_(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf load_half(const uint8_t *p) {
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
#elif defined(ISA_NEON)
INLINE vf fma_(vf a, vf b, vf c) {
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INLINE vf load_half(const uint8_t *p) {
    uint16_t half[4];
    memcpy(half, p, sizeof half);
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half)));
}
#else
INLINE vf fma_(vf a, vf b, vf c) { return a * b + c; }
INLINE vf load_half(const uint8_t *p) {
    float lane[W];
    for (int i = 0; i < W; i++) {
        uint16_t half;
        memcpy(&half, p + 2 * i, 2);
        lane[i] = half_to_float(half);
    }
    return load(lane);
}
#endif

/* The compiler must not load a vector twice because it is used twice: the load ports are the limit. */
#if defined(ISA_AVX512)
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(ISA_AVX2)
#define KEEP(v) __asm__("" : "+x"(v))
#elif defined(ISA_NEON)
#define KEEP(v) __asm__("" : "+w"(v))
#else
#define KEEP(v) (void)(v)
#endif

/* NF4 levels of the 8 W nibbles of one vector. decode_nf4 gives 8 vectors; lane `lane` of vector `j`
   is nibble nf4_nibble(j, lane) of the 4 W bytes, counted 2 x byte + (1 if it is the high one). */
static const float nf4_levels[16] = {
    -1.0f,         -0.6961928009986877f,  -0.5250730514526367f,  -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,  1.0f,
};

#if defined(ISA_AVX2)
/* One byte shuffle per byte of the level (four tables of sixteen), interleaved to floats. */
typedef struct {
    __m256i byte[4];
} Levels;
INLINE Levels load_levels(void) {
    Levels levels;
    uint8_t table[4][32];
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        memcpy(&bits, &nf4_levels[i], 4);
        for (int b = 0; b < 4; b++) table[b][i] = table[b][i + 16] = (uint8_t)(bits >> (8 * b));
    }
    for (int b = 0; b < 4; b++) levels.byte[b] = _mm256_loadu_si256((const __m256i *)table[b]);
    return levels;
}
INLINE void decode_nf4(vi v, Levels levels, vf out[8]) {
    __m256i mask = _mm256_set1_epi8(15);
    __m256i nibbles[2] = {_mm256_and_si256((__m256i)v, mask),
                          _mm256_and_si256(_mm256_srli_epi16((__m256i)v, 4), mask)};
    for (int h = 0; h < 2; h++) {
        __m256i b0 = _mm256_shuffle_epi8(levels.byte[0], nibbles[h]);
        __m256i b1 = _mm256_shuffle_epi8(levels.byte[1], nibbles[h]);
        __m256i b2 = _mm256_shuffle_epi8(levels.byte[2], nibbles[h]);
        __m256i b3 = _mm256_shuffle_epi8(levels.byte[3], nibbles[h]);
        __m256i low01 = _mm256_unpacklo_epi8(b0, b1), high01 = _mm256_unpackhi_epi8(b0, b1);
        __m256i low23 = _mm256_unpacklo_epi8(b2, b3), high23 = _mm256_unpackhi_epi8(b2, b3);
        out[4 * h] = (vf)_mm256_unpacklo_epi16(low01, low23);
        out[4 * h + 1] = (vf)_mm256_unpackhi_epi16(low01, low23);
        out[4 * h + 2] = (vf)_mm256_unpacklo_epi16(high01, high23);
        out[4 * h + 3] = (vf)_mm256_unpackhi_epi16(high01, high23);
    }
}
INLINE int nf4_nibble(int j, int lane) {
    int byte = 16 * (lane / 4) + 4 * (j % 4) + lane % 4;
    return 2 * byte + j / 4;
}
#else
INLINE int nf4_nibble(int j, int lane) { return 8 * lane + j; }
#if defined(ISA_AVX512)
typedef __m512 Levels;
INLINE Levels load_levels(void) { return _mm512_loadu_ps(nf4_levels); }
INLINE void decode_nf4(vi v, Levels levels, vf out[8]) {
    for (int j = 0; j < 8; j++)
        out[j] = (vf)_mm512_permutexvar_ps((__m512i)shift_right(v, 4 * j), levels);
}
#else
typedef const float *Levels;
INLINE Levels load_levels(void) { return nf4_levels; }
INLINE void decode_nf4(vi v, Levels levels, vf out[8]) {
    uint32_t bits[W];
    memcpy(bits, &v, sizeof bits);
    for (int j = 0; j < 8; j++) {
        float lane[W];
        for (int i = 0; i < W; i++) lane[i] = levels[bits[i] >> (4 * j) & 15];
        out[j] = load(lane);
    }
}
#endif
#endif

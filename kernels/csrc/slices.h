/* What float tiles (tiles.h) and bf16 tiles (pairs.h) share; part of rows.h. */

/* Accumulators of a tile, the rows and a token's inputs must fit the vector registers. */
#if defined(ISA_AVX512) || defined(ISA_NEON)
#define TILE_ROWS 4
#define TILE_TOKENS 6
#else
#define TILE_ROWS 3
#define TILE_TOKENS 4
#endif
enum { SLICE = 1024, TOKENS_TOGETHER = 128 };

/* The rows of one tile of a run, and how many they are: far apart in memory, each a stream that the
   hardware runs ahead in; a last tile has fewer, its last row repeated. */
INLINE int64_t rows_of_tile(const Run *run, int64_t tile, int64_t index[TILE_ROWS]) {
    int64_t apart = run->rows / TILE_ROWS, rest = run->rows % TILE_ROWS;
    for (int64_t r = 0; r < TILE_ROWS; r++)
        if (tile < apart) index[r] = tile + r * apart;
        else index[r] = apart * TILE_ROWS + (r < rest ? r : rest - 1);
    return tile < apart ? TILE_ROWS : rest;
}

/* How many of `left` tokens the next tile takes, so that tiles are of like size. */
static int64_t even_part(int64_t left, int64_t most) {
    int64_t tiles = (left + most - 1) / most;
    return (left + tiles - 1) / tiles;
}

/* Sum of the lanes of each row's vector, in one fixed order. */
#if defined(ISA_AVX512)
INLINE void sum_rows(const vf *acc, float *sums) {
    __m512 a = (__m512)acc[0], b = (__m512)acc[1], c = (__m512)acc[2], d = (__m512)acc[3];
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
    __m512 four = _mm512_add_ps(low, high);
    __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(four), 1));
    __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), upper);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
}
#else
INLINE void sum_rows(const vf *acc, float *sums) {
    UNROLL for (int r = 0; r < TILE_ROWS; r++) sums[r] = sum(acc[r]);
}
#endif

/* What each row's sums are multiplied with: int8's scale. */
INLINE void row_scales(int32_t format, const Run *run, const int64_t *index, float *scales) {
    for (int r = 0; r < TILE_ROWS; r++) {
        scales[r] = 1;
        if (format == INT8) memcpy(scales + r, run->scale + 4 * index[r], 4);
    }
}

/* A slice's sums of the first `rows` rows into one token's outputs. */
INLINE void add_sums(const float *sums, const float *scales, const int64_t *index, int64_t rows,
                     int first, float *out) {
    UNROLL for (int r = 0; r < TILE_ROWS; r++) {
        float scaled = sums[r] * scales[r];
        if (r < rows) out[index[r]] = first ? scaled : out[index[r]] + scaled;
    }
}

/* Scales of the groups of a row's slice at `at`, zeros behind them. */
INLINE void slice_scales(int32_t format, const Run *run, int64_t row, int64_t at, int64_t slice,
                         float *out) {
    int64_t groups = (run->k + GROUP - 1) / GROUP - at / GROUP;
    const uint8_t *scale = run->scale + row * scale_bytes(format, run->k);
    if (groups > slice / GROUP) groups = slice / GROUP;
    widen_scales(format, scale + at / GROUP * (format == NF4 ? 4 : 2), groups, out);
}

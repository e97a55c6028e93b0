/* Tiles in bf16 for processors with products of bf16 pairs (AVX-512 BF16); part of rows.h.

   Weights of bf16, int8 and int4 are bf16 numbers as they are, or whole numbers that bf16 holds; their
   scales are applied in fp32, to sums. So nothing but the inputs is in bf16, and sums are fp32. The
   unit takes denormals as zero. bf16 weights are read where they lie. */

enum { PAIR_SLICE = 2048, PAIR_BLOCK = 4 * GROUP, INT4_TOKENS = 3 };

INLINE __m512bh bf16_at(const uint16_t *p) { return (__m512bh)_mm512_loadu_si512(p); }

/* Up to 64 bytes from p, zeros behind them. */
INLINE __m512i first_bytes(const uint8_t *p, int64_t left) {
    if (left >= 64) return _mm512_loadu_si512(p);
    return left > 0 ? _mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, p) : _mm512_setzero_si512();
}

/* Tokens' inputs do not lie whole pages apart: their vectors would share a set of the cache. */
static int64_t pairs_size(int64_t k) { return (k + PAIR_BLOCK - 1) / PAIR_BLOCK * PAIR_BLOCK + 32; }

/* Natural inputs [k] -> bf16 in the order in which weights of `format` are unpacked, zeros behind them. */
static void prepare_pairs(int32_t format, const float *x, int64_t k, uint16_t *out) {
    uint16_t twice[32];
    for (int i = 0; i < 32; i++) twice[i] = (uint16_t)(2 * i);
    __m512i even = _mm512_loadu_si512(twice), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    __m512i even_twos = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(even));
    __m512i odd_twos = _mm512_add_epi32(even_twos, _mm512_set1_epi32(1));
    for (int64_t at = 0; at < k; at += PAIR_BLOCK, out += PAIR_BLOCK) {
        float buffer[PAIR_BLOCK];
        const float *from = padded(x + at, k - at, PAIR_BLOCK, buffer);
        __m512i v[8], u[8];
        for (int i = 0; i < 8; i++)
            v[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 32 * i + 16),
                                                _mm512_loadu_ps(from + 32 * i));
        if (format == INT8) /* the first two of each four, then the others */
            for (int i = 0; i < 8; i += 2) {
                u[i] = _mm512_permutex2var_epi32(v[i], even_twos, v[i + 1]);
                u[i + 1] = _mm512_permutex2var_epi32(v[i], odd_twos, v[i + 1]);
            }
        if (format == INT4) /* four lanes to a group; nibble i of each two bytes, in halves of groups */
            for (int i = 0; i < 4; i++) {
                __m512i which = i < 2 ? even : odd;
                __m512i low = _mm512_permutex2var_epi16(v[i % 2], which, v[i % 2 + 2]);
                __m512i high = _mm512_permutex2var_epi16(v[i % 2 + 4], which, v[i % 2 + 6]);
                u[i] = _mm512_shuffle_i64x2(low, high, 0x88);
                u[i + 4] = _mm512_shuffle_i64x2(low, high, 0xdd);
            }
        for (int i = 0; i < 8; i++)
            _mm512_storeu_si512(out + 32 * i, format == INT8 || format == INT4 ? u[i] : v[i]);
    }
}

/* int8 weights [at, at + width) of a row -> bf16, zeros to a multiple of 64. */
static void expand_int8(const Run *run, int64_t row, int64_t at, int64_t width, uint16_t *out) {
    const uint8_t *p = run->weight + row * run->k + at;
    for (int64_t i = 0; i < width; i += 64) {
        vi v = (vi)first_bytes(p + i, width - i);
        vu first = (vu)to_float(shift_left(v, 24) >> 24), second = (vu)to_float(shift_left(v, 16) >> 24);
        vu third = (vu)to_float(shift_left(v, 8) >> 24), fourth = (vu)to_float(v >> 24);
        _mm512_storeu_si512(out + i, (__m512i)(first >> 16 | second));
        _mm512_storeu_si512(out + i + 32, (__m512i)(third >> 16 | fourth));
    }
}

/* int4 weights of the blocks at `at` -> bf16 whole numbers, and each block's scales by lane. */
static void expand_int4(const Run *run, int64_t row, int64_t at, int64_t width, __m512i levels,
                        uint16_t *out, float *scales) {
    float by_group[PAIR_SLICE / GROUP + W];
    int64_t bytes = row_bytes(INT4, run->k) - at / 2;
    const uint8_t *p = run->weight + row * row_bytes(INT4, run->k) + at / 2;
    __m512i group_of_lane = _mm512_srli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5,
                                                               4, 3, 2, 1, 0), 2);
    slice_scales(INT4, run, row, at, PAIR_SLICE, by_group);
    for (int64_t b = 0; PAIR_BLOCK * b < width; b++, p += 128, bytes -= 128) {
        __m512i low = first_bytes(p, bytes), high = first_bytes(p + 64, bytes - 64);
        __m512i half[2] = {_mm512_shuffle_i64x2(low, high, 0x88),
                           _mm512_shuffle_i64x2(low, high, 0xdd)};
        for (int i = 0; i < 8; i++)
            _mm512_storeu_si512(
                out + PAIR_BLOCK * b + 32 * i,
                _mm512_permutexvar_epi16(_mm512_srli_epi16(half[i / 4], (unsigned)(i % 4 * 4)), levels));
        _mm512_storeu_ps(scales + W * b, _mm512_permutexvar_ps(group_of_lane,
                                                               _mm512_loadu_ps(by_group + 4 * b)));
    }
}

/* sums[m][r] of row r and token m over `width` weights, which the inputs' zeros go on behind. */
INLINE void pair_tile(int tokens, const uint16_t *const *rows, const uint16_t *const *x,
                      int64_t width, float sums[TILE_TOKENS][TILE_ROWS]) {
    __m512 acc[TILE_TOKENS][TILE_ROWS];
    int64_t i = 0;
    UNROLL for (int m = 0; m < tokens; m++)
        UNROLL for (int r = 0; r < TILE_ROWS; r++) acc[m][r] = _mm512_setzero_ps();
    for (; i + 32 <= width; i += 32) {
        __m512bh w[TILE_ROWS];
        UNROLL for (int r = 0; r < TILE_ROWS; r++) w[r] = bf16_at(rows[r] + i);
        UNROLL for (int m = 0; m < tokens; m++) {
            __m512bh in = bf16_at(x[m] + i);
            UNROLL for (int r = 0; r < TILE_ROWS; r++)
                acc[m][r] = _mm512_dpbf16_ps(acc[m][r], w[r], in);
        }
    }
    if (i < width) {
        __mmask32 there = (1u << (width - i)) - 1;
        UNROLL for (int r = 0; r < TILE_ROWS; r++) {
            __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(there, rows[r] + i);
            UNROLL for (int m = 0; m < tokens; m++)
                acc[m][r] = _mm512_dpbf16_ps(acc[m][r], w, bf16_at(x[m] + i));
        }
    }
    UNROLL for (int m = 0; m < tokens; m++) sum_rows((const vf *)acc[m], sums[m]);
}

/* The same for int4: a block's sum meets its scale before it is added. */
INLINE void int4_tile(int tokens, const uint16_t *const *rows, const float *const *scales,
                      const uint16_t *const *x, int64_t width,
                      float sums[TILE_TOKENS][TILE_ROWS]) {
    vf acc[INT4_TOKENS][TILE_ROWS];
    UNROLL for (int m = 0; m < tokens; m++)
        UNROLL for (int r = 0; r < TILE_ROWS; r++) acc[m][r] = (vf){0};
    for (int64_t i = 0; i < width; i += PAIR_BLOCK) {
        __m512 block[INT4_TOKENS][TILE_ROWS];
        UNROLL for (int j = 0; j < 8; j++) {
            __m512bh w[TILE_ROWS];
            UNROLL for (int r = 0; r < TILE_ROWS; r++) w[r] = bf16_at(rows[r] + i + 32 * j);
            UNROLL for (int m = 0; m < tokens; m++) {
                __m512bh in = bf16_at(x[m] + i + 32 * j);
                UNROLL for (int r = 0; r < TILE_ROWS; r++)
                    block[m][r] = _mm512_dpbf16_ps(j ? block[m][r] : _mm512_setzero_ps(), w[r], in);
            }
        }
        UNROLL for (int r = 0; r < TILE_ROWS; r++) {
            vf scale = load(scales[r] + i / PAIR_BLOCK * W);
            UNROLL for (int m = 0; m < tokens; m++)
                acc[m][r] = fma_((vf)block[m][r], scale, acc[m][r]);
        }
    }
    UNROLL for (int m = 0; m < tokens; m++) sum_rows(acc[m], sums[m]);
}

/* What a word's lowest four bits stand for, in bf16. */
INLINE __m512i int4_levels(void) {
    float whole[32];
    for (int i = 0; i < 32; i++) whole[i] = (float)(i % 16 - 8);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(whole + 16), _mm512_loadu_ps(whole));
}

INLINE void tile_in_pairs(int32_t format, int tokens, const uint16_t *const *rows,
                          const float *const *scales, const uint16_t *const *x, int64_t width,
                          float sums[TILE_TOKENS][TILE_ROWS]) {
    if (format == INT4)
        int4_tile(tokens, rows, scales, x, width, sums);
    else
        pair_tile(tokens, rows, x, width, sums);
}

INLINE void pairs(int32_t format, const Run *run, const Prepared *tokens, int64_t num_tokens,
                  float *scratch, float *out, int64_t stride) {
    int most = format == INT4 ? INT4_TOKENS : TILE_TOKENS;
    uint16_t *panel = (uint16_t *)scratch;
    float *lane_scales = scratch + TILE_ROWS * PAIR_SLICE / 2;
    __m512i levels = int4_levels();
    int64_t index[TILE_ROWS], rows;
    for (int64_t begin = 0; begin < num_tokens; begin += TOKENS_TOGETHER) {
        int64_t end = begin + TOKENS_TOGETHER < num_tokens ? begin + TOKENS_TOGETHER : num_tokens;
        for (int64_t at = 0; at < run->k; at += PAIR_SLICE) {
            int64_t width = run->k - at < PAIR_SLICE ? run->k - at : PAIR_SLICE;
            int64_t unit = format == BF16 ? 1 : format == INT8 ? 64 : PAIR_BLOCK;
            int64_t unpacked = (width + unit - 1) / unit * unit;
            for (int64_t done = 0; TILE_ROWS * done < run->rows; done++) {
                const uint16_t *w[TILE_ROWS], *x[TILE_TOKENS];
                const float *by_lane[TILE_ROWS];
                float scales[TILE_ROWS], sums[TILE_TOKENS][TILE_ROWS];
                rows = rows_of_tile(run, done, index);
                row_scales(format, run, index, scales);
                for (int64_t r = 0; r < TILE_ROWS; r++) {
                    uint16_t *mine = panel + r * PAIR_SLICE;
                    float *my_scales = lane_scales + r * (PAIR_SLICE / PAIR_BLOCK * W);
                    if (format == INT8) expand_int8(run, index[r], at, width, mine);
                    if (format == INT4)
                        expand_int4(run, index[r], at, width, levels, mine, my_scales);
                    w[r] = format == BF16 ? (const uint16_t *)run->weight + index[r] * run->k + at : mine;
                    by_lane[r] = my_scales;
                }
                for (int64_t t = begin, count; t < end; t += count) {
                    count = even_part(end - t, most);
                    for (int64_t m = 0; m < count; m++) x[m] = tokens[t + m].pairs + at;
                    switch (count) {
                    case 1: tile_in_pairs(format, 1, w, by_lane, x, unpacked, sums); break;
                    case 2: tile_in_pairs(format, 2, w, by_lane, x, unpacked, sums); break;
                    case 3: tile_in_pairs(format, 3, w, by_lane, x, unpacked, sums); break;
                    case 4: pair_tile(4, w, x, unpacked, sums); break;
                    case 5: pair_tile(5, w, x, unpacked, sums); break;
                    default: pair_tile(TILE_TOKENS, w, x, unpacked, sums);
                    }
                    for (int64_t m = 0; m < count; m++)
                        add_sums(sums[m], scales, index, rows, at == 0, out + (t + m) * stride);
                }
            }
        }
    }
}

#define PAIRS(name, format)                                                                       \
    static void name##_pairs(const Run *run, const Prepared *tokens, int64_t num_tokens,          \
                             float *scratch, float *out, int64_t stride) {                        \
        pairs(format, run, tokens, num_tokens, scratch, out, stride);                             \
    }
PAIRS(bf16, BF16)
PAIRS(int8, INT8)
PAIRS(int4, INT4)

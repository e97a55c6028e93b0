/* Tiles in bf16 for processors with products of bf16 pairs (AVX-512 BF16); part of rows.h.

   Weights of bf16, int8 and int4 are bf16 numbers as they are, or whole numbers that bf16 holds; their
   scales are applied in fp32, to sums. So nothing but the inputs is in bf16, and sums are fp32. The
   unit takes denormals as zero. bf16 weights are read where they lie. */

enum { PAIR_SLICE = 2048, INT4_TOKENS = 3 };

INLINE __m512bh bf16_at(const uint16_t *p) { return (__m512bh)_mm512_loadu_si512(p); }

static int64_t pairs_size(int64_t k) { return (k + PERIOD - 1) / PERIOD * PERIOD + 32; }

/* Natural inputs [k] -> bf16 in the order in which the weights of `format` are unpacked, padded with
   zeros. */
static void prepare_pairs(int32_t format, const float *x, int64_t k, uint16_t *out) {
    __m512i even = _mm512_setzero_si512();
    uint16_t twice[32];
    for (int i = 0; i < 32; i++) twice[i] = (uint16_t)(2 * i);
    even = _mm512_loadu_si512(twice);
    for (int64_t at = 0; at < k; at += PERIOD, out += PERIOD) {
        float buffer[PERIOD];
        const float *from = padded(x + at, k - at, PERIOD, buffer);
        __m512i v[4];
        for (int i = 0; i < 4; i++)
            v[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 32 * i + 16),
                                                _mm512_loadu_ps(from + 32 * i));
        if (format == INT8) { /* the first and the second two of each four */
            __m512i twos = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(even));
            __m512i next = _mm512_add_epi32(twos, _mm512_set1_epi32(1));
            for (int i = 0; i < 4; i += 2) {
                __m512i first = _mm512_permutex2var_epi32(v[i], twos, v[i + 1]);
                v[i + 1] = _mm512_permutex2var_epi32(v[i], next, v[i + 1]);
                v[i] = first;
            }
        }
        if (format == INT4) { /* nibble i of each two bytes of two groups */
            __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
            __m512i low = v[0], high = v[1];
            v[0] = _mm512_permutex2var_epi16(low, even, v[2]);
            v[1] = _mm512_permutex2var_epi16(high, even, v[3]);
            v[2] = _mm512_permutex2var_epi16(low, odd, v[2]);
            v[3] = _mm512_permutex2var_epi16(high, odd, v[3]);
        }
        for (int i = 0; i < 4; i++) _mm512_storeu_si512(out + 32 * i, v[i]);
    }
}

/* int8 weights [at, at + width) of a row -> bf16, zeros to a multiple of 64. */
static void expand_int8(const Run *run, int64_t row, int64_t at, int64_t width, uint16_t *out) {
    const uint8_t *p = run->weight + row * run->k + at;
    for (int64_t i = 0; i < width; i += 64) {
        __mmask64 there = width - i < 64 ? ((__mmask64)1 << (width - i)) - 1 : ~(__mmask64)0;
        vi v = (vi)_mm512_maskz_loadu_epi8(there, p + i);
        vu first = (vu)to_float(shift_left(v, 24) >> 24), second = (vu)to_float(shift_left(v, 16) >> 24);
        vu third = (vu)to_float(shift_left(v, 8) >> 24), fourth = (vu)to_float(v >> 24);
        _mm512_storeu_si512(out + i, (__m512i)(first >> 16 | second));
        _mm512_storeu_si512(out + i + 32, (__m512i)(third >> 16 | fourth));
    }
}

/* int4 weights of the blocks of 128 at `at` -> bf16 whole numbers, and each block's scales by lane. */
static void expand_int4(const Run *run, int64_t row, int64_t at, int64_t width, __m512i levels,
                        uint16_t *out, float *scales) {
    float narrow[PAIR_SLICE / GROUP + W];
    int64_t bytes = row_bytes(INT4, run->k) - at / 2;
    const uint8_t *p = run->weight + row * row_bytes(INT4, run->k) + at / 2;
    slice_scales(INT4, run, row, at, PAIR_SLICE, narrow);
    for (int64_t b = 0; PERIOD * b < width; b++, p += 64, bytes -= 64) {
        __m512i v = _mm512_maskz_loadu_epi8(bytes < 64 ? 0xffffffff : ~(__mmask64)0, p);
        for (int i = 0; i < 4; i++)
            _mm512_storeu_si512(
                out + PERIOD * b + 32 * i,
                _mm512_permutexvar_epi16(_mm512_srli_epi16(v, (unsigned)(4 * i)), levels));
        store(scales + W * b, block_scale(narrow, b));
    }
}

/* sums[m][r] of row r and token m over `width` weights, which the inputs' zeros go on behind. */
INLINE void pair_tile(int tokens, const uint16_t *const *rows, const uint16_t *const *x,
                      int64_t width, Ahead *ahead, float sums[TILE_TOKENS][TILE_ROWS]) {
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
        fetch_ahead(ahead);
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
                      const uint16_t *const *x, int64_t width, Ahead *ahead,
                      float sums[TILE_TOKENS][TILE_ROWS]) {
    vf acc[INT4_TOKENS][TILE_ROWS];
    UNROLL for (int m = 0; m < tokens; m++)
        UNROLL for (int r = 0; r < TILE_ROWS; r++) acc[m][r] = (vf){0};
    for (int64_t i = 0; i < width; i += PERIOD) {
        __m512 block[INT4_TOKENS][TILE_ROWS];
        UNROLL for (int j = 0; j < 4; j++) {
            __m512bh w[TILE_ROWS];
            UNROLL for (int r = 0; r < TILE_ROWS; r++) w[r] = bf16_at(rows[r] + i + 32 * j);
            UNROLL for (int m = 0; m < tokens; m++) {
                __m512bh in = bf16_at(x[m] + i + 32 * j);
                UNROLL for (int r = 0; r < TILE_ROWS; r++)
                    block[m][r] = _mm512_dpbf16_ps(j ? block[m][r] : _mm512_setzero_ps(), w[r], in);
            }
        }
        UNROLL for (int r = 0; r < TILE_ROWS; r++) {
            vf scale = load(scales[r] + i / 8);
            UNROLL for (int m = 0; m < tokens; m++)
                acc[m][r] = fma_((vf)block[m][r], scale, acc[m][r]);
        }
        fetch_ahead(ahead);
    }
    UNROLL for (int m = 0; m < tokens; m++) sum_rows(acc[m], sums[m]);
}

INLINE void pairs(int32_t format, const Run *run, const Prepared *tokens, int64_t num_tokens,
                  float *scratch, float *out, int64_t stride) {
    int most = format == INT4 ? INT4_TOKENS : TILE_TOKENS;
    uint16_t *panel = (uint16_t *)scratch;
    float *block_scales = scratch + TILE_ROWS * PAIR_SLICE / 2;
    Ahead ahead = {run->ahead, run->ahead_end};
    float whole[32];
    uint16_t narrow_whole[32];
    for (int i = 0; i < 32; i++) whole[i] = (float)(i % 16 - 8);
    narrow(BF16, whole, 32, narrow_whole);
    __m512i levels = _mm512_loadu_si512(narrow_whole);
    for (int64_t begin = 0; begin < num_tokens; begin += TOKENS_TOGETHER) {
        int64_t end = begin + TOKENS_TOGETHER < num_tokens ? begin + TOKENS_TOGETHER : num_tokens;
        for (int64_t at = 0; at < run->k; at += PAIR_SLICE) {
            int64_t width = run->k - at < PAIR_SLICE ? run->k - at : PAIR_SLICE;
            for (int64_t row = 0; row < run->rows; row += TILE_ROWS) {
                int64_t rows = run->rows - row < TILE_ROWS ? run->rows - row : TILE_ROWS;
                const uint16_t *w[TILE_ROWS];
                const float *by_block[TILE_ROWS];
                float scales[TILE_ROWS], sums[TILE_TOKENS][TILE_ROWS];
                /* A last tile with fewer rows computes its last row again and drops it. */
                for (int64_t r = 0; r < TILE_ROWS; r++) {
                    int64_t here = r < rows ? r : rows - 1;
                    w[r] = panel + here * PAIR_SLICE;
                    by_block[r] = block_scales + here * PAIR_SLICE / 8;
                    if (format == BF16)
                        w[r] = (const uint16_t *)run->weight + (row + here) * run->k + at;
                    else if (r < rows && format == INT8)
                        expand_int8(run, row + r, at, width, panel + r * PAIR_SLICE);
                    else if (r < rows)
                        expand_int4(run, row + r, at, width, levels, panel + r * PAIR_SLICE,
                                    block_scales + r * PAIR_SLICE / 8);
                }
                row_scales(format, run, row, rows, scales);
                int64_t padded_width = format == BF16   ? width
                                       : format == INT8 ? (width + 63) / 64 * 64
                                                        : (width + PERIOD - 1) / PERIOD * PERIOD;
                for (int64_t t = begin, count; t < end; t += count) {
                    const uint16_t *x[TILE_TOKENS];
                    count = even_part(end - t, most);
                    for (int64_t m = 0; m < count; m++) x[m] = tokens[t + m].pairs + at;
#define PAIR_TILE(n)                                                                              \
    if (format == INT4)                                                                           \
        int4_tile(n, w, by_block, x, padded_width, &ahead, sums);                                 \
    else                                                                                          \
        pair_tile(n, w, x, padded_width, &ahead, sums)
                    switch (count) {
                    case 1: PAIR_TILE(1); break;
                    case 2: PAIR_TILE(2); break;
                    case 3: PAIR_TILE(3); break;
                    case 4: if (format != INT4) pair_tile(4, w, x, padded_width, &ahead, sums); break;
                    case 5: if (format != INT4) pair_tile(5, w, x, padded_width, &ahead, sums); break;
                    default: if (format != INT4) pair_tile(6, w, x, padded_width, &ahead, sums);
                    }
                    for (int64_t m = 0; m < count; m++)
                        add_sums(sums[m], scales, rows, at == 0, out + (t + m) * stride + row);
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

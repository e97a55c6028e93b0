/* Register tiles for many tokens of one expert; part of rows.h.

   A slice of a few rows is dequantised once, into memory that stays in the first cache, and then meets
   every token. An output is the sum of its slices' sums, in order, so its bits do not depend on how many
   tokens there are. */

/* Slice [at, at + width) of a row in `prepare`'s order. */
static void expand(int32_t format, const Run *run, int64_t row, int64_t at, int64_t width,
                   float *out) {
    int64_t bytes = row_bytes(format, run->k), begin = at / BLOCK * block_bytes(format);
    const uint8_t *p = run->weight + row * bytes + begin;
    int64_t rest = bytes - begin;
    Levels levels = load_levels();
    float scales[SLICE / GROUP + W];
    if (format == INT4 || format == NF4) slice_scales(format, run, row, at, SLICE, scales);
    for (int64_t done = 0; done < width;
         done += BLOCK, p += block_bytes(format), rest -= block_bytes(format)) {
        uint8_t last[BLOCK * 4] = {0};
        const uint8_t *from = p;
        if (rest < block_bytes(format)) {
            if (rest > 0) memcpy(last, p, (size_t)rest);
            from = last;
        }
        vf w[8];
        if (format == NF4) {
            vf scale = block_scale(scales, done / BLOCK);
            decode_nf4(load_int(from), levels, w);
            UNROLL for (int j = 0; j < 8; j++) w[j] *= scale;
        } else if (format == INT4) {
            vf scale = block_scale(scales, done / BLOCK);
            vi v = load_int(from);
            float power = 1;
            UNROLL for (int j = 0; j < 8; j++) {
                vf eight = scale * (-8 * (j == 7 ? 1 : power));
                w[j] = fma_(nibble(v, j), scale, eight);
                power *= 16;
            }
        } else {
            int vectors = unit_vectors(format);
            for (int u = 0; u < 8 / vectors; u++)
                decode_unit(format, from + u * unit_bytes(format), w + u * vectors);
        }
        UNROLL for (int j = 0; j < 8; j++) store(out + done + j * W, w[j]);
    }
}

/* sums[m][r] of row r and token m over `width` inputs; rows lie SLICE floats apart. */
INLINE void tile(int tokens, const float *rows, const float *const *x, int64_t width,
                 float sums[TILE_TOKENS][TILE_ROWS]) {
    vf acc[TILE_TOKENS][TILE_ROWS];
    UNROLL for (int m = 0; m < tokens; m++)
        UNROLL for (int r = 0; r < TILE_ROWS; r++) acc[m][r] = (vf){0};
    for (int64_t i = 0; i < width; i += W) {
        vf w[TILE_ROWS];
        UNROLL for (int r = 0; r < TILE_ROWS; r++) w[r] = load(rows + r * SLICE + i);
        UNROLL for (int m = 0; m < tokens; m++) {
            vf in = load(x[m] + i);
            UNROLL for (int r = 0; r < TILE_ROWS; r++) acc[m][r] = fma_(w[r], in, acc[m][r]);
        }
    }
    UNROLL for (int m = 0; m < tokens; m++) sum_rows(acc[m], sums[m]);
}

static void tile_of(int64_t tokens, const float *rows, const float *const *x, int64_t width,
                    float sums[TILE_TOKENS][TILE_ROWS]) {
    switch (tokens) {
    case 1: tile(1, rows, x, width, sums); break;
    case 2: tile(2, rows, x, width, sums); break;
    case 3: tile(3, rows, x, width, sums); break;
#if TILE_TOKENS > 4
    case 4: tile(4, rows, x, width, sums); break;
    case 5: tile(5, rows, x, width, sums); break;
#endif
    default: tile(TILE_TOKENS, rows, x, width, sums);
    }
}

static void tiles(int32_t format, const Run *run, const Prepared *tokens, int64_t num_tokens,
                  float *scratch, float *out, int64_t stride) {
    int64_t padded = (run->k + PADDED - 1) / PADDED * PADDED, index[TILE_ROWS];
    for (int64_t begin = 0; begin < num_tokens; begin += TOKENS_TOGETHER) {
        int64_t end = begin + TOKENS_TOGETHER < num_tokens ? begin + TOKENS_TOGETHER : num_tokens;
        for (int64_t at = 0; at < padded; at += SLICE) {
            int64_t width = padded - at < SLICE ? padded - at : SLICE, rows;
            for (int64_t done = 0; TILE_ROWS * done < run->rows; done++) {
                float scales[TILE_ROWS], sums[TILE_TOKENS][TILE_ROWS];
                rows = rows_of_tile(run, done, index);
                row_scales(format, run, index, scales);
                for (int64_t r = 0; r < TILE_ROWS; r++)
                    expand(format, run, index[r], at, width, scratch + r * SLICE);
                for (int64_t t = begin, count; t < end; t += count) {
                    const float *x[TILE_TOKENS];
                    count = even_part(end - t, TILE_TOKENS);
                    for (int64_t m = 0; m < count; m++) x[m] = tokens[t + m].values + at;
                    tile_of(count, scratch, x, width, sums);
                    for (int64_t m = 0; m < count; m++)
                        add_sums(sums[m], scales, index, rows, at == 0, out + (t + m) * stride);
                }
            }
        }
    }
}

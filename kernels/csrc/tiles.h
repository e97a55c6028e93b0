/* Register tiles for many tokens of one expert, and the elementwise loops; part of rows.h.

   A panel of rows is dequantised once, a slice of K at a time, into memory that stays in the first
   caches; each slice then meets every token. Each output's sum runs over K in one fixed order, whatever
   tile it lies in, so its bits do not depend on how many tokens there are. */

/* rows [count, PANEL_K] of slice [at, at + width) in `prepare`'s order; scales as rows of floats */
static void expand(int32_t format, const Run *run, int64_t row, int64_t at, int64_t width,
                   float *scales, float *out) {
    int64_t bytes = row_bytes(format, run->k), begin = at / BLOCK * block_bytes(format);
    const uint8_t *p = run->weight + row * bytes + begin;
    int64_t rest = bytes - begin;
    Levels levels = load_levels();
    if (format == INT4 || format == NF4)
        widen_scales(format, run->scale + row * scale_bytes(format, run->k),
                     (run->k + GROUP - 1) / GROUP, scales);
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
            vf scale = block_scale(scales, (at + done) / BLOCK);
            decode_nf4(load_int(from), levels, w);
            UNROLL for (int j = 0; j < 8; j++) w[j] *= scale;
        } else if (format == INT4) {
            vf scale = block_scale(scales, (at + done) / BLOCK);
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

INLINE void tile(int tokens, const float *panel, const float *const *x, int64_t width, float *part,
                 int first) {
    vf acc[TILE_ROWS][4];
    UNROLL for (int r = 0; r < TILE_ROWS; r++)
        UNROLL for (int m = 0; m < tokens; m++)
            acc[r][m] = first ? (vf){0} : load(part + (m * PANEL_ROWS + r) * W);
    for (int64_t i = 0; i < width; i += W) {
        vf w[TILE_ROWS];
        UNROLL for (int r = 0; r < TILE_ROWS; r++) w[r] = load(panel + r * PANEL_K + i);
        UNROLL for (int m = 0; m < tokens; m++) {
            vf in = load(x[m] + i);
            UNROLL for (int r = 0; r < TILE_ROWS; r++) acc[r][m] = fma_(w[r], in, acc[r][m]);
        }
    }
    UNROLL for (int r = 0; r < TILE_ROWS; r++)
        UNROLL for (int m = 0; m < tokens; m++)
            store(part + (m * PANEL_ROWS + r) * W, acc[r][m]);
}

static void panel_tokens(const float *panel, const Prepared *tokens, int64_t num_tokens, int64_t at,
                         int64_t width, float *part) {
    for (int64_t t = 0; t < num_tokens; t += 4) {
        const float *x[4];
        int64_t count = num_tokens - t < 4 ? num_tokens - t : 4;
        for (int64_t m = 0; m < count; m++) x[m] = tokens[t + m].values + at;
        for (int r = 0; r < PANEL_ROWS; r += TILE_ROWS) {
            const float *rows = panel + r * PANEL_K;
            float *to = part + (t * PANEL_ROWS + r) * W;
            switch (count) {
            case 1: tile(1, rows, x, width, to, at == 0); break;
            case 2: tile(2, rows, x, width, to, at == 0); break;
            case 3: tile(3, rows, x, width, to, at == 0); break;
            default: tile(4, rows, x, width, to, at == 0);
            }
        }
    }
}

static void tiles(int32_t format, const Run *run, const Prepared *tokens, int64_t num_tokens,
                  float *scratch, float *out, int64_t stride) {
    float *panel = scratch, *part = panel + PANEL_ROWS * PANEL_K;
    float *scales = part + TILE_TOKENS * PANEL_ROWS * W;
    int64_t padded = (run->k + PADDED - 1) / PADDED * PADDED;
    for (int64_t row = 0; row < run->rows; row += PANEL_ROWS) {
        int64_t count = run->rows - row < PANEL_ROWS ? run->rows - row : PANEL_ROWS;
        if (count < PANEL_ROWS) memset(panel, 0, sizeof(float) * PANEL_ROWS * PANEL_K);
        for (int64_t begin = 0; begin < num_tokens; begin += TILE_TOKENS) {
            int64_t here = num_tokens - begin < TILE_TOKENS ? num_tokens - begin : TILE_TOKENS;
            for (int64_t at = 0; at < padded; at += PANEL_K) {
                int64_t width = padded - at < PANEL_K ? padded - at : PANEL_K;
                for (int64_t r = 0; r < count; r++)
                    expand(format, run, row + r, at, width, scales, panel + r * PANEL_K);
                panel_tokens(panel, tokens + begin, here, at, width, part);
            }
            for (int64_t r = 0; r < count; r++) {
                float scale = 1;
                if (format == INT8) memcpy(&scale, run->scale + 4 * (row + r), 4);
                for (int64_t m = 0; m < here; m++)
                    out[(begin + m) * stride + row + r] =
                        sum(load(part + (m * PANEL_ROWS + r) * W)) * scale;
            }
        }
    }
}

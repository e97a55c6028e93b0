/* Rows of 4-bit weights, whose scale changes every 64 weights; part of rows.h.

   A group's products are summed first and multiplied by its scale once. Groups are added in order, so
   neither the rows beside a row nor the way they are cut change its bits. */

/* Scales of one row as floats, padded with zeros to whole vectors and one more. */
INLINE void widen_scales(int32_t format, const uint8_t *scale, int64_t groups, float *out) {
    if (format == NF4)
        memcpy(out, scale, (size_t)groups * 4);
    else
        for (int64_t g = 0; g < groups; g++) {
            uint16_t half;
            memcpy(&half, scale + 2 * g, 2);
            uint32_t bits = (uint32_t)half << 16;
            memcpy(out + g, &bits, 4);
        }
    for (int i = 0; i < W; i++) out[groups + i] = 0;
}

/* The scale of each lane's group in block `b`. */
INLINE vf block_scale(const float *scales, int64_t b) {
#if W < 8
    return splat(scales[b * BLOCK / GROUP]);
#elif W == 8
    return splat(scales[b]);
#else
    vf scale = splat(scales[2 * b]), high = splat(scales[2 * b + 1]);
    vi upper;
    for (int i = 0; i < W; i++) upper[i] = i < 8 ? 0 : -1;
    return (vf)(((vi)scale & ~upper) | ((vi)high & upper));
#endif
}

/* Nibble j of each lane, in place but for the highest, which would carry the sign. */
INLINE vf nibble(vi v, int j) {
    return to_float(j == 7 ? shift_right(v, 28) : v & (vi)((vu){0} + (0xfu << (4 * j))));
}

INLINE void grouped_block(int32_t format, int tokens, const uint8_t *p, Levels levels,
                          const float *const *x, int64_t b, const float *scales, vf *acc) {
    vi v = load_int(p);
    vf w[8];
    KEEP(v);
    if (format == NF4)
        decode_nf4(v, levels, w);
    else
        UNROLL for (int j = 0; j < 8; j++) w[j] = nibble(v, j);
    UNROLL for (int m = 0; m < tokens; m++) {
        vf s[2];
        UNROLL for (int j = 0; j < 8; j++) {
            vf in = load(x[m] + b * BLOCK + j * W);
            s[j % 2] = j < 2 ? w[j] * in : fma_(w[j], in, s[j % 2]);
        }
        acc[m] = fma_(block_scale(scales, b), s[0] + s[1], acc[m]);
    }
}

INLINE void grouped_row(int32_t format, int rows, int tokens, const Run *run, int64_t first,
                        int64_t apart, Levels levels, const Prepared *inputs, float *scales,
                        float *out, int64_t stride) {
    int64_t bytes = row_bytes(format, run->k), groups = (run->k + GROUP - 1) / GROUP;
    int64_t full = bytes / (4 * W), rest = bytes % (4 * W), scales_apart = groups + W;
    const uint8_t *p = run->weight + first * bytes;
    const float *x[MAX_ROW_TOKENS];
    vf acc[4][MAX_ROW_TOKENS];
    UNROLL for (int m = 0; m < tokens; m++) x[m] = inputs[m].values;
    UNROLL for (int r = 0; r < rows; r++) {
        int64_t row = first + r * apart;
        widen_scales(format, run->scale + row * scale_bytes(format, run->k), groups,
                     scales + r * scales_apart);
        UNROLL for (int m = 0; m < tokens; m++) acc[r][m] = (vf){0};
    }
    for (int64_t b = 0; b < full; b++, p += 4 * W)
        UNROLL for (int r = 0; r < rows; r++)
            grouped_block(format, tokens, p + r * apart * bytes, levels, x, b,
                          scales + r * scales_apart, acc[r]);
    if (rest)
        UNROLL for (int r = 0; r < rows; r++) {
            uint8_t last[4 * W] = {0};
            memcpy(last, p + r * apart * bytes, (size_t)rest);
            grouped_block(format, tokens, last, levels, x, full, scales + r * scales_apart,
                          acc[r]);
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int m = 0; m < tokens; m++) {
            vf total = acc[r][m];
            if (format == INT4) {
                vf zero = {0};
                for (int64_t g = 0; g < groups; g += W)
                    zero = fma_(load(scales + r * scales_apart + g), load(inputs[m].sums + g),
                                zero);
                total -= zero;
            }
            out[m * stride + first + r * apart] = sum(total);
        }
}

INLINE void grouped_rows(int32_t format, int tokens, const Run *run, const Prepared *inputs,
                         float *scratch, float *out, int64_t stride) {
    int64_t apart = run->rows / 4;
    Levels levels = load_levels();
    for (int64_t r = 0; r < apart; r++)
        grouped_row(format, 4, tokens, run, r, apart, levels, inputs, scratch, out, stride);
    for (int64_t r = apart * 4; r < run->rows; r++)
        grouped_row(format, 1, tokens, run, r, 0, levels, inputs, scratch, out, stride);
}

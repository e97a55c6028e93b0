/* Activations between the projections and conversions of the inputs and outputs; part of rows.h. */

/* e^x: x = n ln 2 + r, |r| <= ln 2 / 2, Taylor to r^7 (relative error below 2e-7). */
INLINE vf exp_(vf x) {
    vf high = splat(88.8f), low = splat(-87.3f);
    vi over = x > high, under = x < low;
    vf n, r, p;
    vi whole;
    x = (vf)(((vi)x & ~over) | ((vi)high & over));
    x = (vf)(((vi)x & ~under) | ((vi)low & under));
    n = x * 1.44269504088896341f;
    /* to the nearest, by the float that has no room for a fraction */
    n = (n + 12582912.0f) - 12582912.0f;
    r = fma_(n, splat(-0.693145751953125f), x);
    r = fma_(n, splat(-1.42860677e-6f), r);
    p = splat(1.0f / 5040);
    p = fma_(p, r, splat(1.0f / 720));
    p = fma_(p, r, splat(1.0f / 120));
    p = fma_(p, r, splat(1.0f / 24));
    p = fma_(p, r, splat(1.0f / 6));
    p = fma_(p, r, splat(0.5f));
    p = fma_(p, r, splat(1.0f));
    p = fma_(p, r, splat(1.0f));
    whole = __builtin_convertvector(n, vi);
    return p * (vf)shift_left(whole + 127, 23);
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp_(-x)); }

INLINE vf gate_value(int32_t activation, vf g) {
    vf positive;
    switch (activation) {
    case SILU: return g / (1.0f + exp_(-g));
    case GELU: {
        float lane[W];
        store(lane, g);
        for (int i = 0; i < W; i++) lane[i] *= 0.5f * (1 + erff(lane[i] * 0.70710678118654752f));
        return load(lane);
    }
    case GELU_TANH:
        /* 0.5 (1 + tanh u) = sigmoid(2 u) */
        return g * sigmoid(1.5957691216057308f * fma_(0.044715f * g * g, g, g));
    default:
        /* not a maximum: a NaN must stay one */
        positive = (vf)((vi)g & ~(vi)(g <= 0));
        return activation == RELU2 ? positive * positive : positive;
    }
}

INLINE vf clamp(vf x, float low, float high) {
    vi over = x > high, under = x < low;
    x = (vf)(((vi)x & ~over) | ((vi)splat(high) & over));
    return (vf)(((vi)x & ~under) | ((vi)splat(low) & under));
}

INLINE vf gated(int32_t activation, vf gate, vf up) {
    if (activation != CLAMPED_SWIGLU) return gate_value(activation, gate) * up;
    gate = clamp(gate, -INFINITY, 7);
    return gate / (1.0f + exp_(-1.702f * gate)) * (clamp(up, -7, 7) + 1.0f);
}

static void activate(int32_t activation, const float *gate, const float *up, int64_t count,
                     float *out) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, gated(activation, load(gate + i), load(up + i)));
    if (i < count) {
        float lanes[3][W] = {{0}};
        memcpy(lanes[0], gate + i, sizeof(float) * (size_t)(count - i));
        memcpy(lanes[1], up + i, sizeof(float) * (size_t)(count - i));
        store(lanes[2], gated(activation, load(lanes[0]), load(lanes[1])));
        memcpy(out + i, lanes[2], sizeof(float) * (size_t)(count - i));
    }
}

/* scores [count] -> their softmax after `scaling`; its bits depend on these scores alone. */
static void softmax(float *scores, int64_t count, float scaling) {
    int64_t whole = count / W * W;
    float last[W], lanes[W], top = -INFINITY, total;
    vf largest = splat(-INFINITY), sums = {0}, v;
    for (int i = 0; i < W; i++) last[i] = whole + i < count ? scores[whole + i] : -INFINITY;
    for (int64_t i = 0; i <= whole; i += W) {
        v = load(i < whole ? scores + i : last) * scaling;
        vi over = v > largest; /* never a NaN, which shows in the sum instead */
        largest = (vf)(((vi)v & over) | ((vi)largest & ~over));
        store(i < whole ? scores + i : last, v);
    }
    store(lanes, largest);
    for (int i = 0; i < W; i++) top = lanes[i] > top ? lanes[i] : top;
    for (int64_t i = 0; i < whole; i += W) {
        v = exp_(load(scores + i) - top);
        store(scores + i, v);
        sums += v;
    }
    store(last, exp_(load(last) - top));
    for (int i = 0; i < W; i++)
        if (whole + i >= count) last[i] = 0;
    total = sum(sums + load(last));
    for (int64_t i = 0; i < whole; i += W) store(scores + i, load(scores + i) / total);
    for (int64_t i = whole; i < count; i++) scores[i] = last[i - whole] / total;
}

static void widen(int32_t format, const void *in, int64_t count, float *out) {
    const uint16_t *half = in;
    if (format == FP32) memcpy(out, in, sizeof(float) * (size_t)count);
    if (format == BF16)
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = (uint32_t)half[i] << 16;
            memcpy(out + i, &bits, 4);
        }
    if (format == FP16)
        for (int64_t i = 0; i < count; i++) out[i] = half_to_float(half[i]);
}

INLINE uint16_t float_to_half(float f) {
    uint32_t bits, sign, magnitude, shift, kept, lost;
    memcpy(&bits, &f, 4);
    sign = bits >> 16 & 0x8000;
    magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds past 65504 */
    if (magnitude < 0x33000000) return (uint16_t)sign;             /* below half of 2^-24 */
    if (magnitude >= 0x38800000) {
        shift = 13;
        kept = magnitude - 0x38000000;
    } else {
        shift = 126 - (magnitude >> 23);
        kept = (magnitude & 0x7fffff) | 0x800000;
    }
    lost = kept & ((1u << shift) - 1);
    kept >>= shift;
    kept += lost > 1u << (shift - 1) || (lost == 1u << (shift - 1) && (kept & 1));
    return (uint16_t)(sign | kept);
}

static void narrow(int32_t format, const float *in, int64_t count, void *out) {
    uint16_t *half = out;
    if (format == FP32) memcpy(out, in, sizeof(float) * (size_t)count);
    if (format == BF16)
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits, rounded;
            memcpy(&bits, in + i, 4);
            rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            half[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
        }
    if (format == FP16)
        for (int64_t i = 0; i < count; i++) half[i] = float_to_half(in[i]);
}

/* What a plain read of memory costs: every byte touched, next to nothing done with it. */
static float read_bytes(const uint8_t *bytes, int64_t count) {
    vi a = {0}, b = {0}, c = {0}, d = {0};
    int64_t i = 0;
    for (; i + 16 * W <= count; i += 16 * W) {
        a ^= load_int(bytes + i);
        b ^= load_int(bytes + i + 4 * W);
        c ^= load_int(bytes + i + 8 * W);
        d ^= load_int(bytes + i + 12 * W);
    }
    a = (a ^ b) ^ (c ^ d);
    return sum(to_float(a));
}

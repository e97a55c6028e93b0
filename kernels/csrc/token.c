/* One token through the parts of a decoder layer: norm, attention over its keys and values, gated MLP,
   and its experts with their combine; each part is one call. What the parts hand each other is rounded
   to the activations' format, as between a model's modules; inside, everything is fp32. */
#include "token.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, MIN_SHARED_VALUES = 1 << 17 };

static int64_t width_of(int32_t format) { return format ? 2 : 4; }

/* Round to `format` and back; `narrowed` takes the result in the format. */
static void round_through(const Kernels *kernels, int32_t format, float *values, int64_t count,
                          void *narrowed) {
    kernels->narrow(format, values, count, narrowed);
    kernels->widen(format, narrowed, count, values);
}

/* values [n] -> values / their root mean square, rounded, times weight, rounded into `out`. */
static void normalise(const Kernels *kernels, int32_t format, float *values, const uint8_t *weight,
                      float eps, int64_t n, float *weights, uint8_t *out) {
    float lanes[LANES] = {0}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += values[i + j] * values[i + j];
    for (; i < n; i++) lanes[0] += values[i] * values[i];
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
    total = 1.0f / sqrtf(lanes[0] / (float)n + eps);
    for (i = 0; i < n; i++) values[i] *= total;
    round_through(kernels, format, values, n, out);
    kernels->widen(format, weight, n, weights);
    for (i = 0; i < n; i++) values[i] *= weights[i];
    kernels->narrow(format, values, n, out);
}

/* out [n] = the RMS norm of x [n], both in `format`; they may be the same. */
int outrider_rms_norm(const uint8_t *x, const uint8_t *weight, float eps, int64_t n, int32_t format,
                      uint8_t *out) {
    const Kernels *kernels = active_kernels();
    float *memory = malloc(2 * (size_t)n * sizeof *memory);
    if (!memory) return NO_MEMORY;
    kernels->widen(format, x, n, memory);
    normalise(kernels, format, memory, weight, eps, n, memory + n, out);
    free(memory);
    return OK;
}

/* x = round(x + y), n values in `format`; `wide` takes 2 n floats. */
static void add_into(const Kernels *kernels, int32_t format, uint8_t *x, const uint8_t *y, int64_t n,
                     float *wide) {
    kernels->widen(format, x, n, wide);
    kernels->widen(format, y, n, wide + n);
    for (int64_t i = 0; i < n; i++) wide[i] += wide[n + i];
    kernels->narrow(format, wide, n, x);
}

/* Rotate heads [heads, dim] by cos and sin [dim] (second half against first half), rounding as the
   elementwise operations of a model do. `turned` takes as many floats as `rows`. */
static void rotate(const Kernels *kernels, int32_t format, float *rows, int64_t heads, int64_t dim,
                   const float *cosine, const float *sine, float *turned, uint8_t *narrowed) {
    int64_t half = dim / 2, count = heads * dim;
    for (int64_t h = 0; h < heads; h++) {
        float *row = rows + h * dim, *turn = turned + h * dim;
        for (int64_t i = 0; i < half; i++) {
            turn[i] = -row[half + i] * sine[i];
            turn[half + i] = row[i] * sine[half + i];
        }
        for (int64_t i = 0; i < dim; i++) row[i] *= cosine[i];
    }
    round_through(kernels, format, rows, count, narrowed);
    round_through(kernels, format, turned, count, narrowed);
    for (int64_t i = 0; i < count; i++) rows[i] += turned[i];
    round_through(kernels, format, rows, count, narrowed);
}

#define ACCUMULATE                                                                                  \
    for (int64_t row = 0; row < rows; row++) {                                                      \
        float weight = weights[row];                                                                \
        if (format == BF16) {                                                                       \
            const uint16_t *half = (const uint16_t *)values + row * dim;                            \
            for (int64_t i = 0; i < dim; i++) {                                                     \
                union {                                                                             \
                    uint32_t bits;                                                                  \
                    float value;                                                                    \
                } wide = {(uint32_t)half[i] << 16};                                                 \
                out[i] += weight * wide.value;                                                      \
            }                                                                                       \
        } else {                                                                                    \
            kernels->widen(format, values + row * dim * width_of(format), dim, line);               \
            for (int64_t i = 0; i < dim; i++) out[i] += weight * line[i];                           \
        }                                                                                           \
    }

#define ACCUMULATE_ARGUMENTS                                                                        \
    const Kernels *kernels, int32_t format, const uint8_t *values, const float *weights,            \
        int64_t rows, int64_t dim, float *line, float *out

/* out [dim] += weights [rows] times values [rows, dim]. */
static void accumulate_plain(ACCUMULATE_ARGUMENTS) { ACCUMULATE }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void accumulate_avx2(ACCUMULATE_ARGUMENTS) { ACCUMULATE }
#endif

typedef struct {
    const Kernels *kernels;
    const Attention *attention;
    const float *queries; /* [heads, dim] */
    const uint8_t *keys, *values;
    int64_t capacity, start, length; /* rows [start, start + length) are seen */
    float *scratch, *out; /* scratch: a part a thread; out [heads, dim] */
    int64_t scratch_size;
} Heads;

static int64_t rows_scratch(int64_t dim) { return 16 * (dim / GROUP + 32); }

static void heads_body(void *context, int32_t thread, int32_t num_threads) {
    Heads *heads = context;
    const Attention *attention = heads->attention;
    const Kernels *kernels = heads->kernels;
    int64_t dim = attention->head_dim, group = attention->num_heads / attention->num_kv_heads;
    int32_t format = attention->format;
    void (*accumulate)(ACCUMULATE_ARGUMENTS) = accumulate_plain;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        accumulate = accumulate_avx2;
#endif
    float *prepared = heads->scratch + thread * heads->scratch_size;
    float *line = prepared + kernels->values_size(format, dim);
    float *inner = line + dim, *scores = inner + rows_scratch(dim);
    for (int64_t h = thread; h < attention->num_heads; h += num_threads) {
        int64_t offset = (h / group * heads->capacity + heads->start) * dim * width_of(format);
        Run run = {heads->keys + offset, NULL, heads->length, dim};
        Prepared token = {prepared, NULL};
        float *out = heads->out + h * dim, largest = -INFINITY, total = 0;
        kernels->prepare(format, heads->queries + h * dim, dim, 0, dim, prepared, NULL);
        kernels->rows[format][0](&run, &token, inner, scores, heads->length);
        for (int64_t i = 0; i < heads->length; i++) {
            scores[i] *= attention->scaling;
            if (!(scores[i] <= largest)) largest = scores[i];
        }
        for (int64_t i = 0; i < heads->length; i++) total += scores[i] = expf(scores[i] - largest);
        for (int64_t i = 0; i < heads->length; i++) scores[i] /= total;
        memset(out, 0, (size_t)dim * sizeof *out);
        accumulate(kernels, format, heads->values + offset, scores, heads->length, dim, line, out);
    }
}

/* Write a token's row of [heads, capacity, dim] from [heads, dim]. */
static void append(const uint8_t *row, uint8_t *cache, int64_t heads, int64_t dim, int64_t capacity,
                   int64_t at, int64_t width) {
    for (int64_t h = 0; h < heads; h++)
        memcpy(cache + (h * capacity + at) * dim * width, row + h * dim * width,
               (size_t)(dim * width));
}

static void norm_heads(const Kernels *kernels, const Attention *attention, uint8_t *row,
                       const uint8_t *weight, int64_t count, int64_t norm_width, float *wide) {
    int64_t width = width_of(attention->format);
    if (!weight) return;
    for (int64_t at = 0; at < count; at += norm_width) {
        kernels->widen(attention->format, row + at * width, norm_width, wide);
        normalise(kernels, attention->format, wide, weight, attention->head_norm_eps, norm_width,
                  wide + norm_width, row + at * width);
    }
}

/* x [hidden] = round(x + attention of its norm), keys and values [kv_heads, capacity, dim] taking the
   token's row at `length`. cosine, sine [dim] in the format. */
int outrider_attend(const Attention *attention, uint8_t *x, const uint8_t *cosine,
                    const uint8_t *sine, uint8_t *keys, uint8_t *values, int64_t capacity,
                    int64_t length, int32_t num_threads) {
    const Kernels *kernels = active_kernels();
    int32_t format = attention->format;
    int64_t hidden = attention->query.k, dim = attention->head_dim, width = width_of(format);
    int64_t query_size = attention->num_heads * dim, key_size = attention->num_kv_heads * dim;
    int64_t longest = query_size > hidden ? query_size : hidden;
    if (key_size > longest) longest = key_size;
    int32_t sharers = (length + 1) * query_size < MIN_SHARED_VALUES ? 1 : num_threads;
    int64_t share = kernels->values_size(format, dim) + dim + rows_scratch(dim) + length + 1;
    size_t floats = (size_t)(3 * longest + 2 * dim + query_size + sharers * share);
    float *wide = malloc(floats * sizeof *wide + (size_t)(5 * longest * width));
    if (!wide) return NO_MEMORY;
    float *turned = wide + 2 * longest, *rotation = turned + longest, *out = rotation + 2 * dim;
    float *scratch = out + query_size;
    uint8_t *normed = (uint8_t *)(wide + floats), *query = normed + longest * width;
    uint8_t *key = query + longest * width, *value = key + longest * width;
    uint8_t *narrowed = value + longest * width;

    kernels->widen(format, x, hidden, wide);
    normalise(kernels, format, wide, attention->norm, attention->eps, hidden, wide + hidden, normed);
    int status = outrider_linear(&attention->query, normed, query, 1, 0, format, num_threads);
    if (!status) status = outrider_linear(&attention->key, normed, key, 1, 0, format, num_threads);
    if (!status) status = outrider_linear(&attention->value, normed, value, 1, 0, format, num_threads);
    if (!status) {
        norm_heads(kernels, attention, query, attention->query_norm, query_size,
                   attention->query_norm_width, wide);
        norm_heads(kernels, attention, key, attention->key_norm, key_size,
                   attention->key_norm_width, wide);
        kernels->widen(format, cosine, dim, rotation);
        kernels->widen(format, sine, dim, rotation + dim);
        kernels->widen(format, key, key_size, wide);
        rotate(kernels, format, wide, attention->num_kv_heads, dim, rotation, rotation + dim, turned,
               key);
        append(key, keys, attention->num_kv_heads, dim, capacity, length, width);
        append(value, values, attention->num_kv_heads, dim, capacity, length, width);
        kernels->widen(format, query, query_size, wide);
        rotate(kernels, format, wide, attention->num_heads, dim, rotation, rotation + dim, turned,
               query);
        int64_t start = attention->window && length >= attention->window
                            ? length + 1 - attention->window
                            : 0;
        Heads heads = {.kernels = kernels, .attention = attention, .queries = wide, .keys = keys,
                       .values = values, .capacity = capacity, .start = start,
                       .length = length + 1 - start, .scratch = scratch, .out = out, .scratch_size = share};
        run_parallel(heads_body, &heads, sharers);
        kernels->narrow(format, out, query_size, query);
        status = outrider_linear(&attention->output, query, narrowed, 1, 0, format, num_threads);
    }
    if (!status) add_into(kernels, format, x, narrowed, hidden, wide);
    free(wide);
    return status;
}

/* out [hidden] = down(activation(gate x) * up x). */
static int gated(const Kernels *kernels, const Mlp *mlp, const uint8_t *x, uint8_t *out,
                 int32_t num_threads) {
    int64_t inner = mlp->gate.n, width = width_of(mlp->format);
    float *wide = malloc((size_t)(2 * inner) * sizeof *wide + (size_t)(2 * inner * width));
    if (!wide) return NO_MEMORY;
    uint8_t *gate = (uint8_t *)(wide + 2 * inner), *up = gate + inner * width;
    int status = outrider_linear(&mlp->gate, x, gate, 1, 0, mlp->format, num_threads);
    if (!status) status = outrider_linear(&mlp->up, x, up, 1, 0, mlp->format, num_threads);
    if (!status) {
        kernels->widen(mlp->format, gate, inner, wide);
        kernels->widen(mlp->format, up, inner, wide + inner);
        kernels->activate(mlp->activation, wide, wide + inner, inner, wide);
        kernels->narrow(mlp->format, wide, inner, gate);
        status = outrider_linear(&mlp->down, gate, out, 1, 0, mlp->format, num_threads);
    }
    free(wide);
    return status;
}

int outrider_gated_mlp(const Mlp *mlp, const uint8_t *x, uint8_t *out, int32_t num_threads) {
    return gated(active_kernels(), mlp, x, out, num_threads);
}

/* x [n] = round(x + round(first + second)); `second` may be NULL. */
int outrider_add_residual(uint8_t *x, const uint8_t *first, const uint8_t *second, int64_t n,
                          int32_t format) {
    const Kernels *kernels = active_kernels();
    int64_t width = width_of(format);
    float *wide = malloc(2 * (size_t)n * sizeof *wide + (size_t)(n * width));
    if (!wide) return NO_MEMORY;
    if (second) {
        uint8_t *sum = (uint8_t *)(wide + 2 * n);
        memcpy(sum, first, (size_t)(n * width));
        add_into(kernels, format, sum, second, n, wide);
        first = sum;
    }
    add_into(kernels, format, x, first, n, wide);
    free(wide);
    return OK;
}

/* out [hidden] = the sum, in the order given, of one token's experts in `slots` times `weights`; the
   same bits as the outputs of those slots and their combine by ascending expert, where that is it. */
int outrider_token_experts(const Experts *experts, const uint8_t *x, const int64_t *slots,
                           const float *weights, int64_t top_k, int32_t format, uint8_t *out,
                           int32_t num_threads) {
    int64_t hidden = experts->down.n, width = width_of(format);
    size_t size = (size_t)(top_k * hidden * width);
    int64_t *indices = malloc(2 * (size_t)top_k * sizeof *indices + size);
    if (!indices) return NO_MEMORY;
    int64_t *token_idx = indices + top_k;
    uint8_t *outputs = (uint8_t *)(token_idx + top_k);
    for (int64_t i = 0; i < top_k; i++) {
        indices[i] = i;
        token_idx[i] = 0;
    }
    Inputs in = {.x = x, .out = outputs, .token_idx = token_idx, .slot_ids = slots,
                 .num_tokens = 1, .num_assignments = top_k, .num_out_rows = top_k,
                 .format = format, .token_idx_wide = 1, .slot_ids_wide = 1};
    int status = outrider_expert_outputs(experts, &in, num_threads);
    if (!status) status = outrider_combine(outputs, weights, indices, 1, top_k, hidden, format, out);
    free(indices);
    return status;
}

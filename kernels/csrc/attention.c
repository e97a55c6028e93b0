/* Attention of a pass: norm, projections, rotary, each sequence's past, output, residual. */
#include "decoder.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { QUERIES = MAX_ROW_TOKENS }; /* of a sequence, meeting its keys together */

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
    const Past *past;
    int64_t from, count; /* of the past's new rows */
} Block;

typedef struct {
    const Kernels *kernels;
    const Attention *attention;
    const Past *pasts;
    Block *blocks;
    int64_t num_rows, num_blocks, longest; /* row; keys seen by a block at most */
    const uint8_t *cosines, *sines;        /* [rows, dim] */
    uint8_t *query, *key, *value;          /* [rows, heads, dim]; attention's result replaces query */
    float *scratch;                        /* a part a thread */
    int64_t scratch_size;
    atomic_llong next[2];
    uint8_t *x, *normed, *output; /* [rows, hidden] */
    int64_t work;                 /* products of all heads */
    int32_t way, num_threads;
    int status;
} Pass;

/* Write one row of [heads, capacity, dim] from [heads, dim]. */
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

/* Norm and turn a row's queries and keys, and put its keys and values where they belong. */
static void place_body(void *context, int32_t thread) {
    Pass *pass = context;
    const Attention *attention = pass->attention;
    const Kernels *kernels = pass->kernels;
    int32_t format = attention->format;
    int64_t dim = attention->head_dim, width = width_of(format);
    int64_t query_size = attention->num_heads * dim, key_size = attention->num_kv_heads * dim;
    int64_t larger = query_size > key_size ? query_size : key_size;
    float *wide = pass->scratch + thread * pass->scratch_size, *turned = wide + larger;
    float *cosine = turned + larger, *sine = cosine + dim;
    for (const Past *past = pass->pasts;;) {
        int64_t row = atomic_fetch_add(&pass->next[0], 1);
        if (row >= pass->num_rows) break;
        while (row >= past->first + past->count) past++;
        uint8_t *query = pass->query + row * query_size * width;
        uint8_t *key = pass->key + row * key_size * width;
        norm_heads(kernels, attention, query, attention->query_norm, query_size,
                   attention->query_norm_width, wide);
        norm_heads(kernels, attention, key, attention->key_norm, key_size,
                   attention->key_norm_width, wide);
        kernels->widen(format, pass->cosines + row * dim * width, dim, cosine);
        kernels->widen(format, pass->sines + row * dim * width, dim, sine);
        kernels->widen(format, key, key_size, wide);
        rotate(kernels, format, wide, attention->num_kv_heads, dim, cosine, sine, turned, key);
        kernels->widen(format, query, query_size, wide);
        rotate(kernels, format, wide, attention->num_heads, dim, cosine, sine, turned, query);
        int64_t at = past->length + row - past->first;
        append(key, past->keys, attention->num_kv_heads, dim, past->capacity, at, width);
        append(pass->value + row * key_size * width, past->values, attention->num_kv_heads, dim,
               past->capacity, at, width);
    }
}

static int64_t rows_scratch(int64_t dim) { return 16 * (dim / GROUP + 32); }

/* The keys that row `row` of a past's new ones sees begin here. */
static int64_t first_seen(const Attention *attention, const Past *past, int64_t row) {
    int64_t end = past->length + row + 1;
    return attention->window && end > attention->window ? end - attention->window : 0;
}

/* One head of a block's queries over the keys and values that they see. */
static void attend_block(const Pass *pass, const Block *block, int64_t head, float *scratch) {
    const Attention *attention = pass->attention;
    const Kernels *kernels = pass->kernels;
    const Past *past = block->past;
    int32_t format = attention->format;
    int64_t dim = attention->head_dim, width = width_of(format);
    int64_t kv_head = head / (attention->num_heads / attention->num_kv_heads);
    int64_t from = first_seen(attention, past, block->from);
    int64_t seen = past->length + block->from + block->count - from;
    int64_t size = kernels->values_size(format, dim);
    float *line = scratch + QUERIES * size, *out = line + dim, *inner = out + dim;
    float *scores = inner + rows_scratch(dim);
    void (*accumulate)(ACCUMULATE_ARGUMENTS) = accumulate_plain;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        accumulate = accumulate_avx2;
#endif
    Prepared tokens[QUERIES];
    uint8_t *query = pass->query + ((past->first + block->from) * attention->num_heads + head) * dim * width;
    int64_t apart = attention->num_heads * dim * width;
    for (int64_t m = 0; m < block->count; m++) {
        tokens[m] = (Prepared){.values = scratch + m * size};
        kernels->widen(format, query + m * apart, dim, line);
        kernels->prepare(format, line, dim, 0, dim, scratch + m * size, NULL);
    }
    int64_t offset = (kv_head * past->capacity + from) * dim * width;
    Run run = {.weight = past->keys + offset, .rows = seen, .k = dim};
    kernels->rows[format][block->count - 1](&run, tokens, inner, scores, seen);
    for (int64_t m = 0; m < block->count; m++) {
        int64_t skipped = first_seen(attention, past, block->from + m) - from;
        int64_t length = past->length + block->from + m + 1 - from - skipped;
        float *weights = scores + m * seen + skipped;
        kernels->softmax(weights, length, attention->scaling);
        memset(out, 0, (size_t)dim * sizeof *out);
        accumulate(kernels, format, past->values + offset + skipped * dim * width, weights, length,
                   dim, line, out);
        kernels->narrow(format, out, dim, query + m * apart);
    }
}

static void heads_body(void *context, int32_t thread) {
    Pass *pass = context;
    int64_t num_heads = pass->attention->num_heads;
    for (;;) {
        int64_t job = atomic_fetch_add(&pass->next[1], 1);
        if (job >= pass->num_blocks * num_heads) break;
        attend_block(pass, &pass->blocks[job / num_heads], job % num_heads,
                     pass->scratch + thread * pass->scratch_size);
    }
}

/* Cut the pasts' new rows into blocks; returns the products of all heads. */
static int64_t cut(Pass *pass, int64_t num_pasts) {
    int64_t work = 0;
    for (const Past *past = pass->pasts; past < pass->pasts + num_pasts; past++)
        for (int64_t from = 0; from < past->count; from += QUERIES) {
            int64_t count = past->count - from < QUERIES ? past->count - from : QUERIES;
            int64_t seen = past->length + from + count - first_seen(pass->attention, past, from);
            pass->blocks[pass->num_blocks++] = (Block){past, from, count};
            if (seen > pass->longest) pass->longest = seen;
            work += seen * count * pass->attention->num_heads * pass->attention->head_dim;
        }
    return work;
}

static void run_pass(void *context) {
    Pass *pass = context;
    const Attention *attention = pass->attention;
    int32_t format = attention->format, num_threads = pass->num_threads;
    int64_t hidden = attention->query.k, width = width_of(format), num_rows = pass->num_rows;
    int64_t query_size = attention->num_heads * attention->head_dim;
    const Product inputs[] = {{&attention->query, pass->query},
                              {&attention->key, pass->key},
                              {&attention->value, pass->value}};
    const Product output = {&attention->output, pass->output};
    int status = outrider_rms_norm(pass->x, attention->norm, attention->eps, num_rows, hidden, format,
                                   pass->normed, num_threads);
    if (!status)
        status = multiply_rows(inputs, 3, pass->normed, num_rows, hidden * width, format, pass->way,
                               num_threads);
    if (!status) {
        run_parallel(place_body, pass, sharers_of(num_rows * query_size, num_threads));
        run_products(heads_body, pass, sharers_of(pass->work, num_threads));
        status = multiply_rows(&output, 1, pass->query, num_rows, query_size * width, format,
                               pass->way, num_threads);
    }
    if (!status)
        status = outrider_add_residual(pass->x, pass->output, NULL, num_rows, hidden, format,
                                       num_threads);
    pass->status = status;
}

/* x [rows, hidden] = round(x + attention of its norm); every past takes its rows' keys and values, for
   which there is room. The pasts' rows follow each other. cosines, sines [rows, dim] in the format. */
int outrider_attend(const Attention *attention, uint8_t *x, int64_t num_rows, const Past *pasts,
                    int64_t num_pasts, const uint8_t *cosines, const uint8_t *sines,
                    int32_t way, int32_t num_threads) {
    const Kernels *kernels = active_kernels();
    int32_t format = attention->format;
    int64_t hidden = attention->query.k, dim = attention->head_dim, width = width_of(format);
    int64_t query_size = attention->num_heads * dim, key_size = attention->num_kv_heads * dim;
    int64_t larger = query_size > key_size ? query_size : key_size;
    Pass pass = {.kernels = kernels, .attention = attention, .pasts = pasts, .num_rows = num_rows,
                 .cosines = cosines, .sines = sines, .x = x, .way = way, .num_threads = num_threads};
    pass.blocks = malloc((size_t)num_rows * sizeof *pass.blocks);
    if (!pass.blocks) return NO_MEMORY;
    pass.work = cut(&pass, num_pasts);
    int64_t heads_size = QUERIES * (kernels->values_size(format, dim) + pass.longest) + 2 * dim +
                         rows_scratch(dim);
    pass.scratch_size = 2 * larger + 2 * dim;
    if (heads_size > pass.scratch_size) pass.scratch_size = heads_size;
    pass.scratch_size = (pass.scratch_size + 15) / 16 * 16;
    size_t row_size = (size_t)(2 * hidden + query_size + 2 * key_size) * (size_t)width;
    size_t scratch = (size_t)(num_threads * pass.scratch_size) * sizeof(float);
    uint8_t *memory = malloc(scratch + (size_t)num_rows * row_size);
    int status = memory ? OK : NO_MEMORY;
    if (!status) {
        pass.scratch = (float *)memory;
        pass.normed = memory + scratch;
        pass.output = pass.normed + num_rows * hidden * width;
        pass.query = pass.output + num_rows * hidden * width;
        pass.key = pass.query + num_rows * query_size * width;
        pass.value = pass.key + num_rows * key_size * width;
        with_team(run_pass, &pass, num_threads);
        status = pass.status;
    }
    free(memory);
    free(pass.blocks);
    return status;
}

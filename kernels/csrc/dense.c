/* Entry points beside the experts: one dense matrix, the fixed-order combine, the plain read. */
#include "dispatch.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Each product and each sum is rounded by itself. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

/* Rows of weights are handed out in units, many at first and single ones at the end, so that threads end
   together. */
enum { TILE_UNIT = 24, UNIT = 16, MAX_UNITS = 8, SERIAL_TOKENS = 4 };

typedef struct {
    const Kernels *kernels;
    const Product *products;
    int64_t ends[MAX_PRODUCTS]; /* units up to and with each product's */
    const uint8_t *x;
    int64_t num_products, num_tokens, x_stride, values, sums, pairs, scratch_size, unit, max_units;
    int32_t format, num_threads;
    int in_tiles, in_pairs; /* pairs: many tokens are computed in bf16 */
    float *x_values, *x_sums, *scratch;
    uint16_t *x_pairs;
    Prepared *tokens;
    atomic_llong next[2];
} Dense;

static void prepare_body(void *context, int32_t thread) {
    Dense *dense = context;
    const Kernels *kernels = dense->kernels;
    const Matrix *matrix = dense->products->matrix;
    float *scratch = dense->scratch + thread * dense->scratch_size;
    for (;;) {
        int64_t t = atomic_fetch_add(&dense->next[0], 1);
        if (t >= dense->num_tokens) break;
        kernels->widen(dense->format, dense->x + t * dense->x_stride, matrix->k, scratch);
        if (dense->in_pairs)
            kernels->prepare_pairs(matrix->format, scratch, matrix->k,
                                   dense->x_pairs + t * dense->pairs);
        else
            kernels->prepare(matrix->format, scratch, matrix->k, 0, matrix->k,
                             dense->x_values + t * dense->values, dense->x_sums + t * dense->sums);
    }
}

/* The next rows [from, from + rows) of a product; NULL if there are none. */
static const Product *take_rows(Dense *dense, int64_t *from, int64_t *rows) {
    long long begin = atomic_load(&dense->next[1]);
    int64_t all = dense->ends[dense->num_products - 1], count, place;
    do {
        if (begin >= all) return NULL;
        for (place = 0; begin >= dense->ends[place];) place++;
        count = (all - begin) / (2 * dense->num_threads);
        if (count > dense->max_units) count = dense->max_units;
        if (count < 1) count = 1;
        if (count > dense->ends[place] - begin) count = dense->ends[place] - begin;
    } while (!atomic_compare_exchange_weak(&dense->next[1], &begin, begin + count));
    const Product *product = &dense->products[place];
    *from = (begin - (place ? dense->ends[place - 1] : 0)) * dense->unit;
    *rows = count * dense->unit;
    if (*rows > product->matrix->n - *from) *rows = product->matrix->n - *from;
    return product;
}

static void dense_body(void *context, int32_t thread) {
    Dense *dense = context;
    const Kernels *kernels = dense->kernels;
    float *scratch = dense->scratch + thread * dense->scratch_size;
    float *buffer = scratch + dense->scratch_size - dense->num_tokens * dense->unit * dense->max_units;
    int64_t count = dense->num_tokens, width = dense->format ? 2 : 4, from, rows;
    for (const Product *product; (product = take_rows(dense, &from, &rows));) {
        const Matrix *matrix = product->matrix;
        Run run = {.weight = matrix->weight + from * row_bytes(matrix->format, matrix->k),
                   .rows = rows, .k = matrix->k};
        if (matrix->scale) run.scale = matrix->scale + from * scale_bytes(matrix->format, matrix->k);
        if (!dense->in_tiles)
            streamed(kernels, matrix->format, &run, dense->tokens, count, scratch, buffer, rows);
        else if (dense->in_pairs)
            kernels->pairs[matrix->format](&run, dense->tokens, count, scratch, buffer, rows);
        else
            kernels->tiles(matrix->format, &run, dense->tokens, count, scratch, buffer, rows);
        if (matrix->bias) {
            kernels->widen(matrix->bias_format, matrix->bias + from * (matrix->bias_format ? 2 : 4),
                           rows, scratch);
            for (int64_t t = 0; t < count; t++)
                for (int64_t i = 0; i < rows; i++) buffer[t * rows + i] += scratch[i];
        }
        for (int64_t t = 0; t < count; t++)
            kernels->narrow(dense->format, buffer + t * rows, rows,
                            product->out + (t * matrix->n + from) * width);
    }
}

static int same_inputs(const Product *products, int64_t count) {
    for (int64_t i = 1; i < count; i++)
        if (products[i].matrix->format != products->matrix->format ||
            products[i].matrix->k != products->matrix->k)
            return 0;
    return 1;
}

int multiply_rows(const Product *products, int64_t num_products, const uint8_t *x, int64_t num_tokens,
                  int64_t x_stride, int32_t format, int32_t way, int32_t num_threads) {
    const Kernels *kernels = active_kernels();
    const Matrix *matrix = products->matrix;
    Dense dense = {.kernels = kernels, .products = products, .num_products = num_products, .x = x,
                   .num_tokens = num_tokens, .x_stride = x_stride, .format = format,
                   .num_threads = num_threads, .unit = UNIT, .max_units = MAX_UNITS};
    if (num_tokens == 0) return OK;
    if (!same_inputs(products, num_products)) {
        int status = OK;
        for (int64_t i = 0; i < num_products && !status; i++)
            status = multiply_rows(products + i, 1, x, num_tokens, x_stride, format, way, num_threads);
        return status;
    }
    dense.in_tiles = is_tiled(way, num_tokens);
    dense.in_pairs = dense.in_tiles && format == BF16 && kernels->pairs[matrix->format];
    if (dense.in_pairs) {
        dense.pairs = kernels->pairs_size(matrix->k);
    } else {
        dense.values = kernels->values_size(matrix->format, matrix->k);
        dense.sums = (kernels->sums_size(matrix->format, matrix->k) + 15) / 16 * 16;
    }
    if (dense.in_tiles) {
        dense.unit = TILE_UNIT;
        dense.max_units = 1;
    }
    for (int64_t i = 0; i < num_products; i++)
        dense.ends[i] = (i ? dense.ends[i - 1] : 0) +
                        (products[i].matrix->n + dense.unit - 1) / dense.unit;
    dense.scratch_size = (kernels->tiles_scratch > matrix->k ? kernels->tiles_scratch : matrix->k) +
                         16 * (matrix->k / GROUP + 32) + num_tokens * dense.unit * dense.max_units;
    /* whole cache lines: vectors of digits must not straddle two */
    dense.scratch_size = (dense.scratch_size + 15) / 16 * 16;
    size_t floats = (size_t)(num_tokens * (dense.values + dense.sums + dense.pairs / 2) +
                             num_threads * dense.scratch_size + 16);
    float *memory = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
    dense.tokens = malloc((size_t)num_tokens * sizeof(Prepared));
    int status = memory && dense.tokens ? OK : NO_MEMORY;
    if (status == OK) {
        dense.x_values = memory;
        dense.x_sums = memory + num_tokens * dense.values;
        dense.x_pairs = (uint16_t *)(dense.x_sums + num_tokens * dense.sums);
        dense.scratch = dense.x_sums + num_tokens * (dense.sums + dense.pairs / 2);
        for (int64_t t = 0; t < num_tokens; t++)
            dense.tokens[t] =
                (Prepared){dense.x_values + t * dense.values, dense.x_sums + t * dense.sums,
                           dense.x_pairs + t * dense.pairs};
        run_parallel(prepare_body, &dense, num_tokens < SERIAL_TOKENS ? 1 : num_threads);
        run_products(dense_body, &dense, num_threads);
    }
    free(dense.tokens);
    free(memory);
    return status;
}

/* out [num_tokens, n] = x [num_tokens, k] times the matrix, plus its bias. */
int outrider_linear(const Matrix *matrix, const uint8_t *x, uint8_t *out, int64_t num_tokens,
                    int64_t x_stride, int32_t format, int32_t way, int32_t num_threads) {
    Product product = {matrix, out};
    return multiply_rows(&product, 1, x, num_tokens, x_stride, format, way, num_threads);
}

/* out [T, H] = sum over a token's K rows [T, K, H] by ascending id, weights fp32 [T, K]. */
int outrider_combine(const uint8_t *outputs, const float *weights, const int64_t *ids,
                     int64_t num_tokens, int64_t top_k, int64_t hidden, int32_t format,
                     uint8_t *out) {
    const Kernels *kernels = active_kernels();
    int64_t width = format ? 2 : 4;
    int64_t *order = malloc((size_t)top_k * sizeof *order);
    float *row = malloc(2 * (size_t)hidden * sizeof *row), *total = row ? row + hidden : NULL;
    if (order && row) {
        for (int64_t t = 0; t < num_tokens; t++) {
            for (int64_t k = 0; k < top_k; k++) {
                int64_t at = k;
                for (; at && ids[t * top_k + order[at - 1]] > ids[t * top_k + k]; at--)
                    order[at] = order[at - 1];
                order[at] = k;
            }
            for (int64_t k = 0; k < top_k; k++) {
                int64_t from = t * top_k + order[k];
                float weight = weights[from];
                kernels->widen(format, outputs + from * hidden * width, hidden, row);
                if (k == 0)
                    for (int64_t i = 0; i < hidden; i++) total[i] = weight * row[i];
                else
                    for (int64_t i = 0; i < hidden; i++) {
                        float product = weight * row[i];
                        total[i] = total[i] + product;
                    }
            }
            kernels->narrow(format, total, hidden, out + t * hidden * width);
        }
    }
    int status = order && row ? OK : NO_MEMORY;
    free(order);
    free(row);
    return status;
}

enum { READ_PIECE = 1 << 20 };

typedef struct {
    const uint8_t *bytes;
    int64_t count;
    atomic_llong next;
    _Atomic float total;
} Reading;

static void read_body(void *context, int32_t thread) {
    Reading *reading = context;
    float sum = 0;
    (void)thread;
    for (;;) {
        int64_t from = atomic_fetch_add(&reading->next, 1) * READ_PIECE;
        if (from >= reading->count) break;
        int64_t left = reading->count - from;
        sum += active_kernels()->read(reading->bytes + from, left < READ_PIECE ? left : READ_PIECE);
    }
    reading->total = reading->total + sum;
}

/* Read `count` bytes once with num_threads threads: the yardstick of the benchmark. */
float outrider_read(const uint8_t *bytes, int64_t count, int32_t num_threads) {
    Reading reading = {.bytes = bytes, .count = count};
    run_parallel(read_body, &reading, num_threads);
    return reading.total;
}

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

enum { ROWS_AT_ONCE = 24 };

typedef struct {
    const Kernels *kernels;
    const Matrix *matrix;
    const uint8_t *x;
    uint8_t *out;
    int64_t num_tokens, x_stride, values, sums, pairs, scratch_size, rows;
    int32_t format;
    int in_tiles, in_pairs; /* pairs: many tokens are computed in bf16 */
    float *x_values, *x_sums, *scratch;
    uint16_t *x_pairs;
    Prepared *tokens;
    atomic_llong next[2];
    Barrier barrier;
} Dense;

static void dense_body(void *context, int32_t thread, int32_t num_threads) {
    Dense *dense = context;
    const Kernels *kernels = dense->kernels;
    const Matrix *matrix = dense->matrix;
    float *scratch = dense->scratch + thread * dense->scratch_size;
    float *buffer = scratch + dense->scratch_size - dense->num_tokens * dense->rows;
    int64_t count = dense->num_tokens, width = dense->format ? 2 : 4;
    for (;;) {
        int64_t t = atomic_fetch_add(&dense->next[0], 1);
        if (t >= count) break;
        kernels->widen(dense->format, dense->x + t * dense->x_stride, matrix->k, scratch);
        if (dense->in_pairs)
            kernels->prepare_pairs(matrix->format, scratch, matrix->k,
                                   dense->x_pairs + t * dense->pairs);
        else
            kernels->prepare(matrix->format, scratch, matrix->k, 0, matrix->k,
                             dense->x_values + t * dense->values, dense->x_sums + t * dense->sums);
    }
    barrier_wait(&dense->barrier, num_threads);
    for (;;) {
        int64_t from = atomic_fetch_add(&dense->next[1], 1) * dense->rows;
        int64_t rows = matrix->n - from < dense->rows ? matrix->n - from : dense->rows;
        if (rows <= 0) break;
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
                            dense->out + (t * matrix->n + from) * width);
    }
}

/* out [num_tokens, n] = x [num_tokens, k] times the matrix, plus its bias. */
int outrider_linear(const Matrix *matrix, const uint8_t *x, uint8_t *out, int64_t num_tokens,
                    int64_t x_stride, int32_t format, int32_t way, int32_t num_threads) {
    const Kernels *kernels = active_kernels();
    Dense dense = {.kernels = kernels, .matrix = matrix, .x = x, .out = out,
                   .num_tokens = num_tokens, .x_stride = x_stride, .format = format};
    if (num_tokens == 0) return OK;
    dense.in_tiles = is_tiled(way, num_tokens);
    dense.in_pairs = dense.in_tiles && format == BF16 && kernels->pairs[matrix->format];
    if (dense.in_pairs) {
        dense.pairs = kernels->pairs_size(matrix->k);
    } else {
        dense.values = kernels->values_size(matrix->format, matrix->k);
        dense.sums = (kernels->sums_size(matrix->format, matrix->k) + 15) / 16 * 16;
    }
    dense.rows = ROWS_AT_ONCE;
    if (!dense.in_tiles) {
        dense.rows = 128;
        while (dense.rows > 16 && matrix->n / dense.rows < 8 * num_threads) dense.rows /= 2;
    }
    dense.scratch_size = (kernels->tiles_scratch > matrix->k ? kernels->tiles_scratch : matrix->k) +
                         16 * (matrix->k / GROUP + 32) + num_tokens * dense.rows;
    size_t floats = (size_t)(num_tokens * (dense.values + dense.sums + dense.pairs / 2) +
                             num_threads * dense.scratch_size);
    /* whole cache lines: vectors of digits must not straddle two */
    dense.scratch_size = (dense.scratch_size + 15) / 16 * 16;
    floats += (size_t)num_threads * 16;
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
        run_parallel(dense_body, &dense, num_threads);
    }
    free(dense.tokens);
    free(memory);
    return status;
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

typedef struct {
    const uint8_t *bytes;
    int64_t count;
    float *sums;
} Reading;

static void read_body(void *context, int32_t thread, int32_t num_threads) {
    Reading *reading = context;
    int64_t share = reading->count / num_threads / 64 * 64;
    reading->sums[thread] = active_kernels()->read(reading->bytes + thread * share, share);
}

/* Read `count` bytes once with num_threads threads: the yardstick of the benchmark. */
float outrider_read(const uint8_t *bytes, int64_t count, int32_t num_threads) {
    float sums[256] = {0}, total = 0;
    Reading reading = {bytes, count, sums};
    run_parallel(read_body, &reading, num_threads < 256 ? num_threads : 256);
    for (int i = 0; i < 256; i++) total += sums[i];
    return total;
}

/* What the entry points are called with, and the row kernels that this processor runs. */
#ifndef DISPATCH_H
#define DISPATCH_H

#include "outrider.h"

/* x, out: `format` (FP32, BF16, FP16); x_stride in bytes. *_wide: int64 indices, else int32.
   out_rows may be NULL: assignment i then writes row i. */
typedef struct {
    const uint8_t *x;
    uint8_t *out;
    const void *token_idx, *slot_ids, *out_rows;
    int64_t num_tokens, x_stride, num_assignments, num_out_rows;
    int32_t format, token_idx_wide, slot_ids_wide, out_rows_wide, way;
} Inputs;

const Kernels *active_kernels(void);

/* The `rows` kernels over any number of tokens, a few at a time while the run lies in the caches. */
void streamed(const Kernels *kernels, int32_t format, const Run *run, const Prepared *tokens,
              int64_t count, float *scratch, float *out, int64_t stride);

/* One of several products of the same inputs. */
enum { MAX_PRODUCTS = 3 };
typedef struct {
    const Matrix *matrix;
    uint8_t *out; /* [num_tokens, n] */
} Product;

/* out [num_tokens, n] = x [num_tokens, k] times each matrix, plus its bias; up to MAX_PRODUCTS. */
int multiply_rows(const Product *products, int64_t num_products, const uint8_t *x, int64_t num_tokens,
                  int64_t x_stride, int32_t format, int32_t way, int32_t num_threads);

#endif

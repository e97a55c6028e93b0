/* The parts of a decoder layer beside attention: norm, gated MLP, residual, and one token's experts with
   their combine. */
#include "decoder.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16 };

void normalise(const Kernels *kernels, int32_t format, float *values, const uint8_t *weight, float eps,
               int64_t n, float *weights, uint8_t *out) {
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

/* One operation on rows of n values, each on its own. */
typedef struct Rows {
    const Kernels *kernels;
    void (*one)(const struct Rows *rows, int64_t row, float *wide);
    const uint8_t *x, *y, *z;
    uint8_t *out;
    float eps;
    int64_t count, n;
    int32_t format, activation;
    float *scratch; /* 2 n floats a thread, then n of the format */
    int64_t scratch_size;
    atomic_llong next;
} Rows;

static void rows_body(void *context, int32_t thread) {
    Rows *rows = context;
    for (;;) {
        int64_t row = atomic_fetch_add(&rows->next, 1);
        if (row >= rows->count) break;
        rows->one(rows, row, rows->scratch + thread * rows->scratch_size);
    }
}

static int each_row(Rows *rows, int32_t num_threads) {
    int32_t sharers = sharers_of(rows->count * rows->n, num_threads);
    rows->kernels = active_kernels();
    rows->scratch_size = (3 * rows->n + 15) / 16 * 16;
    rows->scratch = malloc((size_t)(sharers * rows->scratch_size) * sizeof(float));
    if (!rows->scratch) return NO_MEMORY;
    run_parallel(rows_body, rows, sharers);
    free(rows->scratch);
    return OK;
}

static void norm_one(const Rows *rows, int64_t row, float *wide) {
    int64_t at = row * rows->n * width_of(rows->format);
    rows->kernels->widen(rows->format, rows->x + at, rows->n, wide);
    normalise(rows->kernels, rows->format, wide, rows->y, rows->eps, rows->n, wide + rows->n,
              rows->out + at);
}

/* out [rows, n] = the RMS norm of each row of x, both in `format`; they may be the same. */
int outrider_rms_norm(const uint8_t *x, const uint8_t *weight, float eps, int64_t num_rows, int64_t n,
                      int32_t format, uint8_t *out, int32_t num_threads) {
    Rows rows = {.one = norm_one, .x = x, .y = weight, .out = out, .eps = eps, .count = num_rows,
                 .n = n, .format = format};
    return each_row(&rows, num_threads);
}

/* out = round(x + y), n values in `format`. */
static void add(const Rows *rows, const uint8_t *x, const uint8_t *y, float *wide, uint8_t *out) {
    rows->kernels->widen(rows->format, x, rows->n, wide);
    rows->kernels->widen(rows->format, y, rows->n, wide + rows->n);
    for (int64_t i = 0; i < rows->n; i++) wide[i] += wide[rows->n + i];
    rows->kernels->narrow(rows->format, wide, rows->n, out);
}

static void add_one(const Rows *rows, int64_t row, float *wide) {
    int64_t at = row * rows->n * width_of(rows->format);
    const uint8_t *sum = rows->y + at;
    if (rows->z) {
        uint8_t *inner = (uint8_t *)(wide + 2 * rows->n);
        add(rows, sum, rows->z + at, wide, inner);
        sum = inner;
    }
    add(rows, rows->x + at, sum, wide, rows->out + at);
}

/* x [rows, n] = round(x + round(first + second)); `second` may be NULL. */
int outrider_add_residual(uint8_t *x, const uint8_t *first, const uint8_t *second, int64_t num_rows,
                          int64_t n, int32_t format, int32_t num_threads) {
    Rows rows = {.one = add_one, .x = x, .y = first, .z = second, .out = x, .count = num_rows, .n = n,
                 .format = format};
    return each_row(&rows, num_threads);
}

static void activate_one(const Rows *rows, int64_t row, float *wide) {
    int64_t at = row * rows->n * width_of(rows->format);
    rows->kernels->widen(rows->format, rows->x + at, rows->n, wide);
    rows->kernels->widen(rows->format, rows->y + at, rows->n, wide + rows->n);
    rows->kernels->activate(rows->activation, wide, wide + rows->n, rows->n, wide);
    rows->kernels->narrow(rows->format, wide, rows->n, rows->out + at);
}

typedef struct {
    const Mlp *mlp;
    const uint8_t *x;
    uint8_t *gate, *up, *out;
    int64_t num_rows;
    int32_t way, num_threads;
    int status;
} MlpCall;

static void run_mlp(void *context) {
    MlpCall *call = context;
    const Mlp *mlp = call->mlp;
    int64_t inner = mlp->gate.n, width = width_of(mlp->format);
    const Product inputs[] = {{&mlp->gate, call->gate}, {&mlp->up, call->up}};
    const Product output = {&mlp->down, call->out};
    int status = multiply_rows(inputs, 2, call->x, call->num_rows, mlp->gate.k * width, mlp->format,
                               call->way, call->num_threads);
    if (!status) {
        Rows rows = {.one = activate_one, .x = call->gate, .y = call->up, .out = call->gate,
                     .count = call->num_rows, .n = inner, .format = mlp->format,
                     .activation = mlp->activation};
        status = each_row(&rows, call->num_threads);
    }
    if (!status)
        status = multiply_rows(&output, 1, call->gate, call->num_rows, inner * width, mlp->format,
                               call->way, call->num_threads);
    call->status = status;
}

/* out [rows, hidden] = down(activation(gate x) * up x). */
int outrider_gated_mlp(const Mlp *mlp, const uint8_t *x, int64_t num_rows, uint8_t *out, int32_t way,
                       int32_t num_threads) {
    int64_t size = num_rows * mlp->gate.n * width_of(mlp->format);
    uint8_t *gate = malloc((size_t)(2 * size));
    if (!gate) return NO_MEMORY;
    MlpCall call = {.mlp = mlp, .x = x, .gate = gate, .up = gate + size, .out = out,
                    .num_rows = num_rows, .way = way, .num_threads = num_threads};
    with_team(run_mlp, &call, num_threads);
    free(gate);
    return call.status;
}

/* out[rows[i]] [hidden] = the output of the expert in slots[i] for the one token x, unweighted; `out` has
   num_rows rows, and without `rows` it is out[i]. */
int outrider_token_rows(const Experts *experts, const uint8_t *x, const int64_t *slots,
                           const int64_t *rows, int64_t count, int64_t num_rows, int32_t format,
                           int32_t way, uint8_t *out, int32_t num_threads) {
    int64_t *token_idx = calloc((size_t)count, sizeof *token_idx);
    if (!token_idx) return NO_MEMORY;
    Inputs in = {.x = x, .out = out, .token_idx = token_idx, .slot_ids = slots, .out_rows = rows,
                 .num_tokens = 1, .num_assignments = count, .num_out_rows = num_rows,
                 .format = format, .token_idx_wide = 1, .slot_ids_wide = 1, .out_rows_wide = 1,
                 .way = way};
    int status = outrider_expert_outputs(experts, &in, num_threads);
    free(token_idx);
    return status;
}

/* Descriptors of the parts of a decoder layer, and what their entry points share. A pass is rows of
   several sequences; each row's results depend on that row and its past alone. What the parts hand each
   other is rounded to the activations' format, as between a model's modules; inside, everything is fp32. */
#ifndef DECODER_H
#define DECODER_H

#include "dispatch.h"

/* norm, query_norm and key_norm hold weights in `format`; the latter two may be NULL, else their width
   is one head or all. `window`: the last so many tokens are seen, 0: all. */
typedef struct {
    Matrix query, key, value, output;
    const uint8_t *norm, *query_norm, *key_norm;
    int64_t query_norm_width, key_norm_width;
    int64_t num_heads, num_kv_heads, head_dim, window;
    float eps, head_norm_eps, scaling;
    int32_t format;
} Attention;

/* Rows [first, first + count) of a pass are the next of a sequence that has `length` rows of keys and
   values [kv_heads, capacity, head_dim]. */
typedef struct {
    uint8_t *keys, *values;
    int64_t capacity, length, first, count;
} Past;

typedef struct {
    Matrix gate, up, down;
    int32_t activation, format;
} Mlp;

/* How a router's logits become a choice of experts and their weights. `format` is that of the
   activations; what is rounded to it is what the family's own module rounds. */
typedef struct {
    Matrix gate; /* [experts, hidden] */
    int64_t top_k;
    float epsilon; /* added to the sum that weights are divided by */
    int32_t format, rounds_scores, rounds_weights, is_renormalised;
} Router;

/* norm: before the block, in the activations' format. The block is `mlp` where there is no router, else
   routed experts and, unless NULL, `mlp` beside them, behind `shared_gate` [1, hidden] unless NULL. */
typedef struct {
    const Attention *attention;
    const Mlp *mlp;
    const Router *router;
    const Matrix *shared_gate;
    const uint8_t *norm;
    float eps;
} Layer;

typedef struct {
    const Layer *layers;
    const uint8_t *embeddings, *norm; /* [vocabulary, hidden], [hidden] */
    Matrix head;
    int64_t num_layers;
    float eps;
    int32_t format;
} Decoder;

/* Fewer values than this are not worth a second thread. */
enum { MIN_SHARED_VALUES = 1 << 16 };

static inline int64_t width_of(int32_t format) { return format ? 2 : 4; }

static inline int32_t sharers_of(int64_t values, int32_t num_threads) {
    return values < MIN_SHARED_VALUES ? 1 : num_threads;
}

/* Round to `format` and back; `narrowed` takes the result in the format. */
static inline void round_through(const Kernels *kernels, int32_t format, float *values, int64_t count,
                                 void *narrowed) {
    kernels->narrow(format, values, count, narrowed);
    kernels->widen(format, narrowed, count, values);
}

/* values [n] -> values / their root mean square, rounded, times weight, rounded into `out`; `weights`
   takes n floats. */
void normalise(const Kernels *kernels, int32_t format, float *values, const uint8_t *weight, float eps,
               int64_t n, float *weights, uint8_t *out);

int outrider_linear(const Matrix *matrix, const uint8_t *x, uint8_t *out, int64_t num_tokens,
                    int64_t x_stride, int32_t format, int32_t way, int32_t num_threads);
int outrider_combine(const uint8_t *outputs, const float *weights, const int64_t *ids,
                     int64_t num_tokens, int64_t top_k, int64_t hidden, int32_t format, uint8_t *out);
int outrider_choose(const Router *router, const uint8_t *logits, int64_t num_rows, int64_t *ids,
                    float *weights, float *scores, int32_t *is_tied);
int outrider_gate_rows(const uint8_t *gate, uint8_t *rows, int64_t num_rows, int64_t n, int32_t format);
int outrider_attend(const Attention *attention, uint8_t *x, int64_t num_rows, const Past *pasts,
                    int64_t num_pasts, const uint8_t *cosines, const uint8_t *sines, int32_t way,
                    int32_t num_threads);
int outrider_gated_mlp(const Mlp *mlp, const uint8_t *x, int64_t num_rows, uint8_t *out, int32_t way,
                       int32_t num_threads);
int outrider_expert_outputs(const Experts *experts, const Inputs *in, int32_t num_threads);
int outrider_rms_norm(const uint8_t *x, const uint8_t *weight, float eps, int64_t num_rows, int64_t n,
                      int32_t format, uint8_t *out, int32_t num_threads);
int outrider_add_residual(uint8_t *x, const uint8_t *first, const uint8_t *second, int64_t num_rows,
                          int64_t n, int32_t format, int32_t num_threads);

#endif

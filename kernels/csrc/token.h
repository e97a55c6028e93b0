/* Descriptors of one token's passes, and the entry points that they are made of. */
#ifndef TOKEN_H
#define TOKEN_H

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

typedef struct {
    Matrix gate, up, down;
    int32_t activation, format;
} Mlp;

int outrider_linear(const Matrix *matrix, const uint8_t *x, uint8_t *out, int64_t num_tokens,
                    int64_t x_stride, int32_t format, int32_t num_threads);
int outrider_combine(const uint8_t *outputs, const float *weights, const int64_t *ids,
                     int64_t num_tokens, int64_t top_k, int64_t hidden, int32_t format, uint8_t *out);
int outrider_expert_outputs(const Experts *experts, const Inputs *in, int32_t num_threads);

#endif

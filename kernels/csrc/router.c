/* A router's choice: softmax, the largest, their weights. */
#include "decoder.h"

#include <stdlib.h>
#include <string.h>

/* The `top_k` largest of `scores` in descending order, equal ones by id; whether another expert has the
   same score as the last. A NaN is never the larger, so ids are distinct whatever the scores. */
static int32_t largest(const float *scores, int64_t num_experts, int64_t top_k, uint8_t *is_chosen,
                       int64_t *ids) {
    memset(is_chosen, 0, (size_t)num_experts);
    for (int64_t k = 0; k < top_k; k++) {
        int64_t best = -1;
        for (int64_t i = 0; i < num_experts; i++)
            if (!is_chosen[i] && (best < 0 || scores[i] > scores[best])) best = i;
        is_chosen[best] = 1;
        ids[k] = best;
    }
    for (int64_t i = 0; i < num_experts; i++)
        if (!is_chosen[i] && scores[i] == scores[ids[top_k - 1]]) return 1;
    return 0;
}

static float rounded(const Kernels *kernels, int32_t format, float value) {
    float narrowed;
    round_through(kernels, format, &value, 1, &narrowed);
    return value;
}

static void weigh(const Router *router, const Kernels *kernels, const float *scores, const int64_t *ids,
                  float *weights) {
    int32_t format = router->rounds_scores ? router->format : FP32;
    float total = 0;
    for (int64_t k = 0; k < router->top_k; k++) total += weights[k] = scores[ids[k]];
    if (router->is_renormalised) {
        total = rounded(kernels, format, rounded(kernels, format, total) + router->epsilon);
        for (int64_t k = 0; k < router->top_k; k++)
            weights[k] = rounded(kernels, format, weights[k] / total);
    }
    for (int64_t k = 0; router->rounds_weights && k < router->top_k; k++)
        weights[k] = rounded(kernels, router->format, weights[k]);
}

/* logits [rows, experts] -> ids and fp32 weights [rows, top_k], weights descending, and scores
   [rows, experts]. Of rows whose last place several experts tie for, is_tied [rows] says so: which of
   them it is, ids settle; the weights do not depend on it. */
int outrider_choose(const Router *router, const uint8_t *logits, int64_t num_rows, int64_t *ids,
                    float *weights, float *scores, int32_t *is_tied) {
    const Kernels *kernels = active_kernels();
    int64_t num_experts = router->gate.n, width = width_of(router->format);
    uint8_t *memory = malloc((size_t)num_experts * 5);
    if (!memory) return NO_MEMORY;
    for (int64_t row = 0; row < num_rows; row++) {
        float *own = scores + row * num_experts;
        kernels->widen(router->format, logits + row * num_experts * width, num_experts, own);
        kernels->softmax(own, num_experts, 1.0f);
        if (router->rounds_scores) round_through(kernels, router->format, own, num_experts, memory);
        is_tied[row] = largest(own, num_experts, router->top_k, memory + 4 * num_experts,
                               ids + row * router->top_k);
        weigh(router, kernels, own, ids + row * router->top_k, weights + row * router->top_k);
    }
    free(memory);
    return OK;
}

/* rows [num_rows, n] *= sigmoid(gate [num_rows]), each rounded; a row's bits depend on it alone. */
int outrider_gate_rows(const uint8_t *gate, uint8_t *rows, int64_t num_rows, int64_t n,
                       int32_t format) {
    const Kernels *kernels = active_kernels();
    int64_t width = width_of(format);
    float *wide = malloc((size_t)n * sizeof *wide);
    if (!wide) return NO_MEMORY;
    for (int64_t row = 0; row < num_rows; row++) {
        float pair[2] = {0, 0};
        kernels->widen(format, gate + row * width, 1, pair);
        kernels->softmax(pair, 2, 1.0f);
        float factor = rounded(kernels, format, pair[0]);
        kernels->widen(format, rows + row * n * width, n, wide);
        for (int64_t i = 0; i < n; i++) wide[i] *= factor;
        kernels->narrow(format, wide, n, rows + row * n * width);
    }
    free(wide);
    return OK;
}

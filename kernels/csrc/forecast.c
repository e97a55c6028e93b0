/* The forecast of later layers from one layer's state: its drift, the later gates, earlier odds. */
#include "forecast.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NEWTON_STEPS = 3 };
static const float newton_step = 4, gelu_slope = 1.702f, largest_odds = 60;

/* `gate`: of `depth` later layers, one after the other. `own`: this layer's gate. bias: fp32
   [depth, num_experts] or NULL. of_drift, of_odds, alone: fp32 [depth]. */
typedef struct {
    Linear inner, up, gate, own;
    const float *bias, *of_drift, *of_odds, *alone;
    int64_t hidden_size, num_experts, depth, top_k, num_linear;
    int32_t is_sigmoid;
} Drift;

void linear(const Kernels *kernels, const Linear *layer, const float *x, float *scratch, float *out) {
    float *values = scratch, *rest = scratch + kernels->values_size(FP16, layer->k);
    Prepared token = {.values = values, .sums = rest};
    Run run = {.weight = layer->weight, .rows = layer->n, .k = layer->k};
    kernels->prepare(FP16, x, layer->k, 0, layer->k, values, rest);
    kernels->rows[FP16][0](&run, &token, rest, out, layer->n);
    if (layer->offset)
        for (int64_t i = 0; i < layer->n; i++) out[i] += layer->offset[i];
}

/* The value that `count` of n values are at least as large as, and the next one below it. */
static void edge_of(const float *values, int64_t n, int64_t count, float *edge, float *below) {
    float top[count + 1];
    int64_t held = 0;
    for (int64_t i = 0; i < n; i++) {
        float value = values[i];
        if (held == count + 1 && !(value > top[count])) continue;
        int64_t at = held < count + 1 ? held++ : count;
        for (; at && top[at - 1] < value; at--) top[at] = top[at - 1];
        top[at] = value;
    }
    *edge = top[count - 1];
    *below = top[count];
}

void include(float *values, int64_t n, int64_t top_k, int max_steps, float max_step, float max_excess) {
    float edge, below;
    if (top_k >= n) {
        for (int64_t i = 0; i < n; i++) values[i] = 1;
        return;
    }
    edge_of(values, n, top_k, &edge, &below);
    for (int64_t i = 0; i < n; i++) {
        float over = values[i] - 0.5f * (edge + below);
        values[i] = expf(fminf(fmaxf(over, -largest_odds), largest_odds));
    }
    float factor = 1;
    for (int step = 0; step < max_steps; step++) {
        float total = 0, slope = 0;
        for (int64_t i = 0; i < n; i++) {
            float chance = values[i] * factor / (1 + values[i] * factor);
            total += chance;
            slope += chance - chance * chance;
        }
        float excess = total - (float)top_k;
        if (fabsf(excess) < max_excess) break;
        factor *= expf(-fminf(fmaxf(excess / fmaxf(slope, 1e-6f), -max_step), max_step));
    }
    for (int64_t i = 0; i < n; i++) values[i] = values[i] * factor / (1 + values[i] * factor);
}

/* Logits [n] -> softmax shares of the top_k, 0 for the others. */
static void choose(float *logits, int64_t n, int64_t top_k) {
    float least = -INFINITY, below, top = logits[0], total = 0;
    for (int64_t i = 1; i < n; i++) top = fmaxf(top, logits[i]);
    if (top_k < n) edge_of(logits, n, top_k, &least, &below);
    for (int64_t i = 0; i < n; i++) total += expf(logits[i] - top);
    for (int64_t i = 0; i < n; i++)
        logits[i] = logits[i] >= least ? expf(logits[i] - top) / total : 0;
}

/* Probabilities [depth, num_experts] of the later layers. `state` in `format` is kept as fp32 in `kept`;
   `before`, of the layer before, and `past`, of two layers at the token before, may be NULL, which is
   zeros; `odds` [depth, num_experts] were forecast before the token, or are NULL. */
int outrider_forecast_layers(const Drift *drift, const uint8_t *state, const float *before,
                             const float *first_past, const float *second_past, const float *odds,
                             float *kept, float *out, int32_t format) {
    const Kernels *kernels = active_kernels();
    int64_t size = drift->hidden_size, experts = drift->num_experts, cells = drift->depth * experts;
    int64_t width = drift->inner.k, units = drift->inner.n;
    int64_t larger = width > units ? width : units;
    size_t floats = (size_t)((width + units + cells + 47) / 16 * 16 + linear_scratch(kernels, larger));
    float *features = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
    if (!features) return NO_MEMORY;
    float *hidden = features + width, *corrections = hidden + units;
    float *scratch = features + (width + units + cells + 15) / 16 * 16;
    const float *states[] = {before, first_past, second_past};
    kernels->widen(format, state, size, kept);
    memcpy(features, kept, (size_t)size * sizeof(float));
    linear(kernels, &drift->own, kept, scratch, features + size);
    choose(features + size, experts, drift->top_k);
    for (int i = 0; i < 3; i++) {
        float *to = features + size + experts + i * size;
        if (states[i])
            memcpy(to, states[i], (size_t)size * sizeof(float));
        else
            memset(to, 0, (size_t)size * sizeof(float));
    }
    linear(kernels, &drift->inner, features, scratch, hidden);
    for (int64_t i = drift->num_linear; i < units; i++)
        hidden[i] /= 1 + expf(-gelu_slope * hidden[i]);
    linear(kernels, &drift->up, hidden, scratch, corrections);
    linear(kernels, &drift->gate, kept, scratch, out);
    const float *trust = odds ? drift->of_drift : drift->alone;
    for (int64_t place = 0; place < drift->depth; place++) {
        float *row = out + place * experts;
        for (int64_t e = 0; e < experts; e++) {
            int64_t cell = place * experts + e;
            float score = row[e] + corrections[cell];
            if (drift->is_sigmoid) score = 1 / (1 + expf(-score));
            if (drift->bias) score += drift->bias[cell];
            row[e] = score * trust[place];
            if (odds) row[e] += odds[cell] * drift->of_odds[place];
        }
        include(row, experts, drift->top_k, NEWTON_STEPS, newton_step, 0);
    }
    free(features);
    return OK;
}

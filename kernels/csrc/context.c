/* The forecast before a token: statistics of its id, corrected by an encoder of the last tokens and a
   cluster head and an expert head, for each horizon. */
#include "forecast.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_HORIZON = 2, NEWTON_STEPS = 40 };
static const float newton_step = 2, max_excess = 1e-3f, share_floor = 1e-4f, odds_floor = 1e-4f;

typedef struct {
    const float *weight, *offset;
    float eps;
} Norm;

/* lag: fp32 [heads, context]. */
typedef struct {
    Norm norm, feed_norm;
    Linear query, key_value, out, feed_in, feed_out;
    const float *lag;
    int64_t heads, context;
} Block;

/* keys: int64 [num_keys] ascending; totals, steps: fp32 [num_keys]; cells: uint8 [num_keys, L * E];
   transitions: fp32 [L, E, E]; head: [L * (E + clusters)]; scale: fp32 [L]. */
typedef struct {
    const int64_t *keys;
    const float *totals, *steps;
    const uint8_t *cells;
    const float *transitions, *scale;
    Linear head;
    int64_t num_keys;
    float strength;
} Horizon;

/* vocabulary: int64 [num_tokens] ascending, whose rows in own and past [1 + num_tokens, width] come after
   that of unknown ones; expert: [L * E, width]; none: [width]; cluster: int64 [L, E]; frequencies: [L, E].
   `states` has no inputs where none are read. */
typedef struct {
    const int64_t *vocabulary, *cluster;
    const float *own, *past, *expert, *none, *frequencies;
    Linear states;
    Norm states_norm, norm;
    Block *blocks;
    Horizon horizons[MAX_HORIZON];
    int64_t num_tokens, num_blocks, width, num_layers, num_experts, top_k, num_clusters, num_horizons;
} Context;

static void normalised(const Norm *norm, const float *x, int64_t n, float *out) {
    float mean = 0, variance = 0;
    for (int64_t i = 0; i < n; i++) mean += x[i];
    mean /= (float)n;
    for (int64_t i = 0; i < n; i++) {
        out[i] = x[i] - mean;
        variance += out[i] * out[i];
    }
    float scale = 1 / sqrtf(variance / (float)n + norm->eps);
    for (int64_t i = 0; i < n; i++) out[i] = out[i] * scale * norm->weight[i] + norm->offset[i];
}

/* Where `key` stands among ascending keys, or -1. */
static int64_t find(const int64_t *keys, int64_t count, int64_t key) {
    int64_t low = 0, high = count;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (keys[middle] < key)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && keys[low] == key ? low : -1;
}

static void add_to(float *x, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

/* The frame of the token about to run [width]. */
static void frame(const Kernels *kernels, const Context *context, int64_t token_id, int64_t past_id,
                  const int64_t *topk_ids, const float *states, int has_past, float *normed,
                  float *scratch, float *out) {
    int64_t width = context->width, experts = context->num_experts;
    int64_t row = find(context->vocabulary, context->num_tokens, token_id) + 1;
    memcpy(out, context->own + row * width, (size_t)width * sizeof(float));
    if (!has_past) {
        add_to(out, context->none, width);
        return;
    }
    row = find(context->vocabulary, context->num_tokens, past_id) + 1;
    add_to(out, context->past + row * width, width);
    for (int64_t layer = 0; layer < context->num_layers; layer++)
        for (int64_t k = 0; k < context->top_k; k++) {
            int64_t cell = layer * experts + topk_ids[layer * context->top_k + k];
            add_to(out, context->expert + cell * width, width);
        }
    if (context->states.k) {
        float *added = normed + context->states.k;
        normalised(&context->states_norm, states, context->states.k, normed);
        linear(kernels, &context->states, normed, scratch, added);
        add_to(out, added, width);
    }
}

/* One frame `x` [width], the newest of `count` whose keys and values [count, 2 * width] stand with the
   newest first, `stride` floats apart: attention, then the feed-forward part, in place. `room` takes
   6 * width + count floats. */
static void attend(const Kernels *kernels, const Block *block, int64_t width, const float *keys_values,
                   int64_t stride, int64_t count, float *room, float *scratch, float *x) {
    int64_t size = width / block->heads;
    float *normed = room, *query = room + width, *scores = room + 6 * width;
    float scaling = 1 / sqrtf((float)size);
    if (count > block->context) count = block->context;
    normalised(&block->norm, x, width, normed);
    linear(kernels, &block->query, normed, scratch, query);
    memset(normed, 0, (size_t)width * sizeof(float));
    for (int64_t head = 0; head < block->heads; head++) {
        float top = -INFINITY, total = 0;
        for (int64_t lag = 0; lag < count; lag++) {
            const float *key = keys_values + lag * stride + head * size;
            float score = 0;
            for (int64_t i = 0; i < size; i++) score += query[head * size + i] * key[i];
            scores[lag] = score * scaling + block->lag[head * block->context + lag];
            top = fmaxf(top, scores[lag]);
        }
        for (int64_t lag = 0; lag < count; lag++) total += scores[lag] = expf(scores[lag] - top);
        for (int64_t lag = 0; lag < count; lag++) {
            const float *value = keys_values + lag * stride + width + head * size;
            float weight = scores[lag] / total;
            for (int64_t i = 0; i < size; i++) normed[head * size + i] += weight * value[i];
        }
    }
    linear(kernels, &block->out, normed, scratch, query);
    add_to(x, query, width);
    normalised(&block->feed_norm, x, width, normed);
    float *fed = room + width;
    linear(kernels, &block->feed_in, normed, scratch, fed);
    for (int64_t i = 0; i < block->feed_in.n; i++) fed[i] *= 0.5f * (1 + erff(fed[i] * 0.70710678f));
    linear(kernels, &block->feed_out, fed, scratch, normed);
    add_to(x, normed, width);
}

/* Log-odds [L, E] by counts of the token's id, which back off to what follows the last experts. */
static void count_odds(const Context *context, const Horizon *horizon, int64_t token_id,
                       const int64_t *topk_ids, int has_past, float *out) {
    int64_t experts = context->num_experts, cells = context->num_layers * experts;
    int64_t row = find(horizon->keys, horizon->num_keys, token_id);
    float total = row < 0 ? 0 : horizon->totals[row], step = row < 0 ? 0 : horizon->steps[row];
    const uint8_t *counts = horizon->cells + (row < 0 ? 0 : row) * cells;
    if (!has_past) memcpy(out, context->frequencies, (size_t)cells * sizeof(float));
    for (int64_t layer = 0; has_past && layer < context->num_layers; layer++) {
        float *followed = out + layer * experts;
        memset(followed, 0, (size_t)experts * sizeof(float));
        for (int64_t k = 0; k < context->top_k; k++)
            add_to(followed,
                   horizon->transitions +
                       (layer * experts + topk_ids[layer * context->top_k + k]) * experts,
                   experts);
        for (int64_t e = 0; e < experts; e++) followed[e] /= (float)context->top_k;
    }
    for (int64_t i = 0; i < cells; i++) {
        float seen = row < 0 ? 0 : (float)counts[i] * step;
        float share = (seen + horizon->strength * out[i]) / (total + horizon->strength);
        share = fminf(fmaxf(share, share_floor), 1 - share_floor);
        out[i] = logf(share / (1 - share));
    }
}

/* sums [clusters] = log of the summed exponentials of each cluster's values. */
static void log_sums(const float *values, const int64_t *cluster, int64_t n, int64_t clusters,
                     float *sums) {
    float top = values[0];
    for (int64_t i = 1; i < n; i++) top = fmaxf(top, values[i]);
    memset(sums, 0, (size_t)clusters * sizeof(float));
    for (int64_t i = 0; i < n; i++) sums[cluster[i]] += expf(values[i] - top);
    for (int64_t i = 0; i < clusters; i++) sums[i] = logf(sums[i] + 1e-9f) + top;
}

/* Probabilities of one layer from its base log-odds `row` [E] and its corrections [E + clusters]. */
static void layer_chances(const Context *context, const Horizon *horizon, int64_t layer,
                          const float *corrections, float *room, float *row) {
    int64_t experts = context->num_experts, clusters = context->num_clusters;
    const int64_t *cluster = context->cluster + layer * experts;
    float *of_cluster = room, *within = room + clusters, top = -INFINITY, total = 0;
    log_sums(row, cluster, experts, clusters, of_cluster);
    add_to(of_cluster, corrections + experts, clusters);
    add_to(row, corrections, experts);
    log_sums(row, cluster, experts, clusters, within);
    for (int64_t i = 0; i < clusters; i++) top = fmaxf(top, of_cluster[i]);
    for (int64_t i = 0; i < clusters; i++) total += expf(of_cluster[i] - top);
    top += logf(total);
    for (int64_t e = 0; e < experts; e++) {
        int64_t c = cluster[e];
        row[e] = (row[e] + of_cluster[c] - top - within[c]) * horizon->scale[layer];
    }
    include(row, experts, context->top_k, NEWTON_STEPS, newton_step, max_excess);
}

/* Probabilities [horizons, L, E] before `token_id` runs, and the log-odds [L, E] of the first horizon.

   frames: fp32 [num_frames, 3 * width], newest first, a frame each with its key and value in the first
   block; the first row is written here, for the token; the others are there. topk_ids: int64 [L, k] and
   states: fp32 of the last token, which is there if `has_past`. */
int outrider_forecast_token(const Context *context, const int64_t *topk_ids, const float *states,
                            float *frames, float *out, float *odds, int64_t token_id,
                            int64_t past_id, int64_t num_frames, int32_t has_past) {
    const Kernels *kernels = active_kernels();
    int64_t width = context->width, experts = context->num_experts;
    int64_t cells = context->num_layers * experts;
    int64_t corrected = cells + context->num_layers * context->num_clusters;
    int64_t states_size = context->states.k + width, wide = 4 * width;
    if (context->states.k > wide) wide = context->states.k;
    for (int64_t b = 0; b < context->num_blocks; b++)
        if (context->blocks[b].feed_in.n > wide) wide = context->blocks[b].feed_in.n;
    int64_t room_size = 6 * width + wide + num_frames + 2 * context->num_clusters;
    int64_t stride = 3 * width;
    int64_t floats = (room_size + states_size + corrected + 2 * num_frames * stride + 15) / 16 * 16;
    float *memory = aligned_alloc(64, (size_t)(floats + linear_scratch(kernels, wide)) * sizeof(float));
    if (!memory) return NO_MEMORY;
    float *scratch = memory + floats, *room = memory, *normed = room + room_size;
    float *corrections = normed + states_size, *x = corrections + corrected;
    frame(kernels, context, token_id, past_id, topk_ids, states, has_past, normed, scratch, frames);
    if (context->num_blocks) {
        normalised(&context->blocks[0].norm, frames, width, normed);
        linear(kernels, &context->blocks[0].key_value, normed, scratch, frames + width);
    }
    memcpy(x, frames, (size_t)(num_frames * stride) * sizeof(float));
    for (int64_t b = 0; b < context->num_blocks; b++) {
        const Block *block = context->blocks + b;
        int64_t asking = b + 1 < context->num_blocks ? num_frames : 1;
        for (int64_t i = 0; b && i < num_frames; i++) {
            normalised(&block->norm, x + i * stride, width, normed);
            linear(kernels, &block->key_value, normed, scratch, x + i * stride + width);
        }
        for (int64_t i = 0; i < asking; i++)
            attend(kernels, block, width, x + i * stride + width, stride, num_frames - i, room, scratch,
                   x + i * stride);
    }
    normalised(&context->norm, x, width, normed);
    for (int64_t h = 0; h < context->num_horizons; h++) {
        const Horizon *horizon = context->horizons + h;
        float *table = out + h * cells;
        linear(kernels, &horizon->head, normed, scratch, corrections);
        count_odds(context, horizon, token_id, topk_ids, has_past, table);
        for (int64_t layer = 0; layer < context->num_layers; layer++)
            layer_chances(context, horizon, layer,
                          corrections + layer * (experts + context->num_clusters), room,
                          table + layer * experts);
    }
    for (int64_t i = 0; i < cells; i++) {
        float chance = fminf(fmaxf(out[i], odds_floor), 1 - odds_floor);
        odds[i] = logf(chance / (1 - chance));
    }
    free(memory);
    return OK;
}

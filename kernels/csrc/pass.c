/* All layers of a pass of single tokens: nobody is asked in between but where a router's choice is tied or
   an expert is in no slot. Each part computes as its own entry point does. */
#include "decoder.h"

#include <stdlib.h>
#include <string.h>

/* Row t is the next of sequence t. cosine_table, sine_table [positions, dim]; pasts [layers, rows]; slots [routed layers, experts], negative where an expert is in none; what is
   chosen, [routed layers, rows, top_k], and scores [rows, experts] of the layer at hand. `layer`, and in
   it `is_chosen`, is where the pass stands: at first -1 and 0. */
typedef struct {
    const Experts *experts;
    const int64_t *slots;
    const Past *pasts;
    const uint8_t *cosine_table, *sine_table;
    const int64_t *token_ids, *positions; /* [rows] */
    uint8_t *x, *normed, *logits, *cosines, *sines; /* [rows, ...] */
    int64_t *ids;
    float *weights, *scores;
    int32_t *is_tied;
    int64_t num_rows, layer, num_routed; /* routed layers that are done */
    int32_t is_chosen, num_threads;
} Tokens;

typedef struct {
    const Decoder *decoder;
    Tokens *tokens;
    int status;
} PassCall;

static void gather(const uint8_t *table, const int64_t *indices, int64_t count, int64_t size,
                   uint8_t *out) {
    for (int64_t i = 0; i < count; i++)
        memcpy(out + i * size, table + indices[i] * size, (size_t)size);
}

static int multiply(const Matrix *matrix, const Tokens *tokens, int32_t format, uint8_t *out) {
    Product product = {matrix, out};
    return multiply_rows(&product, 1, tokens->normed, tokens->num_rows, matrix->k * width_of(format),
                         format, STREAMED, tokens->num_threads);
}

static int choose(const Layer *layer, Tokens *tokens, int32_t format) {
    const Router *router = layer->router;
    int64_t chosen = tokens->num_routed * tokens->num_rows * router->top_k;
    uint8_t *logits = malloc((size_t)(tokens->num_rows * router->gate.n * width_of(format)));
    if (!logits) return NO_MEMORY;
    int status = multiply(&router->gate, tokens, format, logits);
    if (!status)
        status = outrider_choose(router, logits, tokens->num_rows, tokens->ids + chosen,
                                 tokens->weights + chosen, tokens->scores, tokens->is_tied);
    free(logits);
    for (int64_t row = 0; row < tokens->num_rows && !status; row++)
        if (tokens->is_tied[row]) status = TIED;
    return status;
}

static int is_resident(const Layer *layer, const Tokens *tokens) {
    int64_t count = tokens->num_rows * layer->router->top_k;
    const int64_t *ids = tokens->ids + tokens->num_routed * count;
    for (int64_t i = 0; i < count; i++)
        if (tokens->slots[tokens->num_routed * layer->router->gate.n + ids[i]] < 0) return 0;
    return 1;
}

/* The routed experts' rows, and their sums: outputs [rows, top_k, hidden] -> routed [rows, hidden]. */
static int run_routed(const Layer *layer, Tokens *tokens, int32_t format, int64_t *indices,
                      uint8_t *outputs, uint8_t *routed) {
    int64_t top_k = layer->router->top_k, count = tokens->num_rows * top_k;
    int64_t hidden = tokens->experts->down.n;
    const int64_t *ids = tokens->ids + tokens->num_routed * count;
    const int64_t *slots = tokens->slots + tokens->num_routed * layer->router->gate.n;
    for (int64_t i = 0; i < count; i++) {
        indices[i] = i / top_k;
        indices[count + i] = slots[ids[i]];
    }
    Inputs in = {.x = tokens->normed, .out = outputs, .token_idx = indices, .slot_ids = indices + count,
                 .num_tokens = tokens->num_rows, .x_stride = hidden * width_of(format),
                 .num_assignments = count, .num_out_rows = count, .format = format,
                 .token_idx_wide = 1, .slot_ids_wide = 1, .way = STREAMED};
    int status = outrider_expert_outputs(tokens->experts, &in, tokens->num_threads);
    if (status) return status;
    return outrider_combine(outputs, tokens->weights + tokens->num_routed * count, ids,
                            tokens->num_rows, top_k, hidden, format, routed);
}

static int run_shared(const Layer *layer, const Tokens *tokens, int32_t format, uint8_t *gate,
                      uint8_t *shared) {
    int status = outrider_gated_mlp(layer->mlp, tokens->normed, tokens->num_rows, shared, STREAMED,
                                    tokens->num_threads);
    if (status || !layer->shared_gate) return status;
    status = multiply(layer->shared_gate, tokens, format, gate);
    if (status) return status;
    return outrider_gate_rows(gate, shared, tokens->num_rows, layer->mlp->down.n, format);
}

static int run_block(const Layer *layer, Tokens *tokens, int32_t format) {
    int64_t rows = tokens->num_rows, top_k = layer->router ? layer->router->top_k : 0;
    int64_t hidden = layer->attention->query.k, size = rows * hidden * width_of(format);
    size_t indices = (size_t)(2 * rows * top_k) * sizeof(int64_t);
    uint8_t *memory = malloc(indices + (size_t)(size * (top_k + 2)) + (size_t)rows * 4);
    if (!memory) return NO_MEMORY;
    uint8_t *outputs = memory + indices, *routed = outputs + size * top_k, *shared = routed + size;
    int status = OK;
    if (layer->mlp) status = run_shared(layer, tokens, format, shared + size, shared);
    if (layer->router) {
        if (!status) status = run_routed(layer, tokens, format, (int64_t *)memory, outputs, routed);
        tokens->num_routed++;
    }
    if (!status)
        status = outrider_add_residual(tokens->x, layer->router ? routed : shared,
                                       layer->router && layer->mlp ? shared : NULL, rows, hidden,
                                       format, tokens->num_threads);
    free(memory);
    return status;
}

static void run_layers(void *context) {
    PassCall *call = context;
    const Decoder *decoder = call->decoder;
    Tokens *tokens = call->tokens;
    int32_t format = decoder->format, num_threads = tokens->num_threads;
    int64_t rows = tokens->num_rows, hidden = decoder->head.k;
    int status = OK;
    if (tokens->layer < 0) {
        int64_t width = width_of(format), dim = decoder->layers->attention->head_dim;
        gather(decoder->embeddings, tokens->token_ids, rows, hidden * width, tokens->x);
        gather(tokens->cosine_table, tokens->positions, rows, dim * width, tokens->cosines);
        gather(tokens->sine_table, tokens->positions, rows, dim * width, tokens->sines);
        tokens->layer = 0;
    }
    for (; tokens->layer < decoder->num_layers && !status; tokens->layer++) {
        const Layer *layer = &decoder->layers[tokens->layer];
        if (!tokens->is_chosen) {
            status = outrider_attend(layer->attention, tokens->x, rows,
                                     tokens->pasts + tokens->layer * rows, rows, tokens->cosines,
                                     tokens->sines, STREAMED, num_threads);
            if (!status)
                status = outrider_rms_norm(tokens->x, layer->norm, layer->eps, rows, hidden, format,
                                           tokens->normed, num_threads);
            if (!status && layer->router) status = choose(layer, tokens, format);
            if (status) break;
        }
        if (layer->router && !is_resident(layer, tokens)) status = MISSING;
        if (status) break;
        tokens->is_chosen = 0;
        status = run_block(layer, tokens, format);
    }
    if (status == TIED || status == MISSING) tokens->is_chosen = 1;
    if (!status)
        status = outrider_rms_norm(tokens->x, decoder->norm, decoder->eps, rows, hidden, format,
                                   tokens->normed, num_threads);
    if (!status) status = multiply(&decoder->head, tokens, format, tokens->logits);
    call->status = status;
}

/* token_ids -> logits [rows, vocabulary], and each routed layer's choice. Keys and values are written
   behind the pasts' rows, for which there is room. TIED: whoever calls settles the ids of the layer at
   hand, and calls again. MISSING: whoever calls adds that layer's block to x, and calls again with the
   next layer, of which nothing is chosen. */
int outrider_decode(const Decoder *decoder, Tokens *tokens) {
    PassCall call = {.decoder = decoder, .tokens = tokens};
    with_team(run_layers, &call, tokens->num_threads);
    return call.status;
}

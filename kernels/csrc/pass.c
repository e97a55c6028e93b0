/* All layers of a pass of single tokens: nobody is asked in between but where a router's choice is tied, an
   expert is in no slot, or somebody wants to be. Each part computes as its own entry point does. */
#include "decoder.h"

#include <stdlib.h>
#include <string.h>

/* How far the layer at hand is: its experts are CHOSEN, whoever calls was TOLD of them, and BEGUN when the
   shared ones and some of the others are computed. */
enum { AT_ATTENTION, CHOSEN, TOLD, BEGUN };

/* Row t is the next of sequence t. cosine_table, sine_table [positions, dim]; pasts [layers, rows]; slots
   [routed layers, experts], negative where an expert is in none; what is chosen, [routed layers, rows,
   top_k]; scores [rows, experts], outputs [rows, top_k, hidden], is_done [rows, top_k] and the other rows
   [hidden] of the layer at hand. `layer` and `stage` are where the pass stands: at first -1 and 0. */
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
    uint8_t *outputs, *routed, *shared, *is_done, *gate; /* gate: four bytes a row */
    int64_t *assignments;                                /* room for three a row and expert */
    int64_t num_rows, layer, num_routed;                 /* routed layers that are done */
    int32_t stage, tells_all, num_threads;               /* tells_all: of every layer's choice */
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

/* Those routed experts' rows that are in slots and not done; PENDING if some are in none. */
static int run_present(const Layer *layer, Tokens *tokens, int32_t format) {
    int64_t top_k = layer->router->top_k, count = tokens->num_rows * top_k, num_found = 0;
    int64_t hidden = tokens->experts->down.n, is_whole = 1;
    const int64_t *ids = tokens->ids + tokens->num_routed * count;
    const int64_t *slots = tokens->slots + tokens->num_routed * layer->router->gate.n;
    int64_t *token_idx = tokens->assignments, *slot_ids = token_idx + count, *rows = slot_ids + count;
    for (int64_t i = 0; i < count; i++) {
        if (tokens->is_done[i]) continue;
        if (slots[ids[i]] < 0) {
            is_whole = 0;
            continue;
        }
        token_idx[num_found] = i / top_k;
        slot_ids[num_found] = slots[ids[i]];
        rows[num_found++] = i;
    }
    Inputs in = {.x = tokens->normed, .out = tokens->outputs, .token_idx = token_idx,
                 .slot_ids = slot_ids, .out_rows = rows, .num_tokens = tokens->num_rows,
                 .x_stride = hidden * width_of(format), .num_assignments = num_found,
                 .num_out_rows = count, .format = format, .token_idx_wide = 1, .slot_ids_wide = 1,
                 .out_rows_wide = 1, .way = STREAMED};
    int status = outrider_expert_outputs(tokens->experts, &in, tokens->num_threads);
    if (status) return status;
    for (int64_t i = 0; i < num_found; i++) tokens->is_done[rows[i]] = 1;
    return is_whole ? OK : PENDING;
}

static int run_shared(const Layer *layer, Tokens *tokens, int32_t format) {
    int status = outrider_gated_mlp(layer->mlp, tokens->normed, tokens->num_rows, tokens->shared,
                                    STREAMED, tokens->num_threads);
    if (status || !layer->shared_gate) return status;
    status = multiply(layer->shared_gate, tokens, format, tokens->gate);
    if (status) return status;
    return outrider_gate_rows(tokens->gate, tokens->shared, tokens->num_rows, layer->mlp->down.n,
                              format);
}

/* Each part once, however often it is called for a layer. */
static int run_block(const Layer *layer, Tokens *tokens, int32_t format) {
    int64_t rows = tokens->num_rows, hidden = layer->attention->query.k;
    int status = OK;
    if (tokens->stage != BEGUN) {
        if (layer->mlp) status = run_shared(layer, tokens, format);
        if (status) return status;
        if (layer->router) memset(tokens->is_done, 0, (size_t)(rows * layer->router->top_k));
        tokens->stage = BEGUN;
    }
    const uint8_t *first = tokens->shared, *second = NULL;
    if (layer->router) {
        int64_t top_k = layer->router->top_k, chosen = tokens->num_routed * rows * top_k;
        status = run_present(layer, tokens, format);
        if (!status)
            status = outrider_combine(tokens->outputs, tokens->weights + chosen, tokens->ids + chosen,
                                      rows, top_k, hidden, format, tokens->routed);
        first = tokens->routed;
        second = layer->mlp ? tokens->shared : NULL;
    }
    if (!status)
        status = outrider_add_residual(tokens->x, first, second, rows, hidden, format,
                                       tokens->num_threads);
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
    while (tokens->layer < decoder->num_layers && !status) {
        const Layer *layer = &decoder->layers[tokens->layer];
        if (tokens->stage == AT_ATTENTION) {
            status = outrider_attend(layer->attention, tokens->x, rows,
                                     tokens->pasts + tokens->layer * rows, rows, tokens->cosines,
                                     tokens->sines, STREAMED, num_threads);
            if (!status)
                status = outrider_rms_norm(tokens->x, layer->norm, layer->eps, rows, hidden, format,
                                           tokens->normed, num_threads);
            if (!status && layer->router) status = choose(layer, tokens, format);
            tokens->stage = CHOSEN;
            if (status) break;
        }
        if (layer->router && tokens->stage == CHOSEN &&
            (tokens->tells_all || !is_resident(layer, tokens))) {
            tokens->stage = TOLD;
            status = MISSING;
            break;
        }
        status = run_block(layer, tokens, format);
        if (status) break;
        tokens->stage = AT_ATTENTION;
        tokens->layer++;
        tokens->num_routed += layer->router != NULL;
    }
    if (!status)
        status = outrider_rms_norm(tokens->x, decoder->norm, decoder->eps, rows, hidden, format,
                                   tokens->normed, num_threads);
    if (!status) status = multiply(&decoder->head, tokens, format, tokens->logits);
    call->status = status;
}

/* token_ids -> logits [rows, vocabulary], and each routed layer's choice. Keys and values are written
   behind the pasts' rows, for which there is room. What is neither OK nor an error is called again:
   TIED, once the ids of the layer at hand are settled; MISSING, before an expert of it is computed, once
   the reads of those in no slot have begun; PENDING, when more of them are in slots. */
int outrider_decode(const Decoder *decoder, Tokens *tokens) {
    PassCall call = {.decoder = decoder, .tokens = tokens};
    with_team(run_layers, &call, tokens->num_threads);
    return call.status;
}

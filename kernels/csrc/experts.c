/* Entry points that compute: a layer's chosen experts by slot, and one dense matrix.

   Rows of weights are the unit of work: whoever computes a row, and beside whom, its sum is the same.
   Experts with few tokens stream their rows once for all of them in two phases (gate and up, down) that
   the layer's experts share; experts with many tokens go one after the other through register tiles,
   which take bf16 inputs as they are where the processor multiplies bf16. */
#include "outrider.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"

enum { CHUNK = 128, LAST = 32, TILE_CHUNK = 24, TOKENS_AT_ONCE = 256, SERIAL_TOKENS = 4 };

typedef struct {
    int64_t slot, begin, count;
} Group;

typedef struct {
    const Kernels *kernels;
    const Experts *experts;
    const Inputs *in;
    Group *groups;
    int64_t *order; /* assignments by slot */
    int64_t num_groups, num_small;
    int in_pairs; /* many tokens of one expert are computed in bf16 */
    int64_t values, sums, inner_values, inner_sums; /* floats a token takes */
    int64_t pairs, inner_pairs;                     /* bf16 numbers a token takes */
    float *x_values, *x_sums;                       /* [T, values], [T, sums] */
    uint16_t *x_pairs;                              /* [T, pairs] */
    float *h, *h_values, *h_sums;                   /* by row of `order`, or of the current tile */
    uint16_t *h_pairs;
    float *scratch; /* a part a thread, of which the end is `buffer_of` */
    int64_t scratch_size;
    atomic_int *finished;       /* parts of a 128-chunk of h that are there */
    const Group *group;         /* of the phases of a large one: which, and its tokens from `skip` on */
    int64_t skip;
    const Prepared *tokens;
    int32_t num_threads;
    atomic_llong next; /* job counter of the phase */
} Plan;

static int64_t read_index(const void *indices, int32_t wide, int64_t i) {
    return wide ? ((const int64_t *)indices)[i] : ((const int32_t *)indices)[i];
}

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static Run run_of(const Matrix *matrix, int64_t slot, int64_t row, int64_t rows) {
    Run run = {.weight = matrix->weight + slot * matrix->weight_stride +
                         row * row_bytes(matrix->format, matrix->k),
               .rows = rows, .k = matrix->k};
    if (matrix->scale)
        run.scale = matrix->scale + slot * matrix->scale_stride +
                    row * scale_bytes(matrix->format, matrix->k);
    return run;
}

static void multiply(const Plan *plan, int32_t format, const Run *run, const Prepared *tokens,
                     int64_t count, int tiled, float *scratch, float *out, int64_t stride) {
    const Kernels *kernels = plan->kernels;
    if (!tiled)
        streamed(kernels, format, run, tokens, count, scratch, out, stride);
    else if (plan->in_pairs)
        kernels->pairs[format](run, tokens, count, scratch, out, stride);
    else
        kernels->tiles(format, run, tokens, count, scratch, out, stride);
}

/* out[m * stride + i] += bias[row + i] */
static void add_bias(const Kernels *kernels, const Matrix *matrix, int64_t slot, int64_t row,
                     int64_t rows, int64_t tokens, float *out, int64_t stride) {
    float bias[2 * CHUNK];
    if (!matrix->bias) return;
    kernels->widen(matrix->bias_format,
                   matrix->bias + slot * matrix->bias_stride + row * (matrix->bias_format ? 2 : 4),
                   rows, bias);
    for (int64_t m = 0; m < tokens; m++)
        for (int64_t i = 0; i < rows; i++) out[m * stride + i] += bias[i];
}

/* Gate and up rows [from, from + rows) for `count` tokens, activated: h[m * h_stride + i]. `buffer`
   takes 2 * count * rows floats. */
static void gate_and_up(const Plan *plan, int64_t slot, int64_t from, int64_t rows,
                        const Prepared *tokens, int64_t count, int tiled, float *scratch,
                        float *buffer, float *h, int64_t h_stride) {
    const Kernels *kernels = plan->kernels;
    const Matrix *matrix = &plan->experts->gate_up;
    int joined = plan->experts->is_concatenated;
    for (int part = 0; part < (joined ? 2 : 1); part++) {
        int64_t row = joined ? from + part * (matrix->n / 2) : 2 * from;
        int64_t length = joined ? rows : 2 * rows;
        Run run = run_of(matrix, slot, row, length);
        float *out = buffer + part * rows;
        multiply(plan, matrix->format, &run, tokens, count, tiled, scratch, out, 2 * rows);
        add_bias(kernels, matrix, slot, row, length, count, out, 2 * rows);
    }
    for (int64_t m = 0; m < count; m++) {
        float *gate = buffer + m * 2 * rows, split[2 * CHUNK];
        if (!joined) {
            for (int64_t i = 0; i < rows; i++) {
                split[i] = gate[2 * i];
                split[rows + i] = gate[2 * i + 1];
            }
            gate = split;
        }
        kernels->activate(plan->experts->activation, gate, gate + rows, rows, h + m * h_stride);
    }
}

/* Down rows [from, from + rows) for `count` tokens, rounded to the outputs. */
static void down(const Plan *plan, const Group *group, int64_t skip, int64_t from, int64_t rows,
                 const Prepared *tokens, int64_t count, int tiled, float *scratch, float *buffer) {
    const Kernels *kernels = plan->kernels;
    const Matrix *matrix = &plan->experts->down;
    const Inputs *in = plan->in;
    Run run = run_of(matrix, group->slot, from, rows);
    multiply(plan, matrix->format, &run, tokens, count, tiled, scratch, buffer, rows);
    add_bias(kernels, matrix, group->slot, from, rows, count, buffer, rows);
    for (int64_t m = 0; m < count; m++) {
        int64_t assignment = plan->order[group->begin + skip + m];
        int64_t row = in->out_rows ? read_index(in->out_rows, in->out_rows_wide, assignment)
                                   : assignment;
        kernels->narrow(in->format, buffer + m * rows, rows,
                        in->out + (row * matrix->n + from) * (in->format ? 2 : 4));
    }
}

static float *scratch_of(const Plan *plan, int32_t thread) {
    return plan->scratch + thread * plan->scratch_size;
}

static float *buffer_of(const Plan *plan, int32_t thread) {
    return scratch_of(plan, thread + 1) - 2 * TOKENS_AT_ONCE * TILE_CHUNK;
}

static void prepare_body(void *context, int32_t thread) {
    Plan *plan = context;
    const Inputs *in = plan->in;
    const Kernels *kernels = plan->kernels;
    int32_t format = plan->experts->gate_up.format;
    int64_t k = plan->experts->gate_up.k;
    int all_in_pairs = plan->in_pairs && plan->num_small == 0;
    float *scratch = scratch_of(plan, thread);
    for (;;) {
        int64_t t = atomic_fetch_add(&plan->next, 1);
        if (t >= in->num_tokens) return;
        kernels->widen(in->format, in->x + t * in->x_stride, k, scratch);
        if (!all_in_pairs)
            kernels->prepare(format, scratch, k, 0, k, plan->x_values + t * plan->values,
                             plan->x_sums + t * plan->sums);
        if (plan->in_pairs)
            kernels->prepare_pairs(format, scratch, k, plan->x_pairs + t * plan->pairs);
    }
}

static Prepared token_of(const Plan *plan, int64_t position) {
    const Inputs *in = plan->in;
    int64_t t = read_index(in->token_idx, in->token_idx_wide, plan->order[position]);
    return (Prepared){plan->x_values + t * plan->values, plan->x_sums + t * plan->sums,
                      plan->x_pairs + t * plan->pairs};
}

static Prepared inner_of(const Plan *plan, int64_t row) {
    return (Prepared){plan->h_values + row * plan->inner_values,
                      plan->h_sums + row * plan->inner_sums,
                      plan->h_pairs + row * plan->inner_pairs};
}

static void prepare_inner(const Plan *plan, int64_t row, int64_t from, int64_t to) {
    int64_t k = plan->experts->down.k;
    plan->kernels->prepare(plan->experts->down.format,
                           plan->h + row * k, k, from, to, plan->h_values + row * plan->inner_values,
                           plan->h_sums + row * plan->inner_sums);
}

/* Jobs are chunks of CHUNK rows, the last ones in parts of LAST rows, so that threads end together. */
typedef struct {
    int64_t chunk, from, rows, parts;
} Job;

static int next_job(Plan *plan, int64_t num_chunks, Job *job) {
    int64_t whole = num_chunks - 4 * plan->num_threads, at = atomic_fetch_add(&plan->next, 1);
    if (whole < 0) whole = 0;
    if (at < whole) {
        *job = (Job){at, 0, CHUNK, 1};
        return 1;
    }
    at -= whole;
    *job = (Job){whole + at / (CHUNK / LAST), at % (CHUNK / LAST) * LAST, LAST, CHUNK / LAST};
    return job->chunk < num_chunks;
}

/* All experts with few tokens: their gate and up rows. */
static void small_gate_up_body(void *context, int32_t thread) {
    Plan *plan = context;
    float *scratch = scratch_of(plan, thread), *buffer = buffer_of(plan, thread);
    int64_t inner = plan->experts->down.k, chunks = ceil_div(inner, CHUNK);
    for (Job job; next_job(plan, plan->num_small * chunks, &job);) {
        const Group *group = &plan->groups[job.chunk / chunks];
        int64_t start = job.chunk % chunks * CHUNK, from = start + job.from;
        int64_t rows = min64(job.rows, inner - from);
        for (int64_t skip = 0; skip < group->count && rows > 0; skip += MAX_ROW_TOKENS) {
            int64_t few = min64(group->count - skip, MAX_ROW_TOKENS), at = group->begin + skip;
            Prepared tokens[MAX_ROW_TOKENS];
            for (int64_t m = 0; m < few; m++) tokens[m] = token_of(plan, at + m);
            gate_and_up(plan, group->slot, from, rows, tokens, few, 0, scratch, buffer,
                        plan->h + at * inner + from, inner);
        }
        /* Whoever finishes a chunk last lays it out for the down rows. */
        if (atomic_fetch_add(&plan->finished[job.chunk], 1) == job.parts - 1)
            for (int64_t m = 0; m < group->count; m++)
                prepare_inner(plan, group->begin + m, start, min64(start + CHUNK, inner));
    }
}

/* All experts with few tokens: their down rows. */
static void small_down_body(void *context, int32_t thread) {
    Plan *plan = context;
    int64_t hidden = plan->experts->down.n, chunks = ceil_div(hidden, CHUNK);
    for (Job job; next_job(plan, plan->num_small * chunks, &job);) {
        const Group *group = &plan->groups[job.chunk / chunks];
        int64_t from = job.chunk % chunks * CHUNK + job.from, rows = min64(job.rows, hidden - from);
        for (int64_t skip = 0; skip < group->count && rows > 0; skip += MAX_ROW_TOKENS) {
            int64_t few = min64(group->count - skip, MAX_ROW_TOKENS);
            Prepared tokens[MAX_ROW_TOKENS];
            for (int64_t m = 0; m < few; m++) tokens[m] = inner_of(plan, group->begin + skip + m);
            down(plan, group, skip, from, rows, tokens, few, 0, scratch_of(plan, thread),
                 buffer_of(plan, thread));
        }
    }
}

static int64_t large_count(const Plan *plan) {
    return min64(plan->group->count - plan->skip, TOKENS_AT_ONCE);
}

static void large_gate_up_body(void *context, int32_t thread) {
    Plan *plan = context;
    int64_t inner = plan->experts->down.k;
    for (;;) {
        int64_t from = atomic_fetch_add(&plan->next, 1) * TILE_CHUNK;
        if (from >= inner) break;
        gate_and_up(plan, plan->group->slot, from, min64(TILE_CHUNK, inner - from), plan->tokens,
                    large_count(plan), 1, scratch_of(plan, thread), buffer_of(plan, thread),
                    plan->h + from, inner);
    }
}

static void large_inner_body(void *context, int32_t thread) {
    Plan *plan = context;
    int64_t inner = plan->experts->down.k;
    (void)thread;
    for (;;) {
        int64_t row = atomic_fetch_add(&plan->next, 1);
        if (row >= large_count(plan)) break;
        if (plan->in_pairs)
            plan->kernels->prepare_pairs(plan->experts->down.format, plan->h + row * inner, inner,
                                         plan->h_pairs + row * plan->inner_pairs);
        else
            prepare_inner(plan, row, 0, inner);
    }
}

static void large_down_body(void *context, int32_t thread) {
    Plan *plan = context;
    int64_t hidden = plan->experts->down.n;
    for (;;) {
        int64_t from = atomic_fetch_add(&plan->next, 1) * TILE_CHUNK;
        if (from >= hidden) break;
        down(plan, plan->group, plan->skip, from, min64(TILE_CHUNK, hidden - from), plan->tokens,
             large_count(plan), 1, scratch_of(plan, thread), buffer_of(plan, thread));
    }
}

static void phase(Plan *plan, Body body, int is_product, int32_t num_threads) {
    atomic_store(&plan->next, 0);
    (is_product ? run_products : run_parallel)(body, plan, num_threads);
}

/* One expert, up to TOKENS_AT_ONCE of its tokens from plan->skip on. */
static void large_group(Plan *plan) {
    Prepared tokens[TOKENS_AT_ONCE];
    int64_t count = large_count(plan);
    plan->tokens = tokens;
    for (int64_t m = 0; m < count; m++)
        tokens[m] = token_of(plan, plan->group->begin + plan->skip + m);
    phase(plan, large_gate_up_body, 1, plan->num_threads);
    phase(plan, large_inner_body, 0, plan->num_threads);
    for (int64_t m = 0; m < count; m++) tokens[m] = inner_of(plan, m);
    phase(plan, large_down_body, 1, plan->num_threads);
}

static void run_plan(void *context) {
    Plan *plan = context;
    phase(plan, prepare_body, 0, plan->in->num_tokens < SERIAL_TOKENS ? 1 : plan->num_threads);
    if (plan->num_small) {
        phase(plan, small_gate_up_body, 1, plan->num_threads);
        phase(plan, small_down_body, 1, plan->num_threads);
    }
    for (int64_t g = plan->num_small; g < plan->num_groups; g++) {
        plan->group = &plan->groups[g];
        for (plan->skip = 0; plan->skip < plan->group->count; plan->skip += TOKENS_AT_ONCE)
            large_group(plan);
    }
}

/* Sort the assignments by slot (stable) and list the groups, those with few tokens first. */
static int group_assignments(Plan *plan) {
    const Inputs *in = plan->in;
    int64_t num_slots = plan->experts->num_slots, n = in->num_assignments, at = 0;
    int64_t *counts = calloc((size_t)num_slots + 1, sizeof *counts);
    if (!counts) return NO_MEMORY;
    for (int64_t i = 0; i < n; i++) counts[read_index(in->slot_ids, in->slot_ids_wide, i)]++;
    for (int large = 0; large < 2; large++) {
        for (int64_t slot = 0; slot < num_slots; slot++)
            if (counts[slot] && is_tiled(in->way, counts[slot]) == large) {
                plan->groups[plan->num_groups++] = (Group){slot, at, counts[slot]};
                at += counts[slot];
            }
        if (!large) plan->num_small = plan->num_groups;
    }
    for (int64_t g = 0; g < plan->num_groups; g++)
        counts[plan->groups[g].slot] = plan->groups[g].begin;
    for (int64_t i = 0; i < n; i++)
        plan->order[counts[read_index(in->slot_ids, in->slot_ids_wide, i)]++] = i;
    free(counts);
    return OK;
}

static int check(const Experts *experts, const Inputs *in) {
    for (int64_t i = 0; i < in->num_assignments; i++) {
        int64_t token = read_index(in->token_idx, in->token_idx_wide, i);
        int64_t slot = read_index(in->slot_ids, in->slot_ids_wide, i);
        int64_t row = in->out_rows ? read_index(in->out_rows, in->out_rows_wide, i) : i;
        if (token < 0 || token >= in->num_tokens) return BAD_TOKEN;
        if (slot < 0 || slot >= experts->num_slots) return BAD_SLOT;
        if (row < 0 || row >= in->num_out_rows) return BAD_ROW;
    }
    return OK;
}

static void *take(uint8_t **memory, int64_t bytes) {
    uint8_t *start = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return start;
}

int outrider_expert_outputs(const Experts *experts, const Inputs *in, int32_t num_threads) {
    const Kernels *kernels = active_kernels();
    int64_t n = in->num_assignments, hidden = experts->down.n, inner = experts->down.k;
    int status = check(experts, in);
    if (status != OK || n == 0) return status;
    Plan plan = {.kernels = kernels, .experts = experts, .in = in, .num_threads = num_threads};
    plan.values = kernels->values_size(experts->gate_up.format, hidden);
    plan.sums = (kernels->sums_size(experts->gate_up.format, hidden) + 15) / 16 * 16;
    plan.inner_values = kernels->values_size(experts->down.format, inner);
    plan.inner_sums = (kernels->sums_size(experts->down.format, inner) + 15) / 16 * 16;
    plan.in_pairs = in->way != STREAMED && in->format == BF16 &&
                    kernels->pairs[experts->gate_up.format] && kernels->pairs[experts->down.format];
    if (plan.in_pairs) {
        plan.pairs = kernels->pairs_size(hidden);
        plan.inner_pairs = kernels->pairs_size(inner);
    }
    plan.groups = malloc(sizeof(Group) * (size_t)min64(n, experts->num_slots));
    plan.order = malloc(sizeof(int64_t) * (size_t)n);
    status = plan.groups && plan.order ? group_assignments(&plan) : NO_MEMORY;
    if (status == OK) {
        int64_t small_rows = plan.num_small < plan.num_groups ? plan.groups[plan.num_small].begin : n;
        int is_mixed = plan.num_small < plan.num_groups;
        int64_t rows = is_mixed && small_rows < TOKENS_AT_ONCE ? TOKENS_AT_ONCE : small_rows;
        int64_t chunks = plan.num_small * ceil_div(inner, CHUNK) + 1;
        int64_t longest = hidden > inner ? hidden : inner;
        plan.scratch_size = (kernels->tiles_scratch > longest ? kernels->tiles_scratch : longest) +
                            16 * (longest / GROUP + 32) + 2 * TOKENS_AT_ONCE * TILE_CHUNK;
        plan.scratch_size = (plan.scratch_size + 15) / 16 * 16;
        int64_t sizes[] = {
            4 * in->num_tokens * plan.values, 4 * in->num_tokens * plan.sums,
            4 * rows * inner,                 4 * rows * plan.inner_values,
            4 * rows * plan.inner_sums,       4 * num_threads * plan.scratch_size,
            2 * in->num_tokens * plan.pairs,  2 * rows * plan.inner_pairs,
            (int64_t)sizeof(atomic_int) * chunks};
        int64_t total = 64;
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) total += sizes[i] + 64;
        uint8_t *memory = malloc((size_t)total), *at = memory;
        if (!memory) {
            status = NO_MEMORY;
        } else {
            at += (64 - (uintptr_t)at % 64) % 64;
            plan.x_values = take(&at, sizes[0]);
            plan.x_sums = take(&at, sizes[1]);
            plan.h = take(&at, sizes[2]);
            plan.h_values = take(&at, sizes[3]);
            plan.h_sums = take(&at, sizes[4]);
            plan.scratch = take(&at, sizes[5]);
            plan.x_pairs = take(&at, sizes[6]);
            plan.h_pairs = take(&at, sizes[7]);
            plan.finished = take(&at, sizes[8]);
            memset(plan.finished, 0, (size_t)sizes[8]);
            with_team(run_plan, &plan, num_threads);
            free(memory);
        }
    }
    free(plan.groups);
    free(plan.order);
    return status;
}

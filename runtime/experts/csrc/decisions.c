/* Sums over all experts of a model that are wanted many times a token: which are to be read ahead, and
   what keeping each is worth. The same as in `plan.py` and `foresight.py`, which say what it means. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ABSENT = -1 };

typedef struct {
    double lead, chance;
    int64_t cell;
    int32_t tenths;
} Candidate;

static int compare_candidates(const void *left, const void *right) {
    const Candidate *a = left, *b = right;
    if (a->tenths != b->tenths) return a->tenths > b->tenths ? -1 : 1;
    if (a->lead != b->lead) return a->lead < b->lead ? -1 : 1;
    if (a->chance != b->chance) return a->chance < b->chance ? -1 : 1;
    return a->cell < b->cell ? -1 : a->cell > b->cell;
}

/* table, slots [layers, experts], slots ABSENT where a read is due, of one step, of which layers
   [first, end) count; layer l comes after
   l + 1 + ahead moments. Writes cell, lead and chance of each candidate, in order; how many, or -1. */
int64_t outrider_due(const float *table, const int64_t *slots, int64_t first, int64_t end,
                     int64_t num_experts, int64_t ahead, double reads_a_moment, double queued,
                     double price, int64_t *cells, double *leads, double *chances) {
    int64_t count = 0, most = (end - first) * num_experts;
    if (most <= 0) return 0;
    Candidate *found = malloc((size_t)most * sizeof *found);
    if (!found) return -1;
    for (int64_t layer = first; layer < end; layer++) {
        double lead = (double)(layer + 1 + ahead) * reads_a_moment - queued;
        double share = lead < 1.0 ? lead : 1.0;
        if (share < 0.5) continue;
        for (int64_t cell = layer * num_experts; cell < (layer + 1) * num_experts; cell++) {
            double chance = table[cell];
            if (slots[cell] != ABSENT || !(chance * share > (1.0 - chance) * price)) continue;
            found[count++] = (Candidate){lead, chance, cell, (int32_t)rintf(table[cell] * 10.0f)};
        }
    }
    qsort(found, (size_t)count, sizeof *found, compare_candidates);
    for (int64_t i = 0; i < count; i++) {
        cells[i] = found[i].cell;
        leads[i] = found[i].lead;
        chances[i] = found[i].chance;
    }
    free(found);
    return count;
}

/* Forecasts of a step [layers, experts], and of which layers there are some. */
typedef struct {
    const float *table;
    const uint8_t *is_known;
} Forecasts;

/* Forecasts of this step, the next and the one after; the layers before `split` come round a step later.
   rates, beyond, out [layers, experts]; nearness [layers]. */
void outrider_worths(const Forecasts *steps, const double *rates, const double *beyond,
                     const double *nearness, int64_t num_layers, int64_t num_experts, int64_t split,
                     double discount, double *out) {
    for (int64_t layer = 0; layer < num_layers; layer++) {
        const Forecasts *use = steps + (layer < split), *later = use + 1;
        for (int64_t cell = layer * num_experts; cell < (layer + 1) * num_experts; cell++) {
            double first = use->table[cell], second = later->is_known[layer] ? later->table[cell] : rates[cell];
            double worth = second + (1.0 - second) * beyond[cell];
            worth *= discount;
            worth *= 1.0 - first;
            worth += first;
            out[cell] = worth * nearness[layer];
        }
    }
}

typedef struct {
    double worth;
    int64_t cell;
} Member;

static int compare_members(const void *left, const void *right) {
    const Member *a = left, *b = right;
    if (a->worth != b->worth) return a->worth < b->worth ? -1 : 1;
    return a->cell < b->cell ? -1 : a->cell > b->cell;
}

/* The `count` members of least worth among `size` cells, ascending, into `cells`; how many, or -1. */
int64_t outrider_least(const double *worths, const uint8_t *is_member, int64_t size, int64_t count,
                       int64_t *cells) {
    Member *found = malloc((size_t)(size > 0 ? size : 1) * sizeof *found);
    int64_t num_found = 0;
    if (!found) return -1;
    for (int64_t cell = 0; cell < size; cell++) {
        if (!is_member[cell]) continue;
        Member one = {worths[cell], cell};
        int64_t place = num_found;
        if (num_found == count) {
            if (!count || found[count - 1].worth <= one.worth) continue;
            place--;
        } else if (++num_found < count || count == size) {
            found[place] = one; /* in order once there are `count` */
            continue;
        } else {
            found[place] = one;
            qsort(found, (size_t)num_found, sizeof *found, compare_members);
            continue;
        }
        for (; place && found[place - 1].worth > one.worth; place--) found[place] = found[place - 1];
        found[place] = one;
    }
    if (num_found < count || count == size)
        qsort(found, (size_t)num_found, sizeof *found, compare_members);
    for (int64_t i = 0; i < num_found; i++) cells[i] = found[i].cell;
    free(found);
    return num_found;
}

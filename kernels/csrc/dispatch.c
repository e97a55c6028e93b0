/* Chooses the row kernels when first asked: the widest that the processor has. */
#include "dispatch.h"

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

static const Kernels *const candidates[] = {
#if defined(HAS_BF16_PAIRS)
    &kernels_avx512_bf16,
#endif
#if defined(__x86_64__)
    &kernels_avx512_vnni,
    &kernels_avx512,
    &kernels_avx2,
#elif defined(__aarch64__)
    &kernels_neon,
#endif
    &kernels_generic,
};
enum { NUM_CANDIDATES = sizeof candidates / sizeof *candidates };

static _Atomic(const Kernels *) active;

const Kernels *active_kernels(void) {
    const Kernels *kernels = atomic_load(&active);
    for (int i = 0; !kernels; i++)
        if (candidates[i]->available()) kernels = candidates[i];
    atomic_store(&active, kernels);
    return kernels;
}

void streamed(const Kernels *kernels, int32_t format, const Run *run, const Prepared *tokens,
              int64_t count, float *scratch, float *out, int64_t stride) {
    for (int64_t at = 0; at < count; at += MAX_ROW_TOKENS) {
        int64_t few = count - at < MAX_ROW_TOKENS ? count - at : MAX_ROW_TOKENS;
        kernels->rows[format][few - 1](run, tokens + at, scratch, out + at * stride, stride);
    }
}

const char *outrider_isa(void) { return active_kernels()->name; }

/* Use the kernels called `name`; 0 if this processor or build has none. */
int outrider_use_isa(const char *name) {
    for (int i = 0; i < NUM_CANDIDATES; i++)
        if (strcmp(candidates[i]->name, name) == 0 && candidates[i]->available()) {
            atomic_store(&active, candidates[i]);
            return 1;
        }
    return 0;
}

/* Whether bf16 inputs, more than a few, meet weights of `format` in the processor's bf16 unit. */
int outrider_has_bf16_products(int32_t format) { return active_kernels()->pairs[format] != NULL; }

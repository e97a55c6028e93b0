/* Forecasts by small networks: one token at a time, on the calling thread, weights in fp16 and all else
   in fp32. The mathematics, and what the arrays mean, is that of the predictors in Python, to rounding. */
#ifndef FORECAST_H
#define FORECAST_H

#include "dispatch.h"

/* weight: fp16 [n, k]; offset: fp32 [n] or NULL. */
typedef struct {
    const uint8_t *weight;
    const float *offset;
    int64_t n, k;
} Linear;

/* Floats that `linear` takes as scratch for k inputs. */
static inline int64_t linear_scratch(const Kernels *kernels, int64_t k) {
    return (kernels->values_size(FP16, k) + 16 * (k / GROUP + 32) + 15) / 16 * 16;
}

/* out [n] = weight . x [k] + offset */
void linear(const Kernels *kernels, const Linear *layer, const float *x, float *scratch, float *out);

/* Log-odds [n] -> probabilities that sum to top_k: one shift for all, by at most `max_steps` Newton steps
   of `max_step` at most, ended once the sum is within `max_excess`. */
void include(float *values, int64_t n, int64_t top_k, int max_steps, float max_step, float max_excess);

#endif

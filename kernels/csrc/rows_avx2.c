/* 256-bit row kernels for x86 with AVX2, FMA and F16C. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define W 8
#define ISA_AVX2
#define KERNELS kernels_avx2
#define KERNELS_NAME "avx2"
#define AVAILABLE (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#include "rows.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

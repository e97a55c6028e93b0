/* 512-bit row kernels for x86 with byte products (AVX-512 VNNI) and products of bf16 pairs. */
#include "outrider.h"
#if defined(HAS_BF16_PAIRS)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define W 16
#define ISA_AVX512
#define ISA_VNNI
#define ISA_BF16
#define KERNELS kernels_avx512_bf16
#define KERNELS_NAME "avx512_bf16"
#define AVAILABLE                                                                                 \
    (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                   \
     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&                  \
     __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
#include "rows.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

/* 512-bit row kernels for x86 with byte products as well (AVX-512 VNNI). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define W 16
#define ISA_AVX512
#define ISA_VNNI
#define KERNELS kernels_avx512_vnni
#define KERNELS_NAME "avx512_vnni"
#define AVAILABLE                                                                                 \
    (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                   \
     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&                  \
     __builtin_cpu_supports("avx512vnni"))
#include "rows.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

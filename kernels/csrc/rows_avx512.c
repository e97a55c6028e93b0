/* 512-bit row kernels for x86 with AVX-512 F, BW, VL, DQ. Tested on a Zen 4, where avx512_vnni is chosen. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define W 16
#define ISA_AVX512
#define KERNELS kernels_avx512
#define KERNELS_NAME "avx512"
#define AVAILABLE                                                                                 \
    (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                   \
     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
#include "rows.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

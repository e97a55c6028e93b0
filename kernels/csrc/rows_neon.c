/* 128-bit row kernels for 64-bit ARM. No test of this repository has run them. */
#if defined(__aarch64__)
#define W 4
#define ISA_NEON
#define KERNELS kernels_neon
#define KERNELS_NAME "neon"
#define AVAILABLE 1
#include "rows.h"
#endif

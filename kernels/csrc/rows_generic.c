/* The same kernels with no instruction set assumed: what the compiler makes of plain vectors. The width
   can be set from outside, so that tests run the paths of wider machines on this one. */
#ifndef W
#define W 4
#endif
#define KERNELS kernels_generic
#define KERNELS_NAME "generic"
#define AVAILABLE 1
#include "rows.h"

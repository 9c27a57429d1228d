// The kernels for processors without AVX2, with the compiler's default instructions.
#include "cpu/kernels.h"

#define DWA_FAST_LEVEL baseline
#define DWA_FAST_VECTOR "cpu/vector_baseline.h"
#include "cpu/level_kernels.h"

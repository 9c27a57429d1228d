// The kernels for every other machine: whatever the compiler may assume of all of them.
#include "cpu/kernels.h"

#define DWA_FAST_LEVEL baseline
#define DWA_FAST_VECTOR "cpu/vector_baseline.h"
#include "cpu/level_kernels.h"

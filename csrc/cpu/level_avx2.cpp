// The kernels for AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

#define DWA_FAST_LEVEL avx2
#define DWA_FAST_VECTOR "cpu/vector_avx2.h"
// To the end of the file, where templates are instantiated; the headers above must stay outside.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "cpu/level_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

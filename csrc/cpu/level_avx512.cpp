// The kernels for AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

#define DWA_FAST_LEVEL avx512
#define DWA_FAST_VECTOR "cpu/vector_avx512.h"
// To the end of the file, where templates are instantiated; the headers above must stay outside.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of the headers of GCC, its bug 105593
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include "cpu/level_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// Eight floats; included by one level, inside its namespace.
using Vec = __m256;
constexpr int kWidth = 8;
constexpr int kUnroll = 2;  // vectors of channels at a time: five of each in registers

static inline Vec widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }

static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline Vec load(const Bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// Round to nearest even; NaN stays NaN.
static inline __m128i narrow(Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  const __m256i pairs = _mm256_packus_epi32(high, high);  // within each half: the lanes lie in its first and in its second quarter
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
}

static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline void store(Bf16* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v)); }

static inline Vec all(float x) { return _mm256_set1_ps(x); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
static inline Vec root(Vec a) { return _mm256_sqrt_ps(a); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// b where either is NaN
static inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
// a where z > 0, b where it is not or is NaN
static inline Vec pick(Vec z, Vec a, Vec b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_GT_OQ)); }
// a where x > y or x is NaN, else b
static inline Vec pick_above(Vec x, Vec y, Vec a, Vec b) {
  return _mm256_blendv_ps(b, a, _mm256_or_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ), _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
// The lanes whose byte is that number, 0 elsewhere.
static inline Vec keep_equal(const uint8_t* bytes, int number, Vec v) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(wide, _mm256_set1_epi32(number))));
}
static inline Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a·2ⁿ for an integer n of −200 to 200, in two steps: 2ⁿ alone may lie beyond the range
static inline Vec scaled(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), one = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, one), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), one), 23);
  return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

// Bit i is set unless lane i ≤ 0: a NaN counts as positive, so that gradients of NaN are not hidden.
static inline uint32_t positive(Vec v) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)));
}
// The lanes whose bits are set, 0 elsewhere.
static inline Vec keep(uint32_t bits, Vec v) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes), lanes);
  return _mm256_and_ps(v, _mm256_castsi256_ps(set));
}
#include "cpu/vector_partial.h"

// Sixteen floats; included by one level at a time, inside its namespace.
using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kUnroll = 4;  // vectors of channels at a time: five of each in registers

static inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
static inline Vec widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline Vec load(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
static inline Vec load(const Bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline Vec load(const Bf16* p, int count) { return widen(_mm256_maskz_loadu_epi16(first(count), p)); }

// Round to nearest even; NaN stays NaN.
static inline __m256i narrow(Vec v) {
#if defined(DWA_FAST_NATIVE_BF16)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
}

static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline void store(float* p, Vec v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
static inline void store(Bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
static inline void store(Bf16* p, Vec v, int count) { _mm256_mask_storeu_epi16(p, first(count), narrow(v)); }

static inline Vec all(float x) { return _mm512_set1_ps(x); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
static inline Vec root(Vec a) { return _mm512_sqrt_ps(a); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// b where either is NaN
static inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// a where z > 0, b where it is not or is NaN
static inline Vec pick(Vec z, Vec a, Vec b) { return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GT_OQ), a); }
// a where x > y or x is NaN, else b
static inline Vec pick_above(Vec x, Vec y, Vec a, Vec b) {
  const auto above = static_cast<__mmask16>(_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ) | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q));
  return _mm512_mask_mov_ps(b, above, a);
}
// The lanes whose byte is that number, 0 elsewhere.
static inline Vec keep_equal(const uint8_t* bytes, int number, Vec v) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(number)), v);
}
static inline Vec nearest(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a·2ⁿ for an integer n
static inline Vec scaled(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

// Bit i is set unless lane i ≤ 0: a NaN counts as positive, so that gradients of NaN are not hidden.
static inline uint32_t positive(Vec v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
// The lanes whose bits are set, 0 elsewhere.
static inline Vec keep(uint32_t bits, Vec v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v); }

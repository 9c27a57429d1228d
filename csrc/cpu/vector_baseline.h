// Four floats in the compiler's own vectors: any architecture; included by one level, inside its namespace.
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef Bf16 Halves __attribute__((vector_size(8)));
constexpr int kWidth = 4;
constexpr int kUnroll = 2;  // vectors of channels at a time

static inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
static inline Vec load(const Bf16* p) {
  Halves halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  return reinterpret_cast<Vec>(__builtin_convertvector(halves, Bits) << 16);
}

static inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
// Round to nearest even; NaN stays NaN.
static inline void store(Bf16* p, Vec v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits number = reinterpret_cast<Bits>(v == v);
  const Halves halves = __builtin_convertvector(((rounded & number) | (~number & 0x7fc00000u)) >> 16, Halves);
  __builtin_memcpy(p, &halves, sizeof(halves));
}

static inline Vec all(float x) { return Vec{x, x, x, x}; }
static inline Vec add(Vec a, Vec b) { return a + b; }
static inline Vec sub(Vec a, Vec b) { return a - b; }
static inline Vec mul(Vec a, Vec b) { return a * b; }
static inline Vec div(Vec a, Vec b) { return a / b; }
static inline Vec root(Vec a) { return Vec{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])}; }
// One rounding or two, but the same in forward and backward: otherwise their ReLU masks differ.
static inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF)
  return Vec{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]), __builtin_fmaf(a[2], b[2], c[2]),
             __builtin_fmaf(a[3], b[3], c[3])};
#else
  return a * b + c;
#endif
}
static inline Vec choose(Ints condition, Vec a, Vec b) {
  return reinterpret_cast<Vec>((condition & reinterpret_cast<Ints>(a)) | (~condition & reinterpret_cast<Ints>(b)));
}
// b where either is NaN
static inline Vec larger(Vec a, Vec b) { return choose(a > b, a, b); }
static inline Vec smaller(Vec a, Vec b) { return choose(a < b, a, b); }
// a where z > 0, b where it is not or is NaN
static inline Vec pick(Vec z, Vec a, Vec b) { return choose(z > all(0), a, b); }
// a where x > y or x is NaN, else b
static inline Vec pick_above(Vec x, Vec y, Vec a, Vec b) { return choose((x > y) | (x != x), a, b); }
// The lanes whose byte is that number, 0 elsewhere.
static inline Vec keep_equal(const uint8_t* bytes, int number, Vec v) {
  const Ints wide = {bytes[0], bytes[1], bytes[2], bytes[3]};
  return choose(wide == Ints{number, number, number, number}, v, all(0));
}
// For |a| < 2²²: adding 1.5·2²³ rounds the fraction away.
static inline Vec nearest(Vec a) { return (a + all(0x1.8p23f)) - all(0x1.8p23f); }
// a·2ⁿ for an integer n of −200 to 200, in two steps: 2ⁿ alone may lie beyond the range
static inline Vec scaled(Vec a, Vec n) {
  const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
  return a * reinterpret_cast<Vec>((half + 127) << 23) * reinterpret_cast<Vec>((whole - half + 127) << 23);
}

// Bit i is set unless lane i ≤ 0: a NaN counts as positive, so that gradients of NaN are not hidden.
static inline uint32_t positive(Vec v) {
  const Ints not_positive = v <= all(0);
  const Ints set = ~not_positive & Ints{1, 2, 4, 8};
  return static_cast<uint32_t>(set[0] | set[1] | set[2] | set[3]);
}
// The lanes whose bits are set, 0 elsewhere.
static inline Vec keep(uint32_t bits, Vec v) {
  const Ints lanes = {1, 2, 4, 8};
  const auto copy = static_cast<int32_t>(bits);
  const Ints set = (Ints{copy, copy, copy, copy} & lanes) == lanes;
  return choose(set, v, all(0));
}
#include "cpu/vector_partial.h"

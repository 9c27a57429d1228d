// What may follow the BatchNorm of bn_act, and its derivative, on the vectors of one level; included inside its namespace.
// Infinities and NaN come out as PyTorch's formulas in float64 have them.

// eˣ to about one unit in the last place; 0 and infinity beyond its range.
static inline Vec exponential(Vec x) {
  x = smaller(all(89), larger(all(-105), x));
  const Vec n = nearest(mul(x, all(1.44269504f)));
  const Vec r = fma(n, all(-1.42860677e-6f), fma(n, all(-0.693145752f), x));  // x − n ln 2, whose first part is exact
  // Least greatest relative error over |r| ≤ ln(2)/2: 3e-9.
  Vec p = fma(all(1.38144673e-3f), r, all(8.36878084e-3f));
  p = fma(p, r, all(4.16683942e-2f));
  p = fma(p, r, all(1.66665201e-1f));
  p = fma(p, r, all(4.99999934e-1f));
  return scaled(add(all(1), fma(mul(r, r), p, r)), n);
}

// The normal distribution: its density without the factor 1/√(2π), and the probability Φ of values up to x.
struct Normal {
  Vec density, below;

  explicit Normal(Vec x) {
    const Vec size = larger(x, sub(all(0), x));
    density = exponential(mul(all(-0.5f), mul(x, x)));
    // Φ(−|x|) = e^(−x²/2) q(k)/(|x| + 4), k = (|x| − 4)/(|x| + 4): least greatest relative error over |x| ≤ 14.5: 9e-9.
    const Vec inverse = div(all(1), add(size, all(4)));
    const Vec k = fma(all(-8), inverse, all(1));
    constexpr float kQ[] = {-1.31971558e-4f, 1.79353995e-4f, 1.56992253e-3f, -3.51255415e-3f, -7.52527088e-3f,
                            6.04038312e-2f,  -0.186523442f,  0.387136901f,   -0.607896588f,   0.755285135f};
    Vec q = all(kQ[0]);
    for (int i = 1; i < 10; ++i) q = fma(q, k, all(kQ[i]));
    const Vec tail = mul(density, mul(inverse, q));
    below = pick(x, sub(all(1), tail), tail);
  }
};

// GELU with tanh is x/(1 + e^(−2u)), u = √(2/π)(x + 0.044715 x³).
constexpr float kTwiceRoot = 1.59576912f;  // 2√(2/π)
constexpr float kCubic = 0.044715f;
static inline Vec exponential_of_u(Vec x) { return exponential(mul(mul(all(-kTwiceRoot), x), fma(all(kCubic), mul(x, x), all(1)))); }

constexpr float kJustBelow3 = 0x1.7ffffep+1f;  // the next float: x ≥ 3 means x > it

// slope is read by kLeakyRelu alone.
template <Activation A>
static inline Vec activated(Vec x, [[maybe_unused]] Vec slope) {
  if constexpr (A == Activation::kRelu) return larger(all(0), x);
  if constexpr (A == Activation::kRelu6) return smaller(all(6), larger(all(0), x));
  if constexpr (A == Activation::kSilu) return div(x, add(all(1), exponential(sub(all(0), x))));
  if constexpr (A == Activation::kHardswish) return div(mul(x, smaller(all(6), larger(all(0), add(x, all(3))))), all(6));
  if constexpr (A == Activation::kGelu) return mul(x, Normal(x).below);
  if constexpr (A == Activation::kGeluTanh) return div(x, add(all(1), exponential_of_u(x)));
  if constexpr (A == Activation::kLeakyRelu) return fma(slope, smaller(all(0), x), larger(all(0), x));
  return x;
}

// grad times the derivative at x; at a corner the one that PyTorch takes.
template <Activation A>
static inline Vec derived(Vec x, Vec grad, [[maybe_unused]] Vec slope) {
  if constexpr (A == Activation::kRelu) return keep(positive(x), grad);
  if constexpr (A == Activation::kRelu6) return keep(positive(x) & positive(sub(all(6), x)), grad);
  if constexpr (A == Activation::kSilu) {
    const Vec s = div(all(1), add(all(1), exponential(sub(all(0), x))));
    return mul(mul(grad, s), fma(x, sub(all(1), s), all(1)));
  }
  if constexpr (A == Activation::kHardswish) {
    const Vec between = add(div(x, all(3)), all(0.5f));
    const Vec factor = pick(sub(x, all(kJustBelow3)), all(1), pick(sub(all(-kJustBelow3), x), all(0), between));
    return mul(grad, factor);
  }
  if constexpr (A == Activation::kGelu) {
    const Normal normal(x);
    return mul(grad, fma(x, mul(all(0.398942280f), normal.density), normal.below));
  }
  if constexpr (A == Activation::kGeluTanh) {
    const Vec e = exponential_of_u(x), s = div(all(1), add(all(1), e));
    const Vec product = pick(sub(e, all(1e30f)), all(0), mul(s, mul(e, s)));  // s(1 − s), without its cancellation
    const Vec inner = mul(all(kTwiceRoot), fma(all(3 * kCubic), mul(x, x), all(1)));
    return mul(grad, fma(mul(x, product), inner, s));
  }
  if constexpr (A == Activation::kLeakyRelu) return pick(x, grad, mul(slope, grad));
  return grad;
}

// Adam and the clamp on the vectors of one level; included inside its namespace.

template <bool Partial>
static inline void adam_clip_vector(const AdamClip& p, int64_t i, int lanes) {
  const auto at = [&](const float* base) { return Partial ? load(base + i, lanes) : load(base + i); };
  const auto to = [&](float* base, Vec v) { Partial ? store(base + i, v, lanes) : store(base + i, v); };
  const Vec g = mul(all(p.gradient_scale), at(p.gradient));
  const Vec old = at(p.exp_avg);
  const Vec m = fma(all(p.one_minus_beta1), sub(g, old), old);
  const Vec v = fma(mul(all(p.one_minus_beta2), g), g, mul(all(p.beta2), at(p.exp_avg_sq)));
  const Vec denominator = add(root(mul(v, all(p.inverse2))), all(p.eps));
  const Vec moved = sub(at(p.images), div(mul(all(p.rate), m), denominator));
  const Vec low = at(p.low);
  const Vec high = at(p.high);
  to(p.exp_avg, m);
  to(p.exp_avg_sq, v);
  to(p.images, smaller(high, larger(low, moved)));
}

static void adam_clip(const AdamClip& p, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) adam_clip_vector<false>(p, i, kWidth);
  if (i < count) adam_clip_vector<true>(p, i, static_cast<int>(count - i));
}

// bn_act_join on the vectors of one level; included inside its namespace, behind bn_act_kernels.h, whose strips, blocks and sums it uses.

// The coefficients of both layers of a strip, and what the activation is applied to; in both directions by the same arithmetic.
template <int U, bool Partial>
struct JoinedCoefficients : Coefficients<U, Partial> {
  Vec skip_mean[U], skip_scale[U];

  JoinedCoefficients(const BnActJoin& p, const Strip& strip) : Coefficients<U, Partial>(p, strip) {
    for (int u = 0; u < U; ++u) {
      const int64_t c = strip.channel + u * kWidth;
      skip_mean[u] = get<Partial>(p.skip_mean + c, strip.lanes);
      skip_scale[u] = get<Partial>(p.skip_scale + c, strip.lanes);
    }
  }

  Vec joined(int u, Vec shifted, Vec skip_shifted) const {
    return fma(this->scale[u], shifted, fma(skip_scale[u], skip_shifted, this->bias[u]));
  }
};

// gs1 and 2·gs2 of a layer in a strip: what its moments add to the gradient of y is gs1 + 2·gs2·(y − m).
template <int U, bool Partial>
struct MomentGradients {
  Vec constant[U], slope[U];

  MomentGradients(const float* grad_sums, int64_t channels, const Strip& strip) {
    for (int u = 0; u < U; ++u) {
      const float* const p = grad_sums + strip.channel + u * kWidth;
      constant[u] = get<Partial>(p, strip.lanes);
      slope[u] = mul(all(2), get<Partial>(p + channels, strip.lanes));
    }
  }
};

template <typename T, Activation A>
struct JoinForward {
  using Arguments = BnActJoinForward;
  static constexpr int64_t kTileRows = 8;
  static constexpr int kSums = 4;

  template <int U, bool Partial>
  static void run(const BnActJoinForward& p, const Strip& strip, float* sums) {
    const JoinedCoefficients<U, Partial> of(p, strip);
    const T* const y = static_cast<const T*>(p.y);
    const T* const skip = static_cast<const T*>(p.skip);
    T* const result = static_cast<T*>(p.z);
    const int64_t channels = p.channels;
    const int lanes = strip.lanes;
    const bool several = channels > kWhole;
    const int64_t last = strip.last_row * channels + strip.channel, ahead = kAhead * channels;
    Sums<U> sum, skip_sum;
    for (int64_t start = strip.first_row * channels + strip.channel; start < last; start += channels) {
      if (several) {
        prefetch<U>(y + start + ahead);
        prefetch<U>(skip + start + ahead);
        prefetch<U>(result + start + ahead);
      }
      for (int u = 0; u < U; ++u) {
        const int64_t i = start + u * kWidth;
        const Vec shifted = sub(get<Partial>(y + i, lanes), of.mean[u]);
        const Vec skip_shifted = sub(get<Partial>(skip + i, lanes), of.skip_mean[u]);
        sum.first[u] = add(sum.first[u], shifted);
        sum.second[u] = fma(shifted, shifted, sum.second[u]);
        skip_sum.first[u] = add(skip_sum.first[u], skip_shifted);
        skip_sum.second[u] = fma(skip_shifted, skip_shifted, skip_sum.second[u]);
        put<Partial>(result + i, activated<A>(of.joined(u, shifted, skip_shifted), of.slope[u]), lanes);
      }
    }
    sum.put_to(sums);
    skip_sum.put_to(sums + 2 * kPanel);
  }
};

template <typename T, Activation A, bool Parameters>
struct JoinBackward {
  using Arguments = BnActJoinBackward;
  static constexpr int64_t kTileRows = 4;  // no more: the sums for γ and β cancel
  static constexpr bool kSlope = Parameters && A == Activation::kLeakyRelu;
  static constexpr int kSums = kSlope ? 4 : 3;

  template <int U, bool Partial>
  static void run(const BnActJoinBackward& p, const Strip& strip, float* sums) {
    const JoinedCoefficients<U, Partial> of(p, strip);
    const MomentGradients<U, Partial> moments(p.grad_sums, p.channels, strip), skip_moments(p.skip_grad_sums, p.channels, strip);
    const T* const y = static_cast<const T*>(p.y);
    const T* const skip = static_cast<const T*>(p.skip);
    const T* const grad_z = static_cast<const T*>(p.grad_z);
    Again<T> second(p.again, p.channels, strip);
    T* const grad_y = static_cast<T*>(p.grad_y);
    T* const grad_skip = static_cast<T*>(p.grad_skip);
    const int64_t channels = p.channels;
    const int lanes = strip.lanes;
    const bool several = channels > kWhole;
    const int64_t last = strip.last_row * channels + strip.channel, ahead = kAhead * channels;
    [[maybe_unused]] Sums<U> sum, more;  // of g(y − m) and g; of g(y' − m') and for the slope
    for (int64_t start = strip.first_row * channels + strip.channel; start < last; start += channels) {
      const T* const again = second.next();
      if (several) {
        prefetch<U>(y + start + ahead);
        prefetch<U>(skip + start + ahead);
        prefetch<U>(grad_z + start + ahead);
        if (again != nullptr) prefetch<U>(again + ahead);
        prefetch<U>(grad_y + start + ahead);
        prefetch<U>(grad_skip + start + ahead);
      }
      for (int u = 0; u < U; ++u) {
        const int64_t i = start + u * kWidth;
        const Vec shifted = sub(get<Partial>(y + i, lanes), of.mean[u]);
        const Vec skip_shifted = sub(get<Partial>(skip + i, lanes), of.skip_mean[u]);
        Vec grad = get<Partial>(grad_z + i, lanes);
        if (again != nullptr) grad = rounded<T>(add(grad, get<Partial>(again + u * kWidth, lanes)));
        if constexpr (A != Activation::kNone) {
          const Vec x = of.joined(u, shifted, skip_shifted);
          if constexpr (kSlope) more.second[u] = fma(grad, smaller(all(0), x), more.second[u]);
          grad = derived<A>(x, grad, of.slope[u]);
        }
        if constexpr (Parameters) {
          sum.first[u] = fma(grad, shifted, sum.first[u]);
          sum.second[u] = add(sum.second[u], grad);
          more.first[u] = fma(grad, skip_shifted, more.first[u]);
        }
        const Vec of_y = fma(of.scale[u], grad, moments.constant[u]);
        const Vec of_skip = fma(of.skip_scale[u], grad, skip_moments.constant[u]);
        put<Partial>(grad_y + i, fma(moments.slope[u], shifted, of_y), lanes);
        put<Partial>(grad_skip + i, fma(skip_moments.slope[u], skip_shifted, of_skip), lanes);
      }
    }
    if constexpr (Parameters) {
      sum.put_to(sums);
      for (int u = 0; u < U; ++u) {
        store(sums + 2 * kPanel + u * kWidth, more.first[u]);
        if constexpr (kSlope) store(sums + 3 * kPanel + u * kWidth, more.second[u]);
      }
    }
  }
};

template <typename T>
static void join_forward(const BnActJoinForward& p, int64_t begin, int64_t end) {
  with_activation(p.activation,
                  [&](auto activation) { over_blocks<JoinForward<T, decltype(activation)::value>>(p, p.partials, begin, end); });
}

template <typename T>
static void join_backward(const BnActJoinBackward& p, int64_t begin, int64_t end) {
  with_activation(p.activation, [&](auto activation) {
    constexpr Activation A = decltype(activation)::value;
    if (p.partials != nullptr) return over_blocks<JoinBackward<T, A, true>>(p, p.partials, begin, end);
    return over_blocks<JoinBackward<T, A, false>>(p, p.partials, begin, end);
  });
}

static void bn_act_join_forward(const BnActJoinForward& p, int64_t begin, int64_t end) {
  p.bfloat16 ? join_forward<Bf16>(p, begin, end) : join_forward<float>(p, begin, end);
}

static void bn_act_join_backward(const BnActJoinBackward& p, int64_t begin, int64_t end) {
  p.bfloat16 ? join_backward<Bf16>(p, begin, end) : join_backward<float>(p, begin, end);
}

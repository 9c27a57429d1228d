// moments on the vectors of one level, behind bn_act's strips; included inside its namespace.
//
// A channels-last tensor is read in blocks of rows, as by bn_act; a contiguous one plane by plane, each of one channel.

template <typename T>
struct RowMoments {
  using Arguments = Moments;
  static constexpr int64_t kTileRows = 8;
  static constexpr int kSums = 2;

  template <int U, bool Partial>
  static void run(const Moments& p, const Strip& strip, float* sums) {
    Vec mean[U];
    for (int u = 0; u < U; ++u) mean[u] = get<Partial>(p.mean + strip.channel + u * kWidth, strip.lanes);
    const T* const y = static_cast<const T*>(p.y);
    const int64_t channels = p.channels;
    const int lanes = strip.lanes;
    const bool several = channels > kWhole;
    const int64_t last = strip.last_row * channels + strip.channel, ahead = kAhead * channels;
    Sums<U> sum;
    for (int64_t start = strip.first_row * channels + strip.channel; start < last; start += channels) {
      if (several) prefetch<U>(y + start + ahead);
      for (int u = 0; u < U; ++u) {
        const Vec shifted = sub(get<Partial>(y + start + u * kWidth, lanes), mean[u]);
        sum.first[u] = add(sum.first[u], shifted);
        sum.second[u] = fma(shifted, shifted, sum.second[u]);
      }
    }
    sum.put_to(sums);
  }
};

template <typename T>
struct RowMomentsBackward {
  using Arguments = Moments;
  static constexpr int64_t kTileRows = 4;
  static constexpr int kSums = 2;

  template <int U, bool Partial>
  static void run(const Moments& p, const Strip& strip, float*) {
    Vec mean[U], constant[U], slope[U];  // m, gs1 and 2·gs2
    for (int u = 0; u < U; ++u) {
      const int64_t c = strip.channel + u * kWidth;
      mean[u] = get<Partial>(p.mean + c, strip.lanes);
      constant[u] = get<Partial>(p.grad_sums + c, strip.lanes);
      slope[u] = mul(all(2), get<Partial>(p.grad_sums + p.channels + c, strip.lanes));
    }
    const T* const y = static_cast<const T*>(p.y);
    T* const grad_y = static_cast<T*>(p.grad_y);
    const int64_t channels = p.channels;
    const int lanes = strip.lanes;
    const bool several = channels > kWhole;
    const int64_t last = strip.last_row * channels + strip.channel, ahead = kAhead * channels;
    for (int64_t start = strip.first_row * channels + strip.channel; start < last; start += channels) {
      if (several) {
        prefetch<U>(y + start + ahead);
        prefetch<U>(grad_y + start + ahead);
      }
      for (int u = 0; u < U; ++u) {
        const int64_t i = start + u * kWidth;
        put<Partial>(grad_y + i, fma(slope[u], sub(get<Partial>(y + i, lanes), mean[u]), constant[u]), lanes);
      }
    }
  }
};

constexpr int64_t kStretch = 16 * kUnroll * kWidth;  // elements of a plane that are summed in float32: 16 to a lane

template <bool Partial, typename T>
static inline void add_shifted(const T* y, Vec mean, int lanes, Vec& first, Vec& second) {
  Vec shifted = sub(get<Partial>(y, lanes), mean);
  if constexpr (Partial) shifted = keep((1u << lanes) - 1, shifted);
  first = add(first, shifted);
  second = fma(shifted, shifted, second);
}

static inline double total(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  double sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

template <typename T>
static void plane_moments(const Moments& p, int64_t begin, int64_t end) {
  const T* y = static_cast<const T*>(p.y) + begin * p.plane;
  for (int64_t plane = begin; plane < end; ++plane, y += p.plane) {
    const Vec mean = all(p.mean[plane % p.channels]);
    double sums[2] = {0, 0};
    for (int64_t start = 0; start < p.plane; start += kStretch) {
      const int64_t stop = start + kStretch < p.plane ? start + kStretch : p.plane;
      Vec first[kUnroll], second[kUnroll];
      for (int u = 0; u < kUnroll; ++u) first[u] = second[u] = all(0);
      int64_t i = start;
      for (; i + kUnroll * kWidth <= stop; i += kUnroll * kWidth) {
        for (int u = 0; u < kUnroll; ++u) add_shifted<false>(y + i + u * kWidth, mean, kWidth, first[u], second[u]);
      }
      for (; i + kWidth <= stop; i += kWidth) add_shifted<false>(y + i, mean, kWidth, first[0], second[0]);
      if (i < stop) add_shifted<true>(y + i, mean, static_cast<int>(stop - i), first[0], second[0]);
      for (int u = 1; u < kUnroll; ++u) {
        first[0] = add(first[0], first[u]);
        second[0] = add(second[0], second[u]);
      }
      sums[0] += total(first[0]);
      sums[1] += total(second[0]);
    }
    p.partials[2 * plane] = static_cast<float>(sums[0]);
    p.partials[2 * plane + 1] = static_cast<float>(sums[1]);
  }
}

template <typename T>
static void plane_moments_backward(const Moments& p, int64_t begin, int64_t end) {
  const T* y = static_cast<const T*>(p.y) + begin * p.plane;
  T* grad_y = static_cast<T*>(p.grad_y) + begin * p.plane;
  const int64_t size = p.plane;
  for (int64_t plane = begin; plane < end; ++plane, y += size, grad_y += size) {
    const int64_t c = plane % p.channels;
    const Vec mean = all(p.mean[c]), constant = all(p.grad_sums[c]), slope = all(2 * p.grad_sums[p.channels + c]);
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) store(grad_y + i, fma(slope, sub(load(y + i), mean), constant));
    const int lanes = static_cast<int>(size - i);
    if (lanes > 0) store(grad_y + i, fma(slope, sub(load(y + i, lanes), mean), constant), lanes);
  }
}

template <typename T>
static void moments_forward(const Moments& p, int64_t begin, int64_t end) {
  p.plane > 0 ? plane_moments<T>(p, begin, end) : over_blocks<RowMoments<T>>(p, p.partials, begin, end);
}

template <typename T>
static void moments_backward(const Moments& p, int64_t begin, int64_t end) {
  float* const none = nullptr;
  p.plane > 0 ? plane_moments_backward<T>(p, begin, end) : over_blocks<RowMomentsBackward<T>>(p, none, begin, end);
}

static void moments(const Moments& p, int64_t begin, int64_t end) {
  p.bfloat16 ? moments_forward<Bf16>(p, begin, end) : moments_forward<float>(p, begin, end);
}

static void moments_backward(const Moments& p, int64_t begin, int64_t end) {
  p.bfloat16 ? moments_backward<Bf16>(p, begin, end) : moments_backward<float>(p, begin, end);
}

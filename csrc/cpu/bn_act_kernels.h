// bn_act on the vectors of one level; included inside its namespace.
//
// A strip is kUnroll vectors of channels (one at the end), whose coefficients and sums stay in registers over the rows of a block.
// Pointers are copied to locals: the compiler must assume that stores of vectors change the arguments.

// Where the strip starts and what it covers.
struct Strip {
  int64_t first_row, last_row, channel;
  int lanes;  // channels of its last vector
};

// Bits from any position on. Where the number of channels is a multiple of 8 they are whole bytes.
static inline void put_bits(uint8_t* mask, int64_t position, uint64_t bits, int count, bool bytes) {
  uint8_t* target = mask + position / 8;
  if (bytes) {
    for (int i = 0; i < count / 8; ++i) target[i] = static_cast<uint8_t>(bits >> (8 * i));
    return;
  }
  const int shift = static_cast<int>(position % 8);
  target[0] |= static_cast<uint8_t>(bits << shift);
  for (int i = 1; 8 * i < count + shift; ++i) target[i] |= static_cast<uint8_t>(bits >> (8 * i - shift));
}

static inline uint64_t get_bits(const uint8_t* mask, int64_t position, int count, bool bytes) {
  const uint8_t* source = mask + position / 8;
  uint64_t bits = 0;
  if (bytes) {
    for (int i = 0; i < count / 8; ++i) bits |= static_cast<uint64_t>(source[i]) << (8 * i);
    return bits;
  }
  const int shift = static_cast<int>(position % 8);
  bits = static_cast<uint64_t>(source[0]) >> shift;
  for (int i = 1; 8 * i < count + shift; ++i) bits |= static_cast<uint64_t>(source[i]) << (8 * i - shift);
  return bits;
}

template <bool Partial, typename T>
static inline Vec get(const T* p, int lanes) {
  if constexpr (Partial) {
    return load(p, lanes);
  } else {
    return load(p);
  }
}

template <bool Partial, typename T>
static inline void put(T* p, Vec v, int lanes) {
  if constexpr (Partial) {
    store(p, v, lanes);
  } else {
    store(p, v);
  }
}

// m, a = γ/√(v + ε) and β of a strip: z = a(y − m) + β, in both directions by the same arithmetic.
template <int U, bool Partial>
struct Coefficients {
  Vec mean[U], scale[U], bias[U];

  Coefficients(const BnAct& p, const Strip& strip) {
    for (int u = 0; u < U; ++u) {
      const int64_t c = strip.channel + u * kWidth;
      mean[u] = get<Partial>(p.mean + c, strip.lanes);
      scale[u] = get<Partial>(p.scale + c, strip.lanes);
      bias[u] = p.bias == nullptr ? all(0) : get<Partial>(p.bias + c, strip.lanes);
    }
  }
};

// Two sums per channel, in registers over a few rows, then added to those in memory, [2, C]: two short chains of roundings, not a long one.
constexpr int64_t kSumRows = 8;
constexpr int64_t kWeightSumRows = 4;  // the gradients of weights cancel

template <int U, bool Partial>
struct Sums {
  Vec first[U], second[U];

  Sums() {
    for (int u = 0; u < U; ++u) first[u] = second[u] = all(0);
  }
  void add_to(float* sums, int64_t channels, const Strip& strip) const {
    for (int u = 0; u < U; ++u) {
      float* const one = sums + strip.channel + u * kWidth;
      put<Partial>(one, add(get<Partial>(one, strip.lanes), first[u]), strip.lanes);
      put<Partial>(one + channels, add(get<Partial>(one + channels, strip.lanes), second[u]), strip.lanes);
    }
  }
  void add_to(double* sums, int64_t channels, const Strip& strip) const {
    float lanes[2][kWidth];
    for (int u = 0; u < U; ++u) {
      double* const one = sums + strip.channel + u * kWidth;
      store(lanes[0], first[u]);
      store(lanes[1], second[u]);
      for (int i = 0; i < (Partial ? strip.lanes : kWidth); ++i) {
        one[i] += lanes[0][i];
        one[channels + i] += lanes[1][i];
      }
    }
  }
};

template <typename T, bool Skip, bool Relu>
struct Forward {
  using Arguments = BnActForward;

  template <int U, bool Partial>
  static void run(const BnActForward& p, const Strip& strip, float* sums) {
    const Coefficients<U, Partial> of(p, strip);
    const bool bytes = p.channels % 8 == 0;
    const int count = (U - 1) * kWidth + (Partial ? strip.lanes : kWidth);
    const T* const y = static_cast<const T*>(p.y);
    const T* const skip = static_cast<const T*>(p.skip);
    T* const result = static_cast<T*>(p.z);
    uint8_t* const mask = p.mask;
    const int64_t channels = p.channels;
    const int lanes = strip.lanes;
    const int64_t last = strip.last_row * channels + strip.channel;
    for (int64_t start = strip.first_row * channels + strip.channel; start < last;) {
      const int64_t stop = start + kSumRows * channels < last ? start + kSumRows * channels : last;
      Sums<U, Partial> sum;
      for (; start < stop; start += channels) {
        uint64_t bits = 0;
        for (int u = 0; u < U; ++u) {
          const int64_t i = start + u * kWidth;
          const Vec shifted = sub(get<Partial>(y + i, lanes), of.mean[u]);
          sum.first[u] = add(sum.first[u], shifted);
          sum.second[u] = fma(shifted, shifted, sum.second[u]);
          Vec z = fma(of.scale[u], shifted, of.bias[u]);
          if constexpr (Skip) z = add(z, get<Partial>(skip + i, lanes));
          if constexpr (Skip && Relu) bits |= static_cast<uint64_t>(positive(z)) << (u * kWidth);
          if constexpr (Relu) z = larger(all(0), z);
          put<Partial>(result + i, z, lanes);
        }
        if constexpr (Skip && Relu) put_bits(mask, start, Partial ? bits & ((1u << lanes) - 1) : bits, count, bytes);
      }
      sum.add_to(sums, channels, strip);
    }
  }
};

enum class Mask { kNone, kRecomputed, kSaved };

// mask·gz of one vector; shifted is y − m, which only a recomputed mask needs.
template <Mask From, int U, bool Partial>
static inline Vec masked(Vec grad, Vec shifted, const Coefficients<U, Partial>& of, int u, uint64_t bits) {
  if constexpr (From == Mask::kRecomputed) return keep(positive(fma(of.scale[u], shifted, of.bias[u])), grad);
  if constexpr (From == Mask::kSaved) return keep(static_cast<uint32_t>(bits >> (u * kWidth)), grad);
  return grad;
}

template <typename T, Mask From, bool Moments>
struct Backward {
  using Arguments = BnActBackward;

  template <int U, bool Partial>
  static void run(const BnActBackward& p, const Strip& strip, float*) {
    const Coefficients<U, Partial> of(p, strip);
    const bool bytes = p.channels % 8 == 0;
    const int count = (U - 1) * kWidth + (Partial ? strip.lanes : kWidth);
    Vec constant[U], slope[U];  // gs1 and 2·gs2
    for (int u = 0; u < U; ++u) {
      constant[u] = slope[u] = all(0);
      if constexpr (Moments) {
        const int64_t c = strip.channel + u * kWidth;
        constant[u] = get<Partial>(p.grad_sums + c, strip.lanes);
        slope[u] = mul(all(2), get<Partial>(p.grad_sums + p.channels + c, strip.lanes));
      }
    }
    const T* const y = static_cast<const T*>(p.y);
    const T* const grad_z = static_cast<const T*>(p.grad_z);
    T* const grad_y = static_cast<T*>(p.grad_y);
    T* const grad_skip = static_cast<T*>(p.grad_skip);
    const uint8_t* const mask = p.mask;
    const int64_t channels = p.channels;
    const int lanes = strip.lanes;
    const int64_t last = strip.last_row * channels + strip.channel;
    for (int64_t start = strip.first_row * channels + strip.channel; start < last; start += channels) {
      uint64_t bits = 0;
      if constexpr (From == Mask::kSaved) bits = get_bits(mask, start, count, bytes);
      for (int u = 0; u < U; ++u) {
        const int64_t i = start + u * kWidth;
        Vec shifted = all(0);
        if constexpr (Moments || From == Mask::kRecomputed) {
          shifted = sub(get<Partial>(y + i, lanes), of.mean[u]);
        }
        const Vec grad = masked<From>(get<Partial>(grad_z + i, lanes), shifted, of, u, bits);
        if constexpr (From == Mask::kSaved) put<Partial>(grad_skip + i, grad, lanes);
        Vec result = mul(of.scale[u], grad);
        if constexpr (Moments) result = fma(slope[u], shifted, fma(of.scale[u], grad, constant[u]));
        put<Partial>(grad_y + i, result, lanes);
      }
    }
  }
};

template <typename T, Mask From>
struct WeightBackward {
  using Arguments = BnActWeightBackward;

  template <int U, bool Partial>
  static void run(const BnActWeightBackward& p, const Strip& strip, double* sums) {
    const Coefficients<U, Partial> of(p, strip);
    const bool bytes = p.channels % 8 == 0;
    const int count = (U - 1) * kWidth + (Partial ? strip.lanes : kWidth);
    const T* const y = static_cast<const T*>(p.y);
    const T* const grad_z = static_cast<const T*>(p.grad_z);
    const uint8_t* const mask = p.mask;
    const int64_t channels = p.channels;
    const int lanes = strip.lanes;
    const int64_t last = strip.last_row * channels + strip.channel;
    for (int64_t start = strip.first_row * channels + strip.channel; start < last;) {
      const int64_t stop = start + kWeightSumRows * channels < last ? start + kWeightSumRows * channels : last;
      Sums<U, Partial> sum;
      for (; start < stop; start += channels) {
        uint64_t bits = 0;
        if constexpr (From == Mask::kSaved) bits = get_bits(mask, start, count, bytes);
        for (int u = 0; u < U; ++u) {
          const int64_t i = start + u * kWidth;
          const Vec shifted = sub(get<Partial>(y + i, lanes), of.mean[u]);
          const Vec grad = masked<From>(get<Partial>(grad_z + i, lanes), shifted, of, u, bits);
          sum.first[u] = fma(grad, shifted, sum.first[u]);
          sum.second[u] = add(sum.second[u], grad);
        }
      }
      sum.add_to(sums, channels, strip);
    }
  }
};

// Where a strip is narrower than a cache line, its rows must stay in the first-level cache until all strips have been read.
constexpr int kLine = 64;
constexpr int64_t kTileBytes = 8192;

template <typename Kernel, typename Sum>
static void over_channels(const typename Kernel::Arguments& p, Strip strip, Sum* sums) {
  for (; strip.channel + kUnroll * kWidth <= p.channels; strip.channel += kUnroll * kWidth) {
    Kernel::template run<kUnroll, false>(p, strip, sums);
  }
  for (; strip.channel + kWidth <= p.channels; strip.channel += kWidth) Kernel::template run<1, false>(p, strip, sums);
  strip.lanes = static_cast<int>(p.channels - strip.channel);
  if (strip.lanes > 0) Kernel::template run<1, true>(p, strip, sums);
}

template <typename Kernel, typename Sum>
static void over_blocks(const typename Kernel::Arguments& p, Sum* partials, int64_t begin, int64_t end) {
  const int size = p.bfloat16 ? 2 : 4;
  const int64_t about = kUnroll * kWidth * size >= kLine ? p.block_rows : kTileBytes / (p.channels * size);
  const int64_t tile = about < 8 ? 8 : about;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t last = (block + 1) * p.block_rows < p.rows ? (block + 1) * p.block_rows : p.rows;
    Sum* sums = partials == nullptr ? nullptr : partials + block * 2 * p.channels;
    if (sums != nullptr) __builtin_memset(sums, 0, static_cast<unsigned long>(2 * p.channels) * sizeof(Sum));
    for (int64_t row = block * p.block_rows; row < last; row += tile) {
      over_channels<Kernel>(p, {row, row + tile < last ? row + tile : last, 0, kWidth}, sums);
    }
  }
}

static void zero_mask(const BnActForward& p, int64_t begin, int64_t end) {
  const int64_t first = begin * p.block_rows * p.channels / 8;
  const int64_t last = end * p.block_rows < p.rows ? end * p.block_rows * p.channels / 8 : (p.rows * p.channels + 7) / 8;
  __builtin_memset(p.mask + first, 0, static_cast<unsigned long>(last - first));
}

template <typename T>
static void forward(const BnActForward& p, int64_t begin, int64_t end) {
  if (p.skip != nullptr && p.relu && p.channels % 8 != 0) zero_mask(p, begin, end);
  if (p.skip != nullptr && p.relu) return over_blocks<Forward<T, true, true>>(p, p.partials, begin, end);
  if (p.skip != nullptr) return over_blocks<Forward<T, true, false>>(p, p.partials, begin, end);
  if (p.relu) return over_blocks<Forward<T, false, true>>(p, p.partials, begin, end);
  return over_blocks<Forward<T, false, false>>(p, p.partials, begin, end);
}

template <typename T, bool Moments>
static void backward(const BnActBackward& p, int64_t begin, int64_t end) {
  float* const none = nullptr;
  if (p.mask != nullptr) return over_blocks<Backward<T, Mask::kSaved, Moments>>(p, none, begin, end);
  if (p.relu) return over_blocks<Backward<T, Mask::kRecomputed, Moments>>(p, none, begin, end);
  return over_blocks<Backward<T, Mask::kNone, Moments>>(p, none, begin, end);
}

template <typename T>
static void weight_backward(const BnActWeightBackward& p, int64_t begin, int64_t end) {
  if (p.mask != nullptr) return over_blocks<WeightBackward<T, Mask::kSaved>>(p, p.partials, begin, end);
  if (p.relu) return over_blocks<WeightBackward<T, Mask::kRecomputed>>(p, p.partials, begin, end);
  return over_blocks<WeightBackward<T, Mask::kNone>>(p, p.partials, begin, end);
}

static void bn_act_forward(const BnActForward& p, int64_t begin, int64_t end) {
  p.bfloat16 ? forward<Bf16>(p, begin, end) : forward<float>(p, begin, end);
}

static void bn_act_backward(const BnActBackward& p, int64_t begin, int64_t end) {
  if (p.grad_sums != nullptr) return p.bfloat16 ? backward<Bf16, true>(p, begin, end) : backward<float, true>(p, begin, end);
  p.bfloat16 ? backward<Bf16, false>(p, begin, end) : backward<float, false>(p, begin, end);
}

static void bn_act_weight_backward(const BnActWeightBackward& p, int64_t begin, int64_t end) {
  p.bfloat16 ? weight_backward<Bf16>(p, begin, end) : weight_backward<float>(p, begin, end);
}

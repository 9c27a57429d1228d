// bn_act on the vectors of one level; included inside its namespace.
//
// A block is read in tiles of few rows, nearly in memory's order, a tile in strips: kUnroll vectors of channels (one at the end), whose
// coefficients and sums stay in registers over the rows of the tile.
// Pointers are copied to locals: the compiler must assume that stores of vectors change the arguments.

// Where a strip starts and what it covers.
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

// As if stored and loaded again
template <typename T>
static inline Vec rounded(Vec v) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return v;
  } else {
    T memory[kWidth];
    store(memory, v);
    return load(memory);
  }
}

// Rows of a strip that are prefetched ahead. Where a row is several strips, the hardware prefetcher cannot follow them; where it is one,
// memory is read sequentially.
constexpr int64_t kAhead = 16;
constexpr int kWhole = kUnroll * kWidth;
constexpr int kLine = 64;

template <int U, typename T>
static inline void prefetch(const T* p) {
  constexpr int kSecondLevel = 2;  // of the cache
  for (int i = 0; i < U * kWidth; i += kLine / static_cast<int>(sizeof(T))) __builtin_prefetch(p + i, 0, kSecondLevel);
}

// Where the second gradient of the pixels of a strip lies, one after the other.
template <typename T>
class Again {
 public:
  Again(const GradAgain& p, int64_t channels, const Strip& strip)
      : channels_(channels), stride_(p.stride), height_(p.height), width_(p.width) {
    if (p.first == nullptr) return;
    const int64_t line = strip.first_row / width_;
    row_ = line % height_;
    column_ = strip.first_row % width_;
    const int64_t lines = line / height_ * up(height_) + up(row_);  // of the pixels that have one, before this row
    const int64_t pixels = row_ % stride_ == 0 ? lines * up(width_) + up(column_) : lines * up(width_);
    to_row_ = up(row_) * stride_ - row_;
    to_column_ = up(column_) * stride_ - column_;
    next_ = static_cast<const T*>(p.first) + pixels * channels + strip.channel;
  }

  // That of the next pixel; null where it has none
  const T* next() {
    if (next_ == nullptr) return nullptr;
    const T* const here = to_row_ == 0 && to_column_ == 0 ? next_ : nullptr;
    if (here != nullptr) next_ += channels_;
    to_column_ = to_column_ == 0 ? stride_ - 1 : to_column_ - 1;
    if (++column_ == width_) {
      column_ = to_column_ = 0;
      to_row_ = to_row_ == 0 ? stride_ - 1 : to_row_ - 1;
      if (++row_ == height_) row_ = to_row_ = 0;
    }
    return here;
  }

 private:
  int64_t up(int64_t size) const { return (size + stride_ - 1) / stride_; }

  const T* next_ = nullptr;
  int64_t channels_, stride_, height_, width_;
  int64_t row_ = 0, column_ = 0, to_row_ = 0, to_column_ = 0;  // of the next pixel, and from there to the next row and column with one
};

// m, a = γ/√(v + ε), β and the slope of a strip: x = a(y − m) + β, in both directions by the same arithmetic.
template <int U, bool Partial>
struct Coefficients {
  Vec mean[U], scale[U], bias[U], slope[U];

  Coefficients(const BnAct& p, const Strip& strip) {
    for (int u = 0; u < U; ++u) {
      const int64_t c = strip.channel + u * kWidth;
      mean[u] = get<Partial>(p.mean + c, strip.lanes);
      scale[u] = get<Partial>(p.scale + c, strip.lanes);
      bias[u] = p.bias == nullptr ? all(0) : get<Partial>(p.bias + c, strip.lanes);
      slope[u] = p.slope == nullptr ? all(0) : get<Partial>(p.slope + c, strip.lanes);
    }
  }
};

// Two or three sums per channel over the rows of a tile: in registers, then in a buffer, [·, kPanel], from which `flush` adds them to those
// of the block. Two short chains of additions round less than a long one, and the sums of the block, which the tile has evicted from the
// first-level cache, are read sequentially.
constexpr int64_t kPanel = 2048;  // channels at a time, a multiple of kWidth: two sums take 16 KB

template <int U>
struct Sums {
  Vec first[U], second[U];

  Sums() {
    for (int u = 0; u < U; ++u) first[u] = second[u] = all(0);
  }
  void put_to(float* sums) const {
    for (int u = 0; u < U; ++u) {
      store(sums + u * kWidth, first[u]);
      store(sums + kPanel + u * kWidth, second[u]);
    }
  }
};

template <int Count, typename Sum>
static inline void flush(const float* of_tile, Sum* sums, int64_t channels, int64_t count) {
  for (int i = 0; i < Count; ++i) {
    for (int64_t c = 0; c < count; ++c) sums[i * channels + c] += of_tile[i * kPanel + c];
  }
}

template <typename T, Activation A, bool Skip>
struct Forward {
  using Arguments = BnActForward;
  static constexpr int64_t kTileRows = 8;
  static constexpr int kSums = 2;
  static constexpr bool kMask = Skip && A == Activation::kRelu;

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
    const bool several = channels > kWhole;
    const int64_t last = strip.last_row * channels + strip.channel, ahead = kAhead * channels;
    Sums<U> sum;
    for (int64_t start = strip.first_row * channels + strip.channel; start < last; start += channels) {
      if (several) {
        prefetch<U>(y + start + ahead);
        prefetch<U>(result + start + ahead);
        if constexpr (Skip) prefetch<U>(skip + start + ahead);
      }
      uint64_t bits = 0;
      for (int u = 0; u < U; ++u) {
        const int64_t i = start + u * kWidth;
        const Vec shifted = sub(get<Partial>(y + i, lanes), of.mean[u]);
        sum.first[u] = add(sum.first[u], shifted);
        sum.second[u] = fma(shifted, shifted, sum.second[u]);
        Vec z = fma(of.scale[u], shifted, of.bias[u]);
        if constexpr (Skip) z = add(z, get<Partial>(skip + i, lanes));
        if constexpr (kMask) bits |= static_cast<uint64_t>(positive(z)) << (u * kWidth);
        put<Partial>(result + i, activated<A>(z, of.slope[u]), lanes);
      }
      if constexpr (kMask) put_bits(mask, start, Partial ? bits & ((1u << lanes) - 1) : bits, count, bytes);
    }
    sum.put_to(sums);
  }
};

// The gradient behind the activation comes from the saved bits of a ReLU, or from what the activation was applied to, recomputed.
// Without an activation the skip's gradient is gz itself, so Skip says nothing then.
template <typename T, Activation A, bool Skip, bool Moments, bool Parameters>
struct Backward {
  using Arguments = BnActBackward;
  static constexpr int64_t kTileRows = 4;  // no more: the sums for γ and β cancel
  static constexpr bool kMask = Skip && A == Activation::kRelu;
  static constexpr bool kRecomputes = A != Activation::kNone && !kMask;
  static constexpr bool kReadsY = Moments || Parameters || kRecomputes;
  static constexpr bool kSlope = Parameters && A == Activation::kLeakyRelu;
  static constexpr int kSums = kSlope ? 3 : 2;

  template <int U, bool Partial>
  static void run(const BnActBackward& p, const Strip& strip, float* sums) {
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
    Again<T> second(p.again, p.channels, strip);
    T* const grad_y = static_cast<T*>(p.grad_y);
    [[maybe_unused]] const T* const skip = static_cast<const T*>(p.skip);
    T* const grad_skip = static_cast<T*>(p.grad_skip);
    const uint8_t* const mask = p.mask;
    const int64_t channels = p.channels;
    const int lanes = strip.lanes;
    const bool several = channels > kWhole;
    const int64_t last = strip.last_row * channels + strip.channel, ahead = kAhead * channels;
    [[maybe_unused]] Sums<U> sum;
    [[maybe_unused]] Vec of_slope[U];
    if constexpr (kSlope) {
      for (int u = 0; u < U; ++u) of_slope[u] = all(0);
    }
    for (int64_t start = strip.first_row * channels + strip.channel; start < last; start += channels) {
      const T* const again = second.next();
      if (several) {
        if constexpr (kReadsY) prefetch<U>(y + start + ahead);
        if constexpr (Skip && kRecomputes) prefetch<U>(skip + start + ahead);
        prefetch<U>(grad_z + start + ahead);
        if (again != nullptr) prefetch<U>(again + ahead);
        if (grad_y != nullptr) prefetch<U>(grad_y + start + ahead);
        if constexpr (Skip) prefetch<U>(grad_skip + start + ahead);
      }
      uint64_t bits = 0;
      if constexpr (kMask) bits = get_bits(mask, start, count, bytes);
      for (int u = 0; u < U; ++u) {
        const int64_t i = start + u * kWidth;
        Vec shifted = all(0);
        if constexpr (kReadsY) shifted = sub(get<Partial>(y + i, lanes), of.mean[u]);
        Vec grad = get<Partial>(grad_z + i, lanes);
        if (again != nullptr) grad = rounded<T>(add(grad, get<Partial>(again + u * kWidth, lanes)));
        if constexpr (kMask) grad = keep(static_cast<uint32_t>(bits >> (u * kWidth)), grad);
        if constexpr (kRecomputes) {
          Vec x = fma(of.scale[u], shifted, of.bias[u]);
          if constexpr (Skip) x = add(x, get<Partial>(skip + i, lanes));
          if constexpr (kSlope) of_slope[u] = fma(grad, smaller(all(0), x), of_slope[u]);
          grad = derived<A>(x, grad, of.slope[u]);
        }
        if constexpr (Parameters) {
          sum.first[u] = fma(grad, shifted, sum.first[u]);
          sum.second[u] = add(sum.second[u], grad);
        }
        if constexpr (Skip) put<Partial>(grad_skip + i, grad, lanes);
        if (grad_y == nullptr) continue;
        Vec result = mul(of.scale[u], grad);
        if constexpr (Moments) result = fma(slope[u], shifted, fma(of.scale[u], grad, constant[u]));
        put<Partial>(grad_y + i, result, lanes);
      }
    }
    if constexpr (Parameters) sum.put_to(sums);
    if constexpr (kSlope) {
      for (int u = 0; u < U; ++u) store(sums + 2 * kPanel + u * kWidth, of_slope[u]);
    }
  }
};

// From the strip's channel to the last one; sums are those of the first strip.
template <typename Kernel>
static void over_channels(const typename Kernel::Arguments& p, Strip strip, int64_t last, float* sums) {
  for (; strip.channel + kWhole <= last; strip.channel += kWhole, sums += kWhole) Kernel::template run<kUnroll, false>(p, strip, sums);
  for (; strip.channel + kWidth <= last; strip.channel += kWidth, sums += kWidth) Kernel::template run<1, false>(p, strip, sums);
  strip.lanes = static_cast<int>(last - strip.channel);
  if (strip.lanes > 0) Kernel::template run<1, true>(p, strip, sums);
}

template <typename Kernel, typename Sum>
static void over_blocks(const typename Kernel::Arguments& p, Sum* partials, int64_t begin, int64_t end) {
  constexpr int64_t kTileRows = Kernel::kTileRows;
  constexpr int kSums = Kernel::kSums;
  float of_tile[kSums * kPanel];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t last = (block + 1) * p.block_rows < p.rows ? (block + 1) * p.block_rows : p.rows;
    Sum* sums = partials == nullptr ? nullptr : partials + block * kSums * p.channels;
    if (sums != nullptr) __builtin_memset(sums, 0, static_cast<unsigned long>(kSums * p.channels) * sizeof(Sum));
    for (int64_t row = block * p.block_rows; row < last; row += kTileRows) {
      const int64_t stop = row + kTileRows < last ? row + kTileRows : last;
      for (int64_t channel = 0; channel < p.channels; channel += kPanel) {
        const int64_t count = channel + kPanel < p.channels ? kPanel : p.channels - channel;
        over_channels<Kernel>(p, {row, stop, channel, kWidth}, channel + count, of_tile);
        if (sums != nullptr) flush<kSums>(of_tile, sums + channel, p.channels, count);
      }
    }
  }
}

static void zero_mask(const BnActForward& p, int64_t begin, int64_t end) {
  const int64_t first = begin * p.block_rows * p.channels / 8;
  const int64_t last = end * p.block_rows < p.rows ? end * p.block_rows * p.channels / 8 : (p.rows * p.channels + 7) / 8;
  __builtin_memset(p.mask + first, 0, static_cast<unsigned long>(last - first));
}

// An activation as a type, so that a lambda knows it when it is compiled.
template <Activation A>
struct Constant {
  static constexpr Activation value = A;
};

// function(Constant<A>()) for the activation A of a call
template <typename Function>
static inline void with_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::kNone:
      return function(Constant<Activation::kNone>());
    case Activation::kRelu:
      return function(Constant<Activation::kRelu>());
    case Activation::kRelu6:
      return function(Constant<Activation::kRelu6>());
    case Activation::kSilu:
      return function(Constant<Activation::kSilu>());
    case Activation::kHardswish:
      return function(Constant<Activation::kHardswish>());
    case Activation::kGelu:
      return function(Constant<Activation::kGelu>());
    case Activation::kGeluTanh:
      return function(Constant<Activation::kGeluTanh>());
    case Activation::kLeakyRelu:
      return function(Constant<Activation::kLeakyRelu>());
  }
}

template <typename T>
static void forward(const BnActForward& p, int64_t begin, int64_t end) {
  if (p.skip != nullptr && p.activation == Activation::kRelu && p.channels % 8 != 0) zero_mask(p, begin, end);
  with_activation(p.activation, [&](auto activation) {
    constexpr Activation A = decltype(activation)::value;
    if (p.skip != nullptr) return over_blocks<Forward<T, A, true>>(p, p.partials, begin, end);
    return over_blocks<Forward<T, A, false>>(p, p.partials, begin, end);
  });
}

template <typename T, bool Moments, bool Parameters>
static void backward(const BnActBackward& p, int64_t begin, int64_t end) {
  with_activation(p.activation, [&](auto activation) {
    constexpr Activation A = decltype(activation)::value;
    if constexpr (A != Activation::kNone) {
      if (p.grad_skip != nullptr) return over_blocks<Backward<T, A, true, Moments, Parameters>>(p, p.partials, begin, end);
    }
    return over_blocks<Backward<T, A, false, Moments, Parameters>>(p, p.partials, begin, end);
  });
}

template <typename T>
static void backward(const BnActBackward& p, int64_t begin, int64_t end) {
  if (p.grad_sums != nullptr && p.partials != nullptr) return backward<T, true, true>(p, begin, end);
  if (p.grad_sums != nullptr) return backward<T, true, false>(p, begin, end);
  if (p.partials != nullptr) return backward<T, false, true>(p, begin, end);
  return backward<T, false, false>(p, begin, end);
}

static void bn_act_forward(const BnActForward& p, int64_t begin, int64_t end) {
  p.bfloat16 ? forward<Bf16>(p, begin, end) : forward<float>(p, begin, end);
}

static void bn_act_backward(const BnActBackward& p, int64_t begin, int64_t end) {
  p.bfloat16 ? backward<Bf16>(p, begin, end) : backward<float>(p, begin, end);
}

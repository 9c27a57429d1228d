// The pooling of bn_act_pool on the vectors of one level; included inside its namespace. A line at a time, channels innermost.

template <bool Partial>
static inline void put_numbers(uint8_t* p, Vec v, int lanes) {
  float numbers[kWidth];
  store(numbers, v);
  for (int i = 0; i < (Partial ? lanes : kWidth); ++i) p[i] = static_cast<uint8_t>(numbers[i]);
}

// The lines of a window that exist, the columns of a window that exist, or the windows that hold a pixel: [first, last)
struct Span {
  int64_t first, last;
};

static inline Span inside(int64_t pooled, int64_t size, const MaxPool& p) {
  const int64_t start = pooled * p.stride - p.padding;
  return {start < 0 ? -start : 0, start + p.window < size ? p.window : size - start};
}

static inline Span windows_of(int64_t pixel, int64_t count, const MaxPool& p) {
  const int64_t place = pixel + p.padding, last = place / p.stride + 1;
  return {place < p.window ? 0 : (place - p.window) / p.stride + 1, last < count ? last : count};
}

// The largest of one window, the first of equals, or the last NaN, as PyTorch chooses; and its place in the window.
template <int U, bool Partial, typename T>
static inline void largest_of_window(const MaxPool& p, const T* z, Span lines, Span columns, T* pooled, uint8_t* index, int lanes) {
  Vec best[U], place[U];
  const Vec start = all(static_cast<float>(lines.first * p.window + columns.first));
  for (int u = 0; u < U; ++u) {
    best[u] = get<Partial>(z + columns.first * p.channels + u * kWidth, lanes);
    place[u] = start;
  }
  for (int64_t a = lines.first; a < lines.last; ++a, z += p.width * p.channels) {
    for (int64_t b = columns.first; b < columns.last; ++b) {
      const Vec here = all(static_cast<float>(a * p.window + b));
      for (int u = 0; u < U; ++u) {
        const Vec value = get<Partial>(z + b * p.channels + u * kWidth, lanes);
        place[u] = pick_above(value, best[u], here, place[u]);
        best[u] = pick_above(value, best[u], value, best[u]);
      }
    }
  }
  for (int u = 0; u < U; ++u) {
    put<Partial>(pooled + u * kWidth, best[u], lanes);
    put_numbers<Partial>(index + u * kWidth, place[u], lanes);
  }
}

// z: the first line of the windows that exists; `lines`: which of theirs do.
template <typename T>
static void max_pool_line(const MaxPool& p, const T* z, Span lines, T* pooled, uint8_t* index) {
  for (int64_t j = 0; j < p.pooled_width; ++j, pooled += p.channels, index += p.channels) {
    const Span columns = inside(j, p.width, p);
    const T* const from = z + (j * p.stride - p.padding) * p.channels;
    int64_t c = 0;
    for (; c + kWhole <= p.channels; c += kWhole) {
      largest_of_window<kUnroll, false>(p, from + c, lines, columns, pooled + c, index + c, kWidth);
    }
    for (; c + kWidth <= p.channels; c += kWidth) {
      largest_of_window<1, false>(p, from + c, lines, columns, pooled + c, index + c, kWidth);
    }
    const int lanes = static_cast<int>(p.channels - c);
    if (lanes > 0) largest_of_window<1, true>(p, from + c, lines, columns, pooled + c, index + c, lanes);
  }
}

// Σ over the windows that chose a pixel, in U vectors of channels; grad_again is added first and rounded.
template <int U, bool Partial, typename T>
static inline void gather_pixel(const MaxPool& p, const T* grad, const T* again, const uint8_t* index, int64_t line, int64_t column,
                                Span lines, Span columns, T* out, int lanes) {
  Vec sum[U];
  for (int u = 0; u < U; ++u) sum[u] = all(0);
  for (int64_t i = lines.first; i < lines.last; ++i) {
    const int64_t row = (line + p.padding - i * p.stride) * p.window;
    for (int64_t j = columns.first; j < columns.last; ++j) {
      const int place = static_cast<int>(row + column + p.padding - j * p.stride);
      const int64_t pooled = (i * p.pooled_width + j) * p.channels;
      for (int u = 0; u < U; ++u) {
        const int64_t at = pooled + u * kWidth;
        Vec each = get<Partial>(grad + at, lanes);
        if (again != nullptr) each = rounded<T>(add(each, get<Partial>(again + at, lanes)));
        if constexpr (Partial) {
          uint8_t bytes[kWidth] = {};
          for (int k = 0; k < lanes; ++k) bytes[k] = index[at + k];
          sum[u] = add(sum[u], keep_equal(bytes, place, each));
        } else {
          sum[u] = add(sum[u], keep_equal(index + at, place, each));
        }
      }
    }
  }
  for (int u = 0; u < U; ++u) put<Partial>(out + u * kWidth, sum[u], lanes);
}

template <typename T>
static void max_pool_gather_line(const MaxPool& p, const T* grad, const T* again, const uint8_t* index, int64_t line, T* out) {
  const Span lines = windows_of(line, p.pooled_height, p);
  for (int64_t w = 0; w < p.width; ++w, out += p.channels) {
    const Span columns = windows_of(w, p.pooled_width, p);
    const auto second = [&](int64_t c) { return again == nullptr ? nullptr : again + c; };
    int64_t c = 0;
    for (; c + kWhole <= p.channels; c += kWhole) {
      gather_pixel<kUnroll, false>(p, grad + c, second(c), index + c, line, w, lines, columns, out + c, kWidth);
    }
    for (; c + kWidth <= p.channels; c += kWidth) {
      gather_pixel<1, false>(p, grad + c, second(c), index + c, line, w, lines, columns, out + c, kWidth);
    }
    const int lanes = static_cast<int>(p.channels - c);
    if (lanes > 0) gather_pixel<1, true>(p, grad + c, second(c), index + c, line, w, lines, columns, out + c, lanes);
  }
}

static void max_pool(const MaxPool& p, const void* z, int64_t pooled_line, void* pooled, uint8_t* index) {
  const Span lines = inside(pooled_line, p.height, p);
  p.bfloat16 ? max_pool_line(p, static_cast<const Bf16*>(z), lines, static_cast<Bf16*>(pooled), index)
             : max_pool_line(p, static_cast<const float*>(z), lines, static_cast<float*>(pooled), index);
}

static void max_pool_gather(const MaxPool& p, const void* grad, const void* again, const uint8_t* index, int64_t line, void* out) {
  p.bfloat16
      ? max_pool_gather_line(p, static_cast<const Bf16*>(grad), static_cast<const Bf16*>(again), index, line, static_cast<Bf16*>(out))
      : max_pool_gather_line(p, static_cast<const float*>(grad), static_cast<const float*>(again), index, line, static_cast<float*>(out));
}

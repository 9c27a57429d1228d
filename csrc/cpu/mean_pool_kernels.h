// mean_pool on the vectors of one level, behind bn_act's prefetch; included inside its namespace. A line of windows at a time, channels
// innermost: the memory that a window takes comes in stretches of a few vectors.

constexpr int64_t kPixelsAhead = 8;  // that the memory is asked for before they are needed

// The mean of one window in U vectors of channels from `y` on.
template <int U, bool Partial, typename T>
static inline void mean_of_window(const MeanPool& p, const T* y, T* z, int lanes, Vec size) {
  const int64_t line = p.width * p.channels;
  Vec sum[U];
  for (int u = 0; u < U; ++u) sum[u] = all(0);
  for (int64_t a = 0; a < p.window; ++a) {
    const T* from = y + a * line;
    for (int64_t b = 0; b < p.window; ++b, from += p.channels) {
      prefetch<U>(from + kPixelsAhead * p.channels);
      for (int u = 0; u < U; ++u) sum[u] = add(sum[u], get<Partial>(from + u * kWidth, lanes));
    }
  }
  for (int u = 0; u < U; ++u) put<Partial>(z + u * kWidth, div(sum[u], size), lanes);
}

// The same share for every pixel of one window, in U vectors of channels.
template <int U, bool Partial, typename T>
static inline void share_of_window(const MeanPool& p, const T* grad_z, T* grad_y, int lanes, Vec size) {
  const int64_t line = p.width * p.channels;
  Vec share[U];
  for (int u = 0; u < U; ++u) share[u] = div(get<Partial>(grad_z + u * kWidth, lanes), size);
  for (int64_t a = 0; a < p.window; ++a) {
    T* to = grad_y + a * line;
    for (int64_t b = 0; b < p.window; ++b, to += p.channels) {
      for (int u = 0; u < U; ++u) put<Partial>(to + u * kWidth, share[u], lanes);
    }
  }
}

template <typename T>
static void mean_pool_line(const MeanPool& p, const T* y, T* z) {
  const Vec size = all(static_cast<float>(p.window * p.window));
  for (int64_t column = 0; column < p.width / p.window; ++column, y += p.window * p.channels, z += p.channels) {
    int64_t c = 0;
    for (; c + kUnroll * kWidth <= p.channels; c += kUnroll * kWidth) mean_of_window<kUnroll, false>(p, y + c, z + c, kWidth, size);
    for (; c + kWidth <= p.channels; c += kWidth) mean_of_window<1, false>(p, y + c, z + c, kWidth, size);
    if (c < p.channels) mean_of_window<1, true>(p, y + c, z + c, static_cast<int>(p.channels - c), size);
  }
}

// The last line of windows also clears the lines that no window covers.
template <typename T>
static void mean_pool_line_backward(const MeanPool& p, const T* grad_z, T* grad_y, bool last) {
  const int64_t line = p.width * p.channels, columns = p.width / p.window, covered = columns * p.window * p.channels;
  const Vec size = all(static_cast<float>(p.window * p.window));
  for (int64_t column = 0; column < columns; ++column, grad_z += p.channels) {
    T* const corner = grad_y + column * p.window * p.channels;
    int64_t c = 0;
    for (; c + kUnroll * kWidth <= p.channels; c += kUnroll * kWidth) {
      share_of_window<kUnroll, false>(p, grad_z + c, corner + c, kWidth, size);
    }
    for (; c + kWidth <= p.channels; c += kWidth) share_of_window<1, false>(p, grad_z + c, corner + c, kWidth, size);
    if (c < p.channels) share_of_window<1, true>(p, grad_z + c, corner + c, static_cast<int>(p.channels - c), size);
  }
  for (int64_t a = 0; a < p.window; ++a) {
    for (int64_t i = covered; i < line; ++i) grad_y[a * line + i] = 0;
  }
  if (last) {
    for (int64_t i = p.window * line; i < (p.window + p.height % p.window) * line; ++i) grad_y[i] = 0;
  }
}

static void mean_pool(const MeanPool& p, const void* y, void* z) {
  p.bfloat16 ? mean_pool_line(p, static_cast<const Bf16*>(y), static_cast<Bf16*>(z))
             : mean_pool_line(p, static_cast<const float*>(y), static_cast<float*>(z));
}

static void mean_pool_backward(const MeanPool& p, const void* grad_z, void* grad_y, bool last) {
  p.bfloat16 ? mean_pool_line_backward(p, static_cast<const Bf16*>(grad_z), static_cast<Bf16*>(grad_y), last)
             : mean_pool_line_backward(p, static_cast<const float*>(grad_z), static_cast<float*>(grad_y), last);
}

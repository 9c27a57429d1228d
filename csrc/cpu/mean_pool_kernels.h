// mean_pool on the vectors of one level; included inside its namespace. A line of windows at a time, channels innermost.

template <typename T>
static void mean_pool_line(const MeanPool& p, const T* y, T* z) {
  const int64_t line = p.width * p.channels;
  const Vec size = all(static_cast<float>(p.window * p.window));
  for (int64_t column = 0; column < p.width / p.window; ++column, y += p.window * p.channels, z += p.channels) {
    for (int64_t c = 0; c < p.channels; c += kWidth) {
      const int lanes = static_cast<int>(p.channels - c < kWidth ? p.channels - c : kWidth);
      Vec sum = all(0);
      for (int64_t a = 0; a < p.window; ++a) {
        const T* from = y + a * line + c;
        for (int64_t b = 0; b < p.window; ++b, from += p.channels) sum = add(sum, lanes == kWidth ? load(from) : load(from, lanes));
      }
      lanes == kWidth ? store(z + c, div(sum, size)) : store(z + c, div(sum, size), lanes);
    }
  }
}

// The last line of windows also clears the lines that no window covers.
template <typename T>
static void mean_pool_line_backward(const MeanPool& p, const T* grad_z, T* grad_y, bool last) {
  const int64_t line = p.width * p.channels, columns = p.width / p.window, covered = columns * p.window * p.channels;
  const Vec size = all(static_cast<float>(p.window * p.window));
  for (int64_t column = 0; column < columns; ++column, grad_z += p.channels) {
    T* const corner = grad_y + column * p.window * p.channels;
    for (int64_t c = 0; c < p.channels; c += kWidth) {
      const int lanes = static_cast<int>(p.channels - c < kWidth ? p.channels - c : kWidth);
      const Vec share = div(lanes == kWidth ? load(grad_z + c) : load(grad_z + c, lanes), size);
      for (int64_t a = 0; a < p.window; ++a) {
        T* to = corner + a * line + c;
        for (int64_t b = 0; b < p.window; ++b, to += p.channels) lanes == kWidth ? store(to, share) : store(to, share, lanes);
      }
    }
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

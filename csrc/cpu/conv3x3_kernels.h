// 3×3 convolutions by Winograd's F(T×T, 3×3), T = 2 or 4, on the vectors of one level; included inside its namespace. Lavin & Gray,
// arXiv 1509.09308:
//
//   Y = Aᵀ [ (G w Gᵀ) ∘ (Bᵀ d B) ] A      d: the (T+2)×(T+2) pixels around a tile Y of T×T; [·] is summed over the input channels
//   ∂L/∂w = Gᵀ [ (A ∂L/∂Y Aᵀ) ∘ (Bᵀ d B) ] G                                               summed over the tiles
//
// 16 products stand for 36, or 36 for 144. Channels are innermost, so that every entry of a transform is a vector of channels, and the
// products of one of the (T+2)² places are a matrix product. Sums over channels and over tiles are float32, in an order of their own: a
// tile's bits depend on no other tile, and those of a gradient on the size of a block alone.

// The transforms along one side of a tile.
template <int T>
struct Side;

// Through the points 0, 1, −1 and ∞.
template <>
struct Side<2> {
  static inline void pixels(const Vec* d, Vec* out) {  // Bᵀ d
    out[0] = sub(d[0], d[2]);
    out[1] = add(d[1], d[2]);
    out[2] = sub(d[2], d[1]);
    out[3] = sub(d[1], d[3]);
  }
  static inline void results(const Vec* m, Vec* out) {  // Aᵀ m
    out[0] = add(add(m[0], m[1]), m[2]);
    out[1] = sub(sub(m[1], m[2]), m[3]);
  }
  static inline void gradients(const Vec* g, Vec* out) {  // A g
    out[0] = g[0];
    out[1] = add(g[0], g[1]);
    out[2] = sub(g[0], g[1]);
    out[3] = sub(all(0), g[1]);
  }
  static inline void weights(const Vec* w, Vec* out) {  // G w
    const Vec outer = add(w[0], w[2]), half = all(0.5f);
    out[0] = w[0];
    out[1] = mul(half, add(outer, w[1]));
    out[2] = mul(half, sub(outer, w[1]));
    out[3] = w[2];
  }
  static inline void grad_weights(const Vec* m, Vec* out) {  // Gᵀ m
    const Vec half = all(0.5f), sum = mul(half, add(m[1], m[2]));
    out[0] = add(m[0], sum);
    out[1] = mul(half, sub(m[1], m[2]));
    out[2] = add(sum, m[3]);
  }
};

// Through the points 0, a, −a, b, −b and ∞. With a = 5/8 and b = 3/2 the error is half of that with 1 and 2, the usual ones, whose powers
// differ more.
template <>
struct Side<4> {
  static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;
  static constexpr float kZero = 1 / (a2 * b2), kA = 1 / (2 * a2 * (a2 - b2)), kB = 1 / (2 * b2 * (b2 - a2));  // G's scales

  static inline void pixels(const Vec* d, Vec* out) {  // Bᵀ d
    const Vec product = all(a2 * b2), sum = all(-(a2 + b2));
    const Vec even_a = fma(all(-b2), d[2], d[4]), odd_a = fma(all(-b2), d[1], d[3]);
    const Vec even_b = fma(all(-a2), d[2], d[4]), odd_b = fma(all(-a2), d[1], d[3]);
    out[0] = fma(product, d[0], fma(sum, d[2], d[4]));
    out[1] = fma(all(a), odd_a, even_a);
    out[2] = fma(all(-a), odd_a, even_a);
    out[3] = fma(all(b), odd_b, even_b);
    out[4] = fma(all(-b), odd_b, even_b);
    out[5] = fma(product, d[1], fma(sum, d[3], d[5]));
  }
  static inline void results(const Vec* m, Vec* out) {  // Aᵀ m
    const Vec even_a = add(m[1], m[2]), odd_a = sub(m[1], m[2]), even_b = add(m[3], m[4]), odd_b = sub(m[3], m[4]);
    out[0] = add(add(m[0], even_a), even_b);
    out[1] = fma(all(a), odd_a, mul(all(b), odd_b));
    out[2] = fma(all(a2), even_a, mul(all(b2), even_b));
    out[3] = fma(all(a2 * a), odd_a, fma(all(b2 * b), odd_b, m[5]));
  }
  static inline void gradients(const Vec* g, Vec* out) {  // A g
    const Vec even_a = fma(all(a2), g[2], g[0]), odd_a = mul(all(a), fma(all(a2), g[3], g[1]));
    const Vec even_b = fma(all(b2), g[2], g[0]), odd_b = mul(all(b), fma(all(b2), g[3], g[1]));
    out[0] = g[0];
    out[1] = add(even_a, odd_a);
    out[2] = sub(even_a, odd_a);
    out[3] = add(even_b, odd_b);
    out[4] = sub(even_b, odd_b);
    out[5] = g[3];
  }
  static inline void weights(const Vec* w, Vec* out) {  // G w
    const Vec even_a = mul(all(kA), fma(all(a2), w[2], w[0])), odd_a = mul(all(kA * a), w[1]);
    const Vec even_b = mul(all(kB), fma(all(b2), w[2], w[0])), odd_b = mul(all(kB * b), w[1]);
    out[0] = mul(all(kZero), w[0]);
    out[1] = add(even_a, odd_a);
    out[2] = sub(even_a, odd_a);
    out[3] = add(even_b, odd_b);
    out[4] = sub(even_b, odd_b);
    out[5] = w[2];
  }
  static inline void grad_weights(const Vec* m, Vec* out) {  // Gᵀ m
    const Vec even_a = mul(all(kA), add(m[1], m[2])), odd_a = mul(all(kA), sub(m[1], m[2]));
    const Vec even_b = mul(all(kB), add(m[3], m[4])), odd_b = mul(all(kB), sub(m[3], m[4]));
    out[0] = fma(all(kZero), m[0], add(even_a, even_b));
    out[1] = fma(all(a), odd_a, mul(all(b), odd_b));
    out[2] = fma(all(a2), even_a, fma(all(b2), even_b, m[5]));
  }
};

constexpr int kWinogradRows = 6 * (kWidth > 8 ? 2 : 1);  // of a product in registers at a time, beside two vectors of columns

static inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

struct Tile {
  int64_t image, top, left;  // of its own first pixel
};

template <int T>
static inline Tile tile_at(const Winograd& p, int64_t tile) {
  const int64_t per_image = p.tiles_high * p.tiles_wide, place = tile % per_image;
  return {tile / per_image, place / p.tiles_wide * T, place % p.tiles_wide * T};
}

// Bᵀ d B of a tile: its places, `stride` apart.
template <int T>
static inline void transform_pixels(const Winograd& p, int64_t number, float* out, int64_t stride) {
  constexpr int S = T + 2;
  const Tile tile = tile_at<T>(p, number);
  const float* const x = p.x + tile.image * p.height * p.width * p.inputs;
  const float* at[S * S];  // null outside of the image
  bool whole = true;
  for (int i = 0; i < S; ++i) {
    for (int j = 0; j < S; ++j) {
      const int64_t row = tile.top - 1 + i, column = tile.left - 1 + j;
      const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
      at[i * S + j] = inside ? x + (row * p.width + column) * p.inputs : nullptr;
      whole = whole && inside;
    }
  }
  for (int64_t c = 0; c < p.inputs; c += kWidth) {
    Vec half[S][S];
    for (int j = 0; j < S; ++j) {
      Vec d[S], each[S];
      if (whole) {
        for (int i = 0; i < S; ++i) d[i] = load(at[i * S + j] + c);
      } else {
        for (int i = 0; i < S; ++i) d[i] = at[i * S + j] ? load(at[i * S + j] + c) : all(0);
      }
      Side<T>::pixels(d, each);
      for (int i = 0; i < S; ++i) half[i][j] = each[i];
    }
    for (int i = 0; i < S; ++i) {
      Vec each[S];
      Side<T>::pixels(half[i], each);
      for (int j = 0; j < S; ++j) store(out + (i * S + j) * stride + c, each[j]);
    }
  }
}

// R rows of a times V vectors of columns of b, summed over the inner dimension: a[r·a_row + i·a_inner] · b[v][i·b_inner]; `Onto` what is
// there.
template <int R, int V, bool Onto>
static inline void multiply_rows(const float* a, int64_t a_row, int64_t a_inner, const float* const* b, int64_t b_inner, int64_t inner,
                                 float* out, int64_t out_row) {
  Vec sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = all(0);
  }
  for (int64_t i = 0; i < inner; ++i) {
    Vec columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(b[v] + i * b_inner);
    for (int r = 0; r < R; ++r) {
      const Vec each = all(a[r * a_row + i * a_inner]);
      for (int v = 0; v < V; ++v) sums[r][v] = fma(each, columns[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float* const to = out + r * out_row + v * kWidth;
      store(to, Onto ? add(load(to), sums[r][v]) : sums[r][v]);
    }
  }
}

// The same for the last rows, fewer than R + 1.
template <int R, int V, bool Onto>
static inline void multiply_last(int64_t rows, const float* a, int64_t a_row, int64_t a_inner, const float* const* b, int64_t b_inner,
                                 int64_t inner, float* out, int64_t out_row) {
  if constexpr (R > 0) {
    if (rows == R) {
      multiply_rows<R, V, Onto>(a, a_row, a_inner, b, b_inner, inner, out, out_row);
    } else {
      multiply_last<R - 1, V, Onto>(rows, a, a_row, a_inner, b, b_inner, inner, out, out_row);
    }
  }
}

template <int V, bool Onto>
static inline void multiply(int64_t rows, const float* a, int64_t a_row, int64_t a_inner, const float* const* b, int64_t b_inner,
                            int64_t inner, float* out, int64_t out_row) {
  constexpr int R = kWinogradRows;
  int64_t r = 0;
  for (; r + R <= rows; r += R) multiply_rows<R, V, Onto>(a + r * a_row, a_row, a_inner, b, b_inner, inner, out + r * out_row, out_row);
  multiply_last<R - 1, V, Onto>(rows - r, a + r * a_row, a_row, a_inner, b, b_inner, inner, out + r * out_row, out_row);
}

// Aᵀ m A + b of a tile for `count` of its outputs, from `first` on.
template <int T>
static inline void transform_products(const WinogradForward& p, int64_t number, const float* products, int64_t stride, int64_t first,
                                      int64_t count) {
  constexpr int S = T + 2;
  const Tile tile = tile_at<T>(p, number);
  float* const y = p.y + ((tile.image * p.height + tile.top) * p.width + tile.left) * p.outputs + first;
  const int64_t rows = smaller_of(T, p.height - tile.top), columns = smaller_of(T, p.width - tile.left);
  for (int64_t o = 0; o < count; o += kWidth) {
    Vec half[T][S];
    for (int j = 0; j < S; ++j) {
      Vec m[S], each[T];
      for (int i = 0; i < S; ++i) m[i] = load(products + (i * S + j) * stride + o);
      Side<T>::results(m, each);
      for (int i = 0; i < T; ++i) half[i][j] = each[i];
    }
    const Vec bias = p.bias ? load(p.bias + first + o) : all(0);
    for (int i = 0; i < rows; ++i) {
      Vec each[T];
      Side<T>::results(half[i], each);
      for (int j = 0; j < T; ++j) {
        if (j < columns) store(y + (i * p.width + j) * p.outputs + o, add(each[j], bias));
      }
    }
  }
}

// Bᵀ d B of the tiles `first` … `last` of a block of `tiles` that begins at `begin`.
template <int T>
static void see(const Winograd& p, int64_t begin, int64_t tiles, int64_t first, int64_t last, float* seen) {
  const int64_t row = p.inputs + kWinogradPadding;
  for (int64_t tile = first; tile < last; ++tile) transform_pixels<T>(p, begin + tile, seen + tile * row, tiles * row);
}

// A group of outputs from `first` on, two panels or the last one, of all tiles of that block.
template <int T>
static void convolve(const WinogradForward& p, int64_t begin, int64_t tiles, const float* seen, const float* weights, int64_t first,
                     float* products) {
  constexpr int64_t kPlaces = (T + 2) * (T + 2), kGroup = kWinogradGroup;
  const int64_t row = p.inputs + kWinogradPadding, place = tiles * row, panel_size = kPlaces * p.inputs * kWinogradPanel;
  const int64_t count = first + kGroup <= p.outputs ? kGroup : kWinogradPanel;
  for (int64_t k = 0; k < kPlaces; ++k) {
    const float *const a = seen + k * place, *const each = weights + k * kWinogradPanel * p.inputs;
    float* const to = products + k * tiles * kGroup;
    if constexpr (kWidth == kWinogradPanel) {
      const float* const panels[2] = {each, each + panel_size};
      count == kGroup ? multiply<2, false>(tiles, a, row, 1, panels, kWinogradPanel, p.inputs, to, kGroup)
                      : multiply<1, false>(tiles, a, row, 1, panels, kWinogradPanel, p.inputs, to, kGroup);
    } else {
      for (int64_t o = 0; o < count; o += 2 * kWidth) {
        const float* const start = each + o / kWinogradPanel * panel_size + o % kWinogradPanel;
        const float* const halves[2] = {start, start + kWidth};
        multiply<2, false>(tiles, a, row, 1, halves, kWinogradPanel, p.inputs, to + o, kGroup);
      }
    }
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    transform_products<T>(p, begin + tile, products + tile * kGroup, tiles * kGroup, first, count);
  }
}

static void winograd_pixels(const Winograd& p, int64_t begin, int64_t tiles, int64_t first, int64_t last, float* seen) {
  p.tile == 4 ? see<4>(p, begin, tiles, first, last, seen) : see<2>(p, begin, tiles, first, last, seen);
}

static void winograd(const WinogradForward& p, int64_t begin, int64_t tiles, const float* seen, const float* weights, int64_t first,
                     float* products) {
  p.tile == 4 ? convolve<4>(p, begin, tiles, seen, weights, first, products) : convolve<2>(p, begin, tiles, seen, weights, first, products);
}

// G w Gᵀ for a vector of outputs; w[i][j] lies at w[i·rows + j·columns].
template <int T>
static inline void transform_weights(const float* w, int64_t rows, int64_t columns, float* out, int64_t stride) {
  constexpr int S = T + 2;
  Vec half[S][3];
  for (int j = 0; j < 3; ++j) {
    const Vec taps[3] = {load(w + j * columns), load(w + rows + j * columns), load(w + 2 * rows + j * columns)};
    Vec each[S];
    Side<T>::weights(taps, each);
    for (int i = 0; i < S; ++i) half[i][j] = each[i];
  }
  for (int i = 0; i < S; ++i) {
    Vec each[S];
    Side<T>::weights(half[i], each);
    for (int j = 0; j < S; ++j) store(out + (i * S + j) * stride, each[j]);
  }
}

template <int T>
static void arrange(const WinogradWeights& p, int64_t begin, int64_t end) {
  constexpr int64_t P = kWinogradPanel, kPlaces = (T + 2) * (T + 2);
  const int64_t place = p.inputs * P;
  constexpr int64_t kFrom = 2 * P;  // inputs at a time: enough of a row that memory is read in order, few enough for the first cache
  float taps[9 * kFrom * P];        // of those inputs and P outputs, outputs innermost
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t from = 0; from < p.inputs; from += kFrom) {
      const int64_t count = smaller_of(kFrom, p.inputs - from);
      if (!p.transposed) {
        for (int64_t o = 0; o < P; ++o) {
          const float* const w = p.weight + (panel * P + o) * 9 * p.inputs + from;
          for (int64_t tap = 0; tap < 9; ++tap) {
            for (int64_t c = 0; c < count; ++c) taps[(tap * kFrom + c) * P + o] = w[tap * p.inputs + c];
          }
        }
      }
      for (int64_t c = 0; c < count; ++c) {
        float* const to = p.arranged + ((panel - p.first) * kPlaces * p.inputs + from + c) * P;
        // The gradient of an input is the convolution with the kernel turned by half a turn.
        const float* const turned = p.weight + ((from + c) * 9 + 8) * p.outputs + panel * P;
        for (int64_t o = 0; o < P; o += kWidth) {
          p.transposed ? transform_weights<T>(turned + o, -3 * p.outputs, -p.outputs, to + o, place)
                       : transform_weights<T>(taps + c * P + o, 3 * kFrom * P, kFrom * P, to + o, place);
        }
      }
    }
  }
}

static void winograd_weights(const WinogradWeights& p, int64_t begin, int64_t end) {
  p.tile == 4 ? arrange<4>(p, begin, end) : arrange<2>(p, begin, end);
}

// A g Aᵀ of a tile: its places, `stride` apart. Pixels outside of the image have no gradient.
template <int T>
static inline void transform_gradient(const WinogradGradient& p, int64_t number, float* out, int64_t stride) {
  constexpr int S = T + 2;
  const Tile tile = tile_at<T>(p, number);
  const float* const g = p.grad_y + ((tile.image * p.height + tile.top) * p.width + tile.left) * p.outputs;
  const int64_t rows = p.height - tile.top, columns = p.width - tile.left;
  for (int64_t o = 0; o < p.outputs; o += kWidth) {
    Vec half[S][T];
    for (int j = 0; j < T; ++j) {
      Vec each[T], out_of[S];
      for (int i = 0; i < T; ++i) each[i] = i < rows && j < columns ? load(g + (i * p.width + j) * p.outputs + o) : all(0);
      Side<T>::gradients(each, out_of);
      for (int i = 0; i < S; ++i) half[i][j] = out_of[i];
    }
    for (int i = 0; i < S; ++i) {
      Vec each[S];
      Side<T>::gradients(half[i], each);
      for (int j = 0; j < S; ++j) store(out + (i * S + j) * stride + o, each[j]);
    }
  }
}

template <int T>
static void transform_tiles(const WinogradGradient& p, int64_t start, int64_t first, int64_t count) {
  const int64_t x_row = p.inputs + kWinogradPadding, g_row = p.outputs + kWinogradPadding;
  for (int64_t tile = first; tile < first + count; ++tile) {
    transform_pixels<T>(p, tile, p.pixels + (tile - start) * x_row, p.block * x_row);
    transform_gradient<T>(p, tile, p.gradients + (tile - start) * g_row, p.block * g_row);
  }
}

static void winograd_transform(const WinogradGradient& p, int64_t start, int64_t first, int64_t count) {
  p.tile == 4 ? transform_tiles<4>(p, start, first, count) : transform_tiles<2>(p, start, first, count);
}

template <bool Onto>
static inline void multiply_place(const WinogradGradient& p, int64_t first, int64_t tiles, int64_t k, int64_t begin, int64_t end) {
  const int64_t x_row = p.inputs + kWinogradPadding, g_row = p.outputs + kWinogradPadding;
  const float *const x = p.pixels + (k * p.block + first) * x_row, *const g = p.gradients + (k * p.block + first) * g_row + begin;
  float* const to = p.products + (k * p.held + begin - p.first) * p.inputs;
  int64_t c = 0;
  for (; c + 2 * kWidth <= p.inputs; c += 2 * kWidth) {
    const float* const columns[2] = {x + c, x + c + kWidth};
    multiply<2, Onto>(end - begin, g, 1, g_row, columns, x_row, tiles, to + c, p.inputs);
  }
  for (; c < p.inputs; c += kWidth) {
    const float* const columns[1] = {x + c};
    multiply<1, Onto>(end - begin, g, 1, g_row, columns, x_row, tiles, to + c, p.inputs);
  }
}

static void winograd_product(const WinogradGradient& p, int64_t tiles, bool onto, int64_t k, int64_t begin, int64_t end) {
  constexpr int64_t kSummed = 128;  // tiles in one go: sums of sums round less than one long sum
  for (int64_t first = 0; first < tiles; first += kSummed) {
    const int64_t count = tiles - first < kSummed ? tiles - first : kSummed;
    onto || first > 0 ? multiply_place<true>(p, first, count, k, begin, end) : multiply_place<false>(p, first, count, k, begin, end);
  }
}

// Gᵀ m G
template <int T>
static void gradient_of_weights(const WinogradGradient& p, int64_t begin, int64_t end) {
  constexpr int S = T + 2;
  const int64_t place = p.held * p.inputs;
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t c = 0; c < p.inputs; c += kWidth) {
      const float* const products = p.products + (o - p.first) * p.inputs + c;
      Vec half[3][S];
      for (int j = 0; j < S; ++j) {
        Vec m[S], each[3];
        for (int i = 0; i < S; ++i) m[i] = load(products + (i * S + j) * place);
        Side<T>::grad_weights(m, each);
        for (int i = 0; i < 3; ++i) half[i][j] = each[i];
      }
      for (int i = 0; i < 3; ++i) {
        Vec each[3];
        Side<T>::grad_weights(half[i], each);
        for (int j = 0; j < 3; ++j) store(p.grad_weight + (o * 9 + i * 3 + j) * p.inputs + c, each[j]);
      }
    }
  }
}

static void winograd_grad_weight(const WinogradGradient& p, int64_t begin, int64_t end) {
  p.tile == 4 ? gradient_of_weights<4>(p, begin, end) : gradient_of_weights<2>(p, begin, end);
}

// 3×3 convolutions by Winograd's F(2×2, 3×3) on the vectors of one level; included inside its namespace. Lavin & Gray, arXiv 1509.09308:
//
//   Y = Aᵀ [ (G w Gᵀ) ∘ (Bᵀ d B) ] A      d: the 4×4 pixels around a tile Y of 2×2; [·] is summed over the input channels
//   ∂L/∂w = Gᵀ [ (A ∂L/∂Y Aᵀ) ∘ (Bᵀ d B) ] G                                               summed over the tiles
//
// 16 products stand for 36. Channels are innermost, so that every entry of a transform is a vector of channels, and the products of one
// of the 16 places are a matrix product. Sums over channels and over tiles are float32, in an order of their own: a tile's bits depend on
// no other tile, and those of a gradient on the size of a block alone.

constexpr int kWinogradRows = 6 * (kWidth > 8 ? 2 : 1);  // of a product in registers at a time, beside two vectors of columns

struct Tile {
  int64_t image, top, left;  // of its own first pixel
};

static inline Tile tile_at(const Winograd& p, int64_t tile) {
  const int64_t per_image = p.tiles_high * p.tiles_wide, place = tile % per_image;
  return {tile / per_image, place / p.tiles_wide * 2, place % p.tiles_wide * 2};
}

// Bᵀ d B of a tile: 16 places, `stride` apart.
static inline void transform_pixels(const Winograd& p, int64_t number, float* out, int64_t stride) {
  const Tile tile = tile_at(p, number);
  const float* const x = p.x + tile.image * p.height * p.width * p.inputs;
  const float* at[16];  // null outside of the image
  bool whole = true;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int64_t row = tile.top - 1 + i, column = tile.left - 1 + j;
      const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
      at[i * 4 + j] = inside ? x + (row * p.width + column) * p.inputs : nullptr;
      whole = whole && inside;
    }
  }
  for (int64_t c = 0; c < p.inputs; c += kWidth) {
    Vec half[16];
    for (int j = 0; j < 4; ++j) {
      Vec d[4];
      if (whole) {
        for (int i = 0; i < 4; ++i) d[i] = load(at[i * 4 + j] + c);
      } else {
        for (int i = 0; i < 4; ++i) d[i] = at[i * 4 + j] ? load(at[i * 4 + j] + c) : all(0);
      }
      half[j] = sub(d[0], d[2]);
      half[4 + j] = add(d[1], d[2]);
      half[8 + j] = sub(d[2], d[1]);
      half[12 + j] = sub(d[1], d[3]);
    }
    for (int i = 0; i < 4; ++i) {
      const Vec* const h = half + i * 4;
      float* const to = out + i * 4 * stride + c;
      store(to, sub(h[0], h[2]));
      store(to + stride, add(h[1], h[2]));
      store(to + 2 * stride, sub(h[2], h[1]));
      store(to + 3 * stride, sub(h[1], h[3]));
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
static inline void transform_products(const WinogradForward& p, int64_t number, const float* products, int64_t stride, int64_t first,
                                      int64_t count) {
  const Tile tile = tile_at(p, number);
  float* const y = p.y + ((tile.image * p.height + tile.top) * p.width + tile.left) * p.outputs + first;
  const bool below = tile.top + 1 < p.height, right = tile.left + 1 < p.width;
  for (int64_t o = 0; o < count; o += kWidth) {
    Vec half[8];
    for (int j = 0; j < 4; ++j) {
      const Vec m0 = load(products + j * stride + o), m1 = load(products + (4 + j) * stride + o);
      const Vec m2 = load(products + (8 + j) * stride + o), m3 = load(products + (12 + j) * stride + o);
      half[j] = add(add(m0, m1), m2);
      half[4 + j] = sub(sub(m1, m2), m3);
    }
    const Vec bias = p.bias ? load(p.bias + first + o) : all(0);
    for (int i = 0; i < (below ? 2 : 1); ++i) {
      const Vec* const h = half + i * 4;
      float* const to = y + i * p.width * p.outputs + o;
      store(to, add(add(add(h[0], h[1]), h[2]), bias));
      if (right) store(to + p.outputs, add(sub(sub(h[1], h[2]), h[3]), bias));
    }
  }
}

static void winograd(const WinogradForward& p, int64_t begin, int64_t end, float* room) {
  const int64_t tiles = end - begin, row = p.inputs + kWinogradPadding, place = tiles * row;
  constexpr int64_t kGroup = 2 * kWinogradPanel;  // outputs whose products are there at a time
  float *const seen = room, *const products = room + kWinogradPlaces * place;
  for (int64_t tile = 0; tile < tiles; ++tile) transform_pixels(p, begin + tile, seen + tile * row, place);
  const int64_t panel_size = p.inputs * kWinogradPanel;
  for (int64_t first = 0; first < p.outputs; first += kGroup) {
    const int64_t count = first + kGroup <= p.outputs ? kGroup : kWinogradPanel;
    for (int64_t k = 0; k < kWinogradPlaces; ++k) {
      const float *const a = seen + k * place, *const weights = p.weights + (k * p.outputs + first) * p.inputs;
      float* const to = products + k * tiles * kGroup;
      if constexpr (kWidth == kWinogradPanel) {
        const float* const panels[2] = {weights, weights + panel_size};
        count == kGroup ? multiply<2, false>(tiles, a, row, 1, panels, kWinogradPanel, p.inputs, to, kGroup)
                        : multiply<1, false>(tiles, a, row, 1, panels, kWinogradPanel, p.inputs, to, kGroup);
      } else {
        for (int64_t o = 0; o < count; o += 2 * kWidth) {
          const float* const start = weights + o / kWinogradPanel * panel_size + o % kWinogradPanel;
          const float* const halves[2] = {start, start + kWidth};
          multiply<2, false>(tiles, a, row, 1, halves, kWinogradPanel, p.inputs, to + o, kGroup);
        }
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      transform_products(p, begin + tile, products + tile * kGroup, tiles * kGroup, first, count);
    }
  }
}

// G w Gᵀ for a vector of outputs; w[i][j] lies at w[i·rows + j·columns].
static inline void transform_weights(const float* w, int64_t rows, int64_t columns, float* out, int64_t stride) {
  const Vec half = all(0.5f);
  Vec r[12];
  for (int j = 0; j < 3; ++j) {
    const Vec w0 = load(w + j * columns), w1 = load(w + rows + j * columns), w2 = load(w + 2 * rows + j * columns);
    const Vec outer = add(w0, w2);
    r[j] = w0;
    r[3 + j] = mul(half, add(outer, w1));
    r[6 + j] = mul(half, sub(outer, w1));
    r[9 + j] = w2;
  }
  for (int i = 0; i < 4; ++i) {
    const Vec* const each = r + i * 3;
    const Vec outer = add(each[0], each[2]);
    float* const to = out + i * 4 * stride;
    store(to, each[0]);
    store(to + stride, mul(half, add(outer, each[1])));
    store(to + 2 * stride, mul(half, sub(outer, each[1])));
    store(to + 3 * stride, each[2]);
  }
}

static void winograd_weights(const WinogradWeights& p, int64_t begin, int64_t end) {
  const int64_t place = p.inputs * p.outputs;
  constexpr int64_t P = kWinogradPanel;
  float taps[9 * P * P];  // of P inputs and P outputs, outputs innermost
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t from = 0; from < p.inputs; from += P) {
      if (!p.transposed) {
        for (int64_t o = 0; o < P; ++o) {
          const float* const w = p.weight + (panel * P + o) * 9 * p.inputs + from;
          for (int64_t tap = 0; tap < 9; ++tap) {
            for (int64_t c = 0; c < P; ++c) taps[(tap * P + c) * P + o] = w[tap * p.inputs + c];
          }
        }
      }
      for (int64_t c = 0; c < P; ++c) {
        float* const to = p.arranged + (panel * p.inputs + from + c) * P;
        // The gradient of an input is the convolution with the kernel turned by half a turn.
        const float* const turned = p.weight + ((from + c) * 9 + 8) * p.outputs + panel * P;
        for (int64_t o = 0; o < P; o += kWidth) {
          p.transposed ? transform_weights(turned + o, -3 * p.outputs, -p.outputs, to + o, place)
                       : transform_weights(taps + c * P + o, 3 * P * P, P * P, to + o, place);
        }
      }
    }
  }
}

// A g Aᵀ of a tile: 16 places, `stride` apart. Pixels outside of the image have no gradient.
static inline void transform_gradient(const WinogradGradient& p, int64_t number, float* out, int64_t stride) {
  const Tile tile = tile_at(p, number);
  const float* const g = p.grad_y + ((tile.image * p.height + tile.top) * p.width + tile.left) * p.outputs;
  const bool below = tile.top + 1 < p.height, right = tile.left + 1 < p.width;
  for (int64_t o = 0; o < p.outputs; o += kWidth) {
    const Vec g00 = load(g + o), g01 = right ? load(g + p.outputs + o) : all(0);
    const Vec g10 = below ? load(g + p.width * p.outputs + o) : all(0);
    const Vec g11 = below && right ? load(g + (p.width + 1) * p.outputs + o) : all(0);
    const Vec rows[4][2] = {
        {g00, g01}, {add(g00, g10), add(g01, g11)}, {sub(g00, g10), sub(g01, g11)}, {sub(all(0), g10), sub(all(0), g11)}};
    for (int i = 0; i < 4; ++i) {
      float* const to = out + i * 4 * stride + o;
      store(to, rows[i][0]);
      store(to + stride, add(rows[i][0], rows[i][1]));
      store(to + 2 * stride, sub(rows[i][0], rows[i][1]));
      store(to + 3 * stride, sub(all(0), rows[i][1]));
    }
  }
}

static void winograd_transform(const WinogradGradient& p, int64_t start, int64_t first, int64_t count) {
  const int64_t x_row = p.inputs + kWinogradPadding, g_row = p.outputs + kWinogradPadding;
  for (int64_t tile = first; tile < first + count; ++tile) {
    transform_pixels(p, tile, p.pixels + (tile - start) * x_row, p.block * x_row);
    transform_gradient(p, tile, p.gradients + (tile - start) * g_row, p.block * g_row);
  }
}

template <bool Onto>
static inline void multiply_place(const WinogradGradient& p, int64_t first, int64_t tiles, int64_t k, int64_t begin, int64_t end) {
  const int64_t x_row = p.inputs + kWinogradPadding, g_row = p.outputs + kWinogradPadding;
  const float *const x = p.pixels + (k * p.block + first) * x_row, *const g = p.gradients + (k * p.block + first) * g_row + begin;
  float* const to = p.products + (k * p.outputs + begin) * p.inputs;
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
static void winograd_grad_weight(const WinogradGradient& p, int64_t begin, int64_t end) {
  const int64_t place = p.outputs * p.inputs;
  const Vec half = all(0.5f);
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t c = 0; c < p.inputs; c += kWidth) {
      const float* const m = p.products + o * p.inputs + c;
      Vec rows[3][4];
      for (int j = 0; j < 4; ++j) {
        const Vec m0 = load(m + j * place), m1 = load(m + (4 + j) * place), m2 = load(m + (8 + j) * place), m3 = load(m + (12 + j) * place);
        const Vec sum = mul(half, add(m1, m2));
        rows[0][j] = add(m0, sum);
        rows[1][j] = mul(half, sub(m1, m2));
        rows[2][j] = add(sum, m3);
      }
      for (int i = 0; i < 3; ++i) {
        float* const to = p.grad_weight + (o * 9 + i * 3) * p.inputs + c;
        const Vec sum = mul(half, add(rows[i][1], rows[i][2]));
        store(to, add(rows[i][0], sum));
        store(to + p.inputs, mul(half, sub(rows[i][1], rows[i][2])));
        store(to + 2 * p.inputs, add(sum, rows[i][3]));
      }
    }
  }
}

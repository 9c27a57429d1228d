// The adjoint of view, a source line at a time, on the vectors of one level; included inside its namespace.

// Σ weight · seen line over the readers of the line, for some of its elements.
template <typename T>
static void blend_readers(const ViewAdjoint& p, int64_t begin, int64_t count, float* out) {
  const int64_t pitch = p.width * p.channels;
  const T* const seen = static_cast<const T*>(p.seen) + begin;
  const auto blended = [&](int64_t i, auto... lanes) {
    Vec total = all(0);
    for (int64_t k = 0; k < p.readers; ++k) total = fma(all(p.line_weight[k]), load(seen + p.line[k] * pitch + i, lanes...), total);
    store(out + i, total, lanes...);
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) blended(i);
  if (i < count) blended(i, static_cast<int>(count - i));
}

// Four channels at a time; what lies beyond the last one belongs to the next pixel, which is written later.
static void collect_columns(const ViewAdjoint& p) {
  typedef float Four __attribute__((vector_size(16)));
  const int64_t length = p.width * p.channels;
  for (int64_t x = 0; x < p.width; ++x) {
    for (int64_t c = 0; c < p.channels; c += 4) {
      Four total = {};
      for (int64_t entry = p.column_first[x]; entry < p.column_first[x + 1]; ++entry) {
        Four value;
        __builtin_memcpy(&value, p.room + p.column[entry] * p.channels + c, sizeof(value));
        total += p.column_weight[entry] * value;
      }
      const int64_t i = x * p.channels + c;
      if (i + 4 <= length) {
        __builtin_memcpy(p.out + i, &total, sizeof(total));
      } else {
        for (int64_t j = 0; i + j < length; ++j) p.out[i + j] = total[j];
      }
    }
  }
}

template <typename T>
static void view_adjoint_of(const ViewAdjoint& p) {
  const int64_t length = p.width * p.channels, rolled = p.roll * p.channels;
  if (p.column_first == nullptr) {
    blend_readers<T>(p, rolled, length - rolled, p.out);
    blend_readers<T>(p, 0, rolled, p.out + length - rolled);
  } else if (p.readers == 0) {
    for (int64_t i = 0; i < length; ++i) p.out[i] = 0;
  } else {
    blend_readers<T>(p, 0, length, p.room);
    collect_columns(p);
  }
}

static void view_adjoint(const ViewAdjoint& p) { p.bfloat16 ? view_adjoint_of<Bf16>(p) : view_adjoint_of<float>(p); }

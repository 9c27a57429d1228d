// The last channels, fewer than a vector, where the instruction set has no masks: through a buffer.
template <typename T>
static inline Vec load(const T* p, int count) {
  T buffer[kWidth] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <typename T>
static inline void store(T* p, Vec v, int count) {
  T buffer[kWidth];
  store(buffer, v);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

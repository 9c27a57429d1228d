// z[n, c, i, j] = (1/k²) Σ y[n, c, k·i + a, k·j + b] over 0 ≤ a, b < k;   ∂L/∂y is the gradient of its window, over k²; 0 outside of all.
//
// On channels-last tensors, others through a copy; sums are float32, line after line, so the bits do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/level.h"

namespace dwa_fast {
namespace {

constexpr int64_t kGrainElements = 8192;  // elements that are worth waking a thread for

void check(const at::Tensor& tensor, const char* name, int64_t window) {
  TORCH_CHECK(tensor.dim() == 4, name, " must be [N, C, H, W], got shape ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, name,
              " must be float32 or bfloat16 on a CPU, got ", tensor.scalar_type());
  TORCH_CHECK(window >= 1, "window must be at least 1, got ", window);
}

at::Tensor channels_last(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::empty(sizes, like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// Calls the kernel for every line of windows: with the lines of the larger tensor that they cover, and theirs of the smaller one.
template <typename Kernel>
void for_lines(const MeanPool& pool, int64_t images, const Kernel& kernel) {
  const int64_t lines = pool.height / pool.window;
  const int64_t line_elements = pool.window * pool.width * pool.channels;
  if (images * lines * line_elements == 0) return;
  at::parallel_for(0, images * lines, std::max<int64_t>(1, kGrainElements / line_elements), [&](int64_t begin, int64_t end) {
    for (int64_t each = begin; each < end; ++each) {
      const int64_t line = each % lines;
      const int64_t large = (each / lines * pool.height + line * pool.window) * pool.width * pool.channels;
      kernel(large, each * (pool.width / pool.window) * pool.channels, line == lines - 1);
    }
  });
}

template <typename T>
const T* at_element(const at::Tensor& tensor, int64_t element) {
  return reinterpret_cast<const T*>(static_cast<const char*>(tensor.const_data_ptr()) + element * tensor.element_size());
}

template <typename T>
T* at_element(at::Tensor& tensor, int64_t element) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + element * tensor.element_size());
}

at::Tensor mean_pool_forward(const at::Tensor& y_, int64_t window) {
  check(y_, "y", window);
  const at::Tensor y = y_.contiguous(at::MemoryFormat::ChannelsLast);
  const MeanPool pool{y.size(1), y.size(2), y.size(3), window, y.scalar_type() == at::kBFloat16};
  at::Tensor z = channels_last({y.size(0), y.size(1), y.size(2) / window, y.size(3) / window}, y);
  for_lines(pool, y.size(0),
            [&](int64_t large, int64_t small, bool) { kernels().mean_pool(pool, at_element<void>(y, large), at_element<void>(z, small)); });
  return z;
}

at::Tensor mean_pool_backward(const at::Tensor& grad_z_, int64_t window, int64_t height, int64_t width) {
  check(grad_z_, "grad_z", window);
  TORCH_CHECK(grad_z_.size(2) == height / window && grad_z_.size(3) == width / window, "grad_z must be [N, C, ", height / window, ", ",
              width / window, "], got shape ", grad_z_.sizes());
  const at::Tensor grad_z = grad_z_.contiguous(at::MemoryFormat::ChannelsLast);
  const MeanPool pool{grad_z.size(1), height, width, window, grad_z.scalar_type() == at::kBFloat16};
  at::Tensor grad_y = channels_last({grad_z.size(0), grad_z.size(1), height, width}, grad_z);
  if (height < window || width < window) return grad_y.zero_();
  for_lines(pool, grad_z.size(0), [&](int64_t large, int64_t small, bool last) {
    kernels().mean_pool_backward(pool, at_element<void>(grad_z, small), at_element<void>(grad_y, large), last);
  });
  return grad_y;
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def("mean_pool_forward(Tensor y, int window) -> Tensor");
  m.def("mean_pool_backward(Tensor grad_z, int window, int height, int width) -> Tensor");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) {
  m.impl("mean_pool_forward", TORCH_FN(dwa_fast::mean_pool_forward));
  m.impl("mean_pool_backward", TORCH_FN(dwa_fast::mean_pool_backward));
}

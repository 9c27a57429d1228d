// What makes matrix products of convolutions of channels-last features: their windows as rows, and weights turned by half a turn.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace dwa_fast {
namespace {

constexpr int64_t kGrainBytes = 64 * 1024;  // that are worth waking a thread for
constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

const char* bytes(const at::Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); }

int64_t grain(int64_t row) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row)); }

at::Tensor conv_windows(const at::Tensor& x_, int64_t kernel, int64_t stride) {
  TORCH_CHECK(x_.dim() == 4, "x must be [N, C, H, W], got shape ", x_.sizes());
  TORCH_CHECK(kernel >= 1 && kernel % 2 == 1, "kernel must be odd and at least 1, got ", kernel);
  TORCH_CHECK(stride >= 1, "stride must be at least 1, got ", stride);
  const at::Tensor x = x_.contiguous(kLayout);
  const int64_t height = x.size(2), width = x.size(3), rows = (height + stride - 1) / stride, columns = (width + stride - 1) / stride;
  at::Tensor result =
      at::empty({x.size(0) * rows * columns, kernel * kernel * x.size(1)}, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (result.numel() == 0) return result;
  const int64_t pixel = x.size(1) * x.element_size(), line = kernel * pixel, window = kernel * line;
  const char* const source = bytes(x);
  char* const target = static_cast<char*>(result.data_ptr());
  at::parallel_for(0, result.size(0), grain(window), [&](int64_t begin, int64_t end) {
    for (int64_t each = begin; each < end; ++each) {
      const int64_t left = each % columns * stride - kernel / 2, top = each / columns % rows * stride - kernel / 2;
      const char* const image = source + each / (columns * rows) * height * width * pixel;
      const int64_t first = std::max<int64_t>(0, -left), last = std::min(kernel, width - left);  // of the pixels of a line that exist
      for (int64_t k = 0; k < kernel; ++k) {
        char* const place = target + each * window + k * line;
        const int64_t y = top + k;
        if (y < 0 || y >= height) {
          std::memset(place, 0, line);
          continue;
        }
        std::memset(place, 0, first * pixel);
        std::memcpy(place + first * pixel, image + (y * width + left + first) * pixel, (last - first) * pixel);
        std::memset(place + last * pixel, 0, (kernel - last) * pixel);
      }
    }
  });
  return result;
}

at::Tensor conv_turned(const at::Tensor& weight_) {
  TORCH_CHECK(weight_.dim() == 4, "weight must be [O, C, K, L], got shape ", weight_.sizes());
  const at::Tensor weight = weight_.contiguous(kLayout);
  const int64_t outputs = weight.size(0), taps = weight.size(2) * weight.size(3), row = weight.size(1) * weight.element_size();
  at::Tensor result = at::empty({taps * outputs, weight.size(1)}, weight.options().memory_format(at::MemoryFormat::Contiguous));
  if (result.numel() == 0) return result;
  const char* const source = bytes(weight);
  char* const target = static_cast<char*>(result.data_ptr());
  at::parallel_for(0, taps * outputs, grain(row), [&](int64_t begin, int64_t end) {
    for (int64_t each = begin; each < end; ++each) {
      const int64_t tap = taps - 1 - each / outputs, output = each % outputs;
      std::memcpy(target + each * row, source + (output * taps + tap) * row, row);
    }
  });
  return result;
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def("conv_windows(Tensor x, int kernel, int stride) -> Tensor");
  m.def("conv_turned(Tensor weight) -> Tensor");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) {
  m.impl("conv_windows", TORCH_FN(dwa_fast::conv_windows));
  m.impl("conv_turned", TORCH_FN(dwa_fast::conv_turned));
}

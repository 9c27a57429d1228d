// sums = (Σ(y − m), Σ(y − m)²);   ∂L/∂y = gs₁ + 2 gs₂ (y − m)
//
// Contiguous and channels-last tensors are read where they are, others through a contiguous copy. Sums are float32 within a block of rows
// or a plane and float64 over them, in their order; both depend on the shape alone, so the bits do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/level.h"

namespace dwa_fast {
namespace {

constexpr int64_t kBlockRows = 256;       // at most: the error of a float32 sum of so few is near that of a pairwise one
constexpr int64_t kGrainElements = 8192;  // elements that are worth waking a thread for

// y as one pass reads it: `pieces` blocks of rows, or planes.
struct Features {
  Features(const at::Tensor& y_, const at::Tensor& mean_) {
    TORCH_CHECK(y_.dim() == 4, "y must be [N, C, H, W], got shape ", y_.sizes());
    TORCH_CHECK(y_.scalar_type() == at::kFloat || y_.scalar_type() == at::kBFloat16, "y must be float32 or bfloat16 on a CPU, got ",
                y_.scalar_type());
    TORCH_CHECK(mean_.dim() == 1 && mean_.size(0) == y_.size(1), "mean must be [C] with C = ", y_.size(1), ", got shape ", mean_.sizes());
    TORCH_CHECK(mean_.scalar_type() == at::kFloat, "mean must be float32, got ", mean_.scalar_type());
    TORCH_CHECK(mean_.device() == y_.device(), "mean must be on the device of y, ", y_.device(), ", got ", mean_.device());
    const bool single_channel = y_.size(1) == 1 && y_.is_contiguous();
    by_rows = y_.is_contiguous(at::MemoryFormat::ChannelsLast) && !single_channel;
    y = by_rows ? y_ : y_.contiguous();
    mean = mean_.contiguous();
    channels = y.size(1);
    const int64_t pixels = y.size(2) * y.size(3);
    const int64_t rows = y.size(0) * pixels;
    const int64_t about = std::max<int64_t>(1, (rows + kBlockRows - 1) / kBlockRows);
    arguments.rows = rows;
    arguments.channels = channels;
    arguments.block_rows = std::max<int64_t>(8, (rows + about - 1) / about);
    arguments.bfloat16 = y.scalar_type() == at::kBFloat16;
    arguments.y = y.const_data_ptr();
    arguments.mean = mean.const_data_ptr<float>();
    arguments.plane = by_rows ? 0 : pixels;
    if (y.numel() == 0) {
      pieces = 0;
    } else {
      pieces = by_rows ? (rows + arguments.block_rows - 1) / arguments.block_rows : y.size(0) * channels;
      grain = std::max<int64_t>(1, kGrainElements / (y.numel() / pieces));
    }
  }

  template <typename Function>
  void for_pieces(const Function& function) const {
    at::parallel_for(0, pieces, grain, function);
  }

  at::Tensor y, mean;
  Moments arguments{};
  bool by_rows;
  int64_t channels, pieces, grain = 1;
};

at::Tensor moments_forward(const at::Tensor& y, const at::Tensor& mean, const std::optional<at::Tensor>& given) {
  TORCH_CHECK(!given.has_value(), "on a CPU sums are complete: partials must not be given");
  Features features(y, mean);
  const int64_t channels = features.channels;
  const at::Tensor partials = at::empty({features.pieces * 2 * (features.by_rows ? channels : 1)}, features.y.options().dtype(at::kFloat));
  features.arguments.partials = partials.data_ptr<float>();
  features.for_pieces([&](int64_t begin, int64_t end) { kernels().moments(features.arguments, begin, end); });

  // [blocks, 2, C] of rows, [N·C, 2] of planes
  const float* const found = partials.const_data_ptr<float>();
  const int64_t groups = channels == 0 ? 0 : partials.numel() / (2 * channels);
  const int64_t next_channel = features.by_rows ? 1 : 2, next_moment = features.by_rows ? channels : 1;
  std::vector<double> total(2 * channels);
  for (int64_t group = 0; group < groups; ++group) {
    const float* const of_group = found + group * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      total[c] += of_group[c * next_channel];
      total[channels + c] += of_group[c * next_channel + next_moment];
    }
  }
  at::Tensor sums = at::empty({2, channels}, partials.options());
  std::copy(total.begin(), total.end(), sums.data_ptr<float>());
  return sums;
}

at::Tensor moments_backward(const at::Tensor& grad_sums, const at::Tensor& y, const at::Tensor& mean) {
  Features features(y, mean);
  TORCH_CHECK(grad_sums.dim() == 2 && grad_sums.size(0) == 2 && grad_sums.size(1) == features.channels, "grad_sums must be [2, ",
              features.channels, "], got shape ", grad_sums.sizes());
  TORCH_CHECK(grad_sums.scalar_type() == at::kFloat, "grad_sums must be float32, got ", grad_sums.scalar_type());
  const at::Tensor dense_sums = grad_sums.contiguous();
  at::Tensor grad_y = at::empty_like(features.y);
  features.arguments.grad_sums = dense_sums.const_data_ptr<float>();
  features.arguments.grad_y = grad_y.data_ptr();
  features.for_pieces([&](int64_t begin, int64_t end) { kernels().moments_backward(features.arguments, begin, end); });
  return grad_y;
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def("moments_forward(Tensor y, Tensor mean, Tensor(a!)? partials=None) -> Tensor");
  m.def("moments_backward(Tensor grad_sums, Tensor y, Tensor mean) -> Tensor");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) {
  m.impl("moments_forward", TORCH_FN(dwa_fast::moments_forward));
  m.impl("moments_backward", TORCH_FN(dwa_fast::moments_backward));
}

// The adjoint of view, Adam and the clamp, line by line: the gradient of the images lives in a buffer of one line.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/adam_clip.h"
#include "cpu/level.h"
#include "cpu/view.h"

namespace dwa_fast {
namespace {

constexpr int64_t kGrainElements = 16384;  // elements that are worth waking a thread for

void view_adam_clip_(at::Tensor& images, const at::Tensor& gradient, at::Tensor& exp_avg, at::Tensor& exp_avg_sq, const at::Tensor& rows,
                     const at::Tensor& learning_rates, const at::Tensor& step, const at::Tensor& low, const at::Tensor& high,
                     double loss_scale, double beta1, double beta2, double eps) {
  check_adam_clip(images, exp_avg, exp_avg_sq, learning_rates, step, low, high);
  TORCH_CHECK(gradient.sizes() == images.sizes(), "gradient must have the shape of images, ", images.sizes(), ", got ", gradient.sizes());
  TORCH_CHECK(gradient.scalar_type() == at::kFloat || gradient.scalar_type() == at::kBFloat16,
              "gradient must be float32 or bfloat16 on a CPU, got ", gradient.scalar_type());
  AdamClip shared = adam_clip_numbers(learning_rates, step, 1 / loss_scale, beta1, beta2, eps);
  if (images.numel() == 0) return;
  const Row row = read_row(rows, step, images.size(2), images.size(3));

  // Tensors that lie otherwise than channels-last are copied and copied back.
  constexpr auto kFormat = at::MemoryFormat::ChannelsLast;
  const at::Tensor seen = gradient.contiguous(kFormat);
  at::Tensor x = images.contiguous(kFormat), m = exp_avg.contiguous(kFormat), v = exp_avg_sq.contiguous(kFormat);

  const Adjoint adjoint(seen, row);
  const std::vector<float> lows = repeat(low, images.size(3)), highs = repeat(high, images.size(3));
  shared.bound_per_element = true;
  shared.low = lows.data();
  shared.high = highs.data();
  const int64_t lines = images.size(0) * images.size(2), length = images.size(1) * images.size(3);
  at::parallel_for(0, lines, std::max<int64_t>(1, kGrainElements / length), [&](int64_t begin, int64_t end) {
    std::vector<float> room(adjoint.room()), collected(length);
    for (int64_t line = begin; line < end; ++line) {
      adjoint.collect(line, room.data(), collected.data());
      AdamClip p = shared;
      p.images = x.data_ptr<float>() + line * length;
      p.gradient = collected.data();
      p.exp_avg = m.data_ptr<float>() + line * length;
      p.exp_avg_sq = v.data_ptr<float>() + line * length;
      kernels().adam_clip(p, length);
    }
  });
  if (!x.is_same(images)) images.copy_(x);
  if (!m.is_same(exp_avg)) exp_avg.copy_(m);
  if (!v.is_same(exp_avg_sq)) exp_avg_sq.copy_(v);
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) { m.impl("view_adam_clip_", TORCH_FN(dwa_fast::view_adam_clip_)); }

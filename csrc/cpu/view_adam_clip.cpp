// The adjoint of view, Adam and the clamp, line by line: the gradient of the images lives in a buffer of one line.
//
// m ← β₁m + (1−β₁)g,   v ← β₂v + (1−β₂)g²,   x ← clamp(x − lr_t · m/(1−β₁^(t+1)) / (√(v/(1−β₂^(t+1))) + ε), low_c, high_c)
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/pixel_shuffle.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/level.h"
#include "cpu/view.h"

namespace dwa_fast {
namespace {

constexpr int64_t kGrainElements = 16384;  // elements that are worth waking a thread for

void check_images(const at::Tensor& tensor, const char* name, const at::Tensor& images) {
  TORCH_CHECK(tensor.sizes() == images.sizes(), name, " must have the shape of images, ", images.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
}

void check_bound(const at::Tensor& tensor, const char* name, const at::Tensor& images) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == images.size(1), name, " must be [C] with C = ", images.size(1), ", got shape ",
              tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
}

void check_state(const at::Tensor& images, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& learning_rates,
                 const at::Tensor& step, const at::Tensor& low, const at::Tensor& high) {
  TORCH_CHECK(images.dim() == 4, "images must be [N, C, H, W], got shape ", images.sizes());
  check_images(images, "images", images);
  check_images(exp_avg, "exp_avg", images);
  check_images(exp_avg_sq, "exp_avg_sq", images);
  TORCH_CHECK(learning_rates.dim() == 1 && learning_rates.scalar_type() == at::kFloat, "learning_rates must be Float [T], got ",
              learning_rates.scalar_type(), " ", learning_rates.sizes());
  TORCH_CHECK(step.dim() == 0 && step.scalar_type() == at::kLong, "step must be a Long scalar, got ", step.scalar_type(), " ",
              step.sizes());
  check_bound(low, "low", images);
  check_bound(high, "high", images);
}

// The numbers of this step, without the elements that it is for.
AdamClip adam_clip_numbers(const at::Tensor& learning_rates, const at::Tensor& step, double gradient_scale, double beta1, double beta2,
                           double eps) {
  const int64_t t = *step.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(0 <= t && t < learning_rates.size(0), "step must be a row of learning_rates, 0 to ", learning_rates.size(0) - 1,
                    ", got ", t);
  const auto steps = static_cast<double>(t + 1);
  AdamClip numbers{};
  numbers.gradient_scale = static_cast<float>(gradient_scale);
  numbers.one_minus_beta1 = static_cast<float>(1 - beta1);
  numbers.beta2 = static_cast<float>(beta2);
  numbers.one_minus_beta2 = static_cast<float>(1 - beta2);
  numbers.eps = static_cast<float>(eps);
  numbers.rate = static_cast<float>(learning_rates.const_data_ptr<float>()[t * learning_rates.stride(0)] / (1 - std::pow(beta1, steps)));
  numbers.inverse2 = static_cast<float>(1 / (1 - std::pow(beta2, steps)));
  return numbers;
}

// The channels' bounds over and over: one per element of a line.
std::vector<float> repeat(const at::Tensor& bounds, int64_t times) {
  const at::Tensor dense = bounds.contiguous();
  const float* first = dense.const_data_ptr<float>();
  std::vector<float> result;
  result.reserve(bounds.size(0) * times);
  for (int64_t i = 0; i < times; ++i) result.insert(result.end(), first, first + bounds.size(0));
  return result;
}

// The gradient as the images have it, [N, C, H, W]: it may also come as blocks of pixels, [N, C, H/2, 2, W/2, 2].
at::Tensor of_pixels(const at::Tensor& gradient, const at::Tensor& images) {
  constexpr int64_t kBlock = 2;
  const int64_t count = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  const bool even = height % kBlock == 0 && width % kBlock == 0;
  const bool blocks = even && gradient.sizes() == at::IntArrayRef({count, channels, height / kBlock, kBlock, width / kBlock, kBlock});
  TORCH_CHECK(blocks || gradient.sizes() == images.sizes(), "gradient must have the shape of images, ", images.sizes(),
              ", or that of their 2×2 blocks, got ", gradient.sizes());
  if (!blocks) return gradient;
  return at::pixel_shuffle(gradient.permute({0, 1, 3, 5, 2, 4}).flatten(1, 3), kBlock);
}

void view_adam_clip_(at::Tensor& images, const at::Tensor& gradient, at::Tensor& exp_avg, at::Tensor& exp_avg_sq, const at::Tensor& rows,
                     const at::Tensor& learning_rates, const at::Tensor& step, const at::Tensor& low, const at::Tensor& high,
                     double loss_scale, double beta1, double beta2, double eps) {
  check_state(images, exp_avg, exp_avg_sq, learning_rates, step, low, high);
  const at::Tensor given = of_pixels(gradient, images);
  TORCH_CHECK(gradient.scalar_type() == at::kFloat || gradient.scalar_type() == at::kBFloat16,
              "gradient must be float32 or bfloat16 on a CPU, got ", gradient.scalar_type());
  AdamClip shared = adam_clip_numbers(learning_rates, step, 1 / loss_scale, beta1, beta2, eps);
  if (images.numel() == 0) return;
  const Row row = read_row(rows, step, images.size(2), images.size(3));

  // Tensors that lie otherwise than channels-last are copied and copied back.
  constexpr auto kFormat = at::MemoryFormat::ChannelsLast;
  const at::Tensor seen = given.contiguous(kFormat);
  at::Tensor x = images.contiguous(kFormat), m = exp_avg.contiguous(kFormat), v = exp_avg_sq.contiguous(kFormat);

  const Adjoint adjoint(seen, row);
  const std::vector<float> lows = repeat(low, images.size(3)), highs = repeat(high, images.size(3));
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

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def(
      "view_adam_clip_(Tensor(a!) images, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor rows, Tensor learning_rates, "
      "Tensor step, Tensor low, Tensor high, float loss_scale, float beta1, float beta2, float eps) -> ()");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) { m.impl("view_adam_clip_", TORCH_FN(dwa_fast::view_adam_clip_)); }

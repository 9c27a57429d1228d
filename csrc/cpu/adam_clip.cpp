// m ← β₁m + (1−β₁)g,   v ← β₂v + (1−β₂)g²,   x ← clamp(x − lr_t · m/(1−β₁^(t+1)) / (√(v/(1−β₂^(t+1))) + ε), low_c, high_c)
#include "cpu/adam_clip.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/level.h"

namespace dwa_fast {
namespace {

constexpr int64_t kStretch = 4096;         // elements of a stretch, about, where the channels are innermost
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

}  // namespace

void check_adam_clip(const at::Tensor& images, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& learning_rates,
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

std::vector<float> repeat(const at::Tensor& bounds, int64_t times) {
  const at::Tensor dense = bounds.contiguous();
  const float* first = dense.const_data_ptr<float>();
  std::vector<float> result;
  result.reserve(bounds.size(0) * times);
  for (int64_t i = 0; i < times; ++i) result.insert(result.end(), first, first + bounds.size(0));
  return result;
}

namespace {

void adam_clip_(at::Tensor& images, const at::Tensor& gradient, at::Tensor& exp_avg, at::Tensor& exp_avg_sq,
                const at::Tensor& learning_rates, const at::Tensor& step, const at::Tensor& low, const at::Tensor& high, double beta1,
                double beta2, double eps) {
  check_adam_clip(images, exp_avg, exp_avg_sq, learning_rates, step, low, high);
  check_images(gradient, "gradient", images);
  AdamClip shared = adam_clip_numbers(learning_rates, step, 1, beta1, beta2, eps);
  if (images.numel() == 0) return;

  // Tensors that lie otherwise than channels-last or contiguous, or otherwise than the images, are copied and copied back.
  const bool innermost = !images.is_contiguous() && images.is_contiguous(at::MemoryFormat::ChannelsLast);
  const auto format = innermost ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor g = gradient.contiguous(format);
  at::Tensor x = images.contiguous(format), m = exp_avg.contiguous(format), v = exp_avg_sq.contiguous(format);

  const at::Tensor dense_low = low.contiguous(), dense_high = high.contiguous();
  const float* lows = dense_low.const_data_ptr<float>();
  const float* highs = dense_high.const_data_ptr<float>();
  const int64_t channels = images.size(1), pixels = images.size(2) * images.size(3);
  const int64_t times = std::max<int64_t>(1, kStretch / channels);
  const std::vector<float> all_low = innermost ? repeat(low, times) : std::vector<float>();
  const std::vector<float> all_high = innermost ? repeat(high, times) : std::vector<float>();
  const int64_t stretch = innermost ? channels * times : pixels;
  shared.bound_per_element = innermost;

  const int64_t count = x.numel();
  const int64_t stretches = (count + stretch - 1) / stretch;
  at::parallel_for(0, stretches, std::max<int64_t>(1, kGrainElements / stretch), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      AdamClip p = shared;
      const int64_t first = i * stretch;
      p.images = x.data_ptr<float>() + first;
      p.gradient = g.const_data_ptr<float>() + first;
      p.exp_avg = m.data_ptr<float>() + first;
      p.exp_avg_sq = v.data_ptr<float>() + first;
      p.low = innermost ? all_low.data() : lows + i % channels;
      p.high = innermost ? all_high.data() : highs + i % channels;
      kernels().adam_clip(p, std::min(stretch, count - first));
    }
  });
  if (!x.is_same(images)) images.copy_(x);
  if (!m.is_same(exp_avg)) exp_avg.copy_(m);
  if (!v.is_same(exp_avg_sq)) exp_avg_sq.copy_(v);
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) { m.impl("adam_clip_", TORCH_FN(dwa_fast::adam_clip_)); }

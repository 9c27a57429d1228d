// What the operators that begin with a BatchNorm share: the layer, its activation, and their checks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/slice.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace dwa_fast {

using OptionalTensor = std::optional<at::Tensor>;

inline constexpr std::array<const char*, 8> kActivations = {"none",      "relu", "relu6",     "silu",
                                                            "hardswish", "gelu", "gelu_tanh", "leaky_relu"};

inline constexpr int64_t kBlockRows = 256;       // at most: the error of a float32 sum of so few is near that of a pairwise one
inline constexpr int64_t kGrainElements = 8192;  // elements that are worth waking a thread for

inline void check_channels(const at::Tensor& tensor, const char* name, const at::Tensor& y) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == y.size(1), name, " must be [C] with C = ", y.size(1), ", got shape ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == y.device(), name, " must be on the device of y, ", y.device(), ", got ", tensor.device());
}

inline void check_like(const at::Tensor& tensor, const char* name, const at::Tensor& y) {
  TORCH_CHECK(tensor.sizes() == y.sizes(), name, " must have the shape of y, ", y.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == y.scalar_type(), name, " must have the precision of y, ", y.scalar_type(), ", got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.device() == y.device(), name, " must be on the device of y, ", y.device(), ", got ", tensor.device());
}

// A gradient that a later layer has left unwritten is put together on a GPU alone.
inline void check_nothing_left(const OptionalTensor& grad_later, const OptionalTensor& later_mask) {
  TORCH_CHECK(!grad_later.has_value() && !later_mask.has_value(),
              "on a CPU gradients are whole: grad_later and later_mask must not be given");
}

// An activation by its name, and the slope per channel that kLeakyRelu alone has.
struct Act {
  Act(c10::string_view name, const OptionalTensor& slope_, const at::Tensor& y) {
    const auto found = std::find(kActivations.begin(), kActivations.end(), name);
    TORCH_CHECK(found != kActivations.end(), "activation must be none, relu, relu6, silu, hardswish, gelu, gelu_tanh or leaky_relu, got ",
                name);
    kind = static_cast<Activation>(found - kActivations.begin());
    const bool leaky = kind == Activation::kLeakyRelu;
    TORCH_CHECK(slope_.has_value() == leaky,
                leaky ? "activation leaky_relu needs a slope" : "slope belongs to activation leaky_relu alone");
    if (!leaky) return;
    const int64_t count = slope_->numel();
    TORCH_CHECK(slope_->dim() == 1 && (count == 1 || count == y.size(1)), "slope must be [1] or [C] with C = ", y.size(1), ", got shape ",
                slope_->sizes());
    TORCH_CHECK(slope_->scalar_type() == at::kFloat, "slope must be float32, got ", slope_->scalar_type());
    TORCH_CHECK(slope_->device() == y.device(), "slope must be on the device of y, ", y.device(), ", got ", slope_->device());
    shared = count == 1;
    slope = slope_->expand({y.size(1)}).contiguous();
  }

  // Of the slope, from its gradient per channel
  at::Tensor gradient(const double* of_channels) const {
    const double* const last = of_channels + slope.numel();
    at::Tensor result = at::empty({shared ? 1 : slope.numel()}, slope.options());
    if (shared) {
      result.data_ptr<float>()[0] = static_cast<float>(std::accumulate(of_channels, last, 0.0));
    } else {
      std::copy(of_channels, last, result.data_ptr<float>());
    }
    return result;
  }

  Activation kind;
  bool shared = false;  // one slope for all channels
  at::Tensor slope;     // [C]
};

// y and the vectors of a layer as one pass reads them; it owns what the pointers of `fill` point into.
struct Layer {
  // `names` are what mean_, var_, weight_ and bias_ are called
  Layer(const at::Tensor& y_, const at::Tensor& mean_, const at::Tensor& var_, const OptionalTensor& weight_, const OptionalTensor& bias_,
        double eps, const std::array<const char*, 4>& names = {"mean", "var", "weight", "bias"}) {
    TORCH_CHECK(y_.dim() == 4, "y must be [N, C, H, W], got shape ", y_.sizes());
    TORCH_CHECK(y_.scalar_type() == at::kFloat || y_.scalar_type() == at::kBFloat16, "y must be float32 or bfloat16 on a CPU, got ",
                y_.scalar_type());
    check_channels(mean_, names[0], y_);
    check_channels(var_, names[1], y_);
    if (weight_.has_value()) check_channels(*weight_, names[2], y_);
    if (bias_.has_value()) check_channels(*bias_, names[3], y_);
    y = y_.contiguous(at::MemoryFormat::ChannelsLast);
    mean = mean_.contiguous();
    if (bias_.has_value()) bias = bias_->contiguous();
    set_scale(var_, weight_, eps);
    channels = y.size(1);
    rows = y.size(0) * y.size(2) * y.size(3);
    const int64_t about = std::max<int64_t>(1, (rows + kBlockRows - 1) / kBlockRows);
    block_rows = std::max<int64_t>(8, ((rows + about - 1) / about + 7) / 8 * 8);
    blocks = channels == 0 ? 0 : (rows + block_rows - 1) / block_rows;
  }

  void fill(BnAct& p, const Act& act) const {
    p.rows = rows;
    p.channels = channels;
    p.block_rows = block_rows;
    p.bfloat16 = y.scalar_type() == at::kBFloat16;
    p.activation = act.kind;
    p.slope = act.slope.defined() ? act.slope.const_data_ptr<float>() : nullptr;
    p.y = y.const_data_ptr();
    p.mean = mean.const_data_ptr<float>();
    p.scale = scale.const_data_ptr<float>();
    p.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  }

  void set_scale(const at::Tensor& var, const OptionalTensor& weight, double eps) {
    scale = at::empty({y.size(1)}, mean.options());
    const at::Tensor dense_weight = weight.has_value() ? weight->contiguous() : at::Tensor();
    const at::Tensor dense_var = var.contiguous();
    const float* v = dense_var.const_data_ptr<float>();
    const float* w = dense_weight.defined() ? dense_weight.const_data_ptr<float>() : nullptr;
    float* a = scale.data_ptr<float>();
    deviation.resize(y.size(1));
    for (size_t c = 0; c < deviation.size(); ++c) {
      deviation[c] = std::sqrt(v[c] + eps);
      a[c] = static_cast<float>((w == nullptr ? 1 : w[c]) / deviation[c]);
    }
  }

  int64_t mask_bytes() const { return (rows * channels + 7) / 8; }

  // function(first block, the one after the last), on several threads
  template <typename Function>
  void for_blocks(const Function& function) const {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, block_rows * channels));
    at::parallel_for(0, blocks, grain, function);
  }

  // The blocks' sums together, [·, C], one row after the other
  template <typename Sum>
  std::vector<double> total(const at::Tensor& partials) const {
    const int64_t width = partials.size(1) * channels;
    std::vector<double> sums(width);
    const Sum* block = partials.const_data_ptr<Sum>();
    for (int64_t i = 0; i < blocks; ++i, block += width) {
      for (int64_t c = 0; c < width; ++c) sums[c] += block[c];
    }
    return sums;
  }

  at::Tensor y, mean, scale, bias;
  std::vector<double> deviation;  // √(v + ε)
  int64_t rows, channels, block_rows, blocks;
};

// A new tensor as a caller sees it, with y's strides, and as a pass writes it, channels-last: one and the same where y allows.
struct Result {
  explicit Result(const at::Tensor& y) : seen(at::empty_like(y)) {
    constexpr auto kFormat = at::MemoryFormat::ChannelsLast;
    written = seen.is_contiguous(kFormat) ? seen : at::empty(y.sizes(), y.options().memory_format(kFormat));
  }
  at::Tensor finish() {
    if (!written.is_same(seen)) seen.copy_(written);
    return seen;
  }
  at::Tensor seen, written;
};

// Like y, channels-last; undefined without a tensor
inline at::Tensor dense_like(const OptionalTensor& tensor, const char* name, const at::Tensor& y) {
  if (!tensor.has_value()) return {};
  check_like(*tensor, name, y);
  return tensor->contiguous(at::MemoryFormat::ChannelsLast);
}

// Of the second use of z, where there is one: the pixels in every `stride`-th row and column of it, [N, C, ⌈H/s⌉, ⌈W/s⌉]
struct SecondGradient {
  SecondGradient(const OptionalTensor& grad_again, int64_t stride, const at::Tensor& y) {
    TORCH_CHECK(stride >= 1, "alias_stride must be at least 1, got ", stride);
    const at::Tensor seen = at::slice(at::slice(y, 2, 0, std::nullopt, stride), 3, 0, std::nullopt, stride);
    dense = dense_like(grad_again, "grad_again", seen);
    given = {dense.defined() ? dense.const_data_ptr() : nullptr, stride, y.size(2), y.size(3)};
  }
  at::Tensor dense;
  GradAgain given;
};

// [rows, C], float32: the first sums of a layer
inline at::Tensor rows_of(const std::vector<double>& sums, int64_t rows, const Layer& layer) {
  at::Tensor result = at::empty({rows, layer.channels}, layer.mean.options());
  std::copy(sums.begin(), sums.begin() + rows * layer.channels, result.data_ptr<float>());
  return result;
}

// The gradient of the sums, [2, C]; undefined without one
inline at::Tensor dense_sums_of(const OptionalTensor& grad_sums, const Layer& layer) {
  if (!grad_sums.has_value()) return {};
  TORCH_CHECK(grad_sums->dim() == 2 && grad_sums->size(0) == 2 && grad_sums->size(1) == layer.channels, "grad_sums must be [2, ",
              layer.channels, "], got shape ", grad_sums->sizes());
  TORCH_CHECK(grad_sums->scalar_type() == at::kFloat, "grad_sums must be float32, got ", grad_sums->scalar_type());
  return grad_sums->contiguous();
}

// From the blocks' sums, [blocks, 2 or 3, C], if any: the gradients of γ and β, [2, C], and of the slope; empty where there are none.
inline std::pair<at::Tensor, at::Tensor> parameter_gradients(const at::Tensor& partials, const Layer& layer, const Act& act) {
  at::Tensor of_parameters = at::empty({0}, layer.mean.options()), of_slope = at::empty({0}, layer.mean.options());
  if (partials.defined()) {
    std::vector<double> sums = layer.total<double>(partials);
    for (int64_t c = 0; c < layer.channels; ++c) sums[c] /= layer.deviation[c];
    of_parameters = rows_of(sums, 2, layer);
    if (act.slope.defined()) of_slope = act.gradient(sums.data() + 2 * layer.channels);
  }
  return {of_parameters, of_slope};
}

}  // namespace dwa_fast

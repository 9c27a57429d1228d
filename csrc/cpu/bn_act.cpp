// z = f(x),   x = a(y − m) + β [+ skip],   sums = (Σ(y − m), Σ(y − m)²);   ∂L/∂y = f'(x)·a·gz + gs₁ + 2 gs₂ (y − m),   a = γ/√(v + ε)
//
// Channels-last tensors are read where they are, others through a channels-last copy. Sums are float32 within a block of rows
// (those of the weights' gradients, which cancel, over a few rows) and float64 over the blocks, in their order; the blocks depend on the
// shape alone, so the bits do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/level.h"

namespace dwa_fast {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::array<const char*, 8> kActivations = {"none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu"};

constexpr int64_t kBlockRows = 256;       // at most: float32 sums of so few stay as exact as a tree of them
constexpr int64_t kGrainElements = 8192;  // elements that are worth waking a thread for

void check_channels(const at::Tensor& tensor, const char* name, const at::Tensor& y) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == y.size(1), name, " must be [C] with C = ", y.size(1), ", got shape ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == y.device(), name, " must be on the device of y, ", y.device(), ", got ", tensor.device());
}

void check_like(const at::Tensor& tensor, const char* name, const at::Tensor& y) {
  TORCH_CHECK(tensor.sizes() == y.sizes(), name, " must have the shape of y, ", y.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == y.scalar_type(), name, " must have the precision of y, ", y.scalar_type(), ", got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.device() == y.device(), name, " must be on the device of y, ", y.device(), ", got ", tensor.device());
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
  Layer(const at::Tensor& y_, const at::Tensor& mean_, const at::Tensor& var_, const OptionalTensor& weight_, const OptionalTensor& bias_,
        double eps) {
    TORCH_CHECK(y_.dim() == 4, "y must be [N, C, H, W], got shape ", y_.sizes());
    TORCH_CHECK(y_.scalar_type() == at::kFloat || y_.scalar_type() == at::kBFloat16, "y must be float32 or bfloat16 on a CPU, got ",
                y_.scalar_type());
    check_channels(mean_, "mean", y_);
    check_channels(var_, "var", y_);
    if (weight_.has_value()) check_channels(*weight_, "weight", y_);
    if (bias_.has_value()) check_channels(*bias_, "bias", y_);
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
at::Tensor dense_like(const OptionalTensor& tensor, const char* name, const at::Tensor& y) {
  if (!tensor.has_value()) return {};
  check_like(*tensor, name, y);
  return tensor->contiguous(at::MemoryFormat::ChannelsLast);
}

// [rows, C], float32: the first sums of a layer
at::Tensor rows_of(const std::vector<double>& sums, int64_t rows, const Layer& layer) {
  at::Tensor result = at::empty({rows, layer.channels}, layer.mean.options());
  std::copy(sums.begin(), sums.begin() + rows * layer.channels, result.data_ptr<float>());
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_act_forward(const at::Tensor& y, const at::Tensor& mean, const at::Tensor& var,
                                                              const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                              const OptionalTensor& skip, c10::string_view activation,
                                                              const OptionalTensor& slope, const OptionalTensor& partials) {
  TORCH_CHECK(!partials.has_value(), "on a CPU sums are complete: partials must not be given");
  const Layer layer(y, mean, var, weight, bias, eps);
  const Act act(activation, slope, y);
  const at::Tensor dense_skip = dense_like(skip, "skip", y);
  Result z(y);
  const bool masks = skip.has_value() && act.kind == Activation::kRelu;
  at::Tensor mask = at::empty({masks ? layer.mask_bytes() : 0}, y.options().dtype(at::kByte));
  at::Tensor of_blocks = at::empty({layer.blocks, 2, layer.channels}, y.options().dtype(at::kFloat));

  BnActForward p{};
  layer.fill(p, act);
  p.skip = dense_skip.defined() ? dense_skip.const_data_ptr() : nullptr;
  p.z = z.written.data_ptr();
  p.mask = mask.data_ptr<uint8_t>();
  p.partials = of_blocks.data_ptr<float>();
  layer.for_blocks([&](int64_t begin, int64_t end) { kernels().bn_act_forward(p, begin, end); });
  return {z.finish(), rows_of(layer.total<float>(of_blocks), 2, layer), mask};
}

void check_mask(const at::Tensor& mask, const Layer& layer, bool masks) {
  const int64_t bytes = masks ? layer.mask_bytes() : 0;
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.dim() == 1 && mask.is_contiguous() && mask.numel() == bytes,
              "mask must be what bn_act_forward returned, uint8 [", bytes, "], got ", mask.scalar_type(), " ", mask.sizes());
}

// The gradient of z is grad_z, or its sum with grad_again, rounded. With `parameters` also (Σ g·(y − m)/√(v + ε), Σ g), [2, C], g =
// f'(x)·gz: the gradients of γ and β; and that of the slope, shaped like it
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_act_backward(
    const at::Tensor& grad_z, const OptionalTensor& grad_sums, const at::Tensor& y, const at::Tensor& mean, const at::Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const OptionalTensor& skip, const at::Tensor& mask, bool has_skip,
    c10::string_view activation, const OptionalTensor& slope, bool parameters, const OptionalTensor& grad_again) {
  const Layer layer(y, mean, var, weight, bias, eps);
  const Act act(activation, slope, y);
  const bool masks = has_skip && act.kind == Activation::kRelu, changes_skip = has_skip && act.kind != Activation::kNone;
  check_like(grad_z, "grad_z", y);
  check_mask(mask, layer, masks);
  TORCH_CHECK(skip.has_value() || !changes_skip || masks, "activation ", activation, " behind a skip needs the skip again");
  const at::Tensor dense_skip = changes_skip && !masks ? dense_like(skip, "skip", y) : at::Tensor();
  const at::Tensor dense_grad = grad_z.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor dense_again = dense_like(grad_again, "grad_again", y);
  at::Tensor dense_sums;
  if (grad_sums.has_value()) {
    TORCH_CHECK(grad_sums->dim() == 2 && grad_sums->size(0) == 2 && grad_sums->size(1) == layer.channels, "grad_sums must be [2, ",
                layer.channels, "], got shape ", grad_sums->sizes());
    TORCH_CHECK(grad_sums->scalar_type() == at::kFloat, "grad_sums must be float32, got ", grad_sums->scalar_type());
    dense_sums = grad_sums->contiguous();
  }
  Result grad_y(y);
  std::optional<Result> grad_skip;
  if (changes_skip) grad_skip.emplace(y);
  const bool sloped = parameters && act.slope.defined();
  at::Tensor partials;
  if (parameters) partials = at::empty({layer.blocks, sloped ? 3 : 2, layer.channels}, y.options().dtype(at::kDouble));

  BnActBackward p{};
  layer.fill(p, act);
  p.grad_z = dense_grad.const_data_ptr();
  p.grad_again = dense_again.defined() ? dense_again.const_data_ptr() : nullptr;
  p.grad_sums = dense_sums.defined() ? dense_sums.const_data_ptr<float>() : nullptr;
  p.mask = masks ? mask.const_data_ptr<uint8_t>() : nullptr;
  p.skip = dense_skip.defined() ? dense_skip.const_data_ptr() : nullptr;
  p.grad_y = grad_y.written.data_ptr();
  p.grad_skip = changes_skip ? grad_skip->written.data_ptr() : nullptr;
  p.partials = parameters ? partials.data_ptr<double>() : nullptr;
  layer.for_blocks([&](int64_t begin, int64_t end) { kernels().bn_act_backward(p, begin, end); });

  at::Tensor of_parameters = at::empty({0}, mean.options()), of_slope = at::empty({0}, mean.options());
  if (parameters) {
    std::vector<double> sums = layer.total<double>(partials);
    for (int64_t c = 0; c < layer.channels; ++c) sums[c] /= layer.deviation[c];
    of_parameters = rows_of(sums, 2, layer);
    if (sloped) of_slope = act.gradient(sums.data() + 2 * layer.channels);
  }
  return {grad_y.finish(), changes_skip ? grad_skip->finish() : at::empty({0}, y.options()), of_parameters, of_slope};
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def(
      "bn_act_forward(Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? skip, str activation, "
      "Tensor? slope, Tensor(a!)? partials=None) -> (Tensor z, Tensor sums, Tensor mask)");
  m.def(
      "bn_act_backward(Tensor grad_z, Tensor? grad_sums, Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? skip, Tensor mask, bool has_skip, str activation, Tensor? slope, bool parameters=False, Tensor? grad_again=None) "
      "-> (Tensor grad_y, Tensor grad_skip, Tensor grad_parameters, Tensor grad_slope)");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) {
  m.impl("bn_act_forward", TORCH_FN(dwa_fast::bn_act_forward));
  m.impl("bn_act_backward", TORCH_FN(dwa_fast::bn_act_backward));
}

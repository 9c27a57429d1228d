// z = f(x),   x = a(y − m) + a'(y' − m') + β + β',   sums = Σ(y − m), Σ(y − m)², Σ(y' − m'), Σ(y' − m')²
//
// y' is the skip, and ∂L/∂y = a·g + gs₁ + 2 gs₂ (y − m) with g = f'(x)·gz, as of y'. Layout, sums and bits are as bn_act's; x is computed
// again in the backward pass, which reads both y in any case.
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/bn_act.h"
#include "cpu/kernels.h"
#include "cpu/level.h"

namespace dwa_fast {
namespace {

constexpr std::array<const char*, 4> kNames = {"skip_mean", "skip_var", "skip_weight", "skip_bias"};

// Both layers, checked, as one pass reads them.
struct Joined {
  Joined(const at::Tensor& y, const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
         double eps, const at::Tensor& skip, const at::Tensor& skip_mean, const at::Tensor& skip_var, const OptionalTensor& skip_weight,
         const OptionalTensor& skip_bias, double skip_eps, c10::string_view activation, const OptionalTensor& slope)
      : layer(y, mean, var, weight, bias, eps),
        other((check_like(skip, "skip", y), skip), skip_mean, skip_var, skip_weight, skip_bias, skip_eps, kNames),
        act(activation, slope, y) {
    if (layer.bias.defined() && other.bias.defined()) {
      layer.bias = at::add(layer.bias, other.bias);
    } else if (other.bias.defined()) {
      layer.bias = other.bias;
    }
  }

  void fill(BnActJoin& p) const {
    layer.fill(p, act);
    p.skip = other.y.const_data_ptr();
    p.skip_mean = other.mean.const_data_ptr<float>();
    p.skip_scale = other.scale.const_data_ptr<float>();
  }

  Layer layer, other;
  Act act;
};

std::tuple<at::Tensor, at::Tensor> bn_act_join_forward(const at::Tensor& y, const at::Tensor& mean, const at::Tensor& var,
                                                       const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                       const at::Tensor& skip, const at::Tensor& skip_mean, const at::Tensor& skip_var,
                                                       const OptionalTensor& skip_weight, const OptionalTensor& skip_bias, double skip_eps,
                                                       c10::string_view activation, const OptionalTensor& slope,
                                                       const OptionalTensor& partials, const OptionalTensor& skip_partials,
                                                       bool with_sums) {
  TORCH_CHECK(!partials.has_value() && !skip_partials.has_value(), "on a CPU sums are complete: partials must not be given");
  const Joined both(y, mean, var, weight, bias, eps, skip, skip_mean, skip_var, skip_weight, skip_bias, skip_eps, activation, slope);
  const Layer& layer = both.layer;
  Result z(y);
  at::Tensor of_blocks = at::empty({layer.blocks, 4, layer.channels}, y.options().dtype(at::kFloat));

  BnActJoinForward p{};
  both.fill(p);
  p.z = z.written.data_ptr();
  p.partials = of_blocks.data_ptr<float>();
  layer.for_blocks([&](int64_t begin, int64_t end) { kernels().bn_act_join_forward(p, begin, end); });
  if (!with_sums) return {z.finish(), at::empty({0}, layer.mean.options())};
  return {z.finish(), rows_of(layer.total<float>(of_blocks), 4, layer).view({2, 2, layer.channels})};
}

// The gradient of z is grad_z, or its sum with grad_again, rounded. With `parameters` also (Σ g·(y − m)/√(v + ε), Σ g, Σ g·(y' − m')/√(v' +
// ε')), [3, C]: the gradients of γ, of β and of β', and of γ'; and that of the slope, shaped like it
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_act_join_backward(
    const at::Tensor& grad_z, const OptionalTensor& grad_sums, const OptionalTensor& skip_grad_sums, const at::Tensor& y,
    const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
    const at::Tensor& skip, const at::Tensor& skip_mean, const at::Tensor& skip_var, const OptionalTensor& skip_weight,
    const OptionalTensor& skip_bias, double skip_eps, c10::string_view activation, const OptionalTensor& slope, bool parameters,
    const OptionalTensor& grad_again, int64_t alias_stride, const OptionalTensor& grad_later, const OptionalTensor& later_mask) {
  check_nothing_left(grad_later, later_mask);
  const Joined both(y, mean, var, weight, bias, eps, skip, skip_mean, skip_var, skip_weight, skip_bias, skip_eps, activation, slope);
  const Layer& layer = both.layer;
  check_like(grad_z, "grad_z", y);
  const at::Tensor dense_grad = grad_z.contiguous(at::MemoryFormat::ChannelsLast);
  const SecondGradient again(grad_again, alias_stride, y);
  const auto sums_or_zeros = [&](const OptionalTensor& given) {
    const at::Tensor dense = dense_sums_of(given, layer);
    return dense.defined() ? dense : at::zeros({2, layer.channels}, layer.mean.options());
  };
  const at::Tensor dense_sums = sums_or_zeros(grad_sums), skip_dense_sums = sums_or_zeros(skip_grad_sums);
  Result grad_y(y), grad_skip(skip);
  const bool sloped = parameters && both.act.slope.defined();
  at::Tensor of_blocks;
  if (parameters) of_blocks = at::empty({layer.blocks, sloped ? 4 : 3, layer.channels}, y.options().dtype(at::kDouble));

  BnActJoinBackward p{};
  both.fill(p);
  p.grad_z = dense_grad.const_data_ptr();
  p.again = again.given;
  p.grad_sums = dense_sums.const_data_ptr<float>();
  p.skip_grad_sums = skip_dense_sums.const_data_ptr<float>();
  p.grad_y = grad_y.written.data_ptr();
  p.grad_skip = grad_skip.written.data_ptr();
  p.partials = parameters ? of_blocks.data_ptr<double>() : nullptr;
  layer.for_blocks([&](int64_t begin, int64_t end) { kernels().bn_act_join_backward(p, begin, end); });

  at::Tensor of_parameters = at::empty({0}, layer.mean.options()), of_slope = at::empty({0}, layer.mean.options());
  if (parameters) {
    std::vector<double> sums = layer.total<double>(of_blocks);
    for (int64_t c = 0; c < layer.channels; ++c) {
      sums[c] /= layer.deviation[c];
      sums[2 * layer.channels + c] /= both.other.deviation[c];
    }
    of_parameters = rows_of(sums, 3, layer);
    if (sloped) of_slope = both.act.gradient(sums.data() + 3 * layer.channels);
  }
  return {grad_y.finish(), grad_skip.finish(), of_parameters, of_slope};
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def(
      "bn_act_join_forward(Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor skip, Tensor skip_mean, "
      "Tensor skip_var, Tensor? skip_weight, Tensor? skip_bias, float skip_eps, str activation, Tensor? slope, Tensor(a!)? partials=None, "
      "Tensor(b!)? skip_partials=None, bool with_sums=True) -> (Tensor z, Tensor sums)");
  m.def(
      "bn_act_join_backward(Tensor grad_z, Tensor? grad_sums, Tensor? skip_grad_sums, Tensor y, Tensor mean, Tensor var, Tensor? weight, "
      "Tensor? bias, float eps, Tensor skip, Tensor skip_mean, Tensor skip_var, Tensor? skip_weight, Tensor? skip_bias, float skip_eps, "
      "str activation, Tensor? slope, bool parameters=False, Tensor? grad_again=None, int alias_stride=1, Tensor? grad_later=None, "
      "Tensor? later_mask=None) "
      "-> (Tensor grad_y, Tensor grad_skip, Tensor grad_parameters, Tensor grad_slope)");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) {
  m.impl("bn_act_join_forward", TORCH_FN(dwa_fast::bn_act_join_forward));
  m.impl("bn_act_join_backward", TORCH_FN(dwa_fast::bn_act_join_backward));
}

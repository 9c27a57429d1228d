// z = f(x),   x = a(y − m) + β [+ skip],   sums = (Σ(y − m), Σ(y − m)²);   ∂L/∂y = f'(x)·a·gz + gs₁ + 2 gs₂ (y − m),   a = γ/√(v + ε)
//
// Channels-last tensors are read where they are, others through a channels-last copy. Sums are float32 within a block of rows
// (those of the weights' gradients, which cancel, over a few rows) and float64 over the blocks, in their order; the blocks depend on the
// shape alone, so the bits do not depend on the number of threads.
#include "cpu/bn_act.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/level.h"

namespace dwa_fast {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_act_forward(const at::Tensor& y, const at::Tensor& mean, const at::Tensor& var,
                                                              const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                              const OptionalTensor& skip, c10::string_view activation,
                                                              const OptionalTensor& slope, const OptionalTensor& partials, bool with_sums) {
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
  return {z.finish(), with_sums ? rows_of(layer.total<float>(of_blocks), 2, layer) : at::empty({0}, layer.mean.options()), mask};
}

void check_mask(const at::Tensor& mask, const Layer& layer, bool masks) {
  const int64_t bytes = masks ? layer.mask_bytes() : 0;
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.dim() == 1 && mask.is_contiguous() && mask.numel() == bytes,
              "mask must be what bn_act_forward returned, uint8 [", bytes, "], got ", mask.scalar_type(), " ", mask.sizes());
}

// The gradient of z is grad_z, or its sum with grad_again, rounded. With `parameters` also (Σ g·(y − m)/√(v + ε), Σ g), [2, C], g =
// f'(x)·gz: the gradients of γ and β; and that of the slope, shaped like it. What is not wanted is empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_act_backward(
    const at::Tensor& grad_z, const OptionalTensor& grad_sums, const at::Tensor& y, const at::Tensor& mean, const at::Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const OptionalTensor& skip, const at::Tensor& mask, bool has_skip,
    c10::string_view activation, const OptionalTensor& slope, bool parameters, const OptionalTensor& grad_again, int64_t alias_stride,
    bool with_y, bool with_skip, const OptionalTensor& grad_later, const OptionalTensor& later_mask) {
  TORCH_CHECK(with_skip, "on a CPU gradients are whole: with_skip must be true");
  check_nothing_left(grad_later, later_mask);
  const Layer layer(y, mean, var, weight, bias, eps);
  const Act act(activation, slope, y);
  const bool masks = has_skip && act.kind == Activation::kRelu, changes_skip = has_skip && act.kind != Activation::kNone;
  check_like(grad_z, "grad_z", y);
  check_mask(mask, layer, masks);
  TORCH_CHECK(skip.has_value() || !changes_skip || masks, "activation ", activation, " behind a skip needs the skip again");
  const at::Tensor dense_skip = changes_skip && !masks ? dense_like(skip, "skip", y) : at::Tensor();
  const at::Tensor dense_grad = grad_z.contiguous(at::MemoryFormat::ChannelsLast);
  const SecondGradient again(grad_again, alias_stride, y);
  const at::Tensor dense_sums = dense_sums_of(grad_sums, layer);
  std::optional<Result> grad_y, grad_skip;
  if (with_y) grad_y.emplace(y);
  if (changes_skip) grad_skip.emplace(y);
  const bool sloped = parameters && act.slope.defined();
  at::Tensor partials;
  if (parameters) partials = at::empty({layer.blocks, sloped ? 3 : 2, layer.channels}, y.options().dtype(at::kDouble));

  BnActBackward p{};
  layer.fill(p, act);
  p.grad_z = dense_grad.const_data_ptr();
  p.again = again.given;
  p.grad_sums = dense_sums.defined() ? dense_sums.const_data_ptr<float>() : nullptr;
  p.mask = masks ? mask.const_data_ptr<uint8_t>() : nullptr;
  p.skip = dense_skip.defined() ? dense_skip.const_data_ptr() : nullptr;
  p.grad_y = with_y ? grad_y->written.data_ptr() : nullptr;
  p.grad_skip = changes_skip ? grad_skip->written.data_ptr() : nullptr;
  p.partials = parameters ? partials.data_ptr<double>() : nullptr;
  layer.for_blocks([&](int64_t begin, int64_t end) { kernels().bn_act_backward(p, begin, end); });

  auto [of_parameters, of_slope] = parameter_gradients(partials, layer, act);
  const auto finished = [&](std::optional<Result>& result) { return result ? result->finish() : at::empty({0}, y.options()); };
  return {finished(grad_y), finished(grad_skip), of_parameters, of_slope};
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def(
      "bn_act_forward(Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? skip, str activation, "
      "Tensor? slope, Tensor(a!)? partials=None, bool with_sums=True) -> (Tensor z, Tensor sums, Tensor mask)");
  m.def(
      "bn_act_backward(Tensor grad_z, Tensor? grad_sums, Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? skip, Tensor mask, bool has_skip, str activation, Tensor? slope, bool parameters=False, Tensor? grad_again=None, int "
      "alias_stride=1, bool with_y=True, bool with_skip=True, Tensor? grad_later=None, Tensor? later_mask=None) "
      "-> (Tensor grad_y, Tensor grad_skip, Tensor grad_parameters, Tensor grad_slope)");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) {
  m.impl("bn_act_forward", TORCH_FN(dwa_fast::bn_act_forward));
  m.impl("bn_act_backward", TORCH_FN(dwa_fast::bn_act_backward));
}

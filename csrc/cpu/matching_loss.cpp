// R_mean = Σ_l w_l ‖μ_l − m_l − a_l‖₂,   R_var = Σ_l w_l ‖σ²_l − v_l‖₂,   μ − m = s₁/n,   σ² = s₂/n − (s₁/n)²,   a: means, or 0
//
// All layers together have some ten thousand channels: one thread, in float64 and in order, is done before a second would have woken.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

namespace dwa_fast {
namespace {

void check_vector(const at::Tensor& tensor, const char* name, int64_t size, at::ScalarType dtype) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must be [", size, "], got shape ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
}

// The arguments, dense and checked.
struct Layers {
  Layers(const at::Tensor& sums_, const at::Tensor& variances_, const at::Tensor& channel_ptr_, const at::Tensor& counts_,
         const at::Tensor& weights_, const std::optional<at::Tensor>& means_)
      : sums(sums_.contiguous()),
        variances(variances_.contiguous()),
        channel_ptr(channel_ptr_.contiguous()),
        counts(counts_.contiguous()),
        weights(weights_.contiguous()) {
    TORCH_CHECK(sums.dim() == 2 && sums.size(0) == 2, "sums must be [2, C], got shape ", sums.sizes());
    TORCH_CHECK(sums.scalar_type() == at::kFloat, "sums must be Float, got ", sums.scalar_type());
    TORCH_CHECK(counts.dim() == 1, "counts must be [L], got shape ", counts.sizes());
    channels = sums.size(1);
    layers = counts.size(0);
    check_vector(variances, "variances", channels, at::kFloat);
    check_vector(channel_ptr, "channel_ptr", layers + 1, at::kLong);
    check_vector(counts, "counts", layers, at::kLong);
    check_vector(weights, "weights", layers, at::kFloat);
    if (means_.has_value()) {
      means = means_->contiguous();
      check_vector(means, "means", channels, at::kFloat);
      a = means.const_data_ptr<float>();
    }
    s1 = sums.const_data_ptr<float>();
    s2 = s1 + channels;
    v = variances.const_data_ptr<float>();
    bound = channel_ptr.const_data_ptr<int64_t>();
    n = counts.const_data_ptr<int64_t>();
    w = weights.const_data_ptr<float>();
    for (int64_t l = 0; l <= layers; ++l) {
      const int64_t least = l == 0 ? 0 : bound[l - 1];
      TORCH_CHECK_VALUE(least <= bound[l] && bound[l] <= channels, "channel_ptr must not decrease and lie in 0 to ", channels, ", got ",
                        bound[l], " in place ", l);
    }
  }

  double mean(int64_t layer, int64_t c) const { return s1[c] / static_cast<double>(n[layer]); }
  double mean_gap(int64_t layer, int64_t c) const { return a == nullptr ? mean(layer, c) : mean(layer, c) - a[c]; }
  double var_gap(int64_t layer, int64_t c) const {
    const double mean = this->mean(layer, c);
    return s2[c] / static_cast<double>(n[layer]) - mean * mean - v[c];
  }

  at::Tensor sums, variances, channel_ptr, counts, weights, means;
  int64_t channels, layers;
  const float *s1, *s2, *v, *w, *a = nullptr;
  const int64_t *bound, *n;
};

std::tuple<at::Tensor, at::Tensor> matching_loss_forward(const at::Tensor& sums, const at::Tensor& variances, const at::Tensor& channel_ptr,
                                                         const at::Tensor& counts, const at::Tensor& weights,
                                                         const std::optional<at::Tensor>& means) {
  const Layers all(sums, variances, channel_ptr, counts, weights, means);
  at::Tensor loss = at::empty({2}, sums.options());
  at::Tensor norms = at::empty({2, all.layers}, sums.options());
  float* norm = norms.data_ptr<float>();
  double total[2] = {};
  for (int64_t l = 0; l < all.layers; ++l) {
    double squares[2] = {};
    for (int64_t c = all.bound[l]; c < all.bound[l + 1]; ++c) {
      squares[0] += all.mean_gap(l, c) * all.mean_gap(l, c);
      squares[1] += all.var_gap(l, c) * all.var_gap(l, c);
    }
    for (int term = 0; term < 2; ++term) {
      norm[term * all.layers + l] = static_cast<float>(std::sqrt(squares[term]));
      total[term] += all.w[l] * std::sqrt(squares[term]);
    }
  }
  for (int term = 0; term < 2; ++term) loss.data_ptr<float>()[term] = static_cast<float>(total[term]);
  return {loss, norms};
}

// ∂R_var/∂s₂ = w d/(n‖d‖) with d = σ² − v,   ∂/∂s₁ = w e/(n‖e‖) of R_mean with e = s₁/n − a, and −2(s₁/n) ∂R_var/∂s₂ of R_var
at::Tensor matching_loss_backward(const at::Tensor& grad, const at::Tensor& sums, const at::Tensor& variances,
                                  const at::Tensor& channel_ptr, const at::Tensor& counts, const at::Tensor& weights,
                                  const at::Tensor& norms, const std::optional<at::Tensor>& means) {
  const Layers all(sums, variances, channel_ptr, counts, weights, means);
  check_vector(grad, "grad", 2, at::kFloat);
  TORCH_CHECK(
      norms.dim() == 2 && norms.size(0) == 2 && norms.size(1) == all.layers && norms.is_contiguous() && norms.scalar_type() == at::kFloat,
      "norms must be what matching_loss_forward returned, Float [2, ", all.layers, "], got ", norms.scalar_type(), " ", norms.sizes());
  const at::Tensor dense_grad = grad.contiguous();
  const float* g = dense_grad.const_data_ptr<float>();
  const float* norm = norms.const_data_ptr<float>();
  // Channels that belong to no layer have no gradient.
  at::Tensor result = all.layers > 0 && all.bound[0] == 0 && all.bound[all.layers] == all.channels
                          ? at::empty({2, all.channels}, sums.options())
                          : at::zeros({2, all.channels}, sums.options());
  float* first = result.data_ptr<float>();
  float* second = first + all.channels;
  for (int64_t l = 0; l < all.layers; ++l) {
    double scale[2];
    for (int term = 0; term < 2; ++term) {
      const double length = norm[term * all.layers + l];
      scale[term] = length == 0 ? 0 : g[term] * static_cast<double>(all.w[l]) / (static_cast<double>(all.n[l]) * length);
    }
    for (int64_t c = all.bound[l]; c < all.bound[l + 1]; ++c) {
      const double by_square = scale[1] * all.var_gap(l, c);
      first[c] = static_cast<float>(scale[0] * all.mean_gap(l, c) - 2 * all.mean(l, c) * by_square);
      second[c] = static_cast<float>(by_square);
    }
  }
  return result;
}

// Both at once, for a gradient of the loss that is known ahead. On a CPU the sums are complete: no partial sums wait in an arena.
std::tuple<at::Tensor, at::Tensor> matching_gradient(const at::Tensor& sums, const at::Tensor& variances, const at::Tensor& channel_ptr,
                                                     const at::Tensor& counts, const at::Tensor& weights, const at::Tensor& grad,
                                                     const std::optional<at::Tensor>& places, const std::optional<at::Tensor>& finished,
                                                     const std::optional<at::Tensor>& means) {
  TORCH_CHECK(!places.has_value() && !finished.has_value(), "on a CPU sums are complete: places and finished must not be given");
  const auto [loss, norms] = matching_loss_forward(sums, variances, channel_ptr, counts, weights, means);
  return {loss, matching_loss_backward(grad, sums, variances, channel_ptr, counts, weights, norms, means)};
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def(
      "matching_gradient(Tensor sums, Tensor variances, Tensor channel_ptr, Tensor counts, Tensor weights, Tensor grad, "
      "Tensor? places=None, Tensor(a!)? finished=None, Tensor? means=None) -> (Tensor loss, Tensor grad_sums)");
  m.def(
      "matching_loss_forward(Tensor sums, Tensor variances, Tensor channel_ptr, Tensor counts, Tensor weights, Tensor? means=None) "
      "-> (Tensor loss, Tensor norms)");
  m.def(
      "matching_loss_backward(Tensor grad, Tensor sums, Tensor variances, Tensor channel_ptr, Tensor counts, Tensor weights, Tensor norms, "
      "Tensor? means=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) {
  m.impl("matching_gradient", TORCH_FN(dwa_fast::matching_gradient));
  m.impl("matching_loss_forward", TORCH_FN(dwa_fast::matching_loss_forward));
  m.impl("matching_loss_backward", TORCH_FN(dwa_fast::matching_loss_backward));
}

// What the implementations of ascend_ have in common: the arguments they accept.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace dwa_fast {

// Added to the norm before dividing by it, as in the equation.
constexpr double kNormFloor = 1e-12;

inline void check_arena(const at::Tensor& arena, const char* name, const at::Tensor& weights) {
  TORCH_CHECK(arena.dim() == 1, name, " must be [P], got shape ", arena.sizes());
  TORCH_CHECK(arena.is_contiguous(), name, " must be contiguous, got stride ", arena.strides());
  TORCH_CHECK(arena.numel() == weights.numel(), name, " must have as many elements as weights, ", weights.numel(), ", got ", arena.numel());
  TORCH_CHECK(arena.device() == weights.device(), name, " must be on the device of weights, ", weights.device(), ", got ", arena.device());
}

inline void check_ascend(const at::Tensor& weights, const at::Tensor& gradients, const std::optional<at::Tensor>& compute) {
  check_arena(weights, "weights", weights);
  check_arena(gradients, "gradients", weights);
  TORCH_CHECK(weights.scalar_type() == at::kFloat, "weights must be float32, got ", weights.scalar_type());
  TORCH_CHECK(gradients.scalar_type() == at::kFloat, "gradients must be float32, got ", gradients.scalar_type());
  if (compute.has_value()) {
    check_arena(*compute, "compute", weights);
    TORCH_CHECK(compute->scalar_type() == at::kBFloat16 || compute->scalar_type() == at::kHalf, "compute must be bfloat16 or float16, got ",
                compute->scalar_type());
  }
}

}  // namespace dwa_fast

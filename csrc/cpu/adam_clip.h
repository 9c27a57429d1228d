// What the operators that end in Adam and the clamp share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace dwa_fast {

// Refuses a state, a schedule or bounds that do not fit the images.
void check_adam_clip(const at::Tensor& images, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& learning_rates,
                     const at::Tensor& step, const at::Tensor& low, const at::Tensor& high);

// The numbers of this step; which elements it is for is left to the caller.
AdamClip adam_clip_numbers(const at::Tensor& learning_rates, const at::Tensor& step, double gradient_scale, double beta1, double beta2,
                           double eps);

// One bound per element of a stretch with the channels innermost: the channels' bounds over and over.
std::vector<float> repeat(const at::Tensor& bounds, int64_t times);

}  // namespace dwa_fast

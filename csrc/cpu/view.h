// What view's adjoint and the operator that fuses Adam with it share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace dwa_fast {

struct Row {
  int64_t top, left, height, width, flip, down, right;
};

// Row `step` of the schedule; refuses crops that leave images of that size.
Row read_row(const at::Tensor& rows, const at::Tensor& step, int64_t height, int64_t width);

// What one output pixel reads along one axis.
struct Tap {
  int64_t lower, upper;
  float weight;  // of upper; lower has the rest
};

// The output pixels that read source pixel s: entries first[s] … first[s + 1] − 1, in order.
struct Readers {
  Readers(const std::vector<Tap>& taps, int64_t size);
  std::vector<int64_t> first, pixel;
  std::vector<float> weight;

 private:
  void add(int64_t entry, size_t o, float share);
};

// The adjoint of a view: the gradient of every source line is the weighted sum of the gradients of the pixels that sampled it, in a fixed
// order.
class Adjoint {
 public:
  Adjoint(const Adjoint&) = delete;
  Adjoint& operator=(const Adjoint&) = delete;
  Adjoint(const at::Tensor& seen, const Row& row);  // seen: [N, C, H, W], channels-last, float32 or bfloat16; must outlive this

  // Floats that collect() needs to work in.
  int64_t room() const { return length_ + 4; }

  // Source line of the batch, [W, C] of line n·H + y.
  void collect(int64_t line, float* room, float* out) const;

 private:
  int64_t height_, length_;
  const void* seen_;
  Readers of_line_, of_column_;
  ViewAdjoint shared_{};
};

}  // namespace dwa_fast

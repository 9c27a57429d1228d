// norm = ‖g‖₂,   w ← w + (radius / (norm + 1e-12)) g,   compute ← round(w)
//
// The arena is cut into chunks of a fixed size, and the chunks' sums are added in their order, so the bits of the result do not
// depend on how many threads shared the work.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

namespace dwa_fast {
namespace {

constexpr double kNormFloor = 1e-12;  // added to the norm before dividing by it, as in the equation
constexpr int64_t kChunk = 16384;     // 64 KiB of float32: two arenas' chunks stay in the second-level cache
constexpr int64_t kGrain = 4;         // chunks that are worth waking a thread for
constexpr int kLanes = 16;            // independent sums, so that the loop vectorises without reordering

void check_arena(const at::Tensor& arena, const char* name, const at::Tensor& weights) {
  TORCH_CHECK(arena.dim() == 1, name, " must be [P], got shape ", arena.sizes());
  TORCH_CHECK(arena.is_contiguous(), name, " must be contiguous, got stride ", arena.strides());
  TORCH_CHECK(arena.numel() == weights.numel(), name, " must have as many elements as weights, ", weights.numel(), ", got ", arena.numel());
  TORCH_CHECK(arena.device() == weights.device(), name, " must be on the device of weights, ", weights.device(), ", got ", arena.device());
}

void check_ascend(const at::Tensor& weights, const at::Tensor& gradients, const std::optional<at::Tensor>& compute) {
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

// Squares of float32 neither overflow nor vanish in double, and 16 separate sums leave the compiler nothing to reorder.
double square_sum(const float* __restrict gradients, int64_t count) {
  double lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double g = gradients[i + lane];
      lanes[lane] += g * g;
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    const double g = gradients[i];
    lanes[i - whole] += g * g;
  }
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// Round to nearest even on the bits: branch-free, where the library's conversion is not, so that it vectorises.
uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

void add_scaled(float* __restrict weights, const float* __restrict gradients, float scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) weights[i] += scale * gradients[i];
}

void round_to(const float* __restrict weights, uint16_t* __restrict compute, int64_t count) {
  for (int64_t i = 0; i < count; ++i) compute[i] = bfloat16_bits(weights[i]);
}

void round_to(const float* __restrict weights, c10::Half* __restrict compute, int64_t count) {
  for (int64_t i = 0; i < count; ++i) compute[i] = static_cast<c10::Half>(weights[i]);
}

double global_norm(const float* gradients, int64_t count) {
  std::vector<double> sums((count + kChunk - 1) / kChunk);
  at::parallel_for(0, static_cast<int64_t>(sums.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk;
      sums[chunk] = square_sum(gradients + first, std::min(kChunk, count - first));
    }
  });
  double sum = 0;
  for (const double chunk : sums) sum += chunk;
  return std::sqrt(sum);
}

// A chunk is rounded right after its update, while it is still in the cache: one pass over memory.
template <typename Compute>
void update(float* weights, const float* gradients, float scale, bool moves, Compute compute, int64_t count) {
  at::parallel_for(0, (count + kChunk - 1) / kChunk, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk;
      const int64_t size = std::min(kChunk, count - first);
      if (moves) add_scaled(weights + first, gradients + first, scale, size);
      if constexpr (!std::is_same_v<Compute, std::nullptr_t>) round_to(weights + first, compute + first, size);
    }
  });
}

at::Tensor ascend_(at::Tensor& weights, const at::Tensor& gradients, double radius, bool normalize,
                   const std::optional<at::Tensor>& compute) {
  check_ascend(weights, gradients, compute);
  const int64_t count = weights.numel();
  float* w = weights.data_ptr<float>();
  const float* g = gradients.const_data_ptr<float>();

  const double norm = global_norm(g, count);
  const auto scale = static_cast<float>(normalize ? radius / (norm + kNormFloor) : radius);
  // Adding a zero step would still turn −0 into +0, and a huge radius would turn it into NaN.
  const bool moves = norm != 0;
  if (!compute.has_value()) {
    update(w, g, scale, moves, nullptr, count);
  } else if (compute->scalar_type() == at::kBFloat16) {
    update(w, g, scale, moves, static_cast<uint16_t*>(compute->data_ptr()), count);
  } else {
    update(w, g, scale, moves, compute->data_ptr<c10::Half>(), count);
  }

  at::Tensor result = at::empty({}, weights.options());
  *result.data_ptr<float>() = static_cast<float>(norm);
  return result;
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def("ascend_(Tensor(a!) weights, Tensor gradients, float radius, bool normalize=True, Tensor(b!)? compute=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) { m.impl("ascend_", TORCH_FN(dwa_fast::ascend_)); }

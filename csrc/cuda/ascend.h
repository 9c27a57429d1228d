// ascend_ on raw pointers and a stream. Nothing here allocates or waits, so that a CUDA graph can capture it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace dwa_fast::cuda {

enum class Compute { kNone, kBFloat16, kHalf };

struct Ascend {
  float* weights;          // [count], updated in place
  const float* gradients;  // [count]
  void* compute;           // [count] of compute_type, rewritten; null with Compute::kNone
  Compute compute_type;
  float* norm;      // one float: ‖g‖₂
  void* workspace;  // ascend_workspace_bytes(count) bytes, aligned to 16
  int64_t count;
  double radius;
  bool normalize;
};

std::size_t ascend_workspace_bytes(int64_t count);

cudaError_t ascend(const Ascend& arguments, cudaStream_t stream);

}  // namespace dwa_fast::cuda

// Tensors to raw pointers for csrc/cuda/ascend.cu.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../ascend.h"
#include "cuda/ascend.h"

namespace dwa_fast {
namespace {

at::Tensor ascend_cuda_(at::Tensor& weights, const at::Tensor& gradients, double radius, bool normalize,
                        const std::optional<at::Tensor>& compute) {
  check_ascend(weights, gradients, compute);
  const c10::cuda::CUDAGuard guard(weights.device());
  const int64_t count = weights.numel();
  // PyTorch's caching allocator, so that this works during the capture of a CUDA graph too.
  at::Tensor norm = at::empty({}, weights.options());
  at::Tensor workspace = at::empty({static_cast<int64_t>(cuda::ascend_workspace_bytes(count))}, weights.options().dtype(at::kByte));

  cuda::Ascend arguments{};
  arguments.weights = weights.data_ptr<float>();
  arguments.gradients = gradients.const_data_ptr<float>();
  arguments.compute = compute.has_value() ? compute->data_ptr() : nullptr;
  arguments.compute_type = !compute.has_value()                      ? cuda::Compute::kNone
                           : compute->scalar_type() == at::kBFloat16 ? cuda::Compute::kBFloat16
                                                                     : cuda::Compute::kHalf;
  arguments.norm = norm.data_ptr<float>();
  arguments.workspace = workspace.data_ptr();
  arguments.count = count;
  arguments.radius = radius;
  arguments.normalize = normalize;
  C10_CUDA_CHECK(cuda::ascend(arguments, c10::cuda::getCurrentCUDAStream()));
  return norm;
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_IMPL(dwa_fast, CUDA, m) { m.impl("ascend_", TORCH_FN(dwa_fast::ascend_cuda_)); }

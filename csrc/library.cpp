// The schemas of all operators, and the module dwa_fast._C. Implementations register themselves: csrc/cpu, csrc/cuda.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>
#ifdef DWA_FAST_CUDA
#include <cuda_runtime_api.h>

#include "cuda/graph.h"
#endif

#include <string>

#include "cpu/level.h"
#include "program.h"

TORCH_LIBRARY(dwa_fast, m) {
  m.def("ascend_(Tensor(a!) weights, Tensor gradients, float radius, bool normalize=True, Tensor(b!)? compute=None) -> Tensor");
  m.def(
      "bn_act_forward(Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? skip, str activation, "
      "Tensor? slope) -> (Tensor z, Tensor sums, Tensor mask)");
  m.def(
      "bn_act_backward(Tensor grad_z, Tensor? grad_sums, Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? skip, Tensor mask, bool has_skip, str activation, Tensor? slope, bool parameters=False) "
      "-> (Tensor grad_y, Tensor grad_skip, Tensor grad_parameters, Tensor grad_slope)");
  m.def(
      "matching_loss_forward(Tensor sums, Tensor variances, Tensor channel_ptr, Tensor counts, Tensor weights) "
      "-> (Tensor loss, Tensor norms)");
  m.def(
      "matching_loss_backward(Tensor grad, Tensor sums, Tensor variances, Tensor channel_ptr, Tensor counts, Tensor weights, Tensor norms) "
      "-> Tensor");
  m.def("mean_pool_forward(Tensor y, int window) -> Tensor");
  m.def("mean_pool_backward(Tensor grad_z, int window, int height, int width) -> Tensor");
  m.def("moments_forward(Tensor y, Tensor mean) -> Tensor");
  m.def("moments_backward(Tensor grad_sums, Tensor y, Tensor mean) -> Tensor");
  m.def("view(Tensor images, Tensor rows, Tensor step, ScalarType dtype) -> Tensor");
  m.def(
      "view_adam_clip_(Tensor(a!) images, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor rows, Tensor learning_rates, "
      "Tensor step, Tensor low, Tensor high, float loss_scale, float beta1, float beta2, float eps) -> ()");
}

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict built_with() {
  pybind11::dict facts;
  facts["torch"] = TORCH_VERSION;
  facts["compiler"] = compiler();
#ifdef DWA_FAST_CUDA
  facts["has_cuda"] = true;
  facts["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
  facts["has_cuda"] = false;
  facts["cuda"] = pybind11::none();
#endif
  return facts;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled operators of dwa_fast; importing it registers torch.ops.dwa_fast.*";
  m.def("built_with", &built_with, "What this file was built with: torch, compiler, has_cuda, cuda (None without).");
  m.def("cpu_level", &dwa_fast::cpu_level, "Instruction set of the CPU operators: avx512_bf16, avx512, avx2 or baseline.");
  m.def("set_cpu_level", &dwa_fast::set_cpu_level, "For tests: a lower level than the machine's.");
  dwa_fast::register_program(m);
#ifdef DWA_FAST_CUDA
  dwa_fast::register_graph(m);
#endif
}

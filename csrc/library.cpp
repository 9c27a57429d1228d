// The module dwa_fast._C. Operators register themselves: schema and CPU implementation in csrc/cpu; CUDA is Triton, in kernels/.
#include <pybind11/pybind11.h>
#include <torch/version.h>
#ifdef DWA_FAST_CUDA
#include <cuda_runtime_api.h>

#include "cuda/graph.h"
#endif

#include <string>

#include "cpu/level.h"
#include "program.h"

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

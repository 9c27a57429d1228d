// A captured step, launched as often as asked without returning to the interpreter.
#include "cuda/graph.h"

#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace dwa_fast {
namespace {

// Launches are queued on the stream; nothing waits for the device.
void launch_graph(uintptr_t executable, uintptr_t stream, int64_t times) {
  for (int64_t repeat = 0; repeat < times; ++repeat)
    C10_CUDA_CHECK(cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(executable), reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

void register_graph(pybind11::module& m) {
  m.def("launch_graph", &launch_graph, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Launch an instantiated CUDA graph (handle, stream) that many times.");
}

}  // namespace dwa_fast

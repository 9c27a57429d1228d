// norm = ‖g‖₂,   w ← w + (radius / (norm + 1e-12)) g,   compute ← round(w)
//
// Three launches on one stream: the sum of squares of every fixed chunk, their sum in a fixed order, the update. Which block sums
// which chunk depends on the arena's length alone, so the same input gives the same bits on every device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ascend.h"

namespace dwa_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;   // float32 per 16-byte access
constexpr int kVectors = 8;  // accesses per thread
constexpr int kChunk = kThreads * kVector * kVectors;
constexpr int kFinalThreads = 1024;
constexpr double kNormFloor = 1e-12;  // as in csrc/ascend.h, which needs PyTorch's headers

int64_t chunks(int64_t count) { return (count + kChunk - 1) / kChunk; }

bool aligned(const void* pointer, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }

// The sum over the block in thread 0, in an order that only the number of threads decides.
template <int kBlock>
__device__ double block_sum(double value) {
  __shared__ double warps[kBlock / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kBlock / 32; ++warp) sum += warps[warp];
  }
  return sum;
}

// partials[chunk] = Σ g² over the chunk, in double: squares of float32 neither overflow nor vanish in it.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads) square_sum(const float* __restrict__ gradients, double* __restrict__ partials, int64_t count) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  double sum = 0;
#pragma unroll
  for (int round = 0; round < kVectors; ++round) {
    const int64_t i = first + (static_cast<int64_t>(round) * kThreads + threadIdx.x) * kVector;
    if (kAligned && i + kVector <= count) {
      const float4 g = *reinterpret_cast<const float4*>(gradients + i);
      sum += static_cast<double>(g.x) * g.x;
      sum += static_cast<double>(g.y) * g.y;
      sum += static_cast<double>(g.z) * g.z;
      sum += static_cast<double>(g.w) * g.w;
    } else {
      for (int64_t j = i; j < i + kVector && j < count; ++j) sum += static_cast<double>(gradients[j]) * gradients[j];
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// norm = √Σ partials,   scale = radius / (norm + 1e-12)
__global__ void __launch_bounds__(kFinalThreads)
    finalize(const double* __restrict__ partials, int64_t count, double radius, bool normalize, float* norm, float* scale) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinalThreads) sum += partials[i];
  sum = block_sum<kFinalThreads>(sum);
  if (threadIdx.x == 0) {
    const double root = sqrt(sum);
    *norm = static_cast<float>(root);
    *scale = static_cast<float>(normalize ? radius / (root + kNormFloor) : radius);
  }
}

struct Nothing {};

__device__ void store(Nothing*, int64_t, float) {}
__device__ void store(__nv_bfloat16* compute, int64_t i, float value) { compute[i] = __float2bfloat16_rn(value); }
__device__ void store(__half* compute, int64_t i, float value) { compute[i] = __float2half_rn(value); }

__device__ void store(Nothing*, int64_t, float4) {}

__device__ void store(__nv_bfloat16* compute, int64_t i, float4 value) {
  const __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(value.x, value.y), __floats2bfloat162_rn(value.z, value.w)};
  *reinterpret_cast<uint2*>(compute + i) = *reinterpret_cast<const uint2*>(pair);
}

__device__ void store(__half* compute, int64_t i, float4 value) {
  const __half2 pair[2] = {__floats2half2_rn(value.x, value.y), __floats2half2_rn(value.z, value.w)};
  *reinterpret_cast<uint2*>(compute + i) = *reinterpret_cast<const uint2*>(pair);
}

// w ← w + scale g and compute ← round(w). With a zero norm the weights keep their bits: adding a zero step would turn −0 into +0.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    update(float* __restrict__ weights, const float* __restrict__ gradients, T* __restrict__ compute, const float* __restrict__ norm,
           const float* __restrict__ scale_, int64_t count) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  const bool moves = *norm != 0.0f;
  const float scale = *scale_;
#pragma unroll
  for (int round = 0; round < kVectors; ++round) {
    const int64_t i = first + (static_cast<int64_t>(round) * kThreads + threadIdx.x) * kVector;
    if (kAligned && i + kVector <= count) {
      float4 w = *reinterpret_cast<const float4*>(weights + i);
      if (moves) {
        const float4 g = *reinterpret_cast<const float4*>(gradients + i);
        w = make_float4(fmaf(scale, g.x, w.x), fmaf(scale, g.y, w.y), fmaf(scale, g.z, w.z), fmaf(scale, g.w, w.w));
        *reinterpret_cast<float4*>(weights + i) = w;
      }
      store(compute, i, w);
    } else {
      for (int64_t j = i; j < i + kVector && j < count; ++j) {
        if (moves) weights[j] = fmaf(scale, gradients[j], weights[j]);
        store(compute, j, weights[j]);
      }
    }
  }
}

template <typename T>
void launch_update(const Ascend& a, T* compute, const float* scale, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(chunks(a.count));
  if (aligned(a.weights, 16) && aligned(a.gradients, 16) && aligned(compute, 8)) {
    update<T, true><<<blocks, kThreads, 0, stream>>>(a.weights, a.gradients, compute, a.norm, scale, a.count);
  } else {
    update<T, false><<<blocks, kThreads, 0, stream>>>(a.weights, a.gradients, compute, a.norm, scale, a.count);
  }
}

}  // namespace

std::size_t ascend_workspace_bytes(int64_t count) { return chunks(count) * sizeof(double) + sizeof(double); }

cudaError_t ascend(const Ascend& a, cudaStream_t stream) {
  const int64_t blocks = chunks(a.count);
  auto* partials = static_cast<double*>(a.workspace);
  auto* scale = reinterpret_cast<float*>(partials + blocks);
  if (blocks > 0) {
    if (aligned(a.gradients, 16)) {
      square_sum<true><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a.gradients, partials, a.count);
    } else {
      square_sum<false><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a.gradients, partials, a.count);
    }
  }
  finalize<<<1, kFinalThreads, 0, stream>>>(partials, blocks, a.radius, a.normalize, a.norm, scale);
  if (blocks > 0) {
    switch (a.compute_type) {
      case Compute::kNone:
        launch_update(a, static_cast<Nothing*>(nullptr), scale, stream);
        break;
      case Compute::kBFloat16:
        launch_update(a, static_cast<__nv_bfloat16*>(a.compute), scale, stream);
        break;
      case Compute::kHalf:
        launch_update(a, static_cast<__half*>(a.compute), scale, stream);
        break;
    }
  }
  return cudaGetLastError();
}

}  // namespace dwa_fast::cuda

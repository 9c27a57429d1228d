// y = w ∗ x + b for a 3×3 kernel, stride 1 and one pixel of zeros around, and its gradients, by Winograd's F(2×2, 3×3)
// or F(4×4, 3×3): cpu/conv3x3_kernels.h.
//
// On channels-last tensors, others through a copy. The bits do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/kernels.h"
#include "cpu/level.h"

namespace dwa_fast {
namespace {

constexpr int64_t kTiles = 48;              // of a convolution at a time: what a thread works on stays in its cache
constexpr int64_t kSeen = 2 * 1024 * 1024;  // of a gradient of weights at a time: channels of all places of all tiles of a block
constexpr int64_t kOutputs = 48;            // of a gradient of weights that a thread takes at a time, at most
constexpr int64_t kOnceTiles = 128;         // of a convolution whose weights are used once, at most: what they see is read often
constexpr int64_t kMany = 2 * 1024 * 1024;  // arranged weights, from which on it takes less time not to write them all
constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

int64_t up(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

void check(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.dim() == 4, name, " must have four dimensions, got shape ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
  TORCH_CHECK(tensor.size(1) % kWinogradPanel == 0, name, " must have a multiple of ", kWinogradPanel, " channels, got ", tensor.size(1));
}

int64_t places(int64_t tile) { return (tile + 2) * (tile + 2); }

Winograd tiled(const at::Tensor& x, int64_t outputs, int64_t tile) {
  const int64_t height = x.size(2), width = x.size(3);
  return {static_cast<int>(tile), height, width, x.size(1), outputs, up(height, tile), up(width, tile), x.const_data_ptr<float>()};
}

void check_tile(int64_t tile) { TORCH_CHECK(tile == 2 || tile == 4, "tile must be 2 or 4, got ", tile); }

void check_weight(const at::Tensor& weight) {
  check(weight, "weight");
  TORCH_CHECK(weight.size(0) % kWinogradPanel == 0 && weight.size(2) == 3 && weight.size(3) == 3,
              "weight must be [O, C, 3, 3], O a multiple of ", kWinogradPanel, ", got shape ", weight.sizes());
}

at::Tensor checked_bias(const std::optional<at::Tensor>& bias, int64_t outputs) {
  TORCH_CHECK(!bias || (bias->numel() == outputs && bias->scalar_type() == at::kFloat), "bias must be float32, [", outputs, "]");
  return bias ? bias->contiguous() : at::Tensor();
}

at::Tensor empty_like_images(const at::Tensor& x, int64_t outputs) {
  return at::empty({x.size(0), outputs, x.size(2), x.size(3)}, x.options().memory_format(kLayout));
}

at::Tensor conv3x3_weights(const at::Tensor& weight_, bool transposed, int64_t tile) {
  check_weight(weight_);
  check_tile(tile);
  const at::Tensor weight = weight_.contiguous(kLayout);
  const int64_t inputs = weight.size(transposed ? 0 : 1), outputs = weight.size(transposed ? 1 : 0);
  at::Tensor arranged = at::empty({outputs / kWinogradPanel, places(tile), inputs, kWinogradPanel},
                                  weight.options().memory_format(at::MemoryFormat::Contiguous));
  const WinogradWeights task{static_cast<int>(tile),    inputs, outputs, transposed, weight.const_data_ptr<float>(), 0,
                             arranged.data_ptr<float>()};
  at::parallel_for(0, outputs / kWinogradPanel, 1, [&](int64_t begin, int64_t end) { kernels().winograd_weights(task, begin, end); });
  return arranged;
}

at::Tensor conv3x3_forward(const at::Tensor& x_, const at::Tensor& arranged_, const std::optional<at::Tensor>& bias_) {
  check(x_, "x");
  const at::Tensor x = x_.contiguous(kLayout), arranged = arranged_.contiguous();
  TORCH_CHECK(arranged.dim() == 4 && (arranged.size(1) == places(2) || arranged.size(1) == places(4)) && arranged.size(2) == x.size(1) &&
                  arranged.size(3) == kWinogradPanel && arranged.scalar_type() == at::kFloat,
              "arranged must be from conv3x3_weights, for ", x.size(1), " inputs, got shape ", arranged.sizes());
  const int64_t outputs = arranged.size(0) * kWinogradPanel, tile = arranged.size(1) == places(2) ? 2 : 4;
  const at::Tensor bias = checked_bias(bias_, outputs);
  at::Tensor y = empty_like_images(x, outputs);
  const WinogradForward task{tiled(x, outputs, tile), bias_ ? bias.const_data_ptr<float>() : nullptr, y.data_ptr<float>()};
  const int64_t tiles = x.size(0) * task.tiles_high * task.tiles_wide;
  if (tiles == 0) return y;
  // Blocks of about the same size, as many for every thread.
  const int64_t threads = at::get_num_threads(), blocks = threads * up(tiles, threads * kTiles), block = up(tiles, blocks);
  const int64_t seen = places(tile) * block * (x.size(1) + kWinogradPadding), need = seen + places(tile) * block * kWinogradGroup;
  at::Tensor room = at::empty({threads, need}, x.options());
  float* const rooms = room.data_ptr<float>();
  const float* const weights = arranged.const_data_ptr<float>();
  at::parallel_for(0, up(tiles, block), 1, [&](int64_t begin, int64_t end) {
    float *const pixels = rooms + at::get_thread_num() * need, *const products = pixels + seen;
    for (; begin < end; ++begin) {
      const int64_t start = begin * block, count = std::min(block, tiles - start);
      kernels().winograd_pixels(task, start, count, 0, count, pixels);
      for (int64_t first = 0; first < outputs; first += kWinogradGroup) {
        kernels().winograd(task, start, count, pixels, weights + first * places(tile) * x.size(1), first, products);
      }
    }
  });
  return y;
}

// The same with weights that no other call will read. Where they are many and tiles few, a thread arranges those of a group of outputs
// and uses them while they are in its cache. The bits are the same.
at::Tensor conv3x3_once(const at::Tensor& x_, const at::Tensor& weight_, const std::optional<at::Tensor>& bias_, bool transposed,
                        int64_t tile) {
  check(x_, "x");
  check_weight(weight_);
  check_tile(tile);
  const int64_t inputs = weight_.size(transposed ? 0 : 1), outputs = weight_.size(transposed ? 1 : 0);
  TORCH_CHECK(x_.size(1) == inputs, "x must have ", inputs, " channels, got shape ", x_.sizes());
  const int64_t tiles = x_.size(0) * up(x_.size(2), tile) * up(x_.size(3), tile);
  const int64_t groups = up(outputs, kWinogradGroup), threads = at::get_num_threads();
  if (tiles == 0 || tiles > kOnceTiles || groups < threads || places(tile) * inputs * outputs < kMany) {
    return conv3x3_forward(x_, conv3x3_weights(weight_, transposed, tile), bias_);
  }
  const at::Tensor x = x_.contiguous(kLayout), weight = weight_.contiguous(kLayout), bias = checked_bias(bias_, outputs);
  at::Tensor y = empty_like_images(x, outputs);
  const WinogradForward task{tiled(x, outputs, tile), bias_ ? bias.const_data_ptr<float>() : nullptr, y.data_ptr<float>()};
  const int64_t own = places(tile) * inputs * kWinogradGroup, need = own + places(tile) * tiles * kWinogradGroup;
  at::Tensor pixels = at::empty({places(tile), tiles, inputs + kWinogradPadding}, x.options()),
             room = at::empty({threads, need}, x.options());
  float *const seen = pixels.data_ptr<float>(), *const rooms = room.data_ptr<float>();
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) { kernels().winograd_pixels(task, 0, tiles, begin, end, seen); });
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    float *const arranged = rooms + at::get_thread_num() * need, *const products = arranged + own;
    for (; begin < end; ++begin) {
      const int64_t first = begin * kWinogradGroup, last = std::min(outputs, first + kWinogradGroup), panel = first / kWinogradPanel;
      const float* const from = weight.const_data_ptr<float>();
      kernels().winograd_weights({static_cast<int>(tile), inputs, outputs, transposed, from, panel, arranged}, panel,
                                 last / kWinogradPanel);
      kernels().winograd(task, 0, tiles, seen, arranged, first, products);
    }
  });
  return y;
}

at::Tensor conv3x3_weight_gradient(const at::Tensor& grad_y_, const at::Tensor& x_, int64_t tile) {
  check_tile(tile);
  check(x_, "x");
  check(grad_y_, "grad_y");
  TORCH_CHECK(grad_y_.size(0) == x_.size(0) && grad_y_.size(2) == x_.size(2) && grad_y_.size(3) == x_.size(3),
              "grad_y must have the images and pixels of x, ", x_.sizes(), ", got shape ", grad_y_.sizes());
  const at::Tensor x = x_.contiguous(kLayout), grad_y = grad_y_.contiguous(kLayout);
  const int64_t inputs = x.size(1), outputs = grad_y.size(1);
  at::Tensor grad_weight = at::empty({outputs, inputs, 3, 3}, x.options().memory_format(kLayout));
  const Winograd shape = tiled(x, outputs, tile);
  const int64_t tiles = x.size(0) * shape.tiles_high * shape.tiles_wide;
  if (tiles == 0) return grad_weight.zero_();
  const int64_t block =
      std::min(tiles, std::max<int64_t>(1, kSeen / (places(tile) * (inputs + outputs))));  // not by threads: it sets the order of sums
  const auto room = [&](int64_t rows, int64_t row) { return at::empty({places(tile), rows, row}, x.options()); };
  at::Tensor pixels = room(block, inputs + kWinogradPadding), gradients = room(block, outputs + kWinogradPadding);
  WinogradGradient task{shape,   grad_y.const_data_ptr<float>(), block, pixels.data_ptr<float>(), gradients.data_ptr<float>(), 0, outputs,
                        nullptr, grad_weight.data_ptr<float>()};
  const auto transform = [&](int64_t start, int64_t count) {
    at::parallel_for(start, start + count, 1,
                     [&](int64_t begin, int64_t end) { kernels().winograd_transform(task, start, begin, end - begin); });
  };
  const int64_t threads = at::get_num_threads(), parts = threads * up(outputs, threads * kOutputs), each = up(outputs, parts);
  if (tiles <= block && 2 * each >= kOutputs) {  // a thread has all products of its outputs, which its cache may hold
    transform(0, tiles);
    const int64_t own = places(tile) * each * inputs;
    at::Tensor products = at::empty({threads, own}, x.options());
    at::parallel_for(0, up(outputs, each), 1, [&](int64_t begin, int64_t end) {
      WinogradGradient part = task;
      part.products = products.data_ptr<float>() + at::get_thread_num() * own;
      for (; begin < end; ++begin) {
        const int64_t last = std::min(outputs, (begin + 1) * each);
        part.first = begin * each;
        part.held = each;
        for (int64_t k = 0; k < places(tile); ++k) kernels().winograd_product(part, tiles, false, k, part.first, last);
        kernels().winograd_grad_weight(part, part.first, last);
      }
    });
    return grad_weight;
  }
  at::Tensor products = room(outputs, inputs);
  task.products = products.data_ptr<float>();
  for (int64_t start = 0; start < tiles; start += block) {
    const int64_t count = std::min(block, tiles - start);
    transform(start, count);
    at::parallel_for(0, places(tile) * parts, 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        const int64_t first = std::min(outputs, begin % parts * each);
        kernels().winograd_product(task, count, start > 0, begin / parts, first, std::min(outputs, first + each));
      }
    });
  }
  at::parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) { kernels().winograd_grad_weight(task, begin, end); });
  return grad_weight;
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def("conv3x3_weights(Tensor weight, bool transposed, int tile) -> Tensor");
  m.def("conv3x3_forward(Tensor x, Tensor arranged, Tensor? bias) -> Tensor");
  m.def("conv3x3_once(Tensor x, Tensor weight, Tensor? bias, bool transposed, int tile) -> Tensor");
  m.def("conv3x3_weight_gradient(Tensor grad_y, Tensor x, int tile) -> Tensor");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) {
  m.impl("conv3x3_weights", TORCH_FN(dwa_fast::conv3x3_weights));
  m.impl("conv3x3_forward", TORCH_FN(dwa_fast::conv3x3_forward));
  m.impl("conv3x3_once", TORCH_FN(dwa_fast::conv3x3_once));
  m.impl("conv3x3_weight_gradient", TORCH_FN(dwa_fast::conv3x3_weight_gradient));
}

// z = the largest f(x) of each window, or their mean,   x = a(y − m) + β,   sums = (Σ(y − m), Σ(y − m)²)
//
// Lines of an image are taken a few at a time: f(x), or its gradient, of those alone lies in memory, and in the cache, between bn_act's
// kernels and the pooling. All bits are those of bn_act and a pooling behind it, but for the sums, whose blocks are other ones; they
// depend on the shape alone.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/bn_act.h"
#include "cpu/kernels.h"
#include "cpu/level.h"

namespace dwa_fast {
namespace {

constexpr int64_t kPieceRows = 512;  // pixels of y at a time, or one line of windows
constexpr int64_t kLargestWindow = 3;

// Lines [first, last) of y, whose sums a piece makes, and [pooled_first, pooled_last) of z, in one image.
struct Piece {
  int64_t image, first, last, pooled_first, pooled_last;
};

// How an image is pooled, and cut into pieces.
struct Cut {
  Cut(const at::Tensor& y, int64_t window, int64_t stride, int64_t padding, bool averages_) : averages(averages_) {
    TORCH_CHECK(window >= 1 && window <= kLargestWindow, "window must be 1 to ", kLargestWindow, ", got ", window);
    TORCH_CHECK(stride >= 1, "stride must be at least 1, got ", stride);
    TORCH_CHECK(padding >= 0 && 2 * padding <= window, "padding must be 0 to half of the window, got ", padding, " with window ", window);
    TORCH_CHECK(!averages || (stride == window && padding == 0), "means are of windows side by side: stride must be ", window,
                " and padding 0, got ", stride, " and ", padding);
    const int64_t height = y.size(2) + 2 * padding - window, width = y.size(3) + 2 * padding - window;
    TORCH_CHECK(height >= 0 && width >= 0, "y must have room for a window of ", window, " pixels, got shape ", y.sizes());
    pool = {y.size(1),
            y.size(2),
            y.size(3),
            window,
            stride,
            padding,
            height / stride + 1,
            width / stride + 1,
            y.scalar_type() == at::kBFloat16};
    line = pool.width * pool.channels;
    pooled_line = pool.pooled_width * pool.channels;
    lines = std::max<int64_t>(1, kPieceRows / std::max<int64_t>(1, stride * pool.width));
    of_image = (pool.pooled_height + lines - 1) / lines;
    pieces = pool.channels == 0 ? 0 : y.size(0) * of_image;
    room = std::min(pool.height, lines * stride + 2 * window) * line;
  }

  Piece operator[](int64_t piece) const {
    const int64_t first = piece % of_image * lines, last = std::min(first + lines, pool.pooled_height);
    const int64_t end = last == pool.pooled_height ? pool.height : std::min(last * pool.stride, pool.height);
    return {piece / of_image, std::min(first * pool.stride, pool.height), end, first, last};
  }

  // function(the first piece, the one after the last, memory for the lines of a piece), on several threads
  template <typename Function>
  void for_pieces(const Function& function) const {
    const int64_t element = pool.bfloat16 ? 2 : 4;
    at::parallel_for(0, pieces, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, room)), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> memory(new char[room * element]);
      function(begin, end, memory.get());
    });
  }

  at::Tensor pooled(const at::Tensor& y, at::ScalarType type) const {
    const std::array<int64_t, 4> sizes = {y.size(0), y.size(1), pool.pooled_height, pool.pooled_width};
    return at::empty(sizes, y.options().dtype(type).memory_format(at::MemoryFormat::ChannelsLast));
  }

  MeanPool means() const { return {pool.channels, pool.height, pool.width, pool.window, pool.bfloat16}; }

  bool averages;  // whether z is the mean of a window, not the largest
  MaxPool pool;
  int64_t line, pooled_line;  // elements
  int64_t lines;              // of windows in a piece, at most
  int64_t of_image, pieces;
  int64_t room;  // elements of the lines of y that the windows of a piece read, and of its own
};

// Of means, which have no place in their window
at::Tensor no_places(const at::Tensor& y) {
  return at::empty({0}, y.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
}

template <typename T>
T* moved(T* pointer, int64_t elements, bool bfloat16) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return pointer == nullptr ? nullptr : reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + elements * (bfloat16 ? 2 : 4));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_act_pool_forward(const at::Tensor& y, const at::Tensor& mean, const at::Tensor& var,
                                                                   const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                                   c10::string_view activation, const OptionalTensor& slope, int64_t window,
                                                                   int64_t stride, int64_t padding, const OptionalTensor& partials,
                                                                   bool with_sums, bool averages) {
  TORCH_CHECK(!partials.has_value(), "on a CPU sums are complete: partials must not be given");
  Layer layer(y, mean, var, weight, bias, eps);
  const Act act(activation, slope, y);
  const Cut cut(y, window, stride, padding, averages);
  const MaxPool& pool = cut.pool;
  layer.blocks = cut.pieces;
  at::Tensor z = cut.pooled(y, y.scalar_type()), index = averages ? no_places(y) : cut.pooled(y, at::kByte);
  at::Tensor of_pieces = at::empty({layer.blocks, 2, layer.channels}, y.options().dtype(at::kFloat));
  float* const sums = of_pieces.data_ptr<float>();
  uint8_t* const places = index.data_ptr<uint8_t>();
  void* const pooled = z.data_ptr();

  cut.for_pieces([&](int64_t begin, int64_t end, void* memory) {
    for (int64_t each = begin; each < end; ++each) {
      const Piece piece = cut[each];
      const int64_t top = piece.pooled_first * stride - padding, bottom = (piece.pooled_last - 1) * stride - padding + window;
      const int64_t low = std::min(piece.first, std::max<int64_t>(top, 0));
      const int64_t high = std::max(piece.last, std::min(bottom, pool.height));
      // f(x) of the lines [from, to), and where wanted their sums
      const auto activate = [&](int64_t from, int64_t to, float* sums) {
        BnActForward p{};
        layer.fill(p, act);
        p.rows = p.block_rows = (to - from) * pool.width;
        p.y = moved(p.y, (piece.image * pool.height + from) * cut.line, pool.bfloat16);
        p.z = moved(memory, (from - low) * cut.line, pool.bfloat16);
        p.partials = sums;
        kernels().bn_act_forward(p, 0, 1);
      };
      if (low < piece.first) activate(low, piece.first, nullptr);
      activate(piece.first, piece.last, with_sums ? sums + each * 2 * pool.channels : nullptr);
      if (piece.last < high) activate(piece.last, high, nullptr);
      for (int64_t i = piece.pooled_first; i < piece.pooled_last; ++i) {
        const int64_t line = std::max<int64_t>(i * stride - padding, 0) - low;
        const int64_t to = (piece.image * pool.pooled_height + i) * cut.pooled_line;
        const void* const from = moved(memory, line * cut.line, pool.bfloat16);
        if (averages) {
          kernels().mean_pool(cut.means(), from, moved(pooled, to, pool.bfloat16));
        } else {
          kernels().max_pool(pool, from, i, moved(pooled, to, pool.bfloat16), places + to);
        }
      }
    }
  });
  return {z, with_sums ? rows_of(layer.total<float>(of_pieces), 2, layer) : at::empty({0}, layer.mean.options()), index};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_act_pool_backward(const at::Tensor& grad_z, const OptionalTensor& grad_sums,
                                                                    const at::Tensor& y, const at::Tensor& mean, const at::Tensor& var,
                                                                    const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                                    const at::Tensor& index, c10::string_view activation,
                                                                    const OptionalTensor& slope, int64_t window, int64_t stride,
                                                                    int64_t padding, bool parameters, const OptionalTensor& grad_again,
                                                                    bool averages, bool with_y) {
  Layer layer(y, mean, var, weight, bias, eps);
  const Act act(activation, slope, y);
  const Cut cut(y, window, stride, padding, averages);
  const MaxPool& pool = cut.pool;
  layer.blocks = cut.pieces;
  const at::Tensor like = cut.pooled(y, y.scalar_type());
  check_like(grad_z, "grad_z", like);
  const std::vector<int64_t> wanted = averages ? std::vector<int64_t>{0} : like.sizes().vec();
  TORCH_CHECK(index.sizes().vec() == wanted && index.scalar_type() == at::kByte &&
                  (averages || index.is_contiguous(at::MemoryFormat::ChannelsLast)),
              "index must be what bn_act_pool_forward returned, uint8 ", at::IntArrayRef(wanted), ", got ", index.scalar_type(), " ",
              index.sizes());
  at::Tensor dense_grad = grad_z.contiguous(at::MemoryFormat::ChannelsLast), dense_again = dense_like(grad_again, "grad_again", like);
  if (averages && dense_again.defined()) {  // the largest take theirs where they are found
    dense_grad = at::add(dense_grad, dense_again);
    dense_again = at::Tensor();
  }
  const at::Tensor dense_sums = dense_sums_of(grad_sums, layer);
  std::optional<Result> grad_y;
  if (with_y) grad_y.emplace(y);
  const int64_t count = parameters && act.slope.defined() ? 3 : 2;
  at::Tensor partials;
  if (parameters) partials = at::empty({layer.blocks, count, layer.channels}, y.options().dtype(at::kDouble));
  double* const sums = parameters ? partials.data_ptr<double>() : nullptr;
  const void* const pooled = dense_grad.const_data_ptr();
  const void* const again = dense_again.defined() ? dense_again.const_data_ptr() : nullptr;
  const uint8_t* const places = index.const_data_ptr<uint8_t>();
  void* const written = with_y ? grad_y->written.data_ptr() : nullptr;

  cut.for_pieces([&](int64_t begin, int64_t end, void* memory) {
    for (int64_t each = begin; each < end; ++each) {
      const Piece piece = cut[each];
      const int64_t from = piece.image * pool.pooled_height * cut.pooled_line;
      if (averages) {
        for (int64_t i = piece.pooled_first; i < piece.pooled_last; ++i) {
          kernels().mean_pool_backward(cut.means(), moved(pooled, from + i * cut.pooled_line, pool.bfloat16),
                                       moved(memory, (i * stride - piece.first) * cut.line, pool.bfloat16), i == pool.pooled_height - 1);
        }
      } else {
        for (int64_t line = piece.first; line < piece.last; ++line) {
          kernels().max_pool_gather(pool, moved(pooled, from, pool.bfloat16), moved(again, from, pool.bfloat16), places + from, line,
                                    moved(memory, (line - piece.first) * cut.line, pool.bfloat16));
        }
      }
      BnActBackward p{};
      layer.fill(p, act);
      p.rows = p.block_rows = (piece.last - piece.first) * pool.width;
      const int64_t place = (piece.image * pool.height + piece.first) * cut.line;
      p.y = moved(p.y, place, pool.bfloat16);
      p.grad_z = memory;
      p.grad_sums = dense_sums.defined() ? dense_sums.const_data_ptr<float>() : nullptr;
      p.grad_y = moved(written, place, pool.bfloat16);
      p.partials = parameters ? sums + each * count * pool.channels : nullptr;
      kernels().bn_act_backward(p, 0, 1);
    }
  });
  auto [of_parameters, of_slope] = parameter_gradients(partials, layer, act);
  return {with_y ? grad_y->finish() : at::empty({0}, y.options()), of_parameters, of_slope};
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) {
  m.def(
      "bn_act_pool_forward(Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, str activation, Tensor? slope, "
      "int window, int stride, int padding, Tensor(a!)? partials=None, bool with_sums=True, bool averages=False) "
      "-> (Tensor z, Tensor sums, Tensor index)");
  m.def(
      "bn_act_pool_backward(Tensor grad_z, Tensor? grad_sums, Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor index, str activation, Tensor? slope, int window, int stride, int padding, bool parameters=False, "
      "Tensor? grad_again=None, bool averages=False, bool with_y=True) -> (Tensor grad_y, Tensor grad_parameters, Tensor grad_slope)");
}

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) {
  m.impl("bn_act_pool_forward", TORCH_FN(dwa_fast::bn_act_pool_forward));
  m.impl("bn_act_pool_backward", TORCH_FN(dwa_fast::bn_act_pool_backward));
}

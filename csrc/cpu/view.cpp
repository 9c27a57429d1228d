// Crop, bilinear resize to the size of the images, flip, roll; and the adjoint, which view_adam_clip_ calls: it gathers, it does not
// scatter.
//
// Both axes are tables: output pixel o reads source pixels `lower` and `upper`, the second with `weight`. Lines are resampled along the
// width first, then two of them are blended. The adjoint goes the other way round through the tables' transposes.
#include "cpu/view.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cpu/level.h"

namespace dwa_fast {
namespace {

constexpr int64_t kBand = 16;              // output lines that share resampled source lines
constexpr int64_t kGrainElements = 16384;  // elements that are worth waking a thread for

std::vector<Tap> taps(int64_t size, int64_t start, int64_t crop, bool flip, int64_t shift) {
  std::vector<Tap> result(size);
  const int64_t roll = (shift % size + size) % size;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t source = flip ? size - 1 - i : i;
    Tap& tap = result[(i + roll) % size];
    if (crop == size) {
      tap = {start + source, start + source, 0};
      continue;
    }
    const double position =
        std::max(0.0, (static_cast<double>(source) + 0.5) * static_cast<double>(crop) / static_cast<double>(size) - 0.5);
    const int64_t lower = std::min(static_cast<int64_t>(position), crop - 1);
    const int64_t upper = std::min(lower + 1, crop - 1);
    tap = {start + lower, start + upper, upper == lower ? 0 : static_cast<float>(position - static_cast<double>(lower))};
  }
  return result;
}

}  // namespace

Row read_row(const at::Tensor& rows, const at::Tensor& step, int64_t height, int64_t width) {
  TORCH_CHECK(rows.dim() == 2 && rows.size(1) == 7 && rows.scalar_type() == at::kInt, "rows must be Int [T, 7], got ", rows.scalar_type(),
              " ", rows.sizes());
  TORCH_CHECK(step.dim() == 0 && step.scalar_type() == at::kLong, "step must be a Long scalar, got ", step.scalar_type(), " ",
              step.sizes());
  const int64_t t = *step.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(0 <= t && t < rows.size(0), "step must be one of the rows, 0 to ", rows.size(0) - 1, ", got ", t);
  const int32_t* first = rows.const_data_ptr<int32_t>() + t * rows.stride(0);
  std::array<int64_t, 7> column;
  for (int64_t i = 0; i < 7; ++i) column[i] = first[i * rows.stride(1)];
  const Row row{column[0], column[1], column[2], column[3], column[4], column[5], column[6]};
  TORCH_CHECK_VALUE(
      row.top >= 0 && row.left >= 0 && row.height > 0 && row.width > 0 && row.top + row.height <= height && row.left + row.width <= width,
      "the crop of row ", t, " must lie inside the images, ", height, " x ", width, ", got top ", row.top, ", left ", row.left, ", height ",
      row.height, ", width ", row.width);
  return row;
}

Readers::Readers(const std::vector<Tap>& taps, int64_t size) : first(size + 1) {
  for (const Tap& tap : taps) {
    ++first[tap.lower + 1];
    if (tap.upper != tap.lower) ++first[tap.upper + 1];
  }
  for (int64_t s = 0; s < size; ++s) first[s + 1] += first[s];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  pixel.resize(first[size]);
  weight.resize(first[size]);
  for (size_t o = 0; o < taps.size(); ++o) {
    const Tap& tap = taps[o];
    add(next[tap.lower]++, o, 1 - tap.weight);
    if (tap.upper != tap.lower) add(next[tap.upper]++, o, tap.weight);
  }
}

void Readers::add(int64_t entry, size_t o, float share) {
  pixel[entry] = static_cast<int64_t>(o);
  weight[entry] = share;
}

Adjoint::Adjoint(const at::Tensor& seen, const Row& row)
    : height_(seen.size(2)),
      length_(seen.size(3) * seen.size(1)),
      seen_(seen.const_data_ptr()),
      of_line_(taps(height_, row.top, row.height, false, row.down), height_),
      of_column_(taps(seen.size(3), row.left, row.width, row.flip != 0, row.right), seen.size(3)) {
  const int64_t width = seen.size(3);
  shared_.width = width;
  shared_.channels = seen.size(1);
  shared_.bfloat16 = seen.scalar_type() == at::kBFloat16;
  shared_.roll = (row.right % width + width) % width;
  const bool rolls_only = row.width == width && row.flip == 0;
  shared_.column_first = rolls_only ? nullptr : of_column_.first.data();
  shared_.column = of_column_.pixel.data();
  shared_.column_weight = of_column_.weight.data();
}

void Adjoint::collect(int64_t line, float* room, float* out) const {
  const int64_t y = line % height_, first = of_line_.first[y];
  const int64_t image = line / height_ * height_ * length_ * (shared_.bfloat16 ? 2 : 4);  // in bytes
  ViewAdjoint p = shared_;
  p.seen = static_cast<const char*>(seen_) + image;
  p.readers = of_line_.first[y + 1] - first;
  p.line = of_line_.pixel.data() + first;
  p.line_weight = of_line_.weight.data() + first;
  p.room = room;
  p.out = out;
  kernels().view_adjoint(p);
}

namespace {

// One source line, resampled along the width, as [W, C].
void resample_line(const float* source, int64_t pixel_stride, int64_t channel_stride, int64_t channels, const std::vector<Tap>& columns,
                   float* line) {
  for (const Tap& tap : columns) {
    const float* lower = source + tap.lower * pixel_stride;
    const float* upper = source + tap.upper * pixel_stride;
    if (tap.weight == 0) {
      for (int64_t c = 0; c < channels; ++c) *line++ = lower[c * channel_stride];
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        *line++ = (1 - tap.weight) * lower[c * channel_stride] + tap.weight * upper[c * channel_stride];
      }
    }
  }
}

template <typename T>
void blend(const float* lower, const float* upper, float weight, int64_t count, T* out) {
  if (weight == 0) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(lower[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>((1 - weight) * lower[i] + weight * upper[i]);
  }
}

// A line that is only rolled along the width, as [W, C].
template <typename T>
void roll_line(const float* source, int64_t pixel_stride, int64_t channel_stride, int64_t channels, int64_t width, int64_t shift, T* out) {
  const int64_t roll = (shift % width + width) % width;
  const bool dense = channel_stride == 1 && pixel_stride == channels;
  const auto copy = [&](int64_t first, int64_t count, T* target) {
    const float* from = source + first * pixel_stride;
    if (dense) {
      for (int64_t i = 0; i < count * channels; ++i) target[i] = static_cast<T>(from[i]);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < count; ++i) target[i * channels + c] = static_cast<T>(from[i * pixel_stride + c * channel_stride]);
      }
    }
  };
  copy(0, width - roll, out + roll * channels);
  copy(width - roll, roll, out);
}

template <typename T>
void forward(const at::Tensor& images, const Row& row, T* out) {
  const int64_t count = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t image_stride = images.stride(0), channel_stride = images.stride(1);
  const int64_t line_stride = images.stride(2), pixel_stride = images.stride(3);
  const float* const pixels = images.const_data_ptr<float>();
  const std::vector<Tap> lines = taps(height, row.top, row.height, false, row.down);
  const std::vector<Tap> columns = taps(width, row.left, row.width, row.flip != 0, row.right);
  const bool rolls_only = row.height == height && row.width == width && row.flip == 0;
  const int64_t length = width * channels;
  const int64_t bands = (height + kBand - 1) / kBand;

  at::parallel_for(0, count * bands, std::max<int64_t>(1, kGrainElements / (kBand * length)), [&](int64_t begin, int64_t end) {
    // A line and the next one are in different buffers.
    std::array<std::vector<float>, 2> buffers;
    if (!rolls_only) buffers = {std::vector<float>(length), std::vector<float>(length)};
    for (int64_t item = begin; item < end; ++item) {
      const float* image = pixels + item / bands * image_stride;
      T* const target = out + item / bands * height * length;
      std::array<int64_t, 2> held = {-1, -1};
      const auto resampled = [&](int64_t line) {
        const int64_t slot = line % 2;
        if (held[slot] != line) {
          resample_line(image + line * line_stride, pixel_stride, channel_stride, channels, columns, buffers[slot].data());
          held[slot] = line;
        }
        return buffers[slot].data();
      };
      const int64_t first = item % bands * kBand;
      for (int64_t y = first; y < std::min(first + kBand, height); ++y) {
        const Tap& tap = lines[y];
        if (rolls_only) {
          roll_line(image + tap.lower * line_stride, pixel_stride, channel_stride, channels, width, row.right, target + y * length);
        } else {
          const float* lower = resampled(tap.lower);
          blend(lower, resampled(tap.upper), tap.weight, length, target + y * length);
        }
      }
    }
  });
}

at::Tensor view(const at::Tensor& images, const at::Tensor& rows, const at::Tensor& step, at::ScalarType dtype) {
  TORCH_CHECK(images.dim() == 4, "images must be [N, C, H, W], got shape ", images.sizes());
  TORCH_CHECK(images.scalar_type() == at::kFloat, "images must be float32, got ", images.scalar_type());
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "dtype must be float32 or bfloat16 on a CPU, got ", dtype);
  at::Tensor out = at::empty(images.sizes(), images.options().dtype(dtype).memory_format(at::MemoryFormat::ChannelsLast));
  if (images.numel() == 0) return out;
  const Row row = read_row(rows, step, images.size(2), images.size(3));
  if (dtype == at::kFloat) {
    forward(images, row, out.data_ptr<float>());
  } else {
    forward(images, row, out.data_ptr<c10::BFloat16>());
  }
  return out;
}

}  // namespace
}  // namespace dwa_fast

TORCH_LIBRARY_FRAGMENT(dwa_fast, m) { m.def("view(Tensor images, Tensor rows, Tensor step, ScalarType dtype) -> Tensor"); }

TORCH_LIBRARY_IMPL(dwa_fast, CPU, m) { m.impl("view", TORCH_FN(dwa_fast::view)); }

// The vectorised kernels: their arguments, and the table that every level fills. No header of PyTorch may be included here: what
// is compiled for a newer instruction set must not leak into code that older machines run.
#pragma once

#include <cstdint>

namespace dwa_fast {

// What bn_act applies after the BatchNorm and the skip.
enum class Activation : int32_t { kNone, kRelu, kRelu6, kSilu, kHardswish, kGelu, kGeluTanh, kLeakyRelu };

// Rows of y, [rows, channels], are the pixels of a channels-last tensor. They are cut into blocks whose size depends on the number of
// rows alone, a multiple of 8, so that a block's bits of the mask are bytes of its own.
struct BnAct {
  int64_t rows;
  int64_t channels;
  int64_t block_rows;
  bool bfloat16;  // precision of y, z, skip and their gradients: bfloat16 or float32
  Activation activation;
  const void* y;
  const float* mean;   // [C]
  const float* scale;  // [C]: a = γ/√(v + ε)
  const float* bias;   // [C] or null: 0
  const float* slope;  // [C]: of kLeakyRelu below 0
};

struct BnActForward : BnAct {
  const void* skip;  // or null
  void* z;
  uint8_t* mask;    // with skip and kRelu: one bit per element, in memory order, set where z > 0
  float* partials;  // [blocks, 2, C]: each block's Σ(y − m) and Σ(y − m)²
};

// The gradient of a second use of z, which is added to that of the first and rounded to their precision: channels-last, of the pixels in
// every `stride`-th row and column alone.
struct GradAgain {
  const void* first;              // or null: there is none
  int64_t stride, height, width;  // those of y
};

struct BnActBackward : BnAct {
  const void* grad_z;
  GradAgain again;
  const float* grad_sums;  // [2, C] or null: 0
  const uint8_t* mask;     // of the forward pass with skip and kRelu, else null
  const void* skip;        // with an activation other than kNone and kRelu: what it was applied to is recomputed from y and skip
  void* grad_y;            // or null
  void* grad_skip;         // with mask or skip
  double* partials;  // [blocks, 2, C] or null: each block's Σ g·(y − m) and Σ g, where g is gz times the derivative of the activation;
                     // with kLeakyRelu [blocks, 3, C]: also Σ gz·min(x, 0), where x is what it was applied to
};

// Two layers whose sum is activated, x = a(y − m) + a'(y' − m') + β: the first one is that of BnAct, with the sum of both β.
struct BnActJoin : BnAct {
  const void* skip;         // y'
  const float* skip_mean;   // [C]
  const float* skip_scale;  // [C]
};

struct BnActJoinForward : BnActJoin {
  void* z;
  float* partials;  // [blocks, 4, C]: each block's Σ(y − m), Σ(y − m)², and both of y'
};

struct BnActJoinBackward : BnActJoin {
  const void* grad_z;
  GradAgain again;
  const float* grad_sums;       // [2, C]
  const float* skip_grad_sums;  // [2, C]
  void* grad_y;
  void* grad_skip;
  double* partials;  // [blocks, 3, C] or null: each block's Σ g·(y − m), Σ g and Σ g·(y' − m'); with kLeakyRelu [blocks, 4, C]
};

// In the rows of a channels-last tensor, or in the planes of a contiguous one.
struct Moments : BnAct {
  int64_t plane;           // H·W of a contiguous tensor; 0: channels-last
  float* partials;         // forward: [blocks, 2, C] of rows, [N·C, 2] of planes: Σ(y − m) and Σ(y − m)²
  const float* grad_sums;  // backward: [2, C]
  void* grad_y;            // backward
};

// Means over the windows of a channels-last tensor, [N, H, W, C].
struct MeanPool {
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t window;  // pixels of a side
  bool bfloat16;   // precision: bfloat16 or float32
};

// Windows over a channels-last tensor, [N, H, W, C]; pixels beyond its border do not count.
struct MaxPool {
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t window;  // pixels of a side
  int64_t stride;
  int64_t padding;
  int64_t pooled_height;
  int64_t pooled_width;
  bool bfloat16;  // precision: bfloat16 or float32
};

// A 3×3 convolution, or a gradient of one, in tiles of T×T pixels: channels-last, stride 1, one pixel of zeros around. Tiles are counted
// line by line, image after image; those at the last rows and columns may reach beyond them.
struct Winograd {
  int tile;  // T, 2 or 4; a tile has (T + 2)² places
  int64_t height;
  int64_t width;
  int64_t inputs;   // channels, a multiple of kWinogradPanel
  int64_t outputs;  // channels, a multiple of kWinogradPanel
  int64_t tiles_high;
  int64_t tiles_wide;
  const float* x;  // [N, H, W, inputs]
};

constexpr int64_t kWinogradPanel = 16;                  // outputs whose weights lie together
constexpr int64_t kWinogradGroup = 2 * kWinogradPanel;  // outputs whose products are there at a time
constexpr int64_t kWinogradPadding = 16;                // floats behind a row: rows of a power of two would share a few lines of the cache

struct WinogradForward : Winograd {
  const float* bias;  // [outputs] or null: 0
  float* y;           // [N, H, W, outputs]
};

struct WinogradWeights {
  int tile;
  int64_t inputs;  // of the convolution that is to be computed
  int64_t outputs;
  bool transposed;      // whether that is the gradient of the input of the layer
  const float* weight;  // [O, 3, 3, C] of the layer; transposed: [inputs, 3, 3, outputs]
  int64_t first;        // panel, of 16 outputs, with which `arranged` begins
  float* arranged;      // [panels, (T + 2)², inputs, 16]
};

struct WinogradGradient : Winograd {
  const float* grad_y;  // [N, H, W, outputs]
  int64_t block;        // tiles of which `pixels` and `gradients` have room
  float* pixels;        // [(T + 2)², block, inputs + padding]
  float* gradients;     // [(T + 2)², block, outputs + padding]
  int64_t first;        // outputs that `products` has room for: from this one on,
  int64_t held;         // as many
  float* products;      // [(T + 2)², held, inputs]
  float* grad_weight;   // [outputs, 3, 3, inputs]
};

struct AdamClip {
  float* images;
  const float* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  const float* low;  // one bound per element
  const float* high;
  float gradient_scale;  // what the gradient is multiplied with first
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float rate;      // lr / (1 − β₁^t)
  float inverse2;  // 1 / (1 − β₂^t)
};

// One source line of the adjoint of view.
struct ViewAdjoint {
  int64_t width;
  int64_t channels;
  bool bfloat16;     // precision of seen: bfloat16 or float32
  const void* seen;  // gradient of the view of one image, [H, W, C]
  // The seen lines that read the source line.
  int64_t readers;
  const int64_t* line;
  const float* line_weight;
  // The seen columns that read source column x: entries column_first[x] … column_first[x + 1] − 1. Null: column (x + roll) mod W alone.
  const int64_t* column_first;
  const int64_t* column;
  const float* column_weight;
  int64_t roll;
  float* room;  // [W·C + 4], to work in
  float* out;   // [W, C]
};

// Functions of blocks take the first block and the one after the last.
struct Kernels {
  void (*bn_act_forward)(const BnActForward&, int64_t, int64_t);
  void (*bn_act_backward)(const BnActBackward&, int64_t, int64_t);
  void (*bn_act_join_forward)(const BnActJoinForward&, int64_t, int64_t);
  void (*bn_act_join_backward)(const BnActJoinBackward&, int64_t, int64_t);
  void (*moments)(const Moments&, int64_t, int64_t);           // the range is of planes in a contiguous tensor
  void (*moments_backward)(const Moments&, int64_t, int64_t);  // as above
  void (*mean_pool)(const MeanPool&, const void*, void*);      // the first of the lines that it reads, the line that it writes
  void (*mean_pool_backward)(const MeanPool&, const void*, void*,
                             bool);  // the line that it reads, the first that it writes, if none follow
  // What the windows of a pooled line read, from the first line that exists on; the pooled line; its line of the places that were largest
  void (*max_pool)(const MaxPool&, const void*, int64_t, void*, uint8_t*);
  // Of one image the gradient, or null or a second one, and the places; a line of the unpooled gradient
  void (*max_pool_gather)(const MaxPool&, const void*, const void*, const uint8_t*, int64_t, void*);
  // Of a block of tiles, its first and their number, a range of them; to [(T + 2)², tiles, inputs + padding]
  void (*winograd_pixels)(const Winograd&, int64_t, int64_t, int64_t, int64_t, float*);
  // Of that block, with those pixels: a group of outputs from the one after their weights on, with room for [(T + 2)², tiles, group]
  void (*winograd)(const WinogradForward&, int64_t, int64_t, const float*, const float*, int64_t, float*);
  void (*winograd_weights)(const WinogradWeights&, int64_t, int64_t);  // a range of panels
  // The tiles from the third argument on, of a block that begins at the second, as many as the fourth says
  void (*winograd_transform)(const WinogradGradient&, int64_t, int64_t, int64_t);
  // Of a block of that many tiles: the product of one place for a range of outputs, added to what is there or not
  void (*winograd_product)(const WinogradGradient&, int64_t, bool, int64_t, int64_t, int64_t);
  void (*winograd_grad_weight)(const WinogradGradient&, int64_t, int64_t);  // a range of outputs
  void (*adam_clip)(const AdamClip&, int64_t);                              // the first elements, that many
  void (*view_adjoint)(const ViewAdjoint&);
};

namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
#endif

}  // namespace dwa_fast

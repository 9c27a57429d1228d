// Everything that a level compiles: included once by each level_*.cpp, which names the level, its vectors and its instructions.
namespace dwa_fast::DWA_FAST_LEVEL {
namespace {
using Bf16 = uint16_t;  // its bits
#include DWA_FAST_VECTOR
// The operators on those vectors.
#include "cpu/activation_kernels.h"
#include "cpu/adam_clip_kernel.h"
#include "cpu/bn_act_kernels.h"
#include "cpu/conv3x3_kernels.h"
#include "cpu/max_pool_kernels.h"
#include "cpu/mean_pool_kernels.h"
#include "cpu/moments_kernels.h"
#include "cpu/view_kernel.h"
// On those of bn_act.
#include "cpu/bn_act_join_kernels.h"
}  // namespace

const Kernels kKernels = {
    bn_act_forward,   bn_act_backward,    bn_act_join_forward, bn_act_join_backward,
    moments,          moments_backward,   mean_pool,           mean_pool_backward,
    max_pool,         max_pool_gather,    winograd_pixels,     winograd,
    winograd_weights, winograd_transform, winograd_product,    winograd_grad_weight,
    adam_clip,        view_adjoint,
};
}  // namespace dwa_fast::DWA_FAST_LEVEL

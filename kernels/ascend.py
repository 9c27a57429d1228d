"""Triton twin of dwa_fast.ops.ascend_: the sum of squares of every block, their sum in a fixed order, the update; three launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import on_device_of

_BLOCK = 4096  # float32 per program: 16 KiB, one 16-byte access per thread and row of the tile
_FINAL_BLOCK = 1024
_WARPS = 8


@triton.jit
def _ascend_square_sum_kernel(gradients, partials, count, BLOCK: tl.constexpr):
    """partials_i = Σ g²   over block i of the arena, float64: squares of float32 neither overflow nor vanish in it."""
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradients + offsets, mask=offsets < count, other=0.0).to(tl.float64)
    tl.store(partials + program, tl.sum(g * g, axis=0))


@triton.jit
def _ascend_norm_kernel(partials, norm, scale, count, radius, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    """norm = √Σ partials,   scale = radius / (norm + 1e-12)   or radius where NORMALIZE is off; one program, so the order is fixed."""
    lanes = tl.zeros([BLOCK], dtype=tl.float64)
    first = 0
    while first < count:  # not range(count): with Triton 3.6 and numpy 2.4 the interpreter cannot take a tensor for its bound
        offsets = first + tl.arange(0, BLOCK)
        lanes += tl.load(partials + offsets, mask=offsets < count, other=0.0)
        first += BLOCK
    root = tl.sqrt(tl.sum(lanes, axis=0))
    tl.store(norm, root.to(tl.float32))
    step = radius
    if NORMALIZE:
        step = (radius / (root + 1e-12)).to(tl.float32)
    tl.store(scale, step)


@triton.jit
def _ascend_update_kernel(weights, gradients, compute, norm, scale, count, HAS_COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """w ← w + scale g,   compute ← round(w);   with a zero norm the weights keep their bits."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    w = tl.load(weights + offsets, mask=inside)
    g = tl.load(gradients + offsets, mask=inside)
    moves = tl.load(norm) != 0.0
    w = tl.where(moves, w + tl.load(scale) * g, w)
    tl.store(weights + offsets, w, mask=inside)
    if HAS_COMPUTE:
        tl.store(compute + offsets, w.to(compute.dtype.element_ty), mask=inside)


def ascend_(
    weights: Tensor,  # [P], float32, updated in place
    gradients: Tensor,  # [P], float32
    radius: float,
    normalize: bool = True,
    compute: Tensor | None = None,  # [P], bfloat16 or float16, rewritten
) -> Tensor:
    """w ← w + radius · g / (‖g‖₂ + 1e-12); arguments and result as in dwa_fast.ops.ascend_."""
    count = weights.numel()
    programs = triton.cdiv(count, _BLOCK)
    partials = torch.empty(programs, dtype=torch.float64, device=weights.device)  # [programs]
    norm = torch.empty((), dtype=torch.float32, device=weights.device)
    scale = torch.empty((), dtype=torch.float32, device=weights.device)
    with on_device_of(weights):
        if programs:
            _ascend_square_sum_kernel[(programs,)](gradients, partials, count, BLOCK=_BLOCK, num_warps=_WARPS)
        _ascend_norm_kernel[(1,)](partials, norm, scale, programs, radius, NORMALIZE=normalize, BLOCK=_FINAL_BLOCK, num_warps=_WARPS)
        if programs:
            copy, copies = weights if compute is None else compute, compute is not None
            _ascend_update_kernel[(programs,)](
                weights, gradients, copy, norm, scale, count, HAS_COMPUTE=copies, BLOCK=_BLOCK, num_warps=_WARPS
            )
    return norm

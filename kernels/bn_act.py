"""Triton twin of dwa_fast.ops.bn_act: BatchNorm in eval mode, skip, activation and the shifted moments in one pass over the features;
the gradients, where asked those of γ, β and the slope too, in a second one.

Features are channels-last. Since a row of `layout.Tiles` is a multiple of 16 elements, loads are 16 bytes wide and no byte of the mask
straddles two rows, whatever C is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.bn_layer import (
    activated,
    activation_gradient,
    constants,
    gradient_of_z,
    mask_bytes,
    parameter_gradients,
    passes,
    per_channel,
)
from dwa_fast.kernels.layout import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    WARPS,
    channels_last,
    gradients_to_read,
    laid_out_like,
    left_behind,
    on_device_of,
    tiles,
)
from dwa_fast.kernels.partial_sums import add_up, sums_to_write

_FEW_ROWS = BLOCK_ROWS // 2  # of the tiles of two launches for which compilers would otherwise spill a register on sm_100


@triton.jit(do_not_specialize=["count", "rows", "programs"])
def _bn_act_forward_kernel(
    y, skip, z, bits, partials, mean, var, weight, bias, slope, eps,
    count, rows, columns, channels, programs,
    ACTIVATION: tl.constexpr, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """z = f(a(y − m) + β [+ skip]),   where asked partials = (Σ(y − m), Σ(y − m)²) over the rows of this program.

    Bit i of the mask, in memory order, says whether a ReLU lets element i pass; NaN passes, as in PyTorch.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    channel = column % channels
    m, a, b = constants(mean, var, weight, bias, eps, channel, used)
    s = None if slope is None else tl.load(slope + channel, mask=used, other=0.0)
    row = tl.arange(0, BLOCK_ROWS)
    inner = row[:, None] * columns + column[None, :]
    if partials is not None:
        first = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
        second = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
    start = tl.program_id(1) * BLOCK_ROWS
    while start < rows:
        base = start.to(tl.int64) * columns
        inside = (start + row < rows)[:, None] & used[None, :]
        if RAGGED:
            inside = inside & (inner < left_behind(count, base))
        value = tl.load(y + base + inner, mask=inside, other=0.0).to(tl.float32)
        if skip is not None:
            added = tl.load(skip + base + inner, mask=inside, other=0.0).to(tl.float32)
        shifted = tl.where(inside, value - m[None, :], 0.0)
        if partials is not None:
            # Rows that one thread holds are added at once: half the registers that a sum per element of the tile would take.
            halves = tl.reshape(shifted, [2, BLOCK_ROWS // 2, BLOCK_COLUMNS])
            first += tl.sum(halves, axis=0)
            second += tl.sum(halves * halves, axis=0)
        out = tl.fma(shifted, a[None, :], b[None, :])
        if skip is not None:
            out += added
        if ACTIVATION == "relu":
            blocked = out <= 0.0
            out = tl.where(blocked, 0.0, out)
            if bits is not None:
                single = tl.reshape((inside & ~blocked).to(tl.int32), [BLOCK_ROWS, BLOCK_COLUMNS // 8, 8])
                packed = tl.sum(single << tl.arange(0, 8)[None, None, :], axis=2)
                byte, written = mask_bytes(start, rows, columns, count, base, RAGGED, BLOCK_ROWS, BLOCK_COLUMNS)
                tl.store(bits + base // 8 + byte, packed.to(tl.uint8), mask=written)
        else:
            out = activated(out, s, ACTIVATION)
        tl.store(z + base + inner, out.to(z.dtype.element_ty), mask=inside)
        start += programs * BLOCK_ROWS
    if partials is not None:
        place = partials + tl.program_id(1) * columns + column
        tl.store(place, tl.sum(first, axis=0), mask=used)
        tl.store(place + programs * columns, tl.sum(second, axis=0), mask=used)


@triton.jit(do_not_specialize=["count", "rows", "programs", "height", "width"])
def _bn_act_backward_kernel(
    grad_z, grad_alias, grad_later, later_mask, grad_sums, y, skip, bits, grad_y, grad_skip, partials, mean, var, weight, bias, slope, eps,
    count, rows, columns, channels, programs, height, width, moment_stride,
    ACTIVATION: tl.constexpr, Z_STRIDE: tl.constexpr, ALIAS_STRIDE: tl.constexpr, LATER_STRIDE: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_skip = f'(x)·grad_z,   grad_y = a·f'(x)·grad_z + gs1 + 2·gs2·(y − m); without stored bits x comes from y and skip.

    grad_z stands for the sum that `gradient_of_z` gives. Without grad_y or grad_skip none is made.
    Where asked, partials = (Σ f'(x)·grad_z·(y − m), Σ f'(x)·grad_z[, Σ grad_z·min(x, 0) with a slope]) over the rows of this program.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    channel = column % channels
    m, a, b = constants(mean, var, weight, bias, eps, channel, used)
    s = None if slope is None else tl.load(slope + channel, mask=used, other=0.0)
    if grad_sums is not None:
        gs1 = tl.load(grad_sums + channel, mask=used, other=0.0).to(tl.float32)
        gs2 = 2.0 * tl.load(grad_sums + moment_stride + channel, mask=used, other=0.0).to(tl.float32)
    row = tl.arange(0, BLOCK_ROWS)
    inner = row[:, None] * columns + column[None, :]
    if partials is not None:
        first = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
        second = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
        if slope is not None:
            third = tl.zeros([BLOCK_ROWS // 2, BLOCK_COLUMNS], dtype=tl.float32)
    start = tl.program_id(1) * BLOCK_ROWS
    while start < rows:
        base = start.to(tl.int64) * columns
        inside = (start + row < rows)[:, None] & used[None, :]
        if RAGGED:
            inside = inside & (inner < left_behind(count, base))
        gradient = gradient_of_z(
            grad_z, grad_alias, grad_later, later_mask, start, base, inner, inside, channel, count, rows, columns, channels, height, width,
            Z_STRIDE, ALIAS_STRIDE, LATER_STRIDE, RAGGED, BLOCK_ROWS, BLOCK_COLUMNS
        )  # fmt: skip
        if grad_sums is not None or partials is not None or (ACTIVATION != "none" and bits is None):
            shifted = tl.load(y + base + inner, mask=inside, other=0.0).to(tl.float32) - m[None, :]
        if ACTIVATION != "none":
            if bits is not None:
                gradient = tl.where(passes(bits, start, rows, columns, count, base, RAGGED, BLOCK_ROWS, BLOCK_COLUMNS), gradient, 0.0)
            else:
                x = tl.fma(shifted, a[None, :], b[None, :])
                if skip is not None:
                    x += tl.load(skip + base + inner, mask=inside, other=0.0).to(tl.float32)
                if partials is not None and slope is not None:
                    below = tl.where(inside & ~(x > 0.0), gradient * x, 0.0)
                    third += tl.sum(tl.reshape(below, [2, BLOCK_ROWS // 2, BLOCK_COLUMNS]), axis=0)
                gradient = activation_gradient(x, gradient, s, ACTIVATION)
            if grad_skip is not None:
                tl.store(grad_skip + base + inner, gradient.to(grad_skip.dtype.element_ty), mask=inside)
        if partials is not None:
            halves = tl.reshape(gradient, [2, BLOCK_ROWS // 2, BLOCK_COLUMNS])
            first += tl.sum(halves * tl.reshape(shifted, [2, BLOCK_ROWS // 2, BLOCK_COLUMNS]), axis=0)
            second += tl.sum(halves, axis=0)
        if grad_y is not None:
            out = gradient * a[None, :]
            if grad_sums is not None:
                out = tl.fma(gradient, a[None, :], tl.fma(shifted, gs2[None, :], gs1[None, :]))
            tl.store(grad_y + base + inner, out.to(grad_y.dtype.element_ty), mask=inside)
        start += programs * BLOCK_ROWS
    if partials is not None:
        place = partials + tl.program_id(1) * columns + column
        tl.store(place, tl.sum(first, axis=0), mask=used)
        tl.store(place + programs * columns, tl.sum(second, axis=0), mask=used)
        if slope is not None:
            tl.store(place + 2 * programs * columns, tl.sum(third, axis=0), mask=used)


def registers(has_skip: bool, activation: str) -> int:
    """Of a thread of the forward kernel, compiled for sm_90, at most: from this follows how many programs a GPU holds."""
    return 96 if has_skip or activation not in ("none", "relu", "relu6") else 72


def backward_registers(activation: str) -> int:
    """Of a thread of the backward kernel where it leaves sums."""
    return 160 if activation in ("relu6", "gelu_tanh") else 128


def bn_act_forward(
    y: Tensor,  # [N, C, H, W] float32, bfloat16 or float16
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    eps: float,
    skip: Tensor | None,  # like y
    activation: str,
    slope: Tensor | None,  # [1] or [C] float32, with leaky_relu
    partials: Tensor | None = None,  # [2, R, C] float32, written
    with_sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """z like y, sums [2, C] float32, and with skip and ReLU the mask, uint8 [⌈numel/8⌉] in channels-last order (else empty).

    One launch, the pass over y, which leaves a row of partial sums per program; without `partials` another one, which adds them up.
    With it nothing is written to sums: they are the sums of its rows. Not with_sums there are neither: sums is empty.
    """
    channels = y.shape[1]
    like, y = y, channels_last(y)
    skip = None if skip is None else channels_last(skip)
    keeps_mask = activation == "relu" and skip is not None
    z = torch.empty_like(y)
    bits = torch.empty(triton.cdiv(y.numel(), 8) if keeps_mask else 0, dtype=torch.uint8, device=y.device)
    if y.numel() == 0:
        if partials is not None:
            partials.zero_()
        return torch.empty_like(like), torch.zeros((2, channels) if with_sums else 0, device=y.device), bits
    cut = tiles(y, registers=registers(skip is not None, activation) if with_sums else None)
    sums = torch.empty((2, channels) if with_sums else 0, dtype=torch.float32, device=y.device)
    rows = sums_to_write(partials, cut, y, 2) if with_sums else None
    with on_device_of(y):
        _bn_act_forward_kernel[(cut.column_blocks, cut.programs)](
            y, skip, z, bits if keeps_mask else None, rows, mean, var, weight, bias, per_channel(slope, channels), eps,
            y.numel(), cut.rows, cut.columns, channels, cut.programs,
            ACTIVATION=activation, RAGGED=y.numel() % cut.columns != 0,
            BLOCK_ROWS=BLOCK_ROWS if with_sums or y.element_size() < 4 else _FEW_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        if rows is not None and partials is None:
            add_up(rows, sums)
    return laid_out_like(z, like), sums, bits


def bn_act_backward(
    grad_z: Tensor,  # [N, C, H, W]
    grad_sums: Tensor | None,  # [2, C] float32; None: zero
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    eps: float,
    skip: Tensor | None,  # like y: of the forward pass, where it had one before an activation other than ReLU
    mask: Tensor,  # uint8 [⌈numel/8⌉] of the forward pass where it had skip and ReLU
    has_skip: bool,
    activation: str,
    slope: Tensor | None,  # [1] or [C] float32, with leaky_relu
    parameters: bool = False,  # whether the gradients of γ, β and the slope are wanted
    grad_alias: Tensor | None = None,  # [N, C, ⌈H/s⌉, ⌈W/s⌉]: added to grad_z in every s-th row and column
    alias_stride: int = 1,  # s
    with_y: bool = True,  # whether grad_y is wanted
    with_skip: bool = True,  # whether grad_skip is
    grad_later: Tensor | None = None,  # [N, C, H, W]: of the result of a later layer, whose skip z is; grad_alias is that of its alias then
    later_mask: Tensor | None = None,  # uint8 [⌈numel/8⌉] of the later layer; with grad_later alone
    shares: Tensor | None = None,  # [2, C] float32, written with the gradients of γ and β: see `partial_sums.add_up`
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_y like y; grad_skip like y with skip and activation (else empty: it is grad_z); those of γ and β, [2, C], and of the slope.

    What is not wanted is empty. One launch; with the gradients of γ and β a second one, which adds up the programs' partial sums.
    """
    channels = y.shape[1]
    like, y = y, channels_last(y)
    changes_skip, keeps_mask = has_skip and activation != "none", has_skip and activation == "relu"
    skip = channels_last(skip) if skip is not None and changes_skip and not keeps_mask else None
    makes_skip = changes_skip and with_skip
    sums = 0 if not parameters else 2 if slope is None else 3
    grad_parameters = torch.empty((sums, channels) if parameters else 0, dtype=torch.float32, device=y.device)
    if y.numel() == 0:
        of_y, of_skip = (torch.empty_like(like) if wanted else y.new_empty(0) for wanted in (with_y, makes_skip))
        return of_y, of_skip, *parameter_gradients(grad_parameters.zero_(), slope)
    if grad_sums is not None and grad_sums.stride(1) != 1:
        grad_sums = grad_sums.contiguous()
    grad_y = torch.empty_like(y) if with_y else None
    grad_skip = torch.empty_like(y) if makes_skip else None
    read, strides = gradients_to_read(y, grad_z, grad_alias, alias_stride, grad_later, later_mask)
    cut = tiles(y, registers=backward_registers(activation) if parameters else None)
    partials = sums_to_write(None, cut, y, sums) if parameters else None
    with on_device_of(y):
        _bn_act_backward_kernel[(cut.column_blocks, cut.programs)](
            *read, grad_sums, y, skip, mask if keeps_mask else None, grad_y, grad_skip, partials,
            mean, var, weight, bias, per_channel(slope, channels), eps,
            y.numel(), cut.rows, cut.columns, channels, cut.programs, *y.shape[2:], 0 if grad_sums is None else grad_sums.stride(0),
            ACTIVATION=activation, **strides, RAGGED=y.numel() % cut.columns != 0,
            BLOCK_ROWS=BLOCK_ROWS if with_skip else _FEW_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        if partials is not None:
            add_up(partials, grad_parameters, var, eps, weight, shares, y.numel() // channels)
    of_y, of_skip = (y.new_empty(0) if each is None else laid_out_like(each, like) for each in (grad_y, grad_skip))
    return of_y, of_skip, *parameter_gradients(grad_parameters, slope)

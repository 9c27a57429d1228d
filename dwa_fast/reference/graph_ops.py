"""Plain operators that read schedule and counter as tensors: one compiled or captured graph then serves every iteration."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dwa_fast.reference import ops


def matching_loss(
    sums: Tensor,  # [2, ΣC] from bn_act, layer after layer
    variances: Tensor,  # [ΣC] variances v that are aimed at
    channel_ptr: Tensor,  # [L + 1] int64
    counts: Tensor,  # [L] int64
    weights: Tensor,  # [L]
    means: Tensor | None = None,  # [ΣC] by how much the means that are aimed at exceed those of the sums
) -> Tensor:  # [2]: R_mean, R_var
    """Both matching terms of all layers at once; as `reference.ops.matching_loss` without reading the layers' sizes on the host."""
    layer = torch.searchsorted(channel_ptr, torch.arange(sums.shape[1], device=sums.device), right=True) - 1
    members = (layer == torch.arange(len(weights), device=sums.device)[:, None]).to(sums.dtype)  # [L, ΣC]
    moments = sums / counts.index_select(0, layer).to(sums.dtype)
    var_gap = moments[1] - moments[0].square() - variances
    mean_gap = moments[0] if means is None else moments[0] - means
    squares = torch.stack([mean_gap, var_gap]).square() @ members.T  # [2, L]
    positive = squares > 0
    norms = torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
    return norms @ weights


_MULTIPLIED = 64  # pixels of the longer side up to which a view by products is the faster one

matching_gradient = partial(ops.matching_gradient, loss=matching_loss)


def view(
    images: Tensor,  # [N, C, H, W]
    rows: Tensor,  # [T, 7] int32, see schedule.Schedule
    step: Tensor,  # [] int64: the row to use
    dtype: torch.dtype | None = None,  # of the result; None: as the images
) -> Tensor:  # [N, C, H, W]
    """The view of one iteration: lines and columns beside each pixel are gathered and interpolated, rows first.

    Images of at most 64 pixels are multiplied by one sparse matrix of interpolation weights per axis instead: these few launches cost more
    than the operations do.
    """
    height, width = images.shape[2:]
    if max(height, width) <= _MULTIPLIED:
        vertical, horizontal = _weights(images, rows, step)
        return (vertical @ images @ horizontal.T).to(dtype or images.dtype)
    lower, upper, fraction = _sources(images, rows, step)
    pixels = images.permute(0, 2, 3, 1)  # as they lie in memory
    for axis, size, weight in ((0, height, fraction[0, :height, None, None]), (1, width, fraction[1, :width, None])):
        below, above = (pixels.index_select(1 + axis, index[axis, :size]) for index in (lower, upper))
        pixels = torch.lerp(below, above, weight)
    return pixels.permute(0, 3, 1, 2).to(dtype or images.dtype)


def adam_clip_(
    images: Tensor,  # [N, C, H, W], changed in place
    gradient: Tensor,  # [N, C, H, W]
    exp_avg: Tensor,  # [N, C, H, W], changed in place
    exp_avg_sq: Tensor,  # [N, C, H, W], changed in place
    learning_rates: Tensor,  # [T]
    step: Tensor,  # [] int64, counted from 0
    low: Tensor,  # [C]
    high: Tensor,  # [C]
    betas: tuple[float, float] = (0.5, 0.9),
    eps: float = 1e-8,
) -> None:
    """Adam with the learning rate of the row, then the clamp; as `reference.ops.adam_clip_` without reading the counter on the host."""
    count = (step + 1).to(images.dtype)
    rate = learning_rates.index_select(0, step[None])[0].to(images.dtype) / (1 - betas[0] ** count)
    exp_avg.lerp_(gradient, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** count)).sqrt() + eps
    moved = images - rate * exp_avg / denominator
    images.copy_(torch.minimum(torch.maximum(moved, low[:, None, None]), high[:, None, None]))


def view_adam_clip_(
    images: Tensor,  # [N, C, H, W], changed in place
    gradient: Tensor,  # [N, C, H, W], with respect to the view, in any precision
    exp_avg: Tensor,  # [N, C, H, W], changed in place
    exp_avg_sq: Tensor,  # [N, C, H, W], changed in place
    rows: Tensor,  # [T, 7] int32, see schedule.Schedule
    learning_rates: Tensor,  # [T]
    step: Tensor,  # [] int64, counted from 0: the row of both
    low: Tensor,  # [C]
    high: Tensor,  # [C]
    loss_scale: float = 1.0,
    betas: tuple[float, float] = (0.5, 0.9),
    eps: float = 1e-8,
) -> None:
    """The adjoint of the view, as products with the transposes of its matrices, then `adam_clip_` with it.

    Products at every size: `index_add` on CUDA adds in any order, so the same seed would not give the same bits, and for a gather the
    number of pixels that read one source, up to all of a line, would have to be known while the step is compiled or captured.
    """
    vertical, horizontal = _weights(images, rows, step)
    adjoint = vertical.T @ (gradient.to(images.dtype) @ horizontal)
    if loss_scale != 1:
        adjoint = adjoint * (1 / loss_scale)
    adam_clip_(images, adjoint, exp_avg, exp_avg_sq, learning_rates, step, low, high, betas, eps)


def _weights(
    images: Tensor,  # [N, C, H, W]
    rows: Tensor,  # [T, 7]
    step: Tensor,  # []
) -> tuple[Tensor, Tensor]:  # [H, H] and [W, W]: weight of each source pixel (column) in each pixel of the view (row)
    """Bilinear interpolation along both axes as matrices; both at once, for half the launches."""
    height, width = images.shape[2:]
    lower, upper, fraction = _sources(images, rows, step)
    source, share = torch.arange(lower.shape[1], device=images.device), fraction[:, :, None]
    both = (source == lower[:, :, None]) * (1 - share) + (source == upper[:, :, None]) * share
    return both[0, :height, :height], both[1, :width, :width]


def _sources(
    images: Tensor,  # [N, C, H, W]
    rows: Tensor,  # [T, 7]
    step: Tensor,  # []
) -> tuple[Tensor, Tensor, Tensor]:  # [2, max(H, W)] of lines and columns: two source pixels, int64, and the weight of the second one
    """Bilinear interpolation with half-pixel centres, after flip and roll."""
    height, width = images.shape[2:]
    row = rows.index_select(0, step[None])[0][:, None]
    start, extent, roll = row[0:2], row[2:4], row[5:7]  # [2, 1]: down and right
    axis = torch.arange(2, device=images.device)[:, None]
    size = height + axis * (width - height)
    pixel = (torch.arange(max(height, width), device=images.device) - roll) % size
    pixel = torch.where(axis * row[4] > 0, size - 1 - pixel, pixel)
    position = ((pixel.to(images.dtype) + 0.5) * (extent.to(images.dtype) / size) - 0.5).clamp_min(0)
    lower = position.long()
    upper = torch.minimum(lower + 1, extent - 1)
    return start + lower, start + upper, position - lower

"""The back-end "compiled": plain operators that read schedule and counter as tensors, so that TorchInductor compiles one step for all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dwa_fast.tracing import trace


def compiled(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one compiled graph: forward, backward and updates. The first call compiles, which takes a minute."""
    unused = torch.empty(0)
    fast = torch.compile(trace(step), dynamic=False, options={"max_autotune": torch.cuda.is_available()})

    def run() -> None:
        with torch.no_grad():
            fast(unused)

    return run


def matching_loss(
    sums: Tensor,  # [2, ΣC] from bn_act, layer after layer
    variances: Tensor,  # [ΣC] running variances v
    offsets: Tensor,  # [L + 1] int64
    counts: Tensor,  # [L] int64
    weights: Tensor,  # [L]
) -> Tensor:  # [2]: R_mean, R_var
    """Both matching terms of all layers at once; as `reference.ops.matching_loss` without reading the layers' sizes on the host."""
    layer = torch.searchsorted(offsets, torch.arange(sums.shape[1], device=sums.device), right=True) - 1
    members = (layer == torch.arange(len(weights), device=sums.device)[:, None]).to(sums.dtype)  # [L, ΣC]
    moments = sums / counts.index_select(0, layer).to(sums.dtype)
    spread = moments[1] - moments[0].square() - variances
    squares = torch.stack([moments[0], spread]).square() @ members.T  # [2, L]
    positive = squares > 0
    norms = torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
    return norms @ weights


def view(
    images: Tensor,  # [N, C, H, W]
    rows: Tensor,  # [T, 7] int32, see views.Schedule
    step: Tensor,  # [] int64: the row to use
    dtype: torch.dtype | None = None,  # of the result; None: as the images
) -> Tensor:  # [N, C, H, W]
    """The view of one iteration, as a product with one sparse matrix of interpolation weights per axis."""
    row = rows.index_select(0, step[None])[0]
    top, left, height, width, flip, down, right = row.unbind()
    vertical = _weights(images.shape[2], top, height, torch.zeros_like(flip), down, images)
    horizontal = _weights(images.shape[3], left, width, flip, right, images)
    return (vertical @ images @ horizontal.T).to(dtype or images.dtype)


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


def _weights(
    size: int,
    start: Tensor,  # [] first pixel of the crop
    extent: Tensor,  # [] pixels of the crop
    flip: Tensor,  # [] 0 or 1
    roll: Tensor,  # [] pixels
    like: Tensor,
) -> Tensor:  # [size, size]: weight of each source pixel (column) in each seen pixel (row)
    """Bilinear interpolation along one axis, with half-pixel centres, after flip and roll."""
    index = torch.arange(size, device=like.device)
    seen = (index - roll) % size
    seen = torch.where(flip > 0, size - 1 - seen, seen)
    position = ((seen.to(like.dtype) + 0.5) * (extent.to(like.dtype) / size) - 0.5).clamp_min(0)
    lower = position.floor()
    upper = torch.minimum(lower + 1, extent.to(like.dtype) - 1)
    fraction = (position - lower)[:, None]
    source = index - start
    return (source == lower[:, None]) * (1 - fraction) + (source == upper[:, None]) * fraction

"""Plain PyTorch twin of every operator: same signature, any device, any floating type, differentiable where the operator is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast.ops.activation import Activation

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {  # leaky_relu has a slope besides
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
ASCENT_EPSILON = 1e-12  # added to ‖g‖ before the division, Algorithm 1 as published


def bn_act(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C] running mean m
    var: Tensor,  # [C] running variance v
    weight: Tensor | None,  # [C] γ
    bias: Tensor | None,  # [C] β
    eps: float,
    skip: Tensor | None = None,  # [N, C, H, W]
    activation: Activation = "none",
    slope: Tensor | None = None,  # [1] or [C], of leaky_relu
    partials: Tensor | None = None,  # [2, R, C], written
    with_alias: bool = False,
    alias_stride: int = 1,  # s
    with_sums: bool = True,
    leaves_skip: bool = False,  # changes nothing here: automatic differentiation writes every gradient
) -> tuple[Tensor, ...]:  # z [N, C, H, W], with_alias an alias [N, C, ⌈H/s⌉, ⌈W/s⌉] of z, sums [2, C] float32 or wider, or empty
    """BatchNorm in eval mode with what follows it, and the shifted moments of its input.

    z = f(γ(y − m)/√(v + ε) + β [+ skip]);  sums = (Σ(y − m), Σ(y − m)²) over N, H and W.
    """
    z = F.batch_norm(y, mean, var, weight, bias, training=False, eps=eps)
    if skip is not None:
        z = z + skip
    z = _ACTIVATIONS[activation](z) if slope is None else F.prelu(z, slope.to(z.dtype))
    sums = moments(y, mean, partials) if with_sums else mean.new_empty(0)
    return (z, z[:, :, ::alias_stride, ::alias_stride], sums) if with_alias else (z, sums)


def batch_norm_act(
    y: Tensor,  # [N, C, H, W]
    running_mean: Tensor | None,  # [C], written
    running_var: Tensor | None,  # [C], written
    weight: Tensor | None,  # [C] γ
    bias: Tensor | None,  # [C] β
    momentum: float,
    eps: float,
    skip: Tensor | None = None,  # [N, C, H, W]
    activation: Activation = "none",
    slope: Tensor | None = None,  # [1] or [C], of leaky_relu
    windows: tuple[int, int, int] | None = None,  # k, s and p of a pooling
    averages: bool = False,
) -> Tensor:  # [N, C, H, W], or [N, C, H', W'] with windows
    """BatchNorm in train mode with what follows it."""
    z = F.batch_norm(y, running_mean, running_var, weight, bias, training=True, momentum=momentum, eps=eps)
    if skip is not None:
        z = z + skip
    z = _ACTIVATIONS[activation](z) if slope is None else F.prelu(z, slope.to(z.dtype))
    return z if windows is None else F.avg_pool2d(z, *windows) if averages else F.max_pool2d(z, *windows)


def bn_act_join(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C] running mean m
    var: Tensor,  # [C] running variance v
    weight: Tensor | None,  # [C] γ
    bias: Tensor | None,  # [C] β
    eps: float,
    skip: Tensor,  # [N, C, H, W]
    skip_mean: Tensor,  # [C], and so on: those of the skip's own layer
    skip_var: Tensor,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    skip_eps: float,
    activation: Activation = "none",
    slope: Tensor | None = None,  # [1] or [C], of leaky_relu
    partials: Tensor | None = None,  # [2, R, C], written
    skip_partials: Tensor | None = None,  # [2, R, C], written
    with_alias: bool = False,
    alias_stride: int = 1,
    with_sums: bool = True,
) -> tuple[Tensor, ...]:  # z [N, C, H, W], with_alias an alias of z, sums and those of the skip, each [2, C] float32 or wider
    """`bn_act` of a skip that comes out of a BatchNorm of its own."""
    skip_layer = skip_mean, skip_var, skip_weight, skip_bias, skip_eps
    normalised, skip_sums = bn_act(skip, *skip_layer, partials=skip_partials, with_sums=with_sums)
    return *bn_act(y, mean, var, weight, bias, eps, normalised, activation, slope, partials, with_alias, alias_stride, with_sums), skip_sums


def bn_act_pool(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C] running mean m
    var: Tensor,  # [C] running variance v
    weight: Tensor | None,  # [C] γ
    bias: Tensor | None,  # [C] β
    eps: float,
    window: int,
    stride: int,
    padding: int,
    activation: Activation = "none",
    slope: Tensor | None = None,  # [1] or [C], of leaky_relu
    partials: Tensor | None = None,  # [2, R, C], written
    with_alias: bool = False,
    with_sums: bool = True,
    averages: bool = False,
) -> tuple[Tensor, ...]:  # z [N, C, H', W'], with_alias an alias of z, sums [2, C] float32 or wider
    """`bn_act` and a max-pooling of square windows behind it, or their means."""
    z, sums = bn_act(y, mean, var, weight, bias, eps, None, activation, slope, partials, with_sums=with_sums)
    z = F.avg_pool2d(z, window, stride, padding) if averages else F.max_pool2d(z, window, stride, padding)
    return (z, z.view_as(z), sums) if with_alias else (z, sums)


def moments(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    partials: Tensor | None = None,  # [2, R, C], written: rows that add up to the result
) -> Tensor:  # [2, C] float32 or wider
    """Σ(y − m) and Σ(y − m)² over N, H and W."""
    shifted = y.to(torch.promote_types(y.dtype, torch.float32)) - mean[:, None, None]
    sums = torch.stack([shifted.sum((0, 2, 3)), shifted.square().sum((0, 2, 3))])
    if partials is not None:
        partials.zero_()[:, 0] = sums.detach()
    return sums


def mean_pool(
    y: Tensor,  # [N, C, H, W]
    window: int,
) -> Tensor:  # [N, C, H // window, W // window]
    """The mean of every window of `window` × `window` pixels."""
    return F.avg_pool2d(y, window)


def conv3x3(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [O, C, 3, 3]
    bias: Tensor | None = None,  # [O]
    large_tiles: bool = False,  # as in the fused operator; the sum is the same
) -> Tensor:  # [N, O, H, W]
    """A convolution with stride 1 and one pixel of zeros around."""
    return F.conv2d(x, weight, bias, padding=1)


def conv_product(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [O, C, K, K]
    bias: Tensor | None = None,  # [O]
    stride: int = 1,
    of_y: bool = True,
    of_x: bool = True,
    of_weight: bool = True,
) -> Tensor:  # [N, O, ⌈H/s⌉, ⌈W/s⌉]
    """A convolution with (K − 1)/2 pixels of zeros around; what the last three say is how the fused operator computes it."""
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)


def matching_loss(
    sums: Tensor,  # [2, ΣC] from bn_act, layer after layer
    variances: Tensor,  # [ΣC] variances v that are aimed at, such as the running ones
    channel_ptr: Tensor,  # [L + 1] int64: channels of layer l are channel_ptr[l] … channel_ptr[l + 1] − 1
    counts: Tensor,  # [L] int64: n = N·H·W of each layer
    weights: Tensor,  # [L] w_l
    means: Tensor | None = None,  # [ΣC] a: by how much the means that are aimed at exceed m; None: 0
) -> Tensor:  # [2]: R_mean, R_var
    """Decoupled matching of BatchNorm statistics, all layers (Eq. 3).

    R_mean = Σ_l w_l ‖μ_l − m_l − a_l‖₂,  R_var = Σ_l w_l ‖σ²_l − v_l‖₂, with μ − m = s₁/n and σ² = s₂/n − (s₁/n)².
    The gradient of a norm that is 0 is 0.
    """
    bounds = channel_ptr.tolist()
    terms = [torch.zeros(2).to(sums)]
    for first, last, n, w in zip(bounds[:-1], bounds[1:], counts.tolist(), weights.tolist(), strict=True):
        mean = sums[0, first:last] / n
        mean_gap = mean if means is None else mean - means[first:last]
        var_gap = sums[1, first:last] / n - mean.square() - variances[first:last]
        terms.append(w * torch.stack([torch.linalg.vector_norm(mean_gap), torch.linalg.vector_norm(var_gap)]))
    return torch.stack(terms).sum(0)


def matching_gradient(
    sums: Tensor,  # [2, ΣC], or with places the arena
    variances: Tensor,  # [ΣC]
    channel_ptr: Tensor,  # [L + 1] int64
    counts: Tensor,  # [L] int64
    weights: Tensor,  # [L]
    grad: Tensor,  # [2], of the loss
    places: Tensor | None = None,  # [2, L] int64: where each layer's partial sums, [2, R, C], begin in the arena, and R
    finished: Tensor | None = None,  # the plain twin needs no counter
    means: Tensor | None = None,  # [ΣC]
    *,
    loss: Callable[..., Tensor] = matching_loss,
) -> tuple[Tensor, Tensor]:  # [2]; [2, ΣC]
    """`matching_loss` and the gradient of the sums."""
    if places is not None:
        sizes, starts, rows = channel_ptr.diff().tolist(), *places.tolist()
        each = [sums[start:].narrow(0, 0, 2 * r * c).view(2, r, c).sum(1) for start, r, c in zip(starts, rows, sizes, strict=True)]
        sums = torch.cat(each, 1)
    leaf = sums.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf, variances, channel_ptr, counts, weights, means)
    return value.detach(), torch.autograd.grad(value, leaf, grad)[0]


def cross_entropy(
    logits: Tensor,  # [N, C]
    labels: Tensor,  # [N] int64
    scale: float,
) -> tuple[Tensor, Tensor]:  # [1] the mean loss, where the operator returns [N] losses, float32 or wider; [N, C]
    """Cross-entropy, and the gradient of scale times it."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(leaf.to(torch.promote_types(leaf.dtype, torch.float32)), labels)
    return loss.detach()[None], torch.autograd.grad(loss, leaf, torch.full_like(loss, scale))[0]


def log_losses_(
    losses: Tensor,  # [T, 3], row t written
    step: Tensor,  # [] int64: t, advanced
    image_losses: Tensor,  # [N]
    matching: Tensor,  # [2]
) -> None:
    """losses_t = (mean of image_losses, R_mean, R_var); t ← (t + 1) mod T."""
    losses.index_copy_(0, step[None], torch.cat([image_losses.mean(0, keepdim=True), matching])[None])
    step.add_(1).remainder_(len(losses))


def view(
    images: Tensor,  # [N, C, H, W]
    rows: Tensor,  # [T, 7] int32, see schedule.Schedule
    step: Tensor,  # [] int64: the row to use
    dtype: torch.dtype | None = None,  # of the result; None: as the images
) -> Tensor:  # [N, C, H, W]
    """Crop, bilinear resize to the size of the images, horizontal flip, roll: the view of one iteration."""
    top, left, height, width, flip, down, right = rows[step].tolist()
    size = images.shape[2:]
    result = images[:, :, top : top + height, left : left + width]
    if result.shape[2:] != size:
        result = F.interpolate(result, size=size, mode="bilinear", align_corners=False)
    if flip:
        result = result.flip(3)
    return torch.roll(result, (down, right), (2, 3)).to(dtype or images.dtype)


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
    """One step of Adam with the learning rate of the row, then the clamp of every channel to [low, high].

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  x ← clamp(x − lr_t · m/(1−β₁^(t+1)) / (√(v/(1−β₂^(t+1))) + ε)).
    """
    count = int(step) + 1
    exp_avg.lerp_(gradient, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** count)).sqrt_().add_(eps)
    images.addcdiv_(exp_avg, denominator, value=-float(learning_rates[step]) / (1 - betas[0] ** count))
    images.clamp_(low[:, None, None], high[:, None, None])


def view_adam_clip_(
    images: Tensor,  # [N, C, H, W], changed in place
    gradient: Tensor,  # [N, C, H, W] or [N, C, H/2, 2, W/2, 2], with respect to the view, in any precision
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
    """The adjoint of the row's view, divided by the scale of the loss, then `adam_clip_` with it."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_(True)
        result = view(leaf, rows, step)
    (adjoint,) = torch.autograd.grad(result, leaf, gradient.to(images.dtype).reshape(images.shape))
    adam_clip_(images, adjoint * (1 / loss_scale), exp_avg, exp_avg_sq, learning_rates, step, low, high, betas, eps)


def ascend_(
    weights: Tensor,  # [P], changed in place
    gradients: Tensor,  # [P]
    radius: float,
    *,
    normalize: bool = True,
    compute: Tensor | None = None,  # [P] in the compute precision, rewritten
) -> Tensor:  # [] ‖g‖₂
    """One ascent step of all weights: w += radius · g / (‖g‖₂ + 1e-12), one norm over all of them (Eq. 11)."""
    norm: Tensor = torch.linalg.vector_norm(gradients, dtype=torch.float64)
    scale = radius / (norm + ASCENT_EPSILON) if normalize else torch.full_like(norm, radius)
    weights += gradients * scale.to(gradients.dtype)
    if compute is not None:
        compute.copy_(weights)
    return norm.to(gradients.dtype)


@dataclass(frozen=True)
class Operators:
    """The operators that a run or a hook calls: the plain ones unless others of the same signature are given."""

    name: str
    fuses: bool = False  # whether bn_act is worth tracing the teacher for
    bn_act: Callable[..., tuple[Tensor, ...]] = bn_act
    bn_act_join: Callable[..., tuple[Tensor, ...]] = bn_act_join
    bn_act_pool: Callable[..., tuple[Tensor, ...]] = bn_act_pool
    batch_norm_act: Callable[..., Tensor] = batch_norm_act
    moments: Callable[..., Tensor] = moments
    matching_loss: Callable[..., Tensor] = matching_loss
    matching_gradient: Callable[..., tuple[Tensor, Tensor]] = matching_gradient
    cross_entropy: Callable[..., tuple[Tensor, Tensor]] = cross_entropy
    log_losses_: Callable[..., None] = log_losses_
    view: Callable[..., Tensor] = view
    view_adam_clip_: Callable[..., None] = view_adam_clip_
    ascend_: Callable[..., Tensor] = ascend_
    mean_pool: Callable[..., Tensor] = mean_pool
    conv3x3: Callable[..., Tensor] = conv3x3
    conv_product: Callable[..., Tensor] = conv_product
    partial_rows: Callable[..., int] | None = None  # where bn_act and moments leave partial sums: how many rows


OPERATORS = tuple(field.name for field in fields(Operators) if field.name not in ("name", "fuses", "partial_rows"))

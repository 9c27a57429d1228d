"""Layers for the kernels of bn_act, bn_act_join and bn_act_pool, and their results beside those of PyTorch."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from dwa_fast.ops.activation import Activation
from dwa_fast.reference import ops as reference
from tests.kernels.support import assert_as_good_as_pytorch

kernel = importlib.import_module("dwa_fast.kernels.bn_act")
kernel_layout = importlib.import_module("dwa_fast.kernels.layout")


EPS = 1e-5
NO_EPS = 1e-300  # adds nothing; PyTorch 2.11 refuses 0
SMALL = [(1, 1, 3, 7), (2, 3, 5, 7), (1, 16, 3, 3), (3, 24, 4, 4), (2, 64, 8, 8)]
LARGER = [(2, 58, 9, 8), (1, 130, 7, 7), (2, 256, 4, 4)]  # several column blocks; 58 and 130 are no multiples of 8


def batch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)


def spread(sampled: Tensor, like: Tensor, stride: int) -> Tensor:
    """The gradient of every stride-th pixel of each line as PyTorch has it: zeros between them."""
    whole = torch.zeros_like(like)
    whole[:, :, ::stride, ::stride] = sampled
    return whole


def layer(channels: int, device: torch.device | str) -> list[Tensor]:
    """m, v, γ and β of a BatchNorm layer."""
    values = [torch.randn(channels), torch.rand(channels) + 0.1, torch.randn(channels), torch.randn(channels)]
    return [value.to(device) for value in values]


def slope_of(activation: Activation, y: Tensor) -> Tensor | None:
    """A slope per channel of leaky_relu, of either sign."""
    return torch.linspace(-0.2, 0.5, y.shape[1], device=y.device) if activation == "leaky_relu" else None


def both_ways(
    y: Tensor, values: list[Tensor | None], skip: Tensor | None, activation: Activation, grad_z: Tensor, grad_sums: Tensor | None
) -> dict[str, Tensor]:
    """Every result of the kernels, forward and backward."""
    slope = slope_of(activation, y)
    z, sums, mask = kernel.bn_act_forward(y, *values, EPS, skip, activation, slope)
    behind = skip, mask, skip is not None, activation, slope
    grad_y, grad_skip, parameters, grad_slope = kernel.bn_act_backward(grad_z, grad_sums, y, *values, EPS, *behind, True)
    results = {"z": z, "sums": sums, "grad_y": grad_y, "grad_weight": parameters[0], "grad_bias": parameters[1]}
    if slope is not None:
        results["grad_slope"] = grad_slope
    return {**results, "grad_skip": grad_skip} if skip is not None and activation != "none" else results


def plainly(
    y: Tensor,
    values: list[Tensor | None],
    skip: Tensor | None,
    activation: Activation,
    grad_z: Tensor,
    grad_sums: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The same from the plain twin and automatic differentiation, activations in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    y = y.to(dtype).detach().requires_grad_()
    skip = None if skip is None else skip.to(dtype).detach().requires_grad_()
    mean, var, weight, bias = (None if value is None else value.to(wide) for value in values)
    # γ = 1 and β = 0 have gradients too.
    weight, bias = ((torch.full_like(mean, i) if v is None else v.detach()).requires_grad_() for i, v in ((1, weight), (0, bias)))
    slope = slope_of(activation, y)
    slope = None if slope is None else slope.to(wide).requires_grad_()
    z, sums = reference.bn_act(y, mean, var, weight, bias, EPS, skip, activation, slope)
    grad_sums = torch.zeros_like(sums) if grad_sums is None else grad_sums.to(wide)
    wanted = {"grad_y": y, "grad_weight": weight, "grad_bias": bias} | ({} if slope is None else {"grad_slope": slope})
    wanted |= {} if skip is None or activation == "none" else {"grad_skip": skip}
    grads = torch.autograd.grad([z, sums], list(wanted.values()), [grad_z.to(dtype), grad_sums])
    return {"z": z.detach(), "sums": sums.detach(), **dict(zip(wanted, grads, strict=True))}


def sum_sizes(
    y: Tensor, values: list[Tensor | None], skip: Tensor | None, activation: Activation, grad_z: Tensor, eps: float = EPS
) -> dict[str, Tensor]:
    """√Σ terms² of the gradients of γ, β and the slope: how large such sums are where their terms do not cancel by chance."""
    doubles = [None if value is None else value.double() for value in values]
    mean, var = (value[:, None, None] for value in doubles[:2])  # type: ignore[index]
    before, _ = reference.bn_act(y.double(), *doubles, eps, None if skip is None else skip.double())
    before.requires_grad_()
    slope, one = slope_of(activation, y), torch.ones(y.shape[1], dtype=torch.float64, device=y.device)
    z, _ = reference.bn_act(before, 0 * one, one, None, None, NO_EPS, None, activation, None if slope is None else slope.double())
    (terms,) = torch.autograd.grad(z, before, grad_z.double())
    return {
        "grad_weight": (terms * (y.double() - mean) / (var + eps).sqrt()).square().sum((0, 2, 3)).sqrt(),
        "grad_bias": terms.square().sum((0, 2, 3)).sqrt(),
        "grad_slope": (grad_z.double() * before.detach().clamp_max(0)).square().sum((0, 2, 3)).sqrt(),
    }


def assert_matches(
    y: Tensor, values: list[Tensor | None], skip: Tensor | None, activation: Activation, grad_sums: Tensor | None = None
) -> dict[str, Tensor]:
    grad_z = torch.randn_like(y)
    ours = both_ways(y, values, skip, activation, grad_z, grad_sums)
    # Where a plain float16 or bfloat16 z rounds to 0 its ReLU is blocked, so the mask of the oracle is that of float64.
    plain = plainly(y, values, skip, activation, grad_z, grad_sums, y.dtype)
    expected = plainly(y, values, skip, activation, grad_z, grad_sums, torch.float64)
    sizes = sum_sizes(y, values, skip, activation, grad_z)
    for name, result in ours.items():
        assert_as_good_as_pytorch(result, plain[name], expected[name], sizes.get(name))
    return ours

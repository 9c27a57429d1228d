"""Inputs of bn_act and bn_act_join with the magnitudes of trained networks, and its results beside those of PyTorch."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.ops.activation import ACTIVATIONS, Activation
from dwa_fast.reference import ops as reference

EPS = 1e-5
NO_EPS = 1e-300  # adds nothing; PyTorch 2.11 refuses 0
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 20, 4, 9),
    (2, 67, 3, 11),
    (1, 136, 6, 5),
    (8, 64, 32, 32),
    (50, 512, 4, 4),
    (0, 16, 8, 8),
]
SMALL = [shape for shape in SHAPES if math.prod(shape) < 10_000]
LAYOUTS = ["contiguous", "channels_last", "slice"]
DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = list(itertools.product([False, True], ACTIVATIONS))
Inputs = dict[str, Any]


def extension() -> Any:
    return importlib.import_module("dwa_fast._C")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another place: channels-last, or the inside of a larger channels-last tensor."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    larger = torch.full((n, c, h + 2, 2 * w), math.nan, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last)
    inside = larger[:, :, 1 : h + 1, ::2]
    inside.copy_(x)
    return inside


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    *,
    skip: bool = False,
    activation: Activation = "none",
    slopes: int | None = None,
    affine: bool = True,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Arguments of bn_act with the magnitudes of a trained network."""
    channels = shape[1]

    def features() -> Tensor:
        return laid_out((torch.randn(shape) * 1.5 + 0.3).to(dtype).to(device), layout)

    vectors = {
        "mean": torch.randn(channels) * 0.5,
        "var": torch.rand(channels) * 2 + 0.1,
        "weight": torch.rand(channels) + 0.5 if affine else None,
        "bias": torch.randn(channels) * 0.3 if affine else None,
    }
    placed = {name: None if vector is None else vector.to(device) for name, vector in vectors.items()}
    inputs = {"y": features(), **placed, "eps": EPS, "skip": features() if skip else None, "activation": activation}
    slope = torch.rand(channels if slopes is None else slopes) - 0.3 if activation == "leaky_relu" else None
    return inputs | {"slope": None if slope is None else slope.to(device)}


def make_join(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "channels_last", **settings: Any) -> Inputs:
    """Arguments of bn_act_join: of two such layers."""
    first, second = (make(shape, dtype, layout, **settings) for _ in range(2))
    names = "mean", "var", "weight", "bias", "eps"
    behind = {name: first[name] for name in ("activation", "slope")}
    of_skip = {"skip": second["y"], **{f"skip_{name}": second[name] for name in names}}
    return {name: first[name] for name in ("y", *names)} | of_skip | behind


def run(operator: Callable[..., Any], inputs: Inputs, double: bool = False, moments: bool = True) -> dict[str, Tensor]:
    """Results of an operator and their gradients, for fixed gradients of the results."""
    leaves: Inputs = {}
    for name, value in inputs.items():
        leaves[name] = value
        if isinstance(value, Tensor):
            leaves[name] = value.detach().double() if double else value.detach()
            leaves[name].requires_grad_(name in ("y", "skip", "weight", "bias", "slope", "skip_weight", "skip_bias"))
    z, *sums = operator(**leaves)
    source = torch.Generator().manual_seed(1)
    grad_z = torch.randn(z.shape, generator=source).to(inputs["y"].dtype).to(z)
    grad_sums = [(1e-3 * torch.randn(each.shape, generator=source)).to(each) for each in sums]
    wanted = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    outputs, grads = ((z, *sums), (grad_z, *grad_sums)) if moments else ((z,), (grad_z,))
    gradients = torch.autograd.grad(outputs, list(wanted.values()), grads)
    named = {name: each.detach() for name, each in zip(("sums", "skip_sums"), sums, strict=False)}
    return {"z": z.detach(), **named, **dict(zip(wanted, gradients, strict=True))}


def error(result: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(result.double() - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-300)).item()


def assert_as_good_as_pytorch(inputs: Inputs, moments: bool = True, operator: str = "bn_act") -> None:
    """Errors of results and gradients against float64 at most twice those of PyTorch's operators, or a unit of the precision."""
    ours, plain = (run(getattr(module, operator), inputs, moments=moments) for module in (ops, reference))
    expected = run(getattr(reference, operator), inputs, double=True, moments=moments)
    assert set(ours) == set(expected)
    for name, result in ours.items():
        assert result.shape == expected[name].shape, name
        assert result.dtype == (torch.float32 if name.endswith("sums") else inputs[name if name in inputs else "y"].dtype), name
        unit = 2.0 ** (-9 if result.dtype == torch.bfloat16 else -23)
        # Of one or three numbers PyTorch may hit one by luck, or all lie where a derivative nearly cancels.
        units = 3 if result.numel() < 64 and inputs["activation"] not in ("none", "relu") else 1
        assert error(result, expected[name]) <= max(2 * error(plain[name], expected[name]), units * unit), name
    for name in ("z", "y", "skip"):
        if name in ours and (name != "skip" or inputs["activation"] != "none"):  # else the skip's gradient is that of z itself
            assert ours[name].stride() == torch.empty_like(inputs["y"]).stride(), name

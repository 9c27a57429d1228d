"""Compares a rewritten teacher with the original on a few images: logits, statistics, gradients of images and of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dwa_fast.errors import InputError
from dwa_fast.models.batchnorm import given, planes

_LOGITS = 1e-3  # largest relative difference of logits and statistics in float32
_GRADIENTS = 0.05  # and of gradients: where rounding decides on which side of 0 the input of a ReLU lies, they differ by up to 1e-2


@dataclass(frozen=True)
class Gradients:
    """Of a fixed combination of the logits, and of the matching terms."""

    logits: Tensor  # of the logits to the images
    matching: Tensor  # of the matching terms to the images
    weights: dict[str, Tensor]  # of the logits to each weight that they depend on


@dataclass(frozen=True)
class Response:
    """The outputs of a teacher for some images."""

    logits: Tensor  # [N, classes]
    gaps: dict[str, tuple[Tensor, Tensor]]  # by layer, in the order of the calls: μ − m and σ² − v, [C] each
    gradients: Gradients | None


def teacher_response(module: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, *, gradients: bool) -> Response:
    """Response of a teacher as it is, its layers' inputs taken by hooks and averaged by plain PyTorch.

    Raises:
        InputError: a layer runs more than once.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def measure(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            y = planes(given(args, kwargs)).to(layer.running_mean.dtype)
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            calls.setdefault(name, []).append((mean - layer.running_mean, var - layer.running_var))

        return hook

    hooks: list[RemovableHandle] = [layer.register_forward_pre_hook(measure(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        return _respond(module, module, images, lambda: {name: _single(name, each) for name, each in calls.items()}, gradients)
    finally:
        for hook in hooks:
            hook.remove()


def _single(name: str, calls: list[Any]) -> Any:
    if len(calls) > 1:
        raise InputError(f"BatchNorm layer {name!r} runs {len(calls)} times in a forward pass; each layer may run once")
    return calls[0]


def network_response(network: Any, parameters: nn.Module, images: Tensor, *, gradients: bool) -> Response:
    """Response of a network whose layers keep the shifted moments of their inputs; the weights are those of `parameters`."""

    def gaps() -> dict[str, tuple[Tensor, Tensor]]:
        gap_pairs = {}
        for name, layer in network.layers.items():
            if layer.sums:
                mean = _single(name, layer.sums)[0] / layer.count
                gap_pairs[name] = mean, layer.sums[0][1] / layer.count - mean.square() - layer.running_var
        return gap_pairs

    try:
        return _respond(network, parameters, images, gaps, gradients)
    finally:
        network.forget()


def _respond(
    call: Callable[[Tensor], Tensor],
    parameters: nn.Module,
    images: Tensor,
    gaps: Callable[[], dict[str, tuple[Tensor, Tensor]]],
    gradients: bool,
) -> Response:
    leaf = images.detach().clone(memory_format=torch.preserve_format).requires_grad_(gradients)
    weights = dict(parameters.named_parameters()) if gradients else {}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        with torch.set_grad_enabled(gradients):
            logits = call(leaf)
            gap_pairs = gaps()
            if not gradients or not gap_pairs:
                return Response(logits, gap_pairs, None)
            direction = torch.linspace(-1, 1, logits.numel(), device=logits.device, dtype=logits.dtype).view(logits.shape)
            terms = [torch.cat(each).norm() for each in zip(*gap_pairs.values(), strict=True)]
            matching = torch.stack([term / term.detach().clamp_min(torch.finfo(term.dtype).tiny) for term in terms]).sum()
            logit_grads = torch.autograd.grad((logits * direction).sum(), [leaf, *weights.values()], retain_graph=True, allow_unused=True)
            (grad_matching,) = torch.autograd.grad(matching, leaf, allow_unused=True) if matching.requires_grad else (None,)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    grad_images, *grad_weights = logit_grads
    nothing = torch.zeros_like(leaf)
    named = {name: gradient for name, gradient in zip(weights, grad_weights, strict=True) if gradient is not None}
    grads = Gradients(nothing if grad_images is None else grad_images, nothing if grad_matching is None else grad_matching, named)
    return Response(logits.detach(), {name: (mean.detach(), var.detach()) for name, (mean, var) in gap_pairs.items()}, grads)


def difference(expected: Response, got: Response, layers: Mapping[str, Any], tolerance: float = 1.0) -> str | None:
    """How a rewritten teacher differs from the original, the most informative difference first; None if it does not.

    Args:
        layers: the BatchNorm layers, whose running variances say which differences of the statistics are small.
        tolerance: how many times what is allowed in float32.
    """
    missing, foreign = expected.gaps.keys() - got.gaps.keys(), got.gaps.keys() - expected.gaps.keys()
    for names, what in ((missing, "no statistics of"), (foreign, "statistics, though they do not run, of")):
        if names:
            return f"it gives {what} BatchNorm layer {sorted(names)[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    for name, pair in expected.gaps.items():
        variance = layers[name].running_var.detach()
        for gap, mine, usual, what in zip(pair, got.gaps[name], (variance.sqrt(), variance), ("mean", "variance"), strict=True):
            error = _relative(mine, gap, usual)
            if not error <= _LOGITS * tolerance:
                return f"the {what} of the input of BatchNorm layer {name!r} is off by {_percent(error)}"
    error = _relative(got.logits, expected.logits)
    if not error <= _LOGITS * tolerance:
        return f"its logits are off by {_percent(error)}"
    if expected.gradients is None or got.gradients is None:
        return None
    return _gradient_difference(expected.gradients, got.gradients, tolerance)


def _gradient_difference(expected: Gradients, got: Gradients, tolerance: float) -> str | None:
    for theirs, mine, what in ((expected.logits, got.logits, "logits"), (expected.matching, got.matching, "matching terms")):
        error = _relative(mine, theirs)
        if not error <= _GRADIENTS * tolerance:
            return f"the gradient of the {what} to the images is off by {_percent(error)}"
    for name in expected.weights.keys() ^ got.weights.keys():
        if {**expected.weights, **got.weights}[name].any():
            gets = "gets no gradient" if name in expected.weights else "gets a gradient, which the teacher's does not"
            return f"weight {name!r} {gets}"
    names = [name for name in expected.weights if name in got.weights]
    flat = [torch.cat([weights[name].flatten() for name in names]) for weights in (got.weights, expected.weights)] if names else []
    error = _relative(*flat) if flat else 0.0
    if not error <= _GRADIENTS * tolerance:
        worst = max(names, key=lambda name: float((got.weights[name] - expected.weights[name]).norm()))
        return f"the gradient of the logits to the weights is off by {_percent(error)}, most of it in {worst!r}"
    return None


def _relative(got: Tensor, expected: Tensor, usual: Tensor | None = None) -> float:
    """‖got − expected‖ / (‖expected‖ + ‖usual‖)."""
    if got.shape != expected.shape:
        return float("inf")
    scale = expected.double().norm() + (0.0 if usual is None else usual.double().norm())
    return float((got.double() - expected.double()).norm() / scale.clamp_min(torch.finfo(torch.float32).tiny))


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %"

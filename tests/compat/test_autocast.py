"""Hooks, ascent and whole loop inside autocast, and with a GradScaler: held against float64 on the very features that the layers got."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwa_fast import InputError
from dwa_fast.compat import BNFeatureHook, Perterb, get_images
from tests.compat.loops import PlainHook, colour_teacher

HALF = [torch.bfloat16, torch.float16]


class Caught(nn.BatchNorm2d):
    """Keeps its input, and the gradient that reaches it."""

    def forward(self, y: Tensor) -> Tensor:
        if y.requires_grad:
            y.retain_grad()
        self.caught = y
        return super().forward(y)


def small(scale: float = 1.0) -> nn.Sequential:
    """A convolution and a trained layer behind it."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Caught(8)).eval()
    network[1].running_mean, network[1].running_var = torch.randn(8) * scale, (torch.rand(8) + 0.3) * scale**2
    with torch.no_grad():
        network[0].weight.mul_(scale)
    return network


def expected(y: Tensor, module: Any, r_var: float) -> tuple[Tensor, Tensor]:
    """r_feature and its gradient, by the definition in float64."""
    exact = y.detach().double().requires_grad_()
    flat = exact.transpose(0, 1).flatten(1)
    mean, var = module.running_mean.double() - flat.mean(1), module.running_var.double() - flat.var(1, unbiased=False)
    value = r_var * var.norm() + mean.norm()
    return value.detach(), torch.autograd.grad(value, exact)[0]


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("dtype", HALF)
def test_r_feature_is_that_of_the_features_that_the_layer_got(dtype: torch.dtype, scale: float) -> None:
    """Scale 300: activations that fp16 holds, and whose matching loss it does not. The gradient is rounded once, to the features' type."""
    network = small(scale)
    hook = BNFeatureHook(network[1], Namespace(r_var=11.0))
    images = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        network(images)
        total = 100.0 * hook.r_feature
        total.backward()  # type: ignore[no-untyped-call]
    caught: Any = network[1]
    assert caught.caught.dtype == dtype
    assert hook.r_feature.dtype == total.dtype == torch.float32
    value, gradient = expected(caught.caught, caught, 11.0)
    assert float(hook.r_feature.detach()) == pytest.approx(float(value), rel=1e-6)
    rounding = {torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert (caught.caught.grad.double() - 100 * gradient).norm() < rounding * (100 * gradient).norm()


def test_double_precision_stays_double_inside_autocast() -> None:
    module = small()[1].double()
    hook = BNFeatureHook(module)
    y = torch.randn(4, 8, 3, 3, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(y)
    assert float(hook.r_feature) == pytest.approx(float(expected(y, module, 1.0)[0]), rel=1e-14)


@pytest.mark.parametrize("dtype", HALF)
def test_a_loop_with_a_scaler(dtype: torch.dtype) -> None:
    """As CV-DD and FADRM write it. The same loop with the definition as hook, in the same precision, is no nearer to the one in float64."""

    def refined(hook: Callable[..., Any], *, half: bool) -> Tensor:
        network: Any = copy.deepcopy(colour_teacher(4, 16, (8, 8, 8))).requires_grad_(False).to(torch.float32 if half else torch.float64)
        layers = [hook(module) for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        torch.manual_seed(1)
        images = torch.randn(4, 3, 16, 16).to(torch.float32 if half else torch.float64).requires_grad_()
        optimizer = torch.optim.SGD([images], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", enabled=half, init_scale=2.0**10)
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=half):
                loss = nn.functional.cross_entropy(network(images), torch.arange(4)) + 0.1 * sum(each.r_feature for each in layers)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return images.detach().double()

    exact = refined(PlainHook, half=False)
    ours, plain = (float((refined(hook, half=True) - exact).norm()) for hook in (BNFeatureHook, PlainHook))
    assert ours <= 1.5 * plain


def weights_after(step: Callable[[Perterb], None], *, half: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weights of a network after an ascent step along gradients of the cross-entropy."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    images = torch.randn(7, 6).to(dtype)
    perterb = Perterb(network.parameters(), torch.optim.SGD([torch.zeros(1)], lr=1.0), rho=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        nn.functional.cross_entropy(network(images), torch.arange(7) % 3).backward()
        step(perterb)
    return [p.detach().double() for p in network.parameters()]


def test_ascent_step_inside_autocast_and_inference_mode() -> None:
    """The step itself is in fp32 there; the gradients come from the caller."""

    def in_inference_mode(perterb: Perterb) -> None:
        with torch.inference_mode():
            perterb.first_step(True)

    outside = weights_after(lambda perterb: perterb.first_step(True))
    for changed, original in zip(weights_after(in_inference_mode), outside, strict=True):
        assert torch.equal(changed, original)
    moved = weights_after(lambda perterb: perterb.first_step(True), half=True)
    before = weights_after(lambda _: None)
    length = torch.cat([(new - old).flatten() for new, old in zip(moved, before, strict=True)]).norm()
    assert float(length) == pytest.approx(0.3, rel=1e-5)


def test_ascent_of_weights_in_half_precision() -> None:
    """One norm in float32: gradients whose norm fp16 cannot hold move the weights by rho all the same."""
    p = nn.Parameter(torch.zeros(400, dtype=torch.float16))
    p.grad = torch.full((400,), 6e4, dtype=torch.float16)
    Perterb([p], torch.optim.SGD([torch.zeros(1)], lr=1.0), rho=2.0).first_step()
    assert torch.allclose(p.detach().double(), torch.full((400,), 0.1, dtype=torch.float64), rtol=1e-3)


def test_ascent_along_overflowed_gradients_moves_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, float("inf"), 0.0])
    perterb = Perterb([p], torch.optim.SGD([torch.zeros(1)], lr=1.0))
    with pytest.raises(InputError, match="wants finite gradients, got NaN or infinity; with a GradScaler choose a smaller init_scale"):
        perterb.first_step()
    assert p.tolist() == [1, 1, 1]


def test_the_whole_loop_is_the_same_inside_every_context() -> None:
    args = Namespace(iteration=1, batch_size=10, lr=0.1, dataset="cifar10", r_bn=0.01, jitter=2)
    teacher = colour_teacher(10, 32, (8, 8, 8))

    def losses() -> Tensor:
        return get_images(args, teacher, None, 0, backend="reference")

    outside = losses()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses(), outside)
    with torch.inference_mode():
        assert torch.equal(losses(), outside)

"""BatchNorm in train mode with skip, activation and pooling, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast import ops
from dwa_fast.engine.pool_nodes import Windows
from dwa_fast.reference.ops import _ACTIVATIONS

SHAPES = {"odd": (5, 19, 7, 3), "wide": (4, 64, 6, 6), "two values": (2, 3, 1, 1), "one channel": (3, 1, 4, 4)}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "slice": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}
CASES = [(activation, skip) for activation in ("none", "relu", "silu", "leaky_relu") for skip in (False, True)]


def inputs(shape: tuple[int, ...], skip: bool, slope: bool) -> list[Tensor]:
    """y far from 0 in some channels, γ, β, and the others on request; last the gradient of the result."""
    source = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=source)

    channels = shape[1]
    y = 2 * draw(*shape) + 30 * draw(channels, 1, 1)
    extras = [draw(*shape)] * skip + [draw(channels).abs()] * slope
    return [y, 1 + 0.3 * draw(channels), draw(channels), *extras, draw(*shape)]


def respond(
    given: list[Tensor], skip: bool, activation: str, dtype: torch.dtype, fused: bool, pooling: Windows | None = None
) -> list[Tensor]:
    """z, both running statistics, and the gradients of all that has one."""
    *leaves, grad = (each.detach().to(dtype).requires_grad_() for each in given)
    y, weight, bias = leaves[:3]
    extra = leaves[3] if skip else None
    slope = leaves[-1] if activation == "leaky_relu" else None
    running_mean, running_var = torch.full_like(weight, 0.5).detach(), torch.full_like(weight, 2.0).detach()
    if fused:
        operator: Any = ops.batch_norm_act
        behind = () if pooling is None else (pooling[:3], pooling.averages)
        z = operator(y, running_mean, running_var, weight, bias, 0.3, 1e-5, extra, activation, slope, *behind)
    else:
        x = F.batch_norm(y, running_mean, running_var, weight, bias, True, 0.3, 1e-5)
        x = x if extra is None else x + extra
        z = F.prelu(x, slope) if slope is not None else _ACTIVATIONS[activation](x)  # type: ignore[index]
        if pooling is not None:
            z = (F.avg_pool2d if pooling.averages else F.max_pool2d)(z, *pooling[:3])
    z.backward(grad)
    return [each.detach() for each in (z, running_mean, running_var, *(leaf.grad for leaf in leaves)) if each is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("activation", "skip"), CASES)
def test_values_gradients_and_running_statistics(activation: str, skip: bool, shape: str, layout: str) -> None:
    given = inputs(SHAPES[shape], skip, activation == "leaky_relu")
    exact = respond(given, skip, activation, torch.float64, fused=False)
    laid = [LAYOUTS[layout](each) if each.dim() == 4 else each for each in given]
    plain = respond(laid, skip, activation, torch.float32, fused=False)
    own = respond(laid, skip, activation, torch.float32, fused=True)
    assert len(own) == len(exact)
    for mine, theirs, value in zip(own, plain, exact, strict=True):
        rounding = 8 * torch.finfo(torch.float32).eps * float(value.norm())
        allowed = 2 * float((theirs - value).norm()) + rounding
        assert float((mine - value).norm()) <= allowed
    if layout != "slice":
        assert own[0].stride() == laid[0].stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", [Windows(2, 2, 0, True), Windows(3, 3, 0, True), Windows(3, 2, 1), Windows(2, 2, 0)])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "leaky_relu"])
def test_with_a_pooling_behind(activation: str, pooling: Windows, layout: str) -> None:
    """Values, gradients and running statistics; rows and columns without a window count in the statistics."""
    for shape in ((5, 19, 7, 4), (4, 64, 6, 6)):
        *given, grad = inputs(shape, False, activation == "leaky_relu")
        grad = grad[:, :, : (shape[2] + 2 * pooling.padding - pooling.window) // pooling.stride + 1]
        given.append(grad[..., : (shape[3] + 2 * pooling.padding - pooling.window) // pooling.stride + 1])
        exact = respond(given, False, activation, torch.float64, fused=False, pooling=pooling)
        laid = [LAYOUTS[layout](each) if each.dim() == 4 else each for each in given]
        plain = respond(laid, False, activation, torch.float32, fused=False, pooling=pooling)
        own = respond(laid, False, activation, torch.float32, fused=True, pooling=pooling)
        for mine, theirs, value in zip(own, plain, exact, strict=True):
            rounding = 8 * torch.finfo(torch.float32).eps * float(value.norm())
            assert float((mine - value).norm()) <= 2 * float((theirs - value).norm()) + rounding


def test_same_input_same_bits_for_any_number_of_threads() -> None:
    given, before = inputs((16, 64, 16, 16), True, False), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(respond(given, True, "relu", torch.float32, fused=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bfloat16_is_rounded_once() -> None:
    given = [each.bfloat16() if each.dim() == 4 else each for each in inputs((4, 24, 6, 6), True, False)]
    y, weight, bias, skip, _ = given
    z = ops.batch_norm_act(y, None, None, weight, bias, 0.1, 1e-5, skip, "relu")
    exact = F.relu(F.batch_norm(y.double(), None, None, weight.double(), bias.double(), True) + skip.double())
    assert z.dtype is torch.bfloat16
    assert float((z - exact).norm() / exact.norm()) < 2**-8


def test_one_value_per_channel_is_refused_and_changes_nothing() -> None:
    mean, var = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input"):
        ops.batch_norm_act(torch.randn(1, 4, 1, 1), mean, var, None, None, 0.1, 1e-5)
    assert not mean.any()
    assert torch.equal(var, torch.ones(4))


def test_without_parameters_and_running_statistics() -> None:
    y = torch.randn(6, 5, 4, 4, requires_grad=True)
    z = ops.batch_norm_act(y, None, None, None, None, 0.1, 1e-5)
    assert torch.allclose(z, F.batch_norm(y, None, None, training=True), atol=1e-5)
    layer = nn.BatchNorm2d(5, affine=False, track_running_stats=False)
    (gradient,) = torch.autograd.grad(z[:, :, 0].square().sum(), y)
    (expected,) = torch.autograd.grad(layer(y)[:, :, 0].square().sum(), y)
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_arguments_that_do_not_fit_are_refused() -> None:
    y, four = torch.randn(3, 4, 2, 2), torch.ones(4)
    refused: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, "y must be", (y[0], None, None, None, None, 0.1, 1e-5)),
        (TypeError, "y must be", (y.double(), None, None, None, None, 0.1, 1e-5)),
        (ValueError, "running_var must be", (y, four, four[:3], None, None, 0.1, 1e-5)),
        (TypeError, "weight must be float32", (y, None, None, four.double(), None, 0.1, 1e-5)),
        (TypeError, "skip must have the precision", (y, None, None, None, None, 0.1, 1e-5, y.bfloat16())),
        (ValueError, "skip must have the shape", (y, None, None, None, None, 0.1, 1e-5, y[:2])),
        (ValueError, "activation must be one of", (y, None, None, None, None, 0.1, 1e-5, None, "tanh")),
        (ValueError, "window must be 1 to 3, got 4", (y, None, None, None, None, 0.1, 1e-5, None, "relu", None, (4, 4, 0))),
        (ValueError, "skip or windows must be left out", (y, None, None, None, None, 0.1, 1e-5, y, "relu", None, (2, 2, 0))),
    ]
    for error, message, arguments in refused:
        with pytest.raises(error, match=message):
            ops.batch_norm_act(*arguments)

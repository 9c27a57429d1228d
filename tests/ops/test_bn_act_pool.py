"""bn_act_pool: the bits of bn_act and PyTorch's pooling, and as near to float64, on every instruction set; and which teachers use it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast import ops
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.fuse import BatchNormAct
from dwa_fast.engine.teacher import prepare
from dwa_fast.ops.activation import ACTIVATIONS, Activation
from dwa_fast.reference import ops as reference
from tests.nets import alive, distance, expected_gradient, image_gradient
from tests.ops.conftest import LEVELS
from tests.ops.layers import LAYOUTS, Inputs, error, laid_out, run

SHAPES = [(1, 1, 5, 5), (2, 3, 6, 7), (3, 20, 9, 5), (1, 67, 8, 11), (2, 136, 7, 6), (2, 64, 57, 56)]
WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 2, 0), (3, 3, 0), (2, 2, 1), (1, 2, 0), (2, 3, 0)]  # k, s, p
MEANS = [(2, 2, 0, True), (3, 3, 0, True), (1, 1, 0, True)]
Pooling = tuple[int, int, int] | tuple[int, int, int, bool]
DTYPES = [torch.float32, torch.bfloat16]


def make(
    shape: tuple[int, ...],
    windows: Pooling,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    activation: Activation = "relu",
    affine: bool = True,
) -> Inputs:
    """Arguments of bn_act_pool with the magnitudes of a trained network."""
    channels = shape[1]
    names = ("window", "stride", "padding", "averages")
    return {
        "y": laid_out((torch.randn(shape) * 1.5 + 0.3).to(dtype), layout),
        "mean": torch.randn(channels) * 0.5,
        "var": torch.rand(channels) * 2 + 0.1,
        "weight": torch.randn(channels) if affine else None,
        "bias": torch.randn(channels) * 0.3 if affine else None,
        "eps": 1e-5,
        **dict(zip(names, windows, strict=False)),
        "activation": activation,
        "slope": torch.rand(channels) - 0.3 if activation == "leaky_relu" else None,
    }


def in_two_steps(y: Tensor, window: int, stride: int, padding: int, averages: bool = False, **layer: Any) -> tuple[Tensor, Tensor]:
    z, sums = ops.bn_act(y.contiguous(memory_format=torch.channels_last), skip=None, **layer)
    return (F.avg_pool2d if averages else F.max_pool2d)(z, window, stride, padding), sums


def fitting() -> Iterator[tuple[tuple[int, ...], Pooling]]:
    kinds: list[Pooling] = [*MEANS, *WINDOWS]
    return ((shape, windows) for shape, windows in itertools.product(SHAPES, kinds) if shape != SHAPES[-1] or windows in kinds[:6])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_good_as_pytorch_and_the_bits_of_two_steps(level: str, dtype: torch.dtype, use_level: Callable[[str], None]) -> None:
    use_level(level)
    layouts = itertools.cycle(LAYOUTS)
    for shape, windows in fitting():
        inputs = make(shape, windows, dtype, next(layouts))
        ours, steps = run(ops.bn_act_pool, inputs), run(in_two_steps, inputs)
        plain, expected = run(reference.bn_act_pool, inputs), run(reference.bn_act_pool, inputs, double=True)
        assert set(ours) == set(expected)
        for name, result in ours.items():
            assert (result.shape, result.dtype) == (expected[name].shape, steps[name].dtype), (name, shape, windows)
            unit = 2.0 ** (-9 if result.dtype == torch.bfloat16 else -23)
            allowed = max(2 * error(plain[name], expected[name]), error(steps[name], expected[name]), unit)
            assert error(result, expected[name]) <= allowed, (name, shape, windows)
        assert torch.equal(ours["z"], steps["z"]), (shape, windows)
        if dtype == torch.float32:
            assert torch.equal(ours["y"], steps["y"]), (shape, windows)
        assert ours["z"].is_contiguous(memory_format=torch.channels_last)
        assert ours["y"].stride() == torch.empty_like(inputs["y"]).stride()


@pytest.mark.parametrize("windows", [(3, 2, 1), (2, 2, 0, True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("moments", [False, True])
def test_activations(activation: Activation, affine: bool, moments: bool, windows: Pooling) -> None:
    inputs = make((2, 20, 9, 8), windows, activation=activation, affine=affine)
    ours, steps = (run(operator, inputs, moments=moments) for operator in (ops.bn_act_pool, in_two_steps))
    expected = run(reference.bn_act_pool, inputs, double=True, moments=moments)
    for name in ("z", "y"):
        assert torch.equal(ours[name], steps[name]), name
    for name in expected:
        assert error(ours[name], expected[name]) <= max(2 * error(steps[name], expected[name]), 2e-7), name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_and_what_is_no_number(level: str, dtype: torch.dtype, use_level: Callable[[str], None]) -> None:
    """Of equals the first takes the gradient; of several NaN the last; infinities are numbers."""
    use_level(level)
    source = torch.Generator().manual_seed(0)
    values = torch.tensor([math.nan, math.inf, -math.inf, -1.0, 0.0, 1.0, 1.0, 2.0])
    y = values[torch.randint(len(values), (3, 19, 9, 9), generator=source)].to(dtype).contiguous(memory_format=torch.channels_last)
    zero, one = torch.zeros(19), torch.ones(19)
    for activation, windows in itertools.product(("none", "relu"), WINDOWS):
        leaf = y.clone().requires_grad_()
        z, _ = ops.bn_act_pool(leaf, zero, one, None, None, 0.0, *windows, activation)
        before = y.clone().requires_grad_()
        expected = F.max_pool2d(F.relu(before) if activation == "relu" else before, *windows)
        assert torch.equal(z.nan_to_num(7.0), expected.nan_to_num(7.0))
        gradient = torch.randint(1, 9, z.shape, generator=source).to(dtype)  # whose sums are exact
        ours, plain = (torch.autograd.grad(result, each, gradient)[0] for result, each in ((z, leaf), (expected, before)))
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("windows", [(3, 2, 1), (2, 2, 0, True)])
def test_gradients_of_two_uses(windows: Pooling, dtype: torch.dtype) -> None:
    """Their sum, as PyTorch rounds it; one of them may be missing."""
    inputs = make((2, 20, 9, 8), windows, dtype)
    y = inputs["y"].requires_grad_()
    z, alias, sums = ops.bn_act_pool(**inputs, with_alias=True)
    assert z.data_ptr() == alias.data_ptr()
    single, single_sums = ops.bn_act_pool(**inputs)
    grad_z, grad_alias, grad_sums = torch.randn_like(z), torch.randn_like(z), torch.randn_like(sums)

    def gradient(results: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Tensor:
        return torch.autograd.grad(results, y, grads, retain_graph=True)[0]

    added = gradient((single, single_sums), (grad_z + grad_alias, grad_sums))
    assert torch.equal(gradient((z, alias, sums), (grad_z, grad_alias, grad_sums)), added)
    for each in (z, alias):
        assert torch.equal(gradient((each,), (grad_z,)), gradient((single,), (grad_z,)))
    assert torch.equal(gradient((sums,), (grad_sums,)), gradient((single_sums,), (grad_sums,)))


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 0, 4, 4)])
def test_nothing_to_read(shape: tuple[int, ...]) -> None:
    results = run(ops.bn_act_pool, make(shape, (3, 2, 1)))
    assert results["z"].shape == (*shape[:2], 2, 2)
    assert results["y"].shape == shape
    assert not results["sums"].any()
    assert not results["weight"].any()


@pytest.mark.parametrize("windows", [(3, 2, 1), (2, 2, 0, True)])
def test_same_bits_for_any_number_of_threads(windows: Pooling) -> None:
    inputs, found = make((6, 64, 33, 32), windows, torch.bfloat16), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(run(ops.bn_act_pool, inputs))
    assert all(torch.equal(result, found[0][name]) for each in found[1:] for name, result in each.items())


@pytest.mark.parametrize("windows", [(3, 2, 1), (2, 2, 0, True)])
def test_without_sums(windows: Pooling) -> None:
    """The result and its gradient keep their bits."""
    inputs = make((2, 19, 6, 5), windows)
    inputs["y"].requires_grad_()
    z, sums = ops.bn_act_pool(**inputs, with_sums=False)
    expected, _ = ops.bn_act_pool(**inputs)
    assert torch.equal(z, expected)
    assert (sums.shape, sums.dtype) == ((0,), torch.float32)
    assert torch.equal(*(torch.autograd.grad(each.sum(), inputs["y"])[0] for each in (z, expected)))


def test_opcheck() -> None:
    ops.load()
    inputs = make((2, 19, 6, 5), (3, 2, 1))
    layer = tuple(inputs[name] for name in ("y", "mean", "var", "weight", "bias", "eps"))
    for behind in ((), (None, False)):
        torch.library.opcheck(torch.ops.dwa_fast.bn_act_pool_forward.default, (*layer, "relu", None, 3, 2, 1, *behind))
    z, _, index = torch.ops.dwa_fast.bn_act_pool_forward(*layer, "relu", None, 3, 2, 1)
    for parameters, again in itertools.product((False, True), (None, z)):
        arguments = z, torch.randn(2, 19), *layer, index, "relu", None, 3, 2, 1, parameters, again
        torch.library.opcheck(torch.ops.dwa_fast.bn_act_pool_backward.default, arguments)
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_pool_forward.default, (*layer, "relu", None, 2, 2, 0, None, True, True))
    z, _, index = torch.ops.dwa_fast.bn_act_pool_forward(*layer, "relu", None, 2, 2, 0, averages=True)
    for with_y in (False, True):
        arguments = z, None, *layer, index, "relu", None, 2, 2, 0, True, z, True, with_y
        torch.library.opcheck(torch.ops.dwa_fast.bn_act_pool_backward.default, arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"y": [1.0]}, TypeError, "y must be a tensor, got list"),
        ({"y": torch.zeros(2, 4, 3)}, ValueError, "y must be [N, C, H, W], got shape (2, 4, 3)"),
        ({"window": 2.0}, TypeError, "window must be an integer, got float"),
        ({"window": 0}, ValueError, "window must be 1 to 3, got 0"),
        ({"window": 4}, ValueError, "window must be 1 to 3, got 4"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"padding": 2}, ValueError, "padding must be 0 to half of the window, got 2 with window 3"),
        ({"averages": True}, ValueError, "stride must be 3 and padding 0 for means of 3 × 3 pixels, got 2 and 1"),
        ({"padding": 0}, ValueError, "y must have room for a window of 3 pixels, got shape (2, 4, 4, 2)"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"mean": torch.zeros(3)}, ValueError, "mean must be [C] with C = 4, got shape (3,)"),
    ],
)
def test_wrong_input(changes: Inputs, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.bn_act_pool(**make((2, 4, 4, 2), (3, 2, 1)) | changes)


def test_gradients_of_another_shape_are_refused() -> None:
    ops.load()
    inputs = make((2, 4, 6, 6), (2, 2, 0))
    layer = tuple(inputs[name] for name in ("y", "mean", "var", "weight", "bias", "eps"))
    z, _, index = torch.ops.dwa_fast.bn_act_pool_forward(*layer, "relu", None, 2, 2, 0)
    with pytest.raises(RuntimeError, match=r"grad_z must have the shape of y, \[2, 4, 3, 3\]"):
        torch.ops.dwa_fast.bn_act_pool_backward(z[:, :, 1:], None, *layer, index, "relu", None, 2, 2, 0)
    with pytest.raises(RuntimeError, match="index must be what bn_act_pool_forward returned"):
        torch.ops.dwa_fast.bn_act_pool_backward(z, None, *layer, index[:, :, 1:], "relu", None, 2, 2, 0)
    with pytest.raises(RuntimeError, match="index must be what bn_act_pool_forward returned"):
        torch.ops.dwa_fast.bn_act_pool_backward(z, None, *layer, index, "relu", None, 2, 2, 0, averages=True)
    with pytest.raises(RuntimeError, match="windows side by side: stride must be 2 and padding 0, got 1 and 0"):
        torch.ops.dwa_fast.bn_act_pool_forward(*layer, "relu", None, 2, 1, 0, averages=True)


class Pooled(nn.Module):
    """A teacher whose BatchNorm layer is followed by something, and its result by two branches."""

    def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.behind = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), behind
        self.branch, self.last = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.behind(self.norm(self.conv(images)))
        return self.fc(F.relu(self.last(self.branch(x)) + x).mean((2, 3)))


def stem(*layers: nn.Module) -> Callable[[Tensor], Tensor]:
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("behind", "fused"),
    [
        (stem(nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)), "BatchNorm + ReLU + max-pooling"),
        (stem(nn.MaxPool2d((2, 2), stride=(2, 2))), "BatchNorm + max-pooling"),
        (stem(nn.SiLU(), nn.Dropout(), nn.MaxPool2d(3, stride=1, padding=1)), "BatchNorm + SiLU + max-pooling"),
        (lambda x: F.max_pool2d(F.relu(x), 2), "BatchNorm + ReLU + max-pooling"),
        (lambda x: torch.max_pool2d(torch.relu(x), kernel_size=3, stride=2), "BatchNorm + ReLU + max-pooling"),
        (stem(nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)), "BatchNorm + ReLU"),
        (stem(nn.ReLU(), nn.MaxPool2d(4)), "BatchNorm + ReLU"),
        (stem(nn.Hardswish(), nn.MaxPool2d(2)), "BatchNorm + Hardswish"),
        (stem(nn.ReLU6(), nn.MaxPool2d(2)), "BatchNorm + ReLU6 + max-pooling"),
        (stem(nn.ReLU6(), nn.AvgPool2d(2)), "BatchNorm + ReLU6"),
        (stem(nn.ReLU(), nn.MaxPool2d(2, dilation=2)), "BatchNorm + ReLU"),
        (stem(nn.ReLU(), nn.MaxPool2d((2, 3))), "BatchNorm + ReLU"),
        (stem(nn.ReLU(), nn.AvgPool2d(2)), "BatchNorm + ReLU + mean-pooling"),
        (stem(nn.GELU(), nn.AvgPool2d((3, 3), stride=3, count_include_pad=False)), "BatchNorm + GELU + mean-pooling"),
        (lambda x: F.avg_pool2d(F.relu(x), 2), "BatchNorm + ReLU + mean-pooling"),
        (stem(nn.ReLU(), nn.AvgPool2d(2, stride=1)), "BatchNorm + ReLU"),
        (stem(nn.ReLU(), nn.AvgPool2d(2, padding=1)), "BatchNorm + ReLU"),
        (stem(nn.ReLU(), nn.AvgPool2d((2, 3))), "BatchNorm + ReLU"),
        (stem(nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)), "BatchNorm + ReLU"),
        (stem(nn.ReLU(), nn.AvgPool2d(2, divisor_override=3)), "BatchNorm + ReLU"),
        (stem(nn.ReLU(), nn.AvgPool2d(4)), "BatchNorm + ReLU"),
        (lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2), "BatchNorm"),
    ],
)
def test_which_poolings_are_fused(behind: Callable[[Tensor], Tensor], fused: str) -> None:
    teacher = alive(Pooled(behind))
    images, labels = torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])
    network, _ = prepare(teacher, images, resolve("fused", "fp32", "cpu"))
    assert network.traced
    layer = network.layers["norm"]
    assert isinstance(layer, BatchNormAct)
    assert layer.extra_repr() == fused
    assert layer.with_alias or "pooling" not in fused
    got, _ = image_gradient(network, images, labels)
    expected, _ = expected_gradient(teacher, images, labels)
    assert distance(got, expected) < 1e-5


def test_a_hooked_pooling_is_not_fused() -> None:
    teacher = alive(Pooled(nn.MaxPool2d(2)))
    teacher.behind.register_forward_hook(lambda *_: None)  # type: ignore[union-attr, attr-defined]
    network = prepare(teacher, torch.randn(3, 3, 8, 8), resolve("fused", "fp32", "cpu"))[0]
    assert network.layers["norm"].extra_repr() == "BatchNorm"

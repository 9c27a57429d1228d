"""bn_act_join in Triton, interpreted on a CPU and real on a GPU, against its plain twin in float64."""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.ops.activation import ACTIVATIONS, Activation
from dwa_fast.reference import ops as reference
from tests.kernels.cases import Launches, meta
from tests.kernels.layers import LARGER, SMALL, batch, layer, slope_of, spread, sum_sizes
from tests.kernels.support import PRECISIONS, assert_as_good_as_pytorch, captured

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
kernel = importlib.import_module("dwa_fast.kernels.bn_act_join")

EPS = 1e-5, 1e-3  # of the two layers
CASES = [(shape, activation) for shape in SMALL for activation in ACTIVATIONS if activation in ("none", "relu") or shape in SMALL[1:4:2]]
Layers = tuple[Any, ...]  # y, m, v, γ, β, ε, and those of the skip


def two_layers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Layers:
    first, second = ((batch(shape, dtype, device), *layer(shape[1], device), eps) for eps in EPS)
    return *first, *second


def both_ways(
    layers: Layers,
    activation: Activation,
    grads: tuple[Tensor | None, ...],
    *alias: Any,  # its gradient and stride, and what follows them
    parameters: bool = True,
) -> dict[str, Tensor]:
    """Every result of the kernels, forward and backward; grads are those of z and of both layers' sums."""
    slope = slope_of(activation, layers[0])
    z, sums = kernel.bn_act_join_forward(*layers, activation, slope)
    grad_y, grad_skip, of_parameters, grad_slope = kernel.bn_act_join_backward(*grads, *layers, activation, slope, parameters, *alias)
    results = {"z": z, "sums": sums[0], "skip_sums": sums[1], "y": grad_y, "skip": grad_skip}
    if parameters:
        results |= dict(zip(("weight", "bias", "skip_weight"), of_parameters, strict=True))
    return results if slope is None or not parameters else {**results, "slope": grad_slope}


def plainly(layers: Layers, activation: Activation, grads: tuple[Tensor | None, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same from the plain twin and automatic differentiation, activations in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    names = ("y", "mean", "var", "weight", "bias", "eps", "skip", "skip_mean", "skip_var", "skip_weight", "skip_bias", "skip_eps")
    given = dict(zip(names, layers, strict=True)) | {"slope": slope_of(activation, layers[0])}
    for name, value in given.items():
        if isinstance(value, Tensor):
            given[name] = value.to(dtype if name in ("y", "skip") else wide).detach()
            given[name].requires_grad_(name.split("_")[-1] in ("y", "skip", "weight", "bias", "slope"))
    z, *sums = reference.bn_act_join(**given, activation=activation)  # type: ignore[arg-type]
    wanted = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad}
    grad_sums = [torch.zeros_like(each) if grad is None else grad.to(wide) for each, grad in zip(sums, grads[1:], strict=True)]
    gradients = torch.autograd.grad([z, *sums], list(wanted.values()), [grads[0].to(dtype), *grad_sums])  # type: ignore[union-attr]
    return {"z": z.detach(), "sums": sums[0].detach(), "skip_sums": sums[1].detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_matches(layers: Layers, activation: Activation, *grad_sums: Tensor | None) -> dict[str, Tensor]:
    grads = torch.randn_like(layers[0]), *grad_sums
    ours, plain = both_ways(layers, activation, grads), plainly(layers, activation, grads, layers[0].dtype)
    expected, sizes = plainly(layers, activation, grads, torch.float64), sizes_of_sums(layers, activation, grads[0])
    for name, result in ours.items():
        assert_as_good_as_pytorch(result, plain[name], expected[name], sizes.get(name))
    return ours


def sizes_of_sums(layers: Layers, activation: Activation, grad_z: Tensor) -> dict[str, Tensor]:
    """How large the sums over the features are where their terms do not cancel."""
    halves = layers[:6], layers[6:]
    normalised = [reference.bn_act(*(each.double() if isinstance(each, Tensor) else each for each in half))[0] for half in halves]
    (y, *values, eps), (skip, *skip_values, skip_eps) = halves
    of_first = sum_sizes(y, values, normalised[1], activation, grad_z, eps)
    of_second = sum_sizes(skip, skip_values, normalised[0], activation, grad_z, skip_eps)
    return {name.removeprefix("grad_"): size for name, size in of_first.items()} | {"skip_weight": of_second["grad_weight"]}


def pair(channels: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    return torch.randn(2, channels, device=device), torch.randn(2, channels, device=device)


@pytest.mark.parametrize(("shape", "activation"), CASES)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, activation: Activation, device: torch.device) -> None:
    assert_matches(two_layers(shape, dtype, device), activation, *pair(shape[1], device))


@pytest.mark.parametrize("shape", LARGER)
def test_several_column_blocks(shape: tuple[int, ...], device: torch.device) -> None:
    assert_matches(two_layers(shape, torch.float32, device), "relu", *pair(shape[1], device))


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_without_a_gradient_of_the_sums(given: tuple[bool, bool], activation: Activation, device: torch.device) -> None:
    grad_sums = [grad if there else None for there, grad in zip(given, pair(20, device), strict=True)]
    assert_matches(two_layers((2, 20, 5, 5), torch.float32, device), activation, *grad_sums)


@pytest.mark.parametrize("missing", [(3,), (4,), (9, 10), (10,), (3, 4, 9, 10)])
def test_without_weight_or_bias(missing: tuple[int, ...], device: torch.device) -> None:
    """Those that are there have their gradients; of the others γ = 1 and β = 0."""
    layers, grads = list(two_layers((2, 20, 5, 5), torch.float32, device)), (batch((2, 20, 5, 5), torch.float32, device), *pair(20, device))
    for position in missing:
        layers[position] = None
    ours = both_ways(tuple(layers), "relu", grads)
    expected = plainly(tuple(layers), "relu", grads, torch.float64)
    for name, result in ours.items():
        if name in expected:
            torch.testing.assert_close(result.double(), expected[name].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_programs_loop_over_tiles(programs: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr("dwa_fast.kernels.layout.resident", lambda *_: programs)
    assert_matches(two_layers((3, 64, 9, 7), torch.float32, device), "relu", *pair(64, device))


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (5, 24, 9, 7)])
def test_partial_sums_in_memory_that_is_given(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Their rows add up to the sums, and nothing else changes; memory of another shape is refused."""
    monkeypatch.setattr("dwa_fast.kernels.layout.resident", lambda *_: 2)
    layers = two_layers(shape, torch.float32, device)
    rows = ops.partial_rows(layers[0], "relu", joins=True)
    partials = [torch.full((2, rows, shape[1]), math.nan, device=device) for _ in range(2)]
    z, _ = kernel.bn_act_join_forward(*layers, "relu", None, *partials)
    expected, sums = kernel.bn_act_join_forward(*layers, "relu", None)
    assert torch.equal(z, expected)
    for each, both in zip(partials, sums, strict=True):
        torch.testing.assert_close(each.double().sum(1).float(), both)
    with pytest.raises(ValueError, match="partials must be contiguous float32"):
        kernel.bn_act_join_forward(*layers, "relu", None, partials[0], partials[1][:, :, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "leaky_relu"])
def test_gradients_of_two_uses_and_of_frozen_weights(activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    """They are added as PyTorch adds them, bit for bit; frozen weights change nothing else."""
    layers, grad, more = two_layers((2, 20, 6, 5), dtype, device), *(batch((2, 20, 6, 5), dtype, device) for _ in range(2))
    for grad_sums in ((None, None), pair(20, device)):
        two = both_ways(layers, activation, (grad, *grad_sums), more)
        one = both_ways(layers, activation, (grad + more, *grad_sums))
        frozen = both_ways(layers, activation, (grad + more, *grad_sums), parameters=False)
        assert all(torch.equal(two[name], one[name]) for name in one)
        assert all(torch.equal(frozen[name], one[name]) for name in frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "stride"), [((1, 3, 5, 7), 2), ((2, 64, 5, 4), 2), ((1, 128, 4, 5), 3)])
def test_gradient_of_a_sampled_use(shape: tuple[int, ...], stride: int, dtype: torch.dtype, device: torch.device) -> None:
    """The same bits as with zeros between the pixels that it has."""
    layers, grad, grad_sums = two_layers(shape, dtype, device), batch(shape, dtype, device), pair(shape[1], device)
    sampled = batch(grad[:, :, ::stride, ::stride].shape, dtype, device)
    found = both_ways(layers, "relu", (grad, *grad_sums), sampled, stride)
    expected = both_ways(layers, "relu", (grad + spread(sampled, grad, stride), *grad_sums))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 64, 5, 4)])
def test_without_sums(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """One launch, which leaves none; the result has the same bits."""
    layers = two_layers(shape, torch.float32, device)
    z, _ = kernel.bn_act_join_forward(*layers, "relu", None)
    for name in ("add_up", "sums_to_write"):
        monkeypatch.setattr(kernel, name, None)
    found, sums = kernel.bn_act_join_forward(*layers, "relu", None, None, None, False)
    assert torch.equal(found, z)
    assert sums.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 64, 5, 4), (5, 24, 9, 7)])
@pytest.mark.parametrize("last", ["one use", "a strided one", "a mean"])
def test_gradient_of_the_next_skip_in_parts(last: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """The same bits as from its mask times their sum."""
    layers, grad_sums = two_layers(shape, dtype, device), pair(shape[1], device)
    grad_z, later = (batch(shape, dtype, device) for _ in range(2))
    alias, whole = (None, 1), later
    if last == "a strided one":
        sampled = batch(later[:, :, ::2, ::2].shape, dtype, device)
        alias, whole = (sampled, 2), later + spread(sampled, later, 2)
    elif last == "a mean":
        later = whole = later[:, :, :1, :1].expand(shape)
    passes = torch.rand(elements := math.prod(shape)) < 0.5
    bits = torch.nn.functional.pad(passes, (0, -elements % 8)).view(-1, 8).long() << torch.arange(8)
    mask, n, (h, w) = bits.sum(1).to(torch.uint8).to(device), shape[0], shape[2:]
    masked = torch.where(passes.view(n, h, w, -1).permute(0, 3, 1, 2).to(device), whole, 0).contiguous(memory_format=torch.channels_last)
    found = both_ways(layers, "relu", (grad_z, *grad_sums), *alias, later, mask, parameters=False)
    expected = both_ways(layers, "relu", (grad_z, *grad_sums), masked, parameters=False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_slope_for_all_channels(device: torch.device) -> None:
    """Its gradient is the sum of those of a slope per channel."""
    layers, grads = two_layers((2, 20, 5, 5), torch.float32, device), (batch((2, 20, 5, 5), torch.float32, device), None, None)
    slopes = torch.tensor([0.25], device=device), torch.full((20,), 0.25, device=device)
    shared, each = (kernel.bn_act_join_backward(*grads, *layers, "leaky_relu", slope, True) for slope in slopes)
    assert all(torch.equal(*both) for both in zip(shared[:3], each[:3], strict=True))
    torch.testing.assert_close(shared[3], each[3].sum(0, keepdim=True))


def test_gradients_of_the_sums_are_slices_of_all_layers(device: torch.device) -> None:
    layers, everything = two_layers((2, 20, 5, 5), torch.float32, device), pair(100, device)
    grad_z = torch.randn_like(layers[0])
    slices = [each[:, 37 + i : 57 + i] for i, each in enumerate(everything)]
    expected = both_ways(layers, "relu", (grad_z, *(each.contiguous() for each in slices)))
    for grad_sums in (slices, [each.t().contiguous().t() for each in slices]):
        found = both_ways(layers, "relu", (grad_z, *grad_sums))
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_forward_and_backward_agree_on_what_passes(device: torch.device) -> None:
    """The backward pass finds the very elements that the forward pass let through, also next to 0."""
    layers = list(two_layers((4, 32, 16, 16), torch.float32, device))
    layers[4] = -layers[10]
    layers[0], layers[6] = (
        layers[i + 1].view(-1, 1, 1) + 1e-6 * torch.randn_like(layers[i]).contiguous(memory_format=torch.channels_last) for i in (0, 6)
    )
    z, _ = kernel.bn_act_join_forward(*layers, "relu", None)
    _, _, parameters, _ = kernel.bn_act_join_backward(torch.ones_like(z), None, None, *layers, "relu", None, True)
    assert torch.equal(parameters[1], (z > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("layout", ["contiguous", "slice"])
def test_any_memory_layout(layout: str, device: torch.device) -> None:
    whole = torch.randn(3, 12, 6, 10, device=device)
    given = {"contiguous": whole, "slice": whole[:, 1:11, :, ::2]}[layout]
    layers = list(two_layers(given.shape, torch.float32, device))
    layers[0], layers[6], grads = given, torch.randn_like(given), (torch.randn_like(given), *pair(given.shape[1], device))
    same = [each.contiguous(memory_format=torch.channels_last) if isinstance(each, Tensor) and each.dim() == 4 else each for each in layers]
    ours, expected = both_ways(tuple(layers), "relu", grads), both_ways(tuple(same), "relu", grads)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert all(ours[name].stride() == torch.empty_like(given).stride() for name in ("z", "y", "skip"))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_empty(shape: tuple[int, ...], activation: Activation, device: torch.device) -> None:
    layers = two_layers(shape, torch.float32, device)
    results = both_ways(layers, activation, (layers[0], *pair(shape[1], device)))
    assert all(results[name].shape == shape for name in ("z", "y", "skip"))
    assert not any(results[name].any() for name in results)


def test_nan_propagates_as_in_pytorch(device: torch.device) -> None:
    layers = two_layers((2, 8, 4, 4), torch.float32, device)
    layers[0][1, 5, 2, 3], layers[6][0, 2, 0, 0] = math.nan, math.inf
    grads = torch.randn_like(layers[0]), *(torch.ones(2, 8, device=device) for _ in range(2))
    ours, plain = both_ways(layers, "relu", grads), plainly(layers, "relu", grads, torch.float32)
    for name, result in ours.items():
        torch.testing.assert_close(result, plain[name], equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", [(100, 128, 28, 28), (100, 256, 56, 56), (8, 2048, 7, 7), (3, 58, 28, 28)])
def test_real_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_matches(two_layers(shape, dtype, "cuda"), "relu", *pair(shape[1], "cuda"))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    layers, grads = two_layers((8, 64, 16, 16), torch.bfloat16, "cuda"), (batch((8, 64, 16, 16), torch.bfloat16, "cuda"), *pair(64, "cuda"))
    called, replayed = both_ways(layers, "relu", grads), captured(lambda: both_ways(layers, "relu", grads))
    assert all(torch.equal(called[name], replayed[name]) for name in called)


def public_calls() -> list[tuple[str, Layers]]:
    """For test_dispatch."""
    layers = list(two_layers((2, 5, 4, 3), torch.float32, "cpu"))
    for position in (0, 3, 4, 6, 9, 10):
        layers[position].requires_grad_()
    return [("bn_act_join", (*layers, "relu"))]


def schema_calls() -> list[tuple[str, Layers]]:
    """For test_dispatch."""
    layers = two_layers((2, 5, 4, 3), torch.float32, "cpu")
    backward = layers[0], *pair(5, "cpu"), *layers, "relu", None, True, layers[0]
    left = *backward[:-2], False, None, 1, layers[0], torch.zeros(15, dtype=torch.uint8)
    forward = *layers, "relu", None
    return [
        ("bn_act_join_forward", forward),
        ("bn_act_join_forward", (*forward, None, None, False)),
        ("bn_act_join_backward", backward),
        ("bn_act_join_backward", left),
    ]


def launches() -> Launches:
    """The joins of a ResNet-18 for CIFAR and of a ResNet-50 at 224 pixels, batch 100; and odd sizes."""

    def both(shape: tuple[int, ...], dtype: torch.dtype, activation: Activation) -> None:
        y, values = meta(*shape, dtype=dtype), [meta(shape[1]) for _ in range(4)]
        layers, slope = (y, *values, 1e-5) * 2, meta(shape[1]) if activation == "leaky_relu" else None
        kernel.bn_act_join_forward(*layers, activation, slope)
        kernel.bn_act_join_forward(*layers, activation, slope, None, None, False)
        grad_sums = [meta(2, 4800)[:, : shape[1]]] * 2
        kernel.bn_act_join_backward(y, *grad_sums, *layers, activation, slope)
        kernel.bn_act_join_backward(y, *grad_sums, *layers, activation, slope, False, y)
        # During the ascent the moments go unused and γ and β take gradients.
        kernel.bn_act_join_backward(y, None, None, *layers, activation, slope, True)
        kernel.bn_act_join_backward(y, None, None, *layers, activation, slope, True, y)
        if activation == "relu":  # where a strided 1×1 convolution follows, as in the stages of one block
            sampled = meta(*y[:, :, ::2, ::2].shape, dtype=dtype)
            for sums, parameters in ((grad_sums, False), ([None, None], True)):
                kernel.bn_act_join_backward(y, *sums, *layers, activation, slope, parameters, sampled, 2)
            mask, of_mean = meta(math.ceil(y.numel() / 8), dtype=torch.uint8), meta(*shape[:2], 1, 1, dtype=dtype).expand(shape)
            for left in (None, 1, y), (sampled, 2, y), (None, 1, of_mean):  # the gradient of the next block's skip, in parts
                kernel.bn_act_join_backward(y, *grad_sums, *layers, activation, slope, False, *left, mask)
            kernel.bn_act_join_backward(of_mean, *grad_sums, *layers, activation, slope)
            kernel.bn_act_join_backward(of_mean, None, None, *layers, activation, slope, True)

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in [(100, 128, 16, 16), (100, 256, 56, 56), (100, 2048, 7, 7)]:
            yield f"{dtype} relu C={shape[1]}", partial(both, shape, dtype, "relu")
        for activation in ACTIVATIONS if dtype != torch.float16 else ():
            if activation != "relu6":  # 8 bytes are spilled for sm_80: no teacher is rewritten to that
                yield f"{dtype} {activation} C=128", partial(both, (100, 128, 16, 16), dtype, activation)
    yield "torch.bfloat16 relu C=58, odd size", partial(both, (3, 58, 7, 7), torch.bfloat16, "relu")

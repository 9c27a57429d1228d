"""adam_clip_: Adam with the schedule's learning rate and the pixel clamp in one pass, in C++ on every instruction set, against float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.reference import ops as reference
from tests.ops.conftest import LEVELS

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (50, 3, 32, 32), (3, 5, 17, 9), (1, 20, 3, 3), (2, 4097, 1, 2), (0, 3, 8, 8)]
LAYOUTS = ["contiguous", "channels_last", "slice"]
CHANGED = ("images", "exp_avg", "exp_avg_sq")
Inputs = dict[str, Any]


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return x
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    larger = torch.full((n, c, h + 2, 2 * w), math.nan, device=x.device)
    larger[:, :, 1 : h + 1, ::2] = x
    return larger[:, :, 1 : h + 1, ::2]


def make(shape: tuple[int, ...], layout: str = "channels_last", step: int = 3, device: torch.device | str = "cpu") -> Inputs:
    """A step in the middle of a run, with gradients of a real run's magnitude; some pixels end at either bound."""
    images = torch.randn(shape)
    tensors = {
        "images": laid_out(images.to(device), layout),
        "gradient": laid_out((1e-4 * torch.randn(shape)).to(device), layout),
        "exp_avg": laid_out((1e-4 * torch.randn(shape)).to(device), layout),
        "exp_avg_sq": laid_out((1e-8 * torch.rand(shape)).to(device), layout),
        "learning_rates": torch.tensor([0.25, 0.2, 0.15, 0.1, 0.05], device=device),
        "step": torch.tensor(step, device=device),
        "low": (-1.5 - torch.rand(shape[1])).to(device),
        "high": (1.5 + torch.rand(shape[1])).to(device),
    }
    return tensors | {"betas": (0.5, 0.9), "eps": 1e-8}


def run(operator: Any, inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What an operator makes of copies of the inputs that lie in memory as they do."""
    copies: Inputs = {}
    for name, value in inputs.items():
        copies[name] = value
        if isinstance(value, Tensor) and value.is_floating_point():
            copies[name] = value.to(dtype) if dtype is not None else copy_of(value)
    assert operator(**copies) is None
    return {name: copies[name] for name in CHANGED}


def copy_of(x: Tensor) -> Tensor:
    """The same numbers with the same strides."""
    if x.numel() == 0:
        return x.clone()
    storage = torch.full((x.untyped_storage().nbytes() // x.element_size(),), math.nan, device=x.device)
    copy = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    copy.copy_(x)
    return copy


def error(result: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(result.double() - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-300)).item()


def assert_as_good_as_pytorch(inputs: Inputs) -> None:
    """Errors against float64 at most twice those of PyTorch's own operators, or a unit in the last place."""
    ours, plain, expected = run(ops.adam_clip_, inputs), run(reference.adam_clip_, inputs), run(reference.adam_clip_, inputs, torch.float64)
    for name in CHANGED:
        assert error(ours[name], expected[name]) <= max(2 * error(plain[name], expected[name]), 2**-23), name
        assert ours[name].stride() == inputs[name].stride()
    low, high = inputs["low"][:, None, None], inputs["high"][:, None, None]
    assert ((ours["images"] >= low) & (ours["images"] <= high)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: tuple[int, ...], layout: str, device: torch.device) -> None:
    for step in (0, 3):
        assert_as_good_as_pytorch(make(shape, layout, step, device))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_instruction_set_matches_float64(level: str, layout: str, use_level: Callable[[str], None]) -> None:
    use_level(level)
    for shape in SHAPES:
        assert_as_good_as_pytorch(make(shape, layout))


def test_tensors_that_lie_differently(device: torch.device) -> None:
    """A contiguous gradient for channels-last images, and the state sliced from something larger."""
    inputs = make((3, 3, 8, 10), device=device)
    expected = run(ops.adam_clip_, inputs)
    mixed = inputs | {
        "gradient": inputs["gradient"].contiguous(),
        "exp_avg": laid_out(inputs["exp_avg"].contiguous(), "slice"),
        "exp_avg_sq": inputs["exp_avg_sq"].contiguous(),
    }
    results = run(ops.adam_clip_, mixed)
    assert all(torch.equal(results[name], expected[name]) for name in CHANGED)


def test_nothing_outside_a_slice_is_touched(device: torch.device) -> None:
    inputs = make((2, 3, 4, 5), device=device)
    larger = torch.full((2, 3, 6, 10), math.nan, device=device)
    inside = larger[:, :, 1:5, ::2]
    inside.copy_(inputs["images"])
    ops.adam_clip_(**(inputs | {"images": inside}))
    assert inside.isfinite().all()
    assert larger.isfinite().sum() == inside.numel()


def test_many_steps_equal_torch_adam(device: torch.device) -> None:
    """Fifty steps with the cosine schedule, against torch.optim.Adam with a clamp, on a quadratic."""
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device)
    target = torch.randn_like(x)
    low, high = torch.full((3,), -1.2, device=device), torch.full((3,), 1.3, device=device)
    rates = torch.tensor([0.125 * (1 + math.cos(math.pi * t / 50)) for t in range(50)], device=device)
    leaf = x.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], betas=(0.5, 0.9), eps=1e-8)
    images, step = x.float(), torch.tensor(0, device=device)
    exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
    for rate in rates.tolist():
        adam.param_groups[0]["lr"] = rate
        leaf.grad = leaf.detach() - target
        adam.step()
        leaf.data.clamp_(low.double()[:, None, None], high.double()[:, None, None])
        ops.adam_clip_(images, images - target.float(), exp_avg, exp_avg_sq, rates, step, low, high)
        step += 1
    torch.testing.assert_close(images.double(), leaf.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_propagate(value: float, device: torch.device) -> None:
    inputs = make((2, 3, 5, 7), device=device)
    inputs["gradient"][1, 2, 3, 4] = value
    ours, plain = run(ops.adam_clip_, inputs), run(reference.adam_clip_, inputs)
    for name in CHANGED:
        finite = plain[name].isfinite()
        assert torch.equal(ours[name].isfinite(), finite)
        torch.testing.assert_close(ours[name][finite], plain[name][finite], rtol=1e-5, atol=1e-6)
    assert ours["images"][1, 2, 3, 4].isnan()


def test_same_bits_for_any_number_of_threads_and_layout() -> None:
    inputs = make((50, 3, 32, 32))
    contiguous = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    results = []
    for threads, given in ((1, inputs), (2, inputs), (2, contiguous)):
        torch.set_num_threads(threads)
        results.append(run(ops.adam_clip_, given))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in CHANGED)


def test_opcheck() -> None:
    ops.load()
    for layout in LAYOUTS:
        inputs = make((2, 3, 5, 7), layout)
        arguments = (*list(inputs.values())[:8], 0.5, 0.9, 1e-8)
        torch.library.opcheck(torch.ops.dwa_fast.adam_clip_.default, arguments)


def test_meta_tensors_are_accepted() -> None:
    inputs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in make((2, 3, 5, 7)).items()}
    assert ops.adam_clip_(**inputs) is None


def test_requires_grad_is_fine_under_no_grad() -> None:
    inputs = make((2, 3, 5, 7))
    before = inputs["images"].clone()
    inputs["images"].requires_grad_()
    with torch.no_grad():
        ops.adam_clip_(**inputs)
    assert not torch.equal(inputs["images"].detach(), before)


WRONG: list[tuple[Inputs, type[Exception], str]] = [
    ({"images": [1.0]}, TypeError, "images must be a tensor, got list"),
    ({"images": torch.zeros(2, 3, 4, 4).double()}, TypeError, "images must be float32, got float64"),
    ({"images": torch.zeros(3, 4, 4)}, ValueError, "images must be [N, C, H, W], got shape (3, 4, 4)"),
    ({"images": torch.zeros(2, 3, 4, 4, requires_grad=True)}, ValueError, "adam_clip_ is not differentiable"),
    ({"gradient": torch.zeros(2, 3, 4, 4).bfloat16()}, TypeError, "gradient must be float32, got bfloat16"),
    ({"gradient": torch.zeros(2, 3, 4, 5)}, ValueError, "gradient must have the shape of images, (2, 3, 4, 4), got (2, 3, 4, 5)"),
    ({"exp_avg": torch.zeros(1, 3, 4, 4)}, ValueError, "exp_avg must have the shape of images, (2, 3, 4, 4), got (1, 3, 4, 4)"),
    ({"exp_avg_sq": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, "exp_avg_sq must be on the device of images, cpu, got meta"),
    ({"learning_rates": torch.zeros(1, 5)}, ValueError, "learning_rates must be [T], got shape (1, 5)"),
    ({"step": 3}, TypeError, "step must be a tensor, got int"),
    ({"step": torch.tensor(3.0)}, TypeError, "step must be int64, got float32"),
    ({"step": torch.tensor([3])}, ValueError, "step must be [], got shape (1,)"),
    ({"step": torch.tensor(5)}, IndexError, "step must be a row of learning_rates, 0 to 4, got 5"),
    ({"step": torch.tensor(-1)}, IndexError, "step must be a row of learning_rates, 0 to 4, got -1"),
    ({"low": torch.zeros(4)}, ValueError, "low must be [C] with C = 3, got shape (4,)"),
    ({"high": torch.zeros(3).half()}, TypeError, "high must be float32, got float16"),
    ({"betas": 0.9}, TypeError, "betas must be two numbers, got 0.9"),
    ({"betas": (0.5, 1.0)}, ValueError, "betas must lie in [0, 1), got (0.5, 1.0)"),
    ({"eps": "small"}, TypeError, "eps must be a number, got str"),
    ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
    ({"eps": math.nan}, ValueError, "eps must not be negative, got nan"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[row[-1] for row in WRONG])
def test_wrong_input(change: Inputs, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.adam_clip_(**(make((2, 3, 4, 4)) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 4, 4)}, r"images must be \[N, C, H, W\], got shape \[3, 4, 4\]"),
        ({"gradient": torch.zeros(2, 3, 4, 5)}, r"gradient must have the shape of images, \[2, 3, 4, 4\], got \[2, 3, 4, 5\]"),
        ({"exp_avg": torch.zeros(2, 3, 4, 4).half()}, "exp_avg must be float32, got Half"),
        ({"low": torch.zeros(4)}, r"low must be \[C\] with C = 3, got shape \[4\]"),
        ({"step": torch.tensor([1])}, r"step must be a Long scalar, got Long \[1\]"),
    ],
)
def test_the_operator_checks_for_itself(change: Inputs, message: str) -> None:
    ops.load()
    arguments = list((make((2, 3, 4, 4)) | change).values())[:8]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dwa_fast.adam_clip_(*arguments, 0.5, 0.9, 1e-8)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """Replays follow the counter on the device, as calls do."""
    called, captured = make((2, 3, 16, 16), step=0, device="cuda"), make((2, 3, 16, 16), step=0, device="cuda")
    for name in called:
        if isinstance(called[name], Tensor):
            captured[name].copy_(called[name])
    ops.adam_clip_(**make((2, 3, 16, 16), step=0, device="cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.adam_clip_(**captured)
        captured["step"] += 1
    for _ in range(3):
        ops.adam_clip_(**called)
        called["step"] += 1
        graph.replay()
    assert all(torch.equal(called[name], captured[name]) for name in CHANGED)

"""view_adam_clip_: the adjoint of the view, Adam and the clamp in one pass, in C++, against float64 and torch.optim.Adam."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast import ops
from dwa_fast.reference import ops as reference
from tests.ops.conftest import LEVELS
from tests.ops.layers import error

Row = tuple[int, int, int, int, int, int, int]  # top, left, height, width; flip; roll down, right
Inputs = dict[str, Any]

VIEWS: list[tuple[tuple[int, int, int, int], Row]] = [
    ((1, 1, 1, 1), (0, 0, 1, 1, 1, 3, 2)),
    ((2, 3, 5, 7), (0, 0, 5, 7, 0, 0, 0)),
    ((2, 3, 5, 7), (0, 0, 5, 7, 0, -3, 16)),
    ((2, 3, 5, 7), (0, 0, 5, 7, 1, 1, 2)),
    ((3, 5, 17, 9), (4, 1, 9, 7, 1, 5, 2)),
    ((2, 1, 16, 16), (15, 0, 1, 1, 0, 2, 3)),  # one pixel, in one corner
    ((1, 20, 9, 6), (0, 1, 8, 5, 0, 1, 0)),
    ((1, 8, 20, 3), (3, 0, 6, 3, 0, 4, 1)),  # a crop in height alone
    ((1, 2, 3, 40), (0, 7, 3, 21, 0, 0, 30)),  # and in width alone
    ((50, 3, 32, 32), (0, 0, 32, 32, 0, 4, 3)),
    ((2, 3, 224, 224), (31, 17, 101, 160, 1, 30, 9)),
]
CASES = [pytest.param(shape, row, id=f"{'x'.join(map(str, shape))}-{','.join(map(str, row))}") for shape, row in VIEWS]
LAYOUTS = ["contiguous", "channels_last", "slice"]
DTYPES = [torch.float32, torch.bfloat16]
CHANGED = ("images", "exp_avg", "exp_avg_sq")
CROP: Row = (1, 2, 4, 5, 1, 3, 2)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return x
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    larger = torch.full((n, c, h + 2, 2 * w), math.nan, dtype=x.dtype, device=x.device)
    larger[:, :, 1 : h + 1, ::2] = x
    return larger[:, :, 1 : h + 1, ::2]


def make(
    shape: tuple[int, ...],
    row: Row,
    layout: str = "channels_last",
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """A step in the middle of a run, with gradients of a real run's magnitude; some pixels end at either bound."""
    other = (0, 0, 1, 1, 0, 0, 0)
    tensors = {
        "images": torch.randn(shape),
        "gradient": (1e-4 * scale * torch.randn(shape)).to(dtype),
        "exp_avg": 1e-4 * torch.randn(shape),
        "exp_avg_sq": 1e-8 * torch.rand(shape),
    }
    return {name: laid_out(tensor.to(device), layout) for name, tensor in tensors.items()} | {
        "rows": torch.tensor([other, other, row], dtype=torch.int32, device=device),
        "learning_rates": torch.tensor([0.25, 0.2, 0.15], device=device),
        "step": torch.tensor(2, device=device),
        "low": (-1.5 - torch.rand(shape[1])).to(device),
        "high": (1.5 + torch.rand(shape[1])).to(device),
        "loss_scale": scale,
        "betas": (0.5, 0.9),
        "eps": 1e-8,
    }


def copy_of(x: Tensor) -> Tensor:
    """The same numbers with the same strides."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).fill_(math.nan)
    return copy.copy_(x)


def run(operator: Any, inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What an operator makes of copies of the inputs that lie in memory as they do; `dtype` is that of the state."""
    copies = dict(inputs)
    for name in (*CHANGED, "low", "high"):
        copies[name] = copy_of(inputs[name]) if dtype is None else inputs[name].to(dtype)
    assert operator(**copies) is None
    return {name: copies[name] for name in CHANGED}


def assert_as_good_as_pytorch(inputs: Inputs) -> None:
    """Errors against float64 at most twice those of PyTorch's own operators, or a unit in the last place."""
    ours, plain = run(ops.view_adam_clip_, inputs), run(reference.view_adam_clip_, inputs)
    expected = run(reference.view_adam_clip_, inputs, torch.float64)
    for name in CHANGED:
        assert error(ours[name], expected[name]) <= max(2 * error(plain[name], expected[name]), 2**-23), name
        assert ours[name].stride() == inputs[name].stride()
    low, high = inputs["low"][:, None, None], inputs["high"][:, None, None]
    assert ((ours["images"] >= low) & (ours["images"] <= high)).all()


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in CHANGED:
        torch.testing.assert_close(result[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "row"), CASES)
def test_matches_float64(shape: tuple[int, ...], row: Row, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    assert_as_good_as_pytorch(make(shape, row, layout, dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_matches_float64(level: str, dtype: torch.dtype, use_level: Callable[[str], None]) -> None:
    use_level(level)
    for shape, row in [*VIEWS, ((2, 4097, 1, 2), (0, 0, 1, 2, 0, 0, 1))]:
        for layout in LAYOUTS:
            assert_as_good_as_pytorch(make(shape, row, layout, dtype, 2.0**14))


@pytest.mark.parametrize("scale", [2.0**14, 3.0])
def test_the_scale_of_the_loss_is_divided_out(scale: float, device: torch.device) -> None:
    inputs = make((2, 3, 6, 9), CROP, scale=scale, device=device)
    unscaled = inputs | {"gradient": inputs["gradient"] / scale, "loss_scale": 1.0}
    results = run(ops.view_adam_clip_, inputs), run(ops.view_adam_clip_, unscaled)
    for name in CHANGED:
        assert error(results[0][name], results[1][name].double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_in_blocks(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """As a stem's convolution leaves it, the inside of a larger tensor, or otherwise: the same bits."""
    inputs = make((2, 3, 6, 8), CROP, layout, dtype, device=device)
    expected = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    ops.view_adam_clip_(**expected)
    room = F.pad(F.pixel_unshuffle(inputs["gradient"], 2), (0, 1, 1, 0, 0, 4)).contiguous(memory_format=torch.channels_last)
    of_stem = room[:, :12, 1:, :-1].view(2, 3, 2, 2, 3, 4).permute(0, 1, 4, 2, 5, 3)
    for gradient in (of_stem, inputs["gradient"].unflatten(3, (4, 2)).unflatten(2, (3, 2))):
        assert torch.equal(gradient.reshape(2, 3, 6, 8), inputs["gradient"])
        found = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()} | {"gradient": gradient}
        ops.view_adam_clip_(**found)
        assert all(torch.equal(found[name], expected[name]) for name in CHANGED)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    inputs = make(shape, (0, 0, 8, 8, 0, 1, 1), "contiguous", torch.bfloat16, device=device)
    ops.view_adam_clip_(**inputs)
    assert inputs["images"].shape == shape


def test_tensors_that_lie_differently(device: torch.device) -> None:
    """A contiguous gradient for channels-last images, the state sliced from something larger, schedule and bounds with strides."""
    inputs = make((3, 3, 8, 10), CROP, device=device)
    mixed = inputs | {
        "gradient": inputs["gradient"].contiguous(),
        "exp_avg": laid_out(inputs["exp_avg"].contiguous(), "slice"),
        "exp_avg_sq": inputs["exp_avg_sq"].contiguous(),
        "rows": inputs["rows"].T.contiguous().T,
        "low": torch.stack([inputs["low"], inputs["high"]], 1)[:, 0],
    }
    assert_same(run(ops.view_adam_clip_, mixed), run(ops.view_adam_clip_, inputs))


def test_nothing_else_is_touched(device: torch.device) -> None:
    """Neither what lies between the pixels of a slice, nor the gradient, nor the schedule."""
    inputs = make((2, 3, 6, 9), CROP, device=device)
    larger = torch.full((2, 3, 8, 18), math.nan, device=device)
    inside = larger[:, :, 1:7, ::2]
    inside.copy_(inputs["images"])
    others = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor) and name not in CHANGED}
    ops.view_adam_clip_(**(inputs | {"images": inside}))
    assert inside.isfinite().all()
    assert larger.isfinite().sum() == inside.numel()
    assert all(torch.equal(inputs[name], value) for name, value in others.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_reach_the_pixels_that_were_read(value: float, device: torch.device) -> None:
    inputs = make((2, 3, 6, 9), (0, 0, 6, 9, 1, 2, 3), device=device)
    inputs["gradient"][1, 2, 3, 4] = value
    ours, plain = run(ops.view_adam_clip_, inputs), run(reference.view_adam_clip_, inputs)
    for name in CHANGED:
        finite = plain[name].isfinite()
        assert (~finite).any()
        assert torch.equal(ours[name].isfinite(), finite)
        torch.testing.assert_close(ours[name][finite], plain[name][finite], rtol=1e-5, atol=1e-6)


def test_many_steps_equal_torch_adam(device: torch.device) -> None:
    """Fifty steps with the cosine schedule and views that change nothing, against torch.optim.Adam with a clamp, on a quadratic."""
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device)
    target = torch.randn_like(x)
    low, high = torch.full((3,), -1.2, device=device), torch.full((3,), 1.3, device=device)
    rates = torch.tensor([0.125 * (1 + math.cos(math.pi * t / 50)) for t in range(50)], device=device)
    rows = torch.tensor([(0, 0, 8, 8, 0, 0, 0)] * 50, dtype=torch.int32, device=device)
    leaf = x.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], betas=(0.5, 0.9), eps=1e-8)
    images, step = x.float(), torch.tensor(0, device=device)
    exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
    for rate in rates.tolist():
        adam.param_groups[0]["lr"] = rate
        leaf.grad = leaf.detach() - target
        adam.step()
        leaf.data.clamp_(low.double()[:, None, None], high.double()[:, None, None])
        ops.view_adam_clip_(images, images - target.float(), exp_avg, exp_avg_sq, rows, rates, step, low, high)
        step += 1
    torch.testing.assert_close(images.double(), leaf.detach(), rtol=1e-4, atol=1e-4)


def test_a_run_follows_the_schedule(device: torch.device) -> None:
    """Ten steps of a quadratic that is seen through ten views, against the plain operators in float64."""
    shape, rows = (2, 3, 9, 7), [(t % 3, t % 2, 6, 5, t % 2, t, 2 * t) for t in range(10)]
    schedule = {"rows": torch.tensor(rows, dtype=torch.int32, device=device), "step": torch.tensor(0, device=device)}
    rates, target = torch.linspace(0.2, 0.1, 10, device=device), torch.randn(shape, device=device)
    low, high = torch.full((3,), -0.8, device=device), torch.full((3,), 0.9, device=device)
    ours = [tensor.contiguous(memory_format=torch.channels_last) for tensor in torch.zeros(3, *shape, device=device)]
    exact = [tensor.double() for tensor in ours]
    for _ in rows:
        for operators, state in ((ops, ours), (reference, exact)):
            gradient = operators.view(state[0] - target.to(state[0].dtype), **schedule)
            bounds = low.to(state[0].dtype), high.to(state[0].dtype)
            operators.view_adam_clip_(state[0], gradient, state[1], state[2], schedule["rows"], rates, schedule["step"], *bounds)
        schedule["step"] += 1
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads_and_layout(dtype: torch.dtype) -> None:
    inputs = make((20, 3, 64, 64), (9, 3, 40, 51, 1, 4, 60), dtype=dtype)
    contiguous = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    results = []
    for threads, given in ((1, inputs), (2, inputs), (3, inputs), (2, contiguous)):
        torch.set_num_threads(threads)
        results.append(run(ops.view_adam_clip_, given))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in CHANGED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    ops.load()
    for layout in LAYOUTS:
        for shape in ((2, 3, 6, 9), (2, 3, 6, 8)):
            arguments = list(make(shape, CROP, layout, dtype).values())
            arguments[1] = arguments[1] if shape[3] % 2 else arguments[1].reshape(2, 3, 3, 2, 4, 2)
            torch.library.opcheck(torch.ops.dwa_fast.view_adam_clip_.default, (*arguments[:9], 2.0**14, 0.5, 0.9, 1e-8))


def test_meta_tensors_are_accepted() -> None:
    inputs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in make((2, 3, 6, 9), CROP).items()}
    assert ops.view_adam_clip_(**inputs) is None


def test_requires_grad_is_fine_under_no_grad() -> None:
    inputs = make((2, 3, 6, 9), CROP)
    before = inputs["images"].clone()
    inputs["images"].requires_grad_()
    with torch.no_grad():
        ops.view_adam_clip_(**inputs)
    assert not torch.equal(inputs["images"].detach(), before)


def schedule(*row: int) -> Tensor:
    return torch.tensor([row] * 3, dtype=torch.int32)


SHAPE = (2, 3, 6, 9)
WRONG: list[tuple[Inputs, type[Exception], str]] = [
    ({"images": [1.0]}, TypeError, "images must be a tensor, got list"),
    ({"images": torch.zeros(SHAPE).double()}, TypeError, "images must be float32, got float64"),
    ({"images": torch.zeros(3, 6, 9)}, ValueError, "images must be [N, C, H, W], got shape (3, 6, 9)"),
    ({"images": torch.zeros(SHAPE, requires_grad=True)}, ValueError, "view_adam_clip_ is not differentiable"),
    ({"gradient": None}, TypeError, "gradient must be a tensor, got NoneType"),
    ({"gradient": torch.zeros(SHAPE).half()}, TypeError, "gradient must be float32 or bfloat16 on cpu, got float16"),
    ({"gradient": torch.zeros(2, 3, 6, 8)}, ValueError, "gradient must have the shape of images, (2, 3, 6, 9), got (2, 3, 6, 8)"),
    (
        {"gradient": torch.zeros(2, 3, 3, 2, 4, 2)},
        ValueError,
        "gradient must have the shape of images, (2, 3, 6, 9), got (2, 3, 3, 2, 4, 2)",
    ),
    ({"gradient": torch.zeros(SHAPE, requires_grad=True)}, ValueError, "view_adam_clip_ is not differentiable"),
    ({"exp_avg": torch.zeros(SHAPE).bfloat16()}, TypeError, "exp_avg must be float32, got bfloat16"),
    ({"exp_avg_sq": torch.zeros(SHAPE, device="meta")}, ValueError, "exp_avg_sq must be on the device of images, cpu, got meta"),
    ({"rows": torch.zeros(3, 7)}, TypeError, "rows must be int32, got float32"),
    ({"rows": schedule(1, 2, 3)}, ValueError, "rows must be [T, 7], got shape (3, 3)"),
    ({"rows": schedule(*CROP)[:2]}, ValueError, "rows and learning_rates must be of one length, got 2 and 3"),
    ({"rows": schedule(5, 0, 2, 9, 0, 0, 0)}, ValueError, "the crop of row 2 must lie inside the images, 6 x 9, got top 5"),
    ({"learning_rates": torch.zeros(1, 3)}, ValueError, "learning_rates must be [T], got shape (1, 3)"),
    ({"step": 3}, TypeError, "step must be a tensor, got int"),
    ({"step": torch.tensor([2])}, ValueError, "step must be [], got shape (1,)"),
    ({"step": torch.tensor(3)}, IndexError, "step must be a row of learning_rates, 0 to 2, got 3"),
    ({"step": torch.tensor(-1)}, IndexError, "step must be a row of learning_rates, 0 to 2, got -1"),
    ({"low": torch.zeros(4)}, ValueError, "low must be [C] with C = 3, got shape (4,)"),
    ({"high": torch.zeros(3).half()}, TypeError, "high must be float32, got float16"),
    ({"loss_scale": "big"}, TypeError, "loss_scale must be a number, got str"),
    ({"loss_scale": 0.0}, ValueError, "loss_scale must be positive and finite, got 0.0"),
    ({"loss_scale": math.inf}, ValueError, "loss_scale must be positive and finite, got inf"),
    ({"loss_scale": math.nan}, ValueError, "loss_scale must be positive and finite, got nan"),
    ({"step": torch.tensor(3.0)}, TypeError, "step must be int64, got float32"),
    ({"betas": 0.9}, TypeError, "betas must be two numbers, got 0.9"),
    ({"eps": "small"}, TypeError, "eps must be a number, got str"),
    ({"eps": math.nan}, ValueError, "eps must not be negative, got nan"),
    ({"betas": (0.5, 1.0)}, ValueError, "betas must lie in [0, 1), got (0.5, 1.0)"),
    ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[row[-1] for row in WRONG])
def test_wrong_input(change: Inputs, kind: type[Exception], message: str) -> None:
    inputs = make(SHAPE, CROP)
    before = inputs["images"].clone()
    with pytest.raises(kind, match=re.escape(message)):
        ops.view_adam_clip_(**(inputs | change))
    assert torch.equal(inputs["images"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 6, 9)}, r"images must be \[N, C, H, W\], got shape \[3, 6, 9\]"),
        (
            {"gradient": torch.zeros(2, 3, 6, 8)},
            r"gradient must have the shape of images, \[2, 3, 6, 9\], or that of their 2×2 blocks, got \[2, 3, 6, 8\]",
        ),
        ({"gradient": torch.zeros(SHAPE).half()}, "gradient must be float32 or bfloat16 on a CPU, got Half"),
        ({"exp_avg": torch.zeros(SHAPE).half()}, "exp_avg must be float32, got Half"),
        ({"rows": torch.zeros(3, 7)}, r"rows must be Int \[T, 7\], got Float \[3, 7\]"),
        ({"rows": schedule(*CROP)[:2]}, "step must be one of the rows, 0 to 1, got 2"),
        ({"low": torch.zeros(4)}, r"low must be \[C\] with C = 3, got shape \[4\]"),
    ],
)
def test_the_operator_checks_for_itself(change: Inputs, message: str) -> None:
    ops.load()
    arguments = list((make(SHAPE, CROP) | change).values())[:9]
    with pytest.raises((RuntimeError, IndexError), match=message):
        torch.ops.dwa_fast.view_adam_clip_(*arguments, 1.0, 0.5, 0.9, 1e-8)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """Replays follow the counter on the device, as calls do."""
    shape = (2, 3, 16, 16)
    rows = torch.tensor([(0, 0, 16, 16, 0, 1, 2), (2, 3, 9, 10, 1, 4, 4), (0, 0, 8, 16, 1, 0, 0)], dtype=torch.int32, device="cuda")
    called, captured, spare = (make(shape, CROP, device="cuda") | {"rows": rows, "step": torch.tensor(0, device="cuda")} for _ in range(3))
    for name, value in called.items():
        if isinstance(value, Tensor):
            captured[name].copy_(value)
    ops.view_adam_clip_(**spare)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.view_adam_clip_(**captured)
        captured["step"] += 1
    for _ in rows:
        ops.view_adam_clip_(**called)
        called["step"] += 1
        graph.replay()
    assert all(torch.equal(called[name], captured[name]) for name in CHANGED)

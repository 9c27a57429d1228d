"""ascend_: w ← w + radius · g / (‖g‖₂ + 1e-12) from flat arenas, in C++ and Triton, against float64."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.reference import ops as reference
from tests.ops.layers import error

RADIUS = 0.015 / 12
SIZES = [0, 1, 7, 1023, 4096, 4097, 65537, 200_003]
REAL_SIZE = 11_220_132  # the weights of a CIFAR ResNet-18 with 100 classes


def triton_ascend_(*args: object, **kwargs: object) -> Tensor:
    pytest.importorskip("triton", reason="this PyTorch comes without Triton")
    norm: Tensor = importlib.import_module("dwa_fast.kernels.ascend").ascend_(*args, **kwargs)
    return norm


IMPLEMENTATIONS = [pytest.param(ops.ascend_, id="compiled"), pytest.param(triton_ascend_, id="triton")]


def oracle(weights: Tensor, gradients: Tensor, radius: float, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """New weights and norm in float64."""
    w, g = weights.double(), gradients.double()
    norm = g.square().sum().sqrt()
    return w + radius * g / (norm + 1e-12 if normalize else 1), norm


def arenas(size: int, device: torch.device | str = "cpu", scale: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Weights and gradients, each [size], of a trained network's magnitudes."""
    return (0.05 * torch.randn(size)).to(device), (scale * torch.randn(size)).to(device)


def rounded(weights: Tensor, dtype: torch.dtype, ascend: Callable[..., Tensor]) -> Tensor:
    """The weights in compute precision, as PyTorch rounds them; Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    if ascend is triton_ascend_ and dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return (weights.view(torch.int32) & -(2**16)).view(torch.float32).to(dtype)
    return weights.to(dtype)


def assert_as_good_as_pytorch(ascend: Callable[..., Tensor], weights: Tensor, gradients: Tensor, radius: float, normalize: bool) -> None:
    """Errors against float64 at most twice those of PyTorch's own operators, or a unit in the last place."""
    expected, expected_norm = oracle(weights, gradients, radius, normalize)
    ours, plain = weights.clone(), weights.clone()
    norm = ascend(ours, gradients, radius, normalize=normalize)
    plain_norm = reference.ascend_(plain, gradients, radius, normalize=normalize)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert norm.device == weights.device
    assert error(norm, expected_norm) <= max(2 * error(plain_norm, expected_norm), 2**-23)
    assert error(ours, expected) <= max(2 * error(plain, expected), 2**-24)
    step, expected_step = ours.double() - weights.double(), expected - weights.double()
    assert error(step, expected_step) <= max(2 * error(plain.double() - weights.double(), expected_step), 2**-23)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ascend", IMPLEMENTATIONS)
def test_matches_float64(ascend: Callable[..., Tensor], size: int, normalize: bool, device: torch.device) -> None:
    weights, gradients = arenas(size, device)
    assert_as_good_as_pytorch(ascend, weights, gradients, RADIUS, normalize)


def test_real_size(device: torch.device) -> None:
    weights, gradients = arenas(REAL_SIZE, device, scale=1e-4)
    assert_as_good_as_pytorch(ops.ascend_, weights, gradients, RADIUS, normalize=True)


def test_hand_computed() -> None:
    weights, gradients = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    norm = ops.ascend_(weights, gradients, 0.5)
    assert norm.item() == 5
    torch.testing.assert_close(weights, torch.tensor([1.3, -1.6]))


@pytest.mark.parametrize("ascend", IMPLEMENTATIONS)
def test_many_tensors_share_one_norm(ascend: Callable[..., Tensor], device: torch.device) -> None:
    """Every tensor of a network is a view of the arena; each moves by its share of one common norm."""
    shapes = [(64, 3, 3, 3), (64,), (64,), (128, 64, 1, 1), (10, 128), (10,), (1,), ()]
    sizes = [math.prod(shape) for shape in shapes]
    weights, gradients = arenas(sum(sizes), device)
    tensors = [part.view(shape) for part, shape in zip(weights.split(sizes), shapes, strict=True)]
    parts = [part.view(shape).double() for part, shape in zip(gradients.split(sizes), shapes, strict=True)]
    before = [tensor.double() for tensor in tensors]
    common = math.sqrt(sum(part.square().sum().item() for part in parts))
    ascend(weights, gradients, RADIUS)
    for tensor, start, part in zip(tensors, before, parts, strict=True):
        torch.testing.assert_close(tensor.double(), start + RADIUS * part / common, rtol=1e-6, atol=1e-8)
    moved = torch.cat([(tensor.double() - start).flatten() for tensor, start in zip(tensors, before, strict=True)])
    assert torch.linalg.vector_norm(moved).item() == pytest.approx(RADIUS, rel=1e-4)


@pytest.mark.parametrize("first", [1, 3, 4, 33])
@pytest.mark.parametrize("ascend", IMPLEMENTATIONS)
def test_slice_of_an_arena(ascend: Callable[..., Tensor], first: int, device: torch.device) -> None:
    """A slice starts where it likes, aligned or not, and nothing outside it is touched."""
    whole, whole_gradients = arenas(20_011, device)
    copy = torch.full_like(whole, math.nan, dtype=torch.bfloat16)
    before = whole.clone()
    inside = slice(first, -5)
    expected, _ = oracle(whole[inside], whole_gradients[inside], RADIUS)
    ascend(whole[inside], whole_gradients[inside], RADIUS, compute=copy[inside])
    torch.testing.assert_close(whole[inside].double(), expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(copy[inside], rounded(whole[inside], torch.bfloat16, ascend))
    assert torch.equal(whole[:first], before[:first])
    assert torch.equal(whole[-5:], before[-5:])
    assert copy[:first].isnan().all()
    assert copy[-5:].isnan().all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ascend", IMPLEMENTATIONS)
def test_zero_gradient_leaves_every_bit(ascend: Callable[..., Tensor], normalize: bool, device: torch.device) -> None:
    weights, _ = arenas(5001, device)
    weights[::7] = -0.0
    before = weights.clone()
    compute = torch.full_like(weights, math.nan, dtype=torch.bfloat16)
    norm = ascend(weights, torch.zeros_like(weights), 1e30, normalize=normalize, compute=compute)
    assert norm.item() == 0
    assert torch.equal(weights.view(torch.int32), before.view(torch.int32))
    assert torch.equal(compute, rounded(weights, torch.bfloat16, ascend))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ascend", IMPLEMENTATIONS)
def test_nan_and_infinity_propagate(ascend: Callable[..., Tensor], value: float, normalize: bool, device: torch.device) -> None:
    weights, gradients = arenas(4099, device)
    gradients[1234] = value
    plain = weights.clone()
    norm = ascend(weights, gradients, RADIUS, normalize=normalize)
    plain_norm = reference.ascend_(plain, gradients, RADIUS, normalize=normalize)
    torch.testing.assert_close(norm, plain_norm, equal_nan=True)
    torch.testing.assert_close(weights, plain, equal_nan=True)
    assert not math.isfinite(norm.item())
    assert not torch.isfinite(weights[1234])


@pytest.mark.parametrize("ascend", IMPLEMENTATIONS)
def test_norm_neither_overflows_nor_vanishes(ascend: Callable[..., Tensor], device: torch.device) -> None:
    """Squares of these leave the range of float32; the norm does not."""
    for size in (1e25, 1e-30):
        weights, gradients = torch.zeros(4, device=device), torch.full((4,), size, device=device)
        assert ascend(weights, gradients, 1.0).item() == pytest.approx(2 * size)
        expected, _ = oracle(torch.zeros_like(weights), gradients, 1.0)
        torch.testing.assert_close(weights.double(), expected.clamp_min(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 4097, 40_001])
@pytest.mark.parametrize("ascend", IMPLEMENTATIONS)
def test_compute_copy_is_rewritten(ascend: Callable[..., Tensor], size: int, dtype: torch.dtype, device: torch.device) -> None:
    weights, gradients = arenas(size, device)
    weights[: size // 2] *= 1e3
    alone = weights.clone()
    compute = torch.full((size,), math.nan, dtype=dtype, device=device)
    ascend(weights, gradients, RADIUS, compute=compute)
    ascend(alone, gradients, RADIUS)
    assert torch.equal(weights, alone)
    assert torch.equal(compute, rounded(weights, dtype, ascend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_copy_rounds_like_pytorch(dtype: torch.dtype, device: torch.device) -> None:
    """Halves, subnormals, both infinities, NaN and the largest numbers, through a zero step."""
    bits = torch.randint(-(2**31), 2**31 - 1, (100_003,), dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, 65504.0, 65520.0, 1e-40, 1.00390625, 1.01171875])
    weights = torch.cat([bits.view(torch.float32), special]).to(device)
    compute = torch.empty_like(weights, dtype=dtype)
    ops.ascend_(weights, torch.zeros_like(weights), RADIUS, compute=compute)
    torch.testing.assert_close(compute, weights.to(dtype), rtol=0, atol=0, equal_nan=True)
    finite = ~weights.isnan()
    assert torch.equal(compute[finite].view(torch.int16), weights.to(dtype)[finite].view(torch.int16))


@pytest.mark.parametrize("size", [4097, 1_000_003])
def test_same_bits_for_any_number_of_threads(size: int) -> None:
    start, gradients = arenas(size)
    results = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        weights, compute = start.clone(), torch.empty(size, dtype=torch.bfloat16)
        results.append((ops.ascend_(weights, gradients, RADIUS, compute=compute), weights, compute))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("ascend", IMPLEMENTATIONS)
def test_same_bits_again(ascend: Callable[..., Tensor], device: torch.device) -> None:
    start, gradients = arenas(100_003, device)
    first, second = start.clone(), start.clone()
    assert torch.equal(ascend(first, gradients, RADIUS), ascend(second, gradients, RADIUS))
    assert torch.equal(first, second)


def test_opcheck(device: torch.device) -> None:
    ops.load()
    weights, gradients = arenas(1000, device)
    compute = torch.empty_like(weights, dtype=torch.bfloat16)
    for args, kwargs in [
        ((weights, gradients, RADIUS), {}),
        ((weights, gradients, RADIUS), {"normalize": False}),
        ((weights, gradients, RADIUS, True, compute), {}),
        ((weights[:0], gradients[:0], RADIUS), {}),
    ]:
        torch.library.opcheck(torch.ops.dwa_fast.ascend_.default, args, kwargs)


def test_meta_tensors_have_the_right_shape() -> None:
    weights = torch.empty(10, device="meta")
    norm = ops.ascend_(weights, weights, RADIUS)
    assert (norm.shape, norm.dtype, norm.device.type) == ((), torch.float32, "meta")


GOOD = torch.zeros(4)
WRONG = [
    ([1.0], GOOD, 1.0, None, TypeError, "weights must be a tensor, got list"),
    (GOOD.double(), GOOD, 1.0, None, TypeError, "weights must be float32, got float64"),
    (GOOD, GOOD.half(), 1.0, None, TypeError, "gradients must be float32, got float16"),
    (GOOD, GOOD, 1.0, GOOD.clone(), TypeError, "compute must be bfloat16 or float16, got float32"),
    (GOOD, GOOD, "1", None, TypeError, "radius must be a number, got str"),
    (GOOD, GOOD, True, None, TypeError, "radius must be a number, got bool"),
    (GOOD, GOOD, math.nan, None, ValueError, "radius must be finite and not negative, got nan"),
    (GOOD, GOOD, -1.0, None, ValueError, "radius must be finite and not negative, got -1.0"),
    (GOOD.view(2, 2), GOOD, 1.0, None, ValueError, "weights must be [P], got shape (2, 2)"),
    (GOOD, GOOD.view(2, 2), 1.0, None, ValueError, "gradients must be [P], got shape (2, 2)"),
    (GOOD, torch.zeros(8)[::2], 1.0, None, ValueError, "gradients must be contiguous, got stride 2"),
    (GOOD, torch.zeros(5), 1.0, None, ValueError, "gradients must have as many elements as weights, 4, got 5"),
    (GOOD, GOOD, 1.0, torch.zeros(3).half(), ValueError, "compute must have as many elements as weights, 4, got 3"),
    (GOOD, GOOD.to("meta"), 1.0, None, ValueError, "gradients must be on the device of weights, cpu, got meta"),
    (GOOD.clone().requires_grad_(), GOOD, 1.0, None, ValueError, "ascend_ is not differentiable"),
]


@pytest.mark.parametrize(("weights", "gradients", "radius", "compute", "kind", "message"), WRONG, ids=[row[-1] for row in WRONG])
def test_wrong_input(
    weights: Tensor, gradients: Tensor, radius: float, compute: Tensor | None, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.ascend_(weights, gradients, radius, compute=compute)


@pytest.mark.parametrize(
    ("weights", "gradients", "compute", "message"),
    [
        (GOOD.double(), GOOD, None, "weights must be float32"),
        (GOOD, GOOD.double(), None, "gradients must be float32"),
        (GOOD.view(2, 2), GOOD, None, r"weights must be \[P\], got shape \[2, 2\]"),
        (GOOD, torch.zeros(8)[::2], None, r"gradients must be contiguous, got stride \[2\]"),
        (GOOD, torch.zeros(5), None, "gradients must have as many elements as weights, 4, got 5"),
        (GOOD, GOOD, GOOD.clone(), "compute must be bfloat16 or float16"),
    ],
)
def test_the_operator_checks_for_itself(weights: Tensor, gradients: Tensor, compute: Tensor | None, message: str) -> None:
    """Callers of torch.ops.dwa_fast pass by the checks in Python: wrong input is refused in C++ too."""
    ops.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dwa_fast.ascend_(weights, gradients, 1.0, True, compute)


def test_requires_grad_is_fine_under_no_grad() -> None:
    weights = torch.zeros(4, requires_grad=True)
    with torch.no_grad():
        ops.ascend_(weights, torch.ones(4), 2.0)
    torch.testing.assert_close(weights.detach(), torch.ones(4))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """Two replays equal two calls, bit for bit: nothing in the operator allocates outside the graph or waits."""
    start, gradients = arenas(300_007, "cuda")
    called = start.clone()
    compute, captured_compute = (torch.empty_like(start, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(2):
        called_norm = ops.ascend_(called, gradients, RADIUS, compute=compute)
    captured = start.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_norm = ops.ascend_(captured, gradients, RADIUS, compute=captured_compute)
    for _ in range(2):
        graph.replay()
    assert torch.equal(captured, called)
    assert torch.equal(captured_compute, compute)
    assert torch.equal(captured_norm, called_norm)

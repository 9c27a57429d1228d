"""The Triton launchers behind the dispatcher: registered for a CPU in the place of CUDA, interpreted, the public operators call them."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast import ops, recipe
from dwa_fast.engine import backend
from dwa_fast.engine.ascent import Arena
from dwa_fast.engine.refine import Refinement, Teacher
from dwa_fast.engine.teacher import prepare
from dwa_fast.engine.training_form import FusedForm, training_form
from dwa_fast.models.architectures import build
from dwa_fast.ops import _library
from dwa_fast.reference import ops as reference
from dwa_fast.schedule import make_schedule
from tests.kernels.cases import schedule
from tests.nets import alive, distance

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
Y = (2, 5, 4, 3)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The launchers that were called."""
    called: set[str] = set()
    ops.load()
    for operator, module in _library._launchers.items():
        kernel = __import__(f"dwa_fast.kernels.{module}", fromlist=["_"])

        original = getattr(kernel, operator)

        def noted(*arguments: Any, operator: str = operator, launch: Callable[..., Any] = original) -> Any:
            called.add(operator)
            return launch(*arguments)

        monkeypatch.setattr(kernel, operator, noted)
    with torch.library._scoped_library("dwa_fast", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an implementation that is replaced
        _library.register_launchers(library, "CPU", allow_override=True)
        yield called


def features(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def from_operators(function: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Names and arguments, from the functions of that name in the tests of single operators."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        yield from getattr(importlib.import_module(f"tests.kernels.{path.stem}"), function, list)()


def both(operator: str, *arguments: Any) -> list[tuple[Tensor, ...]]:
    """Results and gradients of the public operator and of its plain twin, with the same arguments."""
    results = []
    for module in (ops, reference):
        leaves = [each.clone().requires_grad_(each.requires_grad) if isinstance(each, Tensor) else each for each in arguments]
        result = getattr(module, operator)(*leaves)
        result = result if isinstance(result, tuple) else (result,)
        wanted = [each for each in leaves if isinstance(each, Tensor) and each.requires_grad]
        gradients = torch.autograd.grad(sum(each.square().sum() for each in result), wanted) if wanted else ()
        results.append((*result, *gradients))
    return results


def test_every_launcher_is_reached(calls: set[str]) -> None:
    y, skip, mean, var = features(*Y).requires_grad_(), features(*Y).requires_grad_(), torch.randn(5), torch.rand(5) + 0.5
    weight, bias = torch.rand(5).requires_grad_(), torch.randn(5).requires_grad_()
    layers = torch.tensor([0, 2, 5]), torch.tensor([24, 24]), torch.tensor([10.0, 1.0])
    rows, step = schedule((1, 0, 3, 3, 1, 2, 1), "cpu")
    for ours, plain in (
        both("bn_act", y, mean, var, weight, bias, 1e-5, skip, "relu"),
        both("matching_loss", torch.rand(2, 5).requires_grad_(), var, *layers),
        both("matching_gradient", torch.rand(2, 5), var, *layers, torch.rand(2)),
        both("matching_loss", torch.rand(2, 5).requires_grad_(), var, *layers, mean),
        both("matching_gradient", torch.rand(2, 5), var, *layers, torch.rand(2), None, None, mean),
        both("view", features(*Y), rows, step, torch.float32),
        *(both(operator, *arguments) for operator, arguments in from_operators("public_calls")),
    ):
        for result, expected in zip(ours, plain, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    state = [(features(*Y), torch.zeros(Y), torch.zeros(Y))] * 2
    state = [tuple(each.clone() for each in tensors) for tensors in state]  # type: ignore[misc]
    gradient, rates, bound = features(*Y), torch.full((3,), 0.1), torch.ones(5)
    for module, (x, m, v) in zip((ops, reference), state, strict=True):
        module.view_adam_clip_(x, gradient, m, v, rows, rates, step, -bound, bound)
    for result, expected in zip(*state, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    arenas = [(torch.ones(9), torch.zeros(9, dtype=torch.float16)) for _ in range(2)]
    norms = [
        module.ascend_(weights, torch.arange(9.0), 0.5, normalize=True, compute=compute)
        for module, (weights, compute) in zip((ops, reference), arenas, strict=True)
    ]
    for result, expected in zip((norms[0], *arenas[0]), (norms[1], *arenas[1]), strict=True):
        torch.testing.assert_close(result, expected)
    ops.log_losses_(torch.zeros(3, 3), step.clone(), ops.cross_entropy(torch.rand(4, 5), torch.arange(4), 1.0)[0], torch.zeros(2))
    assert calls == set(_library._launchers)


def test_opcheck(calls: set[str]) -> None:
    """Schemas, shapes and strides of the launchers' results."""
    y, mean, var = features(*Y), torch.randn(5), torch.rand(5) + 0.5
    layers = torch.tensor([0, 2, 5]), torch.tensor([24, 24]), torch.tensor([10.0, 1.0])
    rows, step = schedule((1, 0, 3, 3, 1, 2, 1), "cpu")
    operators, mask = torch.ops.dwa_fast, torch.zeros((y.numel() + 7) // 8, dtype=torch.uint8)
    sums, values = torch.rand(2, 5), (mean, var, None, None, 1e-5)
    checked: dict[str, tuple[Any, ...]] = {
        "bn_act_forward": (y, *values, y, "relu", None),
        "bn_act_backward": (y, None, y, *values, None, mask, True, "relu", None, True),
        "matching_loss_forward": (sums, var, *layers, mean),
        "matching_gradient": (sums, var, *layers, torch.rand(2), None, torch.zeros(1, dtype=torch.int32), mean),
        "matching_loss_backward": (torch.rand(2), sums, var, *layers, torch.rand(2, 2), mean),
        "cross_entropy": (torch.rand(4, 5), torch.arange(4), 2.0),
        "log_losses_": (torch.rand(3, 3), torch.tensor(1), torch.rand(4), torch.rand(2)),
        "ascend_": (torch.rand(9), torch.rand(9), 0.5, True, torch.zeros(9, dtype=torch.bfloat16)),
        "view": (y, rows, step, torch.bfloat16),
        "view_adam_clip_": (y, y.bfloat16(), y.clone(), y.abs(), rows, torch.rand(3), step, -mean.abs(), mean.abs(), 2.0, 0.5, 0.9, 1e-8),
        **dict(from_operators("schema_calls")),
    }
    assert set(checked) == set(_library._launchers)
    for name, arguments in checked.items():
        torch.library.opcheck(getattr(operators, name).default, arguments)
    assert calls == set(_library._launchers)


@pytest.mark.parametrize("aims", [False, True], ids=["running statistics", "statistics of a class"])
def test_an_iteration_on_the_launchers(calls: set[str], aims: bool) -> None:
    """The inner loop as CUDA runs it, with one arena of partial sums, interpreted: as near to float64 as plain PyTorch in float32."""
    torch.manual_seed(0)
    teacher = alive(build("small-resnet", classes=10, channels=1, size=8))
    images, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 3, 9])
    own = recipe("digits", iterations=3)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    results = {}
    for name, precision, operators in (
        ("reference", "fp64", reference.Operators("reference")),
        ("plain", "fp32", reference.Operators("plain")),
        ("fused", "fp32", backend.fused_operators(cuda)),
    ):
        execution = backend.Execution(name, operators, cpu, precision)
        network, _ = prepare(teacher, images, execution)
        Arena(network, execution, moves=False)
        with execution.arithmetic():
            for shift in (9.0, 0.3) if aims else ():  # the plan is made for the first class, and then aims at the second one
                own_statistics = {
                    each: torch.stack([layer.running_mean + shift, 1.5 * layer.running_var]) for each, layer in network.layers.items()
                }
                network.aim(own_statistics)
            loop = Refinement([Teacher(network, network)], images.shape, own.synthesis, own.data, execution)
            loop.load(images, labels, make_schedule(own.synthesis, 8, 8, seed=0, batch=0))
            loop.advance(3)
        results[name] = loop.images.double(), loop.losses.double()
        assert bool(network._arena_plans) == (name == "fused")
    for exact, plain, ours in zip(*results.values(), strict=True):
        assert distance(ours, exact) <= max(2 * distance(plain, exact), 1e-6)
    layers = {f"{name}_{way}" for name in ("bn_act", "bn_act_join") for way in ("forward", "backward")}
    assert layers | {"matching_gradient", "cross_entropy", "log_losses_", "view", "view_adam_clip_"} <= calls


def test_training_steps_on_the_launchers(calls: set[str]) -> None:
    """A student's layers as CUDA runs them, interpreted: gradients and running statistics as near to float64 as plain PyTorch's."""
    torch.manual_seed(0)
    start, images, labels = build("small-resnet", classes=10, channels=1, size=8).train(), torch.randn(6, 1, 8, 8), torch.arange(6)
    found = []
    for dtype, fused in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        network = copy.deepcopy(start).to(dtype)
        forward = training_form(network, (1, 8, 8), torch.device("cpu")) if fused else network
        assert isinstance(forward, FusedForm) == fused
        for _ in range(2):
            F.cross_entropy(forward(images.to(dtype)), labels).backward()
        gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters()}
        found.append({**gradients, **{name: value.double() for name, value in network.named_buffers()}})
    exact, plain, ours = found
    for name, value in exact.items():
        assert distance(ours[name], value) <= max(2 * distance(plain[name], value), 1e-6), name
    assert {"batch_norm_act_forward", "batch_norm_act_backward"} <= calls

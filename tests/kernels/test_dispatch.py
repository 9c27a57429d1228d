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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dwa_fast import ops, recipe
from dwa_fast.engine import backend
from dwa_fast.engine.ascent import Arena, Ascent
from dwa_fast.engine.network import Network
from dwa_fast.engine.refine import Refinement, Teacher
from dwa_fast.engine.teacher import prepare
from dwa_fast.engine.training_form import FusedForm, training_form
from dwa_fast.models.architectures import build
from dwa_fast.ops import _library
from dwa_fast.reference import ops as reference
from dwa_fast.schedule import make_schedule
from dwa_fast.seeding import generator
from tests.kernels.cases import schedule
from tests.nets import alive, distance, image_gradient

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


class Written(TorchDispatchMode):
    """Writes down the operators of ours that are called inside, with their arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "dwa_fast":
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append((func.overloadpacket.__name__, dict(zip(names, args, strict=False))))
        return func(*args, **(kwargs or {}))


class Stages(nn.Module):
    """A residual network of two stages, each of two blocks."""

    def __init__(self) -> None:
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        self.stem, self.norm, self.fc = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Linear(64, 10)
        downsample = nn.Sequential(nn.Conv2d(16, 64, 1, stride=2, bias=False), nn.BatchNorm2d(64))
        blocks = BasicBlock(16, 16), BasicBlock(16, 16), BasicBlock(16, 64, 2, downsample), BasicBlock(64, 64)
        self.blocks, self.pool = nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(F.relu(self.norm(self.stem(images))))).flatten(1))


def on_launchers(teacher: nn.Module, images: Tensor) -> tuple[Network, backend.Execution]:
    """The network that CUDA would run, on a CPU."""
    execution = backend.Execution("fused", backend.fused_operators(torch.device("cuda")), torch.device("cpu"), "fp32")
    network, _ = prepare(teacher, images, execution)
    return network, execution


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
    backward = y, None, y, *values, None, mask, True, "relu", None
    checked: list[tuple[str, tuple[Any, ...]]] = [
        ("bn_act_forward", (y, *values, y, "relu", None)),
        ("bn_act_forward", (y, *values, y, "relu", None, None, False)),
        ("bn_act_backward", (*backward, True)),
        ("bn_act_backward", (*backward, False, y[:, :, ::2, ::2], 2, True, False, y, mask)),
        ("matching_loss_forward", (sums, var, *layers, mean)),
        ("matching_gradient", (sums, var, *layers, torch.rand(2), None, torch.zeros(1, dtype=torch.int32), mean)),
        ("matching_loss_backward", (torch.rand(2), sums, var, *layers, torch.rand(2, 2), mean)),
        ("cross_entropy", (torch.rand(4, 5), torch.arange(4), 2.0)),
        ("log_losses_", (torch.rand(3, 3), torch.tensor(1), torch.rand(4), torch.rand(2))),
        ("ascend_", (torch.rand(9), torch.rand(9), 0.5, True, torch.zeros(9, dtype=torch.bfloat16))),
        ("view", (y, rows, step, torch.bfloat16)),
        ("view_adam_clip_", (y, y.bfloat16(), y.clone(), y.abs(), rows, torch.rand(3), step, -mean.abs(), mean.abs(), 2.0, 0.5, 0.9, 1e-8)),
        *from_operators("schema_calls"),
    ]
    assert {name for name, _ in checked} == set(_library._launchers)
    for name, arguments in checked:
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


@pytest.mark.parametrize("skip", ["alias", "result", "view", "alias of sampled pixels", "alias of a plain sum", "alias of pooled pixels"])
def test_the_gradient_of_a_skip_is_left_where_it_can_be_put_together(calls: set[str], skip: str) -> None:
    """Elsewhere it is written, though the caller allowed that it is not; the gradients are right either way, also the second time."""
    y, *parameters = features(2, 5, 4, 4).requires_grad_(), torch.randn(5), torch.rand(5) + 0.5, None, None, 1e-5
    added, later = features(2, 5, 4, 4), features(2, 5, 4, 4).requires_grad_()
    if skip == "alias of a plain sum":
        z, alias, _ = ops.bn_act(y, *parameters, added, with_alias=True)
    elif skip == "alias of pooled pixels":
        z, alias, _ = ops.bn_act_pool(y, *parameters, 1, 1, 0, "relu", with_alias=True)
    elif skip == "alias of sampled pixels":
        z, alias, _ = ops.bn_act(y, *parameters, None, "relu", with_alias=True, alias_stride=2)
        later = features(2, 5, 2, 2).requires_grad_()
    else:
        z, alias, _ = ops.bn_act(y, *parameters, added, "relu", with_alias=True)
    given = {"result": z, "view": alias.view(alias.shape)}.get(skip, alias)
    results = [ops.bn_act(later, *parameters, given, "relu", leaves_skip=leaves)[0] for leaves in (True, False)]
    losses = [each.square().sum() + z.sin().sum() for each in results]
    expected = torch.autograd.grad(losses[1], (y, later), retain_graph=True)
    for retained in (True, False):
        with Written() as written:
            found = torch.autograd.grad(losses[0], (y, later), retain_graph=retained)
        left = [call.get("with_skip", True) for name, call in written.calls if name == "bn_act_backward"].count(False)
        assert left == (skip == "alias")
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_gradient_that_was_left_counts_in_its_own_backward_pass_alone(calls: set[str]) -> None:
    """Without the inputs of the layer before, that one does not run; its next gradient is not made of what was left to it."""
    y, later, *parameters = features(2, 5, 4, 4).requires_grad_(), features(2, 5, 4, 4).requires_grad_(), torch.randn(5), torch.rand(5)
    layer = *parameters, None, None, 1e-5
    z, alias, _ = ops.bn_act(y, *layer, None, "relu", with_alias=True)
    result, _ = ops.bn_act(later, *layer, alias, "relu", leaves_skip=True)
    (expected,) = torch.autograd.grad(z.sin().sum(), y, retain_graph=True)
    torch.autograd.grad(result.square().sum(), later, retain_graph=True)
    assert torch.equal(torch.autograd.grad(z.sin().sum(), y)[0], expected)


@pytest.mark.parametrize("changed", ["another use", "a hook"])
def test_a_skip_with_another_use_or_a_hook_cannot_leave_its_gradient(calls: set[str], changed: str) -> None:
    y, *layer = features(2, 5, 4, 4).requires_grad_(), torch.randn(5), torch.rand(5), None, None, 1e-5
    _, alias, _ = ops.bn_act(y, *layer, None, "relu", with_alias=True)
    if changed == "a hook":
        alias.register_hook(torch.neg)
    loss = ops.bn_act(features(2, 5, 4, 4), *layer, alias, "relu", leaves_skip=True)[0].sum()
    with pytest.raises(RuntimeError, match="has another use or a hook; expected neither"):
        torch.autograd.grad(loss + alias.sum() if changed == "another use" else loss, y)


def test_of_two_skips_in_a_row_one_is_left(calls: set[str]) -> None:
    """The layer between them puts the gradient of its own result together, and writes that of its skip."""
    y, between, last = (features(2, 5, 4, 4).requires_grad_() for _ in range(3))
    parameters = torch.randn(5), torch.rand(5) + 0.5, None, None, 1e-5
    gradients = []
    for leaves in (True, False):
        z, alias, _ = ops.bn_act(y, *parameters, torch.ones_like(y), "relu", with_alias=True)
        second, again, _ = ops.bn_act(between, *parameters, alias, "relu", with_alias=True, leaves_skip=leaves)
        third, _ = ops.bn_act(last, *parameters, again, "relu", leaves_skip=leaves)
        with Written() as written:
            gradients.append(torch.autograd.grad(z.sin().sum() + second.cos().sum() + third.square().sum(), (y, between, last)))
        left = [call.get("with_skip", True) for name, call in written.calls if name == "bn_act_backward"].count(False)
        assert left == leaves
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_the_gradient_of_a_skip_is_left_unwritten_at_the_end_of_a_stage(calls: set[str]) -> None:
    """No bit of the images' gradient changes; where weights take gradients too it is written."""
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 7])
    network, _ = on_launchers(alive(Stages()), images)
    leaving = {name: layer for name, layer in network.layers.items() if getattr(layer, "leaves_skip", False)}
    assert list(leaving) == ["blocks.1.bn2", "blocks.3.bn2"]
    with Written() as written:
        found = image_gradient(network, images, labels)
    backward = [call for name, call in written.calls if name in ("bn_act_backward", "bn_act_join_backward")]
    assert [call.get("with_skip", True) for call in backward].count(False) == 2
    put_together = [call for call in backward if call.get("later_mask") is not None]
    assert [call["grad_again"] is None for call in put_together] == [True, False]  # of the mean, and with a strided branch
    with Written() as written, network.trainable():
        weights = torch.autograd.grad(F.cross_entropy(network(images), labels), list(network.parameters()))
    assert all(call.get("with_skip", True) and call.get("later_mask") is None for name, call in written.calls if "backward" in name)
    for layer in leaving.values():
        layer.leaves_skip = False
    expected = image_gradient(network, images, labels)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with network.trainable():
        again = torch.autograd.grad(F.cross_entropy(network(images), labels), list(network.parameters()))
    assert all(torch.equal(*pair) for pair in zip(weights, again, strict=True))


def test_the_ascent_takes_no_moments(calls: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one launch leaves sums of them, also after the refinement has made its arena; the weights have the same bits with them."""
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 7])
    teacher = alive(Stages())
    teacher.norm.register_forward_hook(lambda layer, inputs, output: output.clone())  # which so keeps its own layer, and ours is a hook
    network, execution = on_launchers(teacher, images)
    ascent = Ascent(network, recipe("digits", steps=2).synthesis, execution)
    with execution.arithmetic():
        network(images, deferred=True)
        network.matching_gradient(1.0, torch.ones(2))
        assert network._arena_plans
        with Written() as written:
            ascent.adjust(images, labels, generator(0, "ascent", 0))
        forward = [call for name, call in written.calls if name.startswith("bn_act") and name.endswith("_forward")]
        assert len(forward) == 2 * 8
        assert all(call["with_sums"] is False and call["partials"] is None for call in forward)
        assert not any(name.startswith("moments") for name, _ in written.calls)
        found, forward_pass = ascent.arena.weights.clone(), Network.forward
        monkeypatch.setattr(Network, "forward", lambda self, images, **_: forward_pass(self, images, deferred=True))
        ascent.adjust(images, labels, generator(0, "ascent", 0))
    assert torch.equal(ascent.arena.weights, found)


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
        assert distance(ours[name], value) <= max(2 * distance(plain[name], value), 3e-6), name
    assert {"batch_norm_act_forward", "batch_norm_act_backward"} <= calls

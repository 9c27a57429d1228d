"""Steps of a training that are captured: with a graph that calls the step again on a CPU, with real ones on a GPU."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.config import SqueezeConfig
from dwa_fast.data.loader import ImageCache, RandomSampler, TrainingBatch, TrainingLoader
from dwa_fast.engine.backend import repeatable
from dwa_fast.engine.training_form import FusedForm, training_form
from dwa_fast.training import step as module_under_test
from dwa_fast.training.fit import fit, predict
from dwa_fast.training.squeeze import sgd, squeeze
from dwa_fast.training.validate import optimiser_of, validate
from tests.nets import DIGITS, SIZE, small_set, small_teacher

CPU = torch.device("cpu")
TEACHER = replace(DIGITS.squeeze, epochs=5, batch_size=8, schedule="fast", flip=0.5, padding=1)  # batches of 8 and, the last one, of 4


class Graph:
    """A captured step that is called again, on the tensors that it was captured with."""

    def __init__(self, step: Callable[[], object]) -> None:
        self.step, self.replays = step, 0

    def replay(self) -> None:
        """Once more."""
        self.replays += 1
        self.step()

    def reset(self) -> None:
        """Nothing to free."""


class Stream:
    """A queue that is always empty."""

    def wait_stream(self, other: object) -> None:
        """At once."""

    def synchronize(self) -> None:
        """At once."""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Those that were captured."""
    captured: list[Graph] = []

    def capture(step: Callable[[], object], stream: object, memory: object) -> Graph:
        captured.append(Graph(step))  # capturing does not run it
        return captured[-1]

    monkeypatch.setattr(module_under_test, "_has_graphs", lambda device: True)
    monkeypatch.setattr(module_under_test, "capture_graph", capture)
    monkeypatch.setattr(module_under_test, "take_stream", lambda device: Stream())
    monkeypatch.setattr(module_under_test, "return_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return captured


def assert_same(one: nn.Module, two: nn.Module) -> None:
    """Near each other: a fused optimiser rounds a learning rate that is a tensor to float32."""
    for (name, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(value.double(), other.double(), rtol=1e-4, atol=1e-6), name


def teacher(config: SqueezeConfig = TEACHER) -> nn.Module:
    return squeeze(small_set(), replace(DIGITS, squeeze=config), device=CPU, seed=1)


def test_a_teacher_is_the_same(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven batches of 8 and one of 4 in each of five epochs: after three of a kind it is replayed, with each step's own rate."""
    captured = teacher()
    assert [graph.replays for graph in graphs] == [32, 2]
    monkeypatch.setattr(module_under_test, "_has_graphs", lambda device: False)
    assert_same(captured, teacher())
    assert len(graphs) == 2


SOFT: dict[str, Any] = {"weight_ema": 0.9, "teacher_mode": "train", "accumulation": 2}
HARD: dict[str, Any] = {"labels": "hard", "optimiser": "sgd", "learning_rate": 0.05}


@pytest.mark.parametrize("settings", [SOFT, HARD], ids=["soft labels", "hard labels"])
@pytest.mark.parametrize("mixing", ["cutmix", "mixup", "none"])
def test_a_student_is_the_same(settings: dict[str, Any], mixing: Any, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes the images, labels, partners and shares of its own batch."""
    config = replace(DIGITS.validation, epochs=4, batch_size=20, mixing=mixing, students=1, **settings)
    recipe, found = replace(DIGITS, validation=config), []
    weights: list[nn.Module] = []
    monkeypatch.setattr("dwa_fast.training.validate.top1", lambda network, *_: weights.append(network) or 50.0)
    for graph in (True, False):
        monkeypatch.setattr(module_under_test, "_has_graphs", lambda device, graph=graph: graph)
        found.append(validate(small_set(), small_set(), small_teacher(), "small-resnet", recipe, device=CPU))
    assert [graph.replays for graph in graphs] == [9]
    assert_same(*weights)


def loop(
    network: nn.Module, losses: Callable[[TrainingBatch], Iterable[Tensor]], device: torch.device, *, captures: bool = True, epochs: int = 5
) -> nn.Module:
    """Eight steps an epoch with momentum on the same few images, in new views."""
    network = network.to(device).train()
    data = small_set()
    loader = TrainingLoader(ImageCache(data, device, 1.0), RandomSampler(data, TEACHER, seed=0), DIGITS.data, TEACHER.padding)
    options: dict[str, Any] = {"epochs": epochs, "learning_rate": 0.05, "seed": 3, "remedy": str, "captures": captures}
    fit(network, sgd(network, TEACHER), loader, losses, **options)
    return network


class Small(nn.Module):
    """Dropout, and BatchNorm with a given momentum."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=momentum)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.drop(F.relu(self.norm(self.conv(images))).mean((2, 3))))
        return logits


def cross_entropy(forward: Callable[[Tensor], Tensor]) -> Callable[[TrainingBatch], list[Tensor]]:
    return lambda batch: [F.cross_entropy(predict(forward, batch.images, "fp32"), batch.labels)]


def test_an_average_over_all_batches_is_not_captured(graphs: list[Graph]) -> None:
    network = Small(momentum=None)
    loop(network, cross_entropy(network), CPU)
    assert not graphs


def test_what_cannot_be_captured_is_called(monkeypatch: pytest.MonkeyPatch, graphs: list[Graph], caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    caplog.set_level(logging.INFO, "dwa_fast")
    monkeypatch.setattr(module_under_test, "capture_graph", refuse)
    network, twin = Small(), Small()
    loop(network, cross_entropy(network), CPU)
    assert_same(network, loop(twin, cross_entropy(twin), CPU, captures=False))
    assert caplog.text.count("training steps are called, not captured: operation not permitted when stream is capturing") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["dropout", "small-resnet"])
def test_captured_and_called_on_a_gpu(kind: str, precision: Any) -> None:
    """The same bits, dropout's random numbers included."""
    device, start, found = torch.device("cuda"), Small() if kind == "dropout" else small_teacher(), []
    for captures in (True, False, True):
        network = copy.deepcopy(start).to(device).train()
        form = training_form(network, (1, SIZE, SIZE), device)

        def losses(batch: TrainingBatch, form: Callable[[Tensor], Tensor] = form) -> list[Tensor]:
            return [F.cross_entropy(predict(form, batch.images, precision), batch.labels)]

        found.append(loop(network, losses, device, captures=captures).state_dict())
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.mark.gpu
def test_a_training_on_a_gpu_is_that_on_a_cpu() -> None:
    """Eight steps, some of them replayed: as near as float32 allows."""
    found, before = [], copy.deepcopy(small_teacher().state_dict())
    with repeatable():
        for device in (CPU, torch.device("cuda")):
            network = small_teacher().to(device).train()
            form = training_form(network, (1, SIZE, SIZE), device)
            assert isinstance(form, FusedForm)
            found.append(loop(network, cross_entropy(form), device, epochs=1).state_dict())
    for name, value in found[0].items():
        moved = float((value - before[name]).double().norm())
        assert float((value - found[1][name].cpu()).double().norm()) <= 1e-2 * moved + 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("mixing", ["cutmix", "mixup"])
def test_a_student_on_a_gpu_is_captured(mixing: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With AdamW, an average of its weights and a teacher's soft labels."""
    caplog.set_level(logging.INFO, "dwa_fast")
    config = replace(DIGITS.validation, epochs=6, batch_size=20, mixing=mixing, students=1, weight_ema=0.9)
    validate(small_set(), small_set(20), small_teacher(), "small-resnet", replace(DIGITS, validation=config), device="cuda")
    assert "not captured" not in caplog.text
    assert "not fused" not in caplog.text


@pytest.mark.gpu
def test_a_step_that_waits_for_a_value_is_called_on_a_gpu() -> None:
    """The training goes on, and the next one is captured; in a process of its own, which a broken capture would spoil."""
    work = "from tests.training.test_step import train_waiting; train_waiting()"
    run = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr


def train_waiting() -> None:
    """What the test above runs."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dwa_fast").addHandler(handler)
    logging.getLogger("dwa_fast").setLevel(logging.INFO)
    device, network, twin = torch.device("cuda"), Small(), Small()

    def losses(batch: TrainingBatch) -> list[Tensor]:
        loss = F.cross_entropy(network(batch.images), batch.labels)
        return [loss * (1.0 if float(loss) < 1e9 else 0.0)]

    waiting = loop(network, losses, device).state_dict()
    assert [each for each in said if each.startswith("training steps are called, not captured")]
    said.clear()
    captured = loop(twin, cross_entropy(twin), device).state_dict()
    assert not said, said
    assert all(torch.equal(value, captured[name]) for name, value in waiting.items())


def test_the_optimiser_of_a_student_can_be_captured() -> None:
    """On a GPU AdamW must be told so; elsewhere it keeps its plain settings."""
    optimizer = optimiser_of(Small(), DIGITS.validation)
    assert all(not group["capturable"] for group in optimizer.param_groups)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", ["none", "pad-crop", "resized-crop"])
def test_nothing_waits_for_a_gpu_between_batches(augmentation: Any) -> None:
    device, data = torch.device("cuda"), small_set(20)
    sampler = RandomSampler(data, replace(DIGITS.validation, batch_size=7, padding=1, augmentation=augmentation, mixing="cutmix"), seed=0)
    loader = TrainingLoader(ImageCache(data, device, 1.0), sampler, DIGITS.data, 1)
    list(loader.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = [batch.images for batch in loader.epoch(1)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = TrainingLoader(ImageCache(data, CPU, 1.0), sampler, DIGITS.data, 1).epoch(1)
    for got, expected in zip(images, host, strict=True):
        torch.testing.assert_close(got.cpu(), expected.images)

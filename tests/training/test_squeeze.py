"""Training of the teacher: it learns, repeats, and resumes."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dwa_fast import InputError
from dwa_fast.commands.cli import run
from dwa_fast.config import Progress, Schedule, SqueezeConfig
from dwa_fast.data.datasets import digits
from dwa_fast.data.loader import RandomSampler
from dwa_fast.data.pixels import normalise
from dwa_fast.models.architectures import ARCHITECTURES
from dwa_fast.models.checkpoint import load_teacher
from dwa_fast.training import fit, state
from dwa_fast.training.fit import new_network, top1
from dwa_fast.training.squeeze import squeeze
from dwa_fast.training.validate import validate
from tests.nets import DIGITS, SIZE, small_set, small_teacher, stop_at, tight

CPU = torch.device("cpu")
CONFIG = replace(DIGITS.squeeze, epochs=3, padding=1)
QUICK = replace(CONFIG, batch_size=8)  # eight steps for an epoch of small_set


def test_squeeze_learns_and_repeats() -> None:
    train, test = digits("train", SIZE), digits("test", SIZE)
    ticks: list[tuple[int, int]] = []
    teachers = [
        squeeze(train, replace(DIGITS, squeeze=CONFIG), device=CPU, seed=1, progress=lambda done, total: ticks.append((done, total)))
        for _ in range(2)
    ]
    assert top1(teachers[0], test, DIGITS.data, CPU) > 85
    assert not teachers[0].training
    assert ticks[: len(ticks) // 2] == [(step, 33) for step in range(1, 34)]
    for one, two in zip(teachers[0].parameters(), teachers[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_the_caller_has_set_changes_nothing() -> None:
    """Gradients off, inference mode, autocast and another default precision: the same teacher, students and accuracies."""
    data, recipe = small_set(), replace(DIGITS, squeeze=QUICK, validation=replace(DIGITS.validation, epochs=1, students=1))

    def results() -> list[Any]:
        teacher = squeeze(data, recipe, device=CPU, seed=1)
        return [*teacher.state_dict().values(), validate(data, data, teacher, "small-resnet", recipe, device=CPU).mean]

    def same(found: list[Any]) -> bool:
        return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(found, wanted, strict=True))

    wanted = results()
    for around in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with around:
            assert same(results())
    torch.set_default_dtype(torch.float64)
    try:
        assert same(results())
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("schedule", ["fast", "short"])
def test_the_fast_schedule(schedule: Schedule) -> None:
    """Its learning rates, Nesterov's momentum and smoothed labels; by hand for the first two steps."""
    data = small_set()
    config = replace(CONFIG, schedule=schedule, epochs=1, batch_size=30, augmentation="none", flip=0.0, learning_rate=0.05)
    trained = squeeze(data, replace(DIGITS, squeeze=config), device=CPU, seed=1)
    expected = new_network("small-resnet", classes=10, channels=1, size=SIZE, seed=1, device=CPU).train()
    plans = RandomSampler(data, config, seed=1, purpose="squeeze").epoch(0)
    optimizer = torch.optim.SGD(expected.parameters(), momentum=config.momentum, weight_decay=config.weight_decay, nesterov=True, lr=1)
    for rate, plan in zip((0.05, 0.025), plans, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        logits = expected(normalise(data.load(plan.indices.tolist()), DIGITS.data))
        smooth = torch.full_like(logits, 0.01).scatter(1, data.labels[plan.indices][:, None], 0.91)
        (-(smooth * logits.log_softmax(1)).sum(1).mean()).backward()
        optimizer.step()
    for one, two in zip(trained.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_fast_schedule_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    config = replace(QUICK, schedule="fast", flip=0.5)
    whole, checkpoint_file = teacher(config), tmp_path / ".teacher.pt.state"
    with pytest.raises(KeyboardInterrupt):
        teacher(config, checkpoint_file, stop_at(18))
    resumed = teacher(config, checkpoint_file)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(InputError, match="schedule was 'fast', is 'cosine'"):
        teacher(replace(config, schedule="cosine"), checkpoint_file)


def teacher(
    config: SqueezeConfig, checkpoint_file: Path | None = None, progress: Progress | None = None, architecture: str = "small-resnet"
) -> nn.Module:
    recipe = replace(DIGITS, squeeze=config, architecture=architecture)
    return squeeze(small_set(), recipe, device=CPU, seed=1, checkpoint_file=checkpoint_file, progress=progress)


def test_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With momentum; stopped within an epoch, whose beginning is done again."""
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    whole, checkpoint_file = teacher(QUICK), tmp_path / ".teacher.pt.state"
    with pytest.raises(KeyboardInterrupt):
        teacher(QUICK, checkpoint_file, stop_at(18))
    ticks: list[int] = []
    resumed = teacher(QUICK, checkpoint_file, lambda done, total: ticks.append(done))
    assert ticks == list(range(16, 25))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    checkpoint_file = tmp_path / ".teacher.pt.state"
    with pytest.raises(KeyboardInterrupt):
        teacher(QUICK, checkpoint_file, stop_at(11))
    with pytest.raises(InputError, match=r"other settings \(epochs was 3, is 4; momentum was 0.9, is 0.5\); remove it to start again"):
        teacher(replace(QUICK, epochs=4, momentum=0.5), checkpoint_file)
    teacher(replace(QUICK, memory_limit=0.0), checkpoint_file)


def test_damaged_state_is_named(tmp_path: Path) -> None:
    checkpoint_file = tmp_path / ".teacher.pt.state"
    checkpoint_file.write_bytes(b"PK")
    with pytest.raises(InputError, match=r"checkpoint of a training .*\.teacher\.pt\.state cannot be read"):
        teacher(CONFIG, checkpoint_file)
    torch.save({"settings": "{}"}, checkpoint_file)
    with pytest.raises(InputError, match="holds no complete checkpoint of a training; remove it to start again"):
        teacher(CONFIG, checkpoint_file)


def test_bf16_learns() -> None:
    """On the images that it has seen, after a few steps; weights stay in fp32."""
    config = replace(CONFIG, epochs=8, batch_size=20, augmentation="none")
    exact, rounded = teacher(config), teacher(replace(config, precision="bf16"))
    assert top1(rounded, small_set(), DIGITS.data, CPU) > 85
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    assert not torch.equal(exact.get_parameter("fc.weight"), rounded.get_parameter("fc.weight"))


KILLED = """
import os, signal, sys, torch
from dwa_fast.commands import cli
from dwa_fast.training import state
from dwa_fast.training import fit
torch.set_num_threads(1)
state._SECONDS, real, calls = 0.0, fit.cosine, []
def cosine(*arguments):
    calls.append(arguments)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
fit.cosine = cosine
cli.run(sys.argv[1:])
"""


def test_killed_command_goes_on(tmp_path: Path) -> None:
    """In the middle of the second epoch of eleven steps; momentum and batch plans continue as if nothing had happened."""

    def command(name: str) -> list[str]:
        return ["squeeze", "--recipe", "digits", "--size", str(SIZE), "--padding", "1", "--epochs", "3", "--output", str(tmp_path / name)]

    killed = [sys.executable, "-c", KILLED, *command("t.pt")]  # elsewhere: it would import the dwa_fast of the folder that it starts in
    process = subprocess.run(killed, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".t.pt.lock", ".t.pt.state"]
    assert torch.load(tmp_path / ".t.pt.state", weights_only=True)["epochs"] == 1
    assert run(command("t.pt")) == 0
    assert run(command("whole.pt")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".t.pt.json", ".whole.pt.json", "t.pt", "whole.pt"]
    assert load_teacher(tmp_path / "t.pt")[1].architecture == "small-resnet"
    assert (tmp_path / "t.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


def test_divergence_stops_with_its_epoch_and_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch that diverged is not saved."""
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    checkpoint_file = tmp_path / ".teacher.pt.state"
    with pytest.raises(InputError, match=r"training diverged: loss not finite in epoch 1 of 3; lower --learning-rate \(1e\+12\)$"):
        teacher(replace(QUICK, learning_rate=1e12), checkpoint_file)
    assert not checkpoint_file.exists()
    with pytest.raises(InputError, match=r"lower --learning-rate \(1e\+12\) or take --precision fp32$"):
        teacher(replace(QUICK, learning_rate=1e12, precision="bf16"))


def test_divergence_leaves_the_state_of_the_last_good_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    checkpoint_file, real = tmp_path / ".teacher.pt.state", fit.cosine
    monkeypatch.setattr(fit, "cosine", lambda step, *more: real(step, *more) * (1e30 if step == 20 else 1))  # in epoch 3
    with pytest.raises(InputError, match="not finite in epoch 3 of 3"):
        teacher(QUICK, checkpoint_file)
    assert torch.load(checkpoint_file, weights_only=True)["epochs"] == 2
    monkeypatch.setattr(fit, "cosine", real)
    resumed, whole = teacher(QUICK, checkpoint_file), teacher(QUICK)
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_divergence_in_the_last_step_is_seen_in_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loss is computed after it."""
    real = fit.cosine
    monkeypatch.setattr(fit, "cosine", lambda step, *more: float("inf") if step == 23 else real(step, *more))
    with pytest.raises(InputError, match="training diverged: weights not finite in epoch 3 of 3"):
        teacher(QUICK)


def test_the_state_of_a_diverged_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    checkpoint_file = tmp_path / ".teacher.pt.state"
    with pytest.raises(KeyboardInterrupt):
        teacher(QUICK, checkpoint_file, stop_at(11))
    content = torch.load(checkpoint_file, weights_only=True)
    content["weights"]["fc.weight"][0, 0] = float("nan")
    torch.save(content, checkpoint_file)
    with pytest.raises(InputError, match=r"holds weights that are not finite, of a training that diverged; remove it to start again"):
        teacher(QUICK, checkpoint_file)


def test_command_tells_of_a_divergence_and_writes_no_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--recipe", "digits", "--size", str(SIZE), "--epochs", "2", "--learning-rate", "1e12", "--output", str(tmp_path / "t.pt")]
    assert run(["squeeze", *options]) == 1
    assert "training diverged: loss not finite in epoch 1 of 2; lower --learning-rate (1e+12)" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_batches_of_one_value_per_channel_are_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tight", tight)
    ticks: list[int] = []
    with pytest.raises(InputError, match="a batch of one image leaves a BatchNorm layer of the network with one value per channel, from"):
        teacher(replace(QUICK, batch_size=1), None, lambda done, total: ticks.append(done), "tight")
    assert ticks == []
    teacher(replace(QUICK, batch_size=1, epochs=1))  # more than one pixel
    teacher(replace(QUICK, batch_size=59, epochs=1), architecture="tight")  # the sixtieth image joins them


@torch.no_grad()
def test_no_accuracy_of_what_is_not_finite() -> None:
    """NaN would count as class 0."""
    network, data = small_teacher(), small_set()
    whole = top1(network, data, DIGITS.data, CPU)
    network.get_parameter("fc.weight")[3, 2] = float("nan")
    with pytest.raises(InputError, match="network gives logits that are not finite for 60 of 60 images"):
        top1(network, data, DIGITS.data, CPU)
    assert 0 < whole <= 100


SETS: dict[str, tuple[list[int], int, str]] = {
    "none": ([], 10, "there are no {}; expected at least one"),
    "too large": ([0, 1, 10], 10, "labels of the {} must lie in 0 … 9, the classes of the set, got 10"),
    "negative": ([0, -100, 1], 10, "labels of the {} must lie in 0 … 9, the classes of the set, got -100"),
    "other classes": ([0, 1, 2], 3, "network gives logits of 10 classes, the data have 3"),
}


@pytest.mark.parametrize(("labels", "classes", "message"), SETS.values(), ids=SETS)
def test_labels_are_checked(labels: list[int], classes: int, message: str) -> None:
    """Those of a set of one's own, which has no more than `ImageSet` asks for; a `MemorySet` refuses them itself."""
    pixels = small_set().pixels[: len(labels)]
    data: Any = SimpleNamespace(
        labels=torch.tensor(labels, dtype=torch.int64),
        class_names=[str(number) for number in range(classes)],
        image_shape=tuple(pixels.shape[1:]),
        name=str,
        load=lambda indices: pixels[list(indices)],
    )
    with pytest.raises(InputError, match=message.format("held-out images")):
        top1(small_teacher(), data, DIGITS.data, CPU)
    if classes == 10:
        with pytest.raises(InputError, match=message.format("training images")):
            squeeze(data, replace(DIGITS, squeeze=CONFIG), device=CPU)


def test_early_tests_see_the_network_and_change_nothing() -> None:
    recipe = replace(DIGITS, squeeze=replace(DIGITS.squeeze, epochs=3))
    seen: list[tuple[int, float]] = []

    def test(network: nn.Module, epochs: int) -> None:
        seen.append((epochs, top1(network, small_set(), DIGITS.data, CPU)))

    tested = squeeze(small_set(), recipe, device=CPU, tested=test, test_every=1)
    plain = squeeze(small_set(), recipe, device=CPU)
    assert [epochs for epochs, _ in seen] == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(tested.state_dict().values(), plain.state_dict().values(), strict=True))
    assert not tested.training


def test_weights_come_back_in_the_layout_of_files() -> None:
    recipe = replace(DIGITS, squeeze=replace(DIGITS.squeeze, epochs=1))
    network = squeeze(small_set(), recipe, device=CPU)
    for weight in network.parameters():
        assert weight.stride() == torch.empty(weight.shape).stride()
        assert weight.grad is None

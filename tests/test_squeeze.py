"""Training of the teacher: it learns, repeats, and goes on where it was stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dwa_fast import InputError, resuming
from dwa_fast.checkpoint import load_teacher
from dwa_fast.cli import run
from dwa_fast.config import SqueezeConfig
from dwa_fast.datasets import digits
from dwa_fast.recipes import full_recipe
from dwa_fast.squeeze import squeeze
from dwa_fast.training import Progress, top1
from tests.nets import SIZE, small_set, stop_at

CPU = torch.device("cpu")
CONFIG = replace(full_recipe("digits").squeeze, epochs=3, padding=1)
QUICK = replace(CONFIG, batch_size=8)  # eight steps for an epoch of small_set


def test_squeeze_learns_and_repeats() -> None:
    train, test = digits("train", SIZE), digits("test", SIZE)
    ticks: list[tuple[int, int]] = []
    teachers = [
        squeeze(train, "small-resnet", CONFIG, size=SIZE, device=CPU, seed=1, progress=lambda done, total: ticks.append((done, total)))
        for _ in range(2)
    ]
    assert top1(teachers[0], test, CONFIG, CPU) > 85
    assert not teachers[0].training
    assert ticks[: len(ticks) // 2] == [(step, 33) for step in range(1, 34)]
    for one, two in zip(teachers[0].parameters(), teachers[1].parameters(), strict=True):
        assert torch.equal(one, two)


def teacher(
    config: SqueezeConfig, keep: Path | None = None, progress: Progress | None = None, architecture: str = "small-resnet"
) -> nn.Module:
    return squeeze(small_set(), architecture, config, size=SIZE, device=CPU, seed=1, keep=keep, progress=progress)


def test_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With momentum; stopped within an epoch, whose beginning is done again."""
    monkeypatch.setattr(resuming, "_SECONDS", 0.0)
    whole, keep = teacher(QUICK), tmp_path / ".teacher.pt.state"
    with pytest.raises(KeyboardInterrupt):
        teacher(QUICK, keep, stop_at(18))
    ticks: list[int] = []
    resumed = teacher(QUICK, keep, lambda done, total: ticks.append(done))
    assert ticks == list(range(16, 25))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "_SECONDS", 0.0)
    keep = tmp_path / ".teacher.pt.state"
    with pytest.raises(KeyboardInterrupt):
        teacher(QUICK, keep, stop_at(11))
    with pytest.raises(InputError, match=r"other settings \(epochs was 3, is 4; momentum was 0.9, is 0.5\); remove it to begin again"):
        teacher(replace(QUICK, epochs=4, momentum=0.5), keep)
    teacher(replace(QUICK, memory_limit=0.0), keep)


def test_damaged_state_is_named(tmp_path: Path) -> None:
    keep = tmp_path / ".teacher.pt.state"
    keep.write_bytes(b"PK")
    with pytest.raises(InputError, match=r"state of a training .*\.teacher\.pt\.state cannot be read"):
        teacher(CONFIG, keep)
    torch.save({"settings": "{}"}, keep)
    with pytest.raises(InputError, match="holds no whole state of a training; remove it to begin again"):
        teacher(CONFIG, keep)


def test_bf16_learns() -> None:
    """On the images that it has seen, after a few steps; weights stay in fp32."""
    config = replace(CONFIG, epochs=8, batch_size=20, augmentation="none")
    exact, rounded = teacher(config), teacher(replace(config, precision="bf16"))
    assert top1(rounded, small_set(), config, CPU) > 85
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    assert not torch.equal(exact.get_parameter("fc.weight"), rounded.get_parameter("fc.weight"))


KILLED = """
import os, signal, sys, torch
from dwa_fast import cli, resuming, training
torch.set_num_threads(2)
resuming._SECONDS, real, calls = 0.0, training.cosine, []
def cosine(*arguments):
    calls.append(arguments)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
training.cosine = cosine
cli.run(sys.argv[1:])
"""


def test_killed_command_goes_on(tmp_path: Path) -> None:
    """In the middle of the second epoch of eleven steps; momentum and draws go on as if nothing had happened."""

    def command(name: str) -> list[str]:
        return ["squeeze", "--recipe", "digits", "--size", str(SIZE), "--padding", "1", "--epochs", "3", "--output", str(tmp_path / name)]

    killed = [sys.executable, "-c", KILLED, *command("t.pt")]  # elsewhere: it would import the dwa_fast of the folder that it starts in
    process = subprocess.run(killed, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".t.pt.state"]
    assert torch.load(tmp_path / ".t.pt.state", weights_only=True)["epochs"] == 1
    assert run(command("t.pt")) == 0
    assert run(command("whole.pt")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.pt", "whole.pt"]
    assert load_teacher(tmp_path / "t.pt")[1].architecture == "small-resnet"
    assert (tmp_path / "t.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()

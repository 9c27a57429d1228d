"""Losses for TensorBoard and Weights & Biases; both packages are stood in for, and neither is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dwa_fast import InputError
from dwa_fast.commands.cli import run
from dwa_fast.sets.store import BatchSpec
from dwa_fast.sets.tracking import tracked

SETTINGS = {"iterations": 100, "rho": 0.015}
ROWS = [[1, 0.5, 1.5, 2.5], [100, 0.25, 1.25, 2.25]]


class Recorder:
    """Writes down what is called, as both packages' writers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.calls.append((name, *arguments, *sorted(named.items())))


def module(name: str, monkeypatch: pytest.MonkeyPatch, **content: Any) -> None:
    stand_in = ModuleType(name)
    vars(stand_in).update(content)
    monkeypatch.setitem(sys.modules, name, stand_in)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, folders = Recorder(), []
    module("torch.utils.tensorboard", monkeypatch, SummaryWriter=lambda folder: folders.append(folder) or recorder)  # type: ignore[func-returns-value]
    with tracked("tensorboard", tmp_path, SETTINGS) as observers:
        for observer in observers:
            observer(BatchSpec(3, 0, [0]), ROWS)
    assert folders == [str(tmp_path)]
    assert recorder.calls == [
        *(("add_scalar", "loss/ce", 0.5, 301), ("add_scalar", "loss/mean", 1.5, 301), ("add_scalar", "loss/var", 2.5, 301)),
        *(("add_scalar", "loss/ce", 0.25, 400), ("add_scalar", "loss/mean", 1.25, 400), ("add_scalar", "loss/var", 2.25, 400)),
        ("close",),
    ]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, begun = Recorder(), []
    module("wandb", monkeypatch, init=lambda **named: begun.append(named) or recorder)  # type: ignore[func-returns-value]
    with tracked("wandb", tmp_path / "set", SETTINGS) as observers:
        for observer in observers:
            observer(BatchSpec(0, 0, [0]), ROWS[:1])
    assert begun == [{"project": "dwa-fast", "name": "set", "config": SETTINGS}]
    assert recorder.calls == [
        ("define_metric", "loss/*", ("step_metric", "iteration")),
        ("log", {"iteration": 1, "loss/ce": 0.5, "loss/mean": 1.5, "loss/var": 2.5}),
        ("finish",),
    ]


def test_tracker_is_closed_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    module("torch.utils.tensorboard", monkeypatch, SummaryWriter=lambda folder: recorder)
    with pytest.raises(ZeroDivisionError), tracked("tensorboard", tmp_path, SETTINGS):
        raise ZeroDivisionError
    assert recorder.calls == [("close",)]


@pytest.mark.parametrize(("name", "needed"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, needed: str) -> None:
    monkeypatch.setitem(sys.modules, needed, None)
    with pytest.raises(InputError) as error, tracked(name, tmp_path, SETTINGS):
        pass
    assert str(error.value) == f"--track {name} needs the package {name}: pip install 'dwa-fast[{name}]'"


def test_nothing_is_needed_for_none(tmp_path: Path) -> None:
    with tracked("none", tmp_path, SETTINGS) as observers:
        assert observers == []


def test_unknown_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["synthesize", "--recipe", "digits", "--teacher", "t.pt", "--output", str(tmp_path), "--track", "mlflow"])
    assert "tensorboard" in capsys.readouterr().err

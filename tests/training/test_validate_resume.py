"""Students that were stopped go on to the same bits, alone or in processes, and what is finished is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwa_fast import InputError
from dwa_fast.models.architectures import ARCHITECTURES
from dwa_fast.threads import torch_threads
from dwa_fast.training import fit, state
from dwa_fast.training.validate import ValidationResult
from tests.nets import small_teacher, stop_at
from tests.training.students import QUICK, students


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an architecture with dropout."""

    def make(classes: int, channels: int, size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels * size**2, classes))

    monkeypatch.setitem(ARCHITECTURES, "dropping", make)
    return "dropping"


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_goes_on_to_the_same_accuracies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimiser: Any) -> None:
    """Stopped within an epoch of either student."""
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    config = replace(QUICK, optimiser=optimiser, learning_rate=0.05, students=2)

    def run(**more: Any) -> ValidationResult:
        return students(config, **more)

    whole = run()
    for step in (8, 20):
        with pytest.raises(KeyboardInterrupt):
            run(resume_dir=tmp_path, progress=stop_at(step))
    ticks: list[int] = []
    assert run(resume_dir=tmp_path, progress=lambda done, total: ticks.append(done)) == whole
    assert ticks == list(range(18, 25))
    assert [path.name for path in tmp_path.iterdir()] == ["students.json"]
    assert run(resume_dir=tmp_path, progress=stop_at(1)) == whole  # nothing is trained again


@pytest.mark.parametrize("student", ["small-resnet", "dropping"])
def test_state_is_that_of_the_undisturbed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str, dropping: str) -> None:
    """Accuracies of a hundred images could hide a difference; the weights after every epoch cannot. Dropout plans numbers of its own."""
    monkeypatch.setattr(state, "_SECONDS", 0.0)

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        content: dict[str, torch.Tensor] = torch.load(folder / "student0.state", weights_only=True)["weights"]
        return content

    with pytest.raises(KeyboardInterrupt):
        students(student=student, resume_dir=tmp_path / "whole", progress=stop_at(10))  # after three epochs
    for step in (4, 7, 10):
        with pytest.raises(KeyboardInterrupt):
            students(student=student, resume_dir=tmp_path / "stopped", progress=stop_at(step))
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_thread_count_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The order of sums, so the last bits, depend on it; resuming goes ahead with the present number."""
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    with torch_threads(2), pytest.raises(KeyboardInterrupt):
        students(replace(QUICK, students=2), resume_dir=tmp_path, progress=stop_at(8))
    assert not caplog.records
    with torch_threads(1):
        students(replace(QUICK, students=2), resume_dir=tmp_path)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{tmp_path}: begun on 2 CPU threads, now on 1; the last bits of what is still computed may differ"]


def test_more_students_join_those_that_are_there(tmp_path: Path) -> None:
    one = students(replace(QUICK, students=1), resume_dir=tmp_path)
    three = students(replace(QUICK, students=3), resume_dir=tmp_path)
    assert three.accuracies[:1] == one.accuracies
    assert three == students(replace(QUICK, students=3))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    config = replace(QUICK, students=1, epochs=1)
    students(config, resume_dir=tmp_path)
    with pytest.raises(
        InputError, match=r"holds students of other settings \(seed was 0, is 5; temperature was 20.0, is 4.0\); choose another"
    ):
        students(replace(config, temperature=4.0), resume_dir=tmp_path, seed=5)
    with pytest.raises(InputError, match=r"other settings \(teacher was '[0-9a-f]{12}…', is '[0-9a-f]{12}…'\)"):
        students(config, small_teacher(1), resume_dir=tmp_path)
    students(replace(config, memory_limit=0.0), resume_dir=tmp_path)
    (tmp_path / "students.json").write_text(json.dumps({"format": 1, "settings": {}, "accuracies": {"0": 101}}))
    with pytest.raises(
        InputError,
        match=r"students\.json cannot be read: expected accuracies in percent; remove it to train all students again",
    ):
        students(config, resume_dir=tmp_path)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_student_does_not_depend_on_those_before_it(tmp_path: Path, mode: Any) -> None:
    """A teacher in train mode moves its running statistics; the next student must not notice."""

    class Running(nn.Module):
        """A teacher whose answers depend on its running statistics in train mode too."""

        def __init__(self) -> None:
            super().__init__()
            self.network = small_teacher()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            norm = next(m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d))
            assert norm.running_mean is not None
            logits: torch.Tensor = self.network(images) + norm.running_mean.sum() * torch.arange(10)
            return logits

    teacher = Running().eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = replace(QUICK, teacher_mode=mode, temperature=1.0, learning_rate=0.05)
    both = students(config, teacher).accuracies
    assert students(replace(config, students=1), teacher, resume_dir=tmp_path).accuracies == both[:1]
    assert students(config, teacher, resume_dir=tmp_path).accuracies == both  # trains the second alone
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_folder_without_a_finished_student_takes_other_settings(tmp_path: Path) -> None:
    """Such as a lower learning rate after a divergence."""
    with pytest.raises(InputError, match="training diverged"):
        students(replace(QUICK, learning_rate=1e30), resume_dir=tmp_path)
    assert students(QUICK, resume_dir=tmp_path) == students(QUICK)


def test_divergence_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = students(replace(QUICK, students=1), resume_dir=tmp_path)
    monkeypatch.setattr(fit, "cosine", lambda *_: 1e30)
    with pytest.raises(InputError, match=r"training diverged: loss not finite in epoch 1 of 4; lower --learning-rate \(0\.\d+\)$"):
        students(resume_dir=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["students.json"]
    assert students(resume_dir=tmp_path).accuracies[:1] == first.accuracies


def test_early_tests_change_nothing_and_are_kept(tmp_path: Path, dropping: str) -> None:
    seen: list[tuple[int, int, float]] = []
    config = replace(QUICK, epochs=5, students=2)
    plain = students(config, student=dropping)
    result = students(config, student=dropping, resume_dir=tmp_path, test_every=2, tested=lambda *each: seen.append(each))
    assert result.accuracies == plain.accuracies
    assert [(student, epochs) for student, epochs, _ in seen] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert result.tests == [{2: seen[0][2], 4: seen[1][2]}, {2: seen[2][2], 4: seen[3][2]}]
    assert students(config, student=dropping, resume_dir=tmp_path).tests == result.tests
    after_two_epochs = students(config, student="small-resnet", test_every=1).tests[0]
    assert sorted(after_two_epochs) == [1, 2, 3, 4]


def test_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also early tests, from a student that had been interrupted after its first test."""
    counts: list[tuple[int, int]] = []
    config = replace(QUICK, learning_rate=5e-3, mixing="none")
    alone = students(config, test_every=2)
    assert alone.accuracies[0] != alone.accuracies[1]
    assert alone.tests[0] != alone.tests[1]
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        students(config, resume_dir=tmp_path, test_every=2, progress=stop_at(10))
    assert json.loads((tmp_path / "students.json").read_text())["accuracies"] == {}
    together = students(config, resume_dir=tmp_path, test_every=2, jobs=8, progress=lambda *count: counts.append(count))
    assert together == alone
    assert counts[-1] == (24, 24)
    assert counts == sorted(counts)
    assert students(config, resume_dir=tmp_path) == alone


def test_early_tests_that_are_no_accuracies_are_refused(tmp_path: Path) -> None:
    students(resume_dir=tmp_path, test_every=1)
    path = tmp_path / "students.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tests": {"0": {"1": 101}}}))
    with pytest.raises(InputError, match=r"students\.json cannot be read"):
        students(resume_dir=tmp_path)

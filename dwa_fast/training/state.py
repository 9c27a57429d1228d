"""Resumable training: fingerprint of the settings, checkpoint between epochs, accuracies of finished students."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum, is_left_over, output_folder, read_json, write_json
from dwa_fast.io.settings import refuse_change
from dwa_fast.io.torch_files import read_archive, write_archive
from dwa_fast.models.finite import has_finite_weights
from dwa_fast.threads import with_recorded_threads

_SECONDS = 30.0  # between two checkpoints, at least; that of a large network takes a second to write
_FORMAT = 1


def as_in_files(value: Any) -> Any:
    """A tensor of four dimensions in the contiguous layout that files have, with its strides; anything else as it is."""
    if not isinstance(value, Tensor) or value.dim() != 4:
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)


class WeightAverage:
    """A moving average of a network's parameters: average ← rate · average + (1 − rate) · parameters, from their initial values (EDC)."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        self._parameters = list(model.parameters())
        self.values = [p.detach().clone() for p in self._parameters]
        self._update = get_ema_multi_avg_fn(rate)

    def update(self) -> None:
        """Take in the parameters after a step."""
        self._update(self.values, self._parameters, None)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange average and parameters."""
        for value, parameter in zip(self.values, self._parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network has the average as its parameters; running statistics stay its own."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


class TrainingState:
    """Checkpoint of one training in one file: weights, optimiser and number of finished epochs.

    The random numbers of an epoch depend on its number alone, so a resumed training gives the same bits.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Reads and writes nothing yet.

        Args:
            settings: everything that the training depends on; JSON values. Resuming with another number of `threads` is allowed and logged.
        """
        self.path = path
        self.tests: dict[int, float] = {}  # accuracies by finished epochs, of tests on the way; stored with the checkpoint
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._saved = time.monotonic()

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None) -> int:
        """Load the checkpoint into the model, the optimiser and the average of the weights, if the file exists.

        Returns:
            the number of finished epochs.
        Raises:
            InputError: the file is damaged, of a training with other settings, or of one that diverged.
        """
        for path in self.path.parent.glob(f".{self.path.name}.*.part"):
            if is_left_over(path):
                path.unlink(missing_ok=True)
        if not self.path.exists():
            return 0
        content = read_archive(self.path, "checkpoint of a training")
        try:
            before, epochs = json.loads(content["settings"]), int(content["epochs"])
            self.tests.update(_accuracies(json.loads(content.get("tests", "{}"))))
            self._settings = with_recorded_threads(self._settings, before, str(self.path))
            refuse_change(self.path, "a checkpoint", before, self._settings, "remove it to start again")
            model.load_state_dict(content["weights"])
            optimizer.load_state_dict(content["optimiser"])
            if average:
                for value, stored in zip(average.values, content["average"], strict=True):
                    value.copy_(stored)
            for weight, values in optimizer.state.items():  # fused optimisers read weights and their own values in one order
                values.update({name: torch.empty_like(weight).copy_(v) for name, v in values.items() if v.shape == weight.shape})
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path} holds no complete checkpoint of a training; remove it to start again") from error
        if not has_finite_weights(model):
            raise InputError(f"{self.path} holds weights that are not finite, of a training that diverged; remove it to start again")
        return epochs

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, average: WeightAverage | None = None) -> None:
        """Write a checkpoint after `epochs` epochs, unless the last one is less than 30 seconds old."""
        if time.monotonic() - self._saved < _SECONDS:
            return
        weights = {name: as_in_files(value) for name, value in model.state_dict().items()}
        optimiser = optimizer.state_dict()
        optimiser["state"] = {
            number: {name: as_in_files(value) for name, value in values.items()} for number, values in optimiser["state"].items()
        }
        content: dict[str, Any] = {"settings": json.dumps(self._settings), "epochs": epochs, "weights": weights, "optimiser": optimiser}
        if self.tests:
            content["tests"] = json.dumps(self.tests)
        if average:
            content["average"] = [as_in_files(value) for value in average.values]
        write_archive(self.path, content)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the file, once the result of the training is on disk."""
        self.path.unlink(missing_ok=True)


class FinishedTeacher:
    """What a hidden file beside a teacher remembers: the settings that it was trained with."""

    def __init__(self, teacher: Path) -> None:
        """Reads and writes nothing yet."""
        self._teacher, self._file = teacher, teacher.with_name(f".{teacher.name}.json")

    def write(self, settings: Mapping[str, Any]) -> None:
        """Remember the settings of a teacher that has just been written; JSON values."""
        write_json(self._file, {"format": _FORMAT, "teacher": checksum(self._teacher), "settings": settings})

    def known(self) -> bool:
        """Whether the teacher is there, with its settings beside it, and has not changed since."""
        return self._teacher.exists() and self.settings() is not None

    def compare(self, settings: Mapping[str, Any]) -> None:
        """Check that a known teacher was trained with these settings; another number of `threads` is allowed and logged.

        Raises:
            InputError: they differ.
        """
        before = self.settings() or {}
        now = with_recorded_threads(json.loads(json.dumps(settings)), before, str(self._teacher))
        refuse_change(self._teacher, "a teacher", before, now, "choose another name, or pass --overwrite")

    def settings(self) -> dict[str, Any] | None:
        """With which a known teacher was trained; None where they are not known."""
        try:
            return read_json(self._file, self._parsed)
        except InputError:
            return None

    def _parsed(self, content: Any) -> dict[str, Any] | None:
        same = content["format"] == _FORMAT and content["teacher"] == checksum(self._teacher)
        return dict(content["settings"]) if same else None


class FinishedStudents:
    """A folder with the accuracies of finished students and the checkpoint of the running one."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Create the folder, or resume from its content.

        Args:
            settings: everything that the students depend on; JSON values. Resuming with another number of `threads` is allowed and logged.
        Raises:
            InputError: the folder cannot be written, or holds students of other settings.
        """
        self._folder = output_folder(folder)
        self._file = folder / "students.json"
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.accuracies: dict[int, float] = {}
        self.tests: dict[int, dict[int, float]] = {}  # of each student: accuracies by finished epochs, before the last one
        if self._file.exists():
            self._read()
        else:
            self.write()
        for index in self.accuracies:  # left if the process stopped between writing the accuracy and removing the checkpoint
            self.state(index).remove()

    def state(self, index: int) -> TrainingState:
        """The checkpoint of student `index`."""
        return TrainingState(self._folder / f"student{index}.state", {**self._settings, "student_number": index})

    def add(self, index: int, accuracy: float, tests: Mapping[int, float]) -> None:
        """Write the accuracies of a finished student and remove its checkpoint."""
        self.accuracies[index] = accuracy
        if tests:
            self.tests[index] = dict(tests)
        self.write()
        self.state(index).remove()

    def write(self) -> None:
        """Write all accuracies so far."""
        accuracies = {str(number): value for number, value in sorted(self.accuracies.items())}
        content = {"format": _FORMAT, "settings": self._settings, "accuracies": accuracies}
        write_json(self._file, {**content, "tests": self.tests} if self.tests else content)

    def _read(self) -> None:
        before, accuracies, early = read_json(self._file, _students, advice="remove it to train all students again")
        if not accuracies and not any(self._folder.glob("student*.state")):  # nothing is finished: the folder may take other settings
            self.write()
            return
        self._settings = with_recorded_threads(self._settings, before, str(self._folder))
        refuse_change(self._folder, "students", before, self._settings, "choose another folder")
        self.accuracies, self.tests = accuracies, early


def _students(content: Any) -> tuple[dict[str, Any], dict[int, float], dict[int, dict[int, float]]]:
    """Settings, the accuracy of each finished student, and those of its tests on the way."""
    settings, accuracies = dict(content["settings"]), _accuracies(content["accuracies"])
    early = {int(number): _accuracies(each) for number, each in content.get("tests", {}).items()}
    if content["format"] != _FORMAT:
        raise ValueError(f"expected format {_FORMAT}, got {content['format']}")
    return settings, accuracies, early


def _accuracies(content: Mapping[str, Any]) -> dict[int, float]:
    """Accuracies by number, from a file.

    Raises:
        ValueError: one is not in 0 … 100.
    """
    found = {int(number): float(value) for number, value in content.items()}
    if not all(0 <= value <= 100 for value in found.values()):
        raise ValueError("expected accuracies in percent")
    return found

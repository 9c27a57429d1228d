"""Trainings that go on where they were stopped: what they depend on, the state of one between two epochs, and what is finished."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwa_fast.data.datasets import FileSet, ImageSet
from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum, is_left_over, output_folder, read_regular, write_json
from dwa_fast.io.settings import refuse_change
from dwa_fast.io.torch_files import read_archive, write_archive
from dwa_fast.models.finite import has_finite_weights
from dwa_fast.threads import THREADS, as_begun

_SECONDS = 30.0  # between two states of a training, at least: one of a large network takes a second to write
_DIGEST_BYTES = 2**24  # of a set's pixels; of larger sets, evenly spaced images stand for all
_FORMAT = 1


def image_digest(data: ImageSet) -> str:
    """Checksum of a set: its labels, its classes, its names and its images, of a large set evenly spaced ones.

    Files count as they are, whether they can be decoded or not.

    Raises:
        InputError: a file cannot be read.
    """
    count = len(data.labels)
    shown = max(1, min(count, _DIGEST_BYTES // math.prod(data.image_shape)))
    names = [data.name(index) for index in range(count)]
    described: list[Any] = [names, data.labels.tolist(), data.class_names, data.image_shape]
    if isinstance(data, FileSet) and data.resize not in (None, data.size):
        described.append(data.resize)
    total = hashlib.sha256(json.dumps(described).encode())
    for part in torch.linspace(0, count - 1, shown).round().to(torch.int64).split(256):
        total.update(_content(data, part.tolist()))
    return total.hexdigest()


def _content(data: ImageSet, indices: Sequence[int]) -> bytes:
    if not isinstance(data, FileSet):
        return data.load(indices).numpy().tobytes()
    sums = []
    for index in indices:
        path = data.folder / data.files[index]
        try:
            sums.append(checksum(path))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return "".join(sums).encode()


def weight_digest(module: nn.Module) -> str:
    """Checksum of all parameters and buffers and their names."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class TrainingState:
    """Weights, optimiser and number of finished epochs of one training, in one file.

    All draws of an epoch come from its number, so nothing else is needed to go on to the same bits.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Nothing is read or written yet.

        Args:
            settings: everything that the training depends on; JSON values. With another number of `threads` than before it goes on with
                that of before.
        """
        self.path = path
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._saved = time.monotonic()

    @property
    def threads(self) -> int | None:
        """CPU threads that the training is to compute with; None: as many as there are."""
        return self._settings.get(THREADS)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Take over the state, if there is one.

        Returns:
            epochs that are finished.
        Raises:
            InputError: the file is damaged, is the state of a training with other settings, or of one that diverged.
        """
        for path in self.path.parent.glob(f".{self.path.name}.*.part"):
            if is_left_over(path):
                path.unlink(missing_ok=True)
        if not self.path.exists():
            return 0
        content = read_archive(self.path, "state of a training")
        try:
            before, epochs = json.loads(content["settings"]), int(content["epochs"])
            self._settings = as_begun(self._settings, before)
            refuse_change(self.path, "the state of a training", before, self._settings, "remove it to begin again")
            model.load_state_dict(content["weights"])
            optimizer.load_state_dict(content["optimiser"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path} holds no whole state of a training; remove it to begin again") from error
        if not has_finite_weights(model):
            raise InputError(f"{self.path} holds weights that are not finite, of a training that diverged; remove it to begin again")
        return epochs

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        """Write the state after so many epochs, unless the last one is only seconds old."""
        if time.monotonic() - self._saved < _SECONDS:
            return
        content = {"settings": json.dumps(self._settings), "epochs": epochs, "weights": model.state_dict()}
        write_archive(self.path, {**content, "optimiser": optimizer.state_dict()})
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Once the training is finished and its result is on the disk."""
        self.path.unlink(missing_ok=True)


class KeptStudents:
    """A folder with the accuracies of finished students and the state of the running one."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open the folder, or go on with what is in it.

        Args:
            settings: everything that the students depend on; JSON values. With another number of `threads` than before they go on with that
                of before.
        Raises:
            InputError: it cannot be written, or holds students of other settings.
        """
        self._folder = output_folder(folder)
        self._file = folder / "students.json"
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.accuracies: dict[int, float] = {}
        if self._file.exists():
            self._read()
        else:
            self._write()
        for index in self.accuracies:  # stopped between writing its accuracy and removing its state
            self.state(index).remove()

    @property
    def threads(self) -> int | None:
        """CPU threads that the students are to be trained with; None: as many as there are."""
        return self._settings.get(THREADS)

    def state(self, index: int) -> TrainingState:
        """Of the student of that number."""
        return TrainingState(self._folder / f"student{index}.state", {**self._settings, "student_number": index})

    def add(self, index: int, accuracy: float) -> None:
        """Keep the accuracy of a finished student."""
        self.accuracies[index] = accuracy
        self._write()
        self.state(index).remove()

    def _write(self) -> None:
        kept = {str(number): value for number, value in sorted(self.accuracies.items())}
        write_json(self._file, {"format": _FORMAT, "settings": self._settings, "accuracies": kept})

    def _read(self) -> None:
        try:
            content = json.loads(read_regular(self._file))
            before = dict(content["settings"])
            accuracies = {int(number): float(value) for number, value in content["accuracies"].items()}
            if content["format"] != _FORMAT or not all(0 <= value <= 100 for value in accuracies.values()):
                raise ValueError("it holds something else")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"{self._file} cannot be read: {error}; remove it to train all students again") from error
        if not accuracies and not any(self._folder.glob("student*.state")):  # nothing was finished: other settings may take the folder
            self._write()
            return
        self._settings = as_begun(self._settings, before)
        refuse_change(self._folder, "students", before, self._settings, "choose another folder")
        self.accuracies = accuracies

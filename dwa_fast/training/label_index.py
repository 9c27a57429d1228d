"""Index of a folder of soft labels: the settings that they were made with, and a checksum per epoch."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dwa_fast.data.set_layout import refuse_images
from dwa_fast.io.files import checksum, is_left_over, output_folder, read_json, write_json
from dwa_fast.io.settings import refuse_change
from dwa_fast.threads import with_recorded_threads

INDEX = "labels.json"
_FORMAT = 1
_Index = TypeVar("_Index", bound="LabelIndex")


class LabelIndex(ABC):
    """What is known of the labels of a set without reading them; subclasses hold the labels in a layout.

    Attributes:
        folder: of the labels.
        settings: what they were made with.
        epochs: how many a complete store has.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder of soft labels.

        Raises:
            InputError: it holds no soft labels, or its index is damaged.
        """
        self.folder = folder
        missing = f"{folder} holds no {INDEX}; dwa-fast relabel makes soft labels"
        content = read_json(folder / INDEX, _parsed, advice="remove it to make all labels again", missing=missing)
        self.settings, self.epochs, self._sums = content

    @classmethod
    def create(cls: type[_Index], folder: Path, settings: Mapping[str, Any], epochs: int) -> _Index:
        """Create a store, or resume the one in the folder. A store can grow to more epochs.

        Raises:
            InputError: the folder cannot be written, or holds labels of other settings.
        """
        refuse_images(folder)
        output_folder(folder)
        for path in folder.glob(".*.part"):
            if is_left_over(path):
                path.unlink(missing_ok=True)
        if not (folder / INDEX).exists():
            write_json(folder / INDEX, {"format": _FORMAT, "settings": settings, "epochs": epochs, "checksums": {}})
        store = cls(folder)
        wanted = json.loads(json.dumps(with_recorded_threads(settings, store.settings, str(folder))))
        refuse_change(folder, "soft labels", store.settings, wanted, "choose another folder")
        store.epochs = max(store.epochs, epochs)
        return store

    @property
    def complete(self) -> bool:
        """Whether every epoch has been written."""
        return all(number in self._sums for number in range(self.epochs))

    @property
    def missing(self) -> list[int]:
        """Epochs without a file that matches its checksum."""
        return [number for number in range(self.epochs) if not self.is_whole(number)]

    @property
    def files(self) -> list[str]:
        """Names of all files that have been written."""
        return [INDEX, *(name for number in sorted(self._sums) for name in self.files_of(number))]

    @property
    def identity(self) -> str:
        """Identifies the labels: the checksum of the index, which holds that of every file."""
        return checksum(self.folder / INDEX)

    def is_whole(self, number: int) -> bool:
        """Whether an epoch has been written and has not changed since."""
        try:
            return number in self._sums and self.digest(number) == self._sums[number]
        except OSError:
            return False

    def written(self, number: int) -> None:
        """Note durably that an epoch is on the disk."""
        self._sums[number] = self.digest(number)
        sums = {str(epoch): value for epoch, value in sorted(self._sums.items())}
        write_json(self.folder / INDEX, {"format": _FORMAT, "settings": self.settings, "epochs": self.epochs, "checksums": sums})

    def finish(self) -> None:  # noqa: B027  # a layout may have nothing of the kind
        """Write what belongs to no single epoch, after all of them."""

    @abstractmethod
    def files_of(self, number: int) -> list[str]:
        """The files of an epoch that has been written, relative to the folder."""

    @abstractmethod
    def digest(self, number: int) -> str:
        """SHA-256 of the files of an epoch. Raises OSError if one is missing."""


def _parsed(content: Any) -> tuple[dict[str, Any], int, dict[int, str]]:
    """Settings, number of epochs, and the checksum of each epoch that has been written."""
    settings, epochs = dict(content["settings"]), int(content["epochs"])
    sums = {int(number): str(value) for number, value in content["checksums"].items()}
    if content["format"] != _FORMAT or epochs < 1:
        raise ValueError("it holds something else")
    return settings, epochs, sums

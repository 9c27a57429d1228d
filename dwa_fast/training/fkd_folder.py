"""Reads a folder of FKD files, of this program or another one, as the batch plans of a training."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dwa_fast.config import ValidationConfig
from dwa_fast.data.augment import Mix
from dwa_fast.data.images import ImageSet
from dwa_fast.data.loader import BatchPlan, batch_size_of
from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum, read_json, sorted_scandir
from dwa_fast.io.torch_files import read_archive
from dwa_fast.seeding import generator
from dwa_fast.training.fkd import FIRST_EPOCH, IMAGE_ORDER, ImageOrder, check_fkd_settings, folder_order, from_record


def is_fkd(folder: Path) -> bool:
    """Whether a folder looks like one of FKD files."""
    return (folder / FIRST_EPOCH).is_dir()


class FkdFolder:
    """The soft labels in a folder of FKD files.

    With LPLD's file of the image order it is a pool: each epoch of a student draws its batches from all that there are.
    """

    def __init__(self, folder: Path, data: ImageSet, config: ValidationConfig) -> None:
        """Open it for the training of students on a set.

        Args:
            data: whose images the labels are for, all that its folder holds.
            config: settings of the training.
        Raises:
            InputError: the files are not those of a training on this set with these settings.
        """
        check_fkd_settings(config)
        self.folder, self._side, self._classes = folder, data.image_shape[1], len(data.class_names)
        names = [f"{FIRST_EPOCH[:-1]}{number}" for number in range(_count(folder, r"epoch_(\d+)", "epochs"))]
        self._batches = [_count(folder / name, r"batch_(\d+)\.tar", "batches") for name in names]
        self._orders = _read_order(folder / IMAGE_ORDER)
        self.epochs, self.pool = len(self._batches), self._orders is not None
        places = folder_order(data)
        self._places, self._order = torch.tensor(places), ImageOrder(len(places))
        _, mix, *_ = first = self._load(0, 0)
        size, last = len(first[2]), self._batches[0] - 1
        # Images of the batches of an epoch. A pool, which may hold less than one epoch, has no smaller last one.
        self.sizes = [size] * max(1, len(places) // size) if self.pool else [size] * last + [len(self._load(0, last)[2])]
        self.steps = len(self.sizes)
        self._compare(config, data, mix)

    def _compare(self, config: ValidationConfig, data: ImageSet, mix: Mix) -> None:
        """Raise InputError if the training or the set is another one."""
        images, wanted = len(data.labels), min(batch_size_of(config, len(data.labels), self._classes), len(data.labels))
        if not self.pool and sum(self.sizes) != images:
            raise InputError(f"{self.folder} holds labels of {sum(self.sizes)} images, the set has {images}")
        if self.sizes[0] != wanted:
            raise InputError(f"{self.folder} holds batches of {self.sizes[0]} images, got {wanted}; pass --batch-size {self.sizes[0]}")
        found = "none" if mix.partner is None else "cutmix" if mix.box else "mixup"
        if found != config.mixing:
            raise InputError(f"{self.folder} holds labels of mixing {found!r}, got {config.mixing!r}; pass --mixing {found}")
        other = next((epoch for epoch, batches in enumerate(self._batches) if batches != self.steps), None)
        if other is not None and not self.pool:
            raise InputError(f"{self.folder} holds {self.steps} batches of epoch 0 and {self._batches[other]} of epoch {other}")
        if config.epochs > self.epochs and not self.pool:
            raise InputError(f"{self.folder} holds labels of {self.epochs} epochs, the training has {config.epochs}")

    @cached_property
    def identity(self) -> str:
        """Identifies the labels: SHA-256 of the names and sizes of all files, and of the content of each epoch's first one."""
        total = hashlib.sha256()
        for epoch, batches in enumerate(self._batches):
            paths = [self._file(epoch, batch) for batch in range(batches)]
            total.update(f"{epoch} {[path.stat().st_size for path in paths]} {checksum(paths[0])}".encode())
        if self.pool:
            total.update(checksum(self.folder / IMAGE_ORDER).encode())
        return total.hexdigest()

    def sampler(self, config: ValidationConfig, images: int, classes: int, *, seed: int) -> FkdSampler:
        """Gives the plans of a training."""
        return FkdSampler(self, seed=seed)

    def places(self) -> Iterator[tuple[int, int]]:
        """All batches: epoch and number."""
        return ((epoch, batch) for epoch, batches in enumerate(self._batches) for batch in range(batches))

    def read(self, epoch: int, batch: int) -> BatchPlan:
        """The plan of a batch, with its logits.

        Raises:
            InputError: the file cannot be read, or does not hold the labels of such a batch.
        """
        views, mix, logits, numbers = self._load(epoch, batch)
        start = self.sizes[0] * batch
        order = numbers.tolist() if numbers is not None else self._images(epoch)[start : start + self.sizes[0]]
        if len(order) != len(logits) or not all(0 <= number < len(self._places) for number in order):
            raise InputError(
                f"{self._file(epoch, batch)} holds labels of {len(logits)} images, expected {len(order)} in 0 … {len(self._places) - 1}"
            )
        return BatchPlan(self._places[order], views, mix, logits)

    def _load(self, epoch: int, batch: int) -> tuple[Any, ...]:
        path = self._file(epoch, batch)
        content = read_archive(path, "FKD file", numpy_numbers=True)
        try:
            return from_record(content, self._side, self._classes)
        except ValueError as error:
            raise InputError(f"FKD file {path} {error}") from error

    def _images(self, epoch: int) -> list[int]:
        return self._order.epoch(epoch) if self._orders is None else self._orders.get(epoch, [])

    def _file(self, epoch: int, batch: int) -> Path:
        return self.folder / f"epoch_{epoch}" / f"batch_{batch}.tar"


class FkdSampler:
    """Gives the plans of an epoch: those of the same epoch of the files or, of a pool, as many batches as an epoch has, drawn at random."""

    def __init__(self, labels: FkdFolder, *, seed: int) -> None:
        self._labels, self._seed, self.steps = labels, seed, labels.steps

    def epoch(self, number: int) -> list[BatchPlan]:
        """The plans of one epoch, counted from 0; they depend on its number and the seed alone."""
        if not self._labels.pool:
            return [self._labels.read(number, batch) for batch in range(self.steps)]
        places = list(self._labels.places())
        drawn = generator(self._seed, "label pool", number).integers(len(places), size=self.steps)
        return [self._labels.read(*places[place]) for place in drawn.tolist()]


def _count(folder: Path, pattern: str, what: str) -> int:
    """How many entries are named like this; their numbers run from 0.

    Raises:
        InputError: one is missing.
    """
    names = [re.fullmatch(pattern, entry.name) for entry in sorted_scandir(os.fspath(folder))]
    numbers = {int(match[1]) for match in names if match}
    missing = next(number for number in itertools.count() if number not in numbers)
    if missing < len(numbers) or not numbers:
        raise InputError(f"{folder} holds FKD files of {len(numbers)} {what}, but not number {missing}; expected all from 0 on")
    return len(numbers)


def _read_order(path: Path) -> dict[int, list[int]] | None:
    """LPLD's file of the image order; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    return read_json(path, _order, advice="copy it again, or make the labels again") if path.exists() else None


def _order(content: Any) -> dict[int, list[int]]:
    found = {int(epoch): list(numbers) for epoch, numbers in content.items()}
    if not all(type(number) is int for numbers in found.values() for number in numbers):
        raise ValueError("it holds something else than integers")
    return found

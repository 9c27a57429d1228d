"""Writes soft labels as FKD files, which programs of SRe2L's family read, with an index beside them from which the writing resumes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dwa_fast.config import FkdConfig, ValidationConfig
from dwa_fast.data.augment import Views, draw_mix
from dwa_fast.data.boxes import draw_boxes
from dwa_fast.data.images import ImageSet
from dwa_fast.data.loader import BatchPlan, batch_size_of
from dwa_fast.errors import InputError
from dwa_fast.io.files import atomic_write, checksum, output_folder
from dwa_fast.io.torch_files import save_archive
from dwa_fast.seeding import generator
from dwa_fast.training.fkd import IMAGE_ORDER, ImageOrder, check_fkd_settings, folder_order, to_record
from dwa_fast.training.label_index import INDEX, LabelIndex

FKD_FILES = "fkd"  # folder of the files, below that of the index: other programs count what lies among them
_FILE = 2250  # approximate overhead in bytes of a file


class FkdPlans:
    """The plans of the batches that get labels: crops of whole pixels, flips and mixes in the order that readers of FKD files expect.

    A pool (`pool_share` below 1) has the first batches of all epochs, without the smaller last one of each epoch.
    """

    def __init__(self, data: ImageSet, config: ValidationConfig, fkd: FkdConfig, *, seed: int) -> None:
        """Draw nothing yet.

        Raises:
            InputError: FKD files cannot hold such views, or the set is a part of the images in its folder.
        """
        check_fkd_settings(config)
        places = folder_order(data)
        self._places, self._order, self._side = torch.tensor(places), ImageOrder(len(places)), data.image_shape[1]
        self._config, self._fkd, self._seed = config, fkd, seed
        self._batch_size, self.steps, self.total = _counts(config, fkd, len(data.labels), len(data.class_names))
        self.epochs = -(-self.total // self.steps)
        self._pool = fkd.pool_share < 1

    def count(self, number: int) -> int:
        """Batches of an epoch that get labels."""
        return min(self.steps, self.total - number * self.steps) if self._pool else self.steps

    def numbers(self, epoch: int) -> list[int]:
        """The images of the batches of an epoch that get labels, as their numbers in the order of ImageFolder."""
        order = self._order.epoch(epoch)
        return order[: self.count(epoch) * self._batch_size] if self._pool else order

    def epoch(self, number: int) -> list[BatchPlan]:
        """The plans of one epoch, counted from 0."""
        source, config, plans = generator(self._seed, "fkd", number), self._config, []
        for rows in torch.tensor(self.numbers(number)).split(self._batch_size):
            boxes = draw_boxes(len(rows), self._side, config.smallest_crop, source)
            views = Views(boxes=boxes, flipped=torch.from_numpy(source.random(len(rows)) < config.flip))
            mix = draw_mix(len(rows), (self._side, self._side), config, source, by_area=False)
            plans.append(BatchPlan(self._places[rows], views, mix))
        return plans

    def records(self, plans: Sequence[BatchPlan]) -> list[list[Any]]:
        """The contents of the files for plans with logits."""
        numbers = self._places.argsort()  # of each image
        return [to_record(plan, self._side, numbers[plan.indices] if self._fkd.sample_indices else None) for plan in plans]


def fkd_bytes(config: ValidationConfig, fkd: FkdConfig, images: int, classes: int) -> int:
    """Approximate size of all FKD files of a set."""
    batch_size, steps, total = _counts(config, fkd, images, classes)
    row = classes * (2 if fkd.logits == "fp16" else 4) + 17 + 8 * (config.mixing != "none") + 8 * fkd.sample_indices
    return total * _FILE + math.ceil(total / steps * (steps * batch_size if fkd.pool_share < 1 else images)) * row


def _counts(config: ValidationConfig, fkd: FkdConfig, images: int, classes: int) -> tuple[int, int, int]:
    """Images of a batch, batches of an epoch, and batches that get labels."""
    batch_size = min(batch_size_of(config, images, classes), images)
    if fkd.pool_share == 1:
        steps = -(-images // batch_size)
        return batch_size, steps, config.epochs * steps
    steps = images // batch_size
    return batch_size, steps, max(1, int(config.epochs * steps * fkd.pool_share + 1e-6))  # 1e-6: 0.3 · 10 is 3


def fkd_index(folder: Path) -> FkdStore | None:
    """The index of a folder that `relabel` wrote FKD files into; None where it wrote others, or wrote nothing.

    Raises:
        InputError: the index is damaged.
    """
    if not (folder / INDEX).is_file():
        return None
    store = FkdStore(folder)
    return store if store.settings.get("layout") == "fkd" else None


class FkdStore(LabelIndex):
    """Writes FKD files, an epoch at a time: into a temporary folder, which then becomes `fkd/epoch_0`."""

    plans: FkdPlans | None = None  # that it is written for; None where it is only looked at

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any], plans: FkdPlans) -> FkdStore:
        """Create a store for the batches of `plans`, or resume the one in the folder. Raises InputError as `create`."""
        store = cls.create(folder, settings, plans.epochs)
        store.plans = plans
        return store

    def write(self, number: int, plans: Sequence[BatchPlan]) -> None:
        """Write the files of one epoch.

        Raises:
            InputError: a logit is beyond half precision, the disk is full, or the like.
        """
        assert self.plans is not None
        if not all(plan.logits is not None and bool(plan.logits.isfinite().all()) for plan in plans):
            raise InputError(f"the teacher's logits of epoch {number} are not finite in half precision; --logits fp32 stores them in full")
        unfinished, folder = self.folder / f".epoch_{number}.part", self._folder(number)
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            for batch, record in enumerate(self.plans.records(plans)):
                with open(unfinished / f"batch_{batch}.tar", "wb") as file:
                    save_archive(record, file)
            shutil.rmtree(folder, ignore_errors=True)
            output_folder(folder.parent)
            os.replace(unfinished, folder)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.written(number)

    def finish(self) -> None:
        """Write LPLD's file with the images of all batches, of a pool alone."""
        if not self.is_pool or self.complete:
            return
        assert self.plans is not None
        order = {str(epoch): self.plans.numbers(epoch) for epoch in range(self.epochs)}
        with atomic_write(self.folder / FKD_FILES / IMAGE_ORDER, self.folder) as target:
            target.write_text(json.dumps(order), encoding="utf-8")

    @property
    def is_pool(self) -> bool:
        """Whether it holds the labels of a part of the batches."""
        return bool(self.settings.get("pool_share", 1) < 1)

    @property
    def complete(self) -> bool:
        """Whether every epoch has been written and, of a pool, the order of the images."""
        return super().complete and (not self.is_pool or (self.folder / FKD_FILES / IMAGE_ORDER).is_file())

    @property
    def files(self) -> list[str]:
        """Names of all files that have been written."""
        return [*super().files, *([f"{FKD_FILES}/{IMAGE_ORDER}"] if self.is_pool and self.complete else [])]

    def files_of(self, number: int) -> list[str]:
        """The files of an epoch that has been written, in their order."""
        names = sorted((path.name for path in self._folder(number).glob("batch_*.tar")), key=lambda name: (len(name), name))
        return [f"{FKD_FILES}/epoch_{number}/{name}" for name in names]

    def digest(self, number: int) -> str:
        """SHA-256 of the files of an epoch. Raises OSError if one cannot be read."""
        return hashlib.sha256("".join(checksum(self.folder / name) for name in self.files_of(number)).encode()).hexdigest()

    def _folder(self, number: int) -> Path:
        return self.folder / FKD_FILES / f"epoch_{number}"

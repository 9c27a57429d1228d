"""Soft labels on disk: the plans of every batch of every epoch with the teacher's logits for them, in half precision.

A folder holds `labels.json` (the settings and a checksum per epoch) and one file of plain tensors per epoch.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwa_fast.config import ValidationConfig
from dwa_fast.data.augment import Mix, RandAugment, Views
from dwa_fast.data.loader import BatchPlan, batch_size_of, batch_sizes
from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum
from dwa_fast.io.torch_files import read_archive, write_archive
from dwa_fast.recipes import Recipe
from dwa_fast.seeding import generator
from dwa_fast.training.label_index import INDEX, LabelIndex

_ARCHIVE, _ENTRY = 1600, 280  # approximate overhead in bytes of an epoch's file, and of each tensor in it
# Settings that batch plans depend on.
PLAN_SETTINGS = (
    "mean",
    "std",
    "batch_size",
    "augmentation",
    "padding",
    "flip",
    "mixing",
    "mixing_alpha",
    "smallest_crop",
    "shuffle_cells",
    "rand_augment",
    "rand_magnitude",
    "torchvision",
)

TensorSpecs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def tensor_specs(config: ValidationConfig, images: int, classes: int) -> TensorSpecs:
    """Name, type and shape of each tensor in an epoch's file: all batches concatenated, `images` rows in total."""
    steps = len(batch_sizes(images, batch_size_of(config, images, classes)))
    parts: TensorSpecs = {"indices": (torch.int32, (images,))}
    if config.augmentation == "resized-crop":
        parts["crops"] = torch.float32, (images, 4)
    if config.augmentation == "pad-crop":
        parts["offsets"] = torch.int16, (images, 2)
    if config.augmentation != "resized-crop" and config.flip > 0:
        parts["flipped"] = torch.bool, (images,)
    if config.shuffle_cells > 1:
        parts["cells"] = torch.uint8, (images, 2, config.shuffle_cells)
    if config.rand_augment > 0:
        parts["augment_seed"] = torch.int64, (steps,)
    if config.mixing != "none":
        parts |= {"partner": (torch.int32, (images,)), "share": (torch.float64, (steps,))}
    if config.mixing == "cutmix":
        parts["box"] = torch.int16, (steps, 4)
    return {**parts, "logits": (torch.float16, (images, classes))}


def epoch_bytes(config: ValidationConfig, images: int, classes: int) -> int:
    """Approximate size of one epoch's file."""
    parts = tensor_specs(config, images, classes).values()
    return _ARCHIVE + sum(_ENTRY + dtype.itemsize * torch.Size(shape).numel() for dtype, shape in parts)


def view_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that batch plans depend on, as JSON values."""
    settings: dict[str, Any] = json.loads(json.dumps(recipe.settings("validation")))
    if recipe.validation.rand_augment > 0:
        settings["torchvision"] = importlib.metadata.version("torchvision")  # whose RandAugment makes other pixels of the same seed
    return {name: settings[name] for name in PLAN_SETTINGS if name in settings}


class LabelStore(LabelIndex):
    """Reads and writes the labels of a set, one file per epoch."""

    def write(self, number: int, plans: Sequence[BatchPlan]) -> None:
        """Write one epoch durably.

        Raises:
            InputError: a logit is beyond half precision, the disk is full, or the like.
        """
        content = _packed(plans)
        if not bool(content["logits"].isfinite().all()):
            raise InputError(
                f"the teacher's logits of epoch {number} are not finite in half precision, in which labels are stored; "
                "dwa-fast validate --teacher computes them during training, in full precision"
            )
        write_archive(self._file(number), content)
        self.written(number)

    def read(self, number: int, parts: TensorSpecs, sizes: Sequence[int], config: ValidationConfig) -> list[BatchPlan]:
        """The batch plans of one epoch.

        Args:
            parts: tensors that the file must hold. sizes: images per batch. config: the views are of.
        Raises:
            InputError: the file is missing, has changed, or holds logits that are not finite.
        """
        path = self._file(number)
        if not self.is_whole(number):
            raise InputError(f"{path} is missing or has changed since it was written; the command that made the labels makes it again")
        content = read_archive(path, "file of soft labels")
        found = {name: (value.dtype, tuple(value.shape)) for name, value in content.items()} if isinstance(content, dict) else {}
        if found != parts or not _in_range(content, sizes, config.padding):
            raise InputError(f"{path} does not hold the labels that {INDEX} says; remove the folder, and make them again")
        if not bool(content["logits"].isfinite().all()):
            raise InputError(f"{path} holds logits that are not finite; remove the folder, and make them again with a sound teacher")
        return _unpacked(content, sizes, config)

    def sampler(self, config: ValidationConfig, images: int, classes: int, *, seed: int) -> StoredSampler:
        """Gives the plans of a training of these students' settings on the set."""
        return StoredSampler(self, config, images, classes, seed=seed)

    def files_of(self, number: int) -> list[str]:
        """The file of an epoch."""
        return [self._file(number).name]

    def digest(self, number: int) -> str:
        """SHA-256 of the file of an epoch. Raises OSError if it is missing."""
        return checksum(self._file(number))

    def _file(self, number: int) -> Path:
        return self.folder / f"epoch{number:03d}.pt"


class StoredSampler:
    """Takes the plans of a training from a store.

    The first epochs take the stored ones in order. After that the stored epochs are reused, in a new random order each round.
    """

    def __init__(self, store: LabelStore, config: ValidationConfig, images: int, classes: int, *, seed: int) -> None:
        self._sizes = batch_sizes(images, batch_size_of(config, images, classes))
        self.steps = len(self._sizes)
        self._store, self._parts, self._seed, self._config = store, tensor_specs(config, images, classes), seed, config

    def epoch(self, number: int) -> list[BatchPlan]:
        """The plans of one epoch, counted from 0."""
        return self._store.read(self.entry(number), self._parts, self._sizes, self._config)

    def entry(self, number: int) -> int:
        """The stored epoch that serves as epoch `number` of the training."""
        again, place = divmod(number, self._store.epochs)
        return place if again == 0 else int(generator(self._seed, "pool", again).permutation(self._store.epochs)[place])


def _packed(plans: Sequence[BatchPlan]) -> dict[str, Tensor]:
    """Concatenate the batches, as `tensor_specs` lists them."""
    content = {"indices": torch.cat([plan.indices for plan in plans]).to(torch.int32)}
    for name in ("crops", "offsets", "flipped", "cells"):
        parts = [getattr(plan.views, name) for plan in plans]
        if parts[0] is not None:
            content[name] = torch.cat(parts)
    seeds = [plan.views.rand_augment.seed for plan in plans if plan.views.rand_augment]
    if seeds:
        content["augment_seed"] = torch.tensor(seeds, dtype=torch.int64)
    if plans[0].mix.partner is not None:
        content["partner"] = torch.cat([plan.mix.partner for plan in plans]).to(torch.int32)  # type: ignore[misc]
        content["share"] = torch.tensor([plan.mix.share for plan in plans], dtype=torch.float64)
    if plans[0].mix.box is not None:
        content["box"] = torch.tensor([plan.mix.box for plan in plans], dtype=torch.int16)
    content["logits"] = torch.cat([plan.logits for plan in plans])  # type: ignore[misc]
    return content


def _in_range(content: Mapping[str, Tensor], sizes: Sequence[int], padding: int) -> bool:
    """Whether indices, partners, crops and shares are valid."""
    counts = torch.tensor(sizes)
    limits = {"partner": counts.repeat_interleave(counts), "offsets": torch.tensor(2 * padding + 1)}
    shares, cells = content.get("share", torch.zeros(0)), content.get("cells", torch.zeros(0, 2, 1))
    return (
        torch.equal(content["indices"].sort().values, torch.arange(sum(sizes), dtype=torch.int32))
        and all(bool(((content[name] >= 0) & (content[name] < limit)).all()) for name, limit in limits.items() if name in content)
        and bool(((shares >= 0) & (shares <= 1)).all())
        and bool(content.get("crops", torch.zeros(0)).isfinite().all())
        and bool((cells.sort(2).values == torch.arange(cells.shape[2])).all())
        and bool((content.get("augment_seed", torch.zeros(0)) >= 0).all())
    )


def _unpacked(content: Mapping[str, Tensor], sizes: Sequence[int], config: ValidationConfig) -> list[BatchPlan]:
    """The inverse of `_packed`."""
    rows = {name: value.split(list(sizes)) for name, value in content.items() if name not in ("share", "box", "augment_seed")}
    plans = []
    for step in range(len(sizes)):
        own = {name: parts[step] for name, parts in rows.items()}
        mix = Mix()
        if "partner" in own:
            box = tuple(content["box"][step].tolist()) if "box" in content else None
            mix = Mix(own["partner"].to(torch.int64), float(content["share"][step]), box)
        views = Views(own.get("offsets"), own.get("flipped"), own.get("crops"), own.get("cells"))
        if "augment_seed" in content:
            drawn = RandAugment(config.rand_augment, config.rand_magnitude, int(content["augment_seed"][step]))
            views = replace(views, rand_augment=drawn)
        plans.append(BatchPlan(own["indices"].to(torch.int64), views, mix, own["logits"]))
    return plans

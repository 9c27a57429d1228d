"""Distil a whole data set: every class, every image per class, batch by batch into a folder, resuming where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwa_fast.config import InitialConfig, SynthesisConfig, check_integer
from dwa_fast.datasets import ImageSet, denormalise
from dwa_fast.errors import InputError
from dwa_fast.initial import initial_images, unseen
from dwa_fast.storage import ImageStore
from dwa_fast.synthesis import Batch, Synthesizer, count_all

Progress = Callable[[int, int], None]  # called with the iterations finished and the iterations in all


@dataclass(frozen=True)
class WorkItem:
    """One batch: image `index` of each of these classes."""

    number: int  # picks the random streams
    index: int
    labels: list[int]


def work_list(classes: int, ipc: int, batch_size: int) -> list[WorkItem]:
    """All batches, image index by image index; a larger ipc begins with the items of a smaller one."""
    chunks = [list(range(start, min(start + batch_size, classes))) for start in range(0, classes, batch_size)]
    return [WorkItem(index * len(chunks) + number, index, labels) for index in range(ipc) for number, labels in enumerate(chunks)]


def distill(
    teacher: nn.Module,
    data: ImageSet,
    config: SynthesisConfig,
    *,
    ipc: int,
    output: Path,
    initial: InitialConfig | None = None,
    seed: int = 0,
    origin: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write `ipc` images of every class of `data` into `output`; images that are there already are kept.

    Args:
        teacher: as for `synthesize`; with as many classes as the data.
        ipc: images per class, at least 1.
        initial: which initial images; default: a seeded sample of the real ones.
        origin: what else the images depend on (teacher's checksum, recipe); kept in the manifest.
        progress: called with the iterations finished and the iterations in all; kept items count as finished.
    Returns:
        the number of images that this call made.
    Raises:
        InputError: as `synthesize`; or a class has fewer than ipc images, or the folder holds a set of other settings.
    """
    check_integer("ipc", ipc, 1)
    classes = len(data.class_names)
    start = initial_images(data, config, initial or InitialConfig(), ipc=ipc, seed=seed)
    run = Synthesizer(teacher, unseen(data), config)
    if run.classes != classes:
        raise InputError(f"teacher knows {run.classes} classes, the data have {classes}")
    settings = {**asdict(config), **run.execution.describe(), **start.settings, "seed": seed, **(origin or {})}
    del settings["concurrent_batches"]  # changes how fast, not what
    store = ImageStore(output, settings, data.class_names)
    start.skipped.update(store.skipped)
    items = work_list(classes, ipc, config.batch_size)
    missing = [item for item in items if not all(store.has(label, item.index) for label in item.labels)]
    total, kept = len(items) * config.iterations, (len(items) - len(missing)) * config.iterations
    if progress:
        progress(kept, total)
    for first in range(0, len(missing), config.concurrent_batches):
        group = missing[first : first + config.concurrent_batches]
        tick = count_all(progress, kept + first * config.iterations, len(group), total)
        batches = [Batch(item.number, start.load(item.labels, item.index), torch.tensor(item.labels)) for item in group]
        store.skipped.update(start.skipped)
        results = run.run(batches, seed=seed, progress=tick)
        for item, (refined, _) in zip(group, results, strict=True):
            store.write(denormalise(refined, config), item.labels, item.index)
    store.finish()
    return sum(len(item.labels) for item in missing)

"""Distil a whole data set: every class, every image per class, batch by batch into a folder, resuming where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dwa_fast.config import SynthesisConfig, check_integer
from dwa_fast.datasets import ImageSet, denormalise, normalise
from dwa_fast.errors import InputError
from dwa_fast.initial import sample
from dwa_fast.storage import ImageStore
from dwa_fast.synthesis import Synthesizer

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
    seed: int = 0,
    origin: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write `ipc` images of every class of `data` into `output`; images that are there already are kept.

    Args:
        teacher: as for `synthesize`; with as many classes as the data.
        ipc: images per class, at least 1.
        origin: what else the images depend on (teacher's checksum, recipe); kept in the manifest.
        progress: called with the iterations finished and the iterations in all; kept items count as finished.
    Returns:
        the number of images that this call made.
    Raises:
        InputError: as `synthesize`; or a class has fewer than ipc images, or the folder holds a set of other settings.
    """
    check_integer("ipc", ipc, 1)
    classes = len(data.class_names)
    members = [sample(data, label, ipc, seed=seed) for label in range(classes)]
    run = Synthesizer(teacher, normalise(data.load([0]), config), config)
    if run.classes != classes:
        raise InputError(f"teacher knows {run.classes} classes, the data have {classes}")
    settings = {**asdict(config), **run.execution.describe(), "seed": seed, **(origin or {})}
    store = ImageStore(output, settings, data.class_names)
    items = work_list(classes, ipc, config.batch_size)
    total, made = len(items) * config.iterations, 0
    for done, item in enumerate(items):
        before = done * config.iterations
        if not all(store.has(label, item.index) for label in item.labels):
            chosen = [members[label][item.index] for label in item.labels]
            images = normalise(data.load(chosen), config)

            def tick(iteration: int, before: int = before) -> None:
                if progress:
                    progress(before + iteration, total)

            refined, _ = run.batch(images, data.labels[chosen], seed=seed, number=item.number, progress=tick)
            store.write(denormalise(refined, config), item.labels, item.index)
            made += len(item.labels)
        if progress:
            progress(before + config.iterations, total)
    store.finish()
    return made

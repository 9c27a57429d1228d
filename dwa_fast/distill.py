"""Distil a whole data set: every class, every image per class, batch by batch into a folder, resuming where it stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwa_fast.config import InitialConfig, StorageConfig, SynthesisConfig, check_integer
from dwa_fast.datasets import ImageSet, denormalise
from dwa_fast.errors import InputError
from dwa_fast.initial import initial_images, unseen
from dwa_fast.storage import MANIFEST, ImageStore, WorkItem, read_manifest, to_levels
from dwa_fast.synthesis import Batch, Synthesizer, count_all

_MOST_THREADS = 1024  # a manifest that asks for more is not ours

Progress = Callable[[int, int], None]  # called with the iterations finished and the iterations in all


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
    form: StorageConfig | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write `ipc` images of every class of `data` into `output`; images that are there already are kept.

    Args:
        teacher: as for `synthesize`; with as many classes as the data.
        ipc: images per class, at least 1.
        initial: which initial images; default: a seeded sample of the real ones.
        origin: what else the images depend on (teacher's checksum, recipe); kept in the manifest.
        form: how images and losses are written.
        threads: CPU threads to compute with, at least 1, on which the last bits depend where the device is a CPU. None: those that the
            set in the folder was begun with; for a new set, as many as PyTorch would take.
        progress: called with the iterations finished and the iterations in all; kept items count as finished.
    Returns:
        the number of images that this call made.
    Raises:
        InputError: as `synthesize`; or a class has fewer than ipc images, or the folder holds a set of other settings.
    """
    check_integer("ipc", ipc, 1)
    if threads is not None:
        check_integer("threads", threads, 1)
    classes = len(data.class_names)
    start = initial_images(data, config, initial or InitialConfig(), ipc=ipc, seed=seed)
    run = Synthesizer(teacher, unseen(data), config)
    if run.classes != classes:
        raise InputError(f"teacher knows {run.classes} classes, the data have {classes}")
    settings = {**asdict(config), **run.execution.describe(), **start.settings, "seed": seed, "image_shape": list(data.image_shape)}
    settings |= {"real_images": len(data.labels), **(origin or {})}
    del settings["concurrent_batches"]  # changes how fast, not what
    if run.execution.device.type == "cpu":
        settings["threads"] = threads = threads or _begun_with(output) or torch.get_num_threads()
    items = work_list(classes, ipc, config.batch_size)
    with _computing(threads), contextlib.closing(ImageStore(output, settings, data.class_names, form)) as store:
        start.skipped.update(store.skipped)
        missing = store.unfinished(items)
        if missing:
            store.begin()
        total, kept = len(items) * config.iterations, (len(items) - len(missing)) * config.iterations
        if progress:
            progress(kept, total)
        for first in range(0, len(missing), config.concurrent_batches):
            group = missing[first : first + config.concurrent_batches]
            tick = count_all(progress, kept + first * config.iterations, len(group), total)
            batches = [Batch(item.number, start.load(item.labels, item.index), torch.tensor(item.labels)) for item in group]
            results = run.run(batches, seed=seed, progress=tick)
            for item, (refined, losses) in zip(group, results, strict=True):
                store.write(item, to_levels(denormalise(refined, config)), losses.cpu(), dict(start.skipped))
        store.finish(items)
    return sum(len(item.labels) for item in missing)


def _begun_with(output: Path) -> int | None:
    """CPU threads that the set in a folder is computed with, if there is one."""
    threads = read_manifest(output)["settings"].get("threads") if (output / MANIFEST).exists() else None
    return threads if type(threads) is int and 0 < threads <= _MOST_THREADS else None


@contextlib.contextmanager
def _computing(threads: int | None) -> Iterator[None]:
    """Inside, PyTorch computes with that many CPU threads; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

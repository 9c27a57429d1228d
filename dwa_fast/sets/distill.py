"""Distil a whole data set: every class, every image per class, batch by batch into a folder, resuming where it stopped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from dwa_fast.config import InitialConfig, StorageConfig, SynthesisConfig, check_integer
from dwa_fast.data.datasets import ImageSet
from dwa_fast.data.initial import initial_images, unseen
from dwa_fast.data.manifest import read_manifest
from dwa_fast.data.set_layout import is_set
from dwa_fast.data.teacher_check import check_teacher
from dwa_fast.engine.synthesis import Synthesizer
from dwa_fast.errors import InputError
from dwa_fast.models.wrappers import Output
from dwa_fast.sets.preview import Preview
from dwa_fast.sets.production import Line, Observer, Progress
from dwa_fast.sets.store import ImageStore, WorkItem
from dwa_fast.sets.tracking import tracked
from dwa_fast.sets.workers import Shard, StoreLostError, Workers, rank, threads_alone
from dwa_fast.threads import computing, recorded_threads


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
    output: str | Path,
    initial: InitialConfig | None = None,
    seed: int = 0,
    origin: Mapping[str, Any] | None = None,
    form: StorageConfig | None = None,
    threads: int | None = None,
    logits: str | int | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
    observer: Observer | None = None,
    try_teacher: bool = True,
) -> int:
    """Write `ipc` images of every class of `data` into `output`; images that are there already are kept.

    Args:
        teacher: as for `synthesize`; with as many classes as the data.
        ipc: images per class, at least 1.
        initial: which initial images; default: a seeded sample of the real ones.
        origin: what else the images depend on (teacher's checksum, recipe); kept in the manifest.
        form: how images and losses are written.
        threads: CPU threads to compute with, at least 1, on which the last bits depend where the device is a CPU. None: those that the
            set in the folder was begun with; for a new set, as many as PyTorch takes in a process alone.
        logits: which of several outputs of the teacher are the logits, as `output` of `synthesize`.
        workers: who else makes the set, and what is left for this process; default: nobody, and everything.
        progress: called with the iterations finished and the iterations in all; kept items count as finished.
        observer: called with each batch that is on the disk and its recorded losses, in another thread.
        try_teacher: whether the teacher first predicts some of the images, so that one that knows nothing of them is warned of.
    Returns:
        the number of images that this call made.
    Raises:
        InputError: as `synthesize`; or a class has fewer than ipc images, one of the initial images cannot be decoded, the folder holds a
            set of other settings or cannot be written.
    """
    output = Path(output)
    check_integer("ipc", ipc, 1)
    if threads is not None:
        check_integer("threads", threads, 1)
    classes = len(data.class_names)
    start = initial_images(data, config, initial or InitialConfig(), ipc=ipc, seed=seed)
    items = work_list(classes, ipc, config.batch_size)
    chosen = teacher if logits is None else Output(teacher, logits)
    run = Synthesizer(chosen, unseen(data), config, batch_sizes=sorted({len(item.labels) for item in items}))
    if run.classes != classes:
        raise InputError(f"teacher knows {run.classes} classes, the data have {classes}")
    settings = {**asdict(config), **run.execution.describe(), **start.settings, "seed": seed, "image_shape": list(data.image_shape)}
    settings |= {"real_images": len(data.labels), **(origin or {})}
    del settings["concurrent_batches"]  # changes how fast, not what

    def opened() -> ImageStore:
        if run.execution.device.type == "cpu":
            settings["threads"] = threads or _begun_with(output) or threads_alone()
        return ImageStore(output, settings, data.class_names, form)

    surveyed: list[tuple[ImageStore, int]] = []  # the set and its number of missing batches, where this process has looked

    def survey() -> list[int]:
        store = opened()
        missing = store.unfinished(items)
        if missing:
            store.begin()
        surveyed.append((store, len(missing)))
        return [item.number for item in missing]

    with workers or Shard() as team:
        todo = team.begin(survey)
        store, missing = surveyed[0] if surveyed else (opened(), len(todo))
        start.skipped.update(store.skipped)
        with computing(store.settings.get("threads")):
            line = Line(run, start, store, team, items, seed=seed)
            if todo:
                start.check(_last_indices(items[number] for number in todo))
                if try_teacher and rank() == 0:
                    check_teacher(run.logits, data, config)
            line.kept, line.todo, line.progress = len(items) - missing, len(todo), progress
            line.preview = Preview(store, data.image_shape, ipc) if store.storage.preview else None
            with tracked(store.storage.track, store.folder, store.settings) as trackers:
                line.observers = [*trackers, *([observer] if observer else [])]
                made = line.produce()
            _finish(team, line, output)
    return made


def _last_indices(items: Iterable[WorkItem]) -> dict[int, int]:
    """For each class of these batches, the last of its images in them."""
    last: dict[int, int] = {}
    for item in items:
        last |= {label: max(item.index, last.get(label, 0)) for label in item.labels}
    return last


def _finish(team: Workers, line: Line, output: Path) -> None:
    """Complete the set; where the store of the workers ended with the worker that did it, that is as well."""
    try:
        team.finish(line.complete)
    except StoreLostError:
        if not read_manifest(output)["complete"]:
            raise


def _begun_with(output: Path) -> int | None:
    """CPU threads that the set in a folder is computed with, if there is one."""
    return recorded_threads(read_manifest(output)["settings"]) if is_set(output) else None

"""Distil a whole data set into a folder: every class, every image per class, batch by batch. The same call resumes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwa_fast.config import InitialConfig, Progress, StorageConfig, SynthesisConfig, check_integer, plain
from dwa_fast.data.digest import image_digest
from dwa_fast.data.images import FileSet, ImageSet, check_image_set, check_shape
from dwa_fast.data.initial import InitialImages, initial_images, probe_image
from dwa_fast.data.manifest import read_manifest
from dwa_fast.data.pixels import denormalise, to_levels
from dwa_fast.data.set_layout import MANIFEST, is_set, refuse_class_folders, set_folder
from dwa_fast.data.teacher_check import warn_if_inaccurate
from dwa_fast.engine.class_statistics import ClassStatistics, aims, class_statistics
from dwa_fast.engine.synthesis import Batch, Synthesizer
from dwa_fast.engine.turns import warn_of_idle_teachers
from dwa_fast.errors import InputError
from dwa_fast.models.checkpoint import weight_digest
from dwa_fast.models.wrappers import listed, unwrapped
from dwa_fast.recipes import Recipe, check_recipe
from dwa_fast.schedule import refined_counts
from dwa_fast.sets.background import BackgroundWriter, Prefetcher
from dwa_fast.sets.loss_log import LOSSES, Rows
from dwa_fast.sets.preview import Preview
from dwa_fast.sets.store import BATCH_FILES, BatchSpec, ImageStore
from dwa_fast.sets.tracking import tracked
from dwa_fast.sets.workers import Shard, Workers, default_threads, rank
from dwa_fast.threads import recorded_threads, torch_threads

log = logging.getLogger("dwa_fast")

Observer = Callable[[BatchSpec, Rows], None]  # called with a batch that is on the disk, and the losses that are kept of it

_WAITING = 4  # batches that may wait to be written, for each of config.concurrent_batches


def batch_specs(classes: int, ipc: int, batch_size: int, batch_ipc: int = 1) -> list[BatchSpec]:
    """All batches, image index by image index; the list of a larger ipc starts with that of a smaller one.

    Args:
        batch_size: most images of a batch; a batch has at least one class.
        batch_ipc: images of each class in a batch.
    Raises:
        InputError: ipc is no multiple of batch_ipc.
    """
    if ipc % batch_ipc:
        raise InputError(f"ipc must be a multiple of batch_ipc, which is {batch_ipc}, got {ipc}")
    step = max(1, batch_size // batch_ipc)
    chunks = [list(range(start, min(start + step, classes))) for start in range(0, classes, step)]
    starts = [(index, chunk) for index in range(0, ipc, batch_ipc) for chunk in chunks]
    return [BatchSpec(number, index, chunk * batch_ipc) for number, (index, chunk) in enumerate(starts)]


def distill(
    teacher: nn.Module | Sequence[nn.Module],
    data: ImageSet,
    recipe: Recipe,
    *,
    ipc: int,
    output: str | Path,
    initial: InitialConfig | None = None,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    teacher_info: Sequence[Mapping[str, Any]] = (),
    storage: StorageConfig | None = None,
    threads: int | None = None,
    logits: str | int | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
    measuring: Progress | None = None,
    observer: Observer | None = None,
    try_teacher: bool = True,
) -> int:
    """Write `ipc` images of every class of `data` into `output`; undamaged images that are already there stay.

    Args:
        teacher: one or several, as for `synthesize`; with as many classes as the data. The first of several chooses initial patches.
        recipe: settings of the synthesis, mean and std.
        ipc: images per class, at least 1.
        initial: which initial images; default: a seeded sample of the real ones.
        provenance: what else the images depend on (recipe, checksums of the teachers' files as "teacher"; by default those of their
            weights); written into the manifest.
        teacher_info: architecture and accuracy of each teacher, if they are known; written into the manifest for its readers.
        storage: how images and losses are written.
        threads: CPU threads to compute with, at least 1; the last bits depend on it where the device is a CPU. None: those that the
            set in the folder was started with; for a new set, as many as PyTorch takes in a single process.
        logits: which of several outputs of the teacher are the logits, as for `synthesize`.
        workers: which batches this process makes; default: all.
        progress: called with the iterations finished and the iterations in all; batches that are already there count as finished.
        measuring: called before the first batch, where the teachers look at real images: with the classes whose patches or median images
            are chosen, and all of them; with `statistics="class"`, with the images that have passed through, and those that will.
        observer: called in another thread with each batch that is on the disk and the losses that are kept of it.
        try_teacher: whether the teacher first predicts some of the images, to warn of one that does not fit them.
    Returns:
        the number of images that this call made.
    Raises:
        TypeError: data or recipe are of the wrong type.
        InputError: as `synthesize` and `class_statistics`; or ipc is no multiple of batch_ipc, a class has fewer than ipc images, one of
            the initial images cannot be decoded, the folder holds a set of other settings or cannot be written.
    """
    ipc, seed = plain(ipc), plain(seed)
    check_integer("ipc", ipc, 1)
    check_integer("seed", seed, 0)
    initial, storage = initial or InitialConfig(), storage or StorageConfig()
    for name, value, kind in (("initial", initial, InitialConfig), ("storage", storage, StorageConfig)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
    check_image_set(data)
    check_recipe(recipe)
    check_shape(data, recipe.data)
    whole_classes = recipe.synthesis.batch_ipc is None
    recipe = replace(recipe, synthesis=replace(recipe.synthesis, batch_ipc=recipe.synthesis.batch_ipc or ipc))
    config, output, workers = recipe.synthesis, Path(output), workers or Shard()
    if isinstance(data, FileSet):
        refuse_class_folders(output, data.folder)
    if threads is not None:
        check_integer("threads", threads, 1)
    classes = len(data.class_names)
    batches = _plan(config, classes, ipc)
    sizes = sorted({count for batch in batches for count in refined_counts(batch.labels, config.rounds)})
    synthesizer = Synthesizer(listed(teacher, logits), probe_image(data), config, recipe.data, batch_sizes=sizes)
    if synthesizer.classes != classes:
        raise InputError(f"teacher knows {synthesizer.classes} classes, the data have {classes}")
    images = initial_images(data, recipe, initial, ipc=ipc, seed=seed, predict=synthesizer.logits)
    folder = set_folder(output)
    if whole_classes and is_set(folder) and (before := read_manifest(folder)["settings"].get("batch_ipc", 1)) != ipc:
        raise InputError(
            f"{output} holds a set with {before} images of a class in a batch; batches of all images of a class cannot go on with it "
            f"for ipc {ipc}; choose another folder"
        )
    settings = {**recipe.settings("synthesis"), **synthesizer.execution.describe(), **images.settings, "seed": seed}
    settings |= {"image_shape": list(data.image_shape), "real_images": len(data.labels), **(provenance or {})}
    settings["real_images_digest"] = _digest_for(folder, data)
    if "teacher" not in settings:
        digests = [weight_digest(unwrapped(each)) for each in listed(teacher)]
        settings["teacher"] = digests[0] if len(digests) == 1 else digests
    del settings["concurrent_batches"]  # changes the speed only
    if synthesizer.execution.device.type == "cpu":
        settings["threads"] = threads or _threads_of(folder) or default_threads()
    if config.iterations == 0:  # and so no losses
        storage = replace(storage, losses_every=0)
    store = ImageStore(output, settings, data.class_names, storage, teacher_info)
    images.skipped.update(store.skipped)
    preview = Preview(store, data.image_shape, ipc) if store.storage.preview else None
    share = workers.share(batches)
    missing = store.unfinished(share)
    needed = _last_indices(missing)
    statistics: list[ClassStatistics] = []
    with synthesizer, torch_threads(store.settings.get("threads")), tracked(store.storage.track, store.folder, store.settings) as trackers:
        if missing:
            if rank() == 0 and (lost := store.without_losses(missing)):
                log.warning(
                    "%s lacks the lines of %d of %d batches, which are made again with their images; put back, it saves this work",
                    *(store.folder / LOSSES, len(lost), len(batches)),
                )
            store.begin()
            images.check(needed, measuring)
            if rank() == 0:
                each = config.batch_ipc or ipc
                warn_of_idle_teachers(config, len(listed(teacher)), ipc // each, f"ipc {ipc} in batches of {each} images of a class")
            if try_teacher and rank() == 0:
                for predict in synthesizer.predictors:
                    warn_if_inaccurate(predict, data, recipe.data)
        if missing and config.matches_class:
            skipped = images.skipped if initial.skip_bad_images else None
            statistics = class_statistics(teacher, data, recipe, classes=sorted(needed), logits=logits, skipped=skipped, progress=measuring)
        observers: list[Observer] = [*trackers, *([observer] if observer else [])]
        builder = SetBuilder(synthesizer, images, store, statistics, preview, observers, seed)
        made = builder.run(workers.take(missing), missing, len(share), progress)
    others_done = workers.others_done()
    if others_done is False:  # they complete the set
        return made
    left = store.finish(batches)
    if left and others_done:
        raise InputError(
            f"{store.folder}: files of {len(left)} batches were damaged or removed meanwhile; the same command makes them again"
        )
    if preview:
        preview.draw()
    return made


@dataclass(frozen=True)
class SetBuilder:
    """Makes batches of a set: initial images are read, batches refined and results written at the same time."""

    synthesizer: Synthesizer
    initial_images: InitialImages
    store: ImageStore
    statistics: Sequence[ClassStatistics]  # of each teacher, where batches are matched with their class; else empty
    preview: Preview | None
    observers: Sequence[Observer]
    seed: int

    def run(self, batches: Iterator[BatchSpec], missing: Sequence[BatchSpec], total: int, progress: Progress | None) -> int:
        """Make the batches; returns the number of images.

        Args:
            batches: handed out one after the other.
            missing: all batches that are missing, of which this process may make only some.
            total: how many batches there are with those that are not missing.
            progress: as of `distill`.
        """
        config, made = self.synthesizer.config, 0
        each = max(1, config.iterations)
        iterations = total * each
        finished = {batch.number: place * each for place, batch in enumerate(missing, total - len(missing))}
        if progress:
            progress((total - len(missing)) * each, iterations)
        with Prefetcher(partial(self._load, batches)) as prefetcher, BackgroundWriter(_WAITING * config.concurrent_batches) as writer:
            while group := prefetcher.take():

                def tick(done: int, before: int = finished[group[0][0].number], concurrent: int = len(group)) -> None:
                    writer.check()
                    if 2 * done >= each:  # not earlier: other workers may be free for a batch before this one is
                        prefetcher.begin()
                    if progress:
                        progress(min(before + concurrent * done, iterations), iterations)

                results = self.synthesizer.run([batch for _, batch in group], seed=self.seed, progress=tick)
                for (spec, _), (refined, losses) in zip(group, results, strict=True):
                    writer.submit(partial(self._write, spec, to_levels(denormalise(refined, self.synthesizer.normalisation)), losses.cpu()))
                    made += len(spec.labels)
        return made

    def _load(self, batches: Iterator[BatchSpec]) -> list[tuple[BatchSpec, Batch]]:
        """The next concurrent batches with their initial images; empty when there are no more."""
        group = islice(batches, self.synthesizer.config.concurrent_batches)
        each = self.synthesizer.config.batch_ipc or 1
        return [(spec, self._batch(spec, each)) for spec in group]

    def _batch(self, spec: BatchSpec, each: int) -> Batch:
        aimed = aims(self.statistics, spec.labels) if self.statistics else []
        return Batch(spec.number, self.initial_images.load(spec.images), torch.tensor(spec.labels), spec.index // each, aimed)

    def _write(
        self,
        batch: BatchSpec,
        levels: Tensor,  # [n, C, H, W] uint8 on the CPU
        losses: Tensor,  # [T, 3] on the CPU
    ) -> None:
        rows = self.store.write(batch, levels, losses, dict(self.initial_images.skipped))
        if self.preview and self.preview.shows(batch):
            self.preview.draw()
        for observer in self.observers:
            observer(batch, rows)


def _plan(config: SynthesisConfig, classes: int, ipc: int) -> list[BatchSpec]:
    """All batches of a set; where they are matched with their class, a batch has a single one.

    Raises:
        InputError: ipc is no multiple of batch_ipc, or batches that are to match their class would have a single image of it.
    """
    each = config.batch_ipc or ipc
    if config.matches_class and each == 1 < ipc:
        raise InputError("statistics 'class' are those of several images of one class; set batch_ipc to more than 1, or to None for all")
    return batch_specs(classes, ipc, each if config.matches_class else config.batch_size, each)


def _threads_of(folder: Path) -> int | None:
    """The CPU threads that the set in the folder was started with; None where there is none."""
    return recorded_threads(read_manifest(folder)["settings"]) if is_set(folder) else None


def _last_indices(batches: Iterable[BatchSpec]) -> dict[int, int]:
    """For each class of these batches, the last of its images in them."""
    last: dict[int, int] = {}
    for batch in batches:
        for label, index in batch.images:
            last[label] = max(index, last.get(label, 0))
    return last


def _digest_for(folder: Path, data: ImageSet) -> str:
    """Checksum of the real images; that of the set in the folder where only files that it skips may have been repaired since."""
    now = image_digest(data)
    if not is_set(folder):
        return now
    manifest = read_manifest(folder)
    before = str(manifest["settings"].get("real_images_digest", now))
    if before != now and manifest["skipped"]:
        log.warning("%s: real images have changed since the set was begun; only those that it skips may have been repaired", folder)
        return before
    empty = not manifest["images"] and not any(folder.glob(BATCH_FILES))
    if before != now and empty:  # an image may have been repaired so that it can begin
        (folder / MANIFEST).unlink()
    return now

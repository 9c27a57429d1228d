"""Relabel: the teacher's soft labels for every view of a training, kept on disk, so that students need no teacher."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dwa_fast.config import Progress, ValidationConfig, check_integer
from dwa_fast.data.datasets import ImageSet
from dwa_fast.data.loader import Lessons, Pixels, RandomDraws
from dwa_fast.errors import InputError
from dwa_fast.models.finite import check_logits
from dwa_fast.seeding import derive
from dwa_fast.threads import THREADS, computing, recorded_threads, threads_of
from dwa_fast.training.fit import check_set, check_teaching, repeatable, seeded_layers, teaching
from dwa_fast.training.label_store import LabelStore, epoch_bytes, view_settings
from dwa_fast.training.state import image_digest, weight_digest


def kept_epochs(config: ValidationConfig, pool: int) -> int:
    """Epochs whose labels are kept: all, or one in `pool`.

    Raises:
        InputError: pool is not an integer ≥ 1.
    """
    check_integer("pool", pool, 1)
    return -(-config.epochs // pool)


def label_bytes(config: ValidationConfig, images: int, classes: int, pool: int = 1) -> int:
    """What the labels of a set take on disk, about."""
    return kept_epochs(config, pool) * epoch_bytes(config, images, classes)


def relabel(
    distilled: ImageSet,
    teacher: nn.Module,
    config: ValidationConfig,
    *,
    output: str | Path,
    device: str | torch.device,
    seed: int = 0,
    pool: int = 1,
    progress: Progress | None = None,
) -> LabelStore:
    """Write the soft labels of the first student that `validate` would train with this configuration and seed.

    Args:
        teacher: copied, never changed.
        config: views, mixes, batches, epochs and the teacher's mode; the rest is not used.
        output: folder for the labels; the same call goes on where it was stopped, to the same bits.
        pool: keep one epoch in so many, which students then use again and again.
        progress: called with the batches done and the batches in all.
    Raises:
        InputError: the folder holds other labels, the disk is too small, or the teacher gives no finite logits of the set's classes.
    """
    output, device = Path(output), torch.device(device)
    check_set(distilled, "distilled images")
    check_teaching(teacher, distilled, config, device)
    classes = len(distilled.class_names)
    settings = {
        **view_settings(config),
        "teacher_mode": config.teacher_mode,
        "images": image_digest(distilled),
        "teacher": weight_digest(teacher),
        "classes": classes,
        "seed": seed,
        THREADS: threads_of(device),
    }
    store = LabelStore.create(output, settings, kept_epochs(config, pool))
    missing = store.missing
    needed, free = len(missing) * epoch_bytes(config, len(distilled.labels), classes), shutil.disk_usage(output).free
    if needed > free:
        raise InputError(f"{output} has {free / 2**30:.3g} GiB left, but the labels need {needed / 2**30:.3g} GiB; --pool keeps fewer")
    own = derive(seed, "student", 0)
    lessons = Lessons(Pixels(distilled, device, config.memory_limit), RandomDraws(distilled, config, seed=own), config)
    threads = recorded_threads(store.settings)
    teach, done = teaching(teacher, config.teacher_mode, device), (store.wanted - len(missing)) * lessons.steps
    for epoch in missing:
        draws = []
        with seeded_layers(derive(own, "dropout", epoch), device), repeatable(), computing(threads):
            for lesson in lessons.epoch(epoch):
                draws.append(replace(lesson.draw, logits=check_logits(teach(lesson), "teacher", classes).half().cpu()))
                done += 1
                if progress:
                    progress(done, store.wanted * lessons.steps)
        store.write(epoch, draws)
    return store

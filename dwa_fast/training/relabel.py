"""Relabel: store the teacher's soft labels of every augmented batch, so that students can be trained without the teacher."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dwa_fast.config import Progress, ValidationConfig, check_integer
from dwa_fast.data.datasets import ImageSet
from dwa_fast.data.digest import image_digest
from dwa_fast.data.loader import ImageCache, RandomSampler, TrainingLoader
from dwa_fast.engine.memory import kept_memory
from dwa_fast.errors import InputError
from dwa_fast.models.finite import check_logits
from dwa_fast.recipes import Recipe
from dwa_fast.seeding import derive
from dwa_fast.threads import THREADS, threads_of
from dwa_fast.training.fit import (
    as_teachers,
    check_label_teacher,
    check_set,
    label_precision,
    repeatable,
    resolve_precision,
    seeded_layers,
    teacher_labels,
    teacher_settings,
    with_batch_size,
)
from dwa_fast.training.label_store import LabelStore, epoch_bytes, view_settings


def stored_epochs(config: ValidationConfig, pool: int) -> int:
    """Number of epochs whose labels are stored: ⌈epochs / pool⌉.

    Raises:
        InputError: pool is not an integer ≥ 1.
    """
    check_integer("pool", pool, 1)
    return -(-config.epochs // pool)


def label_bytes(config: ValidationConfig, images: int, classes: int, pool: int = 1) -> int:
    """Approximate size of the labels of a set on disk."""
    return stored_epochs(config, pool) * epoch_bytes(config, images, classes)


def relabel(
    distilled: ImageSet,
    teacher: nn.Module | Sequence[nn.Module],
    recipe: Recipe,
    *,
    output: str | Path,
    device: str | torch.device,
    seed: int = 0,
    pool: int = 1,
    progress: Progress | None = None,
) -> LabelStore:
    """Write the soft labels of the first student that `validate` would train with this recipe and seed.

    Args:
        teacher: one, or several whose mean logits are stored; copied, never changed.
        recipe: mean and std; of the validation augmentation, mixing, batch size, epochs, precision and teacher mode. No other field is
            used.
        output: folder of the labels. The same call resumes an interrupted run and gives the same bits.
        pool: store the labels of one epoch in `pool`; students reuse them.
        progress: called with the finished batches and the total.
    Raises:
        InputError: the folder holds labels of other settings, the disk has too little space, or the teacher gives no finite logits of the
            set's classes.
    """
    check_set(distilled, "distilled images")
    recipe, output, device = with_batch_size(recipe, distilled), Path(output), torch.device(device)
    config, teachers = recipe.validation, as_teachers(teacher)
    for each in teachers:
        check_label_teacher(each, distilled, recipe, device)
    classes = len(distilled.class_names)
    settings = {
        **view_settings(recipe),
        "teacher_mode": config.teacher_mode,
        "images": image_digest(distilled),
        **teacher_settings(teachers, config),
        **label_precision(resolve_precision(config.precision, device)),
        "classes": classes,
        "seed": seed,
        THREADS: threads_of(device),
    }
    store = LabelStore.create(output, settings, stored_epochs(config, pool))
    missing = store.missing
    needed, free = len(missing) * epoch_bytes(config, len(distilled.labels), classes), shutil.disk_usage(output).free
    if needed > free:
        raise InputError(f"{output} has {free / 2**30:.3g} GiB left, but the labels need {needed / 2**30:.3g} GiB; --pool keeps fewer")
    own = derive(seed, "student", 0)
    sampler = RandomSampler(distilled, config, seed=own)
    loader = TrainingLoader(ImageCache(distilled, device, config.memory_limit), sampler, recipe.data, config.padding)
    soft_labels = teacher_labels(teachers, config, distilled.image_shape, device)
    done = (store.epochs - len(missing)) * loader.steps
    for epoch in missing:
        plans = []
        with seeded_layers(derive(own, "dropout", epoch), device), repeatable(), kept_memory(device):
            for batch in loader.epoch(epoch):
                plans.append(replace(batch.plan, logits=check_logits(soft_labels(batch), "teacher", classes).half().cpu()))
                done += 1
                if progress:
                    progress(done, store.epochs * loader.steps)
        store.write(epoch, plans)
    return store

"""Relabel: store the teacher's soft labels of every augmented batch, so that students can be trained without the teacher."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwa_fast.config import FkdConfig, Progress, ValidationConfig, check_integer, plain
from dwa_fast.data.digest import image_digest
from dwa_fast.data.images import ImageSet, check_image_set, check_shape
from dwa_fast.data.loader import ImageCache, RandomSampler, TrainingLoader
from dwa_fast.engine.backend import own_defaults, repeatable, resolve_device
from dwa_fast.engine.memory import kept_memory
from dwa_fast.errors import InputError
from dwa_fast.models.finite import check_logits
from dwa_fast.recipes import Recipe, check_recipe
from dwa_fast.seeding import derive, seeded_layers
from dwa_fast.threads import THREADS, threads_of
from dwa_fast.training.fit import (
    as_teachers,
    check_label_teacher,
    check_set,
    label_precision,
    resolve_precision,
    teacher_labels,
    teacher_settings,
    with_batch_size,
)
from dwa_fast.training.fkd_store import FkdPlans, FkdStore, fkd_bytes
from dwa_fast.training.label_index import LabelIndex
from dwa_fast.training.label_store import LabelStore, epoch_bytes, view_settings


def stored_epochs(config: ValidationConfig, pool: int) -> int:
    """Number of epochs whose labels are stored: ⌈epochs / pool⌉.

    Raises:
        InputError: pool is not an integer ≥ 1.
    """
    check_integer("pool", pool, 1)
    return -(-config.epochs // pool)


def label_bytes(config: ValidationConfig, images: int, classes: int, pool: int = 1, fkd: FkdConfig | None = None) -> int:
    """Approximate size of the labels of a set on disk."""
    return fkd_bytes(config, fkd, images, classes) if fkd else stored_epochs(config, pool) * epoch_bytes(config, images, classes)


@own_defaults()
def relabel(
    distilled: ImageSet,
    teacher: nn.Module | Sequence[nn.Module],
    recipe: Recipe,
    *,
    output: str | Path,
    device: str | torch.device | None = None,
    seed: int = 0,
    pool: int = 1,
    fkd: FkdConfig | None = None,
    progress: Progress | None = None,
) -> LabelIndex:
    """Write the soft labels of the first student that `validate` would train with this recipe and seed, or FKD files for other programs.

    Args:
        teacher: one, or several whose mean logits are stored; copied, never changed.
        recipe: mean and std; of the validation augmentation, mixing, batch size, epochs, precision and teacher mode. No other field is
            used.
        output: folder of the labels. The same call resumes an interrupted run and gives the same bits.
        device: "auto", "cpu", "cuda", "cuda:1", …; default: the recipe's.
        pool: store the labels of one epoch in `pool`; students reuse them.
        fkd: write FKD files below `output/fkd`, of other random views than `validate` would draw; None: our own layout.
        progress: called with the finished batches and the total.
    Returns:
        the folder's index, which `validate` opens by itself.
    Raises:
        InputError: the folder holds labels of other settings, or of more epochs than this pool has, the disk has too little space, the
            teacher gives no finite logits of the set's classes, or FKD files cannot hold such views.
    """
    seed, pool = plain(seed), plain(pool)
    check_integer("seed", seed, 0)
    check_image_set(distilled, "distilled")
    check_recipe(recipe)
    check_shape(distilled, recipe.data)
    check_set(distilled, "distilled images")
    recipe, output, device = with_batch_size(recipe, distilled), Path(output), resolve_device(str(device or recipe.synthesis.device))
    config, teachers = recipe.validation, as_teachers(teacher)
    if not teachers:
        raise InputError("soft labels come from a teacher, got None")
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
    own = derive(seed, "student", 0)
    store: LabelStore | FkdStore
    sampler: RandomSampler | FkdPlans
    if fkd:
        sampler = FkdPlans(distilled, config, fkd, seed=own)
        store = FkdStore.of(output, {**settings, **_fkd_settings(config, fkd, pool)}, sampler)
        counts = [sampler.count(epoch) for epoch in range(store.epochs)]
        size = fkd_bytes(config, fkd, len(distilled.labels), classes) / sampler.total  # of a batch
    else:
        sampler = RandomSampler(distilled, config, seed=own)
        store = LabelStore.create(output, settings, stored_epochs(config, pool))
        if pool > 1 and store.epochs > stored_epochs(config, pool):
            raise InputError(
                f"{output} holds the labels of {store.epochs} epochs, which students would use, not of {stored_epochs(config, pool)}; "
                "choose another folder"
            )
        counts = [sampler.steps] * store.epochs
        size = epoch_bytes(config, len(distilled.labels), classes) / sampler.steps
    missing = store.missing
    total, left = sum(counts), sum(counts[epoch] for epoch in missing)
    needed, free = left * size, shutil.disk_usage(output).free
    if needed > free:
        raise InputError(
            f"{output} has {free / 2**30:.3g} GiB left, but the labels need {needed / 2**30:.3g} GiB; "
            "--pool keeps fewer, or with --layout fkd --pool-share"
        )
    loader = TrainingLoader(ImageCache(distilled, device, config.memory_limit), sampler, recipe.data, config.padding)
    soft_labels = teacher_labels(teachers, config, distilled.image_shape, device)
    dtype = torch.float32 if fkd and fkd.logits == "fp32" else torch.float16
    done = total - left
    for epoch in missing:
        plans = []
        with seeded_layers(derive(own, "dropout", epoch), device), repeatable(), kept_memory(device):
            for batch in loader.epoch(epoch):
                plans.append(replace(batch.plan, logits=check_logits(soft_labels(batch), "teacher", classes).to(dtype).cpu()))
                done += 1
                if progress:
                    progress(done, total)
        store.write(epoch, plans)
    store.finish()
    return store


def _fkd_settings(config: ValidationConfig, fkd: FkdConfig, pool: int) -> dict[str, Any]:
    """What the content of FKD files depends on besides the settings of all soft labels.

    Raises:
        InputError: pool is not 1.
    """
    if pool != 1:
        raise InputError(f"FKD files keep a share of all batches, not one epoch in {pool}; pass --pool-share {1 / pool:.3g}, not --pool")
    own = {name: getattr(fkd, name) for name in ("logits", "sample_indices", "pool_share")}
    return {"layout": "fkd", **own, **({"epochs": config.epochs} if fkd.pool_share < 1 else {})}  # a pool cannot grow

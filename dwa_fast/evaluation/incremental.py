"""Class-incremental learning by the GDumb protocol: at each task a new student trains on the distilled images of all classes so far."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dwa_fast.config import Config, PositiveInt, Progress, check_integer
from dwa_fast.data.digest import image_digest
from dwa_fast.data.images import ImageSet
from dwa_fast.data.subsets import some_classes
from dwa_fast.engine.backend import own_defaults
from dwa_fast.errors import InputError
from dwa_fast.models.wrappers import KnownClasses
from dwa_fast.processes import Task, processes
from dwa_fast.recipes import Recipe
from dwa_fast.seeding import derive, generator
from dwa_fast.threads import torch_threads
from dwa_fast.training.fit import check_set, check_teacher_logits
from dwa_fast.training.validate import validate

_MARK = 16  # characters of the checksum of a set in the names of its folders


@dataclass(frozen=True, kw_only=True)
class IncrementalConfig(Config):
    """Settings of class-incremental learning."""

    tasks: PositiveInt = 5  # Tasks that the classes are split into, as evenly as possible.
    seeds: PositiveInt = 3  # Random orders of the classes, each with its own students.


def class_order(classes: int, tasks: int, *, seed: int, index: int = 0) -> list[list[int]]:
    """The classes of each task, in a random order that depends on seed and index.

    Raises:
        InputError: the first task has no two classes.
    """
    if tasks >= classes:
        raise InputError(f"{classes} classes cannot be split into {tasks} tasks, the first of which needs at least 2 classes")
    return [part.tolist() for part in np.array_split(generator(seed, "class order", index).permutation(classes), tasks)]


@own_defaults()
def learn(
    sets: Mapping[str, ImageSet],
    test: ImageSet,
    teacher: nn.Module,
    student: str,
    recipe: Recipe,
    config: IncrementalConfig,
    *,
    device: torch.device,
    resume_dir: Path,
    seed: int = 0,
    jobs: int = 1,
    progress: Progress | None = None,
) -> dict[str, list[list[list[float]]]]:
    """Accuracies of every set: [seeds][tasks][students], top-1 % on the held-out images of the classes so far.

    Every set has the same orders of classes and the same students. Soft labels are the teacher's logits of the classes so far alone.

    Args:
        sets: distilled images by name, all with the classes of the held-out ones.
        recipe: size, mean, std, and the training of each task, of `recipe.validation.students` students.
        resume_dir: holds a folder of finished work for each task; the same call resumes from it.
        jobs: tasks that are learned at the same time, each in a process of its own, on a CPU with its share of PyTorch's threads, on which
            the last bits depend.
        progress: called with the number of trained tasks and the total.
    Raises:
        InputError: the first task has no two classes, a folder holds a task of other settings, or as `validate`.
    """
    check_integer("jobs", jobs, 1)
    check_set(test, "held-out images")
    for name, images in sets.items():
        check_set(images, f"images of set {name!r}")
        if images.class_names != test.class_names:
            raise InputError(f"set {name!r} has other classes than the held-out images")
    if recipe.validation.labels == "soft":
        check_teacher_logits(teacher, test, recipe.data, device)
    orders = [class_order(len(test.class_names), config.tasks, seed=seed, index=index) for index in range(config.seeds)]
    marks = {name: image_digest(images)[:_MARK] for name, images in sets.items()}
    places = [(index, name, task) for index in range(config.seeds) for name in sets for task in range(config.tasks)]
    jobs = max(1, min(jobs, len(places)))
    threads = max(1, torch.get_num_threads() // jobs) if device.type == "cpu" else None
    tasks = []
    for index, name, task in places:
        known = [label for part in orders[index][: task + 1] for label in part]
        folder = resume_dir / f"{marks[name]}-order{index}-task{task}"
        own_seed = derive(seed, "incremental", index, task)
        call = functools.partial(_learn_task, sets[name], test, teacher, known, student, recipe, device, own_seed, folder, threads)
        tasks.append(Task(f"{name}, order {index + 1}, task {task + 1}" if jobs > 1 else "", call))
    found: dict[int, list[float]] = {}
    with processes(jobs) as run:
        for place, own in run(tasks, lambda _: None):
            found[place] = own
            if progress:
                progress(len(found), len(places))
    accuracies: dict[str, list[list[list[float]]]] = {name: [[] for _ in orders] for name in sets}
    for place, (index, name, _) in enumerate(places):
        accuracies[name][index].append(found[place])
    return accuracies


def _learn_task(
    images: ImageSet,
    test: ImageSet,
    teacher: nn.Module,
    known: list[int],
    student: str,
    recipe: Recipe,
    device: torch.device,
    seed: int,
    folder: Path,
    threads: int | None,
    progress: Progress,
) -> list[float]:
    """Accuracies of the students of one task, which know these classes."""
    sets = some_classes(images, known), some_classes(test, known)
    with torch_threads(threads):
        result = validate(*sets, KnownClasses(teacher, known), student, recipe, device=device, seed=seed, resume_dir=folder)
    return result.accuracies

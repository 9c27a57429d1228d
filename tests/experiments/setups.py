"""A set-up whose sets and cells take a fraction of a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dwa_fast.experiments.cells import Setup, StudyTeacher
from dwa_fast.io.files import checksum
from dwa_fast.models.checkpoint import TeacherInfo, save_teacher
from dwa_fast.training.fit import new_network
from tests.nets import SIZE, small_recipe


def with_validation(setup: Setup, **changes: Any) -> Setup:
    """The set-up with other settings of the students' training."""
    recipe = replace(setup.recipe, validation=replace(setup.recipe.validation, **changes))
    return replace(setup, recipe=recipe)


def with_teacher(setup: Setup, **changes: Any) -> Setup:
    """The set-up with a single teacher of which this is changed."""
    (teacher,) = setup.teachers
    return replace(setup, teachers=(replace(teacher, **changes),))


def small_setup(output: Path, *architectures: str) -> Setup:
    """Digits at 8 pixels with untrained teachers, small-resnet by default, which lie in the output folder."""
    output.mkdir(parents=True, exist_ok=True)
    setup = Setup(
        output=output,
        recipe=small_recipe(iterations=2, batch_size=10, backend="reference"),
        folder=None,
        train_checksum="of the training images",
        test_checksum="of the held-out images",
        teachers=tuple(_teacher(output, architecture) for architecture in architectures or ("small-resnet",)),
    )
    return with_validation(setup, epochs=2, padding=1, students=2)


def _teacher(folder: Path, architecture: str) -> StudyTeacher:
    file = folder / f"{architecture}.pt"
    if not file.exists():
        network = new_network(architecture, classes=10, channels=1, size=SIZE, seed=0, device=torch.device("cpu"))
        save_teacher(file, network, TeacherInfo(architecture=architecture, classes=10, channels=1, size=SIZE, accuracy=10.0))
    return StudyTeacher(file=file, checksum=checksum(file), architecture=architecture)

"""A set-up whose sets and cells take a fraction of a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dwa_fast.experiments.cells import Setup
from dwa_fast.io.files import checksum
from dwa_fast.models.checkpoint import TeacherInfo, save_teacher
from dwa_fast.training.fit import new_network
from tests.nets import SIZE, small_recipe


def with_validation(setup: Setup, **changes: Any) -> Setup:
    """The set-up with other settings of the students' training."""
    recipe = replace(setup.recipe, validation=replace(setup.recipe.validation, **changes))
    return replace(setup, recipe=recipe)


def small_setup(output: Path) -> Setup:
    """Digits at 8 pixels with an untrained teacher, which lies in the output folder."""
    output.mkdir(parents=True, exist_ok=True)
    teacher = output / "teacher.pt"
    if not teacher.exists():
        network = new_network("small-resnet", classes=10, channels=1, size=SIZE, seed=0, device=torch.device("cpu"))
        save_teacher(teacher, network, TeacherInfo(architecture="small-resnet", classes=10, channels=1, size=SIZE, accuracy=10.0))
    setup = Setup(
        output=output,
        recipe=small_recipe(iterations=2, batch_size=10, backend="reference"),
        folder=None,
        train_checksum="of the training images",
        test_checksum="of the held-out images",
        teacher=teacher,
        teacher_checksum=checksum(teacher),
    )
    return with_validation(setup, epochs=2, padding=1, students=2)

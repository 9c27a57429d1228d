"""A set-up whose sets and cells take a fraction of a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dwa_fast.config import DataConfig, ValidationConfig
from dwa_fast.experiments.cells import Setup
from dwa_fast.io.files import checksum
from dwa_fast.models.checkpoint import TeacherInfo, save_teacher
from dwa_fast.recipes import full_recipe
from dwa_fast.training.fit import fresh
from tests.nets import SIZE, small_config


def small_validation(**changes: Any) -> ValidationConfig:
    return replace(full_recipe("digits").validation, **{"epochs": 2, "padding": 1, "students": 2, **changes})


def small_setup(output: Path, **changes: Any) -> Setup:
    """Digits at 8 pixels with an untrained teacher, which lies in the output folder."""
    output.mkdir(parents=True, exist_ok=True)
    teacher = output / "teacher.pt"
    if not teacher.exists():
        network = fresh("small-resnet", classes=10, channels=1, size=SIZE, seed=0, device=torch.device("cpu"))
        save_teacher(teacher, network, TeacherInfo(architecture="small-resnet", classes=10, channels=1, size=SIZE, accuracy=10.0))
    plain: dict[str, Any] = {
        "output": output,
        "recipe": "digits",
        "data": DataConfig(layout="digits", size=SIZE, classes=10),
        "folder": None,
        "train_checksum": "of the training images",
        "test_checksum": "of the held-out images",
        "teacher": teacher,
        "teacher_checksum": checksum(teacher),
        "architecture": "small-resnet",
        "synthesis": small_config(iterations=2, batch_size=10, backend="reference"),
        "validation": small_validation(),
    }
    return Setup(**{**plain, **changes})

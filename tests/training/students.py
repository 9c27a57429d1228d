"""What the tests of students share: quick students of a small set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dwa_fast.config import ValidationConfig
from dwa_fast.data.datasets import digits
from dwa_fast.data.images import MemorySet
from dwa_fast.training.validate import ValidationResult, validate
from tests.nets import DIGITS, SIZE, small_set, small_teacher

CPU = torch.device("cpu")
QUICK = replace(DIGITS.validation, epochs=4, batch_size=20, padding=1, students=2)  # three steps for an epoch of small_set


def held_out() -> MemorySet:
    data = digits("test", SIZE)
    return MemorySet(data.pixels[:100], data.labels[:100], data.class_names)


def students(config: ValidationConfig = QUICK, teacher: Any = None, student: str = "small-resnet", **more: Any) -> ValidationResult:
    return validate(
        small_set(),
        held_out(),
        small_teacher() if teacher is None else teacher,
        student,
        replace(DIGITS, validation=config),
        device=CPU,
        **more,
    )

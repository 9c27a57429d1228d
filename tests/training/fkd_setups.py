"""What the tests of FKD files and of label pools share: a set on the disk, labels of it, students of these labels, and the exact logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dwa_fast import FkdConfig
from dwa_fast.config import ValidationConfig
from dwa_fast.data.distilled import open_distilled
from dwa_fast.data.images import FileSet
from dwa_fast.data.loader import parts
from dwa_fast.training.relabel import relabel
from dwa_fast.training.validate import ValidationResult, validate
from tests.nets import DIGITS, SIZE, small_set, small_teacher

CPU = torch.device("cpu")
MEAN, STD = DIGITS.data.mean[0], DIGITS.data.std[0]
CUTMIX = replace(
    DIGITS.validation, epochs=3, batch_size=16, students=1, augmentation="resized-crop", mixing="cutmix", mixing_alpha=1.0, flip=0.5
)
MIXUP = replace(CUTMIX, mixing="mixup", mixing_alpha=0.8)
PLAIN = replace(CUTMIX, mixing="none")
PER_CLASS = 11  # ImageFolder sorts id10 before id2; 110 images are six batches of 16 and one of 14


def set_on_disk(folder: Path) -> FileSet:
    """A distilled set on the disk."""
    data, counts = small_set(PER_CLASS), [0] * 10
    for pixels, label in zip(data.pixels, data.labels.tolist(), strict=True):
        path = folder / f"new{label:03d}" / f"id{counts[label]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(path)
        counts[label] += 1
    return open_distilled(folder, SIZE, 1, data.class_names)[0]


def write(folder: Path, images: FileSet, config: ValidationConfig = CUTMIX, fkd: FkdConfig | None = None, **more: Any) -> Path:
    """Labels of this program; the folder of the FKD files."""
    recipe = replace(DIGITS, validation=config)
    more = {"teacher": small_teacher(), **more}
    relabel(images, more.pop("teacher"), recipe, output=folder, device=CPU, fkd=fkd or FkdConfig(), **more)
    return folder / "fkd"


def students(images: FileSet, labels: Path, config: ValidationConfig = CUTMIX, **more: Any) -> ValidationResult:
    recipe = replace(DIGITS, validation=config)
    return validate(images, small_set(8), None, "small-resnet", recipe, device=CPU, soft_labels=labels, **more)


def exact_logits(batch: torch.Tensor, config: ValidationConfig) -> torch.Tensor:
    """The teacher's, in float64."""
    teacher = small_teacher().double().train(config.teacher_mode == "train")
    with torch.no_grad():
        return torch.cat([teacher(batch[rows]) for rows in parts(len(batch), config.accumulation)])

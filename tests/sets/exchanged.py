"""Sets to convert."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dwa_fast.config import Normalisation, StorageConfig
from dwa_fast.data.folders import image_folder
from dwa_fast.sets.distill import batch_specs
from dwa_fast.sets.store import ImageStore

CLASSES = ["zebra", "ant", "bee"]  # in no sorted order, as a data set may have them
CIFAR = Normalisation(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
FLAGS = ["--recipe", "cifar10"]
X, Y = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])


def make(folder: Path, *, channels: int = 3, size: int = 8, ipc: int = 2, image_format: Any = "png", finish: bool = True) -> Tensor:
    """A set of three classes; its levels, [3, ipc, C, S, S]."""
    levels = torch.randint(0, 256, (3, ipc, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = {"mean": list(CIFAR.mean[:channels]), "std": list(CIFAR.std[:channels]), "image_shape": [channels, size, size]}
    batches = batch_specs(3, ipc, 2)
    store = ImageStore(folder, settings, CLASSES, StorageConfig(image_format=image_format, losses_every=0))
    store.begin()
    for batch in batches:
        store.write(batch, levels[batch.labels, batch.index])
    if finish:
        assert store.finish(batches) == []
    return levels


def levels_of(folder: Path, size: int = 8, channels: int = 3) -> Tensor:
    """What the package itself reads from a folder, [N, C, S, S] uint8."""
    data = image_folder(folder, size, channels)
    return data.load(range(len(data.files)))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def encoded(level: int, kind: str = "PNG", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), level, dtype=np.uint8)).save(buffer, format=kind)
    return buffer.getvalue()

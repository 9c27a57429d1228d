"""What the training of teachers and of students shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from dwa_fast.architectures import build
from dwa_fast.config import Normalisation
from dwa_fast.datasets import ImageSet, normalise
from dwa_fast.seeding import derive

Progress = Callable[[int, int], None]  # called with the steps done and the steps in all

_EVALUATION_BATCH = 500


def fresh(architecture: str, *, classes: int, channels: int, size: int, seed: int, device: torch.device) -> nn.Module:
    """A network with random weights that depend on the seed alone; the global generator of torch is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return build(architecture, classes=classes, channels=channels, size=size).to(device)


def batches(count: int, batch_size: int, source: np.random.Generator) -> Iterator[np.ndarray]:
    """Indices of one epoch in random order. A last batch of one image joins the batch before it, since BatchNorm needs two."""
    order = source.permutation(count)
    parts = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [np.concatenate(parts[-2:])]
    yield from parts


def step_count(count: int, batch_size: int) -> int:
    """How many batches `batches` gives."""
    whole, rest = divmod(count, batch_size)
    return max(1, whole + (rest > 1 or (rest == 1 and whole == 0)))


def cosine(step: float, steps: int, warmup: int = 0) -> float:
    """Factor of the learning rate: linear from 0.01 to 1 during the warm-up, then a cosine to 0."""
    if step < warmup:
        return 0.01 + 0.99 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def top1(model: nn.Module, data: ImageSet, normalisation: Normalisation, device: torch.device) -> float:
    """Share of the images whose class the model names, percent; the model is left in eval mode."""
    model.eval()
    right = 0
    for start in range(0, len(data.labels), _EVALUATION_BATCH):
        indices = range(start, min(start + _EVALUATION_BATCH, len(data.labels)))
        logits = model(normalise(data.load(indices).to(device), normalisation))
        right += int((logits.argmax(1).cpu() == data.labels[start : indices.stop]).sum())
    return 100 * right / len(data.labels)

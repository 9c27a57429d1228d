"""What the training of teachers and of students shares: the loop, the learning rate, the arithmetic, the test."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dwa_fast.architectures import build
from dwa_fast.config import Normalisation, TeacherMode, TrainingPrecision
from dwa_fast.datasets import ImageSet, normalise
from dwa_fast.lessons import Lesson, Lessons
from dwa_fast.resuming import TrainingState
from dwa_fast.seeding import derive
from dwa_fast.threads import computing

Progress = Callable[[int, int], None]  # called with the steps done and the steps in all
Teach = Callable[[Lesson], Tensor]  # a lesson's soft labels: logits, [B, classes] float32

_EVALUATION_BATCH = 500


def fresh(architecture: str, *, classes: int, channels: int, size: int, seed: int, device: torch.device) -> nn.Module:
    """A network with random weights that depend on the seed alone; the global generator of torch is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return build(architecture, classes=classes, channels=channels, size=size).to(device)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lessons: Lessons,
    loss: Callable[[Lesson], Tensor],
    *,
    epochs: int,
    learning_rate: float,
    warmup_epochs: int = 0,
    seed: int,
    state: TrainingState | None = None,
    progress: Progress | None = None,
) -> None:
    """Train a network on the lessons of all epochs; where `state` holds those that are finished, on the rest.

    Args:
        loss: of one lesson, from the network in train mode.
        learning_rate: the first one; it falls to 0 on a cosine.
        seed: of dropout and the like, anew for each epoch; the global generators of torch are left as they were.
        state: where the training is kept, between epochs.
        progress: called with the steps done, those of an earlier run first, and the steps in all.
    """
    model.train()
    begun = state.restore(model, optimizer) if state else 0
    total, done = epochs * lessons.steps, begun * lessons.steps
    if progress and done:
        progress(done, total)
    for epoch in range(begun, epochs):
        threads = computing(state.threads if state else None)
        with seeded_layers(derive(seed, "dropout", epoch), lessons.device), repeatable(), threads:
            for lesson in lessons.epoch(epoch):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * cosine(done, total, warmup_epochs * lessons.steps)
                optimizer.zero_grad()
                loss(lesson).backward()
                optimizer.step()
                done += 1
                if progress:
                    progress(done, total)
        if state:
            state.save(model, optimizer, epoch + 1)


def cosine(step: float, steps: int, warmup: int = 0) -> float:
    """Factor of the learning rate: linear from 0.01 to 1 during the warm-up, then a cosine to 0."""
    if step < warmup:
        return 0.01 + 0.99 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def resolve_precision(precision: TrainingPrecision, device: torch.device) -> TrainingPrecision:
    """What "auto" stands for: bf16 where a GPU computes it natively, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def predict(
    model: nn.Module,
    images: Tensor,  # [B, C, H, W]
    precision: TrainingPrecision,  # resolved
) -> Tensor:  # [B, classes] float32
    """Logits, computed in that precision; the weights stay in fp32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(images)
    return logits.float()


def teaching(teacher: nn.Module, mode: TeacherMode, device: torch.device) -> Teach:
    """The teacher's logits for each lesson, from a copy of its own: what train mode does to running statistics stays in there."""
    module = copy.deepcopy(teacher).to(device).requires_grad_(False).train(mode == "train")

    @torch.no_grad()
    def teach(lesson: Lesson) -> Tensor:
        return predict(module, lesson.images, "fp32")

    return teach


@contextmanager
def seeded_layers(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, dropout and the like draw from this seed; afterwards torch's generators are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, cuDNN takes the same algorithms every time, so that the same seed gives the same bits."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@torch.no_grad()
def top1(model: nn.Module, data: ImageSet, normalisation: Normalisation, device: torch.device) -> float:
    """Share of the images whose class the model names, percent; the model is left in eval mode."""
    model.eval()
    right = 0
    with repeatable():
        for start in range(0, len(data.labels), _EVALUATION_BATCH):
            indices = range(start, min(start + _EVALUATION_BATCH, len(data.labels)))
            logits = model(normalise(data.load(indices).to(device), normalisation))
            right += int((logits.argmax(1).cpu() == data.labels[start : indices.stop]).sum())
    return 100 * right / len(data.labels)

"""Validate: train students on the distilled images and measure them on the held-out real ones."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.augment import augment, mix
from dwa_fast.config import ValidationConfig
from dwa_fast.datasets import ImageSet, normalise
from dwa_fast.seeding import derive, generator
from dwa_fast.training import Progress, batches, cosine, fresh, step_count, top1


@dataclass(frozen=True)
class ValidationResult:
    """Top-1 of several students, percent."""

    accuracies: list[float]  # one per student
    seeds: list[int]  # of the students

    @property
    def mean(self) -> float:
        """Mean over students."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Standard deviation of the sample over students; 0 for one student."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def validate(
    distilled: ImageSet,
    test: ImageSet,
    teacher: nn.Module,
    student: str,
    config: ValidationConfig,
    *,
    size: int,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
) -> ValidationResult:
    """Train `config.students` students and test each.

    Soft labels are the teacher's probabilities for exactly the view that the student sees, computed as training goes.

    Args:
        distilled: images to learn from. test: held-out real images.
        teacher: gives the soft labels; it is copied, never changed.
        student: a name of `architectures.ARCHITECTURES`.
        size: height and width of the images, pixels.
        progress: called with the steps done and the steps in all, over all students.
    """
    teacher = copy.deepcopy(teacher).to(device).requires_grad_(False).train(config.teacher_mode == "train")
    pixels = distilled.load(range(len(distilled.labels))).to(device)
    labels = distilled.labels.to(device)
    steps = config.epochs * step_count(len(labels), config.batch_size)
    seeds = [derive(seed, "student", index) for index in range(config.students)]
    accuracies = []
    for index, own in enumerate(seeds):
        model = fresh(student, classes=len(test.class_names), channels=config.channels, size=size, seed=own, device=device)

        def tick(done: int, before: int = index * steps) -> None:
            if progress:
                progress(before + done, config.students * steps)

        _train(model, teacher, pixels, labels, config, own, tick, steps)
        accuracies.append(top1(model, test, config, device))
    return ValidationResult(accuracies, seeds)


def _train(
    student: nn.Module,
    teacher: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    config: ValidationConfig,
    seed: int,
    tick: Callable[[int], None],
    steps: int,
) -> None:
    student.train()
    optimizer = _optimizer(student, config)
    source = generator(seed, "training")
    warmup = config.warmup_epochs * step_count(len(labels), config.batch_size)
    done = 0
    for _ in range(config.epochs):
        for order in batches(len(labels), config.batch_size, source):
            indices = torch.from_numpy(order).to(pixels.device)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * cosine(done, steps, warmup)
            images = normalise(augment(pixels[indices], config, source), config)
            images, partner, share = mix(images, config.mixing, config.mixing_alpha, source)
            loss = _loss(student, teacher, images, labels[indices], partner, share, config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            tick(done)


def _optimizer(student: nn.Module, config: ValidationConfig) -> torch.optim.Optimizer:
    decayed = [p for p in student.parameters() if config.decay_vectors or p.dim() > 1]
    kept = [p for p in student.parameters() if not config.decay_vectors and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def _loss(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, partner: Tensor, share: float, config: ValidationConfig
) -> Tensor:
    logits = student(images)
    if config.labels == "hard":
        return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[partner])
    with torch.no_grad():
        target = F.log_softmax(teacher(images) / config.temperature, 1)
    loss = F.kl_div(F.log_softmax(logits / config.temperature, 1), target, reduction="batchmean", log_target=True)
    return loss * config.temperature**2 if config.scale_loss else loss

"""The order of the stages: teacher → initial images → views → ascent → refinement."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwa_fast import initial
from dwa_fast.ascent import Ascent
from dwa_fast.backend import resolve
from dwa_fast.config import SynthesisConfig
from dwa_fast.errors import InputError
from dwa_fast.refine import refine
from dwa_fast.seeding import generator
from dwa_fast.teacher import prepare
from dwa_fast.views import draw_schedule

Progress = Callable[[int, int], None]  # called with the iterations finished and the iterations in all


@dataclass(frozen=True)
class SynthesisResult:
    """What `synthesize` returns."""

    images: Tensor  # [N, C, H, W] float32 (float64 in that precision), normalised, in the order of the input, on its device
    losses: Tensor  # [batches, T, 3] float32 on the CPU: cross-entropy, R_mean, R_var of each iteration


class Synthesizer:
    """A teacher made ready once, for any number of batches."""

    def __init__(self, teacher: nn.Module, images: Tensor, config: SynthesisConfig) -> None:
        """Check and copy the teacher; `images` ([N, C, H, W]) shows what it will be given."""
        self.config = config
        self.execution = resolve(config.backend, config.precision, config.device)
        self.network, self.classes = prepare(teacher, images, self.execution)
        self.matcher = self.network
        if config.matching_weights == "original" and config.adjusts:
            self.matcher = copy.deepcopy(self.network)
            self.network.record(False)
        self.ascent = Ascent(self.network, config)

    def batch(
        self,
        images: Tensor,  # [B, C, H, W], normalised
        labels: Tensor,  # [B]
        *,
        seed: int,
        number: int,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Refined images [B, C, H, W] and losses [T, 3] of one batch, on the device; `number` picks its random streams."""
        config, operators = self.config, self.execution.operators
        images = images.to(self.execution.device, self.execution.dtype)
        labels = labels.to(self.execution.device, torch.int64)
        schedule = draw_schedule(config, images.shape[2], images.shape[3], seed=seed, batch=number)
        seen = operators.view(images, schedule.rows, torch.tensor(0))
        self.ascent.adjust(seen, labels, generator(seed, "ascent", number))
        start = initial.noise(images, seed=seed, batch=number) if config.initial == "noise" else images
        return refine(self.network, self.matcher, start, labels, schedule, config, progress)


def synthesize(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: SynthesisConfig,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> SynthesisResult:
    """Refine images so that a student learns from few of them what the teacher knows (DWA, arXiv 2409.17612).

    The images are cut into batches of `config.batch_size` in the given order. Each batch moves the teacher's weights from θ to its
    own θ̃ (Eq. 11) and minimises CE + λ_mean·R_mean + λ_var·R_var over its pixels (Eq. 15). Same seed, same device, same bits.

    Args:
        teacher: classifier with BatchNorm2d layers; it is copied, never changed.
        images: [N, C, H, W], floating, normalised with `config.mean` and `config.std`: initial images, and what the ascent sees.
        labels: [N], integers in 0 … classes − 1.
        config: settings, for example `recipe("cifar100")`.
        seed: at least 0; all random draws derive from it.
        progress: called with the iterations finished and the iterations in all.
    Returns:
        images in the same order and normalisation, and the losses of every iteration.
    Raises:
        TypeError: an argument is of the wrong type.
        InputError: (a ValueError) an argument cannot be used; the sentence says what it got and what it wants.
    """
    check_arguments(images, labels, config)
    run = Synthesizer(teacher, images, config)
    check_label_range(labels, run.classes)
    starts = range(0, len(images), config.batch_size)
    total = len(starts) * config.iterations
    finished, losses = [], []
    for number, start in enumerate(starts):
        part = slice(start, start + config.batch_size)
        tick = functools.partial(_report, progress, number * config.iterations, total) if progress else None
        refined, terms = run.batch(images[part], labels[part], seed=seed, number=number, progress=tick)
        finished.append(refined.to(images.device))
        losses.append(terms.float().cpu())
    return SynthesisResult(torch.cat(finished), torch.stack(losses))


def check_arguments(images: Tensor, labels: Tensor, config: SynthesisConfig) -> None:
    """Check what can be checked without the teacher; raises as `synthesize` does."""
    if not isinstance(config, SynthesisConfig):
        raise TypeError(f"config must be a SynthesisConfig, such as recipe('cifar100'), got {type(config).__name__}")
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images must be normalised floating point, got {images.dtype}")
    if labels.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    channels = config.channels
    if images.dim() != 4 or images.shape[1] != channels or images.numel() == 0:
        raise InputError(f"images must be [N, {channels}, H, W] and not empty, got shape {tuple(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise InputError(f"labels must be [{len(images)}], one per image, got shape {tuple(labels.shape)}")
    if not torch.isfinite(images).all():
        raise InputError(f"images must be finite, got {int((~torch.isfinite(images)).sum())} pixels that are NaN or infinite")


def check_label_range(labels: Tensor, classes: int) -> None:
    """Raise InputError unless every label is a class of the teacher."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(f"labels must lie in 0 … {classes - 1}, the classes of the teacher, got {low if low < 0 else high}")


def _report(progress: Progress, before: int, total: int, iteration: int) -> None:
    progress(before + iteration, total)

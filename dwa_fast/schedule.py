"""The schedule of a batch: the view and the learning rate of every iteration, computed on the host before the first one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dwa_fast.config import SynthesisConfig
from dwa_fast.errors import InputError
from dwa_fast.seeding import generator

TOP, LEFT, HEIGHT, WIDTH, FLIP, DOWN, RIGHT = range(7)  # columns of Schedule.rows

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop, whose distribution this is
_FALLS: dict[str, Callable[[float], float]] = {  # from 1 to 0 over the time of a curriculum
    "step": lambda _: 1.0,
    "linear": lambda s: 1 - s,
    "cosine": lambda s: 0.5 * (1 + math.cos(math.pi * s)),
}


@dataclass(frozen=True)
class Schedule:
    """One row per iteration. The operators `view` and `view_adam_clip_` read it."""

    rows: Tensor  # [T, 7] int32: crop top, left, height, width; flip 0 or 1; roll down, right
    learning_rates: Tensor  # [T] float32

    def to(self, device: torch.device) -> Schedule:
        """The same schedule on a device."""
        return Schedule(self.rows.to(device), self.learning_rates.to(device))

    def part(self, start: int, stop: int) -> Schedule:
        """Iterations start … stop − 1."""
        return Schedule(self.rows[start:stop], self.learning_rates[start:stop])


class Stage(NamedTuple):
    """Iterations start … stop − 1, which refine the same images at one size."""

    height: int
    width: int
    start: int
    stop: int
    round: int = 0


def make_stages(config: SynthesisConfig, height: int, width: int) -> list[Stage]:
    """The stages of a refinement: those of `config.stage_sizes`, or one of the images' own size for each round.

    S stages have T/S iterations each; where S does not divide T, the first T mod S stages have one more than the others.

    Args:
        height, width: of the images, pixels.
    Raises:
        InputError: the last stage has another size.
    """
    sizes = [(size, size) for size in config.stage_sizes] or [(height, width)] * config.rounds
    if sizes[-1] != (height, width):
        given = ", ".join(map(str, config.stage_sizes))
        raise InputError(f"the last of stage_sizes must be the size of the images, {height} × {width} pixels, got {given}")
    each, more = divmod(config.iterations, len(sizes))
    ends = accumulate((each + (number < more) for number in range(len(sizes))), initial=0)
    rounds = range(config.rounds) if config.rounds > 1 else [0] * len(sizes)
    return [Stage(*size, *span, number) for size, span, number in zip(sizes, pairwise(ends), rounds, strict=True)]


def joining_rounds(labels: Sequence[int], rounds: int) -> list[int]:
    """The round, counted from 0, from which each image of a batch is refined (DELT, arXiv 2411.19946).

    The n images of a class are cut into M groups in their order, the first n mod M with one image more; group g joins in round g.
    """
    total, seen, joins = Counter(labels), Counter[int](), list[int]()
    for label in labels:
        each, more = divmod(total[label], rounds)
        place, longer = seen[label], more * (each + 1)
        joins.append(place // (each + 1) if place < longer else more + (place - longer) // each)
        seen[label] += 1
    return joins


def refined_counts(labels: Sequence[int], rounds: int) -> list[int]:
    """The numbers of images that the rounds of a batch refine."""
    return [sum(each <= number for each in joining_rounds(labels, rounds)) for number in range(rounds)]


def make_schedule(config: SynthesisConfig, height: int, width: int, *, seed: int, batch: int) -> Schedule:
    """Views and learning rates of all T iterations of one batch.

    Learning rate: lr_t = ½(1 + cos(π t/T))·lr. Views: method of SRe2L; roll by (dy, dx), each uniform in {0..jitter}, after one random
    resized crop and flip where `config.view` is "crop". Where `config.curriculum` is set, the smallest crop of iteration t has the share
    low + (high − low)·f(t / (milestone·T)) of the area, f falling from 1 to 0 (CDA, arXiv 2311.18838). In stages, crops are those of
    images of the stage's size; the learning rate, the curriculum and the roll are the same as in a single one.

    Args:
        height, width: of the images, pixels.
        seed, batch: select the random stream.
    Raises:
        InputError: as `make_stages`.
    """
    source = generator(seed, "views", batch)
    rows = np.zeros((config.iterations, 7), dtype=np.int32)
    for stage in make_stages(config, height, width):
        rows[stage.start : stage.stop, HEIGHT : WIDTH + 1] = stage.height, stage.width
    rows[:, DOWN : RIGHT + 1] = (source.random((config.iterations, 2)) * (config.jitter + 1)).astype(np.int32)
    if config.view == "crop":
        rows[:, FLIP] = source.random(config.iterations) < config.flip
        for row, smallest in zip(rows, _smallest_crops(config), strict=True):
            row[TOP : WIDTH + 1] = _random_crop(source, config, smallest, *map(int, row[HEIGHT : WIDTH + 1]))
    cosine = [0.5 * (1 + math.cos(math.pi * t / config.iterations)) * config.learning_rate for t in range(config.iterations)]
    return Schedule(torch.from_numpy(rows), torch.tensor(cosine, dtype=torch.float32))


def _smallest_crops(config: SynthesisConfig) -> list[float]:
    """Share of the area that a crop covers at least, of each iteration."""
    low, high = config.crop_scale
    end = config.milestone * config.iterations
    if config.curriculum == "none":
        return [low] * config.iterations
    falls = _FALLS[config.curriculum]
    return [low + (high - low) * falls(t / end) if t < end else low for t in range(config.iterations)]


def _random_crop(
    source: np.random.Generator, config: SynthesisConfig, smallest: float, height: int, width: int
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random resized crop; the largest centred one where ten draws do not fit."""
    for area, ratio, y, x in source.random((_CROP_ATTEMPTS, 4)):
        pixels = height * width * (smallest + area * (config.crop_scale[1] - smallest))
        low, high = (math.log(bound) for bound in config.crop_ratio)
        aspect = math.exp(low + ratio * (high - low))
        crop_width, crop_height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return int(y * (height - crop_height + 1)), int(x * (width - crop_width + 1)), crop_height, crop_width
    aspect = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - crop_height) // 2, (width - crop_width) // 2, max(crop_height, 1), max(crop_width, 1)

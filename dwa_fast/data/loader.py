"""What a network is shown while it is trained: batch by batch, which images, how each is seen, and with which it is mixed."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dwa_fast.config import SqueezeConfig, ValidationConfig
from dwa_fast.data.augment import Mix, Views, apply_mix, apply_views, draw_mix, draw_views
from dwa_fast.data.datasets import ImageSet, normalise, to_unit
from dwa_fast.seeding import generator

log = logging.getLogger("dwa_fast")

_AHEAD = 2  # batches that are read from disk before they are needed
_READ_AT_ONCE = 256  # images


@dataclass(frozen=True)
class Draw:
    """One batch, before its images are looked at. On the CPU."""

    indices: Tensor  # [B] int64: images of the set
    views: Views
    mix: Mix
    logits: Tensor | None = None  # [B, classes] float16: the teacher's for exactly this, where they were stored


@dataclass(frozen=True)
class Lesson:
    """One batch as the network sees it, on its device."""

    images: Tensor  # [B, C, H, W], normalised, mixed
    labels: Tensor  # [B] int64
    draw: Draw


class Draws(Protocol):
    """The batches of every epoch."""

    @property
    def steps(self) -> int:
        """Batches of an epoch."""

    def epoch(self, number: int) -> Sequence[Draw]:
        """Those of one epoch, from 0."""


class RandomDraws:
    """All from one stream, epoch by epoch. An epoch asked for out of turn is what it would have been in turn."""

    def __init__(
        self,
        data: ImageSet,
        config: SqueezeConfig | ValidationConfig,
        *,
        seed: int,
        purpose: str = "training",
    ) -> None:
        self.steps = len(batch_sizes(len(data.labels), config.batch_size))
        self._count, self._image_size, self._config = len(data.labels), data.image_shape[1:], config
        self._seed, self._purpose = seed, purpose
        self._source, self._next = generator(seed, purpose), 0

    def epoch(self, number: int) -> list[Draw]:
        """The batches of one epoch."""
        if number < self._next:
            self._source, self._next = generator(self._seed, self._purpose), 0
        while self._next < number:
            self._draw()
        return self._draw()

    def _draw(self) -> list[Draw]:
        self._next += 1
        return [self._one(order) for order in batches(self._count, self._config.batch_size, self._source)]

    def _one(self, order: np.ndarray) -> Draw:
        views = draw_views(len(order), self._config, self._source)
        return Draw(torch.from_numpy(order), views, draw_mix(len(order), self._image_size, self._config, self._source))


class Pixels:
    """The images of a set for a device: kept there as bytes where they fit into the limit, else read from disk when they are needed."""

    def __init__(
        self,
        data: ImageSet,
        device: torch.device,
        limit: float,  # GiB
    ) -> None:
        self.data, self.device = data, device
        self._held: Tensor | None = None
        size = len(data.labels) * math.prod(data.image_shape)
        if size <= limit * 2**30:
            parts = [range(start, min(start + _READ_AT_ONCE, len(data.labels))) for start in range(0, len(data.labels), _READ_AT_ONCE)]
            self._held = torch.cat([data.load(part).to(device) for part in parts])
        else:
            log.info("images: %.3g GiB, more than the memory limit of %g GiB; read from disk as training goes", size / 2**30, limit)

    def batches(self, orders: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each batch, [B, C, H, W] uint8 on the device."""
        if self._held is not None:
            for order in orders:
                yield self._held[order.to(self.device)]
            return
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(1) as reader:
            for order in orders:
                waiting.append(reader.submit(self.data.load, order.tolist()))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result().to(self.device)
            while waiting:
                yield waiting.popleft().result().to(self.device)


class Lessons:
    """Images as their draws say, epoch by epoch."""

    def __init__(self, pixels: Pixels, draws: Draws, config: SqueezeConfig | ValidationConfig) -> None:
        self._pixels, self._draws, self._config = pixels, draws, config
        self._labels = pixels.data.labels.to(pixels.device)

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return self._draws.steps

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self._pixels.device

    def epoch(self, number: int) -> Iterator[Lesson]:
        """The batches of one epoch, from 0."""
        draws = self._draws.epoch(number)
        for draw, pixels in zip(draws, self._pixels.batches(draw.indices for draw in draws), strict=True):
            images = normalise(apply_views(to_unit(pixels), draw.views, self._config.padding), self._config)
            yield Lesson(apply_mix(images, draw.mix), self._labels[draw.indices.to(pixels.device)], draw)


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Images of each batch of an epoch. A last batch of one image joins the batch before it, since BatchNorm needs two."""
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


def batches(count: int, batch_size: int, source: np.random.Generator) -> list[np.ndarray]:
    """Indices of one epoch in random order."""
    return np.split(source.permutation(count), np.cumsum(batch_sizes(count, batch_size))[:-1])

"""Training batches: which images, how each is augmented, and with which other one it is mixed."""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dwa_fast.config import Normalisation, SqueezeConfig, ValidationConfig
from dwa_fast.data.augment import Mix, Views, apply_mix, apply_views, draw_mix, draw_views, mirror
from dwa_fast.data.images import ImageSet
from dwa_fast.data.pixels import moved, normalise
from dwa_fast.seeding import generator

log = logging.getLogger("dwa_fast")

_PREFETCH = 2  # batches that are read from disk in advance
_CHUNK = 256  # images that are copied to the device at once
_MANY_CLASSES = 100  # from which RDED doubles its batches


@dataclass(frozen=True)
class BatchPlan:
    """The random choices for one batch, made before any image is loaded. All tensors are on the CPU."""

    indices: Tensor  # [B] int64, into the set
    views: Views
    mix: Mix
    logits: Tensor | None = None  # [B, classes] float16: stored teacher logits of exactly these views and this mix


@dataclass(frozen=True)
class TrainingBatch:
    """One augmented batch on the device."""

    images: Tensor  # [B, C, H, W], normalised, mixed
    labels: Tensor  # [B] int64
    plan: BatchPlan
    partner_labels: Tensor | None = None  # [B] int64: of the images that were mixed in
    shares: Tensor | None = None  # [2] float32: of the images themselves and of what was mixed in
    logits: Tensor | None = None  # [B, classes]: stored teacher logits

    def tensors(self) -> dict[str, Tensor]:
        """What a training step reads, by the names of the fields."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "plan"}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class BatchSampler(Protocol):
    """Gives the batch plans of every epoch."""

    @property
    def steps(self) -> int:
        """Batches per epoch."""

    def epoch(self, number: int) -> Sequence[BatchPlan]:
        """The plans of one epoch, counted from 0."""


class RandomSampler:
    """Random plans, all from one random stream. An epoch has the same plans whatever order the epochs are requested in."""

    def __init__(
        self,
        data: ImageSet,
        config: SqueezeConfig | ValidationConfig,
        *,
        seed: int,
        purpose: str = "training",
    ) -> None:
        self._batch_size = batch_size_of(config, len(data.labels), len(data.class_names))
        self.steps = len(batch_sizes(len(data.labels), self._batch_size))
        self._count, self._image_size, self._config = len(data.labels), data.image_shape[1:], config
        self._seed, self._purpose = seed, purpose
        self._source, self._next = generator(seed, purpose), 0
        self._mirrored: np.ndarray | None = None  # whether each image is mirrored in epoch 0, where it is in every other epoch
        if isinstance(config, SqueezeConfig) and config.one_cycle and config.flip > 0:
            self._mirrored = generator(seed, f"{purpose} mirrored").random(self._count) < config.flip

    def epoch(self, number: int) -> list[BatchPlan]:
        """The plans of one epoch. An earlier epoch than the last one replays the stream from its start."""
        if number < self._next:
            self._source, self._next = generator(self._seed, self._purpose), 0
        while self._next < number:
            self._next_epoch()
        return self._next_epoch()

    def _next_epoch(self) -> list[BatchPlan]:
        self._next += 1
        return [self._plan(order) for order in batches(self._count, self._batch_size, self._source)]

    def _plan(self, order: np.ndarray) -> BatchPlan:
        views = draw_views(len(order), self._config, self._source)
        if self._mirrored is not None:
            views = mirror(views, torch.from_numpy(self._mirrored[order] ^ (self._next % 2 == 0)))
        return BatchPlan(torch.from_numpy(order), views, draw_mix(len(order), self._image_size, self._config, self._source))


class ImageCache:
    """The images of a set: held on the device as uint8 if they fit into the limit, else read from disk for every batch."""

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
            self._held = torch.empty(len(data.labels), *data.image_shape, dtype=torch.uint8, device=device)
            for start in range(0, len(data.labels), _CHUNK):
                chunk = range(start, min(start + _CHUNK, len(data.labels)))
                self._held[start : chunk.stop] = data.load(chunk)
        else:
            log.info("images: %.3g GiB, more than the memory limit of %g GiB; read from disk during training", size / 2**30, limit)

    def batches(self, orders: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each batch, [B, C, H, W] uint8 on the device.

        Args:
            orders: indices of each batch, [B] int64.
        """
        if self._held is not None:
            for order in orders:
                yield self._held[moved(order, self.device)]
            return
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(1) as prefetcher:
            for order in orders:
                waiting.append(prefetcher.submit(self.data.load, order.tolist()))
                if len(waiting) > _PREFETCH:
                    yield waiting.popleft().result().to(self.device)
            while waiting:
                yield waiting.popleft().result().to(self.device)


class TrainingLoader:
    """Loads, augments, normalises and mixes the images of each batch plan."""

    def __init__(
        self,
        images: ImageCache,
        sampler: BatchSampler,
        normalisation: Normalisation,
        padding: int,  # of pad-crop, pixels
    ) -> None:
        self._images, self._sampler, self._normalisation, self._padding = images, sampler, normalisation, padding
        self._labels = images.data.labels.to(images.device)

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return self._sampler.steps

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self._images.device

    def epoch(self, number: int) -> Iterator[TrainingBatch]:
        """The batches of one epoch, counted from 0."""
        plans = self._sampler.epoch(number)
        for plan, pixels in zip(plans, self._images.batches(plan.indices for plan in plans), strict=True):
            device = pixels.device
            views, mix = _on_device(plan.views, device), replace(plan.mix, partner=_moved(plan.mix.partner, device))
            images = apply_mix(normalise(apply_views(pixels, views, self._padding), self._normalisation), mix)
            labels, partner_labels, shares = self._labels[moved(plan.indices, device)], None, None
            if mix.partner is not None:
                partner_labels, shares = labels[mix.partner], moved(torch.tensor([mix.share, 1 - mix.share]), device)
            yield TrainingBatch(images, labels, plan, partner_labels, shares, _moved(plan.logits, device))


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else moved(tensor, device)


def _on_device(views: Views, device: torch.device) -> Views:
    """Views whose tensors are on the device, but for the boxes, of which the host makes the weights."""
    tensors = {name: _moved(getattr(views, name), device) for name in ("offsets", "flipped", "crops", "cells")}
    return replace(views, **tensors)  # type: ignore[arg-type]


def batch_size_of(config: SqueezeConfig | ValidationConfig, images: int, classes: int) -> int:
    """The batch size of a training: the configured one, or by images per class (ipc) and classes.

    RDED's values for ipc 1, 10 and 50 are 10, 50 and 100, doubled for 100 classes or more; any other ipc has the value of the next lower
    one. At most the number of images.
    """
    if config.batch_size is not None:
        return config.batch_size
    ipc = images // classes
    size = 100 if ipc >= 50 else 50 if ipc >= 10 else 10
    return min(images, 2 * size if classes >= _MANY_CLASSES else size)


def parts(count: int, wanted: int) -> list[slice]:
    """The rows of a batch in at most `wanted` parts of about equal size, at least two images each where the batch has as many."""
    number = max(1, min(wanted, count // 2))
    edges = [count * place // number for place in range(number + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(edges)]


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Sizes of the batches of an epoch. A last batch of one image is merged into the previous one, since BatchNorm needs two."""
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


def batches(count: int, batch_size: int, source: np.random.Generator) -> list[np.ndarray]:
    """The shuffled indices of one epoch, split into batches."""
    return np.split(source.permutation(count), np.cumsum(batch_sizes(count, batch_size))[:-1])

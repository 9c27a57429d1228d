"""The order of the stages: teacher → initial images → views → ascent → refinement."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwa_fast.config import SynthesisConfig
from dwa_fast.engine.ascent import Arena, Ascent
from dwa_fast.engine.backend import Execution, resolve
from dwa_fast.engine.refine import Refinement, matching_dominates, noise
from dwa_fast.engine.teacher import Network, check_precision, prepare
from dwa_fast.errors import InputError
from dwa_fast.schedule import draw_schedule
from dwa_fast.seeding import generator

log = logging.getLogger("dwa_fast")

_CHUNK = 10  # iterations that are queued on a GPU between two reports of progress

Progress = Callable[[int, int], None]  # called with the iterations finished and the iterations in all


@dataclass(frozen=True)
class Batch:
    """One batch of work; `number` picks its random streams."""

    number: int
    images: Tensor  # [B, C, H, W], normalised
    labels: Tensor  # [B]


class Lane:
    """A network with its own weights, for one batch after the other."""

    def __init__(self, network: Network, config: SynthesisConfig, execution: Execution) -> None:
        self.config, self.execution = config, execution
        self.network = self.matcher = network
        if config.matching_weights == "original" and config.adjusts:
            self.matcher = copy.deepcopy(network)
            Arena(self.matcher, execution, moves=False)
        cuda = execution.device.type == "cuda"
        self._stream = torch.cuda.Stream(execution.device) if cuda else None
        self._graph_memory = torch.cuda.graph_pool_handle() if cuda else None  # ascent and refinement take turns
        self.ascent = Ascent(network, config, execution, self._graph_memory)
        self._refinements: dict[torch.Size, Refinement] = {}

    def begin(self, batch: Batch, seed: int) -> Refinement:
        """Views, ascent and start of a batch: all but the iterations."""
        config, execution = self.config, self.execution
        self.wait_for_caller()
        with self.active():
            layout = torch.channels_last if execution.channels_last else torch.contiguous_format
            images = batch.images.to(execution.device, execution.master_dtype, memory_format=layout)
            labels = batch.labels.to(execution.device, torch.int64)
            schedule = draw_schedule(config, images.shape[2], images.shape[3], seed=seed, batch=batch.number).to(execution.device)
            first = torch.zeros((), dtype=torch.int64, device=execution.device)
            seen = self.network.operators.view(images, schedule.rows, first, execution.dtype)
            if images.shape not in self._refinements:
                self._refinements[images.shape] = Refinement(
                    self.network, self.matcher, images.shape, config, execution, self._graph_memory
                )
            refinement = self._refinements[images.shape]
            self.ascent.adjust(seen, labels, generator(seed, "ascent", batch.number))
            start = noise(images, seed=seed, batch=batch.number) if config.initial == "noise" else images
            refinement.load(start, labels, schedule)
        return refinement

    def finish(self, refinement: Refinement) -> tuple[Tensor, Tensor]:
        """Refined images and losses, for the caller's stream."""
        with self.active():
            images, losses = refinement.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.execution.device)
            current.wait_stream(self._stream)
            for tensor in (images, losses):
                tensor.record_stream(current)
        return images, losses

    def wait_for_caller(self) -> None:
        """What the caller's stream has computed so far is there for the lane's own."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.execution.device))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, a GPU's work goes to the lane's own stream."""
        with torch.cuda.stream(self._stream), self.execution.arithmetic():
            yield


class Synthesizer:
    """A teacher made ready once, for any number of batches."""

    def __init__(self, teacher: nn.Module, images: Tensor, config: SynthesisConfig, *, batch_sizes: Sequence[int] = ()) -> None:
        """Check and copy the teacher.

        Args:
            images: [N, C, H, W], such as it will be given.
            batch_sizes: the numbers of images of the batches that will run.
        """
        self.config = config
        self.execution = resolve(config.backend, config.precision, config.device)
        network, self.classes = prepare(teacher, images, self.execution, batch_sizes=batch_sizes)
        copies = [network] + [copy.deepcopy(network) for _ in range(config.concurrent_batches - 1)]
        with check_precision(network, images, self.execution), self.execution.arithmetic():
            self.lanes = [Lane(each, config, self.execution) for each in copies]
        self._warned = False  # whether the log has said that the matching losses dominate

    def logits(
        self,
        images: Tensor,  # [n, C, H, W], normalised
    ) -> Tensor:  # [n, classes] float32 on the CPU
        """What the teacher says, on the device and in the precision that the batches are computed in."""
        lane, execution = self.lanes[0], self.execution
        layout = torch.channels_last if execution.channels_last else torch.contiguous_format
        lane.wait_for_caller()
        with lane.active(), torch.no_grad():
            logits: Tensor = lane.network(images.to(execution.device, execution.dtype, memory_format=layout))
            return logits.float().cpu()

    def run(
        self,
        batches: Sequence[Batch],  # no more than config.concurrent_batches
        *,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Refined images [B, C, H, W] and losses [T, 3] of each batch, on the device; all of them are in flight at once.

        Args:
            progress: called with the iterations that every batch has finished.
        """
        with memory_errors(self.execution, batches):
            return self._run(batches, seed, progress)

    def _run(self, batches: Sequence[Batch], seed: int, progress: Callable[[int], None] | None) -> list[tuple[Tensor, Tensor]]:
        pairs = [(lane, lane.begin(batch, seed)) for lane, batch in zip(self.lanes, batches, strict=False)]
        chunk = 1 if self.execution.device.type == "cpu" else _CHUNK
        for done in range(0, self.config.iterations, chunk):
            for lane, refinement in pairs:
                with lane.active():
                    refinement.advance(min(chunk, self.config.iterations - done))
            if progress:
                progress(min(done + chunk, self.config.iterations))
        results = [lane.finish(refinement) for lane, refinement in pairs]
        for _, losses in results:
            dominating = None if self._warned else matching_dominates(losses, self.config)
            if dominating:
                log.warning(dominating)
                self._warned = True
        return results


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


@contextmanager
def memory_errors(execution: Execution, batches: Sequence[Batch]) -> Iterator[None]:
    """Turns an allocation that failed into one sentence."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the C library's allocations raise the plain kind
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        flight = (
            f"{len(batches)} batches of {len(batches[0].images)} images"
            if len(batches) > 1
            else f"a batch of {len(batches[0].images)} images"
        )
        asked = re.search(r"(?:allocate|asked for) ([\d.]+ (?:[KMG]iB|bytes))", str(error))
        there = ""
        if execution.device.type == "cuda":
            free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info(execution.device))
            there = f"; {free:.1f} of {total:.1f} GiB are free"
        wanted = f" asked for {asked[1]} more" if asked else " does not fit"
        raise InputError(f"out of memory on {execution.device}: {flight}{wanted}{there}; lower the batch size") from error


def count_all(progress: Progress | None, before: int, batches: int, total: int) -> Callable[[int], None] | None:
    """What `Synthesizer.run` calls for a group of batches, given what the caller wants to hear: iterations over all batches."""
    if progress is None:
        return None
    return lambda iterations: progress(before + batches * iterations, total)

"""The order of the stages: teacher → initial images → views → ascent → refinement."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dwa_fast.config import Normalisation, Precision, SynthesisConfig
from dwa_fast.engine.ascent import Arena, Ascent, check_norms
from dwa_fast.engine.backend import Execution, resolve
from dwa_fast.engine.capture import return_stream, take_stream
from dwa_fast.engine.class_statistics import ClassStatistics, check_statistics
from dwa_fast.engine.network import Network
from dwa_fast.engine.refine import Teacher, matching_dominates, noise
from dwa_fast.engine.stages import StagedRefinement, resized
from dwa_fast.engine.teacher import PrecisionError, check_precision, prepare
from dwa_fast.engine.turns import make_turns
from dwa_fast.errors import InputError
from dwa_fast.models.wrappers import listed
from dwa_fast.schedule import make_schedule, make_stages
from dwa_fast.seeding import generator

log = logging.getLogger("dwa_fast")


@dataclass(frozen=True)
class Batch:
    """One batch of work; `number` picks its random streams."""

    number: int
    images: Tensor  # [B, C, H, W], normalised
    labels: Tensor  # [B]
    index: int = 0  # picks the teachers, where these take turns by index
    aims: Sequence[Mapping[str, Tensor]] = ()  # what each teacher matches: [2, C] by layer, mean and variance. Empty: running statistics


def initial(batch: Batch, config: SynthesisConfig, seed: int) -> Tensor:
    """Where the refinement of a batch starts, [B, C, H, W], normalised."""
    return noise(batch.images, seed=seed, batch=batch.number) if config.initial == "noise" else batch.images


class Replica:
    """A copy of the teachers with its own weights, buffers and CUDA stream. It works on one batch at a time."""

    def __init__(self, networks: Sequence[Network], config: SynthesisConfig, normalisation: Normalisation, execution: Execution) -> None:
        self.config, self.normalisation, self.execution = config, normalisation, execution
        self.teachers = [Teacher(network, network) for network in networks]
        if config.matching_weights == "original" and config.adjusts:
            self.teachers = [Teacher(network, copy.deepcopy(network)) for network in networks]
            for _, matcher in self.teachers:
                Arena(matcher, execution, moves=False)
        cuda = execution.device.type == "cuda"
        self._stream = take_stream(execution.device) if cuda else None
        self._graph_memory = torch.cuda.graph_pool_handle() if cuda else None  # ascent and refinement never run at the same time
        self._turns = make_turns(config, len(networks))
        self._ascents = [Ascent(network, config, execution, self._graph_memory) for network in networks]
        self._refinement = StagedRefinement(self.teachers, config, normalisation, execution, self._graph_memory)
        self._norms: list[Tensor] = []  # of each teacher's ascent for the current batch, until they have been checked

    def begin(self, batch: Batch, seed: int) -> None:
        """Start a batch: draw its views, adjust the weights (Eq. 11) and load the initial images. On a GPU this is only queued.

        Where the refinement has stages, the weights are adjusted once, before the first stage, on all images at its size.
        """
        config, execution = self.config, self.execution
        with self._active():
            images = self._to_device(batch.images, execution.master_dtype)
            labels = batch.labels.to(execution.device, torch.int64)
            schedule = make_schedule(config, images.shape[2], images.shape[3], seed=seed, batch=batch.number).to(execution.device)
            first = torch.zeros((), dtype=torch.int64, device=execution.device)
            seen = resized(images, make_stages(config, *images.shape[2:])[0])
            view = execution.operators.view(seen, schedule.rows, first, execution.dtype)
            for place, aim in enumerate(batch.aims):
                self.teachers[place].matcher.aim(aim)
            turns = self._turns if config.teacher_turns == "iteration" else [self._turns[batch.index % len(self._turns)]]
            self._refinement.capture(images.shape, batch.labels, turns)
            self._norms = []
            for place in sorted({place for turn in turns for place, _ in turn}):
                source = generator(seed, f"ascent {place}" if place else "ascent", batch.number)
                self._norms.append(self._ascents[place].adjust(view, labels, source))
            self._refinement.load(initial(replace(batch, images=images), config, seed), labels, schedule, turns)

    def advance(self, iterations: int) -> None:
        """Run some iterations, in pieces that Ctrl-C can interrupt. On a GPU they are only queued.

        Raises:
            InputError: a gradient of the ascent was not finite.
        """
        piece = self.execution.iterations_per_call
        with self._active(wait=False):
            for norms in self._norms:
                check_norms(norms, self.execution.precision)
            self._norms = []
            for done in range(0, iterations, piece):
                self._refinement.advance(min(piece, iterations - done))

    def finish(self) -> tuple[Tensor, Tensor]:  # images [B, C, H, W]; losses [T, 3]: cross-entropy, R_mean, R_var
        """Images and losses as they are now, for the caller's stream; the batch may still be advanced.

        Raises:
            InputError: a loss is not finite.
        """
        with self._active(wait=False):
            images, losses = self._refinement.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.execution.device)
            current.wait_stream(self._stream)
            for tensor in (images, losses):
                tensor.record_stream(current)
        return images, losses

    def close(self) -> None:
        """Wait for the device and free what was captured; the replica cannot be used any more.

        Destroying a graph frees the workspaces of cuBLAS that belong to its stream, which other graphs on that stream would then read (so
        PyTorch 2.12 to 2.14): all graphs of a stream end here, and only then another replica may take the stream.
        """
        if self._stream is None:
            return
        self._stream.synchronize()
        for ascent in self._ascents:
            ascent.close()
        self._refinement.close()
        for network in {network for teacher in self.teachers for network in teacher}:
            network.close()
        return_stream(self._stream)
        self._stream = None

    def view(
        self,
        images: Tensor,  # [B, C, H, W], from `finish`
        iteration: int,
    ) -> Tensor:  # [B, C, H, W]
        """The images in the view of an iteration of the current batch, at the size of its stage."""
        rows, row = self._refinement.schedule.rows, torch.tensor(iteration, device=images.device)
        return self.execution.operators.view(images, rows, row, images.dtype)

    def logits(
        self,
        images: Tensor,  # [n, C, H, W], normalised
        place: int = 0,
    ) -> Tensor:  # [n, classes] float32 on the CPU
        """The logits of a teacher, on the device and in the precision of the synthesis."""
        with self._active(), torch.no_grad():
            logits: Tensor = self.teachers[place].classifier(self._to_device(images, self.execution.dtype))
            return logits.float().cpu()

    def _to_device(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        return images.detach().to(self.execution.device, dtype, memory_format=self.execution.memory_format)

    @contextmanager
    def _active(self, *, wait: bool = True) -> Iterator[None]:
        """Inside, a GPU's work goes to the replica's own stream, by default behind all that the caller's stream has queued."""
        if self._stream is not None and wait:
            self._stream.wait_stream(torch.cuda.current_stream(self.execution.device))
        with torch.cuda.stream(self._stream), self.execution.arithmetic():
            yield


class Synthesizer:
    """Teachers prepared once, for any number of batches. As a context manager it is closed at the end."""

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module],
        images: Tensor,
        config: SynthesisConfig,
        normalisation: Normalisation,
        *,
        batch_sizes: Sequence[int] = (),
    ) -> None:
        """Check and copy the teachers.

        Args:
            teacher: one, or several which take turns as `make_turns` says.
            images: [N, C, H, W], examples of the images to come, normalised.
            normalisation: of the images.
            batch_sizes: the numbers of images of the batches that will run.
        Raises:
            TypeError, InputError: as `prepare` and `make_turns`, or the teachers know different numbers of classes.
        """
        teachers = listed(teacher)
        self._count = len(teachers)
        self.config, self.normalisation = config, normalisation
        if teachers:
            make_turns(config, len(teachers))
        try:
            self._start(teachers, images, config.precision, batch_sizes)
        except PrecisionError as error:
            if config.precision != "auto":
                raise
            log.warning("%s; it computes in fp32", error.cause)
            self._start(teachers, images, "fp32", batch_sizes)
        self._warned = False  # whether the dominating matching losses have been logged

    def _start(self, teachers: Sequence[nn.Module], images: Tensor, precision: Precision, batch_sizes: Sequence[int]) -> None:
        config = self.config
        self.execution = resolve(config.backend, precision, config.device, *teachers)
        sizes = [(stage.height, stage.width) for stage in make_stages(config, *images.shape[2:])]
        networks, self.classes = self._prepare(teachers, images, batch_sizes, sizes)
        copies = [networks] + [copy.deepcopy(networks) for _ in range(config.concurrent_batches - 1)]
        with ExitStack() as checks:
            for network in networks:
                checks.enter_context(check_precision(network, images, self.execution))
            checks.enter_context(self.execution.arithmetic())
            self.replicas = [Replica(each, config, self.normalisation, self.execution) for each in copies]

    def _prepare(
        self, teachers: Sequence[nn.Module], images: Tensor, batch_sizes: Sequence[int], sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Network], int]:
        """A network of each teacher, and how many classes they all know."""
        if not teachers:
            raise InputError("teacher must be a torch.nn.Module or a sequence of at least one, got an empty one")
        found = []
        for number, teacher in enumerate(teachers, 1):
            try:
                found.append(prepare(teacher, images, self.execution, batch_sizes=batch_sizes, sizes=sizes))
            except InputError as error:
                if len(teachers) == 1:
                    raise
                raise InputError(f"teacher {number} of {len(teachers)}: {error}") from error
        networks, classes = [network for network, _ in found], [count for _, count in found]
        if len(set(classes)) > 1:
            raise InputError(f"teachers must know the same classes, got {', '.join(map(str, classes))} of them")
        return networks, classes[0]

    def logits(
        self,
        images: Tensor,  # [n, C, H, W], normalised
        place: int = 0,
    ) -> Tensor:  # [n, classes] float32 on the CPU
        """The logits of a teacher, the first one by default, on the device and in the precision of the synthesis."""
        return self.replicas[0].logits(images, place)

    def check_statistics(self, statistics: Sequence[ClassStatistics], labels: Tensor) -> None:
        """Raise InputError unless these are statistics of the teachers' layers, for the classes of the labels."""
        networks = [teacher.matcher for teacher in self.replicas[0].teachers]
        sizes = [{name: len(layer.running_mean) for name, layer in network.layers.items()} for network in networks]
        check_statistics(statistics, sizes, labels, self.classes)

    @property
    def predictors(self) -> list[Callable[[Tensor], Tensor]]:
        """`logits` of each teacher."""
        return [partial(self.logits, place=place) for place in range(self._count)]

    def close(self) -> None:
        """Free what the replicas hold on a GPU; the synthesizer cannot be used any more. Results stay."""
        for replica in self.replicas:
            replica.close()

    def __enter__(self) -> Synthesizer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(
        self,
        batches: Sequence[Batch],  # no more than config.concurrent_batches
        *,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Refined images [B, C, H, W] and losses [T, 3] of each batch, on the device; all batches run at the same time.

        Args:
            progress: called with the iterations that every batch has finished; with 1 where there are none.
        """
        with memory_errors(self.execution, batches):
            return self._run(batches, seed, progress)

    def _run(self, batches: Sequence[Batch], seed: int, progress: Callable[[int], None] | None) -> list[tuple[Tensor, Tensor]]:
        if self.config.iterations == 0:
            if progress:
                progress(1)
            return [(initial(batch, self.config, seed), torch.zeros(0, 3)) for batch in batches]
        replicas = self.replicas[: len(batches)]
        for replica, batch in zip(replicas, batches, strict=True):
            replica.begin(batch, seed)
        piece, iterations = self.execution.iterations_per_call, self.config.iterations
        for done in range(0, iterations, piece):
            for replica in replicas:
                replica.advance(min(piece, iterations - done))
            if progress:
                progress(min(done + piece, iterations))
        results = [replica.finish() for replica in replicas]
        for _, losses in results:
            dominating = None if self._warned else matching_dominates(losses, self.config)
            if dominating:
                log.warning(dominating)
                self._warned = True
        return results


def check_arguments(images: Tensor, labels: Tensor, channels: int) -> None:
    """Check what can be checked without the teacher; raises as `synthesize` does."""
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images must be normalised floating point, got {images.dtype}")
    if labels.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
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
    """Turns a failed allocation into an InputError with the size of the batches and the memory that is free."""
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
        match = re.search(r"(?:allocate|asked for) ([\d.]+ (?:[KMG]iB|bytes))", str(error))
        there = ""
        if execution.device.type == "cuda":
            free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info(execution.device))
            there = f"; {free:.1f} of {total:.1f} GiB are free"
        wanted = f" asked for {match[1]} more" if match else " does not fit"
        raise InputError(f"out of memory on {execution.device}: {flight}{wanted}{there}; lower the batch size") from error

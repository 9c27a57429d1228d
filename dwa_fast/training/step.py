"""One step of a training: losses, gradients, optimiser and average of the weights; on a GPU captured once and then replayed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dwa_fast.data.loader import TrainingBatch
from dwa_fast.engine.capture import TRACING, GraphMemory, capture_graph, return_stream, take_stream
from dwa_fast.errors import first_line
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.training.state import WeightAverage

log = logging.getLogger("dwa_fast")

CALLED = 3  # steps on batches of a shape before they are captured: libraries choose their algorithms, the optimiser makes its state


class TrainingStep:
    """Trains a network on one batch after the other.

    Where steps are captured, those on the first three batches of a shape are called, and from the fourth one on a CUDA graph is replayed
    on a copy of the batch. Both compute the same bits. A step that cannot be captured is called every time, and the log says why.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        losses: Callable[[TrainingBatch], Iterable[Tensor]],
        average: WeightAverage | None,
        device: torch.device,
        *,
        captures: bool = True,  # on a GPU
    ) -> None:
        self.total_loss = torch.zeros((), device=device)  # of the steps of this epoch so far
        self._optimizer, self._losses, self._average, self._device = optimizer, losses, average, device
        self._captures = captures and _has_graphs(device) and not _counts_batches(model)
        self._called: Counter[Any] = Counter()
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, TrainingBatch]] = {}
        self._memory: GraphMemory | None = None  # of all graphs, which never run at the same time
        self._stream = take_stream(device) if self._captures else None
        self._rate: Tensor | None = None
        if _has_graphs(device):  # a graph reads the learning rate from memory; called steps do too, for the same bits
            self._rate = torch.zeros((), dtype=torch.float32, device=device)
            for group in optimizer.param_groups:
                group["lr"] = self._rate
                if "capturable" in group:  # a checkpoint may say otherwise
                    group["capturable"] = True

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Inside, batches are made and steps are taken."""
        self.total_loss.zero_()
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def take(self, batch: TrainingBatch, rate: float) -> None:
        """One step with that learning rate."""
        if self._rate is None:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
        else:
            self._rate.fill_(rate)
        shape = tuple((name, tensor.shape) for name, tensor in batch.tensors().items())
        if self._captures and shape not in self._graphs and self._called[shape] >= CALLED:
            self._capture(shape, batch)
        if shape not in self._graphs:
            self._called[shape] += 1
            self._call(batch)
            return
        graph, read = self._graphs[shape]
        for name, tensor in batch.tensors().items():
            getattr(read, name).copy_(tensor)
        graph.replay()

    def close(self) -> None:
        """Give the gradients' memory back, and that of the graphs."""
        if self._stream is not None:
            self._stream.synchronize()
        self._optimizer.zero_grad()
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._captures = False
        if self._stream is not None:
            return_stream(self._stream)
            self._stream = None

    def _call(self, batch: TrainingBatch) -> None:
        self._optimizer.zero_grad()
        for value in self._losses(batch):
            value.backward()
            self.total_loss += value.detach()
        self._optimizer.step()
        if self._average:
            self._average.update()

    def _capture(self, shape: Any, batch: TrainingBatch) -> None:
        read = replace(batch, **{name: tensor.clone() for name, tensor in batch.tensors().items()})  # type: ignore[arg-type]
        self._optimizer.zero_grad()  # the graph makes its own gradients
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        assert self._stream is not None
        try:
            with TRACING:
                self._graphs[shape] = capture_graph(lambda: self._call(read), self._stream, self._memory), read
        except RuntimeError as error:
            self._captures = False
            log.info("training steps are called, not captured: %s", first_line(error))


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _counts_batches(model: nn.Module) -> bool:
    """Whether a layer averages its statistics over all batches, by a count that Python reads in every step."""
    return any(layer.momentum is None for layer in batchnorm_layers(model).values() if hasattr(layer, "momentum"))

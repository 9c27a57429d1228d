"""Losses for TensorBoard or Weights & Biases, whose packages are needed only if tracking is enabled."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from dwa_fast.config import Tracker
from dwa_fast.errors import InputError
from dwa_fast.sets.loss_log import Rows
from dwa_fast.sets.store import BatchSpec


class _Sink(Protocol):
    def log(self, iteration: int, losses: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Scalars in a file beside the manifest: `tensorboard --logdir DIR` shows them."""

    def __init__(self, folder: Path) -> None:
        self._writer = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))

    def log(self, iteration: int, losses: Mapping[str, float]) -> None:
        for name, value in losses.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of project dwa-fast, named as the folder, with the settings of the set."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._run = _imported("wandb", "wandb").init(project="dwa-fast", name=folder.name, config=dict(settings))
        self._run.define_metric("loss/*", step_metric="iteration")  # which may go back where a lost batch is made again

    def log(self, iteration: int, losses: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **losses})

    def close(self) -> None:
        self._run.finish()


class Tracking:
    """Called with finished batches; sends their losses on, with iterations counted over the whole set."""

    def __init__(self, sink: _Sink, iterations: int) -> None:
        self._sink, self._iterations = sink, iterations

    def __call__(self, batch: BatchSpec, rows: Rows) -> None:
        """Send the losses of a batch."""
        for iteration, ce, mean, var in rows:
            step = batch.number * self._iterations + int(iteration)
            self._sink.log(step, {"loss/ce": ce, "loss/mean": mean, "loss/var": var})


@contextmanager
def tracked(name: Tracker, folder: Path, settings: Mapping[str, Any]) -> Iterator[list[Tracking]]:
    """What is to be called with finished batches so that their losses go to that tracker; nothing for "none".

    Args:
        settings: of the set in the folder.
    Raises:
        InputError: the tracker's package is not installed.
    """
    if name == "none":
        yield []
        return
    sink: _Sink = _TensorBoard(folder) if name == "tensorboard" else _WeightsAndBiases(folder, settings)
    try:
        yield [Tracking(sink, settings["iterations"])]
    finally:
        sink.close()


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"--track {package} needs the package {package}: pip install 'dwa-fast[{package}]'") from error

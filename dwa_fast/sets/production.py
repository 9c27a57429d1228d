"""The production line of a set: initial images are read, batches computed and files written at the same time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dwa_fast.config import Progress
from dwa_fast.data.datasets import denormalise, to_levels
from dwa_fast.data.initial import InitialImages
from dwa_fast.engine.synthesis import Batch, Synthesizer
from dwa_fast.errors import InputError
from dwa_fast.sets.background import Ahead, Background
from dwa_fast.sets.loss_log import Rows
from dwa_fast.sets.preview import Preview
from dwa_fast.sets.store import ImageStore, WorkItem
from dwa_fast.sets.workers import Workers

Observer = Callable[[WorkItem, Rows], None]  # called with a batch that is on the disk, and its recorded losses

_ROOM = 4  # batches that may wait to be written, for each that is in flight


class Line:
    """Makes the batches that this process takes, until there is nothing left to take."""

    def __init__(
        self,
        run: Synthesizer,
        start: InitialImages,
        store: ImageStore,
        workers: Workers,
        items: list[WorkItem],
        *,
        seed: int,
    ) -> None:
        self.run, self.start, self.store, self.workers, self.items, self.seed = run, start, store, workers, items, seed
        self.observers: list[Observer] = []
        self.preview: Preview | None = None
        self.progress: Progress | None = None
        self.kept, self.todo = 0, 0  # batches that were there, and that this process or its workers together have to make
        self._made = 0

    def produce(self) -> int:
        """Make them; returns the number of images."""
        flight, count = self.run.config.concurrent_batches, 0
        if self.progress:
            self.progress(*self._iterations(0))
        with Ahead(self._load) as ahead, Background(_ROOM * flight) as background:
            while group := ahead.take(background.check):

                def tick(iterations: int, batches: int = len(group)) -> None:
                    background.check()
                    if self.workers.exclusive or 2 * iterations >= self.run.config.iterations:  # what is taken early, others cannot take
                        ahead.begin()
                    if self.progress:
                        self.progress(*self._iterations(batches * iterations))

                results = self.run.run([batch for _, batch in group], seed=self.seed, progress=tick)
                for (item, _), (refined, losses) in zip(group, results, strict=True):
                    levels = to_levels(denormalise(refined, self.run.config))
                    background.submit(partial(self._keep, item, levels, losses.cpu()))
                    count += len(item.labels)
                self._made += len(group)
        return count

    def complete(self) -> None:
        """Complete the set, if every batch of it is there.

        Raises:
            InputError: files that were there have been damaged or removed since.
        """
        left = self.store.finish(self.items)
        if left and not self.workers.partial:
            raise InputError(
                f"{self.store.folder}: files of {len(left)} batches were damaged or removed meanwhile; the same command makes them again"
            )
        if self.preview:
            self.preview.draw()

    def _load(self) -> list[tuple[WorkItem, Batch]]:
        """The next batches in flight, with their initial images; none when there is nothing left to take."""
        group = [self.items[number] for number in self.workers.take(self.run.config.concurrent_batches)]
        return [(item, Batch(item.number, self.start.load(item.labels, item.index), torch.tensor(item.labels))) for item in group]

    def _keep(
        self,
        item: WorkItem,
        levels: Tensor,  # [n, C, H, W] uint8 on the CPU
        losses: Tensor,  # [T, 3] on the CPU
    ) -> None:
        """Bring a batch to the disk, and tell everybody."""
        rows = self.store.write(item, levels, losses, dict(self.start.skipped))
        self.workers.done(item.number)
        if self.preview and self.preview.shows(item):
            self.preview.draw()
        for observer in self.observers:
            observer(item, rows)

    def _iterations(self, current: int) -> tuple[int, int]:
        """Iterations that are finished, and in all, where those of the batches in flight are at `current`."""
        each = self.run.config.iterations
        total = (self.kept + self.todo) * each
        return min((self.kept + self._made + self.workers.elsewhere()) * each + current, total), total

"""The refinement of a batch in stages: each at a size of its own (FADRM, arXiv 2506.24125), or each of more images (DELT, 2411.19946)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast.config import Normalisation, SynthesisConfig
from dwa_fast.engine.backend import Execution
from dwa_fast.engine.capture import GraphMemory
from dwa_fast.engine.refine import Refinement, Teacher, finite
from dwa_fast.engine.turns import Turn
from dwa_fast.schedule import Schedule, Stage, joining_rounds, make_stages, refined_counts


class StagedRefinement:
    """Refines one batch after the other, from stage to stage.

    A stage of size D begins with new moments of Adam, and with the images

        x ← α·resize(x, D) + (1 − α)·resize(p, D)          α = config.stage_mix, p: the initial images

    The first one begins with resize(p, D). A stage that is a round has all images of the rounds before and those that join in it, with one
    state of Adam for all: moments of an image that joins are 0, and the count of steps goes on. Losses are those of the images that are
    refined. Learning rate and views are those of the schedule, which runs over all stages.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        config: SynthesisConfig,
        normalisation: Normalisation,
        execution: Execution,
        graph_memory: GraphMemory | None = None,  # see CapturedStep
    ) -> None:
        fixed = partial(Refinement, config=config, normalisation=normalisation, execution=execution, graph_memory=graph_memory)
        self._make = partial(fixed, teachers)
        self._config, self._precision, self._in_rounds = config, execution.precision, config.rounds > 1
        self._refinements: dict[torch.Size, Refinement] = {}
        self._losses = torch.zeros(config.iterations, 3, dtype=execution.master_dtype, device=execution.device)
        self.schedule: Schedule  # this and the rest: of the current batch
        self._turns: Sequence[Turn]
        self._initial: Tensor
        self._labels: Tensor
        self._stages: list[Stage]
        self._joins: Tensor  # [B] on the CPU: the round from which each image is refined
        self._state: tuple[Tensor, Tensor, Tensor]  # of all images: their pixels and Adam's moments before the current round
        self._current: Refinement
        self._done: int  # iterations

    def capture(
        self,
        shape: torch.Size,  # [B, C, H, W]
        labels: Tensor,  # [B]
        turns: Sequence[Turn],
    ) -> None:
        """Capture the steps of every stage of such images, once for each shape and turn."""
        stages, counts = make_stages(self._config, *shape[2:]), [len(labels)]
        if self._in_rounds:
            counts = refined_counts(labels.tolist(), self._config.rounds)
        for stage in stages:
            own = torch.Size((counts[stage.round], shape[1], stage.height, stage.width))
            if own not in self._refinements:
                self._refinements[own] = self._make(own)
            self._refinements[own].capture(turns)

    def load(
        self,
        images: Tensor,  # [B, C, H, W], of a shape that has been captured: where the refinement starts
        labels: Tensor,  # [B]
        schedule: Schedule,
        turns: Sequence[Turn],  # which the iterations have one after the other, through all stages
    ) -> None:
        """Begin a batch; the networks already hold its weights θ̃."""
        self._turns, self.schedule, self._initial, self._labels, self._done = turns, schedule, images, labels, 0
        self._stages = make_stages(self._config, *images.shape[2:])
        if self._in_rounds:
            self._joins = torch.tensor(joining_rounds(labels.tolist(), self._config.rounds))
            self._begin_round((images.clone(), torch.zeros_like(images), torch.zeros_like(images)))
        else:
            self._begin_size(resized(images, self._stages[0]))

    def advance(self, iterations: int) -> None:
        """Do that many iterations, T at most for a batch; on a GPU this only queues them."""
        while iterations:
            now = min(iterations, self._stages[0].stop - self._done)
            self._current.advance(now, self._done)
            self._done += now
            iterations -= now
            if self._done == self._stages[0].stop and len(self._stages) > 1:
                self._keep_losses()
                if self._in_rounds:
                    state = self._round_state()
                    del self._stages[0]
                    self._begin_round(state)
                else:
                    stage, share = self._stages[1], self._config.stage_mix
                    mixed = share * resized(self._current.images, stage) + (1 - share) * resized(self._initial, stage)
                    del self._stages[0]
                    self._begin_size(mixed)

    def result(self) -> tuple[Tensor, Tensor]:  # images [B, C, H, W] of the stage's size; losses [T, 3]: cross-entropy, R_mean, R_var
        """Images and losses as they are now.

        Raises:
            InputError: a loss is not finite.
        """
        self._keep_losses()
        images = self._round_state()[0] if self._in_rounds else self._current.images.clone()
        return images, finite(self._losses.clone(), self._precision)

    def close(self) -> None:
        """Free what was captured; the device must have finished with it."""
        for refinement in self._refinements.values():
            refinement.close()

    def _begin_size(self, images: Tensor) -> None:
        stage = self._stages[0]
        self._current = self._refinements[images.shape]
        self._current.load(images, self._labels, self.schedule.part(stage.start, stage.stop), self._turns)

    def _begin_round(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        self._state, places = state, self._places
        images, *moments = (each[places] for each in state)
        self._current = self._refinements[images.shape]
        self._current.load(
            images, self._labels[places], self.schedule, self._turns, done=self._stages[0].start, moments=(moments[0], moments[1])
        )

    @property
    def _places(self) -> Tensor:
        """The images that the current round refines."""
        return (self._joins <= self._stages[0].round).nonzero().flatten().to(self._labels.device)

    def _round_state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels and moments of all images as they are now."""
        refined, places = (self._current.images, self._current.exp_avg, self._current.exp_avg_sq), self._places
        pixels, first, second = (before.index_copy(0, places, now) for before, now in zip(self._state, refined, strict=True))
        return pixels, first, second

    def _keep_losses(self) -> None:
        stage = self._stages[0]
        first = stage.start if self._in_rounds else 0  # the losses of a round lie where those of all iterations do
        self._losses[stage.start : stage.stop].copy_(self._current.losses[first : first + stage.stop - stage.start])


def resized(
    images: Tensor,  # [B, C, H, W]
    stage: Stage,
) -> Tensor:  # [B, C, stage.height, stage.width]
    """The images at the size of a stage, bilinear without antialiasing; themselves where they have it."""
    size = stage.height, stage.width
    return images if images.shape[2:] == size else F.interpolate(images, size, mode="bilinear", align_corners=False)

"""The inner loop: view → forward → losses → backward → Adam and clamp, T times, with the weights frozen (Eq. 15)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwa_fast.config import Normalisation, SynthesisConfig
from dwa_fast.engine.backend import Execution
from dwa_fast.engine.capture import CapturedStep, GraphMemory
from dwa_fast.engine.network import Network
from dwa_fast.engine.turns import ALONE, Turn
from dwa_fast.errors import InputError
from dwa_fast.ops.view_adam_clip import blocks_shape
from dwa_fast.schedule import HEIGHT, WIDTH, Schedule
from dwa_fast.seeding import generator, normal

_TERMS = ("cross-entropy", "R_mean", "R_var")
_DOMINATES = 100.0  # times the cross-entropy


class Teacher(NamedTuple):
    """The networks of a teacher in the refinement."""

    classifier: Network  # θ̃: gives the cross-entropy
    matcher: Network  # gives the matching terms: the same network, or θ


class Refinement:
    """The inner loop for batches of one shape: all buffers lie at fixed places, and an iteration neither allocates nor waits."""

    def __init__(
        self,
        teachers: Sequence[Teacher],
        shape: torch.Size,  # [B, C, H, W]
        config: SynthesisConfig,
        normalisation: Normalisation,
        execution: Execution,
        graph_memory: GraphMemory | None = None,  # see CapturedStep
    ) -> None:
        self.teachers = teachers
        self.config, self.execution = config, execution
        dtype, device = execution.master_dtype, execution.device
        self.images = torch.zeros(shape, dtype=dtype, device=device).to(memory_format=execution.memory_format)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.images), torch.zeros_like(self.images)
        self.labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.rows = torch.zeros(config.iterations, 7, dtype=torch.int32, device=device)
        self.rows[:, HEIGHT], self.rows[:, WIDTH] = shape[2], shape[3]  # until a schedule is loaded: the whole image
        self.learning_rates = torch.zeros(config.iterations, dtype=torch.float32, device=device)
        self.losses = torch.zeros(config.iterations, 3, dtype=dtype, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.low, self.high = (torch.tensor(bound, dtype=dtype, device=device) for bound in normalisation.bounds)
        lambdas = torch.tensor([config.lambda_mean, config.lambda_var], dtype=dtype, device=device)
        self.grad_matching = lambdas * execution.loss_scale  # the gradient of R_mean and R_var
        self.grad_prior = torch.tensor(execution.loss_scale, dtype=dtype, device=device)  # that of SRe2L's priors
        self._graph_memory = graph_memory
        self._captured: dict[Turn, CapturedStep] = {}
        self._turns: Sequence[Turn]  # of the current batch
        for network in {network for teacher in teachers for network in teacher}:
            network.refresh()

    def capture(self, turns: Sequence[Turn]) -> None:
        """Capture the steps of these turns where that has not been done; this changes the buffers."""
        for turn in turns:
            if turn not in self._captured:
                captures = not any(network.capture_error for place, _ in turn for network in self.teachers[place])
                kind: Any = {"compiles": True, "captures": captures, "graph_memory": self._graph_memory}
                self._captured[turn] = CapturedStep(partial(self._iterate, turn), self.execution, **kind)

    def load(
        self,
        images: Tensor,
        labels: Tensor,
        schedule: Schedule,
        turns: Sequence[Turn] = (ALONE,),
        *,
        done: int = 0,
        moments: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Set every buffer for a new batch, or a stage of it with at most T iterations; the networks already hold its weights θ̃.

        Args:
            done: iterations of the schedule that have passed. moments: Adam's, exp_avg and exp_avg_sq, after them; None: zero.
        """
        self.capture(turns)
        self._turns = turns
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.rows[: len(schedule.rows)].copy_(schedule.rows)
        self.learning_rates[: len(schedule.rows)].copy_(schedule.learning_rates)
        self.step.fill_(done)
        zero = torch.zeros((), dtype=self.images.dtype, device=self.images.device)
        for buffer, value in zip((self.exp_avg, self.exp_avg_sq), moments or (zero, zero), strict=True):
            buffer.copy_(value)
        for network in {network for turn in turns for place, _ in turn for network in self.teachers[place]}:
            network.refresh()
        for turn in turns:
            self._captured[turn].refresh()

    def advance(self, iterations: int, before: int = 0) -> None:
        """Do that many iterations; on a GPU this only queues them.

        Args:
            before: iterations that the batch has had: the next one is that of turn `before` mod the number of turns.
        """
        if len(self._turns) == 1:
            self._captured[self._turns[0]].run(iterations)
            return
        for iteration in range(before, before + iterations):
            self._captured[self._turns[iteration % len(self._turns)]].run(1)

    def close(self) -> None:
        """Free what was captured; the device must have finished with it."""
        for captured in self._captured.values():
            captured.close()

    def _iterate(self, turn: Turn = ALONE) -> None:
        """One iteration; row, learning rate and place of the losses follow from the counter.

        On CUDA the launches are: `view`; for each layer a convolution of cuDNN and `bn_act`, which leaves partial sums of the moments;
        pooling, linear layer and `cross_entropy`, beside `matching_gradient` on a second stream; backwards the same layers in reverse
        order, `bn_act` with the gradients of the moments; `view_adam_clip_`; `log_losses_`.
        """
        operators, scale = self.execution.operators, self.execution.loss_scale
        view = operators.view(self.images, self.rows, self.step, self.execution.dtype).detach()
        if (blocks := self._blocks(turn)) is not None:
            view = view.view(blocks)
        view.requires_grad_(True)
        results, gradients, terms = list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor]]()
        for place, weight in turn:
            classifier, matcher = self.teachers[place]
            logits = classifier(view, deferred=True)
            if matcher is not classifier:
                matcher(view, deferred=True)
            grad_matching = self.grad_matching if weight == 1 else weight * self.grad_matching
            matching, moments, grad_moments = matcher.matching_gradient(self.config.first_layer_weight, grad_matching)
            ce, grad_logits = operators.cross_entropy(logits, self.labels, weight * scale)
            results += [logits, *moments]
            gradients += [grad_logits, *grad_moments]
            terms.append((ce, matching))
        priors = self._priors(view)
        for place, _ in turn:
            self.teachers[place].matcher.join()
        (gradient,) = torch.autograd.grad([*results, *priors], view, [*gradients, *[self.grad_prior] * len(priors)])
        if len(turn) > 1:
            ce, matching = (sum(w * term for (_, w), term in zip(turn, own, strict=True)) for own in zip(*terms, strict=True))
        schedule = self.rows, self.learning_rates, self.step
        operators.view_adam_clip_(self.images, gradient, self.exp_avg, self.exp_avg_sq, *schedule, self.low, self.high, scale)
        operators.log_losses_(self.losses, self.step, ce, matching)

    def _blocks(self, turn: Turn) -> torch.Size | None:
        """The shape of the view in blocks of 2×2 pixels, where all that reads it takes it so."""
        priors = self.config.tv_l2 or self.config.l2_scale
        stems = all(network.takes_blocks for place, _ in turn for network in self.teachers[place])
        return blocks_shape(self.images) if stems and not priors else None

    def _priors(self, view: Tensor) -> list[Tensor]:
        """SRe2L's weighted priors, where they have a weight."""
        priors = []
        if self.config.tv_l2:
            priors.append(self.config.tv_l2 * total_variation(view.to(self.execution.master_dtype)))
        if self.config.l2_scale:
            priors.append(self.config.l2_scale * mean_norm(view.to(self.execution.master_dtype)))
        return priors


def matching_dominates(
    losses: Tensor,  # [T, 3]: cross-entropy, R_mean, R_var
    config: SynthesisConfig,
) -> str | None:
    """A warning if the weighted matching terms of the last iteration exceed 100 times the cross-entropy; else None.

    The cross-entropy counts as at least 1 here, because it falls to 0 once the images are learnt.
    """
    ce, mean, var = losses[-1].tolist()
    matching = config.lambda_mean * mean + config.lambda_var * var
    if matching <= _DOMINATES * max(ce, 1.0):
        return None
    return (
        f"matching losses dominate: {config.lambda_mean:g} × {mean:.3g} + {config.lambda_var:g} × {var:.3g} beside a cross-entropy of "
        f"{ce:.3g} in the last iteration; lower --lambda-mean or --lambda-var"
    )


def finite(
    losses: Tensor,  # [T, 3]
    precision: str,
) -> Tensor:  # [T, 3]
    """The losses; raises InputError if one is not finite."""
    bad = (~torch.isfinite(losses).all(1)).nonzero()
    if not len(bad):
        return losses
    first = int(bad[0])
    finite = torch.isfinite(losses[first]).tolist()
    if first and not finite[0]:
        remedy = "lower the learning rate or rho"
    else:
        cause = "the teacher's activations overflow" if finite[0] else "no image has changed yet, so its weights overflow"
        remedy = f"{cause}; take {'--precision bf16' if precision == 'fp16' else 'a lower rho'} or another teacher"
    names = ", ".join(name for name, good in zip(_TERMS, finite, strict=True) if not good)
    raise InputError(f"losses ({names}) are not finite from iteration {first + 1} of {len(losses)} on; {remedy}")


def noise(
    images: Tensor,  # [B, C, H, W]: gives shape, type and device
    *,
    seed: int,
    batch: int,
) -> Tensor:  # [B, C, H, W]
    """Standard normal noise, SRe2L's start."""
    return normal(generator(seed, "noise", batch), tuple(images.shape)).to(images)


def total_variation(
    images: Tensor,  # [N, C, H, W], float32 or wider
) -> Tensor:  # []
    """‖∂→x‖₂ + ‖∂↓x‖₂ + ‖∂↗x‖₂ + ‖∂↘x‖₂, each norm over all differences between such neighbours in the batch (SRe2L's tv_l2)."""
    right = images[:, :, :, :-1] - images[:, :, :, 1:]
    down = images[:, :, :-1] - images[:, :, 1:]
    up_right = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    down_right = images[:, :, :-1, :-1] - images[:, :, 1:, 1:]
    return torch.stack([torch.linalg.vector_norm(each) for each in (right, down, up_right, down_right)]).sum()


def mean_norm(
    images: Tensor,  # [N, C, H, W], float32 or wider
) -> Tensor:  # []
    """The mean of ‖x_n‖₂ over the images (SRe2L's l2_scale)."""
    norms: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3))
    return norms.mean()

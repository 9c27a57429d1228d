"""Directed weight adjustment: θ → θ̃ in K steps of gradient ascent on the cross-entropy (Eq. 11, Algorithm 1)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dwa_fast.config import SynthesisConfig
from dwa_fast.engine.backend import Execution
from dwa_fast.engine.capture import CapturedStep, GraphMemory
from dwa_fast.engine.fuse import BatchNormAct
from dwa_fast.engine.network import Network
from dwa_fast.errors import InputError
from dwa_fast.seeding import normal


class Arena:
    """All weights of a network as one flat tensor, their gradients as a second one, and both in compute precision beside them.

    Every parameter becomes a view into an arena: normalisation layers into the master weights, all others into the copy in compute
    precision. The global norm, the update with its rounding, and the restoring are then one pass each. Buffers of the other layers, such as
    those that spectral norm computes weights with, are rounded too.
    """

    def __init__(
        self,
        network: nn.Module,
        execution: Execution,
        *,
        moves: bool = True,  # whether the weights are ever to be changed: others need neither gradients nor a second copy
    ) -> None:
        kept = {p for layer in network.modules() if isinstance(layer, (BatchNormAct, _BatchNorm)) for p in layer.parameters(recurse=False)}
        self.parameters = list(network.parameters())
        total = sum(p.numel() for p in self.parameters)
        self.weights = torch.empty(total, dtype=execution.master_dtype, device=execution.device)  # [P] θ, then θ̃
        self.gradients = torch.zeros_like(self.weights) if moves else self.weights[:0]  # [P]
        rounds = execution.dtype != execution.master_dtype
        self.compute = torch.zeros_like(self.weights, dtype=execution.dtype) if rounds else None  # [P]
        self.slots: list[Tensor] = []  # where the gradient of each parameter goes, shaped like it
        start = 0
        for p in self.parameters:
            part = slice(start, start + p.numel())
            start = part.stop
            master = _shaped(self.weights[part], p, execution.channels_last)
            master.copy_(p.detach())
            if moves:
                self.slots.append(_shaped(self.gradients[part], p, execution.channels_last))
            p.data = master if self.compute is None or p in kept else _shaped(self.compute[part], p, execution.channels_last)
        if rounds:
            _round_buffers(network, execution)
        self.original = self.weights.clone() if moves else self.weights
        self.restore()

    def restore(self) -> None:
        """θ̃ → θ, bit for bit."""
        self.weights.copy_(self.original)
        if self.compute is not None:
            self.compute.copy_(self.weights)


class Ascent:
    """Adjusts the weights of a network for a batch, and restores them bit for bit."""

    def __init__(self, network: Network, config: SynthesisConfig, execution: Execution, graph_memory: GraphMemory | None = None) -> None:
        self.network = network
        self.config = config
        self.execution = execution
        self._graph_memory = graph_memory  # see CapturedStep
        self.arena = Arena(network, execution, moves=config.adjusts)
        self._norms = torch.zeros(max(1, config.steps), dtype=execution.master_dtype, device=execution.device)  # [K]
        self._count = torch.zeros((), dtype=torch.int64, device=execution.device)
        self._steps: dict[torch.Size, tuple[Tensor, Tensor, CapturedStep]] = {}  # per shape: the input of the step, its labels, the step

    def adjust(
        self,
        view: Tensor,  # [B, C, H, W], initial real images in the view of iteration 0
        labels: Tensor,  # [B]
        source: np.random.Generator,  # of the random direction
    ) -> Tensor:  # [K] gradient norms, for `check_norms`; overwritten by the next batch
        """Move the weights from θ to θ̃; on a GPU this only queues the work."""
        self.arena.restore()
        if not self.config.adjusts:
            return self._norms[:0]
        if self.config.ascent == "random":
            return self._randomly(source)
        if view.shape not in self._steps:
            inputs = view.clone(), labels.clone()
            captured = CapturedStep(
                lambda: self._step(*inputs), self.execution, captures=not self.network.capture_error, graph_memory=self._graph_memory
            )
            self._steps[view.shape] = (*inputs, captured)
        static_view, static_labels, captured = self._steps[view.shape]
        static_view.copy_(view)
        static_labels.copy_(labels)
        self.arena.restore()
        self._count.zero_()
        captured.refresh()
        captured.run(self.config.steps)
        return self._norms

    def close(self) -> None:
        """Free what was captured; the device must have finished with it."""
        for _, _, captured in self._steps.values():
            captured.close()

    def _randomly(self, source: np.random.Generator) -> Tensor:
        """A Gaussian direction of length ρ; drawn in the order of the teacher's parameters, so that every back-end takes the same one."""
        arena, drawn = self.arena, self.network.drawn
        noise = normal(source, (sum(parameter.numel() for parameter in drawn),)).to(arena.weights)
        parts = dict(zip(drawn, noise.split([parameter.numel() for parameter in drawn]), strict=True))
        for slot, parameter in zip(arena.slots, arena.parameters, strict=True):
            slot.copy_(parts[parameter].view(slot.shape))
        return self.network.operators.ascend_(arena.weights, arena.gradients, self.config.rho, compute=arena.compute)[None]

    def _step(self, view: Tensor, labels: Tensor) -> None:
        """One step; everything in it lies at fixed places, so that it can be captured."""
        arena, config = self.arena, self.config
        with self.network.trainable():
            loss = F.cross_entropy(self.network(view, measures=False).to(self.execution.master_dtype), labels)
            gradients = torch.autograd.grad(loss * self.execution.loss_scale, arena.parameters, allow_unused=True)
        for slot, gradient in zip(arena.slots, gradients, strict=True):
            if gradient is not None:  # the gradient of a weight that the loss does not reach stays 0
                slot.copy_(gradient)
        if self.execution.loss_scale != 1:
            arena.gradients.mul_(1 / self.execution.loss_scale)
        radius = config.rho / config.steps
        ascend_ = self.network.operators.ascend_
        norm = ascend_(arena.weights, arena.gradients, radius, normalize=config.normalize_ascent, compute=arena.compute)
        self._norms.index_copy_(0, self._count[None], norm[None])
        self._count.add_(1).remainder_(len(self._norms))


def _round_buffers(network: nn.Module, execution: Execution) -> None:
    """Floating buffers of all but BatchNorm layers into the compute precision."""
    for layer in network.modules():
        if not isinstance(layer, (BatchNormAct, _BatchNorm)):
            for name, buffer in layer._buffers.items():
                if buffer is not None and buffer.dtype is execution.master_dtype:
                    layer._buffers[name] = buffer.to(execution.dtype)


def _shaped(flat: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """A flat piece of an arena as a tensor of that shape; convolution weights channels-last if `channels_last`."""
    if channels_last and like.dim() == 4:
        out, inner, height, width = like.shape
        return flat.view(out, height, width, inner).permute(0, 3, 1, 2)
    return flat.view(like.shape)


def check_norms(
    norms: Tensor,  # [K], from `Ascent.adjust`
    precision: str,
) -> None:
    """Raise InputError unless every gradient of the ascent was finite; this waits for the ascent."""
    bad = (~torch.isfinite(norms)).nonzero()
    if len(bad):
        step = int(bad[0])
        other = "--precision bf16" if precision == "fp16" else "--ascent none"
        remedy = "lower rho" if step else f"the weights have not moved yet, so the teacher's own gradient overflows; take {other}"
        raise InputError(f"gradient of the ascent is not finite in step {step + 1} of {len(norms)} (norm {float(norms[step])}); {remedy}")

"""A teacher whose BatchNorm layers keep their inputs' moments, and the matching terms of those."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dwa_fast.engine.backend import Execution
from dwa_fast.engine.capture import return_stream, take_stream
from dwa_fast.engine.fuse import BatchNormAct, Rewritten
from dwa_fast.engine.layers import StemConv
from dwa_fast.errors import InputError
from dwa_fast.models.batchnorm import MomentsHook

_ALIGNED = 16  # elements; the partial sums of each layer begin at a multiple of it
_OTHER_LAYERS = "teacher runs other BatchNorm layers, or on other shapes, from one forward pass to the next"


@dataclass(frozen=True)
class MatchingPlan:
    """What `matching_loss` needs beside the moments: fixed for a network and a batch size, on the device.

    Where the operators leave partial sums, those of all layers lie in one arena, which `matching_gradient` adds up in one launch.
    """

    variances: Tensor  # [ΣC] that are aimed at
    channel_ptr: Tensor  # [L + 1] int64
    counts: Tensor  # [L] int64
    weights: Tensor  # [L]
    means: Tensor | None = None  # [ΣC] by how much the means that are aimed at exceed the running ones; None: 0
    arena: Tensor | None = None  # [S] the layers' partial sums
    slices: Mapping[BatchNormAct | MomentsHook, Tensor] = field(default_factory=dict)  # [2, R, C] each layer's part of it
    places: Tensor | None = None  # [2, L] int64: where each part begins, and its R
    finished: Tensor | None = None  # [1] int32: the kernel's counter
    stream: Any = None  # on which the arena is added up, beside the classifier
    forward_done: Any = None  # event after the last layer of a forward pass

    @classmethod
    def of(
        cls,
        layers: Sequence[BatchNormAct | MomentsHook],
        first_layer_weight: float,
        *,
        in_arena: bool = False,
        aim: Tensor | None = None,  # [2, ΣC] means and variances of the plan; None: the running statistics
    ) -> MatchingPlan:
        """The plan of these layers, each with the count of its last call."""
        variances = torch.cat([layer.running_var for layer in layers]) if aim is None else aim[1]
        device = variances.device
        sizes = torch.tensor([0] + [len(layer.running_var) for layer in layers], device=device)
        counts = torch.tensor([layer.count for layer in layers], device=device)
        weights = torch.tensor([first_layer_weight] + [1.0] * (len(layers) - 1), dtype=variances.dtype, device=device)
        plan = cls(variances, sizes.cumsum(0), counts, weights, None if aim is None else aim[0])
        if not in_arena:
            return plan
        shapes = [(2, layer.rows, len(layer.running_var)) for layer in layers]
        starts = list(itertools.accumulate((math.prod(shape) + -math.prod(shape) % _ALIGNED for shape in shapes), initial=0))
        arena = torch.zeros(starts[-1], dtype=variances.dtype, device=device)
        return replace(
            plan,
            arena=arena,
            slices={
                layer: arena[start:][: math.prod(shape)].view(shape) for layer, start, shape in zip(layers, starts, shapes, strict=False)
            },
            places=torch.tensor([starts[:-1], [shape[1] for shape in shapes]], device=device),
            finished=torch.zeros(1, dtype=torch.int32, device=device),
            stream=take_stream(device) if device.type == "cuda" else None,
            forward_done=torch.cuda.Event() if device.type == "cuda" else None,
        )


class _ReshapingViews(TorchFunctionMode):
    """Inside, `x.view(…)` copies where the layout of x does not allow a view, as it does for channels-last features."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        sizes = args[1:]
        if func is Tensor.view and not kwargs and not isinstance(sizes[0], torch.dtype):
            func = Tensor.reshape
        return func(*args, **(kwargs or {}))


class Network(nn.Module):
    """A copy of the teacher, in eval mode, whose BatchNorm layers keep their inputs' moments."""

    def __init__(self, rewritten: Rewritten, execution: Execution) -> None:
        super().__init__()
        self.operators = execution.operators
        self._views = _ReshapingViews if execution.channels_last else nullcontext
        self.module = rewritten.module
        self.layers = rewritten.layers
        self.traced = rewritten.traced
        self.capture_error: str | None = None  # why steps with this network cannot be captured, if so
        self.drawn: list[nn.Parameter] = []  # the parameters in the order of the teacher, which a trace may have changed
        self._plans: dict[tuple[float, ...], MatchingPlan] = {}
        self._arena_plans: dict[torch.Size, MatchingPlan] = {}  # those with an arena of partial sums, by shape of the images
        self._arena_plan: MatchingPlan | None = None  # the one whose arena holds the partial sums of the last forward pass
        self._shape = torch.Size()  # of its images
        self._aim: Tensor | None = None  # [2, ΣC] what all plans aim at instead of the running statistics; it stays where it is

    @property
    def takes_blocks(self) -> bool:
        """Whether `forward` also takes images as [N, C, H/2, 2, W/2, 2]: their gradient is then not moved to [N, C, H, W]."""
        if not isinstance(self.module, torch.fx.GraphModule):
            return False
        images = self.module.graph.find_nodes(op="placeholder")[0]
        return all(user.op == "call_module" and isinstance(self.module.get_submodule(str(user.target)), StemConv) for user in images.users)

    def release(self) -> None:
        """Take the hooks off the layers, which may be the teacher's own."""
        for layer in self.layers.values():
            if isinstance(layer, MomentsHook):
                layer.remove()

    def close(self) -> None:
        """Return the streams of a GPU; the network cannot be used any more."""
        for plan in self._plans.values():
            if plan.stream is not None:
                return_stream(plan.stream)
        self._plans.clear()
        self._arena_plans.clear()

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Inside, the weights take gradients."""
        self.requires_grad_(True)
        try:
            yield
        finally:
            self.requires_grad_(False)

    def forward(
        self,
        images: Tensor,  # [N, C, H, W], normalised; see `takes_blocks`
        *,
        deferred: bool = False,
        measures: bool = True,
    ) -> Tensor:  # [N, classes] logits
        """Logits; the moments of all layers are then ready for `matching`, or, deferred, for `matching_gradient` alone.

        Args:
            measures: whether the moments are wanted at all.
        """
        self.forget()
        self._shape = images.shape
        self._arena_plan = self._arena_plans.get(images.shape) if deferred else None
        for layer in self.layers.values():
            layer.measures = measures
            layer.partials = self._arena_plan.slices.get(layer) if self._arena_plan else None
            layer.written = self._arena_plan.forward_done if self._arena_plan else None
        with self._views():
            logits: Tensor = self.module(images)
        return logits

    def refresh(self) -> None:
        """Prepare for the weights as they are now; to be called whenever they have changed, before gradients of the images are taken."""
        for layer in self.modules():
            if isinstance(layer, StemConv):
                layer.refresh()

    def forget(self) -> None:
        """Drop the moments of the last forward pass; they may hold an autograd graph, and a module that does cannot be copied."""
        for layer in self.layers.values():
            layer.sums.clear()

    def aim(self, statistics: Mapping[str, Tensor]) -> None:
        """Match these statistics from now on, not the running ones; where steps are captured, the first time before that.

        Args:
            statistics: by name of the layer, mean and variance of its channels, [2, C].
        """
        pairs = [(layer, statistics[name].to(layer.running_mean)) for name, layer in self.layers.items()]
        aim = torch.cat([torch.stack([mean - layer.running_mean, variance]) for layer, (mean, variance) in pairs], 1)
        self._aim = aim if self._aim is None else self._aim.copy_(aim)

    def matching(
        self,
        first_layer_weight: float,
    ) -> Tensor:  # [2]: R_mean, R_var
        """Matching terms of the last forward pass (Eq. 3), once; layers that it did not reach take no part.

        Raises:
            InputError: a layer ran more than once, so that it has no single batch statistic.
        """
        used, plan = self._plan(first_layer_weight)
        sums = torch.cat([layer.sums.pop() for layer in used], 1)
        return self.operators.matching_loss(sums, plan.variances, plan.channel_ptr, plan.counts, plan.weights, plan.means)

    def matching_gradient(
        self,
        first_layer_weight: float,
        grad: Tensor,  # [2], of R_mean and R_var
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # [2]; per layer [2, C]; per layer [2, C]
        """Matching terms of the last forward pass, once, the layers' moments, and the gradient of each.

        Where the forward pass has left partial sums, on a GPU, this runs beside what was queued behind the last BatchNorm layer, and only
        `join` waits for it.

        Raises:
            InputError: as `matching`, or other layers ran than the last time.
        """
        used, plan = self._plan(first_layer_weight, in_arena=self.operators.partial_rows is not None)
        moments = [layer.sums.pop() for layer in used]
        constants = plan.variances, plan.channel_ptr, plan.counts, plan.weights, grad
        if self._arena_plan is None:
            if plan.arena is not None:
                self._arena_plans[self._shape] = plan
            terms, gradient = self.operators.matching_gradient(torch.cat(moments, 1), *constants, means=plan.means)
        elif self._arena_plan is plan:
            with torch.cuda.stream(plan.stream):
                if plan.stream is not None:
                    plan.stream.wait_event(plan.forward_done)
                terms, gradient = self.operators.matching_gradient(plan.arena, *constants, plan.places, plan.finished, plan.means)
        else:
            raise InputError(_OTHER_LAYERS)
        return terms, moments, list(gradient.split([len(layer.running_var) for layer in used], 1))

    def join(self) -> None:
        """Let the current stream wait for `matching_gradient`."""
        if self._arena_plan is not None and self._arena_plan.stream is not None:
            torch.cuda.current_stream(self._arena_plan.stream.device).wait_stream(self._arena_plan.stream)

    def _plan(self, first_layer_weight: float, *, in_arena: bool = False) -> tuple[list[BatchNormAct | MomentsHook], MatchingPlan]:
        """The layers of the last forward pass, and what is fixed for them."""
        for name, layer in self.layers.items():
            if len(layer.sums) > 1:
                raise InputError(f"BatchNorm layer {name!r} runs {len(layer.sums)} times in a forward pass; each layer may run once")
        used = [layer for layer in self.layers.values() if layer.sums]
        if self._aim is not None and len(used) < len(self.layers):
            raise InputError(_OTHER_LAYERS)
        shape = (in_arena, first_layer_weight, self._aim is not None, *(layer.count for layer in used))
        if shape not in self._plans:
            self._plans[shape] = MatchingPlan.of(used, first_layer_weight, in_arena=in_arena, aim=self._aim)
        return used, self._plans[shape]

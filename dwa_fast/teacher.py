"""Teachers made ready for synthesis: checked, copied, and rewritten so that every BatchNorm layer records its input's moments."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwa_fast.backend import Execution, Operators
from dwa_fast.errors import InputError
from dwa_fast.pointwise import replace_strided_pointwise
from dwa_fast.rewrite import BatchNormAct, Rewritten, batchnorm_layers, rewrite

log = logging.getLogger("dwa_fast")


@dataclass(frozen=True)
class MatchingPlan:
    """What `matching_loss` needs beside the moments: fixed for a network and a batch size, on the device."""

    variances: Tensor  # [ΣC]
    offsets: Tensor  # [L + 1] int64
    counts: Tensor  # [L] int64
    weights: Tensor  # [L]

    @classmethod
    def of(cls, layers: Sequence[BatchNormAct], first_layer_weight: float) -> MatchingPlan:
        """The plan of these layers, each with the count of its last call."""
        variances = torch.cat([layer.running_var for layer in layers])
        device = variances.device
        sizes = torch.tensor([0] + [len(layer.running_var) for layer in layers], device=device)
        counts = torch.tensor([layer.count for layer in layers], device=device)
        weights = torch.tensor([first_layer_weight] + [1.0] * (len(layers) - 1), dtype=variances.dtype, device=device)
        return cls(variances, sizes.cumsum(0), counts, weights)


class Network(nn.Module):
    """A copy of the teacher, in eval mode, whose BatchNorm layers record their inputs' moments."""

    def __init__(self, rewritten: Rewritten, operators: Operators) -> None:
        super().__init__()
        self.operators = operators
        self.module = rewritten.module
        self.layers = rewritten.layers
        self.traced = rewritten.traced
        self._plans: dict[tuple[float, ...], MatchingPlan] = {}

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
        images: Tensor,  # [N, C, H, W], normalised
    ) -> Tensor:  # [N, classes] logits
        """Logits; the moments of all layers are then ready for `matching`."""
        for layer in self.layers.values():
            layer.sums.clear()
        logits: Tensor = self.module(images)
        return logits

    def matching(
        self,
        first_layer_weight: float,
    ) -> Tensor:  # [2]: R_mean, R_var
        """Matching terms of the last forward pass (Eq. 3), once; layers that it did not reach take no part.

        Raises:
            InputError: a layer ran more than once, so that it has no single batch statistic.
        """
        for name, layer in self.layers.items():
            if len(layer.sums) > 1:
                raise InputError(f"BatchNorm layer {name!r} runs {len(layer.sums)} times in a forward pass; each layer may run once")
        used = [layer for layer in self.layers.values() if layer.sums]
        shape = (first_layer_weight, *(layer.count for layer in used))
        if shape not in self._plans:
            self._plans[shape] = MatchingPlan.of(used, first_layer_weight)
        plan = self._plans[shape]
        sums = torch.cat([layer.sums.pop() for layer in used], 1)
        return self.operators.matching_loss(sums, plan.variances, plan.offsets, plan.counts, plan.weights)


def prepare(
    teacher: nn.Module,
    images: Tensor,  # [N, C, H, W], normalised; the first two are tried
    execution: Execution,
) -> tuple[Network, int]:
    """A checked, recording copy of the teacher on the device, and its number of classes. The teacher itself is not changed.

    Raises:
        TypeError: teacher is not a module.
        InputError: it has no BatchNorm layer, keeps no running statistics, cannot take the images, or gives no [N, classes] logits.
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    module = teacher.module if isinstance(teacher, nn.DataParallel) else teacher
    if module.training:
        log.warning("teacher was in train mode; a copy of it in eval mode is used")
    layers = batchnorm_layers(module)
    if not layers:
        raise InputError(
            f"teacher must have BatchNorm layers (1d, 2d or 3d), whose statistics are matched; {type(module).__name__} has none"
        )
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise InputError(f"BatchNorm layer {name!r} keeps no running statistics; it needs track_running_stats=True")
    if layers.keys() == {""}:
        raise InputError(f"teacher must be a classifier that gives [N, classes] logits, got a single {type(module).__name__}")
    module = copy.deepcopy(module).eval().requires_grad_(False).to(execution.device, execution.master_dtype)
    if execution.device.type == "cpu" and execution.channels_last:
        replace_strided_pointwise(module)
    trial = images[:2].to(execution.device, execution.master_dtype)
    classes = _count_classes(module, trial)
    network = Network(rewrite(module, execution.operators, trial), execution.operators)
    with torch.no_grad():
        network(trial)
        network.matching(1.0)
    return network, classes


@torch.no_grad()
def _count_classes(module: nn.Module, images: Tensor) -> int:
    try:
        logits = module(images)
    except (RuntimeError, ValueError, AssertionError) as error:  # of a product, of a BatchNorm layer, of a transformer
        raise InputError(f"teacher cannot take images of shape {tuple(images.shape[1:])}: {str(error).splitlines()[0]}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"teacher must give [N, classes] logits, got {got}")
    if not torch.isfinite(logits).all():
        raise InputError("teacher gives logits that are not finite; its weights or running statistics hold NaN or infinity")
    return logits.shape[1]

"""`BNFeatureHook` of SRe2L, CDA and DWA: how far the input of a BatchNorm layer is from its running statistics, in one read of it."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BATCHNORM

from dwa_fast.backend import operators_for
from dwa_fast.config import check_real
from dwa_fast.errors import InputError
from dwa_fast.norms import planes


class _Constants(NamedTuple):
    """What `matching_loss` of one layer needs beside moments and running variance, for a number of elements per channel."""

    offsets: Tensor  # [2] int64: 0 and C
    counts: Tensor  # [1] int64: N·H·W
    weights: Tensor  # [1]: 1
    factors: Tensor  # [2]: of R_mean and R_var in r_feature


class BNFeatureHook:
    """Takes r_feature = ‖running_mean − μ‖₂ + r_var·‖running_var − σ²‖₂ of a layer's input at each forward pass.

    μ and σ² are the mean and biased variance per channel. Values and gradients are those of the published class, in an otherwise untouched
    loop; the input is read once forward, and its gradient comes from one pointwise pass. The fused operators compute where they can run,
    plain PyTorch elsewhere, which is logged.

    Attributes:
        r_feature: [], float32 or wider, differentiable in the input; there from the first forward pass on.
        hook: the handle of the forward hook.
    """

    r_feature: Tensor

    def __init__(self, module: nn.Module, args: Any = None) -> None:
        """Hook onto a layer.

        Args:
            module: an nn.BatchNorm2d, or a 1d or 3d one, with running statistics.
            args: as in DWA, a namespace whose `r_var` weighs the variance; without it 1, as in SRe2L and CDA.
        Raises:
            TypeError: module is no such layer.
            InputError: it keeps no running statistics, or r_var is no number of at least 0.
        """
        if not isinstance(module, BATCHNORM):
            raise TypeError(f"BNFeatureHook wants an nn.BatchNorm2d (or 1d, 3d), got {type(module).__name__}")
        if module.running_mean is None or module.running_var is None:
            raise InputError("BNFeatureHook wants a BatchNorm layer that keeps running statistics; it needs track_running_stats=True")
        self.r_var = getattr(args, "r_var", 1.0)
        check_real("r_var", self.r_var, 0)
        self._constants: dict[tuple[torch.device, torch.dtype, int, int], _Constants] = {}
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Tensor) -> None:
        """What the layer calls after each forward pass.

        Raises:
            InputError: the layer is a replica of nn.DataParallel over several devices.
        """
        if getattr(module, "_is_replica", False):
            raise InputError(
                "BNFeatureHook cannot follow nn.DataParallel over several devices: every replica sees only its part of the batch, and the "
                "statistics of one would overwrite those of the others; give it one device (device_ids=[0]), or run one process per device"
            )
        y = input[0]
        operators, wide = operators_for(y.device, y.dtype), torch.promote_types(y.dtype, torch.float32)
        sums = operators.moments(planes(y), module.running_mean.detach().to(wide))
        offsets, counts, weights, factors = self._of(y, wide)
        terms = operators.matching_loss(sums, module.running_var.detach().to(wide), offsets, counts, weights)
        self.r_feature = terms @ factors

    def close(self) -> None:
        """Take the hook off the layer."""
        self.hook.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> BNFeatureHook:
        """The hook of a copied layer; r_feature belongs to the graph of the original, and stays there."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        kept = {name: value for name, value in vars(self).items() if name != "r_feature"}
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in kept.items()})
        return twin

    def _of(self, y: Tensor, dtype: torch.dtype) -> _Constants:
        channels, count = y.shape[1], y.numel() // y.shape[1]
        key = (y.device, dtype, channels, count)
        if key not in self._constants:
            integers = [torch.tensor(value, device=y.device) for value in ([0, channels], [count])]
            numbers = [torch.tensor(value, dtype=dtype, device=y.device) for value in ([1.0], [1.0, float(self.r_var)])]
            self._constants[key] = _Constants(*integers, *numbers)
        return self._constants[key]

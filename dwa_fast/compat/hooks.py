"""`BNFeatureHook` of SRe2L, CDA and DWA: how far the input of a BatchNorm layer is from its running statistics, in one read of it."""

from __future__ import annotations

import copy
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dwa_fast.compat.fields import fields_of, log_once
from dwa_fast.config import check_real
from dwa_fast.engine.backend import operators_for
from dwa_fast.errors import InputError
from dwa_fast.models.batchnorm import planes
from dwa_fast.reference.ops import Operators

_PER_CLASS = ("per_class_bn", "ipc", "start", "end", "weights")  # of WMDD's and GUARD's hooks, with no meaning where the first is False
_OTHER_METHOD = (
    "is another method's hook, with other mathematics: leave that class in the script; "
    "neither BNFeatureHook nor get_images computes it (docs/swapping-in.md)"
)
_new: weakref.WeakSet[BNFeatureHook] = weakref.WeakSet()  # hooks that no forward pass has reached since the last line in the log


class _Constants(NamedTuple):
    """What `matching_loss` of one layer needs beside moments and running variance, for a number of elements per channel."""

    channel_ptr: Tensor  # [2] int64: 0 and C
    counts: Tensor  # [1] int64: N·H·W
    weights: Tensor  # [1]: 1
    factors: Tensor  # [2]: of R_mean and R_var in r_feature


class _Moments(NamedTuple):
    """Results of the last forward pass."""

    sums: Tensor  # [2, C]: Σ(y − m) and Σ(y − m)²
    shift: Tensor  # [C]: m
    elements: int  # N·H·W


class BNFeatureHook:
    """Takes r_feature = ‖running_mean − μ‖₂ + r_var·‖running_var − σ²‖₂ of a layer's input at each forward pass.

    μ and σ² are the mean and biased variance per channel. Values and gradients are those of the published class, in an otherwise untouched
    loop; the input is read once forward, and its gradient comes from one pointwise pass. Inside autocast too all of it is computed in
    float32 (float64 for float64 features). The fused operators compute where they can run, plain PyTorch elsewhere, which is logged; the
    first forward pass logs how many layers are followed.

    Attributes:
        r_feature: [], float32 or float64, differentiable in the input; None before the first forward pass.
        hook: the handle of the forward hook.
    """

    r_feature: Tensor  # None until the first pass, where no loop reads it

    def __init__(self, module: nn.Module, args: Any = None, *rest: Any, **others: Any) -> None:
        """Hook onto a layer.

        Args:
            module: an nn.BatchNorm2d, or a 1d, 3d or SyncBatchNorm one, or one with another forward method, with running statistics.
            args: as in DWA, a namespace or mapping whose `r_var` weighs the variance; without it 1, as in SRe2L and CDA. False, and
                `per_class_bn=False`, are WMDD's and GUARD's way to ask for the same.
            *rest, **others: ipc, start, end and weights, which WMDD and GUARD pass behind per_class_bn=False and do not use then.
        Raises:
            TypeError: module is no such layer, args is no namespace, or an argument is another method's.
            InputError: the layer keeps no running statistics, or r_var is no number of at least 0.
        """
        _check_layer(module)
        self.r_var = _variance_weight(args, rest, others)
        self.r_feature = None  # type: ignore[assignment]
        self._moments: _Moments | None = None
        self._constants: dict[tuple[torch.device, torch.dtype, int, int], _Constants] = {}
        self.hook = module.register_forward_hook(self._called, with_kwargs=True)
        _new.add(self)

    @property
    def mean(self) -> Tensor | None:
        """[C], mean of the channels in the last forward pass, differentiable; None before the first."""
        if self._moments is None:
            return None
        sums, shift, elements = self._moments
        return shift + sums[0] / elements

    @property
    def var(self) -> Tensor | None:
        """[C], biased variance of the channels in the last forward pass, differentiable; None before the first."""
        if self._moments is None:
            return None
        sums, _, elements = self._moments
        return sums[1] / elements - (sums[0] / elements).square()

    def hook_fn(self, module: Any, input: tuple[Any, ...], output: Any) -> None:
        """What the layer calls after each forward pass, with its positional arguments.

        Raises:
            InputError: the layer is a replica of nn.DataParallel over several devices, or its first argument is no features.
        """
        if getattr(module, "_is_replica", False):
            raise InputError(
                "BNFeatureHook cannot follow nn.DataParallel over several devices: every replica sees only its part of the batch, and the "
                "statistics of one would overwrite those of the others; give it one device (device_ids=[0]), or run one process per device"
            )
        y = self._features(input, module.running_mean.numel())
        with torch.autocast(y.device.type, enabled=False):
            operators, wide = operators_for(y.device, y.dtype), torch.promote_types(y.dtype, torch.float32)
            shift = module.running_mean.detach().to(wide)
            sums = operators.moments(planes(y), shift)
            channel_ptr, counts, weights, factors = self._of(y, wide)
            terms = operators.matching_loss(sums, module.running_var.detach().to(wide), channel_ptr, counts, weights)
            self.r_feature = (terms * factors).sum()
        self._moments = _Moments(sums, shift, int(y.numel() // y.shape[1]))
        if self in _new:
            _announce(operators)

    def close(self) -> None:
        """Take the hook off the layer."""
        self.hook.remove()
        _new.discard(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> BNFeatureHook:
        """The hook of a copied layer; r_feature belongs to the graph of the original, and stays there."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        kept = {name: value for name, value in vars(self).items() if name not in ("r_feature", "_moments")}
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in kept.items()}, r_feature=None, _moments=None)
        return twin

    def _called(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Arguments by name, as in `bn(input=x)`, come behind those by position."""
        self.hook_fn(module, (*args, *kwargs.values()), output)

    def _features(self, inputs: tuple[Any, ...], channels: int) -> Tensor:  # [N, C, …]
        """The layer's first argument, or the first entry of it where a layer takes (features, labels)."""
        y = inputs[0] if inputs else None
        y = y[0] if isinstance(y, (tuple, list)) and y else y
        if not isinstance(y, Tensor) or not y.is_floating_point():
            got = f"{y.dtype} tensor" if isinstance(y, Tensor) else type(y).__name__
            raise InputError(f"BNFeatureHook wants the first argument of the layer to be its features, a floating tensor, got {got}")
        y = self._channels_second(y)
        if y.dim() < 2 or y.shape[1] != channels or y.numel() == 0:
            raise InputError(
                f"BNFeatureHook wants features [N, {channels}, …], not empty, got shape {tuple(y.shape)}; "
                "ViT_BNFeatureHook takes those of a transformer, [B, N, C]"
            )
        return y

    def _channels_second(self, y: Tensor) -> Tensor:
        return y

    def _of(self, y: Tensor, dtype: torch.dtype) -> _Constants:
        channels, count = y.shape[1], y.numel() // y.shape[1]
        key = (y.device, dtype, channels, count)
        if key not in self._constants:
            with torch.inference_mode(False):  # they serve later passes, whose graphs keep them
                integers = [torch.tensor(value, device=y.device) for value in ([0, channels], [count])]
                numbers = [torch.tensor(value, dtype=dtype, device=y.device) for value in ([1.0], [1.0, float(self.r_var)])]
            self._constants[key] = _Constants(*integers, *numbers)
        return self._constants[key]


class ViT_BNFeatureHook(BNFeatureHook):  # noqa: N801
    """`ViT_BNFeatureHook` of CDA and DELT: the same for a layer whose features are [B, N, C], statistics over B and N."""

    def _channels_second(self, y: Tensor) -> Tensor:
        if y.dim() != 3:
            raise InputError(f"ViT_BNFeatureHook wants features [B, N, C], got shape {tuple(y.shape)}")
        return y.transpose(1, 2)


def _announce(operators: Operators) -> None:
    """Log the number of hooked layers at the first forward pass that reaches a new hook."""
    count, how = len(_new), "fused operators" if operators.name == "fused" else "plain PyTorch"
    log_once(f"hooks: {count} BatchNorm {'layer' if count == 1 else 'layers'}, {how}")
    _new.clear()


def _check_layer(module: Any) -> None:
    prefix = "BNFeatureHook wants an nn.BatchNorm2d (or 1d, 3d), got"
    if not isinstance(module, nn.Module):
        raise TypeError(f"{prefix} {type(module).__name__}")
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(f"{prefix} {type(module).__name__}: a hook on a convolution {_OTHER_METHOD}")
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, _InstanceNorm)):
        raise TypeError(f"{prefix} {type(module).__name__}, which has no running statistics of whole batches to be compared with")
    known = isinstance(module, _BatchNorm)
    statistics = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    if known and any(each is None for each in statistics):
        raise InputError("BNFeatureHook wants a BatchNorm layer that keeps running statistics; it needs track_running_stats=True")
    if not known and not all(
        isinstance(each, Tensor) and each.dim() == 1 for each in statistics
    ):  # torchvision's FrozenBatchNorm2d has them
        raise TypeError(f"{prefix} {type(module).__name__}")


def _variance_weight(args: Any, rest: tuple[Any, ...], others: dict[str, Any]) -> float:
    """The weight of the variance term; every other argument must have no effect."""
    strange = [name for name in others if name not in _PER_CLASS]
    if strange:
        raise TypeError(f"BNFeatureHook(…, {strange[0]}=…) {_OTHER_METHOD}")
    if args is None or isinstance(args, bool):
        if others.get("per_class_bn", args):
            raise TypeError(f"BNFeatureHook(…, per_class_bn=True), with statistics of each class, {_OTHER_METHOD}")
        return 1.0
    try:
        given = fields_of(args)
    except TypeError:
        raise TypeError(
            f"args of BNFeatureHook must be None or a namespace with r_var, got {args!r:.60}; "
            f"a hook that takes a momentum, a class, a path or a list {_OTHER_METHOD}"
        ) from None
    if rest or others:
        count = 2 + len(rest) + len(others)
        raise TypeError(
            f"BNFeatureHook takes (module, args), or (module, per_class_bn=False, …), got {count} arguments with args a namespace"
        )
    weight = given.get("r_var", 1.0)
    check_real("r_var", weight, 0)
    return float(weight)

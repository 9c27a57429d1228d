"""BatchNorm layers: which layers of a teacher are matched, and the statistics of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from dwa_fast.models.modules import has_hooks

_PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # in eval mode both are F.batch_norm with the running statistics
_FROZEN = ("torchvision.ops.misc", "FrozenBatchNorm2d")  # by name: importing torchvision loads Triton, and teachers may do without it


def is_batchnorm(layer: nn.Module) -> bool:
    """Whether the input statistics of a layer are matched: a BatchNorm of PyTorch, a subclass, or one with frozen statistics.

    The last are modules of their own in torchvision, DETR, detectron2 and timm, known by their name and by their running statistics.
    """
    if isinstance(layer, _BatchNorm):
        return True
    named = any("BatchNorm" in base.__name__ for base in type(layer).__mro__)
    return named and all(isinstance(getattr(layer, name, None), Tensor) for name in ("running_mean", "running_var"))


def is_plain(layer: nn.Module) -> bool:
    """Whether a matched layer computes γ(y − m)/√(v + ε) + β in eval mode and nothing else, so that an operator can take its place."""
    if has_hooks(layer) or type(layer).__call__ is not nn.Module.__call__ or "forward" in vars(layer):
        return False
    if isinstance(layer, _BatchNorm):
        own = all(getattr(layer, name) is layer._parameters.get(name) for name in ("weight", "bias"))  # not computed from other weights
        return own and type(layer).forward in _PLAIN_FORWARDS
    return (type(layer).__module__, type(layer).__name__) == _FROZEN


def batchnorm_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every layer whose input statistics are matched, by name, in module order."""
    return {name: layer for name, layer in module.named_modules() if is_batchnorm(layer)}


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The features among the arguments of a layer's call: the first one, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)


def planes(
    features: Tensor,  # [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]
) -> Tensor:  # [N, C, H, W]
    """The input of a BatchNorm layer as the operators take it; tokens [N, S, C], transposed, are a channels-last tensor where they lie."""
    if features.dim() == 4:
        return features
    return features.flatten(3) if features.dim() > 4 else features.view(*features.shape, *[1] * (4 - features.dim()))


class MomentsOperators(Protocol):
    """What a hook computes the moments with."""

    @property
    def moments(self) -> Callable[..., Tensor]:
        """That operator."""

    @property
    def partial_rows(self) -> Callable[..., int] | None:
        """Number of rows of partial sums; None if there are none."""


class MomentsHook:
    """Computes the shifted moments of a layer's input at each call, without changing the layer."""

    def __init__(self, layer: nn.Module, operators: MomentsOperators) -> None:
        """Hook onto the layer.

        It runs after the existing hooks, so it sees the input that the layer gets.
        """
        self.kind = type(layer).__name__
        self.running_mean, self.running_var = (getattr(layer, name).detach() for name in ("running_mean", "running_var"))  # [C]
        self.measures = True  # whether it computes them
        self.sums: list[Tensor] = []  # one [2, C] per call of the last forward pass
        self.count = 0  # N·H·W of the last call
        self.rows = 1  # of partial sums that the last call leaves or would leave
        self.partials: Tensor | None = None  # [2, rows, C]: where they are left; the values of `sums` are then undefined
        self.written: Any = None  # the event of a GPU that is recorded behind it then
        self._operators = operators
        self._handle: RemovableHandle = layer.register_forward_pre_hook(self._compute, with_kwargs=True)

    def extra_repr(self) -> str:
        """What `dwa-fast info` shows."""
        return f"{self.kind}, statistics by a hook"

    def remove(self) -> None:
        """Take the hook off the layer."""
        self._handle.remove()

    def _compute(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.measures:
            return
        y: Tensor = given(args, kwargs)
        if y.dtype not in (self.running_mean.dtype, torch.bfloat16) and not (y.is_cuda and y.dtype is torch.float16):
            y = y.to(self.running_mean.dtype)
        features = planes(y)
        by_rows = features.is_contiguous(memory_format=torch.channels_last)
        if not by_rows and self.partials is not None:
            features = features.contiguous(memory_format=torch.channels_last)
        self.sums.append(self._operators.moments(features, self.running_mean, self.partials))
        self.count = y.numel() // y.shape[1]
        self.rows = self._operators.partial_rows(features, moments=True) if self._operators.partial_rows else 1
        if self.written is not None:
            self.written.record()

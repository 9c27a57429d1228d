"""Unwraps teachers (DataParallel, averaged weights, torch.compile), copies them, selects one of several outputs, or some classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dwa_fast.errors import InputError, first_line
from dwa_fast.models.modules import replace_layers

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_NAMED = {"ModelEma", "ModelEmaV2", "ModelEmaV3"}  # timm's averages of weights


class SelectedOutput(nn.Module):
    """A teacher that returns one of its several outputs: the logits."""

    def __init__(self, teacher: nn.Module, output: str | int) -> None:
        """Select an output.

        Args:
            output: a key of a dictionary or the name of an attribute ("logits"), or an index into a tuple (0).
        """
        super().__init__()
        self.teacher, self.output = teacher, output

    def forward(self, images: Tensor) -> Any:
        """The selected output.

        Raises:
            InputError: the teacher gives no such output.
        """
        given = self.teacher(images)
        if isinstance(given, Tensor):
            raise InputError(f"teacher has one output, a tensor of shape {tuple(given.shape)}; leave out logits={self.output!r}")
        try:
            if isinstance(self.output, str) and not isinstance(given, Mapping):
                return getattr(given, self.output)
            return given[self.output]
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"teacher has no output {self.output!r}; it gives {describe_output(given)}") from error


class KnownClasses(nn.Module):
    """A teacher restricted to some of its classes: its probabilities are over these classes."""

    classes: Tensor  # [k]

    def __init__(self, teacher: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.teacher = teacher
        self.register_buffer("classes", torch.tensor(classes))

    def forward(
        self,
        images: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, k]
        """Logits of these classes, in their order."""
        logits: Tensor = self.teacher(images)
        return logits.index_select(1, self.classes)


def describe_output(given: Any) -> str:
    """Describes an output that is no tensor of logits, with advice how to select the logits, for error messages."""
    if isinstance(given, Tensor):
        flat = (
            "; put nn.Flatten() behind it: nn.Sequential(teacher, nn.Flatten())" if given.shape[2:].numel() == 1 and given.dim() > 2 else ""
        )
        return f"shape {tuple(given.shape)}{flat}"
    kind = type(given).__name__
    if isinstance(given, Mapping):
        names = list(map(str, given))
        output = "logits" if "logits" in names else names[0] if names else ""
        return f"{kind} with {', '.join(names) or 'nothing'}" + (f"; say which are the logits with logits={output!r}" if names else "")
    if isinstance(given, Sequence) and not isinstance(given, str):
        return f"{kind} of {len(given)}; say which are the logits with logits=0 (or 1, …)"
    return kind + ("; say which are the logits with logits='logits'" if isinstance(getattr(given, "logits", None), Tensor) else "")


def listed(teacher: nn.Module | Sequence[nn.Module], output: str | int | None = None) -> list[nn.Module]:
    """One teacher or several as a list; where `output` says which of their outputs are the logits, with that one selected."""
    teachers: list[Any] = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    return teachers if output is None else [SelectedOutput(each, output) for each in teachers]


def unwrapped(teacher: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, averages of weights and torch.compile, however they are nested."""
    while True:
        inner = _inner(teacher)
        if inner is None:
            return teacher
        teacher = inner


def _inner(module: nn.Module) -> nn.Module | None:
    if isinstance(module, _WRAPPERS) or type(module).__name__ in _NAMED:
        inner = getattr(module, "module", None)
        return inner if isinstance(inner, nn.Module) else getattr(module, "ema", None)
    original = vars(module).get("_modules", {}).get("_orig_mod")
    return original if isinstance(original, nn.Module) else None


def copied(teacher: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy in eval mode on the device, without gradients, all wrappers removed.

    Raises:
        InputError: the teacher cannot be copied: sharded, scripted, or with attributes that refuse.
    """
    module = unwrapped(teacher)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if hasattr(tensor, "full_tensor"):  # a DTensor
            raise InputError(
                f"teacher is sharded over processes ({name} is a {type(tensor).__name__}); gather its weights into a plain module"
            )
        if tensor.is_meta:
            raise InputError(f"teacher has no values: {name} is on the meta device; load its weights first")
        if tensor.layout is not torch.strided:
            raise InputError(f"teacher holds {name} as a sparse tensor ({tensor.layout}); expected a dense one, as its to_dense() gives")
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in str(getattr(layer, "original_name", "")):
            raise InputError(
                f"BatchNorm layer {name!r} is scripted, so that its input cannot be taken; give the module before torch.jit.script"
            )
    try:
        twin = copy.deepcopy(module, _computed_tensors(module))
        twin.eval().to(device, dtype)
    except Exception as error:  # of any kind: modules copy themselves
        raise InputError(f"teacher cannot be copied ({first_line(error)}); give a plain module with its weights loaded") from error
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    replace_layers(twin, lambda layer: unwrapped(layer) if _inner(layer) is not None else None)
    replace_layers(twin, lambda layer: _Normalise(layer).to(device, dtype) if _is_transform(layer) else None)
    return twin


class _Normalise(nn.Module):
    """torchvision's transform Normalize inside a network: the same arithmetic, without checks of values, which cannot be traced."""

    def __init__(self, transform: Any) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(transform, name), dtype=torch.float64)[:, None, None], persistent=False)

    def forward(
        self,
        pixels: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, C, H, W]
        """(pixels − mean) / std per channel."""
        return (pixels - self.get_buffer("mean")) / self.get_buffer("std")


def _is_transform(layer: nn.Module) -> bool:
    kind = type(layer)
    return kind.__name__ == "Normalize" and kind.__module__.startswith("torchvision.transforms") and not getattr(layer, "inplace", False)


def _computed_tensors(module: nn.Module) -> dict[int, Tensor]:
    """Copies of the tensors that hooks compute from weights before each call (old weight norm, pruning), which deepcopy refuses."""
    return {
        id(value): value.detach().clone()
        for layer in module.modules()
        for value in vars(layer).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }

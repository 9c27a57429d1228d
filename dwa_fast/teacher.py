"""Teachers: built by name, loaded from checkpoints, checked, and rewritten so that every BatchNorm layer calls the operator."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.architectures import build
from dwa_fast.backend import Execution, Operators
from dwa_fast.errors import InputError
from dwa_fast.files import replacing

log = logging.getLogger("dwa_fast")

_NAMED = 3  # how many names of a long list an error quotes


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """What a checkpoint of ours says about its weights."""

    architecture: str
    classes: int
    channels: int
    size: int
    accuracy: float | None = None  # top-1 on the held-out images, percent


class MatchedBatchNorm2d(nn.Module):
    """A BatchNorm2d in eval mode that keeps the shifted moments of its input for the matching loss."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: nn.BatchNorm2d, operators: Operators) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.register_buffer("running_mean", layer.running_mean)
        self.register_buffer("running_var", layer.running_var)
        self.operators = operators
        self.recording = True
        self.sums: list[Tensor] = []  # one [2, C] per call of the last forward pass
        self.count = 0  # N·H·W of the last call

    def forward(
        self,
        y: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, C, H, W]
        """Normalise with the running statistics."""
        if not self.recording:
            return F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        z, sums = self.operators.bn_act(y, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        self.sums.append(sums)
        self.count = y.numel() // y.shape[1]
        return z


@dataclass(frozen=True)
class MatchingPlan:
    """What `matching_loss` needs beside the moments: fixed for a network and a batch size, on the device."""

    variances: Tensor  # [ΣC]
    offsets: Tensor  # [L + 1] int64
    counts: Tensor  # [L] int64
    weights: Tensor  # [L]

    @classmethod
    def of(cls, layers: Sequence[MatchedBatchNorm2d], first_layer_weight: float) -> MatchingPlan:
        """The plan of these layers, each with the count of its last call."""
        variances = torch.cat([layer.running_var for layer in layers])
        device = variances.device
        sizes = torch.tensor([0] + [len(layer.running_var) for layer in layers], device=device)
        counts = torch.tensor([layer.count for layer in layers], device=device)
        weights = torch.tensor([first_layer_weight] + [1.0] * (len(layers) - 1), dtype=variances.dtype, device=device)
        return cls(variances, sizes.cumsum(0), counts, weights)


class Network(nn.Module):
    """A copy of the teacher, in eval mode, whose BatchNorm layers record their inputs' moments."""

    def __init__(self, module: nn.Module, operators: Operators) -> None:
        super().__init__()
        self.operators = operators
        self.module = copy.deepcopy(module).eval()
        self.layers: dict[str, MatchedBatchNorm2d] = {}
        for name, layer in batchnorm_layers(self.module).items():
            self.layers[name] = MatchedBatchNorm2d(layer, operators)
            _replace(self.module, layer, self.layers[name])
        self.recording = True
        self._plans: dict[tuple[float, ...], MatchingPlan] = {}

    def record(self, recording: bool) -> None:
        """Whether forward passes compute the moments."""
        self.recording = recording
        for layer in self.layers.values():
            layer.recording = recording

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Inside, the weights take gradients and no moments are computed."""
        recording = self.recording
        self.record(False)
        self.requires_grad_(True)
        try:
            yield
        finally:
            self.requires_grad_(False)
            self.record(recording)

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
        """Matching terms of the last forward pass (Eq. 3); layers that it did not reach take no part.

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
        sums = torch.cat([layer.sums[0] for layer in used], 1)
        return self.operators.matching_loss(sums, plan.variances, plan.offsets, plan.counts, plan.weights)


def prepare(
    teacher: nn.Module,
    images: Tensor,  # [N, C, H, W], normalised; one of them is tried
    execution: Execution,
) -> tuple[Network, int]:
    """A checked, recording copy of the teacher on the device, and its number of classes. The teacher itself is not changed.

    Raises:
        TypeError: teacher is not a module.
        InputError: it has no BatchNorm2d, keeps no running statistics, cannot take the images, or gives no [N, classes] logits.
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    module = teacher.module if isinstance(teacher, nn.DataParallel) else teacher
    if module.training:
        log.warning("teacher was in train mode; a copy of it in eval mode is used")
    layers = batchnorm_layers(module)
    if not layers:
        raise InputError(f"teacher must have BatchNorm2d layers, whose statistics are matched; {type(module).__name__} has none")
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise InputError(f"BatchNorm layer {name!r} keeps no running statistics; it needs track_running_stats=True")
    if layers.keys() == {""}:
        raise InputError("teacher must be a classifier that gives [N, classes] logits, got a single BatchNorm2d")
    network = Network(module, execution.operators).to(execution.device, execution.dtype).requires_grad_(False)
    return network, _count_classes(network, images[:1].to(execution.device, execution.dtype))


def batchnorm_layers(module: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Every BatchNorm2d by name, in module order."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.BatchNorm2d)}


@torch.no_grad()
def _count_classes(network: Network, image: Tensor) -> int:
    try:
        logits = network(image)
    except RuntimeError as error:
        raise InputError(f"teacher cannot take images of shape {tuple(image.shape[1:])}: {str(error).splitlines()[0]}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"teacher must give [N, classes] logits, got {got}")
    if not torch.isfinite(logits).all():
        raise InputError("teacher gives logits that are not finite; its weights or running statistics hold NaN or infinity")
    network.matching(1.0)
    return logits.shape[1]


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` hangs in the tree."""
    for parent in list(root.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, key, new)


def save_teacher(path: Path, module: nn.Module, info: TeacherInfo) -> None:
    """Write weights and description, whole or not at all."""
    weights = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    with replacing(path) as target:
        torch.save({"state_dict": weights, "dwa_fast": vars(info)}, target)


def load_teacher(
    path: Path,
    *,
    architecture: str | None = None,
    classes: int | None = None,
    channels: int = 3,
    size: int = 224,
) -> tuple[nn.Module, TeacherInfo]:
    """A teacher in eval mode from a checkpoint: {"state_dict": …}, {"model": …} or a bare state dict, with or without "module." prefixes.

    Args:
        architecture, classes, channels, size: what to build; a checkpoint written by `dwa-fast squeeze` says it itself.
    Raises:
        InputError: the file is not there, cannot be read safely, or holds other weights than the architecture has.
    """
    content = _read(path)
    described = content.get("dwa_fast")
    info = TeacherInfo(**described) if isinstance(described, dict) else None
    if info and architecture not in (None, info.architecture):
        raise InputError(f"checkpoint {path} holds a {info.architecture}, not a {architecture}")
    if info and classes not in (None, info.classes):
        raise InputError(f"checkpoint {path} knows {info.classes} classes, the data have {classes}")
    weights = _state_dict(path, content)
    if info is None:
        if architecture is None:
            raise InputError(f"checkpoint {path} does not say which network it holds; name it with --architecture")
        info = TeacherInfo(architecture=architecture, classes=classes or _last_rows(weights), channels=channels, size=size)
    module = build(info.architecture, classes=info.classes, channels=info.channels, size=info.size)
    _fill(path, module, weights, info)
    return module.eval(), info


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for damaged archives
        reason = "it is empty" if path.stat().st_size == 0 else "it is damaged, no PyTorch file, or holds more than tensors"
        raise InputError(f"checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} must hold a state dict, got {type(content).__name__}")
    return content


def _state_dict(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside any of the published shapes, without "module." prefixes."""
    inner = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    weights = {str(name).removeprefix("module."): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not weights:
        raise InputError(f"checkpoint {path} holds no weights; wanted a state dict, or one under 'state_dict' or 'model'")
    return weights


def _last_rows(weights: Mapping[str, Tensor]) -> int:
    """Number of rows of the last matrix: the classes of a classifier."""
    matrices = [value for value in weights.values() if value.dim() == 2]
    if not matrices:
        raise InputError("checkpoint has no linear layer to read the number of classes from; name it with the data")
    return matrices[-1].shape[0]


def _fill(path: Path, module: nn.Module, weights: Mapping[str, Tensor], info: TeacherInfo) -> None:
    own = module.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    foreign = [name for name in weights if name not in own]
    if missing or foreign:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:_NAMED])}…)" for what, names in (("missing", missing), ("unknown", foreign)) if names
        ]
        raise InputError(f"checkpoint {path} does not fit a {info.architecture}: weights {' and '.join(parts)}")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"checkpoint {path} does not fit a {info.architecture} with {info.classes} classes: "
                f"{name} has shape {tuple(value.shape)}, wanted {tuple(own[name].shape)}"
            )
    module.load_state_dict(dict(weights), strict=False)

"""Checkpoints of teachers: our own, which say what they hold, and all three published shapes; read with weights_only, always."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwa_fast.architectures import ARCHITECTURES, build
from dwa_fast.archives import read_archive, write_archive
from dwa_fast.config import check_choice, check_integer, check_real
from dwa_fast.errors import InputError

_NAMED = 3  # how many names of a long list an error quotes
_MOST_CLASSES, _MOST_PIXELS = 2**24, 4096  # beyond, a description is no network's; it would only fill the memory


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """What a checkpoint of ours says about its weights."""

    architecture: str
    classes: int
    channels: int
    size: int
    accuracy: float | None = None  # top-1 on the held-out images, percent


_FIELDS = {field.name for field in fields(TeacherInfo)}


def save_teacher(path: Path, module: nn.Module, info: TeacherInfo) -> None:
    """Write weights and description, whole or not at all."""
    weights = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    write_archive(path, {"state_dict": weights, "dwa_fast": vars(info)})


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
    info = _described(path, content)
    if info and architecture not in (None, info.architecture):
        raise InputError(f"checkpoint {path} holds a {info.architecture}, not a {architecture}")
    if info and classes not in (None, info.classes):
        raise InputError(f"checkpoint {path} knows {info.classes} classes, the data have {classes}")
    weights = _state_dict(path, content)
    if info is None:
        if architecture is None:
            raise InputError(f"checkpoint {path} does not say which network it holds; name it with --architecture")
        info = TeacherInfo(architecture=architecture, classes=classes or _last_rows(weights), channels=channels, size=size)
    shape: dict[str, int] = {"classes": info.classes, "channels": info.channels, "size": info.size}
    with torch.device("meta"):  # without memory, until the file is known to hold weights of these shapes
        _check_fit(path, build(info.architecture, **shape), weights, info)
    module = build(info.architecture, **shape)
    module.load_state_dict(dict(weights), strict=False)
    return module.eval(), info


def _read(path: Path) -> dict[str, Any]:
    content = read_archive(path, "checkpoint")
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} must hold a state dict, got {type(content).__name__}")
    return content


def _described(path: Path, content: Mapping[str, Any]) -> TeacherInfo | None:
    """What a checkpoint of ours says about itself, checked; None for others."""
    described = content.get("dwa_fast")
    if described is None:
        return None
    if not isinstance(described, dict) or not {"architecture", "classes", "channels", "size"} <= described.keys() <= _FIELDS:
        raise InputError(f"checkpoint {path} does not describe its network as dwa-fast does; make it again with dwa-fast squeeze")
    info = TeacherInfo(**described)
    try:
        check_choice("architecture", info.architecture, list(ARCHITECTURES))
        for name, most in (("classes", _MOST_CLASSES), ("channels", 3), ("size", _MOST_PIXELS)):
            check_integer(name, getattr(info, name), 1)
            check_real(name, getattr(info, name), 1, most)
        if info.accuracy is not None:
            check_real("accuracy", info.accuracy, 0, 100)
    except InputError as error:
        raise InputError(f"checkpoint {path} describes a network that cannot be: {error}") from error
    return info


def _state_dict(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside any of the published shapes, without "module." prefixes."""
    inner = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    weights = {str(name).removeprefix("module."): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not weights:
        raise InputError(f"checkpoint {path} holds no weights; wanted a state dict, or one under 'state_dict' or 'model'")
    for name, value in weights.items():
        if value.device.type != "cpu" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"checkpoint {path} says that {name} has shape {tuple(value.shape)}, but does not hold as many values")
    return weights


def _last_rows(weights: Mapping[str, Tensor]) -> int:
    """Number of rows of the last matrix: the classes of a classifier."""
    matrices = [value for value in weights.values() if value.dim() == 2]
    if not matrices:
        raise InputError("checkpoint has no linear layer to read the number of classes from; name it with the data")
    return matrices[-1].shape[0]


def _check_fit(path: Path, module: nn.Module, weights: Mapping[str, Tensor], info: TeacherInfo) -> None:
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

"""Checkpoints of teachers: our own, which describe their contents, and those of other programs; always read with weights_only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwa_fast.config import Normalisation, check_integer, check_real
from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum
from dwa_fast.io.pickles import StandIn
from dwa_fast.io.torch_files import read_checkpoint, write_archive
from dwa_fast.models.architectures import build, build_on_meta, check_architecture
from dwa_fast.models.weights import find_weights

_MOST_CLASSES, _MOST_PIXELS = 2**24, 4096  # beyond, a description is no network's; it would only fill the memory


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """The description that our checkpoints carry beside the weights."""

    architecture: str
    classes: int
    channels: int
    size: int
    accuracy: float | None = None  # top-1 on the held-out images, percent
    class_names: list[str] | None = None  # in the order of its outputs; None, as the next two, where it is not known
    mean: tuple[float, ...] | None = None  # with which the images were normalised that it was trained on
    std: tuple[float, ...] | None = None


_FIELDS = {field.name for field in fields(TeacherInfo)}


def save_teacher(path: str | Path, module: nn.Module, info: TeacherInfo) -> None:
    """Write weights and description, whole or not at all.

    Args:
        module: a network of `info.architecture`. The weights of a network of your own are saved with
            `torch.save(network.state_dict(), path)` and loaded into it by your own code.
    Raises:
        TypeError: an argument is of the wrong type.
        InputError: the description is of no network, or of another one than the module, or the file cannot be written.
    """
    if not isinstance(module, nn.Module) or not isinstance(info, TeacherInfo):
        wrong = module if not isinstance(module, nn.Module) else info
        raise TypeError(f"expected a torch.nn.Module and a TeacherInfo, got {type(wrong).__name__}")
    info = _checked(info)
    described = build_on_meta(info.architecture, classes=info.classes, channels=info.channels, size=info.size).state_dict()
    shapes, own = ({name: value.shape for name, value in each.items()} for each in (described, module.state_dict()))
    if shapes != own:
        name = next(name for name in {**shapes, **own} if shapes.get(name) != own.get(name))
        raise InputError(
            f"the network is no {info.architecture} as described: {name} is {_shape(own.get(name))}, expected {_shape(shapes.get(name))}; "
            "of a network of your own, save the state_dict with torch.save"
        )
    weights = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    write_archive(Path(path), {"state_dict": weights, "dwa_fast": vars(info)})


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"


def load_teacher(
    path: str | Path,
    *,
    architecture: str | None = None,
    classes: int | None = None,
    channels: int | None = None,
    size: int | None = None,
    weights_key: str | None = None,
) -> tuple[nn.Module, TeacherInfo]:
    """A teacher in eval mode from a checkpoint of torch.save or safetensors: a state dict, bare or at any key, behind any prefix.

    Args:
        architecture, classes, channels, size: what to build; a checkpoint written by `dwa-fast squeeze` says it itself, and must then say
            the same. The architecture is a name of `architectures.build`, such as "resnet18" or "timm:resnet18". By default as many
            classes as the weights have, 3 channels and 224 pixels.
        weights_key: which weights, where the checkpoint holds several that fit: their key, with dots for keys within keys.
    Raises:
        InputError: the file is not there, cannot be read safely, holds other weights than the architecture has, or says something else.
    """
    module, info = read_teacher(
        Path(path),
        architecture=architecture,
        classes=classes,
        channels=3 if channels is None else channels,
        size=224 if size is None else size,
        weights_key=weights_key,
    )
    for name, wanted, unit in (("channels", channels, "channels"), ("size", size, "pixels")):
        if wanted not in (None, getattr(info, name)):
            raise InputError(f"checkpoint {path} is for images of {getattr(info, name)} {unit}, not {wanted}")
    return module, info


def read_teacher(
    path: Path, *, architecture: str | None, classes: int | None, channels: int, size: int, weights_key: str | None
) -> tuple[nn.Module, TeacherInfo]:
    """As `load_teacher`, but channels and size count only where the checkpoint does not say them.

    Raises:
        InputError: likewise.
    """
    content = _read(path)
    info = _described(path, content)
    if info and architecture not in (None, info.architecture):
        raise InputError(f"checkpoint {path} holds a {info.architecture}, not a {architecture}")
    if info and classes not in (None, info.classes):
        raise InputError(f"checkpoint {path} knows {info.classes} classes, the data have {classes}")
    if info:
        architecture, classes, channels, size = info.architecture, info.classes, info.channels, info.size
    if architecture is None:
        raise InputError(f"checkpoint {path} does not say which network it holds; name it with --architecture")
    weights, found = find_weights(path, content, architecture, classes=classes, channels=channels, size=size, weights_key=weights_key)
    info = info or TeacherInfo(architecture=architecture, classes=found, channels=channels, size=size)
    module = build(architecture, classes=found, channels=channels, size=size)
    module.load_state_dict(weights, strict=False)
    return module.eval(), info


def teacher_checksum(path: Path, weights_key: str | None = None) -> str:
    """The identity of a teacher in settings: the checksum of its file, and the key of the weights if one was chosen."""
    return checksum(path) + (f" {weights_key}" if weights_key else "")


def weight_digest(module: nn.Module) -> str:
    """The identity of a teacher without a file: SHA-256 of the names, types, shapes and values of all parameters and buffers."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path, "checkpoint")
    if isinstance(content, StandIn):
        raise InputError(
            f"checkpoint {path} holds an object of class {content.class_name}, whose code is not run; "
            "where you trust the file, load it with the program that wrote it and save its state_dict()"
        )
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} must hold a state dict, got {type(content).__name__}")
    return content


def _described(path: Path, content: Mapping[str, Any]) -> TeacherInfo | None:
    """The description in a checkpoint of ours, checked; None for the checkpoints of other programs."""
    described = content.get("dwa_fast")
    if described is None:
        return None
    if not isinstance(described, dict) or not {"architecture", "classes", "channels", "size"} <= described.keys() <= _FIELDS:
        raise InputError(f"checkpoint {path} does not describe its network as dwa-fast does; make it again with dwa-fast squeeze")
    info = TeacherInfo(**described)
    try:
        return _checked(info)
    except InputError as error:
        raise InputError(f"checkpoint {path} describes a network that cannot be: {error}") from error


def _checked(info: TeacherInfo) -> TeacherInfo:
    """The description, if it is valid."""
    info = _checked_data(info)
    check_architecture("architecture", info.architecture)
    for name, most in (("classes", _MOST_CLASSES), ("channels", 3), ("size", _MOST_PIXELS)):
        check_integer(name, getattr(info, name), 1)
        check_real(name, getattr(info, name), 1, most)
    if info.accuracy is not None:
        check_real("accuracy", info.accuracy, 0, 100)
    return info


def _checked_data(info: TeacherInfo) -> TeacherInfo:
    """The description, if its statements about the data are valid."""
    names, mean, std = info.class_names, info.mean, info.std
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise InputError("class_names must be a list of different names")
        if len(names) != info.classes:
            raise InputError(f"it has {info.classes} classes and {len(names)} class_names")
    if mean is None and std is None:
        return info
    if not all(isinstance(value, (list, tuple)) for value in (mean, std)):
        raise InputError("mean and std must be lists of numbers")
    normalisation = Normalisation(mean=tuple(mean or ()), std=tuple(std or ()))
    if normalisation.channels != info.channels:
        raise InputError(f"it has {info.channels} channels and {normalisation.channels} values of mean and std")
    return replace(info, mean=normalisation.mean, std=normalisation.std)

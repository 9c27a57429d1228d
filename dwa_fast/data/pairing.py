"""Checks that a teacher fits the data: same classes, normalisation and size; else explains the difference and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dwa_fast.config import Normalisation
from dwa_fast.data.class_names import as_named, shown
from dwa_fast.errors import InputError
from dwa_fast.models.checkpoint import TeacherInfo, read_teacher, teacher_checksum
from dwa_fast.models.wrappers import KnownClasses


@dataclass(frozen=True)
class PairedTeacher:
    """A teacher whose outputs are in the order of the data's classes."""

    module: nn.Module  # in eval mode
    info: TeacherInfo  # of the checkpoint
    outputs: list[int] | None  # output of the checkpoint for each class; None if they are the same
    checksum: str  # as checkpoint.teacher_checksum


def teachers_in_settings(checksums: Sequence[str], outputs: Sequence[Sequence[int] | None]) -> dict[str, Any]:
    """The teachers of a set, for its settings: checksums, and which outputs are used unless all are; of a single teacher not as lists."""
    found: dict[str, Any] = {"teacher": list(checksums)}
    if any(outputs):
        found["teacher_outputs"] = [each and list(each) for each in outputs]
    return found if len(checksums) > 1 else {name: value for name, (value,) in found.items()}


def read_classes(path: Path) -> list[str]:
    """Read class names in the order of their numbers, one per line. Empty lines and lines starting with # are ignored.

    Raises:
        InputError: the file cannot be read, has no name, or has a name twice.
    """
    try:
        lines = [line.strip() for line in path.read_bytes().decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"list of classes {path} cannot be read: {error.strerror if isinstance(error, OSError) else 'it is no text'}"
        ) from error
    names = [line for line in lines if line and not line.startswith("#")]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice or not names:
        got = f"names {shown(twice)} more than once" if twice else "names no class"
        raise InputError(f"list of classes {path} {got}; expected one class name a line, in the order of their numbers")
    return names


def open_teacher(
    path: Path,
    class_names: Sequence[str],
    normalisation: Normalisation,
    *,
    size: int,
    architecture: str | None = None,
    default_architecture: str | None = None,
    classes: Path | None = None,
    weights_key: str | None = None,
) -> PairedTeacher:
    """Load the teacher of a checkpoint for images of these classes.

    The classes, size and normalisation recorded in the checkpoint must fit the data. If it has more classes than the data, or in
    another order, the outputs of the data's classes are selected by name.

    Args:
        class_names: of the data. normalisation, size: of the images that the teacher gets.
        architecture: network of the checkpoint. default_architecture: used if neither this nor the checkpoint names it.
        classes: file for `read_classes`, if the checkpoint does not name its classes or names them differently.
        weights_key: as in `load_teacher`.
    Raises:
        InputError: the checkpoint cannot be read, or its classes, normalisation or size are not those of the data.
    """
    listed = read_classes(classes) if classes else None
    count = len(listed) if listed else len(class_names)
    shape = {"channels": normalisation.channels, "size": size}
    module, info = _load(path, count, architecture, default_architecture, shape, weights_key)
    names = listed or (list(info.class_names) if info.class_names else None)
    if info.classes != (len(names) if names else len(class_names)):
        if classes:
            raise InputError(f"{path} has {info.classes} outputs, but {classes} names {len(names or [])} classes")
        way = "--classes FILE, with the teacher's classes one a line in the order of its outputs, takes those of the data"
        raise InputError(f"teacher {path} knows {info.classes} classes, the data have {len(class_names)}; {way}")
    outputs = _outputs(names, class_names, classes or path) if names else None
    _check_images(path, info, normalisation, size)  # last: no flag makes a teacher of other classes fit
    chosen = KnownClasses(module, outputs).eval() if outputs else module
    return PairedTeacher(chosen, info, outputs, teacher_checksum(path, weights_key))


def _load(
    path: Path, count: int, architecture: str | None, default: str | None, shape: Mapping[str, int], weights_key: str | None
) -> tuple[nn.Module, TeacherInfo]:
    """Load the checkpoint with `count` classes, or with its own number if it has another."""
    try:
        return read_teacher(path, architecture=architecture, classes=count, weights_key=weights_key, **shape)
    except InputError as error:
        if architecture is None and default is not None and "does not say which network" in str(error):
            return _load(path, count, default, None, shape, weights_key)
        first = error
    try:
        return read_teacher(path, architecture=architecture, classes=None, weights_key=weights_key, **shape)
    except InputError:
        raise first from None


def _check_images(path: Path, info: TeacherInfo, normalisation: Normalisation, size: int) -> None:
    """Raise InputError if the checkpoint records another image size or normalisation."""
    found: list[str] = []
    ways: list[str] = []
    if info.size != size:
        found.append(f"{info.size} × {info.size} pixels, not {size} × {size}")
        ways.append(f"--size {info.size}")
    if info.channels != normalisation.channels:
        found.append(f"{info.channels} channels, not {normalisation.channels}")
    elif info.mean is not None and info.std is not None and (info.mean, info.std) != (tuple(normalisation.mean), tuple(normalisation.std)):
        found.append(f"{described(info.mean, info.std)}, not {described(normalisation.mean, normalisation.std)}")
    if info.mean is not None and info.std is not None and len(found) > len(ways):
        ways.append(as_flags(info.mean, info.std))
    if found:
        way = f"; pass {' '.join(ways)}" if ways else "; give --mean and --std as many values"
        raise InputError(f"teacher {path} was trained on images of {' and '.join(found)}{way}")


def described(mean: Sequence[float], std: Sequence[float]) -> str:
    """A normalisation as text."""
    return f"mean {_plain(mean)} and std {_plain(std)}"


def as_flags(mean: Sequence[float], std: Sequence[float]) -> str:
    """A normalisation as command-line flags."""
    return f"--mean {_plain(mean)} --std {_plain(std)}"


def _plain(values: Sequence[float]) -> str:
    return " ".join(map(str, values))


def _outputs(names: Sequence[str], class_names: Sequence[str], source: Path) -> list[int] | None:
    """The teacher's output for each class of the data; None if they are the same, in the same order.

    Raises:
        InputError: the teacher does not know a class of the data.
    """
    if not set(class_names) <= set(names):
        first = [name.split()[0] for name in names]  # ImageNet class lists have words after the wnid
        names = first if len(set(first)) == len(first) and set(class_names) <= set(first) else as_named(names, class_names)
    if missing := [name for name in class_names if name not in names]:
        raise InputError(
            f"{source} names the classes {shown(names)}; the data have {shown(class_names)}, of which the teacher does not know "
            f"{shown(missing)}; --classes FILE names the teacher's outputs anew, one class a line"
        )
    return None if list(names) == list(class_names) else [list(names).index(name) for name in class_names]

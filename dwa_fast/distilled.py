"""Distilled sets of any origin: their class folders matched with the real classes, the first images of each, without damaged files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dwa_fast.datasets import FileSet, image_folder
from dwa_fast.errors import InputError

_NUMBERED = re.compile(r"\D*(\d+)")  # new007, 00007, 7
_SHOWN = 3  # folders that an error names


def open_distilled(
    folder: Path,
    size: int,
    channels: int,
    class_names: Sequence[str],
    *,
    per_class: int | None = None,
    skip_bad_images: bool = False,
) -> tuple[FileSet, dict[str, str]]:
    """A distilled set, whose labels are those of the real classes.

    Class folders bear the names of the real classes (wnids), or their numbers: `new000` of SRe2L, CDA, DWA and this program, `00000`
    of RDED. Within a class the files are taken in sorted order, as all of them publish their sets.

    Args:
        class_names: of the real classes.
        per_class: take the first images of each class only.
        skip_bad_images: pass over files that are no images.
    Returns:
        the set, and why files were passed over, by name.
    Raises:
        InputError: the folders are not those of the classes, or one has too few images.
    """
    data = image_folder(folder, size, channels, per_class=None if skip_bad_images else per_class)
    numbers = _numbers(folder, data.class_names, class_names)
    data = replace(data, labels=torch.tensor(numbers)[data.labels], class_names=list(class_names))
    if not skip_bad_images:
        return data, {}
    skipped = data.faults()
    good = [index for index in range(len(data.files)) if index not in skipped]
    return _first(data.select(good), per_class), {data.name(index): cause for index, cause in skipped.items()}


def _numbers(folder: Path, names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Number of the real class of each class folder."""
    if len(names) != len(class_names):
        raise InputError(f"{folder} has {len(names)} classes, the held-out images have {len(class_names)}")
    if set(names) == set(class_names):
        return [class_names.index(name) for name in names]
    matches = [_NUMBERED.fullmatch(name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    if sorted(numbers) != list(range(len(names))):
        shown, real = (", ".join([*each[:_SHOWN], "…"][: len(each)]) for each in (list(names), list(class_names)))
        raise InputError(
            f"class folders of {folder} are neither named as the held-out images' classes nor numbered from 0: {shown}; the classes: {real}"
        )
    return numbers


def _first(data: FileSet, per_class: int | None) -> FileSet:
    """The first images of each class.

    Raises:
        InputError: a class has fewer, or none.
    """
    seen: Counter[int] = Counter()
    chosen = []
    for index, label in enumerate(data.labels.tolist()):
        seen[label] += 1
        if per_class is None or seen[label] <= per_class:
            chosen.append(index)
    for label, name in enumerate(data.class_names):
        if seen[label] < (per_class or 1):
            raise InputError(f"class {name!r} of {data.folder} has {seen[label]} images that can be read, wanted at least {per_class or 1}")
    return data.select(chosen)

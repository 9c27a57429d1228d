"""Opens distilled sets of any program: matches class folders with the real classes, and can limit ipc and skip damaged files."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dwa_fast.config import check_integer
from dwa_fast.data.class_names import as_named, shown
from dwa_fast.data.folders import image_folder
from dwa_fast.data.images import FileSet
from dwa_fast.data.manifest import read_manifest
from dwa_fast.data.set_layout import MANIFEST, is_set
from dwa_fast.errors import InputError
from dwa_fast.io.decode import READERS, BadImageError, check_image
from dwa_fast.io.files import checksum

log = logging.getLogger("dwa_fast")

_NUMBERED = re.compile(r"\D*(\d+)")  # new007, 00007, 7


def open_distilled(
    folder: str | Path,
    size: int,
    channels: int,
    class_names: Sequence[str],
    *,
    per_class: int | None = None,
    skip_bad_images: bool = False,
) -> tuple[FileSet, dict[str, str]]:
    """Open a distilled set with the labels of the real classes.

    Class folders are named as the real classes (wnids), or numbered: `new000` of SRe2L, CDA, DWA and this program, `00000` of RDED. A
    number is an index into the class names of the manifest, or, without a manifest, into the sorted class names. If all folders have
    names, classes of the set that are not among the real ones are left out. Within a class, files are sorted by the numbers in their names.

    Args:
        class_names: of the real classes.
        per_class: use only the first images of each class, at least 1.
        skip_bad_images: skip files that are not images.
    Returns:
        the set, and the causes by skipped file.
    Raises:
        InputError: per_class is below 1, the folder holds several sets, the class folders do not match the classes, one has too few images,
            or images, their content or their size differ from the manifest.
    """
    folder = Path(folder)
    if per_class is not None:
        check_integer("per_class", per_class, 1)
    _check_one_set(folder)
    data = image_folder(folder, size, channels, per_class=None if skip_bad_images else per_class, by_number=True)
    manifest = set_manifest(folder)
    if manifest:
        _check_shape(folder, manifest["settings"].get("image_shape"), size, channels)
        _check_names(folder, data, manifest)
    numbers = _numbers(folder, data.class_names, class_names, manifest["class_names"] if manifest else None)
    data = replace(data, labels=torch.tensor(numbers)[data.labels], class_names=list(class_names))
    if -1 in numbers:
        log.info("%s: %d of its %d classes are among the real ones; the others are left out", folder, len(class_names), len(numbers))
        data = data.select((data.labels >= 0).nonzero().flatten().tolist())
    skipped: dict[int, str] = data.faults() if skip_bad_images else {}
    causes = {data.name(index): cause for index, cause in skipped.items()}
    if skip_bad_images:
        data = _first(data.select([index for index in range(len(data.files)) if index not in skipped]), per_class)
    if manifest:
        _check_content(data, manifest["images"])
    return data, causes


def set_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a set; None if there is none, or, with a warning, if it cannot be read."""
    if not is_set(folder):
        return None
    try:
        return read_manifest(folder)
    except InputError as error:
        log.warning("%s; its classes and settings are not known", error)
        return None


def _check_one_set(folder: Path) -> None:
    """Raise InputError if the folder holds sets and is none itself: each would count as a class."""
    if is_set(folder) or not folder.is_dir():
        return
    sets = [entry.name for entry in sorted(folder.iterdir()) if (entry / MANIFEST).is_file()]
    if sets:
        raise InputError(f"{folder} is no distilled set, but holds {shown(sets)}; name one of them, such as {folder / sets[0]}")


def _check_shape(folder: Path, shape: Any, size: int, channels: int) -> None:
    if shape is None or shape == [channels, size, size]:
        return
    if not (isinstance(shape, list) and len(shape) == 3):
        raise InputError(f"{folder / MANIFEST} has image_shape {shape!r}; expected channels, height and width")
    if shape[0] != channels:
        raise InputError(f"{folder} holds images of {shape[0]} channel{'s' if shape[0] != 1 else ''}, got a mean and std of {channels}")
    advice = f"pass --size {shape[1]}" if shape[1] == shape[2] else "a set is opened only if its images are squares"
    raise InputError(f"{folder} holds images of {shape[1]} × {shape[2]} pixels, not {size} × {size}; {advice}")


def _check_content(data: FileSet, checksums: Mapping[str, str]) -> None:
    """Raise InputError if an image is not the one that was written; what is no image is reported where it is read."""

    def is_another(name: str) -> bool:
        path = data.folder / name
        if checksums.get(name, "") in ("", checksum(path)):
            return False
        try:
            check_image(path, data.channels)
        except BadImageError:
            return False
        return True

    for name, changed in zip(data.files, READERS.map(is_another, data.files), strict=True):
        if changed:
            raise InputError(f"{data.folder / name} has changed since it was written; the command that made the set makes it again")


def _check_names(folder: Path, data: FileSet, manifest: Mapping[str, Any]) -> None:
    """Check that the images of a complete set are those in its manifest.

    Raises:
        InputError: an image is missing, or does not belong to the set.
    """
    named = manifest["images"]
    if not manifest["complete"]:
        log.warning("%s is not complete; run the command that started it again to resume", folder)
        return
    missing = next((name for name in named if not (data.folder / name).is_file()), None)
    extra = next((name for name in data.files if name not in named), None)
    if missing or extra:
        what = f"{missing} is missing" if missing else f"{extra} does not belong to the set"
        raise InputError(f"{folder} holds other images than its manifest names: {what}; dwa-fast verify names all of them")


def _numbers(folder: Path, folders: Sequence[str], class_names: Sequence[str], set_names: Sequence[str] | None) -> list[int]:
    """The real label of each class folder; -1 if its class is not among the real ones.

    Args:
        set_names: class names in the manifest, if there is one.
    """
    matches = [_NUMBERED.fullmatch(name) for name in folders]
    numbers = [int(match[1]) for match in matches if match]
    unique = len(set(numbers)) == len(folders)
    unnamed = [str(number) for number in range(len(set_names or ()))]  # class names of a set that was imported without names
    named = set_names is not None and (list(set_names) != unnamed or list(class_names) == unnamed)
    if set_names is not None and named and unique and max(numbers) < len(set_names) and len(set(set_names)) == len(set_names):
        names = as_named([set_names[number] for number in numbers], class_names)
        if missing := [name for name in class_names if name not in names]:
            raise InputError(
                f"{folder} holds images of the classes {shown(names)}; the real images have {shown(class_names)}: it lacks {shown(missing)}"
            )
        return [class_names.index(name) if name in class_names else -1 for name in names]
    names = _as_named_by_text(folders, class_names)
    if set(class_names) <= set(names):
        return [class_names.index(name) if name in class_names else -1 for name in names]
    if len(folders) != len(class_names):
        raise InputError(f"{folder} has {len(folders)} classes, the held-out images have {len(class_names)}")
    if sorted(numbers) != list(range(len(folders))):
        raise InputError(
            f"class folders of {folder} are neither named as the held-out images' classes nor numbered from 0: {shown(folders)}; "
            f"the classes: {shown(class_names)}"
        )
    own = [int(match[1]) for match in map(_NUMBERED.fullmatch, class_names) if match]
    if own != sorted(own) and sorted(own) == list(range(len(class_names))):
        raise InputError(
            f"class folders of {folder} are numbered ({shown(folders)}), and the real classes have the same numbers in another order "
            f"({shown(class_names)}), so that a number may be a name or a place; rename the folders as the real classes"
        )
    return numbers


def _as_named_by_text(folders: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Folder names in the spelling of the real classes, class_2 for class_002. Bare numbers are not names: they may be class indices."""
    return list(folders) if any(name.isdecimal() for name in folders) else as_named(folders, class_names)


def _first(data: FileSet, per_class: int | None) -> FileSet:
    """The first images of each class.

    Raises:
        InputError: a class has fewer, or none.
    """
    count: Counter[int] = Counter()
    chosen = []
    for index, label in enumerate(data.labels.tolist()):
        count[label] += 1
        if per_class is None or count[label] <= per_class:
            chosen.append(index)
    for label, name in enumerate(data.class_names):
        if count[label] < (per_class or 1):
            raise InputError(
                f"class {name!r} of {data.folder} has {count[label]} images that can be read, expected at least {per_class or 1}"
            )
    return data.select(chosen)

"""Folders of class folders: their classes, the images of each, and what is left out."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dwa_fast.config import check_integer
from dwa_fast.data.images import FileSet
from dwa_fast.data.set_layout import image_root
from dwa_fast.errors import InputError
from dwa_fast.io.files import sorted_scandir, walk_files

log = logging.getLogger("dwa_fast")

_UNREAD = (".gif", ".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl")  # of images that are left out


def image_folder(folder: str | Path, size: int, channels: int = 3, per_class: int | None = None, *, by_number: bool = False) -> FileSet:
    """A folder with one sub-folder of images per class, or a distilled set; classes and files in sorted order.

    Hidden files and folders are ignored. Class folders and files may be symbolic links; links to folders inside a class folder are not
    followed. Warns of what is left out that may be meant as an image, and of images in folders inside a class folder.

    Args:
        size: height and width of the decoded images, pixels, at least 1. channels: 1 (grey) or 3 (RGB).
        per_class: use only the first files of each class, at least 1.
        by_number: sort the files of a class by the numbers in their names: id999 before id1000.
    Raises:
        InputError: the folder does not exist or has no class folders, or one of them is empty or has fewer than `per_class` images; or a
            number is out of its range.
    """
    check_integer("size", size, 1)
    if channels not in (1, 3):
        raise InputError(f"channels must be 1 or 3, got {channels!r}")
    if per_class is not None:
        check_integer("per_class", per_class, 1)
    folder = image_root(Path(folder))
    names = class_folders(folder)
    files: list[str] = []
    labels: list[int] = []
    left_out = [entry.name for entry in sorted_scandir(str(folder)) if _is_named_as_image(entry.name) and not os.path.isdir(entry)]
    for label, name in enumerate(names):
        members = list(_images(folder, name, left_out))
        if by_number:
            members.sort(key=natural)
        if len(members) < (per_class or 1):
            wanted = f"at least {per_class}" if per_class else "some"
            raise InputError(f"class folder {folder / name} has {len(members)} images, expected {wanted}")
        members = members[:per_class]
        files += members
        labels += [label] * len(members)
    _warn(folder, files, left_out)
    return FileSet(folder, files, torch.tensor(labels), names, size, channels)


def _warn(folder: Path, files: Sequence[str], left_out: Sequence[str]) -> None:
    """Say what a reader may not expect: files that are no part of the data, and the class of images that lie deeper."""
    if left_out:
        log.warning(
            "%s: left out %d files or links, such as %s; only .png, .jpg, .webp, .bmp, .tif, .ppm and .pgm files in class folders are read",
            *(folder, len(left_out), left_out[0]),
        )
    deeper = [file for file in files if file.count(os.sep) > 1 and f"{os.sep}images{os.sep}" not in file]  # Tiny-ImageNet has "images"
    if deeper:
        label = deeper[0].partition(os.sep)[0]
        log.warning("%s: %d images lie in folders inside class folders; %s counts as class %r", folder, len(deeper), deeper[0], label)


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares numbers in names by value: 2 before 10, id999 before id1000."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the sub-folders, without hidden ones.

    Raises:
        InputError: `folder` is not a folder, cannot be read, or has no sub-folders.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with a sub-folder of images per class")
    names = [entry.name for entry in sorted_scandir(str(folder)) if os.path.isdir(entry) and not entry.name.startswith(".")]
    if not names:
        raise InputError(f"{folder} has no class folders; expected one sub-folder of images per class")
    return names


def _images(folder: Path, class_name: str, left_out: list[str]) -> Iterator[str]:
    """Relative paths of the images of a class, sorted, without hidden ones (._1.png of macOS, .ipynb_checkpoints).

    Links to folders and what else is named as an image are appended to `left_out`.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    prefix = os.path.join(folder, "")
    for entry in walk_files(prefix + class_name):
        path = entry.path[len(prefix) :]
        if f"{os.sep}." in path:
            continue
        if path.lower().endswith(IMG_EXTENSIONS) and (entry.is_file(follow_symlinks=False) or os.path.isfile(entry)):
            yield path
        elif _is_named_as_image(path) or os.path.isdir(entry):
            left_out.append(path)


def _is_named_as_image(name: str) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return not name.startswith(".") and name.lower().endswith((*IMG_EXTENSIONS, *_UNREAD))

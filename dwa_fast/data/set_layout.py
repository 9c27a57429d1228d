"""Folder layout of a distilled set: images in class folders below `images/`, everything else beside that folder.

Other programs treat every entry of an image folder as a class, so `images/` contains only class folders. Given the folder of the set they
would treat `images` as the only class; a second folder without images makes them stop.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from dwa_fast.errors import InputError
from dwa_fast.io.files import read_json

MANIFEST = "manifest.json"
IMAGES = "images"
NOTE = "other-programs/README.txt"
NOTE_TEXT = """This folder belongs to a distilled set that dwa-fast wrote. The images are in class folders in the folder
"images" beside it: that is the folder to give to other programs. dwa-fast takes either of them.

There are no images here, so that a program which is given the folder of the set itself stops,
instead of taking all images for those of a single class called "images".
"""
FORMAT = 3  # of manifests
_LOOKED_AT = 20  # entries of a folder, to tell whether it holds class folders


class AmongImagesError(InputError):
    """Results would be written among the class folders of real images."""


def set_folder(folder: Path) -> Path:
    """The folder of a set's manifest, given that folder or its `images/`; any other folder is returned unchanged."""
    absolute = Path(os.path.abspath(folder))
    if absolute.name != IMAGES or (folder / MANIFEST).exists() or not _has_manifest(absolute.parent):
        return folder
    return folder.parent if folder.name == IMAGES else absolute.parent


def image_root(folder: Path) -> Path:
    """The folder of the class folders: `images/` of a set, given it or the set's folder; else the folder itself.

    A set whose manifest is damaged or lost is recognised by the note beside its images.
    """
    outer = set_folder(folder)
    return outer / IMAGES if _has_manifest(outer) or (outer / NOTE).is_file() else outer


def is_set(folder: Path) -> bool:
    """Whether the folder of a set, or its `images/`, has a manifest."""
    return (set_folder(folder) / MANIFEST).exists()


def has_link(folder: Path, name: str) -> bool:
    """Whether a file below a folder is a symbolic link or is reached through one."""
    parts = Path(name).parts
    return any(folder.joinpath(*parts[:depth]).is_symlink() for depth in range(1, len(parts) + 1))


def refuse_images(folder: Path) -> None:
    """Raise InputError if results would be written among the images of a set, or among class folders that hold images and nothing else."""
    absolute = Path(os.path.abspath(folder))
    for place in (absolute, *absolute.parents):
        if place.name == IMAGES and set_folder(place) != place:
            raise InputError(
                f"{folder} is for the images of a set alone, since other programs take whatever lies there for a class; "
                f"choose another output, such as {place.parent / 'results'}"
            )
    resolved = _resolved(absolute)
    for place in (resolved, *resolved.parents):
        if _holds_classes(place):
            raise InputError(
                f"output {folder} lies in {place}, whose folders hold nothing but images, as classes do; choose another folder"
            )


def refuse_class_folders(output: Path, real: Path) -> None:
    """Raise AmongImagesError if results would be written into `real`, the folder of the class folders of real images."""
    if _resolved(output).is_relative_to(_resolved(real)):
        raise AmongImagesError(f"output {output} lies in {real}, whose folders are the classes of the real images; choose another folder")


def _resolved(folder: Path) -> Path:
    """Where links lead; a loop of links, of which `Path.resolve` makes a RuntimeError, stays."""
    return Path(os.path.realpath(folder))


def _holds_classes(folder: Path) -> bool:
    """Whether a folder holds several folders of images and nothing else, as far as its first entries show it."""
    entries = _first_entries(folder)
    return len(entries) > 1 and all(map(_holds_images, entries))


def _holds_images(folder: Path) -> bool:
    """Whether a folder holds images and nothing else, or is a class folder of Tiny-ImageNet."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    entries = _first_entries(folder)
    tiny = folder / IMAGES in entries and f"{folder.name}_boxes.txt" in {entry.name for entry in entries}
    return tiny or (bool(entries) and all(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in entries))


def _first_entries(folder: Path) -> list[Path]:
    """Some entries of a folder that are not hidden; none where it is no folder or cannot be read."""
    try:
        with os.scandir(folder) as scan:
            return [Path(entry) for entry in islice(scan, _LOOKED_AT) if not entry.name.startswith(".")]
    except OSError:
        return []


def _has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest of ours; a web app has a file of that name too."""
    try:
        return read_json(folder / MANIFEST, lambda content: bool(content["format"] == FORMAT))
    except InputError:
        return False

"""Folder layout of a distilled set: images in class folders below `images/`, everything else beside that folder.

Other programs treat every entry of an image folder as a class, so `images/` contains only class folders. Given the folder of the set they
would treat `images` as the only class; a second folder without images makes them stop. Sets of an earlier format keep their class folders
beside the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwa_fast.errors import InputError

MANIFEST = "manifest.json"
IMAGES = "images"
NOTE = "other-programs/README.txt"
NOTE_TEXT = """This folder belongs to a distilled set that dwa-fast wrote. The images are in class folders in the folder
"images" beside it: that is the folder to give to other programs. dwa-fast takes either of them.

There are no images here, so that a program which is given the folder of the set itself stops,
instead of taking all images for those of a single class called "images".
"""
FORMAT, FLAT_FORMAT = 3, 2  # manifest formats; in the second one the class folders lie beside the manifest


def set_folder(folder: Path) -> Path:
    """The folder of a set's manifest, given that folder or its `images/`; any other folder is returned unchanged."""
    absolute = Path(os.path.abspath(folder))
    if absolute.name != IMAGES or (folder / MANIFEST).exists() or _format(absolute.parent) != FORMAT:
        return folder
    return folder.parent if folder.name == IMAGES else absolute.parent


def image_root(folder: Path) -> Path:
    """The folder of the class folders: `images/` of a set, given it or the set's folder; else the folder itself.

    A set whose manifest is damaged or lost is recognised by the note beside its images.
    """
    outer = set_folder(folder)
    return outer / IMAGES if _format(outer) == FORMAT or (outer / NOTE).is_file() else outer


def is_set(folder: Path) -> bool:
    """Whether the folder of a set, or its `images/`, has a manifest."""
    return (set_folder(folder) / MANIFEST).exists()


def prefix(manifest: Mapping[str, Any]) -> str:
    """Prefix of image names in a manifest, relative to the folder of the set."""
    return f"{IMAGES}/" if manifest["format"] == FORMAT else ""


def has_link(folder: Path, name: str) -> bool:
    """Whether a file below a folder is a symbolic link or is reached through one."""
    parts = Path(name).parts
    return any(folder.joinpath(*parts[:depth]).is_symlink() for depth in range(1, len(parts) + 1))


def refuse_images(folder: Path) -> None:
    """Raise InputError if results would be written among the images of a set."""
    absolute = Path(os.path.abspath(folder))
    for place in (absolute, *absolute.parents):
        if place.name == IMAGES and set_folder(place) != place:
            raise InputError(
                f"{folder} is for the images of a set alone, since other programs take whatever lies there for a class; "
                f"choose another output, such as {place.parent / 'results'}"
            )


def _format(folder: Path) -> int | None:
    """The format of a manifest; None if there is no readable one."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    found = content.get("format") if isinstance(content, dict) else None
    return found if isinstance(found, int) else None

"""Where the parts of a distilled set lie: images in class folders below `images/`, everything else beside that folder.

Other programs take every entry of an image folder for a class, so `images/` holds nothing but class folders of images. Given the folder of
the set they would take `images` for the only class; a second folder, without images, makes them stop. Sets of an earlier format have their
class folders beside the manifest, and stay so.
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
FORMAT, FLAT_FORMAT = 3, 2  # of manifests; the second one says that the class folders lie beside it


def set_folder(folder: Path) -> Path:
    """The folder of a set's manifest, given it or the set's `images/`; any other folder is returned as it is."""
    absolute = Path(os.path.abspath(folder))
    if absolute.name != IMAGES or (folder / MANIFEST).exists() or _format(absolute.parent) != FORMAT:
        return folder
    return folder.parent if folder.name == IMAGES else absolute.parent


def image_root(folder: Path) -> Path:
    """The folder of the class folders: `images/` of a set of ours, given it or the set's folder; else the folder itself.

    A set whose manifest is damaged or lost is recognised by the note beside its images.
    """
    outer = set_folder(folder)
    # Where the manifest is lost or damaged, the note still says which layout it was.
    return outer / IMAGES if _format(outer) == FORMAT or (outer / NOTE).is_file() else outer


def is_set(folder: Path) -> bool:
    """Whether a manifest is there, given the folder of a set or its `images/`."""
    return (set_folder(folder) / MANIFEST).exists()


def prefix(manifest: Mapping[str, Any]) -> str:
    """What stands before the names of a manifest's images, on the way to them from the folder of the set."""
    return f"{IMAGES}/" if manifest["format"] == FORMAT else ""


def has_link(folder: Path, name: str) -> bool:
    """Whether a file below a folder is a symbolic link, or lies behind one: it may be anywhere."""
    parts = Path(name).parts
    return any(folder.joinpath(*parts[:depth]).is_symlink() for depth in range(1, len(parts) + 1))


def refuse_images(folder: Path) -> None:
    """Raise InputError where results would come to lie among the images of a set."""
    absolute = Path(os.path.abspath(folder))
    for place in (absolute, *absolute.parents):
        if place.name == IMAGES and set_folder(place) != place:
            raise InputError(
                f"{folder} is for the images of a set alone, since other programs take whatever lies there for a class; "
                f"choose another output, such as {place.parent / 'results'}"
            )


def _format(folder: Path) -> int | None:
    """The format that a manifest names; None where there is no manifest of ours that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    found = content.get("format") if isinstance(content, dict) else None
    return found if isinstance(found, int) else None

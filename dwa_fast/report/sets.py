"""Sections of a report about distilled sets: a contact sheet of each kind, and its settings."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from dwa_fast.config import EXECUTION_SETTINGS, LATER_SETTINGS
from dwa_fast.data.manifest import image_name
from dwa_fast.data.set_layout import IMAGES, has_link
from dwa_fast.errors import InputError
from dwa_fast.io.decode import decode
from dwa_fast.io.pictures import mosaic
from dwa_fast.recipes import METHODS, RECIPES, recipe
from dwa_fast.report.contents import Facts, Image, Section
from dwa_fast.report.search import DistilledSet
from dwa_fast.report.values import groups, shown

_CLASSES, _IMAGES = 10, 10  # shown of a set, at most
_TILE, _LARGEST_TILE = 64, 128  # pixels of an image in a contact sheet: small ones are enlarged by a whole number, large ones shrunk
_SHEET = 384  # pixels of the width of a sheet that few images share
_MISSING = 128  # grey
_CHANGES = 4  # at most this many settings that differ from the recipe, in a title


def kinds(sets: Sequence[DistilledSet]) -> list[list[DistilledSet]]:
    """The sets in groups that differ in nothing but their seed."""
    together: dict[str, list[DistilledSet]] = {}
    for each in sets:
        settings = {name: value for name, value in each.manifest["settings"].items() if name != "seed"}
        content = [settings, each.manifest["class_names"], len(each.manifest["images"]), each.manifest["complete"]]
        together.setdefault(json.dumps(content, sort_keys=True), []).append(each)
    return list(together.values())


def set_section(anchor: str, alike: Sequence[DistilledSet]) -> Section:
    """The first of several sets that differ in their seed alone."""
    first = alike[0]
    manifest, settings = first.manifest, first.manifest["settings"]
    classes, count = len(manifest["class_names"]), len(manifest["images"])
    ipc = count // classes if classes else 0
    named = f"ipc {ipc}" if manifest["complete"] else "unfinished"
    names = [str(settings[name]) for name in ("method", "recipe") if name in settings]
    sheet = _sheet(first, ipc)
    facts = [Facts("Settings", groups(settings))]
    if manifest["skipped"]:
        facts.append(Facts("Real images that could not be used", groups(manifest["skipped"])))
    state = "" if manifest["complete"] else " · not complete"
    seeds = {json.dumps(each.manifest["settings"].get("seed")) for each in alike}
    more, copies = len(seeds) - 1, len(alike) - len(seeds)
    others = f" · {more} more set{'s' * (more > 1)} with another seed" if more else ""
    others += f" · {copies} more with the same seed" if copies else ""
    return Section(
        anchor=anchor,
        name=first.name,
        title=", ".join([*names, *_size(settings), named, *_teachers(manifest), *_changes(settings)]),
        subtitle=f"{first.name} · {count} images of {classes} classes{state}{others}",
        paragraphs=[] if sheet else ["No whole row of images yet."],
        images=[sheet] if sheet else [],
        facts=[*facts, Facts("Versions", groups(manifest["versions"]))],
    )


def _size(settings: Mapping[str, Any]) -> list[str]:
    """Pixels of an image, for its title."""
    height, width = _sides(settings) or (0, 0)
    return [] if not width else [f"{width} px" if height == width else f"{width} × {height} px"]


def _sides(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of an image, if a manifest says them."""
    shape = settings.get("image_shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
        return None
    return shape[1], shape[2]


def _teachers(manifest: Mapping[str, Any]) -> list[str]:
    """Architecture and accuracy of each teacher; of a manifest that does not have them, its checksums alone."""
    checksums, known = manifest["settings"].get("teacher"), manifest.get("teachers", [])
    several = f"{len(checksums)} teachers" if isinstance(checksums, list) else "teacher" if known else ""
    described = " and ".join(_described(each["architecture"], each.get("accuracy")) for each in known)
    return [f"{several} {described}".strip()] if several else []


def _described(architecture: str, accuracy: float | None) -> str:
    return architecture if accuracy is None else f"{architecture} ({accuracy:.1f} %)"


def _changes(settings: Mapping[str, Any]) -> list[str]:
    """The settings of a set that are not those of its recipe and method, for its title."""
    name, method = str(settings.get("recipe")), str(settings.get("method"))
    if name not in RECIPES or method not in METHODS:
        return []
    sides = _sides(settings)
    size: dict[str, Any] = {"size": sides[1]} if sides else {}
    made = recipe(name, method=method, **size)
    own = json.loads(json.dumps({"mean": made.data.mean, "std": made.data.std, **asdict(made.synthesis)}))
    stated = {**json.loads(json.dumps(LATER_SETTINGS)), **settings}
    compared = [field for field in own if field not in EXECUTION_SETTINGS and field in stated]
    changed = [f"{field} {shown(stated[field])}" for field in compared if stated[field] != own[field]]
    return changed if len(changed) <= _CHANGES else [*changed[:_CHANGES], "…"]


def _sheet(found: DistilledSet, ipc: int) -> Image | None:
    """The first images of the first classes, a row per class; grey where an image is missing. None before the first whole row."""
    names = found.manifest["class_names"]
    rows, columns = min(len(names), _CLASSES), min(ipc, _IMAGES)
    if not rows or not columns:
        return None
    files = [_file(found.manifest, *divmod(place, columns)) for place in range(rows * columns)]
    sides = [_side(found.folder, file) for file in files]
    tile = min(_LARGEST_TILE, max(_TILE, _SHEET // columns))
    size = min([tile, *filter(None, sides)])
    tiles = [_tile(found.folder / file, size) if side else _blank(size) for file, side in zip(files, sides, strict=True)]
    levels = mosaic(torch.stack(tiles), columns, tile // size)
    image, buffer = PIL.Image.fromarray(levels.numpy()), io.BytesIO()
    image.save(buffer, format="PNG")
    which = f"the first {rows} of {len(names)} classes" if rows < len(names) else f"all {rows} classes"
    number = f"the first {columns} of {ipc} images" if columns < ipc else f"all {columns} images" if columns > 1 else "the image"
    title = f"{number} of each of {which}, a row per class"
    return Image(title[0].upper() + title[1:], buffer.getvalue(), rows=names[:rows])


def _file(manifest: Mapping[str, Any], label: int, index: int) -> str:
    """An image, below the folder of its set."""
    suffix = "jpg" if manifest["settings"].get("image_format") == "jpeg" else "png"
    return f"{IMAGES}/{image_name(label, index, len(manifest['class_names']), suffix)}"


def _side(folder: Path, file: str) -> int | None:
    """Pixels of the shorter side of an image; None where there is none, or only behind a link, which may lead anywhere."""
    try:
        with PIL.Image.open(io.BytesIO((folder / file).read_bytes()), formats=("PNG", "JPEG")) as image:
            return None if has_link(folder, file) else min(image.size)
    except Exception:  # not there yet, or damaged in one of the dozen ways that Pillow knows
        return None


def _tile(path: Path, size: int) -> Tensor:
    """An image as [3, S, S] uint8."""
    try:
        return decode(path, size, 3)
    except InputError:  # damaged further on
        return _blank(size)


def _blank(size: int) -> Tensor:
    return torch.full((3, size, size), _MISSING, dtype=torch.uint8)

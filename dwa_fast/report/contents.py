"""What a report says about a record and about a distilled set."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from dwa_fast.decoding import decode
from dwa_fast.errors import InputError
from dwa_fast.files import read_regular
from dwa_fast.pictures import mosaic
from dwa_fast.plots import Figure, as_png, as_svg
from dwa_fast.published import beside_published
from dwa_fast.records import Picture, Scatter
from dwa_fast.report.document import Block, Command, Document, Drawing, Facts, Image, Paragraph, Section
from dwa_fast.report.findings import DistilledSet, Run, find
from dwa_fast.storage import image_name

_CLASSES, _IMAGES = 10, 10  # of a set that are shown, at most: the first ones
_TILE = 64  # pixels to which larger images are shrunk in a contact sheet
_SHOWN_TILE = 32  # pixels to which smaller ones are enlarged, about
_MISSING = 0.5  # grey
_LARGEST = 2000  # pixels of a side of a picture
_LONGEST_LIST, _LONGEST_TEXT, _LONGEST_GROUP = 20, 400, 200  # of settings


def gather(folders: Sequence[Path], title: str) -> Document:
    """Everything that lies below some folders.

    Raises:
        InputError: one of them cannot be read, or none holds anything to show.
    """
    found = find(folders)
    left_out = list(found.left_out)
    runs = list(_sections(found.runs, "run", _run, left_out))
    sets = list(_sections(found.sets, "set", _set, left_out))
    if not runs and not sets:
        reason = f" ({left_out[0]})" if left_out else ""
        raise InputError(f"no record and no distilled set that can be shown lies below {', '.join(map(str, folders))}{reason}")
    return Document(title, runs, sets, left_out)


def _sections(found: Sequence[Any], kind: str, describe: Callable[[str, Any], Section], left_out: list[str]) -> Iterator[Section]:
    """A section for each; what cannot be shown is named in `left_out`."""
    for number, each in enumerate(found, 1):
        try:
            yield describe(f"{kind}-{number}", each)
        except InputError as error:
            left_out.append(f"{each.place}: {error}")
        except RecursionError:
            left_out.append(f"{each.place} is nested too deeply")


def _run(anchor: str, run: Run) -> Section:
    record = run.record
    blocks: list[Block] = [Paragraph(record.summary)] if record.summary else []
    blocks += record.tables
    beside = beside_published(record)
    blocks += [beside] if beside else []
    figures: Sequence[Figure] = (*record.charts, *record.heat_maps, *record.scatters)
    blocks += [_drawing(figure, f"{anchor}-{number}") for number, figure in enumerate(figures)]
    blocks += [_picture(run, each) for each in record.pictures]
    blocks += [Command(record.command)] if record.command else []
    blocks += [Facts(title, _groups(values)) for title, values in _folded(record.settings, record.environment)]
    parts = [record.kind, run.place, *([] if record.seconds is None else [_duration(record.seconds)]), *_memory(record.environment)]
    return Section(anchor, record.title, " · ".join(parts), blocks)


def _drawing(figure: Figure, salt: str) -> Drawing:
    note = str(figure.note) if isinstance(figure, Scatter) else ""
    return Drawing(str(figure.title), as_svg(figure, titled=False, salt=salt), as_png(figure), note)


def _folded(settings: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if settings:
        yield "Settings", settings
    if environment:
        yield "Versions and machine", environment


def _memory(environment: Mapping[str, Any]) -> list[str]:
    """Peak memory as `finish` records it."""
    return [f"{name.removesuffix(', MiB')} {value} MiB" for name, value in environment.items() if name.endswith(", MiB")]


def _duration(seconds: float) -> str:
    """Time for a reader."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _picture(run: Run, picture: Picture) -> Block:
    """An image file beside a record, decoded and written anew: whatever else was in the file stays there."""
    path = run.folder / picture.file
    try:
        if not path.resolve().is_relative_to(run.folder.resolve()):
            raise InputError("it lies outside of the folder of its record")
        with PIL.Image.open(io.BytesIO(read_regular(path)), formats=("PNG", "JPEG")) as image:
            seen = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        return Paragraph(f"{picture.title}: {picture.file} cannot be shown: {getattr(error, 'strerror', None) or error}")
    seen.thumbnail((_LARGEST, _LARGEST))
    return Image(str(picture.title), _encoded(seen), *seen.size)


def _encoded(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _set(anchor: str, found: DistilledSet) -> Section:
    manifest, settings = found.manifest, found.manifest["settings"]
    classes, count = len(manifest["class_names"]), len(manifest["images"])
    ipc = count // classes if classes else 0
    origin = [str(settings[name]) for name in ("method", "recipe") if name in settings]
    blocks: list[Block] = [*_sheet(found, ipc), Facts("Settings", _groups(settings))]
    if manifest["skipped"]:
        blocks.append(Facts("Real images that could not be used", _groups(manifest["skipped"])))
    blocks.append(Facts("Versions", _groups(manifest["versions"])))
    state = "" if manifest["complete"] else " · not complete"
    title = ", ".join([*origin, f"ipc {ipc}"])
    return Section(anchor, title, f"{found.place} · {count} images of {classes} classes{state}", blocks)


def _sheet(found: DistilledSet, ipc: int) -> list[Block]:
    """The first images of the first classes, a row per class; grey where there is none."""
    names = found.manifest["class_names"]
    rows, columns = min(len(names), _CLASSES), min(ipc, _IMAGES)
    if not rows or not columns:
        return [Paragraph("No whole row of images yet.")]
    paths = [_path(found, *divmod(place, columns)) for place in range(rows * columns)]
    sides = [_side(path) for path in paths]
    size = min([_TILE, *filter(None, sides)])
    tiles = [_tile(path, size) if side else _blank(size) for path, side in zip(paths, sides, strict=True)]
    levels = (mosaic(torch.stack(tiles), columns) * 255).round().to(torch.uint8)
    times = max(1, round(_SHOWN_TILE / size))
    levels = levels.repeat_interleave(times, 0).repeat_interleave(times, 1)
    image = PIL.Image.fromarray(levels.numpy())
    which = f"the first {rows} of {len(names)} classes" if rows < len(names) else f"all {rows} classes"
    number = f"the first {columns} of {ipc} images" if columns < ipc else f"all {columns} images" if columns > 1 else "the image"
    title = f"{number} of each of {which}, a row per class"
    return [Image(title[0].upper() + title[1:], _encoded(image), *image.size, rows=names[:rows])]


def _path(found: DistilledSet, label: int, index: int) -> Path:
    suffix = "jpg" if found.manifest["settings"].get("image_format") == "jpeg" else "png"
    return found.folder / image_name(label, index, len(found.manifest["class_names"]), suffix)


def _side(path: Path) -> int | None:
    """Pixels of the shorter side of an image; None where there is none, or only behind a link, which may lead anywhere."""
    try:
        with PIL.Image.open(io.BytesIO(read_regular(path)), formats=("PNG", "JPEG")) as image:
            return None if path.is_symlink() or path.parent.is_symlink() else min(image.size)
    except Exception:  # not there yet, or damaged in one of the dozen ways that Pillow knows
        return None


def _tile(path: Path, size: int) -> Tensor:
    """An image as [3, S, S] in [0, 1]."""
    try:
        return decode(path, size, 3)
    except InputError:  # damaged further on
        return _blank(size)


def _blank(size: int) -> Tensor:
    return torch.full((3, size, size), _MISSING)


def _groups(settings: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Nested values as names and values: those at the top first, then a group for each mapping at the top."""
    plain = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    nested = {name: value for name, value in settings.items() if isinstance(value, dict) and value}
    return [(name, _cut(list(_leaves(values)))) for name, values in [("", plain), *nested.items()] if values]


def _cut(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    left = len(rows) - _LONGEST_GROUP
    return rows if left <= 0 else [*rows[:_LONGEST_GROUP], ("…", f"{left} more")]


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every value that is no mapping, with the names that lead to it; a stack, not recursion: it may be nested deeply."""
    waiting = list(values.items())[::-1]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{name} · {key}", below) for key, below in value.items()][::-1]
        else:
            yield name, _shown(value)


def _shown(value: Any) -> str:
    """A value for a reader; what is long is cut."""
    if value is None or value in ({}, []):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        more = f", … ({len(value)} in all)" if len(value) > _LONGEST_LIST else ""
        return ", ".join(map(str, value[:_LONGEST_LIST]))[:_LONGEST_TEXT] + more
    text = str(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"

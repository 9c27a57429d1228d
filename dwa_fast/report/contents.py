"""The contents of a report as plain values, before a template makes HTML or Markdown of them. All text is untrusted."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image

from dwa_fast.errors import InputError
from dwa_fast.report.plots import Figure, as_png
from dwa_fast.report.published import beside_published
from dwa_fast.report.records import Picture, Scatter, Table
from dwa_fast.report.search import ReportRecord
from dwa_fast.report.values import duration, groups, shown

_LARGEST = 2000  # pixels of the longer side of a picture
_TITLES = 5  # of the runs with a preset, at most


@dataclass(frozen=True)
class Image:
    """A figure, a picture or a contact sheet."""

    title: str
    png: bytes
    note: str = ""
    rows: Sequence[str] = ()  # names of the rows of a contact sheet, from the top


@dataclass(frozen=True)
class Facts:
    """Names and values in groups, collapsed."""

    title: str
    groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]  # name of the group, "" for none; its names and values


@dataclass(frozen=True, kw_only=True)
class Section:
    """A run or a set; its parts are shown in this order."""

    anchor: str  # unique; letters, digits and hyphens
    name: str  # of the folder
    title: str
    subtitle: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    images: Sequence[Image] = ()
    command: str = ""
    facts: Sequence[Facts] = ()


@dataclass(frozen=True)
class Contents:
    """A whole report."""

    title: str
    runs: Sequence[Section]
    sets: Sequence[Section]
    runs_note: str  # whether students of different runs were trained with different presets, or tested on different images
    sets_note: str  # how many of them are not shown
    left_out: Sequence[str]  # one error message each


def run_section(anchor: str, run: ReportRecord) -> Section:
    """A record as a section.

    Raises:
        InputError: a figure holds values that cannot be drawn.
    """
    record = run.record
    beside = beside_published(record)
    figures: Sequence[Figure] = (*record.charts, *record.heat_maps, *record.scatters)
    images = [Image(str(each.title), as_png(each, titled=False), str(each.note) if isinstance(each, Scatter) else "") for each in figures]
    notes = [record.summary] if record.summary else []
    for picture in record.pictures:
        try:
            images.append(_picture(run, picture))
        except Exception as error:  # Pillow raises a dozen kinds for damaged files
            notes.append(f"{picture.title}: {picture.file} cannot be shown: {getattr(error, 'strerror', None) or error}")
    parts = [record.kind, run.name, *([] if record.seconds is None else [duration(record.seconds)]), *_memory(record.environment)]
    return Section(
        anchor=anchor,
        name=run.name,
        title=record.title,
        subtitle=" · ".join(parts),
        paragraphs=notes,
        tables=[*record.tables, *([beside] if beside else [])],
        images=images,
        command=record.command,
        facts=list(_facts(record.settings, record.environment)),
    )


def told_apart(sections: Sequence[Section]) -> list[Section]:
    """The sections; where several have one title, the names of their folders stand behind it."""
    counts = Counter(each.title for each in sections)
    return [replace(each, title=f"{each.title} ({each.name})") if counts[each.title] > 1 else each for each in sections]


def presets_note(runs: Sequence[ReportRecord]) -> str:
    """A warning where students of the runs were trained with different presets, else "". Records that name none have the paper's."""
    titles: dict[str, list[str]] = {}
    for run in runs:
        if "validation" in run.record.settings:
            preset = run.record.data.get("preset", {"name": "paper"})
            name = preset.get("name") if isinstance(preset, dict) else None
            titles.setdefault(shown(name), []).append(shown(run.record.title))
    if len(titles) < 2:
        return ""
    lists = [f"{name} ({'; '.join([*own[:_TITLES], *(['…'] if len(own) > _TITLES else [])])})" for name, own in titles.items()]
    return f"Students were trained with different presets, which makes their numbers differ: {', '.join(lists)}."


def held_out_note(runs: Sequence[ReportRecord]) -> str:
    """A warning where only some runs were tested on the test images, else ""."""
    shares: dict[float, list[str]] = {}
    for run in runs:
        settings = run.record.settings
        if "validation" in settings:
            data = settings.get("data")
            share = {**settings, **(data if isinstance(data, dict) else {})}.get("held_out_share", 0.0)
            shares.setdefault(share if isinstance(share, float) else 0.0, []).append(shown(run.record.title))
    if len(shares) < 2:
        return ""
    lists = [
        f"{f'{100 * share:.3g} % of the training images' if share else 'the test images'} ({'; '.join(own[:_TITLES])})"
        for share, own in sorted(shares.items())
    ]
    return f"Students were tested on different images: {', '.join(lists)}."


def _facts(settings: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[Facts]:
    for title, values in (("Settings", settings), ("Versions and machine", environment)):
        if values:
            yield Facts(title, groups(values))


def _memory(environment: Mapping[str, Any]) -> list[str]:
    """Peak memory as `finish` records it."""
    return [f"{name.removesuffix(', MiB')} {value} MiB" for name, value in environment.items() if name.endswith(", MiB")]


def _picture(run: ReportRecord, picture: Picture) -> Image:
    """An image file beside a record. It is decoded and encoded again, so that nothing else in the file reaches the report."""
    path = run.folder / picture.file
    if not path.resolve().is_relative_to(run.folder.resolve()):
        raise InputError("it lies outside of the folder of its record")
    with PIL.Image.open(io.BytesIO(path.read_bytes()), formats=("PNG", "JPEG")) as image:
        pixels = image.convert("RGBA" if image.has_transparency_data else "RGB")
    pixels.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    pixels.save(buffer, format="PNG")
    return Image(str(picture.title), buffer.getvalue())

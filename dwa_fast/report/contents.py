"""What a report says about runs, and all that it is made of."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from dwa_fast.errors import InputError
from dwa_fast.report.document import Block, Command, Document, Drawing, Facts, Image, Paragraph, Section
from dwa_fast.report.findings import Run, find
from dwa_fast.report.plots import Figure, as_png, as_svg
from dwa_fast.report.published import beside_published
from dwa_fast.report.records import Picture, Scatter
from dwa_fast.report.sets import kinds, set_section
from dwa_fast.report.values import duration, groups

_LARGEST = 2000  # pixels of a side of a picture


def gather(folders: Sequence[Path], title: str, most_sets: int) -> Document:
    """Everything that lies below some folders; of the distilled sets, so many kinds at most.

    Raises:
        InputError: one of them cannot be read, or none holds anything to show.
    """
    found = find(folders)
    left_out = list(found.left_out)
    runs = list(_runs(found.runs, left_out))
    alike = kinds(found.sets)
    if not runs and not alike:
        reason = f" ({left_out[0]})" if left_out else ""
        raise InputError(f"no record and no distilled set that can be shown lies below {', '.join(map(str, folders))}{reason}")
    sets = [set_section(f"set-{number}", each) for number, each in enumerate(alike[:most_sets], 1)]
    note = f"Shown: {most_sets} of {len(alike)} kinds of sets; --sets {len(alike)} shows all." if len(alike) > most_sets else ""
    return Document(title, runs, sets, note, left_out)


def _runs(found: Sequence[Run], left_out: list[str]) -> Iterator[Section]:
    """A section for each; what cannot be shown is named in `left_out`."""
    for number, run in enumerate(found, 1):
        try:
            yield _run(f"run-{number}", run)
        except InputError as error:
            left_out.append(f"{run.place}: {error}")
        except RecursionError:
            left_out.append(f"{run.place} is nested too deeply")


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
    blocks += [Facts(title, groups(values)) for title, values in _folded(record.settings, record.environment)]
    parts = [record.kind, run.place, *([] if record.seconds is None else [duration(record.seconds)]), *_memory(record.environment)]
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


def _picture(run: Run, picture: Picture) -> Block:
    """An image file beside a record, decoded and written anew: whatever else was in the file stays there."""
    path = run.folder / picture.file
    try:
        if not path.resolve().is_relative_to(run.folder.resolve()):
            raise InputError("it lies outside of the folder of its record")
        with PIL.Image.open(io.BytesIO(path.read_bytes()), formats=("PNG", "JPEG")) as image:
            seen = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        return Paragraph(f"{picture.title}: {picture.file} cannot be shown: {getattr(error, 'strerror', None) or error}")
    seen.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    seen.save(buffer, format="PNG")
    return Image(str(picture.title), buffer.getvalue(), *seen.size)

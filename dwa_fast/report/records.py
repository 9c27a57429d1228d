"""The results of a command, as plain values in one `record.json`: tables, figures and pictures, which the report shows as they are."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dwa_fast._version import __version__
from dwa_fast.config import DataConfig
from dwa_fast.errors import InputError
from dwa_fast.io.files import read_json, write_json
from dwa_fast.recipes import Recipe, nearest_preset, preset_text

RECORD = "record.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""  # a note below it


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve, or one colour of bars."""

    name: str
    values: Sequence[float | None]  # one per place on the x axis; None: not measured
    spreads: Sequence[float | None] = ()  # standard deviations, drawn as error bars; empty: none
    level: bool = False  # whether it is one value wherever it is on the x axis: a line across, without markers


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over numbers, or bars over names, with error bars."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float | str]  # numbers: curves; names: bars
    series: Sequence[Series]
    log_x: bool = False


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A value for each pair of settings."""

    title: str
    x_label: str
    y_label: str
    value_label: str
    x: Sequence[float | str]
    y: Sequence[float | str]
    values: Sequence[Sequence[float | None]]  # [y][x]


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Points of the plane in groups, such as a t-SNE."""

    title: str
    groups: Mapping[str, Sequence[tuple[float, float]]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image file beside the record."""

    title: str
    file: str  # relative to the folder of the record, below it


@dataclass(frozen=True, kw_only=True)
class Record:
    """The results of one command."""

    kind: str  # what was done: validate, ablation, incremental, …
    title: str
    summary: str = ""  # what to read out of it, a sentence or two
    command: str = ""  # how to do it again
    settings: Mapping[str, Any] = field(default_factory=dict)  # nested plain values
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None  # of the whole command, without what an earlier run had finished
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    heat_maps: Sequence[HeatMap] = ()
    scatters: Sequence[Scatter] = ()
    pictures: Sequence[Picture] = ()
    data: Mapping[str, Any] = field(default_factory=dict)  # raw numbers behind the tables


_PARTS = {"tables": Table, "charts": Chart, "heat_maps": HeatMap, "scatters": Scatter, "pictures": Picture}


def write_record(folder: Path, record: Record) -> None:
    """Write `record.json`, whole or not at all."""
    write_json(folder / RECORD, {"dwa_fast_record": _FORMAT, **asdict(record)})


def read_record(path: Path) -> Record:
    """A record that `write_record` wrote.

    Raises:
        InputError: it cannot be read, is no record, or names a picture outside of its folder.
    """
    content = read_json(path, lambda content: content, advice="make it again with the command that made it")
    if not isinstance(content, dict) or content.pop("dwa_fast_record", None) != _FORMAT:
        raise InputError(f"{path} is no record of this dwa_fast; make it again with the command that made it")
    try:
        for name, kind in _PARTS.items():
            content[name] = [kind(**each) for each in content.get(name, [])]
        for chart in content["charts"]:
            object.__setattr__(chart, "series", [Series(**each) for each in chart.series])
        record = Record(**content)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path} is no whole record: {error}") from error
    wrong = next(_wrong(record), None)
    if wrong:
        raise InputError(f"{path} is no whole record: {wrong}")
    for picture in record.pictures:
        place = PurePosixPath(picture.file)
        if place.is_absolute() or ".." in place.parts:
            raise InputError(f"{path} names a picture outside of its folder: {picture.file!r}")
    return record


def _wrong(record: Record) -> Iterator[str]:
    """The first field of the wrong type, since a record may come from anywhere; figures are checked when they are drawn."""
    for name in ("kind", "title", "summary", "command"):
        if not isinstance(getattr(record, name), str):
            yield f"{name} is no text"
    for name in ("settings", "environment", "data"):
        if not isinstance(getattr(record, name), dict):
            yield f"{name} is no mapping"
    if not isinstance(record.seconds, (int, float, type(None))):
        yield "seconds is no number"
    for table in record.tables:
        if not isinstance(table.columns, list) or not all(isinstance(row, list) and len(row) == len(table.columns) for row in table.rows):
            yield f"table {table.title!r} needs {table.columns!r} in every row"
    for picture in record.pictures:
        if not isinstance(picture.file, str):
            yield f"picture {picture.title!r} names no file"


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers may depend on beside the settings."""
    cuda = {"device name": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    versions = {"dwa_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**versions, "device": device.type, **cuda, "threads": torch.get_num_threads()}


def preset_data(recipe: Recipe) -> dict[str, Any]:
    """The preset of the students' training, for the data of a record, with what was changed of it."""
    name, changed = nearest_preset(recipe)
    return {"name": name, "changed": changed}


def preset_note(recipe: Recipe) -> str:
    """A sentence for the note of a table; "" for the paper's training of the students."""
    text = preset_text(recipe)
    return f"Students trained with {text}." if text else ""


def tested_note(data: DataConfig) -> str:
    """A sentence for the note of a table that is not of the test images; else ""."""
    share = data.held_out_share
    return f"Tested on {100 * share:.3g} % of the training images, not on the test images." if share else ""


def command_line() -> str:
    """The command that is running, as a person types it."""
    return shlex.join(["dwa-fast", *sys.argv[1:]])


def format_mean_std(mean: float, std: float, count: int) -> str:
    """A cell of a table: the mean, and the standard deviation where it is over more than one value."""
    return f"{mean:.1f} ± {std:.1f}" if count > 1 else f"{mean:.1f}"

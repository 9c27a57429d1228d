"""What a report is made of: every record and every distilled set below some folders. What cannot be shown is named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwa_fast.data.manifest import read_manifest
from dwa_fast.data.set_layout import MANIFEST, set_folder
from dwa_fast.errors import InputError, escape_control_chars
from dwa_fast.io.files import walk_files
from dwa_fast.report.records import RECORD, Record, read_record


@dataclass(frozen=True)
class Run:
    """A record, and where it lies."""

    place: str  # its folder, from the name of the folder that was given
    folder: Path
    record: Record


@dataclass(frozen=True)
class DistilledSet:
    """The manifest of a set, and where it lies."""

    place: str
    folder: Path
    manifest: dict[str, Any]


@dataclass
class Findings:
    """Everything below the folders, in sorted order."""

    runs: list[Run] = field(default_factory=list)
    sets: list[DistilledSet] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # a sentence for each file that could not be read


def find(folders: Sequence[Path]) -> Findings:
    """Look through folders; links to folders are not followed, and what lies below two of them is found once.

    Raises:
        InputError: one of them is no folder, or cannot be read.
    """
    found = Findings()
    seen: set[str] = set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
        folder = set_folder(folder)
        for entry in walk_files(str(folder)):
            path = Path(entry.path)
            if entry.name not in (RECORD, MANIFEST) or os.path.realpath(path) in seen:
                continue
            seen.add(os.path.realpath(path))
            place = (Path(folder.resolve().name) / path.parent.relative_to(folder)).as_posix()
            try:
                if entry.name == RECORD:
                    found.runs.append(Run(place, path.parent, read_record(path)))
                else:
                    found.sets.append(DistilledSet(place, path.parent, read_manifest(path.parent)))
            except InputError as error:
                found.left_out.append(escape_control_chars(str(error)))
            except RecursionError:
                found.left_out.append(escape_control_chars(f"{path} is nested too deeply"))
    return found

"""Finds every record and every distilled set below some folders."""

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
class ReportRecord:
    """A record and its folder."""

    name: str  # the folder, relative to the parent of the folder that was searched
    folder: Path
    record: Record


@dataclass(frozen=True)
class DistilledSet:
    """The manifest of a set and its folder."""

    name: str
    folder: Path
    manifest: dict[str, Any]


@dataclass
class SearchResult:
    """Everything below the folders, in sorted order."""

    records: list[ReportRecord] = field(default_factory=list)
    sets: list[DistilledSet] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # an error message for each file that cannot be read


def search(folders: Sequence[Path]) -> SearchResult:
    """Search folders. Links to folders are not followed, and a file below two of the folders is found once.

    Raises:
        InputError: one of them is not a folder, or cannot be read.
    """
    result = SearchResult()
    visited: set[str] = set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
        folder = set_folder(folder)
        for entry in walk_files(str(folder)):
            path = Path(entry.path)
            if entry.name not in (RECORD, MANIFEST) or os.path.realpath(path) in visited:
                continue
            visited.add(os.path.realpath(path))
            name = (Path(folder.resolve().name) / path.parent.relative_to(folder)).as_posix()
            try:
                if entry.name == RECORD:
                    result.records.append(ReportRecord(name, path.parent, read_record(path)))
                else:
                    result.sets.append(DistilledSet(name, path.parent, read_manifest(path.parent)))
            except InputError as error:
                result.left_out.append(escape_control_chars(str(error)))
            except RecursionError:
                result.left_out.append(escape_control_chars(f"{path} is nested too deeply"))
    return result

"""What the commands that study distilled sets share: the sets by name, and a folder that holds one study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dwa_fast.datasets import FileSet
from dwa_fast.distilled import open_distilled
from dwa_fast.errors import InputError
from dwa_fast.files import output_folder
from dwa_fast.records import RECORD, read_record
from dwa_fast.resuming import refuse_change


def named_sets(sets: Sequence[str], size: int, channels: int, ipc: int | None, class_names: Sequence[str]) -> dict[str, FileSet]:
    """Distilled sets by name, from `name=DIR`, or `DIR` alone, which names itself.

    Args:
        ipc: take the first images of each class only.
        class_names: of the real classes.
    Raises:
        InputError: there is none, two have the same name, or one cannot be read.
    """
    found: dict[str, FileSet] = {}
    for text in sets:
        name, equals, place = text.partition("=")
        named = equals and name and "/" not in name and not Path(text).is_dir()
        folder = Path(place if named else text)
        name = name if named else folder.absolute().name
        if name in found:
            raise InputError(f"two sets are called {name!r}; name them, as in --sets one=DIR two=DIR")
        found[name], _ = open_distilled(folder, size, channels, class_names, per_class=ipc)
    if not found:
        raise InputError("there is no set to look at; name some with --sets")
    return found


def study_folder(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The folder of a study, made if need be.

    Raises:
        InputError: it cannot be written, or holds a study of other settings.
    """
    if (output_folder(folder) / RECORD).exists():
        before = read_record(folder / RECORD).settings
        refuse_change(folder, "a study", before, json.loads(json.dumps(settings)), "choose another folder")
    return folder

"""Shared by the commands that analyse distilled sets: the sets by name, and the folder of a study."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwa_fast.commands.console import Console
from dwa_fast.commands.data import TeacherData, naming_bad_images, readable_images, report_skipped
from dwa_fast.config import PositiveInt
from dwa_fast.data.datasets import Split
from dwa_fast.data.distilled import open_distilled
from dwa_fast.data.images import FileSet, ImageSet
from dwa_fast.data.pairing import PairedTeacher
from dwa_fast.data.set_layout import refuse_images, set_folder
from dwa_fast.errors import InputError
from dwa_fast.io.files import output_folder
from dwa_fast.io.settings import refuse_change
from dwa_fast.report.records import RECORD, read_record


@dataclass(frozen=True, kw_only=True)
class DistilledSets(TeacherData):
    """Some distilled sets, and the real data that they were made from."""

    sets: tuple[str, ...]  # Distilled sets: folders, or name=folder.
    ipc: PositiveInt | None = None  # Take the first images of each class only; default: all.
    skip_bad_images: bool = False  # Skip files that are not complete images and report how many; otherwise stop at the first.

    def real(self, console: Console, split: Split) -> ImageSet:
        """The real images of a split."""
        with naming_bad_images():
            return readable_images(console, self.load(split), self.skip_bad_images, used_late=split == "test")

    def open_sets(self, console: Console, class_names: Sequence[str]) -> dict[str, FileSet]:
        """The distilled sets by name, from `name=DIR`, or `DIR` alone, which names itself.

        Args:
            class_names: of the real classes.
        Raises:
            InputError: there is none, two have the same name, or one cannot be read.
        """
        found: dict[str, FileSet] = {}
        for name, folder in named_sets(self.sets).items():
            found[name], skipped = open_distilled(
                folder, self.size, self.normalisation.channels, class_names, per_class=self.ipc, skip_bad_images=self.skip_bad_images
            )
            report_skipped(console, skipped)
        if not found:
            raise InputError("there is no set to analyse; name some with --sets")
        return found


def named_sets(texts: Sequence[str]) -> dict[str, Path]:
    """Folders by name, from `name=DIR`, or `DIR` alone, which names itself.

    Raises:
        InputError: two have the same name, or there is a name alone.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        named = equals and name and "/" not in name and not Path(text).is_dir()
        if named and not place:
            raise InputError(f"{text!r} names no folder; expected {name}=DIR")
        folder = Path(place if named else text)
        name = name if named else Path(os.path.abspath(set_folder(folder))).name
        if name in found:
            raise InputError(f"two sets are called {name!r}; name them, as in --sets one=DIR two=DIR")
        found[name] = folder
    return found


def teacher_settings(teacher: PairedTeacher) -> dict[str, Any]:
    """The properties of the teacher that affect the numbers of a study."""
    outputs = {"outputs": teacher.outputs} if teacher.outputs else {}
    return {"architecture": teacher.info.architecture, "checksum": teacher.checksum, **outputs}


def study_folder(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The folder of a study, made if need be.

    Raises:
        InputError: it cannot be written, holds a study of other settings, or is for the images of a set alone.
    """
    refuse_images(folder)
    if (output_folder(folder) / RECORD).exists():
        before = read_record(folder / RECORD).settings
        refuse_change(folder, "a study", before, json.loads(json.dumps(settings)), "choose another folder")
    return folder

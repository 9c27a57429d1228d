"""The command that collects results in one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dwa_fast.commands.console import Console
from dwa_fast.config import NonNegativeInt
from dwa_fast.data.set_layout import refuse_images
from dwa_fast.errors import InputError
from dwa_fast.report.page import write_report


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make one HTML page, and the same as Markdown, of every run and every distilled set below some folders.

    The page needs nothing beside it; the Markdown has its pictures in a folder beside it. Results stand beside the published ones where
    the setting is the published one.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]  # Folders to search for record.json and manifest.json.
    output: Path = Path("report.html")  # The page; the Markdown has the same name with .md.
    title: str = "Runs and distilled sets"  # Heading of the page.
    sets: NonNegativeInt = 24  # Largest number of distilled sets shown; of sets that differ only in their seed, one is shown.

    def run(self, console: Console) -> None:
        """Write the page, and name the files that were left out."""
        if not self.folders:
            raise InputError("report needs at least one folder to search")
        refuse_images(self.output)
        document = write_report(self.folders, self.output, self.title, most_sets=self.sets)
        for sentence in document.left_out:
            console.print(f"left out: {sentence}")
        runs, sets = len(document.runs), len(document.sets)
        counts = f"{runs} run{'s' * (runs != 1)}, {sets} kind{'s' * (sets != 1)} of distilled sets"
        console.print(f"{self.output}: {counts}; the same as Markdown in {self.output.with_suffix('.md')}")

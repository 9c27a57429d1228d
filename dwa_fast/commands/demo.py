"""The command that shows everything on real digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from dwa_fast.commands.console import Console
from dwa_fast.commands.finish import finish
from dwa_fast.data.set_layout import refuse_images
from dwa_fast.experiments.demo import DemoConfig, run_demo
from dwa_fast.report.records import command_line


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole method on scikit-learn's digits: teacher, distilled sets, students, a table and a picture. Minutes on a CPU."""

    output: Path  # Folder for teacher.pt, the sets, contact-sheet.png and record.json.
    config: tyro.conf.OmitArgPrefixes[DemoConfig]

    def run(self, console: Console) -> None:
        """Run, and print the table."""
        refuse_images(self.output)
        with console.bars() as track:
            record = run_demo(self.output, self.config, track)
        finish(console, self.output, replace(record, command=command_line()))

"""The command that shows everything on real digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dwa_fast.console import Console
from dwa_fast.demo import DemoConfig, run_demo, table


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole method on scikit-learn's digits: teacher, distilled sets, students, a table and a picture. Minutes on a CPU."""

    output: Path  # Folder for teacher.pt, the sets, contact-sheet.png and report.json.
    config: tyro.conf.OmitArgPrefixes[DemoConfig]

    def run(self, console: Console) -> None:
        """Run, and print the table."""
        with console.bars() as track:
            content = run_demo(self.output, self.config, track)
        teacher = content["teacher"]
        console.say(f"teacher: {teacher['accuracy']:.1f} % top-1 on {teacher['test_images']} held-out digits")
        console.table(f"students of the distilled digits, {self.config.students} of each", table(content))
        console.say(f"images, contact-sheet.png and report.json are in {self.output}")

"""The command that checks a distilled set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dwa_fast.commands.console import Console
from dwa_fast.data.manifest import read_manifest
from dwa_fast.errors import InputError
from dwa_fast.sets.verify import problems


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a distilled set against its manifest: no image missing, changed or added."""

    images: tyro.conf.Positional[Path]  # The distilled set: a folder with a manifest.json.

    def run(self, console: Console) -> None:
        """Print a line per problem; raises InputError where there is one."""
        count = 0
        for problem in problems(self.images):
            console.print(problem)
            count += 1
        if count:
            raise InputError(
                f"{self.images}: {count} problem{'s' if count > 1 else ''}; the command that made the set makes it whole again"
            )
        console.print(f"{self.images}: complete, {len(read_manifest(self.images)['images'])} images, every file as it was written")

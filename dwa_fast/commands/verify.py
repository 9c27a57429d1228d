"""The command that checks a distilled set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dwa_fast.commands.console import Console
from dwa_fast.data.manifest import read_manifest
from dwa_fast.errors import InputError
from dwa_fast.sets.verify import additions, damage


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a distilled set against its manifest: no image missing, changed or added."""

    images: tyro.conf.Positional[Path]  # The distilled set: a folder with a manifest.json.

    def run(self, console: Console) -> None:
        """Print a line per problem; raises InputError where there is one."""
        counts = []
        for problems in (damage, additions):
            counts.append(0)
            for problem in problems(self.images):
                console.print(problem)
                counts[-1] += 1
        if any(counts):
            advice = "; the command that made the set makes again what is missing or has changed" if counts[0] else ""
            raise InputError(f"{self.images}: {sum(counts)} problem{'s' if sum(counts) > 1 else ''}{advice}")
        console.print(f"{self.images}: complete, {len(read_manifest(self.images)['images'])} images, every file as it was written")

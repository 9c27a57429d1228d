"""Writes the results of a command: a record and its figures in the folder, the tables on the screen."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dwa_fast.commands.console import Console
from dwa_fast.report.plots import Figure, draw
from dwa_fast.report.records import RECORD, Record, write_record


def finish(console: Console, folder: Path, record: Record) -> None:
    """Write `record.json`, draw every figure as a PNG beside it (chart-1.png, heat-map-1.png, scatter-1.png, …) and print the tables.

    The peak memory of the command is added to the environment.

    Raises:
        InputError: the folder cannot be written.
    """
    write_record(folder, replace(record, environment={**record.environment, **_peak_memory()}))
    files = [RECORD]
    kinds: dict[str, Sequence[Figure]] = {"chart": record.charts, "heat-map": record.heat_maps, "scatter": record.scatters}
    for kind, figures in kinds.items():
        for number, figure in enumerate(figures, 1):
            files.append(f"{kind}-{number}.png")
            draw(figure, folder / files[-1])
        for path in folder.glob(f"{kind}-*.png"):  # of an earlier run that had more figures
            if re.fullmatch(rf"{kind}-\d+\.png", path.name) and path.name not in files:
                path.unlink()
    for table in record.tables:
        console.table(table.title, [table.columns, *table.rows])
        if table.note:
            console.print(table.note)
    if record.summary:
        console.print(record.summary)
    files += [picture.file for picture in record.pictures]
    console.print(f"{folder} holds {', '.join(files)}")


def _peak_memory() -> dict[str, int]:
    """Peak memory of this process, or of the largest one that it started; also of the GPU, if one was used."""
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in, bytes
    peak = max(resource.getrusage(whose).ru_maxrss for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found = {"peak memory, MiB": peak * unit // 2**20}
    if torch.cuda.is_initialized():
        peaks = (torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        found["peak memory of a GPU, MiB"] = max(peaks) // 2**20
    return found

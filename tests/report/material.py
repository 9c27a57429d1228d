"""Records and sets to report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dwa_fast.config import StorageConfig
from dwa_fast.report.records import RECORD, Chart, HeatMap, Picture, Record, Scatter, Series, Table, write_record
from dwa_fast.sets.store import BatchSpec, ImageStore

EVIL = '<script>alert("x")</script> & `a` | [b](http://evil.example) <img src=x onerror=y> $\\frac{1}{2}$ \x1b[31m "quoted" \'it\''

WHOLE = Record(
    kind="ablation",
    title="λ_var alone",
    summary="Best in the middle.",
    command="dwa-fast ablate lambda-var --recipe digits",
    settings={
        "recipe": "digits",
        "synthesis": {"iterations": 500, "crop_scale": [0.08, 1.0], "deep": {"er": None}},
        "classes": list(range(99)),
    },
    environment={"torch": "2.14", "peak memory, MiB": 812},
    seconds=185.2,
    tables=[
        Table(title="students", columns=["λ_var", "top-1 %"], rows=[["0.01", "30.0 ± 1.0"], ["0.11", "39.6 ± 0.4"]], note="Three seeds.")
    ],
    charts=[Chart(title="a sweep", x_label="λ", y_label="%", x=[1, 2], series=[Series(name="s", values=[1.0, 2.0], spreads=[0.1, 0.2])])],
    heat_maps=[HeatMap(title="a grid", x_label="K", y_label="ρ", value_label="%", x=[1, 12], y=[0.1], values=[[1.0, 2.0]])],
    scatters=[Scatter(title="a plane", groups={"real": [(0.0, 1.0)], "DWA": [(1.0, 0.0)]}, note="ten classes")],
    pictures=[Picture(title="a sheet", file="sheet.png")],
)

BRIEF = Record(kind="validate", title="Again", tables=WHOLE.tables, pictures=WHOLE.pictures)


def make_run(folder: Path, record: Record = WHOLE) -> Path:
    """A record with its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (200, 30, 30)).save(folder / "sheet.png")
    write_record(folder, record)
    return folder


def make_set(folder: Path, classes: int = 3, ipc: int = 2, *, complete: bool = True, teachers: Sequence[Any] = (), **changes: Any) -> Path:
    """A set of images of 8 pixels; those of class c and index i have the level 10 c + i."""
    settings = {"recipe": "digits", "method": "dwa", "image_shape": [1, 8, 8], "seed": 0, **changes}
    store = ImageStore(folder, settings, [f"class {label}" for label in range(classes)], StorageConfig(losses_every=0), teachers)
    batches = [BatchSpec(index, index, list(range(classes))) for index in range(ipc)]
    for batch in batches:
        levels = [torch.full((1, 8, 8), (10 * label + batch.index) % 256, dtype=torch.uint8) for label in batch.labels]
        store.write(batch, torch.stack(levels))
    if complete:
        store.finish(batches)
    return folder


def spoil(folder: Path) -> Path:
    """A record with hostile text in every place that takes some."""
    content = _spoiled(json.loads((make_run(folder) / RECORD).read_text()))
    content["settings"] = content["environment"] = {EVIL: {EVIL: EVIL}}
    content["scatters"][0]["groups"] = {EVIL: [[0, 1]], f"{EVIL} again": [[1, 0]]}
    content["pictures"][0]["file"] = "sheet.png"
    (folder / RECORD).write_text(json.dumps(content))
    return folder


def _spoiled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spoiled(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_spoiled(each) for each in value]
    return EVIL if isinstance(value, str) else value

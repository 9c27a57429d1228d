"""The demo, whole but short: every file that it promises, and a second run that makes nothing again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from dwa_fast.commands.cli import run
from dwa_fast.data.images import FileSet, MemorySet
from dwa_fast.data.manifest import read_manifest
from dwa_fast.experiments import demo
from dwa_fast.io.files import checksum
from dwa_fast.recipes import Recipe
from dwa_fast.report.records import read_record
from dwa_fast.training.squeeze import squeeze

ARGUMENTS = ["demo", "--ipc", "1", "2", "--students", "2", "--iterations", "3", "--epochs", "1", "--jobs", "1"]
TITLES = {
    "real": "random real images",
    "sre2l": "SRe2L",
    "real-start": "real start",
    "random-step": "random step",
    "dwa": "DWA",
}


def short_squeeze(train: FileSet | MemorySet, recipe: Recipe, **more: Any) -> nn.Module:
    return squeeze(train, replace(recipe, squeeze=replace(recipe.squeeze, epochs=4)), **more)


@pytest.mark.parametrize(
    ("methods", "least"),
    [
        pytest.param(["real", "sre2l", "dwa"], 60, id="short"),
        pytest.param(list(TITLES), 98, id="whole", marks=pytest.mark.slow),
    ],
)
def test_demo_writes_record_images_and_picture(
    methods: list[str], least: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*ARGUMENTS, "--output", str(tmp_path), "--methods", *methods]
    if methods != list(TITLES):
        monkeypatch.setattr(demo, "squeeze", short_squeeze)
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    record = read_record(tmp_path / "record.json")
    assert record.data["teacher"]["accuracy"] >= least
    assert record.data["teacher"]["test_images"] == 450
    assert f"Teacher: {record.data['teacher']['accuracy']:.1f} % top-1 on 450 held-out digits." in printed
    found = {(row["method"], row["ipc"]): row for row in record.data["cells"]}
    assert found.keys() == {(method, ipc) for ipc in (1, 2) for method in methods}
    lines = {(row[0], row[1]): row[2:] for row in record.tables[0].rows}
    assert list(lines) == [(title, ipc) for ipc in "12" for title in (TITLES[method] for method in methods)]
    for (method, ipc), row in found.items():
        assert len(row["accuracies"]) == 2
        assert np.mean(row["accuracies"]) == pytest.approx(row["mean"])
        assert np.std(row["accuracies"], ddof=1) == pytest.approx(row["std"])
        reached, diversity = lines[TITLES[method], str(ipc)]
        assert reached == f"{row['mean']:.1f} ± {row['std']:.1f}"
        assert reached in printed
        assert (diversity == "–") == (ipc == 1)
    sets = list((tmp_path / "sets").iterdir())
    assert len(sets) == len(methods)
    for folder in sets:
        manifest = read_manifest(folder)
        assert manifest["complete"]
        assert len(manifest["images"]) == 20
    with Image.open(tmp_path / "contact-sheet.png") as picture:
        assert picture.width > 1000
        assert np.asarray(picture.convert("L")).std() > 30

    before = {path: checksum(path) for path in tmp_path.rglob("*.p*") if path.suffix in (".png", ".pt")}
    assert run(arguments) == 0
    assert {path: checksum(path) for path in before} == before
    assert read_record(tmp_path / "record.json").data == record.data


def test_another_seed_has_a_teacher_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "squeeze", short_squeeze)
    made = {}
    for folder, seed in (("both", 0), ("both", 1), ("alone", 1)):
        arguments = ["demo", "--ipc", "1", "--students", "1", "--iterations", "1", "--epochs", "1", "--jobs", "1", "--methods", "real"]
        assert run([*arguments, "--output", str(tmp_path / folder), "--seed", str(seed)]) == 0
        made[folder, seed] = read_record(tmp_path / folder / "record.json").data["teacher"]
    assert checksum(tmp_path / "both" / "teacher-seed1.pt") == checksum(tmp_path / "alone" / "teacher-seed1.pt")
    assert checksum(tmp_path / "both" / "teacher.pt") != checksum(tmp_path / "both" / "teacher-seed1.pt")
    assert made["both", 1] == made["alone", 1]

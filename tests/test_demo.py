"""The demo, whole but short: every file that it promises, and a second run that makes nothing again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dwa_fast.cli import run
from dwa_fast.files import checksum
from dwa_fast.pictures import contact_sheet, mosaic
from dwa_fast.storage import read_manifest

ARGUMENTS = ["demo", "--ipc", "1", "2", "--students", "2", "--iterations", "3", "--epochs", "2"]


def test_demo_writes_report_images_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["teacher"]["accuracy"] >= 98
    assert report["teacher"]["test_images"] == 450
    assert [(row["method"], row["ipc"]) for row in report["sets"]] == [
        (method, ipc) for ipc in (1, 2) for method in ("real", "sre2l", "real-start", "random-step", "dwa")
    ]
    for row in report["sets"]:
        assert len(row["accuracies"]) == len(row["seeds"]) == 2
        assert np.mean(row["accuracies"]) == pytest.approx(row["accuracy_mean"])
        assert np.std(row["accuracies"], ddof=1) == pytest.approx(row["accuracy_std"])
        assert (row["diversity"] is None) == (row["ipc"] == 1)
        assert row["title"] in printed
        manifest = read_manifest(tmp_path / row["folder"])
        assert manifest["complete"]
        assert len(manifest["images"]) == 10 * row["ipc"]
    with Image.open(tmp_path / "contact-sheet.png") as picture:
        assert picture.width > 1000
        assert np.asarray(picture.convert("L")).std() > 30

    before = {path: checksum(path) for path in tmp_path.rglob("*.p*") if path.suffix in (".png", ".pt")}
    assert run([*ARGUMENTS, "--output", str(tmp_path)]) == 0
    assert {path: checksum(path) for path in before} == before
    again = json.loads((tmp_path / "report.json").read_text())
    assert [row["accuracies"] for row in again["sets"]] == [row["accuracies"] for row in report["sets"]]


def test_mosaic_lays_images_out_in_rows() -> None:
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 2, 2) / 10
    sheet = mosaic(images, 3)
    assert sheet.shape == (2 * 2 + 2, 3 * 2 + 4, 3)
    assert sheet[0, ::4, 0].tolist() == pytest.approx([0, 0.1, 0.2])
    assert sheet[4, ::4, 0].tolist() == pytest.approx([0.3, 0.4, 0.5])
    assert sheet[2:4].unique().tolist() == [1.0]


def test_contact_sheet_takes_colour(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", {"one": torch.rand(4, 3, 8, 8), "two": torch.rand(4, 3, 8, 8)}, ["cat", "dog"])
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG"

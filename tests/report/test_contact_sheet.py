"""Contact sheets: colour, and names of any kind."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image

from dwa_fast.report.contact_sheet import write_contact_sheet


def test_contact_sheet_takes_colour(tmp_path: Path) -> None:
    one, two = torch.randint(256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    write_contact_sheet(tmp_path / "sheet.png", {"one": one, "two": two}, ["cat", "dog"])
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG"


def test_contact_sheet_of_hostile_names(tmp_path: Path) -> None:
    names = ["$\\frac{$", "two\nlines", "x" * 5000, "漢字", os.fsdecode(b"\xff"), "\x1b[31m"]
    write_contact_sheet(tmp_path / "sheet.png", {"$\\bad{$": torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8)}, names)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width < 2000

"""The Markdown: the same as the page, and hostile text is text."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from dwa_fast.report.page import write_report
from tests.report.material import EVIL, spoil


def test_everything_is_there(runs: Path, tmp_path: Path) -> None:
    write_report([runs], tmp_path / "my page.html", "Tables")
    text = (tmp_path / "my page.md").read_text()
    for line in (
        *("# Tables", r"- [λ\_var alone](#run-1)", '<a id="run-1"></a>', r"## λ\_var alone", "Best in the middle."),
        *(r"| λ\_var | top-1 % |", "|---|---:|", "| 0.11 | 39.6 ± 0.4 |", "Three seeds.", "dwa-fast ablate lambda-var --recipe digits"),
        *("| iterations | 500 |", "| deep · er | – |", "## dwa, digits, 8 px, ipc 2"),
        "All 2 images of each of all 3 classes, a row per class. Rows: class 0, class 1, class 2.",
    ):
        assert line in text.splitlines(), line
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 6
    for target in pictures:
        with Image.open(tmp_path / target.replace("%20", " ")) as image:
            image.load()


def test_tables_are_whole(runs: Path, tmp_path: Path) -> None:
    spoil(runs / "c")
    write_report([runs], tmp_path / "page.html", "t")
    blocks = re.findall(r"(?:^\|.*\n)+", (tmp_path / "page.md").read_text(), flags=re.MULTILINE)
    assert len(blocks) > 6
    for block in blocks:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block


def test_hostile_text_is_text(tmp_path: Path) -> None:
    spoil(tmp_path / "runs")
    write_report([tmp_path / "runs"], tmp_path / "page.html", EVIL)
    text = (tmp_path / "page.md").read_text()
    prose = re.sub(r"^```+sh\n.*\n```+$", "", text, flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)<(?!!--|/?details|/?summary|/?a\b)", prose)
    assert "<script" not in prose.replace(r"\<", "")
    assert not re.search(r"(?<!\\)\]\(http", prose)
    assert r"\<script\>" in prose

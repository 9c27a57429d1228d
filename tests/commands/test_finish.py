"""The end of every command: a record, its figures, and the tables on the screen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dwa_fast.commands.console import Console
from dwa_fast.commands.finish import finish
from dwa_fast.report.records import RECORD, Chart, HeatMap, Picture, Record, Scatter, Series, Table, read_record

FOUND = Record(
    kind="ablation",
    environment={"torch": "2"},
    title="λ_var",
    summary="Best in the middle.",
    tables=[Table(title="students", columns=["set", "top-1 %"], rows=[["[red]DWA", "39.6"]], note="Three seeds.")],
    charts=[Chart(title=name, x_label="x", y_label="y", x=[1, 2], series=[Series(name="a", values=[1.0, 2.0])]) for name in "ab"],
    heat_maps=[HeatMap(title="h", x_label="K", y_label="ρ", value_label="%", x=[1], y=[0.1], values=[[1.0]])],
    scatters=[Scatter(title="s", groups={"real": [(0.0, 1.0)]})],
    pictures=[Picture(title="sheet", file="sheet.png")],
)


def test_everything_is_written_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(Console(), tmp_path, FOUND)
    drawn = ["chart-1.png", "chart-2.png", "heat-map-1.png", "scatter-1.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([RECORD, *drawn])
    assert (tmp_path / "chart-1.png").read_bytes() != (tmp_path / "chart-2.png").read_bytes()
    again = read_record(tmp_path / RECORD)
    assert again.title == "λ_var"
    assert 20 < again.environment["peak memory, MiB"] < 10**6
    assert again.environment["torch"] == "2"
    said = capsys.readouterr().out
    for text in ("students", "[red]DWA", "39.6", "Three seeds.", "Best in the middle.", f"{tmp_path} holds {RECORD}, chart-1.png, "):
        assert text in said
    assert said.rstrip().endswith("scatter-1.png, sheet.png")


def test_figures_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    """And nothing else of the folder."""
    own = [tmp_path / "chart-a.png", tmp_path / "my-chart-2.png"]
    for path in own:
        path.touch()
    finish(Console(), tmp_path, FOUND)
    finish(Console(), tmp_path, replace(FOUND, charts=FOUND.charts[:1], scatters=[]))
    figures = [path.name for path in tmp_path.glob("*.png") if path not in own]
    assert sorted(figures) == ["chart-1.png", "heat-map-1.png"]
    assert all(path.exists() for path in own)

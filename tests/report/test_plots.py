"""Figures: what they show, the same bytes every time, and wrong numbers in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from dwa_fast import InputError
from dwa_fast.report.plots import Figure, as_png, draw
from dwa_fast.report.records import Chart, HeatMap, Scatter, Series

CURVES = Chart(
    title="λ_var $alone$ & <both>",
    x_label="λ_var",
    y_label="top-1 %",
    x=[0.01, 0.11, 0.23],
    series=[Series(name="_alone", values=[1.0, 3.0, None], spreads=[0.5, None, None]), Series(name="both", values=[1.0, 2.0, 1.5])],
)
BARS = replace(CURVES, x=["SRe2L", "DWA", "real"])
GRID = HeatMap(title="K × ρ", x_label="K", y_label="ρ", value_label="%", x=[1, 12], y=[0.005, 0.015], values=[[30.0, None], [31.25, 39.6]])
POINTS = Scatter(title="t-SNE", groups={"real": [(0, 0), (1, 2)], "DWA": [(3.5, 1)], "none": []}, note="of logits")
COLOURS = ("#1f77b4", "#ff7f0e")  # the first two of matplotlib
ALL = {"curves": CURVES, "bars": BARS, "heat map": GRID, "scatter": POINTS}


@pytest.mark.parametrize("figure", ALL.values(), ids=ALL.keys())
def test_same_figure_same_bytes(tmp_path: Path, figure: Figure) -> None:
    draw(figure, tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9}):  # a user's own style
        draw(figure, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_settings_of_matplotlib_stay_as_they_were(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    draw(CURVES, tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def labels(figure: Figure, monkeypatch: pytest.MonkeyPatch, *, titled: bool = True) -> set[str]:
    """Every text that is drawn."""
    found: set[str] = set()
    draw_text = Text.draw

    def record(text: Text, renderer: Any) -> None:
        found.add(text.get_text())
        draw_text(text, renderer)

    monkeypatch.setattr(Text, "draw", record)
    as_png(figure, titled=titled)
    return found


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        (CURVES, ["λ_var", "top-1 %", " _alone", " both", "λ_var $alone$ & <both>"]),
        (BARS, ["SRe2L", "DWA", "real", " _alone", " both"]),
        (GRID, ["K", "ρ", "%", "1", "12", "0.005", "0.015", "30", "31.25", "39.6", "–", "K × ρ"]),
        (POINTS, ["t-SNE", " real", " DWA", "of logits"]),
        (
            replace(CURVES, title="a\x00b\x1b[31m" + "c" * 200),
            [r"a\x00b\x1b[31m" + "c" * 42 + "\n" + "c" * 56 + "\n" + "c" * 56 + "\n" + "c" * 46],
        ),
    ],
)
def test_names_and_numbers_are_there(monkeypatch: pytest.MonkeyPatch, figure: Figure, shown: list[str]) -> None:
    found = labels(figure, monkeypatch)
    assert set(shown) <= found, found


def test_numbers_of_a_logarithmic_axis_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some within a power of ten too, and no formulas, since text is shown as it is."""
    times = Chart(title="t", x_label="seconds", y_label="y", x=[0.03, 0.8, 2.6], series=[Series(name="DWA", values=[1, 2, 3])], log_x=True)
    found = labels(times, monkeypatch)
    assert {"0.05", "0.1", "0.2", "0.5", "1", "2"} <= found
    assert not [text for text in found if "$" in text]
    assert {"0.08", "0.1", "0.12", "0.14", "0.16"} <= labels(replace(times, x=[0.07, 0.09, 0.165]), monkeypatch)  # a narrow range


def test_axis_of_counts_has_no_fractions(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Chart(title="t", x_label="classes seen", y_label="y", x=[2, 3], series=[Series(name="DWA", values=[50, 100])])
    assert {"2", "3"} <= labels(counts, monkeypatch)
    assert not {"2.0", "2.2", "2.4", "2.6", "2.8", "3.0"} & labels(counts, monkeypatch)
    assert "2.2" in labels(replace(counts, x=[2.0, 3.0]), monkeypatch)


def test_title_can_be_left_to_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "K × ρ" not in labels(GRID, monkeypatch, titled=False)
    assert "of logits" not in labels(POINTS, monkeypatch, titled=False)


def drawn(figure: Figure, folder: Path) -> list[int]:
    """How many pixels have each of the first two colours."""
    draw(figure, folder / "a.png")
    with Image.open(folder / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0] == 255).all()
    return [int((pixels == [int(colour[place : place + 2], 16) for place in (1, 3, 5)]).all(-1).sum()) for colour in COLOURS]


def test_a_taller_bar_has_more_pixels(tmp_path: Path) -> None:
    series = [Series(name="low", values=[1.0]), Series(name="high", values=[3.0])]
    low, high = drawn(Chart(title="t", x_label="x", y_label="y", x=["a"], series=series), tmp_path)
    assert 2.5 < high / low < 3.5


@pytest.mark.parametrize("spreads", [[], [0.1, 0.1, 0.1]])
@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("x", [[1, 2, 3], [0, 0.1, 10]])
def test_curves_are_in_the_picture(tmp_path: Path, spreads: list[float], log_x: bool, x: list[float]) -> None:
    """A flat and a crooked curve: both cross the picture, the crooked one on a longer way."""
    series = [Series(name="a", values=[1, 1, 1], spreads=spreads), Series(name="b", values=[1, 9, 2], spreads=spreads)]
    flat, crooked = drawn(Chart(title="t", x_label="x", y_label="y", x=x, series=series, log_x=log_x), tmp_path)
    assert flat > 1000
    assert crooked > 1.1 * flat


def test_a_level_is_a_broken_line_across_without_markers(tmp_path: Path) -> None:
    curve = Series(name="a", values=[1, 1, 1], spreads=[0.5, 0.5, 0.5])
    chart = Chart(title="t", x_label="x", y_label="y", x=[1, 2, 3], series=[curve, Series(name="b", values=[0, 2, 4])])
    solid, _ = drawn(chart, tmp_path)
    level, other = drawn(replace(chart, series=[replace(curve, level=True), chart.series[1]]), tmp_path)
    assert 0.2 * solid < level < 0.9 * solid
    assert other > 1000


WRONG: dict[str, tuple[Any, str]] = {
    "no series": (replace(CURVES, series=[]), "has nothing to show"),
    "no places": (replace(CURVES, x=[]), "has nothing to show"),
    "short": (replace(CURVES, x=[1, 2]), "needs 2 values in '_alone', got"),
    "words": (replace(CURVES, series=[Series(name="a", values=["1", 2, 3])]), "needs finite numbers in 'a', got '1'"),  # type: ignore[list-item]
    "infinite": (replace(CURVES, series=[Series(name="a", values=[1, 2, float("inf")])]), "needs finite numbers in 'a', got inf"),
    "spread": (replace(CURVES, series=[Series(name="a", values=[1, 2, 3], spreads=[1, -1, 0])]), "has a standard deviation below 0"),
    "huge": (replace(CURVES, series=[Series(name="a", values=[1, 2, 10**400])]), "needs finite numbers in 'a', got 1000"),
    "no list": (replace(CURVES, series=[Series(name="a", values=7)]), "needs a list of values in 'a', got 7"),  # type: ignore[arg-type]
    "no groups": (Scatter(title="t", groups=[]), "needs points by group, got"),  # type: ignore[arg-type]
    "no rows": (replace(GRID, values="ab"), "needs a list of values in 'values', got 'ab'"),  # type: ignore[arg-type]
    "rows": (replace(GRID, values=[[1.0, 2.0]]), "needs a row for each of its 2 places, got 1"),
    "columns": (replace(GRID, values=[[1.0], [2.0]]), "needs 2 values in 'row 0', got"),
    "empty map": (replace(GRID, values=[[None, None], [None, None]]), "has nothing to show"),
    "no points": (Scatter(title="t", groups={"a": []}), "has nothing to show"),
    "space": (Scatter(title="t", groups={"a": [(1, 2, 3)]}), "needs 2 values in 'a', got"),  # type: ignore[list-item]
}


@pytest.mark.parametrize(("figure", "message"), WRONG.values(), ids=WRONG.keys())
def test_numbers_that_do_not_fit_are_one_sentence(tmp_path: Path, figure: Figure, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error:
        draw(figure, tmp_path / "a.png")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())

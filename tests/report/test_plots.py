"""Figures: what they show, the same bytes every time, and wrong numbers in one sentence."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from dwa_fast import InputError
from dwa_fast.report.plots import COLOURS, Figure, as_svg, draw
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
ALL = {"curves": CURVES, "bars": BARS, "heat map": GRID, "scatter": POINTS}


def words(svg: str) -> list[str]:
    """Every text of an SVG."""
    return [text for each in ElementTree.fromstring(svg).iter() if each.tag.endswith("text") and (text := "".join(each.itertext()))]


@pytest.mark.parametrize("figure", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_same_figure_same_bytes(tmp_path: Path, figure: Figure, suffix: str) -> None:
    draw(figure, tmp_path / f"a.{suffix}")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9}):  # a person's own style
        draw(figure, tmp_path / f"b.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{suffix}", f"b.{suffix}"]


def test_settings_of_matplotlib_stay_as_they_were(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    draw(CURVES, tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        (CURVES, ["λ_var", "top-1 %", " _alone", " both", "0.01", "0.11", "0.23", "λ_var $alone$ & <both>"]),
        (BARS, ["SRe2L", "DWA", "real", " _alone", " both"]),
        (GRID, ["K", "ρ", "%", "1", "12", "0.005", "0.015", "30.0", "31.2", "39.6", "–", "K × ρ"]),
        (POINTS, ["t-SNE", " real", " DWA", "of logits"]),
        (replace(CURVES, log_x=True), ["0.01", "0.11", "0.23"]),
        (replace(CURVES, x=[0, 0.01, 0.1], log_x=True), ["0", "0.01", "0.1"]),
        (replace(CURVES, title="a\x00b\x1b[31m" + "c" * 200), [r"a\x00b\x1b[31m" + "c" * 42]),
    ],
)
def test_names_and_numbers_are_there(figure: Figure, shown: list[str]) -> None:
    found = words(as_svg(figure, titled=True))
    assert set(shown) <= set(found), found


def test_title_can_be_left_to_the_page() -> None:
    assert "K × ρ" not in words(as_svg(GRID, titled=False))
    assert "of logits" not in words(as_svg(POINTS, titled=False))


@pytest.mark.parametrize("figure", ALL.values(), ids=ALL.keys())
def test_element_takes_the_colour_of_its_page(figure: Figure) -> None:
    svg = as_svg(figure, titled=True)
    assert svg.startswith("<svg ")
    assert svg.endswith("</svg>")
    assert "currentColor" in svg
    assert "#1b1c1d" not in svg
    assert set(re.findall(r'http[^"]*', svg)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not links
    assert '="axes_1"' not in svg


def test_file_says_its_colours_for_light_and_dark(tmp_path: Path) -> None:
    draw(CURVES, tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")
    assert "@media(prefers-color-scheme:dark)" in (tmp_path / "a.svg").read_text()


def test_identifiers_of_different_figures_differ() -> None:
    def names(figure: Figure) -> set[str]:
        return {each.get("id", "") for each in ElementTree.fromstring(as_svg(figure, titled=True)).iter()} - {""}

    assert names(CURVES)
    assert not names(CURVES) & names(replace(CURVES, y_label="another"))


def drawn(figure: Figure, folder: Path) -> list[int]:
    """How many pixels have each of the first two colours."""
    draw(figure, folder / "a.png")
    with Image.open(folder / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0] == 255).all()
    return [int((pixels == [int(colour[place : place + 2], 16) for place in (1, 3, 5)]).all(-1).sum()) for colour in COLOURS[:2]]


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


def test_many_points_become_pixels() -> None:
    many = Scatter(title="t", groups={"a": [(number % 71, number % 113) for number in range(4000)]})
    assert len(as_svg(many, titled=True)) < 200_000


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_seen_on_white_and_on_black(colour: str) -> None:
    """WCAG's contrast of graphics: 3 : 1."""
    channels = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    assert 1.05 / (luminance + 0.05) >= 3
    assert (luminance + 0.05) / (0.0095 + 0.05) >= 3  # 0.0095: the dark page


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


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"written as \.png or \.svg, got 'a\.pdf'"):
        draw(CURVES, tmp_path / "a.pdf")

"""Figures of records as PNG and SVG: curves with error bars, bars, heat maps and scatters."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dwa_fast.errors import InputError, escape_control_chars
from dwa_fast.io.files import atomic_write
from dwa_fast.report.records import Chart, HeatMap, Scatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Each is seen on white and on near black (contrast of 3 or more) and told from its neighbours by colour-blind eyes; markers differ too.
COLOURS = ("#3b78b4", "#d96c1e", "#1f9d6b", "#c8174a", "#6a5ae0", "#a6860f", "#858585")
_MARKERS = "osD^vPX*"
_HATCHES = ("", "////", "....", "xxxx")  # one per round of colours
_INK = "#1b1c1d"  # of everything that is no data
_INK_IN_SVG = re.compile(rf"(fill|stroke): {_INK}")
_LIGHT_AND_DARK = "<style>svg{color:#1b1c1d}@media(prefers-color-scheme:dark){svg{color:#e4e6e9}}</style>"
_WIDTH, _HEIGHT = 4.8, 3.4  # inches: text of 9 points stays readable where the figure is as wide as a phone
_WIDEST = 40.0  # inches, however much there is to show
_GREATEST = 1e100  # beyond, the axes overflow
_APART = 3.0  # points between the error bars of neighbouring curves
_DPI = 160
_TITLE_CHARACTERS = 56  # in a line
_LEGEND_CHARACTERS = 62  # in a line
_TICKS_APART = 0.075  # least distance of ticks at the measured places, as a share of the axis
_BAKED_POINTS = 3000  # a scatter of more is pixels in an SVG too, which would be megabytes otherwise
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color", "hatch.color")
_SETTINGS: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "svg.fonttype": "none", "hatch.linewidth": 0.6}
_SETTINGS |= dict.fromkeys(_INKED, _INK)

Figure = Chart | HeatMap | Scatter
_Values = NDArray[np.float64]  # NaN: not measured


def draw(figure: Figure, path: Path) -> None:
    """Write a figure; the same one gives the same bytes.

    Args:
        path: its suffix says what is written: .png (on white) or .svg (without a background, its text as light or dark as the reader asks).
    Raises:
        InputError: another suffix, numbers that do not fit together, or a path that cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"figures are written as .png or .svg, got {path.name!r}")
    if path.suffix == ".png":
        content = as_png(figure)
    else:
        inner = as_svg(figure, titled=True)
        start = inner.index(">") + 1
        content = (inner[:start] + _LIGHT_AND_DARK + inner[start:]).encode()
    with atomic_write(path) as target:
        target.write_bytes(content)


def as_png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file, on white.

    Raises:
        InputError: numbers that do not fit together.
    """
    return _rendered(figure, "png", titled=True)


def as_svg(figure: Figure, *, titled: bool, salt: str = "") -> str:
    """A figure as an <svg> element to stand in a page, whose text colour it takes.

    Args:
        titled: with title and note; the page may show them itself.
        salt: makes its identifiers differ from those of the same figure elsewhere on the page.
    Raises:
        InputError: numbers that do not fit together.
    """
    text = _rendered(figure, "svg", titled=titled, salt=salt).decode()
    text = re.sub(r'(?<=<g) id="[^"]*"', "", text[text.index("<svg") :])  # names of groups, which another figure of the page has too
    return _INK_IN_SVG.sub(r"\1: currentColor", text).strip()


def _rendered(figure: Figure, form: str, *, titled: bool, salt: str = "") -> bytes:
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    buffer = io.BytesIO()
    salt = hashlib.sha256(json.dumps([salt, asdict(figure)], default=str).encode()).hexdigest()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it draws a box instead, which is enough for a label
        matplotlib.rcdefaults()  # what a person's matplotlibrc says must not change the bytes
        matplotlib.rcParams.update({**_SETTINGS, "svg.hashsalt": salt})
        canvas = Canvas(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        if isinstance(figure, Chart):
            axis = _chart(canvas, figure)
        elif isinstance(figure, HeatMap):
            axis = _heat_map(canvas, figure)
        else:
            axis = _scatter(canvas, figure, note=titled)
        if titled:
            axis.set_title(textwrap.fill(escape_control_chars(str(figure.title)), _TITLE_CHARACTERS), parse_math=False)
        facts = {"Software": None} if form == "png" else dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(buffer, format=form, dpi=_DPI, transparent=form == "svg", metadata=facts)
    return buffer.getvalue()


def _chart(canvas: Canvas, chart: Chart) -> Axes:
    """Curves over numbers, bars over names."""
    _check_list(chart, "x", chart.x)
    if not chart.x or not chart.series:
        raise InputError(f"chart {chart.title!r} has nothing to show")
    values = [_numbers(chart, each.name, each.values, len(chart.x)) for each in chart.series]
    spreads = [_numbers(chart, each.name, each.spreads, len(chart.x)) if each.spreads else None for each in chart.series]
    if any((each < 0).any() for each in spreads if each is not None):
        raise InputError(f"chart {chart.title!r} has a standard deviation below 0")
    axis = canvas.add_subplot()
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    numbers = all(map(_is_number, chart.x))
    handles = _curves(canvas, axis, chart, values, spreads) if numbers else _bars(canvas, axis, chart, values, spreads)
    axis.set_xlabel(escape_control_chars(str(chart.x_label)), parse_math=False)
    axis.set_ylabel(escape_control_chars(str(chart.y_label)), parse_math=False)
    if len(chart.series) > 1:
        _legend(canvas, handles, [each.name for each in chart.series])
    return axis


def _curves(canvas: Canvas, axis: Axes, chart: Chart, values: list[_Values], spreads: list[_Values | None]) -> list[Any]:
    """Draws them; gives the handles for the legend, as `_bars` does."""
    x = np.array(_numbers(chart, "x", chart.x, len(chart.x)))
    order = np.argsort(x, kind="stable")
    handles = [
        axis.errorbar(
            x[order],
            heights[order],
            None if errors is None else errors[order],
            color=COLOURS[number % len(COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
            markersize=5,
            capsize=3,
            linewidth=1.5,
        )
        for number, (heights, errors) in enumerate(zip(values, spreads, strict=True))
    ]
    places = x
    if chart.log_x and (x > 0).any():
        smallest = x[x > 0].min()
        if (x > 0).all():
            axis.set_xscale("log")
        else:  # such as ρ = 0: near 0 the axis is linear
            axis.set_xscale("symlog", linthresh=smallest)
        places = np.log(np.where(x > 0, x, smallest / math.e))
    if (np.diff(np.unique(places)) >= _TICKS_APART * np.ptp(places)).all():
        axis.set_xticks(x[order], [f"{each:g}" for each in x[order]], parse_math=False)
        axis.set_xticks([], minor=True)
    if any(each is not None for each in spreads):
        _set_apart(canvas, axis, handles)
    return handles


def _set_apart(canvas: Canvas, axis: Axes, handles: Sequence[Any]) -> None:
    """Move the curves a little sideways, so that their error bars do not lie on each other."""
    from matplotlib.transforms import ScaledTranslation

    axis.autoscale_view()
    axis.autoscale(enable=False)  # the limits stay those of the numbers
    for number, handle in enumerate(handles):
        points = _APART * (number - (len(handles) - 1) / 2)
        for artist in handle.get_children():
            artist.set_transform(axis.transData + ScaledTranslation(points / 72, 0, canvas.dpi_scale_trans))


def _bars(canvas: Canvas, axis: Axes, chart: Chart, values: list[_Values], spreads: list[_Values | None]) -> list[Any]:
    width = 0.8 / len(values)
    places = np.arange(len(chart.x))
    handles = [
        axis.bar(
            places + (number - (len(values) - 1) / 2) * width,
            heights,
            0.94 * width,
            yerr=errors,
            capsize=2.5,
            ecolor=_INK,
            color=COLOURS[number % len(COLOURS)],
            hatch=_HATCHES[number // len(COLOURS) % len(_HATCHES)],
        )
        for number, (heights, errors) in enumerate(zip(values, spreads, strict=True))
    ]
    inches = min(_WIDEST, max(_WIDTH, 0.8 + 0.16 * len(values) * len(chart.x)))
    canvas.set_size_inches(inches, _HEIGHT)
    labels = [escape_control_chars(str(each)) for each in chart.x]
    slanted = max(map(len, labels)) * len(labels) > 11 * inches
    turn: Any = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axis.set_xticks(places, labels, parse_math=False, **turn)
    axis.tick_params(axis="x", length=0)
    return handles


def _heat_map(canvas: Canvas, figure: HeatMap) -> Axes:
    for name in ("x", "y", "values"):
        _check_list(figure, name, getattr(figure, name))
    if len(figure.values) != len(figure.y):
        raise InputError(f"heat map {figure.title!r} needs a row for each of its {len(figure.y)} places, got {len(figure.values)}")
    rows = [_numbers(figure, f"row {number}", row, len(figure.x)) for number, row in enumerate(figure.values)]
    values = np.ma.masked_invalid(rows)
    if not values.count():
        raise InputError(f"heat map {figure.title!r} has nothing to show")
    width, height = max(_WIDTH, 1.6 + 0.5 * len(figure.x)), max(2.4, 1.2 + 0.36 * len(figure.y))
    canvas.set_size_inches(min(_WIDEST, width), min(_WIDEST, height))
    axis = canvas.add_subplot()
    mesh = axis.pcolormesh(values, cmap="viridis")
    decimals = _decimals(values.compressed())
    for place, value in np.ndenumerate(values.filled(np.nan)):
        seen = np.isfinite(value)
        red, green, blue, _ = mesh.to_rgba(value) if seen else (0.0, 0.0, 0.0, 0.0)
        colour = ("black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white") if seen else _INK
        axis.text(place[1] + 0.5, place[0] + 0.5, f"{value:.{decimals}f}" if seen else "–", ha="center", va="center", color=colour)
    axis.set_xticks(np.arange(len(figure.x)) + 0.5, list(map(_name, figure.x)), parse_math=False)
    axis.set_yticks(np.arange(len(figure.y)) + 0.5, list(map(_name, figure.y)), parse_math=False)
    if not all(map(_is_number, figure.y)):
        axis.invert_yaxis()  # names read downwards, numbers grow upwards
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(escape_control_chars(str(figure.x_label)), parse_math=False)
    axis.set_ylabel(escape_control_chars(str(figure.y_label)), parse_math=False)
    bar = canvas.colorbar(mesh, ax=axis)
    bar.set_label(escape_control_chars(str(figure.value_label)), parse_math=False)
    bar.outline.set_visible(False)
    return axis


def _scatter(canvas: Canvas, figure: Scatter, *, note: bool) -> Axes:
    if not isinstance(figure.groups, Mapping):
        raise InputError(f"scatter {figure.title!r} needs points by group, got {figure.groups!r}")
    for name, points in figure.groups.items():
        _check_list(figure, name, points)
    if not any(map(len, figure.groups.values())):
        raise InputError(f"scatter {figure.title!r} has nothing to show")
    canvas.set_size_inches(_WIDTH, _WIDTH)
    axis = canvas.add_subplot()
    many = sum(map(len, figure.groups.values())) > _BAKED_POINTS
    handles = []
    for (name, points), colour, marker in zip(figure.groups.items(), cycle(COLOURS), cycle(_MARKERS)):
        pairs = [_numbers(figure, name, point, 2) for point in points]
        x, y = np.array(pairs).reshape(-1, 2).T
        handles.append(axis.scatter(x, y, s=9 if many else 16, color=colour, marker=marker, alpha=0.85, linewidths=0, rasterized=many))
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_alpha(0.3)
    if note and figure.note:
        axis.set_xlabel(textwrap.fill(escape_control_chars(str(figure.note)), _TITLE_CHARACTERS), parse_math=False)
    _legend(canvas, handles, list(figure.groups))
    return axis


def _legend(canvas: Canvas, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Below the axes, in as many columns as the names leave room for."""
    labels = [f" {escape_control_chars(str(name))}" for name in names]  # matplotlib hides what begins with an underscore
    columns = max(1, min(len(labels), _LEGEND_CHARACTERS // (max(map(len, labels)) + 6)))
    legend = canvas.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handletextpad=0.4)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _numbers(figure: Figure, name: str, values: Sequence[Any], count: int) -> _Values:
    """Values as an array; NaN where there is None."""
    _check_list(figure, name, values)
    if len(values) != count:
        raise InputError(f"{figure.title!r} needs {count} values in {name!r}, got {values!r}")
    for value in values:
        if value is not None and not (_is_number(value) and abs(value) <= _GREATEST):
            raise InputError(f"{figure.title!r} needs finite numbers in {name!r}, got {value!r}")
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _check_list(figure: Figure, name: str, values: Any) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(f"{figure.title!r} needs a list of values in {name!r}, got {values!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _name(place: Any) -> str:
    """A number or a name as a label."""
    return f"{place:g}" if _is_number(place) else escape_control_chars(str(place))


def _decimals(values: _Values) -> int:
    """Digits behind the point so that the largest value has three in all."""
    largest = float(np.abs(values).max())
    return min(4, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 0

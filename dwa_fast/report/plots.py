"""Figures of records as PNG: curves with error bars, bars, heat maps and scatter plots."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
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

Figure = Chart | HeatMap | Scatter

_MARKERS = "osD^vPX*"
_WIDTH, _HEIGHT, _WIDEST = 4.8, 3.4, 40.0  # inches
_LOG_TICKS = (1, 2, 5)  # labelled in every power of ten
_NARROW = 5  # times the smallest number of a logarithmic axis: up to it the numbers of a linear one are labelled
_GREATEST = 1e100  # beyond, the axes overflow
_TITLE_CHARACTERS, _LEGEND_CHARACTERS = 56, 62  # in a line
_SETTINGS: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
_SETTINGS |= {"text.parse_math": False, "errorbar.capsize": 3}


def draw(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG with its title; the same figure gives the same bytes.

    Raises:
        InputError: lengths or values do not fit together, or the path cannot be written.
    """
    content = as_png(figure)
    with atomic_write(path) as target:
        target.write_bytes(content)


def as_png(figure: Figure, *, titled: bool = True) -> bytes:
    """A figure as the content of a PNG file, with its title and note or without them.

    Raises:
        InputError: lengths or values do not fit together.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    buffer = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # matplotlib draws a box, which is enough for a label
        matplotlib.rcdefaults()  # the bytes must not depend on the user's matplotlibrc
        matplotlib.rcParams.update(_SETTINGS)
        canvas = Canvas(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axis = canvas.add_subplot()
        if isinstance(figure, Chart):
            _chart(canvas, axis, figure)
        elif isinstance(figure, HeatMap):
            _heat_map(canvas, axis, figure)
        else:
            _scatter(canvas, axis, figure)
            axis.set_xlabel(textwrap.fill(_text(figure.note), _TITLE_CHARACTERS) if titled else "")
        if titled:
            axis.set_title(textwrap.fill(_text(figure.title), _TITLE_CHARACTERS))
        canvas.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _chart(canvas: Canvas, axis: Axes, chart: Chart) -> None:
    """Curves over numbers, bars over names."""
    _check_list(chart, "x", chart.x)
    if not chart.x or not chart.series:
        raise InputError(f"chart {chart.title!r} has nothing to show")
    values = [_numbers(chart, each.name, each.values, len(chart.x)) for each in chart.series]
    errors = [_numbers(chart, each.name, each.spreads, len(chart.x)) if each.spreads else None for each in chart.series]
    if any((each < 0).any() for each in errors if each is not None):
        raise InputError(f"chart {chart.title!r} has a standard deviation below 0")
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=0.2)
    handles: list[Any] = []
    if all(map(_is_number, chart.x)):
        x = _numbers(chart, "x", chart.x, len(chart.x))
        order = np.argsort(x, kind="stable")
        for series, heights, error, marker in zip(chart.series, values, errors, cycle(_MARKERS)):
            if series.level:
                colour = f"C{len(handles)}"
                handles.append(axis.axhline(heights[0], color=colour, linestyle="--"))
                if error is not None and error[0] > 0:
                    axis.axhspan(heights[0] - error[0], heights[0] + error[0], color=colour, alpha=0.12, linewidth=0)
                continue
            handles.append(
                axis.errorbar(x[order], heights[order], None if error is None else error[order], marker=marker, color=f"C{len(handles)}")
            )
        if chart.log_x and (x > 0).all():
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(
                LogLocator(subs=_LOG_TICKS) if x.max() > _NARROW * x.min() else MaxNLocator(6, steps=[1, 2, 5, 10])
            )
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # matplotlib's own would be a formula, which labels do not show
            axis.xaxis.set_minor_formatter(NullFormatter())
        elif all(isinstance(value, int) for value in chart.x):
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    else:
        places, width = np.arange(len(chart.x)), 0.8 / len(values)
        for number, (heights, error) in enumerate(zip(values, errors, strict=True)):
            handles.append(axis.bar(places + (number - (len(values) - 1) / 2) * width, heights, 0.94 * width, yerr=error))
        inches = min(_WIDEST, max(_WIDTH, 0.8 + 0.16 * len(values) * len(chart.x)))
        canvas.set_size_inches(inches, _HEIGHT)
        labels = list(map(_text, chart.x))
        slanted: Any = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(places, labels, **(slanted if max(map(len, labels)) * len(labels) > 11 * inches else {}))
    axis.set_xlabel(_text(chart.x_label))
    axis.set_ylabel(_text(chart.y_label))
    if len(chart.series) > 1:
        _legend(canvas, handles, [each.name for each in chart.series])


def _heat_map(canvas: Canvas, axis: Axes, figure: HeatMap) -> None:
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
    image = axis.imshow(values, cmap="viridis", aspect="auto", origin="lower" if all(map(_is_number, figure.y)) else "upper")
    bright = values.min() + 0.6 * (values.max() - values.min())
    for (row, column), value in np.ndenumerate(values.filled(np.nan)):
        colour = "white" if value < bright else "black"  # black on white where there is no value
        axis.text(column, row, "–" if math.isnan(value) else f"{value:.4g}", ha="center", va="center", color=colour)
    axis.set_xticks(range(len(figure.x)), [f"{each:g}" if _is_number(each) else _text(each) for each in figure.x])
    axis.set_yticks(range(len(figure.y)), [f"{each:g}" if _is_number(each) else _text(each) for each in figure.y])
    axis.set_xlabel(_text(figure.x_label))
    axis.set_ylabel(_text(figure.y_label))
    canvas.colorbar(image, ax=axis).set_label(_text(figure.value_label))


def _scatter(canvas: Canvas, axis: Axes, figure: Scatter) -> None:
    if not isinstance(figure.groups, Mapping):
        raise InputError(f"scatter {figure.title!r} needs points by group, got {figure.groups!r}")
    for name, points in figure.groups.items():
        _check_list(figure, name, points)
    if not any(map(len, figure.groups.values())):
        raise InputError(f"scatter {figure.title!r} has nothing to show")
    canvas.set_size_inches(_WIDTH, _WIDTH)
    handles = []
    for (name, points), marker in zip(figure.groups.items(), cycle(_MARKERS)):
        x, y = np.array([_numbers(figure, name, point, 2) for point in points]).reshape(-1, 2).T
        handles.append(axis.scatter(x, y, s=12, marker=marker, alpha=0.85, linewidths=0))
    axis.set_aspect("equal", adjustable="datalim")
    axis.set(xticks=[], yticks=[])
    _legend(canvas, handles, list(figure.groups))


def _legend(canvas: Canvas, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Below the axes, in as many columns as fit."""
    labels = [f" {_text(name)}" for name in names]  # matplotlib hides labels that begin with an underscore
    columns = max(1, min(len(labels), _LEGEND_CHARACTERS // (max(map(len, labels)) + 6)))
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _numbers(figure: Figure, name: str, values: Sequence[Any], count: int) -> NDArray[np.float64]:
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


def _text(value: Any) -> str:
    return escape_control_chars(str(value))

"""A cost curve: samples against what was varied, the two lines that are fitted to them, and both for a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from rich.table import Table

_PANEL_INCHES = 4.0
_COLUMNS = 4  # panels side by side
_DECADE = 10.0  # that every vertical axis spans at least, so that what is flat looks flat


@dataclass(frozen=True)
class Line:
    """y = offset + slope·x, with the standard errors of both."""

    offset: float
    slope: float
    offset_error: float
    slope_error: float


@dataclass(frozen=True)
class Curve:
    """What it costs, against one size, for some peers."""

    name: str
    varied: str  # name of the horizontal axis
    cost: str  # name and unit of the vertical axis
    expected: str  # exponent
    samples: dict[str, dict[int, list[float]]]  # peer → size → samples, of which there are at least one
    settings: dict[str, Any] = field(default_factory=dict)  # what was held fixed

    def points(self, peer: str) -> tuple[list[int], list[tuple[float, float, float]]]:
        """Sizes, and median, 10 % and 90 % quantile at each."""
        return list(self.samples[peer]), [harness.quantiles(taken) for taken in self.samples[peer].values()]

    def fits(self, peer: str) -> tuple[Line, Line] | None:
        """Two least squares through the medians; None where a median is not above 0 and so has no logarithm.

        The first is through the logarithms, so its slope is the exponent of a power law. The second is cost = offset + slope·size with
        relative residuals, so that the smallest point weighs as much as the largest.

        Raises:
            ValueError: there are fewer than three sizes.
        """
        sizes, quantiles = self.points(peer)
        x, y = np.array(sizes, dtype=float), np.array([median for median, _, _ in quantiles])
        return None if (y <= 0).any() else (_line(np.log(x), np.log(y), np.ones_like(x)), _line(x, y, 1 / y))

    def describe(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        lines = []
        for peer, taken in self.samples.items():
            sizes, quantiles = self.points(peer)
            fits = self.fits(peer)
            power, straight = (None, None) if fits is None else map(vars, fits)
            points = [
                {"size": size, "median": median, "low_10": low, "high_90": high, "samples": taken[size]}
                for size, (median, low, high) in zip(sizes, quantiles, strict=True)
            ]
            lines.append({"peer": peer, "power_law": power, "straight_line": straight, "points": points})
        named = {"name": self.name, "varied": self.varied, "cost": self.cost, "expected_exponent": self.expected}
        return {**named, "settings": self.settings, "lines": lines}


def _line(x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]) -> Line:
    """Minimises Σ (w·(offset + slope·x − y))²."""
    if len(x) < 3:
        raise ValueError(f"a line with its standard error needs at least 3 points, got {len(x)}")
    design, target = weights[:, None] * np.stack([np.ones_like(x), x], 1), weights * y
    inverse = np.linalg.inv(design.T @ design)
    offset, slope = inverse @ design.T @ target
    residuals = design @ (offset, slope) - target
    errors = np.sqrt(np.diag(inverse) * (residuals @ residuals) / (len(x) - 2))
    return Line(float(offset), float(slope), float(errors[0]), float(errors[1]))


def table(curves: Sequence[Curve], title: str) -> Table:
    """A row per curve and peer."""
    caption = "\n".join(f"{curve.name}: {curve.cost} against n = {curve.varied}" for curve in curves)
    result = Table(title=title, caption=caption, caption_justify="left")
    for column in ("curve", "peer", "n", "smallest [10 … 90 %]", "largest [10 … 90 %]", "exponent", "expected", "a of a + b·n", "b"):
        result.add_column(
            column, justify="left" if column in ("curve", "peer") else "right", no_wrap=column in ("curve", "peer", "exponent")
        )
    for curve in curves:
        for peer in curve.samples:
            sizes, quantiles = curve.points(peer)
            fits = curve.fits(peer)
            result.add_row(
                curve.name,
                peer,
                f"{sizes[0]} … {sizes[-1]}",
                *(f"{median:.3g} [{low:.3g} … {high:.3g}]" for median, low, high in (quantiles[0], quantiles[-1])),
                f"{fits[0].slope:.3f} ± {fits[0].slope_error:.3f}" if fits else "–",
                curve.expected,
                f"{fits[1].offset:.2g} ± {fits[1].offset_error:.1g}" if fits else "–",
                f"{fits[1].slope:.3g} ± {fits[1].slope_error:.1g}" if fits else "–",
            )
    return result


def plot(curves: Sequence[Curve], title: str, path: Path) -> None:
    """One PNG with a panel per curve: medians with their 10 … 90 %, and the power law that is fitted to them."""
    columns = min(_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(_PANEL_INCHES * columns, _PANEL_INCHES * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    peers = dict.fromkeys(peer for curve in curves for peer in curve.samples)
    colours = {peer: f"C{number}" for number, peer in enumerate(peers)}
    for axis, curve in zip(axes, curves, strict=False):
        _panel(axis, curve, colours)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def _panel(axis: Axes, curve: Curve, colours: Mapping[str, str]) -> None:
    """One curve on two logarithmic axes."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    for peer in curve.samples:
        sizes, quantiles = curve.points(peer)
        medians, lows, highs = (np.array(values) for values in zip(*quantiles, strict=True))
        fits = curve.fits(peer)
        label = f"{peer}: exponent {fits[0].slope:.2f} ± {fits[0].slope_error:.2f}" if fits else peer
        errors = [medians - lows, highs - medians]
        axis.errorbar(sizes, medians, errors, fmt="o", markersize=4, capsize=3, color=colours[peer], label=label)
        if fits:
            ends = np.array([sizes[0], sizes[-1]], dtype=float)
            axis.plot(ends, np.exp(fits[0].offset) * ends ** fits[0].slope, "--", linewidth=1, color=colours[peer])
    low, high = axis.get_ylim()
    wider = max(1.0, (_DECADE * low / high) ** 0.5)
    axis.set_ylim(low / wider, high * wider)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    ticks = sorted({size for taken in curve.samples.values() for size in taken})
    axis.set_xticks(ticks, [str(size) for size in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(curve.varied)
    axis.set_ylabel(curve.cost)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small")

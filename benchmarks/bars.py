"""The plot of throughput.py's results: a panel per workload, a bar per peer and precision, and the floor of that precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tables import find, ratio

from dwa_fast.io.files import atomic_write

_COLOURS = {"fp32": "#4477aa", "tf32": "#228833", "bf16": "#ee8866", "fp16": "#aa3377"}  # told apart by colour-blind eyes too
_RIVAL = 0.45  # opacity of what is not ours
_PANEL_INCHES = 5.6
_BAR_INCHES = 0.27
_COLUMNS = 2


def plot(results: Sequence[dict[str, Any]], path: Path, title: str, source: str) -> None:
    """One PNG; `source` goes into its metadata, so that one can see whether the plot is that of the files at hand."""
    columns = min(_COLUMNS, len(results))
    rows = -(-len(results) // columns)
    tallest = max(len(result["rows"]) for result in results)
    figure = Figure(figsize=(_PANEL_INCHES * columns, (_BAR_INCHES * tallest + 0.9) * rows + 0.9), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, result in zip(axes, results, strict=False):
        _panel(axis, result)
    for axis in axes[len(results) :]:
        axis.set_axis_off()
    used = [each for each in _COLOURS if any(row["precision"] == each for result in results for row in result["rows"])]
    keys: list[Any] = [Patch(color=_COLOURS[each], label=each) for each in used]
    keys.append(Line2D([], [], color="black", linewidth=2, label="floor of that precision on this machine"))
    figure.suptitle(f"{title}\nmedian, 10 … 90 %, and × the published loop of the same run", fontsize="medium")
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    with atomic_write(path) as target:
        figure.savefig(target, format="png", dpi=120, metadata={"Source": source})


def _panel(axis: Axes, result: dict[str, Any]) -> None:
    """One workload: medians, their 10 … 90 %, and how many times the published loop's speed that is."""
    rows, published = result["rows"], find(result, "published")
    longest = max(row["milliseconds_90"] for row in rows)
    for place, row in enumerate(rows):
        median, low, high = (row[name] for name in ("milliseconds", "milliseconds_10", "milliseconds_90"))
        colour, floor = _COLOURS[row["precision"]], 1e3 * result["floors"][row["precision"]]["seconds"]
        axis.barh(place, median, height=0.72, color=colour, alpha=1 if row["peer"] == "fused" else _RIVAL)
        axis.errorbar(median, place, xerr=[[median - low], [high - median]], color="#555555", linewidth=1, capsize=2)
        axis.vlines(floor, place - 0.36, place + 0.36, color="black", linewidth=2)
        axis.text(high + 0.015 * longest, place, _says(row, published), va="center", fontsize="small")
    axis.set_yticks(range(len(rows)), [f"{row['peer']} {row['precision']}" for row in rows])
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["peer"] == "fused" else "normal")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * longest)
    axis.set_xlabel("milliseconds per iteration")
    axis.set_title(f"{result['workload']}, {result['size']} px, batch {result['batch']}", fontsize="medium")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _says(row: dict[str, Any], published: dict[str, Any] | None) -> str:
    if not row["matches"]:
        return "numbers do not match"
    times = ratio(row, published)
    return f"{row['milliseconds']:.3g} ms" + ("" if times is None or row is published else f", {times:.2f}×")

"""Markdown tables of throughput.py's results. Every ratio is one of two medians of the same run, and only between numbers that match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

NONE = "–"
Labelled = Sequence[tuple[str, dict[str, Any]]]  # what to say before a workload's name, and what throughput.py measured of it


def iterations(results: Labelled) -> list[str]:
    """A row per workload and precision of ours."""
    counted = any(row["kernels"] is not None for _, result in results for row in result["rows"])
    head = [
        "workload",
        "precision",
        "fused, ms per iteration (10 … 90 %)",
        "× published (fp32)",
        "× fastest other in this precision",
        "% of floor",
        "peak MiB, fused / published",
        *(["kernels, fused / published"] if counted else []),
    ]
    rows = []
    for label, result in results:
        published = find(result, "published")
        for row in _ours(result):
            both = [f"{_figure(row[name])} / {_figure(published and published[name])}" for name in ("peak_memory_mib", "kernels")]
            cells = [_time(row), _times(row, published), _against_rival(result, row), _percent(row), *both[: 1 + counted]]
            rows.append([label + subject(result), row["precision"], *cells])
    wrong = [
        f"{row['peer']} {row['precision']} on {result['workload']}" for _, result in results for row in result["rows"] if not row["matches"]
    ]
    note = ["", f"Errors above the allowed ones, so neither ratio nor rival: {', '.join(wrong)}."] if wrong else []
    return [*_table(head, rows), *note]


def around(results: Labelled) -> list[str]:
    """The same rows: what surrounds the iterations, and what a whole set takes."""
    head = ["workload", "precision", "ascent, ms", "whole batch, s", "set at ipc 10, h", "set at ipc 50, h"]
    rows, lengths = [], set()
    for label, result in results:
        for row in _ours(result):
            ascents = [_figure(_ascent(result, *key)) for key in ((row["peer"], row["precision"]), ("published", "fp32"))]
            batch, sets = result["whole_batch"], {each["ipc"]: each for each in result["whole_sets"]}
            cells = [NONE] * 3
            if batch and batch["precision"] == row["precision"]:
                cells = [f"{_pair(batch['seconds'], batch['published_seconds'])} ({batch['iterations']} iterations)"]
                cells += [_pair(sets[ipc]["hours"], sets[ipc]["published_hours"]) for ipc in (10, 50)]
                lengths |= {f"{each['iterations']} on {result['workload']}" for each in sets.values()}
            rows.append([label + subject(result), row["precision"], " / ".join(ascents), *cells])
    note = (
        "Each fused / published. An ascent is all of its K steps; a whole batch goes from image files to image files. The peak of memory is"
        " that of the iterations: the ascent needs more, because gradients of the weights need the inputs of the convolutions."
    )
    if lengths:
        note += (
            f" Hours are extrapolated from one iteration and from what surrounds them; iterations of a batch: {', '.join(sorted(lengths))}."
        )
    return [*_table(head, rows), "", note]


def peers(results: Labelled) -> list[str]:
    """A row per workload, precision and peer."""
    head = "workload|precision|peer|ms per iteration (10 … 90 %)|it/s|ms/image|× published (fp32)|× fastest other".split("|")
    head += "% of floor|peak MiB|kernels|gradient error (allowed)|loss error (allowed)".split("|")
    rows = []
    for label, result in results:
        for row in result["rows"]:
            errors = zip(("gradient_error", "loss_error"), row["allowed_errors"], strict=True)
            rows.append(
                [
                    label + subject(result),
                    row["precision"],
                    row["peer"],
                    _time(row),
                    _figure(row["iterations_per_second"]),
                    _figure(row["milliseconds_per_image"]),
                    _times(row, find(result, "published")),
                    _against_rival(result, row),
                    _percent(row),
                    _figure(row["peak_memory_mib"]),
                    _figure(row["kernels"]),
                    *(f"{row[name]:.1e} ({allowed:.1e})" for name, allowed in errors),
                ]
            )
    return _table(head, rows)


def subject(result: dict[str, Any]) -> str:
    """What was distilled: workload, size, batch, and what is not as published."""
    smaller = "" if result["batch"] == result["published_batch"] else f" (published: {result['published_batch']})"
    teacher = "" if result["teacher"] == "random weights" else ", own teacher"
    return f"{result['workload']}, {result['size']} px, batch {result['batch']}{smaller}{teacher}"


def find(result: dict[str, Any], peer: str, precision: str = "fp32") -> dict[str, Any] | None:
    """The row of a peer, where it took part."""
    return next((row for row in result["rows"] if (row["peer"], row["precision"]) == (peer, precision)), None)


def ratio(row: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    """How many times as fast as the other; None where there is none, or numbers of one of both do not match."""
    if other is None or not (row["matches"] and other["matches"]):
        return None
    times: float = other["milliseconds"] / row["milliseconds"]
    return times


def _ours(result: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (row for row in result["rows"] if row["peer"] == "fused")


def _against_rival(result: dict[str, Any], row: dict[str, Any]) -> str:
    """Against the fastest other peer whose numbers match; the published loop has a column of its own."""
    others = [each for each in result["rows"] if each["precision"] == row["precision"] and each["peer"] not in (row["peer"], "published")]
    best = min((each for each in others if each["matches"]), key=lambda each: each["milliseconds"], default=None)
    return NONE if best is None or not row["matches"] else f"{ratio(row, best):.2f} ({best['peer']})"


def _ascent(result: dict[str, Any], peer: str, precision: str) -> float | None:
    """Milliseconds."""
    return next((1e3 * each["seconds"] for each in result["ascent"] if (each["peer"], each["precision"]) == (peer, precision)), None)


def _times(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    found = ratio(row, other)
    return NONE if found is None else f"{found:.2f}"


def _time(row: dict[str, Any]) -> str:
    return f"{_figure(row['milliseconds'])} ({_figure(row['milliseconds_10'])} … {_figure(row['milliseconds_90'])})"


def _percent(row: dict[str, Any]) -> str:
    return f"{row['percent_of_floor']:.0f}" if row["matches"] else NONE


def _pair(ours: float | None, published: float | None) -> str:
    return f"{_figure(ours)} / {_figure(published)}"


def _figure(value: float | None) -> str:
    """Three digits, never an exponent."""
    if value is None:
        return NONE
    return f"{value:.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]

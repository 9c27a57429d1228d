"""What the other benchmarks of a folder of results found, as Markdown; `benchmarks/report.py --readme` writes it beside the JSON files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_OPERATORS_SHOWN = 1  # inputs of every operator and precision: the largest

Row = Sequence[str]


def page(folder: Path) -> str | None:
    """The page of a folder; None where it holds nothing but throughput.py's files."""
    found = list(_contents(folder))
    parts = [shown for title, describe in SECTIONS.items() for name, content in found for shown in _section(title, describe, name, content)]
    if (folder / "scaling.png").exists():
        parts.append("![Time and memory against iterations, batch, image size and images per class](scaling.png)\n")
    return "\n".join(["# More measurements of this machine\n", *parts]) if parts else None


def _contents(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON file."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            yield path.name, content


def _section(title: str, describe: Callable[[dict[str, Any]], list[str] | None], name: str, content: dict[str, Any]) -> list[str]:
    lines = describe(content)
    if lines is None:
        return []
    commit = content.get("commit") or content.get("machine_info", {}).get("commit", "")
    mark = f", commit `{commit.partition('+')[0][:12]}`{' with uncommitted changes' if '+' in commit else ''}" if commit else ""
    return [f"## {title}\n", *lines, f"\nFrom [{name}]({name}){mark}.\n"]


def _table(columns: Row, rows: Sequence[Row]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def _anatomy(content: dict[str, Any]) -> list[str] | None:
    """Where the time of an iteration goes."""
    if "results" not in content:
        return None
    lines: list[str] = []
    for result in content["results"]:
        whole = sum(each["milliseconds"] for each in result["parts"])
        rows = [
            (
                each["part"],
                f"{each['calls']:g}",
                f"{each['milliseconds']:.2f}",
                f"{100 * each['milliseconds'] / whole:.1f}",
                f"{each['floor']:.2f}",
                f"{100 * each['floor'] / each['milliseconds']:.0f}" if each["milliseconds"] else "–",
            )
            for each in result["parts"]
        ]
        title = f"{result['workload']}, batch {result['batch']}, {result['precision']}: {result['milliseconds']:.1f} ms per iteration"
        lines += [f"{title} ({whole:.1f} ms under the profiler).\n"]
        lines += [*_table(("part", "calls", "ms", "% of the iteration", "floor, ms", "% of floor"), rows), ""]
    return lines[:-1]


def _swapping(content: dict[str, Any]) -> list[str] | None:
    """What each level of swapping gains."""
    if "way" not in _first(content.get("rows")):
        return None
    rows = [
        (
            row["code_base"],
            row["way"],
            f"{1e3 * row['seconds']:.0f} ({1e3 * row['seconds_10']:.0f} … {1e3 * row['seconds_90']:.0f})",
            _ratio(row["iteration_gain"]),
            f"{row['batch_seconds']:.0f}",
            _ratio(row["batch_gain"]),
        )
        for row in content["rows"]
    ]
    columns = "code base", "way", "ms per iteration (10 … 90 %)", "× plain", "whole batch, s", "× plain"
    what = f"{content['workload']}, batch {content['batch']}, {content['teacher']}"
    iterations = content["rows"][0]["batch_iterations"]
    return [f"{what}; a whole batch of {iterations} iterations is extrapolated from one.\n", *_table(columns, rows)]


def _whole_set(content: dict[str, Any]) -> list[str] | None:
    """A whole set, files included, against its bare loop."""
    if "shares" not in content:
        return None
    bare, whole = (statistics.median(content["samples"][way]) for way in ("bare loop", "whole set"))
    low, high = min(content["shares"]), max(content["shares"])
    same = "the same pixels" if content["same images"] else "OTHER pixels"
    times = f"The bare loop took {bare:.2f} s and the whole set {whole:.2f} s, each the median of {len(content['shares'])}"
    return [f"{times}: {100 * content['share']:.1f} % of its throughput ({100 * low:.1f} … {100 * high:.1f}), with {same} in the files."]


def _family(content: dict[str, Any]) -> list[str] | None:
    """Stages and several teachers, against what they are made of."""
    if "family" not in content:
        return None
    what = f"{content['workload']} and {content['second']}, batch {content['batch']}, sizes {content['sizes'][0]} and {content['sizes'][1]}"
    rows = [(name, f"{ratio:.3f} ({low:.3f} … {high:.3f})") for name, (ratio, low, high) in content["family"].items()]
    return [f"{what}; time of an iteration.\n", *_table(("what", "× (10 … 90 %)"), rows)]


def _faults(content: dict[str, Any]) -> list[str] | None:
    """What kills, full disks and damage cost."""
    if "outcomes" not in _first(content.get("rows")):
        return None
    rows = []
    for row in content["rows"]:
        outcomes = row["outcomes"]
        total = content["images"] * len(outcomes)
        rows.append(
            (
                row["what"],
                str(len(outcomes)),
                str(sum(each["finished"] < content["images"] for each in outcomes)),
                f"{sum(each['finished'] for each in outcomes)} of {total}",
                str(sum(each["lost"] for each in outcomes)),
                f"{sum(each['equal'] for each in outcomes)} of {len(outcomes)}",
            )
        )
    columns = "what was done", "times", "before the end", "images finished by then", "of those made again", "bytes equal in the end"
    what = f"Sets of {content['images']} images in batches of five; after each fault the same command again."
    return [f"{what}\n", *_table(columns, rows)]


def _scaling(content: dict[str, Any]) -> list[str] | None:
    """Exponents of the cost curves."""
    if "curves" not in content:
        return None
    rows = []
    for curve in content["curves"]:
        for line in curve["lines"]:
            law, points = line["power_law"], line["points"]
            rows.append(
                (
                    f"{curve['cost']} against {curve['varied']}",
                    line["peer"],
                    f"{points[0]['size']} … {points[-1]['size']}",
                    f"{points[0]['median']:.3g} … {points[-1]['median']:.3g}",
                    f"{law['slope']:.2f} ± {law['slope_error']:.2f}",
                    curve["expected_exponent"],
                )
            )
    return [
        f"Teacher and images of {content['workload']}.\n",
        *_table(("curve", "peer", "from … to", "cost", "exponent", "expected"), rows),
    ]


def _operators(content: dict[str, Any]) -> list[str] | None:
    """Every operator on its largest input."""
    if "benchmarks" not in content:
        return None
    kept: dict[tuple[str, str, str], list[tuple[int, Row]]] = {}
    for bench in content["benchmarks"]:
        info, median = bench["extra_info"], bench["stats"]["median"]
        row = info["subject"], f"{1e3 * median:.3f}", f"{info['gigabytes_per_second']:.1f}", f"{info['percent_of_copy']:.0f}"
        kept.setdefault((info["operator"], info["precision"], info["implementation"]), []).append((info["bytes"], row))
    rows = []
    for (operator, precision, by), measured in kept.items():
        for _, (subject, *numbers) in sorted(measured, key=lambda each: each[0], reverse=True)[:_OPERATORS_SHOWN]:
            rows.append((operator, subject, precision, by, *numbers))
    ceiling = content["benchmarks"][0]["extra_info"]["copy_ceiling_gigabytes_per_second"]
    return [
        f"Each on its largest input; a copy moves {ceiling:.1f} GB/s.\n",
        *_table(("operator", "input", "precision", "by", "ms", "GB/s", "% of copy"), rows),
    ]


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str] | None]] = {
    "Where an iteration's time goes": _anatomy,
    "Swapping dwa_fast into a published loop": _swapping,
    "A whole set": _whole_set,
    "Stages and several teachers": _family,
    "What a fault costs": _faults,
    "Cost curves": _scaling,
    "Operators": _operators,
}


def _first(rows: Any) -> dict[str, Any]:
    return rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"

"""Tables of what `make gpu-speed` and `make gpu-check` measured on a GPU."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from proof import read_rows

from dwa_fast.errors import InputError

SPEED, CHECK = "speed.jsonl", "check.jsonl"
Row = dict[str, Any]


def section(folder: Path, *, brief: bool = False) -> str:
    """Heading, facts and tables of one folder of results; of a brief one, the iterations alone.

    Raises:
        InputError: the rows do not say what machine they come from.
    """
    speed, check = (_latest(read_rows(folder / name)) if (folder / name).exists() else [] for name in (SPEED, CHECK))
    facts = next(iter(_of(speed + check, "facts")), None)
    if facts is None:
        raise InputError(f"{folder} has no row of facts in {SPEED} or {CHECK}: measure again")
    if brief:
        return "\n".join([f"{facts['device']}:", "", *_loops(speed)])
    lines = [f"### {facts['device']}", "", _facts(facts, speed), ""]
    lines += [*_loops(speed), *_flights(speed), *_ascents(speed), *_training(speed)]
    lines += [f"- {sentence}" for sentence in [*_first_look(speed), *_checks(check), *_unfinished(speed + check)]]
    return "\n".join(lines) + "\n"


def _latest(rows: Iterable[Row]) -> list[Row]:
    """Without the rows of a step that came again: its last run counts, unless an earlier one ended well and this one did not."""
    runs: dict[str, list[Row]] = {}
    current: list[Row] = []
    for row in rows:
        current.append(row)
        if row.get("row") == "step":
            before = runs.get(row["name"])
            if before is None or row["outcome"] == "done" or before[-1]["outcome"] != "done":
                runs[row["name"]] = current
            current = []
    return [*itertools.chain.from_iterable(runs.values()), *current]


def _of(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.get("row") == kind]


def _facts(facts: Row, speed: Sequence[Row]) -> str:
    commit, _, changed = (facts["commit"] or "unknown").partition("+")
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    ceilings = [f"copy {row['copy'] / 1e12:.2f} TB/s, arithmetic {row['arithmetic'] / 1e12:.0f} TFLOP/s" for row in _of(speed, "ceilings")]
    parts = [f"Commit `{commit[:12]}`{' with uncommitted changes' if changed else ''}", packages, f"driver {facts['driver']}", *ceilings]
    return f"{'; '.join(parts)}."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    shown = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in shown] + [""] if rows else []


def _milliseconds(row: Row) -> str:
    samples = sorted(row["milliseconds"])
    return f"{statistics.median(samples):.3f} ({samples[0]:.3f} … {samples[-1]:.3f})"


def _loops(speed: Sequence[Row]) -> list[str]:
    """A row per workload and rival: both were timed in turns in one process."""
    loops, kernels = _of(speed, "loop"), {row["workload"]: row for row in _of(speed, "kernels")}
    rows = []
    for ratio in _of(speed, "ratio"):
        end = next(place for place, row in enumerate(speed) if row is ratio)
        pair = [row for row in loops if row in speed[:end] and row["workload"] == ratio["workload"]][-2:]
        ours, rival = pair
        launched = f"{kernels[ratio['workload']]['per_iteration']:.0f}" if ratio["workload"] in kernels else "–"
        peaks = " / ".join("–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}" for row in pair)
        rows.append(
            [
                f"{ratio['workload']}, {ratio['rival']} ({rival['precision']})",
                _milliseconds(ours),
                _milliseconds(rival),
                f"{ratio['times']:.2f}",
                peaks,
                launched,
            ]
        )
    columns = [
        "workload, rival",
        "fused, ms per iteration (least … most)",
        "rival",
        "×",
        "peak MiB, fused / rival",
        "kernels per iteration",
    ]
    return _table(columns, rows)


def _flights(speed: Sequence[Row]) -> list[str]:
    rows = [[str(row["count"]), _milliseconds(row)] for row in _of(speed, "batches in flight")]
    return _table(["batches in flight", "ms per iteration and batch, ascent included"], rows)


def _ascents(speed: Sequence[Row]) -> list[str]:
    rows = [[row["workload"], row["peer"], str(row["steps"]), _milliseconds(row)] for row in _of(speed, "ascent")]
    return _table(["ascent", "peer", "steps", "ms for all steps"], rows)


def _training(speed: Sequence[Row]) -> list[str]:
    """A row per kind of step and peer but the released loop, beside which all were timed in turns."""
    rows = []
    for row in _of(speed, "training"):
        if row["peer"] != "released":
            ratios = ["numbers differ" if row[name] is None else f"{row[name]:.2f}" for name in ("ratio_to_released", "ratio_to_before")]
            kind = f"{row['trains']} {row['architecture']}, batch {row['batch']}"
            own = row["peer"].startswith("now") and not row["fused"]
            rows.append(
                [
                    kind,
                    f"{row['peer']}{', not fused' if own else ''}",
                    f"{1e3 * row['seconds']:.3f} ({1e3 * row['low']:.3f} … {1e3 * row['high']:.3f})",
                    *ratios,
                ]
            )
    return _table(["training step", "peer", "ms (10 … 90 %)", "× released loop (fp32)", "× plain PyTorch (fp32)"], rows)


def _first_look(speed: Sequence[Row]) -> list[str]:
    return [
        f"Fused step on {row['workload']}: relative errors {_errors(row['errors'])} of gradient and losses "
        f"(PyTorch's own operators: {_errors(row['errors_of_pytorch'])}); captured and called steps give "
        f"{'the same' if row['recorded_equals_called'] else 'OTHER'} bits, two runs {'the same' if row['same_twice'] else 'OTHER'} bits."
        for row in _of(speed, "first look")
    ]


def _errors(errors: Sequence[float]) -> str:
    return " and ".join(f"{error:.1e}" for error in errors)


def _checks(check: Sequence[Row]) -> list[str]:
    return [sentence for kind, describe in _CHECKS.items() for row in _of(check, kind) for sentence in describe(row)] + _operators(check)


def _tests(row: Row) -> list[str]:
    counts = [f"{count} {outcome}" for outcome, count in sorted(row.get("counts", {}).items())]
    return [f"Tests on this GPU: {', '.join(counts)}."] if counts else []


def _watched(row: Row) -> list[str]:
    return [f"{row['tool']} of the kernels: {'not finished' if row['errors'] is None else str(row['errors']) + ' errors'}."]


def _losses(row: Row) -> list[str]:
    apart = ", ".join(f"{100 * each:.1f} %" for each in row["relative"])
    high, low = row["precisions"]
    return [
        f"{row['iterations']} iterations of {row['workload']}: cross-entropy, R_mean and R_var in {low} end {apart} from those in {high}."
    ]


_CHECKS: dict[str, Callable[[Row], list[str]]] = {"tests": _tests, "watched": _watched, "losses": _losses}


def _operators(check: Sequence[Row]) -> list[str]:
    rows = _of(check, "operator")
    if not rows:
        return []
    wrong = [row["case"] for row in rows if not row["right"]]
    shares = sorted(row["percent_of_copy"] for row in rows if row["percent_of_copy"] is not None)
    reached = [f"the {len(shares)} that move much memory at {shares[0]:.0f} to {shares[-1]:.0f} % of the copy ceiling"] if shares else []
    return [f"{', '.join([f'Operators: {len(rows)} measured', *reached])}; errors too large: {', '.join(wrong) or 'none'}."]


def _unfinished(rows: Sequence[Row]) -> list[str]:
    names = [f"{row['name']} ({row['outcome']})" for row in _of(rows, "step") if row["outcome"] != "done"]
    return [f"Steps that did not end well: {', '.join(names)}."] if names else []

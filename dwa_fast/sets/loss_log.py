"""The losses of a set as JSON lines: a line per iteration that is kept, batch after batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from dwa_fast.errors import InputError

LOSSES = "losses.jsonl"

Rows = list[list[float]]  # of one batch: iteration (from 1), cross-entropy, R_mean, R_var


def subsample(
    losses: Tensor,  # [T, 3]: cross-entropy, R_mean, R_var
    every: int,
) -> Rows:
    """The first, the last and every `every`-th iteration, in six digits; none where `every` is 0."""
    count = len(losses)
    if every == 0:
        return []
    iterations = sorted({1, count, *range(every, count + 1, every)})
    return [[iteration, *(float(f"{value:.6g}") for value in losses[iteration - 1].tolist())] for iteration in iterations]


def to_jsonl(batch: int, rows: Rows) -> str:
    """The lines of one batch."""
    keys = ("item", "iteration", "ce", "mean", "var")
    return "".join(json.dumps(dict(zip(keys, (batch, *row), strict=True)), allow_nan=False) + "\n" for row in rows)


def digest(text: str) -> str:
    """SHA-256 of a batch's lines, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_losses(folder: Path) -> dict[int, str]:
    """The lines of each batch in a set's log; damaged lines are left out. Empty where there is no log."""
    found: dict[int, str] = {}
    try:
        lines = (folder / LOSSES).read_bytes().decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return found
    except OSError as error:
        raise InputError(f"{folder / LOSSES} cannot be read: {error.strerror}") from error
    for line in lines:
        try:
            batch = json.loads(line)["item"]
        except (ValueError, TypeError, KeyError):
            continue
        if isinstance(batch, int):
            found[batch] = found.get(batch, "") + line
    return found


def concat(texts: Iterable[tuple[int, str]]) -> str:
    """The whole log, sorted by batch."""
    return "".join(text for _, text in sorted(texts))

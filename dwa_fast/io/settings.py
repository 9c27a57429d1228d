"""Compares stored settings with the present ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwa_fast.config import LATER_SETTINGS
from dwa_fast.errors import InputError

_CHECKSUM = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
_SHOWN = 4  # changed settings in a message


def refuse_change(place: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any], advice: str) -> None:
    """Raise InputError with the differences if the settings have changed.

    Args:
        what: the content of `place`, such as "students". advice: what to do, such as "choose another folder".
    """
    changed = difference(before, now)
    if changed:
        raise InputError(f"{place} holds {what} of other settings ({changed}); {advice}")


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The changed settings with both values, as text: the method first and no more than a few; empty if there are none."""
    before, now = {**LATER_SETTINGS, **before}, {**LATER_SETTINGS, **now}
    changed = [key for key in sorted({*before, *now}, key=lambda key: (key != "method", key)) if before.get(key) != now.get(key)]
    shown = [f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}" for key in changed[:_SHOWN]]
    return "; ".join([*shown, *([f"and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else [])])


def _short(value: Any) -> str:
    """A value as text of at most 80 characters, checksums by their first twelve digits."""
    text = _CHECKSUM.sub(r"\1…", repr(value))
    return text if len(text) <= 80 else f"{text[:77]}…"

"""What was made with which settings: the difference, as an error message."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwa_fast.errors import InputError


def refuse_change(place: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any], advice: str) -> None:
    """Raise InputError, with the difference, where settings are not those that something was made with.

    Args:
        what: what is in that place: "students". advice: what to do about it: "choose another folder".
    """
    changed = difference(before, now)
    if changed:
        raise InputError(f"{place} holds {what} of other settings ({changed}); {advice}")


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings have changed, and how, for a sentence; empty where none has."""
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}" for key in changed)


def _short(value: Any) -> str:
    """A setting for a sentence: long lists, such as a thousand class names, cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"

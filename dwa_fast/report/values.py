"""Untrusted values as text for a reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_LONGEST_LIST, _LONGEST_TEXT, _LONGEST_GROUP = 20, 400, 200  # items, characters, rows


def duration(seconds: float) -> str:
    """Time for a reader."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def groups(settings: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Nested values as names and values: those at the top first, then a group for each mapping at the top."""
    plain = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    nested = {name: value for name, value in settings.items() if isinstance(value, dict) and value}
    return [(name, _cut(list(_leaves(values)))) for name, values in [("", plain), *nested.items()] if values]


def _cut(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    left = len(rows) - _LONGEST_GROUP
    return rows if left <= 0 else [*rows[:_LONGEST_GROUP], ("…", f"{left} more")]


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every value that is no mapping, with the names that lead to it; a stack, not recursion: it may be nested deeply."""
    waiting = list(values.items())[::-1]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{name} · {key}", below) for key, below in value.items()][::-1]
        else:
            yield name, shown(value)


def shown(value: Any) -> str:
    """A value for a reader; what is long is cut."""
    if value is None or value in ({}, []):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        more = f", … ({len(value)} in all)" if len(value) > _LONGEST_LIST else ""
        return ", ".join(map(str, value[:_LONGEST_LIST]))[:_LONGEST_TEXT] + more
    text = str(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"

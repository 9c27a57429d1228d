"""Names of classes: the same in two spellings, numbered alike in two splits, and as text of a message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dwa_fast.errors import InputError

_SHOWN = 5  # classes or files that an error message names


def class_numbers(names: Sequence[str], train_names: Sequence[str], folder: Path, train: Path) -> list[int]:
    """The training label of each class folder of the test images.

    Names match if they are equal, or equal up to zero padding of the number at their end.

    Raises:
        InputError: the two sets of classes differ.
    """
    names = as_named(names, train_names)
    if set(names) != set(train_names):
        foreign, missing = sorted(set(names) - set(train_names)), sorted(set(train_names) - set(names))
        parts = [f"{folder} has class folders that {train} lacks: {shown(foreign)}"] if foreign else []
        parts += [f"{folder if not foreign else 'it'} lacks {shown(missing)}"] if missing else []
        raise InputError(f"{', and '.join(parts)}; training and held-out images must be of the same classes")
    return [train_names.index(name) for name in names]


def as_named(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """`names` in the spelling of `wanted` if they differ only in zero padding (2 for 02, class_2 for class_002); else unchanged."""
    own, known = _by_number(names), _by_number(wanted)
    if not own or not known or set(own) != set(known):
        return list(names)
    found = {name: known[number] for number, name in own.items()}
    return [found[name] for name in names]


def _by_number(names: Sequence[str]) -> dict[tuple[str, int], str] | None:
    """Names by prefix and number at their end; None if a name has no number, or two have the same prefix and number."""
    matches = [re.fullmatch(r"([^0-9]*)([0-9]+)", name) for name in names]
    found = {(match[1], int(match[2])): match[0] for match in matches if match}
    return found if len(found) == len(names) else None


def shown(names: Sequence[str], at_most: int = _SHOWN) -> str:
    """Names as text, at most `at_most` of them."""
    more = f", … ({len(names)} in all)" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more

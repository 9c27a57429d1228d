"""What changed between stored settings and the present ones, in one readable sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwa_fast.errors import InputError
from dwa_fast.io.settings import difference, refuse_change


def test_nothing_changed() -> None:
    assert difference({"rho": 0.015}, {"rho": 0.015}) == ""
    refuse_change(Path("place"), "a set", {"rho": 0.015}, {"rho": 0.015}, "choose another folder")


def test_the_method_first_and_a_few_of_many() -> None:
    before = {"ascent": "directed", "initial": "real", "method": "dwa", "rho": 1, "steps": 12, "view": "roll"}
    now = {"ascent": "none", "initial": "patches", "method": "fadrm", "rho": 0, "steps": 1, "view": "crop"}
    expected = (
        "method was 'dwa', is 'fadrm'; ascent was 'directed', is 'none'; initial was 'real', is 'patches'; rho was 1, is 0; and 2 more"
    )
    assert difference(before, now) == expected
    with pytest.raises(InputError, match=r"place holds a set of other settings \(method .* and 2 more\); choose another folder"):
        refuse_change(Path("place"), "a set", before, now, "choose another folder")


def test_few_are_all_shown_and_long_values_cut() -> None:
    assert difference({"a": 1, "b": 2, "c": 3, "d": "x" * 90}, {}).count(" was ") == 4
    assert difference({"teacher": ["ab" * 32]}, {"teacher": "cd" * 32}) == "teacher was ['abababababab…'], is 'cdcdcdcdcdcd…'"
    assert difference({"names": "x" * 90}, {"names": "y"}) == f"names was '{'x' * 76}…, is 'y'"

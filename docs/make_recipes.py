"""Writes docs/recipes.md from the recipes in the code: python docs/make_recipes.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dwa_fast.recipes import METHODS, RECIPES, Recipe

TARGET = Path(__file__).with_name("recipes.md")
_HEAD = """\
# Recipes

Written by `python docs/make_recipes.py` from `dwa_fast/recipes.py`; change that, not this. Names are those of the fields, and with
dashes those of the flags: `dwa-fast synthesize --help` says what each means.
"""
_STAGES = {"synthesis": "Synthesis", "squeeze": "Squeeze: the teacher", "validation": "Validation: the students"}


def page() -> str:
    """The whole document."""
    own = [recipe for recipe in RECIPES.values() if not recipe.name.endswith("-released")]
    parts = [_HEAD, _data(own)]
    names = [recipe.name for recipe in own]
    parts += [f"## {title}\n\n{_stage(names, [_fields(recipe)[stage] for recipe in own])}" for stage, title in _STAGES.items()]
    return "\n".join([*parts, _released(), _methods()])


def _fields(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Every stage's settings."""
    return {stage: asdict(getattr(recipe, stage)) for stage in _STAGES}


def _data(recipes: Sequence[Recipe]) -> str:
    rows = [("recipe", "what", "pixels", "`test_crop`", "classes", "teacher", "mean", "std")]
    for recipe in recipes:
        data = recipe.data
        shown = (data.size, data.test_crop, data.classes, recipe.architecture, data.mean, data.std)
        rows.append((recipe.name, recipe.summary, *map(_shown, shown)))
    return _table(rows)


def _stage(names: Sequence[str], settings: Sequence[dict[str, Any]]) -> str:
    """One row per field, one column per recipe; a field that never differs is named below."""
    differing = [field for field in settings[0] if any(each[field] != settings[0][field] for each in settings)]
    same = [f"`{field}` {_shown(value)}" for field, value in settings[0].items() if field not in differing]
    rows = [(f"`{field}`", *(_shown(each[field]) for each in settings)) for field in differing]
    return _table([("field", *names), *rows]) + f"\nAll: {', '.join(same)}.\n"


def _released() -> str:
    rows = []
    for recipe in RECIPES.values():
        if recipe.name.endswith("-released"):
            paper, released = _fields(RECIPES[recipe.name.removesuffix("-released")]), _fields(recipe)
            for stage, values in released.items():
                changed = [field for field, value in values.items() if value != paper[stage][field]]
                rows += [(recipe.name, stage, f"`{f}`", _shown(paper[stage][f]), _shown(values[f])) for f in changed]
    table = _table([("recipe", "stage", "field", "paper", "released command"), *rows])
    return f"## Where the authors' released commands differ from the paper\n\n{table}"


def _methods() -> str:
    """What each method changes of a recipe's synthesis."""
    rows = [(name, "; ".join(_changes(name)) or "nothing") for name in METHODS]
    return f"## Methods\n\nWhat `--method` changes of a recipe's synthesis, which is DWA's.\n\n{_table([('method', 'changes'), *rows])}"


def _changes(method: str) -> Iterator[str]:
    """Every field that a method changes; with its recipes, where it has several values in them."""
    if method == "coupled":
        yield "`lambda_mean` = the recipe's `lambda_var`"
        return
    before = {recipe.name: asdict(recipe.synthesis) for recipe in RECIPES.values()}
    after = {recipe.name: asdict(METHODS[method](recipe.synthesis, recipe.data)) for recipe in RECIPES.values()}
    for field in after["digits"]:
        values: dict[str, list[str]] = {}
        for name, settings in after.items():
            if not name.endswith("-released"):
                values.setdefault(_shown(settings[field]), []).append(name)
        if any(settings[field] != before[name][field] for name, settings in after.items()):
            several = len(values) > 1
            yield f"`{field}` " + ", or ".join(value + f" ({', '.join(names)})" * several for value, names in values.items())


def _shown(value: Any) -> str:
    if value == ():
        return "none"
    if isinstance(value, (tuple, list)):
        return ", ".join(_shown(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "any"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: Iterable[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *body]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")

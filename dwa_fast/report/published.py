"""The results that the paper publishes (arXiv 2409.17612), to compare with those of a record with the same settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dwa_fast.config import EXECUTION_SETTINGS, LATER_SETTINGS
from dwa_fast.recipes import METHODS, RECIPES, recipe
from dwa_fast.report.records import Record, Table, format_mean_std

_Key = tuple[str, str, int]  # recipe, student, images per class

# Top-1 % of students of the same architecture as the teacher.
_SRE2L: dict[_Key, float] = {
    ("cifar10", "resnet18-cifar", 10): 27.2,
    ("cifar10", "resnet18-cifar", 50): 47.5,
    ("cifar100", "resnet18-cifar", 10): 31.6,
    ("cifar100", "resnet18-cifar", 50): 52.2,
    ("tiny", "resnet18-cifar", 50): 41.1,
    ("tiny", "resnet18-cifar", 100): 49.7,
    ("tiny", "resnet50-cifar", 50): 42.2,
    ("tiny", "resnet101-cifar", 50): 42.5,
    ("imagenet", "resnet18", 10): 21.3,
    ("imagenet", "resnet18", 50): 46.8,
    ("imagenet", "resnet18", 100): 52.8,
    ("imagenet", "resnet50", 10): 28.4,
    ("imagenet", "resnet50", 50): 55.6,
    ("imagenet", "resnet50", 100): 61.0,
    ("imagenet", "resnet101", 10): 30.9,
    ("imagenet", "resnet101", 50): 60.8,
    ("imagenet", "resnet101", 100): 62.8,
}
_DWA: dict[_Key, float] = {
    ("cifar10", "resnet18-cifar", 10): 32.6,
    ("cifar10", "resnet18-cifar", 50): 53.1,
    ("cifar10", "convnet128", 10): 45.0,
    ("cifar10", "convnet128", 50): 63.3,
    ("cifar100", "resnet18-cifar", 10): 39.6,
    ("cifar100", "resnet18-cifar", 50): 60.9,  # 60.3 in the paper's ablation
    ("cifar100", "convnet128", 10): 47.6,
    ("cifar100", "convnet128", 50): 59.9,
    ("tiny", "resnet18-cifar", 50): 52.8,
    ("tiny", "resnet18-cifar", 100): 56.0,
    ("tiny", "resnet50-cifar", 50): 53.7,
    ("tiny", "resnet101-cifar", 50): 54.7,
    ("imagenet", "resnet18", 10): 37.9,
    ("imagenet", "resnet18", 50): 55.2,
    ("imagenet", "resnet18", 100): 59.2,
    ("imagenet", "resnet50", 10): 43.0,
    ("imagenet", "resnet50", 50): 62.3,
    ("imagenet", "resnet50", 100): 65.7,
    ("imagenet", "resnet101", 10): 46.9,
    ("imagenet", "resnet101", 50): 63.3,
    ("imagenet", "resnet101", 100): 66.7,
}
_REAL_START: dict[_Key, float] = {("cifar100", "resnet18-cifar", 10): 30.6, ("cifar100", "resnet18-cifar", 50): 56.1}
_RANDOM_STEP: dict[_Key, float] = {("cifar100", "resnet18-cifar", 10): 14.9, ("cifar100", "resnet18-cifar", 50): 56.2}
_RESULTS = {"sre2l": _SRE2L, "dwa": _DWA, "real-start": _REAL_START, "random-step": _RANDOM_STEP}
# Class-incremental learning by the GDumb protocol, top-1 % after each of five tasks: CIFAR-100, convnet128, 20 images per class.
_INCREMENTAL: dict[str, tuple[float, ...]] = {"sre2l": (15.7, 10.6, 9.0, 7.9, 6.9), "dwa": (34.6, 25.7, 22.5, 20.2, 18.1)}

_SEEN = "classes seen"  # of a cell of class-incremental learning
_OWN = {"mean", "std"}  # of a cell: its result, not the normalisation
_FREE = EXECUTION_SETTINGS | {"students"}
_SAYS = "Published: arXiv 2409.17612. Compared where teacher, synthesis and training of the students are set as the recipe says."


def published(recipe: str, method: str, student: str, ipc: int) -> float | None:
    """The paper's top-1, percent; None if it has none. A -released recipe counts as the recipe without that suffix."""
    return _RESULTS.get(method, {}).get((recipe.removesuffix("-released"), student, ipc))


def _after_tasks(recipe: str, method: str, student: str, ipc: int, tasks: Any, seen: Any) -> float | None:
    """The same of class-incremental learning, when so many classes have been seen."""
    steps = range(20, 101, 20)
    if (recipe.removesuffix("-released"), student, ipc, tasks) != ("cifar100", "convnet128", 20, 5) or seen not in steps:
        return None
    return _INCREMENTAL[method][steps.index(seen)] if method in _INCREMENTAL else None


def beside_published(record: Record) -> Table | None:
    """A table of the record's cells with published settings and the published numbers; None if there are none.

    A cell is compared where the record says that its teacher is of the student's architecture, and that the size of the images, the
    synthesis and the training of the students are as the recipe has them. The note names the settings that prevented other comparisons.
    """
    rows, kept_out = [], set()
    for cell in _cells(record):
        seen = cell.get(_SEEN)
        place = cell["recipe"], cell["method"], cell["student"], cell["ipc"]
        number = published(*place) if seen is None else _after_tasks(*place, record.settings.get("tasks"), seen)
        if number is None:
            continue
        different = sorted(_differences(record.settings, cell))
        if different:
            kept_out.update(different)
            continue
        names = [*place[:3], str(place[3]) if seen is None else f"{place[3]}, {seen} {_SEEN}"]
        each = cell.get("accuracies")
        here = format_mean_std(cell["mean"], cell["std"], len(each) if isinstance(each, list) else 2)
        rows.append([*names, here, f"{number:.1f}", f"{cell['mean'] - number:+.1f}".replace("-", "−")])
    if not rows and not kept_out:
        return None
    others = f" Others differ from what was published in: {', '.join(sorted(kept_out))}." if kept_out else ""
    columns = ["recipe", "method", "student", "ipc", "here", "published", "difference"]
    return Table(title="Beside the published results, top-1 %", columns=columns, rows=rows, note=_SAYS + others)


def _cells(record: Record) -> Iterator[Mapping[str, Any]]:
    """The well-formed cells; a record may come from anywhere."""
    kinds: dict[str, Any] = {"recipe": str, "method": str, "student": str, "ipc": int, "mean": (int, float), "std": (int, float)}
    cells = record.data.get("cells")
    for cell in cells if isinstance(cells, list) else []:
        whole = isinstance(cell, dict) and all(isinstance(cell.get(name), kind) for name, kind in kinds.items())
        if whole and all(math.isfinite(cell[name]) for name in ("mean", "std")):
            yield cell


def _differences(settings: Mapping[str, Any], cell: Mapping[str, Any]) -> Iterator[str]:
    """Names of the settings of a cell that are not the published ones, or not known to be."""
    if cell["recipe"] not in RECIPES or cell["method"] not in METHODS:
        yield "recipe"
        return
    dwa, own = recipe(cell["recipe"]), recipe(cell["recipe"], method=cell["method"])
    if _part(settings, "teacher").get("architecture") != cell["student"]:
        yield "teacher"
    if cell.get("set_teachers") not in (None, [cell["student"]]):  # which made the set, where that is known
        yield "teacher"
    if settings.get("soft_labels"):  # of a file, perhaps of another program
        yield "soft_labels"
    data = {**settings, **_part(settings, "data")}
    if data.get("size") != dwa.data.size:
        yield "size"
    if data.get("test_crop", 1.0) != dwa.data.test_crop:
        yield "test_crop"
    if data.get("held_out_share", 0.0):  # of training images, not the test images
        yield "held_out_share"
    yield from _changed(_part(settings, "validation"), dwa.settings("validation"), "validation")
    # A study of several methods records the settings that it derives them from, those of DWA, and in each cell what is not its method's.
    stated = _part(cell if "synthesis" in cell else settings, "synthesis")
    if isinstance(stated.get("teacher"), list):  # a set of several teachers, whatever its method
        yield "teacher"
    yield from min((list(_changed(stated, each, "synthesis")) for each in (own.settings("synthesis"), dwa.settings("synthesis"))), key=len)
    yield from (name for name in _plain(own.settings("synthesis")) if name in cell and name not in _OWN)


def _part(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = settings.get(name)
    return value if isinstance(value, dict) else {}


def _changed(stated: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> Iterator[str]:
    if not stated:
        yield name
        return
    stated, wanted = {**LATER_SETTINGS, **stated}, {**LATER_SETTINGS, **_plain(wanted)}
    yield from (field for field, value in wanted.items() if stated.get(field) != value)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a record holds them, without those that may differ."""
    content: dict[str, Any] = json.loads(json.dumps(settings))
    return {name: value for name, value in content.items() if name not in _FREE}

"""Writes docs/recipes.md from the recipes in the code: python docs/make_recipes.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dwa_fast import recipes
from dwa_fast.recipes import DEFAULT_SCHEDULES, METHODS, PRESETS, RECIPES, Recipe

TARGET = Path(__file__).with_name("recipes.md")
_HEAD = """\
# Recipes

Written by `python docs/make_recipes.py` from `dwa_fast/recipes.py`; change that, not this. Names are those of the fields, and with
dashes those of the flags: `dwa-fast synthesize --help` says what each means.
"""
_STAGES = {"synthesis": "Synthesis", "squeeze": "Squeeze: the teacher", "validation": "Validation: the students"}


_PRESETS_HEAD = """\
## Presets: trainings of the students

`--preset`, or `recipe(..., preset=)`, trains students as another publication does; `paper` is DWA's training. A preset sets the validation
alone, and other flags change single settings of it. Values are those for ResNet-18 and 10 images per class (ipc). `folder` has those of
imagenet; digits keep their own epochs, learning rate, crops and flips. `batch_size` by rule, RDED's: 10, 50 and 100 images for ipc 1, 10
and 50, between them the lower value (ours); twice that for 100 classes or more; never more than there are images.
"""
_PRESETS_ALL = """\
All: the last epoch counts, where most of the programs report the best of those that they test. Pixels are normalised as the recipe says;
RDED takes ImageNet's mean and standard deviation for every data set. The learning rate falls from step to step, theirs from epoch to epoch.
Soft labels are computed in the precision of the student's steps."""
PRESET_NOTES = {
    "rded": "CVPR 2024, LINs-lab/RDED 3f6453d. Up to 64 pixels its crops are the whole image, so there are none here. Its program "
    "passes each batch through the student twice, which moves the running statistics twice. Its other learning rates: 0.002 "
    "for EfficientNet, 0.0025 for MobileNetV2.",
    "edc": "NeurIPS 2024, tables 6 to 10, and shaoshitong/EDC 80116a7. On CIFAR-10 it halves the learning rate after 800, 900 and "
    "950 epochs; the stretched cosine there is ours. RandAugment is torchvision's with its default settings, here in its "
    "version for tensors. Tiny-ImageNet at ipc 1: `--epochs 1000`; ImageNet-10: `--epochs 1000 --batch-size 50 "
    "--shuffle-cells 1 --rand-augment 2`. Its scripts take SGD and another schedule on CIFAR-100 and Tiny-ImageNet. Its "
    "labels are the mean of several teachers: `--teacher A.pt B.pt`.",
    "fadrm": "NeurIPS 2025, Jiacheng8/FADRM f445e38. At ipc 50 `--cosine-stretch 1`; CIFAR-100 at ipc 1 `--learning-rate 5e-4`; "
    "ImageNette at ipc 10 `--batch-size 10 --learning-rate 5e-4 --cosine-stretch 1`. It has no CIFAR-10: CIFAR-100's "
    "settings are taken. Its labels are computed in fp16. FADRM+ takes the mean of several teachers, in train mode on "
    "Tiny-ImageNet too.",
    "cv-dd": "arXiv 2501.07575, Jiacheng8/CV-DD 24097e9. It weights five teachers by what they achieve; several teachers have a "
    "plain mean here. At other ipc ζ is 1 on CIFAR-100 and 2 on Tiny-ImageNet; on ImageNet it is 1 at ipc 50. CIFAR-10 at "
    "ipc 1: `--batch-size 10`.",
    "rd3": "ICLR 2026, known from a summary alone. Temperature, smallest crop and weight decay were not found: 20, 0.08 and 0.01 "
    "are ours. Other networks than ResNet-18: `--cosine-stretch 2`.",
    "rethinkdc": "arXiv 2502.06434, ArmandXiao/Rethinking-Dataset-Compression 91d1ef0. It evaluates ImageNet-1K alone, where it is the "
    "same as `paper`; for other data sets the same settings are ours. With hard labels: `--labels hard --mixing none`.",
    "ddranking": "NUS-HPC-AI-Lab/DD-Ranking 9ee9a165, its configuration for DWA. It tries the learning rates 0.001, 0.005, 0.01, 0.05 "
    "and 0.1 and keeps the best; here it is 0.001. `dwa_fast.evaluation.ranking.label_robust_score` computes its score "
    "(LRS).",
}


def page() -> str:
    """The whole document."""
    own = [recipe for recipe in RECIPES.values() if not recipe.name.endswith("-released")]
    parts = [_HEAD, _data(own)]
    names = [recipe.name for recipe in own]
    for stage, title in _STAGES.items():
        note = f"\n{_schedules()}\n" if stage == "squeeze" else ""
        parts.append(f"## {title}\n\n{_stage(names, [_fields(recipe)[stage] for recipe in own])}{note}")
    return "\n".join([*parts, _presets(), _released(), _methods()])


def _schedules() -> str:
    """What the schedules other than the published one are, and which recipes have them by default."""
    usual = "; ".join(
        f"`{name}` has `--schedule {schedule}` by default: {made.epochs} epochs with a learning rate up to {_shown(made.learning_rate)}"
        for name, schedule in DEFAULT_SCHEDULES.items()
        if (made := recipes.recipe(name).squeeze)
    )
    return (
        "So it is published: `--schedule cosine`. `--schedule fast` takes a tenth of the epochs, `--schedule short` a fiftieth, both with\n"
        f"Nesterov's momentum, twice the learning rate and label smoothing ([usage](usage.md#training)).\n{usual}, since\n"
        "[its students are better](results/cifar10/README.md#a-short-and-a-long-teacher). The `-released` recipes train as published."
    )


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
    rows = [(f"`{field}`", *("by rule" if each[field] is None else _shown(each[field]) for each in settings)) for field in differing]
    return _table([("field", *names), *rows]) + f"\nAll: {', '.join(same)}.\n"


def _presets() -> str:
    """One table per data set, with a column per preset, and how each differs from what was published."""
    parts = [_PRESETS_HEAD]
    for name in ("cifar10", "cifar100", "tiny", "imagenet"):
        settings = [asdict(preset(RECIPES[name])) for preset in PRESETS.values()]
        parts.append(f"### {name}\n\n{_stage(list(PRESETS), settings)}")
    notes = "\n".join(f"- `{name}`: {note}" for name, note in PRESET_NOTES.items())
    return "\n".join([*parts, f"### Where the presets differ from what was published\n\n{_PRESETS_ALL}\n\n{notes}\n"])


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

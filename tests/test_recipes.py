"""The published settings, and the page of the documentation that is made from them."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dwa_fast import InputError, SqueezeConfig
from dwa_fast.recipes import METHODS, PRESETS, RECIPES, nearest_preset, preset_text, recipe

ROOT = Path(__file__).resolve().parents[1]
CIFAR = {"iterations": 1000, "batch_size": 100, "learning_rate": 0.25, "lambda_mean": 0.01, "lambda_var": 0.11, "rho": 0.015, "steps": 12}
ROLL, CROP = {"view": "roll", "jitter": 4}, {"view": "crop", "crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3), "flip": 0.5}
TINY = {**CIFAR, **CROP, "iterations": 2000, "learning_rate": 0.1, "jitter": 4}
IMAGENET = {**CIFAR, **CROP, "iterations": 2000, "lambda_var": 0.02, "jitter": 32}
PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar10": {**CIFAR, **ROLL},
    "cifar100": {**CIFAR, **ROLL},
    "tiny": TINY,
    "tiny-released": {**TINY, "batch_size": 200},
    "imagenet": IMAGENET,
    "imagenet-released": {**IMAGENET, "steps": 15},
}
STUDENTS: dict[str, dict[str, Any]] = {
    "cifar100": {"epochs": 400, "batch_size": 128, "optimiser": "adamw", "learning_rate": 1e-3, "mixing": "mixup", "temperature": 30.0},
    "cifar100-released": {"epochs": 400, "teacher_mode": "train"},
    "tiny": {"epochs": 200, "batch_size": 128, "optimiser": "sgd", "warmup_epochs": 5, "scale_loss": True, "temperature": 20.0},
    "tiny-released": {"epochs": 200, "batch_size": 64},
    "imagenet": {"epochs": 300, "batch_size": 128, "decay_vectors": False, "mixing": "cutmix", "temperature": 20.0, "scale_loss": False},
}
NOISE = {"ascent": "none", "rho": 0.0, "initial": "noise", "lambda_mean": 0.01, "lambda_var": 0.01}
CHANGES: dict[str, dict[str, Any]] = {
    "dwa": {},
    "sre2l": NOISE,
    "cda": {**NOISE, "view": "crop", "curriculum": "cosine", "milestone": 1.0},
    "real-start": {"ascent": "none", "rho": 0.0},
    "random-step": {"ascent": "random"},
    "rded": {"ascent": "none", "rho": 0.0, "initial": "patches", "iterations": 0},
    "coupled": {"lambda_mean": 0.11},
    "sre2l++": {**NOISE, "initial": "patches", "view": "crop", "iterations": 4000},
    "fadrm": {**NOISE, "initial": "patches", "view": "crop", "iterations": 2000, "stage_sizes": (32, 32, 32, 32)},
}
CHANGES["delt"] = {**CHANGES["cda"], "initial": "median", "jitter": 0, "iterations": 4000, "rounds": 8, "batch_ipc": None}
CHANGES["lpld"] = {**NOISE, "view": "crop", "iterations": 4000, "statistics": "class", "batch_ipc": None}
CHANGES["fadrm+"] = CHANGES["fadrm"]
CHANGES["cv-dd"] = {**CHANGES["sre2l++"], "teachers_together": 2, "teacher_turns": "index"}
CHANGES["dwa+"] = {**CHANGES["fadrm"], "ascent": "directed", "rho": 0.015}


# Students of the family, ResNet-18, 10 images per class: released programs and papers (LINs-lab/RDED, shaoshitong/EDC, Jiacheng8/FADRM and
# CV-DD, RD3, ArmandXiao/Rethinking-Dataset-Compression, NUS-HPC-AI-Lab/DD-Ranking).
FAMILY = {
    "optimiser": "adamw",
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "decay_vectors": False,
    "mixing": "cutmix",
    "mixing_alpha": 1.0,
}
FAMILY |= {"epochs": 300, "warmup_epochs": 0, "labels": "soft", "temperature": 20.0, "scale_loss": False, "flip": 0.5, "students": 3}
SMALL = {"augmentation": "none", "shuffle_cells": 1}
LARGE = {"augmentation": "resized-crop", "shuffle_cells": 2, "smallest_crop": 0.5}
EDC = {"loss": "mse", "hard_weight": 0.025, "weight_ema": 0.99, "cosine_stretch": 2.0, "augmentation": "resized-crop", "rand_augment": 2}
HALVES = {"batch_size": 16, "accumulation": 2, "teacher_mode": "train", "augmentation": "resized-crop", "smallest_crop": 0.08}
PLAIN = {"augmentation": "resized-crop", "smallest_crop": 0.08, "teacher_mode": "eval", "loss": "kl", "weight_ema": 0.0, "accumulation": 1}
PRESET_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "rded": {
        "cifar10": {**SMALL, "cosine_stretch": 2.0, "batch_size": None},
        "tiny": {**SMALL, "cosine_stretch": 2.0, "batch_size": 100},
        "imagenet": {**LARGE, "cosine_stretch": 2.0, "batch_size": None},
        "folder": {**LARGE, "cosine_stretch": 2.0, "batch_size": None},
    },
    "edc": {
        "cifar10": {**EDC, "epochs": 1000, "batch_size": 25, "smallest_crop": 0.08},
        "cifar100": {**EDC, "epochs": 1000, "batch_size": 50, "smallest_crop": 0.5},
        "tiny": {**EDC, "batch_size": 100, "smallest_crop": 0.5},
        "imagenet": {**EDC, **LARGE, "batch_size": 100, "rand_augment": 0},
    },
    "fadrm": {
        "cifar100": {**HALVES, "epochs": 1000, "cosine_stretch": 2.0},
        "tiny": {**HALVES, "cosine_stretch": 2.0, "teacher_mode": "eval"},
        "imagenet": {**HALVES, "cosine_stretch": 2.0},
    },
    "cv-dd": {
        "cifar10": {**HALVES, "cosine_stretch": 1.0},
        "cifar100": {**HALVES, "cosine_stretch": 2.0},
        "tiny": {**HALVES, "cosine_stretch": 1.0},
        "imagenet": {**HALVES, "cosine_stretch": 2.0},
    },
    "rd3": {
        name: {**PLAIN, "epochs": 400, "batch_size": 50, "cosine_stretch": 1.0} for name in ("cifar10", "cifar100", "tiny", "imagenet")
    },
    "rethinkdc": {"imagenet": {**PLAIN, "batch_size": 128, "cosine_stretch": 1.0}},
    "ddranking": {name: {**PLAIN, "batch_size": 128, "decay_vectors": True, "students": 5} for name in ("cifar10", "tiny", "imagenet")},
}


def documentation() -> Any:
    """The program that writes the page."""
    spec = importlib.util.spec_from_file_location("make_recipes", ROOT / "docs" / "make_recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PUBLISHED)
def test_synthesis_is_as_published(name: str) -> None:
    found = asdict(recipe(name).synthesis)
    assert {field: found[field] for field in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", STUDENTS)
def test_validation_is_as_published(name: str) -> None:
    found = asdict(recipe(name).validation)
    assert {field: found[field] for field in STUDENTS[name]} == STUDENTS[name]


def test_a_released_recipe_shares_all_else_with_the_paper() -> None:
    paper, released = recipe("imagenet"), recipe("imagenet-released")
    assert (released.data, released.squeeze, released.validation) == (paper.data, paper.squeeze, paper.validation)
    assert asdict(released.synthesis) == {**asdict(paper.synthesis), "steps": 15}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_this_and_nothing_else(method: str) -> None:
    assert asdict(recipe("cifar100", method=method).synthesis) == {**asdict(recipe("cifar100").synthesis), **CHANGES[method]}


def test_stages_of_fadrm_by_size() -> None:
    """Sizes, iterations and learning rates of the released commands (recover/scripts of Jiacheng8/FADRM)."""
    tiny, imagenet = (recipe(name, method="fadrm").synthesis for name in ("tiny", "imagenet"))
    assert (tiny.stage_sizes, tiny.iterations, tiny.learning_rate, tiny.jitter) == ((64, 64, 64, 64), 2000, 0.01, 4)
    assert (imagenet.stage_sizes, imagenet.iterations, imagenet.learning_rate, imagenet.jitter) == ((200, 224, 200, 224), 2000, 0.25, 32)
    assert recipe("folder", method="fadrm", size=112).synthesis.stage_sizes == (100, 112, 100, 112)
    assert [recipe("tiny", method=method).synthesis.learning_rate for method in ("sre2l++", "fadrm+", "dwa+")] == [0.25] * 3
    assert recipe("digits", method="fadrm").synthesis.iterations == recipe("digits").synthesis.iterations


def test_fast_takes_a_quarter_of_the_iterations_and_changes_nothing_else() -> None:
    for name, method, iterations in (("cifar10", "dwa", 250), ("imagenet", "fadrm", 500), ("tiny", "delt", 1000), ("cifar100", "rded", 0)):
        usual, fast = recipe(name, method=method), recipe(name, method=method, fast=True)
        assert fast == replace(usual, synthesis=replace(usual.synthesis, iterations=iterations))
    assert recipe("cifar10", fast=True, iterations=7).synthesis.iterations == 7


def test_teachers_of_cifar10_are_trained_shortly_unless_it_is_asked_for_otherwise() -> None:
    published = {"schedule": "cosine", "epochs": 200, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128}
    for made in (recipe("cifar10", schedule="cosine"), recipe("cifar10-released"), recipe("cifar100"), RECIPES["cifar10"]):
        assert asdict(made.squeeze).items() >= published.items()
    short, fast = recipe("cifar10").squeeze, recipe("cifar10", schedule="fast").squeeze
    assert asdict(short).items() >= {**published, "schedule": "short", "epochs": 4, "learning_rate": 0.2}.items()
    assert fast == replace(short, schedule="fast", epochs=20)
    assert recipe("tiny", schedule="short").squeeze.epochs == 2
    assert recipe("digits", schedule="short").squeeze.epochs == 1
    assert recipe("cifar10", squeeze={"epochs": 7}).squeeze == replace(short, epochs=7)
    assert recipe("cifar10").synthesis == RECIPES["cifar10"].synthesis


def test_a_schedule_among_the_settings_of_the_training_brings_its_epochs_and_rate() -> None:
    for name, schedule in (("cifar10", "cosine"), ("cifar100", "fast"), ("digits", "short")):
        assert recipe(name, squeeze={"schedule": schedule}).squeeze == recipe(name, schedule=schedule).squeeze
    assert recipe("cifar10", squeeze={"schedule": "cosine", "epochs": 7}).squeeze == replace(RECIPES["cifar10"].squeeze, epochs=7)
    with pytest.raises(InputError, match="unknown schedule 'slow'; known: cosine, fast, short"):
        recipe("cifar10", squeeze={"schedule": "slow"})
    assert recipe("cifar10", schedule="fast", squeeze={"schedule": "fast"}) == recipe("cifar10", schedule="fast")
    for training in ({"schedule": "fast"}, SqueezeConfig(schedule="fast")):
        with pytest.raises(InputError, match="schedule is 'cosine', that of squeeze is 'fast'; name one of them"):
            recipe("cifar10", schedule="cosine", squeeze=training)


def test_single_settings_of_the_trainings_can_be_changed() -> None:
    usual = recipe("folder", method="sre2l")
    changed = recipe("folder", method="sre2l", squeeze={"epochs": 3}, validation={"students": 1, "batch_size": 20})
    assert changed == replace(
        usual, squeeze=replace(usual.squeeze, epochs=3), validation=replace(usual.validation, students=1, batch_size=20)
    )
    assert recipe("folder", schedule="fast", squeeze={"epochs": 3}).squeeze.schedule == "fast"
    assert recipe("folder", preset="rd3", validation={"epochs": 5}).validation == replace(
        recipe("folder", preset="rd3").validation, epochs=5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.1}, "'lr' is no setting of the synthesis; did you mean learning_rate?"),
        ({"iteration": 5}, "'iteration' is no setting of the synthesis; did you mean iterations?"),
        (
            {"epochs": 3},
            "'epochs' is no setting of the synthesis; it is one of squeeze and of validation: recipe(…, squeeze=",
        ),
        (
            {"temperature": 3},
            "'temperature' is no setting of the synthesis; it is one of validation: recipe(…, validation={",
        ),
        ({"seed": 3}, "'seed' is no setting of the synthesis; it is an argument of synthesize or distill"),
        ({"squeeze": {"epoch": 3}}, "'epoch' is no setting of the squeeze; did you mean epochs?"),
        ({"validation": 3}, "validation must be a ValidationConfig, or in recipe() a dictionary of its fields, got 3"),
    ],
    ids=str,
)
def test_a_setting_that_does_not_exist_is_named_with_the_one_that_is_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        recipe("folder", **changes)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_with_every_method(name: str) -> None:
    for method in METHODS:
        assert recipe(name, method=method).name == name


@pytest.mark.parametrize(("preset", "name"), [(preset, name) for preset, each in PRESET_VALUES.items() for name in each])
def test_presets_train_students_as_published(preset: str, name: str) -> None:
    found, expected = asdict(recipe(name, preset=preset).validation), {**FAMILY, **PRESET_VALUES[preset][name]}
    assert {field: found[field] for field in expected} == expected


def test_a_preset_goes_by_the_size_of_the_images() -> None:
    small, large = recipe("folder", preset="rded", size=32), recipe("folder", preset="rded")
    assert (small.validation.augmentation, small.validation.shuffle_cells) == ("none", 1)
    assert (large.validation.augmentation, large.validation.shuffle_cells) == ("resized-crop", 2)
    assert [nearest_preset(each) for each in (small, large)] == [("rded", {})] * 2


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_with_every_preset(name: str) -> None:
    """Digits keep their views, since no digit may be mirrored; what is left of a recipe does not change."""
    for preset in PRESETS:
        chosen = recipe(name, preset=preset)
        assert replace(chosen, validation=recipe(name).validation) == recipe(name)
        found, changes = nearest_preset(chosen)
        assert preset in found.split(" = ") or PRESETS[preset](RECIPES[name]) == RECIPES[name].validation
        assert changes == {}
        if name == "digits":
            views = ("augmentation", "padding", "flip", "shuffle_cells", "rand_augment", "epochs")
            assert [getattr(chosen.validation, each) for each in views] == ["pad-crop", 2, 0.0, 1, 0, 200]


def test_the_nearest_preset_and_its_changes() -> None:
    edc = recipe("cifar10", preset="edc")
    changed = replace(edc, validation=replace(edc.validation, epochs=7, batch_size=None, students=1, precision="bf16"))
    assert nearest_preset(edc) == ("edc", {})
    assert nearest_preset(changed) == ("edc", {"epochs": 7, "batch_size": None})
    assert preset_text(changed) == "preset edc (epochs 7, batch_size None)"
    assert nearest_preset(recipe("imagenet", preset="cv-dd")) == ("fadrm = cv-dd", {})  # the same settings
    assert nearest_preset(recipe("imagenet", preset="rethinkdc")) == ("paper", {})
    few = replace(recipe("cifar10"), validation=replace(recipe("cifar10").validation, epochs=7))
    assert (nearest_preset(few), preset_text(few)) == (("paper", {"epochs": 7}), "")


def test_the_page_tells_how_each_preset_differs_from_what_was_published() -> None:
    assert set(documentation().PRESET_NOTES) == set(PRESETS) - {"paper"}


def test_the_page_is_what_the_code_says() -> None:
    module = documentation()
    written = module.TARGET.read_text(encoding="utf-8")
    assert written == module.page(), "docs/recipes.md is stale: python docs/make_recipes.py writes it again"


def test_the_page_would_be_stale_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    module = documentation()
    monkeypatch.setitem(RECIPES, "tiny", recipe("tiny", method="random-step"))
    assert module.TARGET.read_text(encoding="utf-8") != module.page()

"""The published settings, and the page of the documentation that is made from them."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dwa_fast.recipes import METHODS, RECIPES, recipe

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
CHANGES["fadrm+"] = CHANGES["fadrm"]
CHANGES["cv-dd"] = {**CHANGES["sre2l++"], "teachers_together": 2, "teacher_turns": "index"}
CHANGES["dwa+"] = {**CHANGES["fadrm"], "ascent": "directed", "rho": 0.015}


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


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_with_every_method(name: str) -> None:
    for method in METHODS:
        assert recipe(name, method=method).name == name


def test_the_page_is_what_the_code_says() -> None:
    module = documentation()
    written = module.TARGET.read_text(encoding="utf-8")
    assert written == module.page(), "docs/recipes.md is stale: python docs/make_recipes.py writes it again"


def test_the_page_would_be_stale_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    module = documentation()
    monkeypatch.setitem(RECIPES, "tiny", recipe("tiny", method="random-step"))
    assert module.TARGET.read_text(encoding="utf-8") != module.page()

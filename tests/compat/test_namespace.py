"""What get_images makes of the namespaces of the published scripts, whole or with fields missing."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
from torch import nn

from dwa_fast import InputError, SynthesisConfig, recipe
from dwa_fast.compat.namespace import Recovery, read_namespace
from dwa_fast.recipes import RECIPES

EVERYWHERE = {"exp_name": "x", "syn_data_path": "syn", "arch_name": "resnet18", "verifier": False, "ipc_start": 0, "ipc_end": 50}
SRE2L_PARSER = {**EVERYWHERE, "store_best_images": True, "batch_size": 100, "lr": 0.25, "r_bn": 0.01, "first_bn_multiplier": 10.0}
DWA_PARSER = {**SRE2L_PARSER, "rho": 0.015, "init_path": "init", "verifier_arch": None}


def teacher(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Linear(8, classes))


def read(classes: int = 1000, name: str | None = None, **fields: Any) -> Recovery:
    return read_namespace(Namespace(**fields), teacher(classes), recipe=name, backend="auto", precision="auto", device="auto")


# The released commands, and the recipe that each of them is.
COMMANDS: dict[str, tuple[int, dict[str, Any], SynthesisConfig]] = {
    "DWA, CIFAR-100": (
        100,
        {**DWA_PARSER, "dataset": "cifar100", "iteration": 1000, "jitter": 4, "steps": 12, "r_var": 11.0},
        recipe("cifar100"),
    ),
    "DWA, CIFAR-10": (
        10,
        {**DWA_PARSER, "dataset": "cifar10", "iteration": 1000, "jitter": 4, "steps": 12, "r_var": 11.0},
        recipe("cifar10"),
    ),
    "DWA, Tiny-ImageNet": (
        200,
        {**DWA_PARSER, "dataset": "tiny", "batch_size": 200, "iteration": 2000, "lr": 0.1, "jitter": 4, "steps": 12, "r_var": 11.0},
        recipe("tiny-released"),
    ),
    "DWA, ImageNet": (
        1000,
        {**DWA_PARSER, "dataset": "imagenet", "iteration": 2000, "jitter": 32, "steps": 15, "r_var": 2.0, "arch_path": ""},
        recipe("imagenet-released"),
    ),
    "SRe2L, ImageNet": (
        1000,
        {**SRE2L_PARSER, "iteration": 4000, "jitter": 32, "tv_l2": 0.0, "l2_scale": 0.0, "verifier_arch": "mobilenet_v2"},
        recipe("imagenet", method="sre2l", iterations=4000),
    ),
    "CDA, ImageNet": (
        1000,
        {**SRE2L_PARSER, "iteration": 4000, "jitter": 32, "easy2hard_mode": "cosine", "milestone": 1.0, "G": "-1", "wandb_key": ""},
        recipe("imagenet", method="cda", iterations=4000),
    ),
}


@pytest.mark.parametrize(("classes", "fields", "expected"), COMMANDS.values(), ids=COMMANDS.keys())
def test_released_commands_are_the_recipes(
    classes: int, fields: dict[str, Any], expected: SynthesisConfig, caplog: pytest.LogCaptureFixture
) -> None:
    found = read(classes, **fields)
    assert changes(expected, found.config) <= {"steps", "milestone", "lambda_var"}
    assert found.config.lambda_var == pytest.approx(expected.lambda_var)
    assert found.config.milestone == expected.milestone or found.config.curriculum == "none"
    assert found.config.steps == expected.steps or not found.config.adjusts
    assert (found.classes, str(found.output), str(found.init_path)) == (classes, "syn", fields.get("init_path", "None"))
    assert not caplog.records


def changes(one: SynthesisConfig, other: SynthesisConfig) -> set[str]:
    return {name for name, value in vars(one).items() if vars(other)[name] != value}


# Empty namespaces but for what tells the code bases apart: all else has the default of its parser.
DEFAULTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "SRe2L": (1000, {}, {"lambda_mean": 0.05, "lambda_var": 0.05, "jitter": 32, "view": "crop", "initial": "noise"}),
    "SRe2L, Tiny-ImageNet": (200, {}, {"jitter": 4, "view": "crop"}),
    "SRe2L, CIFAR-100": (100, {}, {"jitter": 4, "view": "roll", "mean": RECIPES["cifar10"].synthesis.mean}),
    "CDA": (1000, {"easy2hard_mode": "linear"}, {"curriculum": "linear", "milestone": 0.0, "lambda_var": 0.05, "tv_l2": 0.0}),
    "CDA, ImageNet-21K": (10450, {"easy2hard_mode": "cosine"}, {"mean": (0.0,) * 3, "std": (1.0,) * 3, "jitter": 32}),
    "DWA, CIFAR-100": (
        100,
        {"init_path": "x", "dataset": "cifar100", "steps": 1},
        {"rho": 0.05, "steps": 1, "lambda_var": 0.05, "mean": RECIPES["cifar100"].synthesis.mean, "initial": "real"},
    ),
    "DWA, Tiny-ImageNet": (200, {"init_path": "x", "dataset": "tiny", "steps": 1}, {"rho": 0.015, "lambda_var": 0.05}),
    "DWA, ImageNet": (1000, {"init_path": "x", "steps": 1}, {"rho": 0.05, "lambda_var": 0.01, "jitter": 32, "ascent": "directed"}),
}


@pytest.mark.parametrize(("classes", "fields", "expected"), DEFAULTS.values(), ids=DEFAULTS.keys())
def test_missing_fields_have_the_defaults_of_their_code_base(classes: int, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    found = read(classes, **fields)
    common = {"iterations": 1000, "batch_size": 100, "learning_rate": 0.1, "first_layer_weight": 10.0, "l2_scale": 0.0}
    assert {name: vars(found.config)[name] for name in {**common, **expected}} == {**common, **expected}
    assert (found.output, found.verifier, found.verifier_arch) == (None, False, "mobilenet_v2")


def test_a_recipe_serves_data_sets_that_the_code_bases_do_not_know() -> None:
    found = read(37, "imagenet")
    assert (found.classes, found.size, found.config.jitter) == (None, 224, 32)


def test_priors_are_honoured() -> None:
    found = read(tv_l2=1e-4, l2_scale=1e-5).config
    assert (found.tv_l2, found.l2_scale) == (1e-4, 1e-5)


@pytest.mark.parametrize(
    ("classes", "fields", "message"),
    [
        (37, {}, "cannot tell the data set from a teacher of 37 classes: name it in args.dataset or pass recipe"),
        (10, {"dataset": "svhn"}, "unknown args.dataset 'svhn'; known: cifar10, cifar100, tiny, imagenet"),
    ],
)
def test_unknown_data_sets_are_refused(classes: int, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(classes, **fields)


def test_a_teacher_without_a_linear_layer_needs_a_name() -> None:
    with pytest.raises(InputError, match="a teacher of no known number of classes"):
        read_namespace(Namespace(), nn.Conv2d(3, 5, 1), recipe=None, backend="auto", precision="auto", device="auto")

"""What get_images makes of the namespaces of the published scripts, whole or with fields missing."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from dwa_fast import InputError, SynthesisConfig, recipe
from dwa_fast.compat.fields import fields_of, log_once
from dwa_fast.compat.namespace import Recovery, read_namespace
from dwa_fast.recipes import RECIPES, Recipe

EVERYWHERE = {"exp_name": "x", "syn_data_path": "syn", "arch_name": "resnet18", "verifier": False, "ipc_start": 0, "ipc_end": 50}
SRE2L_PARSER = {**EVERYWHERE, "store_best_images": True, "batch_size": 100, "lr": 0.25, "r_bn": 0.01, "first_bn_multiplier": 10.0}
DWA_PARSER = {**SRE2L_PARSER, "rho": 0.015, "init_path": "init", "verifier_arch": None}


def teacher(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Linear(8, classes))


def read(classes: int = 1000, name: str | None = None, **fields: Any) -> Recovery:
    return read_namespace(Namespace(**fields), teacher(classes), recipe=name, backend="auto", precision="auto", device="auto")


# The released commands, and the recipe that each of them is.
COMMANDS: dict[str, tuple[int, dict[str, Any], Recipe]] = {
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


@pytest.mark.parametrize(("classes", "fields", "whole"), COMMANDS.values(), ids=COMMANDS.keys())
def test_released_commands_are_the_recipes(classes: int, fields: dict[str, Any], whole: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    found, expected = read(classes, **fields), whole.synthesis
    assert changes(expected, found.config) <= {"steps", "milestone", "lambda_var"}
    assert (found.normalisation.mean, found.normalisation.std) == (whole.data.mean, whole.data.std)
    assert found.config.lambda_var == pytest.approx(expected.lambda_var)
    assert found.config.milestone == expected.milestone or found.config.curriculum == "none"
    assert found.config.steps == expected.steps or not found.config.adjusts
    assert (found.classes, str(found.output), str(found.init_path)) == (classes, "syn", fields.get("init_path", "None"))
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def changes(one: SynthesisConfig, other: SynthesisConfig) -> set[str]:
    return {name for name, value in vars(one).items() if vars(other)[name] != value}


# Empty namespaces but for what tells the code bases apart: all else has the default of its parser.
DEFAULTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "SRe2L": (1000, {}, {"lambda_mean": 0.05, "lambda_var": 0.05, "jitter": 32, "view": "crop", "initial": "noise"}),
    "SRe2L, Tiny-ImageNet": (200, {}, {"jitter": 4, "view": "crop"}),
    "SRe2L, CIFAR-100": (100, {}, {"jitter": 4, "view": "roll", "mean": RECIPES["cifar10"].data.mean}),
    "CDA": (1000, {"easy2hard_mode": "linear"}, {"curriculum": "linear", "milestone": 0.0, "lambda_var": 0.05, "tv_l2": 0.0}),
    "CDA, ImageNet-21K": (10450, {"easy2hard_mode": "cosine"}, {"mean": (0.0,) * 3, "std": (1.0,) * 3, "jitter": 32}),
    "DWA, CIFAR-100": (
        100,
        {"init_path": "x", "dataset": "cifar100", "steps": 1},
        {"rho": 0.05, "steps": 1, "lambda_var": 0.05, "mean": RECIPES["cifar100"].data.mean, "initial": "real"},
    ),
    "DWA, Tiny-ImageNet": (200, {"init_path": "x", "dataset": "tiny", "steps": 1}, {"rho": 0.015, "lambda_var": 0.05}),
    "DWA, ImageNet": (1000, {"init_path": "x", "steps": 1}, {"rho": 0.05, "lambda_var": 0.01, "jitter": 32, "ascent": "directed"}),
}


@pytest.mark.parametrize(("classes", "fields", "expected"), DEFAULTS.values(), ids=DEFAULTS.keys())
def test_missing_fields_have_the_defaults_of_their_code_base(classes: int, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    found = read(classes, **fields)
    common = {"iterations": 1000, "batch_size": 100, "learning_rate": 0.1, "first_layer_weight": 10.0, "l2_scale": 0.0}
    settings = vars(found.config) | vars(found.normalisation)
    assert {name: settings[name] for name in {**common, **expected}} == {**common, **expected}
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
        (10, {"dataset": "svhn"}, "unknown args.dataset 'svhn'; known: cifar10, cifar100, tiny, imagenet, .*; for others pass recipe=…"),
    ],
)
def test_unknown_data_sets_are_refused(classes: int, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(classes, **fields)


def test_a_teacher_without_a_linear_layer_needs_a_name() -> None:
    with pytest.raises(InputError, match="a teacher of no known number of classes"):
        read_namespace(Namespace(), nn.Conv2d(3, 5, 1), recipe=None, backend="auto", precision="auto", device="auto")


# Every kind of object that scripts call args.


class Mapped(MutableMapping[str, Any]):
    """A mapping whose attributes are its own affairs, as OmegaConf's DictConfig is one."""

    def __init__(self, **content: Any) -> None:
        self._content, self.parent = content, "its own"

    def __getitem__(self, name: str) -> Any:
        return self._content[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._content[name] = value

    def __delitem__(self, name: str) -> None:
        del self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


@dataclass(slots=True)
class Slots:
    lr: float = 0.3
    dataset: str = "imagenet"
    init_path: str | None = None


class Tuple(NamedTuple):
    lr: float = 0.3
    dataset: str = "imagenet"


class OfClass:
    lr = 0.3
    dataset = "imagenet"

    def describe(self) -> str:
        return "a method is no field"


class Keyed:
    """As ml_collections' ConfigDict: keys and items, but no Mapping."""

    def keys(self) -> list[str]:
        return ["lr", "dataset"]

    def __getitem__(self, name: str) -> Any:
        return {"lr": 0.3, "dataset": "imagenet"}[name]


KINDS = {
    "argparse": Namespace(lr=0.3, dataset="imagenet", func=print, init_path=None),
    "SimpleNamespace": SimpleNamespace(lr=0.3, dataset="imagenet"),
    "dict": {"lr": 0.3, "dataset": "imagenet"},
    "mapping": Mapped(lr=0.3, dataset="imagenet"),
    "keys": Keyed(),
    "dataclass with slots": Slots(),
    "named tuple": Tuple(),
    "attributes of the class": OfClass(),
    "a class": OfClass,
    "scalars of NumPy and PyTorch": Namespace(lr=np.float64(0.3), dataset="imagenet", iteration=torch.tensor(1000), jitter=np.int64(32)),
}


@pytest.mark.parametrize("args", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_args(args: Any) -> None:
    found = read_namespace(args, teacher(1000), recipe=None, backend="auto", precision="auto", device="auto")
    assert (found.code_base, found.config.learning_rate, found.size) == ("sre2l", 0.3, 224)
    assert {type(value) for value in (found.config.learning_rate, found.config.iterations)} == {float, int}


@pytest.mark.parametrize("args", [5, "args", ["--lr", "0.1"], (1, 2), np.zeros(3), torch.zeros(3), nn.Linear(2, 2), None, Path()])
def test_what_is_no_namespace(args: Any) -> None:
    with pytest.raises(TypeError, match="args must be a namespace such as argparse gives, or a mapping, got"):
        read_namespace(args, teacher(1000), recipe=None, backend="auto", precision="auto", device="auto")


def test_fields_that_are_none_or_private_are_missing() -> None:
    assert fields_of({"rho": None, "_flags": 1, "lr": 0.1}) == {"lr": 0.1}


# Namespaces of descendants. Those whose loop is another method have a field that says so.

CVDD = {
    **SRE2L_PARSER,
    "dataset_name": "imagenet-nette",
    "mean_norm": [0.485, 0.456, 0.406],
    "std_norm": [0.229, 0.224, 0.225],
    "ncls": 10,
    "input_size": 224,
    "jitter": 32,
    "apply_data_augmentation": True,
    "initialisation_method": "Guassian",
    "patch_diff": "medium",
    "patch_dir": None,
    "model_setting": 0,
    "selected_size": 1,
    "voter_type": "equal",
    "sre2l_model": "ResNet18",
    "model_choice": ["ResNet18"],
    "model_prior_weight_dict": {"ResNet18": 62.4},
    "weight_temperature": 5,
    "model_pool_dir": "pool",
    "pretrained_model_type": "offline",
    "start_index": 0,
    "store_initialised_images": False,
    "initialisation_dir": None,
    "verifier_weight_path": None,
    "iteration": 4000,
}
GUARD = {
    **SRE2L_PARSER,
    "dataset": "imagenet",
    "image_size": 224,
    "num_classes": 1000,
    "real_data_path": "",
    "ipc": 50,
    "ipc_id": 0,
    "model": "resnet18",
    "ckpt_path": "",
    "wb": False,
    "weight_wb": False,
    "per_class_bn": False,
    "cda": False,
    "easy2hard_mode": "cosine",
    "milestone": 1.0,
    "G": "-1",
    "jitter": 32,
}
SCDD = {**SRE2L_PARSER, "arch_path": "x", "jitter": 4, "GPU_ID": "0", "tv_l2": 0.0, "l2_scale": 0.0}


def test_the_namespace_of_cvdd_describes_its_pixels() -> None:
    """Ten classes, of ImageNet's pixels: those fields count, and the view that its flag asks for."""
    found = read(10, **CVDD)
    expected = recipe("imagenet", method="sre2l", iterations=4000)
    assert changes(expected.synthesis, found.config) <= {"steps", "milestone"}
    assert (found.size, found.classes, found.normalisation.mean) == (224, 10, expected.data.mean)
    small = read(10, **{**CVDD, "dataset_name": "cifar10", "std_norm": [0.2470, 0.2435, 0.2616], "input_size": 32, "jitter": 4})
    assert (small.size, small.config.view, small.normalisation.std) == (32, "crop", (0.2470, 0.2435, 0.2616))
    assert read(10, **{**CVDD, "apply_data_augmentation": False}).config.view == "roll"


def test_the_namespace_of_guard_says_itself_whether_there_is_a_curriculum() -> None:
    assert (read(**GUARD).code_base, read(**GUARD).config.curriculum) == ("sre2l", "none")
    on = read(**{**GUARD, "cda": True})
    assert (on.code_base, on.config.curriculum, on.config.milestone) == ("cda", "cosine", 1.0)


def test_the_namespace_of_scdd() -> None:
    found = read(100, **SCDD)
    assert (found.size, found.config.view, found.normalisation.mean) == (32, "roll", RECIPES["cifar10"].data.mean)


REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "unknown": (
        1000,
        {"K": 700, "loss_threshold": 0.7},
        r"does not know args.K, args.loss_threshold, which .* pass ignore=\('K', 'loss_threshold'\)",
    ),
    "one unknown": (1000, {"gamma": 3}, r"does not know args.gamma, which could change the images: .* ignore=\('gamma',\)"),
    "committee": (
        1000,
        {**CVDD, "ncls": 1000, "selected_size": 2},
        "args.selected_size is 2, which is another method; get_images does what 1 stands",
    ),
    "patches": (10, {**CVDD, "initialisation_method": "Patches"}, "args.initialisation_method is 'Patches', which is another method"),
    "barycentres": (1000, {**GUARD, "wb": True}, "args.wb is True, which is another method"),
    "curriculum without crops": (
        10,
        {**GUARD, "dataset": "cifar10", "image_size": 32, "num_classes": 10, "cda": True},
        "loop with crops, but the view",
    ),
    "crops without curriculum": (
        10,
        {**GUARD, "dataset": "cifar10", "image_size": 32, "num_classes": 10},
        "args.easy2hard_mode belongs to a loop with",
    ),
    "CDA on CIFAR": (
        100,
        {"easy2hard_mode": "cosine"},
        "args.easy2hard_mode belongs to a loop with crops, but the view of cifar100, guessed",
    ),
    "priors of SCDD": (100, {**SCDD, "tv_l2": 1e-4}, "args.tv_l2 is 0.0001, but no published loop with the view of cifar100"),
    "DWA and CDA": (1000, {"rho": 0.1, "init_path": "x", "easy2hard_mode": "cosine"}, "args.rho and args.steps are DWA's"),
    "start without ascent": (
        1000,
        {"init_path": "x"},
        "args.init_path without args.rho: DWA's loop, which starts from real images, has both",
    ),
    "two sizes": (1000, {"input_size": 224, "image_size": 64}, "args.input_size is 224, but args.image_size is 64; they must be the same"),
    "size": (1000, {"input_size": 0}, "args.input_size must be an integer of at least 1, got 0"),
    "mean": (1000, {"mean_norm": [0.5, 0.5]}, r"args.mean_norm must hold one number per channel, such as .*, got \[0.5, 0.5\]"),
    "std": (1000, {"std_norm": [0.2, 0.0, 0.2]}, "args.std_norm must be a finite number above 0, got 0.0"),
    "flag": (1000, {"cda": "yes"}, "args.cda must be True or False, got 'yes'"),
    "seed": (1000, {"seed": -1}, "args.seed must be an integer of at least 0, got -1"),
    "imagenette": (10, {"dataset": "imagenette"}, "unknown args.dataset 'imagenette'; known: .* recipe='folder' for 224 pixels"),
    "guess against size": (
        10,
        {"input_size": 224},
        "a teacher of 10 classes suggests cifar10, 32 pixels, but args.input_size is 224: name the data set",
    ),
    "guess against mean": (
        100,
        {"mean_norm": [0.485, 0.456, 0.406]},
        "a teacher of 100 classes suggests cifar100, 32 pixels, but args.mean_norm is",
    ),
    "guess against classes": (10, {"ncls": 100}, "suggests cifar10, 32 pixels, but args.ncls is 100"),
    "guess against jitter": (10, {"jitter": 32}, "suggests cifar10, 32 pixels, but args.jitter is 32"),
    "guess of ImageNet": (1000, {"input_size": 64}, "suggests imagenet, 224 pixels, but args.input_size is 64"),
}


@pytest.mark.parametrize(("classes", "fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_understood_is_refused(classes: int, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(classes, **fields)


def test_a_guess_heeds_the_first_convolution() -> None:
    """Imagenette and CUB have as many classes as CIFAR-10 and Tiny-ImageNet; their teachers are made for larger images."""
    for classes, size in ((10, 32), (100, 32), (200, 64)):
        for kernel, stride in ((7, 2), (3, 2)):
            network = nn.Sequential(nn.Conv2d(3, 4, kernel, stride), teacher(classes))
            message = (
                f"{size} pixels, but its first convolution, {kernel} × {kernel} with stride 2, is made for larger images: name the data set"
            )
            with pytest.raises(InputError, match=message):
                read_namespace(Namespace(), network, recipe=None, backend="auto", precision="auto", device="auto")
        network = nn.Sequential(nn.Conv2d(3, 4, 3), teacher(classes))
        assert read_namespace(Namespace(), network, recipe=None, backend="auto", precision="auto", device="auto").size == size


def test_fields_that_are_ignored_are_as_if_they_were_not_there() -> None:
    args = Namespace(**GUARD, K=3)
    found = read_namespace(
        args, teacher(1000), recipe=None, backend="auto", precision="auto", device="auto", ignore=("K", "jitter", "lr", "absent")
    )
    assert (found.config.jitter, found.config.learning_rate) == (32, 0.1)
    with pytest.raises(TypeError, match=r"ignore must be a list of names of fields, such as \('K',\), got a string"):
        read_namespace(args, teacher(1000), recipe=None, backend="auto", precision="auto", device="auto", ignore="K")


def test_fields_describe_the_pixels_of_a_recipe_too() -> None:
    found = read(10, "folder", input_size=128, mean_norm=np.full(3, 0.5), std_norm=torch.full((3,), 0.2).double(), seed=3)
    assert (found.size, found.normalisation.mean, found.normalisation.std, found.config.view, found.seed) == (
        128,
        (0.5,) * 3,
        pytest.approx((0.2,) * 3),
        "crop",
        3,
    )


def test_one_line_says_what_was_understood(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log_once.cache_clear()
    for _ in range(2):
        read(100, **DWA_PARSER, dataset="cifar100", iteration=1000, jitter=4, steps=12, r_var=11.0)
    read(1000, easy2hard_mode="linear", milestone=0.5, tv_l2=0.1)
    assert [record.getMessage() for record in caplog.records] == [
        (
            "get_images: DWA's loop; data set cifar100; 32 × 32 pixels, mean 0.5071 0.4867 0.4408, std 0.2675 0.2565 0.2761; "
            "view: roll by 0 to 4 pixels; curriculum: none; 1000 iterations, batches of 100, λ_mean 0.01, λ_var 0.11; "
            "ascent: 12 steps, rho 0.015"
        ),
        (
            "get_images: CDA's loop; data set imagenet, guessed from the 1000 classes of the teacher; 224 × 224 pixels, "
            "mean 0.485 0.456 0.406, std 0.229 0.224 0.225; view: crop of 0.08 to 1 of the area, flip and roll by 0 to 32 pixels; "
            "curriculum: linear, milestone 0.5; 1000 iterations, batches of 100, λ_mean 0.05, λ_var 0.05; priors: tv_l2 0.1, l2_scale 0"
        ),
    ]

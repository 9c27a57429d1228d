"""What the argparse namespaces of SRe2L, CDA and DWA ask for, in our terms."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dwa_fast.config import BackendName, Precision, SynthesisConfig, check_choice, check_integer, check_real
from dwa_fast.errors import InputError
from dwa_fast.recipes import RECIPES

log = logging.getLogger("dwa_fast")

CodeBase = Literal["sre2l", "cda", "dwa"]

_ELSEWHERE = "exp_name arch_name arch_path verifier_arch_path verifier_path ipc_start ipc_end G GPU_ID wandb_key".split()  # in the scripts
_DEFAULTS: dict[str, Any] = {  # of the fields that do not depend on data set or code base
    "iteration": 1000,
    "batch_size": 100,
    "lr": 0.1,
    "first_bn_multiplier": 10.0,
    "tv_l2": 0.0,
    "l2_scale": 0.0,
    "r_var": 1.0,
    "steps": 1,
    "milestone": 0.0,
    "easy2hard_mode": "cosine",
    "verifier": False,
    "verifier_arch": "mobilenet_v2",
    "store_best_images": False,
    "store_last_images": False,
}
_OTHERS = "r_bn jitter rho dataset init_path sorted_path syn_data_path".split()  # with defaults of a data set, or none
_CLASSES = {10: "cifar10", 100: "cifar100", 200: "tiny", 1000: "imagenet", 10450: "imagenet-21k"}  # where no data set is named


@dataclass(frozen=True)
class Recovery:
    """One call of `get_images`, read and checked."""

    code_base: CodeBase
    config: SynthesisConfig
    size: int  # height and width of the images, pixels
    classes: int | None  # of the data set; None: as many as the teacher knows
    init_path: Path | None  # where the real images are that the refinement starts from; None: noise
    sorted_path: list[str] | None  # the class folders in it; None: all of them, sorted
    output: Path | None  # where images go; None: nowhere
    r_var: float  # λ_var / λ_mean
    verifier: bool
    verifier_arch: str


def read_namespace(
    args: Any, teacher: nn.Module, *, recipe: str | None, backend: BackendName, precision: Precision, device: str
) -> Recovery:
    """What a namespace asks for; fields that it lacks have the defaults of the code base that it comes from.

    Args:
        args: any object with the fields as attributes.
        teacher: shows the data set by its number of classes where neither `recipe` nor `args.dataset` names it.
        recipe: the recipe whose pixels, normalisation and view hold, for data sets that the code bases do not know.
    Raises:
        TypeError: args has no attributes.
        InputError: a field cannot be used.
    """
    if not hasattr(args, "__dict__"):
        raise TypeError(f"args must be a namespace such as argparse gives, got {type(args).__name__}")
    given = vars(args)
    _warn_of(tuple(sorted(given.keys() - {*_DEFAULTS, *_OTHERS, *_ELSEWHERE})))
    code_base = _code_base(given)
    facts, size, classes = _data_set(given, teacher, recipe, code_base)
    fields = {**_DEFAULTS, **_own_defaults(code_base, facts), **given}
    _check(fields, code_base)
    config = replace(
        facts,
        iterations=fields["iteration"],
        batch_size=fields["batch_size"],
        learning_rate=fields["lr"],
        jitter=fields["jitter"],
        lambda_mean=fields["r_bn"],
        lambda_var=fields["r_bn"] * fields["r_var"],
        first_layer_weight=fields["first_bn_multiplier"],
        tv_l2=fields["tv_l2"],
        l2_scale=fields["l2_scale"],
        ascent="directed" if code_base == "dwa" else "none",
        rho=fields["rho"],
        steps=fields["steps"],
        initial="real" if code_base == "dwa" else "noise",
        curriculum=fields["easy2hard_mode"] if code_base == "cda" else "none",
        milestone=fields["milestone"],
        backend=backend,
        precision=precision,
        device=device,
    )
    stores = fields["store_best_images"] or fields["store_last_images"]
    return Recovery(
        code_base=code_base,
        config=config,
        size=size,
        classes=classes,
        init_path=_path(fields, "init_path") if code_base == "dwa" else None,
        sorted_path=fields.get("sorted_path"),
        output=_path(fields, "syn_data_path") if stores else None,
        r_var=fields["r_var"],
        verifier=fields["verifier"],
        verifier_arch=fields["verifier_arch"],
    )


@functools.cache
def _warn_of(unknown: tuple[str, ...]) -> None:
    """Name the fields that nothing here reads, once."""
    if unknown:
        log.warning("get_images ignores fields of args that it does not know: %s", ", ".join(unknown))


def _code_base(given: Mapping[str, Any]) -> CodeBase:
    if given.keys() & {"rho", "steps", "init_path"}:
        return "dwa"
    return "cda" if "easy2hard_mode" in given else "sre2l"


def _data_set(
    given: Mapping[str, Any], teacher: nn.Module, recipe: str | None, code_base: CodeBase
) -> tuple[SynthesisConfig, int, int | None]:
    """Normalisation, view and jitter of the data set, the size of its images, and its number of classes where that is fixed."""
    if recipe is not None:
        check_choice("recipe", recipe, list(RECIPES))
        return RECIPES[recipe].synthesis, RECIPES[recipe].data.size, None
    if "dataset" in given:
        check_choice("args.dataset", given["dataset"], ("cifar10", "cifar100", "tiny", "imagenet"))
        name: str = given["dataset"]
        return RECIPES[name].synthesis, RECIPES[name].data.size, RECIPES[name].data.classes
    classes = _outputs(teacher)
    if classes not in _CLASSES:
        known = ", ".join(f"{count} ({name})" for count, name in _CLASSES.items())
        raise InputError(
            f"cannot tell the data set from a teacher of {classes or 'no known number of'} classes: "
            f"name it in args.dataset or pass recipe=…; known by their classes: {known}"
        )
    name = _CLASSES[classes]
    if name == "imagenet-21k":  # CDA's teachers for it were trained on pixels in [0, 1]
        return replace(RECIPES["imagenet"].synthesis, mean=(0.0,) * 3, std=(1.0,) * 3), 224, classes
    own = RECIPES[name]
    if name == "cifar100" and code_base == "sre2l":  # whose CIFAR-100 scripts normalise as for CIFAR-10
        return RECIPES["cifar10"].synthesis, own.data.size, classes
    return own.synthesis, own.data.size, classes


def _outputs(teacher: nn.Module) -> int | None:
    """The width of the last linear layer."""
    linear = [module for module in teacher.modules() if isinstance(module, nn.Linear)]
    return linear[-1].out_features if linear else None


def _own_defaults(code_base: CodeBase, facts: SynthesisConfig) -> dict[str, Any]:
    """Defaults that the code bases' parsers set differently for different data sets."""
    own = {"jitter": facts.jitter, "r_bn": 0.05, "rho": 0.0}
    if code_base == "dwa":
        tiny, imagenet = (facts.mean == RECIPES[name].synthesis.mean for name in ("tiny", "imagenet"))
        own |= {"r_bn": 0.01 if imagenet else 0.05, "rho": 0.015 if tiny else 0.05}
    return own


def _check(fields: Mapping[str, Any], code_base: CodeBase) -> None:
    """Raise InputError where a value means nothing; the sentence has the namespace's own names."""
    for name in ("iteration", "batch_size"):
        check_integer(f"args.{name}", fields[name], 1)
    check_integer("args.jitter", fields["jitter"], 0)
    check_real("args.lr", fields["lr"], 0, above=True)
    for name in ("r_bn", "first_bn_multiplier", "r_var", "tv_l2", "l2_scale", "rho"):
        check_real(f"args.{name}", fields[name], 0)
    check_integer("args.steps", fields["steps"], 1)
    check_real("args.milestone", fields["milestone"], 0, 1)
    check_choice("args.easy2hard_mode", fields["easy2hard_mode"], ("step", "linear", "cosine"))
    for name in ("verifier", "store_best_images", "store_last_images"):
        if not isinstance(fields[name], bool):
            raise InputError(f"args.{name} must be True or False, got {fields[name]!r}")
    if code_base == "dwa" and "init_path" not in fields:
        raise InputError("args.init_path is missing: DWA starts from real images, in class folders or as tensor_0.pt, tensor_1.pt, …")


def _path(fields: Mapping[str, Any], name: str) -> Path:
    value = fields.get(name)
    if not isinstance(value, (str, Path)) or not str(value):
        raise InputError(f"args.{name} must be the path of a folder, got {value!r}")
    return Path(value)

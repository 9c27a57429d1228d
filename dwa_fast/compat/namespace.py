"""Translates the namespaces of SRe2L, CDA and DWA scripts into our settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dwa_fast.compat.data_set import DESCRIBING, DataSet, check_flag, data_set
from dwa_fast.compat.fields import fields_of, log_once
from dwa_fast.compat.known import ELSEWHERE, NEUTRAL
from dwa_fast.config import BackendName, Normalisation, Precision, SynthesisConfig, check_choice, check_integer, check_real
from dwa_fast.errors import InputError
from dwa_fast.recipes import RECIPES

CodeBase = Literal["sre2l", "cda", "dwa"]

_TITLES: dict[CodeBase, str] = {"sre2l": "SRe2L", "cda": "CDA", "dwa": "DWA"}
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
    "cda": True,
    "verifier": False,
    "verifier_arch": "mobilenet_v2",
    "store_best_images": False,
    "store_last_images": False,
    "seed": 0,
}
_OTHERS = "r_bn jitter rho init_path sorted_path syn_data_path".split()  # with defaults of a data set, or none
_READ = {*_DEFAULTS, *_OTHERS, *DESCRIBING}


@dataclass(frozen=True)
class Recovery:
    """One call of `get_images`, read and checked."""

    code_base: CodeBase
    config: SynthesisConfig
    normalisation: Normalisation
    size: int  # height and width of the images, pixels
    classes: int | None  # of the data set; None: as many as the teacher knows
    init_path: Path | None  # where the real images are that the refinement starts from; None: noise
    sorted_path: list[str] | None  # the class folders in it; None: all of them, sorted
    output: Path | None  # where images go; None: nowhere
    r_var: float  # λ_var / λ_mean
    verifier: bool
    verifier_arch: str
    seed: int


def read_namespace(
    args: Any,
    teacher: nn.Module,
    *,
    recipe: str | None,
    backend: BackendName,
    precision: Precision,
    device: str,
    ignore: Collection[str] = (),
) -> Recovery:
    """Translates a script's namespace. Missing fields take the defaults of its code base; the result is logged once.

    Args:
        args: a namespace, mapping, dataclass, or any object with the fields as attributes; None stands for a missing field.
        teacher: shows the data set by its number of classes where neither `recipe` nor `args.dataset` names it.
        recipe: the recipe whose pixels, normalisation and view hold, for data sets that the code bases do not know.
        ignore: fields that are passed over, as if args lacked them.
    Raises:
        TypeError: args is no namespace.
        InputError: a field cannot be used, or is unknown and could change the images.
    """
    if isinstance(ignore, str):
        raise TypeError(f"ignore must be a list of names of fields, such as ({ignore!r},), got a string")
    left_out = set(ignore)
    given = {name: value for name, value in fields_of(args).items() if name not in left_out}
    _refuse_unknown(given)
    code_base = _code_base(given)
    data = data_set(given, teacher, recipe, sre2l=code_base == "sre2l")
    fields = {**_DEFAULTS, **_own_defaults(code_base, data), **given}
    _check(fields, code_base)
    _check_view(given, code_base, data)
    config = replace(
        data.config,
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
    log_once(_summary(code_base, config, data))
    return Recovery(
        code_base=code_base,
        config=config,
        normalisation=data.normalisation,
        size=data.size,
        classes=data.classes,
        init_path=_path(fields, "init_path") if code_base == "dwa" else None,
        sorted_path=fields.get("sorted_path"),
        output=_path(fields, "syn_data_path") if stores else None,
        r_var=fields["r_var"],
        verifier=fields["verifier"],
        verifier_arch=fields["verifier_arch"],
        seed=fields["seed"],
    )


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    """Raise InputError where a field may belong to another method."""
    unknown = sorted(given.keys() - _READ - ELSEWHERE - NEUTRAL.keys())
    if unknown:
        names = ", ".join(f"args.{name}" for name in unknown)
        raise InputError(
            f"get_images does not know {names}, which could change the images: where that does not matter, pass "
            f"ignore={tuple(unknown)!r}; otherwise keep the script's own loop, in which BNFeatureHook still works"
        )
    for name, values in NEUTRAL.items():
        if name in given and given[name] not in values:
            raise InputError(
                f"args.{name} is {given[name]!r}, which is another method; get_images does what {values[0]!r} stands for: keep the "
                f"script's own loop, in which BNFeatureHook still works, or pass ignore=({name!r},) where it does not matter"
            )


def _code_base(given: Mapping[str, Any]) -> CodeBase:
    for name in ("cda", "apply_data_augmentation"):
        check_flag(name, given.get(name, False))
    curriculum = given.get("cda", "easy2hard_mode" in given)
    if given.keys() & {"rho", "steps"}:
        if curriculum:
            raise InputError(
                "args.rho and args.steps are DWA's, and args.easy2hard_mode is CDA's: get_images does one or the other; "
                "name the other in ignore="
            )
        return "dwa"
    if "init_path" in given:
        raise InputError(
            "args.init_path without args.rho: DWA's loop, which starts from real images, has both; "
            "set args.rho (0 for no ascent), or pass ignore=('init_path',) for a start from noise"
        )
    return "cda" if curriculum else "sre2l"


def _own_defaults(code_base: CodeBase, data: DataSet) -> dict[str, Any]:
    """Defaults that the code bases' parsers set differently for different data sets."""
    own = {"jitter": data.config.jitter, "r_bn": 0.05, "rho": 0.0}
    if code_base == "dwa":
        tiny, imagenet = (data.normalisation.mean == RECIPES[name].data.mean for name in ("tiny", "imagenet"))
        own |= {"r_bn": 0.01 if imagenet else 0.05, "rho": 0.015 if tiny else 0.05}
    return own


def _check(fields: Mapping[str, Any], code_base: CodeBase) -> None:
    """Raise InputError if a value is invalid; the message uses the names of the namespace."""
    for name in ("iteration", "batch_size"):
        check_integer(f"args.{name}", fields[name], 1)
    for name in ("jitter", "seed"):
        check_integer(f"args.{name}", fields[name], 0)
    check_real("args.lr", fields["lr"], 0, above=True)
    for name in ("r_bn", "first_bn_multiplier", "r_var", "tv_l2", "l2_scale", "rho"):
        check_real(f"args.{name}", fields[name], 0)
    check_integer("args.steps", fields["steps"], 1)
    check_real("args.milestone", fields["milestone"], 0, 1)
    check_choice("args.easy2hard_mode", fields["easy2hard_mode"], ("step", "linear", "cosine"))
    for name in ("verifier", "store_best_images", "store_last_images"):
        check_flag(name, fields[name])
    if code_base == "dwa" and "init_path" not in fields:
        raise InputError("args.init_path is missing: DWA starts from real images, in class folders or as tensor_0.pt, tensor_1.pt, …")


def _check_view(given: Mapping[str, Any], code_base: CodeBase, data: DataSet) -> None:
    """Raise InputError where a field belongs to loops with crops, and the data set's view has none."""
    if data.config.view == "crop":
        return
    if code_base == "cda" or "cda" in given:
        name = "easy2hard_mode" if "easy2hard_mode" in given else "cda"
        raise InputError(
            f"args.{name} belongs to a loop with crops, but the view of {data.title} is a roll without crops: "
            f"keep the script's own loop, in which BNFeatureHook still works, or pass recipe=… with crops, or ignore=({name!r}, …)"
        )
    for name in ("tv_l2", "l2_scale"):
        if given.get(name):
            raise InputError(
                f"args.{name} is {given[name]!r}, but no published loop with the view of {data.title} uses it (SCDD's parser has it): "
                f"set it to 0, or pass ignore=({name!r},)"
            )


def _summary(code_base: CodeBase, config: SynthesisConfig, data: DataSet) -> str:
    """A one-line summary for the log."""
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (data.normalisation.mean, data.normalisation.std))
    crop = f"crop of {config.crop_scale[0]:g} to {config.crop_scale[1]:g} of the area, flip and " if config.view == "crop" else ""
    parts = [
        f"get_images: {_TITLES[code_base]}'s loop",
        f"data set {data.title}",
        f"{data.size} × {data.size} pixels, mean {mean}, std {std}",
        f"view: {crop}roll by 0 to {config.jitter} pixels",
        f"curriculum: {config.curriculum}" + (f", milestone {config.milestone:g}" if config.curriculum != "none" else ""),
        f"{config.iterations} iterations, batches of {config.batch_size}, λ_mean {config.lambda_mean:g}, λ_var {config.lambda_var:g}",
    ]
    if code_base == "dwa":
        parts.append(f"ascent: {config.steps} steps, rho {config.rho:g}")
    if config.tv_l2 or config.l2_scale:
        parts.append(f"priors: tv_l2 {config.tv_l2:g}, l2_scale {config.l2_scale:g}")
    return "; ".join(parts)


def _path(fields: Mapping[str, Any], name: str) -> Path:
    value = fields.get(name)
    if not isinstance(value, (str, Path)) or not str(value):
        raise InputError(f"args.{name} must be the path of a folder, got {value!r}")
    return Path(value)

"""The data set of a namespace: named, described by its pixels, or guessed from the teacher if nothing contradicts the guess."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dwa_fast.config import Normalisation, SynthesisConfig, View, check_choice, check_integer, check_real
from dwa_fast.errors import InputError
from dwa_fast.recipes import RECIPES

_SYNONYMS = {  # one thing under several names, ours first
    "dataset": ("dataset", "dataset_name"),
    "input_size": ("input_size", "image_size", "img_size"),
    "ncls": ("ncls", "num_classes", "num_class"),
    "mean_norm": ("mean_norm",),
    "std_norm": ("std_norm",),
    "apply_data_augmentation": ("apply_data_augmentation",),
}
DESCRIBING = frozenset(name for names in _SYNONYMS.values() for name in names)  # fields that are read here
_CLASSES = {10: "cifar10", 100: "cifar100", 200: "tiny", 1000: "imagenet", 10450: "imagenet-21k"}  # where no data set is named
_DATASETS = {name: name for name in ("cifar10", "cifar100", "tiny", "imagenet")} | dict.fromkeys(
    ("imagenet1k", "imagenet-1k", "in1k"), "imagenet"
)


@dataclass(frozen=True)
class DataSet:
    """Pixels, view and number of classes of a data set."""

    title: str  # with where it is known from
    config: SynthesisConfig  # whose view and jitter hold
    normalisation: Normalisation
    size: int  # pixels
    classes: int | None


def data_set(given: Mapping[str, Any], teacher: nn.Module, recipe: str | None, *, sre2l: bool) -> DataSet:
    """The data set that is named or described, else the one that the teacher's classes suggest; fields that describe it come first.

    Args:
        given: the fields of a namespace.
        teacher: shows the number of classes.
        recipe: the recipe whose pixels, normalisation and view hold, whatever args.dataset says.
        sre2l: whether the code base is SRe2L's, whose CIFAR-100 scripts normalise as for CIFAR-10.
    Raises:
        InputError: a field cannot be used, or the data set cannot be determined.
    """
    shared = {ours: _one_of(given, names) for ours, names in _SYNONYMS.items()}
    _check_description(shared)
    name = shared["dataset"]
    described = None not in (shared["input_size"], shared["mean_norm"], shared["std_norm"])
    if recipe is not None:
        check_choice("recipe", recipe, list(RECIPES))
        data_set = _of_recipe(f"recipe {recipe}", recipe, None)
    elif name in _DATASETS:
        data_set = _of_recipe(name, _DATASETS[name], RECIPES[_DATASETS[name]].data.classes)
    elif described:
        jitter = 32 if shared["input_size"] >= 128 else 4
        imagenet = _of_recipe(name or "as args describe it", "imagenet", None)
        data_set = replace(imagenet, config=replace(imagenet.config, jitter=jitter), size=shared["input_size"])
    elif name is not None:
        raise InputError(
            f"unknown args.dataset {name!r}; known: {', '.join(_DATASETS)}; for others pass recipe=…, such as recipe='folder' "
            "for 224 pixels, ImageNet's normalisation and any number of classes"
        )
    else:
        data_set = _guess(shared, given, teacher, sre2l)
    config, own, crops = data_set.config, data_set.normalisation, shared["apply_data_augmentation"]
    mean, std = tuple(shared["mean_norm"] or own.mean), tuple(shared["std_norm"] or own.std)
    view: View = config.view if crops is None else "crop" if crops else "roll"
    return replace(
        data_set,
        config=replace(config, view=view),
        normalisation=Normalisation(mean=mean, std=std),
        size=shared["input_size"] or data_set.size,
        classes=shared["ncls"] or data_set.classes,
    )


def _of_recipe(title: str, recipe: str, classes: int | None) -> DataSet:
    own = RECIPES[recipe]
    return DataSet(title, own.synthesis, own.data, own.data.size, classes)


def _check_description(shared: Mapping[str, Any]) -> None:
    for name in ("input_size", "ncls"):
        if shared[name] is not None:
            check_integer(f"args.{name}", shared[name], 1)
    for name in ("mean_norm", "std_norm"):
        values = shared[name]
        if values is not None and (not isinstance(values, Sequence) or isinstance(values, str) or len(values) not in (1, 3)):
            raise InputError(f"args.{name} must hold one number per channel, such as [0.485, 0.456, 0.406], got {values!r}")
        for value in values or ():
            check_real(f"args.{name}", value, 0, 1 if name == "mean_norm" else math.inf, above=name == "std_norm")


def _guess(shared: Mapping[str, Any], given: Mapping[str, Any], teacher: nn.Module, sre2l: bool) -> DataSet:
    """The data set with as many classes as the teacher, if nothing contradicts it."""
    classes = _outputs(teacher)
    if classes not in _CLASSES:
        known = ", ".join(f"{count} ({name})" for count, name in _CLASSES.items())
        raise InputError(
            f"cannot tell the data set from a teacher of {classes or 'no known number of'} classes: "
            f"name it in args.dataset or pass recipe=…; known by their classes: {known}"
        )
    name = _CLASSES[classes]
    if name == "imagenet-21k":  # CDA's teachers for it were trained on pixels in [0, 1]
        data_set = replace(_of_recipe(name, "imagenet", classes), normalisation=Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3))
    else:
        data_set = _of_recipe(name, "cifar10" if name == "cifar100" and sre2l else name, classes)
    against = _contradiction(data_set, shared, given, teacher)
    if against:
        raise InputError(
            f"a teacher of {classes} classes suggests {name}, {data_set.size} pixels, but {against}: name the data set in args.dataset "
            "or pass recipe=…, such as recipe='folder' for 224 pixels, ImageNet's normalisation and any number of classes"
        )
    return replace(data_set, title=f"{name}, guessed from the {classes} classes of the teacher")


def _contradiction(data_set: DataSet, shared: Mapping[str, Any], given: Mapping[str, Any], teacher: nn.Module) -> str | None:
    """A contradiction to a guess; None if there is none."""
    mean, std = data_set.normalisation.mean, data_set.normalisation.std
    expected = {"input_size": data_set.size, "mean_norm": mean, "std_norm": std, "ncls": data_set.classes}
    for name, value in expected.items():
        got = shared[name]
        if got is not None and (tuple(got) if isinstance(value, tuple) else got) != value:
            return f"args.{name} is {got!r}"
    jitter = given.get("jitter", 0)
    if isinstance(jitter, int) and jitter >= data_set.size:
        return f"args.jitter is {jitter}"
    stem = next((module for module in teacher.modules() if isinstance(module, nn.Conv2d)), None)
    if data_set.size < 128 and stem is not None and (max(stem.kernel_size) > 5 or max(stem.stride) > 1):
        return (
            f"its first convolution, {stem.kernel_size[0]} × {stem.kernel_size[1]} with stride {stem.stride[0]}, is made for larger images"
        )
    return None


def _outputs(teacher: nn.Module) -> int | None:
    """The width of the last linear layer."""
    linear = [module for module in teacher.modules() if isinstance(module, nn.Linear)]
    return linear[-1].out_features if linear else None


def _one_of(given: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The common value under these names; None if none is present."""
    present = [name for name in names if name in given]
    for name in present[1:]:
        if given[name] != given[present[0]]:
            raise InputError(f"args.{present[0]} is {given[present[0]]!r}, but args.{name} is {given[name]!r}; they must be the same")
    return given[present[0]] if present else None


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"args.{name} must be True or False, got {value!r}")

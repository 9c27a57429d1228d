"""The published settings by data set (appendix of the DWA paper), and the methods they are compared with."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from dwa_fast.config import (
    LATER_SETTINGS,
    SHORT_NAMES,
    DataConfig,
    Schedule,
    SqueezeConfig,
    SynthesisConfig,
    ValidationConfig,
    check_choice,
)
from dwa_fast.errors import InputError

_STAGES = {"data": DataConfig, "synthesis": SynthesisConfig, "squeeze": SqueezeConfig, "validation": ValidationConfig}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings for one data set, from the real images to the students."""

    name: str
    summary: str
    data: DataConfig
    architecture: str  # of the teacher
    synthesis: SynthesisConfig
    squeeze: SqueezeConfig
    validation: ValidationConfig

    def __post_init__(self) -> None:
        for name, kind in _STAGES.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, or in recipe() a dictionary of its fields, got {getattr(self, name)!r}")

    def settings(self, stage: Literal["synthesis", "squeeze", "validation"]) -> dict[str, Any]:
        """The settings of a stage with mean and std, as manifests, checkpoints and records hold them.

        Those of `LATER_SETTINGS` are left out where they have the values there.
        """
        settings = {"mean": self.data.mean, "std": self.data.std, **asdict(getattr(self, stage))}
        return {name: value for name, value in settings.items() if name not in LATER_SETTINGS or value != LATER_SETTINGS[name]}


def check_recipe(value: Any) -> None:
    """Raise TypeError unless that is a recipe."""
    if not isinstance(value, Recipe):
        raise TypeError(f"recipe must be a Recipe, such as recipe('cifar100'), got {type(value).__name__}")


def _sre2l(dwa: SynthesisConfig, _: DataConfig) -> SynthesisConfig:
    return replace(dwa, ascent="none", rho=0.0, initial="noise", lambda_mean=0.01, lambda_var=0.01)


def _sre2l_plus(dwa: SynthesisConfig, data: DataConfig) -> SynthesisConfig:
    """SRe2L++ (arXiv 2501.07575); the digits, which are not in the paper, keep their iterations."""
    iterations = dwa.iterations if data.layout == "digits" else 4000
    return replace(_sre2l(dwa, data), initial="patches", view="crop", iterations=iterations, learning_rate=0.25)


def _fadrm(dwa: SynthesisConfig, data: DataConfig) -> SynthesisConfig:
    """FADRM: every other stage of images of more than 64 pixels is at 25/28 of their size, 200 of 224 pixels."""
    start = _sre2l_plus(dwa, data)
    low = data.size * 25 // 28 if data.size > 64 else data.size
    iterations = dwa.iterations if data.layout == "digits" else 2000
    rate = 0.01 if data.layout == "tiny" else start.learning_rate
    return replace(start, iterations=iterations, learning_rate=rate, stage_sizes=(low, data.size) * 2)


def _fadrm_plus(dwa: SynthesisConfig, data: DataConfig) -> SynthesisConfig:
    return replace(_fadrm(dwa, data), learning_rate=0.25)


def _delt(dwa: SynthesisConfig, data: DataConfig) -> SynthesisConfig:
    """DELT (arXiv 2411.19946): CDA from median images without the roll, in eight rounds; batches of whole classes."""
    iterations = dwa.iterations if data.layout == "digits" else 4000
    start = replace(_sre2l(dwa, data), initial="median", view="crop", curriculum="cosine", jitter=0)
    return replace(start, iterations=iterations, learning_rate=0.25, rounds=8, batch_ipc=None)


def _lpld(dwa: SynthesisConfig, data: DataConfig) -> SynthesisConfig:
    """LPLD (arXiv 2410.15919): SRe2L with crops, each batch all images of one class, matched with the statistics of that class."""
    iterations = dwa.iterations if data.layout == "digits" else 4000
    rate, weight = (0.1, 0.05) if data.layout == "tiny" else (0.25, 0.01)
    own = replace(_sre2l(dwa, data), view="crop", iterations=iterations, learning_rate=rate, lambda_mean=weight, lambda_var=weight)
    return replace(own, statistics="class", batch_ipc=None)


METHODS: dict[str, Callable[[SynthesisConfig, DataConfig], SynthesisConfig]] = {
    "dwa": lambda dwa, _: dwa,
    "sre2l": _sre2l,
    "cda": lambda dwa, data: replace(_sre2l(dwa, data), view="crop", curriculum="cosine"),
    "rded": lambda dwa, _: replace(dwa, ascent="none", rho=0.0, initial="patches", iterations=0),
    "real-start": lambda dwa, _: replace(dwa, ascent="none", rho=0.0),
    "random-step": lambda dwa, _: replace(dwa, ascent="random"),
    "coupled": lambda dwa, _: replace(dwa, lambda_mean=dwa.lambda_var),
    "sre2l++": _sre2l_plus,
    "fadrm": _fadrm,
    "delt": _delt,
    "lpld": _lpld,
    "fadrm+": _fadrm_plus,
    "dwa+": lambda dwa, data: replace(_fadrm_plus(dwa, data), ascent=dwa.ascent, rho=dwa.rho),
    "cv-dd": lambda dwa, data: replace(_sre2l_plus(dwa, data), teachers_together=2, teacher_turns="index"),
}
SEVERAL_TEACHERS = ("fadrm+", "dwa+", "cv-dd")  # methods that are for several teachers


_OF_NO_PRESET = ("students", "precision", "memory_limit")  # settings of the validation that are not compared with those of a preset


def _family(of: Recipe, **changes: Any) -> ValidationConfig:
    """What most of the family shares, with these changes. Digits keep their own epochs, learning rate and views."""
    shared: dict[str, Any] = {"epochs": 300, "decay_vectors": False, "augmentation": "resized-crop", "temperature": 20.0}
    shared |= {"mixing": "cutmix", "mixing_alpha": 1.0, **{name: getattr(of.validation, name) for name in _OF_NO_PRESET}, **changes}
    if of.data.layout == "digits":
        own = ("epochs", "learning_rate", "augmentation", "padding", "flip", "smallest_crop", "shuffle_cells", "rand_augment")
        shared |= {name: getattr(of.validation, name) for name in own}
    return ValidationConfig(**shared)


def _rded_training(of: Recipe) -> ValidationConfig:
    views = {"shuffle_cells": 2, "smallest_crop": 0.5} if of.data.size > 64 else {"augmentation": "none"}  # crops of the whole image
    return _family(of, cosine_stretch=2.0, batch_size=100 if of.data.layout == "tiny" else None, **views)


def _edc_training(of: Recipe) -> ValidationConfig:
    cifar = {"epochs": 1000, "rand_augment": 2}
    own: dict[str, dict[str, Any]] = {
        "digits": {"batch_size": 25},
        "cifar10": {**cifar, "batch_size": 25},
        "cifar100": {**cifar, "batch_size": 50, "smallest_crop": 0.5},
        "tiny": {"batch_size": 100, "rand_augment": 2, "smallest_crop": 0.5},
        "folder": {"batch_size": 100, "shuffle_cells": 2, "smallest_crop": 0.5},
    }
    return _family(of, cosine_stretch=2.0, loss="mse", hard_weight=0.025, weight_ema=0.99, **own[of.data.layout])


def _fadrm_training(of: Recipe) -> ValidationConfig:
    mode = "eval" if of.data.layout == "tiny" else "train"
    epochs = 1000 if of.data.layout in ("cifar10", "cifar100") else 300
    return _family(of, epochs=epochs, batch_size=16, accumulation=2, cosine_stretch=2.0, teacher_mode=mode)


def _cv_dd_training(of: Recipe) -> ValidationConfig:
    stretch = 2.0 if of.data.layout in ("cifar100", "folder") else 1.0
    return _family(of, batch_size=16, accumulation=2, cosine_stretch=stretch, teacher_mode="train")


# Trainings of students by which results of the family are published, as functions of a recipe; docs/recipes.md says how they differ from
# what was published. Where settings depend on the images per class, these are for 10.
PRESETS: dict[str, Callable[[Recipe], ValidationConfig]] = {
    "paper": lambda of: of.validation,
    "rded": _rded_training,
    "edc": _edc_training,
    "fadrm": _fadrm_training,
    "cv-dd": _cv_dd_training,
    "rd3": lambda of: _family(of, epochs=400, batch_size=50),
    "rethinkdc": _family,
    "ddranking": lambda of: _family(of, decay_vectors=True, students=5),
}


def nearest_preset(own: Recipe) -> tuple[str, dict[str, Any]]:
    """The preset with the fewest settings that differ from a recipe's validation, and those settings.

    Of presets with the same settings for this data set, such as fadrm and cv-dd on ImageNet, all are named: "fadrm = cv-dd"; paper alone.
    """
    published = replace(RECIPES.get(own.name, own), data=own.data)

    def compared(validation: ValidationConfig) -> dict[str, Any]:
        return {field: value for field, value in asdict(validation).items() if field not in _OF_NO_PRESET}

    known = {name: compared(preset(published)) for name, preset in PRESETS.items()}
    changes = {name: dict(compared(own.validation).items() - settings.items()) for name, settings in known.items()}
    nearest = min(known, key=lambda name: len(changes[name]))
    names = [name for name, settings in known.items() if settings == known[nearest]]
    return "paper" if "paper" in names else " = ".join(names), {
        name: value for name, value in asdict(own.validation).items() if name in changes[nearest]
    }


def preset_text(own: Recipe) -> str:
    """A recipe's preset for a reader, with what was changed of it: "preset rded (epochs 100)"; "" for the paper's, changed or not."""
    name, changes = nearest_preset(own)
    changed = ", ".join(f"{field} {value}" for field, value in changes.items())
    return "" if name == "paper" else f"preset {name}" + (f" ({changed})" if changed else "")


def _cifar(name: Literal["cifar10", "cifar100"], classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Recipe:
    return Recipe(
        name=name,
        summary=f"CIFAR-{classes}, 32 pixels, ResNet-18 with a 3×3 stem",
        data=DataConfig(layout=name, mean=mean, std=std, size=32, classes=classes),
        architecture="resnet18-cifar",
        synthesis=SynthesisConfig(),
        squeeze=SqueezeConfig(),
        validation=ValidationConfig(),
    )


def _imagenet(name: str, summary: str, classes: int | None, test_crop: float) -> Recipe:
    return Recipe(
        name=name,
        summary=summary,
        data=DataConfig(layout="folder", size=224, classes=classes, test_crop=test_crop),
        architecture="resnet18",
        synthesis=SynthesisConfig(iterations=2000, lambda_var=0.02, view="crop", jitter=32),
        squeeze=SqueezeConfig(epochs=90, batch_size=256, weight_decay=1e-4, augmentation="resized-crop"),
        validation=ValidationConfig(
            epochs=300, decay_vectors=False, augmentation="resized-crop", mixing="cutmix", mixing_alpha=1.0, temperature=20.0
        ),
    )


def _tiny() -> Recipe:
    return Recipe(
        name="tiny",
        summary="Tiny-ImageNet, 64 pixels, ResNet-18 with a 3×3 stem",
        data=DataConfig(layout="tiny", mean=(0.4802, 0.4481, 0.3975), std=(0.2302, 0.2265, 0.2262), size=64, classes=200),
        architecture="resnet18-cifar",
        synthesis=SynthesisConfig(iterations=2000, learning_rate=0.1, view="crop"),
        squeeze=SqueezeConfig(epochs=100),
        validation=ValidationConfig(
            epochs=200,
            optimiser="sgd",
            learning_rate=0.2,
            weight_decay=1e-4,
            warmup_epochs=5,
            augmentation="resized-crop",
            mixing="cutmix",
            mixing_alpha=1.0,
            temperature=20.0,
            scale_loss=True,
        ),
    )


def _digits() -> Recipe:
    return Recipe(
        name="digits",
        summary="scikit-learn's handwritten digits, 16 pixels, a small ResNet: minutes on a CPU",
        data=DataConfig(layout="digits", mean=(0.3053,), std=(0.3185,), size=16, classes=10),
        architecture="small-resnet",
        synthesis=SynthesisConfig(iterations=500, jitter=2),
        squeeze=SqueezeConfig(epochs=12, learning_rate=0.05, padding=2, flip=0.0),
        validation=ValidationConfig(epochs=200, learning_rate=5e-3, padding=2, flip=0.0, temperature=20.0),
    )


def _released(paper: Recipe, *, synthesis: Mapping[str, Any] | None = None, validation: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe as in the authors' released command, which differs from the paper."""
    return replace(
        paper,
        name=f"{paper.name}-released",
        summary=f"{paper.name}, as the authors' command runs it",
        synthesis=replace(paper.synthesis, **(synthesis or {})),
        validation=replace(paper.validation, **(validation or {})),
    )


_CIFAR10 = _cifar("cifar10", 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CIFAR100 = _cifar("cifar100", 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_TINY = _tiny()
_IMAGENET = _imagenet("imagenet", "ImageNet-1K, 224 pixels, torchvision's ResNet-18", 1000, test_crop=224 / 256)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _digits(),
        _CIFAR10,
        _CIFAR100,
        _TINY,
        _IMAGENET,
        _imagenet("folder", "your own folder of class folders, with ImageNet's settings and any number of classes", None, test_crop=1.0),
        _released(_CIFAR10, validation={"teacher_mode": "train"}),
        _released(_CIFAR100, validation={"teacher_mode": "train"}),
        _released(_TINY, synthesis={"batch_size": 200}, validation={"batch_size": 64}),
        _released(_IMAGENET, synthesis={"steps": 15}),
    )
}


# Of teachers that are not trained as published unless it is asked for: students of shorter trained ones are better (docs/results/cifar10/).
DEFAULT_SCHEDULES: dict[str, Schedule] = {"cifar10": "short"}


def _scheduled(published: SqueezeConfig, schedule: Schedule) -> SqueezeConfig:
    if schedule == "cosine":
        return published
    epochs = max(1, round(published.epochs / {"fast": 10, "short": 50}[schedule]))
    return replace(published, schedule=schedule, epochs=epochs, learning_rate=2 * published.learning_rate)


_FIELDS = {stage: [field.name for field in fields(kind)] for stage, kind in _STAGES.items()}


def recipe(
    name: str, *, method: str = "dwa", schedule: Schedule | None = None, preset: str = "paper", fast: bool = False, **changes: Any
) -> Recipe:
    """All settings of a data set, with the synthesis of a method, and with single fields changed: `recipe("cifar100", iterations=200)`.

    Args:
        name: digits, cifar10, cifar100, tiny, imagenet, folder; a published one with "-released" as the authors' command runs it.
        method: one of `METHODS`; docs/method.md says what each changes.
        schedule: of the teacher's training: cosine, as published; fast, in a tenth of the epochs; short, in a fiftieth. None: that of
            `DEFAULT_SCHEDULES`, else cosine. `squeeze={"schedule": "fast"}` is the same.
        preset: of the students' training: paper (this recipe's), rded, edc, fadrm, cv-dd, rd3, rethinkdc, ddranking.
        fast: a quarter of the method's iterations, which on CIFAR-10 with ten images per class costs no accuracy.
        changes: fields of `SynthesisConfig`, of `DataConfig` (mean, std, size, …), or `architecture`; and `squeeze` and `validation`, each
            a dictionary of the fields to change, such as `squeeze={"epochs": 20}`, or a whole `SqueezeConfig` or `ValidationConfig`.
    Raises:
        InputError: no such recipe, method or preset, a value that cannot be used, or two schedules.
        TypeError: no such field; the message names the one that may be meant.
    """
    check_choice("recipe", name, list(RECIPES))
    check_choice("method", method, list(METHODS))
    check_choice("preset", preset, list(PRESETS))
    others = {field: changes.pop(field) for field in ("architecture", "squeeze", "validation") if field in changes}
    training = others.get("squeeze")
    named = training.get("schedule") if isinstance(training, Mapping) else getattr(training, "schedule", None)
    if schedule and named and named != schedule:
        raise InputError(f"schedule is {schedule!r}, that of squeeze is {named!r}; name one of them")
    schedule = named or schedule or DEFAULT_SCHEDULES.get(name, "cosine")
    check_choice("schedule", schedule, Schedule)
    data = {field: changes.pop(field) for field in _FIELDS["data"] if field in changes}
    _check_names(changes, "synthesis")
    chosen = replace(RECIPES[name], data=replace(RECIPES[name].data, **data))
    chosen = replace(chosen, validation=PRESETS[preset](chosen))
    chosen = replace(chosen, squeeze=_scheduled(chosen.squeeze, schedule))
    synthesis = METHODS[method](chosen.synthesis, chosen.data)
    if fast:
        synthesis = replace(synthesis, iterations=synthesis.iterations // 4)
    for stage in ("squeeze", "validation"):
        if isinstance(others.get(stage), Mapping):
            _check_names(others[stage], stage)
            others[stage] = replace(getattr(chosen, stage), **others[stage])
    return replace(chosen, synthesis=replace(synthesis, **changes), **others)


def _check_names(changes: Iterable[str], stage: str) -> None:
    """Raise TypeError for a field that the settings of a stage do not have, with the one that may be meant, or the stage that has it."""
    for field in changes:
        if field in _FIELDS[stage]:
            continue
        near = difflib.get_close_matches(SHORT_NAMES.get(field, field), _FIELDS[stage], 1)
        elsewhere = [each for each in ("squeeze", "validation") if each != stage and field in _FIELDS[each]]
        hint = f"; did you mean {near[0]}?" if near else ""
        if elsewhere:
            hint = f"; it is one of {' and of '.join(elsewhere)}: recipe(…, {elsewhere[0]}={{{field!r}: …}})"
        elif field in ("seed", "ipc", "output"):
            hint = "; it is an argument of synthesize or distill"
        raise TypeError(f"{field!r} is no setting of the {stage}{hint}")

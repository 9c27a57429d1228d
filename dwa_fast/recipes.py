"""The published settings by name (method: DWA paper, tables of the appendix), and the methods that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dwa_fast.config import DataConfig, Normalisation, SqueezeConfig, SynthesisConfig, ValidationConfig, check_choice


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that one data set needs, from the real images to the students."""

    name: str
    summary: str
    data: DataConfig
    architecture: str
    synthesis: SynthesisConfig
    squeeze: SqueezeConfig
    validation: ValidationConfig


METHODS: dict[str, Callable[[SynthesisConfig], SynthesisConfig]] = {
    "dwa": lambda dwa: dwa,
    "sre2l": lambda dwa: replace(dwa, ascent="none", rho=0.0, initial="noise", lambda_mean=0.01, lambda_var=0.01),
    "real-start": lambda dwa: replace(dwa, ascent="none", rho=0.0),
    "random-step": lambda dwa: replace(dwa, ascent="random"),
    "coupled": lambda dwa: replace(dwa, lambda_mean=dwa.lambda_var),
}


def _statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    return {"mean": mean, "std": std}


_CIFAR10 = _statistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CIFAR100 = _statistics((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_TINY = _statistics((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
_IMAGENET = _statistics(Normalisation().mean, Normalisation().std)
_DIGITS = _statistics((0.3053,), (0.3185,))


def _cifar(name: str, classes: int, statistics: Mapping[str, tuple[float, ...]]) -> Recipe:
    return Recipe(
        name=name,
        summary=f"CIFAR-{classes}, 32 pixels, ResNet-18 with a 3×3 stem",
        data=DataConfig(layout="cifar10" if classes == 10 else "cifar100", size=32, classes=classes),
        architecture="resnet18-cifar",
        synthesis=SynthesisConfig(**statistics),
        squeeze=SqueezeConfig(**statistics),
        validation=ValidationConfig(**statistics),
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="digits",
            summary="scikit-learn's handwritten digits, 16 pixels, a small ResNet: minutes on a CPU",
            data=DataConfig(layout="digits", size=16, classes=10),
            architecture="small-resnet",
            synthesis=SynthesisConfig(iterations=300, learning_rate=0.1, jitter=2, **_DIGITS),
            squeeze=SqueezeConfig(epochs=12, learning_rate=0.05, padding=2, flip=0.0, **_DIGITS),
            validation=ValidationConfig(epochs=300, padding=2, flip=0.0, temperature=20.0, **_DIGITS),
        ),
        _cifar("cifar10", 10, _CIFAR10),
        _cifar("cifar100", 100, _CIFAR100),
        Recipe(
            name="tiny",
            summary="Tiny-ImageNet, 64 pixels, ResNet-18 with a 3×3 stem",
            data=DataConfig(layout="tiny", size=64, classes=200),
            architecture="resnet18-cifar",
            synthesis=SynthesisConfig(iterations=2000, learning_rate=0.1, view="crop", **_TINY),
            squeeze=SqueezeConfig(epochs=100, **_TINY),
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
                **_TINY,
            ),
        ),
        Recipe(
            name="imagenet",
            summary="ImageNet-1K, 224 pixels, torchvision's ResNet-18",
            data=DataConfig(layout="folder", size=224, classes=1000),
            architecture="resnet18",
            synthesis=SynthesisConfig(iterations=2000, lambda_var=0.02, view="crop", jitter=32, **_IMAGENET),
            squeeze=SqueezeConfig(epochs=90, batch_size=256, weight_decay=1e-4, augmentation="resized-crop", **_IMAGENET),
            validation=ValidationConfig(
                epochs=300, augmentation="resized-crop", mixing="cutmix", mixing_alpha=1.0, temperature=20.0, **_IMAGENET
            ),
        ),
        Recipe(
            name="folder",
            summary="your own folder of class folders, with ImageNet's settings and any number of classes",
            data=DataConfig(layout="folder", size=224),
            architecture="resnet18",
            synthesis=SynthesisConfig(iterations=2000, lambda_var=0.02, view="crop", jitter=32, **_IMAGENET),
            squeeze=SqueezeConfig(epochs=90, augmentation="resized-crop", **_IMAGENET),
            validation=ValidationConfig(
                epochs=300, augmentation="resized-crop", mixing="cutmix", mixing_alpha=1.0, temperature=20.0, **_IMAGENET
            ),
        ),
    )
}


def full_recipe(name: str, *, method: str = "dwa") -> Recipe:
    """All settings of a data set, with the synthesis of a method.

    Args:
        name: digits, cifar10, cifar100, tiny, imagenet, folder.
        method: dwa, sre2l (noise start, λ = 0.01, no step), real-start (no step), random-step, coupled (λ_mean = λ_var).
    Raises:
        InputError: no such recipe or method.
    """
    check_choice("recipe", name, list(RECIPES))
    check_choice("method", method, list(METHODS))
    chosen = RECIPES[name]
    return replace(chosen, synthesis=METHODS[method](chosen.synthesis))


def recipe(name: str, *, method: str = "dwa", **changes: Any) -> SynthesisConfig:
    """The synthesis settings of a data set and method, with single fields changed: `recipe("cifar100", iterations=200)`.

    Raises:
        InputError: no such recipe or method, or a value that cannot be used.
        TypeError: a field that `SynthesisConfig` does not have.
    """
    return replace(full_recipe(name, method=method).synthesis, **changes)

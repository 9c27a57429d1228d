"""Settings: frozen dataclasses that are validated on creation.

The comment after a field is its help text on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dwa_fast.errors import InputError

Ascent = Literal["directed", "random", "none"]
MatchingWeights = Literal["adjusted", "original"]
View = Literal["roll", "crop"]
Curriculum = Literal["none", "step", "linear", "cosine"]
Initial = Literal["real", "noise"]
InitialOrder = Literal["sampled", "sorted"]
BackendName = Literal["auto", "reference", "fused", "compiled"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"]
TrainingPrecision = Literal["auto", "fp32", "bf16"]
DataLayout = Literal["digits", "cifar10", "cifar100", "tiny", "folder"]
Augmentation = Literal["pad-crop", "resized-crop", "none"]
Mixing = Literal["none", "mixup", "cutmix"]
Optimiser = Literal["adamw", "sgd"]
SoftOrHard = Literal["soft", "hard"]
TeacherMode = Literal["eval", "train"]
ImageFormat = Literal["png", "jpeg"]
Tracker = Literal["none", "tensorboard", "wandb"]

Progress = Callable[[int, int], None]  # called with the steps done and the steps in all


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise InputError unless value is one of the choices, a Literal or a sequence of strings."""
    known = get_args(choices) or tuple(choices)
    if value not in known:
        raise InputError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def check_integer(name: str, value: Any, at_least: int) -> None:
    """Raise InputError unless value is an integer ≥ at_least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise InputError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def check_real(name: str, value: Any, at_least: float, at_most: float = math.inf, *, above: bool = False) -> None:
    """Raise InputError unless value is a finite number in [at_least, at_most], or in (at_least, at_most] if `above`."""
    number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not number or value < at_least or value > at_most or (above and value == at_least):
        low = f"above {at_least:g}" if above else f"of at least {at_least:g}"
        high = f" and at most {at_most:g}" if at_most < math.inf else ""
        raise InputError(f"{name} must be a finite number {low}{high}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Normalisation of pixels in [0, 1]: (pixel − mean) / std, per channel."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # Mean of each channel, for pixels in [0, 1]; 1 or 3 values.
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # Standard deviation of each channel, for pixels in [0, 1]; 1 or 3 values.

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise InputError(f"mean and std must hold 1 or 3 values each, got {len(self.mean)} and {len(self.std)}")
        for value in self.mean:
            check_real("mean", value, 0, 1)
        for value in self.std:
            check_real("std", value, 0, above=True)

    @property
    def channels(self) -> int:
        """Number of colour channels."""
        return len(self.mean)

    @property
    def bounds(self) -> tuple[list[float], list[float]]:
        """Normalised value of a black and of a white pixel, per channel: the clamp of the synthesis."""
        pairs = list(zip(self.mean, self.std, strict=True))
        return [(0 - mean) / std for mean, std in pairs], [(1 - mean) / std for mean, std in pairs]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Normalisation):
    """The real images, their size and their normalisation."""

    layout: DataLayout = "folder"  # Format of the data on disk; digits need no files.
    size: int = 224  # Height and width of every image, pixels.
    classes: int | None = None  # Number of classes that the data must have; None: any.
    held_out_share: float = 0.0  # Test on this fraction of the training images of each class instead of the test images, in [0, 1).
    test_crop: float = 1.0  # Fraction of the shorter side that the centre crop of test images covers, in (0, 1]; image folders only.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("layout", self.layout, DataLayout)
        check_integer("size", self.size, 1)
        if self.classes is not None:
            check_integer("classes", self.classes, 1)
        check_real("held_out_share", self.held_out_share, 0, 1)
        if self.held_out_share == 1:
            raise InputError("held_out_share must be below 1, which would leave nothing to train with")
        check_real("test_crop", self.test_crop, 0, 1, above=True)

    @property
    def test_resize(self) -> int:
        """Shorter side of test images before the centre crop, pixels: 256 for size 224 and test_crop 0.875."""
        return round(self.size / self.test_crop)


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """Directed weight adjustment and the refinement of the images (arXiv 2409.17612, Eq. 11 and 15)."""

    iterations: int = 1000  # T: Adam steps on the images of a batch, at least 1.
    batch_size: int = 100  # B: images refined together, at least 1.
    learning_rate: float = 0.25  # Adam's first learning rate, above 0; falls to 0 on a cosine.
    lambda_mean: float = 0.01  # λ_mean: weight of the BatchNorm mean matching loss, at least 0.
    lambda_var: float = 0.11  # λ_var: weight of the BatchNorm variance matching loss, at least 0.
    first_layer_weight: float = 10.0  # w: weight of the first BatchNorm layer in both matching losses, at least 0.
    tv_l2: float = 0.0  # Weight of SRe2L's total variation prior, at least 0.
    l2_scale: float = 0.0  # Weight of SRe2L's prior on the mean norm of the images, at least 0.
    ascent: Ascent = "directed"  # Weight adjustment: directed (DWA), random (Gaussian of norm ρ), none.
    rho: float = 0.015  # ρ: length of the weight adjustment, at least 0; 0 is the same as ascent none.
    steps: int = 12  # K: ascent steps of length ρ/K, at least 1 where ρ > 0.
    normalize_ascent: bool = True  # Divide each ascent gradient by its global norm, as the published code does; Algorithm 1 does not.
    matching_weights: MatchingWeights = "adjusted"  # Weights of the matching terms: adjusted (published code), original (Eq. 15).
    initial: Initial = "real"  # Where the refinement starts: real images, or Gaussian noise.
    view: View = "roll"  # Shared view of an iteration: roll (CIFAR), or crop, flip and roll (ImageNet).
    crop_scale: tuple[float, float] = (0.08, 1.0)  # Fraction of the image area that a crop covers, within (0, 1].
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # Width divided by height of a crop, above 0.
    curriculum: Curriculum = "none"  # How the smallest crop shrinks from the largest to the smallest value of crop_scale (CDA).
    milestone: float = 1.0  # Fraction of the iterations that the curriculum takes, 0 to 1.
    flip: float = 0.5  # Probability of a horizontal flip in the crop view, 0 to 1.
    jitter: int = 4  # Largest roll in each direction, pixels, at least 0.
    backend: BackendName = "auto"  # fused (our operators), compiled (TorchInductor), reference (plain PyTorch), auto (the best that runs).
    precision: Precision = "auto"  # Arithmetic of the networks; images, statistics and losses stay in fp32.
    concurrent_batches: int = 1  # Batches in flight at once on a GPU, each with its own weights, at least 1.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …

    def __post_init__(self) -> None:
        check_integer("iterations", self.iterations, 1)
        check_integer("batch_size", self.batch_size, 1)
        check_real("learning_rate", self.learning_rate, 0, above=True)
        for name in ("lambda_mean", "lambda_var", "first_layer_weight", "tv_l2", "l2_scale", "rho"):
            check_real(name, getattr(self, name), 0)
        check_choice("ascent", self.ascent, Ascent)
        check_integer("steps", self.steps, 1 if self.adjusts else 0)
        check_choice("matching_weights", self.matching_weights, MatchingWeights)
        check_choice("initial", self.initial, Initial)
        check_choice("view", self.view, View)
        check_range("crop_scale", self.crop_scale, at_most=1)
        check_range("crop_ratio", self.crop_ratio)
        check_choice("curriculum", self.curriculum, Curriculum)
        check_real("milestone", self.milestone, 0, 1)
        check_real("flip", self.flip, 0, 1)
        check_integer("jitter", self.jitter, 0)
        check_integer("concurrent_batches", self.concurrent_batches, 1)
        check_choice("backend", self.backend, BackendName)
        check_choice("precision", self.precision, Precision)

    @property
    def adjusts(self) -> bool:
        """Whether the weights are moved at all."""
        return self.ascent != "none" and self.rho > 0

    @property
    def sees_images(self) -> bool:
        """Whether the initial images change the result: the refinement starts from them, or the weights move along their gradient."""
        return self.initial == "real" or (self.ascent == "directed" and self.adjusts)


@dataclass(frozen=True, kw_only=True)
class InitialConfig:
    """The initial images of a set, class by class."""

    initial_order: InitialOrder = "sampled"  # Initial images of a class: sampled (random, seeded), or sorted (the first by file name).
    initial_tensors: Path | None = None  # Folder of tensor_0.pt, tensor_1.pt, …: the initial image of every class, [classes, C, H, W].
    skip_bad_images: bool = False  # Replace a file that is not a complete image by the next one of its class, and record it; else stop.

    def __post_init__(self) -> None:
        check_choice("initial_order", self.initial_order, InitialOrder)


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """File formats of a set."""

    image_format: ImageFormat = "png"  # Image files: png (lossless) or jpeg.
    jpeg_quality: int = 95  # Quality of jpeg files, 1 to 100; without chroma subsampling.
    losses_every: int = 10  # Iterations between two entries of losses.jsonl; 0: no such file.
    preview: bool = False  # Also draw preview.png, a contact sheet of the first ten images of the first ten classes, as they are finished.
    track: Tracker = "none"  # Also send the losses to tensorboard or wandb (Weights & Biases), where that is installed.

    def __post_init__(self) -> None:
        check_choice("image_format", self.image_format, ImageFormat)
        check_integer("jpeg_quality", self.jpeg_quality, 1)
        check_real("jpeg_quality", self.jpeg_quality, 1, 100)
        check_integer("losses_every", self.losses_every, 0)
        check_choice("track", self.track, Tracker)

    def describe(self) -> dict[str, str | int]:
        """The settings that the bytes of the set depend on."""
        quality = {"jpeg_quality": self.jpeg_quality} if self.image_format == "jpeg" else {}
        return {"image_format": self.image_format, **quality, "losses_every": self.losses_every}


@dataclass(frozen=True, kw_only=True)
class SqueezeConfig:
    """Training of the teacher on the real images: SGD with momentum, cosine learning rate."""

    epochs: int = 200  # Passes over the real images, at least 1.
    batch_size: int = 128  # Images of one step, at least 1.
    learning_rate: float = 0.1  # First learning rate, above 0.
    momentum: float = 0.9  # 0 to 1.
    weight_decay: float = 5e-4  # At least 0.
    augmentation: Augmentation = "pad-crop"  # Random crop after padding, random resized crop, or none.
    padding: int = 4  # Padding of pad-crop, pixels, at least 0.
    flip: float = 0.5  # Probability of a horizontal flip, 0 to 1.
    precision: TrainingPrecision = "auto"  # Arithmetic: fp32, bf16 (weights stay in fp32), auto (bf16 on a GPU that has it, else fp32).
    memory_limit: float = 2.0  # Largest set that is held on the device, GiB of uint8; larger ones are read from disk in every epoch.

    def __post_init__(self) -> None:
        _check_training(self)
        check_real("momentum", self.momentum, 0, 1)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Training of students on the distilled images, with the teacher's soft labels."""

    epochs: int = 400  # Passes over the distilled images, at least 1.
    batch_size: int = 128  # Images of one step, at least 1.
    optimiser: Optimiser = "adamw"  # AdamW or SGD with momentum.
    learning_rate: float = 1e-3  # First learning rate, above 0; falls to 0 on a cosine.
    momentum: float = 0.9  # Of SGD, 0 to 1.
    weight_decay: float = 0.01  # At least 0.
    decay_vectors: bool = True  # Weight decay of biases and normalisation layers too.
    warmup_epochs: int = 0  # Epochs of linear warm-up from ×0.01, at least 0.
    augmentation: Augmentation = "pad-crop"  # Random crop after padding, random resized crop, or none.
    padding: int = 4  # Padding of pad-crop, pixels, at least 0.
    flip: float = 0.5  # Probability of a horizontal flip, 0 to 1.
    mixing: Mixing = "mixup"  # Mixing of images: none, mixup, cutmix.
    mixing_alpha: float = 0.8  # Parameter of the Beta distribution of the mixing, above 0.
    labels: SoftOrHard = "soft"  # Soft (the teacher's probabilities for each batch) or hard (the class).
    temperature: float = 30.0  # Temperature of the soft labels, above 0.
    scale_loss: bool = False  # Multiply the soft loss by temperature².
    teacher_mode: TeacherMode = "eval"  # The published CIFAR script leaves the teacher in train mode.
    students: int = 3  # Students trained, each from a seed of its own, at least 1.
    precision: TrainingPrecision = "auto"  # Arithmetic: fp32, bf16 (weights stay in fp32), auto (bf16 on a GPU that has it, else fp32).
    memory_limit: float = 2.0  # Largest set that is held on the device, GiB of uint8; larger ones are read from disk in every epoch.

    def __post_init__(self) -> None:
        _check_training(self)
        check_choice("optimiser", self.optimiser, Optimiser)
        check_real("momentum", self.momentum, 0, 1)
        check_integer("warmup_epochs", self.warmup_epochs, 0)
        check_choice("mixing", self.mixing, Mixing)
        check_real("mixing_alpha", self.mixing_alpha, 0, above=True)
        check_choice("labels", self.labels, SoftOrHard)
        check_real("temperature", self.temperature, 0, above=True)
        check_choice("teacher_mode", self.teacher_mode, TeacherMode)
        check_integer("students", self.students, 1)


def check_range(name: str, value: tuple[float, float], at_most: float = math.inf) -> None:
    """Raise InputError unless value is (low, high) with 0 < low ≤ high ≤ at_most."""
    if len(value) != 2 or not 0 < value[0] <= value[1] <= at_most:
        high = f" ≤ {at_most:g}" if at_most < math.inf else ""
        raise InputError(f"{name} must be (low, high) with 0 < low ≤ high{high}, got {value}")


def _check_training(config: SqueezeConfig | ValidationConfig) -> None:
    check_integer("epochs", config.epochs, 1)
    check_integer("batch_size", config.batch_size, 1)
    check_real("learning_rate", config.learning_rate, 0, above=True)
    check_real("weight_decay", config.weight_decay, 0)
    check_choice("augmentation", config.augmentation, Augmentation)
    check_integer("padding", config.padding, 0)
    check_real("flip", config.flip, 0, 1)
    check_choice("precision", config.precision, TrainingPrecision)
    check_real("memory_limit", config.memory_limit, 0)

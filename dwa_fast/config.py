"""Settings: frozen dataclasses that are validated on creation.

The comment after a field is its help text on the command line. The values that a field may have stand in its annotation alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dwa_fast.errors import InputError

Ascent = Literal["directed", "random", "none"]
MatchingWeights = Literal["adjusted", "original"]
MatchedStatistics = Literal["running", "class"]
View = Literal["roll", "crop"]
Curriculum = Literal["none", "step", "linear", "cosine"]
TeacherTurns = Literal["iteration", "index"]
Initial = Literal["real", "median", "patches", "noise"]
InitialOrder = Literal["sampled", "sorted"]
BackendName = Literal["auto", "reference", "fused", "compiled"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"]
TrainingPrecision = Literal["auto", "fp32", "bf16"]
DataLayout = Literal["digits", "cifar10", "cifar100", "tiny", "folder"]
Schedule = Literal["cosine", "fast", "short"]
Augmentation = Literal["pad-crop", "resized-crop", "none"]
Mixing = Literal["none", "mixup", "cutmix"]
Optimiser = Literal["adamw", "sgd"]
SoftOrHard = Literal["soft", "hard"]
TeacherMode = Literal["eval", "train"]
TeacherMean = Literal["plain", "balanced"]
SoftLoss = Literal["kl", "mse"]
LogitPrecision = Literal["fp16", "fp32"]
ImageFormat = Literal["png", "jpeg"]
Tracker = Literal["none", "tensorboard", "wandb"]

# Settings that files leave out where they have these values.
LATER_SETTINGS = {
    "batch_ipc": 1,
    "schedule": "cosine",
    "stage_sizes": (),
    "stage_mix": 0.5,
    "teachers_together": 1,
    "teacher_turns": "iteration",
    "teacher_priors": (),
    "rounds": 1,
    "statistics": "running",
}
LATER_SETTINGS |= {"cosine_stretch": 1.0, "accumulation": 1, "loss": "kl", "hard_weight": 0.0, "weight_ema": 0.0}
LATER_SETTINGS |= {"smallest_crop": 0.08, "shuffle_cells": 1, "rand_augment": 0, "rand_magnitude": 9, "teacher_mean": "plain"}

EXECUTION_SETTINGS = {"backend", "concurrent_batches", "device", "precision"}  # settings that say how a set is computed, not what it is

# What people write for a setting.
SHORT_NAMES = {"lr": "learning_rate", "bs": "batch_size", "wd": "weight_decay", "gpu": "device", "model": "architecture"}

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


@dataclass(frozen=True)
class Range:
    """The values of a number, or of both numbers of a pair (low, high), in the annotation of a field."""

    at_least: float = 0
    at_most: float = math.inf
    above: bool = False  # whether `at_least` itself is out of range

    def __str__(self) -> str:
        """The range in words, such as "at least 1"."""
        if not self.above and self.at_most < math.inf:
            return f"{self.at_least:g} to {self.at_most:g}"
        low = f"above {self.at_least:g}" if self.above else f"at least {self.at_least:g}"
        return low + (f", at most {self.at_most:g}" if self.at_most < math.inf else "")


PositiveInt = Annotated[int, Range(at_least=1)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
Positive = Annotated[float, Range(above=True)]
NonNegative = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
PositiveFraction = Annotated[float, Range(at_most=1, above=True)]


def range_of(annotation: Any) -> Range | None:
    """The range in an annotation, also that of `X | None` and of the elements of a tuple."""
    found = [part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Range)]
    return next((each for each in [*found, *map(range_of, get_args(annotation))] if each), None)


def plain(value: Any) -> Any:
    """A number of NumPy, or a tensor of one, as Python's own: settings are written as JSON."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _as_annotated(value: Any, annotation: Any) -> Any:
    """A value in the type of its annotation, where another one says the same: NumPy's numbers, a list for a tuple, text for a path."""
    if annotation is str and type(value).__module__ == "torch":  # a torch.device; without importing torch, which takes a second
        return str(value)
    if isinstance(value, str) and Path in (annotation, *get_args(annotation)):
        return Path(value)
    wanted = {get_origin(annotation), *(get_origin(part) for part in get_args(annotation))}
    if tuple in wanted and hasattr(value, "__iter__") and not isinstance(value, (str, bytes)):
        return tuple(map(plain, value))
    return plain(value)


def check_fields(settings: Any) -> None:
    """Raise InputError unless every field of a dataclass has a value of its annotation: of its Literal, or in its Range."""
    for name, annotation in _annotations(settings.__class__).items():
        _check(name, getattr(settings, name), annotation)


@functools.cache
def _annotations(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _check(name: str, value: Any, annotation: Any) -> None:
    origin, (kind, *others) = get_origin(annotation), get_args(annotation) or (None,)
    if origin is Literal:
        check_choice(name, value, annotation)
    elif origin in (Union, UnionType) and value is not None:
        _check(name, value, kind)
    elif origin is tuple and others == [...]:
        if not isinstance(value, tuple):
            raise InputError(f"{name} must be a list of numbers, got {value!r}")
        for each in value:
            _check(name, each, kind)
    elif annotation is bool and not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}")
    elif annotation is str and not isinstance(value, str):
        raise InputError(f"{name} must be text, got {value!r}")
    elif origin is Annotated and (allowed := range_of(annotation)):
        if get_origin(kind) is tuple:
            _check_pair(name, value, allowed)
            return
        if kind is int:
            check_integer(name, value, int(allowed.at_least))
        check_real(name, value, allowed.at_least, allowed.at_most, above=allowed.above)


def _check_pair(name: str, value: Any, allowed: Range) -> None:
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, (int, float)) and math.isfinite(each) for each in value)
    if not pair or not allowed.at_least < value[0] <= value[1] <= allowed.at_most:
        high = f" ≤ {allowed.at_most:g}" if allowed.at_most < math.inf else " < ∞"
        raise InputError(f"{name} must be (low, high) with {allowed.at_least:g} < low ≤ high{high}, got {value}")


class Config:
    """Settings that are checked on creation. What `help()` does not show, what each means and its range, is in docs/recipes.md."""

    def __post_init__(self) -> None:
        own: Any = self
        for name, annotation in _annotations(own.__class__).items():
            object.__setattr__(self, name, _as_annotated(getattr(self, name), annotation))
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Normalisation(Config):
    """Normalisation of pixels in [0, 1]: (pixel − mean) / std, per channel."""

    mean: tuple[Fraction, ...] = (0.485, 0.456, 0.406)  # Mean of each channel, for pixels in [0, 1]; 1 or 3 values.
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)  # Standard deviation of each channel, for pixels in [0, 1]; 1 or 3 values.

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise InputError(f"mean and std must hold 1 or 3 values each, got {len(self.mean)} and {len(self.std)}")

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
    size: PositiveInt = 224  # Height and width of every image, pixels.
    classes: PositiveInt | None = None  # Number of classes that the data must have; None: any.
    held_out_share: Fraction = 0.0  # Test on this fraction of the training images of each class instead of the test images.
    test_crop: PositiveFraction = 1.0  # Fraction of the shorter side that the centre crop of test images covers; image folders only.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out_share == 1:
            raise InputError("held_out_share must be below 1, which would leave nothing to train with")

    @property
    def test_resize(self) -> int:
        """Shorter side of test images before the centre crop, pixels: 256 for size 224 and test_crop 0.875."""
        return round(self.size / self.test_crop)


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig(Config):
    """Directed weight adjustment and the refinement of the images (arXiv 2409.17612, Eq. 11 and 15)."""

    iterations: NonNegativeInt = 1000  # T: Adam steps on the images of a batch; 0: the initial images stay as they are.
    batch_size: PositiveInt = 100  # B: images that are refined together, at most; at least batch_ipc.
    batch_ipc: PositiveInt | None = 1  # Images of each class in a batch of a set; ipc must be a multiple of it. 1: as published; None: all.
    learning_rate: Positive = 0.25  # Adam's first learning rate; falls to 0 on a cosine.
    lambda_mean: NonNegative = 0.01  # λ_mean: weight of the BatchNorm mean matching loss.
    lambda_var: NonNegative = 0.11  # λ_var: weight of the BatchNorm variance matching loss.
    first_layer_weight: NonNegative = 10.0  # w: weight of the first BatchNorm layer in both matching losses.
    tv_l2: NonNegative = 0.0  # Weight of SRe2L's total variation prior.
    l2_scale: NonNegative = 0.0  # Weight of SRe2L's prior on the mean norm of the images.
    ascent: Ascent = "directed"  # Weight adjustment: directed (DWA), random (Gaussian of norm ρ), none.
    rho: NonNegative = 0.015  # ρ: length of the weight adjustment; 0 is the same as ascent none.
    steps: NonNegativeInt = 12  # K: ascent steps of length ρ/K; not 0 where ρ > 0.
    normalize_ascent: bool = True  # Divide each ascent gradient by its global norm, as the published code does; Algorithm 1 does not.
    matching_weights: MatchingWeights = "adjusted"  # Weights of the matching terms: adjusted (published code), original (Eq. 15).
    statistics: MatchedStatistics = "running"  # Statistics to match: running (Eq. 3), or those of a batch's one class (class; LPLD).
    initial: Initial = "real"  # Start: real images, median (DELT) or patches (RDED), both chosen by the teacher, or Gaussian noise.
    view: View = "roll"  # Shared view of an iteration: roll (CIFAR), or crop, flip and roll (ImageNet).
    crop_scale: Annotated[tuple[float, float], Range(at_most=1, above=True)] = (0.08, 1.0)  # Fraction of the image area that a crop covers.
    crop_ratio: Annotated[tuple[float, float], Range(above=True)] = (3 / 4, 4 / 3)  # Width divided by height of a crop.
    curriculum: Curriculum = "none"  # How the smallest crop shrinks from the largest to the smallest value of crop_scale (CDA).
    milestone: Fraction = 1.0  # Fraction of the iterations that the curriculum takes.
    flip: Fraction = 0.5  # Probability of a horizontal flip in the crop view.
    jitter: NonNegativeInt = 4  # Largest roll in each direction, pixels.
    stage_sizes: tuple[PositiveInt, ...] = ()  # Sizes of the refinement's stages, pixels; the last is the images' own. Empty: one stage.
    stage_mix: Fraction = 0.5  # α: share of the refined images where a stage begins; the rest is the initial images (FADRM).
    rounds: PositiveInt = 1  # M: rounds of T/M iterations; from one to the next more images of each class in a batch are refined (DELT).
    teachers_together: PositiveInt = 1  # Teachers in an iteration, whose losses are added with weights; all such choices take turns.
    teacher_turns: TeacherTurns = "iteration"  # Turns of several teachers: by iteration (FADRM+), or by the image index of a set (CV-DD).
    teacher_priors: tuple[NonNegative, ...] = ()  # Accuracy of each teacher's images, %: the weights are softmax(prior / 5). Empty: equal.
    backend: BackendName = "auto"  # fused (our operators), compiled (TorchInductor), reference (plain PyTorch), auto (the best that runs).
    precision: Precision = "auto"  # Arithmetic of the networks; images, statistics and losses stay in fp32.
    concurrent_batches: PositiveInt = 1  # Batches in flight at once on a GPU, each with its own weights.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adjusts:
            check_integer("steps", self.steps, 1)
        if 0 < self.iterations < len(self.stage_sizes):
            raise InputError(f"iterations must be at least the number of stages, {len(self.stage_sizes)}, got {self.iterations}")
        if 0 < self.iterations < self.rounds:
            raise InputError(f"iterations must be at least the number of rounds, {self.rounds}, got {self.iterations}")
        if self.rounds > 1 and self.stage_sizes:
            raise InputError("a refinement has several rounds or stages of several sizes, not both; leave out rounds or stage_sizes")

    @property
    def adjusts(self) -> bool:
        """Whether the weights are moved at all."""
        return self.ascent != "none" and self.rho > 0

    @property
    def matches_class(self) -> bool:
        """Whether each batch holds one class, whose statistics it is matched with."""
        return self.statistics == "class" and self.iterations > 0

    @property
    def sees_images(self) -> bool:
        """Whether the initial images change the result: the refinement starts from them, or the weights move along their gradient."""
        return self.initial != "noise" or (self.ascent == "directed" and self.adjusts)


@dataclass(frozen=True, kw_only=True)
class InitialConfig(Config):
    """The initial images of a set, class by class."""

    initial_order: InitialOrder = "sampled"  # Initial images of a class: sampled (random, seeded), or sorted (the first by file name).
    initial_tensors: Path | None = None  # Folder of tensor_0.pt, tensor_1.pt, …: the initial image of every class, [classes, C, H, W].
    skip_bad_images: bool = False  # Replace a file that is not a complete image by the next one of its class, and record it; else stop.
    patch_candidates: PositiveInt = 300  # Patches: real images of each class that they are cut from; each gives its best one.
    patch_crops: PositiveInt = 5  # Patches: random crops that are tried of each of them.
    patch_factor: PositiveInt = 1  # Patches: an image is made of factor × factor of them; as published 1 at 32 and 64 pixels, 2 at 224.


@dataclass(frozen=True, kw_only=True)
class StorageConfig(Config):
    """File formats of a set."""

    image_format: ImageFormat = "png"  # Image files: png (lossless) or jpeg.
    jpeg_quality: Annotated[int, Range(1, 100)] = 95  # Quality of jpeg files; without chroma subsampling.
    losses_every: NonNegativeInt = 10  # Iterations between two entries of losses.jsonl; 0: no such file.
    preview: bool = False  # Also draw preview.png, a contact sheet of the first ten images of the first ten classes, as they are finished.
    track: Tracker = "none"  # Also send the losses to tensorboard or wandb (Weights & Biases), where that is installed.

    def describe(self) -> dict[str, str | int]:
        """The settings that the bytes of the set depend on."""
        quality = {"jpeg_quality": self.jpeg_quality} if self.image_format == "jpeg" else {}
        return {"image_format": self.image_format, **quality, "losses_every": self.losses_every}


@dataclass(frozen=True, kw_only=True)
class SqueezeConfig(Config):
    """Training of the teacher on the real images with SGD.

    Schedules fast and short: Nesterov's momentum; a learning rate that rises linearly over a fifth of the steps and falls linearly to 0;
    label smoothing of 0.1; and each image is mirrored in every other epoch instead of at random.
    """

    schedule: Schedule = "cosine"  # cosine, as published; fast, for a tenth of the epochs; short, the same for a fiftieth.
    epochs: PositiveInt = 200  # Passes over the real images.
    batch_size: PositiveInt = 128  # Images of one step.
    learning_rate: Positive = 0.1  # Highest learning rate: at first, falling to 0 on a cosine, or after a fifth of the other schedules.
    momentum: Fraction = 0.9  # Momentum of SGD.
    weight_decay: NonNegative = 5e-4  # Weight decay.
    augmentation: Augmentation = "pad-crop"  # Random crop after padding, random resized crop, or none.
    padding: NonNegativeInt = 4  # Padding of pad-crop, pixels.
    flip: Fraction = 0.5  # Probability of a horizontal flip.
    precision: TrainingPrecision = "auto"  # Arithmetic: fp32, bf16 (weights stay in fp32), auto (bf16 on a GPU that has it, else fp32).
    memory_limit: NonNegative = 2.0  # Largest set that is held on the device, GiB of uint8; larger ones are read from disk in every epoch.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.one_cycle and self.momentum == 0:
            raise InputError(f"momentum must be above 0 for schedule {self.schedule!r}, which takes Nesterov's, got 0")

    @property
    def one_cycle(self) -> bool:
        """Whether the learning rate rises and falls in straight lines, with all that goes with it: not so on the published cosine."""
        return self.schedule != "cosine"


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Config):
    """Training of students on the distilled images, with the teacher's soft labels."""

    epochs: PositiveInt = 400  # Passes over the distilled images.
    batch_size: PositiveInt | None = 128  # Images of one step; None: by images per class and classes, as RDED has it.
    accumulation: PositiveInt = 1  # Parts of a batch that pass through the networks one by one, at least two images each; one step for all.
    optimiser: Optimiser = "adamw"  # AdamW or SGD with momentum.
    learning_rate: Positive = 1e-3  # First learning rate; falls to 0 on a cosine.
    cosine_stretch: Annotated[float, Range(at_least=1)] = 1.0  # ζ: the cosine would reach 0 after ζ × epochs; 2: it ends at half the rate.
    momentum: Fraction = 0.9  # Momentum of SGD.
    weight_decay: NonNegative = 0.01  # Weight decay.
    decay_vectors: bool = True  # Weight decay of biases and normalisation layers too.
    warmup_epochs: NonNegativeInt = 0  # Epochs of linear warm-up from ×0.01.
    augmentation: Augmentation = "pad-crop"  # Random crop after padding, random resized crop, or none.
    padding: NonNegativeInt = 4  # Padding of pad-crop, pixels.
    flip: Fraction = 0.5  # Probability of a horizontal flip.
    smallest_crop: PositiveFraction = 0.08  # Smallest area of resized-crop, share of the image.
    shuffle_cells: Annotated[int, Range(1, 16)] = 1  # Cut images into n × n cells, shuffled as columns and as rows before the crop; 1: not.
    rand_augment: NonNegativeInt = 0  # RandAugment before the crop: torchvision's operations per image, drawn for each; 0: not.
    rand_magnitude: Annotated[int, Range(0, 30)] = 9  # Strength of RandAugment.
    mixing: Mixing = "mixup"  # Mixing of images: none, mixup, cutmix.
    mixing_alpha: Positive = 0.8  # Parameter of the Beta distribution of the mixing.
    labels: SoftOrHard = "soft"  # Soft (the teacher's probabilities for each batch) or hard (the class).
    temperature: Positive = 30.0  # Temperature of the soft labels.
    scale_loss: bool = False  # Multiply the soft loss by temperature².
    loss: SoftLoss = "kl"  # With soft labels: kl (divergence at the temperature), mse (mean squared error of the logits).
    hard_weight: NonNegative = 0.0  # c: weight of the cross-entropy with each image's own class, added to the soft loss.
    teacher_mode: TeacherMode = "eval"  # The published CIFAR script leaves the teacher in train mode.
    teacher_mean: TeacherMean = "plain"  # Logits of several teachers: plain mean, or balanced (first scaled to equal norms over a batch).
    weight_ema: Fraction = 0.0  # Rate per step of an average of the weights that is tested in their place, below 1; 0: none.
    students: PositiveInt = 3  # Students trained, each from a seed of its own.
    precision: TrainingPrecision = "auto"  # Arithmetic of student and soft labels: fp32, bf16, auto (bf16 on a GPU that has it, else fp32).
    memory_limit: NonNegative = 2.0  # Largest set that is held on the device, GiB of uint8; larger ones are read from disk in every epoch.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_ema == 1:
            raise InputError("weight_ema must be below 1, at which the average would never move")


@dataclass(frozen=True, kw_only=True)
class FkdConfig(Config):
    """Soft labels as FKD files: what SRe2L's relabel and LPLD's label pruning write."""

    logits: LogitPrecision = "fp16"  # FKD: precision of the stored logits.
    sample_indices: bool = False  # FKD: also the numbers of the images, for G-VBSM's reader; SRe2L's refuses them.
    pool_share: PositiveFraction = 1.0  # FKD: share of all batches that get labels (LPLD); each epoch of a student draws from them. 1: all.

"""Shared by the training of teachers and students: loop, learning rate schedule, precision, checks and test accuracy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dwa_fast.config import (
    LATER_SETTINGS,
    Normalisation,
    Progress,
    SqueezeConfig,
    TeacherMean,
    TrainingPrecision,
    ValidationConfig,
)
from dwa_fast.data.images import ImageSet
from dwa_fast.data.loader import TrainingBatch, TrainingLoader, batch_size_of, batch_sizes, parts
from dwa_fast.data.pixels import normalise
from dwa_fast.engine.backend import own_defaults, repeatable
from dwa_fast.engine.memory import kept_memory
from dwa_fast.engine.training_form import Forward, takes_channels_last, training_form
from dwa_fast.errors import InputError
from dwa_fast.models.architectures import build
from dwa_fast.models.checkpoint import weight_digest
from dwa_fast.models.finite import check_finite_weights, check_logits, has_finite_weights, refuse_probabilities
from dwa_fast.recipes import Recipe
from dwa_fast.seeding import derive, seeded_layers
from dwa_fast.training.state import TrainingState, WeightAverage, as_in_files
from dwa_fast.training.step import TrainingStep

SoftLabelFn = Callable[[TrainingBatch], Tensor]  # batch → teacher logits, [B, classes] float32

TEACHER_SETTINGS = ("teacher", "teacher_mode", "teacher_mean", "accumulation")  # what teacher_settings may hold
_EVALUATION_BATCH = 500
_WORTH_FUSING = 1000  # images that a CPU tests in less time with the fused form, which takes a second or two to make


def new_network(architecture: str, *, classes: int, channels: int, size: int, seed: int, device: torch.device) -> nn.Module:
    """A network whose random weights depend on the seed alone. The global generator of torch is not advanced."""
    with seeded_layers(derive(seed, "weights"), torch.device("cpu")):
        return build(architecture, classes=classes, channels=channels, size=size).to(device)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: TrainingLoader,
    losses: Callable[[TrainingBatch], Iterable[Tensor]],
    *,
    epochs: int,
    learning_rate: float,
    one_cycle: bool = False,
    stretch: float = 1,
    warmup_epochs: float = 0,
    weight_ema: float = 0,
    seed: int,
    remedy: Callable[[], str],
    state: TrainingState | None = None,
    progress: Progress | None = None,
    test: Callable[[int], object] | None = None,
    test_every: int = 0,
    captures: bool = True,
) -> None:
    """Train a network for `epochs` epochs, resuming from `state` if it holds finished ones.

    Args:
        losses: the losses of the parts of a batch, whose gradients are added up for one step; the network is in train mode.
        learning_rate: highest learning rate; falls to 0 on a cosine, or in a straight line if `one_cycle`.
        stretch: ζ of the cosine. warmup_epochs: epochs in which the learning rate rises to it.
        weight_ema: rate per step of an average of the weights, which is tested in their place and becomes the result; 0: none.
        seed: seeds dropout and other random layers, separately for each epoch. The global generators of torch are not advanced.
        remedy: gives the advice in the error message about a diverged training.
        state: checkpoint, read at the start and written between epochs.
        progress: called with the finished steps, including those of an earlier run, and the total.
        test: called with the number of finished epochs after every `test_every`-th, but not after the last one; may leave the network in
            eval mode, and must not draw random numbers. test_every: 0: never.
        captures: whether steps may be captured on a GPU; the losses must then depend on the tensors of a batch alone, not on its plan.
    Raises:
        InputError: the loss or a weight is not finite after an epoch. The state of that epoch is not saved.
    """
    model.train()
    if takes_channels_last(model, loader.device):
        model.to(memory_format=torch.channels_last)  # as the images are: convolutions then copy no weights and no gradients
    average = WeightAverage(model, weight_ema) if weight_ema else None
    finished = state.restore(model, optimizer, average) if state else 0
    total, done = epochs * loader.steps, finished * loader.steps
    warmup = round(warmup_epochs * loader.steps)

    def factor(step: int) -> float:
        return triangle(step, total, warmup) if one_cycle else cosine(step, total, warmup, stretch)

    if progress and done:
        progress(done, total)
    step = TrainingStep(model, optimizer, losses, average, loader.device, captures=captures)
    with kept_memory(loader.device), closing(step):
        for epoch in range(finished, epochs):
            with seeded_layers(derive(seed, "dropout", epoch), loader.device), repeatable(), step.epoch():
                for batch in loader.epoch(epoch):
                    step.take(batch, learning_rate * factor(done))
                    done += 1
                    if progress:
                        progress(done, total)
            if not step.total_loss.isfinite() or not has_finite_weights(model):
                what = "weights" if step.total_loss.isfinite() else "loss"
                raise InputError(f"training diverged: {what} not finite in epoch {epoch + 1} of {epochs}; {remedy()}")
            if test and test_every and (epoch + 1) % test_every == 0 and epoch + 1 < epochs:
                with average.in_place() if average else nullcontext():
                    test(epoch + 1)
                model.train()
            if state:
                state.save(model, optimizer, epoch + 1, average)
    if average:
        average.swap()
    for weight in model.parameters():
        weight.data = as_in_files(weight.data)


def cosine(step: float, steps: int, warmup: int = 0, stretch: float = 1) -> float:
    """Learning rate factor of a step: linear from 0.01 to 1 during warm-up, then ½(1 + cos(πt/ζ)) for t from 0 to 1.

    Args:
        stretch: ζ ≥ 1; 1 ends at 0, 2 at ½ (RDED and EDC, whose rate changes by the epoch, not by the step).
    """
    if step < warmup:
        return 0.01 + 0.99 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup) / stretch))


def triangle(step: float, steps: int, warmup: int) -> float:
    """Learning rate factor of a step: linear up to 1 at `warmup`, then linear to 0 at `steps`."""
    return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / max(1, steps - warmup)


def remedy(config: SqueezeConfig | ValidationConfig, precision: TrainingPrecision) -> str:
    """Advice for the error message about a diverged training."""
    return f"lower --learning-rate ({config.learning_rate:g})" + (" or take --precision fp32" if precision == "bf16" else "")


def resolve_precision(precision: TrainingPrecision, device: torch.device) -> TrainingPrecision:
    """Resolve "auto": bf16 on GPUs with native support (compute capability 8.0), else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def predict(
    model: Forward,
    images: Tensor,  # [B, C, H, W]
    precision: TrainingPrecision,  # resolved
) -> Tensor:  # [B, classes] float32
    """Logits, computed under autocast for bf16; the weights stay in fp32."""
    # Inside another autocast, also one that is off, PyTorch would keep the rounded weights from step to step.
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        logits: Tensor = model(images)
    return logits.float()


def check_set(data: ImageSet, what: str) -> None:
    """Check the labels of a set.

    Args:
        what: name of the images in the error message, such as "held-out images".
    Raises:
        InputError: the set is empty, or a label is not the number of a class.
    """
    if len(data.labels) == 0:
        raise InputError(f"there are no {what}; expected at least one")
    low, high, last = int(data.labels.min()), int(data.labels.max()), len(data.class_names) - 1
    if low < 0 or high > last:
        raise InputError(f"labels of the {what} must lie in 0 … {last}, the classes of the set, got {low if low < 0 else high}")


def check_teacher_logits(teacher: nn.Module, data: ImageSet, normalisation: Normalisation, device: torch.device) -> None:
    """Run a teacher on the first two images of a set and check its logits.

    Raises:
        InputError: a weight or running statistic is not finite, the teacher cannot process the images, or its logits are not finite and of
            shape [N, classes], with as many classes as the set has.
    """
    check_finite_weights(teacher)
    module = copy.deepcopy(teacher).to(device).eval()
    images = normalise(data.load(range(min(2, len(data.labels)))).to(device), normalisation)
    try:
        with torch.no_grad():
            logits = module(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"teacher cannot take images of shape {tuple(images.shape[1:])}: {str(error).splitlines()[0]}") from error
    refuse_probabilities(check_logits(logits, "teacher", len(data.class_names)), "teacher")


def check_batches(make: Callable[[], nn.Module], data: ImageSet, sizes: Sequence[int], device: torch.device, owner: str) -> None:
    """Check that the smallest batch of an epoch can pass through a network in train mode.

    Args:
        sizes: images of the batches. make: builds the network on the device; called only if the smallest batch has one image.
        owner: name of the network in the error message.
    Raises:
        InputError: a batch of one image leaves a BatchNorm layer with a single value per channel.
    """
    if min(sizes) > 1:
        return
    try:
        with torch.no_grad(), seeded_layers(0, device):
            make().train()(torch.zeros(1, *data.image_shape, device=device))
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise InputError(
            f"a batch of one image leaves a BatchNorm layer of the {owner} with one value per channel, from which no variance can be "
            "computed in train mode; raise --batch-size or --ipc, or choose a network that keeps more pixels, such as a -cifar one"
        ) from error


def check_label_teacher(teacher: nn.Module, data: ImageSet, recipe: Recipe, device: torch.device) -> None:
    """Check that a teacher can label the batches of a set.

    Raises:
        InputError: as `check_teacher_logits`, and for a teacher in train mode as `check_batches`.
    """
    check_teacher_logits(teacher, data, recipe.data, device)
    if recipe.validation.teacher_mode == "train":
        size = batch_size_of(recipe.validation, len(data.labels), len(data.class_names))
        check_batches(lambda: copy.deepcopy(teacher).to(device), data, batch_sizes(len(data.labels), size), device, "teacher")


def with_batch_size(recipe: Recipe, data: ImageSet) -> Recipe:
    """The recipe with the batch size of the validation as a number."""
    size = batch_size_of(recipe.validation, len(data.labels), len(data.class_names))
    return replace(recipe, validation=replace(recipe.validation, batch_size=size))


def teacher_settings(teachers: Sequence[nn.Module], config: ValidationConfig) -> dict[str, Any]:
    """What soft labels depend on besides the views and the precision: the teachers and how their logits are computed."""
    digests = [weight_digest(each) for each in teachers]
    settings: dict[str, Any] = {"teacher": digests[0] if len(digests) == 1 else digests, "teacher_mode": config.teacher_mode}
    if config.teacher_mode == "train":
        settings["accumulation"] = config.accumulation
    if len(digests) > 1:
        settings["teacher_mean"] = config.teacher_mean
    return {name: value for name, value in settings.items() if name not in LATER_SETTINGS or value != LATER_SETTINGS[name]}


def label_precision(precision: TrainingPrecision) -> dict[str, Any]:
    """The setting that soft labels computed in that precision add to those of `teacher_settings`; none for fp32."""
    return {} if precision == "fp32" else {"label_precision": precision}


def as_teachers(teacher: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    """The teachers of an argument that may hold none, one or several.

    Raises:
        InputError: it is an empty sequence.
    """
    if teacher is None or isinstance(teacher, nn.Module):
        return [] if teacher is None else [teacher]
    if not teacher:
        raise InputError("expected at least one teacher, got an empty list")
    return list(teacher)


def teacher_labels(
    teachers: Sequence[nn.Module], config: ValidationConfig, image_shape: tuple[int, int, int], device: torch.device
) -> SoftLabelFn:
    """A function that gives the mean logits of the teachers for a batch, whose parts (`accumulation`) they see one by one.

    They are computed in the precision of the settings, as the student's steps are. It uses copies, so train mode does not change the
    teachers' statistics. Train mode with two parts is BSSL of CV-DD and FADRM.
    """

    def form(teacher: nn.Module) -> Forward:
        own = copy.deepcopy(teacher).to(device).requires_grad_(False).train(config.teacher_mode == "train")
        if takes_channels_last(own, device):
            own.to(memory_format=torch.channels_last)
        return training_form(own, image_shape, device)

    forwards, precision = [form(each) for each in teachers], resolve_precision(config.precision, device)

    @torch.no_grad()
    def soft_labels(batch: TrainingBatch) -> Tensor:
        rows = parts(len(batch.images), config.accumulation)
        return mean_logits(
            [torch.cat([predict(each, batch.images[part], precision) for part in rows]) for each in forwards], config.teacher_mean
        )

    return soft_labels


def mean_logits(
    logits: Sequence[Tensor],  # of each teacher, [B, classes]
    kind: TeacherMean,
) -> Tensor:  # [B, classes]
    """The mean of several teachers' logits; balanced: each first scaled so that its Frobenius norm is the mean of all norms (G-VBSM)."""
    if len(logits) == 1:
        return logits[0]
    stacked = torch.stack(list(logits))
    if kind == "balanced":
        norms = stacked.flatten(1).norm(dim=1)
        stacked = stacked * (norms.mean() / norms)[:, None, None]
    return stacked.mean(0)


@own_defaults()
@torch.no_grad()
def top1(model: nn.Module, data: ImageSet, normalisation: Normalisation, device: torch.device) -> float:
    """Top-1 accuracy on a set, percent. Leaves the model in eval mode.

    Raises:
        InputError: the set is empty, a label is not the number of a class, or the logits are not finite and of these classes.
    """
    check_set(data, "held-out images")
    model.eval()
    fuses = device.type == "cpu" and len(data.labels) >= _WORTH_FUSING
    forward, correct = training_form(model, data.image_shape, device) if fuses else model, 0
    with repeatable(), kept_memory(device):
        for start in range(0, len(data.labels), _EVALUATION_BATCH):
            indices = range(start, min(start + _EVALUATION_BATCH, len(data.labels)))
            logits = check_logits(forward(normalise(data.load(indices).to(device), normalisation)), "network", len(data.class_names))
            correct += int((logits.argmax(1).cpu() == data.labels[start : indices.stop]).sum())
    return 100 * correct / len(data.labels)

"""What the training of teachers and of students shares: the loop, the learning rate, the arithmetic, the test."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dwa_fast.config import Normalisation, Progress, SqueezeConfig, TeacherMode, TrainingPrecision, ValidationConfig
from dwa_fast.data.datasets import ImageSet, normalise
from dwa_fast.data.loader import Lesson, Lessons, batch_sizes
from dwa_fast.errors import InputError
from dwa_fast.models.architectures import build
from dwa_fast.models.finite import check_finite_weights, check_logits, has_finite_weights
from dwa_fast.seeding import derive
from dwa_fast.threads import computing
from dwa_fast.training.state import TrainingState

Teach = Callable[[Lesson], Tensor]  # a lesson's soft labels: logits, [B, classes] float32

_EVALUATION_BATCH = 500


def fresh(architecture: str, *, classes: int, channels: int, size: int, seed: int, device: torch.device) -> nn.Module:
    """A network with random weights that depend on the seed alone; the global generator of torch is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return build(architecture, classes=classes, channels=channels, size=size).to(device)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lessons: Lessons,
    loss: Callable[[Lesson], Tensor],
    *,
    epochs: int,
    learning_rate: float,
    warmup_epochs: int = 0,
    seed: int,
    remedy: Callable[[], str],
    state: TrainingState | None = None,
    progress: Progress | None = None,
) -> None:
    """Train a network on the lessons of all epochs; where `state` holds those that are finished, on the rest.

    Args:
        loss: of one lesson, from the network in train mode.
        learning_rate: the first one; it falls to 0 on a cosine.
        seed: of dropout and the like, anew for each epoch; the global generators of torch are left as they were.
        remedy: says what to do where the training has diverged, for the message.
        state: where the training is kept, between epochs.
        progress: called with the steps done, those of an earlier run first, and the steps in all.
    Raises:
        InputError: the loss or a weight is not finite after an epoch, whose state is then not saved.
    """
    model.train()
    begun = state.restore(model, optimizer) if state else 0
    total, done = epochs * lessons.steps, begun * lessons.steps
    if progress and done:
        progress(done, total)
    for epoch in range(begun, epochs):
        threads, losses = computing(state.threads if state else None), torch.zeros((), device=lessons.device)
        with seeded_layers(derive(seed, "dropout", epoch), lessons.device), repeatable(), threads:
            for lesson in lessons.epoch(epoch):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * cosine(done, total, warmup_epochs * lessons.steps)
                optimizer.zero_grad()
                value = loss(lesson)
                value.backward()
                optimizer.step()
                losses += value.detach()
                done += 1
                if progress:
                    progress(done, total)
        if not losses.isfinite() or not has_finite_weights(model):
            what = "weights" if losses.isfinite() else "loss"
            raise InputError(f"training diverged: {what} not finite in epoch {epoch + 1} of {epochs}; {remedy()}")
        if state:
            state.save(model, optimizer, epoch + 1)


def cosine(step: float, steps: int, warmup: int = 0) -> float:
    """Factor of the learning rate: linear from 0.01 to 1 during the warm-up, then a cosine to 0."""
    if step < warmup:
        return 0.01 + 0.99 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def remedy(config: SqueezeConfig | ValidationConfig, precision: TrainingPrecision) -> str:
    """What to do where a training diverges, for the message."""
    return f"lower --learning-rate ({config.learning_rate:g})" + (" or take --precision fp32" if precision == "bf16" else "")


def resolve_precision(precision: TrainingPrecision, device: torch.device) -> TrainingPrecision:
    """What "auto" stands for: bf16 where a GPU computes it natively, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def predict(
    model: nn.Module,
    images: Tensor,  # [B, C, H, W]
    precision: TrainingPrecision,  # resolved
) -> Tensor:  # [B, classes] float32
    """Logits, computed in that precision; the weights stay in fp32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(images)
    return logits.float()


def check_set(data: ImageSet, what: str) -> None:
    """Check the labels of a set.

    Args:
        what: the images are, in the message: "held-out images".
    Raises:
        InputError: there are none, or one is not the number of a class.
    """
    if len(data.labels) == 0:
        raise InputError(f"there are no {what}; wanted at least one")
    low, high, last = int(data.labels.min()), int(data.labels.max()), len(data.class_names) - 1
    if low < 0 or high > last:
        raise InputError(f"labels of the {what} must lie in 0 … {last}, the classes of the set, got {low if low < 0 else high}")


def check_teacher(teacher: nn.Module, data: ImageSet, normalisation: Normalisation, device: torch.device) -> None:
    """Check a teacher by its logits for the first two images of a set.

    Raises:
        InputError: a weight or a statistic of it is not finite, it cannot take the images, or it gives no finite [N, classes] logits of as
            many classes as the set has.
    """
    check_finite_weights(teacher)
    module = copy.deepcopy(teacher).to(device).eval()
    images = normalise(data.load(range(min(2, len(data.labels)))).to(device), normalisation)
    try:
        with torch.no_grad():
            logits = module(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"teacher cannot take images of shape {tuple(images.shape[1:])}: {str(error).splitlines()[0]}") from error
    check_logits(logits, "teacher", len(data.class_names))


def check_batches(make: Callable[[], nn.Module], data: ImageSet, batch_size: int, device: torch.device, owner: str) -> None:
    """Check that the smallest batch of a set passes through a network in train mode.

    Args:
        make: gives a network on the device to try, where there is such a batch. owner: what it is called in the message.
    Raises:
        InputError: it holds one image, which leaves a BatchNorm layer with one value per channel.
    """
    if min(batch_sizes(len(data.labels), batch_size)) > 1:
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


def check_teaching(teacher: nn.Module, data: ImageSet, config: ValidationConfig, device: torch.device) -> None:
    """Check that a teacher can label the batches of a set.

    Raises:
        InputError: as `check_teacher`, or, of a teacher in train mode, as `check_batches`.
    """
    check_teacher(teacher, data, config, device)
    if config.teacher_mode == "train":
        check_batches(lambda: copy.deepcopy(teacher).to(device), data, config.batch_size, device, "teacher")


def teaching(teacher: nn.Module, mode: TeacherMode, device: torch.device) -> Teach:
    """The teacher's logits for each lesson, from a copy of its own: what train mode does to running statistics stays in there."""
    module = copy.deepcopy(teacher).to(device).requires_grad_(False).train(mode == "train")

    @torch.no_grad()
    def teach(lesson: Lesson) -> Tensor:
        return predict(module, lesson.images, "fp32")

    return teach


@contextmanager
def seeded_layers(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, dropout and the like draw from this seed; afterwards torch's generators are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, cuDNN takes the same algorithms every time, so that the same seed gives the same bits."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@torch.no_grad()
def top1(model: nn.Module, data: ImageSet, normalisation: Normalisation, device: torch.device) -> float:
    """Share of the images whose class the model names, percent; the model is left in eval mode.

    Raises:
        InputError: there is no image, a label is not the number of a class, or the model gives no finite logits of these classes.
    """
    check_set(data, "held-out images")
    model.eval()
    right = 0
    with repeatable():
        for start in range(0, len(data.labels), _EVALUATION_BATCH):
            indices = range(start, min(start + _EVALUATION_BATCH, len(data.labels)))
            logits = check_logits(model(normalise(data.load(indices).to(device), normalisation)), "network", len(data.class_names))
            right += int((logits.argmax(1).cpu() == data.labels[start : indices.stop]).sum())
    return 100 * right / len(data.labels)

"""`synthesize`: images in memory are refined and come back in memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwa_fast.config import Normalisation, Progress, check_integer, plain
from dwa_fast.data.pixels import denormalise, to_levels
from dwa_fast.data.teacher_check import check_predictions
from dwa_fast.engine.class_statistics import ClassStatistics, aims
from dwa_fast.engine.synthesis import Batch, Synthesizer, check_arguments, check_label_range
from dwa_fast.engine.turns import warn_of_idle_teachers
from dwa_fast.errors import InputError
from dwa_fast.models.wrappers import listed
from dwa_fast.recipes import Recipe, check_recipe
from dwa_fast.sets.exchange import write_set

log = logging.getLogger("dwa_fast")

_BEYOND = 2.0  # how far outside of [0, 1] a pixel may lie; Gaussian noise, which some methods start from, reaches some way
_TRIED = 1000  # images at most that the teacher is tried with before the first batch


@dataclass(frozen=True, repr=False)
class SynthesisResult:
    """What `synthesize` returns.

    Attributes:
        images: [N, C, H, W] float32 (float64 in that precision), normalised, in the order of the input, on its device; pixels for a
            student's own loader, or for `denormalise`.
        losses: [batches, T, 3] float32 on the CPU: cross-entropy, R_mean, R_var of each iteration.
        labels: [N], a copy of those that were given.
        recipe: the settings that were given.
        seed: likewise.
        execution: what ran: back-end, precision, kind of device, and on a CPU the number of threads.
    """

    images: Tensor
    losses: Tensor
    labels: Tensor
    recipe: Recipe
    seed: int
    execution: Mapping[str, Any]

    def __repr__(self) -> str:
        batches, iterations, _ = self.losses.shape
        return f"SynthesisResult({len(self.images)} images {list(self.images.shape[1:])}, {batches} batches of {iterations} iterations)"

    def save(self, folder: str | Path, *, class_names: Sequence[str] | None = None) -> None:
        """Write the images as `dwa-fast synthesize` does: PNGs in class folders below `images/`, and beside these a manifest.

        A set holds images of every class, and opens again only if they are squares.

        Args:
            folder: of the set; made where there is none.
            class_names: different names of all classes, in the order of their numbers; default: the numbers.
        Raises:
            InputError: the names are not those of the labels, a class has no image, the folder holds another set or cannot be written.
        """
        labels = self.labels.tolist()
        names = [str(label) for label in range(max(labels) + 1)] if class_names is None else _checked_names(class_names, max(labels))
        levels = to_levels(denormalise(self.images, self.recipe.data))
        # Teacher and initial images are not known here: only the pixels tell a result from another one of the same settings.
        pixels = hashlib.sha256(levels.numpy().tobytes()).hexdigest()
        settings = {**self.recipe.settings("synthesis"), **self.execution, "seed": self.seed, "pixels": pixels}
        write_set(Path(folder), lambda row: levels[row], labels, names, settings)


def _checked_names(names: Sequence[str], last: int) -> list[str]:
    """The class names as a list, if they are different names of the classes 0 … last at least."""
    listed = names if isinstance(names, (list, tuple)) else []
    if not listed or not all(isinstance(name, str) and name for name in listed) or len(set(listed)) != len(listed):
        raise InputError(f"class_names must be a list of different names, one for each class, got {names!r}")
    if len(listed) <= last:
        raise InputError(f"class_names must name every class, and label {last} is that of class {last + 1}; got {len(listed)} names")
    return list(listed)


def synthesize(
    teacher: nn.Module | Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int = 0,
    logits: str | int | None = None,
    class_statistics: Sequence[ClassStatistics] | None = None,
    progress: Progress | None = None,
) -> SynthesisResult:
    """Refine images so that a student learns from few of them what the teacher knows (DWA, arXiv 2409.17612).

    The images are cut into batches of `synthesis.batch_size` in the given order; `batch_ipc` is for whole sets (`distill`). Each batch
    moves the teacher's weights from θ to its own θ̃ (Eq. 11) and minimises CE + λ_mean·R_mean + λ_var·R_var over its pixels (Eq. 15).
    Same seed, same device, same bits: on a CPU with the same `torch.get_num_threads()`. Several threads may call it at once.

    Args:
        teacher: classifier with BatchNorm layers (1d, 2d or 3d); it is copied, never changed. Or a list of several, which take turns:
            iteration t of a batch, counted from 0, is that of teacher t mod their number (FADRM+), each with weights θ̃ of its own. With
            `teacher_turns="index"` the teachers take turns from batch to batch, in a set (`distill`) from image index to image index.
        images: [N, C, H, W], floating, normalised with mean and std of `recipe.data` (`normalise`): initial images, and what the ascent
            sees. They need not be squares, nor of the recipe's size.
        labels: [N], integers in 0 … classes − 1.
        recipe: settings, for example `recipe("cifar100")`. Those that start from patches or median images (methods such as rded, fadrm and
            delt) are for whole sets, out of which the teacher chooses them; `initial="real"` starts from the images that are given.
        seed: at least 0; the seed of all random numbers.
        logits: which of several outputs of a teacher are the logits: the name of an attribute or of a dictionary's entry ("logits"), or a
            place in a tuple (0). None: it gives logits and nothing else.
        class_statistics: with `statistics="class"`, what `dwa_fast.class_statistics` gives for the teachers: for each of them, by name of
            the BatchNorm layer, mean and variance of its input for every class, [2, classes, C]. Each batch then holds one class.
        progress: called with the iterations finished and the iterations in all.
    Returns:
        images in the same order and normalisation, and the losses of every iteration.
    Raises:
        TypeError: an argument is of the wrong type.
        InputError: (a ValueError) an argument cannot be used; the message says what was given and what is expected.
    """
    check_recipe(recipe)
    config, normalisation, seed = recipe.synthesis, recipe.data, plain(seed)
    check_integer("seed", seed, 0)
    check_arguments(images, labels, normalisation.channels)
    if config.initial in ("patches", "median"):
        raise InputError(
            f"initial {config.initial!r} is for distill, whose teacher chooses among all images of a class; "
            "with initial='real' the given images are refined"
        )
    normalised = not config.sees_images or _look_normalised(images, normalisation)
    if class_statistics is None and config.matches_class:
        raise InputError(
            "statistics 'class' need class_statistics, a list of one for each teacher, as dwa_fast.class_statistics(teacher, data, recipe) "
            "takes them from the real images"
        )
    if class_statistics is not None and config.statistics != "class":
        raise InputError("class_statistics would not be used: the recipe matches running statistics; set statistics='class'")
    parts = [slice(start, start + config.batch_size) for start in range(0, len(images), config.batch_size)]
    sizes = [len(images[part]) for part in parts]
    with Synthesizer(listed(teacher, logits), images, config, normalisation, batch_sizes=sizes) as run:
        check_label_range(labels, run.classes)
        warn_of_idle_teachers(config, len(listed(teacher)), len(parts), f"a set of {len(parts)} batches")
        if class_statistics is not None:
            run.check_statistics(class_statistics, labels)
        if config.sees_images and normalised:  # else what the teacher says of them would blame mean and std
            some = torch.linspace(0, len(images) - 1, min(len(images), _TRIED)).round().to(torch.int64).split(config.batch_size)
            for predict in run.predictors:
                pixels = (denormalise(images[part.to(images.device)], normalisation) for part in some)
                wanted = (labels[part.to(labels.device)].cpu() for part in some)
                check_predictions(predict, zip(pixels, wanted, strict=True), normalisation)
        aimed = [aims(class_statistics or [], labels[part].tolist()) if config.matches_class else [] for part in parts]
        batches = [Batch(number, images[part], labels[part], number, aimed[number]) for number, part in enumerate(parts)]
        finished, losses = _refined(run, batches, seed, progress)
    execution: dict[str, Any] = run.execution.describe()
    if run.execution.device.type == "cpu":
        execution["threads"] = torch.get_num_threads()
    return SynthesisResult(torch.cat(finished), torch.stack(losses), labels.clone(), recipe, seed, execution)


def _refined(
    run: Synthesizer,
    batches: Sequence[Batch],
    seed: int,
    progress: Progress | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Images and losses of each batch, the images on the device of those that were given."""
    config = run.config
    each = max(1, config.iterations)
    total = len(batches) * each
    finished, losses = [], []
    for start in range(0, len(batches), config.concurrent_batches):
        group = batches[start : start + config.concurrent_batches]

        def tick(iterations: int, before: int = start * each, batches: int = len(group)) -> None:
            if progress:
                progress(before + batches * iterations, total)

        for refined, terms in run.run(group, seed=seed, progress=tick):
            finished.append(refined.to(batches[0].images.device, memory_format=torch.contiguous_format))
            losses.append(terms.float().cpu())
    return finished, losses


def _look_normalised(images: Tensor, normalisation: Normalisation) -> bool:
    """Refuse images that no normalisation of pixels gives; warn of those that look like pixels in [0, 1], and say whether they do not."""
    ends = torch.stack([images.detach().amin((0, 2, 3)), images.detach().amax((0, 2, 3))])  # [2, C]
    pixels = denormalise(ends[:, :, None, None], normalisation)
    low, high = float(pixels.min()), float(pixels.max())
    if low < -_BEYOND or high > 1 + _BEYOND:
        raise InputError(
            f"images must be normalised with mean and std of the recipe: (pixels - mean) / std, with pixels in [0, 1]; "
            f"undone, those given would have pixels from {low:.3g} to {high:.3g}"
        )
    if not any(normalisation.mean) or float(ends.min()) < 0 or float(ends.max()) > 1:
        return True
    log.warning("all values of the images lie in 0 … 1, as pixels do that are not normalised; normalise(images, recipe.data) does it")
    return False

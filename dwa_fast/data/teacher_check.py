"""Checks a teacher's accuracy on some real images before a long run, and warns about likely causes of a low one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dwa_fast.config import Normalisation
from dwa_fast.data.class_names import shown
from dwa_fast.data.images import ImageSet
from dwa_fast.data.pairing import described
from dwa_fast.data.pixels import normalise, to_levels, to_unit
from dwa_fast.data.subsets import by_class
from dwa_fast.errors import InputError
from dwa_fast.recipes import RECIPES
from dwa_fast.seeding import generator

log = logging.getLogger("dwa_fast")

Predict = Callable[[Tensor], Tensor]  # normalised images [n, C, H, W] → logits [n, classes], on any device

_IMAGES, _OF_A_CLASS = 1000, 50  # largest number of images: in all, and per class
_BATCH = 100
_FEWEST = 30  # fewer images are not judged
_GAIN = 0.2  # smallest gain in accuracy that counts as an explanation
_ABOVE_CHANCE = 0.1  # fraction of the way from chance to 100 %; below it a teacher counts as guessing
_DOUBTFUL = 0.6  # other normalisations are tried below this accuracy
_TRIED = 200  # number of images they are tried on
# Two classes count as swapped if at least the first fraction of images gets the other output, and at most the second one its own.
_CERTAIN, _RARELY = 0.5, 0.2
_ENOUGH = 10  # images per class needed to tell swapped classes from similar ones


@dataclass(frozen=True)
class Verdict:
    """How well a teacher's outputs match the labels of real images."""

    accuracy: float  # in [0, 1]
    reordered: float  # accuracy after the best permutation of the outputs, fitted on one half of the images and measured on the other
    moved: dict[int, int]  # class → its output, where they differ and the permutation is much more accurate; else empty


def judge(
    answers: Tensor,  # [n] int64: the largest output of each image
    labels: Tensor,  # [n] int64
    outputs: int,
) -> Verdict:
    """Measure the accuracy, and look for a permutation of the outputs that is much more accurate."""
    from scipy.optimize import linear_sum_assignment

    rows = labels.unique()
    halves = torch.zeros(2, len(rows), outputs)
    for row, label in enumerate(rows.tolist()):
        own = answers[labels == label]
        for half in (0, 1):
            halves[half, row] = torch.bincount(own[half::2], minlength=outputs)
    count, confusion = len(labels), halves.sum(0)
    accuracy = float((answers == labels).sum()) / count
    right = 0.0
    for half in (0, 1):
        places = linear_sum_assignment(-halves[half].numpy())
        right += float(halves[1 - half].numpy()[places].sum())
    assigned = [int(output) for output in linear_sum_assignment(-confusion.numpy())[1]]
    moved = {label: output for label, output in zip(rows.tolist(), assigned, strict=True) if label != output}
    totals = confusion.sum(1)
    swapped = [
        row
        for row, label in enumerate(rows.tolist())
        if label in moved and confusion[row, assigned[row]] >= _CERTAIN * totals[row] and confusion[row, label] <= _RARELY * totals[row]
    ]
    fits = right / count >= accuracy + _gain(count) or (len(swapped) > 1 and float(totals.min()) >= _ENOUGH)
    return Verdict(accuracy, right / count, moved if fits else {})


def _gain(count: int) -> float:
    """Smallest significant gain in accuracy on `count` images: at least twice its standard deviation."""
    return max(_GAIN, 2 / math.sqrt(count))


def warn_if_inaccurate(predict: Predict, data: ImageSet, normalisation: Normalisation, *, seed: int = 0) -> None:
    """Classify some images of each class, at most a thousand in all; log the accuracy and warn if it is near chance.

    Images that cannot be read are skipped.

    Args:
        predict: the teacher in eval mode.
        data: real images; their labels are indices of the teacher's outputs.
        seed: of the random choice of images.
    """
    check_predictions(predict, _read(data, _chosen(data, seed)), normalisation, data.class_names)


@torch.no_grad()
def check_predictions(
    predict: Predict,
    batches: Iterable[tuple[Tensor, Tensor]],  # pixels [n, C, H, W], as `normalise` takes them, and their labels [n] on the CPU
    normalisation: Normalisation,
    class_names: Sequence[str] | None = None,
) -> None:
    """The same for given images. Fewer than 30 images, or images of a single class, are not judged."""
    tried, given, wanted = [], [], []
    for pixels, labels in batches:
        given.append(predict(normalise(pixels, normalisation)).float().cpu())
        wanted.append(labels.to(torch.int64))
        tried.append(pixels if pixels.dtype == torch.uint8 else to_levels(pixels))
    labels = torch.cat(wanted) if wanted else torch.empty(0, dtype=torch.int64)
    count = len(labels)
    if count < _FEWEST or len(labels.unique()) < 2:
        return
    logits = torch.cat(given)
    if not bool(logits.isfinite().all()):
        return  # reported elsewhere, with the cause
    outputs = logits.shape[1]
    found = judge(logits.argmax(1), labels, outputs)
    right = f"{100 * found.accuracy:.1f} % of {count} real images right"
    log.info("teacher: %s", right)
    doubtful = found.moved or found.accuracy < _DOUBTFUL
    better = _better_normalisation(predict, torch.cat(tried), labels, normalisation) if doubtful else None
    if better and better[0] >= found.reordered:
        log.warning(
            "teacher gives only %s, but %.1f %% of images normalised with %s; see --mean and --std", right, 100 * better[0], better[1]
        )
    elif found.moved:
        log.warning(
            "teacher gives only %s, but %.1f %% where its outputs are permuted: %s; --classes FILE names the class of each output",
            right,
            100 * found.reordered,
            _orders(found.moved, class_names),
        )
    elif found.accuracy < 1 / outputs + _ABOVE_CHANCE * (1 - 1 / outputs):
        log.warning(
            "teacher gives only %s, and guessing gives %.1f %%: it was trained on other classes, or on images of another normalisation or "
            "size, or hardly at all",
            right,
            100 / outputs,
        )


def _chosen(data: ImageSet, seed: int) -> list[int]:
    """Choose 2 to 50 images of every class, or of some classes if there are too many."""
    members = [own for own in by_class(data) if len(own)]
    most = _IMAGES // 2
    if len(members) > most:
        members = [members[place] for place in generator(seed, "teacher check").permutation(len(members))[:most]]
    each = max(2, min(_OF_A_CLASS, _IMAGES // max(1, len(members))))
    return [
        int(own[place])
        for number, own in enumerate(members)
        for place in generator(seed, "teacher check", number).permutation(len(own))[:each]
    ]


def _read(data: ImageSet, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and labels of these images, without those that cannot be read."""
    for start in range(0, len(indices), _BATCH):
        part = list(indices[start : start + _BATCH])
        try:
            yield data.load(part), data.labels[part]
        except InputError:
            for index in part:
                try:
                    yield data.load([index]), data.labels[[index]]
                except InputError:
                    continue


def _better_normalisation(
    predict: Predict,
    pixels: Tensor,  # [n, C, H, W] uint8
    labels: Tensor,  # [n]
    normalisation: Normalisation,
) -> tuple[float, str] | None:
    """The common normalisation with the highest accuracy, if it is significantly higher: accuracy and description."""
    some = torch.linspace(0, len(labels) - 1, min(_TRIED, len(labels))).round().to(torch.int64)
    pixels, labels = pixels[some.to(pixels.device)], labels[some]

    def accuracy(each: Normalisation) -> float:
        right = [predict(normalise(part, each)).argmax(1).cpu() for part in pixels.split(_BATCH)]
        return float((torch.cat(right) == labels).float().mean())

    found = [(accuracy(each), each) for each in _usual(to_unit(pixels), normalisation)]
    best, each = max(found, key=lambda pair: pair[0])
    return (best, described(each.mean, each.std)) if best >= accuracy(normalisation) + _gain(len(labels)) else None


def _usual(pixels: Tensor, normalisation: Normalisation) -> list[Normalisation]:
    """Normalisations that a teacher may have been trained with: those of the recipes, [−1, 1], [0, 1], and the images' own mean and std."""
    channels = pixels.shape[1]
    found = [recipe.data for recipe in RECIPES.values() if recipe.data.channels == channels]
    pairs = [(each.mean, each.std) for each in found]
    pairs += [((0.5,) * channels, (0.5,) * channels), ((0.0,) * channels, (1.0,) * channels)]
    own = pixels.transpose(0, 1).flatten(1)
    pairs.append((tuple(own.mean(1).tolist()), tuple((own.std(1) + 1e-6).tolist())))
    unlike = (pair for pair in dict.fromkeys(pairs) if pair != (normalisation.mean, normalisation.std))
    return [Normalisation(mean=mean, std=std) for mean, std in unlike]


def _orders(moved: dict[int, int], class_names: Sequence[str] | None) -> str:
    """The class of each output, as text."""
    pairs = sorted((output, label) for label, output in moved.items())
    return shown([f"output {output} is class {class_names[label] if class_names else label}" for output, label in pairs])

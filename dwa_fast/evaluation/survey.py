"""Distilled sets beside the real images that they stand for: diversity, nearest real images, and a t-SNE, as the teacher sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.config import Normalisation, Progress, check_choice, check_integer
from dwa_fast.data.datasets import ImageSet, to_unit
from dwa_fast.data.subsets import by_class, draw
from dwa_fast.errors import InputError
from dwa_fast.evaluation.diversity import Spread
from dwa_fast.evaluation.embedding import Embedding, stream, tsne
from dwa_fast.evaluation.neighbours import Neighbours
from dwa_fast.seeding import generator

REAL = "random real images"
_PIXELS = 32  # height and width to which images are averaged before their pixels are compared

Space = Literal["features", "pixels"]


@dataclass(frozen=True, kw_only=True)
class SurveyConfig:
    """What the sets are compared with, and how much is shown."""

    space: Space = (
        "features"  # Nearest in features (what the teacher's last linear layer is given) or in pixels (averaged to at most 32×32).
    )
    real_images: int | None = None  # Real images of each class to compare with, drawn at random, at least 2; default: all.
    shown_classes: int = 10  # Classes in the t-SNE and in the pictures, drawn at random where there are more, at least 1.
    tsne_images: int = 100  # Images of each class and set in the t-SNE, at most; at least 1.

    def __post_init__(self) -> None:
        check_choice("space", self.space, Space)
        if self.real_images is not None:
            check_integer("real_images", self.real_images, 2)
        check_integer("shown_classes", self.shown_classes, 1)
        check_integer("tsne_images", self.tsne_images, 1)


@dataclass(frozen=True)
class Findings:
    """What was found about one set. Ratios are to what as many random real images of the class have on average; None: that is 0."""

    images: ImageSet
    distances: list[float]  # D^c of each class, on the last convolution
    ratios: list[float | None]  # the same as ratios
    feature_ratios: list[float | None]  # on the input of the last linear layer
    nearest: Tensor  # [n]: index of the nearest real image
    nearest_distances: Tensor  # [n] float64
    points: Tensor  # [m, 2]: images of the shown classes in the plane


@dataclass(frozen=True)
class Survey:
    """What was found about all of them."""

    real: ImageSet  # what was compared with
    shown: list[int]  # classes
    sets: dict[str, Findings]  # first a random draw of real images


def survey(
    teacher: nn.Module,
    sets: Mapping[str, ImageSet],
    real: ImageSet,
    config: SurveyConfig,
    normalisation: Normalisation,
    *,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
) -> Survey:
    """Look at every image of every set, and at the real images, once; only what is small is kept.

    Args:
        teacher: in whose eyes; moved to the device and put in eval mode.
        sets: by name; all with the classes of the real images.
        seed: of the draws of real images and classes, and of the t-SNE.
        progress: called with the images seen and the images in all.
    Raises:
        InputError: a class of a set has a single image, or a class has too few real ones, or a set is called as these are.
    """
    if REAL in sets:
        raise InputError(f"no set may be called {REAL!r}; those are drawn to compare with")
    if config.real_images is not None:
        real = draw(real, config.real_images, "real images", seed=seed)
    drawn = draw(real, _smallest_class(sets), "random real images", seed=seed)
    everything: dict[str, ImageSet] = {REAL: drawn, **sets}
    total = sum(len(images.labels) for images in everything.values()) + len(real.labels)
    eye = _Eye(teacher.to(device).eval(), normalisation, device, config.space, total, progress)
    shown = sorted(generator(seed, "shown classes").permutation(len(real.class_names))[: config.shown_classes].tolist())
    looks = {name: _look(eye, images, _some(images, shown, config.tsne_images, seed)) for name, images in everything.items()}
    neighbours = {name: Neighbours(torch.cat(look.vectors), drawn.indices if name == REAL else None) for name, look in looks.items()}
    whole = _look(eye, real, _some(real, shown, config.tsne_images, seed), neighbours)
    logits = [torch.cat(look.logits) for look in (whole, *(looks[name] for name in sets))]
    points = tsne(torch.cat(logits), seed=seed).split([len(own) for own in logits])
    return Survey(
        real,
        shown,
        {
            name: Findings(
                images,
                distances=[looks[name].convolution.distance(label) for label in range(len(real.class_names))],
                ratios=_ratios(looks[name].convolution, whole.convolution),
                feature_ratios=_ratios(looks[name].features, whole.features),
                nearest=neighbours[name].indices.cpu(),
                nearest_distances=neighbours[name].distances.cpu(),
                points=own,
            )
            for (name, images), own in zip(everything.items(), points, strict=True)
        },
    )


@dataclass
class _Eye:
    """The teacher as it looks at set after set."""

    teacher: nn.Module
    normalisation: Normalisation
    device: torch.device
    space: Space
    total: int  # images of all sets
    progress: Progress | None
    seen: int = 0

    def stream(self, images: ImageSet) -> Iterator[tuple[range, Tensor, Embedding]]:
        """A set, a batch at a time: indices, what neighbours are searched by [n, F], embedding."""
        for indices, pixels, embedding in stream(self.teacher, images, self.normalisation, self.device):
            small = F.adaptive_avg_pool2d(to_unit(pixels), min(_PIXELS, pixels.shape[-1])).flatten(1)
            yield indices, small if self.space == "pixels" else embedding.features, embedding
            self.seen += len(indices)
            if self.progress:
                self.progress(self.seen, self.total)


class _Look:
    """What is kept of a set that has been looked at."""

    def __init__(self, classes: int) -> None:
        self.convolution, self.features = Spread(classes), Spread(classes)
        self.vectors: list[Tensor] = []  # of all images
        self.logits: list[Tensor] = []  # of some


def _look(eye: _Eye, images: ImageSet, some: Tensor, neighbours: Mapping[str, Neighbours] | None = None) -> _Look:
    """Look at a set: at the real images, among which neighbours are searched, or, where there are none yet, at those that have some."""
    look, with_logits = _Look(len(images.class_names)), torch.zeros(len(images.labels), dtype=torch.bool)
    with_logits[some] = True
    for indices, vectors, embedding in eye.stream(images):
        own = slice(indices.start, indices.stop)
        look.convolution.add(embedding.convolution, images.labels[own])
        look.features.add(embedding.features, images.labels[own])
        look.logits.append(embedding.logits.cpu()[with_logits[own]])
        if neighbours is None:
            look.vectors.append(vectors)
        for search in (neighbours or {}).values():
            search.look(indices.start, vectors)
    return look


def _some(images: ImageSet, classes: Sequence[int], at_most: int, seed: int) -> Tensor:
    """Indices of so many images of each of these classes."""
    own = by_class(images)
    return torch.cat([own[label][generator(seed, "t-sne images", label).permutation(len(own[label]))[:at_most]] for label in classes])


def _smallest_class(sets: Mapping[str, ImageSet]) -> int:
    """How many images of every class all sets have.

    Raises:
        InputError: a class of a set has a single image.
    """
    smallest = {name: min(len(own) for own in by_class(images)) for name, images in sets.items()}
    for name, count in smallest.items():
        if count < 2:
            raise InputError(f"set {name!r} has a class with {count} image; diversity needs at least 2 of each class")
    return min(smallest.values())


def _ratios(own: Spread, real: Spread) -> list[float | None]:
    """D^c of each class as a ratio to the mean over random real images of the same number."""
    expected = [real.expected_distance(label, count) for label, count in enumerate(own.counts)]
    return [own.distance(label) / value if value > 0 else None for label, value in enumerate(expected)]

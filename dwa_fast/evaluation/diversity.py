"""Distilled sets compared with the real images: diversity D^c, nearest real images and a t-SNE, all in features of the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.config import Config, Normalisation, PositiveInt, Progress, Range
from dwa_fast.data.images import ImageSet
from dwa_fast.data.pixels import to_unit
from dwa_fast.data.subsets import by_class, draw
from dwa_fast.errors import InputError
from dwa_fast.evaluation.embedding import Embedding, embed, stream, tsne
from dwa_fast.seeding import generator

REAL = "random real images"
_PIXELS = 32  # images are averaged to at most this height and width before their pixels are compared

Space = Literal["features", "pixels"]


class ClassScatter:
    """Count, mean ḡ and Σ_i ‖g_i − ḡ‖² of each class, updated one batch at a time."""

    def __init__(self, classes: int) -> None:
        self.counts = [0] * classes
        self._means: list[Tensor | None] = [None] * classes
        self._squares = [0.0] * classes

    def update(
        self,
        features: Tensor,  # [n, …]
        labels: Tensor,  # [n]
    ) -> None:
        """Add a batch by Chan's update of mean and squares, which stays accurate where the mean is large."""
        flat, labels = features.flatten(1).double(), labels.to(features.device)
        for label in map(int, labels.unique().tolist()):
            own = flat[labels == label]
            mean, before = own.mean(0), self.counts[label]
            self._squares[label] += float((own - mean).square().sum())
            self.counts[label] += len(own)
            old = self._means[label]
            if old is not None:
                step = mean - old
                self._squares[label] += float(step.square().sum()) * before * len(own) / self.counts[label]
                mean = old + step * (len(own) / self.counts[label])
            self._means[label] = mean

    def distance(self, label: int) -> float:
        """D^c = Σ_i Σ_j ‖g_i − g_j‖² over all ordered pairs of images of the class, which is 2n Σ_i ‖g_i − ḡ‖²."""
        return 2 * self.counts[label] * self._squares[label]

    def expected_distance(self, label: int, count: int) -> float:
        """Mean D^c of `count` random images of the class: 2n(n − 1) times its unbiased variance. The class needs at least two images."""
        return 2 * count * (count - 1) * self._squares[label] / (self.counts[label] - 1)


def class_diversity(
    teacher: nn.Module,
    images: Tensor,  # [N, C, H, W], normalised
    labels: Tensor,  # [N]
) -> dict[int, float]:
    """D^c of every class in the output of the teacher's last convolution outside of skips (DWA, Section 4).

    Raises:
        InputError: the teacher has no convolution.
    """
    convolution, classes = embed(teacher, images).convolution, list(map(int, labels.unique()))
    scatter = ClassScatter(classes[-1] + 1)
    scatter.update(convolution, labels)
    return {label: scatter.distance(label) for label in classes}


class NearestNeighbours:
    """The nearest image to each query, and its Euclidean distance, among images that arrive one batch at a time."""

    def __init__(
        self,
        queries: Tensor,  # [q, F]
        own_indices: Tensor | None = None,  # [q]: index of each query among the images; an image is not its own neighbour
    ) -> None:
        self.indices = torch.full((len(queries),), -1, device=queries.device)  # [q]; -1 before the first candidate
        self._queries, self._own = queries.double(), None if own_indices is None else own_indices.to(queries.device)
        self._squares = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=queries.device)

    @property
    def distances(self) -> Tensor:  # [q] float64
        """Distance to the nearest image so far; infinite before the first candidate."""
        return self._squares.sqrt()

    def update(
        self,
        start: int,
        images: Tensor,  # [n, F]: images start, start + 1, …
    ) -> None:
        """Compare the queries with a batch."""
        images = images.double()
        squares = self._queries.square().sum(1)[:, None] + images.square().sum(1) - 2 * self._queries @ images.T  # [q, n]
        if self._own is not None:
            itself = (self._own - start)[:, None] == torch.arange(len(images), device=images.device)
            squares.masked_fill_(itself, torch.inf)
        least, place = squares.min(1)
        near = (self._queries - images[place]).square().sum(1)  # recomputed without cancellation: a copy is at distance 0
        better = near.where(least < torch.inf, least) < self._squares
        self.indices[better] = start + place[better]
        self._squares[better] = near[better]


@dataclass(frozen=True, kw_only=True)
class DiversityConfig(Config):
    """What the sets are compared with, and how much is plotted."""

    space: Space = "features"  # Of nearest neighbours: inputs of the teacher's last linear layer, or pixels (averaged to 32×32 at most).
    real_images: Annotated[int, Range(at_least=2)] | None = None  # Compare with this many random real images of each class; default: all.
    shown_classes: PositiveInt = 10  # Classes in the t-SNE and in the pictures, chosen at random where there are more.
    tsne_images: PositiveInt = 100  # Most images of each class and set in the t-SNE.


@dataclass(frozen=True)
class SetAnalysis:
    """Measurements of one set. A ratio divides by the mean over as many random real images of the class; None where that mean is 0."""

    images: ImageSet
    distances: list[float]  # D^c of each class, on the last convolution
    ratios: list[float | None]  # the same as ratios
    feature_ratios: list[float | None]  # ratios on the input of the last linear layer
    nearest: Tensor  # [n]: index of the nearest real image
    nearest_distances: Tensor  # [n] float64
    points: Tensor  # [m, 2]: t-SNE of the images of the shown classes


@dataclass(frozen=True)
class Analysis:
    """Measurements of several sets and of random real images."""

    real: ImageSet  # the real images that the sets are compared with
    shown: list[int]  # classes
    sets: dict[str, SetAnalysis]  # random real images first


def analyse_sets(
    teacher: nn.Module,
    sets: Mapping[str, ImageSet],
    real: ImageSet,
    config: DiversityConfig,
    normalisation: Normalisation,
    *,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """Embed every image of the sets and every real image once, and compare them.

    The features of the sets are kept; those of the real images are reduced batch by batch.

    Args:
        teacher: gives the features; moved to the device and put in eval mode.
        sets: by name; all with the classes of the real images.
        seed: of the random real images and classes, and of the t-SNE.
        progress: called with the number of images embedded and the total.
    Raises:
        InputError: a class of a set has a single image, a class has too few real images, or a set has the name of the random real ones.
    """
    if REAL in sets:
        raise InputError(f"no set may be called {REAL!r}; those are drawn to compare with")
    if config.real_images is not None:
        real = draw(real, config.real_images, "real images", seed=seed)
    drawn = draw(real, smallest_class(sets), "random real images", seed=seed)
    everything: dict[str, ImageSet] = {REAL: drawn, **sets}
    total = sum(len(images.labels) for images in everything.values()) + len(real.labels)
    embedder = _Embedder(teacher.to(device).eval(), normalisation, device, config.space, total, progress)
    shown = sorted(generator(seed, "shown classes").permutation(len(real.class_names))[: config.shown_classes].tolist())

    def plotted(images: ImageSet) -> Tensor:
        return _random_images(images, shown, config.tsne_images, seed)

    features = {name: _embed_set(embedder, images, plotted(images)) for name, images in everything.items()}
    neighbours = {
        name: NearestNeighbours(torch.cat(own.vectors), drawn.indices if name == REAL else None) for name, own in features.items()
    }
    of_real = _embed_set(embedder, real, plotted(real), neighbours)
    logits = [torch.cat(own.logits) for own in (of_real, *(features[name] for name in sets))]
    points = tsne(torch.cat(logits), seed=seed).split([len(own) for own in logits])
    return Analysis(
        real,
        shown,
        {
            name: SetAnalysis(
                images,
                distances=[features[name].convolution.distance(label) for label in range(len(real.class_names))],
                ratios=_ratios(features[name].convolution, of_real.convolution),
                feature_ratios=_ratios(features[name].features, of_real.features),
                nearest=neighbours[name].indices.cpu(),
                nearest_distances=neighbours[name].distances.cpu(),
                points=own,
            )
            for (name, images), own in zip(everything.items(), points, strict=True)
        },
    )


@dataclass
class _Embedder:
    """Embeds set after set with one teacher, and counts the images for the progress."""

    teacher: nn.Module
    normalisation: Normalisation
    device: torch.device
    space: Space
    total: int  # images of all sets
    progress: Progress | None
    done: int = 0

    def stream(self, images: ImageSet) -> Iterator[tuple[range, Tensor, Embedding]]:
        """A set, one batch at a time: indices, vectors for the neighbour search [n, F], embedding."""
        for indices, pixels, embedding in stream(self.teacher, images, self.normalisation, self.device):
            small = F.adaptive_avg_pool2d(to_unit(pixels), min(_PIXELS, pixels.shape[-1])).flatten(1)
            yield indices, small if self.space == "pixels" else embedding.features, embedding
            self.done += len(indices)
            if self.progress:
                self.progress(self.done, self.total)


class _SetFeatures:
    """Scatter of the classes of a set, vectors of its images and logits of those in the t-SNE."""

    def __init__(self, classes: int) -> None:
        self.convolution, self.features = ClassScatter(classes), ClassScatter(classes)
        self.vectors: list[Tensor] = []
        self.logits: list[Tensor] = []


def _embed_set(
    embedder: _Embedder,
    images: ImageSet,
    plotted: Tensor,  # indices of the images in the t-SNE
    neighbours: Mapping[str, NearestNeighbours] | None = None,
) -> _SetFeatures:
    """Embed a set. With `neighbours`, update these with its vectors and do not store the vectors."""
    result, with_logits = _SetFeatures(len(images.class_names)), torch.zeros(len(images.labels), dtype=torch.bool)
    with_logits[plotted] = True
    for indices, vectors, embedding in embedder.stream(images):
        own = slice(indices.start, indices.stop)
        result.convolution.update(embedding.convolution, images.labels[own])
        result.features.update(embedding.features, images.labels[own])
        result.logits.append(embedding.logits.cpu()[with_logits[own]])
        if neighbours is None:
            result.vectors.append(vectors)
        for search in (neighbours or {}).values():
            search.update(indices.start, vectors)
    return result


def _random_images(images: ImageSet, classes: Sequence[int], at_most: int, seed: int) -> Tensor:
    """Indices of at most that many random images of each of these classes."""
    own = by_class(images)
    return torch.cat([own[label][generator(seed, "t-sne images", label).permutation(len(own[label]))[:at_most]] for label in classes])


def smallest_class(sets: Mapping[str, ImageSet]) -> int:
    """The size of the smallest class of all sets.

    Raises:
        InputError: it is a single image.
    """
    smallest = {name: min(len(own) for own in by_class(images)) for name, images in sets.items()}
    for name, count in smallest.items():
        if count < 2:
            raise InputError(f"set {name!r} has a class with {count} image; diversity needs at least 2 of each class")
    return min(smallest.values())


def _ratios(own: ClassScatter, real: ClassScatter) -> list[float | None]:
    """D^c of each class divided by its mean over random real images of the same number."""
    expected = [real.expected_distance(label, count) for label, count in enumerate(own.counts)]
    return [own.distance(label) / value if value > 0 else None for label, value in enumerate(expected)]

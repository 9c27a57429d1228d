"""How different the images of a class are from each other, seen by the teacher."""

from __future__ import annotations

from torch import Tensor, nn

from dwa_fast.evaluation.embedding import embed


def pairwise_distance(
    features: Tensor,  # [n, …]
) -> float:
    """D = Σ_i Σ_j ‖g_i − g_j‖² over all ordered pairs, which is 2n Σ_i ‖g_i − ḡ‖²."""
    flat = features.flatten(1).double()
    return float(2 * len(flat) * (flat - flat.mean(0)).square().sum())


class Spread:
    """Count, mean ḡ and Σ_i ‖g_i − ḡ‖² of each class, from features that come a batch at a time."""

    def __init__(self, classes: int) -> None:
        self.counts = [0] * classes
        self._means: list[Tensor | None] = [None] * classes
        self._squares = [0.0] * classes

    def add(
        self,
        features: Tensor,  # [n, …]
        labels: Tensor,  # [n]
    ) -> None:
        """Take a batch into account, with Chan's update of mean and squares, which loses nothing where the mean is large."""
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
        """D^c of all images of the class."""
        return 2 * self.counts[label] * self._squares[label]

    def expected_distance(self, label: int, count: int) -> float:
        """Mean D^c of so many images of the class drawn at random: 2n(n − 1) times the unbiased variance of its at least two images."""
        return 2 * count * (count - 1) * self._squares[label] / (self.counts[label] - 1)


def class_diversity(
    teacher: nn.Module,
    images: Tensor,  # [N, C, H, W], normalised
    labels: Tensor,  # [N]
) -> dict[int, float]:
    """D^c of every class: the pairwise distance of its images in the output of the teacher's last convolution (DWA, Section 4),
    those of skips aside.

    Raises:
        InputError: the teacher has no convolution.
    """
    convolution = embed(teacher, images).convolution
    return {int(label): pairwise_distance(convolution[labels == label]) for label in labels.unique()}

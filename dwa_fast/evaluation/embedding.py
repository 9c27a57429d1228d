"""Images as the teacher sees them: its last convolution, what its last linear layer is given, its logits; and these in the plane."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwa_fast.config import Normalisation
from dwa_fast.data.datasets import ImageSet, normalise
from dwa_fast.errors import InputError
from dwa_fast.models.finite import check_finite_weights, check_logits
from dwa_fast.seeding import derive
from dwa_fast.training.fit import repeatable

_OF_A_SKIP = {"downsample", "shortcut"}  # what torchvision, timm and the CIFAR ResNets call the convolution of a skip
_BATCH = 256  # images that the teacher sees at once
_PERPLEXITY = 30.0  # of the t-SNE where there are enough points


@dataclass(frozen=True)
class Embedding:
    """What the teacher makes of some images."""

    convolution: Tensor  # [n, …]: output of the last convolution, those of skips aside
    features: Tensor  # [n, F]: input of the last linear layer, or the logits where there is none
    logits: Tensor  # [n, classes]


@torch.no_grad()
def embed(
    teacher: nn.Module,
    images: Tensor,  # [n, C, H, W], normalised
) -> Embedding:
    """One forward pass in eval mode.

    Raises:
        InputError: the teacher has no convolution, or what it makes of an image is not finite.
    """
    seen: dict[str, Tensor] = {}

    def keep_output(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["convolution"] = output

    def keep_input(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["features"] = inputs[0]

    handles = []
    for name, layer in teacher.named_modules():
        if isinstance(layer, nn.Conv2d) and not _OF_A_SKIP & set(name.split(".")):
            handles.append(layer.register_forward_hook(keep_output))
        elif isinstance(layer, nn.Linear):
            handles.append(layer.register_forward_hook(keep_input))
    try:
        with repeatable():
            logits = teacher.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    if "convolution" not in seen:
        raise InputError(f"teacher must have a Conv2d to measure diversity on; {type(teacher).__name__} has none")
    check_logits(logits, "teacher")
    embedding = Embedding(seen["convolution"], seen.get("features", logits).flatten(1), logits)
    if not (embedding.convolution.isfinite().all() and embedding.features.isfinite().all()):
        raise InputError("features of the teacher are not finite, though its logits are; no distance can be measured in them")
    return embedding


def stream(
    teacher: nn.Module,
    data: ImageSet,
    normalisation: Normalisation,
    device: torch.device,
) -> Iterator[tuple[range, Tensor, Embedding]]:
    """The whole set, a batch at a time: indices, pixels [n, C, S, S] uint8 on the device, embedding.

    Raises:
        InputError: as `embed`, or a weight or a statistic of the teacher is not finite.
    """
    check_finite_weights(teacher)
    for start in range(0, len(data.labels), _BATCH):
        indices = range(start, min(start + _BATCH, len(data.labels)))
        pixels = data.load(indices).to(device)
        yield indices, pixels, embed(teacher, normalise(pixels, normalisation))


def tsne(
    points: Tensor,  # [n, D], n at least 4
    *,
    seed: int,
) -> Tensor:  # [n, 2]
    """The t-SNE of some points, by scikit-learn. One thread, since the last bits of its sums depend on their number."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    method = TSNE(perplexity=perplexity, init="pca", random_state=derive(seed, "t-sne") % 2**32)
    with threadpool_limits(1):
        return torch.from_numpy(method.fit_transform(points.double().cpu().numpy())).double()

"""Teacher embeddings: the last convolution, the input of the last linear layer, the logits; and their t-SNE."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwa_fast.config import Normalisation
from dwa_fast.data.images import ImageSet
from dwa_fast.data.pixels import normalise
from dwa_fast.engine.backend import repeatable
from dwa_fast.errors import InputError
from dwa_fast.models.finite import check_finite_weights, check_logits
from dwa_fast.seeding import derive

_OF_A_SKIP = {"downsample", "shortcut"}  # names of the convolution of a skip in torchvision, timm and the CIFAR ResNets
_GATES = re.compile(r"SqueezeExcit|^(Effective)?SE(Module|Layer)?$")  # classes of squeeze-and-excitation, whose convolutions see one pixel
_BATCH = 256  # images per forward pass
_PERPLEXITY = 30.0  # of the t-SNE where there are enough points


@dataclass(frozen=True)
class Embedding:
    """Activations of the teacher on some images."""

    convolution: Tensor  # [n, …]: output of the last convolution outside of skips and of squeeze-and-excitation
    features: Tensor  # [n, F]: input of the last linear layer, or the logits where there is none
    logits: Tensor  # [n, classes]


@torch.no_grad()
def embed(
    teacher: nn.Module,
    images: Tensor,  # [n, C, H, W], normalised
) -> Embedding:
    """One forward pass in eval mode.

    Raises:
        InputError: the teacher has no convolution, or a logit or a feature is not finite.
    """
    found: dict[str, Tensor] = {}

    def keep_output(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found["convolution"] = output.clone()  # an activation or an addition behind it may work in place

    def keep_input(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found["features"] = inputs[0].clone()

    handles = []
    gates = tuple(f"{name}." for name, layer in teacher.named_modules() if _is_gate(name, layer))
    for name, layer in teacher.named_modules():
        aside = _OF_A_SKIP & set(name.split(".")) or name.startswith(gates)
        if isinstance(layer, nn.Conv2d) and not aside:
            handles.append(layer.register_forward_hook(keep_output))
        elif isinstance(layer, nn.Linear):
            handles.append(layer.register_forward_hook(keep_input))
    try:
        with repeatable():
            logits = teacher.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    if "convolution" not in found:
        raise InputError(f"teacher must have a Conv2d to measure diversity on; {type(teacher).__name__} has none")
    check_logits(logits, "teacher")
    embedding = Embedding(found["convolution"], found.get("features", logits).flatten(1), logits)
    if not (embedding.convolution.isfinite().all() and embedding.features.isfinite().all()):
        raise InputError("features of the teacher are not finite, though its logits are; no distance can be measured in them")
    return embedding


def _is_gate(name: str, layer: nn.Module) -> bool:
    return _GATES.search(type(layer).__name__) is not None or name.rpartition(".")[2] == "se"


def stream(
    teacher: nn.Module,
    data: ImageSet,
    normalisation: Normalisation,
    device: torch.device,
) -> Iterator[tuple[range, Tensor, Embedding]]:
    """The whole set, one batch at a time: indices, pixels [n, C, S, S] uint8 on the device, embedding.

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
    """t-SNE by scikit-learn, on one thread, because the last bits of its sums depend on the number of threads."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    method = TSNE(perplexity=perplexity, init="pca", random_state=derive(seed, "t-sne") % 2**32)
    with threadpool_limits(1):
        return torch.from_numpy(method.fit_transform(points.double().cpu().numpy())).double()

"""How different the distilled images of a class are from each other, seen by the teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dwa_fast.errors import InputError


def pairwise_distance(
    features: Tensor,  # [n, …]
) -> float:
    """D = Σ_i Σ_j ‖g_i − g_j‖² over all ordered pairs, which is 2n Σ_i ‖g_i − ḡ‖²."""
    flat = features.flatten(1).double()
    return float(2 * len(flat) * (flat - flat.mean(0)).square().sum())


@torch.no_grad()
def class_diversity(
    teacher: nn.Module,
    images: Tensor,  # [N, C, H, W], normalised
    labels: Tensor,  # [N]
) -> dict[int, float]:
    """D^c of every class: the pairwise distance of its images in the output of the teacher's last convolution (DWA, Section 4).

    Raises:
        InputError: the teacher has no convolution.
    """
    convolutions = [layer for layer in teacher.modules() if isinstance(layer, nn.Conv2d)]
    if not convolutions:
        raise InputError(f"teacher must have a Conv2d to measure diversity on; {type(teacher).__name__} has none")
    features: list[Tensor] = []
    handle = convolutions[-1].register_forward_hook(lambda layer, inputs, output: features.append(output))
    try:
        teacher.eval()(images)
    finally:
        handle.remove()
    return {int(label): pairwise_distance(features[-1][labels == label]) for label in labels.unique()}

"""The inner loop: view → forward → losses → backward → Adam and clamp, T times, with the weights frozen (Eq. 15)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast.config import SynthesisConfig
from dwa_fast.errors import InputError
from dwa_fast.teacher import Network
from dwa_fast.views import Schedule

Progress = Callable[[int], None]  # called with the number of finished iterations


def refine(
    classifier: Network,  # θ̃: gives the cross-entropy
    matcher: Network,  # gives the matching terms: the same network, or θ
    images: Tensor,  # [B, C, H, W], normalised
    labels: Tensor,  # [B]
    schedule: Schedule,
    config: SynthesisConfig,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:  # images [B, C, H, W]; losses [T, 3] on the device: cross-entropy, R_mean, R_var
    """Refine one batch. Nothing in an iteration waits for the device.

    Raises:
        InputError: a loss is not finite; seen once the batch is done.
    """
    operators = classifier.operators
    images = images.clone()
    exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
    low, high = (torch.tensor(bound).to(images) for bound in config.bounds)
    weights = torch.tensor([1.0, config.lambda_mean, config.lambda_var]).to(images)
    losses = torch.zeros(config.iterations, 3, dtype=images.dtype, device=images.device)
    for iteration in range(config.iterations):
        step = torch.tensor(iteration)
        leaf = images.detach().requires_grad_(True)
        seen = operators.view(leaf, schedule.rows, step)
        terms = _terms(classifier, matcher, seen, labels, config.first_layer_weight)
        (gradient,) = torch.autograd.grad(terms @ weights, leaf)
        operators.adam_clip_(images, gradient, exp_avg, exp_avg_sq, schedule.learning_rates, step, low, high)
        losses[iteration] = terms.detach()
        if progress:
            progress(iteration + 1)
    return images, _finite(losses)


def _terms(classifier: Network, matcher: Network, seen: Tensor, labels: Tensor, first_layer_weight: float) -> Tensor:
    """Cross-entropy, R_mean and R_var of a view, [3]."""
    logits = classifier(seen)
    if matcher is not classifier:
        matcher(seen)
    return torch.cat([F.cross_entropy(logits, labels)[None], matcher.matching(first_layer_weight)])


def _finite(losses: Tensor) -> Tensor:
    bad = (~torch.isfinite(losses).all(1)).nonzero()
    if len(bad):
        raise InputError(f"losses are not finite from iteration {int(bad[0]) + 1} of {len(losses)} on; lower the learning rate or rho")
    return losses

"""Directed weight adjustment: θ → θ̃ in K steps of gradient ascent on the cross-entropy (Eq. 11, Algorithm 1)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dwa_fast.config import SynthesisConfig
from dwa_fast.errors import InputError
from dwa_fast.seeding import normal
from dwa_fast.teacher import Network


class Ascent:
    """Owns the weights of a network as one flat arena: adjusts them for a batch, and restores them bit for bit.

    Every parameter of the network becomes a view into the arena, and its gradient a view into a second one, so that the global
    norm, the update and the restoring are one pass each.
    """

    def __init__(self, network: Network, config: SynthesisConfig) -> None:
        self.network = network
        self.config = config
        parameters = list(network.parameters())
        self.arena = torch.cat([p.detach().reshape(-1) for p in parameters])  # [P]
        self.original = self.arena.clone()
        self.gradients = torch.zeros_like(self.arena)
        sizes = [p.numel() for p in parameters]
        for p, weights, gradient in zip(parameters, self.arena.split(sizes), self.gradients.split(sizes), strict=True):
            p.data = weights.view(p.shape)
            p.grad = gradient.view(p.shape)

    def adjust(
        self,
        seen: Tensor,  # [B, C, H, W], initial real images in the view of iteration 0
        labels: Tensor,  # [B]
        source: np.random.Generator,  # of the random direction
    ) -> Tensor:  # [K] gradient norms
        """Move the weights from θ to θ̃.

        Raises:
            InputError: a gradient is not finite.
        """
        self.restore()
        if not self.config.adjusts:
            return torch.empty(0)
        if self.config.ascent == "random":
            noise = normal(source, (self.arena.numel(),)).to(self.arena)
            return self.network.operators.ascend_(self.arena, noise, self.config.rho)[None]
        with self.network.trainable():
            norms = [self._step(seen, labels) for _ in range(self.config.steps)]
        return _finite(torch.stack(norms))

    def restore(self) -> None:
        """θ̃ → θ, bit for bit."""
        self.arena.copy_(self.original)

    def _step(self, seen: Tensor, labels: Tensor) -> Tensor:
        self.gradients.zero_()
        F.cross_entropy(self.network(seen), labels).backward()
        config = self.config
        return self.network.operators.ascend_(self.arena, self.gradients, config.rho / config.steps, normalize=config.normalize_ascent)


def _finite(norms: Tensor) -> Tensor:
    bad = (~torch.isfinite(norms)).nonzero()
    if len(bad):
        step = int(bad[0])
        raise InputError(f"gradient of the ascent is not finite in step {step + 1} of {len(norms)} (norm {float(norms[step])}); lower rho")
    return norms

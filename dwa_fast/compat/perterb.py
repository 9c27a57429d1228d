"""`Perterb` of DWA, in their spelling: the normalised ascent step of the weights (Eq. 11, Algorithm 1) as an optimiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dwa_fast.compat.fields import plain
from dwa_fast.config import check_real
from dwa_fast.errors import InputError
from dwa_fast.reference.ops import ASCENT_EPSILON


class Perterb(Optimizer):
    """Moves weights uphill along their gradient, and takes the last move back before a base optimiser steps.

    Values are those of the published class; the weights of a device move together. DWA passes ρ/K and calls `first_step(True)` K times.
    """

    def __init__(self, params: Iterable[Any], base_optimizer: Optimizer, rho: float = 0.05, dropout: float = 0, **kwargs: Any) -> None:
        """Take hold of weights.

        Args:
            params: weights, or groups of them.
            base_optimizer: what `second_step` steps.
            rho: length of a step over all weights, at least 0.
            dropout: kept, and not used; the published class has it.
            **kwargs: kept in the groups.
        Raises:
            TypeError: base_optimizer is a class.
            InputError: rho is no number of at least 0.
        """
        rho = plain(rho)
        check_real("rho", rho, 0)
        if isinstance(base_optimizer, type):
            raise TypeError(f"base_optimizer must be an optimiser, such as Adam([images]), got the class {base_optimizer.__name__}")
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer
        self.dropout = dropout
        for group in self.param_groups:
            group["rho"] = rho

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """p ← p + e with e = rho·g/(‖g‖₂ + 1e-12), one norm over all weights, in float32 or wider; e is remembered.

        Raises:
            InputError: no weight has a gradient, or one is not finite; no weight has moved then.
        """
        norm = self._grad_norm()
        for group in self.param_groups:
            scale = group["rho"] / (norm + ASCENT_EPSILON)
            for weights, gradients in _by_device(group):
                moves = torch._foreach_mul(gradients, scale.to(weights[0].device))
                torch._foreach_add_(weights, moves)
                for p, move in zip(weights, moves, strict=True):
                    self.state[p]["e_w"] = move
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Take back the last `first_step` of every weight that has a gradient, then step the base optimiser."""
        for group in self.param_groups:
            for weights, _ in _by_device(group):
                torch._foreach_sub_(weights, [self.state[p]["e_w"] for p in weights])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """`first_step`, the closure (a forward and backward pass), `second_step`.

        Raises:
            InputError: there is no closure.
        """
        if closure is None:
            raise InputError("Perterb.step wants a closure that does a forward and backward pass, got None")
        self.first_step(zero_grad=True)
        with torch.inference_mode(False), torch.enable_grad():
            closure()
        self.second_step()

    def _grad_norm(self) -> Tensor:
        weights = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in weights if p.grad is not None]
        if not gradients and not any(p.requires_grad for p in weights):
            raise InputError(
                "Perterb.first_step wants gradients, but requires_grad is off for every weight: switch it on, as with "
                "teacher.requires_grad_(True), before the forward pass"
            )
        if not gradients:
            raise InputError("Perterb.first_step wants gradients: no weight has one; call backward() first")
        device = weights[0].device
        wide = functools.reduce(torch.promote_types, (each.dtype for each in gradients), torch.float32)
        norms = [each.to(device) for each in torch._foreach_norm(gradients, 2, dtype=wide)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if not norm.isfinite():
            raise InputError(
                "Perterb.first_step wants finite gradients, got NaN or infinity; with a GradScaler choose a smaller init_scale, "
                "or do the ascent outside autocast"
            )
        return norm


def _by_device(group: dict[str, Any]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The weights of a group that have a gradient, and their gradients, device by device."""
    pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
    for device in dict.fromkeys(p.device for p, _ in pairs):
        yield [p for p, _ in pairs if p.device == device], [gradient for p, gradient in pairs if p.device == device]

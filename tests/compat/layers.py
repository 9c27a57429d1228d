"""A BatchNorm layer, and what the published hook makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def layer(channels: int = 6, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.BatchNorm2d:
    """A trained layer in eval mode."""
    made = nn.BatchNorm2d(channels).eval()
    made.running_mean, made.running_var = torch.randn(channels), torch.rand(channels) + 0.3
    return made.to(device, dtype)


def as_published(y: Tensor, module: nn.BatchNorm2d, r_var: float = 1.0) -> Tensor:
    """The definition, in the precision of y, by automatic differentiation."""
    assert module.running_mean is not None
    assert module.running_var is not None
    flat = y.transpose(0, 1).flatten(1)
    mean, var = module.running_mean.to(y.dtype) - flat.mean(1), module.running_var.to(y.dtype) - flat.var(1, unbiased=False)
    return r_var * var.norm() + mean.norm()


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf)[0]


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.detach().double() - expected.detach()).norm() / expected.detach().norm())


def buffers(module: nn.BatchNorm2d) -> tuple[Any, Any, Any, Any]:
    return module.running_mean, module.running_var, module.weight, module.bias


def losses(network: nn.Module, images: Tensor, hooks: list[Any]) -> tuple[Tensor, Tensor]:
    """Logits and matching loss of a network, as recover loops write it."""
    logits = network(images)
    return logits, torch.stack([hook.r_feature * (10.0 if i == 0 else 1.0) for i, hook in enumerate(hooks)]).sum()


class Plain:
    """The published class: the definition at each forward pass."""

    def __init__(self, module: nn.BatchNorm2d) -> None:
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.r_feature = as_published(inputs[0], module)


def batchnorms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]

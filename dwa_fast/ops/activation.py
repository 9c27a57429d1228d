"""The activations that `bn_act` applies, by name."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

Activation = Literal["none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

_TITLES = {"relu": "ReLU", "relu6": "ReLU6", "silu": "SiLU", "hardswish": "Hardswish", "gelu": "GELU", "gelu_tanh": "GELU (tanh)"}


def title(activation: Activation, slope: Tensor | None) -> str:
    """The activation as PyTorch calls its layer."""
    leaky = "PReLU" if isinstance(slope, nn.Parameter) else "LeakyReLU"
    return _TITLES.get(activation, leaky)

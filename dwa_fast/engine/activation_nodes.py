"""The activations that `bn_act` applies, and how they are recognised in a traced network: as modules, functions and methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.models.modules import has_hooks
from dwa_fast.ops.activation import Activation


@dataclass(frozen=True)
class Match:
    """An activation that a node of a graph applies."""

    activation: Activation
    slope: nn.Parameter | float | None = None  # of leaky_relu below 0: PReLU's weight, [1] or [C], or LeakyReLU's number

    def fits(self, channels: int, dtype: torch.dtype) -> bool:
        """Whether it can follow that many channels, whose vectors have that precision."""
        return not isinstance(self.slope, Tensor) or (self.slope.shape in ((1,), (channels,)) and self.slope.dtype is dtype)


def match(traced: torch.fx.GraphModule, node: torch.fx.Node, value: torch.fx.Node) -> Match | None:
    """The activation that the node applies to `value`; None where it does something else.

    A module with hooks, of a subclass, or with a forward of its own is not recognised, nor a PReLU whose weight is used elsewhere too.
    """
    rule, given = _rule(traced, node)
    if rule is None:
        return None
    try:
        arguments = inspect.signature(rule).bind(*node.args, **node.kwargs, **given).arguments
    except TypeError:  # arguments that the activation does not have
        return None
    if arguments.pop("input") is not value:
        return None
    if "weight" in arguments:
        arguments["weight"] = _own_parameter(traced, arguments["weight"])
    return None if any(isinstance(each, torch.fx.Node) for each in arguments.values()) else rule(None, **arguments)


def changed_in_place(traced: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether a user of the node's result may write into it."""
    return any(_writes(traced, user) for user in node.users)


def _relu(input: Any, inplace: Any = False) -> Match:
    return Match("relu")


def _relu6(input: Any, inplace: Any = False) -> Match:
    return Match("relu6")


def _silu(input: Any, inplace: Any = False) -> Match:
    return Match("silu")


def _hardswish(input: Any, inplace: Any = False) -> Match:
    return Match("hardswish")


def _hardtanh(input: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: Any = False) -> Match | None:
    return Match("relu6") if (min_val, max_val) == (0, 6) else None


def _gelu(input: Any, approximate: Any = "none") -> Match | None:
    names: dict[Any, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}
    return Match(names[approximate]) if approximate in names else None


def _leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: Any = False) -> Match | None:
    number = isinstance(negative_slope, (int, float)) and not isinstance(negative_slope, bool)
    return Match("leaky_relu", float(negative_slope)) if number else None


def _prelu(input: Any, weight: Any) -> Match | None:
    return Match("leaky_relu", weight) if isinstance(weight, nn.Parameter) else None


_Rule = Callable[..., Match | None]
_FUNCTIONS: dict[Any, _Rule] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), _relu),
    F.relu6: _relu6,
    F.silu: _silu,
    F.hardswish: _hardswish,
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    F.gelu: _gelu,
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    **dict.fromkeys((F.prelu, torch.prelu), _prelu),
}
_METHODS: dict[str, _Rule] = {"relu": _relu, "relu_": _relu, "prelu": _prelu}
_MODULES: dict[type[nn.Module], tuple[_Rule, tuple[str, ...]]] = {  # and which attributes are arguments
    nn.ReLU: (_relu, ()),
    nn.ReLU6: (_relu6, ()),
    nn.SiLU: (_silu, ()),
    nn.Hardswish: (_hardswish, ()),
    nn.Hardtanh: (_hardtanh, ("min_val", "max_val")),
    nn.GELU: (_gelu, ("approximate",)),
    nn.LeakyReLU: (_leaky_relu, ("negative_slope",)),
    nn.PReLU: (_prelu, ("weight",)),
}


def _rule(traced: torch.fx.GraphModule, node: torch.fx.Node) -> tuple[_Rule | None, dict[str, Any]]:
    """What reads the node's arguments, and those that its module holds."""
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target), {}
    if node.op == "call_method":
        return _METHODS.get(str(node.target)), {}
    layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    if layer is None or type(layer) not in _MODULES or "forward" in vars(layer) or has_hooks(layer):
        return None, {}
    rule, names = _MODULES[type(layer)]
    return rule, {name: getattr(layer, name) for name in names}


def _own_parameter(traced: torch.fx.GraphModule, weight: Any) -> Any:
    """The parameter of a PReLU that is used once; else what was given, which is no parameter."""
    if isinstance(weight, torch.fx.Node):
        weight = _attribute(traced, weight) if len(weight.users) == 1 else None
    uses = sum(_reads(traced, node, weight) for node in traced.graph.nodes)
    return weight if uses == 1 else None


def _reads(traced: torch.fx.GraphModule, node: torch.fx.Node, parameter: Any) -> bool:
    if node.op == "call_module":
        return any(each is parameter for each in traced.get_submodule(str(node.target)).parameters())
    return node.op == "get_attr" and _attribute(traced, node) is parameter


def _attribute(traced: torch.fx.GraphModule, node: torch.fx.Node) -> Any:
    """What a get_attr node reads; None for others."""
    if node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(traced.get_submodule(owner), name)


def _writes(traced: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    return bool(node.kwargs.get("inplace")) or "out" in node.kwargs or (name.endswith("_") and not name.endswith("__"))

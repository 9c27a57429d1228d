"""What an iteration would cost if every operator call took no longer than its arithmetic or its memory traffic must."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from dwa_fast.engine.capture import trace_step

_WINOGRAD = "dwa_fast.conv3x3_forward.default"
_ARRANGED = ("dwa_fast.conv3x3_weights.default", "dwa_fast.conv_turned.default")  # of weights, once per batch


@dataclass(frozen=True)
class Call:
    """One operator call of an iteration."""

    operator: str
    operations: int  # floating-point operations of convolutions and matrix products; of Winograd's 3×3 convolutions those of its products
    traffic: int  # bytes: every tensor it reads and every tensor it writes, once


def count(peer: harness.Ours) -> list[Call]:
    """The calls of one iteration of our engine, as it captures them: weights frozen, one pass per BatchNorm layer each way."""
    with peer.execution.arithmetic():
        graph = trace_step(peer.refinement._iterate)
    peer.reset()

    def value(node: Node) -> Any:
        return operator.attrgetter(str(node.target))(graph) if node.op == "get_attr" else node.meta.get("val")

    return [
        _call(node, torch.fx.map_arg(node.args, value), torch.fx.map_arg(node.kwargs, value), value(node))
        for node in graph.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and not touches_nothing(node.target)
        if str(node.target) not in _ARRANGED
    ]


def seconds(calls: list[Call], arithmetic: float, copying: float) -> float:
    """Σ over the calls of max(operations / arithmetic, traffic / copying); ceilings per second."""
    return sum(max(call.operations / arithmetic, call.traffic / copying) for call in calls)


def touches_nothing(target: torch._ops.OpOverload) -> bool:
    """Whether the call touches no memory: it returns a view of its argument's memory, or memory that is not filled."""
    returned = target._schema.returns
    aliases = bool(returned) and all(each.alias_info is not None and not each.alias_info.is_write for each in returned)
    return aliases or target.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like)


def traffic(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes of a call: every tensor it reads and every tensor it writes, once; what is changed in place counts twice."""
    read = _tensors((args, kwargs))
    if target.overloadpacket is torch.ops.aten.convolution_backward and not args[-1][1]:
        read = [args[0], args[2]]  # without a weight gradient the input's values are not needed
    written = [
        each
        for given, argument in zip(args, target._schema.arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for each in _tensors(given)
    ]
    several = isinstance(result, (tuple, list)) and len(target._schema.returns) > 1
    results = zip(result if several else [result], target._schema.returns, strict=False)
    made = [each for value, returned in results if returned.alias_info is None for each in _tensors(value)]
    return sum(_bytes(each) for each in [*read, *written, *made])


def _bytes(tensor: Tensor) -> int:
    """Of its memory: what is expanded lies there once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size]
    return math.prod(sizes) * tensor.element_size()


def _call(node: Node, args: Any, kwargs: Any, result: Any) -> Call:
    target: Any = node.target
    formula = flop_registry.get(target.overloadpacket)
    operations = int(formula(*args, **kwargs, out_val=result)) if formula else _products(result, args[0]) if str(target) == _WINOGRAD else 0
    return Call(str(target), operations, traffic(target, args, kwargs, result))


def _products(y: Tensor, x: Tensor) -> int:
    """Of a tile of 2×2 pixels 16 products of every input with every output, and as many additions."""
    images, outputs, height, width = y.shape
    return 2 * 16 * images * -(-height // 2) * -(-width // 2) * x.shape[1] * outputs


def _tensors(value: Any) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    torch.utils._pytree.tree_map_only(Tensor, lambda each: found.setdefault(id(each), each), value)
    return list(found.values())

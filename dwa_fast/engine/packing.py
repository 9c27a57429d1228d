"""Packs the convolution weights that a captured step does not change into oneDNN's format."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

_aten, _mkldnn = torch.ops.aten, torch.ops.mkldnn
# Calls that alias or write an argument without declaring it in their schema; their arguments count as written.
_UNDECLARED = {_aten._unsafe_view, _aten.unsafe_split, _aten.unsafe_split_with_sizes, _aten.native_batch_norm, _aten.set_}
_ARRANGED = ("dwa_fast::conv3x3_weights", "dwa_fast::conv_turned")  # of our own: weights in another order
_PLAIN: tuple[Any, ...] = ("none", [], None)  # no activation fused behind the convolution


def frozen_tensors(graph: GraphModule) -> set[Node]:
    """The outside tensors of a step whose memory none of its calls writes to, directly or through a view."""
    memory: dict[Node, set[int]] = {}  # by value: the outside storages that it may alias
    written: set[int] = set()
    for node in graph.graph.nodes:
        target: Any = node.target
        memory[node] = set()
        if node.op == "get_attr":
            memory[node] = {operator.attrgetter(str(target))(graph).untyped_storage().data_ptr()}
        elif target is operator.getitem or getattr(target, "overloadpacket", None) in _UNDECLARED:
            memory[node] = set().union(*(memory[each] for each in node.all_input_nodes))
            written |= memory[node] if target is not operator.getitem else set()
        elif node.op == "call_function":
            for position, declared in enumerate(target._schema.arguments):
                argument: Any = node.args[position] if position < len(node.args) else node.kwargs.get(declared.name)
                for each in argument if isinstance(argument, (list, tuple)) else [argument]:
                    if declared.alias_info is not None and isinstance(each, Node):
                        memory[node] |= memory[each]
                        written |= memory[each] if declared.alias_info.is_write else set()
    return {node for node in graph.graph.nodes if node.op == "get_attr" and not memory[node] & written}


@dataclass(frozen=True)
class _Packed:
    """A convolution, or the gradient of its input, with packed weights: `call(source, pack(weight, *order), *shape)`."""

    source: Node
    weight: Node
    pack: Any
    order: tuple[Any, ...]
    call: Any
    shape: tuple[Any, ...]


def pack_convolutions(graph: GraphModule) -> set[Node]:
    """Replace CPU convolutions with frozen weights by calls on packed weights.

    Returns the packing calls, which have to run once before the first replay.
    PyTorch passes oneDNN plain weights, which oneDNN packs again in every call; that costs up to a third of the time where batches
    are small. A replacement is made only if it gives the same bits in the same layout on random numbers.
    """
    frozen, packing, checked = frozen_tensors(graph), set(), dict[Any, bool]()
    for node in list(graph.graph.nodes):
        if getattr(node.target, "name", str)() in _ARRANGED and node.args[0] in frozen:
            packing.add(node)
            continue
        packed = _packed(node)
        if packed is None or packed.weight not in frozen or not _same_bits(node, packed, checked):
            continue
        with graph.graph.inserting_before(node):
            weight = graph.graph.call_function(packed.pack, (packed.weight, *packed.order))
            new = graph.graph.call_function(packed.call, (packed.source, weight, *packed.shape, *_PLAIN))
        weight.meta["val"] = packed.weight.meta["val"]
        packing.add(weight)
        replaced = [node] if node.target is _aten.convolution.default else [user for user in node.users if user.args[1] == 0]
        for old in replaced:
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)
        _erase(graph, node)
    return packing


def _packed(node: Node) -> _Packed | None:
    """The node with packed weights; None where that is not possible: transposed convolutions, gradients of weights."""
    args: Any = node.args
    if node.target not in (_aten.convolution.default, _aten.convolution_backward.default) or args[0].meta["val"].dim() != 4:
        return None
    if node.target is _aten.convolution.default:
        source, weight, bias, stride, padding, dilation, transposed, _, groups = args
        shape: tuple[Any, ...] = (padding, stride, dilation, groups)
        pack, call = _mkldnn._reorder_convolution_weight.default, _mkldnn._convolution_pointwise.default
    else:
        source, x, weight, _, stride, padding, dilation, transposed, _, groups, output_mask = args
        if list(output_mask) != [True, False, False] or groups != 1:  # oneDNN is slow at the transposed ones of several groups
            return None
        stride, padding, dilation = (list(each) * (2 // len(each)) for each in (stride, padding, dilation))  # one number may stand for two
        axes = zip(_size(x)[2:], _size(source)[2:], _size(weight)[2:], stride, padding, dilation, strict=True)
        left = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in axes]
        shape, bias = (padding, left, stride, dilation, groups), None
        pack, call = _mkldnn._reorder_convolution_transpose_weight.default, _mkldnn._convolution_transpose_pointwise.default
    value = source.meta["val"]
    if transposed or value.device.type != "cpu" or not value.is_contiguous(memory_format=torch.channels_last):
        return None
    return _Packed(source, weight, pack, (*shape, _size(source)), call, (bias, *shape))


def _same_bits(node: Node, packed: _Packed, checked: dict[Any, bool]) -> bool:
    """Whether the packed call gives the bits of the node on random numbers; once for all layers of the same shapes and settings."""

    def layout(used: Node) -> Any:
        like = used.meta["val"]
        return like.dtype, like.shape, like.stride()

    key = str((node.target, map_arg(node.args, layout)))
    if key not in checked:
        checked[key] = _compare(node, packed)
    return checked[key]


def _compare(node: Node, packed: _Packed) -> bool:
    random = torch.Generator().manual_seed(0)
    values: dict[Node, Tensor] = {}

    def value(used: Node) -> Tensor:
        if used not in values:
            like = used.meta["val"]
            extent = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
            values[used] = torch.empty(extent, dtype=like.dtype).normal_(generator=random).as_strided(like.shape, like.stride())
        return values[used]

    target: Any = node.target
    try:
        result = target(*map_arg(node.args, value))
        expected: Tensor = result if isinstance(result, Tensor) else result[0]
        weight = packed.pack(value(packed.weight), *packed.order)
        got: Tensor = packed.call(value(packed.source), weight, *map_arg(packed.shape, value), *_PLAIN)
    except RuntimeError:  # no such primitive on this processor, an integer type, overlapping memory
        return False
    return got.stride() == expected.stride() and torch.equal(got, expected)


def _erase(graph: GraphModule, node: Node) -> None:
    """Remove a call whose results are unused, and the empty tensors made for it alone."""
    for user in list(node.users):
        graph.graph.erase_node(user)
    before = node.all_input_nodes
    graph.graph.erase_node(node)
    for each in before:
        if not each.users and each.target is _aten.empty_strided.default:
            graph.graph.erase_node(each)


def _size(node: Node) -> list[int]:
    return list(node.meta["val"].shape)

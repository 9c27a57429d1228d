"""Recorded steps: what they compute from frozen tensors alone, and convolutions whose weights are frozen, in oneDNN's own format."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

_aten, _mkldnn = torch.ops.aten, torch.ops.mkldnn
_PLAIN: tuple[Any, ...] = ("none", [], None)  # nothing else is done to the result of a convolution


def constants(graph: GraphModule) -> set[Node]:
    """The values that are the same in every repeat: computed from tensors that no call writes into, and never written into themselves.

    A call that writes into a tensor writes into all views of its memory.
    """
    memory: dict[Node, set[Any]] = {}  # by value: where it may lie
    written: set[Any] = set()
    for node in graph.graph.nodes:
        target: Any = node.target
        memory[node] = {node}
        if node.op == "get_attr":
            memory[node] = {operator.attrgetter(str(target))(graph).untyped_storage().data_ptr()}
        elif target is operator.getitem:
            memory[node] = memory[node.all_input_nodes[0]]
        elif node.op == "call_function":
            for position, declared in enumerate(target._schema.arguments):
                given: Any = node.args[position] if position < len(node.args) else node.kwargs.get(declared.name)
                if declared.alias_info is None or given is None:
                    continue
                shared: set[Any] = set().union(*(memory[each] for each in (given if isinstance(given, (list, tuple)) else [given])))
                memory[node] |= shared
                written |= shared if declared.alias_info.is_write else set()
    found: set[Node] = set()
    for node in graph.graph.nodes:
        computed = node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        if (node.op == "get_attr" or computed) and not memory[node] & written and not _draws(node):
            found.add(node)
    return found


@dataclass(frozen=True)
class _Packed:
    """A convolution, or the gradient of its input, with packed weights: `call(source, pack(weight, *order), *shape)`."""

    source: Node
    weight: Node
    pack: Any
    order: tuple[Any, ...]
    call: Any
    shape: tuple[Any, ...]


def pack_convolutions(graph: GraphModule, once: set[Node]) -> None:
    """Let convolutions of a CPU take constant weights packed, and add the packing to what is computed `once`.

    PyTorch gives oneDNN the weights as they lie, and oneDNN packs them in every call, which costs up to a third of the time where batches
    are small. Each replacement is tried on random numbers, and made only where it gives the same bits in the same layout.
    """
    for node in list(graph.graph.nodes):
        packed = _packed(node)
        if packed is None or node in once or packed.weight not in once or not _agrees(node, packed):
            continue
        with graph.graph.inserting_before(node):
            weight = graph.graph.call_function(packed.pack, (packed.weight, *packed.order))
            new = graph.graph.call_function(packed.call, (packed.source, weight, *packed.shape, *_PLAIN))
        weight.meta["val"] = packed.weight.meta["val"]
        once.add(weight)
        replaced = [node] if node.target is _aten.convolution.default else [user for user in node.users if user.args[1] == 0]
        for old in replaced:
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)
        _erase(graph, node)


def _packed(node: Node) -> _Packed | None:
    """The node with packed weights, where it may have them: no transposed convolution, and no gradient of weights."""
    args: Any = node.args
    if node.target is _aten.convolution.default:
        source, weight, bias, stride, padding, dilation, transposed, _, groups = args
        shape: tuple[Any, ...] = (padding, stride, dilation, groups)
        pack, call = _mkldnn._reorder_convolution_weight.default, _mkldnn._convolution_pointwise.default
    elif node.target is _aten.convolution_backward.default:
        source, x, weight, _, stride, padding, dilation, transposed, _, groups, wanted = args
        if list(wanted) != [True, False, False] or groups != 1:  # oneDNN is slow at the transposed ones of several groups
            return None
        axes = zip(_size(x)[2:], _size(source)[2:], _size(weight)[2:], stride, padding, dilation, strict=True)
        left = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in axes]
        shape, bias = (padding, left, stride, dilation, groups), None
        pack, call = _mkldnn._reorder_convolution_transpose_weight.default, _mkldnn._convolution_transpose_pointwise.default
    else:
        return None
    value = source.meta["val"]
    if transposed or value.device.type != "cpu" or value.dim() != 4 or not value.is_contiguous(memory_format=torch.channels_last):
        return None
    return _Packed(source, weight, pack, (*shape, _size(source)), call, (bias, *shape))


def _agrees(node: Node, packed: _Packed) -> bool:
    """Whether the packed call does on random numbers what the node does."""
    random = torch.Generator().manual_seed(0)
    values: dict[Node, Tensor] = {}

    def value(used: Node) -> Tensor:
        if used not in values:
            like = used.meta["val"]
            values[used] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).normal_(generator=random)
        return values[used]

    target: Any = node.target
    result = target(*map_arg(node.args, value))
    wanted: Tensor = result if isinstance(result, Tensor) else result[0]
    try:
        weight = packed.pack(value(packed.weight), *packed.order)
        got: Tensor = packed.call(value(packed.source), weight, *map_arg(packed.shape, value), *_PLAIN)
    except RuntimeError:  # there is no such primitive on this processor
        return False
    return got.stride() == wanted.stride() and torch.equal(got, wanted)


def _erase(graph: GraphModule, node: Node) -> None:
    """Take out a call whose results nobody uses, and what was made for it alone."""
    for user in list(node.users):
        graph.graph.erase_node(user)
    before = node.all_input_nodes
    graph.graph.erase_node(node)
    for each in before:
        if not each.users and each.target is _aten.empty_strided.default:
            graph.graph.erase_node(each)


def _draws(node: Node) -> bool:
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _size(node: Node) -> list[int]:
    return list(node.meta["val"].shape)

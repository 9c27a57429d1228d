"""Traces a teacher with torch.fx along the path that given images take, for batches of any size."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.node import map_aggregate, map_arg
from torch.fx.proxy import Attribute, TraceError
from torch.utils._pytree import tree_leaves

_SIZES = {"shape", "size", "numel", "nelement", "stride", "nbytes"}
_METADATA = set("size dim ndimension numel nelement stride is_contiguous element_size is_floating_point is_complex get_device".split())


class Root(nn.Module):
    """A teacher as a module with one argument; its optional arguments keep their defaults."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Tensor) -> Any:
        """The teacher's output."""
        return self.teacher(images)


def symbolic(
    teacher: nn.Module,
    images: Tensor,  # [3, C, H, W]
    leaves: Collection[nn.Module],
) -> GraphModule:
    """The teacher's graph, whose modules are the teacher's own, under their names. A node has its shape, if any, in meta["shape"].

    Shapes are numbers while it is traced, so that a forward pass may compare them and branch on them; it must not branch on values.
    Sizes that depend on the number of images are found by tracing two batches of different size, and computed in the graph. Where the
    forward pass reads sizes, it may still do otherwise with more images: then meta["reads_sizes"] of the result is true.

    Args:
        leaves: modules that are called, not traced into.
    Raises:
        Exception: of any kind, where the forward pass cannot be traced: it is the teacher's own code that runs.
    """
    root = Root(teacher)
    tracer = _Tracer(images[:2], leaves)
    graph = tracer.trace(root)
    _generalise(graph, _Tracer(images[:3], leaves).trace(root))
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        node.meta = {"shape": getattr(node.meta.get("value"), "shape", None)}
        if node.op in ("call_module", "get_attr"):
            value, node.target = operator.attrgetter(str(node.target))(root), str(node.target).removeprefix("teacher.")
            attributes[str(node.target)] = value
    traced = GraphModule(attributes, graph)
    traced.meta["reads_sizes"] = tracer.reads_sizes
    traced.graph.lint()
    return traced


class _ValueProxy(Proxy):
    """Stands for a tensor, or a sequence of tensors, that the tracer knows."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> Any:
        self.tracer.reads_sizes |= name in _SIZES
        value = getattr(self.node.meta["value"], name)
        if callable(value):
            return Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {}) if _holds_tensors(value) else value

    def __len__(self) -> int:
        self.tracer.reads_sizes = True
        return len(self.node.meta["value"])

    def __iter__(self) -> Iterator[Any]:
        self.tracer.reads_sizes = True
        return (self[index] for index in range(len(self)))  # type: ignore[index]


class _Tracer(torch.fx.Tracer):
    """Computes the value of every node as it is traced, and gives shapes and the like as plain numbers."""

    def __init__(self, images: Tensor, leaves: Collection[nn.Module]) -> None:
        super().__init__()
        self._images, self._leaves = images, set(leaves)
        self._computing = False  # whether modules are called for their values
        self.reads_sizes = False  # whether the forward pass has seen a number that may depend on that of the images

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._leaves or isinstance(m, torch.jit.ScriptModule) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._computing:
            try:
                return super().call_module(m, forward, args, kwargs)
            except NameError:  # a module made inside a forward pass, which has no place in the tree
                if any(m is module for module in self.root.modules()):
                    raise
        return forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: Node) -> Proxy:
        return _ValueProxy(node, self)

    def create_node(self, kind: str, target: Any, *rest: Any, **others: Any) -> Node:
        node = super().create_node(kind, target, *rest, **others)
        if kind == "get_attr":
            with self._untraced():
                node.meta["value"] = operator.attrgetter(target)(self.root)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **others: Any) -> Any:
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(self._images.device.type):
            raise TraceError("it switches gradients off, or autocast on, for a part of its forward pass")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **others)
        value = proxy.node.meta["value"] = self._value(proxy.node)
        if _holds_tensors(value):
            return proxy
        if value is None:
            return None
        name = getattr(target, "__name__", target)
        self.reads_sizes |= name in _SIZES
        if name not in _METADATA:
            raise TraceError(f"it reads values of a tensor with {name}")
        self.graph.erase_node(proxy.node)
        return value

    @torch.no_grad()
    def _value(self, node: Node) -> Any:
        if node.op == "get_attr":
            return node.meta["value"]
        args, kwargs = map_arg((node.args, node.kwargs), lambda other: other.meta["value"])
        with self._untraced():
            if node.op == "placeholder":
                return self._images.clone()
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            called = operator.attrgetter(node.target)(self.root) if isinstance(node.target, str) else node.target
            return called(*args, **kwargs)

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """Inside, modules and their attributes are what they are outside of a trace."""
        before, self._computing = self._computing, True
        try:
            yield
        finally:
            self._computing = before


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _generalise(graph: Graph, other: Graph) -> None:
    """Make the graph of two images that of any number, by comparing it with the graph of three.

    Raises:
        TraceError: they differ in more than numbers that grow with the batch.
    """
    pairs = list(zip(graph.nodes, other.nodes, strict=False))
    if len(graph.nodes) != len(other.nodes) or any((a.op, a.target) != (b.op, b.target) for a, b in pairs):
        raise TraceError("it takes another path for another number of images")
    twins = dict(pairs)
    images = next(iter(graph.nodes))
    for node, twin in pairs:
        if node.op == "get_attr":
            _compare_constants(node, twin)

        def sizes(mine: Any, theirs: Any, node: Node = node) -> Any:
            if isinstance(mine, Node):
                if twins[mine] is not theirs:
                    raise TraceError("it takes another path for another number of images")
                return mine
            if isinstance(mine, slice):
                return slice(*(sizes(getattr(mine, part), getattr(theirs, part)) for part in ("start", "stop", "step")))
            if isinstance(mine, (tuple, list)) and len(mine) == len(theirs):
                return type(mine)([sizes(*both) for both in zip(mine, theirs, strict=True)])
            if isinstance(mine, dict) and mine.keys() == theirs.keys():
                return {key: sizes(value, theirs[key]) for key, value in mine.items()}
            if type(mine) is type(theirs) and (mine == theirs or mine != mine):
                return mine
            if type(mine) is not int or type(theirs) is not int or mine % 2 or mine // 2 * 3 != theirs:
                raise TraceError(f"it computes with {mine} for two images and with {theirs} for three")
            with graph.inserting_before(node):
                return graph.call_function(operator.mul, (graph.call_method("size", (images, 0)), mine // 2))

        plain = map_aggregate((node.args, node.kwargs), lambda each: each)
        theirs = map_aggregate((twin.args, twin.kwargs), lambda each: each)
        changed = sizes(plain, theirs)
        node.args, node.kwargs = changed


def _compare_constants(node: Node, twin: Node) -> None:
    mine, theirs = node.meta["value"], twin.meta["value"]
    if isinstance(mine, Tensor) and mine is not theirs and not (mine.shape == theirs.shape and torch.equal(mine, theirs)):
        raise TraceError("it makes a tensor whose shape or values depend on the images")

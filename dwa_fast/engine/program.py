"""Records what a step does to fixed tensors, so that it can be repeated in C++ without the interpreter."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dwa_fast import ops
from dwa_fast.engine.packing import pack_convolutions
from dwa_fast.engine.tracing import trace


class Program:
    """A step as a flat list of operator calls: forward, backward and updates in the order in which Python made them once.

    The step must read and write only tensors that stay where they are, and take the same path every time. The bits of the result are
    those of the step itself. Convolutions take weights that the step leaves alone in oneDNN's format: `refresh` packs them,
    once when the Program is made, and is to be called after such weights have been changed. Making a Program runs the step once.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        ops.load()
        graph = trace(step)
        once = pack_convolutions(graph)
        self._program = importlib.import_module("dwa_fast._C").Program()
        slots: dict[Node, Any] = {}
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                slots[node] = self._program.hold(operator.attrgetter(str(node.target))(graph).detach())
            elif node.op == "call_function" and node.target is operator.getitem:
                slots[node] = slots[node.args[0]][node.args[1]]
            elif node.op == "call_function":
                slots[node] = self._append(node, slots, node in once)
            elif node.op not in ("placeholder", "output"):
                raise RuntimeError(f"a recorded step holds {node.format_node()}, which is no operator call")
        self._program.seal()
        self.refresh()

    def refresh(self) -> None:
        """Pack the weights that the step leaves alone anew."""
        self._program.refresh()

    def run(self, times: int) -> None:
        """Repeat the step; other Python threads go on meanwhile."""
        self._program.run(times)

    def __len__(self) -> int:
        return int(self._program.size)

    def _append(self, node: Node, slots: dict[Node, Any], once: bool) -> Any:
        """The slot of the node's result, or a list of them where the operator gives several."""
        target: Any = node.target
        schema = target._schema
        arguments = []
        for position, argument in enumerate(schema.arguments):
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            arguments.append(torch.fx.map_arg(given, lambda used: slots[used]))
        value = node.meta["val"] if schema.returns else ()
        several = not isinstance(value, Tensor)
        count = len(value) if several else 1
        results = self._program.call(schema.name, schema.overload_name, arguments, count, once)
        return results if several else results[0]

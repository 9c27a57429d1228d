"""A step on fixed tensors as a flat graph of operator calls: forward, backward and updates in the order in which Python made them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

TRACING = threading.RLock()  # held while a step or a teacher is traced or recorded: torch.fx patches nn.Module for all threads of a process


def trace(step: Callable[[], None]) -> GraphModule:
    """The graph of a step, which runs once. It takes one argument that it does not read; the step's tensors are its attributes."""

    def traced(unused: Tensor) -> None:
        step()

    graph: GraphModule = make_fx(traced)(torch.empty(0))
    return graph

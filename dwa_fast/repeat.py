"""A step on fixed tensors, repeated without the interpreter where that is possible: in C++ on a CPU, as a CUDA graph on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from dwa_fast.backend import Execution
from dwa_fast.compiled import compiled
from dwa_fast.program import Program

_WARM_UPS = 3  # before a capture: libraries choose their algorithms and allocate their workspaces


class Repeat:
    """Runs a step any number of times. Making one runs the step, so what it changes must be set afterwards.

    The back-end "fused" records: on a CPU the operator calls, which C++ repeats with the interpreter's lock released; on a GPU the
    kernels, as a CUDA graph. "compiled" compiles the step where that pays, and records its kernels too. "reference" calls the step.
    """

    def __init__(self, step: Callable[[], None], execution: Execution, *, compiles: bool = False) -> None:
        self._execution = execution
        self._step = compiled(step) if compiles and execution.backend == "compiled" else step
        self._program: Program | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if execution.device.type == "cuda" and execution.backend not in ("reference", "eager"):
            self._graph = _captured(self._step, execution.device)
        elif execution.backend == "fused":
            self._program = Program(step)

    def run(self, times: int) -> None:
        """Repeat the step; on a GPU this only queues the work."""
        if self._program is not None:
            self._program.run(times)
        elif self._graph is not None:
            stream = torch.cuda.current_stream(self._execution.device).cuda_stream
            importlib.import_module("dwa_fast._C").launch_graph(self._graph.raw_cuda_graph_exec(), stream, times)
        else:
            for _ in range(times):
                self._step()


def _captured(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph

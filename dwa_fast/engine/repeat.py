"""A step on fixed tensors, repeated without the interpreter where that is possible: in C++ on a CPU, as a CUDA graph on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from dwa_fast.engine.backend import Execution
from dwa_fast.engine.compiled import compiled
from dwa_fast.engine.program import Program
from dwa_fast.engine.tracing import TRACING

Pool = Any  # of a GPU's memory: what `torch.cuda.graph_pool_handle` gives, whose type has no public name

_WARM_UPS = 3  # before a capture: libraries choose their algorithms and allocate their workspaces


class Repeat:
    """Runs a step any number of times. Making one runs the step, so what it changes must be set afterwards.

    The back-end "fused" records: on a CPU the operator calls, which C++ repeats with the interpreter's lock released; on a GPU the
    kernels, as a CUDA graph. "compiled" compiles the step where that pays, and records its kernels too. "reference" calls the step.
    """

    def __init__(
        self,
        step: Callable[[], None],
        execution: Execution,
        *,
        compiles: bool = False,
        records: bool = True,  # whether the step always makes the same calls, which a branch on values would change
        pool: Pool | None = None,
    ) -> None:
        """Record the step. Steps that run one after the other, never at once, share a GPU's memory where they are given the same `pool`."""
        self._execution = execution
        self._step = step
        self._program: Program | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if not records:
            return
        with TRACING:
            if compiles and execution.backend == "compiled":
                self._step = compiled(step)
            if execution.device.type == "cuda" and execution.backend not in ("reference", "eager"):
                self._graph = _captured(self._step, execution.device, pool)
            elif execution.backend == "fused":
                self._program = Program(step)

    def refresh(self) -> None:
        """To be called before the first repeat, and after weights that the step reads and never writes have been changed."""
        if self._program is not None:
            self._program.refresh()

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


def _captured(step: Callable[[], None], device: torch.device, pool: Pool | None) -> torch.cuda.CUDAGraph:
    """The step as a graph, captured on the current stream, since memory is reused on one stream only; the default one cannot capture."""
    current = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device) if current == torch.cuda.default_stream(device) else current
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        step()
    return graph

"""Captures a step on fixed tensors and replays it without the interpreter: in C++ on a CPU, as a CUDA graph on a GPU."""

from __future__ import annotations

import importlib
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dwa_fast import ops
from dwa_fast.engine.backend import Execution
from dwa_fast.engine.packing import pack_convolutions

GraphMemory = Any  # of a GPU's memory: what `torch.cuda.graph_pool_handle` gives, whose type has no public name

TRACING = threading.RLock()  # held while a step or a teacher is traced or captured: torch.fx patches nn.Module for all threads of a process
_STREAMS = 32  # streams of a device in PyTorch's pool, which gives them out round-robin
_WARM_UPS = 3  # before a capture: libraries choose their algorithms and allocate their workspaces


_taken: set[int] = set()  # handles of the streams that have an owner


def take_stream(device: torch.device) -> torch.cuda.Stream:
    """A CUDA stream without an owner; if all have one, a shared stream."""
    for _ in range(_STREAMS):
        stream = torch.cuda.Stream(device)
        if stream.cuda_stream not in _taken:
            break
    _taken.add(stream.cuda_stream)
    return stream


def return_stream(stream: torch.cuda.Stream) -> None:
    """Give a stream back."""
    _taken.discard(stream.cuda_stream)


def trace_step(step: Callable[[], None]) -> GraphModule:
    """The graph of a step, which runs once. It takes one argument that it does not read; the step's tensors are its attributes."""

    def traced(unused: Tensor) -> None:
        step()

    # make_fx notes the shape of every result in a fake tensor. Making a mode for each of them would take as long as the rest of the trace.
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))), _shared_notes():
        graph: GraphModule = make_fx(traced)(torch.empty(0))
    return graph


@contextmanager
def _shared_notes() -> Iterator[None]:
    """Inside, results that look alike share a fake tensor: making one takes as long as the operator calls of a small batch."""
    make, made = getattr(proxy_tensor, "extract_val", None), dict[Any, Any]()
    if make is None:  # a private name of PyTorch: without it traces take longer
        yield
        return

    def note(value: Any, *options: Any, **more: Any) -> Any:
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            return make(value, *options, **more)
        looks = value.dtype, value.device, value.shape, value.stride()
        if looks not in made:
            made[looks] = make(value, *options, **more)
        return made[looks]

    proxy_tensor.extract_val = note  # type: ignore[assignment]
    try:
        yield
    finally:
        proxy_tensor.extract_val = make


def compile_step(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one compiled graph: forward, backward and updates. Compiling takes a minute, and runs the step.

    Inductor's cache does not know how wide a CPU's vectors are: code made for AVX-512 and taken from the cache on a processor with AVX2
    gives wrong numbers. So the capability is part of the key.
    """
    unused = torch.empty(0)
    fast = torch.compile(trace_step(step), dynamic=False, options={"max_autotune": torch.cuda.is_available()})

    def run() -> None:
        with torch.no_grad():
            fast(unused)

    settings: Any = torch.compiler.config  # its `patch` has no annotation
    with settings.patch(cache_key_tag=f"{settings.cache_key_tag} {torch.backends.cpu.get_cpu_capability()}"):
        run()  # here, where no other thread traces
    return run


class CallList:
    """A step as a flat list of operator calls: forward, backward and updates in the order in which Python made them once.

    The step must read and write only tensors that stay where they are, and take the same path every time. The bits of the result are
    those of the step itself. Convolutions take weights that the step leaves alone in oneDNN's format: `refresh` packs them,
    once when it is made, and is to be called after such weights have been changed. Making one runs the step once.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        ops.load()
        graph = trace_step(step)
        once = pack_convolutions(graph)
        self._calls = importlib.import_module("dwa_fast._C").Program()
        slots: dict[Node, Any] = {}
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                slots[node] = self._calls.hold(operator.attrgetter(str(node.target))(graph).detach())
            elif node.op == "call_function" and node.target is operator.getitem:
                slots[node] = slots[node.args[0]][node.args[1]]
            elif node.op == "call_function":
                slots[node] = self._append(node, slots, node in once)
            elif node.op not in ("placeholder", "output"):
                raise RuntimeError(f"a captured step holds {node.format_node()}, which is no operator call")
        self._calls.seal()
        self.refresh()

    def refresh(self) -> None:
        """Pack the frozen weights again."""
        self._calls.refresh()

    def run(self, times: int) -> None:
        """Replay the step; other Python threads run meanwhile."""
        self._calls.run(times)

    def __len__(self) -> int:
        return int(self._calls.size)

    def _append(self, node: Node, slots: dict[Node, Any], once: bool) -> Any:
        """The slot of the node's result, or a list of slots if there are several results."""
        target: Any = node.target
        schema = target._schema
        arguments = []
        for position, argument in enumerate(schema.arguments):
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            arguments.append(torch.fx.map_arg(given, lambda used: slots[used]))
        value = node.meta["val"] if schema.returns else ()
        several = not isinstance(value, Tensor)
        count = len(value) if several else 1
        results = self._calls.call(schema.name, schema.overload_name, arguments, count, once)
        return results if several else results[0]


class CapturedStep:
    """Replays a step any number of times. Creating one executes the step, so buffers that it changes must be initialised afterwards.

    An execution that captures does so once: on a CPU the operator calls, which C++ repeats with the interpreter lock released; on a GPU
    the kernels, as a CUDA graph. The back-end "compiled" compiles the step first. Without a capture, every repeat calls the step.

    A captured step no longer refers to the function that it was made from, so that its memory is freed with the last reference to it.
    """

    def __init__(
        self,
        step: Callable[[], None],
        execution: Execution,
        *,
        compiles: bool = False,
        captures: bool = True,  # whether the step always makes the same calls, which a branch on values would change
        graph_memory: GraphMemory | None = None,
    ) -> None:
        """Capture the step.

        Args:
            graph_memory: shared by captured steps that never run at the same time.
        """
        self._execution = execution
        self._step: Callable[[], None] | None = step
        self._calls: CallList | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._launch: Callable[[int, int, int], None] | None = None  # repeats the graph from C++; PyTorch does where that was not built
        if not captures:
            return
        with TRACING:
            if compiles and execution.backend == "compiled":
                self._step = step = compile_step(step)
            if not execution.captures:
                return
            if execution.device.type == "cuda":
                self._graph = _captured(step, execution.device, graph_memory)
                if ops.cause() is None and ops.built_with()["has_cuda"]:
                    self._launch = importlib.import_module("dwa_fast._C").launch_graph
            else:
                self._calls = CallList(step)
        self._step = None

    def refresh(self) -> None:
        """Call this before the first replay, and whenever weights that the step only reads have changed."""
        if self._calls is not None:
            self._calls.refresh()

    def run(self, times: int) -> None:
        """Repeat the step; on a GPU this only queues the work."""
        if self._calls is not None:
            self._calls.run(times)
        elif self._launch is not None and self._graph is not None:
            stream = torch.cuda.current_stream(self._execution.device).cuda_stream
            self._launch(self._graph.raw_cuda_graph_exec(), stream, times)
        else:
            repeated = self._step or self._graph.replay  # type: ignore[union-attr]  # one of both
            for _ in range(times):
                repeated()

    def close(self) -> None:
        """Free the graph and its memory; the device must have finished with it. The step cannot run any more."""
        if self._graph is not None:
            self._graph.reset()


def _captured(step: Callable[[], None], device: torch.device, graph_memory: GraphMemory | None) -> torch.cuda.CUDAGraph:
    """The step as a graph, captured on the current stream, since memory is reused on one stream only; the default one cannot capture."""
    current = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device) if current == torch.cuda.default_stream(device) else current
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step()
    current.wait_stream(stream)
    return capture_graph(step, stream, graph_memory)


def capture_graph(step: Callable[[], object], stream: torch.cuda.Stream, graph_memory: GraphMemory | None) -> torch.cuda.CUDAGraph:
    """The kernels of a step that has run on that stream before, none of which runs now.

    Raises:
        RuntimeError: the step waits for the device, such as by reading a value; the device and its memory are as before.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=graph_memory, stream=stream), _no_waiting():
        step()
    return graph


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, PyTorch raises before it waits for a GPU: that would break a capture, and with PyTorch 2.11 all later ones of the process."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)

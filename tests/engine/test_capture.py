"""A captured step does what the step does, bit for bit, as often as asked."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast import synthesize
from dwa_fast.engine import ascent, capture, synthesis
from dwa_fast.engine.ascent import Ascent
from dwa_fast.engine.backend import Execution
from dwa_fast.engine.capture import CallList, CapturedStep, compile_step, trace_step
from dwa_fast.engine.synthesis import Batch, Synthesizer
from dwa_fast.reference.ops import Operators
from tests.nets import real_images, small_recipe, small_teacher


def test_repeats_a_training_step_bit_for_bit() -> None:
    """Forward, backward, update, a counter, a list of tensors, several results and Python's numbers as operands."""

    def make() -> tuple[list[Tensor], Tensor, Tensor, nn.Module]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
        return list(network.parameters()), torch.zeros(5), torch.zeros((), dtype=torch.int64), network

    images, labels = torch.randn(6, 2, 6, 6), torch.tensor([0, 1, 2, 0, 1, 2])

    def step(parameters: list[Tensor], losses: Tensor, count: Tensor, network: nn.Module) -> None:
        halves = images.split(3)
        loss = F.cross_entropy(network(torch.cat([halves[1], halves[0]])), labels) * 0.5
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p.sub_(0.1 * gradient)
            losses.index_copy_(0, count[None], loss[None])
            count.add_(1)

    plain, captured = make(), make()
    for _ in range(5):
        step(*plain)
    calls = CallList(lambda: step(*captured))  # runs the step once
    calls.run(4)
    assert len(calls) > 20
    assert torch.equal(plain[1], captured[1])
    assert (plain[1].diff() < 0).all()
    for one, two in zip(plain[0], captured[0], strict=True):
        assert torch.equal(one, two)


def test_other_threads_go_on_meanwhile() -> None:
    values, ticks, done = torch.randn(400, 400), 0, threading.Event()
    calls = CallList(lambda: values.copy_(torch.tanh(values @ values)))

    def work() -> None:
        calls.run(200)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        ticks += 1
    thread.join()
    assert ticks > 100


def test_error_in_a_repeat_is_an_exception() -> None:
    values = torch.zeros(3)
    index = torch.tensor([1])

    def step() -> None:
        values.index_copy_(0, index, torch.ones(1))

    calls = CallList(step)
    index.fill_(7)
    with pytest.raises(IndexError, match=r"out of (bounds|range)"):
        calls.run(1)


def test_programs_in_several_threads_share_the_pool_of_memory() -> None:
    """Large temporaries of both programs come from one pool, and none is handed out twice."""
    sources = [torch.randn(300, 300, dtype=torch.float64) for _ in range(2)]
    results = [torch.zeros_like(source) for source in sources]

    def make(source: Tensor, result: Tensor) -> CallList:
        return CallList(lambda: result.copy_((source @ source.T).tanh() + (source * 2).sin()))

    programs = [make(*pair) for pair in zip(sources, results, strict=True)]
    threads = [threading.Thread(target=calls.run, args=(60,)) for calls in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for source, result in zip(sources, results, strict=True):
        assert torch.equal(result, (source @ source.T).tanh() + (source * 2).sin())
    del programs
    assert torch.equal(torch.ones(500, 500) * 2, torch.full((500, 500), 2.0))


def test_a_tensor_as_index_leaves_a_gap_in_a_list_of_optional_tensors() -> None:
    """x[:, i] gives the operator [None, i]; the gap has no slot."""
    x, index, result = torch.randn(4, 5), torch.tensor([2, 0, 1]), torch.zeros(4, 3)
    calls = CallList(lambda: result.copy_((2 * x)[:, index]))
    result.zero_()
    calls.run(3)
    assert torch.equal(result, 2 * x[:, [2, 0, 1]])


def test_cached_code_is_that_of_the_same_vector_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own key lacks it, and code for wider vectors then gives wrong numbers."""
    tags = []

    def compiled(graph: nn.Module, **_: object) -> nn.Module:
        graph.register_forward_pre_hook(lambda *_: tags.append(torch.compiler.config.cache_key_tag))
        return graph

    monkeypatch.setattr(torch, "compile", compiled)
    target = torch.zeros(3)
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        compile_step(lambda: target.add_(1))
    assert len(set(tags)) == 2
    assert all(name in tag for name, tag in zip(("AVX512", "AVX2"), tags, strict=True))
    assert torch.compiler.config.cache_key_tag == ""


def test_memory_is_freed_without_the_garbage_collector() -> None:
    """A graph of CUDA that is destroyed at any later time would take the workspace of another one with it."""
    images, labels = real_images()
    config = small_recipe(backend="fused", precision="fp32", iterations=2)
    gc.collect()
    gc.disable()
    try:
        engine = Synthesizer(small_teacher(), images, config.synthesis, config.data)
        engine.run([Batch(0, images, labels)], seed=0)
        (refinement,) = map(weakref.ref, engine.replicas[0]._refinement._refinements.values())
        alive = refinement, weakref.ref(engine.replicas[0]._refinement), weakref.ref(engine.replicas[0]._ascents[0])
        del engine
        assert [each() for each in alive] == [None] * 3
    finally:
        gc.enable()


def test_graph_is_replayed_by_pytorch_where_the_extension_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        replays = 0

        def replay(self) -> None:
            self.replays += 1

        def reset(self) -> None:
            self.replays = -1

    graph = Graph()
    monkeypatch.setattr(capture, "_captured", lambda *_: graph)
    monkeypatch.setattr(capture.ops, "built_with", lambda: {"has_cuda": False})
    step = CapturedStep(lambda: None, Execution("compiled", Operators("compiled"), torch.device("cuda"), "fp32", captures=True))
    step.run(3)
    assert graph.replays == 3
    step.close()
    assert graph.replays == -1


def test_ascents_of_all_batches_are_queued_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = real_images()
    order: list[str] = []
    adjust = Ascent.adjust
    monkeypatch.setattr(Ascent, "adjust", lambda *arguments: [order.append("ascent"), adjust(*arguments)][1])
    for module in (ascent, synthesis):
        monkeypatch.setattr(module, "check_norms", lambda *_: order.append("check"))
    config = small_recipe(backend="reference", concurrent_batches=2, iterations=2)
    engine = Synthesizer(small_teacher(), images, config.synthesis, config.data)
    engine.run([Batch(0, images[:6], labels[:6]), Batch(1, images[6:], labels[6:])], seed=0)
    assert order == ["ascent", "ascent", "check", "check"]


def test_a_stream_has_one_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch hands out a few streams in turns: one that is in use is passed over, until none is left."""
    handles = itertools.cycle(range(capture._STREAMS))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=next(handles)))
    monkeypatch.setattr(capture, "_taken", set())
    device = torch.device("cuda:0")
    first, *others = (capture.take_stream(device) for _ in range(5))
    for each in others:
        capture.return_stream(each)
    more = [capture.take_stream(device).cuda_stream for _ in range(capture._STREAMS - 1)]
    assert sorted(more) == list(range(1, capture._STREAMS))
    assert first.cuda_stream == 0
    assert capture.take_stream(device).cuda_stream in range(capture._STREAMS)


@pytest.mark.gpu
def test_forty_engines_in_one_process() -> None:
    """One lives on while others come and go: same images as before, though PyTorch has only 32 streams to hand out."""
    images, labels = (each.to("cuda") for each in real_images())
    config = small_recipe(backend="fused", precision="bf16", iterations=20, device="cuda")
    batch = Batch(0, images, labels)
    with Synthesizer(small_teacher(), images, config.synthesis, config.data) as first:
        expected = first.run([batch], seed=0)[0][0].clone()
        for number in range(40):
            with Synthesizer(small_teacher(), images, config.synthesis, config.data) as other:
                assert torch.equal(other.run([batch], seed=0)[0][0], expected), number
            assert torch.equal(first.run([batch], seed=0)[0][0], expected), number


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_gpu() -> None:
    images, labels = real_images()
    results = [
        synthesize(small_teacher(), images, labels, small_recipe(backend="fused", precision="fp32", iterations=5, device=f"cuda:{number}"))
        for number in (0, 1)
    ]
    assert torch.equal(results[0].images, results[1].images)


def test_results_that_look_alike_share_a_note() -> None:
    """With the shape, strides, type and device of each; making one for every result took a third of a trace."""
    x, w = torch.randn(4, 6), torch.randn(6, 6)
    target = torch.zeros(4, 6)
    nodes = [node for node in trace_step(lambda: target.copy_((x @ w).relu() + x.t().contiguous().t())).graph.nodes if "val" in node.meta]
    notes = {str(node.target): node.meta["val"] for node in nodes}
    assert notes["aten.mm.default"] is notes["aten.relu.default"]
    assert notes["aten.t.default"].stride() == (1, 4)
    assert notes["aten.t.default"] is not notes["aten.relu.default"]
    for node in nodes:
        assert isinstance(node.meta["val"], torch._subclasses.FakeTensor)

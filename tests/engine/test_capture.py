"""A recorded step does what the step does, bit for bit, as often as asked."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.engine.capture import OpTape, compile_step


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

    plain, recorded = make(), make()
    for _ in range(5):
        step(*plain)
    tape = OpTape(lambda: step(*recorded))  # runs the step once
    tape.run(4)
    assert len(tape) > 20
    assert torch.equal(plain[1], recorded[1])
    assert (plain[1].diff() < 0).all()
    for one, two in zip(plain[0], recorded[0], strict=True):
        assert torch.equal(one, two)


def test_other_threads_go_on_meanwhile() -> None:
    values, ticks, done = torch.randn(400, 400), 0, threading.Event()
    tape = OpTape(lambda: values.copy_(torch.tanh(values @ values)))

    def work() -> None:
        tape.run(200)
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

    tape = OpTape(step)
    index.fill_(7)
    with pytest.raises(IndexError, match=r"out of (bounds|range)"):
        tape.run(1)


def test_programs_in_several_threads_share_the_pool_of_memory() -> None:
    """Large temporaries of both programs come from one pool, and none is handed out twice."""
    sources = [torch.randn(300, 300, dtype=torch.float64) for _ in range(2)]
    results = [torch.zeros_like(source) for source in sources]

    def make(source: Tensor, result: Tensor) -> OpTape:
        return OpTape(lambda: result.copy_((source @ source.T).tanh() + (source * 2).sin()))

    programs = [make(*pair) for pair in zip(sources, results, strict=True)]
    threads = [threading.Thread(target=tape.run, args=(60,)) for tape in programs]
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
    tape = OpTape(lambda: result.copy_((2 * x)[:, index]))
    result.zero_()
    tape.run(3)
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

"""Memory that repeated steps keep."""

from __future__ import annotations

import importlib
import resource

import pytest
import torch
from torch import nn

from dwa_fast.engine.memory import kept_memory

CPU = torch.device("cpu")
LARGE = 50 << 20  # bytes; above what the C library can be told to keep


def pages_taken_by_two_large_tensors() -> int:
    """Pages that the system hands out for two tensors, one after the other let go."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        torch.ones(LARGE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_one_tensor_lets_go_the_next_one_takes() -> None:
    extension = importlib.import_module("dwa_fast._C")
    before = extension.pool_in_use()
    with kept_memory(CPU):
        first = torch.empty(LARGE // 4)
        place = first.data_ptr()
        del first
        second = torch.empty(LARGE // 4)
        assert second.data_ptr() == place
        assert pages_taken_by_two_large_tensors() < LARGE // 4096
        assert extension.pool_in_use() == before + 1
    assert torch.equal(second.fill_(3), torch.full_like(second, 3))  # outlives the block
    del second
    assert extension.pool_in_use() == before
    torch.ones(LARGE // 4)
    assert extension.pool_in_use() == before  # nothing is taken from it any more


def test_tensors_of_other_sizes_take_what_was_let_go() -> None:
    """Small ones share the memory of a large one, and once they are gone a large one takes it whole."""
    with kept_memory(CPU):
        torch.ones(LARGE // 4)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for sizes in ([5] * 8, [20, 20], [45], [3, 1, 30, 7], [50]):
            kept = [torch.full((size << 18,), float(size)) for size in sizes]
            assert all((each == size).all() for each, size in zip(kept, sizes, strict=True))
            del kept[::2]
            kept.append(torch.full((1 << 18,), 0.5))
            assert all((each == each[0]).all() for each in kept)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000


def test_memory_goes_back_after_an_error() -> None:
    kept: torch.Tensor | None = None
    before = importlib.import_module("dwa_fast._C").pool_in_use()

    def fail() -> None:
        nonlocal kept
        with kept_memory(CPU):
            kept = torch.ones(LARGE // 4)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert kept is not None
    assert kept.sum() == LARGE // 4
    del kept
    assert importlib.import_module("dwa_fast._C").pool_in_use() == before


def test_a_training_step_gives_the_same_bits_with_kept_memory() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 256, 5))
    images = torch.randn(64, 3, 16, 16)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(images).square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    plain = gradients()
    with kept_memory(CPU):
        kept = [gradients() for _ in range(2)]
    for each in kept:
        assert all(torch.equal(a, b) for a, b in zip(plain, each, strict=True))

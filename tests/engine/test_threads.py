"""Several threads of one process that synthesise at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from dwa_fast import synthesize
from dwa_fast.engine.backend import resolve
from dwa_fast.sets.synthesize import SynthesisResult
from dwa_fast.threads import torch_threads
from tests.nets import real_images, small_recipe, small_teacher

_THREADS = 3


def _gpu_settings() -> tuple[bool, ...]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_threads_at_once_give_the_bits_of_one_after_the_other(backend: str) -> None:
    images, labels = real_images(6)
    teachers = [small_teacher(0), *[small_teacher(1)] * 2]
    before = _gpu_settings(), nn.Module.__call__, nn.Module.__getattr__
    start = threading.Barrier(_THREADS)

    def result(number: int) -> SynthesisResult:
        config = small_recipe(backend=backend, precision="fp32", device="cpu", iterations=8, steps=1)
        with torch_threads(1):
            return synthesize(teachers[number], images[number:], labels[number:], config, seed=number)

    def at_once(number: int) -> SynthesisResult:
        start.wait()
        return result(number)

    wanted = [result(number) for number in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        got = list(pool.map(at_once, range(_THREADS)))
    for each, alone in zip(got, wanted, strict=True):
        assert torch.equal(each.images, alone.images)
        assert torch.equal(each.losses, alone.losses)
    assert (_gpu_settings(), nn.Module.__call__, nn.Module.__getattr__) == before


def test_whoever_leaves_last_puts_the_settings_back() -> None:
    """Not the one that came first, whose settings would be switched off under the other."""
    before = _gpu_settings()
    execution = resolve("reference", "fp32", "cpu")
    first, second = execution.arithmetic(), execution.arithmetic()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.cudnn.deterministic
    second.__exit__(None, None, None)
    assert _gpu_settings() == before

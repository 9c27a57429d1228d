"""benchmarks/bench_operators.py: the shapes are the networks' own, every operator can be measured, and wrong numbers are not timed."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

from dwa_fast.reference.ops import Operators

CPU = torch.device("cpu")


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("bench_operators")


@pytest.fixture
def subjects(bench: ModuleType) -> ModuleType:
    return importlib.import_module("operator_subjects")


class Stopped:
    """Stands for pytest-benchmark's fixture when it is disabled: the call runs once."""

    stats = None

    def __init__(self) -> None:
        self.ran = 0

    def pedantic(self, target: Any, *, setup: Any, rounds: int) -> None:
        setup()
        target()
        self.ran += 1


def test_layers_are_those_of_the_network(subjects: ModuleType) -> None:
    """ResNet-18 has a stem, eight blocks of two layers, and three strided skips, which are joined with the last layers of their blocks."""
    workload = importlib.import_module("harness").WORKLOADS["cifar100-resnet18"]
    found = subjects.layers(subjects.Network(workload, 18, CPU))
    kinds = [(layer.skip, layer.joins, layer.activation) for layer in found]
    assert [kinds.count((*kind, "relu")) for kind in ((False, False), (True, False), (True, True))] == [9, 5, 3]
    assert len(kinds) == 17
    (every,) = subjects.all_layers(subjects.Network(workload, 18, CPU))
    assert len(every.channels) == len(every.counts) == 20
    assert {layer.shape[1:] for layer in found} == {(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)}
    assert {layer.shape[0] for layer in found if layer.shape[1] == 512} == {workload.batch}
    inputs = subjects.inputs_of_layers(subjects.Network(workload, 18, CPU))
    assert [layer.shape[1:] for layer in inputs] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert not any(layer.skip or layer.activation != "none" for layer in inputs)


def test_convolutions_are_those_of_the_network(subjects: ModuleType) -> None:
    network = subjects.Network(importlib.import_module("harness").WORKLOADS["cifar100-resnet18"], 18, CPU)
    shapes = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert [layer.shape[1:] for layer in subjects.convolutions(network)] == shapes
    assert [layer.shape[1:] for layer in subjects.small_convolutions(network)] == shapes[-1:]


@pytest.fixture
def small(subjects: ModuleType) -> list[Any]:
    """Every operator once, on something small."""
    calls, cases = importlib.import_module("operator_calls"), importlib.import_module("operator_cases")
    chosen = {
        subjects.distinct_layers: subjects.Layer((2, 20, 5, 3), True, "relu"),
        subjects.joined_layers: subjects.Layer((2, 20, 5, 3), True, "relu", None, True),
        subjects.pooled_layers: subjects.Layer((2, 20, 5, 3), False, "relu", subjects.Windows(3, 2, 1)),
        subjects.averaged_layers: subjects.Layer((2, 20, 5, 3), False, "relu", subjects.Windows(2, 2, 0, True)),
        subjects.inputs_of_layers: subjects.Layer((2, 20, 5, 3), False, False),
        subjects.pooled: subjects.Layer((2, 20, 5, 3), False, False),
        subjects.convolutions: subjects.Layer((2, 32, 5, 3), False),
        subjects.small_convolutions: subjects.Layer((2, 32, 5, 3), False),
        subjects.all_layers: subjects.Layers("small", (3, 8), (50, 20)),
        subjects.images: subjects.Images((2, 3, 12, 12), "imagenet"),
        subjects.weights: subjects.Weights("small", 1000),
    }
    return [cases.Case(each, chosen[each.subjects], precision) for each in calls.OPERATORS for precision in each.precisions]


def test_every_operator_is_measured(bench: ModuleType, small: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_MAX_COPIES", 2)
    for case in small:
        benchmark = Stopped()
        for implementation in ("plain", "fused"):
            bench.test_operator(benchmark, case, [], implementation, CPU, 1.0)
        assert benchmark.ran == 2, case


def test_traffic(bench: ModuleType, small: list[Any]) -> None:
    """Bytes that have to be moved, added up by hand."""
    features, images = 2 * 20 * 5 * 3, 2 * 3 * 12 * 12
    bits, vectors, matching = (features + 7) // 8, 6 * 20 * 4, 3 * 11 * 4 + 2 * 11 * 4 + (3 + 2) * 8 + 2 * 4
    wanted = {
        ("bn_act", "fp32"): 3 * 4 * features + bits + vectors,
        ("bn_act", "bf16"): 3 * 2 * features + bits + vectors,
        ("bn_act backward", "bf16"): 4 * 2 * features + bits + vectors,
        ("bn_act backward, ascent", "fp32"): 4 * 4 * features + bits + vectors,
        ("bn_act_join", "bf16"): 3 * 2 * features + 2 * vectors,
        ("bn_act_join backward", "fp32"): 5 * 4 * features + 2 * vectors,
        ("bn_act_pool", "bf16"): 2 * features + vectors + 3 * 2 * 20 * 3 * 2,
        ("bn_act_pool backward", "fp32"): 2 * 4 * features + vectors + 5 * 2 * 20 * 3 * 2,
        ("bn_act_pool, means", "bf16"): 2 * features + vectors + 2 * 2 * 20 * 2 * 1,
        ("bn_act_pool backward, means", "fp32"): 2 * 4 * features + vectors + 4 * 2 * 20 * 2 * 1,
        ("mean_pool backward", "bf16"): 2 * features + 2 * 2 * 20 * 2 * 1,
        ("conv3x3", "fp32"): 4 * (2 * 2 * 32 * 5 * 3 + 9 * 32 * 32),
        ("conv3x3 backward, ascent", "fp32"): 4 * (3 * 2 * 32 * 5 * 3 + 2 * 9 * 32 * 32),
        ("conv_product", "bf16"): 2 * (2 * 2 * 32 * 5 * 3 + 9 * 32 * 32),
        ("moments", "bf16"): 2 * features + vectors // 2,
        ("moments backward", "fp32"): 2 * 4 * features + vectors // 2,
        ("matching_loss, both ways", "fp32"): matching,
        ("view_adam_clip_", "bf16"): (2 + 6 * 4) * images,
        ("ascend_", "fp32"): 16_000,
        ("ascend_", "bf16"): 18_000,
    }
    found = {(case.operator.name, case.precision): case.operator.traffic(case.inputs(CPU)) for case in small}
    assert {key: found[key] for key in wanted} == wanted


def test_wrong_numbers_are_not_timed(bench: ModuleType, small: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> tuple[torch.Tensor, ...]:
        z, sums = Operators("plain").bn_act(*arguments)
        return z * 1.001, sums

    monkeypatch.setattr(bench, "implementations", lambda *_: Operators("wrong", bn_act=wrong))
    benchmark = Stopped()
    with pytest.raises(AssertionError, match="not timed"):
        bench.test_operator(benchmark, small[0], [], "fused", CPU, 1.0)
    assert benchmark.ran == 0

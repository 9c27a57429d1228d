"""benchmarks/counts.py: kernels and bytes of an iteration as CUDA would run it."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dwa_fast import recipe
from dwa_fast.models.architectures import build


@pytest.fixture
def counts() -> ModuleType:
    pytest.importorskip("triton", reason="this PyTorch comes without Triton")
    return importlib.import_module("counts")


def counted(counts: ModuleType, name: str, batch: int) -> Any:
    workload = replace(counts.harness.WORKLOADS[name], batch=batch)
    torch.manual_seed(0)
    channels = recipe(workload.recipe).data.channels
    teacher = build(workload.architecture, classes=workload.classes, channels=channels, size=workload.size).eval()
    return counts.count(teacher, workload, batch)


def test_kernels_of_a_cifar_resnet18(counts: ModuleType) -> None:
    """Two per BatchNorm layer and per convolution, and ten more."""
    kernels = counted(counts, "cifar100-resnet18", 4).kernels
    assert kernels["bn_act._bn_act_forward_kernel"] == kernels["bn_act._bn_act_backward_kernel"] == 20
    assert kernels["aten.convolution"] + kernels["aten.convolution_backward"] == 40
    for once in ("matching_loss._matching_loss_kernel", "losses._cross_entropy_kernel", "losses._record_kernel"):
        assert kernels[once] == 1
    assert kernels["aten.add"] == 0
    assert kernels.total() <= 90


def test_bytes_grow_with_the_batch(counts: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (counted(counts, "digits", batch) for batch in (4, 8))
    assert one.kernels == two.kernels
    assert 1.5 < two.traffic.total() / one.traffic.total() < 2.0
    assert counts.main(["--workload", "digits", "--json", str(tmp_path / "out" / "counts.json")]) == 0
    (result,) = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert result["kernels"] == dict(one.kernels)
    assert f"digits: {one.kernels.total()} kernels" in capsys.readouterr().out

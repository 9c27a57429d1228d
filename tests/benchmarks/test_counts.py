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
from dwa_fast.engine import fuse
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
    """Two per BatchNorm layer and per convolution, less those of three layers that are joined to others, and nine more."""
    found = counted(counts, "cifar100-resnet18", 4)
    kernels = found.kernels
    assert kernels["bn_act._bn_act_forward_kernel"] == kernels["bn_act._bn_act_backward_kernel"] == 14
    assert kernels["bn_act_join._bn_act_join_forward_kernel"] == kernels["bn_act_join._bn_act_join_backward_kernel"] == 3
    joined = [8 * channels * size**2 for channels, size in ((128, 16), (256, 8), (512, 4))]  # bytes
    read = 5 * sum(joined) + sum(each // 16 for each in joined)  # both inputs, the gradient of z, those of both; the mask of the next block
    read += sum(each + each // 4 for each in joined[:2]) + 8 * 512  # gradients of the next block: of both uses, or of a mean
    assert found.traffic["bn_act_join._bn_act_join_backward_kernel"] == read + 12 * (128 + 256 + 512) * 4
    assert kernels["aten.convolution"] + kernels["aten.convolution_backward"] == 40
    for once in ("matching_loss._matching_loss_kernel", "losses._cross_entropy_kernel", "losses._log_losses_kernel"):
        assert kernels[once] == 1
    assert kernels["aten.add"] == kernels["aten.pixel_shuffle"] == kernels["aten.clone"] == 0
    assert kernels.total() <= 83


def test_the_pooling_of_a_resnet18_at_224_pixels_is_one_kernel_each_way(counts: ModuleType) -> None:
    """It reads y and writes z and the places; it reads y, both gradients and the places and writes the gradient."""
    found = counted(counts, "imagenet-resnet18", 2)
    assert found.kernels["bn_act_pool._bn_act_pool_forward_kernel"] == found.kernels["bn_act_pool._bn_act_pool_backward_kernel"] == 1
    assert not [name for name in found.kernels if "max_pool2d" in name or name in ("aten.add", "aten.clone")]
    assert found.kernels.total() <= 83
    y, z, vectors = 2 * 2 * 64 * 112**2, 2 * 2 * 64 * 56**2, 6 * 64 * 4
    forward, backward = (found.traffic[f"bn_act_pool._bn_act_pool_{way}_kernel"] for way in ("forward", "backward"))
    assert 0 < forward - (y + z + z // 2 + vectors) <= 2 * 2 * 4 * 64 * 4 * 132  # the partial sums of four programs per multiprocessor
    assert backward == 2 * y + 2 * z + z // 2 + vectors


def test_bytes_of_a_resnet18_at_224_pixels(counts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of each stage the gradient of the skip is neither written nor read: what it consists of is read instead."""
    found = counted(counts, "imagenet-resnet18", 100)
    assert found.traffic.total() <= 4.9e9
    monkeypatch.setattr(fuse, "_leave_gradients", lambda traced: None)
    written = counted(counts, "imagenet-resnet18", 100)
    assert found.kernels == written.kernels
    last = [64 * 56**2, 128 * 28**2, 256 * 14**2]  # values of an image, 2 bytes each, that have a strided branch
    fewer = sum(200 * n * 2 - (200 * n + 200 * n // 4 + 100 * n // 8) for n in last)
    of_mean = 512 * 7**2  # read as one value per channel
    fewer += 200 * of_mean * 2 - (200 * 512 + 100 * of_mean // 8)
    assert written.traffic.total() - found.traffic.total() == fewer


def test_a_strided_branch_has_the_gradient_of_a_quarter_of_the_pixels(counts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters of what each of the three branches reads is neither written nor read; nothing else changes."""
    monkeypatch.setattr(fuse, "_leave_gradients", lambda traced: None)
    sampled = counted(counts, "imagenet-resnet18", 2)
    monkeypatch.setattr(fuse, "_strided", lambda *_: None)
    whole = counted(counts, "imagenet-resnet18", 2)
    assert sampled.kernels == whole.kernels
    saved = 3 * 2 * 2 * (64 * 56**2 + 128 * 28**2 + 256 * 14**2) // 4
    for kernel, traffic in whole.traffic.items():
        changes = kernel in ("aten.convolution_backward", "bn_act._bn_act_backward_kernel")
        assert traffic - sampled.traffic[kernel] == (saved if changes else 0), kernel


def test_a_copy_inside_a_launcher_counts(counts: ModuleType) -> None:
    y = torch.empty(2, 64, 8, 8, device="meta")  # not channels-last, as the kernels want it
    vectors = [torch.empty(64, device="meta") for _ in range(4)]
    with counts.Counting() as found:
        torch.ops.dwa_fast.bn_act_forward(y, *vectors, 1e-5, None, "relu", None)
    assert {name for name in found.kernels if name.startswith("aten.")} == {"aten.clone", "aten.copy_"}  # there and back
    assert found.traffic["aten.clone"] == 2 * y.numel() * y.element_size()


def test_bytes_grow_with_the_batch(counts: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (counted(counts, "digits", batch) for batch in (4, 8))
    assert one.kernels == two.kernels
    assert 1.5 < two.traffic.total() / one.traffic.total() < 2.0
    assert counts.main(["--workload", "digits", "--json", str(tmp_path / "out" / "counts.json")]) == 0
    (result,) = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert result["kernels"] == dict(one.kernels)
    assert f"digits: {one.kernels.total()} kernels" in capsys.readouterr().out

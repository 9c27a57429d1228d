"""benchmarks/anatomy.py: every operator of an iteration belongs to one part, and the parts add up to the iteration."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def anatomy() -> ModuleType:
    return importlib.import_module("anatomy")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("dwa_fast::bn_act_forward", "bn_act"),
        ("dwa_fast::matching_gradient", "matching loss"),
        ("_matching_loss_kernel", "matching loss"),
        ("dwa_fast::view_adam_clip_", "view, Adam, clamp"),
        ("dwa_fast::view", "view, Adam, clamp"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::addmm", "linear, pooling, cross-entropy"),
        ("aten::nll_loss_forward", "linear, pooling, cross-entropy"),
        ("aten::view", "the rest"),
        ("aten::copy_", "the rest"),
        ("_bn_act_backward_kernel", "bn_act"),
        ("sm90_xmma_fprop_implicit_gemm_bf16", "convolutions"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "convolutions"),
        ("void at::native::max_pool_forward_nhwc<c10::BFloat16>", "linear, pooling, cross-entropy"),
        ("nvjet_hsh_128x64_64x8", "linear, pooling, cross-entropy"),
        ("void at::native::reduce_kernel<512, 1, at::native::MeanOps<float>>", "linear, pooling, cross-entropy"),
    ],
)
def test_parts(anatomy: ModuleType, name: str, part: str) -> None:
    assert anatomy.part(name) == part


def test_an_iteration_is_taken_apart(anatomy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--workload", "digits", "--batch-size", "4", "--iterations", "2", "--device", "cpu", "--precision", "fp32"]
    assert anatomy.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    parts = {each["part"]: each for each in result["parts"]}
    layers = 7  # BatchNorm layers of the small ResNet, two that are joined as one: one call forward and one back for each
    assert (parts["bn_act"]["calls"], parts["matching loss"]["calls"], parts["view, Adam, clamp"]["calls"]) == (2 * layers, 1, 2)
    assert all(each["milliseconds"] > 0 for each in parts.values())
    assert parts["convolutions"]["floor"] > 0
    assert parts["bn_act"]["floor"] > 0
    assert "digits, batch 4, fp32" in capsys.readouterr().out

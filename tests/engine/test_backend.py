"""What "auto" becomes, and that it is said."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dwa_fast import ops
from dwa_fast.engine import backend
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.synthesis import Synthesizer
from tests.nets import DIGITS, small_recipe


@pytest.fixture(autouse=True)
def heard_anew() -> None:
    """Choices are announced once per process; each test hears its own."""
    backend._announce.cache_clear()


@pytest.mark.parametrize(("fast", "precision", "says"), [(True, "bf16", "in bf16 on cpu"), (False, "fp32", "(no AVX-512 BF16 for bf16)")])
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fast: bool, precision: str, says: str) -> None:
    monkeypatch.setattr(backend, "bf16_instructions", lambda: "AMX" if fast else None)
    with caplog.at_level(logging.INFO, "dwa_fast"):
        execution = resolve("auto", "auto", "cpu")
        resolve("auto", "auto", "cpu")
    assert (execution.backend, execution.precision) == ("fused", precision)
    assert [says in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("name", ["auto", "bf16", "fp32"])
def test_depthwise_convolutions_run_in_fp32_on_a_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """Where nothing else was asked for; grouped convolutions and plain ones of one channel change nothing."""
    monkeypatch.setattr(backend, "bf16_instructions", lambda: "AMX")
    depthwise = nn.Sequential(nn.Conv2d(1, 4, 1), nn.DataParallel(nn.Conv2d(4, 8, 3, 2, 1, groups=4)))
    others = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 3, groups=2))
    with caplog.at_level(logging.INFO, "dwa_fast"):
        assert resolve("auto", name, "cpu", depthwise).precision == ("fp32" if name == "auto" else name)  # type: ignore[arg-type]
        assert resolve("auto", name, "cpu", others).precision == ("bf16" if name == "auto" else name)  # type: ignore[arg-type]
    said = "back-end fused in fp32 on cpu (the teacher's depthwise convolutions are slow in bf16)"
    assert (said in caplog.messages) == (name == "auto")


def test_synthesis_asks_for_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "bf16_instructions", lambda: "AMX")
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 3)).eval()
    config = small_recipe(iterations=1, device="cpu").synthesis
    assert Synthesizer(teacher, torch.randn(2, 1, 8, 8), config, DIGITS.data).execution.precision == "fp32"
    assert Synthesizer(teacher[:2].append(nn.Flatten()), torch.randn(2, 1, 8, 8), config, DIGITS.data).execution.precision == "bf16"


def test_auto_falls_back_aloud(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("dwa_fast.ops.cause", lambda: "the extension is not built")
    with caplog.at_level(logging.INFO, "dwa_fast"):
        assert resolve("auto", "auto", "cpu").backend == "reference"
    assert "back-end reference in fp32 on cpu (fused cannot run: the extension is not built)" in caplog.text


def test_every_cause_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwa_fast.ops.cause", lambda: "the extension is not built")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.fused_causes(torch.device("cuda")) == ["the extension is not built", "Triton is not installed"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_arithmetic_is_put_back(precision: str) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    execution = resolve("reference" if precision != "bf16" else "fused", precision, "cpu")  # type: ignore[arg-type]
    with execution.arithmetic():
        assert not matmul.allow_tf32
        assert cudnn.deterministic
    assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == before


@pytest.mark.parametrize(("capability", "level", "vectors"), [("avx2", "avx2", "AVX2"), ("default", "baseline", "DEFAULT")])
def test_what_holds_pytorch_down_holds_the_operators_down(capability: str, level: str, vectors: str, tmp_path: Path) -> None:
    """On a machine that has less, both say what it has."""
    if ops.cpu_level() == "baseline":
        pytest.skip("this machine's instructions end at baseline")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "dwa_fast", "info", "--json"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout)
    assert told["machine"]["vector instructions"] in (vectors, "NO AVX")
    assert told["back-ends"]["fused"]["bn_act"] == f"C++ ({level})"
    assert told["auto"]["precision"] == "fp32"
    assert told["machine"]["bf16 instructions"] == "none"

"""What "auto" becomes, and that it is said."""

from __future__ import annotations

import itertools
import json
import logging
import operator
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
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


def _older_settings() -> list[object]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return [matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision(), cudnn.deterministic, cudnn.benchmark]


def _newer_settings() -> list[str]:
    b = torch.backends
    return [each.fp32_precision for each in (b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.rnn, b.mkldnn.matmul)]


@pytest.fixture
def settings_as_before() -> Iterator[None]:
    b = torch.backends
    whole, parts = (b, b.cudnn, b.mkldnn), backend._Products.found()
    before = [each.fp32_precision for each in whole]
    yield
    for each, precision in zip(whole, before, strict=True):
        each.fp32_precision = precision
    parts.put()


@pytest.mark.usefixtures("settings_as_before")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64", "tf32"])
@pytest.mark.parametrize("chosen", ["", "highest", "high", "medium", "no tf32"])
def test_arithmetic_is_put_back(precision: str, chosen: str) -> None:
    if chosen == "no tf32":
        torch.backends.cudnn.allow_tf32 = False
    elif chosen:
        torch.set_float32_matmul_precision(chosen)
    before = _older_settings(), _newer_settings()
    execution = replace(resolve("reference" if precision != "bf16" else "fused", "auto", "cpu"), precision=precision)
    tf32 = precision == "tf32"
    with execution.arithmetic():
        assert _older_settings() == [tf32, tf32, "high" if tf32 else "highest", True, False]
        assert _newer_settings() == ["tf32" if tf32 else "ieee"] * 3 + ["ieee"] * 3
    assert (_older_settings(), _newer_settings()) == before


@pytest.mark.usefixtures("settings_as_before")
@pytest.mark.parametrize(
    ("where", "value"),
    [
        *itertools.product(["", "cudnn", "cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn", "mkldnn.matmul"], ["ieee", "tf32"]),
        *itertools.product(["mkldnn", "mkldnn.matmul"], ["bf16"]),
    ],
)
def test_newer_settings_of_precision_are_overruled_and_put_back(where: str, value: str) -> None:
    """After some of these PyTorch refuses to say what the older settings are."""
    operator.attrgetter(f"backends.{where}".rstrip("."))(torch).fp32_precision = value
    before = _newer_settings()
    with resolve("reference", "fp32", "cpu").arithmetic():
        assert _newer_settings() == ["ieee"] * 6
        assert _older_settings()[:3] == [False, False, "highest"]
    assert _newer_settings() == before


def test_what_is_exact_within_tf32_leaves_tf32_behind() -> None:
    before = _newer_settings()
    with backend.repeatable(tf32=True):
        within = _newer_settings()
        with backend.repeatable():
            assert _newer_settings() == ["ieee"] * 6
        assert _newer_settings() == within == ["tf32"] * 3 + ["ieee"] * 3
    assert _newer_settings() == before


@pytest.mark.usefixtures("settings_as_before")
def test_the_bits_of_fp32_on_a_cpu_do_not_depend_on_what_is_allowed() -> None:
    """PyTorch may otherwise take another program for products, where the processor can, one that rounds their factors to bf16."""
    torch.manual_seed(0)
    layer, x = nn.Linear(1024, 1024), torch.randn(1024, 1024)
    with torch.no_grad(), backend.repeatable():
        expected = layer(x)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with torch.no_grad(), backend.repeatable():
        assert torch.equal(layer(x), expected)


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

"""benchmarks/pipeline.py: that all peers take the same step, and that wrong numbers get no ratio."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dwa_fast.config import ValidationConfig
from dwa_fast.engine.backend import precisions
from dwa_fast.training.validate import soft_loss


@pytest.fixture
def pipeline() -> ModuleType:
    return importlib.import_module("pipeline")


def run(pipeline: ModuleType, tmp_path: Path) -> tuple[int, list[dict[str, Any]]]:
    target = tmp_path / "out.json"
    status = pipeline.main(["--dry-run", "--batch-size", "6", "--json", str(target)])
    return status, json.loads(target.read_text())["training_steps"]


def test_all_peers_take_the_same_steps(pipeline: ModuleType, tmp_path: Path) -> None:
    status, results = run(pipeline, tmp_path)
    assert status == 0
    assert [result["trains"] for result in results] == ["student", "teacher"]
    for result in results:
        assert result["matches"]
        peers = [*pipeline.PEERS, *(pipeline.BF16_PEERS if precisions("fused", torch.device("cpu"))[0] == "bf16" else ())]
        assert [row["peer"] for row in result["rows"]] == peers
        assert [row["fused"] for row in result["rows"]] == [peer.startswith("now") for peer in peers]
        assert all(row["ratio_to_before"] > 0 and row["ratio_to_released"] > 0 for row in result["rows"])
        assert result["floor_seconds"] > 0


def test_wrong_numbers_get_no_ratio(pipeline: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    right = pipeline.predict
    monkeypatch.setattr(pipeline, "predict", lambda forward, images, precision: 1.001 * right(forward, images, precision))
    monkeypatch.setattr(pipeline.Steps, "_before", pipeline.Steps._released)  # keeps its numbers
    status, results = run(pipeline, tmp_path)
    assert status == 1
    assert "so no ratio: student small-resnet, teacher small-resnet" in capsys.readouterr().err
    for result in results:
        refused = {row["peer"] for row in result["rows"] if row["ratio_to_before"] is None}
        assert refused - {"now bf16"} == {"now"}  # which is wrong by less than bf16's rounding


@pytest.mark.parametrize("distance", [0.01, 0.1])
def test_rounding_of_a_loss_between_nearly_uniform_distributions(pipeline: ModuleType, distance: float) -> None:
    case, generator, errors = pipeline.CASES["convnet128"], torch.Generator().manual_seed(0), []
    for _ in range(50):
        teacher = torch.randn(case.batch, case.classes, generator=generator, dtype=torch.float64)
        logits = (teacher, teacher + distance * torch.randn(teacher.shape, generator=generator, dtype=torch.float64))
        exact, found = (
            float(soft_loss(*(each.to(dtype) for each in logits), ValidationConfig())) for dtype in (torch.float64, torch.float)
        )
        errors.append(abs(found - exact) / pipeline.rounding_of_loss(case, 1))
    assert 0.3 < torch.tensor(errors).square().mean().sqrt() < 3


@pytest.mark.parametrize("trains", ["student", "teacher"])
def test_the_released_loops_learn_and_repeat_their_bits(pipeline: ModuleType, trains: str) -> None:
    case = pipeline.CASES["tiny"]
    one, two = (pipeline.Steps("released", trains, case) for _ in range(2))
    losses = one.advance(12, 0.01)
    assert losses[-1] < losses[0]
    assert two.advance(12, 0.01) == losses
    assert all(torch.equal(a, b) for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True))

"""benchmarks/family.py: that every way is sampled, and that the ratios are those of their times."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest


def test_ratios_are_of_the_same_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    family = importlib.import_module("family")
    seconds = {family.ALONE: [4.0, 8.0], family.SMALLER: [2.0, 4.0], family.STAGES: [3.3, 6.6], family.SECOND: [6.0, 12.0]}
    seconds[family.BOTH] = [5.5, 11.0]

    def in_turns(jobs: dict[str, object], rounds: int) -> dict[str, list[float]]:
        assert rounds == 2
        assert all(job() > 0 for job in jobs.values())  # type: ignore[operator]
        return {name: seconds[name] for name in jobs}

    monkeypatch.setattr(family.harness, "in_turns", in_turns)
    target = tmp_path / "family.json"
    small = ["--workload", "digits", "--second", "convnet128", "--smaller", "8", "--iterations", "4", "--rounds", "2", "--batch-size", "2"]
    assert family.main([*small, "--json", str(target)]) == 0
    content = json.loads(target.read_text())
    assert [median for median, _, _ in content["family"].values()] == pytest.approx([3.3 / (4 * 320 / 512), 1.1, 1.1])
    assert (content["sizes"], content["second"], content["ways"]) == ([8, 16], "convnet128", seconds)
    printed = capsys.readouterr().out
    assert "two teachers in turn, against the mean of both: 1.100 × (1.100 … 1.100)" in printed
    assert "both teachers in turn: 2062.5 ms per iteration" in printed

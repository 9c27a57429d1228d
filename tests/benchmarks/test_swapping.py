"""benchmarks/swapping.py: every way is measured, and what is wrong gets no ratio."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--workload", "digits", "--batch-size", "2", "--rounds", "1", "--iterations", "1", "--device", "cpu"]


@pytest.fixture
def swapping() -> ModuleType:
    return importlib.import_module("swapping")


@pytest.mark.parametrize("code_bases", [["dwa"], pytest.param(["dwa", "sre2l"], marks=pytest.mark.slow)])
def test_every_way_matches_and_is_measured(
    swapping: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], code_bases: list[str]
) -> None:
    assert swapping.main([*QUICK, "--code-base", *code_bases, "--json", str(tmp_path / "out" / "s.json")]) == 0
    content = json.loads((tmp_path / "out" / "s.json").read_text())
    assert (content["workload"], content["batch"], content["iterations"]) == ("digits", 2, 1)
    rows = {(row["code_base"], row["way"]): row for row in content["rows"]}
    levels = [("dwa", "plain"), ("dwa", "hooks"), ("dwa", "hooks and Perterb"), ("sre2l", "plain"), ("sre2l", "hooks")]
    assert {key for key in rows if "get_images" not in key[1]} == {level for level in levels if level[0] in code_bases}
    assert {key[0] for key in rows if key[1] == "get_images, fp32"} == set(code_bases)
    for row in rows.values():
        assert row["matches"]
        assert row["iteration_gain"] == pytest.approx(rows[row["code_base"], "plain"]["seconds"] / row["seconds"])
        assert row["batch_seconds"] == pytest.approx(row["begin_seconds"] + 500 * row["seconds"])
        assert row["samples"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_wrong_numbers_get_no_ratio(
    swapping: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(swapping.BNFeatureHook):  # type: ignore[misc, name-defined]
        def hook_fn(self, module: Any, input: Any, output: Any) -> None:
            super().hook_fn(module, input, output)
            self.r_feature = 1.01 * self.r_feature

    monkeypatch.setattr(swapping, "BNFeatureHook", Wrong)
    assert swapping.main([*QUICK, "--code-base", "sre2l", "--json", str(tmp_path / "s.json")]) == 1
    rows = {row["way"]: row for row in json.loads((tmp_path / "s.json").read_text())["rows"]}
    assert [way for way, row in rows.items() if row["iteration_gain"] is None] == ["hooks"]
    assert "losses differ from float64 by more than rounding: hooks (sre2l)" in capsys.readouterr().err


def test_the_guide_says_how(swapping: ModuleType) -> None:
    guide = (ROOT / "docs" / "swapping-in.md").read_text(encoding="utf-8")
    assert "python benchmarks/swapping.py" in guide
    for name in importlib.import_module("dwa_fast.compat").__all__:
        assert f"`{name}`" in guide


def test_the_guide_shows_what_is_committed() -> None:
    content = json.loads((ROOT / "benchmarks/results/epyc-avx512bf16-2threads/swapping.json").read_text())
    wanted = [
        [row["precision"], f"{row['iteration_gain']:.2f}", f"{row['batch_gain']:.2f}"] for row in content["rows"] if row["way"] != "plain"
    ]
    lines = (ROOT / "docs" / "swapping-in.md").read_text(encoding="utf-8").partition("| code base |")[2].splitlines()[2 : 2 + len(wanted)]
    assert [[cell.strip() for cell in line.strip("|").split("|")][2:] for line in lines] == wanted

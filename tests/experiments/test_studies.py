"""The studies: which sets they compare, and where each number goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dwa_fast import InputError
from dwa_fast.experiments.cells import DistilledSource, Setup, make_set, seconds_per_image
from dwa_fast.experiments.grid import Grid, Outcome, Outcomes
from dwa_fast.experiments.studies import TITLES, AblationName, ablate, by_method, compare, cross
from dwa_fast.recipes import METHODS, SEVERAL_TEACHERS, recipe
from dwa_fast.report.records import Record
from tests.experiments.setups import small_setup

VALUES: dict[str, Any] = {"lambda_vars": (0.11, 0.01), "steps": (12, 4), "rhos": (0.02, 0.01, 0.015), "iterations": (20, 5)}


def run(grid: Grid) -> Outcomes:
    """A number for each place that tells λ_mean, λ_var, K and ρ apart."""
    outcomes = {}
    for variant, ipc, student in grid.places:
        config = variant.synthesis or recipe("digits").synthesis
        value = 1000 * config.lambda_mean + 100 * config.lambda_var + config.steps + 1000 * config.rho + ipc / 10
        outcomes[variant.name, ipc, student] = Outcome([[value], [value + 2]])
    return outcomes


def ablation(setup: Setup, study: AblationName, *ipc: int) -> Record:
    return ablate(run, setup, study=study, ipc=ipc, student="small-resnet", seeds=range(2), **VALUES)


def test_methods_derive_from_changed_settings(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    setup = replace(setup, recipe=replace(setup.recipe, synthesis=replace(setup.recipe.synthesis, iterations=9, learning_rate=0.1)))
    one = [method for method in TITLES if method not in SEVERAL_TEACHERS]
    variants = by_method(setup, one)
    assert variants[0].synthesis is None
    assert all(variant.synthesis and variant.synthesis.iterations == (0 if variant.name == "RDED" else 9) for variant in variants[1:])
    assert all(variant.synthesis and variant.synthesis.learning_rate == 0.1 for variant in variants[1:])
    assert len(set(TITLES.values())) == len(TITLES) == 1 + len(METHODS)
    assert [TITLES[method] for method in ("real", "dwa", "cda", "fadrm+")] == ["random real images", "DWA", "CDA", "FADRM+"]
    assert not any(variant.all_teachers for variant in variants)
    with pytest.raises(
        InputError,
        match="unknown method 'mtt'; known: real, dwa, sre2l, cda, rded, real-start, random-step, coupled, sre2l\\+\\+, fadrm, delt, lpld",
    ):
        by_method(setup, ["mtt"])
    with pytest.raises(InputError, match="--teacher must name the checkpoints of several teachers for method cv-dd, got 1"):
        by_method(setup, ["dwa", "cv-dd"])
    both = replace(setup, teachers=setup.teachers * 2)
    several = by_method(both, ["real", *SEVERAL_TEACHERS])
    assert [variant.all_teachers for variant in several] == [False, True, True, True]
    assert [variant.name for variant in several[1:]] == ["FADRM+", "DWA+", "CV-DD"]


def test_compare(tmp_path: Path) -> None:
    record = compare(run, small_setup(tmp_path), methods=["real", "dwa"], ipc=(1, 5), student="small-resnet", seeds=range(2))
    assert record.tables[0].columns == ["set", "ipc 1", "ipc 5"]
    assert [row[0] for row in record.tables[0].rows] == ["random real images", "DWA"]
    assert record.charts[0].x == ["ipc 1", "ipc 5"]
    assert len(record.data["cells"]) == 4
    assert record.environment["threads"] == 1


@pytest.mark.parametrize(
    ("study", "changes"),
    [
        ("adjustment", [{"ascent": "none"}, {"ascent": "random"}, {"ascent": "directed"}]),
        ("matching-weights", [{"matching_weights": "adjusted"}, {"matching_weights": "original"}]),
        ("initial", [{"initial": "real"}, {"initial": "noise"}]),
    ],
)
def test_categories(tmp_path: Path, study: AblationName, changes: list[dict[str, str]]) -> None:
    seen: list[Grid] = []
    setup = small_setup(tmp_path)
    record = ablate(
        lambda grid: seen.append(grid) or run(grid), setup, study=study, ipc=(1,), student="small-resnet", seeds=range(2), **VALUES
    )  # type: ignore[func-returns-value]
    for variant, wanted in zip(seen[0].variants, changes, strict=True):
        assert {name: getattr(variant.synthesis, name) for name in wanted} == wanted
    assert [row[0] for row in record.tables[0].rows] == [variant.name for variant in seen[0].variants]
    assert record.kind == "ablation"


@pytest.mark.parametrize("ascent", ["random", "none"])
def test_the_directed_step_is_directed_whatever_the_settings_say(ascent: str, tmp_path: Path) -> None:
    seen: list[Grid] = []
    setup = small_setup(tmp_path)
    setup = replace(setup, recipe=replace(setup.recipe, synthesis=replace(setup.recipe.synthesis, ascent=ascent)))
    ablate(lambda grid: seen.append(grid) or run(grid), setup, study="adjustment", ipc=(1,), student="small-resnet", seeds=[0], **VALUES)  # type: ignore[func-returns-value]
    found = {variant.name: variant.synthesis and variant.synthesis.ascent for variant in seen[0].variants}
    assert found == {"no step": "none", "random step": "random", "directed step": "directed"}


def test_lambda_var_alone_and_coupled(tmp_path: Path) -> None:
    record = ablation(small_setup(tmp_path), "lambda-var", 1, 5)
    assert [table.title for table in record.tables] == [f"λ_var on digits, ipc {ipc}, top-1 %" for ipc in (1, 5)]
    alone, coupled = record.charts[0].series
    assert record.charts[0].x == [0.01, 0.11]
    base = 3 + 15 + 0.1 + 1  # K, ρ, ipc, and half of the distance of the seeds
    assert alone.values == pytest.approx([base + 10 + 1, base + 10 + 11])
    assert coupled.values == pytest.approx([base + 10 + 1, base + 110 + 11])
    assert (alone.name, coupled.name) == ("λ_var alone, λ_mean = 0.01", "λ_mean = λ_var")
    assert record.tables[0].rows[1] == ["0.11", "40.1 ± 1.4", "140.1 ± 1.4"]
    assert [row.get("lambda_var") for row in record.data["cells"] if row["ipc"] == 1] == [0.01, None, 0.01, None]


def test_k_rho(tmp_path: Path) -> None:
    record = ablation(small_setup(tmp_path), "k-rho", 1)
    (found,) = record.heat_maps
    assert (found.x, found.y) == ([4, 12], [0.01, 0.015, 0.02])
    base = 10 + 11 + 0.1 + 1
    assert found.values[0] == pytest.approx([base + 4 + 10, base + 12 + 10])
    assert found.values[2] == pytest.approx([base + 4 + 20, base + 12 + 20])
    assert record.tables[0].columns == ["ρ", "K = 4", "K = 12"]
    assert [row[0] for row in record.tables[0].rows] == ["0.01", "0.015", "0.02"]


def test_iterations(tmp_path: Path) -> None:
    """The values in order; without times no table of them."""
    setup = small_setup(tmp_path)
    record = ablation(setup, "iterations", 1, 5)
    assert [row["synthesis"]["iterations"] for row in record.data["cells"] if row["ipc"] == 5] == [5, 20]
    assert [row[0] for row in record.tables[0].rows] == ["T = 5", "T = 20"]
    assert record.charts[0].x == [5, 20]
    assert [each.name for each in record.charts[0].series] == ["ipc 1", "ipc 5"]
    assert (len(record.tables), len(record.charts)) == (1, 1)


def test_time_of_the_synthesis(tmp_path: Path) -> None:
    """Measured where a set is made, an image; a set that grows adds to it, and what was there already does not."""
    setup = small_setup(tmp_path)
    source = DistilledSource(setup.recipe.synthesis, 0)
    assert seconds_per_image(setup, source) is None
    clock = iter([0.0, 20.0, 100.0, 130.0, 200.0])  # 10 images, then 10 more, then none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dwa_fast.experiments.cells.time", SimpleNamespace(perf_counter=lambda: next(clock)))
        make_set(setup, source, 1)
        assert seconds_per_image(setup, source) == 2.0
        make_set(setup, source, 2)
        assert seconds_per_image(setup, source) == 2.5
        make_set(setup, source, 2)
    assert seconds_per_image(setup, source) == 2.5
    make_set(setup, DistilledSource(None, 0), 1)
    assert seconds_per_image(setup, DistilledSource(None, 0)) is None
    record = compare(run, setup, methods=["real", "dwa"], ipc=(1, 2), student="small-resnet", seeds=range(2))
    assert [row[:2] for row in record.tables[1].rows] == [["random real images", "–"], ["DWA", "2.5"]]
    assert record.charts[1].x == [2.5]
    assert [each.name for each in record.charts[1].series] == ["random real images", "DWA"]
    assert [row.get("seconds_per_image") for row in record.data["cells"]] == [None, None, 2.5, 2.5]


def test_cross(tmp_path: Path) -> None:
    students = ["small-resnet", "convnet128"]
    given: dict[str, Any] = {"ipc": (1, 5), "students": students, "seeds": range(2)}
    record = cross(run, small_setup(tmp_path), methods=["dwa"], sets={"set": Path("their/set")}, **given)
    assert [table.columns for table in record.tables] == [["student", "DWA", "set"]] * 2
    assert [row[0] for row in record.tables[0].rows] == students
    with pytest.raises(InputError, match=r"each method and set must have a name of its own, got DWA, DWA; --sets NAME=DIR names a set"):
        cross(run, small_setup(tmp_path), methods=["dwa"], sets={"DWA": Path("x/a")}, **given)

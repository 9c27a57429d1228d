"""Grids: which cells they ask for, what their numbers mean, and how they are told."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from dwa_fast import InputError
from dwa_fast.experiments import grid as grid_module
from dwa_fast.experiments.cells import Cell, DistilledSource, ExternalSet
from dwa_fast.experiments.grid import Grid, Outcome, Variant, best, by_ipc, by_student, by_time, cell_rows, contact_sheet, note, run_grid
from dwa_fast.recipes import recipe
from tests.experiments.setups import small_setup, with_validation

REAL = Variant(name="real")


def grid(**changes: object) -> Grid:
    plain = {"variants": [REAL], "ipc": (1,), "students": ("small-resnet",), "seeds": range(2)}
    return Grid(**{**plain, **changes})  # type: ignore[arg-type]


def test_cells_of_a_place() -> None:
    asked = grid(variants=[REAL, Variant(name="theirs", external=Path("theirs"))], ipc=(1, 5))
    assert asked.cells(REAL, 5, "small-resnet") == [Cell(DistilledSource(None, seed), 5, "small-resnet") for seed in (0, 1)]
    assert asked.cells(asked.variants[1], 1, "small-resnet") == [Cell(ExternalSet(Path("theirs"), 0), 1, "small-resnet")]
    assert len(asked.places) == 4


def test_sets_of_whole_classes_have_a_folder_for_each_ipc(tmp_path: Path) -> None:
    """One study after another in the same folder, and one of both; settings that do not depend on the ipc share a set."""
    setup = with_validation(small_setup(tmp_path), epochs=1, students=1)
    whole = recipe("digits", method="lpld", iterations=1, backend="reference", size=8).synthesis
    variants = [Variant(name="LPLD", synthesis=whole), Variant(name="DWA", synthesis=setup.recipe.synthesis)]
    for ipc in ((2,), (3,), (2, 3)):
        found = run_grid(setup, grid(variants=variants, ipc=ipc, seeds=(0,)), jobs=1)
        assert set(found) == {(variant.name, each, "small-resnet") for variant in variants for each in ipc}
    names = sorted(folder.name.rpartition("-")[0] for folder in (tmp_path / "sets").iterdir())
    assert len(names) == 3
    assert [name for name in names if name.startswith("lpld")] == [f"lpld-iterations1-batch_ipc{ipc}-seed0" for ipc in (2, 3)]
    contact_sheet(tmp_path, setup, variants, 3, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": []}, "a study needs at least one method or set, got none"),
        ({"ipc": ()}, "a study needs at least one ipc"),
        ({"students": ()}, "a study needs at least one student"),
        ({"variants": [REAL, REAL]}, "each method or set must be named once, got real, real"),
        ({"ipc": (1, 2, 1)}, "each ipc must be named once, got 1, 2, 1"),
        ({"ipc": (0,)}, "ipc must be an integer of at least 1, got 0"),
        ({"students": ("vit",)}, "unknown student 'vit'; known: "),
    ],
)
def test_grids_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        grid(**changes)


def test_spread_is_over_sets_where_there_are_several() -> None:
    several = Outcome([[90.0, 94.0], [80.0, 84.0], [70.0, 74.0]])
    assert several.mean == pytest.approx(82)
    assert several.std == pytest.approx(10)
    assert str(several) == "82.0 ± 10.0"
    one = Outcome([[90.0, 94.0, 95.0]])
    assert one.std == pytest.approx(statistics.stdev([90, 94, 95]))
    single = Outcome([[90.0]])
    assert (single.std, str(single)) == (0, "90.0")


def test_note_says_what_the_spread_is(tmp_path: Path) -> None:
    setup, single = small_setup(tmp_path), with_validation(small_setup(tmp_path), students=1)
    assert note(setup, grid()) == "Mean ± standard deviation over 2 synthesis seeds, of the mean of 2 students each."
    assert note(single, grid()) == "Mean ± standard deviation over 2 synthesis seeds, of the mean of one student each."
    assert note(setup, grid(seeds=[4])) == "Mean ± standard deviation over 2 students of one set."
    assert note(single, grid(seeds=[4])) == "One student of one set each."
    found = Variant(name="theirs", external=Path("theirs"))
    assert note(setup, grid(variants=[REAL, found])).endswith(" Sets that were made elsewhere: over 2 students of the one set.")


def test_numbers_behind_the_tables(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    changed = Variant(name="DWA", synthesis=setup.recipe.synthesis)
    asked = grid(variants=[REAL, changed], ipc=(1, 5))
    outcomes = {
        (name, ipc, "small-resnet"): Outcome([[50.0 + ipc, 52.0 + ipc], [60.0, 62.0]]) for name in ("real", "DWA") for ipc in (1, 5)
    }
    rows = cell_rows(setup, asked, outcomes)
    assert [(row["method"], row["ipc"]) for row in rows] == [("real", 1), ("real", 5), ("dwa", 1), ("dwa", 5)]
    assert rows[0]["accuracies"] == [51.0, 53.0, 60.0, 62.0]
    assert rows[0]["mean"] == pytest.approx(56.5)
    assert rows[0].keys() == {"recipe", "method", "student", "ipc", "mean", "std", "accuracies", "sets", "synthesis"}
    assert rows[0]["synthesis"] == {}  # nothing was synthesised
    assert rows[2]["synthesis"]["iterations"] == 2
    assert rows[2]["iterations"] == 2  # not the recipe's
    assert "lambda_var" not in rows[2]  # the recipe's


def test_no_setting_takes_the_place_of_a_result(tmp_path: Path) -> None:
    """A normalisation has a mean and a std as well."""
    setup = small_setup(tmp_path)
    setup = replace(setup, recipe=replace(setup.recipe, data=replace(setup.recipe.data, mean=(0.25,), std=(0.75,))))
    changed = Variant(name="DWA", synthesis=setup.recipe.synthesis)
    (row,) = cell_rows(setup, grid(variants=[changed], ipc=(1,)), {("DWA", 1, "small-resnet"): Outcome([[50.0, 52.0]])})
    assert (row["mean"], row["std"]) == (51.0, pytest.approx(2**0.5))
    assert row["synthesis"]["mean"] == (0.25,)


def test_layouts_hold_every_number_in_its_place(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    asked = grid(variants=[REAL, Variant(name="b", synthesis=setup.recipe.synthesis)], ipc=(1, 5), students=("small-resnet", "convnet128"))
    outcomes = {
        (variant.name, ipc, student): Outcome([[10.0 * place], [10.0 * place + 2]])
        for place, (variant, ipc, student) in enumerate(asked.places)
    }
    table, chart = by_ipc("t", setup, asked, outcomes, "convnet128")
    assert table.columns == ["set", "ipc 1", "ipc 5"]
    assert table.rows == [["real", "11.0 ± 1.4", "31.0 ± 1.4"], ["b", "51.0 ± 1.4", "71.0 ± 1.4"]]
    assert [series.values for series in chart.series] == [[11.0, 31.0], [51.0, 71.0]]
    table, chart = by_student("t", setup, asked, outcomes, 5)
    assert table.rows == [["small-resnet", "21.0 ± 1.4", "61.0 ± 1.4"], ["convnet128", "31.0 ± 1.4", "71.0 ± 1.4"]]
    assert [series.name for series in chart.series] == ["real", "b"]
    assert chart.x == ["small-resnet", "convnet128"]


def test_sets_without_a_time_are_lines_across(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [
        REAL,
        Variant(name="fast", synthesis=recipe("digits").synthesis),
        Variant(name="slow", synthesis=recipe("digits").synthesis),
    ]
    seconds = {"fast": 0.25, "slow": 3.0}
    monkeypatch.setattr(grid_module, "times", lambda *_: seconds)
    outcomes = {
        (name, 5, "small-resnet"): Outcome([[value, value + 2]]) for name, value in (("real", 50.0), ("fast", 60.0), ("slow", 70.0))
    }
    tables, (chart,) = by_time("title", small_setup(tmp_path), grid(variants=variants, ipc=(1, 5)), outcomes, "small-resnet")
    assert tables[0].rows == [["real", "–", "51.0 ± 1.4"], ["fast", "0.25", "61.0 ± 1.4"], ["slow", "3", "71.0 ± 1.4"]]
    assert chart.x == [0.25, 3.0]
    assert [each.values for each in chart.series] == [[51, 51], [61, None], [None, 71]]
    spread = pytest.approx(2**0.5)
    assert [each.spreads for each in chart.series] == [[spread, spread], [spread, None], [None, spread]]
    assert [each.level for each in chart.series] == [True, False, False]
    seconds.clear()
    assert by_time("title", small_setup(tmp_path), grid(variants=variants), outcomes, "small-resnet") == ([], [])


def test_best_says_how_much_is_as_good() -> None:
    asked = grid(variants=[Variant(name=name) for name in "abc"])
    near = {"a": [[80.0], [82.0]], "b": [[81.0], [83.5]], "c": [[60.0], [61.0]]}
    outcomes = {(name, 1, "small-resnet"): Outcome(values) for name, values in near.items()}
    assert best(asked, outcomes) == "ipc 1: b first with 82.2 ± 1.8, 1 of the others within one standard deviation."
    single = {(name, 1, "small-resnet"): Outcome([[value]]) for name, value in zip("abc", (31.0, 30.0, 30.5), strict=True)}
    assert best(asked, single) == "ipc 1: a first with 31.0, c next with 30.5; the spread of single students is not known."


def test_run_and_contact_sheet(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    asked = grid(variants=[REAL, Variant(name="DWA", synthesis=setup.recipe.synthesis)], ipc=(1, 2))
    outcomes = run_grid(setup, asked, jobs=1)
    assert outcomes.keys() == {(name, ipc, "small-resnet") for name in ("real", "DWA") for ipc in (1, 2)}
    assert all(len(outcome.accuracies) == 2 and len(outcome.accuracies[0]) == 2 for outcome in outcomes.values())
    (picture,) = contact_sheet(tmp_path, setup, asked.variants, 2, 1)
    assert (tmp_path / picture.file).stat().st_size > 1000

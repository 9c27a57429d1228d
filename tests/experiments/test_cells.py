"""Sets and cells: names that depend on everything that matters and on nothing else, and results that are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dwa_fast import InputError, load_data
from dwa_fast.config import InitialConfig
from dwa_fast.data.distilled import open_distilled
from dwa_fast.data.folders import image_folder
from dwa_fast.data.manifest import read_manifest
from dwa_fast.experiments import cells
from dwa_fast.experiments.cells import (
    Cell,
    DistilledSource,
    ExternalSet,
    Setup,
    _cell_settings,
    accuracies,
    cell_folder,
    inputs,
    make_set,
    measure,
    nearest_method,
    other_versions,
    seconds_per_image,
    set_folder,
    set_is_complete,
)
from dwa_fast.recipes import SEVERAL_TEACHERS, recipe
from dwa_fast.sets.distill import distill
from dwa_fast.sets.store import versions
from dwa_fast.training.validate import validate
from tests.experiments.setups import small_setup, with_teacher, with_validation
from tests.nets import SIZE


def dwa(setup: Setup, seed: int = 0, **changes: Any) -> DistilledSource:
    return DistilledSource(replace(setup.recipe.synthesis, **changes), seed)


def test_larger_set_begins_with_the_smaller_one(tmp_path: Path) -> None:
    small, large = small_setup(tmp_path / "small"), small_setup(tmp_path / "large")
    for setup, ipc in ((small, 1), (large, 3)):
        make_set(setup, dwa(setup), ipc)
    one, three = (read_manifest(set_folder(setup, dwa(setup)))["images"] for setup in (small, large))
    assert len(one) == 10
    assert len(three) == 30
    assert one.items() < three.items()
    make_set(small, dwa(small), 3)
    assert read_manifest(set_folder(small, dwa(small)))["images"] == three
    assert set_is_complete(small, dwa(small), 3)
    assert not set_is_complete(small, dwa(small), 4)


def test_loading_the_data_is_no_part_of_the_time_of_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first set of a process, in a study the first method, would seem slower than the others."""
    seconds = 0.0

    def clock() -> float:
        nonlocal seconds
        seconds += 1
        return seconds

    def load(*arguments: Any) -> Any:
        nonlocal seconds
        seconds += 1000
        return load_data(*arguments)

    monkeypatch.setattr(cells, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(cells, "load", load)
    setup = small_setup(tmp_path)
    make_set(setup, dwa(setup), 1)
    assert seconds > 1000
    assert seconds_per_image(setup, dwa(setup)) == 1 / 10


def test_real_set_holds_the_images_that_the_others_start_from(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    make_set(setup, DistilledSource(None, 7), 2)
    made = image_folder(set_folder(setup, DistilledSource(None, 7)), SIZE, 1)
    train = inputs(setup).train
    pairs = [(100, 145), (1311, 1138), (361, 545), (1035, 13), (205, 194), (163, 423), (53, 402), (1316, 922), (627, 783), (852, 135)]
    wanted = [index for pair in pairs for index in pair]
    assert len(set(wanted)) == 20
    assert train.labels[wanted].tolist() == [label for label in range(10) for _ in range(2)]
    torch.testing.assert_close(made.load(range(20)), train.load(wanted), rtol=0, atol=0)
    before = set_folder(setup, DistilledSource(None, 7)).joinpath("manifest.json").read_bytes()
    make_set(setup, DistilledSource(None, 7), 1)
    assert set_folder(setup, DistilledSource(None, 7)).joinpath("manifest.json").read_bytes() == before


def test_what_changes_a_set_changes_its_place(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    places = [
        set_folder(setup, dwa(setup)),
        set_folder(setup, dwa(setup, seed=1)),
        set_folder(setup, dwa(setup, rho=0.02)),
        set_folder(setup, dwa(setup, precision="fp64")),
        set_folder(setup, DistilledSource(None, 0)),
        set_folder(replace(setup, threads=2), dwa(setup)),
        set_folder(with_teacher(setup, checksum="other"), dwa(setup)),
        set_folder(replace(setup, train_checksum="other"), dwa(setup)),
        set_folder(replace(setup, train_checksum="other"), DistilledSource(None, 0)),
        set_folder(replace(setup, initial=InitialConfig(initial_order="sorted")), dwa(setup)),
        set_folder(replace(setup, recipe=replace(setup.recipe, data=replace(setup.recipe.data, size=16))), dwa(setup)),
    ]
    assert len(set(places)) == len(places)
    assert set_folder(setup, dwa(setup, concurrent_batches=2)) == places[0]
    assert set_folder(replace(with_validation(setup, epochs=9), test_checksum="other"), dwa(setup)) == places[0]


def test_every_tensor_file_changes_the_place_of_a_set(tmp_path: Path) -> None:
    setup, places = small_setup(tmp_path), []
    for name, values in (("one", (0, 1)), ("two", (0, 2)), ("three", (0, 1))):
        (tmp_path / name).mkdir()
        for index, value in enumerate(values):
            torch.save(torch.full((1,), value), tmp_path / name / f"tensor_{index}.pt")
        places.append(set_folder(replace(setup, initial=InitialConfig(initial_tensors=tmp_path / name)), dwa(setup)))
    assert places[0] == places[2] != places[1]


def test_names_say_what_a_set_is(tmp_path: Path) -> None:
    setup = replace(small_setup(tmp_path), recipe=recipe("digits"))
    assert set_folder(setup, dwa(setup)).name.startswith("dwa-seed0-")
    assert set_folder(setup, dwa(setup, seed=3, rho=0.02, steps=4)).name.startswith("dwa-rho0.02-steps4-seed3-")
    assert set_folder(setup, DistilledSource(None, 2)).name.startswith("real-seed2-")
    assert set_folder(setup, DistilledSource(recipe("digits", method="sre2l").synthesis, 0)).name.startswith("sre2l-seed0-")
    odd = dwa(setup, crop_scale=(0.5, 0.9))
    assert set_folder(setup, odd).name.startswith("dwa-crop_scale_0.5__0.9_-seed0-")


@pytest.mark.parametrize(
    ("method", "changes", "wanted"),
    [
        ("dwa", {}, ("dwa", {})),
        ("dwa", {"lambda_var": 0.05}, ("dwa", {"lambda_var": 0.05})),
        ("dwa", {"initial": "noise"}, ("dwa", {"initial": "noise"})),
        ("dwa", {"device": "cpu", "backend": "reference"}, ("dwa", {})),
        ("dwa", {"ascent": "none", "rho": 0.0}, ("real-start", {})),
        ("dwa", {"lambda_mean": 0.11}, ("coupled", {})),
        ("sre2l", {"iterations": 3}, ("sre2l", {"iterations": 3})),
        ("random-step", {}, ("random-step", {})),
        ("dwa", {"batch_ipc": 10}, ("dwa", {"batch_ipc": 10})),
        ("fadrm", {"size": 8}, ("fadrm", {})),
        ("fadrm", {"size": 8, "stage_sizes": ()}, ("sre2l++", {})),
        ("fadrm+", {"size": 8}, ("fadrm+", {})),
        ("dwa+", {"size": 8, "rho": 0.5}, ("dwa+", {"rho": 0.5})),
        ("cv-dd", {}, ("cv-dd", {})),
        ("lpld", {"batch_ipc": 5}, ("lpld", {"batch_ipc": 5})),
    ],
)
def test_nearest_method(tmp_path: Path, method: str, changes: dict[str, Any], wanted: tuple[str, dict[str, Any]]) -> None:
    assert nearest_method(small_setup(tmp_path), recipe("digits", method=method, **changes).synthesis, method in SEVERAL_TEACHERS) == wanted


def test_set_of_statistics_of_classes(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    synthesis = recipe("digits", method="lpld", iterations=2, backend="reference", size=SIZE).synthesis
    source, running = DistilledSource(synthesis, 0), DistilledSource(replace(synthesis, statistics="running"), 0)
    assert set_folder(setup, source) != set_folder(setup, running)
    make_set(setup, source, 2)
    settings = read_manifest(set_folder(setup, source))["settings"]
    assert (settings["method"], settings["statistics"], settings["batch_ipc"]) == ("lpld", "class", 2)


def test_cell_keeps_what_its_students_reach(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    cell = Cell(DistilledSource(None, 0), 1, "small-resnet")
    make_set(setup, DistilledSource(None, 0), 1)
    assert accuracies(setup, cell) is None
    measure(setup, cell)
    found = accuracies(setup, cell)
    assert found is not None
    assert len(found) == 2
    assert all(0 <= each <= 100 for each in found)
    assert accuracies(with_validation(setup, students=1), cell) == found[:1]
    more = with_validation(setup, students=3)
    assert accuracies(more, cell) is None
    measure(more, cell)
    assert (accuracies(more, cell) or [])[:2] == found


@pytest.mark.parametrize("content", ["", "[]", '{"accuracies": 3}', '{"accuracies": ["a", "b"]}', "[" * 100_000])
def test_damaged_result_is_no_result(tmp_path: Path, content: str) -> None:
    setup = small_setup(tmp_path)
    cell = Cell(DistilledSource(None, 0), 1, "small-resnet")
    cell_folder(setup, cell).mkdir(parents=True)
    (cell_folder(setup, cell) / "result.json").write_text(content)
    assert accuracies(setup, cell) is None


def test_what_changes_a_student_changes_its_place(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    cell = Cell(dwa(setup), 1, "small-resnet")
    places = [
        cell_folder(setup, cell),
        cell_folder(setup, replace(cell, ipc=2)),
        cell_folder(setup, replace(cell, student="convnet128")),
        cell_folder(setup, replace(cell, source=dwa(setup, seed=1))),
        cell_folder(setup, replace(cell, source=dwa(setup, lambda_var=0.5))),
        cell_folder(replace(setup, threads=2), cell),
        cell_folder(with_teacher(setup, checksum="other"), cell),
        cell_folder(replace(setup, train_checksum="other"), cell),
        cell_folder(replace(setup, test_checksum="other"), cell),
        cell_folder(with_validation(setup, epochs=9), cell),
    ]
    assert len(set(places)) == len(places)
    assert cell_folder(with_validation(setup, students=9), cell) == places[0]


def test_methods_of_one_teacher_take_the_first_and_others_all(tmp_path: Path) -> None:
    one, two = small_setup(tmp_path), small_setup(tmp_path, "small-resnet", "convnet128")
    source, everyone = dwa(two), replace(dwa(two, teacher_turns="iteration"), all_teachers=True)
    assert set_folder(two, source) == set_folder(one, source)
    assert set_folder(two, everyone) != set_folder(two, replace(everyone, all_teachers=False))
    for each in (source, everyone):
        make_set(two, each, 1)
    first, second = inputs(two).teachers
    for each, teachers in ((source, [first]), (everyone, [first, second])):
        expected = tmp_path / f"{len(teachers)} teachers"
        distill(teachers, inputs(two).train, replace(two.recipe, synthesis=each.synthesis), ipc=1, output=expected, threads=1)
        made, settings = set_folder(two, each), read_manifest(set_folder(two, each))["settings"]
        assert read_manifest(made)["images"] == read_manifest(expected)["images"]
        checksums = [teacher.checksum for teacher in two.teachers[: len(teachers)]]
        assert settings["teacher"] == (checksums if len(checksums) > 1 else checksums[0])
    assert read_manifest(set_folder(two, source))["images"] != read_manifest(set_folder(two, everyone))["images"]


def test_students_learn_from_all_teachers(tmp_path: Path) -> None:
    one, two = small_setup(tmp_path), small_setup(tmp_path, "small-resnet", "convnet128")
    cell = Cell(DistilledSource(None, 0), 1, "small-resnet")
    assert cell_folder(one, cell) != cell_folder(two, cell)
    make_set(two, DistilledSource(None, 0), 1)
    measure(two, cell)
    shared, cpu = inputs(two), torch.device("cpu")
    made, _ = open_distilled(set_folder(two, DistilledSource(None, 0)), SIZE, 1, shared.test.class_names, per_class=1)
    expected = validate(made, shared.test, shared.teachers, "small-resnet", two.recipe, device=cpu, resume_dir=tmp_path / "alone")
    assert accuracies(two, cell) == expected.accuracies
    digests = json.loads((cell_folder(two, cell) / "students.json").read_text())
    assert digests == json.loads((tmp_path / "alone" / "students.json").read_text())


def test_found_set_is_known_by_its_images(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    make_set(setup, DistilledSource(None, 0), 2)
    folder = (set_folder(setup, DistilledSource(None, 0))).rename(tmp_path / "elsewhere")
    copy = tmp_path / "moved"
    first = cell_folder(setup, Cell(ExternalSet(folder, 0), 2, "small-resnet"))
    folder.rename(copy)
    assert cell_folder(setup, Cell(ExternalSet(copy, 0), 2, "small-resnet")) == first
    assert cell_folder(setup, Cell(ExternalSet(copy, 0), 1, "small-resnet")) != first
    measure(setup, Cell(ExternalSet(copy, 0), 2, "small-resnet"))
    assert json.loads((first / "result.json").read_text())["settings"]["ipc"] == 2
    for label in range(9, 5, -1):
        for image in (copy / "images" / f"new00{label}").iterdir():
            image.unlink()
        (copy / "images" / f"new00{label}").rmdir()
    with pytest.raises(InputError, match=r"moved holds other images than its manifest names: new006/class006_id000.png is missing"):
        measure(setup, Cell(ExternalSet(copy, 1), 1, "small-resnet"))


def test_soft_labels_in_bf16_are_other_cells(tmp_path: Path) -> None:
    """Those of before, whose labels were in fp32, are not taken for them; with hard labels or in fp32 nothing changes."""
    setup = small_setup(tmp_path)
    cell = Cell(DistilledSource(None, 0), 1, "small-resnet")

    def settings(**changes: Any) -> Any:
        return _cell_settings(with_validation(setup, **changes), cell)["validation"]

    assert settings(precision="bf16")["label_precision"] == "bf16"
    assert "label_precision" not in settings(precision="fp32")
    assert "label_precision" not in settings(precision="bf16", labels="hard")


def test_results_of_other_versions_are_told(tmp_path: Path) -> None:
    setup = small_setup(tmp_path)
    cell = Cell(dwa(setup), 1, "small-resnet")
    assert other_versions(setup, cell) is None  # nothing is computed yet
    file = cell_folder(setup, cell) / "result.json"
    file.parent.mkdir(parents=True)
    for found, said in ((versions(), None), ({**versions(), "dwa_fast": "0.1", "torch": "2.0"}, "dwa_fast 0.1, torch 2.0"), (None, None)):
        file.write_text(json.dumps({"accuracies": [50.0], **({"versions": found} if found else {})}))
        assert other_versions(setup, cell) == said


def test_a_finished_cell_keeps_its_versions(tmp_path: Path) -> None:
    setup = with_validation(small_setup(tmp_path), epochs=1, students=1)
    cell = Cell(dwa(setup), 1, "small-resnet")
    make_set(setup, cell.source, 1)  # type: ignore[arg-type]
    measure(setup, cell)
    assert json.loads((cell_folder(setup, cell) / "result.json").read_text())["versions"] == versions()

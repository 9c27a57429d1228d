"""Published numbers stand beside results of the published setting, and of no other."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from dwa_fast.recipes import recipe
from dwa_fast.report.published import beside_published, published
from dwa_fast.report.records import Record


@pytest.mark.parametrize(
    ("place", "number"),
    [
        (("cifar10", "sre2l", "resnet18-cifar", 10), 27.2),
        (("cifar100", "dwa", "resnet18-cifar", 50), 60.9),
        (("cifar100-released", "dwa", "convnet128", 10), 47.6),
        (("tiny", "dwa", "resnet101-cifar", 50), 54.7),
        (("imagenet", "sre2l", "resnet50", 100), 61.0),
        (("cifar100", "random-step", "resnet18-cifar", 10), 14.9),
        (("cifar100", "real-start", "resnet18-cifar", 50), 56.1),
        (("cifar10", "sre2l", "convnet128", 10), None),
        (("cifar100", "dwa", "resnet18-cifar", 20), None),
        (("digits", "dwa", "small-resnet", 10), None),
    ],
)
def test_numbers_of_the_paper(place: tuple[str, str, str, int], number: float | None) -> None:
    assert published(*place) == number


def study(name: str = "cifar100", method: str = "dwa", student: str = "resnet18-cifar", **cell: Any) -> Record:
    """A record of one cell, with the recipe's settings."""
    whole = recipe(name)
    settings = {
        "recipe": name,
        "teacher": {"architecture": student},
        "data": asdict(whole.data),
        "synthesis": whole.settings("synthesis"),
        "validation": whole.settings("validation"),
    }
    cells = [{"recipe": name, "method": method, "student": student, "ipc": 10, "mean": 40.04, "std": 0.5, **cell}]
    return Record(kind="compare", title="t", settings=json.loads(json.dumps(settings)), data={"cells": cells})


@pytest.mark.parametrize(("method", "ipc", "difference"), [("dwa", 10, "+0.4"), ("sre2l", 10, "+8.4"), ("real-start", 50, "−16.1")])
def test_the_published_setting_is_compared(method: str, ipc: int, difference: str) -> None:
    table = beside_published(study(method=method, ipc=ipc))
    assert table
    number = published("cifar100", method, "resnet18-cifar", ipc)
    assert table.rows == [["cifar100", method, "resnet18-cifar", f"{ipc}", "40.0 ± 0.5", f"{number}", difference]]
    assert "Others" not in table.note


def test_settings_of_the_method_itself_are_compared_too() -> None:
    record = study(method="sre2l")
    record.settings["synthesis"].update(json.loads(json.dumps(recipe("cifar100", method="sre2l").settings("synthesis"))))
    table = beside_published(record)
    assert table
    assert len(table.rows) == 1


def test_how_it_is_computed_and_how_often_changes_nothing() -> None:
    record = study()
    record.settings["synthesis"].update(backend="reference", precision="bf16", device="cuda:3", concurrent_batches=4)
    record.settings["validation"].update(students=9)
    table = beside_published(record)
    assert table
    assert len(table.rows) == 1


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "synthesis": ({"synthesis": {"iterations": 10}}, "iterations"),
    "students": ({"validation": {"epochs": 1, "labels": "hard"}}, "epochs, labels"),
    "teacher": ({"teacher": {"architecture": "resnet50"}}, "teacher"),
    "several teachers": ({"synthesis": {"teacher": ["0a", "1b"]}}, "teacher"),
    "size": ({"data": {"size": 64}}, "size"),
    "training images": ({"data": {"held_out_share": 0.1}}, "held_out_share"),
}


@pytest.mark.parametrize(("changes", "named"), CHANGES.values(), ids=CHANGES.keys())
def test_other_settings_are_not_compared(changes: dict[str, dict[str, Any]], named: str) -> None:
    record = study()
    for part, values in changes.items():
        record.settings[part].update(values)
    table = beside_published(record)
    assert table
    assert not table.rows
    assert table.note.endswith(f"Others differ from what was published in: {named}.")


@pytest.mark.parametrize("part", ["synthesis", "validation", "teacher", "data"])
def test_settings_that_are_not_recorded_are_not_taken_for_granted(part: str) -> None:
    record = study()
    dict.pop(record.settings, part)  # type: ignore[arg-type]
    table = beside_published(record)
    assert table
    assert not table.rows
    assert (part if part != "data" else "size") in table.note


def test_a_cell_of_other_settings_is_not_compared() -> None:
    table = beside_published(study(lambda_var=0.05))
    assert table
    assert not table.rows
    assert "lambda_var" in table.note


def test_a_set_of_another_teacher_or_labels_of_a_file_are_not_compared() -> None:
    """Whatever the architecture of the teacher that gives the soft labels."""
    for teachers, rows in ((["resnet18-cifar"], 1), (["convnet128"], 0), (["resnet18-cifar", "convnet128"], 0)):
        table = beside_published(study(set_teachers=teachers))
        assert table
        assert len(table.rows) == rows
        assert rows or table.note.endswith("published in: teacher.")
    record = study()
    record.settings["soft_labels"] = "labels"  # type: ignore[index]
    table = beside_published(record)
    assert table
    assert not table.rows
    assert table.note.endswith("published in: soft_labels.")


@pytest.mark.parametrize("cell", [{"mean": float("nan")}, {"std": float("inf")}, {"ipc": "2–10"}])
def test_what_is_no_number_is_not_compared(cell: dict[str, Any]) -> None:
    assert beside_published(study(**cell)) is None


def test_steps_of_incremental_learning() -> None:
    record = study(student="convnet128", ipc=20, **{"classes seen": 60})
    record.settings["tasks"] = 5  # type: ignore[index]
    table = beside_published(record)
    assert table
    assert table.rows == [["cifar100", "dwa", "convnet128", "20, 60 classes seen", "40.0 ± 0.5", "22.5", "+17.5"]]
    record.settings["tasks"] = 10  # type: ignore[index]
    assert beside_published(record) is None


@pytest.mark.parametrize(
    "record",
    [
        study(recipe="digits", student="small-resnet"),
        study(ipc=11),
        study(mean="40"),
        study(**{"classes seen": 100}),
        Record(kind="k", title="t"),
        Record(kind="k", title="t", data={"cells": {"a": 1}}),
        Record(kind="k", title="t", data={"cells": [1, {}, {"recipe": []}]}),
    ],
)
def test_nothing_beside_what_was_never_published(record: Record) -> None:
    assert beside_published(record) is None


def test_images_that_were_cut_otherwise_are_not_compared() -> None:
    """Held-out images of ImageNet are resized to 256 pixels in the paper; older records say nothing, and kept all of them."""
    record = study("imagenet", student="resnet18")
    table = beside_published(record)
    assert table
    assert len(table.rows) == 1
    for crop in (1.0, None):
        record.settings["data"]["test_crop"] = crop
        if crop is None:
            del record.settings["data"]["test_crop"]
        table = beside_published(record)
        assert table
        assert not table.rows
        assert "published in: test_crop." in table.note


@pytest.mark.parametrize(
    ("stage", "name", "value"), [("validation", "accumulation", 2), ("validation", "weight_ema", 0.9), ("synthesis", "batch_ipc", 5)]
)
def test_a_setting_that_the_paper_leaves_alone_is_not_compared(stage: str, name: str, value: float) -> None:
    """Records hold such a setting only where it was changed."""
    record = study()
    assert name not in record.settings[stage]
    record.settings[stage][name] = value
    table = beside_published(record)
    assert table
    assert not table.rows
    assert f"published in: {name}." in table.note

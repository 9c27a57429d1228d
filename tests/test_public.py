"""What `dwa_fast` exports is enough for the whole way from a data set to an accuracy, with paths as plain strings."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import dwa_fast
from dwa_fast import (
    InputError,
    LabelIndex,
    SqueezeConfig,
    SynthesisResult,
    TeacherInfo,
    ValidationConfig,
    denormalise,
    digits,
    distill,
    image_folder,
    load_data,
    load_teacher,
    normalise,
    open_distilled,
    recipe,
    relabel,
    save_teacher,
    squeeze,
    synthesize,
    validate,
)
from dwa_fast.data.pixels import to_levels
from dwa_fast.sets.verify import problems

SIZE = 16
ONE_EPOCH = SqueezeConfig(epochs=1, learning_rate=0.05, padding=2, flip=0.0)


def test_everything_that_is_exported_is_there() -> None:
    assert all(hasattr(dwa_fast, name) for name in dwa_fast.__all__)


def test_what_exported_functions_return_is_exported() -> None:
    """Except protocols, which are for annotations alone."""
    for name in dwa_fast.__all__:
        value = getattr(dwa_fast, name)
        if inspect.isfunction(value):
            returned = get_type_hints(value)["return"]
            for kind in (returned, *get_args(returned)):
                if getattr(kind, "__module__", "").startswith("dwa_fast.") and not getattr(kind, "_is_protocol", False):
                    assert kind.__name__ in dwa_fast.__all__, name


def test_from_data_to_accuracy_with_strings_for_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = recipe("digits", iterations=3, squeeze=ONE_EPOCH, validation=ValidationConfig(epochs=2, students=1, padding=2))
    real, test = load_data(chosen.data, None, "train"), digits("test", SIZE)
    teacher = squeeze(real, chosen, device="cpu", checkpoint_file="state.pt")
    save_teacher("teacher.pt", teacher, TeacherInfo(architecture="small-resnet", classes=10, channels=1, size=SIZE))
    teacher, info = load_teacher("teacher.pt")
    assert info.classes == 10
    assert distill(teacher, real, chosen, ipc=1, output="set", try_teacher=False) == 10
    distilled, skipped = open_distilled("set", SIZE, 1, real.class_names)
    assert (len(distilled.labels), skipped) == (10, {})
    assert image_folder("set", SIZE, 1).class_names == [f"new{label:03d}" for label in range(10)]
    labels = relabel(distilled, teacher, chosen, output="labels", device="cpu")
    assert isinstance(labels, LabelIndex)
    assert labels.complete
    result = validate(distilled, test, None, "small-resnet", chosen, device="cpu", resume_dir="students", soft_labels="labels")
    assert len(result.accuracies) == 1


def synthesized(seed: int = 0) -> SynthesisResult:
    real, chosen = digits("train", SIZE), recipe("digits", iterations=3, batch_size=5, squeeze=ONE_EPOCH)
    torch.manual_seed(0)
    teacher = squeeze(real, chosen, device="cpu")
    rows = [int((real.labels == label).nonzero()[index]) for index in range(2) for label in range(10)]
    return synthesize(teacher, normalise(real.load(rows), chosen.data), real.labels[rows], chosen, seed=seed)


def test_save_writes_the_set_that_the_command_writes(tmp_path: Path) -> None:
    result = synthesized()
    result.save(str(tmp_path / "set"))
    assert list(problems(tmp_path / "set")) == []
    saved, _ = open_distilled(tmp_path / "set", SIZE, 1, [str(label) for label in range(10)])
    wanted = to_levels(denormalise(result.images, result.recipe.data))
    for label in range(10):
        ours = saved.load((saved.labels == label).nonzero().flatten().tolist())
        assert torch.equal(ours, wanted[result.labels == label])
    result.save(tmp_path / "set")  # again: nothing to do
    with pytest.raises(InputError, match="other settings"):
        replace(result, seed=1).save(tmp_path / "set")
    with pytest.raises(InputError, match="other settings"):  # the same settings, another teacher or other initial images
        replace(result, images=-result.images).save(tmp_path / "set")
    with pytest.raises(InputError, match="class 'ten'"):
        result.save(tmp_path / "other", class_names=[*map(str, range(10)), "ten"])

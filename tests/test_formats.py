"""Settings as files hold them: sets and trainings that an earlier version wrote are resumed only while these stay as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwa_fast import distill, open_distilled, relabel, squeeze, validate
from dwa_fast.experiments.cells import Cell, DistilledSource, cell_folder, set_folder
from dwa_fast.recipes import Recipe
from dwa_fast.threads import torch_threads
from dwa_fast.training import state
from tests.experiments.setups import small_setup, with_teacher
from tests.nets import DIGITS, small_set, small_teacher

NORMALISATION = {"mean": [0.3053], "std": [0.3185]}
MANIFEST = {"image_format": "png", "losses_every": 10, **NORMALISATION, "iterations": 2, "batch_size": 100, "learning_rate": 0.25}
MANIFEST |= {"lambda_mean": 0.01, "lambda_var": 0.11, "first_layer_weight": 10.0, "tv_l2": 0.0, "l2_scale": 0.0, "ascent": "directed"}
MANIFEST |= {"rho": 0.015, "steps": 12, "normalize_ascent": True, "matching_weights": "adjusted", "initial": "real", "view": "roll"}
MANIFEST |= {"crop_scale": [0.08, 1.0], "crop_ratio": [0.75, 4 / 3], "curriculum": "none", "milestone": 1.0, "flip": 0.5, "jitter": 2}
MANIFEST |= {"backend": "reference", "precision": "fp32", "device": "cpu", "initial_order": "sampled", "seed": 0}
MANIFEST |= {"image_shape": [1, 8, 8], "real_images": 60, "real_images_digest": "…", "teacher": "…", "threads": 1}
LEARNING = {"weight_decay": 0.01, "decay_vectors": True, "warmup_epochs": 0}
VIEWS = {"augmentation": "pad-crop", "padding": 2, "flip": 0.0}
MIXES = {"mixing": "mixup", "mixing_alpha": 0.8}
STUDENTS = {**NORMALISATION, "epochs": 2, "batch_size": 128, "optimiser": "adamw", "learning_rate": 0.005, "momentum": 0.9, **LEARNING}
STUDENTS |= {**VIEWS, **MIXES, "labels": "soft", "temperature": 20.0, "scale_loss": False, "teacher_mode": "eval", "precision": "fp32"}
STUDENTS |= {"images": "…", "teacher": "…", "student": "small-resnet", "size": 8, "seed": 0, "device": "cpu", "threads": 1, "held_out": "…"}
LABELS = {**NORMALISATION, "batch_size": 128, **VIEWS, **MIXES, "teacher_mode": "eval", "images": "…", "teacher": "…", "classes": 10}
LABELS |= {"seed": 0, "threads": 1}
TEACHER = {**NORMALISATION, "epochs": 2, "batch_size": 128, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4, **VIEWS}
TEACHER |= {"precision": "fp32", "architecture": "small-resnet", "size": 8, "seed": 0, "device": "cpu", "threads": 1, "real_images": "…"}


def brief(recipe: Recipe) -> Recipe:
    synthesis = replace(recipe.synthesis, iterations=2, backend="reference", device="cpu")
    squeeze, validation = replace(recipe.squeeze, epochs=2), replace(recipe.validation, epochs=2, students=1)
    return replace(recipe, synthesis=synthesis, squeeze=squeeze, validation=validation)


def settings(file: Path) -> list[tuple[str, Any]]:
    """In the order of the file, with checksums as "…"."""
    content = json.loads(file.read_bytes()) if file.suffix == ".json" else torch.load(file, weights_only=True)
    found = content["settings"] if file.suffix == ".json" else json.loads(content["settings"])
    return [(name, "…" if isinstance(value, str) and len(value) == 64 else value) for name, value in found.items()]


def test_settings_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_SECONDS", 0)  # write a checkpoint after every epoch
    recipe, data, teacher = brief(DIGITS), small_set(), small_teacher()
    with torch_threads(1):
        squeeze(data, recipe, device="cpu", checkpoint_file=tmp_path / "teacher.state")
        distill(teacher, data, recipe, ipc=1, output=tmp_path / "set", threads=1, try_teacher=False)
        distilled, _ = open_distilled(tmp_path / "set", 8, 1, data.class_names)
        relabel(distilled, teacher, recipe, output=tmp_path / "labels", device="cpu")
        validate(distilled, data, teacher, "small-resnet", recipe, device="cpu", resume_dir=tmp_path / "students")
    assert settings(tmp_path / "set" / "manifest.json") == list(MANIFEST.items())
    assert settings(tmp_path / "labels" / "labels.json") == list(LABELS.items())
    assert settings(tmp_path / "students" / "students.json") == list(STUDENTS.items())
    assert settings(tmp_path / "teacher.state") == list(TEACHER.items())


def test_names_of_sets_and_cells(tmp_path: Path) -> None:
    """They hash every setting that affects the result, of the recipe and of the set-up."""
    setup = with_teacher(small_setup(tmp_path), checksum="of the teacher")
    synthesis = replace(setup.recipe.synthesis, device="cpu")
    setup = replace(setup, recipe=replace(setup.recipe, synthesis=synthesis))
    made, name = DistilledSource(synthesis, 0), "dwa-iterations2-batch_size10-steps3-jitter1-seed0"
    assert set_folder(setup, made).name == f"{name}-e25e724041"
    assert cell_folder(setup, Cell(made, 1, "small-resnet")).name == f"{name}-ipc1-small-resnet-a33b93cf23"

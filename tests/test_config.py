"""Ranges in annotations: every number has one, and it is what is checked."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from dwa_fast import InputError
from dwa_fast.config import DataConfig, InitialConfig, Range, SqueezeConfig, StorageConfig, SynthesisConfig, ValidationConfig, range_of
from dwa_fast.evaluation.diversity import DiversityConfig
from dwa_fast.evaluation.incremental import IncrementalConfig
from dwa_fast.experiments.demo import DemoConfig

CONFIGS = [DataConfig, SynthesisConfig, StorageConfig, SqueezeConfig, ValidationConfig, DiversityConfig, IncrementalConfig, DemoConfig]


def numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(numbers, get_args(annotation)))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_number_has_a_range_and_keeps_to_it(config: type) -> None:
    hints = get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        if not numbers(hints[field.name]):
            continue
        allowed = range_of(hints[field.name])
        assert allowed, f"{field.name} has no range"
        low = allowed.at_least if allowed.above else allowed.at_least - 1
        value = getattr(config(), field.name)
        wrong = (low,) * max(1, len(value)) if isinstance(value, tuple) else low
        with pytest.raises(InputError, match=rf"^{field.name} must be "):
            config(**{field.name: wrong})


def test_ranges_in_words() -> None:
    words = {Range(1): "at least 1", Range(above=True): "above 0", Range(1, 100): "1 to 100", Range(0, 1, above=True): "above 0, at most 1"}
    assert {str(allowed): text for allowed, text in words.items()} == {text: text for text in words.values()}


def test_the_upper_end_of_a_range() -> None:
    assert StorageConfig(jpeg_quality=100).jpeg_quality == 100
    with pytest.raises(InputError, match="jpeg_quality must be a finite number of at least 1 and at most 100, got 101"):
        StorageConfig(jpeg_quality=101)


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("iterations", np.int64(5), 5),
        ("iterations", torch.tensor(5), 5),
        ("learning_rate", np.float64(0.5), 0.5),
        ("batch_ipc", np.int32(3), 3),
        ("crop_scale", [0.5, 1.0], (0.5, 1.0)),
        ("stage_sizes", np.array([24, 32]), (24, 32)),
        ("device", torch.device("cpu"), "cpu"),
        ("normalize_ascent", np.bool_(False), False),
    ],
)
def test_other_types_of_the_same_value_are_kept_as_pythons_own(field: str, value: Any, kept: Any) -> None:
    """Settings are compared with each other and written as JSON, after a run that may take hours."""
    given = SynthesisConfig(**{field: value})
    assert given == SynthesisConfig(**{field: kept})
    assert hash(given) == hash(SynthesisConfig(**{field: kept}))
    assert json.dumps(getattr(given, field)) == json.dumps(kept)


def test_text_stands_for_a_path() -> None:
    assert InitialConfig(initial_tensors="folder") == InitialConfig(initial_tensors=Path("folder"))  # type: ignore[arg-type]
    assert InitialConfig().initial_tensors is None


@pytest.mark.parametrize("schedule", ["fast", "short"])
def test_the_shorter_schedules_need_a_momentum(schedule: Any) -> None:
    """PyTorch refuses Nesterov's without one."""
    with pytest.raises(InputError, match=f"momentum must be above 0 for schedule '{schedule}', which takes Nesterov's, got 0"):
        SqueezeConfig(schedule=schedule, momentum=0)
    assert SqueezeConfig(momentum=0).momentum == 0


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (SynthesisConfig, "normalize_ascent", "no", "normalize_ascent must be True or False, got 'no'"),
        (SynthesisConfig, "stage_sizes", 32, "stage_sizes must be a list of numbers, got 32"),
        (SynthesisConfig, "crop_scale", 0.5, r"crop_scale must be \(low, high\) with 0 < low ≤ high ≤ 1, got 0.5"),
        (SynthesisConfig, "crop_scale", ("a", 1), r"crop_scale must be \(low, high\) with 0 < low ≤ high ≤ 1, got \('a', 1\)"),
        (SynthesisConfig, "crop_ratio", (1, math.inf), r"crop_ratio must be \(low, high\) with 0 < low ≤ high < ∞, got \(1, inf\)"),
        (SynthesisConfig, "device", 3, "device must be text, got 3"),
        (DataConfig, "mean", 0.5, "mean must be a list of numbers, got 0.5"),
        (DataConfig, "mean", "0.5", "mean must be a list of numbers, got '0.5'"),
    ],
)
def test_a_value_of_another_type_is_named(config: type, field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**{field: value})

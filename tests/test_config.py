"""Ranges in annotations: every number has one, and it is what is checked."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest

from dwa_fast import InputError
from dwa_fast.config import DataConfig, Range, SqueezeConfig, StorageConfig, SynthesisConfig, ValidationConfig, range_of
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

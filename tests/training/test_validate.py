"""Students: that they learn and repeat, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dwa_fast import InputError
from dwa_fast.data.datasets import digits
from dwa_fast.data.images import MemorySet
from dwa_fast.data.subsets import some_classes
from dwa_fast.models.architectures import ARCHITECTURES
from dwa_fast.training.validate import validate
from tests.nets import DIGITS, SIZE, small_set, small_teacher, tight
from tests.training.students import CPU, QUICK, held_out, students


def test_validate_trains_students_that_beat_chance_and_repeats() -> None:
    config = replace(DIGITS.validation, epochs=30, padding=1, students=2, mixing="none", labels="hard", learning_rate=5e-3)
    recipe, teacher = replace(DIGITS, validation=config), small_teacher()
    results = [validate(small_set(), digits("test", SIZE), teacher, "small-resnet", recipe, device=CPU) for _ in range(2)]
    assert results[0] == results[1]
    assert len(set(results[0].seeds)) == 2
    assert results[0].mean > 50
    assert results[0].std == pytest.approx(abs(results[0].accuracies[0] - results[0].accuracies[1]) / 2**0.5)
    assert all(p.requires_grad for p in teacher.parameters())


def test_students_in_bf16() -> None:
    config = replace(QUICK, students=1, mixing="none", labels="hard", learning_rate=5e-3)
    exact, rounded = students(replace(config, epochs=10)), students(replace(config, epochs=10, precision="bf16"))
    assert rounded.mean > 30
    assert abs(exact.mean - rounded.mean) < 20


def test_teachers_are_checked_as_synthesis_does(tmp_path: Path) -> None:
    broken = small_teacher()
    broken.get_buffer("stem.1.running_var")[2] = float("inf")
    cases = {
        r"not finite: running_var of layer 'stem\.1' \(1 infinite of 8\); train it again": broken,
        "teacher gives logits of 7 classes, the data have 10": ARCHITECTURES["small-resnet"](7, 1, SIZE),
        "teacher gives logits of 1 classes, the data have 10": ARCHITECTURES["small-resnet"](1, 1, SIZE),
        r"teacher must give \[N, classes\] logits, got shape \(2, 1, 8, 8\)": nn.Identity(),
        r"teacher cannot take images of shape \(1, 8, 8\): ": nn.Linear(3, 10),
    }
    for message, teacher in cases.items():
        with pytest.raises(InputError, match=message):
            students(teacher=teacher.eval(), resume_dir=tmp_path)
    with pytest.raises(InputError, match=r"a batch of one image leaves a BatchNorm layer of the teacher with one value per channel"):
        students(replace(QUICK, batch_size=1, teacher_mode="train"), tight(10, 1, SIZE))
    assert students(replace(QUICK, students=1, labels="hard"), broken).accuracies  # which is not asked


def test_batches_of_one_value_per_channel_are_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tight", tight)
    with pytest.raises(InputError, match="a batch of one image leaves a BatchNorm layer of the student with one value per channel"):
        students(replace(QUICK, batch_size=1), student="tight")


def test_sets_of_other_classes_are_refused() -> None:
    few = some_classes(small_set(), range(7))
    with pytest.raises(InputError, match="distilled images have 7 classes, the held-out images 10"):
        validate(few, held_out(), small_teacher(), "small-resnet", replace(DIGITS, validation=QUICK), device=CPU)
    empty = MemorySet(held_out().pixels[:0], held_out().labels[:0], held_out().class_names)
    with pytest.raises(InputError, match="there are no held-out images; expected at least one"):
        validate(small_set(), empty, small_teacher(), "small-resnet", replace(DIGITS, validation=QUICK), device=CPU)


def test_a_teacher_that_fails_on_the_way_is_named() -> None:
    class Failing(nn.Module):
        """Finite for two images, infinite for the twenty of a batch."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 10), float("inf") if len(images) > 2 else 1.0)

    with pytest.raises(InputError, match=r"loss not finite in epoch 1 of 4; the teacher's logits for its images are not finite$"):
        students(teacher=Failing())


def test_classes_in_another_order_are_refused_and_other_names_said(caplog: pytest.LogCaptureFixture) -> None:
    """An accuracy by the numbers of other classes would be a wrong one."""
    config, test = replace(QUICK, labels="hard", epochs=1, students=1), held_out()
    swapped = replace(test, class_names=[test.class_names[1], test.class_names[0], *test.class_names[2:]])
    with pytest.raises(InputError, match=r"class 0 of the distilled images is '0', .* is '1': the classes are the same in another order"):
        validate(small_set(), swapped, None, "small-resnet", replace(DIGITS, validation=config), device=CPU)
    named = replace(test, class_names=[f"digit {name}" for name in test.class_names])
    validate(small_set(), named, None, "small-resnet", replace(DIGITS, validation=config), device=CPU)
    assert "that of the held-out images is 'digit 0'; classes are taken to be the same by their numbers" in caplog.text
    caplog.clear()
    validate(small_set(), test, None, "small-resnet", replace(DIGITS, validation=config), device=CPU)
    assert "classes" not in caplog.text

"""Real images tell whether a teacher knows the data: what is said, when, and when nothing is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dwa_fast import distill, synthesize
from dwa_fast.config import Normalisation
from dwa_fast.data.images import MemorySet
from dwa_fast.data.pixels import normalise
from dwa_fast.data.teacher_check import judge, warn_if_inaccurate
from tests.nets import DIGITS, real_images, small_recipe, small_set, small_teacher

GREY = Normalisation(mean=(0.3,), std=(0.3,))


def coloured(classes: int, per_class: int, wrong: float = 0.2) -> tuple[MemorySet, Callable[[Tensor], Tensor]]:
    """Images whose level is their class, some of them mislabelled, and an oracle that reads the level after the normalisation GREY."""
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(per_class)
    shown = torch.where(torch.rand(len(labels), generator=source) < wrong, torch.randint(classes, labels.shape, generator=source), labels)
    pixels = (10 + 240 * shown // classes).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    levels = normalise((10 + 240 * torch.arange(classes) // classes).to(torch.uint8)[:, None, None, None], GREY).flatten()

    def predict(images: Tensor) -> Tensor:
        return -(images.mean((1, 2, 3))[:, None] - levels).abs()

    return MemorySet(pixels, labels, [f"c{label}" for label in range(classes)]), predict


def said(
    predict: Callable[[Tensor], Tensor], data: MemorySet, caplog: pytest.LogCaptureFixture, normalisation: Normalisation = GREY
) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, "dwa_fast"):
        warn_if_inaccurate(predict, data, normalisation)
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("classes", "per_class"), [(2, 30), (3, 60), (10, 20), (200, 5), (600, 2)])
def test_a_teacher_that_knows_the_data_is_not_warned_of(classes: int, per_class: int, caplog: pytest.LogCaptureFixture) -> None:
    data, predict = coloured(min(classes, 200), per_class)
    text = said(predict, data, caplog)
    assert text.startswith("teacher: ")
    assert "\n" not in text


def test_a_rolled_head_is_named_output_by_output(caplog: pytest.LogCaptureFixture) -> None:
    data, predict = coloured(3, 60)
    text = said(lambda images: predict(images).roll(1, 1), data, caplog)
    right = float((predict(normalise(data.load(range(180)), GREY)).argmax(1) == data.labels).float().mean())
    assert right > 0.8
    assert "output 0 is class c2, output 1 is class c0, output 2 is class c1; --classes FILE" in text
    assert text.count("\n") == 1


def test_two_swapped_classes_among_ten_are_found(caplog: pytest.LogCaptureFixture) -> None:
    data, predict = coloured(10, 60)
    order = [0, 1, 7, 3, 4, 5, 6, 2, 8, 9]
    text = said(lambda images: predict(images)[:, order], data, caplog)
    assert "output 2 is class c7, output 7 is class c2; --classes FILE" in text


def test_classes_that_are_alike_are_not_taken_for_swapped(caplog: pytest.LogCaptureFixture) -> None:
    """Images of both are given the same output."""
    data, predict = coloured(10, 60)

    def alike(images: Tensor) -> Tensor:
        logits = predict(images).clone()
        logits[:, 7] = torch.where(logits.argmax(1) == 2, 1.0, logits[:, 7])
        return logits

    assert "permuted" not in said(alike, data, caplog)


def test_another_normalisation_is_named(caplog: pytest.LogCaptureFixture) -> None:
    data, predict = coloured(10, 20, wrong=0.1)
    half = Normalisation(mean=(0.5,), std=(0.5,))
    knows_half = lambda images: predict(normalise(images * 0.5 + 0.5, GREY))  # noqa: E731
    assert "mean 0.5 and std 0.5; see --mean and --std" in said(knows_half, data, caplog)
    assert "see --mean" not in said(knows_half, data, caplog, half)


def test_chance_is_called_chance(caplog: pytest.LogCaptureFixture) -> None:
    data, _ = coloured(10, 20)
    text = said(lambda images: torch.eye(10)[torch.zeros(len(images), dtype=torch.int64)], data, caplog)
    assert "teacher gives only 10.0 % of 200 real images right, and guessing gives 10.0 %" in text


def test_few_images_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    data, predict = coloured(10, 2)
    assert said(lambda images: predict(images).roll(1, 1), data, caplog) == ""
    one_class, _ = coloured(1, 60)
    assert said(lambda images: torch.zeros(len(images), 3), one_class, caplog) == ""
    assert said(lambda images: torch.full((len(images), 10), torch.nan), coloured(10, 20)[0], caplog) == ""


def test_random_answers_are_no_permutation() -> None:
    """An assignment fits any table better than chance; judged on other images it does not."""
    for classes, per_class in ((2, 50), (10, 50), (100, 10), (500, 2)):
        labels = torch.arange(classes).repeat_interleave(per_class)
        for seed in range(5):
            answers = torch.randint(classes, labels.shape, generator=torch.Generator().manual_seed(seed))
            assert not judge(answers, labels, classes).moved


def trained() -> nn.Module:
    """A teacher that gets most of the small digits right."""
    from dwa_fast.data.datasets import digits

    module, data = small_teacher(), digits("train", 8)
    images, labels = normalise(data.load(range(200)), DIGITS.data), data.labels[:200]
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
    return module.eval()


def test_distill_and_synthesize_try_the_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, config = trained(), small_recipe(iterations=1, steps=1, batch_size=60, backend="reference")
    images, labels = real_images(60)
    data = small_set(6)
    pixels = normalise(data.load(range(60)), DIGITS.data)
    right = 100 * float((module(pixels).argmax(1) == data.labels).float().mean())
    assert right > 80
    with caplog.at_level(logging.INFO, "dwa_fast"):
        distill(module, data, config, ipc=1, output=tmp_path / "set")
        assert f"teacher: {right:.1f} % of 60 real images right" in caplog.text
        caplog.clear()
        distill(module, data, config, ipc=1, output=tmp_path / "set")  # nothing is left to do
        assert "teacher:" not in caplog.text
        list(module.modules())[-1].weight.data = list(module.modules())[-1].weight.data.roll(1, 0)  # type: ignore[operator]
        list(module.modules())[-1].bias.data = list(module.modules())[-1].bias.data.roll(1, 0)  # type: ignore[operator]
        synthesize(module, images, labels, config)
        assert "output 1 is class 0" in caplog.text
        caplog.clear()
        synthesize(module, images, labels, small_recipe(iterations=1, steps=1, batch_size=60, initial="noise", ascent="none"))
        assert "teacher" not in caplog.text

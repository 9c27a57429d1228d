"""Class-incremental learning: orders, the restricted teacher, and whole runs on a few digits."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dwa_fast import InputError
from dwa_fast.data.datasets import digits
from dwa_fast.data.images import MemorySet
from dwa_fast.evaluation.incremental import IncrementalConfig, class_order, learn
from dwa_fast.models.wrappers import KnownClasses
from tests.nets import DIGITS, SIZE, real_images, small_set, small_teacher

QUICK = replace(DIGITS, validation=replace(DIGITS.validation, epochs=2, padding=1, students=1))
SHORT = IncrementalConfig(tasks=2, seeds=2)


def run(
    resume_dir: Path, config: IncrementalConfig = SHORT, seed: int = 0, jobs: int = 1, **sets: Any
) -> dict[str, list[list[list[float]]]]:
    return learn(
        sets or {"few": small_set(3)},
        digits("test", SIZE),
        small_teacher(),
        "small-resnet",
        QUICK,
        config,
        device=torch.device("cpu"),
        resume_dir=resume_dir,
        seed=seed,
        jobs=jobs,
    )


def test_every_class_comes_once() -> None:
    order = class_order(10, 4, seed=3)
    assert [len(part) for part in order] == [3, 3, 2, 2]
    assert sorted(label for part in order for label in part) == list(range(10))
    assert order == class_order(10, 4, seed=3)
    assert order != class_order(10, 4, seed=4)
    assert order != class_order(10, 4, seed=3, index=1)


@torch.no_grad()
def test_teacher_knows_the_classes_seen_so_far_in_their_order() -> None:
    images, _ = real_images()
    teacher = small_teacher()
    known = KnownClasses(teacher, [7, 2])
    assert torch.equal(known(images), teacher(images)[:, [7, 2]])
    assert known.train().teacher.training
    assert not known.eval().teacher.training


def test_real_images_are_learned_at_every_step(tmp_path: Path) -> None:
    """A set that is the real images: new students know all classes seen so far, as they could not with wrong labels."""
    config = IncrementalConfig(tasks=3, seeds=1)
    hard = replace(QUICK.validation, labels="hard", mixing="none", epochs=6, batch_size=32)
    (steps,) = learn(
        {"real": small_set(60)},
        digits("test", SIZE),
        small_teacher(),
        "small-resnet",
        replace(QUICK, validation=hard),
        config,
        device=torch.device("cpu"),
        resume_dir=tmp_path,
    )["real"]
    assert all(accuracy > 90 for step in steps for accuracy in step), steps


def test_steps_are_of_the_seed_and_paired_over_sets(tmp_path: Path) -> None:
    few = small_set(3)
    found = run(tmp_path / "a", few=few, same=few, other=small_set(4))
    assert [[len(step) for step in order] for order in found["few"]] == [[1, 1], [1, 1]]
    assert found["few"] == found["same"]
    assert found["few"] != found["other"]
    assert run(tmp_path / "b", few=few)["few"] == found["few"]
    assert run(tmp_path / "c", seed=1, few=few)["few"] != found["few"]


class StoppedError(Exception):
    """Stands for whatever stops a run."""


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    trained: list[int] = []
    module = importlib.import_module("dwa_fast.training.validate")

    new_network = module.new_network

    def counting(*arguments: Any, **named: Any) -> Any:
        if len(trained) == 2:
            raise StoppedError
        trained.append(1)
        return new_network(*arguments, **named)

    monkeypatch.setattr(module, "new_network", counting)
    with pytest.raises(StoppedError):
        run(tmp_path / "stopped")
    trained.clear()
    assert run(tmp_path / "stopped") == whole
    assert len(trained) == 2  # the other two were there
    trained.clear()
    assert run(tmp_path / "stopped") == whole
    assert not trained


def test_more_orders_go_on_in_two_processes(tmp_path: Path) -> None:
    first = run(tmp_path / "two", IncrementalConfig(tasks=2, seeds=1))["few"]
    both = run(tmp_path / "two", SHORT, jobs=2)
    assert both["few"][:1] == first
    assert both == run(tmp_path / "one", SHORT)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tasks": 0}, "tasks must be an integer of at least 1, got 0"),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"tasks": 11}, "10 classes cannot be split into 11 tasks, the first of which needs at least 2 classes"),
        ({"tasks": 10}, "10 classes cannot be split into 10 tasks, the first of which needs at least 2 classes"),
    ],
)
def test_wrong_input(tmp_path: Path, config: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path, IncrementalConfig(**config))


def test_what_would_give_wrong_accuracies_is_refused_beforehand(tmp_path: Path) -> None:
    few = small_set(3)
    strangers = MemorySet(few.pixels, few.labels, [f"other {name}" for name in few.class_names])
    with pytest.raises(InputError, match="set 'strangers' has other classes than the held-out images"):
        run(tmp_path, strangers=strangers)
    with pytest.raises(InputError, match="labels of the images of set 'wrong' must lie in 0 … 9, the classes of the set, got 12"):
        run(tmp_path, wrong=SimpleNamespace(labels=few.labels + 3, **{name: getattr(few, name) for name in ("class_names", "image_shape")}))
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_refused(tmp_path: Path) -> None:
    config = IncrementalConfig(tasks=1, seeds=1)
    run(tmp_path, config)
    with pytest.raises(InputError, match=r"seed was .*, is "):
        run(tmp_path, config, seed=1)
    changed = MemorySet(255 - small_set(3).pixels, small_set(3).labels, small_set(3).class_names)
    run(tmp_path, config, changed=changed)  # another set is another matter

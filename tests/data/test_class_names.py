"""The classes of both splits: the same names, and numbered alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dwa_fast import InputError
from dwa_fast.data.datasets import load
from tests.data.image_files import FOLDER, classes, write_image


def test_held_out_images_are_numbered_by_the_training_images(tmp_path: Path) -> None:
    classes(tmp_path / "train", "airplane", "dog", "truck")
    classes(tmp_path / "val", "dog", "truck", "zebra")
    message = r"val has class folders that .*train lacks: zebra, and it lacks airplane; training and held-out images must be of the same"
    for split in ("train", "test"):
        with pytest.raises(InputError, match=message):
            load(FOLDER, tmp_path, split)  # type: ignore[arg-type]
    load(replace(FOLDER, held_out_share=0.5), _with_two_each(tmp_path), "train")  # val is not used
    (tmp_path / "val" / "zebra").rename(tmp_path / "val" / ".zebra")
    with pytest.raises(InputError, match=r"^\S*val lacks airplane; training"):
        load(FOLDER, tmp_path, "test")
    classes(tmp_path / "val", "airplane")
    assert load(FOLDER, tmp_path, "test").class_names == ["airplane", "dog", "truck"]
    classes(tmp_path / "test", "dog")
    with pytest.raises(InputError, match=r"test lacks airplane, truck"):
        load(FOLDER, tmp_path, "train")


def _with_two_each(folder: Path) -> Path:
    for path in list((folder / "train").iterdir()):
        write_image(path / "1.png")
    return folder


def test_numbers_padded_in_one_split_alone_are_the_same_classes(tmp_path: Path) -> None:
    """Sorted as text they are 00, 01, …, 10 and 0, 1, 10, 2, …: each split by itself would number them otherwise."""
    classes(tmp_path / "train", *(f"{number:02d}" for number in range(11)))
    classes(tmp_path / "val", *map(str, range(11)))
    test = load(FOLDER, tmp_path, "test")
    assert test.class_names == [f"{number:02d}" for number in range(11)]
    levels = test.load(range(11))[:, 0].float().mean((1, 2)).round().int()
    assert (levels // 20).tolist() == test.labels.tolist()
    assert load(FOLDER, tmp_path, "train").class_names == test.class_names
    (tmp_path / "val" / "10").rename(tmp_path / "val" / "11")
    with pytest.raises(InputError, match=r"train lacks: 0, 1, 11, 2, 3, … \(11 in all\), and it lacks 00"):
        load(FOLDER, tmp_path, "test")

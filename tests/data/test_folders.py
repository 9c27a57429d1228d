"""Folders of class folders: order, hidden files, and what is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dwa_fast import InputError
from dwa_fast.data.datasets import load
from dwa_fast.data.folders import image_folder
from tests.data.image_files import FOLDER, classes, write_image


def test_image_folder_is_sorted_resized_and_cropped(tmp_path: Path) -> None:
    write_image(tmp_path / "zebra" / "b.png", size=(20, 10))
    write_image(tmp_path / "zebra" / "a.JPEG", size=(8, 8))
    write_image(tmp_path / "ant" / "deep" / "x.png", 128)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    data = load(FOLDER, tmp_path, "train")
    assert data.class_names == ["ant", "zebra"]
    assert data.labels.tolist() == [0, 1, 1]
    pixels = data.load([0, 2])
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels[0].unique().tolist() == [128]
    assert pixels[1].flatten(1).float().mean(1).tolist() == pytest.approx([255, 0, 51], abs=2)
    assert load(replace(FOLDER, mean=(0.5,), std=(0.5,)), tmp_path, "train").load([0]).shape == (1, 1, 8, 8)


def test_first_images_of_each_class(tmp_path: Path) -> None:
    for index in range(3):
        write_image(tmp_path / "a" / f"{index}.png", index * 100)
    data = image_folder(tmp_path, 8, 1, per_class=2)
    assert data.files == ["a/0.png", "a/1.png"]
    with pytest.raises(InputError, match="has 3 images, expected at least 4"):
        image_folder(tmp_path, 8, 1, per_class=4)


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    """macOS leaves ._0.png beside 0.png, Jupyter copies of images in .ipynb_checkpoints."""
    classes(tmp_path, "cat")
    for name in ("._0.png", ".ipynb_checkpoints/0-checkpoint.png", "more/.1.png"):
        (tmp_path / "cat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_bytes(b"no image")
    assert image_folder(tmp_path, 8).files == ["cat/0.png"]


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/0.png", "b/0.png", "b/images/1.png"):
        write_image(tmp_path / "train" / name)
    for name in ("a/list.txt", "a/.1.gif", "Thumbs.db"):
        (tmp_path / "train" / name).touch()
    image_folder(tmp_path / "train", 8)
    assert caplog.messages == []
    write_image(tmp_path / "train" / "2.png")
    (tmp_path / "train" / "a" / "1.GIF").touch()
    (tmp_path / "train" / "a" / "3.png").symlink_to("nowhere")
    (tmp_path / "train" / "b" / "more").symlink_to("../a")
    assert image_folder(tmp_path / "train", 8).files == ["a/0.png", "b/0.png", "b/images/1.png"]
    (sentence,) = caplog.messages
    assert sentence.startswith(f"{tmp_path}/train: left out 4 files or links, such as 2.png; only .png, .jpg,")


def test_images_that_lie_deeper_count_and_their_class_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("indoor/cat/0.png", "indoor/dog/0.png", "outdoor/cat/0.png"):
        write_image(tmp_path / name)
    data = load(FOLDER, tmp_path, "train")
    assert (data.class_names, data.labels.tolist()) == (["indoor", "outdoor"], [0, 0, 1])
    assert caplog.messages == [f"{tmp_path}: 3 images lie in folders inside class folders; indoor/cat/0.png counts as class 'indoor'"]


def test_files_sorted_by_number(tmp_path: Path) -> None:
    for name in ("class0_id1000.png", "class0_id999.png", "class0_id101.png", "10.png", "9.png", "a.png"):
        write_image(tmp_path / "new0" / name)
    data = image_folder(tmp_path, 8, per_class=5, by_number=True)
    assert data.files == [f"new0/{name}.png" for name in ("9", "10", "a", "class0_id101", "class0_id999")]

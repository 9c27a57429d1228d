"""Held-out images that are training images: a warning, from every command that can know it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from dwa_fast.data.digest import image_digest
from dwa_fast.data.folders import image_folder
from dwa_fast.data.images import FileSet
from dwa_fast.data.overlap import warn_if_made_from, warn_if_seen, warn_of_shared_images


def real(folder: Path, first: int) -> FileSet:
    for label in range(2):
        (folder / f"c{label}").mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8), (first + index, label, 0)).save(folder / f"c{label}" / f"{index}.png")
    return image_folder(folder, 8)


def test_copies_among_the_held_out_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = real(tmp_path / "train", 0), real(tmp_path / "test", 9)
    warn_of_shared_images(train, test)
    warn_of_shared_images(train, train)  # a part of the training images that is held out
    assert not caplog.messages
    shutil.copy(tmp_path / "train" / "c1" / "2.png", tmp_path / "test" / "c1" / "2.png")
    warn_of_shared_images(train, test)
    (message,) = caplog.messages
    assert "test: 1 of 6 held-out images that were compared are training images too, such as c1/2.png; accuracies" in message


def test_a_set_that_was_made_from_the_held_out_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = real(tmp_path / "train", 0), real(tmp_path / "test", 9)
    warn_if_made_from({}, test)
    warn_if_made_from({"real_images_digest": image_digest(train)}, test)
    assert not caplog.messages
    shutil.copytree(tmp_path / "train", tmp_path / "copy")
    warn_if_made_from({"real_images_digest": image_digest(train)}, image_folder(tmp_path / "copy", 8))
    assert "was made from these very held-out images" in caplog.text


def test_what_was_made_before_images_were_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = real(tmp_path / "train", 0)
    left = whole.select([0, 1, 3, 4])
    warn_if_seen({}, "real_images", "teacher t.pt", left, 0.3)  # of another program
    warn_if_seen({"real_images": image_digest(left)}, "real_images", "teacher t.pt", left, 0.3)
    assert not caplog.messages
    warn_if_seen({"real_images": image_digest(whole)}, "real_images", "teacher t.pt", left, 0.3)
    (message,) = caplog.messages
    assert message.startswith("teacher t.pt was not made from the training images that are left where a share of 0.3 is held out, and may")

"""What a set of images is known by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dwa_fast.data.datasets import digits
from dwa_fast.data.digest import image_digest
from dwa_fast.data.folders import image_folder
from dwa_fast.data.images import FileSet, ImageSet, MemorySet
from dwa_fast.errors import InputError


def files(folder: Path) -> FileSet:
    for name in ("cat", "dog"):
        for index in range(3):
            path = folder / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (80 * index, 20, 99)).save(path)
    return image_folder(folder, 8, 3)


def test_images_labels_and_names_make_the_digest(tmp_path: Path) -> None:
    """The folder itself does not, so that a set may be moved."""
    data = files(tmp_path / "a")
    assert image_digest(files(tmp_path / "b")) == image_digest(data)
    others: list[ImageSet] = [
        data.select([0, 1, 2, 3, 4]),
        replace(data, labels=1 - data.labels),
        replace(data, class_names=["cat", "eel"]),
        replace(data, size=16),
        replace(data, resize=9),
    ]
    assert image_digest(replace(data, resize=8)) == image_digest(data)
    digests = {image_digest(each) for each in (data, *others)}
    Image.new("RGB", (8, 8), (1, 20, 99)).save(tmp_path / "a" / "dog" / "2.png")
    assert len(digests | {image_digest(data)}) == len(others) + 2


def test_one_level_of_one_pixel_counts() -> None:
    data = digits("test", 8)
    pixels = data.load(range(len(data.labels)))
    pixels[7, 0, 3, 3] ^= 1
    changed = MemorySet(pixels, data.labels, data.class_names)
    assert image_digest(changed) != image_digest(data)


def test_damaged_files_count_as_they_are(tmp_path: Path) -> None:
    """Whoever leaves them out says so later; only a file that cannot be read at all stops here."""
    data = files(tmp_path)
    path = tmp_path / "dog" / "1.png"
    before = image_digest(data)
    path.write_bytes(path.read_bytes()[:20])
    assert image_digest(data) != before
    path.unlink()
    with pytest.raises(InputError, match=r"dog/1\.png cannot be read: No such file"):
        image_digest(data)

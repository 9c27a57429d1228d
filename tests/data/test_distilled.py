"""Sets of other programs: their folders, their names, their order, and damaged files in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dwa_fast import InputError
from dwa_fast.config import StorageConfig
from dwa_fast.data.distilled import open_distilled
from dwa_fast.sets.store import MANIFEST, BatchSpec, ImageStore

WNIDS = ["n01440764", "n01443537", "n02102040"]


def write_image(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)).save(path)


FORMATS = {  # how each program calls image i of class c
    "SRe2L, CDA, DWA": lambda label, index: f"new{label:03d}/class{label:03d}_id{index:03d}.jpg",
    "RDED": lambda label, index: f"{label:05d}/class{label:05d}_id{index:05d}.jpg",
    "RDED by wnid": lambda label, index: f"{WNIDS[label]}/class{label:05d}_id{index:05d}.jpg",
    "any names": lambda label, index: f"{WNIDS[label]}/{'cab'[index]} picture.PNG",
    "bare numbers": lambda label, index: f"{label}/{index}.png",
    "dwa-fast": lambda label, index: f"new{label:03d}/class{label:03d}_id{index:03d}.png",
}


@pytest.mark.parametrize("form", FORMATS)
def test_sets_of_other_programs(tmp_path: Path, form: str) -> None:
    """Every image gets its own class, and the first ones of a class are the first by name."""
    for label in range(3):
        for index in range(3):
            write_image(tmp_path / FORMATS[form](label, index), 60 * label + 10 * index)
    data, skipped = open_distilled(tmp_path, 8, 3, WNIDS)
    assert not skipped
    assert data.class_names == WNIDS
    levels = data.load(range(9)).float().mean((1, 2, 3)).round().int()
    assert (levels // 60).tolist() == data.labels.tolist()
    first, _ = open_distilled(tmp_path, 8, 3, WNIDS, per_class=2)
    assert first.files == sorted(data.files)[0:2] + sorted(data.files)[3:5] + sorted(data.files)[6:8]


def test_folders_are_matched_by_name_and_by_number_not_by_position(tmp_path: Path) -> None:
    names = [str(label) for label in range(12)]
    for label in range(12):
        write_image(tmp_path / "numbers" / f"new{label}" / "0.png", 20 * label)  # sorted: new0, new1, new10, new11, new2, …
        write_image(tmp_path / "names" / f"class {11 - label:02d}" / "0.png", 20 * label)
    for folder, real in (("numbers", names), ("names", [f"class {11 - label:02d}" for label in range(12)])):
        data, _ = open_distilled(tmp_path / folder, 8, 3, real)
        levels = data.load(range(12)).float().mean((1, 2, 3)).round().to(torch.int64)
        assert (levels // 20).tolist() == data.labels.tolist()
        assert data.labels.tolist() != list(range(12))


WRONG = {
    "other names": (
        ["cat", "dog", "eel"],
        "are neither named as .* nor numbered from 0: cat, dog, eel; the classes: n01440764, n01443537, ",
    ),
    "from 1": (["new001", "new002", "new003"], "are neither named as the held-out images' classes nor numbered from 0: new001"),
    "twice": (["0", "00", "1"], "are neither named as"),
    "one too many": (["0", "1", "2", "3"], "has 4 classes, the held-out images have 3"),
    "one wnid of others": ([*WNIDS[:2], "n99999999"], "are neither named as"),
}


@pytest.mark.parametrize(("folders", "message"), WRONG.values(), ids=WRONG.keys())
def test_folders_that_could_be_any_class_are_refused(tmp_path: Path, folders: list[str], message: str) -> None:
    for name in folders:
        write_image(tmp_path / name / "0.png", 0)
    with pytest.raises(InputError, match=message):
        open_distilled(tmp_path, 8, 3, WNIDS)


def test_bad_images_are_named_or_skipped(tmp_path: Path) -> None:
    for label in range(3):
        for index in range(3):
            write_image(tmp_path / FORMATS["RDED"](label, index), 60 * label + 10 * index)
    bad = tmp_path / FORMATS["RDED"](1, 0)
    bad.write_bytes(bad.read_bytes()[:100])
    data, _ = open_distilled(tmp_path, 8, 3, WNIDS)
    with pytest.raises(InputError, match=r"class00001_id00000\.jpg is no image that can be read"):
        data.load(range(9))
    data, skipped = open_distilled(tmp_path, 8, 3, WNIDS, per_class=2, skip_bad_images=True)
    assert list(skipped) == [FORMATS["RDED"](1, 0)]
    assert data.files[2:4] == [FORMATS["RDED"](1, 1), FORMATS["RDED"](1, 2)]  # the next one takes its place
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match=r"class 'n01443537' of .* has 2 images that can be read, expected at least 3"):
        open_distilled(tmp_path, 8, 3, WNIDS, per_class=3, skip_bad_images=True)


def own_set(folder: Path, names: list[str], size: int = 8) -> None:
    """A set of ours, one image per class, whose level says which."""
    settings = {"image_shape": [3, size, size]}
    store = ImageStore(folder, settings, names, StorageConfig(losses_every=0))
    batch = BatchSpec(0, 0, list(range(len(names))))
    store.write(batch, torch.stack([torch.full((3, size, size), 20 * label, dtype=torch.uint8) for label in batch.labels]))
    store.finish([batch])


def classes_of(folder: Path, real: list[str]) -> dict[str, int]:
    """By real class, the number that the class had when the set was made."""
    data, _ = open_distilled(folder, 8, 3, real)
    levels = data.load(range(len(data.labels))).float().mean((1, 2, 3)).round().int() // 20
    assert data.class_names == real
    return {real[label]: int(level) for label, level in zip(data.labels.tolist(), levels, strict=True)}


@pytest.mark.parametrize("skip_bad_images", [False, True])
def test_an_image_that_has_changed_is_no_image_of_the_set(tmp_path: Path, skip_bad_images: bool) -> None:
    own_set(tmp_path, ["ant", "bee"])
    images = sorted(tmp_path.rglob("*.png"))
    images[0].write_bytes(images[1].read_bytes())
    with pytest.raises(InputError, match=r"class000_id000\.png has changed since it was written; the command that made the set"):
        open_distilled(tmp_path, 8, 3, ["ant", "bee"], skip_bad_images=skip_bad_images)


def test_a_set_of_ours_is_matched_by_its_class_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_set(tmp_path / "set", ["dog", "airplane", "truck"])  # CIFAR's files, say, have an order of their own
    assert classes_of(tmp_path / "set", ["airplane", "dog", "truck"]) == {"airplane": 1, "dog": 0, "truck": 2}
    with caplog.at_level("INFO", "dwa_fast"):
        assert classes_of(tmp_path / "set", ["airplane", "truck"]) == {"airplane": 1, "truck": 2}
    assert "set: 2 of its 3 classes are among the real ones; the others are left out" in caplog.text
    for real in (["dog", "truck", "zebra"], ["airplane", "dog", "truck", "zebra"]):
        with pytest.raises(
            InputError, match=r"set holds images of the classes dog, airplane, truck; the real images have .*: it lacks zebra"
        ):
            open_distilled(tmp_path / "set", 8, 3, real)
    own_set(tmp_path / "numbers", sorted(map(str, range(12))))
    padded = [f"{number:02d}" for number in range(12)]
    assert classes_of(tmp_path / "numbers", padded) == {name: sorted(map(str, range(12))).index(str(int(name))) for name in padded}
    (tmp_path / "set" / MANIFEST).write_text("{}")
    with caplog.at_level("WARNING", "dwa_fast"):
        assert classes_of(tmp_path / "set", ["dog", "truck", "zebra"]) == {"dog": 0, "truck": 1, "zebra": 2}  # as any set of numbers
    assert "its classes and settings are not known" in caplog.text


def test_a_set_of_ours_with_other_images_than_its_manifest_names_is_refused(tmp_path: Path) -> None:
    real = ["airplane", "dog", "truck"]
    own_set(tmp_path, real)
    image = next((tmp_path / "images").rglob("*.png"))
    name = image.relative_to(tmp_path / "images")
    copy = image.with_name("id999.png")
    copy.write_bytes(image.read_bytes())
    for folder in (tmp_path, tmp_path / "images"):
        with pytest.raises(
            InputError, match=rf"holds other images than its manifest names: {name.parent}/id999.png does not belong to the set"
        ):
            open_distilled(folder, 8, 3, real)
    image.unlink()
    with pytest.raises(InputError, match=rf"{name} is missing; dwa-fast verify names all of them"):
        open_distilled(tmp_path, 8, 3, real)
    image.write_bytes(copy.read_bytes())
    copy.unlink()
    assert classes_of(tmp_path, real) == {"airplane": 0, "dog": 1, "truck": 2}


@pytest.mark.parametrize("damage", ["", "[]", '{"format": 3'])
def test_a_set_of_ours_without_a_manifest_that_can_be_read_is_matched_by_number(tmp_path: Path, damage: str) -> None:
    own_set(tmp_path, ["airplane", "dog", "truck"])
    (tmp_path / MANIFEST).unlink()
    if damage:
        (tmp_path / MANIFEST).write_text(damage)
    assert classes_of(tmp_path, ["airplane", "dog", "truck"]) == {"airplane": 0, "dog": 1, "truck": 2}


@pytest.mark.parametrize("per_class", [0, -1])
def test_less_than_one_image_per_class_is_refused(tmp_path: Path, per_class: int) -> None:
    own_set(tmp_path, ["airplane", "dog", "truck"])
    for skip in (False, True):
        with pytest.raises(InputError, match=rf"per_class must be an integer of at least 1, got {per_class}"):
            open_distilled(tmp_path, 8, 3, ["airplane", "dog", "truck"], per_class=per_class, skip_bad_images=skip)


def test_a_set_of_ours_of_another_size_is_refused(tmp_path: Path) -> None:
    own_set(tmp_path, ["cat", "dog"], size=16)
    with pytest.raises(InputError, match="holds images of 16 × 16 pixels, not 8 × 8; pass --size 16"):
        open_distilled(tmp_path, 8, 3, ["cat", "dog"])
    with pytest.raises(InputError, match="holds images of 3 channels, got a mean and std of 1"):
        open_distilled(tmp_path, 16, 1, ["cat", "dog"])


def test_more_classes_by_name_are_cut(tmp_path: Path) -> None:
    for number, name in enumerate(("ant", *WNIDS)):
        write_image(tmp_path / name / "0.png", 20 * number)
    assert classes_of(tmp_path, WNIDS) == {name: number + 1 for number, name in enumerate(WNIDS)}


def test_numbers_that_are_names_or_places_are_refused(tmp_path: Path) -> None:
    """Real classes 0 … 11, sorted 0, 1, 10, 11, 2, …: folder 2 may be class 2, or the third one, 10."""
    real = sorted(map(str, range(12)))
    for name in ("class_{}", "new{:03d}", "{:05d}"):
        folder = tmp_path / name[:3].strip("{:")
        for number in range(12):
            write_image(folder / name.format(number) / "0.png", 20 * number)
        with pytest.raises(InputError, match=r"the same numbers in another order .*; rename the folders as the real classes"):
            open_distilled(folder, 8, 3, real)
    for number in range(12):
        write_image(tmp_path / "alike" / f"class_{number:03d}" / "0.png", 20 * number)
    named = sorted(f"class_{number}" for number in range(12))
    assert classes_of(tmp_path / "alike", named) == {name: int(name[6:]) for name in named}


def test_images_beyond_a_thousand_are_sorted_by_number(tmp_path: Path) -> None:
    for index in (2, 998, 999, 1000, 1001):
        write_image(tmp_path / "new000" / f"class000_id{index:03d}.png", index % 200)
    for per_class, last in ((3, "id999"), (4, "id1000")):
        data, _ = open_distilled(tmp_path, 8, 3, ["cat"], per_class=per_class)
        assert data.files[-1] == f"new000/class000_{last}.png"


def test_a_folder_of_several_sets_is_refused(tmp_path: Path) -> None:
    for name in ("dwa", "sre2l"):
        own_set(tmp_path / name, ["dog", "airplane", "truck"])
    with pytest.raises(InputError, match=r"is no distilled set, but holds dwa, sre2l; name one of them, such as .*dwa$"):
        open_distilled(tmp_path, 8, 3, WNIDS)

"""Loaders, each on small files in the real format."""

from __future__ import annotations

import hashlib
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from dwa_fast import InputError
from dwa_fast.config import DataConfig
from dwa_fast.data.datasets import digits, load
from dwa_fast.data.pixels import normalise
from dwa_fast.recipes import recipe
from tests.data.image_files import FOLDER, classes, write_image


def test_digits_are_split_by_class_without_overlap() -> None:
    train, test = digits("train", 16), digits("test", 16)
    assert (len(train.labels), len(test.labels)) == (1347, 450)
    assert test.labels.bincount().min() >= 43
    assert train.pixels.shape == (1347, 1, 16, 16)
    both = torch.cat([train.pixels, test.pixels]).flatten(1)
    assert len(both.unique(dim=0)) > 1790  # a digit that stood in both halves would be missing here
    images = normalise(train.load(range(1347)), recipe("digits").data)
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01


@pytest.mark.parametrize(("layout", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_from_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any, classes: int) -> None:
    kind: Any = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[layout]
    folder = tmp_path / kind.base_folder
    folder.mkdir()

    def store(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    rows = np.arange(4 * 3072, dtype=np.int64).reshape(4, 3072) % 251
    batch = {"data": rows.astype(np.uint8), "labels" if classes == 10 else "fine_labels": [0, 1, classes - 1, 1]}
    monkeypatch.setattr(kind, "train_list", [store("train", batch)])
    monkeypatch.setattr(kind, "test_list", [store("test", batch)])
    name, checksum = store("meta", {kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": name, "md5": checksum})
    data = load(DataConfig(layout=layout, size=32, classes=classes), tmp_path, "train")
    assert data.labels.tolist() == [0, 1, classes - 1, 1]
    assert data.load([2]).shape == (1, 3, 32, 32)
    assert int(data.load([2])[0, 1, 0, 2]) == rows[2, 1024 + 2]
    (folder / "train").write_bytes(b"damaged")
    with pytest.raises(
        InputError, match=r"holds neither an intact .* nor folders train and test .*, or pass --download to fetch the first"
    ):
        load(DataConfig(layout=layout, size=32), tmp_path, "train")


def test_train_and_val_folders(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "n01" / "a.png")
    write_image(tmp_path / "val" / "n01" / "a.png", (0, 0, 0))
    assert load(FOLDER, tmp_path, "train").load([0]).max() == 255
    assert load(FOLDER, tmp_path, "test").load([0]).max() == 0


def test_imagenet_layout(tmp_path: Path) -> None:
    """Real details: .JPEG in capitals, a CMYK file, a grey one, a PNG under another name, lists beside the folders, bare test images."""
    train = tmp_path / "train"
    write_image(train / "n01440764" / "n01440764_10026.JPEG", size=(50, 37))
    write_image(train / "n01440764" / "n01440764_9.JPEG", 128, size=(9, 31))
    (train / "n02105855").mkdir()
    Image.new("CMYK", (40, 30), (0, 255, 51, 20)).save(train / "n02105855" / "n02105855_1.JPEG", format="JPEG", quality=100)
    Image.new("RGB", (40, 30), (1, 2, 3)).save(train / "n02105855" / "n02105855_2933.JPEG", format="PNG")
    (train / "LOC_train_solution.csv").write_text("")
    write_image(tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00000293.JPEG", (0, 0, 0))
    write_image(tmp_path / "val" / "n02105855" / "ILSVRC2012_val_00000001.JPEG")
    write_image(tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG")
    data = load(FOLDER, tmp_path, "train")
    assert data.class_names == ["n01440764", "n02105855"]
    assert [data.name(index) for index in (0, 3)] == ["n01440764/n01440764_10026.JPEG", "n02105855/n02105855_2933.JPEG"]
    colours = data.load(range(4)).flatten(2).float().mean(2).round().int().tolist()
    assert colours == [[254, 0, 50], [128, 128, 128], [235, 0, 188], [1, 2, 3]]
    test = load(FOLDER, tmp_path, "test")
    assert test.labels.tolist() == [0, 1]
    assert test.load([0]).max() == 0


def test_tiny_imagenet_layout(tmp_path: Path) -> None:
    """Real details: images one folder further down, boxes beside them, lists of names, and test images without labels."""
    for name in ("n02", "n01"):
        write_image(tmp_path / "train" / name / "images" / f"{name}_0.JPEG", size=(64, 64))
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
    for name, colour in (("val_0.JPEG", (0, 0, 0)), ("val_1.JPEG", (255, 255, 255))):
        write_image(tmp_path / "val" / "images" / name, colour, size=(64, 64))
    write_image(tmp_path / "test" / "images" / "test_0.JPEG")
    for name in ("wnids.txt", "words.txt"):
        (tmp_path / name).write_text("n02\nn01\n")
    table = tmp_path / "val" / "val_annotations.txt"
    table.write_text("val_0.JPEG\tn02\t0\t0\t62\t62\nval_1.JPEG\tn01\t0\t0\t62\t62\n")
    config = DataConfig(layout="tiny", size=64, classes=200)  # a part of it, as wnids.txt says
    train = load(config, tmp_path, "train")
    assert train.class_names == ["n01", "n02"]
    assert [train.name(index) for index in range(2)] == ["n01/images/n01_0.JPEG", "n02/images/n02_0.JPEG"]
    test = load(config, tmp_path, "test")
    assert test.labels.tolist() == [1, 0]
    assert test.load([1]).min() == 255
    for names, message in (("n01\nn02\nn03\n", "lists classes without images: n03"), ("n02\n", "does not list classes: n01")):
        (tmp_path / "wnids.txt").write_text(names)
        with pytest.raises(InputError, match=f"wnids.txt {message}"):
            load(config, tmp_path, "train")
    (tmp_path / "wnids.txt").unlink()
    with pytest.raises(InputError, match="has 2 classes, expected 200"):
        load(config, tmp_path, "train")
    table.write_text("val_0.JPEG\tn99\t0\t0\t62\t62\n")
    with pytest.raises(InputError, match=r"val_annotations.txt names class 'n99', which has no folder in"):
        load(config, tmp_path, "test")


def test_tiny_imagenet_sorted_into_class_folders(tmp_path: Path) -> None:
    """As many scripts leave it: no table, and the held-out images in folders as the others."""
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            write_image(tmp_path / split / name / "images" / "0.JPEG")
    write_image(tmp_path / "test" / "images" / "test_0.JPEG")
    assert load(DataConfig(layout="tiny", size=8), tmp_path, "test").labels.tolist() == [0, 1]


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder; expected one with a sub-folder of images per class"):
        load(FOLDER, tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="has no class folders"):
        load(FOLDER, tmp_path, "train")
    write_image(tmp_path / "full" / "a.png")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(InputError, match=r"class folder .*hollow has 0 images, expected some"):
        load(FOLDER, tmp_path, "train")
    with pytest.raises(InputError, match="has no 'val' or 'test' folder with the held-out images"):
        load(FOLDER, tmp_path, "test")
    with pytest.raises(InputError, match="lie in a folder; name it with --data"):
        load(FOLDER, None, "train")
    (tmp_path / "hollow").rmdir()
    with pytest.raises(InputError, match="has 1 classes, expected 1000"):
        load(DataConfig(layout="folder", size=8, classes=1000), tmp_path, "train")
    with pytest.raises(InputError, match="cifar10 images are 32 pixels wide, got size 16"):
        load(DataConfig(layout="cifar10", size=16), tmp_path, "train")


def test_a_share_of_the_training_images_is_held_out_in_place_of_the_test_images(tmp_path: Path) -> None:
    """Class by class, the same ones every time, and never a test image."""
    config = DataConfig(layout="digits", size=8, held_out_share=0.2)
    train, held_out, whole = load(config, None, "train"), load(config, None, "test"), load(replace(config, held_out_share=0), None, "train")
    counts = whole.labels.bincount()
    assert held_out.labels.bincount().tolist() == (0.2 * counts).round().to(torch.int64).tolist()
    assert (train.labels.bincount() + held_out.labels.bincount()).tolist() == counts.tolist()
    parts = [row.tobytes() for data in (train, held_out) for row in data.load(range(len(data.labels))).numpy()]
    assert sorted(parts) == sorted(row.tobytes() for row in whole.load(range(len(whole.labels))).numpy())
    assert torch.equal(load(config, None, "test").labels, held_out.labels)

    for name in ("cat", "dog"):
        for index in range(4):
            write_image(tmp_path / "train" / name / f"{index}.png", index)
    files = [load(replace(FOLDER, held_out_share=0.25), tmp_path, "train"), load(replace(FOLDER, held_out_share=0.25), tmp_path, "test")]
    assert [len(data.labels) for data in files] == [6, 2]
    names = [data.name(index) for data in files for index in range(len(data.labels))]
    assert sorted(names) == [f"{name}/{index}.png" for name in ("cat", "dog") for index in range(4)]
    with pytest.raises(InputError, match=r"class 'cat' has 4 training images, of which a share of 0\.1 cannot be held out"):
        load(replace(FOLDER, held_out_share=0.1), tmp_path, "train")


def test_a_folder_of_held_out_images_is_no_class(tmp_path: Path) -> None:
    classes(tmp_path, "cat", "dog")
    write_image(tmp_path / "val" / "cat" / "0.png")
    with pytest.raises(InputError, match="has a folder 'val', but no 'train' beside it"):
        load(FOLDER, tmp_path, "train")
    assert load(FOLDER, tmp_path, "test").class_names == ["cat"]


def test_one_part_of_a_data_set_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    classes(tmp_path / "train", "cat", "dog")
    classes(tmp_path / "val", "cat", "dog")
    for part in ("train", "val"):
        with pytest.raises(InputError, match=rf"{part} is one part of a data set; pass the folder that holds it, {tmp_path}$"):
            load(FOLDER, tmp_path / part, "train")
    (tmp_path / "train").rename(tmp_path / "photos")
    assert load(FOLDER, tmp_path / "photos", "train").class_names == ["cat", "dog"]
    assert load(FOLDER, tmp_path / "val", "train").class_names == ["cat", "dog"]


def test_tiny_imagenet_of_other_classes(tmp_path: Path) -> None:
    config = DataConfig(layout="tiny", size=8)
    classes(tmp_path / "train", "n01", "n02")
    write_image(tmp_path / "val" / "images" / "0.png")
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png\tn02\t0\n")
    for split in ("train", "test"):
        with pytest.raises(InputError, match="names no image of class 'n01', which has a folder in"):
            load(config, tmp_path, split)  # type: ignore[arg-type]
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    assert load(config, tmp_path, "test").class_names == ["n02"]
    (tmp_path / "val" / "val_annotations.txt").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "train")
    classes(tmp_path / "val", "n02")
    (tmp_path / "val" / "images").rename(tmp_path / "val" / "n03")
    with pytest.raises(InputError, match=r"val has class folders that .*train lacks: n03, and it lacks n01"):
        load(config, tmp_path, "test")


def test_the_held_out_images_of_two_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val", "test"):
        write_image(tmp_path / split / "a" / f"{split}.png")
    with caplog.at_level("INFO", "dwa_fast"):
        assert [load(FOLDER, tmp_path, split).name(0) for split in ("train", "test")] == ["a/train.png", "a/test.png"]
    assert caplog.messages == [f"{tmp_path}: the held-out images are those in 'test'; those in 'val' are not used"]


@pytest.mark.parametrize("layout", ["cifar10", "cifar100"])
def test_cifar_as_class_folders(tmp_path: Path, layout: Any) -> None:
    for split in ("train", "test"):
        classes(tmp_path / split, "airplane", "dog")
    config = DataConfig(layout=layout, size=32, classes=2)
    assert load(config, tmp_path, "test").class_names == ["airplane", "dog"]
    with pytest.raises(InputError, match="has 2 classes, expected 10"):
        load(replace(config, classes=10), tmp_path, "train")


def test_test_images_are_cut_as_torchvision_does(tmp_path: Path) -> None:
    """Resize(256), CenterCrop(224) of the released program; training images keep all of their shorter side."""
    from torchvision.transforms import v2

    rows, columns = torch.arange(375)[:, None].expand(375, 500), torch.arange(500)[None].expand(375, 500)
    gradient = np.stack([columns * 255 // 499, rows * 255 // 374, (rows + columns) * 255 // 873], 2).astype(np.uint8)
    for split in ("train", "val"):
        path = tmp_path / split / "cat" / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(gradient).save(path)
    config = recipe("imagenet").data
    assert (config.test_crop, config.test_resize) == (0.875, 256)
    assert recipe("folder").data.test_resize == 224
    one = replace(config, classes=None)
    test, train = (load(one, tmp_path, split).load([0])[0].float() for split in ("test", "train"))  # type: ignore[arg-type]
    wanted = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(Image.fromarray(gradient))
    assert float((test - wanted).abs().max()) <= 1
    whole = v2.Compose([v2.Resize(224), v2.CenterCrop(224), v2.PILToTensor()])(Image.fromarray(gradient))
    assert float((train - whole).abs().max()) <= 1
    assert float(test[0, 0, 0]) > float(train[0, 0, 0]) + 10  # x begins further inside


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("test", ["test", "val", "valid", "validation"])
def test_usual_names_of_the_two_folders(tmp_path: Path, train: str, test: str, caplog: pytest.LogCaptureFixture) -> None:
    """They are no classes."""
    caplog.set_level("INFO", "dwa_fast")
    for split in (train, test):
        for name in ("cat", "dog"):
            write_image(tmp_path / split / name / "0.png")
    config = DataConfig(layout="folder", size=8)
    for split in ("train", "test"):
        assert load(config, tmp_path, split).class_names == ["cat", "dog"]  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is one part of a data set; pass the folder that holds it"):
        load(config, tmp_path / test, "train")
    for other in {"test", "val", "valid"} - {test}:
        write_image(tmp_path / other / "cat" / "0.png")
        write_image(tmp_path / other / "dog" / "0.png")
    load(config, tmp_path, "test")
    assert re.search(r"the held-out images are those in 'test'; those in '.*', '.*' are not used", caplog.text)


def test_what_cannot_be_downloaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--download fetches CIFAR alone"):
        load(FOLDER, tmp_path, "train", download=True)

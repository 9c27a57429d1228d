"""Data sets of real images: scikit-learn's digits, CIFAR, Tiny-ImageNet and folders of class folders, as square images of one size."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dwa_fast.config import DataConfig, check_choice, check_integer
from dwa_fast.data.class_names import class_numbers, shown
from dwa_fast.data.folders import class_folders, image_folder
from dwa_fast.data.images import FileSet, ImageSet, MemorySet
from dwa_fast.errors import InputError
from dwa_fast.io.files import sorted_scandir
from dwa_fast.seeding import generator

log = logging.getLogger("dwa_fast")

Split = Literal["train", "test"]

DIGITS_TEST_SHARE = 0.25
_TINY_TABLE = Path("val", "val_annotations.txt")
_TINY_LIST = "wnids.txt"
_CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # torchvision's folder names
_TRAIN_FOLDERS, _TEST_FOLDERS = ("train", "training"), ("test", "val", "valid", "validation")


def load(
    config: DataConfig,
    folder: str | Path | None,
    split: Split,
    *,
    download: bool = False,
) -> ImageSet:
    """The real images of a split.

    Args:
        config: of a recipe, such as `recipe("cifar100").data`.
        folder: root of the data; None for digits.
        download: whether CIFAR may be downloaded into the folder.
    Raises:
        TypeError: config is no DataConfig.
        InputError: the data do not exist, cannot be downloaded, or do not have the layout of `config`; they have another number of classes,
            different classes in both splits, or too few images of a class for a validation split.
    """
    if not isinstance(config, DataConfig):
        raise TypeError(f"config must be a DataConfig, such as recipe('cifar100').data, got {type(config).__name__}")
    folder = None if folder is None else Path(folder)
    check_choice("split", split, Split)
    share = config.held_out_share
    data = _open(config, folder, "train" if share else split, download)
    if config.layout == "tiny" and folder and (folder / _TINY_LIST).is_file():  # a part of the data set lists its own classes
        _check_listed(folder / _TINY_LIST, data.class_names)
    elif config.classes is not None and len(data.class_names) != config.classes:
        raise InputError(f"{folder or config.layout} has {len(data.class_names)} classes, expected {config.classes}")
    if share:
        data = _part(data, share, split)
    return replace(data, resize=config.test_resize) if split == "test" and isinstance(data, FileSet) else data


def _part(data: MemorySet | FileSet, share: float, split: Split) -> MemorySet | FileSet:
    """The training or validation part of the training images; `share` is the fraction for validation, chosen per class with a fixed seed.

    Raises:
        InputError: a class has too few images for both parts.
    """
    chosen = torch.zeros(len(data.labels), dtype=torch.bool)
    for label, name in enumerate(data.class_names):
        own = (data.labels == label).nonzero().flatten()
        count = round(share * len(own))
        if not 0 < count < len(own):
            raise InputError(f"class {name!r} has {len(own)} training images, of which a share of {share:g} cannot be held out")
        chosen[own[generator(0, "held out", label).permutation(len(own))[:count]]] = True
    return data.select((chosen if split == "test" else ~chosen).nonzero().flatten().tolist())


def _open(config: DataConfig, folder: Path | None, split: Split, download: bool) -> MemorySet | FileSet:
    channels = config.channels
    if download and config.layout not in _CIFAR:
        raise InputError(f"--download fetches CIFAR alone (--recipe cifar10 or cifar100), not data of layout {config.layout!r}")
    if config.layout == "digits":
        if folder is not None:
            raise InputError(f"the digits come with scikit-learn and take no --data, got {folder}; your own images are --recipe folder")
        return digits(split, config.size)
    if folder is None:
        raise InputError(f"data of layout {config.layout!r} lie in a folder; name it with --data")
    if config.layout in _CIFAR:
        archive = (folder / _CIFAR[config.layout]).is_dir()
        if archive or download or not any((folder / name).is_dir() for name in (*_TRAIN_FOLDERS, *_TEST_FOLDERS)):
            if config.size != 32:
                raise InputError(f"{config.layout} images are 32 pixels wide, got size {config.size}")
            return _cifar(config.layout, folder, split, download)
    if config.layout == "tiny" and (folder / _TINY_TABLE).is_file() and not (split == "train" and config.held_out_share):
        test = _tiny_test(folder, config.size, channels)  # read for both splits, to compare their classes
        return test if split == "test" else image_folder(_train_folder(folder), config.size, channels)
    held_out = ("val",) if config.layout == "tiny" else _TEST_FOLDERS  # the images in Tiny-ImageNet's folder "test" have no labels
    if split == "test":
        data, train = image_folder(_test_folder(folder, held_out), config.size, channels), _first_of(folder, _TRAIN_FOLDERS)
        return _numbered_alike(data, train) if train else data
    data = image_folder(_train_folder(folder), config.size, channels)
    test_folder = None if config.held_out_share else _labelled(folder, held_out)
    if test_folder:
        class_numbers(class_folders(test_folder), data.class_names, test_folder, data.folder)
    return data


def digits(split: Split, size: int) -> MemorySet:
    """scikit-learn's 1797 handwritten digits, grey, resized from 8 to `size` pixels; a quarter of each class is the test split.

    Args:
        split: "train" (1347 images) or "test" (450). size: height and width, pixels, at least 1.
    Raises:
        InputError: an unknown split, or a size that is no such number.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_choice("split", split, Split)
    check_integer("size", size, 1)
    source = load_digits()
    parts = train_test_split(np.arange(len(source.target)), test_size=DIGITS_TEST_SHARE, stratify=source.target, random_state=0)
    chosen = np.sort(parts[0 if split == "train" else 1])
    pixels = torch.from_numpy(source.images[chosen]).float()[:, None] / 16
    pixels = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(source.target[chosen]).to(torch.int64)
    return MemorySet((pixels * 255).round().to(torch.uint8), labels, [str(digit) for digit in range(10)])


def _train_folder(folder: Path) -> Path:
    """The sub-folder of the training images if there is one (as in ImageNet), else the folder itself.

    Raises:
        InputError: there is a folder of test images, but none of training images: `val` would count as a class.
    """
    if found := _first_of(folder, _TRAIN_FOLDERS):
        return found
    whole = folder.resolve().parent
    if folder.resolve().name in (*_TRAIN_FOLDERS, *_TEST_FOLDERS) and _first_of(whole, _TRAIN_FOLDERS):
        raise InputError(f"{folder} is one part of a data set; pass the folder that holds it, {folder.parent if folder.name else whole}")
    for name in _TEST_FOLDERS:
        if (folder / name).is_dir():
            raise InputError(
                f"{folder} has a folder {name!r}, but no 'train' beside it that holds the class folders of the training images"
            )
    return folder


def _test_folder(folder: Path, names: Sequence[str]) -> Path:
    """The sub-folder of the test images."""
    labelled = [name for name in names if _labelled(folder, (name,))]
    if len(labelled) > 1:
        others = ", ".join(map(repr, labelled[1:]))
        log.info("%s: the held-out images are those in %r; those in %s are not used", folder, labelled[0], others)
    found = _labelled(folder, names) or _first_of(folder, names)
    if found is None:
        wanted = " or ".join(repr(name) for name in reversed(names[:2]))
        raise InputError(f"{folder} has no {wanted} folder with the held-out images; --held-out-share takes some from the training images")
    return found


def _first_of(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these sub-folders that is there."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _labelled(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these sub-folders that has class folders; ImageNet's test folder has none."""
    places = (folder / name for name in names if (folder / name).is_dir())
    return next((place for place in places if any(os.path.isdir(entry) for entry in sorted_scandir(str(place)))), None)


def _numbered_alike(data: FileSet, train: Path) -> FileSet:
    """Relabel test images with the class numbers and names of the training images."""
    names = class_folders(train)
    numbers = class_numbers(data.class_names, names, data.folder, train)
    return replace(data, labels=torch.tensor(numbers)[data.labels], class_names=names)


def _cifar(layout: str, folder: Path, split: Split, download: bool) -> MemorySet:
    import torchvision.datasets

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[layout]
    try:
        source = kind(root=str(folder), train=split == "train", download=download)
    except RuntimeError as error:
        raise InputError(
            f"{folder} holds neither an intact {_CIFAR[layout]} nor folders train and test with a sub-folder of images per class; "
            "put one of the two there, or pass --download to fetch the first"
        ) from error
    pixels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    return MemorySet(pixels, torch.tensor(source.targets), list(source.classes))


def _check_listed(path: Path, class_names: Sequence[str]) -> None:
    """Raise InputError unless a file of Tiny-ImageNet lists these classes, one per line."""
    try:
        listed = {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for names, what in ((listed - set(class_names), "lists classes without images"), (set(class_names) - listed, "does not list classes")):
        if names:
            raise InputError(f"{path} {what}: {shown(sorted(names))}")


def _tiny_test(folder: Path, size: int, channels: int) -> FileSet:
    """Tiny-ImageNet's test images, whose labels are in a table instead of class folders."""
    table, train = folder / _TINY_TABLE, folder / "train"
    try:
        rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise InputError(f"{table} cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{table} is empty; expected a file name, a tab and a class in each line")
    for row in rows:
        if len(row) < 2 or row[0] in ("", "..") or "/" in row[0]:
            raise InputError(f"{table} must hold a file name, a tab and a class in each line, got {row[:2]}")
    own = sorted({row[1] for row in rows})
    names = class_folders(train) if train.is_dir() else own
    if own != names:
        foreign, missing = sorted(set(own) - set(names)), sorted(set(names) - set(own))
        raise InputError(
            f"{table} names class {foreign[0]!r}, which has no folder in {train}"
            if foreign
            else f"{table} names no image of class {missing[0]!r}, which has a folder in {train}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    files = [row[0] for row in rows]
    return FileSet(folder / "val" / "images", files, torch.tensor([numbers[row[1]] for row in rows]), names, size, channels)

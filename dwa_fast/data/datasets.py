"""Data sets of real images: scikit-learn's digits, CIFAR, Tiny-ImageNet and folders of class folders, as square images of one size."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dwa_fast.config import DataConfig, Normalisation, check_choice
from dwa_fast.data.set_layout import image_root
from dwa_fast.errors import InputError
from dwa_fast.io.decode import READERS, BadImageError, check_image, decode
from dwa_fast.io.files import sorted_scandir, walk_files
from dwa_fast.seeding import generator

log = logging.getLogger("dwa_fast")

Split = Literal["train", "test"]

DIGITS_TEST_SHARE = 0.25
_TINY_TABLE = Path("val", "val_annotations.txt")
_TINY_LIST = "wnids.txt"
_CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # torchvision's folder names
_TEST_FOLDERS = ("test", "val")
_UNREAD = (".gif", ".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl")  # of images that are left out
_SHOWN = 5  # classes or files that an error message names


class ImageSet(Protocol):
    """Labelled images of one size."""

    @property
    def labels(self) -> Tensor:
        """Class of each image, [N] int64."""

    @property
    def class_names(self) -> list[str]:
        """Class names, by label."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    def name(self, index: int) -> str:
        """Name of an image within the set, independent of the location of the set."""

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images [n, C, S, S], uint8."""


@dataclass(frozen=True)
class MemorySet:
    """Images held in memory."""

    pixels: Tensor  # [N, C, S, S] uint8
    labels: Tensor  # [N] int64
    class_names: list[str]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def select(self, indices: Sequence[int]) -> MemorySet:
        """A subset, in the given order."""
        return replace(self, pixels=self.pixels[list(indices)], labels=self.labels[list(indices)])

    def name(self, index: int) -> str:
        """The index as text."""
        return str(index)

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images [n, C, S, S], uint8."""
        return self.pixels[torch.as_tensor(indices, dtype=torch.int64)]


@dataclass(frozen=True)
class FileSet:
    """Image files, decoded on demand: shorter side resized, then a centre crop."""

    folder: Path
    files: list[str]  # paths relative to the folder, sorted class by class
    labels: Tensor  # [N] int64
    class_names: list[str]
    size: int
    channels: int
    resize: int | None = None  # length of the shorter side before the centre crop; None: `size`

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self.channels, self.size, self.size

    def name(self, index: int) -> str:
        """Path of the file, relative to the folder."""
        return self.files[index]

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images [n, C, S, S], uint8.

        Raises:
            BadImageError: a file is not an image.
            InputError: a file cannot be read.
        """
        if len(indices) == 1:  # decoded in this thread, which may itself run a task of READERS
            return self._read(indices[0])[None]
        return torch.stack(list(READERS.map(self._read, indices)))

    def select(self, indices: Sequence[int]) -> FileSet:
        """A subset, in the given order."""
        return replace(self, files=[self.files[index] for index in indices], labels=self.labels[list(indices)])

    def faults(self) -> dict[int, str]:
        """Read every file; gives the indices of those that cannot be decoded, with the cause.

        Raises:
            InputError: a file cannot be opened or read.
        """
        causes = READERS.map(self._fault, range(len(self.files)))
        return {index: cause for index, cause in enumerate(causes) if cause is not None}

    def _read(self, index: int) -> Tensor:
        return decode(self.folder / self.files[index], self.size, self.channels, resize=self.resize)

    def _fault(self, index: int) -> str | None:
        try:
            check_image(self.folder / self.files[index], self.channels)
        except BadImageError as error:
            return error.cause
        return None


def to_unit(
    pixels: Tensor,  # any shape, uint8
) -> Tensor:  # float32 in [0, 1]
    """pixels / 255 on their own device, the same bits on each: divided by a tensor, since CUDA multiplies by the reciprocal of a number."""
    return pixels.float() / torch.full((), 255.0, device=pixels.device)


def normalise(
    pixels: Tensor,  # [N, C, H, W], uint8 as `ImageSet.load` gives them, or floating point in [0, 1]
    normalisation: Normalisation,
) -> Tensor:  # [N, C, H, W]
    """(pixels − mean) / std per channel, with the pixels scaled to [0, 1].

    Raises:
        InputError: the pixels are integers other than uint8.
    """
    if pixels.dtype == torch.uint8:
        pixels = to_unit(pixels)
    elif not pixels.is_floating_point():
        raise InputError(f"pixels must be uint8, or floating point in [0, 1], got {pixels.dtype}")
    mean, std = (torch.tensor(value).to(pixels)[:, None, None] for value in (normalisation.mean, normalisation.std))
    return (pixels - mean) / std


def denormalise(
    images: Tensor,  # [N, C, H, W], normalised
    normalisation: Normalisation,
) -> Tensor:  # [N, C, H, W] in [0, 1]
    """images · std + mean per channel: undoes `normalise`, up to rounding."""
    mean, std = (torch.tensor(value).to(images)[:, None, None] for value in (normalisation.mean, normalisation.std))
    return images * std + mean


def to_levels(
    pixels: Tensor,  # [n, C, H, W] in [0, 1], on any device
) -> Tensor:  # [n, C, H, W] uint8 on the CPU
    """Pixels as image files hold them: clamped to [0, 1], times 255, rounded."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


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
        InputError: the data do not exist, do not have the layout of `config`, have another number of classes, different classes in both
            splits, or too few images of a class for a validation split.
    """
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
    if config.layout == "digits":
        if folder is not None:
            raise InputError(f"the digits come with scikit-learn and take no --data, got {folder}; your own images are --recipe folder")
        return digits(split, config.size)
    if folder is None:
        raise InputError(f"data of layout {config.layout!r} lie in a folder; name it with --data")
    if config.layout in _CIFAR:
        archive = (folder / _CIFAR[config.layout]).is_dir()
        if archive or download or not any((folder / name).is_dir() for name in ("train", *_TEST_FOLDERS)):
            if config.size != 32:
                raise InputError(f"{config.layout} images are 32 pixels wide, got size {config.size}")
            return _cifar(config.layout, folder, split, download)
    if config.layout == "tiny" and (folder / _TINY_TABLE).is_file() and not (split == "train" and config.held_out_share):
        test = _tiny_test(folder, config.size, channels)  # read for both splits, to compare their classes
        return test if split == "test" else image_folder(_train_folder(folder), config.size, channels)
    held_out = ("val",) if config.layout == "tiny" else _TEST_FOLDERS  # the images in Tiny-ImageNet's folder "test" have no labels
    if split == "test":
        data = image_folder(_test_folder(folder, held_out), config.size, channels)
        return _numbered_alike(data, folder / "train") if (folder / "train").is_dir() else data
    data = image_folder(_train_folder(folder), config.size, channels)
    test_folder = None if config.held_out_share else _labelled(folder, held_out)
    if test_folder:
        class_numbers(class_folders(test_folder), data.class_names, test_folder, data.folder)
    return data


def digits(split: Split, size: int) -> MemorySet:
    """scikit-learn's 1797 handwritten digits, grey, resized from 8 to `size` pixels; a quarter of each class is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    parts = train_test_split(np.arange(len(source.target)), test_size=DIGITS_TEST_SHARE, stratify=source.target, random_state=0)
    chosen = np.sort(parts[0 if split == "train" else 1])
    pixels = torch.from_numpy(source.images[chosen]).float()[:, None] / 16
    pixels = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(source.target[chosen]).to(torch.int64)
    return MemorySet((pixels * 255).round().to(torch.uint8), labels, [str(digit) for digit in range(10)])


def image_folder(folder: str | Path, size: int, channels: int = 3, per_class: int | None = None, *, by_number: bool = False) -> FileSet:
    """A folder with one sub-folder of images per class, or a distilled set; classes and files in sorted order.

    Hidden files and folders are ignored. Class folders and files may be symbolic links; links to folders inside a class folder are not
    followed. Warns of what is left out that may be meant as an image, and of images in folders inside a class folder.

    Args:
        per_class: use only the first files of each class.
        by_number: sort the files of a class by the numbers in their names: id999 before id1000.
    Raises:
        InputError: the folder does not exist or has no class folders, or one of them is empty or has fewer than `per_class` images.
    """
    folder = image_root(Path(folder))
    names = class_folders(folder)
    files: list[str] = []
    labels: list[int] = []
    left_out = [entry.name for entry in sorted_scandir(str(folder)) if _is_named_as_image(entry.name) and not os.path.isdir(entry)]
    for label, name in enumerate(names):
        members = list(_images(folder, name, left_out))
        if by_number:
            members.sort(key=natural)
        if len(members) < (per_class or 1):
            wanted = f"at least {per_class}" if per_class else "some"
            raise InputError(f"class folder {folder / name} has {len(members)} images, expected {wanted}")
        members = members[:per_class]
        files += members
        labels += [label] * len(members)
    _warn(folder, files, left_out)
    return FileSet(folder, files, torch.tensor(labels), names, size, channels)


def _warn(folder: Path, files: Sequence[str], left_out: Sequence[str]) -> None:
    """Say what a reader may not expect: files that are no part of the data, and the class of images that lie deeper."""
    if left_out:
        log.warning(
            "%s: left out %d files or links, such as %s; only .png, .jpg, .webp, .bmp, .tif, .ppm and .pgm files in class folders are read",
            *(folder, len(left_out), left_out[0]),
        )
    deeper = [file for file in files if file.count(os.sep) > 1 and f"{os.sep}images{os.sep}" not in file]  # Tiny-ImageNet has "images"
    if deeper:
        label = deeper[0].partition(os.sep)[0]
        log.warning("%s: %d images lie in folders inside class folders; %s counts as class %r", folder, len(deeper), deeper[0], label)


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares numbers in names by value: 2 before 10, id999 before id1000."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the sub-folders, without hidden ones.

    Raises:
        InputError: `folder` is not a folder, cannot be read, or has no sub-folders.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with a sub-folder of images per class")
    names = [entry.name for entry in sorted_scandir(str(folder)) if os.path.isdir(entry) and not entry.name.startswith(".")]
    if not names:
        raise InputError(f"{folder} has no class folders; expected one sub-folder of images per class")
    return names


def _images(folder: Path, class_name: str, left_out: list[str]) -> Iterator[str]:
    """Relative paths of the images of a class, sorted, without hidden ones (._1.png of macOS, .ipynb_checkpoints).

    Links to folders and what else is named as an image are appended to `left_out`.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    prefix = os.path.join(folder, "")
    for entry in walk_files(prefix + class_name):
        path = entry.path[len(prefix) :]
        if f"{os.sep}." in path:
            continue
        if path.lower().endswith(IMG_EXTENSIONS) and (entry.is_file(follow_symlinks=False) or os.path.isfile(entry)):
            yield path
        elif _is_named_as_image(path) or os.path.isdir(entry):
            left_out.append(path)


def _is_named_as_image(name: str) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return not name.startswith(".") and name.lower().endswith((*IMG_EXTENSIONS, *_UNREAD))


def _train_folder(folder: Path) -> Path:
    """The sub-folder "train" if there is one (as in ImageNet), else the folder itself.

    Raises:
        InputError: there is a folder of test images, but none of training images: `val` would count as a class.
    """
    if (folder / "train").is_dir():
        return folder / "train"
    whole = folder.resolve().parent
    if folder.resolve().name in ("train", *_TEST_FOLDERS) and (whole / "train").is_dir():
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
        log.info("%s: the held-out images are those in %r; those in %r are not used", folder, *labelled)
    found = _labelled(folder, names) or next((folder / name for name in names if (folder / name).is_dir()), None)
    if found is None:
        wanted = " or ".join(repr(name) for name in reversed(names))
        raise InputError(f"{folder} has no {wanted} folder with the held-out images; --held-out-share takes some from the training images")
    return found


def _labelled(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these sub-folders that has class folders; ImageNet's test folder has none."""
    places = (folder / name for name in names if (folder / name).is_dir())
    return next((place for place in places if any(os.path.isdir(entry) for entry in sorted_scandir(str(place)))), None)


def _numbered_alike(data: FileSet, train: Path) -> FileSet:
    """Relabel test images with the class numbers and names of the training images."""
    names = class_folders(train)
    numbers = class_numbers(data.class_names, names, data.folder, train)
    return replace(data, labels=torch.tensor(numbers)[data.labels], class_names=names)


def class_numbers(names: Sequence[str], train_names: Sequence[str], folder: Path, train: Path) -> list[int]:
    """The training label of each class folder of the test images.

    Names match if they are equal, or equal up to zero padding of the number at their end.

    Raises:
        InputError: the two sets of classes differ.
    """
    names = as_named(names, train_names)
    if set(names) != set(train_names):
        foreign, missing = sorted(set(names) - set(train_names)), sorted(set(train_names) - set(names))
        parts = [f"{folder} has class folders that {train} lacks: {shown(foreign)}"] if foreign else []
        parts += [f"{folder if not foreign else 'it'} lacks {shown(missing)}"] if missing else []
        raise InputError(f"{', and '.join(parts)}; training and held-out images must be of the same classes")
    return [train_names.index(name) for name in names]


def as_named(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """`names` in the spelling of `wanted` if they differ only in zero padding (2 for 02, class_2 for class_002); else unchanged."""
    own, known = _by_number(names), _by_number(wanted)
    if not own or not known or set(own) != set(known):
        return list(names)
    found = {name: known[number] for number, name in own.items()}
    return [found[name] for name in names]


def _by_number(names: Sequence[str]) -> dict[tuple[str, int], str] | None:
    """Names by prefix and number at their end; None if a name has no number, or two have the same prefix and number."""
    matches = [re.fullmatch(r"([^0-9]*)([0-9]+)", name) for name in names]
    found = {(match[1], int(match[2])): match[0] for match in matches if match}
    return found if len(found) == len(names) else None


def shown(names: Sequence[str], at_most: int = _SHOWN) -> str:
    """Names as text, at most `at_most` of them."""
    more = f", … ({len(names)} in all)" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


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

"""Export of distilled sets as files in order or tensors, and import of images as a set."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dwa_fast.config import ImageFormat, Normalisation, Progress, StorageConfig
from dwa_fast.data.folders import image_folder
from dwa_fast.data.manifest import IMAGE_NAME, read_manifest
from dwa_fast.data.pixels import normalise
from dwa_fast.data.set_layout import image_root, is_set
from dwa_fast.errors import InputError
from dwa_fast.io.decode import decode
from dwa_fast.io.files import atomic_write, output_folder
from dwa_fast.sets.store import BatchSpec, ImageStore

_NUMBERS = re.compile(r"new(\d+)/class\d+_id(\d+)")  # in the names of a set of ours
_NUMBERED = re.compile(r"\D*(\d+)")  # new007, 00007, 7: class folders of other programs
_BATCH = 100  # images that are written at the same time


@dataclass(frozen=True)
class SetFiles:
    """The image files of a set, class after class."""

    root: Path  # of the class folders
    files: list[str]  # below it
    labels: list[int]
    class_names: list[str]
    checksums: dict[str, str] = field(default_factory=dict)  # of a set with a manifest
    settings: dict[str, Any] = field(default_factory=dict)  # with which it was made, if recorded

    def content(self, index: int) -> bytes:
        """A file, as it is. Raises InputError as `read`."""
        return self.read(index)[0]

    def read(self, index: int) -> tuple[bytes, tuple[int, int, int]]:
        """A file, as it is, with the shape of its image: channels, 0 where it is neither grey nor RGB, height and width.

        Raises:
            InputError: it cannot be read, is no whole image, or has changed since the manifest was written.
        """
        path = self.root / self.files[index]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        wanted = self.checksums.get(self.files[index])
        if wanted and hashlib.sha256(content).hexdigest() != wanted:
            raise InputError(f"{path} has changed since it was written; the command that made the set makes it again")
        return content, _shape(content, str(path))


def open_files(folder: Path, ipc: int | None = None) -> SetFiles:
    """The files of a set of ours, or of class folders that are named by classes or numbered from 0.

    Args:
        ipc: take the first images of each class only.
    Raises:
        InputError: it is not such a folder, is incomplete, or a class has fewer images.
    """
    source = _own(folder) if is_set(folder) else _other(folder)
    chosen, counts = [], [0] * len(source.class_names)
    for index, label in enumerate(source.labels):
        if ipc is None or counts[label] < ipc:
            chosen.append(index)
            counts[label] += 1
    if min(counts, default=0) < (ipc or 1):
        label = counts.index(min(counts))
        raise InputError(f"class {source.class_names[label]!r} of {folder} has {counts[label]} images, expected at least {ipc or 1}")
    files, labels = ([values[index] for index in chosen] for values in (source.files, source.labels))
    return SetFiles(source.root, files, labels, source.class_names, source.checksums, source.settings)  # type: ignore[arg-type]


def _own(folder: Path) -> SetFiles:
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise InputError(f"{folder} is not complete; run the command that started it again to resume")
    places = {}
    for name in manifest["images"]:
        match = _NUMBERS.match(name)
        assert match, f"{name} does not match {IMAGE_NAME.pattern}, which read_manifest checks"
        places[name] = int(match[1]), int(match[2])
    files = sorted(places, key=places.__getitem__)
    labels = [places[name][0] for name in files]
    if max(labels, default=0) >= len(manifest["class_names"]):
        raise InputError(f"{folder} has images of class {max(labels)}, but {len(manifest['class_names'])} classes")
    return SetFiles(image_root(folder), files, labels, manifest["class_names"], manifest["images"], manifest["settings"])


def _other(folder: Path) -> SetFiles:
    """Class folders that are numbered from 0 are taken by their numbers, others in sorted order; files in the order of their numbers."""
    data = image_folder(folder, 1)
    matches = [_NUMBERED.fullmatch(name) for name in data.class_names]
    numbers = [int(match[1]) for match in matches if match]
    if sorted(numbers) != list(range(len(data.class_names))):
        numbers = list(range(len(data.class_names)))
    labels = [numbers[label] for label in data.labels.tolist()]
    order = sorted(range(len(labels)), key=lambda index: (labels[index], _natural(data.files[index])))
    names = [name for _, name in sorted(zip(numbers, data.class_names, strict=True))]
    return SetFiles(data.folder, [data.files[index] for index in order], [labels[index] for index in order], names)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts id999 before id1000."""
    return [(int(digits or -1), text) for digits, text in re.findall(r"([0-9]+)|([^0-9]+)", name)]


def write_folders(source: SetFiles, folder: Path, progress: Progress | None = None) -> None:
    """Copy the files into class folders by number, `00007/00012.png`, as RDED names them; unchanged.

    Raises:
        InputError: a file cannot be read, or the folder cannot be written.
    """
    indices = _indices(source.labels)
    for place, (name, label, index) in enumerate(zip(source.files, source.labels, indices, strict=True)):
        path = folder / f"{label:05d}" / f"{index:05d}{Path(name).suffix.lower()}"
        output_folder(path.parent)
        with atomic_write(path, folder) as target:
            target.write_bytes(source.content(place))
        if progress:
            progress(place + 1, len(source.files))


def as_tensors(
    source: SetFiles,
    normalisation: Normalisation,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:  # [N, C, S, S] float32, normalised; [N] int64
    """All images of a set, class after class, in the order of DC, DM and MTT.

    Raises:
        InputError: an image is damaged, no square, or of another size than the first one.
    """
    images: Tensor | None = None
    for place, name in enumerate(source.files):
        path = source.root / name
        height, width = source.read(place)[1][1:]
        if images is None:
            images = torch.empty(len(source.files), normalisation.channels, height, height)
        if height != width or height != images.shape[2]:
            raise InputError(f"{path} has {height} × {width} pixels; tensors need squares of one size, here {images.shape[2]}")
        images[place] = normalise(decode(path, height, normalisation.channels)[None], normalisation)[0]
        if progress:
            progress(place + 1, len(source.files))
    assert images is not None, "open_files refuses sets without images"
    return images, torch.tensor(source.labels, dtype=torch.int64)


def write_set(
    folder: Path,
    images: Callable[[int], bytes | Tensor],
    labels: Sequence[int],
    class_names: Sequence[str],
    settings: dict[str, Any],
    progress: Progress | None = None,
) -> int:
    """Make a set with a manifest from given images, or resume making it. The order within a class is preserved.

    Args:
        images: gives each image, [C, H, W] uint8, or a PNG or JPEG file, which stays as it is.
        settings: what the set is made from, for the manifest; JSON values.
    Returns:
        the number of images that were written now.
    Raises:
        InputError: a class has no image, an image is none, they are of several formats, or the folder holds another set.
    """
    empty = set(range(len(class_names))) - set(labels)
    if empty:
        raise InputError(f"class {class_names[min(empty)]!r} (number {min(empty)} of {len(class_names)}) has no image")
    kind, shape = _common(images, len(labels))
    storage = StorageConfig(image_format=kind, losses_every=0)
    unknown = {"jpeg_quality": None} if kind == "jpeg" else {}
    places = {place: row for row, place in enumerate(zip(labels, _indices(labels), strict=True))}
    batches = list(_batches(labels, len(class_names)))
    store = ImageStore(folder, {**settings, **shape, **unknown}, class_names, storage)
    missing = store.unfinished(batches)
    if missing:
        store.begin()
    made = sum(len(batch.labels) for batch in missing)
    done = len(labels) - made
    for batch in missing:
        content = [images(places[image]) for image in batch.images]
        store.write(batch, [each for each in content if isinstance(each, bytes)] or torch.stack(content))  # type: ignore[arg-type]
        done += len(batch.labels)
        if progress:
            progress(done, len(labels))
    store.finish(batches)
    return made


def _batches(labels: Sequence[int], classes: int) -> Iterator[BatchSpec]:
    """Batches of image `index` of each class that has so many, at most a hundred at a time."""
    counts = torch.tensor(labels).bincount(minlength=classes)
    number = 0
    for index in range(int(counts.max())):
        for part in (counts > index).nonzero().flatten().split(_BATCH):
            yield BatchSpec(number, index, part.tolist())
            number += 1


def _indices(labels: Sequence[int]) -> list[int]:
    """For each image, the number of earlier images of its class."""
    counts: dict[int, int] = {}
    source = []
    for label in labels:
        source.append(counts.get(label, 0))
        counts[label] = source[-1] + 1
    return source


def _common(images: Callable[[int], bytes | Tensor], count: int) -> tuple[ImageFormat, dict[str, list[int]]]:
    """The format of all images, and their shape where they have one and are grey or RGB."""
    kinds, shapes = set(), set()
    for row in range(count):
        content = images(row)
        if isinstance(content, Tensor):
            return "png", {"image_shape": list(content.shape)}
        shape = _shape(content, f"the image in row {row}")
        shapes.add(shape)
        kinds.add("png" if content.startswith(b"\x89PNG") else "jpeg")
    if len(kinds) > 1:
        raise InputError("the images are PNG and JPEG files; a set has one format")
    kind: ImageFormat = "png" if kinds == {"png"} else "jpeg"
    (shape,) = shapes if len(shapes) == 1 else ((0, 0, 0),)
    return kind, {"image_shape": list(shape)} if shape[0] in (1, 3) else {}


def _shape(content: bytes, name: str) -> tuple[int, int, int]:
    """Channels, height and width of a PNG or JPEG file, read whole; 0 channels where they are neither grey nor RGB.

    Raises:
        InputError: it is no whole image of these.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:  # no other: Pillow's EPS reader starts Ghostscript
            image.load()
            return {"L": 1, "RGB": 3}.get(image.mode, 0), image.height, image.width
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise InputError(f"{name} is no whole PNG or JPEG image") from error

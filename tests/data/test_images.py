"""Sets of images in memory and in files: indices, masks, items, and what is refused."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dwa_fast import FileSet, InputError, MemorySet, digits, image_folder
from dwa_fast.data.subsets import some_classes
from dwa_fast.io.decode import _THREADS, READERS
from tests.data.image_files import write_image

LEVELS = [10, 20, 30, 40]  # of the images, two of each class


def in_memory() -> MemorySet:
    pixels = torch.tensor(LEVELS, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    return MemorySet(pixels, torch.tensor([0, 0, 1, 1]), ["ant", "bee"])


def in_files(folder: Path) -> FileSet:
    for place, level in enumerate(LEVELS):
        write_image(folder / ("ant", "bee")[place // 2] / f"{place}.png", level)
    return image_folder(folder, 8, 1)


@pytest.fixture(params=["memory", "files"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> MemorySet | FileSet:
    return in_memory() if request.param == "memory" else in_files(tmp_path)


def levels(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    "indices",
    [
        [1, 3],
        (1, 3),
        range(1, 4, 2),
        torch.tensor([1, 3]),
        torch.tensor([1, 3], dtype=torch.int32),
        np.array([1, 3]),
        torch.tensor([False, True, False, True]),
        [False, True, False, True],
    ],
    ids=str,
)
def test_indices_and_masks_choose_images_and_labels_alike(data: MemorySet | FileSet, indices: Any) -> None:
    chosen = data.select(indices)
    assert (levels(data.load(indices)), levels(chosen.load([0, 1])), chosen.labels.tolist()) == ([20, 40], [20, 40], [0, 1])
    assert len(chosen) == 2


def test_no_images_are_an_empty_batch(data: MemorySet | FileSet) -> None:
    assert data.load([]).shape == (0, 1, 8, 8)
    assert len(data.select([])) == 0
    assert len(data.select(torch.zeros(4, dtype=torch.bool))) == 0


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([4], "indices must lie in 0 … 3, got 4"),
        ([-1], "indices must lie in 0 … 3, got -1"),
        ([True, False], r"expected indices of images, or a mask of 4 booleans, got torch.bool of shape \(2,\)"),
        ([0.5], r"expected indices of images, or a mask of 4 booleans, got torch.float32 of shape \(1,\)"),
        (torch.zeros(2, 2, dtype=torch.int64), r"expected indices of images, or a mask of 4 booleans, got torch.int64 of shape \(2, 2\)"),
    ],
)
def test_other_indices_are_refused(data: MemorySet | FileSet, indices: Any, message: str) -> None:
    for use in (data.load, data.select):
        with pytest.raises(InputError, match=message):
            use(indices)


def test_items_are_images_with_their_labels(data: MemorySet | FileSet) -> None:
    """So that a loader of PyTorch takes a set as it is."""
    assert [(int(image[0, 0, 0]), label) for image, label in data] == [(10, 0), (20, 0), (30, 1), (40, 1)]
    image, label = data[-1]
    assert (image.shape, image.dtype, int(image[0, 0, 0]), label) == ((1, 8, 8), torch.uint8, 40, 1)
    ((images, labels),) = DataLoader(data, batch_size=4)  # type: ignore[arg-type]
    assert (levels(images), labels.tolist()) == (LEVELS, [0, 0, 1, 1])


def test_a_set_is_shown_in_one_line(data: MemorySet | FileSet, tmp_path: Path) -> None:
    where = f" from {tmp_path}" if isinstance(data, FileSet) else ""
    assert repr(data) == f"{type(data).__name__}(4 images of 2 classes, [1, 8, 8]{where})"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pixels": torch.zeros(2, 1, 8, 8)},
            r"pixels must be a tensor \[N, C, S, S\] of uint8, got torch.float32 of shape \(2, 1, 8, 8\)",
        ),
        ({"pixels": np.zeros((2, 1, 8, 8), np.uint8)}, "pixels must be a tensor .* got ndarray"),
        ({"labels": [0, 1]}, r"labels must be a tensor \[2\] of integers, got list"),
        ({"labels": torch.tensor([False, True])}, r"labels must be a tensor \[2\] of integers, got torch.bool of shape \(2,\)"),
        ({"labels": torch.tensor([0.0, 1.0])}, r"labels must be a tensor \[2\] of integers, got torch.float32 of shape \(2,\)"),
        ({"labels": torch.tensor([0])}, r"labels must be a tensor \[2\] of integers, got torch.int64 of shape \(1,\)"),
        ({"labels": torch.tensor([0, 2])}, r"labels must lie in 0 … 1, one number for each of the class_names, got 0 … 2"),
        ({"labels": torch.tensor([-1, 1])}, r"labels must lie in 0 … 1, one number for each of the class_names, got -1 … 1"),
        ({"class_names": "ab"}, "class_names must be a list of names, got 'ab'"),
    ],
)
def test_what_cannot_be_a_set_in_memory_is_refused(change: dict[str, Any], message: str) -> None:
    good = {"pixels": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "labels": torch.tensor([0, 1]), "class_names": ["ant", "bee"]}
    with pytest.raises(InputError, match=message):
        MemorySet(**(good | change))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_other_integers_are_kept_as_int64(kind: torch.dtype) -> None:
    """As an index a tensor of bytes would be a mask."""
    data = MemorySet(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1], dtype=kind), ["ant", "bee"])
    assert data.labels.dtype == torch.int64
    assert some_classes(data, [1]).indices.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_class": 0}, "per_class must be an integer of at least 1, got 0"),
        ({"per_class": -1}, "per_class must be an integer of at least 1, got -1"),
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"size": (8, 8)}, r"size must be an integer of at least 1, got \(8, 8\)"),
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
    ],
)
def test_numbers_of_a_folder_out_of_range_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    in_files(tmp_path)
    with pytest.raises(InputError, match=message):
        image_folder(**{"folder": tmp_path, "size": 8, **arguments})


@pytest.mark.parametrize("split", ["trian", "Train", "val"])
def test_an_unknown_split_of_the_digits_is_refused(split: str) -> None:
    with pytest.raises(InputError, match=f"unknown split '{split}'; known: train, test"):
        digits(split, 8)  # type: ignore[arg-type]


def _load(data: FileSet, sender: Any) -> None:
    sender.send(levels(data.load(range(4))))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_process_can_decode_images(tmp_path: Path) -> None:
    """The threads that decode are its parent's; as those of a loader's workers on Linux they would never answer."""
    data = in_files(tmp_path)
    barrier = threading.Barrier(_THREADS)
    list(READERS.map(lambda _: barrier.wait(60), range(_THREADS)))  # starts all threads: with fewer a child would start the others
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_load, args=(data, sender))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a process with threads should not fork
        child.start()
    try:
        assert receiver.poll(60)
        assert receiver.recv() == LEVELS
    finally:
        child.kill()
        child.join()

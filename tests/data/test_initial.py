"""Initial images: drawn, in order, from tensor files or none; bad files named or skipped; a smaller ipc is the start of a larger one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dwa_fast import InputError, distill
from dwa_fast.config import InitialConfig
from dwa_fast.data.folders import image_folder
from dwa_fast.data.images import FileSet, MemorySet
from dwa_fast.data.initial import initial_images
from dwa_fast.data.manifest import read_manifest
from dwa_fast.data.pixels import normalise
from dwa_fast.data.tensor_files import read_tensor
from tests.nets import SIZE, small_recipe, small_set, small_teacher

SHORT: dict[str, Any] = {"iterations": 2, "batch_size": 4, "backend": "reference"}
CONFIG = small_recipe(**SHORT)


def write_files(folder: Path, classes: int = 10, count: int = 5) -> None:
    """Class folders of grey squares, each of its own level."""
    for label in range(classes):
        (folder / f"c{label}").mkdir(parents=True)
        for number in range(count):
            Image.new("L", (SIZE, SIZE), 20 * label + number).save(folder / f"c{label}" / f"{number}.png")


def files(folder: Path) -> FileSet:
    return image_folder(folder, SIZE, 1)


def levels(images: Tensor) -> list[int]:
    """The grey level of each square."""
    return (images[:, 0, 0, 0] * CONFIG.data.std[0] + CONFIG.data.mean[0]).mul(255).round().int().tolist()


def at(index: int, labels: Iterable[int]) -> list[tuple[int, int]]:
    """Image `index` of each of these classes."""
    return [(label, index) for label in labels]


def chosen(data: FileSet, ipc: int, *, seed: int = 0, **settings: Any) -> tuple[list[list[int]], dict[str, str]]:
    """Levels of the initial images, index by index, and what was skipped."""
    start = initial_images(data, CONFIG, InitialConfig(**settings), ipc=ipc, seed=seed)
    classes = range(len(data.class_names))
    return [levels(start.load(at(index, classes))) for index in range(ipc)], start.skipped


def test_sampled_images_are_the_seeded_sample() -> None:
    """Different images of their class, and for this seed always these."""
    data, wanted = small_set(), {7: [44, 46, 43], 2: [12, 17, 15]}
    start = initial_images(data, CONFIG, InitialConfig(), ipc=3, seed=1)
    for label, indices in wanted.items():
        assert len(set(indices)) == 3
        assert data.labels[indices].tolist() == [label] * 3
    for index in (2, 0):
        expected = data.load([wanted[label][index] for label in (7, 2)])
        assert torch.equal(start.load([(7, index), (2, index)]), normalise(expected, CONFIG.data))


def test_sorted_images_are_the_first_of_each_class(tmp_path: Path) -> None:
    write_files(tmp_path, classes=3)
    assert chosen(files(tmp_path), 2, initial_order="sorted") == ([[0, 20, 40], [1, 21, 41]], {})
    assert chosen(files(tmp_path), 2, initial_order="sorted", seed=9)[0] == [[0, 20, 40], [1, 21, 41]]
    data = small_set()
    start = initial_images(data, CONFIG, InitialConfig(initial_order="sorted"), ipc=2, seed=0)
    assert torch.equal(start.load([(9, 1), (0, 0), (9, 0)]), normalise(data.load([55, 0, 54]), CONFIG.data))
    assert torch.equal(start.load([(0, 1), (9, 1)]), normalise(data.load([1, 55]), CONFIG.data))


@pytest.mark.parametrize("order", ["sampled", "sorted"])
def test_a_smaller_ipc_is_the_start_of_a_larger_one(tmp_path: Path, order: str) -> None:
    write_files(tmp_path, classes=3)
    (tmp_path / "c1" / "0.png").write_bytes(b"")
    settings: dict[str, Any] = {"initial_order": order, "skip_bad_images": True}
    four, two = chosen(files(tmp_path), 4, **settings)[0], chosen(files(tmp_path), 2, **settings)[0]
    assert four[:2] == two
    assert sorted(row[1] for row in four) == [21, 22, 23, 24]


def test_bad_image_is_named_with_the_flag_that_skips_it(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "c3" / "1.png").write_bytes(b"no image")
    start = initial_images(files(tmp_path), CONFIG, InitialConfig(initial_order="sorted"), ipc=3, seed=0)
    start.load([(3, 0)])
    for _ in range(2):  # asked again it is still bad, and not passed over
        with pytest.raises(InputError, match=r"c3/1\.png is no image that can be read: .*; with --skip-bad-images the next image"):
            start.load(at(1, range(10)))


def test_bad_image_before_the_one_asked_for_is_found(tmp_path: Path) -> None:
    """Else the images of a set would depend on whether the flag was given before or after the first stop, and on who takes which item."""
    write_files(tmp_path)
    (tmp_path / "c3" / "1.png").write_bytes(b"no image")
    start = initial_images(files(tmp_path), CONFIG, InitialConfig(initial_order="sorted"), ipc=3, seed=0)
    with pytest.raises(InputError, match=r"c3/1\.png"):
        start.load([(3, 2)])


def test_skipped_images_do_not_depend_on_who_asks_when(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(tmp_path)
    for name in ("c3/1.png", "c3/2.png", "c8/0.png"):
        (tmp_path / name).write_bytes(b"")
    whole, skipped = chosen(files(tmp_path), 3, initial_order="sorted", skip_bad_images=True)
    assert [row[3] for row in whole] == [60, 63, 64]
    assert [row[8] for row in whole] == [161, 162, 163]
    assert skipped == dict.fromkeys(("c3/1.png", "c3/2.png", "c8/0.png"), "it is empty")
    assert sorted(record.getMessage() for record in caplog.records) == [f"skipped {name}: it is empty" for name in sorted(skipped)]
    other = initial_images(files(tmp_path), CONFIG, InitialConfig(initial_order="sorted", skip_bad_images=True), ipc=3, seed=0)
    for index, labels in ((2, [8, 3]), (0, [3]), (1, [3, 8])):
        assert levels(other.load(at(index, labels))) == [whole[index][label] for label in labels]


def test_class_of_too_few_good_images(tmp_path: Path) -> None:
    write_files(tmp_path, count=2)
    (tmp_path / "c3" / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match="class 'c3' has 1 images that can be read and 1 that cannot, and image 2 is needed"):
        chosen(files(tmp_path), 2, skip_bad_images=True, initial_order="sorted")
    with pytest.raises(InputError, match="class 'c0' has 2 images, but ipc 3 needs as many initial ones"):
        initial_images(files(tmp_path), CONFIG, InitialConfig(skip_bad_images=True), ipc=3, seed=0)


def test_file_that_cannot_be_opened_is_never_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files or a lost network drive say nothing about the image; another worker might well read it."""
    write_files(tmp_path)
    data = files(tmp_path)
    (tmp_path / "c0" / "0.png").unlink()
    with pytest.raises(InputError, match=r"c0/0\.png cannot be read: No such file or directory$"):
        chosen(data, 1, skip_bad_images=True, initial_order="sorted")


def distil(data: FileSet | MemorySet, output: Path, ipc: int = 2, config: Any = CONFIG, **settings: Any) -> int:
    return distill(small_teacher(), data, config, ipc=ipc, output=output, initial=InitialConfig(**settings))


@pytest.mark.parametrize("label", [0, 3])
def test_manifest_records_what_was_skipped_and_keeps_to_it(tmp_path: Path, label: int, caplog: pytest.LogCaptureFixture) -> None:
    write_files(tmp_path / "data")
    damaged = tmp_path / "data" / f"c{label}" / "0.png"
    good = damaged.read_bytes()
    damaged.write_bytes(b"")
    settings: dict[str, Any] = {"initial_order": "sorted", "skip_bad_images": True}
    distil(files(tmp_path / "data"), tmp_path / "whole", 2, **settings)
    distil(files(tmp_path / "data"), tmp_path / "set", 1, **settings)
    manifest = read_manifest(tmp_path / "set")
    assert manifest["skipped"] == {f"c{label}/0.png": "it is empty"}
    assert manifest["settings"]["initial_order"] == "sorted"
    damaged.write_bytes(good)  # repaired in between: the set goes on as it began
    distil(files(tmp_path / "data"), tmp_path / "set", 2, initial_order="sorted")
    assert "real images have changed since the set was begun; only those that it skips may have been repaired" in caplog.text
    assert read_manifest(tmp_path / "set") == read_manifest(tmp_path / "whole")


def test_files_with_other_contents_are_other_images(tmp_path: Path) -> None:
    """Though their names are the same; but a damaged one may be repaired before anything is made of it."""
    write_files(tmp_path / "data")
    changed = tmp_path / "data" / "c3" / "4.png"
    good = changed.read_bytes()
    changed.write_bytes(b"")
    with pytest.raises(InputError, match="it is empty"):
        distil(files(tmp_path / "data"), tmp_path / "set", 5)
    changed.write_bytes(good)
    distil(files(tmp_path / "data"), tmp_path / "set", 1)
    whole = read_manifest(tmp_path / "set")
    changed.write_bytes((tmp_path / "data" / "c0" / "0.png").read_bytes())
    with pytest.raises(InputError, match=r"other settings \(real_images_digest was '.*', is '.*'\)"):
        distil(files(tmp_path / "data"), tmp_path / "set", 2)
    assert read_manifest(tmp_path / "set") == whole
    changed.write_bytes(good)
    assert distil(files(tmp_path / "data"), tmp_path / "set", 2) == 10


@pytest.mark.parametrize("inside", [".", "c0", "distilled"])
def test_a_set_is_not_written_among_the_real_images(tmp_path: Path, inside: str) -> None:
    """Its folder would be a class."""
    write_files(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"lies in .*data, whose folders are the classes of the real images"):
        distil(files(tmp_path / "data"), tmp_path / "data" / inside)
    assert sorted(tmp_path.rglob("*")) == before


def test_flag_may_be_given_after_the_first_stop(tmp_path: Path) -> None:
    write_files(tmp_path / "data")
    (tmp_path / "data" / "c3" / "1.png").write_bytes(b"")
    distil(files(tmp_path / "data"), tmp_path / "whole", initial_order="sorted", skip_bad_images=True)
    with pytest.raises(InputError, match="--skip-bad-images"):
        distil(files(tmp_path / "data"), tmp_path / "set", initial_order="sorted")
    assert distil(files(tmp_path / "data"), tmp_path / "set", initial_order="sorted", skip_bad_images=True) == 20
    assert read_manifest(tmp_path / "set") == read_manifest(tmp_path / "whole")


def test_other_order_is_another_set(tmp_path: Path) -> None:
    distil(small_set(), tmp_path)
    with pytest.raises(InputError, match="initial_order was 'sampled', is 'sorted'"):
        distil(small_set(), tmp_path, initial_order="sorted")


def save_tensors(folder: Path, contents: Sequence[Any]) -> None:
    for index, content in enumerate(contents):
        torch.save(content, folder / f"tensor_{index}.pt")


def test_tensors_are_taken_as_they_are(tmp_path: Path) -> None:
    tensors = [torch.rand(10, 1, SIZE, SIZE, dtype=kind) for kind in (torch.float32, torch.float64)]
    save_tensors(tmp_path, [tensors[0].requires_grad_(), tensors[1]])
    start = initial_images(small_set(), CONFIG, InitialConfig(initial_tensors=tmp_path), ipc=2, seed=0)
    for index, labels in ((1, [4, 5]), (0, [9]), (1, [0])):
        assert torch.equal(start.load(at(index, labels)), tensors[index][labels].detach().float())


def test_tensors_give_the_same_set_as_the_images_that_they_hold(tmp_path: Path) -> None:
    data = small_set()
    start = initial_images(data, CONFIG, InitialConfig(), ipc=2, seed=0)
    save_tensors(tmp_path, [start.load(at(index, range(10))) for index in range(2)])
    distil(data, tmp_path / "images")
    distil(data, tmp_path / "tensors", initial_tensors=tmp_path)
    images, tensors = read_manifest(tmp_path / "images"), read_manifest(tmp_path / "tensors")
    assert images["images"] == tensors["images"]
    assert len(tensors["settings"]["initial_tensors"]) == 64
    second = (tmp_path / "tensor_1.pt").read_bytes()
    torch.save(start.load(at(0, range(10))), tmp_path / "tensor_1.pt")
    with pytest.raises(InputError, match="made with other settings"):
        distil(data, tmp_path / "tensors", initial_tensors=tmp_path)
    (tmp_path / "tensor_1.pt").write_bytes(second)
    assert distil(data, tmp_path / "tensors", initial_tensors=tmp_path) == 0
    distil(data, tmp_path / "grown", 1, initial_tensors=tmp_path)
    assert distil(data, tmp_path / "grown", 2, initial_tensors=tmp_path) == 10
    assert read_manifest(tmp_path / "grown") == tensors


@pytest.mark.parametrize("initial", ["patches", "median"])
def test_what_chosen_images_would_ignore_is_refused(tmp_path: Path, initial: str) -> None:
    config = small_recipe(**SHORT, initial=initial)
    save_tensors(tmp_path, [torch.zeros(SHAPE)])
    with pytest.raises(InputError, match=f"initial '{initial}' chooses among the real images; leave out initial_tensors"):
        distil(small_set(), tmp_path / "set", 1, config, initial_tensors=tmp_path)
    with pytest.raises(InputError, match="leave out initial_order sorted"):
        distil(small_set(), tmp_path / "set", 1, config, initial_order="sorted", patch_candidates=6)
    assert not (tmp_path / "set").exists()


SHAPE = (10, 1, SIZE, SIZE)
WANTED = "expected one of shape (10, 1, 8, 8): an image per class, normalised"
TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "classes": (lambda: torch.zeros(100, 1, SIZE, SIZE), f"holds a tensor of shape (100, 1, 8, 8); {WANTED}"),
    "channels": (lambda: torch.zeros(10, 3, SIZE, SIZE), f"holds a tensor of shape (10, 3, 8, 8); {WANTED}"),
    "one image": (lambda: torch.zeros(1, SIZE, SIZE), f"holds a tensor of shape (1, 8, 8); {WANTED}"),
    "bytes": (lambda: torch.zeros(SHAPE, dtype=torch.uint8), f"holds a tensor of torch.uint8; {WANTED}, in floating point"),
    "NaN": (lambda: torch.full(SHAPE, float("nan")), "holds values that are NaN or infinite"),
    "list": (lambda: [torch.zeros(SHAPE)], f"holds no tensor but list; {WANTED}"),
    "dictionary": (lambda: {"images": torch.zeros(SHAPE)}, f"holds no tensor but dict; {WANTED}"),
    "meta": (lambda: torch.zeros(SHAPE, device="meta"), f"holds no plain tensor with values; {WANTED}"),
}


@pytest.mark.parametrize(("make", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_cannot_be_used(tmp_path: Path, make: Callable[[], Any], message: str) -> None:
    save_tensors(tmp_path, [make()])
    with pytest.raises(InputError, match=re.escape(f"tensor file {tmp_path / 'tensor_0.pt'} {message}")):
        read_tensor(tmp_path / "tensor_0.pt", SHAPE)


def test_missing_tensor_is_named_before_anything_is_made(tmp_path: Path) -> None:
    save_tensors(tmp_path, [torch.zeros(SHAPE)])
    with pytest.raises(InputError, match=r"tensor_1\.pt does not exist; ipc 2 needs 2 such files, from tensor_0\.pt on"):
        distil(small_set(), tmp_path / "set", initial_tensors=tmp_path)
    assert not (tmp_path / "set").exists()


def test_noise_start_needs_no_images(tmp_path: Path) -> None:
    """SRe2L looks at no real image: neither bad files nor classes that are too small matter to it."""
    write_files(tmp_path / "data", count=1)
    (tmp_path / "data" / "c3" / "0.png").write_bytes(b"")
    config = small_recipe(**SHORT, initial="noise", ascent="none")
    assert distil(files(tmp_path / "data"), tmp_path / "set", 2, config) == 20
    with pytest.raises(InputError, match="initial_tensors would not be used: a noise start without directed adjustment"):
        distil(files(tmp_path / "data"), tmp_path / "other", 2, config, initial_tensors=tmp_path)
    with pytest.raises(InputError, match=r"c3/0\.png is no image"):  # the adjustment follows the gradient of real images
        distil(files(tmp_path / "data"), tmp_path / "other", 1, small_recipe(**SHORT, initial="noise"))


def test_unknown_order() -> None:
    with pytest.raises(InputError, match="unknown initial_order 'random'; known: sampled, sorted"):
        InitialConfig(initial_order="random")  # type: ignore[arg-type]


def test_all_images_that_a_set_needs_are_read_before_the_first_batch(tmp_path: Path) -> None:
    """The last image of one class and a file of tensors at the end: nothing is computed before they are found."""
    write_files(tmp_path / "data")
    for name in ("c3/2.png", "c7/1.png"):
        (tmp_path / "data" / name).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"c3/2\.png is no image .*; with --skip-bad-images .* \(and images of 1 more classes\)"):
        distil(files(tmp_path / "data"), tmp_path / "set", ipc=3, initial_order="sorted")
    assert not read_manifest(tmp_path / "set")["images"]
    (tmp_path / "tensors").mkdir()
    for index in range(3):
        torch.save(torch.zeros(10, 1, SIZE, SIZE), tmp_path / "tensors" / f"tensor_{index}.pt")
    last = tmp_path / "tensors" / "tensor_2.pt"
    last.write_bytes(last.read_bytes()[:-100])
    start = initial_images(small_set(), CONFIG, InitialConfig(initial_tensors=tmp_path / "tensors"), ipc=3, seed=0)
    start.check(dict.fromkeys(range(10), 1))
    with pytest.raises(InputError, match=r"tensor_2\.pt"):
        start.check({0: 1, 4: 2})


def bright(images: Tensor) -> Tensor:
    """Logits by which class 0 is the likelier, and class 1 the less likely, the brighter an image is."""
    mean = images.mean((1, 2, 3))
    return torch.stack([mean, torch.zeros_like(mean)], 1)


def median_images(data: FileSet, ipc: int, **settings: Any) -> Any:
    config = small_recipe(**SHORT, initial="median")
    return initial_images(data, config, InitialConfig(**settings), ipc=ipc, seed=0, predict=bright)


def test_median_images_come_first(tmp_path: Path) -> None:
    """The median of the probability of each class, then the others from both sides in turn; a larger ipc only adds some."""
    write_files(tmp_path, classes=2, count=6)
    for label, wanted in ((0, [2, 3, 1, 4, 0, 5]), (1, [23, 22, 24, 21, 25, 20])):
        start = median_images(files(tmp_path), 6)
        start.check({label: 5})
        assert levels(start.load([(label, index) for index in range(6)])) == wanted
        assert start.settings == {}
    few = median_images(files(tmp_path), 2)
    few.check({0: 1, 1: 1})
    assert levels(few.load([(1, 1), (0, 0)])) == [22, 2]


def test_median_images_with_bad_files(tmp_path: Path) -> None:
    write_files(tmp_path, classes=2, count=4)
    (tmp_path / "c0" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"c0/1\.png.*with --skip-bad-images"):
        median_images(files(tmp_path), 2).check({0: 1})
    start = median_images(files(tmp_path), 3, skip_bad_images=True)
    start.check({0: 2})
    assert levels(start.load([(0, 0), (0, 1), (0, 2)])) == [2, 3, 0]
    assert list(start.skipped) == ["c0/1.png"]
    with pytest.raises(InputError, match="class 'c0' has 3 images that can be read and 1 that cannot, and image 4 is needed"):
        median_images(files(tmp_path), 4, skip_bad_images=True).check({0: 3})


def test_median_images_have_an_order_of_their_own(tmp_path: Path) -> None:
    write_files(tmp_path, classes=2)
    with pytest.raises(InputError, match="median images have an order of their own; leave out initial_order sorted"):
        median_images(files(tmp_path), 2, initial_order="sorted")

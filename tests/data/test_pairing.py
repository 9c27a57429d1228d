"""A teacher and the data that it is used with: what must agree, what is taken by name, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dwa_fast import InputError
from dwa_fast.config import Normalisation
from dwa_fast.data.pairing import open_teacher, read_classes
from dwa_fast.io.torch_files import write_archive
from dwa_fast.models.architectures import build
from dwa_fast.models.checkpoint import load_teacher
from tests.nets import alive

NAMES = ["cat", "dog", "eel"]
NORMAL = Normalisation(mean=(0.3,), std=(0.25,))


def checkpoint(path: Path, classes: int = 3, **facts: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    module = alive(build("small-resnet", classes=classes, channels=1, size=8))
    described = {"size": 8, "class_names": NAMES[:classes] if classes <= 3 else None, "mean": NORMAL.mean, "std": NORMAL.std, **facts}
    info = {"architecture": "small-resnet", "classes": classes, "channels": 1, **described}
    write_archive(path, {"state_dict": module.state_dict(), "dwa_fast": info})  # not save_teacher, which refuses a wrong description
    return module


def test_the_description_comes_back(tmp_path: Path) -> None:
    checkpoint(tmp_path / "t.pt")
    info = load_teacher(tmp_path / "t.pt")[1]
    assert (info.class_names, info.mean, info.std, info.size) == (NAMES, (0.3,), (0.25,), 8)
    content = torch.load(tmp_path / "t.pt", weights_only=True)
    for name in ("class_names", "mean", "std"):  # which a description may lack
        del content["dwa_fast"][name]
    torch.save(content, tmp_path / "old.pt")
    assert load_teacher(tmp_path / "old.pt")[1].class_names is None
    assert open_teacher(tmp_path / "old.pt", ["x", "y", "z"], Normalisation(mean=(0.9,), std=(1,)), size=8).outputs is None


DAMAGED: dict[str, dict[str, Any]] = {
    "too few names": {"class_names": ["cat"]},
    "a name twice": {"class_names": ["cat", "cat", "dog"]},
    "numbers": {"class_names": [1, 2, 3]},
    "text": {"class_names": "abc"},
    "three channels": {"mean": (0.1, 0.1, 0.1), "std": (1.0, 1.0, 1.0)},
    "no std": {"std": None},
    "std of 0": {"std": (0.0,)},
    "mean of text": {"mean": "0"},
}


@pytest.mark.parametrize("facts", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_description_that_cannot_be_is_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    checkpoint(tmp_path / "t.pt", **facts)
    with pytest.raises(InputError, match="describes a network that cannot be"):
        load_teacher(tmp_path / "t.pt")


def test_another_normalisation_or_size_is_refused_with_the_flags_to_pass(tmp_path: Path) -> None:
    checkpoint(tmp_path / "t.pt")
    open_teacher(tmp_path / "t.pt", NAMES, NORMAL, size=8)
    with pytest.raises(
        InputError, match=r"was trained on images of mean 0\.3 and std 0\.25, not mean 0\.5 and std 0\.25; pass --mean 0\.3"
    ):
        open_teacher(tmp_path / "t.pt", NAMES, Normalisation(mean=(0.5,), std=(0.25,)), size=8)
    with pytest.raises(InputError, match=r"was trained on images of 8 × 8 pixels, not 16 × 16; pass --size 8$"):
        open_teacher(tmp_path / "t.pt", NAMES, NORMAL, size=16)
    both = r"8 × 8 pixels, not 9 × 9 and mean .*; pass --size 8 --mean 0\.3 --std 0\.25$"
    with pytest.raises(InputError, match=both):
        open_teacher(tmp_path / "t.pt", NAMES, Normalisation(mean=(0.5,), std=(0.5,)), size=9)
    with pytest.raises(InputError, match=r"1 channels, not 3; pass --mean 0\.3 --std 0\.25"):
        open_teacher(tmp_path / "t.pt", NAMES, Normalisation(), size=8)


def test_classes_come_before_what_flags_can_change(tmp_path: Path) -> None:
    checkpoint(tmp_path / "t.pt")
    with pytest.raises(InputError, match="fox"):
        open_teacher(tmp_path / "t.pt", ["cat", "fox"], Normalisation(mean=(0.5,), std=(0.5,)), size=9)


def test_means_of_many_digits_are_passed_whole(tmp_path: Path) -> None:
    checkpoint(tmp_path / "t.pt", mean=(0.49139968,))
    with pytest.raises(InputError) as caught:
        open_teacher(tmp_path / "t.pt", NAMES, NORMAL, size=8)
    flags = re.search(r"--mean (\S+) --std (\S+)", str(caught.value))
    assert flags
    open_teacher(tmp_path / "t.pt", NAMES, Normalisation(mean=(float(flags[1]),), std=(float(flags[2]),)), size=8)


def test_outputs_are_taken_by_name(tmp_path: Path) -> None:
    """Logits of the data's classes, in the order of the data: the untouched teacher's, picked by hand."""
    module, images = checkpoint(tmp_path / "t.pt", class_names=["eel", "cat", "dog"]), torch.randn(5, 1, 8, 8)
    own = module(images)
    paired = open_teacher(tmp_path / "t.pt", NAMES, NORMAL, size=8)
    assert paired.outputs == [1, 2, 0]
    assert torch.equal(paired.module(images), own[:, [1, 2, 0]])
    assert not paired.module.training
    fewer = open_teacher(tmp_path / "t.pt", ["dog", "eel"], NORMAL, size=8)
    assert torch.equal(fewer.module(images), own[:, [2, 0]])
    assert torch.allclose(fewer.module(images).softmax(1).sum(1), torch.ones(5))
    with pytest.raises(
        InputError, match=r"names the classes eel, cat, dog; the data have cat, zebra, of which .* does not know zebra; --classes"
    ):
        open_teacher(tmp_path / "t.pt", ["cat", "zebra"], NORMAL, size=8)


def test_a_list_of_classes_names_the_outputs_of_any_checkpoint(tmp_path: Path) -> None:
    module, images = checkpoint(tmp_path / "own.pt", classes=5), torch.randn(4, 1, 8, 8)
    own = module(images)
    torch.save(module.state_dict(), tmp_path / "t.pth")
    options: dict[str, Any] = {"size": 8, "architecture": "small-resnet"}
    with pytest.raises(InputError, match=r"knows 5 classes, the data have 3; --classes FILE"):
        open_teacher(tmp_path / "t.pth", NAMES, NORMAL, **options)
    listed = tmp_path / "classes.txt"
    listed.write_text("\ufeff# of the teacher\nyak\neel\n\n  dog \nant\ncat\n", encoding="utf-8")
    for file in ("t.pth", "own.pt"):
        paired = open_teacher(tmp_path / file, NAMES, NORMAL, classes=listed, **options)
        assert paired.outputs == [4, 2, 1]
        assert torch.equal(paired.module(images), own[:, [4, 2, 1]])
    listed.write_text("n03 yak, grunting ox\nn01 cat\nn02 dog, hound\nn04 ant\nn05 eel\n")
    assert open_teacher(tmp_path / "t.pth", ["n01", "n02", "n05"], NORMAL, classes=listed, **options).outputs == [1, 2, 4]
    listed.write_text("cat\ndog\neel\n")
    with pytest.raises(InputError, match=r"t\.pth has 5 outputs, but .*classes\.txt names 3 classes"):
        open_teacher(tmp_path / "t.pth", NAMES, NORMAL, classes=listed, **options)


def test_a_list_in_the_order_of_the_data_changes_nothing(tmp_path: Path) -> None:
    checkpoint(tmp_path / "t.pt", class_names=["a", "b", "c"])
    (tmp_path / "classes.txt").write_text("cat\ndog\neel\n")
    assert open_teacher(tmp_path / "t.pt", NAMES, NORMAL, size=8, classes=tmp_path / "classes.txt").outputs is None


def test_bad_lists_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    with pytest.raises(InputError, match=r"classes\.txt cannot be read: No such file"):
        read_classes(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read: it is no text"):
        read_classes(path)
    path.write_text("# nothing\n\n")
    with pytest.raises(InputError, match="names no class; expected one class name a line"):
        read_classes(path)
    path.write_text("a\nb\na\n")
    with pytest.raises(InputError, match="names a more than once"):
        read_classes(path)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_classes(tmp_path)

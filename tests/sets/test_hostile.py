"""Names and files made to do harm: no code is run, and nothing is written outside of the output folder."""

from __future__ import annotations

import os
import pickle
import re
import struct
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

from dwa_fast import InputError, distill
from dwa_fast.commands.cli import run
from dwa_fast.commands.console import Console
from dwa_fast.config import DataConfig
from dwa_fast.data.datasets import load
from dwa_fast.data.folders import image_folder
from dwa_fast.data.images import MemorySet
from dwa_fast.data.manifest import read_manifest
from dwa_fast.data.tensor_files import read_tensor
from dwa_fast.errors import escape_control_chars
from dwa_fast.io.decode import BadImageError, decode
from dwa_fast.io.torch_files import read_archive
from dwa_fast.models.architectures import SmallResNet
from dwa_fast.models.checkpoint import load_teacher
from tests.hostile import POSTSCRIPT, Harmful, ghostscript
from tests.nets import SIZE, small_recipe, small_set, small_teacher


def test_the_canary_sings(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Harmful(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def repacked(path: Path, change: Callable[[bytes], bytes]) -> None:
    """An archive of torch.save with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def says_many(content: bytes) -> bytes:
    """A pickle whose storage of 4 values claims 2 ** 31 − 1."""
    changed, count = re.subn(rb"K\x04(?=N?t)", lambda match: b"J" + struct.pack("<i", 2**31 - 1), content)
    assert count == 1
    return changed


def huge(path: Path) -> None:
    torch.save(torch.zeros(4), path)
    repacked(path, says_many)


def huge_of_old(path: Path) -> None:
    torch.save(torch.zeros(4), path, _use_new_zipfile_serialization=False)
    path.write_bytes(says_many(path.read_bytes()))


FOREIGN = "it holds more than tensors ({}), which could run code and is left alone; where you trust the file, load it with the program"
ARCHIVES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "code": (
        lambda path, canary: torch.save({"state_dict": Harmful(canary)}, path),
        FOREIGN.format("posix.mkdir"),
    ),
    "code, old": (
        lambda path, canary: torch.save(Harmful(canary), path, _use_new_zipfile_serialization=False),
        FOREIGN.format("posix.mkdir"),
    ),
    "code, plain pickle": (lambda path, canary: path.write_bytes(pickle.dumps(Harmful(canary))), "it is a pickle, which could run code"),
    "module": (lambda path, canary: torch.save(small_teacher(), path), "dwa_fast.models.architectures.SmallResNet, "),
    "huge": (lambda path, canary: huge(path), "it is damaged"),
    "huge, old": (lambda path, canary: huge_of_old(path), "it is damaged"),
}


@pytest.mark.parametrize(("write", "message"), ARCHIVES.values(), ids=ARCHIVES.keys())
def test_archives(tmp_path: Path, outside: Path, write: Callable[[Path, Path], Any], message: str) -> None:
    path = tmp_path / "tensor_0.pt"
    write(path, outside / "canary")
    readers: list[Callable[[], Any]] = [
        lambda: read_archive(path, "file"),
        lambda: load_teacher(path, architecture="resnet18"),
        lambda: read_tensor(path, (10, 1, SIZE, SIZE)),
    ]
    for reader in readers:
        with pytest.raises(InputError, match=re.escape(message)):
            reader()


def description(**changes: Any) -> dict[str, Any]:
    return {"architecture": "small-resnet", "classes": 10, "channels": 1, "size": SIZE, "accuracy": None, **changes}


CANNOT_BE = "describes a network that cannot be: "
CHECKPOINTS: dict[str, tuple[Any, str]] = {
    "text": ({"dwa_fast": "hello"}, "does not describe its network as dwa-fast does"),
    "incomplete": ({"dwa_fast": {"architecture": "resnet18"}}, "does not describe its network as dwa-fast does"),
    "more": ({"dwa_fast": description(run="rm")}, "does not describe its network as dwa-fast does"),
    "architecture": ({"dwa_fast": description(architecture="../x")}, f"{CANNOT_BE}unknown architecture '../x'; known: resnet18"),
    "kind of architecture": ({"dwa_fast": description(architecture=["resnet18"])}, f"{CANNOT_BE}unknown architecture ['resnet18']"),
    "classes": ({"dwa_fast": description(classes=10**12)}, f"{CANNOT_BE}classes must be a finite number of at least 1 and at most 1.67"),
    "kind of classes": ({"dwa_fast": description(classes="10")}, f"{CANNOT_BE}classes must be an integer of at least 1, got '10'"),
    "channels": ({"dwa_fast": description(channels=10**9)}, f"{CANNOT_BE}channels must be a finite number of at least 1 and at most 3"),
    "size": ({"dwa_fast": description(size=10**9)}, f"{CANNOT_BE}size must be a finite number of at least 1 and at most 4096"),
    "accuracy": ({"dwa_fast": description(accuracy="\x1b[31m100")}, f"{CANNOT_BE}accuracy must be a finite number"),
    "many classes": (
        {"dwa_fast": description(classes=2**24), "state_dict": small_teacher().state_dict()},
        "does not fit a small-resnet with 16777216 classes",
    ),
    "expanded": ({"fc.weight": torch.zeros(1).expand(10**9, 512)}, "has shape (1000000000, 512), but does not hold as many values"),
    "without values": ({"fc.weight": torch.zeros(10**9, 512, device="meta")}, "but does not hold as many values"),
}


@pytest.mark.parametrize(("content", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpoints(tmp_path: Path, content: Any, message: str) -> None:
    weights = {} if "fc.weight" in content else {"state_dict": {"fc.weight": torch.zeros(2, 2)}}
    torch.save({**weights, **content}, tmp_path / "t.pt")
    with pytest.raises(InputError, match=re.escape(message)):
        load_teacher(tmp_path / "t.pt", architecture=None if "dwa_fast" in content else "resnet18")


def test_cifar_with_code_is_refused(tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / torchvision.datasets.CIFAR10.base_folder
    folder.mkdir()
    for name in [name for name, _ in torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list] + ["batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(Harmful(outside / "canary")))
    with pytest.raises(InputError, match="holds neither an intact cifar-10-batches-py nor folders train and test"):
        load(DataConfig(layout="cifar10", size=32), tmp_path, "train")


def test_postscript_in_disguise_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary, path = ghostscript(tmp_path, monkeypatch), tmp_path / "x.png"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(BadImageError, match="it is in none of the formats"):
        decode(path, 8, 3)
    assert not canary.exists()
    with pytest.raises(OSError, match=r"."), Image.open(path) as image:  # what Pillow does by itself
        image.load()
    assert canary.exists()


def grey(path: Path, level: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (SIZE, SIZE), level).save(path)


def test_links_and_loops_in_the_data(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    grey(data / "a" / "1.png")
    grey(data / "a" / "deep" / "2.png")
    grey(elsewhere / "3.png")
    (data / "a" / "4.png").symlink_to(elsewhere / "3.png")  # a file elsewhere: as people make subsets
    (data / "a" / "up").symlink_to("..")
    (data / "a" / "self.png").symlink_to("self.png")
    (data / "a" / "gone.png").symlink_to("nothing.png")
    (data / "a" / "folder.png").mkdir()
    (data / "b").symlink_to(elsewhere)
    (data / "loop").symlink_to("loop")
    (data / "all").symlink_to(".")
    found = image_folder(data, SIZE, 1)
    assert found.class_names == ["a", "all", "b"]
    assert found.files == ["a/1.png", "a/4.png", "a/deep/2.png", "all/a/1.png", "all/a/4.png", "all/a/deep/2.png", "b/3.png"]
    assert found.load(range(7)).shape == (7, 1, SIZE, SIZE)


TABLES: dict[str, tuple[bytes, str]] = {
    "outside": (b"../../outside/precious.txt\tn01\t0\n", "must hold a file name, a tab and a class in each line, got ['../../outside"),
    "parent": (b"..\tn01\n", "must hold a file name, a tab and a class in each line, got ['..', 'n01']"),
    "no tab": (b"val_0.JPEG n01\n", "must hold a file name, a tab and a class in each line, got ['val_0.JPEG n01']"),
    "class outside": (b"x.JPEG\t../n01\n", "names class '../n01', which has no folder in"),
    "escape": (b"x.JPEG\t\x1b[31m\n", r"names class '\x1b[31m', which has no folder in"),
    "bytes": (b"\xff\xfe\tn01\n", "cannot be read: 'utf-8' codec can't decode"),
    "empty": (b"\n", "is empty; expected a file name, a tab and a class in each line"),
}


@pytest.mark.parametrize(("content", "message"), TABLES.values(), ids=TABLES.keys())
def test_tables_of_tiny_imagenet(tmp_path: Path, outside: Path, content: bytes, message: str) -> None:
    grey(tmp_path / "data" / "train" / "n01" / "images" / "x.JPEG")
    (tmp_path / "data" / "val" / "images").mkdir(parents=True)
    (tmp_path / "data" / "val" / "val_annotations.txt").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        load(DataConfig(layout="tiny", size=SIZE), tmp_path / "data", "test")


NAMES = [
    "a..",
    "a.b$",
    "-rf",
    "$(touch canary)",
    unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "é"),
    "\x1b[31mred\x07",
    "two\nlines\r[bold]",
    "x" * 255,
    os.fsdecode(b"\xff\xfe"),
]


def test_hostile_class_names(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command: the folders of a set are numbers, names stand in the manifest alone, and what is printed is plain."""
    monkeypatch.chdir(tmp_path)
    for level, name in enumerate(NAMES):
        grey(tmp_path / "data" / name / "\x1b]0;title\x07\n.png", 20 * level)
    (tmp_path / "data" / NAMES[7] / "\n\x1b[31m.png").write_bytes(b"")
    arguments = [
        "synthesize",
        "--recipe",
        "folder",
        "--data",
        "data",
        "--teacher",
        "t.pt",
        "--output",
        "set",
        "--ipc",
        "1",
        "--backend",
        "reference",
    ]
    small = [
        "--size",
        str(SIZE),
        "--iterations",
        "2",
        "--steps",
        "1",
        "--backend",
        "reference",
        "--mean",
        "0.3",
        "--std",
        "0.3",
        "--initial-order",
        "sorted",
    ]
    torch.save(SmallResNet(10, 1).state_dict(), tmp_path / "t.pt")
    assert run([*arguments, *small, "--architecture", "small-resnet"]) == 1
    assert run([*arguments, *small, "--architecture", "small-resnet", "--skip-bad-images"]) == 0
    printed = capsys.readouterr()
    assert r"data/two\nlines\r[bold]/\n\x1b[31m.png is no image that can be read: it is empty" in printed.err
    assert r"skipped two\nlines\r[bold]/\n\x1b[31m.png: it is empty" in printed.err
    assert all(c.isprintable() or c == "\n" for c in printed.out + printed.err)
    names = sorted(NAMES)
    manifest = read_manifest(tmp_path / "set")
    assert manifest["class_names"] == names
    assert sorted(manifest["images"]) == [f"new{label:03d}/class{label:03d}_id000.png" for label in range(10)]
    assert sorted(path.name for path in (tmp_path / "set" / "images").iterdir() if path.is_dir()) == [
        f"new{label:03d}" for label in range(10)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "set", "t.pt"]


def test_class_names_that_are_paths(tmp_path: Path, outside: Path) -> None:
    source = small_set(1)
    names = ["../outside", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "con", "C:", str(outside / "x")]
    data = MemorySet(source.pixels, source.labels, names)
    distill(small_teacher(), data, small_recipe(iterations=1, steps=1, backend="reference"), ipc=1, output=tmp_path / "set")
    assert read_manifest(tmp_path / "set")["class_names"] == names
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "set"}
    assert {path.name for path in (tmp_path / "set" / "images").iterdir() if path.is_dir()} == {f"new{label:03d}" for label in range(10)}


PRINTED = {
    "a b–é漢字": "a b–é漢字",
    "\x1b[31m": r"\x1b[31m",
    "a\nb\r\t\x00": r"a\nb\r\t\x00",
    "\x9b31m\x7f": r"\x9b31m\x7f",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\u2028\ufeff": r"\u2028\ufeff",
    os.fsdecode(b"\xff"): r"\udcff",
}


@pytest.mark.parametrize(("text", "plain"), PRINTED.items())
def test_what_is_printed_is_plain(text: str, plain: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert escape_control_chars(text) == plain
    console = Console()
    console.print(f"{text}[b]:smile:")
    console.error(text)
    console.table(text, [[text, text], [text, text]])
    console.tree(text, {text: text, "list": [text], "more": {text: 1}})
    with console.bars() as track:
        track(text)(1, 1)
    printed = capsys.readouterr()
    assert f"{plain}[b]:smile:\n" in printed.out
    assert printed.out.count(plain) == 11
    assert f"dwa-fast: {plain}\n" in printed.err
    assert all(c.isprintable() or c == "\n" for c in printed.out + printed.err)

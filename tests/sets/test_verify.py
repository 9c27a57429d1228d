"""What is wrong with a set, a sentence each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from dwa_fast import InputError
from dwa_fast.commands.cli import run
from dwa_fast.data.manifest import image_name
from dwa_fast.data.set_layout import IMAGES
from dwa_fast.sets.store import BatchSpec, ImageStore
from dwa_fast.sets.verify import problems

BATCHES = [BatchSpec(0, 0, [0, 1]), BatchSpec(1, 1, [0, 1])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete set of two classes and two images each, 4 × 6 pixels."""
    store = ImageStore(tmp_path / "set", {"image_shape": [3, 4, 6]}, ["a", "b"])
    for batch in BATCHES:
        store.write(batch, torch.full((2, 3, 4, 6), 40 * batch.number, dtype=torch.uint8), torch.rand(3, 3))
    assert store.finish(BATCHES) == []
    return tmp_path / "set"


def other_size(path: Path) -> None:
    Image.new("RGB", (5, 4)).save(path)


def image_to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def left_over(path: Path) -> None:
    """A temporary file as an hour-old one of another machine."""
    path.touch()
    os.utime(path, (0, 0))


def first_line_gone(path: Path) -> None:
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])


NAME = f"{IMAGES}/{image_name(1, 0, 2)}"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": (NAME, Path.unlink, f"{NAME} is missing"),
    "folder": (f"{IMAGES}/new001", shutil.rmtree, f"{NAME} is missing"),
    "changed": (NAME, lambda path: Image.new("RGB", (6, 4), (9, 9, 9)).save(path), f"{NAME} has changed"),
    "size": (NAME, other_size, f"{NAME} has changed and has shape [3, 4, 5], not [3, 4, 6]"),
    "no image": (NAME, lambda path: path.write_bytes(b"x"), f"{NAME} has changed and is no whole image any more"),
    "torn": (NAME, lambda path: path.write_bytes(path.read_bytes()[:40]), f"{NAME} has changed and is no whole image any more"),
    "folder for image": (NAME, image_to_folder, f"{NAME} cannot be read: Is a directory"),
    "extra image": (f"{IMAGES}/{image_name(0, 7, 2)}", other_size, f"{IMAGES}/{image_name(0, 7, 2)} does not belong to the set"),
    "extra": ("notes.txt", Path.touch, "notes.txt does not belong to the set"),
    "being written": (f"{IMAGES}/new001/.x.png.elsewhere~1.part", Path.touch, ""),
    "left over": (".x.png.elsewhere~1.part", left_over, ".x.png.elsewhere~1.part is left over from a process that died"),
    "left over among the images": (
        f"{IMAGES}/new001/.x.png.elsewhere~1.part",
        left_over,
        f"{IMAGES}/new001/.x.png.elsewhere~1.part is left over from a process that died",
    ),
    "no losses": ("losses.jsonl", Path.unlink, "losses.jsonl is missing"),
    "losses": ("losses.jsonl", first_line_gone, "losses.jsonl: the lines of batch 0 have changed"),
    "losses of a batch": (
        "losses.jsonl",
        lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[2:])),
        "losses.jsonl has no lines of batch 0",
    ),
    "more losses": (
        "losses.jsonl",
        lambda path: path.write_text(path.read_text() + '{"item": 9}\n'),
        "losses.jsonl has lines of batch 9, which the manifest does not name",
    ),
}


@pytest.mark.parametrize(("name", "damage", "sentence"), DAMAGE.values(), ids=DAMAGE.keys())
def test_every_damage_has_its_sentence(folder: Path, name: str, damage: Callable[[Path], object], sentence: str) -> None:
    assert list(problems(folder)) == []
    damage(folder / name)
    found = list(problems(folder))
    assert found[0].startswith(sentence) if sentence else found == []


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(folder)]) == 0
    assert f"{folder}: complete, 4 images, every file as it was written" in capsys.readouterr().out
    (folder / NAME).unlink()
    first = f"{IMAGES}/{image_name(0, 0, 2)}"
    (folder / first).write_bytes(b"")
    assert run(["verify", str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines() == [f"{first} has changed and is no whole image any more", f"{NAME} is missing"]
    assert f"dwa-fast: {folder}: 2 problems; the command that made the set makes again what is missing or has changed" in output.err


def test_advice_for_what_does_not_belong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that made the set leaves it where it is."""
    (folder / "notes.txt").touch()
    assert run(["verify", str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out == "notes.txt does not belong to the set; remove it, or move it elsewhere\n"
    assert output.err == f"dwa-fast: {folder}: 1 problem\n"


@pytest.mark.parametrize("place", ["students", "students/convnet"])
@pytest.mark.parametrize("name", ["record.json", "students.json"])
def test_results_in_a_folder_of_the_set_are_no_part_of_it(name: str, place: str, folder: Path) -> None:
    (folder / place).mkdir(parents=True)
    (folder / place / "chart-1.png").touch()
    assert list(problems(folder)) == [f"{place}/chart-1.png does not belong to the set; remove it, or move it elsewhere"]
    (folder / place / name).touch()
    assert list(problems(folder)) == []
    (folder / IMAGES / name).touch()
    (folder / IMAGES / "new000" / name).touch()
    assert [problem.partition(" ")[0] for problem in problems(folder)] == [f"{IMAGES}/new000/{name}", f"{IMAGES}/{name}"]


def test_files_of_damaged_labels_are_not_listed_too(folder: Path) -> None:
    (folder / "labels").mkdir()
    (folder / "labels" / "labels.json").write_text("{")
    (folder / "labels" / "epoch0000.pt").touch()
    (sentence,) = problems(folder)
    assert "labels/labels.json cannot be read" in sentence


def test_unfinished_set(folder: Path) -> None:
    store = ImageStore(folder, {"image_shape": [3, 4, 6]}, ["a", "b"])
    store.begin()
    store.write(BatchSpec(2, 2, [0, 1]), torch.zeros(2, 3, 4, 6, dtype=torch.uint8), torch.rand(3, 3))
    assert list(problems(folder)) == ["the set is not complete; run the command that started it again to resume"]


def test_no_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no manifest\.json; it is not a set written by dwa-fast"):
        list(problems(tmp_path))


def test_names_that_lead_elsewhere_are_not_followed(folder: Path, tmp_path: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(image_name(1, 0, 2), "../../etc/passwd"))
    with pytest.raises(InputError, match=r"manifest\.json is damaged: a part of it is missing or of the wrong type"):
        list(problems(folder))

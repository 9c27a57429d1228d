"""Where a set keeps what: `images/` holds class folders alone."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from dwa_fast import InputError
from dwa_fast.commands.cli import run
from dwa_fast.config import StorageConfig
from dwa_fast.data.folders import image_folder
from dwa_fast.data.manifest import image_name, read_manifest
from dwa_fast.data.set_layout import IMAGES, MANIFEST, image_root, is_set, refuse_images, set_folder
from dwa_fast.report.search import search
from dwa_fast.sets.distill import batch_specs
from dwa_fast.sets.preview import Preview
from dwa_fast.sets.store import ImageStore
from dwa_fast.sets.verify import problems
from dwa_fast.training.label_store import LabelStore
from tests.hostile import contents

CLASSES = ["ant", "bee", "cow"]


def make(folder: Path, ipc: int = 2, *, finish: bool = True) -> int:
    """A set as a run would write it, with losses and a preview; returns how many batches had to be made."""
    batches = batch_specs(len(CLASSES), ipc, 2)
    store = ImageStore(folder, {"seed": 0, "image_shape": [3, 4, 4]}, CLASSES, StorageConfig(preview=True))
    missing = store.unfinished(batches)
    if missing:
        store.begin()
    for batch in missing:
        levels = torch.arange(len(batch.labels) * 48, dtype=torch.uint8).view(-1, 3, 4, 4) + batch.number
        store.write(batch, levels, torch.ones(3, 3))
        Preview(store, (3, 4, 4), ipc).draw()
    if finish:
        assert store.finish(batches) == []
    return len(missing)


def listing_loader(root: str, image_number: int) -> list[tuple[str, int]]:
    """What SRe2L's loader and its descendants do: the first entry of the root is a class folder, and so is every other one."""
    os.listdir(os.path.join(root, os.listdir(root)[0]))
    found = []
    for label, name in enumerate(sorted(os.listdir(root))):
        members = sorted(os.listdir(os.path.join(root, name)))[:image_number]
        found += [(os.path.join(root, name, member), label) for member in members if member.endswith(".png")]
    return found


@pytest.mark.parametrize("finish", [True, False], ids=["complete", "in the making"])
def test_images_hold_class_folders_of_images_and_nothing_else(tmp_path: Path, finish: bool) -> None:
    make(tmp_path, finish=finish)
    root = tmp_path / IMAGES
    assert sorted(path.name for path in root.iterdir()) == ["new000", "new001", "new002"]
    assert {path.suffix for path in root.rglob("*") if path.is_file()} == {".png"}
    assert {"manifest.json", "preview.png", "images", "other-programs"} <= {path.name for path in tmp_path.iterdir()}
    theirs = ImageFolder(str(root))
    assert theirs.classes == ["new000", "new001", "new002"]
    assert theirs.targets == [0, 0, 1, 1, 2, 2]
    assert listing_loader(str(root), 2) == theirs.samples
    with pytest.raises(FileNotFoundError, match="Found no valid file for the classes other-programs"):
        ImageFolder(str(tmp_path))  # else it would take "images" for the only class, and train on that
    assert [label for _, label in listing_loader(str(root), 1)] == [0, 1, 2]


def test_what_is_half_written_lies_beside_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lying: list[set[str]] = []
    write = Path.write_bytes

    def watched(path: Path, content: bytes) -> int:
        lying.append({"images" if IMAGES in path.parts else "beside"})
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", watched)
    make(tmp_path)
    assert lying == [{"beside"}] * 6


@pytest.mark.parametrize("given", [".", IMAGES, f"{IMAGES}/", f"{IMAGES}/new000/.."])
def test_the_set_is_found_from_its_folder_and_from_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    make(tmp_path / "set")
    for place in (tmp_path / "set" / given, Path(given)):
        monkeypatch.chdir(tmp_path / "set")
        assert is_set(place)
        assert set_folder(place).resolve() == tmp_path / "set"
        assert image_root(place).resolve() == tmp_path / "set" / IMAGES
        assert read_manifest(place)["class_names"] == CLASSES
        assert list(problems(place)) == []
        assert len(image_folder(place, 4).files) == 6
        assert [found.folder.resolve() for found in search([place]).sets] == [tmp_path / "set"]
        assert make(place) == 0
    monkeypatch.chdir(tmp_path / "set" / IMAGES)
    assert set_folder(Path()).resolve() == tmp_path / "set"


def test_both_paths_make_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "whole", ipc=3)
    make(tmp_path / "set", ipc=2)
    assert make(tmp_path / "set" / IMAGES, ipc=3) == 2
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_folders_that_are_no_sets_stay_what_they_are(tmp_path: Path) -> None:
    for name in ("one/images/cat", "two/images/cat", "two/dog", "three/images/cat"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    for number, text in (("one", '{"name": "a web app", "format": 2}'), ("two", "{"), ("three", "[3]")):
        (tmp_path / number / MANIFEST).write_text(text)
        for place in (tmp_path / number, tmp_path / number / "images"):
            assert set_folder(place) == image_root(place) == place
    assert image_folder(tmp_path / "one" / "images", 4).class_names == ["cat"]
    assert image_folder(tmp_path / "two", 4).class_names == ["dog", "images"]


def test_a_copy_is_a_set(tmp_path: Path) -> None:
    make(tmp_path / "set")
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    shutil.copytree(tmp_path / "set" / IMAGES, tmp_path / "bare")
    assert list(problems(tmp_path / "copy")) == []
    assert image_folder(tmp_path / "bare", 4).files == image_folder(tmp_path / "set", 4).files


def test_names_do_not_depend_on_how_many_images_there_are() -> None:
    assert [image_name(7, index, 10) for index in (3, 999, 1000)] == [
        f"new007/class007_id{number}.png" for number in ("003", "999", "1000")
    ]
    assert image_name(7, 3, 1001) == "new0007/class0007_id003.png"


@pytest.mark.parametrize("name", ["", "labels", "new000/labels"])
def test_nothing_else_is_written_among_the_images(tmp_path: Path, name: str) -> None:
    make(tmp_path / "set")
    with pytest.raises(InputError, match=r"is for the images of a set alone, .* choose another output, such as .*set/results"):
        LabelStore.create(tmp_path / "set" / IMAGES / name, {}, 1)
    for place in (tmp_path / "set", tmp_path / "set" / "labels", tmp_path / IMAGES / "labels", tmp_path / "set" / "imagesets"):
        refuse_images(place)
    assert list(problems(tmp_path / "set")) == []


@pytest.mark.parametrize("tiny", [False, True])
def test_nothing_is_written_among_class_folders(tmp_path: Path, tiny: bool, capsys: pytest.CaptureFixture[str]) -> None:
    real = tmp_path / "data" / "train"
    for name in ("ant", "bee"):
        inner = real / name / "images" if tiny else real / name
        inner.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(inner / "0.png")
        if tiny:
            (real / name / f"{name}_boxes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    for output in (real / "out", real / "ant" / "out"):
        for command in (
            ["import", "x.pt", "--output", str(output)],
            ["report", str(tmp_path), "--output", f"{output}.html"],
            ["export", "x", "--to", "folders", "--output", str(output)],
            ["squeeze", "--recipe", "folder", "--data", "x", "--output", f"{output}.pt"],
            ["validate", "--recipe", "folder", "--data", "x", "--images", "x", "--output", str(output), "--student", "resnet18"],
            ["demo", "--output", str(output)],
            ["compare", "--recipe", "folder", "--data", "x", "--teacher", "x", "--output", str(output)],
        ):
            assert run(command) == 1
            assert re.search(r"lies in .*train, whose folders hold nothing but images, as classes do", capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before
    for place in (tmp_path / "data" / "out", tmp_path / "out"):
        refuse_images(place)


def test_a_command_that_knows_its_images_refuses_whatever_else_lies_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/ant", "train/bee", "test/ant", "test/bee"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
        (tmp_path / name / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    flags = ["--recipe", "folder", "--size", "8", "--architecture", "convnet128", "--data", str(tmp_path)]
    for split in ("train", "test"):
        assert run(["squeeze", *flags, "--output", str(tmp_path / split / "teachers" / "t.pt")]) == 1
        assert f"{split}, whose folders are the classes of the real images" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_behind_a_loop_of_links_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    out = str(tmp_path / "loop" / "t.pt")
    assert run(["squeeze", "--recipe", "digits", "--size", "8", "--epochs", "1", "--padding", "1", "--output", out]) == 1
    assert capsys.readouterr().err.startswith(f"dwa-fast: cannot write to {tmp_path / 'loop'}: ")


def test_results_with_pictures_are_no_class_folders(tmp_path: Path) -> None:
    make(tmp_path / "sets" / "one")
    make(tmp_path / "sets" / "two")
    for name in ("compare", "cross"):
        (tmp_path / "studies" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "studies" / name / "chart-1.png")
        (tmp_path / "studies" / name / "record.json").touch()
    for name in ("a", "b"):
        (tmp_path / "pages" / f"{name}-files").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "pages" / f"{name}-files" / "set-1-1.png")
        (tmp_path / "pages" / f"{name}.html").touch()
    for folder in ("sets", "studies", "pages"):
        refuse_images(tmp_path / folder / "more")


@pytest.mark.parametrize("name", ["labels", ""])
def test_soft_labels_beside_the_images_belong_to_the_set(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    store = LabelStore.create(tmp_path / name, {"seed": 0}, 2)
    (tmp_path / name / "epoch000.pt").write_bytes(b"labels")
    store._sums[0] = "0" * 64
    index = tmp_path / name / "labels.json"
    index.write_text(index.read_text().replace('"checksums": {}', f'"checksums": {{"0": "{"0" * 64}"}}'))
    assert list(problems(tmp_path)) == [
        f"{name and 'labels: '}the soft labels of epoch {epoch} are missing or have changed; the relabel command makes them again"
        for epoch in range(2)
    ]
    (tmp_path / name / "notes.txt").touch()
    assert list(problems(tmp_path))[-1] == f"{name and 'labels/'}notes.txt does not belong to the set; remove it, or move it elsewhere"
    index.write_text("{")
    assert any("labels.json cannot be read" in problem for problem in problems(tmp_path))


def test_command_takes_both_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "set")
    assert run(["verify", str(tmp_path / "set" / IMAGES)]) == 0
    assert "complete, 6 images, every file as it was written" in capsys.readouterr().out
    assert run(["report", str(tmp_path / "set" / IMAGES), "--output", str(tmp_path / "report.html")]) == 0
    inside = str(tmp_path / "set" / IMAGES / "out")
    for command in (
        ["validate", "--recipe", "digits", "--images", "x", "--output", inside],
        ["squeeze", "--recipe", "digits", "--output", f"{inside}.pt"],
        ["synthesize", "--recipe", "digits", "--teacher", "x", "--output", inside],
        ["report", str(tmp_path), "--output", f"{inside}.html"],
    ):
        assert run(command) == 1
        assert "is for the images of a set alone" in capsys.readouterr().err

"""Exports and imports that cannot be: one sentence, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dwa_fast import InputError
from dwa_fast.commands.cli import run
from dwa_fast.config import Normalisation
from dwa_fast.data.manifest import image_name
from dwa_fast.sets.exchange import as_tensors, open_files, write_set
from tests.sets.exchanged import CLASSES, FLAGS, X, Y, encoded, files_of, make


def lose(folder: Path) -> None:
    (folder / "images" / image_name(1, 1, 3)).unlink()


def change(folder: Path) -> None:
    (folder / "images" / image_name(1, 1, 3)).write_bytes(encoded(3))


BAD_EXPORTS: dict[str, tuple[list[str], Callable[[Path], object], str]] = {
    "missing": (["--to", "folders"], lose, "class001_id001.png cannot be read: No such file or directory"),
    "changed": (["--to", "tensors"], change, "class001_id001.png has changed since it was written"),
    "too few": (["--to", "folders", "--ipc", "3"], lambda _: None, "class 'zebra' of "),
    "ipc": (["--to", "folders", "--ipc", "0"], lambda _: None, "ipc must be an integer of at least 1, got 0"),
    "half a normalisation": (
        ["--to", "tensors", "--mean", "0.5"],
        lambda _: None,
        "mean and std must hold 1 or 3 values each, got 1 and 0",
    ),
    "column": (["--to", "parquet", "--label-column", "image"], lambda _: None, "the column of labels needs a name"),
    "recipe": (["--to", "tensors", "--recipe", "svhn"], lambda _: None, "unknown recipe 'svhn'"),
}


@pytest.mark.parametrize(("flags", "damage", "message"), BAD_EXPORTS.values(), ids=BAD_EXPORTS.keys())
def test_bad_exports_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], damage: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "set")
    damage(tmp_path / "set")
    assert run(["export", str(tmp_path / "set"), "--output", str(tmp_path / "out"), *flags]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_sets_that_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "begun", finish=False)
    make(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    for size, name in ((8, "a"), (6, "b")):
        (tmp_path / "sizes" / name).mkdir(parents=True)
        (tmp_path / "sizes" / name / "0.png").write_bytes(encoded(3, size=size))
    cases = {
        "begun": "begun is not complete; run the command that started it again to resume",
        "empty": "empty has no class folders",
        "nowhere": "nowhere is not a folder",
        "sizes": "0.png has 6 × 6 pixels; tensors need squares of one size, here 8",
    }
    for name, message in cases.items():
        assert run(["export", str(tmp_path / name), "--to", "tensors", "--output", str(tmp_path / "out"), *FLAGS]) == 1
        assert message in capsys.readouterr().err
    assert run(["export", str(tmp_path / "sizes"), "--to", "tensors", "--output", str(tmp_path / "out")]) == 1
    assert "tensors are normalised, and nothing says how; pass --mean and --std, or --recipe" in capsys.readouterr().err
    assert (
        run(["export", str(tmp_path / "set"), "--to", "tensors", "--output", str(tmp_path / "out"), "--mean", "0.5", "--std", "0.5"]) == 0
    )


@pytest.mark.parametrize("to", ["parquet", "tensors", "folders"])
def test_nothing_is_lost_to_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow")
    make(tmp_path / "set")
    out = tmp_path / ("x.parquet" if to == "parquet" else "out")
    command = ["export", str(tmp_path / "set"), "--to", to, "--output", str(out)]
    assert run(command) == 0
    before = files_of(tmp_path)
    assert run(command) == 1
    assert ("choose another --output") in capsys.readouterr().err
    assert run([*command, "--overwrite"]) == (1 if to == "folders" else 0)
    assert files_of(tmp_path) == before
    wrong = tmp_path / ("out" if to == "parquet" else "file")
    wrong.mkdir() if to == "parquet" else wrong.touch()
    assert run([*command[:-1], str(wrong)]) == 1
    assert f"--output names {'the Parquet file' if to == 'parquet' else 'a folder'}" in capsys.readouterr().err
    assert run([*command[:-1], str(tmp_path / "set" / "images" / "out")]) == 1
    assert "is for the images of a set alone" in capsys.readouterr().err


BAD_IMPORTS: dict[str, tuple[list[str], str]] = {
    "kinds": (["a.parquet", "b.pt"], "Parquet files and PyTorch files cannot be one set"),
    "too many": (["a.pt", "b.pt", "c.pt"], "a set of tensors is one file, or one of images and one of labels; got 3"),
    "nowhere": (["nowhere.pt"], "file of tensors nowhere.pt does not exist"),
    "no normalisation": (["good.pt"], "tensors are normalised, and nothing says how"),
    "channels": (["good.pt", "--mean", "0.5", "--std", "0.5"], "the images have 3 colour channels, but mean and std have values for 1"),
    "names": (
        ["good.pt", "--clip", *FLAGS, "--classes", "names.txt"],
        "list of classes names.txt names ant more than once; expected one class name a line",
    ),
    "too many names": (
        ["good.pt", "--clip", *FLAGS, "--classes", "three.txt"],
        "three.txt holds 3 names; expected one for each of 2 classes",
    ),
    "no names": (["good.pt", "--clip", *FLAGS, "--classes", "none.txt"], "none.txt cannot be read: No such file or directory"),
    "experiment": (["good.pt", *FLAGS, "--experiment", "-1"], "experiment must be an integer of at least 0, got -1"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_IMPORTS.values(), ids=BAD_IMPORTS.keys())
def test_bad_imports_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save([X, Y], "good.pt")
    Path("names.txt").write_text("ant\nant\n")
    Path("three.txt").write_text("ant\nbee\ncow\n")
    assert run(["import", *arguments, "--output", "set"]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not Path("set").exists()


def test_an_import_goes_on_and_knows_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [0, 1, 2, 0, 1]
    levels = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    assert write_set(tmp_path / "set", levels.__getitem__, labels, CLASSES, {"imported": ["x"]}) == 5
    whole = files_of(tmp_path / "set")
    (tmp_path / "set" / "images" / image_name(0, 1, 3)).unlink()
    assert write_set(tmp_path / "set", levels.__getitem__, labels, CLASSES, {"imported": ["x"]}) == 2
    assert files_of(tmp_path / "set") == whole
    with pytest.raises(InputError, match=r"holds a set made with other settings \(imported was \['x'\], is \['y'\]\)"):
        write_set(tmp_path / "set", levels.__getitem__, labels, CLASSES, {"imported": ["y"]})


def test_tensors_of_a_set_with_uneven_classes(tmp_path: Path) -> None:
    levels = torch.randint(0, 256, (4, 3, 4, 4), dtype=torch.uint8)
    write_set(tmp_path / "set", levels.__getitem__, [1, 0, 1, 1], ["a", "b"], {})
    images, labels = as_tensors(open_files(tmp_path / "set"), Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3))
    assert labels.tolist() == [0, 1, 1, 1]
    assert torch.equal(images, levels[[1, 0, 2, 3]].float() / 255)

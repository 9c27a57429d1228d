"""Sets on their way to other programs and back: Parquet as Hugging Face keeps it, tensors as DC, DM and MTT do, numbered folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dwa_fast import InputError
from dwa_fast.commands.cli import run
from dwa_fast.config import Normalisation, StorageConfig
from dwa_fast.data.manifest import image_name, read_manifest
from dwa_fast.data.tensors import as_pixels, read_tensors
from dwa_fast.sets.distill import batch_specs
from dwa_fast.sets.exchange import open_files
from dwa_fast.sets.store import ImageStore
from dwa_fast.sets.verify import problems
from tests.hostile import POSTSCRIPT, Harmful, ghostscript
from tests.sets.exchanged import CIFAR, CLASSES, FLAGS, X, Y, encoded, files_of, levels_of, make


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_parquet_and_back_is_the_same_files(tmp_path: Path, image_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    make(tmp_path / "set", image_format=image_format)
    assert run(["export", str(tmp_path / "set"), "--to", "parquet", "--output", str(tmp_path / "out" / "train.parquet")]) == 0
    assert run(["import", str(tmp_path / "out" / "train.parquet"), "--output", str(tmp_path / "back")]) == 0
    assert "6 images of 3 classes" in capsys.readouterr().out
    assert files_of(tmp_path / "back" / "images") == files_of(tmp_path / "set" / "images")
    assert read_manifest(tmp_path / "back")["class_names"] == CLASSES
    assert list(problems(tmp_path / "back")) == []


def test_parquet_is_as_hugging_face_keeps_it(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    make(tmp_path / "set", ipc=70)
    target = tmp_path / "a.parquet"
    assert run(["export", str(tmp_path / "set" / "images"), "--to", "parquet", "--output", str(target), "--label-column", "class_id"]) == 0
    file = parquet.ParquetFile(target)
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [100, 100, 10]
    assert str(file.schema_arrow.field("image").type) == "struct<bytes: binary, path: string>"
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}, "class_id": {"_type": "ClassLabel", "names": CLASSES}}
    rows = file.read().to_pylist()
    assert [row["class_id"] for row in rows] == [0] * 70 + [1] * 70 + [2] * 70
    assert rows[71]["image"] == {
        "bytes": (tmp_path / "set" / "images" / image_name(1, 1, 3)).read_bytes(),
        "path": "class001_id001.png",
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_and_back_are_the_same_levels(tmp_path: Path, channels: int) -> None:
    """All 256 levels of each channel, normalised in fp32 and back."""
    levels = make(tmp_path / "set", channels=channels, size=64)
    assert all(len(levels[:, :, channel].unique()) == 256 for channel in range(channels))
    assert run(["export", str(tmp_path / "set"), "--to", "tensors", "--output", str(tmp_path / "out")]) == 0
    images, labels = (torch.load(tmp_path / "out" / f"{name}_best.pt", weights_only=True) for name in ("images", "labels"))
    mean, std = (torch.tensor(value[:channels], dtype=torch.float64).view(-1, 1, 1) for value in (CIFAR.mean, CIFAR.std))
    assert (images.dtype, labels.dtype, labels.tolist()) == (torch.float32, torch.int64, [0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(images.double(), (levels.view(6, channels, 64, 64).double() / 255 - mean) / std, rtol=1e-6, atol=1e-6)
    how = ["--mean", *map(str, CIFAR.mean[:channels]), "--std", *map(str, CIFAR.std[:channels])]
    assert run(["import", str(tmp_path / "out" / "images_best.pt"), "--output", str(tmp_path / "back"), *how]) == 0
    assert files_of(tmp_path / "back" / "images") == files_of(tmp_path / "set" / "images")


def test_flags_decide_the_normalisation(tmp_path: Path) -> None:
    levels = make(tmp_path / "set")
    by_flags = ["--mean", "0", "0", "0", "--std", "1", "1", "1", "--recipe", "cifar10"]
    for name, flags in (("plain", by_flags), ("recipe", ["--recipe", "imagenet"])):
        assert run(["export", str(tmp_path / "set"), "--to", "tensors", "--output", str(tmp_path / name), *flags]) == 0
    plain, other = (torch.load(tmp_path / name / "images_best.pt", weights_only=True) for name in ("plain", "recipe"))
    assert torch.equal(plain, levels.view(6, 3, 8, 8).float() / 255)
    torch.testing.assert_close(other[:, 1], (plain[:, 1] - 0.456) / 0.224)


def test_folders_by_number(tmp_path: Path) -> None:
    make(tmp_path / "set", image_format="jpeg")
    assert run(["export", str(tmp_path / "set"), "--to", "folders", "--output", str(tmp_path / "out"), "--ipc", "1"]) == 0
    made = files_of(tmp_path / "out")
    assert list(made) == ["00000/00000.jpg", "00001/00000.jpg", "00002/00000.jpg"]
    assert made["00001/00000.jpg"] == (tmp_path / "set" / "images" / image_name(1, 0, 3, "jpg")).read_bytes()


def test_the_first_images_are_those_of_the_lowest_numbers(tmp_path: Path) -> None:
    """Names of other programs, and ours beyond a thousand images, are not in the order of their numbers when sorted as text."""
    for label in ("10", "9", "8", "7", "6", "5", "4", "3", "2", "1", "0"):
        for index in (10, 9, 1000, 999):
            path = tmp_path / "set" / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(int(label)))
    found = open_files(tmp_path / "set", ipc=3)
    assert found.class_names == [f"class{number}" for number in range(11)]
    assert found.labels == [number for number in range(11) for _ in range(3)]
    assert found.files[:3] == ["class0/9.png", "class0/10.png", "class0/999.png"]
    assert found.files[-3:] == ["class10/9.png", "class10/10.png", "class10/999.png"]


def test_a_set_beyond_a_thousand_images_keeps_its_order(tmp_path: Path) -> None:
    items = batch_specs(1, 1002, 1)
    store = ImageStore(tmp_path, {}, ["a"], StorageConfig(losses_every=0))
    for item in [*items[:2], *items[99:102], *items[998:]]:
        store.write(item, torch.full((1, 1, 2, 2), item.index % 256, dtype=torch.uint8))
    assert store.finish([*items[:2], *items[99:102], *items[998:]]) == []
    found = open_files(tmp_path)
    assert [int(name[-7:-4].lstrip("d")) for name in found.files] == [0, 1, 99, 100, 101, 998, 999, 0, 1]
    assert found.files[-2:] == ["new000/class000_id1000.png", "new000/class000_id1001.png"]
    assert open_files(tmp_path, ipc=5).files == found.files[:5]


def both(images: Tensor, labels: Tensor) -> dict[str, Callable[[Path], list[Path]]]:
    """The same set in every form of this family; each returns what to name on the command line."""

    def save(path: Path, content: Any) -> Path:
        torch.save(content, path)
        return path

    def pair(folder: Path, labels: Tensor = labels) -> list[Path]:
        return [save(folder / "images_best.pt", images), save(folder / "labels_best.pt", labels)]

    return {
        "MTT": pair,
        "MTT, images alone": lambda folder: pair(folder)[:1],
        "DATM": lambda folder: pair(folder, torch.nn.functional.one_hot(labels, 3).float() * 2 - 1),
        "IDC": lambda folder: [save(folder / "data_best.pt", [images, labels])],
        "DC": lambda folder: [save(folder / "res_DM.pt", {"data": [[images, labels]], "accs_all_exps": {"ConvNet": [0.5]}})],
        "gradients": lambda folder: [save(folder / "x.pt", (images.clone().requires_grad_(), labels.float()))],
        "half": lambda folder: [save(folder / "x.pt", [images.half(), labels.to(torch.int32)])],
    }


FORMS = ["MTT", "MTT, images alone", "DATM", "IDC", "DC", "gradients", "half"]


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_other_programs(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In any order of the labels; an image keeps its place among those of its class."""
    levels = torch.randint(0, 256, (7, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (CIFAR.mean, CIFAR.std))
    files = both((levels.float() / 255 - mean) / std, labels)[form](tmp_path)
    (tmp_path / "names.txt").write_text("\ufeff# as every list of classes\nant\nbee\n\ncow\n", encoding="utf-8")
    arguments = ["import", *map(str, files), "--output", str(tmp_path / "set"), *FLAGS]
    assert run([*arguments, "--classes", str(tmp_path / "names.txt")]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert ("the labels are soft" in said) == (form == "DATM")
    made = levels_of(tmp_path / "set", 6)
    wanted = levels[[1, 3, 2, 6, 0, 4, 5]]
    assert (made.int() - wanted.int()).abs().max() <= (1 if form == "half" else 0)
    assert read_manifest(tmp_path / "set")["class_names"] == ["ant", "bee", "cow"]
    assert list(problems(tmp_path / "set")) == []


def test_one_of_several_experiments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [[torch.full((2, 1, 4, 4), value), torch.tensor([0, 1])] for value in (0.5, -0.5)]
    torch.save({"data": pairs, "accs_all_exps": {}}, tmp_path / "res.pt")
    arguments = ["import", str(tmp_path / "res.pt"), "--output", str(tmp_path / "set"), "--mean", "0.5", "--std", "0.5"]
    assert run(arguments) == 1
    assert "holds 2 experiments; choose one with --experiment, from 0" in capsys.readouterr().err
    assert run([*arguments, "--experiment", "2"]) == 1
    assert "holds 2 experiments, got --experiment 2; they are counted from 0" in capsys.readouterr().err
    assert run([*arguments, "--experiment", "1"]) == 0
    assert levels_of(tmp_path / "set", 4, 1).unique().tolist() == [64]  # (−0.5 · 0.5 + 0.5) · 255


def test_values_that_are_no_pixels_are_refused_or_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save([torch.tensor([-2.0, 0.0, 1.0, 1.5]).view(1, 1, 2, 2), torch.tensor([0])], tmp_path / "x.pt")
    arguments = ["import", str(tmp_path / "x.pt"), "--output", str(tmp_path / "set"), "--mean", "0.5", "--std", "0.5"]
    assert run(arguments) == 1
    said = capsys.readouterr().err
    assert "50 % of the values lie outside of [0, 1] without the normalisation, from -0.5 to 1.25; mean and std are others" in said
    assert not (tmp_path / "set").exists()
    assert run([*arguments, "--clip"]) == 0
    assert "from -0.5 to 1.25, and were cut" in capsys.readouterr().out
    assert levels_of(tmp_path / "set", 2, 1).flatten().tolist() == [0, 128, 255, 255]


def test_rounding_is_no_reason_to_refuse() -> None:
    images = torch.tensor([-1.003, 1.003]).view(1, 1, 1, 2)
    assert as_pixels(images, Normalisation(mean=(0.5,), std=(0.5,)))[1] == ""
    with pytest.raises(InputError, match=r"50 % of the values lie outside of \[0, 1\]"):
        as_pixels(images * torch.tensor([1.0, 1.01]), Normalisation(mean=(0.5,), std=(0.5,)))


def test_pixels_that_are_not_normalised_are_not_taken_for_normalised_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With CIFAR's mean and std they would become grey fog between 0.45 and 0.7, and nothing would say so."""
    levels = torch.randint(0, 256, (3, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.save([levels.float() / 255, torch.arange(3)], tmp_path / "data_best.pt")
    arguments = ["import", str(tmp_path / "data_best.pt"), "--output", str(tmp_path / "set")]
    assert run([*arguments, *FLAGS]) == 1
    assert "as pixels do that are not normalised; if that is what they are, pass --mean 0 0 0 --std 1 1 1" in capsys.readouterr().err
    assert run([*arguments, "--mean", "0", "0", "0", "--std", "1", "1", "1"]) == 0
    assert torch.equal(levels_of(tmp_path / "set", 6), levels)


BAD_TENSORS: dict[str, tuple[Any, str]] = {
    "images alone": (X, r"holds a tensor of shape \(2, 3, 4, 4\) and no labels; expected images and labels: two files"),
    "state dict": (
        {"conv.weight": X, "fc.bias": Y},
        "holds a dictionary with the keys 'conv.weight', 'fc.bias'; expected images and labels",
    ),
    "list": ([X, X, Y], "holds a list of 3; expected"),
    "number": (3, "holds int; expected"),
    "empty data": ({"data": []}, "holds 0 experiments"),
    "rank": ([X[0], Y], r"holds images of shape \(3, 4, 4\); expected \[N, C, S, S\] with 1 or 3 channels"),
    "channels last": ([X.permute(0, 2, 3, 1), Y], r"holds images of shape \(2, 4, 4, 3\); expected"),
    "oblong": ([X[..., :3], Y], r"holds images of shape \(2, 3, 4, 3\); expected"),
    "bytes": ([X.byte(), Y], "holds images of torch.uint8; expected finite floating point, normalised"),
    "NaN": ([X * float("nan"), Y], "holds images of NaN or infinite values; expected"),
    "too few labels": ([X, Y[:1]], r"2 images, but labels of shape \(1,\); expected one for each"),
    "negative": ([X, Y - 1], "holds labels that are no numbers of classes, from 0"),
    "fractions": ([X, Y + 0.5], "holds labels that are no numbers of classes, from 0"),
    "NaN labels": ([X, torch.full((2, 3), float("nan"))], "holds soft labels that are not finite"),
    "sparse": ([X.to_sparse(), Y], "holds no plain tensors with values"),
    "code": ([X, Harmful(Path("canary"))], "it holds more than tensors"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_files_that_are_no_set_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        read_tensors([tmp_path / "x.pt"])
    assert not (tmp_path / "canary").exists()


def write_parquet(path: Path, columns: dict[str, Any], names: list[str] | None = None) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path)


PUBLIC: dict[str, tuple[dict[str, Any], list[str]]] = {
    "class_id": ({"image": [{"bytes": encoded(level), "path": None} for level in (9, 1, 5)], "class_id": [1, 0, 1]}, ["0", "1"]),
    "bare bytes, img": ({"img": [encoded(level) for level in (9, 1, 5)], "label": [1, 0, 1]}, ["0", "1"]),
    "names as text": ({"image": [encoded(level) for level in (9, 1, 5)], "label": ["dog", "cat", "dog"]}, ["cat", "dog"]),
    "other columns": ({"image": [encoded(level) for level in (9, 1, 5)], "label": [1, 0, 1], "soft": [[0.1], [0.2], [0.3]]}, ["0", "1"]),
}


@pytest.mark.parametrize(("columns", "names"), PUBLIC.values(), ids=PUBLIC.keys())
def test_parquet_of_other_programs(tmp_path: Path, columns: dict[str, Any], names: list[str]) -> None:
    write_parquet(tmp_path / "x.parquet", columns)
    assert run(["import", str(tmp_path / "x.parquet"), "--output", str(tmp_path / "set")]) == 0
    assert levels_of(tmp_path / "set")[:, 0, 0, 0].tolist() == [1, 9, 5]
    assert read_manifest(tmp_path / "set")["class_names"] == names
    assert read_manifest(tmp_path / "set")["settings"]["image_shape"] == [3, 8, 8]


def test_parquet_in_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, names in enumerate((["a", "b"], ["a", "b"], ["b", "a"])):
        write_parquet(tmp_path / f"{number}.parquet", {"image": [encoded(number)] * 2, "label": [0, 1]}, names)
    files = [str(tmp_path / f"{number}.parquet") for number in range(3)]
    assert run(["import", *files[:2], "--output", str(tmp_path / "set")]) == 0
    assert levels_of(tmp_path / "set")[:, 0, 0, 0].tolist() == [0, 1, 0, 1]
    assert run(["import", *files, "--output", str(tmp_path / "mixed")]) == 1
    assert "2.parquet has other columns or classes than" in capsys.readouterr().err


GOOD = [{"bytes": encoded(3), "path": None}]
BAD_PARQUET: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"picture": GOOD, "label": [0]}, "has no column image or img; it has picture, label; name one with --image-column"),
    "no label": ({"image": GOOD, "y": [0]}, "has no column label or class_id or labels; it has image, y; name one with --label-column"),
    "two labels": ({"image": GOOD, "label": [0], "class_id": [0]}, "has several columns that could be meant (label, class_id)"),
    "path alone": (
        {"image": [{"bytes": None, "path": "/etc/passwd"}], "label": [0]},
        "row 0 holds no encoded image; paths of files elsewhere",
    ),
    "text": ({"image": ["a.png"], "label": [0]}, "column 'image' of"),
    "floats": ({"image": GOOD, "label": [0.5]}, "holds double; expected numbers or names of classes"),
    "negative": ({"image": GOOD, "label": [-1]}, "column 'label' of row 0 holds -1; expected a number of at least 0"),
    "nothing": ({"image": [*GOOD, *GOOD], "label": [0, None]}, "column 'label' of row 1 holds None; expected"),
    "gap": ({"image": [*GOOD, *GOOD], "label": [0, 2]}, "class '1' (number 1 of 3) has no image"),
    "no rows": ({"image": GOOD[:0] or np.array([], dtype="S1"), "label": np.array([], dtype=np.int64)}, "the files hold no rows"),
    "damaged": ({"image": [encoded(3)[:45]], "label": [0]}, "the image in row 0 is no whole PNG or JPEG image"),
    "PostScript": ({"image": [POSTSCRIPT], "label": [0]}, "the image in row 0 is no whole PNG or JPEG image"),
    "mixed": ({"image": [encoded(3), encoded(3, "JPEG")], "label": [0, 1]}, "the images are PNG and JPEG files; a set has one format"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_PARQUET.values(), ids=BAD_PARQUET.keys())
def test_parquet_that_is_no_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: dict[str, Any], message: str
) -> None:
    write_parquet(tmp_path / "x.parquet", columns)
    canary = ghostscript(tmp_path, monkeypatch)
    assert run(["import", str(tmp_path / "x.parquet"), "--output", str(tmp_path / "set")]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not canary.exists()
    assert not (tmp_path / "set").exists()


def test_without_pyarrow_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    make(tmp_path / "set")
    assert run(["export", str(tmp_path / "set"), "--to", "parquet", "--output", str(tmp_path / "x.parquet")]) == 1
    assert "Parquet files need the package pyarrow: pip install 'dwa-fast[parquet]'" in capsys.readouterr().err
    assert not (tmp_path / "x.parquet").exists()
    assert run(["import", str(tmp_path / "x.parquet"), "--output", str(tmp_path / "y")]) == 1

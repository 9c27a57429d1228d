"""The commands that study sets, as a person types them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dwa_fast.commands.cli import run
from dwa_fast.commands.diversity import as_record
from dwa_fast.config import StorageConfig
from dwa_fast.data.datasets import digits
from dwa_fast.data.images import MemorySet
from dwa_fast.data.subsets import draw
from dwa_fast.evaluation.diversity import REAL, Analysis, DiversityConfig, SetAnalysis
from dwa_fast.io.files import checksum
from dwa_fast.report.records import RECORD, read_record
from dwa_fast.sets.store import BatchSpec, ImageStore
from tests.nets import SIZE

IPC = 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher.pt and the sets one, of real images, and two, of these negated."""
    folder = tmp_path_factory.mktemp("studies")
    squeeze = ["squeeze", "--recipe", "digits", "--output", str(folder / "teacher.pt"), "--size", str(SIZE), "--epochs", "2"]
    assert run([*squeeze, "--padding", "1"]) == 0
    data = digits("train", SIZE)
    pixels = draw(data, IPC, "test", seed=0).load(range(10 * IPC)).view(10, IPC, 1, SIZE, SIZE)
    for name, images in (("one", pixels), ("two", 255 - pixels)):
        settings = {"method": f"{name}'s", "iterations": 7, "teacher": ["0a", "1b"]}
        store = ImageStore(folder / name, settings, data.class_names, StorageConfig(losses_every=0))
        items = [BatchSpec(index, index, list(range(10))) for index in range(IPC)]
        for item in items:
            store.write(item, images[:, item.index])
        store.finish(items)
    return folder


def study(command: str, bench: Path, output: Path, *more: str) -> int:
    quick = {
        "diversity": ["--tsne-images", "4", "--shown-classes", "6"],
        "incremental": ["--epochs", "1", "--padding", "1", "--tasks", "2"],
    }
    teacher = [] if "--teacher" in more else ["--teacher", str(bench / "teacher.pt")]
    common = ["--recipe", "digits", "--size", str(SIZE), *teacher, "--output", str(output)]
    sets = [] if "--sets" in more else ["--sets", str(bench / "one"), f"negated={bench / 'two'}"]
    return run([command, *common, *quick[command], *sets, *more])


def test_diversity_leaves_a_record_with_pictures(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study("diversity", bench, tmp_path) == 0
    record = read_record(tmp_path / RECORD)
    assert (record.kind, record.command.split()[0]) == ("diversity", "dwa-fast")
    assert [[row[0] for row in table.rows] for table in record.tables] == [[REAL, "one", "negated"]] * 2
    assert record.tables[1].rows[1][3:6] == ["0", "100.0", "100.0"]  # copies of real images: nearest, near, and of their own class
    bars, curve = record.charts
    assert sorted(map(str, bars.x)) == [str(digit) for digit in range(10)]
    assert [series.name for series in bars.series] == [REAL, "one", "negated"]
    assert list(bars.series[1].values) == sorted(record.data["one"]["diversity_ratios"])
    assert curve.x == list(range(0, 101, 5))
    assert {name: len(points) for name, points in record.scatters[0].groups.items()} == {
        "real images": 24,
        "one": 18,
        "negated": 18,
    }
    for file in [picture.file for picture in record.pictures] + ["chart-1.png", "chart-2.png", "scatter-1.png"]:
        with Image.open(tmp_path / file) as picture:
            picture.verify()
    assert len(record.pictures) == 4
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert record.summary in printed
    before = {path.name: checksum(path) for path in tmp_path.glob("*.png")}
    assert study("diversity", bench, tmp_path) == 0
    assert {path.name: checksum(path) for path in tmp_path.glob("*.png")} == before
    assert read_record(tmp_path / RECORD).data == record.data


def test_threads_of_diversity(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = list[int]()

    def stop(*_: Any, **__: Any) -> None:
        threads.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr("dwa_fast.commands.diversity.analyse_sets", stop)
    assert study("diversity", bench, tmp_path, "--threads", "2") == 130
    assert (threads, torch.get_num_threads()) == ([2], 1)


def test_incremental_leaves_a_record_and_goes_on(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study("incremental", bench, tmp_path, "--seeds", "1") == 0
    assert study("incremental", bench, tmp_path, "--seeds", "2", "--ipc", "3") == 0
    record = read_record(tmp_path / RECORD)
    assert record.kind == "incremental"
    assert list(record.tables[0].columns) == ["set", "5 classes", "10 classes", "mean of steps"]
    cells = record.data["cells"]
    assert [(cell["set"], cell["method"], cell["ipc"], cell["classes seen"]) for cell in cells] == [
        ("one", "one's", IPC, 5),
        ("one", "one's", IPC, 10),
        ("negated", "two's", IPC, 5),
        ("negated", "two's", IPC, 10),
    ]
    assert all(len(cell["accuracies"]) == 2 and cell["synthesis"] == {"iterations": 7, "teacher": ["0a", "1b"]} for cell in cells)
    assert record.charts[0].x == [5, 10]
    assert list(record.charts[0].series[0].values) == [cells[0]["mean"], cells[1]["mean"]]
    assert [sorted(name for part in order for name in part) for order in record.data["class orders"]] == [
        [str(digit) for digit in range(10)]
    ] * 2
    assert len(list((tmp_path / "steps").iterdir())) == 2 * 2 * 2
    assert f"{cells[1]['mean']:.1f} ± {cells[1]['std']:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["diversity", "incremental"])
def test_bad_images_of_a_set_stop_or_are_skipped(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    shutil.copytree(bench / "two", tmp_path / "hurt")
    path = next((tmp_path / "hurt" / "images" / "new003").glob("*.png"))
    path.write_bytes(path.read_bytes()[:20])
    arguments: list[Any] = [command, bench, tmp_path / "out", "--sets", str(tmp_path / "hurt"), "--ipc", "2"]
    assert study(*arguments) == 1
    assert re.search(rf"{path.name} is no image that can be read: .*; with --skip-bad-images it is left out", capsys.readouterr().err)
    assert study(*arguments, "--skip-bad-images") == 0
    assert f"skipped 1 image that cannot be read:\n  new003/{path.name}: " in capsys.readouterr().out


def test_many_classes_become_curves_in_the_order_of_the_first_set() -> None:
    names = [f"c{label}" for label in range(25)]
    data = MemorySet(torch.zeros(75, 1, 2, 2, dtype=torch.uint8), torch.arange(25).repeat_interleave(3), names)
    ratios: list[list[float | None]] = [[1.0] * 25, [*map(float, range(24, 0, -1)), None], [*map(float, range(25))]]
    distances = torch.arange(75.0, dtype=torch.float64)
    sets = {
        name: SetAnalysis(data, [0.0] * 25, own, own, torch.arange(75), distances, torch.zeros(4, 2))
        for name, own in zip((REAL, "first", "second"), ratios, strict=True)
    }
    record = as_record(Analysis(data, [0], sets), DiversityConfig(), [])
    assert record.charts[0].x == list(range(1, 26))
    assert list(record.charts[0].series[1].values) == [*map(float, range(1, 25)), None]
    assert list(record.charts[0].series[2].values) == [*map(float, range(23, -1, -1)), 24.0]
    assert "first 12.50 and 1.00" in record.summary


@pytest.mark.parametrize("command", ["diversity", "incremental"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sets", "{}/one", "{}/one"], "two sets are called 'one'; name them, as in --sets one=DIR two=DIR"),
        (["--sets", "{}/nowhere"], "nowhere is not a folder"),
        (["--sets", "a={}/one/images/new000"], "new000 has no class folders"),
        (["--sets", "a={}/few"], "few has 2 classes, the held-out images have 10"),
        (["--ipc", "4"], "has 3 images, expected at least 4"),
        (["--teacher", "nowhere.pt"], "checkpoint nowhere.pt does not exist"),
    ],
)
def test_bad_input_is_one_sentence(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, more: list[str], message: str
) -> None:
    for name in ("a", "b"):
        (bench / "few" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (SIZE, SIZE)).save(bench / "few" / name / "0.png")
    assert study(command, bench, tmp_path / "out", *(text.format(bench) for text in more)) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(("command", "change"), [("diversity", ["--space", "pixels"]), ("incremental", ["--labels", "hard"])])
def test_a_folder_holds_one_study(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, change: list[str]) -> None:
    assert study(command, bench, tmp_path) == 0
    assert study(command, bench, tmp_path, *change) == 1
    assert re.search(r"holds a study of other settings \(.* was .*, is .*\); choose another folder", capsys.readouterr().err)


def test_a_folder_whose_name_has_an_equals_sign(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "a=b").symlink_to(bench / "one")
    assert study("diversity", bench, tmp_path / "out", "--sets", str(tmp_path / "a=b"), f"c={bench / 'two'}") == 0
    names = [row[0] for row in read_record(tmp_path / "out" / RECORD).tables[0].rows]
    assert names == [REAL, "a=b", "c"]

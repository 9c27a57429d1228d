"""The commands as a person types them: what they write and print, exit codes, one sentence on bad input, Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dwa_fast.commands.cli import _parse, run
from dwa_fast.data.manifest import read_manifest
from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum, sole_writer
from dwa_fast.models.architectures import build
from dwa_fast.models.checkpoint import TeacherInfo, load_teacher, save_teacher
from dwa_fast.report import published
from dwa_fast.report.records import read_record
from tests.nets import SIZE

QUICK = ["--size", str(SIZE), "--iterations", "3", "--batch-size", "5", "--steps", "2", "--backend", "reference"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickly squeezed teacher of digits at 8 pixels."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    assert run(["squeeze", "--recipe", "digits", "--output", str(path), "--size", str(SIZE), "--epochs", "2", "--padding", "1"]) == 0
    return path


def synthesize(teacher: Path, output: Path, *more: str) -> int:
    teachers = [] if "--teacher" in more else ["--teacher", str(teacher)]
    return run(["synthesize", "--recipe", "digits", *teachers, "--output", str(output), "--ipc", "2", *QUICK, *more])


def test_squeeze_synthesize_validate(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert synthesize(teacher, tmp_path / "set", "--backend", "auto") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("real images: 1347 of 10 classes\n")
    assert f"{tmp_path / 'set'}: 20 images" in printed
    manifest = read_manifest(tmp_path / "set")
    assert manifest["settings"]["teacher"] == checksum(teacher)
    assert manifest["teachers"] == [{"architecture": "small-resnet", "accuracy": load_teacher(teacher)[1].accuracy}]
    assert (manifest["settings"]["recipe"], manifest["settings"]["method"]) == ("digits", "dwa")
    arguments = ["validate", "--recipe", "digits", "--teacher", str(teacher), "--images", str(tmp_path / "set"), "--size", str(SIZE)]
    quick = ["--epochs", "2", "--padding", "1", "--students", "2", "--ipc", "1", "--output", str(tmp_path / "out")]
    assert run([*arguments, *quick]) == 0
    record = read_record(tmp_path / "out" / "record.json")
    (cell,) = record.data["cells"]
    assert (cell["recipe"], cell["method"], cell["student"], cell["ipc"]) == ("digits", "dwa", "small-resnet", 1)
    assert len(cell["accuracies"]) == len(cell["seeds"]) == 2
    assert [row[0] for row in record.tables[0].rows] == ["1", "2", "mean"]
    monkeypatch.setitem(published._DWA, ("digits", "small-resnet", 1), 50.0)  # as if the paper had it
    beside = published.beside_published(record)
    assert beside
    assert beside.note.endswith("differ from what was published in: batch_size, epochs, iterations, padding, size, steps.")
    assert re.search(rf"small-resnet: {cell['mean']:.2f} ± \d+\.\d\d % top-1, 2 students", capsys.readouterr().out)
    assert run([*arguments, *quick]) == 0  # nothing is trained again
    assert read_record(tmp_path / "out" / "record.json").data == record.data
    assert run([*arguments, *quick, "--temperature", "3"]) == 1
    assert "other settings (temperature was 20.0, is 3.0); choose another folder" in capsys.readouterr().err


def test_second_run_says_that_all_is_there(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthesize(teacher, tmp_path)
    capsys.readouterr()
    assert synthesize(teacher, tmp_path) == 0
    assert "20 images, 0 of them made now" in capsys.readouterr().out


def test_method_changes_the_defaults(teacher: Path, tmp_path: Path) -> None:
    assert synthesize(teacher, tmp_path, "--method", "sre2l") == 0
    settings = read_manifest(tmp_path)["settings"]
    assert (settings["initial"], settings["rho"], settings["lambda_var"]) == ("noise", 0.0, 0.01)


def test_size_changes_the_stages_of_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["synthesize", "--recipe", "folder", "--method", "fadrm", "--teacher", "t", "--output", "o"]
    assert _parse([*flags, "--size", "112"]).config.stage_sizes == (100, 112, 100, 112)
    assert _parse(flags).config.stage_sizes == (200, 224, 200, 224)
    assert _parse([*flags, "--size", "112", "--stage-sizes", "56", "112"]).config.stage_sizes == (56, 112)
    assert run([*flags, "--size", "0"]) == 1
    assert "size must be an integer of at least 1, got 0" in capsys.readouterr().err


def test_fast_changes_the_defaults() -> None:
    flags = ["--recipe", "cifar100", "--teacher", "t", "--output", "o", "--fast"]
    assert _parse(["synthesize", *flags]).config.iterations == 250
    assert _parse(["synthesize", *flags, "--iterations", "9"]).config.iterations == 9
    assert _parse(["compare", *flags]).synthesis.iterations == 250
    assert _parse(["synthesize", *flags[:-1]]).config.iterations == 1000


@pytest.mark.parametrize(
    ("name", "function"), [("squeeze", "squeeze"), ("validate", "validate"), ("relabel", "relabel"), ("incremental", "learn")]
)
def test_threads_of_a_training(
    name: str, function: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    """They hold while the command runs, and are those of before then."""
    found: list[int] = []

    def stop(*_: object, **__: object) -> None:
        found.append(torch.get_num_threads())
        raise InputError("stopped")

    monkeypatch.setattr(f"dwa_fast.commands.{name}.{function}", stop)
    assert synthesize(teacher, tmp_path / "set") == 0
    needed = {
        "squeeze": [],
        "incremental": ["--teacher", str(teacher), "--sets", str(tmp_path / "set")],
    }.get(name, ["--teacher", str(teacher), "--images", str(tmp_path / "set")])
    command = [name, "--recipe", "digits", "--size", str(SIZE), "--output", str(tmp_path / "out"), *needed]
    assert run([*command, "--threads", "1"]) == 1
    assert run(command) == 1
    assert found == [1, 2]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output", "out"], "stopped; the same command resumes from the batches, epochs and students that are on the disk"),
        ([], "stopped; without --output nothing is kept from which it could resume"),
    ],
)
def test_what_is_said_at_the_end_of_a_validate_that_is_stopped(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dwa_fast.commands.validate.Validate.run", stop)
    assert run(["validate", "--recipe", "digits", "--images", "x", *flags]) == 130
    assert capsys.readouterr().err == f"dwa-fast: {said}\n"


def test_several_teachers(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = TeacherInfo(architecture="small-resnet", classes=10, channels=1, size=SIZE, accuracy=90.0)
    save_teacher(tmp_path / "t.pt", build("small-resnet", classes=10, channels=1), info)
    more, stages = ["--teacher", str(teacher), str(tmp_path / "t.pt")], ["--method", "dwa+", "--stage-sizes", "6", str(SIZE)]
    assert synthesize(teacher, tmp_path / "set", *stages, *more) == 0
    settings = read_manifest(tmp_path / "set")["settings"]
    assert settings["teacher"] == [checksum(teacher), checksum(tmp_path / "t.pt")]
    assert (settings["method"], settings["initial"], settings["ascent"], settings["stage_sizes"]) == (
        "dwa+",
        "patches",
        "directed",
        [6, SIZE],
    )
    capsys.readouterr()
    assert synthesize(teacher, tmp_path / "set", *stages, *more) == 0
    assert "20 images, 0 of them made now" in capsys.readouterr().out
    assert synthesize(teacher, tmp_path / "set", *stages, "--teacher", *more[:0:-1]) == 1
    assert "teacher was " in capsys.readouterr().err
    assert synthesize(teacher, tmp_path / "other", *stages) == 1
    assert "--teacher must name the checkpoints of several teachers for method dwa+, got 1" in capsys.readouterr().err
    assert synthesize(teacher, tmp_path / "other", *more, "--architecture", "small-resnet") == 1
    assert "--architecture must name a network for each of the 2 teachers, got 1" in capsys.readouterr().err


def test_statistics_of_classes(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LPLD from the command line: pixels of its own, resumed, and refused where a batch would hold single images."""
    assert synthesize(teacher, tmp_path / "set", "--method", "lpld") == 0
    shown = capsys.readouterr()
    assert "20 images" in shown.out
    assert "statistics of classes: 0/1347" in shown.err  # every training image of the digits
    manifest = read_manifest(tmp_path / "set")
    expected = {"method": "lpld", "statistics": "class", "batch_ipc": 2, "initial": "noise"}
    assert {name: manifest["settings"][name] for name in expected} == expected
    assert len(manifest["losses"]) == 10  # a batch for each class
    assert synthesize(teacher, tmp_path / "running", "--method", "lpld", "--statistics", "running") == 0
    first = sorted(manifest["images"])[0]
    assert read_manifest(tmp_path / "running")["images"][first] != manifest["images"][first]
    (tmp_path / "set" / "images" / first).unlink()
    capsys.readouterr()
    assert synthesize(teacher, tmp_path / "set", "--method", "lpld") == 0
    assert "20 images, 2 of them made now" in capsys.readouterr().out
    assert read_manifest(tmp_path / "set")["images"] == manifest["images"]
    assert synthesize(teacher, tmp_path / "other", "--statistics", "class") == 1
    assert "statistics 'class' are those of several images of one class; set batch_ipc to more than 1" in capsys.readouterr().err


def test_bare_state_dict_is_taken_for_the_recipe_architecture(tmp_path: Path) -> None:
    torch.save({"state_dict": build("small-resnet", classes=10, channels=1).state_dict()}, tmp_path / "bare.pt")
    assert synthesize(tmp_path / "bare.pt", tmp_path / "set") == 0


def test_own_image_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog", "eel")):
            for index in range(4):
                path = tmp_path / "data" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 30), (80 * label, 20 * index, 99)).save(path)
    common = ["--recipe", "folder", "--data", str(tmp_path / "data"), "--size", "32"]
    small = ["--epochs", "1", "--batch-size", "4"]
    teacher, output = tmp_path / "t.pt", tmp_path / "set"
    assert run(["squeeze", *common, "--architecture", "convnet128", "--output", str(teacher), *small]) == 0
    assert run(["synthesize", *common, "--teacher", str(teacher), "--output", str(output), "--ipc", "2", "--iterations", "2"]) == 0
    validate = ["validate", *common, "--teacher", str(teacher), "--images", str(output), "--student", "convnet128", "--students", "1"]
    assert run([*validate, *small]) == 0
    assert read_manifest(output)["class_names"] == ["cat", "dog", "eel"]


def test_bad_images_stop_or_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the real images, the held-out ones and the set; a set with names of its own."""
    for folder in ("data/train", "data/test", "set"):
        for name in ("cat", "dog"):
            for index in range(3):
                path = tmp_path / folder / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (80 * index, 20, 99)).save(path)
        (tmp_path / folder / "dog" / "1.png").write_bytes(b"\x89PNG")
    common = ["--recipe", "folder", "--data", str(tmp_path / "data"), "--size", "32", "--epochs", "1", "--batch-size", "4"]
    squeeze = ["squeeze", *common, "--architecture", "convnet128", "--output", str(tmp_path / "t.pt")]
    validate = ["validate", *common, "--teacher", str(tmp_path / "t.pt"), "--images", str(tmp_path / "set"), "--student", "convnet128"]
    for command in (squeeze, [*validate, "--students", "1", "--ipc", "2"]):
        assert run(command) == 1
        error = capsys.readouterr().err
        assert re.search(r"dog/1\.png is no image that can be read: .*; with --skip-bad-images it is left out", error)
        assert run([*command, "--skip-bad-images"]) == 0
        printed = capsys.readouterr().out
        assert printed.count("skipped 1 image that cannot be read:\n  dog/1.png: ") == 2


BAD: dict[str, tuple[list[str], str]] = {
    "recipe": (["synthesize", "--recipe", "mnist"], "unknown recipe 'mnist'; known: digits, cifar10, cifar100, tiny, imagenet, folder"),
    "method": (["synthesize", "--recipe", "digits", "--method", "x"], "unknown method 'x'; known: dwa, sre2l,"),
    "rho": (["synthesize", "--recipe", "digits", "--rho", "-1"], "rho must be a finite number of at least 0, got -1.0"),
    "steps": (["synthesize", "--recipe", "digits", "--steps", "0"], "steps must be an integer of at least 1, got 0"),
    "T": (["synthesize", "--recipe", "digits", "--iterations", "-1"], "iterations must be an integer of at least 0, got -1"),
    "batch": (["synthesize", "--recipe", "digits", "--batch-size", "0"], "batch_size must be an integer of at least 1, got 0"),
    "ipc": (["synthesize", "--recipe", "digits", "--ipc", "0"], "ipc must be an integer of at least 1, got 0"),
    "device": (["synthesize", "--recipe", "digits", "--device", "tpu"], "unknown device 'tpu'"),
    "precision": (["synthesize", "--recipe", "digits", "--precision", "fp16"], "precision 'fp16' is not offered by back-end"),
    "digits with data": (["squeeze", "--recipe", "digits", "--data", "."], "the digits come with scikit-learn and take no --data, got .;"),
    "data": (["synthesize", "--recipe", "cifar10"], "data of layout 'cifar10' lie in a folder; name it with --data"),
    "no CIFAR": (["synthesize", "--recipe", "cifar10", "--data", "."], "or pass --download to fetch the first"),
    "folder": (["synthesize", "--recipe", "imagenet", "--data", "nowhere"], "nowhere is not a folder"),
    "images": (["validate", "--recipe", "digits", "--images", "nowhere"], "nowhere is not a folder"),
    "epochs": (["squeeze", "--recipe", "digits", "--epochs", "0"], "epochs must be an integer of at least 1, got 0"),
    "architecture": (["squeeze", "--recipe", "digits", "--architecture", "vit"], "unknown architecture 'vit'; known: resnet18, "),
    "demo ipc": (["demo", "--ipc", "0"], "ipc must be an integer of at least 1, got 0"),
    "demo method": (["demo", "--methods", "mtt"], "unknown method 'mtt'; known: real, dwa, sre2l, cda, rded, real-start,"),
    "threads": (
        ["synthesize", "--recipe", "digits", "--size", str(SIZE), "--threads", "0"],
        "threads must be an integer of at least 1, got 0",
    ),
    "no set": (["verify", "nowhere"], "nowhere does not exist"),
    "info": (["info", "--teacher", "nowhere.pt"], "checkpoint nowhere.pt does not exist"),
    "import of a folder": (["import", "."], ". is a folder; name .parquet files or PyTorch files. Class folders of images are taken"),
    "info of no teacher": (["info", "--architecture", "resnet18"], "say how to read a checkpoint; name it with --teacher"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if arguments[0] in ("synthesize", "validate"):
        arguments = [*arguments, "--teacher", str(teacher)]
    if arguments[0] not in ("info", "validate", "verify"):
        arguments = [*arguments, "--output", str(tmp_path / "out")]
    assert run(arguments) == 1
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("dwa-fast: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in output.err


@pytest.mark.parametrize("damage", [b"", b"hello"])
def test_bad_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes) -> None:
    (tmp_path / "t.pt").write_bytes(damage)
    assert synthesize(tmp_path / "t.pt", tmp_path / "set") == 1
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_unwritable_output(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert synthesize(teacher, tmp_path / "file" / "set") == 1
    assert "dwa-fast: cannot write to" in capsys.readouterr().err
    assert run(["squeeze", "--recipe", "digits", "--output", str(tmp_path / "file" / "t.pt")]) == 1


def test_teacher_of_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seven = build("small-resnet", classes=7, channels=1, size=SIZE)
    save_teacher(tmp_path / "t.pt", seven, TeacherInfo(architecture="small-resnet", classes=7, channels=1, size=SIZE))
    assert synthesize(tmp_path / "t.pt", tmp_path / "set") == 1
    assert "knows 7 classes, the data have 10" in capsys.readouterr().err


def test_a_teacher_that_is_not_used(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synthesize(teacher, tmp_path / "set") == 0
    arguments = [
        "validate",
        "--recipe",
        "digits",
        "--images",
        str(tmp_path / "set"),
        "--size",
        str(SIZE),
        "--epochs",
        "1",
        "--padding",
        "1",
    ]
    hard = [*arguments, "--students", "1", "--labels", "hard"]
    assert run([*hard, "--teacher", str(teacher)]) == 0
    assert "the labels are hard, and --teacher is not used" in capsys.readouterr().out
    assert run(hard) == 0
    assert "is not used" not in capsys.readouterr().out


def test_a_teacher_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same settings it is reported; of others, or of unknown ones, it stays."""
    file = tmp_path / "t.pt"
    squeeze = ["squeeze", "--recipe", "digits", "--output", str(file), "--size", str(SIZE), "--epochs", "1", "--padding", "1"]
    assert run(squeeze) == 0
    reached, before = capsys.readouterr().out.splitlines()[-1].partition(": ")[2], checksum(file)
    assert run(squeeze) == 0
    assert capsys.readouterr().out.endswith(f"{file}: complete, {reached} when it was trained\n")
    for flags, difference in ((["--epochs", "2"], "epochs was 1, is 2"), (["--seed", "1"], "seed was 0, is 1")):
        assert run([*squeeze, *flags]) == 1
        message = f"{file} holds a teacher of other settings ({difference}); choose another name, or pass --overwrite"
        assert message in capsys.readouterr().err
    assert checksum(file) == before
    assert run([*squeeze, "--seed", "1", "--overwrite"]) == 0
    assert run([*squeeze, "--seed", "1"]) == 0
    shutil.copy(file, tmp_path / "copy.pt")  # nothing is known of the training of a copy, or of a file that has changed
    assert run([*squeeze, "--seed", "1", "--output", str(tmp_path / "copy.pt")]) == 1
    capsys.readouterr()
    known = tmp_path / ".t.pt.json"
    for damaged in (known.read_text()[:-9], "[" * 100_000, "[]", "{}"):
        known.write_text(damaged)
        assert run([*squeeze, "--seed", "1"]) == 1
        assert capsys.readouterr().err.count("t.pt exists; choose another name, or pass --overwrite") == 1
    assert run([*squeeze, "--seed", "1", "--overwrite"]) == 0
    with file.open("ab") as content:
        content.write(b"x")
    assert run([*squeeze, "--seed", "1"]) == 1
    assert capsys.readouterr().err.count("t.pt exists; choose another name, or pass --overwrite") == 1


def test_squeeze_says_which_schedule_it_takes_and_promises_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--size", str(SIZE), "--schedule", "short", "--epochs", "2", "--padding", "1"]
    assert run(["squeeze", "--recipe", "digits", "--output", str(tmp_path / "t.pt"), *flags]) == 0
    assert "\nschedule short, epochs: 2; --schedule cosine trains as published\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["squeeze", "validate"])
def test_two_trainings_with_one_output(teacher: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused while the first runs; what a dead process has left is in nobody's way."""
    output, common = tmp_path / "out", ["--recipe", "digits", "--size", str(SIZE), "--epochs", "1", "--padding", "1"]
    if command == "squeeze":
        lock, more = tmp_path / ".out.lock", ["--seed", "1"]
    else:
        assert synthesize(teacher, tmp_path / "set") == 0
        output.mkdir()
        lock, more = output / ".lock", ["--images", str(tmp_path / "set"), "--teacher", str(teacher), "--students", "1"]
    arguments = [command, *common, *more, "--output", str(output)]
    with sole_writer(output, lock):
        assert run(arguments) == 1
    assert f"another process is writing {output}; wait until it ends, or choose another output" in capsys.readouterr().err
    lock.touch()
    assert run(arguments) == 0
    assert ("teacher: 1/" if command == "squeeze" else "1 student: 1/") in capsys.readouterr().err
    assert not lock.exists()


def test_existing_teacher_is_not_overwritten(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, unknown = checksum(teacher), tmp_path / "t.pt"
    shutil.copy(teacher, unknown)
    assert run(["squeeze", "--recipe", "digits", "--output", str(unknown)]) == 1
    assert "exists; choose another name, or pass --overwrite" in capsys.readouterr().err
    assert checksum(unknown) == before
    assert run(["squeeze", "--recipe", "digits", "--output", str(teacher.parent), "--overwrite"]) == 1
    sentence = f"{teacher.parent} is a folder; --output names the file of the teacher, such as {teacher.parent}/teacher.pt"
    assert sentence in capsys.readouterr().err


def test_info_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["versions"]["torch"] == torch.__version__
    assert content["auto"]["backend"] in content["back-ends"]
    assert run(["info"]) == 0
    assert "back-ends" in capsys.readouterr().out


def test_info_describes_a_teacher(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "--json", "--teacher", str(teacher)]) == 0
    described = json.loads(capsys.readouterr().out)["teacher"]
    assert described["architecture"] == "small-resnet"
    assert described["accuracy"] > 50
    assert described["traced"]
    assert described["fused"]["stem.1"] == "BatchNorm + ReLU"
    assert described["fused"]["blocks.0.bn2"] == "BatchNorm + addition + ReLU"
    assert described["fused"]["blocks.1.bn2"] == "BatchNorm + BatchNorm of the skip + ReLU"
    assert run(["info", "--teacher", str(teacher)]) == 0
    assert f"{described['accuracy']:.2f} %\n" in capsys.readouterr().out

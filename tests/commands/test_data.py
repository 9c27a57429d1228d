"""Commands with a teacher and data that do not belong together, as a person runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dwa_fast.commands.cli import run
from dwa_fast.data.manifest import read_manifest
from dwa_fast.models.checkpoint import load_teacher, save_teacher
from tests.nets import SIZE

NAMES = ("ant", "bee", "cat")
QUICK = ["--iterations", "2", "--batch-size", "5", "--steps", "1", "--backend", "reference"]
TRAIN = ["--epochs", "1", "--batch-size", "16", "--padding", "1", "--augmentation", "pad-crop"]


def write(folder: Path, names: tuple[str, ...], count: int) -> None:
    for number, name in enumerate(names):
        for index in range(count):
            path = folder / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (SIZE, SIZE), 20 + 80 * number + index).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of three classes, a teacher of them that knows them well, and a set."""
    folder = tmp_path_factory.mktemp("place")
    write(folder / "data" / "train", NAMES, 12)
    write(folder / "data" / "val", NAMES, 12)
    squeeze = ["squeeze", *common(folder), *TRAIN, "--architecture", "small-resnet", "--output", str(folder / "t.pt"), "--flip", "0"]
    assert run([*squeeze, "--epochs", "25", "--learning-rate", "0.05"]) == 0
    assert synthesize(folder, "set") == 0
    return folder


def common(folder: Path, data: str = "data", mean: str = ".3") -> list[str]:
    return ["--recipe", "folder", "--data", str(folder / data), "--size", str(SIZE), "--mean", mean, "--std", ".3"]


def synthesize(folder: Path, output: str, *more: str, teacher: str = "t.pt", data: str = "data", mean: str = ".3") -> int:
    arguments = ["synthesize", *common(folder, data, mean), *QUICK, "--teacher", str(folder / teacher), "--output", str(folder / output)]
    return run([*arguments, "--ipc", "2", *more])


def validate(folder: Path, *more: str, teacher: str = "t.pt", data: str = "data", mean: str = ".3", images: str = "set") -> int:
    arguments = ["validate", *common(folder, data, mean), *TRAIN, "--teacher", str(folder / teacher), "--images", str(folder / images)]
    return run([*arguments, "--student", "small-resnet", "--students", "1", *more])


def test_the_teacher_says_how_much_it_knows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_teacher(place / "t.pt")[1].class_names == list(NAMES)
    assert synthesize(place, "again") == 0
    error = capsys.readouterr().err
    assert "of 36 real images right" in error
    assert "gives only" not in error


def test_other_flags_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (synthesize, validate):
        arguments = ("other",) if command is synthesize else ()
        assert command(place, *arguments, mean=".5") == 1  # type: ignore[operator]
        assert "not mean 0.5 and std 0.3; pass --mean 0.3 --std 0.3" in capsys.readouterr().err
    assert synthesize(place, "other", "--size", "16") == 1
    assert "images of 8 × 8 pixels, not 16 × 16; pass --size 8" in capsys.readouterr().err
    assert not (place / "other").exists()
    assert validate(place, "--size", "16") == 1
    assert "set holds images of 8 × 8 pixels, not 16 × 16; pass --size 8" in capsys.readouterr().err
    study = ["compare", *common(place)[:-6], "--size", str(SIZE), "--teacher", str(place / "t.pt"), "--output", str(place / "study")]
    study += ["--student", "small-resnet"]
    assert run([*study, "--mean", ".5", "--std", ".5"]) == 1
    assert "pass --mean 0.3 --std 0.3" in capsys.readouterr().err
    diversity = ["diversity", *common(place)[:-6], "--sets", str(place / "set"), "--teacher", str(place / "t.pt"), "--size", str(SIZE)]
    assert run([*diversity, "--mean", ".5", "--std", ".3", "--output", str(place / "d")]) == 1
    assert "pass --mean 0.3 --std 0.3" in capsys.readouterr().err


def test_a_set_and_the_teacher_that_made_it_have_one_normalisation(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the checkpoint does not say it."""
    torch.save(load_teacher(place / "t.pt")[0].state_dict(), place / "bare.pth")
    architecture = ["--architecture", "small-resnet"]
    assert synthesize(place, "bare", *architecture, teacher="bare.pth") == 0
    arguments = [
        "validate",
        *common(place, mean=".5"),
        *TRAIN,
        "--images",
        str(place / "bare"),
        "--student",
        "small-resnet",
        "--students",
        "1",
    ]
    capsys.readouterr()
    assert run([*arguments, *architecture, "--teacher", str(place / "bare.pth")]) == 1
    assert "was made with mean 0.3 and std 0.3, not mean 0.5 and std 0.3, and with this teacher; pass --mean 0.3" in capsys.readouterr().err
    assert run([*arguments, "--labels", "hard"]) == 0
    assert "a teacher is given images of the normalisation that it was trained with" in capsys.readouterr().err


def test_a_permuted_teacher_is_noticed_and_put_right(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, _ = load_teacher(place / "t.pt")
    weights = {name: value.roll(1, 0) if name.startswith("fc.") else value for name, value in module.state_dict().items()}
    torch.save(weights, place / "rolled.pth")
    rolled = ["--architecture", "small-resnet"]
    assert synthesize(place, "rolled", *rolled, teacher="rolled.pth") == 0
    assert "output 0 is class cat, output 1 is class ant, output 2 is class bee; --classes FILE" in capsys.readouterr().err
    (place / "classes.txt").write_text("cat\nant\nbee\n")
    listed = [*rolled, "--classes", str(place / "classes.txt")]
    assert synthesize(place, "right", *listed, teacher="rolled.pth") == 0
    assert "gives only" not in capsys.readouterr().err
    assert read_manifest(place / "right")["settings"]["teacher_outputs"] == [1, 2, 0]
    images = [sorted(read_manifest(place / name)["images"].items()) for name in ("right", "set")]
    assert [name for name, _ in images[0]] == [name for name, _ in images[1]]
    assert synthesize(place, "right", *listed, teacher="rolled.pth") == 0
    assert synthesize(place, "right", *rolled, teacher="rolled.pth") == 1
    assert "teacher_outputs was [1, 2, 0], is None" in capsys.readouterr().err
    assert validate(place, *listed, teacher="rolled.pth") == 0
    assert "gives only" not in capsys.readouterr().err


def test_some_classes_of_a_teacher_and_of_a_set(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the names in the checkpoint and in the manifest."""
    write(place / "two" / "val", ("bee", "cat"), 12)
    for index in range(12):  # of the levels that the teacher knows
        Image.new("L", (SIZE, SIZE), 100 + index).save(place / "two" / "val" / "bee" / f"{index}.png")
        Image.new("L", (SIZE, SIZE), 180 + index).save(place / "two" / "val" / "cat" / f"{index}.png")
    assert validate(place, data="two") == 0
    printed = capsys.readouterr()
    assert "set: 2 of its 3 classes are among the real ones" in printed.err
    assert "gives only" not in printed.err
    info = load_teacher(place / "t.pt")[1]
    assert (info.classes, info.mean) == (3, (0.3,))


def test_classes_of_train_and_val_are_compared_before_anything_is_done(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "mixed" / "train", NAMES, 2)
    write(place / "mixed" / "val", ("bee", "cat", "zebra"), 2)
    for command in (
        ["squeeze", *common(place, "mixed"), "--architecture", "small-resnet", "--output", str(place / "n.pt")],
        ["synthesize", *common(place, "mixed"), "--teacher", str(place / "t.pt"), "--output", str(place / "n")],
    ):
        assert run(command) == 1
        assert "has class folders that" in capsys.readouterr().err
    assert validate(place, data="mixed") == 1
    assert "lacks: zebra, and it lacks ant; training and held-out images must be of the same classes" in capsys.readouterr().err
    assert not (place / "n.pt").exists()


def test_damaged_files_are_found_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last initial image of the last class, and a held-out one."""
    write(place / "bad" / "train", NAMES, 12)
    write(place / "bad" / "val", NAMES, 12)
    for split, name in (("train", "cat/1.png"), ("val", "bee/3.png")):
        path = place / "bad" / split / name
        path.write_bytes(path.read_bytes()[:45])
    assert synthesize(place, "damaged", "--initial-order", "sorted", data="bad") == 1
    assert "cat/1.png is no image that can be read" in capsys.readouterr().err
    assert not read_manifest(place / "damaged")["images"]
    assert validate(place, data="bad") == 1
    error = capsys.readouterr().err
    assert "bee/3.png is no image that can be read" in error
    assert "with --skip-bad-images it is left out" in error
    squeeze = ["squeeze", *common(place, "bad"), *TRAIN, "--architecture", "small-resnet", "--output", str(place / "bad.pt")]
    write(place / "bad" / "train", NAMES, 12)
    assert run([*squeeze, "--epochs", "100000"]) == 1
    assert "bee/3.png is no image" in capsys.readouterr().err


def test_a_checkpoint_without_the_new_fields_is_read(place: Path) -> None:
    module, info = load_teacher(place / "t.pt")
    save_teacher(place / "old.pt", module, info)
    content = torch.load(place / "old.pt", weights_only=True)
    for name in ("class_names", "mean", "std"):
        del content["dwa_fast"][name]
    torch.save(content, place / "old.pt")
    assert synthesize(place, "old", teacher="old.pt") == 0


def test_one_class_is_not_enough(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "one" / "train", NAMES[:1], 2)
    write(place / "one" / "val", NAMES[:1], 2)
    squeeze = ["squeeze", *common(place, "one"), *TRAIN, "--architecture", "small-resnet", "--output", str(place / "one.pt")]
    assert [run(squeeze), synthesize(place, "one-set", data="one"), validate(place, data="one")] == [1, 1, 1]
    assert capsys.readouterr().err.count("one has images of one class alone, 'ant'; expected a sub-folder for each of several") == 3
    assert not (place / "one.pt").exists()


def test_images_that_a_teacher_or_a_set_has_seen_are_not_held_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = ["--held-out-share", "0.25"]
    assert validate(place, *share) == 0
    error = capsys.readouterr().err
    assert error.count("was not made from the training images that are left where a share of 0.25 is held out") == 2
    squeeze = ["squeeze", *common(place), *TRAIN, *share, "--architecture", "small-resnet", "--output", str(place / "part.pt")]
    assert run(squeeze) == 0
    assert synthesize(place, "part", *share, teacher="part.pt") == 0
    assert validate(place, *share, images="part", teacher="part.pt") == 0
    assert "was not made from" not in capsys.readouterr().err


def test_a_misspelled_network_is_found_before_the_data_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = ["--recipe", "folder", "--data", str(tmp_path / "nowhere")]
    assert run(["squeeze", *nowhere, "--architecture", "resnet19", "--output", str(tmp_path / "t.pt")]) == 1
    assert run(["validate", *nowhere, "--student", "resnet19", "--images", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "unknown architecture 'resnet19'" in error
    assert "unknown student 'resnet19'" in error


def test_held_out_images_that_are_training_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of this module are the same files."""
    squeeze = ["squeeze", *common(place), *TRAIN, "--architecture", "small-resnet", "--output", str(place / "again.pt")]
    assert run(squeeze) == 0
    assert "36 of 36 held-out images that were compared are training images too, such as ant/0.png" in capsys.readouterr().err
    assert validate(place) == 0
    assert "the distilled set was made from these very held-out images" in capsys.readouterr().err

"""FKD files: students of other programs get what the teacher saw, students here get what other programs wrote; damaged files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dwa_fast import FkdConfig, InputError
from dwa_fast.commands.cli import run
from dwa_fast.config import StorageConfig, ValidationConfig
from dwa_fast.data.distilled import open_distilled
from dwa_fast.data.images import FileSet
from dwa_fast.data.loader import ImageCache, TrainingLoader
from dwa_fast.models.architectures import build
from dwa_fast.models.checkpoint import TeacherInfo, save_teacher
from dwa_fast.report.records import read_record
from dwa_fast.sets.store import BatchSpec, ImageStore
from dwa_fast.sets.verify import problems
from dwa_fast.training.fkd import ImageOrder
from dwa_fast.training.fkd_folder import FkdFolder
from dwa_fast.training.fkd_store import FkdPlans
from dwa_fast.training.relabel import relabel
from tests.files import contents
from tests.hostile import Harmful
from tests.nets import DIGITS, SIZE, small_set, small_teacher, stop_at
from tests.training import public_fkd
from tests.training.fkd_setups import CPU, CUTMIX, MEAN, MIXUP, PLAIN, STD, exact_logits, students, write


@pytest.mark.parametrize(
    "config",
    [CUTMIX, MIXUP, PLAIN, replace(CUTMIX, teacher_mode="train", accumulation=2, smallest_crop=0.5)],
    ids=["cutmix", "mixup", "none", "halves"],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_published_reader_finds_the_teachers_logits(tmp_path: Path, images: FileSet, config: ValidationConfig, precision: Any) -> None:
    """Of every image of every epoch, from the files alone, by SRe2L's rules."""
    fkd = write(tmp_path / "labels", images, config, FkdConfig(logits=precision))
    assert sorted(path.name for path in fkd.iterdir()) == ["epoch_0", "epoch_1", "epoch_2"]
    seen = 0
    for batch, logits in public_fkd.batches(fkd, images.folder, MEAN, STD, config.epochs):
        assert logits.dtype == (torch.float32 if precision == "fp32" else torch.float16)
        wanted = exact_logits(batch, config)
        assert torch.allclose(logits.double(), wanted, rtol=1e-5 if precision == "fp32" else 2**-10, atol=1e-5)
        seen += len(batch)
    assert seen == 3 * 110


@pytest.mark.parametrize("config", [CUTMIX, MIXUP, PLAIN], ids=["cutmix", "mixup", "none"])
def test_what_was_written_is_read(tmp_path: Path, images: FileSet, config: ValidationConfig) -> None:
    """The same images, views and mixes; and the logits are those of the images that a student gets."""
    fkd = write(tmp_path / "labels", images, config, FkdConfig(logits="fp32"))
    plans, found = FkdPlans(images, config, FkdConfig(), seed=0), FkdFolder(fkd, images, config).sampler(config, 110, 10, seed=7)
    other = FkdPlans(images, config, FkdConfig(), seed=1)
    for epoch in (2, 0):
        for written, read, unlike in zip(plans.epoch(epoch), found.epoch(epoch), other.epoch(epoch), strict=True):
            assert torch.equal(written.indices, read.indices)
            assert torch.equal(unlike.indices, read.indices)  # the order is that of the readers' seed
            assert written.views.boxes is not None
            assert read.views.boxes is not None
            assert not torch.equal(read.views.boxes, unlike.views.boxes)  # type: ignore[arg-type]
        for batch in TrainingLoader(ImageCache(images, CPU, 1.0), found, DIGITS.data, 0).epoch(epoch):
            assert batch.plan.logits is not None
            assert torch.allclose(batch.plan.logits.double(), exact_logits(batch.images.double(), config), rtol=1e-5, atol=1e-5)


def test_image_order_is_drawn_once_an_epoch() -> None:
    order, public = ImageOrder(20), public_fkd.sampler(20, 20)
    wanted = [indices for _ in range(4) for indices in public]
    first = order.epoch(1)
    assert order.epoch(1) is first
    assert [order.epoch(number) for number in (1, 3, 0, 2)] == [wanted[number] for number in (1, 3, 0, 2)]


def test_files_are_of_plain_types(tmp_path: Path, images: FileSet) -> None:
    fkd = write(tmp_path / "labels", images)
    for path in sorted(fkd.rglob("*.tar")):
        crops, flipped, partner, share, box, logits = torch.load(path, weights_only=True)
        count = len(flipped)
        assert (crops.dtype, crops.shape, flipped.dtype) == (torch.float32, (count, 4), torch.bool)
        assert partner.dtype == torch.int64
        assert sorted(partner.tolist()) == list(range(count))
        assert type(share) is float
        assert [type(edge) for edge in box] == [int] * 4
        assert (logits.dtype, logits.shape) == (torch.float16, (count, 10))
        cut = int(SIZE * (1 - share) ** 0.5)  # the share is not that of a box which the border cuts off
        assert box[2] - box[0] <= cut
        assert box[3] - box[1] <= cut
    assert torch.load(write(tmp_path / "none", images, PLAIN) / "epoch_0" / "batch_0.tar", weights_only=True)[2:5] == [None] * 3
    assert torch.load(write(tmp_path / "mixup", images, MIXUP) / "epoch_0" / "batch_0.tar", weights_only=True)[4] is None


@pytest.mark.parametrize("mixing", ["cutmix", "mixup", "none"])
def test_files_of_the_published_writer_are_read(tmp_path: Path, images: FileSet, mixing: Any) -> None:
    """With the NumPy integers that it leaves in them; students get the images that its teacher saw."""
    torch.manual_seed(0)
    config = replace(CUTMIX, mixing=mixing)
    seen = public_fkd.write(tmp_path / "fkd", images.folder, small_teacher(), MEAN, STD, 16, 3, mixing)
    if mixing == "cutmix":
        with pytest.raises(Exception, match=r"numpy\._?core\.multiarray\.scalar"):
            torch.load(tmp_path / "fkd" / "epoch_0" / "batch_0.tar", weights_only=True)
    labels = FkdFolder(tmp_path / "fkd", images, config)
    loader = TrainingLoader(ImageCache(images, CPU, 1.0), labels.sampler(config, 110, 10, seed=0), DIGITS.data, 0)
    read = [batch for epoch in range(3) for batch in loader.epoch(epoch)]
    assert len(read) == len(seen) == 21
    order = [path for path, _ in public_fkd.ImageFolder(str(images.folder)).samples]
    for batch, (indices, pixels, logits) in zip(read, seen, strict=True):
        assert [str(images.folder / images.files[index]) for index in batch.plan.indices] == [order[index] for index in indices]
        assert torch.allclose(batch.images, pixels, atol=1e-6)
        assert torch.equal(batch.plan.logits, logits)  # type: ignore[arg-type]
    assert students(images, tmp_path / "fkd", config).accuracies
    if mixing == "cutmix":  # allowed while it is read here, and then no more
        with pytest.raises(Exception, match=r"numpy\._?core\.multiarray\.scalar"):
            torch.load(tmp_path / "fkd" / "epoch_0" / "batch_0.tar", weights_only=True)


def test_image_numbers_of_gvbsm_go_before_the_seed(tmp_path: Path, images: FileSet) -> None:
    fkd = write(tmp_path / "labels", images, fkd=FkdConfig(sample_indices=True))
    before = FkdFolder(fkd, images, CUTMIX).read(1, 2)
    path = fkd / "epoch_1" / "batch_2.tar"
    content = torch.load(path, weights_only=True)
    assert content[6].dtype == torch.int64
    order = list(public_fkd.sampler(110, 16))
    assert content[6].tolist() != order[2]
    assert torch.load(fkd / "epoch_0" / "batch_2.tar", weights_only=True)[6].tolist() == order[2]
    torch.save([*content[:6], content[6].flip(0)], path)
    assert torch.equal(FkdFolder(fkd, images, CUTMIX).read(1, 2).indices, before.indices.flip(0))
    torch.save([*content[:6], content[6] + 100], path)
    with pytest.raises(InputError, match=r"batch_2\.tar holds labels of 16 images, expected 16 in 0 … 109"):
        FkdFolder(fkd, images, CUTMIX).read(1, 2)


def test_stopped_and_damaged_files_are_made_good(tmp_path: Path, images: FileSet) -> None:
    whole = write(tmp_path / "whole", images)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "stopped", images, progress=stop_at(10))
    with pytest.raises(InputError, match="is incomplete; the dwa-fast relabel command that wrote it resumes it"):
        students(images, tmp_path / "stopped")
    with pytest.raises(InputError, match="holds labels of 1 epochs, the training has 3"):
        students(images, tmp_path / "stopped" / "fkd")
    fkd = write(tmp_path / "stopped", images)
    assert contents(fkd) == contents(whole)
    shutil.copy(fkd / "epoch_0" / "batch_0.tar", fkd / "epoch_1" / "batch_0.tar")
    (fkd / "epoch_2" / "batch_1.tar").unlink()
    ticks: list[int] = []
    write(tmp_path / "stopped", images, progress=lambda done, total: ticks.append(done))
    assert ticks == list(range(8, 22))
    assert contents(fkd) == contents(whole)
    with pytest.raises(InputError, match=r"other settings \(logits was 'fp16', is 'fp32'\); choose another folder"):
        write(tmp_path / "stopped", images, fkd=FkdConfig(logits="fp32"))
    write(tmp_path / "stopped", images, replace(CUTMIX, epochs=4))
    assert {name: value for name, value in contents(fkd).items() if "epoch_3" not in name} == contents(whole)


Change = Callable[[list[Any]], None]


def put(place: int, value: Any) -> Change:
    def change(content: list[Any]) -> None:
        content[place] = value(content[place]) if callable(value) else value

    return change


def at(row: int, column: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[row, column] = value
        return tensor

    return change


DAMAGED: dict[str, tuple[Change, str]] = {
    "infinite logits": (put(5, at(3, 2, float("inf"))), "holds logits that are not finite"),
    "classes": (put(5, lambda logits: logits[:, :9]), "holds logits of 9 classes, the set has 10"),
    "logits": (put(5, lambda logits: logits.double()), "holds logits of a wrong type or shape"),
    "crop outside": (put(0, at(5, 0, 1.0)), "holds crops outside the image of 8 × 8 pixels"),
    "empty crop": (put(0, at(5, 3, 0.0)), "holds crops outside the image of 8 × 8 pixels"),
    "crop of no number": (put(0, at(5, 3, float("nan"))), "holds crops outside the image of 8 × 8 pixels"),
    "crop of another size": (
        put(0, lambda crops: torch.full_like(crops, 1 / 7)),
        "holds crops that are no whole pixels of 8 × 8; its labels are for images of another size",
    ),
    "crops": (put(0, lambda crops: crops[:-1]), "holds crops of a wrong type or shape"),
    "flips": (put(1, lambda flips: flips.long()), "holds flips of a wrong type or shape"),
    "partners": (put(2, lambda partner: partner + 16), "holds partners outside the batch of 16"),
    "share": (put(3, 1.5), r"holds a mix of share 1\.5, expected 0 to 1"),
    "box": (put(4, [0, 0, 9, 2]), r"holds the CutMix box \[0, 0, 9, 2\] outside the image of 8 × 8 pixels"),
    "turned box": (put(4, [5, 0, 3, 2]), r"holds the CutMix box \[5, 0, 3, 2\] outside the image"),
    "half a box": (put(4, [0, 0]), "holds a CutMix box that is not four integers"),
    "no partners": (put(2, None), "holds a mix without partners"),
    "cells of EDC": (lambda content: content.extend([torch.arange(16), [0, 1, 2, 3]]), "holds 8 elements, expected a list of 6"),
    "fewer images": (
        lambda content: content.__setitem__(slice(None), [*(part[:15] for part in content[:2]), None, None, None, content[5][:15]]),
        "holds labels of 15 images, expected 16 in 0 … 109",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused(tmp_path: Path, images: FileSet, change: Change, message: str) -> None:
    fkd = write(tmp_path / "labels", images, replace(CUTMIX, epochs=1))
    path = fkd / "epoch_0" / "batch_3.tar"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    labels = FkdFolder(fkd, images, replace(CUTMIX, epochs=1))
    assert len(labels.read(0, 2).indices) == 16
    with pytest.raises(InputError, match=r"epoch_0/batch_3\.tar " + message):
        labels.read(0, 3)


def test_code_in_files_is_not_run(tmp_path: Path, images: FileSet) -> None:
    fkd, canary = write(tmp_path / "labels", images), tmp_path / "canary"
    path = fkd / "epoch_0" / "batch_2.tar"
    content = torch.load(path, weights_only=True)
    for value in (Harmful(canary), np.zeros(4), np.float32(1), [np.datetime64(0, "s")]):
        torch.save([*content[:4], value, content[5]], path)
        with pytest.raises(InputError, match=r"FKD file .*batch_2\.tar cannot be read: it holds more than tensors"):
            students(images, fkd)
    assert not canary.exists()
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(InputError, match=r"FKD file .*batch_2\.tar cannot be read: it is cut short or damaged"):
        students(images, fkd)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "batch size": ({"batch_size": 20}, "holds batches of 16 images, got 20; pass --batch-size 16"),
    "epochs": ({"epochs": 4}, "holds labels of 3 epochs, the training has 4"),
    "mixing": ({"mixing": "mixup"}, "holds labels of mixing 'cutmix', got 'mixup'; pass --mixing cutmix"),
    "views": (
        {"augmentation": "pad-crop"},
        r"FKD files hold resized crops, flips and mixes alone, got .* pass --augmentation resized-crop",
    ),
    "cells": ({"shuffle_cells": 2}, "got shuffle_cells 2; pass --shuffle-cells 1"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_files_of_other_trainings_are_refused(tmp_path: Path, images: FileSet, changes: dict[str, Any], message: str) -> None:
    fkd = write(tmp_path / "labels", images)
    with pytest.raises(InputError, match=message):
        students(images, fkd, replace(CUTMIX, **changes))
    if "FKD files hold" in message or "shuffle" in message:
        with pytest.raises(InputError, match=message):
            write(tmp_path / "others", images, replace(CUTMIX, **changes))


def test_files_of_other_sets_are_refused(tmp_path: Path, images: FileSet) -> None:
    fkd = write(tmp_path / "labels", images)
    fewer = images.select(range(100))
    with pytest.raises(InputError, match=r"for all images of a folder, got 100 of the 110 in .*; dwa-fast export --to folders --ipc"):
        students(fewer, fkd)
    with pytest.raises(InputError, match="FKD files are for all images of a folder"):
        write(tmp_path / "fewer", fewer)
    with pytest.raises(InputError, match=r"other settings \(layout was 'fkd', is None; .*choose another folder"):
        relabel(images, small_teacher(), replace(DIGITS, validation=CUTMIX), output=tmp_path / "labels", device=CPU)
    (images.folder / "new003" / "id4.png").unlink()
    others = open_distilled(images.folder, SIZE, 1, images.class_names)[0]
    with pytest.raises(InputError, match="holds labels of 110 images, the set has 109"):
        students(others, fkd)
    with pytest.raises(InputError, match=r"holds soft labels of other settings \(images was "):
        students(others, tmp_path / "labels")
    with pytest.raises(InputError, match=r"keep a share of all batches, not one epoch in 4; pass --pool-share 0\.25, not --pool"):
        write(tmp_path / "pool", others, pool=4)


def test_folders_with_gaps_are_refused(tmp_path: Path, images: FileSet) -> None:
    fkd = write(tmp_path / "labels", images)
    (fkd / ".DS_Store").write_bytes(b"")  # counts as an epoch in the published reader, not here
    assert students(images, fkd).accuracies
    (fkd / "epoch_1" / "batch_6.tar").unlink()
    with pytest.raises(InputError, match="holds 7 batches of epoch 0 and 6 of epoch 1"):
        students(images, fkd)
    shutil.move(fkd / "epoch_1", fkd / "epoch_5")
    with pytest.raises(InputError, match="holds FKD files of 3 epochs, but not number 1; expected all from 0 on"):
        students(images, fkd)


class Loud(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 10), 1e6)


def test_logits_beyond_half_precision(tmp_path: Path, images: FileSet) -> None:
    with pytest.raises(InputError, match="logits of epoch 0 are not finite in half precision; --logits fp32 stores them in full"):
        write(tmp_path / "half", images, teacher=Loud())
    fkd = write(tmp_path / "full", images, fkd=FkdConfig(logits="fp32"), teacher=Loud())
    assert torch.load(fkd / "epoch_0" / "batch_0.tar", weights_only=True)[5].eq(1e6).all()


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Relabel, verify, and validate from the index's folder and from that of the files."""
    data = small_set(2)
    images = ImageStore(tmp_path / "set", {}, data.class_names, StorageConfig(losses_every=0))
    images.write(BatchSpec(0, 0, list(range(10))), data.pixels[0::2])
    images.write(BatchSpec(1, 1, list(range(10))), data.pixels[1::2])
    images.finish([BatchSpec(0, 0, list(range(10))), BatchSpec(1, 1, list(range(10)))])
    teacher = build("small-resnet", classes=10, channels=1)
    save_teacher(tmp_path / "t.pt", teacher, TeacherInfo(architecture="small-resnet", classes=10, channels=1, size=SIZE))
    views = ["--augmentation", "resized-crop", "--mixing", "cutmix", "--mixing-alpha", "1", "--batch-size", "8", "--epochs", "4"]
    common = ["--recipe", "digits", "--images", str(tmp_path / "set"), "--size", str(SIZE), *views]
    for name, flags in (("whole", []), ("pool", ["--pool-share", "0.5"])):
        output = tmp_path / "set" / name
        command = ["relabel", *common, "--teacher", str(tmp_path / "t.pt"), "--output", str(output), "--layout", "fkd", *flags]
        assert run([*command, "--dry-run"]) == 0
        assert f"soft labels of {2 if flags else 4} epochs × 20 images × 10 classes" in capsys.readouterr().out
        assert not output.exists()
        assert run(command) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "with the slash at its end, and train-dir" in said
        assert not list(problems(tmp_path / "set"))
        for labels in (output, output / "fkd"):
            out = tmp_path / f"{name}-{labels.name}"
            assert run(["validate", *common, "--soft-labels", str(labels), "--students", "1", "--output", str(out)]) == 0
            assert len(read_record(out / "record.json").data["cells"][0]["accuracies"]) == 1
    again = ["validate", *common, "--soft-labels", str(tmp_path / "set" / "whole" / "fkd"), "--teacher", str(tmp_path / "t.pt")]
    assert run([*again, "--students", "1"]) == 0
    assert "fkd does not say whose soft labels it holds: the teacher is not used" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "set" / "whole" / "fkd" / "epoch_1" / "batch_0.tar").write_bytes(b"PK")
    assert list(problems(tmp_path / "set")) == [
        "whole: the soft labels of epoch 1 are missing or have changed; the relabel command makes them again"
    ]
    capsys.readouterr()
    plain = ["relabel", *common, "--teacher", str(tmp_path / "t.pt"), "--output", str(tmp_path / "own")]
    assert run([*plain, "--pool-share", "0.5"]) == 1
    assert "--logits, --sample-indices and --pool-share are for FKD files; pass --layout fkd" in " ".join(capsys.readouterr().err.split())

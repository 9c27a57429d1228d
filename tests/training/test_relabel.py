"""Soft labels on disk: the same views, mixes and students as labels made as training goes; resumed; never trusted blindly."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dwa_fast import InputError
from dwa_fast.commands.cli import run
from dwa_fast.config import StorageConfig, ValidationConfig
from dwa_fast.data.loader import ImageCache, RandomSampler, TrainingLoader
from dwa_fast.io.files import checksum
from dwa_fast.models.architectures import build
from dwa_fast.models.checkpoint import TeacherInfo, save_teacher
from dwa_fast.recipes import recipe
from dwa_fast.report.records import read_record
from dwa_fast.seeding import derive
from dwa_fast.sets.store import BatchSpec, ImageStore
from dwa_fast.training import state
from dwa_fast.training.fit import predict, teacher_labels
from dwa_fast.training.label_store import LabelStore, StoredSampler, epoch_bytes
from dwa_fast.training.relabel import label_bytes, relabel, stored_epochs
from dwa_fast.training.validate import ValidationResult, validate
from tests.files import contents
from tests.hostile import Harmful
from tests.nets import DIGITS, SIZE, small_set, small_teacher, stop_at, tight

CPU = torch.device("cpu")
QUICK = replace(DIGITS.validation, epochs=4, batch_size=20, padding=1, flip=0.5, students=1)  # three steps an epoch
CUTMIX = replace(QUICK, augmentation="resized-crop", mixing="cutmix", mixing_alpha=1.0)
PLAIN = replace(QUICK, augmentation="none", flip=0.0, mixing="none")
VARIED = replace(CUTMIX, smallest_crop=0.5, shuffle_cells=2, rand_augment=2, rand_magnitude=5)


class Halved(nn.Module):
    """A teacher that answers in half precision, as its answers are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_teacher()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images).half().float()
        return logits


def store(folder: Path, config: ValidationConfig = QUICK, teacher: Any = None, **more: Any) -> LabelStore:
    return relabel(small_set(), teacher or small_teacher(), replace(DIGITS, validation=config), output=folder, device=CPU, **more)


def students(config: ValidationConfig, teacher: Any, **more: Any) -> ValidationResult:
    return validate(small_set(), small_set(8), teacher, "small-resnet", replace(DIGITS, validation=config), device=CPU, **more)


@pytest.mark.parametrize(
    "config",
    [QUICK, CUTMIX, PLAIN, VARIED, replace(QUICK, teacher_mode="train")],
    ids=["pad", "crop", "plain", "cells and RandAugment", "train mode"],
)
def test_stored_lessons_are_those_of_training(tmp_path: Path, config: ValidationConfig) -> None:
    """Images bit for bit, logits as the teacher gives them for exactly these images, rounded to half precision."""
    data, teacher, found = small_set(), small_teacher(), store(tmp_path, config)
    pixels, own = ImageCache(data, CPU, 1.0), derive(0, "student", 0)
    online = TrainingLoader(pixels, RandomSampler(data, config, seed=own), DIGITS.data, config.padding)
    stored = TrainingLoader(pixels, StoredSampler(found, config, len(data.labels), 10, seed=own), DIGITS.data, config.padding)
    teacher.train(config.teacher_mode == "train")
    for epoch in range(config.epochs):
        for one, two in zip(online.epoch(epoch), stored.epoch(epoch), strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.labels, two.labels)
            assert one.plan.mix.share == two.plan.mix.share
            with torch.no_grad():
                teacher_logits = predict(teacher, one.images, "fp32")
            assert two.plan.logits is not None
            assert torch.allclose(teacher_logits, two.plan.logits.float(), rtol=2**-10, atol=1e-5)  # rounded to float16


def test_labels_are_computed_in_the_precision_of_the_steps(tmp_path: Path) -> None:
    """Those on the disk and those of a training; the settings of fp32 labels are what they were before there was a choice."""
    config, teacher = replace(QUICK, precision="bf16"), small_teacher()
    rounded, exact = store(tmp_path / "bf16", config), store(tmp_path / "fp32")
    assert rounded.settings["label_precision"] == "bf16"
    assert "label_precision" not in exact.settings
    sampler = StoredSampler(rounded, config, len(small_set().labels), 10, seed=derive(0, "student", 0))
    loader = TrainingLoader(ImageCache(small_set(), CPU, 1.0), sampler, DIGITS.data, config.padding)
    batch = next(iter(loader.epoch(0)))
    assert batch.plan.logits is not None
    with torch.no_grad():
        expected = predict(teacher, batch.images, "bf16")
    live = teacher_labels([teacher], config, (1, SIZE, SIZE), CPU)(batch)
    for found in (batch.plan.logits.float(), live):
        assert torch.equal(found, found.bfloat16().float())
        assert (found - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(InputError, match=r"label_precision was 'bf16'"):
        store(tmp_path / "bf16")
    assert students(QUICK, None, soft_labels=tmp_path / "bf16").mean >= 0  # a training in fp32 takes labels that were made in bf16


@pytest.mark.parametrize("config", [QUICK, CUTMIX], ids=["pad and mixup", "crop and cutmix"])
def test_students_are_those_of_a_teacher_that_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ValidationConfig) -> None:
    """To the bit of their weights, so that only the rounding can tell stored labels from a teacher's; also where they were stopped."""
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    config = replace(config, temperature=1.0, learning_rate=0.02)
    store(tmp_path / "labels", config)

    def weights(name: str, teacher: nn.Module | None, stops: Sequence[int], **more: Any) -> dict[str, torch.Tensor]:
        for step in stops:
            with pytest.raises(KeyboardInterrupt):
                students(config, teacher, resume_dir=tmp_path / name, progress=stop_at(step), **more)
        content: dict[str, torch.Tensor] = torch.load(tmp_path / name / "student0.state", weights_only=True)["weights"]
        return content

    online = weights("online", Halved(), [11])  # after three epochs of four
    stored = weights("stored", None, [7, 11], soft_labels=tmp_path / "labels")
    assert all(torch.equal(online[name], stored[name]) for name in online)
    exact = weights("exact", small_teacher(), [11])
    assert any(not torch.equal(online[name], exact[name]) for name in online)
    assert students(config, None, soft_labels=tmp_path / "labels") == students(config, Halved())


def test_stopped_and_damaged_labels_are_made_good(tmp_path: Path) -> None:
    store(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "stopped", progress=stop_at(8))
    with pytest.raises(InputError, match="is incomplete; the dwa-fast relabel command that wrote it resumes it"):
        students(QUICK, None, soft_labels=tmp_path / "stopped")
    ticks: list[int] = []
    store(tmp_path / "stopped", progress=lambda done, total: ticks.append(done))
    assert ticks == list(range(7, 13))
    (tmp_path / "stopped" / "epoch001.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"epoch001\.pt is missing or has changed since it was written"):
        students(QUICK, None, soft_labels=tmp_path / "stopped")
    found = store(tmp_path / "stopped")
    assert found.missing == []
    assert same_tensors(tmp_path / "whole", tmp_path / "stopped")


def same_tensors(one: Path, two: Path) -> bool:
    """Whether two stores hold the same tensors; archives also hold the name of the file that they were written as."""
    for number in range(4):
        first, second = (torch.load(folder / f"epoch{number:03d}.pt", weights_only=True) for folder in (one, two))
        if first.keys() != second.keys() or not all(torch.equal(first[name], second[name]) for name in first):
            return False
    return True


def test_a_store_of_more_epochs_begins_with_the_smaller_one(tmp_path: Path) -> None:
    store(tmp_path, replace(QUICK, epochs=2))
    before = contents(tmp_path)
    found = store(tmp_path)
    assert found.epochs == 4
    assert {name: contents(tmp_path)[name] for name in before if name != "labels.json"} == {
        name: value for name, value in before.items() if name != "labels.json"
    }
    store(tmp_path / "whole")
    assert same_tensors(tmp_path, tmp_path / "whole")


def test_a_pool_is_not_taken_from_a_folder_of_more_epochs(tmp_path: Path) -> None:
    """Students would use all of them, and be better than those of the pool."""
    store(tmp_path, pool=2)
    assert store(tmp_path, pool=2).epochs == 2
    store(tmp_path)
    with pytest.raises(InputError, match="holds the labels of 4 epochs, which students would use, not of 2; choose another folder"):
        store(tmp_path, pool=2)


def test_pool_is_used_again_and_again(tmp_path: Path) -> None:
    """Every round takes every stored epoch once, in an order of its own and of the student's."""
    config = replace(QUICK, epochs=20)
    found = store(tmp_path, config, pool=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch000.pt", "epoch001.pt", "epoch002.pt", "epoch003.pt", "labels.json"]
    data = small_set()
    sampler = StoredSampler(found, config, len(data.labels), 10, seed=1)
    rounds = [[sampler.entry(4 * again + place) for place in range(4)] for again in range(5)]
    assert rounds[0] == [0, 1, 2, 3]
    assert all(sorted(each) == [0, 1, 2, 3] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    other = StoredSampler(found, config, len(data.labels), 10, seed=2)
    assert [other.entry(number) for number in range(20)] != [entry for each in rounds for entry in each]
    assert torch.equal(sampler.epoch(9)[0].indices, sampler.epoch(rounds[2][1])[0].indices)
    assert len(students(config, None, soft_labels=tmp_path).accuracies) == 1
    assert [stored_epochs(config, pool) for pool in (1, 3, 10, 30)] == [20, 7, 2, 1]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "views": (
        {"flip": 0.0, "mixing": "none"},
        r"other settings \(flip was 0.5, is 0.0; mixing was 'mixup', is 'none'\); relabel with these",
    ),
    "batches": ({"batch_size": 10}, r"other settings \(batch_size was 20, is 10\)"),
    "hard labels": ({"labels": "hard"}, "stored soft labels are not used by students with hard labels"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_labels_of_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    store(tmp_path, replace(QUICK, epochs=1))
    with pytest.raises(InputError, match=message):
        students(replace(QUICK, **changes), None, soft_labels=tmp_path)


def test_labels_of_other_images_and_teachers_are_refused(tmp_path: Path) -> None:
    store(tmp_path, replace(QUICK, epochs=1))
    with pytest.raises(InputError, match=r"holds soft labels of other settings \(images was '[0-9a-f]{12}…', is '[0-9a-f]{12}…'\)"):
        validate(small_set(5), small_set(), None, "small-resnet", replace(DIGITS, validation=QUICK), device=CPU, soft_labels=tmp_path)
    with pytest.raises(InputError, match=r"other settings \(teacher was '[0-9a-f]{12}…', is '[0-9a-f]{12}…'\)"):
        students(QUICK, small_teacher(1), soft_labels=tmp_path)
    assert students(replace(QUICK, epochs=1), small_teacher(), soft_labels=tmp_path).accuracies
    with pytest.raises(InputError, match=r"holds soft labels of other settings \(seed was 0, is 3\); choose another folder"):
        store(tmp_path, seed=3)
    with pytest.raises(InputError, match="soft labels come from a teacher or from the disk; name a teacher, or the folder"):
        students(QUICK, None)
    assert students(replace(QUICK, labels="hard", epochs=1), None).accuracies
    with pytest.raises(InputError, match=r"holds no labels\.json; dwa-fast relabel makes soft labels"):
        students(QUICK, None, soft_labels=tmp_path / "nowhere")


def test_a_store_from_anywhere_is_read_safely(tmp_path: Path) -> None:
    """Its checksums may be its own: code in it is not run, and indices that lead nowhere are refused."""
    found = store(tmp_path, replace(QUICK, epochs=1))
    path, canary = tmp_path / "epoch000.pt", tmp_path / "canary"
    content = torch.load(path, weights_only=True)

    def plant(value: object) -> None:
        torch.save(value, path)
        index = json.loads((tmp_path / "labels.json").read_text())
        index["checksums"]["0"] = checksum(path)
        (tmp_path / "labels.json").write_text(json.dumps(index))

    plant({**content, "partner": Harmful(canary)})
    with pytest.raises(InputError, match="holds more than tensors"):
        students(QUICK, None, soft_labels=tmp_path)
    assert not canary.exists()
    for name, value in (("indices", content["indices"] + 1), ("partner", content["partner"] + 20), ("offsets", content["offsets"] - 1)):
        plant({**content, name: value})
        with pytest.raises(InputError, match=r"does not hold the labels that labels\.json says; remove the folder"):
            students(QUICK, None, soft_labels=tmp_path)
    broken = content["logits"].clone()
    broken[3, 2] = float("nan")
    plant({**content, "logits": broken})
    with pytest.raises(InputError, match=r"epoch000\.pt holds logits that are not finite; remove the folder, and make them again"):
        students(QUICK, None, soft_labels=tmp_path)
    for share in (float("nan"), -0.5, 1.5):
        plant({**content, "share": torch.full_like(content["share"], share)})
        with pytest.raises(InputError, match=r"does not hold the labels that labels\.json says; remove the folder"):
            students(QUICK, None, soft_labels=tmp_path)
    plant({**content, "logits": content["logits"][:, :9]})
    with pytest.raises(InputError, match=r"does not hold the labels that labels\.json says"):
        students(QUICK, None, soft_labels=tmp_path)
    (tmp_path / "labels.json").write_text("[]")
    with pytest.raises(InputError, match=r"labels\.json cannot be read: .*; remove it to make all labels again"):
        students(QUICK, None, soft_labels=tmp_path)
    assert found.epochs == 1


def test_logits_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    class Loud(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 10), 1e6)

    with pytest.raises(InputError, match=r"logits of epoch 0 are not finite in half precision, .*; dwa-fast validate --teacher computes"):
        store(tmp_path, QUICK, Loud())


def test_teachers_that_are_not_finite_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    teacher = small_teacher()
    teacher.get_buffer("stem.1.running_var")[2] = float("inf")
    with pytest.raises(InputError, match=r"not finite: running_var of layer 'stem\.1' \(1 infinite of 8\); train it again"):
        store(tmp_path / "labels", QUICK, teacher)
    with pytest.raises(InputError, match="teacher gives logits of 7 classes, the data have 10"):
        store(tmp_path / "labels", QUICK, build("small-resnet", classes=7, channels=1, size=SIZE).eval())
    with pytest.raises(InputError, match="teacher with one value per channel"):
        store(tmp_path / "labels", replace(QUICK, batch_size=1, teacher_mode="train"), tight(10, 1, SIZE))
    assert not (tmp_path / "labels").exists()
    store(tmp_path / "labels", replace(QUICK, batch_size=1, epochs=1), tight(10, 1, SIZE).eval())


@pytest.mark.parametrize("config", [QUICK, CUTMIX, PLAIN, VARIED], ids=["pad", "crop", "plain", "cells and RandAugment"])
def test_size_on_disk_is_told_beforehand(tmp_path: Path, config: ValidationConfig) -> None:
    store(tmp_path, config)
    written = sum(path.stat().st_size for path in tmp_path.glob("epoch*.pt"))
    expected = label_bytes(config, len(small_set().labels), 10)
    assert expected == 4 * epoch_bytes(config, 60, 10)
    assert abs(written - expected) < 4 * 1000
    imagenet = label_bytes(recipe("imagenet").validation, 50_000, 1000)
    assert 30e9 < imagenet < 31e9  # logits alone: 50,000 images × 300 epochs × 1,000 classes × 2 bytes
    assert label_bytes(recipe("imagenet").validation, 50_000, 1000, pool=10) == imagenet / 10


def test_too_small_a_disk_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"has 9.31e-07 GiB left, but the labels need .* GiB; --pool keeps fewer"):
        store(tmp_path)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Relabel, then validate without the teacher; the size alone, without writing anything."""
    data = small_set(1)
    images = ImageStore(tmp_path / "set", {}, data.class_names, StorageConfig(losses_every=0))
    images.write(BatchSpec(0, 0, list(range(10))), data.pixels)
    save_teacher(
        tmp_path / "t.pt",
        build("small-resnet", classes=10, channels=1),
        TeacherInfo(architecture="small-resnet", classes=10, channels=1, size=SIZE),
    )
    common = ["--recipe", "digits", "--images", str(tmp_path / "set"), "--size", str(SIZE), "--epochs", "4", "--padding", "1"]
    relabelling = ["relabel", *common, "--teacher", str(tmp_path / "t.pt"), "--output", str(tmp_path / "labels"), "--pool", "2"]
    assert run([*relabelling, "--dry-run"]) == 0
    assert re.search(r"soft labels of 2 epochs × 10 images × 10 classes: 0\.00\d+ MiB on the disk\n", capsys.readouterr().out)
    assert not (tmp_path / "labels").exists()
    assert run(relabelling) == 0
    assert "complete; dwa-fast validate --soft-labels" in capsys.readouterr().out
    arguments = ["validate", *common, "--soft-labels", str(tmp_path / "labels"), "--students", "1", "--output", str(tmp_path / "out")]
    assert run(arguments) == 0
    assert len(read_record(tmp_path / "out" / "record.json").data["cells"][0]["accuracies"]) == 1


@pytest.mark.parametrize(("epochs", "level"), [(5, "WARNING"), (8, "INFO"), (4, None)])
def test_fewer_epochs_of_labels_than_of_the_training_are_said(
    epochs: int, level: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(tmp_path)
    with caplog.at_level("INFO", "dwa_fast"):
        students(replace(QUICK, epochs=epochs), None, soft_labels=tmp_path)
    said = [record.levelname for record in caplog.records if f"soft labels of 4 epochs, and the training has {epochs}" in record.message]
    assert said == ([level] if level else [])


@pytest.mark.parametrize("name", ["smallest_crop", "shuffle_cells", "rand_augment", "rand_magnitude"])
def test_labels_of_other_views_are_refused(tmp_path: Path, name: str) -> None:
    """Also those that are stored without the setting, where it has its default."""
    varied, plain = replace(VARIED, epochs=1), replace(VARIED, epochs=1, **{name: getattr(ValidationConfig(), name)})
    for number, (written, read) in enumerate(((varied, plain), (plain, varied))):
        store(tmp_path / str(number), written)
        with pytest.raises(InputError, match=f"holds soft labels of other settings .*{name} was "):
            students(read, None, soft_labels=tmp_path / str(number))


def test_labels_of_another_torchvision_are_refused(tmp_path: Path) -> None:
    config = replace(VARIED, epochs=1)
    store(tmp_path, config)
    content = json.loads((tmp_path / "labels.json").read_text())
    content["settings"]["torchvision"] = "0.1"
    (tmp_path / "labels.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"torchvision was '0\.1', is '"):
        students(config, None, soft_labels=tmp_path)


def test_labels_of_several_teachers_in_parts(tmp_path: Path) -> None:
    """What was computed otherwise is refused where teachers are named; the batch size may be a rule, and is stored as a number."""
    config = replace(QUICK, epochs=1, batch_size=None, teacher_mode="train", accumulation=2, teacher_mean="balanced")
    teachers = [small_teacher(), small_teacher(1)]
    found = store(tmp_path, config, teachers)
    expected = {"batch_size": 10, "accumulation": 2, "teacher_mean": "balanced", "teacher_mode": "train"}
    assert {name: found.settings[name] for name in expected} == expected
    assert students(replace(config, batch_size=10), teachers, soft_labels=tmp_path).accuracies
    assert students(config, None, soft_labels=tmp_path).accuracies
    for changes in ({"accumulation": 1}, {"teacher_mean": "plain"}):
        with pytest.raises(InputError, match=f"other settings .{next(iter(changes))} was "):
            students(replace(config, **changes), teachers, soft_labels=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"other settings \(teacher was "):
        students(config, teachers[:1], soft_labels=tmp_path)


def test_cells_in_no_order_are_refused(tmp_path: Path) -> None:
    store(tmp_path, replace(VARIED, epochs=1))
    path, index = tmp_path / "epoch000.pt", json.loads((tmp_path / "labels.json").read_text())
    content = torch.load(path, weights_only=True)
    for name, value in (("cells", torch.ones_like(content["cells"])), ("augment_seed", -1 - content["augment_seed"])):
        torch.save({**content, name: value}, path)
        index["checksums"]["0"] = checksum(path)
        (tmp_path / "labels.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match=r"does not hold the labels that labels\.json says"):
            students(replace(VARIED, epochs=1), None, soft_labels=tmp_path)

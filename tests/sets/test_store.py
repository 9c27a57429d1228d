"""The files of a set: entries of batches that are damaged, shared or of another set, full disks."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dwa_fast import InputError
from dwa_fast.config import StorageConfig
from dwa_fast.data.manifest import image_name, read_manifest
from dwa_fast.data.pixels import to_levels
from dwa_fast.data.set_layout import IMAGES
from dwa_fast.io.files import is_left_over
from dwa_fast.sets import store as store_module
from dwa_fast.sets.distill import batch_specs
from dwa_fast.sets.loss_log import read_losses, subsample, to_jsonl
from dwa_fast.sets.store import BatchSpec, ImageStore
from dwa_fast.sets.verify import problems
from tests.files import contents

CLASSES = ["a", "b", "c"]
BATCHES = batch_specs(3, 4, 2)


def store_in(folder: Path, **settings: Any) -> ImageStore:
    return ImageStore(folder, {"seed": 0, **settings}, CLASSES)


def fill(store: ImageStore, batches: list[BatchSpec]) -> None:
    """What a run would write: everything depends on the batch alone."""
    for batch in batches:
        source = torch.Generator().manual_seed(batch.number)
        levels = torch.randint(0, 256, (len(batch.labels), 3, 5, 4), dtype=torch.uint8, generator=source)
        store.write(batch, levels, torch.rand(25, 3, generator=source))


def make(folder: Path, batches: list[BatchSpec] = BATCHES) -> list[int]:
    """A whole run; returns the numbers of the batches that it had to make."""
    store = store_in(folder)
    missing = store.unfinished(batches)
    if missing:
        store.begin()
    fill(store, missing)
    assert store.finish(batches) == []
    return [batch.number for batch in missing]


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    make(tmp_path / "whole")
    return contents(tmp_path / "whole")


def test_pixels_are_rounded_not_cut() -> None:
    assert to_levels(torch.tensor([0.0, 0.9999, 0.5019, -3.0, 7.0])).tolist() == [0, 255, 128, 0, 255]


def batch_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(store_module.BATCH_FILES))


def test_finished_batches_have_entries_until_the_manifest_includes_them(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    fill(store, BATCHES[:3])
    assert len(batch_files(tmp_path)) == 3
    assert read_manifest(tmp_path)["images"] == {}
    assert store.finish(BATCHES) == BATCHES[3:]
    assert not read_manifest(tmp_path)["complete"]
    fill(store, BATCHES[3:])
    assert store.finish(BATCHES) == []
    manifest = read_manifest(tmp_path)
    assert (manifest["complete"], len(manifest["images"]), len(manifest["losses"])) == (True, 12, 8)
    assert not list(tmp_path.glob(".*"))


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) - 1)]  # all but the end of the line


def flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("damage", [cut, flip])
def test_batch_of_a_damaged_entry_is_made_again(tmp_path: Path, whole: dict[str, bytes], damage: Any, seed: int) -> None:
    folder, draw = tmp_path / "damaged", random.Random(seed)
    fill(store_in(folder), BATCHES[:6])
    number = draw.randrange(6)
    path = batch_files(folder)[number]
    before = json.loads(path.read_bytes())
    path.write_bytes(damage(path.read_bytes(), draw))
    try:
        same = json.loads(path.read_bytes()) == before  # a space more or less changes nothing
    except ValueError:
        same = False
    assert make(folder) == ([] if same else [number]) + [6, 7]
    assert contents(folder) == whole


@pytest.mark.parametrize("seed", range(10))
def test_no_bit_changes_unnoticed(tmp_path: Path, whole: dict[str, bytes], seed: int) -> None:
    """Of images and losses; the manifest has their checksums."""
    draw = random.Random(seed)
    name = draw.choice([name for name in sorted(whole) if name.endswith((".png", ".jsonl"))])
    (tmp_path / "whole" / name).write_bytes(flip(whole[name], draw))
    assert list(problems(tmp_path / "whole")) != []


def test_two_processes_share_a_folder(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Whoever is last completes the set, and the other may try as well."""
    first, second = store_in(tmp_path / "shared"), store_in(tmp_path / "shared")
    fill(first, BATCHES[::2])
    assert first.finish(BATCHES) == BATCHES[1::2]
    fill(second, BATCHES[1::2])
    assert second.finish(BATCHES) == []
    assert contents(tmp_path / "shared") == whole
    assert first.finish(BATCHES) == []
    assert contents(tmp_path / "shared") == whole


def test_both_may_write_the_same_batch(tmp_path: Path, whole: dict[str, bytes]) -> None:
    stores = store_in(tmp_path / "shared"), store_in(tmp_path / "shared")
    for store in stores:
        fill(store, BATCHES)
    assert [store.finish(BATCHES) for store in stores] == [[], []]
    assert contents(tmp_path / "shared") == whole


def test_completing_needs_whole_files_of_the_others_too(tmp_path: Path) -> None:
    first, second = store_in(tmp_path), store_in(tmp_path)
    fill(first, BATCHES[:4])
    (tmp_path / IMAGES / image_name(0, 0, 3)).write_bytes(b"torn")
    fill(second, BATCHES[4:])
    assert second.finish(BATCHES) == [BATCHES[0]]


def test_entries_of_other_settings_are_ignored(tmp_path: Path) -> None:
    fill(store_in(tmp_path, seed=1), BATCHES)
    (tmp_path / "manifest.json").unlink()
    assert store_in(tmp_path, seed=0).unfinished(BATCHES) == BATCHES


def test_settings_of_a_simultaneous_start_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found no manifest and wrote one; the one whose was replaced notices."""
    write = store_module.write_json

    def overtaken(path: Path, content: Any) -> None:
        monkeypatch.setattr(store_module, "write_json", write)
        write(path, content)
        path.unlink()
        store_in(tmp_path, seed=1)

    monkeypatch.setattr(store_module, "write_json", overtaken)
    with pytest.raises(InputError, match="seed was 1, is 0"):
        store_in(tmp_path, seed=0)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    store_in(tmp_path)
    with pytest.raises(InputError, match=r"class_names was \['a', 'b', 'c'\], is \['a', 'b'\]"):
        ImageStore(tmp_path, {"seed": 0}, ["a", "b"])


def test_other_versions_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fill(store_in(tmp_path), BATCHES[:4])
    before = store_module.versions()
    monkeypatch.setattr(store_module, "versions", lambda: before | {"torch": "9.9"})
    make(tmp_path)
    manifest = read_manifest(tmp_path)
    assert (manifest["versions"], manifest["continued_with"]) == (before, [before | {"torch": "9.9"}])
    assert "may differ in their last bits" in caplog.text


@pytest.mark.parametrize("where", [".", f"{IMAGES}/new000"])
def test_left_over_files_go_and_living_ones_stay(tmp_path: Path, where: str) -> None:
    place = tmp_path / where
    place.mkdir(parents=True, exist_ok=True)
    host = os.uname().nodename
    names = {f".x.png.{host}~{os.getppid()}.part": False, f".x.png.{host}~{2**22 + 1}.part": True, ".x.png.other~1.part": False}
    for name in names:
        (place / name).touch()
    os.utime(place / ".x.png.other~1.part")
    assert {name: is_left_over(place / name) for name in names} == names
    make(tmp_path)
    assert sorted(path.name for path in place.glob(".*")) == sorted(name for name, dead in names.items() if not dead)
    os.utime(place / ".x.png.other~1.part", (0, 0))
    assert is_left_over(place / ".x.png.other~1.part")


def test_jpeg_on_request(tmp_path: Path) -> None:
    storage = StorageConfig(image_format="jpeg", jpeg_quality=100, losses_every=0)
    store = ImageStore(tmp_path, {}, CLASSES, storage)
    levels = torch.arange(0, 256, 4, dtype=torch.uint8).view(1, 1, 8, 8).expand(2, 3, 8, 8)
    store.write(BatchSpec(0, 0, [0, 2]), levels)
    assert store.finish([BatchSpec(0, 0, [0, 2])]) == []
    assert list(problems(tmp_path)) == []
    with Image.open(tmp_path / IMAGES / "new002" / "class002_id000.jpg") as image:
        assert np.abs(np.asarray(image).astype(int) - levels[0].permute(1, 2, 0).numpy()).max() <= 3
    assert read_manifest(tmp_path)["settings"] == {"image_format": "jpeg", "jpeg_quality": 100, "losses_every": 0}
    assert not (tmp_path / "losses.jsonl").exists()
    with pytest.raises(InputError, match="jpeg_quality was 100, is 90"):
        ImageStore(tmp_path, {}, CLASSES, StorageConfig(image_format="jpeg", jpeg_quality=90, losses_every=0))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"image_format": "gif"}, "unknown image_format 'gif'; known: png, jpeg"),
    "quality": ({"jpeg_quality": 101}, "jpeg_quality must be a finite number of at least 1 and at most 100, got 101"),
    "losses": ({"losses_every": -1}, "losses_every must be an integer of at least 0, got -1"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD.keys())
def test_bad_storage(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StorageConfig(**settings)


def test_losses_are_json_lines(tmp_path: Path) -> None:
    make(tmp_path, BATCHES[:1])
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 10, 20, 25]
    assert lines[0].keys() == {"item", "iteration", "ce", "mean", "var"}
    losses = torch.rand(1, 3)
    assert subsample(losses, 10) == [[1, *(pytest.approx(value, rel=1e-5) for value in losses[0].tolist())]]
    assert subsample(losses, 0) == []
    assert read_losses(tmp_path)[0] == "".join(json.dumps(line) + "\n" for line in lines)
    assert to_jsonl(7, [[1, 0.5, 0.25, 2.0]]) == '{"item": 7, "iteration": 1, "ce": 0.5, "mean": 0.25, "var": 2.0}\n'


def test_image_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]) -> None:
    """The batch fails with the name of the file, what was finished before stays, and nothing half written remains."""
    folder = tmp_path / "full"
    store = store_in(folder)
    fill(store, BATCHES[:2])
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "class001" in path.name:
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot write .*class001_id001\.png: No space left on device"):
        fill(store, BATCHES[2:])
    monkeypatch.undo()
    assert not list(folder.rglob("*.part"))
    assert make(folder) == [batch.number for batch in BATCHES[2:]]
    assert contents(folder) == whole

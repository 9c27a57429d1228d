"""A set on disk: names, manifest, resuming, and that nothing is half written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import HashStore

from dwa_fast import InputError, distill, synthesize
from dwa_fast.data.images import MemorySet
from dwa_fast.data.manifest import image_name, read_manifest
from dwa_fast.data.pixels import denormalise, normalise, to_levels
from dwa_fast.data.real import sample
from dwa_fast.io.files import atomic_write, checksum
from dwa_fast.sets.distill import BatchSpec, batch_specs
from dwa_fast.sets.store import ImageStore
from dwa_fast.sets.workers import TorchrunWorker
from dwa_fast.threads import torch_threads
from tests.files import contents
from tests.nets import small_recipe, small_set, small_teacher

pytestmark = pytest.mark.usefixtures("two_threads")


def run(folder: Path, ipc: int = 2, seed: int = 0, threads: int | None = None, **more: Any) -> int:
    """A small set; more are settings of the synthesis, and what distill itself takes."""
    hooks = {name: more.pop(name) for name in ("progress", "observer", "workers") if name in more}
    config = small_recipe(**{"iterations": 4, "batch_size": 4, "backend": "reference", **more})  # files are the same for every back-end
    return distill(small_teacher(), small_set(), config, ipc=ipc, output=folder, seed=seed, threads=threads, **hooks)


def test_a_set_whose_batches_have_whole_classes_does_not_grow(tmp_path: Path) -> None:
    assert run(tmp_path / "set", ipc=2, batch_size=20, batch_ipc=None) == 20
    before = contents(tmp_path / "set")
    assert run(tmp_path / "set", ipc=2, batch_size=20, batch_ipc=None) == 0
    with pytest.raises(InputError, match=r"with 2 images of a class in a batch; .* cannot go on with it for ipc 4; choose"):
        run(tmp_path / "set", ipc=4, batch_size=20, batch_ipc=None)
    assert contents(tmp_path / "set") == before


def test_batch_specs_begin_with_the_smaller_one() -> None:
    assert batch_specs(5, 2, 3) == [
        BatchSpec(0, 0, [0, 1, 2]),
        BatchSpec(1, 0, [3, 4]),
        BatchSpec(2, 1, [0, 1, 2]),
        BatchSpec(3, 1, [3, 4]),
    ]
    assert batch_specs(5, 4, 3)[:4] == batch_specs(5, 2, 3)


def test_batch_specs_with_several_images_of_a_class() -> None:
    batches = batch_specs(3, 4, 5, batch_ipc=2)
    assert batches == [
        BatchSpec(0, 0, [0, 1, 0, 1]),
        BatchSpec(1, 0, [2, 2]),
        BatchSpec(2, 2, [0, 1, 0, 1]),
        BatchSpec(3, 2, [2, 2]),
    ]
    assert batches[2].images == [(0, 2), (1, 2), (0, 3), (1, 3)]
    assert batch_specs(3, 2, 5, batch_ipc=2) == batches[:2]
    assert [each.labels for each in batch_specs(3, 4, 2, batch_ipc=4)] == [[0] * 4, [1] * 4, [2] * 4]  # a batch has at least one class
    for ipc in (1, 3):
        with pytest.raises(InputError, match=f"ipc must be a multiple of batch_ipc, which is 2, got {ipc}"):
            batch_specs(3, ipc, 5, batch_ipc=2)


def test_a_batch_with_several_images_of_a_class(tmp_path: Path) -> None:
    """Those of `synthesize` for the same initial images in one batch, under the names that they have one by one."""
    run(tmp_path / "set", ipc=2, batch_size=20, batch_ipc=2)
    manifest = read_manifest(tmp_path / "set")
    assert (manifest["settings"]["batch_ipc"], len(manifest["images"]), len(manifest["losses"])) == (2, 20, 1)
    data, config = small_set(), small_recipe(iterations=4, batch_size=20, backend="reference")
    order = [sample(data, label, 2, seed=0)[index] for index in range(2) for label in range(10)]
    with torch_threads(2):
        images = synthesize(small_teacher(), normalise(data.load(order), config.data), data.labels[order], config, seed=0).images
    levels = to_levels(denormalise(images, config.data))
    for place in range(20):
        with Image.open(tmp_path / "set" / "images" / image_name(place % 10, place // 10, 10)) as image:
            assert torch.equal(torch.from_numpy(np.array(image)), levels[place, 0])
    whole = contents(tmp_path / "set")
    (tmp_path / "set" / "images" / image_name(3, 1, 10)).unlink()
    assert run(tmp_path / "set", ipc=2, batch_size=20, batch_ipc=2) == 20  # its whole batch
    assert contents(tmp_path / "set") == whole
    assert run(tmp_path / "set", ipc=4, batch_size=20, batch_ipc=2) == 20
    grown = contents(tmp_path / "set")
    assert all(grown[name] == content for name, content in whole.items() if name.endswith(".png"))
    with pytest.raises(InputError, match="batch_ipc was 2, is 1"):
        run(tmp_path / "set", ipc=4, batch_size=20)
    with pytest.raises(InputError, match="ipc must be a multiple of batch_ipc, which is 2, got 5"):
        run(tmp_path / "set", ipc=5, batch_size=20, batch_ipc=2)


def test_names_are_the_published_ones() -> None:
    assert image_name(7, 12, 100) == "new007/class007_id012.png"
    assert image_name(7, 1, 12000) == "new00007/class00007_id001.png"


def test_set_holds_every_image_and_its_checksum(tmp_path: Path) -> None:
    assert run(tmp_path) == 20
    manifest = read_manifest(tmp_path)
    assert manifest["complete"]
    assert len(manifest["images"]) == 20
    for name, wanted in manifest["images"].items():
        assert checksum(tmp_path / "images" / name) == wanted
        with Image.open(tmp_path / "images" / name) as image:
            assert (image.size, image.mode) == ((8, 8), "L")
    assert manifest["settings"]["rho"] == 0.015
    assert manifest["settings"]["backend"] in ("fused", "reference")
    assert not list(tmp_path.rglob("*.part"))


def test_second_run_makes_nothing_and_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    assert run(tmp_path) == 0
    assert contents(tmp_path) == before


def test_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    calls = 0
    write = ImageStore.write

    def interrupted(store: ImageStore, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        write(store, *arguments)

    monkeypatch.setattr(ImageStore, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    monkeypatch.undo()
    assert not read_manifest(tmp_path / "stopped")["complete"]
    assert run(tmp_path / "stopped") == 10
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"torn")])
def test_lost_and_torn_images_are_made_again(tmp_path: Path, damage: Any) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    damage(tmp_path / "images" / image_name(3, 1, 10))
    assert run(tmp_path) == 4  # its whole batch
    assert contents(tmp_path) == before


def test_more_images_per_class_keep_the_first(tmp_path: Path) -> None:
    run(tmp_path, ipc=1)
    before = contents(tmp_path)
    assert run(tmp_path, ipc=2) == 10
    after = contents(tmp_path)
    assert all(after[name] == content for name, content in before.items() if name.endswith(".png"))


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(InputError, match=r"made with other settings \(rho was 0.015, is 0.02; seed was 0, is 1\)"):
        run(tmp_path, seed=1, rho=0.02)
    assert run(tmp_path) == 0


def test_foreign_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is no manifest of format 3"):
        run(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        run(tmp_path)


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*file"):
        run(tmp_path / "file")


def test_too_few_initial_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="class '0' has 6 images, but ipc 7 needs as many initial ones"):
        run(tmp_path, ipc=7)


def test_teacher_of_other_classes(tmp_path: Path) -> None:
    teacher: Any = small_teacher()
    teacher.fc = torch.nn.Linear(16, 7)
    with pytest.raises(InputError, match="teacher knows 7 classes, the data have 10"):
        distill(teacher, small_set(), small_recipe(), ipc=1, output=tmp_path)


def test_sample_is_seeded_without_replacement_and_nested() -> None:
    data = small_set()
    five, two = sample(data, 3, 5, seed=1), sample(data, 3, 2, seed=1)
    assert five[:2] == two
    assert len(set(five)) == 5
    assert (data.labels[five] == 3).all()
    assert sample(data, 3, 5, seed=2) != five


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")

    def fail() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert contents(tmp_path) == {"x.json": b"old"}


def test_set_goes_on_with_the_threads_that_it_was_begun_with(tmp_path: Path) -> None:
    """The last bits of convolutions on a CPU depend on the number of threads."""
    run(tmp_path / "whole", threads=1, ipc=2)
    run(tmp_path / "set", threads=1, ipc=1)
    assert torch.get_num_threads() == 2
    run(tmp_path / "set", ipc=2)
    assert read_manifest(tmp_path / "set")["settings"]["threads"] == 1
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    with pytest.raises(InputError, match="threads was 1, is 2"):
        run(tmp_path / "set", threads=2)
    with pytest.raises(InputError, match="threads must be an integer of at least 1, got 0"):
        run(tmp_path / "set", threads=0)


def test_the_next_batches_are_computed_while_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the next initial images are read meanwhile."""
    run(tmp_path / "whole")
    write, later = ImageStore.write, threading.Event()

    def slowly(store: ImageStore, item: BatchSpec, *rest: Any) -> Any:
        if item.number == 0:
            assert later.wait(60)  # for what happens only after this batch
        return write(store, item, *rest)

    def progress(done: int, total: int) -> None:
        if done > 2 * 4:
            later.set()

    monkeypatch.setattr(ImageStore, "write", slowly)
    assert run(tmp_path / "slow", progress=progress) == 20
    assert contents(tmp_path / "slow") == contents(tmp_path / "whole")


def test_failed_write_ends_the_run_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    write = ImageStore.write

    def fail(store: ImageStore, item: BatchSpec, *rest: Any) -> Any:
        if item.number == 2:
            raise InputError("cannot write x.png: No space left on device")
        return write(store, item, *rest)

    monkeypatch.setattr(ImageStore, "write", fail)
    with pytest.raises(InputError, match="No space left on device"):
        run(tmp_path / "full")
    monkeypatch.undo()
    assert run(tmp_path / "full") <= 20 - 8
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_observer_hears_of_every_batch_with_its_losses(tmp_path: Path) -> None:
    heard: dict[int, list[float]] = {}
    run(tmp_path, observer=lambda item, rows: heard.update({item.number: [row[0] for row in rows]}))
    assert heard == {number: [1, 4] for number in range(6)}


def test_last_worker_reports_batches_that_are_missing(tmp_path: Path) -> None:
    """Another worker has taken batch 0, and claims to have finished."""
    store = HashStore()
    other = TorchrunWorker(store, 2)
    next(other.take(batch_specs(10, 2, 4)))
    other.others_done()
    with pytest.raises(InputError, match="files of 1 batches were damaged or removed meanwhile; the same command makes them again"):
        run(tmp_path, workers=TorchrunWorker(store, 2))
    assert run(tmp_path) == 4


def test_worker_that_is_not_the_last_leaves_the_set_to_the_others(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    store = HashStore()
    other = TorchrunWorker(store, 2)
    batch = next(other.take(batch_specs(10, 2, 4)))
    assert run(tmp_path / "set", workers=TorchrunWorker(store, 2)) == 16
    assert not read_manifest(tmp_path / "set")["complete"]
    assert batch.number == 0
    assert run(tmp_path / "set") == 4
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_set_is_not_continued_with_another_teacher_or_other_images(tmp_path: Path) -> None:
    """Also where nobody says so in the provenance."""
    config = small_recipe(iterations=4, batch_size=4, backend="reference")
    distill(small_teacher(), small_set(), config, ipc=1, output=tmp_path)
    whole = contents(tmp_path)
    with pytest.raises(InputError, match=r"other settings \(teacher was '.*', is '.*'\)"):
        distill(small_teacher(seed=1), small_set(), config, ipc=2, output=tmp_path)
    data = small_set()
    inverted = MemorySet(255 - data.load(range(len(data.labels))), data.labels, data.class_names)
    with pytest.raises(InputError, match=r"other settings \(real_images_digest was '.*', is '.*'\)"):
        distill(small_teacher(), inverted, config, ipc=2, output=tmp_path)
    assert contents(tmp_path) == whole
    assert distill(small_teacher(), small_set(), config, ipc=2, output=tmp_path) == 10


def test_arguments_of_another_type_are_named(tmp_path: Path) -> None:
    config = small_recipe(iterations=1)
    for data in ("photos", tmp_path, torch.utils.data.TensorDataset(torch.zeros(2))):
        with pytest.raises(TypeError, match=r"data must be a set of images, such as image_folder\(folder, size\) or MemorySet"):
            distill(small_teacher(), data, config, ipc=1, output=tmp_path / "set")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="recipe must be a Recipe"):
        distill(small_teacher(), small_set(), config.data, ipc=1, output=tmp_path / "set")  # type: ignore[arg-type]
    for name, kind in (("storage", "StorageConfig"), ("initial", "InitialConfig")):
        with pytest.raises(TypeError, match=f"{name} must be a {kind}, got 'noise'"):
            distill(None, small_set(), config, ipc=1, output=tmp_path / "set", **{name: "noise"})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed must be an integer of at least 0, got -1"):
        distill(small_teacher(), small_set(), config, ipc=1, output=tmp_path / "set", seed=-1)
    assert not (tmp_path / "set").exists()

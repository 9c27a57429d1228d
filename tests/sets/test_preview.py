"""The contact sheet of a set that is being made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dwa_fast.commands.cli import run
from dwa_fast.config import StorageConfig
from dwa_fast.data.manifest import image_name
from dwa_fast.data.set_layout import IMAGES
from dwa_fast.sets.distill import batch_specs
from dwa_fast.sets.preview import Preview
from dwa_fast.sets.store import BatchSpec, ImageStore
from dwa_fast.sets.verify import problems
from tests.processes import Bench


def sheet(folder: Path) -> np.ndarray:  # type: ignore[type-arg]
    with Image.open(folder / "preview.png") as image:
        return np.asarray(image)


def test_rows_are_classes_and_columns_their_images(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, {}, ["a", "b"], StorageConfig(losses_every=0))
    preview = Preview(store, (3, 4, 6), ipc=3)
    preview.draw()
    assert sheet(tmp_path).shape == (40 + 2 + 40, 60 + 2 + 60 + 2 + 60, 3)  # ten times as large, which makes at most 64 pixels
    assert set(np.unique(sheet(tmp_path))) == {128, 255}  # grey tiles, white gaps
    store.write(BatchSpec(1, 1, [0, 1]), torch.stack([torch.full((3, 4, 6), level, dtype=torch.uint8) for level in (10, 20)]))
    preview.draw()
    assert (sheet(tmp_path)[:40, 62:122] == 10).all()
    assert (sheet(tmp_path)[42:, 62:122] == 20).all()
    assert (sheet(tmp_path)[:, :60] != 10).all()
    (tmp_path / IMAGES / image_name(0, 1, 2)).write_bytes(b"torn")
    preview.draw()
    assert (sheet(tmp_path)[:40, 62:122] == 128).all()


def test_only_the_first_classes_and_images_are_shown(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, {}, [str(label) for label in range(30)])
    preview = Preview(store, (1, 40, 40), ipc=50)
    assert [preview.shows(item) for item in batch_specs(30, 11, 15)] == [True, False] * 10 + [False, False]
    preview.draw()
    assert sheet(tmp_path).shape == (418, 418, 3)


def test_command_draws_it(bench: Bench, tmp_path: Path) -> None:
    assert bench.run(tmp_path, "--preview")[0] == 0
    assert sheet(tmp_path).shape == (658, 196, 3)
    assert 128 not in sheet(tmp_path)[::66, ::66]
    assert list(problems(tmp_path)) == []
    with Image.open(tmp_path / IMAGES / image_name(2, 1, 10)) as image:
        assert (sheet(tmp_path)[132:196:8, 66:130:8, 0] == np.asarray(image)).all()


def test_preview_is_not_part_of_the_settings(bench: Bench, tmp_path: Path) -> None:
    """A complete set gets one too, and is verified and resumed with it."""
    for path, content in bench.whole.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert bench.run(tmp_path, "--preview")[0] == 0
    assert sheet(tmp_path).shape == (658, 196, 3)
    assert run(["verify", str(tmp_path)]) == 0
    assert bench.run(tmp_path)[0] == 0

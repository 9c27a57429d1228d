"""Manifests that nobody has written, and files in a set that Pillow would start programs for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dwa_fast import InputError, distill
from dwa_fast.sets.distill import batch_specs
from dwa_fast.sets.store import ImageStore
from dwa_fast.sets.verify import problems
from tests.hostile import POSTSCRIPT, ghostscript
from tests.nets import small_recipe, small_set, small_teacher


def make(folder: Path, ipc: int = 1) -> None:
    """A set of three classes as a run would write it."""
    batches = batch_specs(3, ipc, 2)
    store = ImageStore(folder, {"seed": 0}, ["a", "b", "c"])
    for batch in store.unfinished(batches):
        store.write(batch, torch.full((len(batch.labels), 1, 4, 4), batch.number, dtype=torch.uint8), torch.ones(1, 3))
    assert store.finish(batches) == []


def test_verify_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "set")
    canary = ghostscript(tmp_path, monkeypatch)
    (tmp_path / "set" / "images" / "new000" / "class000_id000.png").write_bytes(POSTSCRIPT)
    assert list(problems(tmp_path / "set")) == ["images/new000/class000_id000.png has changed and is no whole image any more"]
    assert not canary.exists()


IMAGES: dict[str, Any] = {"../outside/precious.txt": "0", "/etc/passwd": "0", "new000/../../outside/precious.txt": "0", "new000": "0"}
DAMAGED = "is damaged: a part of it is missing or of the wrong type"
MANIFESTS: dict[str, tuple[Any, str]] = {
    "list": ([], "is no manifest of format"),
    "nothing": ({}, "is no manifest of format"),
    "format alone": (dict.fromkeys(("settings", "images", "losses", "skipped", "versions", "class_names", "complete"), ...), DAMAGED),
    **{f"image {name}": ({"images": {name: text}}, DAMAGED) for name, text in IMAGES.items()},
    "checksums": ({"images": {"new000/class000_id000.png": ["0"]}}, DAMAGED),
    "images": ({"images": ["../../x"]}, DAMAGED),
    "settings": ({"settings": []}, DAMAGED),
    "losses": ({"losses": {"x": "0"}}, DAMAGED),
    "skipped": ({"skipped": {"x": {}}}, DAMAGED),
    "versions": ({"versions": None}, DAMAGED),
    "complete": ({"complete": "yes"}, DAMAGED),
    "class names": ({"class_names": [1]}, DAMAGED),
}


@pytest.mark.parametrize(("change", "message"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifests(tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str) -> None:
    """They are refused before any file that they name is opened."""
    make(tmp_path / "set")
    path, opened = tmp_path / "set" / "manifest.json", []
    content = {key: value for key, value in (json.loads(path.read_text()) | change).items() if value is not ...} if change else change
    path.write_text(json.dumps(content))
    monkeypatch.setattr("dwa_fast.sets.store.checksum", opened.append)
    with pytest.raises(InputError, match=re.escape(message)):
        make(tmp_path / "set", ipc=2)
    assert not opened


@pytest.mark.parametrize("threads", [10**9, "../x"])
def test_threads_in_a_changed_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    def run() -> int:
        config = small_recipe(iterations=1, steps=1, device="cpu", backend="reference")
        return distill(small_teacher(), small_set(1), config, ipc=1, output=tmp_path)

    run()
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["settings"]["threads"] = threads
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    taken: list[object] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    with pytest.raises(InputError, match=rf"holds a set made with other settings \(threads was {threads!r}, is 1\)"):
        run()
    assert set(taken) <= {1}

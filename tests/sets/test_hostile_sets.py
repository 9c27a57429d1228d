"""Output folders made to do harm: links that lead elsewhere, pipes and devices, manifests and journals that nobody has written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dwa_fast import InputError, distill
from dwa_fast.data.manifest import content_check, read_manifest
from dwa_fast.sets import journal
from dwa_fast.sets.distill import work_list
from dwa_fast.sets.store import ImageStore
from dwa_fast.sets.verify import problems
from tests.hostile import POSTSCRIPT, contents, ghostscript
from tests.nets import small_config, small_set, small_teacher


def make(folder: Path, ipc: int = 1) -> int:
    """A set of three classes as a run would write it; returns how many images had to be made."""
    items = work_list(3, ipc, 2)
    store = ImageStore(folder, {"seed": 0}, ["a", "b", "c"])
    missing = store.unfinished(items)
    if missing:
        store.begin()
    for item in missing:
        store.write(item, torch.full((len(item.labels), 1, 4, 4), item.number, dtype=torch.uint8), torch.ones(1, 3))
    assert store.finish(items) == []
    return sum(len(item.labels) for item in missing)


def plant(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


PART = f".{{}}.{re.sub('[^A-Za-z0-9-]', '-', os.uname().nodename)}~{os.getpid()}.part"  # how a file is called while it is written
LINKS: dict[str, tuple[str, str, str | None]] = {
    "class folder": ("images/new000", "new000", "new000 is a symbolic link; a set is written into folders of its own"),
    "class folder to nowhere": ("images/new000", "nowhere", "new000 is a symbolic link"),
    "class folder of the earlier layout": ("new000", "new000", None),
    "image folder": ("images", ".", "images is a symbolic link; a set is written into folders of its own"),
    "image folder to nowhere": ("images", "nowhere", "images is a symbolic link"),
    "manifest": ("manifest.json", "manifest.json", None),
    "losses": ("losses.jsonl", "losses.jsonl", None),
    "image": ("images/new000/class000_id000.png", "precious.txt", None),
    "manifest while it is written": (PART.format("manifest.json"), "precious.txt", None),
    "image while it is written": (PART.format("class000_id000.png"), "precious.txt", None),
    "image while an earlier version wrote it": (f"images/new000/{PART.format('class000_id000.png')}", "precious.txt", None),
    "note": ("other-programs", ".", "other-programs is a symbolic link; a set is written into folders of its own"),
    "note itself": ("other-programs/README.txt", "nowhere", None),
    "probe": (PART.format("probe"), "x", None),
    "foreign": ("more", ".", None),
}


@pytest.mark.parametrize(("name", "target", "message"), LINKS.values(), ids=LINKS.keys())
def test_links_planted_in_the_output(tmp_path: Path, outside: Path, name: str, target: str, message: str | None) -> None:
    """Nothing is written through them: they are refused, replaced or left alone."""
    plant(tmp_path / "set" / name, outside / target)
    if message:
        with pytest.raises(InputError, match=re.escape(message)):
            make(tmp_path / "set")
        return
    assert make(tmp_path / "set") == 3
    assert (tmp_path / "set" / "images" / "new000" / "class000_id000.png").is_file()
    assert (tmp_path / "set" / name).is_symlink() == (name in ("more", "new000"))


def test_verify_follows_no_links(tmp_path: Path, outside: Path) -> None:
    make(tmp_path / "set")
    (tmp_path / "set" / "images" / "new000").rename(tmp_path / "moved")
    plant(tmp_path / "set" / "images" / "new000", tmp_path / "moved")
    plant(tmp_path / "set" / "loop", tmp_path / "set")
    assert list(problems(tmp_path / "set")) == [
        "images/new000/class000_id000.png is or lies behind a symbolic link",
        "images/new000 does not belong to the set",
        "loop does not belong to the set",
    ]


def test_verify_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "set")
    canary = ghostscript(tmp_path, monkeypatch)
    (tmp_path / "set" / "images" / "new000" / "class000_id000.png").write_bytes(POSTSCRIPT)
    assert list(problems(tmp_path / "set")) == ["images/new000/class000_id000.png has changed and is no whole image any more"]
    assert not canary.exists()


def test_left_over_names_of_impossible_processes(tmp_path: Path) -> None:
    """They look like files of processes that died; some are folders, or lead elsewhere."""
    host = PART.split(".")[2].split("~")[0]
    plant(tmp_path / "set" / f".x.{host}~{'9' * 30}.part", tmp_path / "precious")
    (tmp_path / "precious").touch()
    (tmp_path / "set" / f".y.{host}~{'9' * 30}.part").mkdir()
    plant(tmp_path / "set" / ".z.elsewhere~1.part", Path(".z.elsewhere~1.part"))
    assert make(tmp_path / "set") == 3
    assert (tmp_path / "precious").exists()
    assert not (tmp_path / "set" / f".x.{host}~{'9' * 30}.part").is_symlink()


IMAGES: dict[str, Any] = {"../outside/precious.txt": "0", "/etc/passwd": "0", "new000/../../outside/precious.txt": "0", "new000": "0"}
CHANGED = "has been changed since dwa-fast wrote it; remove it to make the whole set again"
MANIFESTS: dict[str, tuple[Any, str]] = {
    "list": ([], "is no manifest of format"),
    "nothing": ({}, "is no manifest of format"),
    "format alone": (dict.fromkeys(("settings", "images", "losses", "skipped", "versions", "class_names", "complete"), ...), CHANGED),
    **{f"image {name}": ({"images": {name: text}}, CHANGED) for name, text in IMAGES.items()},
    "checksums": ({"images": {"new000/class000_id000.png": ["0"]}}, CHANGED),
    "images": ({"images": ["../../x"]}, CHANGED),
    "settings": ({"settings": []}, CHANGED),
    "losses": ({"losses": {"x": "0"}}, CHANGED),
    "skipped": ({"skipped": {"x": {}}}, CHANGED),
    "versions": ({"versions": None}, CHANGED),
    "complete": ({"complete": "yes"}, CHANGED),
    "class names": ({"class_names": [1]}, CHANGED),
}


@pytest.mark.parametrize(("change", "message"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifests(tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str) -> None:
    """Each carries the right checksum of itself, as whoever makes one up would give it."""
    make(tmp_path / "set")
    path, opened = tmp_path / "set" / "manifest.json", []
    content = change
    if change:
        content = {key: value for key, value in (json.loads(path.read_text()) | change).items() if key != "check" and value is not ...}
        content["check"] = content_check(content)
    path.write_text(json.dumps(content))
    monkeypatch.setattr("dwa_fast.sets.store.checksum", opened.append)
    with pytest.raises(InputError, match=re.escape(message)):
        make(tmp_path / "set", ipc=2)
    assert not opened


@pytest.mark.parametrize("threads", [10**9, -1, "../x", True])
def test_threads_that_a_manifest_makes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    def distil() -> int:
        return distill(small_teacher(), small_set(1), small_config(iterations=1, steps=1, device="cpu"), ipc=1, output=tmp_path)

    distil()
    content = json.loads((tmp_path / "manifest.json").read_text())
    del content["check"]
    content["settings"]["threads"] = threads
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "check": content_check(content)}))
    taken: list[object] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    with pytest.raises(InputError, match=rf"holds a set made with other settings \(threads was {threads!r}, is 2\)"):
        distil()
    assert set(taken) <= {2}


def entry(**changes: Any) -> dict[str, Any]:
    name = "new000/class000_id000.png"
    return {"item": 0, "images": {name: "0" * 64}, "losses": [[1, 1.0, 1.0, 1.0]], "skipped": {}, **changes}


ENTRIES: dict[str, str | dict[str, Any]] = {
    "nested": "[" * 100_000,
    "image outside": entry(images={"../../outside/precious.txt": "0"}),
    "images": entry(images=[]),
    "item": entry(item="0"),
    "losses": entry(losses=[[1]]),
    "skipped": entry(skipped={"x": 1}),
    "more": entry(run="rm"),
}


@pytest.mark.parametrize("content", ENTRIES.values(), ids=ENTRIES.keys())
def test_journals(tmp_path: Path, outside: Path, content: str | dict[str, Any]) -> None:
    """Entries with the right checksum that no run has written are passed over."""
    make(tmp_path / "whole", ipc=2)
    make(tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    if isinstance(content, dict):
        digest = content_check([manifest["settings"], manifest["class_names"]])
        content = json.dumps({**content, "check": journal._check(content, digest)})
    (tmp_path / "set" / ".journal-0.jsonl").write_text(content + "\n")
    make(tmp_path / "set", ipc=2)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")

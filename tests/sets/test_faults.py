"""Whatever is killed, filled, damaged or deleted, and when: the same command ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dwa_fast.commands.cli import run
from dwa_fast.data.manifest import image_name, read_manifest
from dwa_fast.sets.verify import problems
from tests.files import contents
from tests.processes import Bench

NOBODY = 65534  # a user without rights, on every Unix


def test_killed_again_and_again(bench: Bench, tmp_path: Path) -> None:
    """One folder, killed at random operations on its files until a run comes through."""
    draw, kills = random.Random(0), 0
    while True:
        code, process = bench.run(tmp_path, at_operation=draw.randint(1, bench.operations // 2))
        if code == 0:
            break
        assert code == -signal.SIGKILL, process.output
        kills += 1
    assert kills >= 2
    assert contents(tmp_path) == bench.whole


@pytest.mark.parametrize("seed", range(2))
def test_killed_once(bench: Bench, tmp_path: Path, seed: int) -> None:
    assert bench.run(tmp_path, at_operation=random.Random(seed).randint(1, bench.operations))[0] == -signal.SIGKILL
    assert bench.run(tmp_path)[0] == 0
    assert contents(tmp_path) == bench.whole


@pytest.mark.parametrize(("sends", "wanted"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_politely(bench: Bench, tmp_path: Path, sends: signal.Signals, wanted: int) -> None:
    """What the manifest and the entries of batches name is whole when the process ends, and nothing half written is left."""
    code, process = bench.run(tmp_path, at_operation=random.Random(wanted).randint(30, bench.operations - 20), sends=sends)
    assert code == wanted, process.output
    assert "stopped; the same command resumes" in process.output
    assert "Traceback" not in process.output
    assert not list(tmp_path.rglob("*.part"))
    if (tmp_path / "manifest.json").exists():
        assert list(problems(tmp_path)) in ([], ["the set is not complete; run the command that started it again to resume"])
    assert bench.run(tmp_path)[0] == 0
    assert contents(tmp_path) == bench.whole


@pytest.mark.parametrize("largest_file", [1000, 3000])
def test_full_disk(bench: Bench, tmp_path: Path, largest_file: int) -> None:
    """No file may grow beyond a few bytes: the first manifest, or the last one, cannot be written to its end."""
    code, process = bench.run(tmp_path, largest_file=largest_file)
    assert code == 1, process.output
    (error,) = [line for line in process.output.splitlines() if line.startswith("dwa-fast: ")]
    assert f"cannot write {tmp_path}" in error
    assert "File too large" in error
    assert "Traceback" not in process.output
    assert not list(tmp_path.rglob("*.part"))
    assert bench.run(tmp_path)[0] == 0
    assert contents(tmp_path) == bench.whole


def test_read_only_folder(bench: Bench) -> None:
    """Root may write into read-only folders, so it takes a user without rights to see it."""
    with tempfile.TemporaryDirectory() as name:
        folder, teacher = Path(name) / "set", Path(name) / "teacher.pt"
        folder.mkdir()
        shutil.copy(bench.teacher, teacher)
        for path in (Path(name), teacher, folder):
            path.chmod(0o555)
        code, process = bench.run(folder, "--teacher", str(teacher), user=NOBODY if os.geteuid() == 0 else None)
        for path in (Path(name), folder):
            path.chmod(0o755)
    assert code == 1, process.output
    assert f"dwa-fast: cannot write to {folder}: Permission denied" in process.output
    assert "Traceback" not in process.output


def copy(bench: Bench, folder: Path) -> Path:
    """The undisturbed set in another folder."""
    for path, content in bench.whole.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_images(images: Path) -> None:
    """Every kind of damage, each in another batch or class."""
    (images / image_name(3, 1, 10)).unlink()
    (images / image_name(0, 0, 10)).write_bytes((images / image_name(0, 0, 10)).read_bytes()[:20])
    (images / image_name(9, 2, 10)).write_bytes(b"")
    flip(images / image_name(5, 0, 10))
    shutil.rmtree(images / "new004")


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "images damaged": ("images", damage_images),
    "all images deleted": ("images", shutil.rmtree),
    "losses deleted": ("losses.jsonl", Path.unlink),
    "losses changed": ("losses.jsonl", flip),
    "manifest deleted": ("manifest.json", Path.unlink),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_noticed_and_repaired(bench: Bench, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = copy(bench, tmp_path / "set")
    assert run(["verify", str(folder)]) == 0
    damage(folder / name)
    assert run(["verify", str(folder)]) == 1
    code, process = bench.run(folder)
    assert code == 0
    assert ("losses.jsonl lacks the lines of" in process.output) == name.startswith("losses")
    assert contents(folder) == bench.whole


def test_complete_set_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    copy(bench, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    code, process = bench.run(tmp_path)
    assert (code, "30 images, 0 of them made now" in process.output) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == times
    assert read_manifest(tmp_path)["complete"]

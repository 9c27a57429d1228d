"""Files that are there whole or not at all, and stay there when the power fails."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dwa_fast.errors import InputError

_PART = re.compile(r"\..+\.(?P<host>[A-Za-z0-9-]+)~(?P<process>\d+)\.part")
_STALE_SECONDS = 3600  # a temporary file of another machine is taken for left over after this long


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place once written and on the disk; on an error nothing of it remains.

    Raises:
        InputError: the disk is full, the folder is read-only, or the like.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether this is a temporary file of `replacing`."""
    return _PART.fullmatch(path.name) is not None


def is_left_over(path: Path) -> bool:
    """Whether this is a temporary file whose process has died, so that nobody will finish or remove it."""
    match = _PART.fullmatch(path.name)
    if not match:
        return False
    if match["host"] != _host():
        try:
            return time.time() - path.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:
            return False
    process = int(match["process"])
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, under another user
        pass
    return False


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, whole or not at all. Numbers must be finite."""
    with replacing(path) as target:
        target.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
        )


def output_folder(path: Path) -> Path:
    """The folder, made if need be.

    Raises:
        InputError: it cannot be made, is a file, or cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = _temporary(path / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from error
    return path


def _temporary(path: Path) -> Path:
    """Where this process writes what becomes `path`; the name says who writes, for `is_left_over`."""
    return path.with_name(f".{path.name}.{_host()}~{os.getpid()}.part")


def _host() -> str:
    """Name of this machine, in characters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9-]", "-", os.uname().nodename) or "host"

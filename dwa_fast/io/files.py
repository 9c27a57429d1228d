"""Files that are there whole or not at all, and stay there when the power fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dwa_fast.errors import InputError

_PART = re.compile(r"\..+\.(?P<host>[A-Za-z0-9-]+)~(?P<process>\d+)\.part")
_STALE_SECONDS = 3600  # a temporary file of another machine is taken for left over after this long


@contextmanager
def atomic_write(path: Path, temporary_folder: Path | None = None) -> Iterator[Path]:
    """A temporary file that takes the place of `path` once written and on the disk; on an error nothing of it remains.

    Args:
        temporary_folder: where it lies until then, on the same file system; default: beside `path`.
    Raises:
        InputError: the disk is full, the folder is read-only, or the like.
    """
    temporary = _temporary((temporary_folder or path.parent) / path.name)
    try:
        _create(temporary)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether this is a temporary file of `atomic_write`."""
    return _PART.fullmatch(path.name) is not None


def is_left_over(path: Path) -> bool:
    """Whether this is a temporary file whose process has died, so that nobody will finish or remove it."""
    match = _PART.fullmatch(path.name)
    try:
        if not match or stat.S_ISDIR(path.lstat().st_mode):
            return False
        if match["host"] != _host():
            return time.time() - path.lstat().st_mtime > _STALE_SECONDS
        process = int(match["process"])
        if process == os.getpid():
            return True
        os.kill(process, 0)
    except FileNotFoundError:
        return False
    except (ProcessLookupError, OverflowError):  # there is no such process, or cannot be one of that number
        return True
    except PermissionError:  # it lives, under another user
        pass
    return False


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, whole or not at all. Numbers must be finite."""
    with atomic_write(path) as target:
        target.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_file(path: Path) -> bytes:
    """What a file holds.

    Raises:
        OSError: it cannot be read, or is a folder, or a pipe or a device, which might never end.
    """
    with _open_regular(path) as file:
        return file.read()


def walk_files(folder: str) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder that is no folder itself, in sorted order. Links to folders are given, not entered: there can be no loop.

    Raises:
        InputError: a folder cannot be read.
    """
    waiting = sorted_scandir(folder)[::-1]  # a list, not recursion: folders can be nested deeper than Python's stack
    while waiting:
        entry = waiting.pop()
        if entry.is_dir(follow_symlinks=False):
            waiting += sorted_scandir(entry.path)[::-1]
        else:
            yield entry


def sorted_scandir(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name; the entries know their kind without another look at the disk.

    Raises:
        InputError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with _open_regular(path) as file:
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
        _create(probe)
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from error
    return path


def _open_regular(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nobody writes to would make us wait
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        code = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
        raise OSError(code, os.strerror(code), str(path))
    return os.fdopen(descriptor, "rb")


def _create(temporary: Path) -> None:
    """Make the file anew, so that nothing is written through a link that someone has put in its place."""
    temporary.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def _temporary(path: Path) -> Path:
    """Where this process writes what becomes `path`; the name says who writes, for `is_left_over`."""
    return path.with_name(f".{path.name}.{_host()}~{os.getpid()}.part")


def _host() -> str:
    """Name of this machine, in characters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9-]", "-", os.uname().nodename) or "host"

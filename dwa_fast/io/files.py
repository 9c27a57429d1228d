"""Atomic, durable writes; JSON files; directory walks; checksums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dwa_fast.errors import InputError

T = TypeVar("T")

_PART = re.compile(r"\..+\.(?P<host>[A-Za-z0-9-]+)~(?P<process>\d+)\.part")
LOCK = ".lock"  # of `sole_writer`, in a folder of results
_STALE_SECONDS = 3600  # age at which a temporary file of another machine counts as left over


@contextmanager
def atomic_write(path: Path, temporary_folder: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` after it has been written and synced. On an error it is removed.

    Args:
        temporary_folder: folder of the temporary file, on the same file system; default: that of `path`.
    Raises:
        InputError: the file cannot be written: the disk is full, the folder is read-only, ….
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
    """fsync a folder, so that renames in it are durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether this is named like a temporary file of `atomic_write`."""
    return _PART.fullmatch(path.name) is not None


def is_left_over(path: Path) -> bool:
    """Whether this is a temporary file of a process that has died."""
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
    except (ProcessLookupError, OverflowError):  # no such process
        return True
    except PermissionError:  # it runs, as another user
        pass
    return False


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically. Numbers must be finite."""
    with atomic_write(path) as target:
        target.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, parse: Callable[[Any], T], *, advice: str = "remove it to make it again", missing: str = "") -> T:
    """What `parse` makes of the content of a JSON file.

    Args:
        parse: raises ValueError, TypeError, KeyError or AttributeError where the content is not what it should be.
        advice: what to do with a damaged file, such as "remove it to train all students again".
        missing: the error message where there is no file; default: that it cannot be read.
    Raises:
        InputError: the file cannot be read, is no JSON, or `parse` raises.
    """
    try:
        return parse(json.loads(path.read_bytes()))
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError):
            raise InputError(missing) from None
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path} cannot be read: {reason}; {advice}") from error


def walk_files(folder: str) -> Iterator[os.DirEntry[str]]:
    """All files below a folder, in sorted order. Links to folders are yielded, but not followed, so there can be no loop.

    Raises:
        InputError: a folder cannot be read.
    """
    waiting = sorted_scandir(folder)[::-1]
    while waiting:
        entry = waiting.pop()
        if entry.is_dir(follow_symlinks=False):
            waiting += sorted_scandir(entry.path)[::-1]
        else:
            yield entry


def sorted_scandir(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name.

    Raises:
        InputError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as scan:
            return sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
        )


def output_folder(path: Path) -> Path:
    """Create a folder, if it does not exist, and check that it is writable.

    Raises:
        InputError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = _temporary(path / "probe")
        _create(probe)
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from error
    return path


@contextmanager
def sole_writer(output: Path, lock: Path) -> Iterator[None]:
    """Inside, no other process writes that output. The system frees the lock of a process that dies; its empty file may stay.

    Args:
        output: what is written, for the message. lock: a file beside it, or in it; its folder exists.
    Raises:
        InputError: another process is inside, or the lock cannot be made.
    """
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise InputError(f"cannot write {lock}: {error.strerror}") from error
        try:
            if not _locked(descriptor):
                raise InputError(f"another process is writing {output}; wait until it ends, or choose another output")
            if _is_at(descriptor, lock):  # else a process that was done has removed it meanwhile
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Lock a file, unless another process has; a file system without locks has none that could be in the way."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _create(temporary: Path) -> None:
    """Create an empty file. A link of that name is removed, not written through."""
    temporary.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def _temporary(path: Path) -> Path:
    """The temporary name of `path`, with host and process for `is_left_over`."""
    return path.with_name(f".{path.name}.{_host()}~{os.getpid()}.part")


def _host() -> str:
    """Name of this machine, in characters that are valid in file names."""
    return re.sub(r"[^A-Za-z0-9-]", "-", os.uname().nodename) or "host"

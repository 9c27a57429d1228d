"""What a run has finished so far: one line of JSON per batch, appended to a file of its own by every process that works on a set."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwa_fast.errors import InputError
from dwa_fast.io.files import sync_folder

_PATTERN = ".journal-*.jsonl"


class Journal:
    """Appends entries, each of them on the disk before `append` returns. The file appears with the first one."""

    def __init__(
        self,
        folder: Path,
        settings: str,  # checksum of the settings: entries of another run are not taken for those of this one
    ) -> None:
        self.path = folder / f".journal-{uuid.uuid4().hex[:12]}.jsonl"
        self._settings = settings
        self._descriptor: int | None = None

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry.

        Raises:
            InputError: the disk is full, the folder is read-only, or the like.
        """
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
                sync_folder(self.path.parent)
            line = memoryview((json.dumps({**entry, "check": _check(entry, self._settings)}, allow_nan=False) + "\n").encode())
            while line:
                line = line[os.write(self._descriptor, line) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> bool:
        """Close the file, and say whether there was one open."""
        if self._descriptor is None:
            return False
        os.close(self._descriptor)
        self._descriptor = None
        return True


def read_journals(folder: Path, settings: str) -> Iterator[dict[str, Any]]:
    """Every whole entry of every journal in a folder that was made with these settings.

    A line that a power failure or a full disk tore, or that was changed since, is passed over: its batch is made again.
    """
    for path in sorted(folder.glob(_PATTERN)):
        try:
            lines = path.read_bytes().split(b"\n")[:-1]  # the last one has no end: it is empty, or torn
        except FileNotFoundError:  # another process has just finished the set
            continue
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        for line in lines:
            try:
                entry = json.loads(line)
                good = isinstance(entry, dict) and entry.pop("check", None) == _check(entry, settings)
            except (ValueError, RecursionError):
                continue
            if good:
                yield entry


def remove_journals(folder: Path) -> None:
    """Remove all journals, once the manifest says what they say."""
    for path in folder.glob(_PATTERN):
        path.unlink(missing_ok=True)


def is_journal(path: Path) -> bool:
    """Whether this is one of the journals of a set."""
    return path.match(_PATTERN)


def _check(entry: dict[str, Any], settings: str) -> str:
    return hashlib.sha256(f"{settings} {json.dumps(entry, sort_keys=True)}".encode()).hexdigest()[:16]

"""PyTorch files: written whole, the same content as the same bytes; read, of any origin, without running anything that is in them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from dwa_fast.errors import InputError
from dwa_fast.files import replacing

_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")  # how torch names what it refuses to call
_NAMED = 3  # how many of them an error quotes


def write_archive(path: Path, content: Any) -> None:
    """Write what `read_archive` reads, whole or not at all.

    Raises:
        InputError: the disk is full, the folder is read-only, or the like.
    """
    with replacing(path) as target, open(target, "wb") as file:  # of a path, torch.save would keep the temporary name in the archive
        torch.save(content, file)


def read_archive(path: Path, what: str) -> Any:
    """What `torch.save` wrote, on the CPU; tensors, numbers, text and containers alone.

    Args:
        what: what the file should be, for the sentence: "checkpoint".
    Raises:
        InputError: the file is not there, cannot be read, is damaged, or holds more than that (such as a whole module, which is code).
    """
    if not path.is_file():
        raise InputError(f"{what} {path} does not exist")
    if _is_compressed(path):
        raise InputError(f"{what} {path} is a compressed archive, which torch.save never writes; it could be far larger than it looks")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for damaged archives
        if isinstance(error, PermissionError):
            raise InputError(f"{what} {path} cannot be read: {error.strerror}") from error
        raise InputError(f"{what} {path} cannot be read: {_reason(path, error)}") from error


def _is_compressed(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception:  # an archive of the old kind, or damaged in one of many ways: torch.load will say
        return False


def _reason(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        return "it is empty"
    foreign = _foreign(path, error)
    if not foreign:
        return "it is damaged, no PyTorch file, or holds more than tensors"
    return (
        f"it holds more than tensors ({', '.join(foreign)}), which could run code and is left alone; "
        "where you trust the file, load it with the program that wrote it and save the tensors alone (of a module: its state_dict())"
    )


def _foreign(path: Path, error: Exception) -> list[str]:
    """Names of the functions and classes that the file asks for and that weights_only refuses, as far as torch tells."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an archive of the old kind, which that function cannot list; its first name stands in the message
        names = _FOREIGN.findall(str(error))
    names = sorted(set(names))
    return names[:_NAMED] + (["…"] if len(names) > _NAMED else [])

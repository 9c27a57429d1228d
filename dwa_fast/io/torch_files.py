"""PyTorch files: written atomically and reproducibly; read without running code from them."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dwa_fast.errors import InputError
from dwa_fast.io.files import atomic_write
from dwa_fast.io.formats import damaged_entry, folder_reason, foreign_format, is_safetensors
from dwa_fast.io.pickles import PLAIN_NUMBERS, stand_ins

_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")  # names in torch's message about a refused global
_BLOCKED = re.compile(r"GLOBAL ([\w.]+) whose module")  # the same for modules that torch always blocks
_NAMED = 3  # names that an error message quotes
_SHARDED = {"DTensor", "ShardedTensor"}  # tensors of which each process holds a part


def write_archive(path: Path, content: Any) -> None:
    """Write with torch.save, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_write(path) as target, open(target, "wb") as file:
        save_archive(content, file)


def save_archive(content: Any, file: BinaryIO) -> None:
    """Write with torch.save into an open file; raises OSError where it cannot be written."""
    # Given a path, torch.save would store its name in the archive; given the file, a full disk would be a RuntimeError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    file.write(buffer.getbuffer())


def read_archive(path: Path, what: str, *, numpy_numbers: bool = False) -> Any:
    """Read what `torch.save` wrote, on the CPU: tensors, numbers, text and containers only (weights_only).

    Args:
        what: kind of file in the error message, such as "checkpoint".
        numpy_numbers: NumPy integers and floats become Python's instead of being refused; no function of NumPy is called.
    Raises:
        InputError: the file does not exist, cannot be read, is damaged, or holds other objects, such as a whole module.
    """
    return _reading(path, what, lambda: _load(path, PLAIN_NUMBERS if numpy_numbers else ()))


def read_checkpoint(path: Path, what: str) -> Any:
    """Read a checkpoint of any program: also safetensors, and archives with objects of unknown classes, which become inert stand-ins.

    Raises:
        InputError: the file does not exist, cannot be read, or is damaged.
    """
    return _reading(path, what, lambda: _load_safetensors(path) if is_safetensors(path) else _load_foreign(path))


def _reading(path: Path, what: str, load: Callable[[], Any]) -> Any:
    """Call `load` and turn all its errors into one InputError."""
    if path.is_dir():
        raise InputError(f"{what} {path} cannot be read: {folder_reason(path)}")
    if not path.is_file():
        raise InputError(f"{what} {path} does not exist")
    try:
        return load()
    except InputError as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from error
    except Exception as error:  # torch raises a dozen kinds for damaged archives
        reason = error.strerror if isinstance(error, PermissionError) else _reason(path, error)
        raise InputError(f"{what} {path} cannot be read: {reason}") from error


def _load(path: Path, allowed: Sequence[tuple[type, str]] = ()) -> Any:
    _check_format(path)
    if (damaged := damaged_entry(path)) is not None:
        raise InputError(f"it is damaged: the checksum of {damaged} in it is not that of its bytes; copy or download it again")
    with open(path, "rb") as file, torch.serialization.safe_globals([*allowed]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # protocol 3 is a superset of 2
        warnings.filterwarnings("ignore", ".*[Ss]parse")  # its checks take time, or are off; callers refuse sparse tensors
        return torch.load(file, map_location="cpu", weights_only=True)  # given a path, torch.load would look at its suffix


def _check_format(path: Path) -> None:
    reason = foreign_format(path)
    if reason is not None:
        raise InputError(reason)


def _load_foreign(path: Path) -> Any:
    _check_format(path)
    try:
        allowed = stand_ins(path)
    except Exception:  # damaged, or not of torch.save: the loader reports which
        allowed = []
    shards = [name for _, name in allowed if name.rpartition(".")[2] in _SHARDED]
    if shards:
        raise InputError(
            f"its weights are pieces of distributed tensors ({shards[0]}); "
            "save whole ones, of torch.distributed.checkpoint.state_dict with full_state_dict=True"
        )
    return _load(path, allowed)


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError("it is a safetensors file; pip install safetensors lets it be read") from error
    try:
        weights: dict[str, Any] = load_file(path)
        return weights
    except SafetensorError as error:
        raise InputError(f"it is a safetensors file that is cut short or damaged ({error})") from error


def _reason(path: Path, error: Exception) -> str:
    foreign = _foreign(path, error)
    if "persistent_load of storage" in str(error):  # PyTorch before 1.6 wrote modules with their source code
        foreign = ["a module"]
    if not foreign:
        return "it is damaged, no PyTorch file, or holds more than tensors"
    return (
        f"it holds more than tensors ({', '.join(foreign)}), which could run code and is left alone; "
        "where you trust the file, load it with the program that wrote it and save the tensors alone (of a module: its state_dict())"
    )


def _foreign(path: Path, error: Exception) -> list[str]:
    """Names of functions and classes in the file that weights_only refuses, as far as torch reports them."""
    blocked = _BLOCKED.findall(str(error))
    try:
        names = blocked or torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old archive, which that function cannot list; the message has its first name
        names = _FOREIGN.findall(str(error))
    names = sorted(set(names))
    return names[:_NAMED] + (["…"] if len(names) > _NAMED else [])

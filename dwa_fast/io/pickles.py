"""Reads pickles without their classes: each name that PyTorch does not know becomes an inert stand-in.

`torch.load(weights_only=True)` refuses a whole file for one unknown object beside its tensors, such as the argparse.Namespace of a training
script. Here each unknown class or function is replaced by a class of ours that accepts and ignores all arguments and state. The tensors are
read; nothing named in the file is imported, looked up or called.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, deque
from pathlib import Path
from typing import IO, Any, ClassVar

_PICKLES_BEFORE = 3  # in files of PyTorch before 1.6: magic number, protocol and system, a pickle each
_STORED = "/data.pkl"  # name of the pickle in an archive of torch.save
_MARK = pickletools.markobject


class StandIn:
    """Replaces an object of an unknown class."""

    __slots__ = ()
    class_name: ClassVar[str] = "unknown"  # the original name, as in the file

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        """Ignore the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


class _Lookup:
    """Replaces getattr, which pickles use for nested classes and methods; gives a stand-in."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return StandIn


class _Mapping:
    """Replaces a class of dictionaries. Its items are read, since they may hold the weights."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


class _Sequence:
    """Stands for a class of lists."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []


class _NumberType:
    """Replaces numpy.dtype, for the types of numbers in `_NUMBERS` alone."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in _NUMBERS:
            raise ValueError(f"a NumPy value of type {code!r}, expected one of {', '.join(_NUMBERS)}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        """Take the byte order, which is all that these types have as state."""
        self.order = "<" if state[1] in ("<", "=") else ">"


class _Number:
    """Replaces numpy.core.multiarray.scalar; gives a Python number."""

    def __new__(cls, kind: Any, content: Any) -> Any:
        if not isinstance(kind, _NumberType) or not isinstance(content, bytes):
            raise ValueError("a NumPy value that is no number")
        (value,) = struct.unpack(kind.order + _NUMBERS[kind.code], content)
        return value


_NUMBERS = {"i4": "i", "i8": "q", "f8": "d"}  # NumPy's name of a type: Python's in struct

# For `torch.serialization.safe_globals`: NumPy integers and floats become Python's; NumPy 1 and 2 pickle them under different names.
PLAIN_NUMBERS: list[tuple[type, str]] = [
    (_NumberType, "numpy.dtype"),
    *((_Number, f"numpy.{name}.multiarray.scalar") for name in ("core", "_core")),
]


def stand_ins(path: Path) -> list[tuple[type, str]]:
    """For `torch.serialization.safe_globals`: a stand-in for every class and function that a file of torch.save names.

    PyTorch's own table goes first, so that stand-ins for what it knows are never used.

    Raises:
        Exception: of many kinds, where the file is damaged or no file of torch.save.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(_STORED))
            kinds = _kinds(io.BytesIO(archive.read(name)))
    else:
        with path.open("rb") as file:
            for _ in range(_PICKLES_BEFORE):
                deque(pickletools.genops(file), maxlen=0)
            kinds = _kinds(file)
    return [(StandIn, ""), *((_stand_in(name, kind), spelling) for name, kind in kinds.items() for spelling in _spellings(name))]


def _stand_in(name: str, kind: type) -> type:
    return type("StandIn", (kind,), {"__slots__": (), "class_name": name.replace(" ", ".")})


def _kinds(pickled: IO[bytes]) -> dict[str, type]:
    """What stands for each name: a mapping or a list where the pickle puts items into its objects, else an object.

    The stack of the unpickler is followed with names in the place of objects; nothing is made.
    """
    kinds: dict[str, type] = {}
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for code, argument, _ in pickletools.genops(pickled):
        if code.name == "GLOBAL":
            name = str(argument)
            kinds.setdefault(name, _Lookup if "builtins.getattr" in _spellings(name) else StandIn)
            stack.append(name)
        elif code.name == "MARK":
            stack.append(_MARK)
        elif code.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        else:
            taken = _take(stack, code.stack_before)
            if code.name in _FILLING and taken[0] in kinds:
                kinds[taken[0]] = _FILLING[code.name]
            stack += taken[:1] if code.name in _KEEPING else [None] * len(code.stack_after)
    return kinds


_FILLING = {"APPEND": _Sequence, "APPENDS": _Sequence, "SETITEM": _Mapping, "SETITEMS": _Mapping}
_KEEPING = {*_FILLING, "BUILD", "REDUCE", "NEWOBJ"}  # leave the object, or what its class makes, on the stack


def _take(stack: list[Any], wanted: list[pickletools.StackObject]) -> list[Any]:
    """Take what an operation takes from the stack."""
    cut = len(stack) - len(wanted)
    if _MARK in wanted:
        cut = next(index for index in reversed(range(len(stack))) if stack[index] is _MARK) - wanted.index(_MARK)
    taken = stack[cut:]
    del stack[cut:]
    return taken


def _spellings(name: str) -> set[str]:
    """A module and a name of it with a dot between them: as protocol 2 writes those of Python 2, and as they are called today."""
    module, _, attribute = name.partition(" ")
    today = NAME_MAPPING.get((module, attribute), (IMPORT_MAPPING.get(module, module), attribute))
    return {f"{module}.{attribute}", ".".join(today)}

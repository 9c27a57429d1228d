"""Reads a script's `args`, whatever its type, into a mapping of plain values; and logs a message once."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

log = logging.getLogger("dwa_fast")

_NO_NAMESPACES = (str, bytes, int, float, complex, list, set, frozenset, PurePath, Tensor, np.ndarray, np.generic, nn.Module, torch.device)


def fields_of(args: Any) -> dict[str, Any]:
    """The fields of an argparse namespace, a mapping (dict, OmegaConf's DictConfig), a dataclass, or any object with attributes.

    Private names and functions are left out, so are fields that are None: they stand for no choice. Scalars and arrays
    of NumPy and PyTorch become Python's.

    Raises:
        TypeError: it is None, a number, a string, a list, a tensor or a network.
    """
    if isinstance(args, Mapping):
        values = {str(name): args[name] for name in args}
    elif args is None or isinstance(args, _NO_NAMESPACES) or (isinstance(args, tuple) and not hasattr(args, "_fields")):
        raise TypeError(f"args must be a namespace such as argparse gives, or a mapping, got {type(args).__name__}")
    elif isinstance(args, Namespace):
        values = dict(vars(args))
    elif callable(getattr(args, "keys", None)):  # ml_collections' ConfigDict, which is no Mapping
        values = {str(name): args[name] for name in list(args.keys())}
    elif dataclasses.is_dataclass(args):
        values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(args)} | _attributes(args)
    else:
        values = _attributes(args)
    return {name: plain(value) for name, value in values.items() if value is not None and not name.startswith("_") and not _is_code(value)}


def _attributes(args: Any) -> dict[str, Any]:
    """Also those of its classes, as in `class Args: lr = 0.1`, and those of a named tuple."""
    return {name: getattr(args, name, None) for name in dir(args) if not name.startswith("_")}


def _is_code(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module)


def plain(value: Any) -> Any:
    """A scalar of NumPy or PyTorch as Python's, an array or tensor as a list; anything else as it is."""
    if isinstance(value, (np.ndarray, np.generic)) or (isinstance(value, Tensor) and value.device.type != "meta"):
        return value.item() if math.prod(value.shape) == 1 else value.tolist()
    return value


@functools.cache
def log_once(text: str) -> None:
    """Log a line, once a process; where the script has set up no logging, which would hide it, it goes to the standard error."""
    log.info(text)
    if not log.hasHandlers():
        print(text, file=sys.stderr)

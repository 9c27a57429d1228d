"""Checkpoints as other programs write them, and what the tests of reading them share."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import io
import pathlib
import random
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwa_fast.models.architectures import SmallResNet
from dwa_fast.models.checkpoint import load_teacher
from tests.nets import SIZE, alive

Weights = dict[str, Tensor]


def network(seed: int = 0) -> nn.Module:
    """A small-resnet for ten classes with statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return alive(SmallResNet(10, 1))


def load(path: Path, **changes: Any) -> nn.Module:
    return load_teacher(path, **{"architecture": "small-resnet", "channels": 1, "size": SIZE, **changes})[0]


def assert_weights(module: nn.Module, wanted: Weights) -> None:
    own = module.state_dict()
    assert own.keys() == wanted.keys()
    assert [name for name, value in own.items() if not torch.equal(value, wanted[name].to(value.dtype))] == []


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


class Colour(enum.Enum):
    RED = 1


class Attributes(dict[str, Any]):
    """A dictionary class as hyperparameters are kept in: AttributeDict, EasyDict, ConfigDict."""


class Many(list[Any]):
    """A list class."""


class Slots:
    __slots__ = ("a",)

    class Nested(enum.Enum):
        ONE = 1

    def __init__(self) -> None:
        self.a = 1


class Averaged:
    """ModelEmaV2 and its kind, as far as a pickle is concerned: an object that holds a network."""

    def __init__(self) -> None:
        self.module = network(1)


def objects() -> dict[str, Any]:
    """What training scripts keep beside weights."""
    return {
        "args": argparse.Namespace(lr=0.1, output=pathlib.Path("runs"), nested=argparse.Namespace(a=1)),
        "path": pathlib.PurePosixPath("a/b"),
        "windows": pathlib.PureWindowsPath("a\\b"),
        "best": np.float64(71.5),
        "curve": np.arange(5, dtype=np.float32),
        "words": np.array(["a", None], dtype=object),
        "numpy rng": np.random.get_state(),  # noqa: NPY002 (as training scripts keep it)
        "python rng": random.getstate(),
        "torch rng": torch.get_rng_state(),
        "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        "simple": types.SimpleNamespace(a=1),
        "enum": Colour.RED,
        "nested": Slots.Nested.ONE,
        "default": collections.defaultdict(list, {"loss": [1.0]}),
        "deque": collections.deque([1, 2], maxlen=3),
        "counter": collections.Counter("aab"),
        "attributes": Attributes(lr=0.1, sub=Attributes(a=1)),
        "many": Many([1, 2]),
        "slots": Slots(),
        "partial": functools.partial(torch.nn.functional.relu, inplace=True),
        "type": nn.ReLU,
        "module of its own": nn.Linear(2, 2),
        "set": {1, 2},
        "frozen": frozenset({1}),
        "bytes": b"abc",
        "bytearray": bytearray(b"abc"),
        "complex": 1 + 2j,
        "dtype": torch.float16,
        "range": range(3),
        "slice": slice(1, 2),
        "exception": ValueError("x"),
    }


def optimiser(weights: Weights) -> dict[str, Any]:
    return {"state": {i: {"step": torch.tensor(3.0), "exp_avg": v.clone()} for i, v in enumerate(weights.values())}, "param_groups": [{}]}


def changed(**values: Any) -> Weights:
    return {**network().state_dict(), **{name.replace("__", "."): value for name, value in values.items()}}


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/").replace("DOT", "."), content)
    return buffer.getvalue()


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.zeros(3))
    return buffer.getvalue()

"""What BNFeatureHook takes: where its line takes effect, which arguments mean nothing else, and what it refuses."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dwa_fast import InputError
from dwa_fast.compat import BNFeatureHook
from tests.compat.layers import layer

THEIRS = "class BNFeatureHook:\n    def __init__(self, module):\n        self.r_feature = None\n"
MAKING = "def hooks_of(network):\n    return [BNFeatureHook(module) for module in network]\n"
LINE = "from dwa_fast.compat import BNFeatureHook\n"


@pytest.mark.parametrize(
    ("script", "ours"),
    [
        ("from theirs import BNFeatureHook\n" + LINE + MAKING, True),  # SRe2L, CDA, DWA, DELT, UFC: below the imports
        (LINE + THEIRS + MAKING, False),  # CV-DD, DIVA, FADRM, FD2: there it does nothing
        (THEIRS + MAKING + LINE, True),  # and there it does
    ],
)
def test_where_the_line_takes_effect(script: str, ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {}
    exec(script, names)
    assert isinstance(names["hooks_of"]([layer()])[0], BNFeatureHook) is ours


METHODS = "is another method's hook, with other mathematics: leave that class in the script; neither BNFeatureHook nor get_images"


@pytest.mark.parametrize(
    ("rest", "others"),
    [
        ((), {}),
        ((None,), {}),
        ((False,), {}),
        ((False, 0, 10), {}),
        ((False, 0, 10, None), {}),
        ((False, 5, 0, 10, None), {}),
        ((), {"per_class_bn": False, "start": 0, "end": 10, "weights": None}),
        ((), {"start": 0, "end": 10}),
    ],
)
def test_arguments_that_ask_for_nothing_else(rest: tuple[Any, ...], others: dict[str, Any]) -> None:
    assert BNFeatureHook(layer(), *rest, **others).r_var == 1.0


def test_r_var_comes_from_any_namespace() -> None:
    @dataclass
    class Settings:
        r_var: float = 7.0

    class Class:
        r_var = 7.0

    for args in (
        Namespace(r_var=7.0),
        SimpleNamespace(r_var=7.0),
        {"r_var": 7.0},
        Settings(),
        Class,
        Class(),
        Namespace(r_var=np.float32(7)),
    ):
        assert BNFeatureHook(layer(), args).r_var == 7.0


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no layer": (lambda: BNFeatureHook(nn.ReLU()), TypeError, "BNFeatureHook wants an nn.BatchNorm2d (or 1d, 3d), got ReLU"),
    "no statistics": (
        lambda: BNFeatureHook(nn.BatchNorm2d(3, track_running_stats=False)),
        InputError,
        "BNFeatureHook wants a BatchNorm layer that keeps running statistics; it needs track_running_stats=True",
    ),
    "LayerNorm": (lambda: BNFeatureHook(nn.LayerNorm(3)), TypeError, "got LayerNorm, which has no running statistics of whole batches"),
    "InstanceNorm": (
        lambda: BNFeatureHook(nn.InstanceNorm2d(3, track_running_stats=True)),
        TypeError,
        "got InstanceNorm2d, which has no running statistics of whole batches",
    ),
    "convolution": (lambda: BNFeatureHook(nn.Conv2d(3, 3, 1)), TypeError, f"got Conv2d: a hook on a convolution {METHODS}"),
    "no module": (lambda: BNFeatureHook("bn1"), TypeError, "BNFeatureHook wants an nn.BatchNorm2d (or 1d, 3d), got str"),  # type: ignore[arg-type]
    "momentum": (
        lambda: BNFeatureHook(nn.BatchNorm2d(3), 0.8),
        TypeError,
        "args of BNFeatureHook must be None or a namespace with r_var, got 0.8; a hook that takes a momentum, a class, a path or a list is",
    ),
    "class": (
        lambda: BNFeatureHook(nn.BatchNorm2d(3), 3),
        TypeError,
        "args of BNFeatureHook must be None or a namespace with r_var, got 3",
    ),
    "list": (
        lambda: BNFeatureHook(nn.BatchNorm2d(3), [1]),
        TypeError,
        f"got [1]; a hook that takes a momentum, a class, a path or a list {METHODS}",
    ),
    "path": (lambda: BNFeatureHook(nn.BatchNorm2d(3), "x", 0.8, "y"), TypeError, "must be None or a namespace with r_var, got 'x'"),
    "per class": (
        lambda: BNFeatureHook(nn.BatchNorm2d(3), True),
        TypeError,
        f"BNFeatureHook(…, per_class_bn=True), with statistics of each class, {METHODS}",
    ),
    "per class by name": (lambda: BNFeatureHook(nn.BatchNorm2d(3), per_class_bn=True), TypeError, "BNFeatureHook(…, per_class_bn=True)"),
    "momentum by name": (
        lambda: BNFeatureHook(nn.BatchNorm2d(3), training_momentum=0.8),
        TypeError,
        f"BNFeatureHook(…, training_momentum=…) {METHODS}",
    ),
    "category": (
        lambda: BNFeatureHook(nn.BatchNorm2d(3), save_path="x", name="y", gpu=0),
        TypeError,
        f"BNFeatureHook(…, save_path=…) {METHODS}",
    ),
    "too many": (
        lambda: BNFeatureHook(nn.BatchNorm2d(3), Namespace(r_var=1), 3),
        TypeError,
        "BNFeatureHook takes (module, args), or (module, per_class_bn=False, …), got 3 arguments with args a namespace",
    ),
    "no features": (
        lambda: BNFeatureHook(layer()).hook_fn(layer(), (torch.zeros(2, 6, dtype=torch.int64),), None),
        InputError,
        "wants the first argument of the layer to be its features, a floating tensor, got torch.int64 tensor",
    ),
    "tokens": (
        lambda: BNFeatureHook(layer()).hook_fn(layer(), (torch.zeros(2, 9, 6),), None),
        InputError,
        "BNFeatureHook wants features [N, 6, …], not empty, got shape (2, 9, 6); ViT_BNFeatureHook takes those of a transformer, [B, N, C]",
    ),
    "r_var": (
        lambda: BNFeatureHook(nn.BatchNorm2d(3), Namespace(r_var=-1)),
        InputError,
        "r_var must be a finite number of at least 0, got -1",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        make()


def test_a_namespace_without_r_var_weighs_the_variance_with_1() -> None:
    assert BNFeatureHook(layer(), Namespace(lr=0.1)).r_var == 1.0

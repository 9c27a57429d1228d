"""Chooses once which implementation of each operator runs, and says why the others cannot."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.config import BackendName, Precision, check_choice
from dwa_fast.errors import InputError
from dwa_fast.reference import ops as plain

log = logging.getLogger("dwa_fast")

OPERATORS = ("bn_act", "matching_loss", "view", "adam_clip_", "ascend_")
_PLAIN = "plain PyTorch"
_PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Operators:
    """The five operators that a run calls; signatures as in `reference.ops`."""

    name: str
    bn_act: Callable[..., tuple[Tensor, Tensor]] = plain.bn_act
    matching_loss: Callable[..., Tensor] = plain.matching_loss
    view: Callable[..., Tensor] = plain.view
    adam_clip_: Callable[..., None] = plain.adam_clip_
    ascend_: Callable[..., Tensor] = plain.ascend_
    implementations: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(OPERATORS, _PLAIN))


@dataclass(frozen=True)
class Execution:
    """Where and how a run computes: everything that "auto" stood for, decided."""

    operators: Operators
    device: torch.device
    dtype: torch.dtype

    def describe(self) -> dict[str, str]:
        """What the bits of the result depend on, for manifests and reports."""
        return {"backend": self.operators.name, "device": self.device.type, "precision": _PRECISIONS[self.dtype]}


def resolve(backend: BackendName, precision: Precision, device: str) -> Execution:
    """Decide device, operators and arithmetic; log what "auto" became.

    Raises:
        InputError: something that was asked for by name cannot run here; every cause is given.
    """
    check_choice("backend", backend, BackendName)
    check_choice("precision", precision, Precision)
    where = resolve_device(device)
    chosen, causes = backend, fused_causes()
    if backend == "auto":
        chosen = "reference" if causes or precision == "fp64" else "fused"
        _announce(f"back-end {chosen} on {where}" + (f" (fused cannot run: {'; '.join(causes)})" if causes else ""))
    if chosen == "fused" and causes:
        raise InputError(f"back-end 'fused' cannot run: {'; '.join(causes)}")
    if precision not in ("auto", "fp32", "fp64") or (chosen, precision) == ("fused", "fp64"):
        supported = "fp32, fp64" if chosen == "reference" else "fp32"
        raise InputError(f"precision {precision!r} is not offered by back-end {chosen!r}; it offers: {supported}")
    dtype = torch.float64 if precision == "fp64" else torch.float32
    return Execution(_fused() if chosen == "fused" else Operators("reference"), where, dtype)


@functools.cache
def _announce(choice: str) -> None:
    """Log what "auto" became, once."""
    log.info(choice)


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first CUDA device where there is one, else the CPU.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:0, …") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported; supported: cpu, cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    return device


def fused_causes() -> list[str]:
    """Why the fused operators cannot run here; empty where they can."""
    cause = ops.cause()
    return [cause] if cause else []


def describe() -> dict[str, Any]:
    """What `dwa-fast info` shows: each back-end with its operators, or with the causes that keep it from running."""
    causes = fused_causes()
    return {
        "reference": dict(Operators("reference").implementations),
        "fused": causes or dict(_fused().implementations),
    }


def _fused() -> Operators:
    implementations = dict.fromkeys(OPERATORS, _PLAIN) | {"ascend_": "C++ and CUDA"}
    return Operators("fused", ascend_=ops.ascend_, implementations=implementations)

"""Loads the compiled operators and registers all that Python adds to their schemas: shapes, and the Triton launchers for CUDA."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

_NAME = "dwa_fast._C"
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")  # instruction sets of the CPU operators, lowest first
_HIGHEST = {"NO AVX": "baseline", "DEFAULT": "baseline", "AVX2": "avx2"}  # by what PyTorch computes with; with more there is no limit
_fakes: dict[str, Callable[..., object]] = {}  # operator: its fake, registered once the library that defines its schema is loaded
_schemas: dict[str, str] = {}  # operator: its schema, where C++ does not define it
_composed: dict[str, Callable[..., object]] = {}  # operator: what computes it on a CPU, where C++ does not
_launchers: dict[str, str] = {}  # operator: the module of kernels/ with its Triton launcher, a function of the operator's name
_registrations: torch.library.Library | None = None  # holds the registrations; there once the extension is loaded


def fake(
    operator: str, triton: str | None = None, schema: str | None = None, cpu: Callable[..., object] | None = None
) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Decorator: the shapes that torch.ops.dwa_fast.<operator> returns, for torch.compile and meta tensors.

    Args:
        triton: the module of kernels/ that launches the operator on CUDA; None where C++ does, or nothing.
        schema: of an operator that C++ does not know; None where C++ defines it.
        cpu: computes it on a CPU from other operators; None where C++ does, or nothing.
    """

    def register(function: Callable[..., object]) -> Callable[..., object]:
        _fakes[operator] = function
        if triton is not None:
            _launchers[operator] = triton
        if schema is not None:
            _schemas[operator] = schema
        if cpu is not None:
            _composed[operator] = cpu
        return function

    return register


def register_launchers(library: torch.library.Library, key: str, **options: Any) -> None:
    """Make the Triton launchers the implementations of their schemas for a dispatch key. The first call of each loads Triton."""

    def lazily(operator: str, module: str) -> Callable[..., Any]:
        return lambda *arguments: getattr(importlib.import_module(f"dwa_fast.kernels.{module}"), operator)(*arguments)

    for operator, module in _launchers.items():
        library.impl(operator, lazily(operator, module), key, **options)


def load() -> None:
    """Registers torch.ops.dwa_fast.*; the second call does nothing.

    The CPU operators use no higher an instruction set than PyTorch does, so that ATEN_CPU_CAPABILITY holds for both.

    Raises:
        ImportError: the extension cannot be used; the message gives the reason; the original error is its cause.
    """
    global _registrations
    if _registrations is not None:
        return
    try:
        extension = importlib.import_module(_NAME)
        built_for = str(extension.built_with()["torch"])
    except ImportError as error:
        raise ImportError(f"the compiled operators of dwa_fast cannot be used: {_explain(error)}", name=_NAME) from error
    # Between minor versions PyTorch's C++ interface changes, not always in ways that the loader notices.
    if built_for.split(".")[:2] != str(torch.__version__).split(".")[:2]:
        raise ImportError(
            "the compiled operators of dwa_fast cannot be used: "
            f"dwa_fast._C was built for PyTorch {built_for}, this is PyTorch {torch.__version__}; build it again",
            name=_NAME,
        )
    highest = _HIGHEST.get(torch.backends.cpu.get_cpu_capability())
    if highest and LEVELS.index(extension.cpu_level()) > LEVELS.index(highest):
        extension.set_cpu_level(highest)
    _registrations = torch.library.Library("dwa_fast", "FRAGMENT")
    for operator, schema in _schemas.items():
        _registrations.define(f"{operator}{schema}")
    for operator, function in _composed.items():
        _registrations.impl(operator, function, "CPU")
    for operator, function in _fakes.items():
        torch.library.register_fake(f"dwa_fast::{operator}", function)
    register_launchers(_registrations, "CUDA")


def cause() -> str | None:
    """Why the compiled operators cannot be used; None if they can."""
    try:
        load()
    except ImportError as error:
        return str(error)
    return None


def built_with() -> dict[str, object]:
    """What the extension was built with: torch, compiler, has_cuda, cuda (None without).

    Raises:
        ImportError: the extension cannot be used.
    """
    load()
    return dict(importlib.import_module(_NAME).built_with())


def _explain(error: ImportError) -> str:
    running = f"this is PyTorch {torch.__version__} with CUDA {torch.version.cuda or 'none'}"
    if importlib.util.find_spec(_NAME) is None:
        return "dwa_fast._C is not built for this Python (`pip install --no-build-isolation -e .` in the repository builds it)"
    message = str(error).splitlines()[0] if str(error) else repr(error)
    if "undefined symbol" in message or "cannot open shared object" in message:
        return f"dwa_fast._C was built for another PyTorch, {running}; build it again ({message})"
    return f"{message}; {running}"

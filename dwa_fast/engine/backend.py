"""Chooses which implementation of each operator runs, once per run, and gives the causes why the others cannot."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwa_fast import ops
from dwa_fast.config import BackendName, Precision, check_choice
from dwa_fast.errors import InputError
from dwa_fast.reference import graph_ops
from dwa_fast.reference.ops import OPERATORS, Operators

log = logging.getLogger("dwa_fast")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN = "plain PyTorch"
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_QUEUED = 10  # iterations on a GPU between two progress reports
_FP16_LOSS_SCALE = 2.0**14  # matching gradients are 1e-8 to 1e-7 per element, below fp16's range


@dataclass(frozen=True)
class Execution:
    """Where and how a run computes: every "auto" resolved."""

    backend: str  # reference, fused or compiled
    operators: Operators
    device: torch.device
    precision: str  # fp32, tf32, bf16, fp16 or fp64
    captures: bool = False  # whether steps are captured once and then replayed without the interpreter

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and of the weights that convolutions read."""
        return _DTYPES[self.precision]

    @property
    def master_dtype(self) -> torch.dtype:
        """Of images, statistics, losses, Adam's state and the weights that the ascent moves."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def channels_last(self) -> bool:
        """Whether images and weights lie with their channels innermost."""
        return self.backend != "reference"

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def iterations_per_call(self) -> int:
        """How many iterations run, or are queued on a GPU, before Ctrl-C and progress get their turn."""
        return _QUEUED if self.device.type == "cuda" else 1

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied with before the backward pass."""
        return _FP16_LOSS_SCALE if self.precision == "fp16" else 1.0

    def describe(self) -> dict[str, str]:
        """What the bits of the result depend on, for manifests and reports."""
        return {"backend": self.backend, "device": self.device.type, "precision": self.precision}

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Inside, convolutions and products take TensorFloat-32 only where the precision is tf32, and give the same bits every time.

        Gradients can be taken and no autocast is on, whatever the caller has set.
        """
        with repeatable(self.precision == "tf32"), own_modes():
            yield


@dataclass(frozen=True)
class _Products:
    """How PyTorch computes products and convolutions of fp32 numbers, and whether cuDNN gives the same bits every time."""

    precisions: tuple[str, ...]  # of _PRODUCTS
    matmul: str  # what set_float32_matmul_precision was told
    allows_tf32: bool  # cuDNN's older setting
    deterministic: bool
    benchmark: bool

    @classmethod
    def found(cls) -> _Products:
        """What is set now. The older settings cannot be read where only a newer one was changed; then they follow it."""
        precisions = tuple(each.fp32_precision for each in _PRODUCTS)
        try:
            matmul = torch.get_float32_matmul_precision()
        except RuntimeError:
            matmul = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
        return cls(precisions, matmul, _cudnn.conv.fp32_precision == "tf32", _cudnn.deterministic, _cudnn.benchmark)

    def put(self) -> None:
        """Set them, the older ones first: these change the newer ones."""
        torch.set_float32_matmul_precision(self.matmul)
        _cudnn.allow_tf32 = self.allows_tf32
        for each, precision in zip(_PRODUCTS, self.precisions, strict=True):
            each.fp32_precision = precision
        _cudnn.deterministic, _cudnn.benchmark = self.deterministic, self.benchmark


_cudnn: Any = torch.backends.cudnn
_mkldnn: Any = torch.backends.mkldnn
# three of a GPU, three of a CPU
_PRODUCTS = _cudnn.conv, _cudnn.rnn, torch.backends.cuda.matmul, _mkldnn.conv, _mkldnn.rnn, _mkldnn.matmul
_EXACT = _Products(("ieee",) * 6, "highest", False, True, False)
_TF32 = _Products(("tf32",) * 3 + ("ieee",) * 3, "high", True, True, False)
_lock = threading.Lock()
_inside: list[_Products] = []  # the settings before the first that is within `repeatable`, of whatever thread, and what each has set


@contextmanager
def own_modes() -> Iterator[None]:
    """Inside, gradients can be taken and no autocast is on, whatever the caller has set."""
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def own_defaults() -> Iterator[None]:
    """Inside, as within `own_modes`, and new tensors and networks are float32, whatever the caller has set."""
    before = torch.get_default_dtype()
    with own_modes():
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def repeatable(tf32: bool = False) -> Iterator[None]:
    """Inside, fp32 is fp32, or on a GPU TensorFloat-32 where that is asked for, and the same seed gives the same bits.

    The settings belong to the process: threads that compute at once must agree on tf32. The last one to leave puts back what the first
    one found.
    """
    own = _TF32 if tf32 else _EXACT
    with _lock:
        if not _inside:
            _inside.append(_Products.found())
        _inside.append(own)
        own.put()
    try:
        yield
    finally:
        with _lock:
            del _inside[len(_inside) - 1 - _inside[::-1].index(own)]
            _inside[-1].put()
            if len(_inside) == 1:
                _inside.clear()


def resolve(backend: BackendName, precision: Precision, device: str, *teachers: object) -> Execution:
    """Decide device, operators and arithmetic; log what "auto" became.

    Args:
        teachers: for which; on a CPU depthwise convolutions are slow in bf16, and a precision "auto" is fp32. None: any others.
    Raises:
        InputError: a back-end, precision or device named explicitly cannot run here; the message gives every cause.
    """
    check_choice("backend", backend, BackendName)
    check_choice("precision", precision, Precision)
    where = resolve_device(device)
    causes = fused_causes(where)
    chosen: str = backend
    if backend == "auto":
        chosen = "reference" if causes or precision == "fp64" else "fused"
    if chosen == "fused" and causes:
        raise InputError(f"back-end 'fused' cannot run: {'; '.join(causes)}")
    offered = precisions(chosen, where)
    if precision != "auto" and precision not in offered:
        raise InputError(f"precision {precision!r} is not offered by back-end {chosen!r} on {where.type}; it offers: {', '.join(offered)}")
    arithmetic = offered[0] if precision == "auto" else precision
    depthwise = precision == "auto" and where.type == "cpu" and arithmetic == "bf16" and any(map(_has_depthwise, teachers))
    if depthwise:
        arithmetic = "fp32"
    if "auto" in (backend, precision):
        why = f" (fused cannot run: {'; '.join(causes)})" if causes and backend == "auto" else ""
        slow = precision == "auto" and chosen != "reference" and where.type == "cpu" and arithmetic == "fp32"
        cause = "the teacher's depthwise convolutions are slow in bf16" if depthwise else "no AVX-512 BF16 for bf16"
        _announce(f"back-end {chosen} in {arithmetic} on {where}{why}" + (f" ({cause})" if slow else ""))
    captures = chosen == "fused" or (chosen == "compiled" and where.type == "cuda")
    return Execution(chosen, _operators(chosen, where), where, arithmetic, captures)


def precisions(backend: str, device: torch.device) -> list[str]:
    """Precisions of a back-end on a device; "auto" takes the first."""
    if backend == "reference":
        return ["fp32", "fp64"]
    if device.type == "cuda":
        return ["bf16", "tf32", "fp32", "fp16"]
    return ["bf16", "fp32"] if bf16_instructions() else ["fp32", "bf16"]


def _has_depthwise(teacher: object) -> bool:
    """Whether it has convolutions with a filter of its own for each channel, whose gradient oneDNN computes slowly in bf16."""
    layers = teacher.modules() if isinstance(teacher, nn.Module) else ()
    return any(isinstance(layer, _CONVOLUTIONS) and layer.groups == layer.in_channels > 1 for layer in layers)


def bf16_instructions() -> str | None:
    """By which this CPU multiplies bfloat16 natively, so that oneDNN's convolutions gain from it: AMX, AVX-512 BF16, or None.

    None where PyTorch or oneDNN is held down to fewer instructions (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA).
    """
    allowed = torch.backends.cpu.get_cpu_capability() not in ("NO AVX", "DEFAULT", "AVX2")
    if not (allowed and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if torch.cpu._is_amx_tile_supported() and ("AMX" in limit or limit in ("ALL", "DEFAULT")):
        return "AMX"
    return "AVX-512 BF16" if torch.cpu._is_avx512_bf16_supported() else None


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


def fused_causes(device: torch.device) -> list[str]:
    """Why the fused operators cannot run on a device; empty where they can."""
    causes = [cause] if (cause := ops.cause()) else []
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            causes.append("Triton is not installed")
        if not causes and not ops.built_with()["has_cuda"]:
            causes.append("the extension was built without CUDA")
    return causes


def describe(device: torch.device) -> dict[str, Any]:
    """What `dwa-fast info` shows: each back-end with its operators, or with the causes that keep it from running."""
    causes = fused_causes(device)
    return {
        "reference": dict.fromkeys(OPERATORS, _PLAIN),
        "fused": causes or _implementations(device),
        "compiled": "plain PyTorch, compiled by TorchInductor at the first batch",
    }


def graph_operators(name: str) -> Operators:
    """Plain operators that read schedule and counter as tensors: for TorchInductor, and for CUDA graphs."""
    return Operators(name, **{each: getattr(graph_ops, each) for each in OPERATORS if hasattr(graph_ops, each)})


@functools.cache
def operators_for(device: torch.device, dtype: torch.dtype) -> Operators:
    """Operators with which a hook measures features of this dtype: fused if they can run, else plain ones, with a warning in the log."""
    causes = fused_causes(device) if device.type in ("cpu", "cuda") else [f"they do not run on {device.type}"]
    if not causes and dtype not in {_DTYPES[precision] for precision in precisions("fused", device)}:
        causes = [f"they do not compute in {str(dtype).removeprefix('torch.')} on {device.type}"]
    if not causes:
        return fused_operators(device)
    log.warning("BatchNorm statistics are measured with %s, not by the fused operators: %s", _PLAIN, "; ".join(causes))
    return Operators("reference")


def _operators(backend: str, device: torch.device) -> Operators:
    if backend == "fused":
        return fused_operators(device)
    return graph_operators(backend) if backend == "compiled" else Operators(backend)


def fused_operators(device: torch.device) -> Operators:
    """The fused operators of a device where they can run, plain ones in the place of those that it lacks."""
    implemented = {each: getattr(ops, each) for each, by in _implementations(device).items() if by != _PLAIN}
    return Operators("fused", **implemented, fuses=True, partial_rows=ops.partial_rows if device.type == "cuda" else None)


def _implementations(device: torch.device) -> dict[str, str]:
    """What computes each operator of the fused back-end."""
    if device.type == "cuda":
        return dict.fromkeys(OPERATORS, "Triton") | dict.fromkeys(("mean_pool", "conv3x3", "conv_product"), _PLAIN)
    return dict.fromkeys(OPERATORS, f"C++ ({ops.cpu_level()})") | {
        "ascend_": "C++",
        "conv_product": "C++",
        "cross_entropy": _PLAIN,
        "log_losses_": _PLAIN,
    }

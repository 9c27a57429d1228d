"""The poolings that `bn_act_pool` does, and how they are recognised in a traced network: as modules and functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from dwa_fast.models.modules import has_hooks
from dwa_fast.ops.bn_act_pool import LARGEST_WINDOW

_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")  # attributes of the module
_MEAN = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


class Windows(NamedTuple):
    """Square windows: pixels of a side, from one to the next, and beyond the border."""

    window: int
    stride: int
    padding: int
    averages: bool = False  # whether their mean is taken, not the largest of them

    @property
    def title(self) -> str:
        """For the reader."""
        return "mean-pooling" if self.averages else "max-pooling"


def match_pool(traced: torch.fx.GraphModule, node: torch.fx.Node, value: torch.fx.Node) -> Windows | None:
    """The windows whose largest or mean of `value`, [N, C, H, W], the node takes; None where it does something else, or with other windows.

    A module with hooks, of a subclass, or with a forward of its own is not recognised.
    """
    if len(value.meta.get("shape") or ()) != 4:
        return None
    given: dict[str, Any] = {}
    if node.op == "call_module":
        layer = traced.get_submodule(str(node.target))
        if "forward" in vars(layer) or has_hooks(layer):
            return None
        names, windows = _MODULES.get(type(layer), ((), None))
        given = {name: getattr(layer, name) for name in names}
    else:
        windows = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if windows is None:
        return None
    try:
        call = inspect.signature(windows).bind(*node.args, **node.kwargs, **given)
    except TypeError:  # arguments that the pooling does not have
        return None
    found: Windows | None = windows(*call.args, **call.kwargs) if call.arguments["input"] is value else None
    return found


def _of_largest(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: Any = False,
    return_indices: Any = False,
) -> Windows | None:
    sizes = [_side(each) for each in (kernel_size, kernel_size if stride in (None, ()) else stride, padding, dilation)]
    if ceil_mode or return_indices or any(not isinstance(each, int) for each in sizes):
        return None
    window, step, beyond, apart = sizes
    return Windows(window, step, beyond) if apart == 1 and window <= LARGEST_WINDOW else None


def _of_means(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
) -> Windows | None:
    window, step, beyond = sizes = [_side(each) for each in (kernel_size, kernel_size if stride in (None, ()) else stride, padding)]
    if ceil_mode or divisor_override is not None or any(not isinstance(each, int) for each in sizes):
        return None
    return Windows(window, step, beyond, averages=True) if step == window <= LARGEST_WINDOW and beyond == 0 else None


_MODULES = {nn.MaxPool2d: (_MAX, _of_largest), nn.AvgPool2d: (_MEAN, _of_means)}
_FUNCTIONS: dict[Any, Callable[..., Windows | None]] = {
    F.max_pool2d: _of_largest,
    torch.max_pool2d: _of_largest,
    F.avg_pool2d: _of_means,
}


def _side(value: Any) -> Any:
    """The number that both axes have; None where they have two."""
    numbers = set(value) if isinstance(value, (tuple, list)) else {value}
    return numbers.pop() if len(numbers) == 1 else None

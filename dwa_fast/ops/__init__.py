"""Operators: public function, checks, documentation and registration of each; the arithmetic is in csrc/ and kernels/.

Importing this package loads neither Triton nor the compiled extension: the first call of an operator does.
"""

from __future__ import annotations

import importlib

from dwa_fast.ops._library import built_with, cause, load
from dwa_fast.ops.ascend import ascend_
from dwa_fast.ops.batch_norm_act import batch_norm_act
from dwa_fast.ops.bn_act import bn_act, partial_rows
from dwa_fast.ops.bn_act_join import bn_act_join
from dwa_fast.ops.bn_act_pool import bn_act_pool
from dwa_fast.ops.conv3x3 import conv3x3
from dwa_fast.ops.conv_product import conv_product
from dwa_fast.ops.losses import cross_entropy, log_losses_
from dwa_fast.ops.matching_loss import matching_gradient, matching_loss
from dwa_fast.ops.mean_pool import mean_pool
from dwa_fast.ops.moments import moments
from dwa_fast.ops.view import view
from dwa_fast.ops.view_adam_clip import view_adam_clip_

__all__ = [
    "ascend_",
    "batch_norm_act",
    "bn_act",
    "bn_act_join",
    "bn_act_pool",
    "built_with",
    "cause",
    "conv3x3",
    "conv_product",
    "cpu_level",
    "cross_entropy",
    "load",
    "log_losses_",
    "matching_gradient",
    "matching_loss",
    "mean_pool",
    "moments",
    "partial_rows",
    "view",
    "view_adam_clip_",
]


def cpu_level() -> str:
    """The instruction set that the CPU operators use: "avx512_bf16", "avx512", "avx2" or "baseline".

    The best of this machine, and no better than PyTorch's own, which ATEN_CPU_CAPABILITY ("avx2", "default") limits.

    Raises:
        ImportError: the extension cannot be used.
    """
    load()
    return str(importlib.import_module("dwa_fast._C").cpu_level())

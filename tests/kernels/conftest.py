"""Buffers that no kernel wrote are seen: torch.empty hands out NaN in every test of this folder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty and torch.empty_like holds NaN, or in integers a pattern that no result has by chance."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args: Any, allocate: Any = allocate, **kwargs: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan if tensor.is_floating_point() else 0x5A)

        monkeypatch.setattr(torch, name, poisoned)

"""The loader of the compiled operators."""

from __future__ import annotations

import pytest
import torch

from dwa_fast import ops
from dwa_fast.ops import _library


def test_it_loads_and_says_what_it_is() -> None:
    assert ops.cause() is None
    facts = ops.built_with()
    assert set(facts) == {"torch", "compiler", "has_cuda", "cuda"}
    assert torch.__version__.startswith(str(facts["torch"]))
    assert (facts["cuda"] is not None) == facts["has_cuda"]


def test_built_for_another_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    built_for = ops.built_with()["torch"]
    monkeypatch.setattr(_library, "_registrations", None)
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    said = f"dwa_fast._C was built for PyTorch {built_for}, this is PyTorch 1.0.0; build it again"
    assert ops.cause() == f"the compiled operators of dwa_fast cannot be used: {said}"
    with pytest.raises(ImportError, match="this is PyTorch"):
        ops.ascend_(torch.zeros(1), torch.zeros(1), 1.0)

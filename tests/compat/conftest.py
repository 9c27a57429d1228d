"""Set-up of all tests of the drop-in interfaces."""

from __future__ import annotations

import pytest

from dwa_fast.compat import hooks
from dwa_fast.compat.fields import log_once
from dwa_fast.engine.backend import operators_for


@pytest.fixture(autouse=True)
def chosen_anew() -> None:
    """Operators are chosen, and the choice is said, once per process; each test chooses anew."""
    operators_for.cache_clear()
    log_once.cache_clear()
    hooks._new.clear()

"""Something to report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.material import BRIEF, make_run, make_set


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs and a set."""
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", BRIEF)
    make_set(tmp_path / "runs" / "sets" / "dwa")
    return tmp_path / "runs"

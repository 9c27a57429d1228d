"""Fixtures of the tests of soft labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwa_fast.data.images import FileSet
from tests.training.fkd_setups import set_on_disk


@pytest.fixture
def images(tmp_path: Path) -> FileSet:
    """A distilled set on the disk, below `images`."""
    return set_on_disk(tmp_path / "images")

"""What the tests of hostile names and files share: code that leaves a trace where it is run."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from PIL import EpsImagePlugin


class Harmful:
    """Unpickling this makes a folder: the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: what files hold and where links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def ghostscript(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The canary of a false Ghostscript, which Pillow starts for PostScript."""
    canary, program = folder / "canary", folder / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{canary}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    return canary

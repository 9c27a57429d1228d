"""What `lint-imports` (see pyproject.toml) cannot see: kernels lie outside of the package's folder, and the root stays small."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


def test_kernels_import_torch_and_triton_alone() -> None:
    folder = Path(importlib.util.find_spec("dwa_fast.kernels").origin).parent  # type: ignore[union-attr, arg-type]
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            allowed = {"__future__", "torch", "triton", "dwa_fast", "math", "typing", "collections"}
            assert {name.split(".")[0] for name in names} <= allowed, path
            assert all(not name.startswith("dwa_fast") or name.startswith("dwa_fast.kernels") for name in names), path


def test_folders_hold_the_subjects() -> None:
    """At most ten modules beside the folders."""
    root = Path(importlib.util.find_spec("dwa_fast").origin).parent  # type: ignore[union-attr, arg-type]
    assert len(list(root.glob("*.py"))) <= 10

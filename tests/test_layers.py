"""Imports point down only: every module may import those above it in this list, and no others of the package."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ORDER = """
    _version errors config seeding files layout formats pickles archives views recipes decoding datasets subsets architectures layers norms
    activations reference reference.ops reference.loop
    priors tracing compiled threads finite
    ops._library ops.adam_clip ops.ascend ops.bn_act ops.matching_loss ops.mean_pool ops.moments ops.view ops.view_adam_clip ops
    backend
    weights checkpoint pairing teacher_check pointwise pooling convolution stem symbolic rewrite trial wrappers teacher initial
    packing program repeat ascent refine
    journal losses storage tracking pipeline workers
    parquet tensors exchange
    synthesis
    records distilled augment lessons resuming training squeeze labels validate relabel
    embedding neighbours diversity survey incremental pictures plots
    preview verify production distill
    published report.findings report.document report.values report.sets report.contents report.style report.page report.markdown report
    compat.fields compat.hooks compat.perterb compat.known compat.data_set compat.namespace compat.recover compat
    experiments experiments.cells experiments.schedule experiments.grid experiments.studies
    demo console
    commands.finish commands.data commands.pipeline commands.students commands.exchange commands.relabel commands.inspect commands.demo
    commands.experiments
    commands.report commands.studies commands.diversity commands.incremental commands
    cli
    __init__ __main__
""".split()

BOTTOM = set("_version errors config seeding files layout formats pickles archives views recipes decoding datasets architectures".split())
PACKAGE = Path(importlib.util.find_spec("dwa_fast").origin).parent  # type: ignore[union-attr, arg-type]
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path, name: str) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} uses a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        for full in names:
            if full.startswith("dwa_fast."):
                parts = full.removeprefix("dwa_fast.").split(".")
                found |= {".".join(parts[:n]) for n in (1, 2, 3) if ".".join(parts[:n]) in MODULES}
    return found


def violations(modules: dict[str, Path]) -> list[str]:
    """Every import that points up or sideways to a later module."""
    rank = {name: position for position, name in enumerate(ORDER)}
    wrong = []
    for name, path in modules.items():
        parents = {".".join(name.split(".")[:1])}  # a module of a package may see the package itself
        wrong += [f"{name} imports {other}" for other in imported(path, name) - parents if rank[other] >= rank[name] and other != name]
    return wrong


def test_every_module_has_a_layer() -> None:
    kernels = {name for name in MODULES if name.split(".")[0] == "kernels"}
    assert set(MODULES) - kernels == set(ORDER)


def test_imports_point_down() -> None:
    assert violations({name: path for name, path in MODULES.items() if name in ORDER}) == []


def test_a_wrong_import_would_be_found(tmp_path: Path) -> None:
    wrong = tmp_path / "config.py"
    wrong.write_text("def late():\n    from dwa_fast.engine.synthesis import synthesize\n")
    assert violations({"config": wrong}) == ["config imports synthesis"]


def test_operators_have_no_random_numbers() -> None:
    """Draws happen in stages, never in operators."""
    for name in ("reference.ops", "ops.ascend"):
        assert "seeding" not in imported(MODULES[name], name)


def test_kernels_import_torch_and_triton_alone() -> None:
    folder = Path(importlib.util.find_spec("dwa_fast.kernels").origin).parent  # type: ignore[union-attr, arg-type]
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            allowed = {"__future__", "torch", "triton", "dwa_fast", "math", "typing", "collections"}
            assert {name.split(".")[0] for name in names} <= allowed, path
            assert all(not name.startswith("dwa_fast") or name.startswith("dwa_fast.kernels") for name in names), path


@pytest.mark.parametrize("module", sorted(BOTTOM))
def test_plain_values_need_no_operators(module: str) -> None:
    assert not imported(MODULES[module], module) - BOTTOM

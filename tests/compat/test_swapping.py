"""The recover loop run three ways, plain, with hooks and ascent swapped, and as get_images, with equal losses and images."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dwa_fast import SynthesisConfig
from dwa_fast.compat import BNFeatureHook, Perterb, get_images
from dwa_fast.compat.namespace import read_namespace
from dwa_fast.compat.recover import Recovery
from dwa_fast.recipes import RECIPES, recipe
from tests.compat.loops import Draws, Parts, Run, colour_teacher, recover

SWAPPED = Parts(BNFeatureHook, Perterb)
COMMON = {"iteration": 4, "batch_size": 6, "lr": 0.02, "first_bn_multiplier": 10.0, "store_best_images": True, "verifier": False}
SRE2L = {**COMMON, "r_bn": 0.01, "jitter": 4}
DWA = {**COMMON, "r_bn": 0.01, "r_var": 11.0, "jitter": 4, "rho": 0.1, "steps": 3}

POCKET = replace(recipe("tiny", size=20), name="pocket")  # crops of small images
CODE_BASES: dict[str, tuple[str | None, dict[str, Any]]] = {  # recipe, fields
    "DWA, CIFAR": (None, {**DWA, "dataset": "cifar10"}),
    "DWA, crops": ("pocket", DWA),
    "SRe2L, CIFAR": (None, SRE2L),
    "SRe2L, crops and priors": ("pocket", {**SRE2L, "tv_l2": 1e-3, "l2_scale": 1e-2}),
    "CDA": ("pocket", {**SRE2L, "easy2hard_mode": "cosine", "milestone": 1.0}),
}
CLASSES = 10


class Case:
    """A code base with its teacher, start images and namespace."""

    def __init__(self, name: str, folder: Path) -> None:
        self.recipe, fields = CODE_BASES[name]
        self.size = 20 if self.recipe else 32
        self.folder, self.teacher = folder, colour_teacher(CLASSES, self.size)
        self.start = None
        if "rho" in fields:
            torch.manual_seed(7)
            self.start = torch.randn(CLASSES, 3, self.size, self.size)
            torch.save(self.start, folder / "tensor_2.pt")
            fields = {**fields, "init_path": str(folder)}
        self.fields = fields

    def args(self, output: str) -> Namespace:
        return Namespace(**self.fields, syn_data_path=str(self.folder / output))

    def asked(self) -> Recovery:
        return read_namespace(self.args("x"), self.teacher, recipe=self.recipe, backend="auto", precision="fp32", device="cpu")

    def loop(self, output: str, dtype: torch.dtype, parts: Parts, *, tidy: bool) -> Run:
        draws = Draws(self.asked().config, self.asked().normalisation, self.size, self.start)
        network = copy.deepcopy(self.teacher).to(dtype)
        return recover(self.args(output), network, 2, CLASSES, draws, parts, tidy=tidy, dtype=dtype)

    def ours(self, output: str, precision: Any) -> tuple[Tensor, Tensor]:
        """Losses as the loop counts them, and images as they are on disk."""
        teacher = nn.DataParallel(copy.deepcopy(self.teacher))  # which takes it to a GPU where there is one
        losses = get_images(self.args(output), teacher, None, 2, recipe=self.recipe, precision=precision, device="cpu")
        total = losses[..., 1] + self.asked().r_var * losses[..., 2]
        return torch.stack([losses[..., 0], total], -1), on_disk(self.folder / output)


@pytest.fixture(autouse=True)
def pocket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "pocket", POCKET)


@pytest.fixture(params=CODE_BASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path)


def on_disk(folder: Path) -> Tensor:
    """The images of index 2, [classes, S, S, 3]; nothing else may be there."""
    names = [f"new{label:03d}/class{label:03d}_id002.jpg" for label in range(CLASSES)]
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == names
    return torch.stack([torch.from_numpy(np.array(Image.open(folder / name))).float() for name in names])


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hooks_and_ascent_swapped(case: Case, dtype: torch.dtype) -> None:
    """In the loop as published: errors against float64 at most twice those of the plain loop, or what Adam makes of a few roundings."""
    plain, swapped = (case.loop(name, dtype, parts, tidy=False) for name, parts in (("plain", Parts()), ("swapped", SWAPPED)))
    exact = plain if dtype == torch.float64 else case.loop("exact", torch.float64, Parts(), tidy=False)
    rounding = 1e-9 if dtype == torch.float64 else 1e-5
    assert error(swapped.losses, exact.losses) <= max(2 * error(plain.losses, exact.losses), rounding)
    assert error(swapped.images, exact.images) <= max(2 * error(plain.images, exact.images), rounding)


def test_the_whole_loop_swapped_in_double_precision(case: Case) -> None:
    plain = case.loop("plain", torch.float64, Parts(), tidy=True)
    losses, images = case.ours("ours", "fp64")
    assert error(losses, plain.losses) < 1e-6  # they are returned in float32
    assert (images - on_disk(case.folder / "plain")).abs().mean() < 0.05  # levels, where truncation went the other way


def test_the_whole_loop_swapped_in_single_precision(case: Case) -> None:
    exact, plain = (case.loop(str(dtype), dtype, Parts(), tidy=True) for dtype in (torch.float64, torch.float32))
    losses, images = case.ours("ours", "fp32")
    assert error(losses, exact.losses) <= max(2 * error(plain.losses, exact.losses), 1e-5)
    wanted, other = (on_disk(case.folder / str(dtype)) for dtype in (torch.float64, torch.float32))
    assert (images - wanted).abs().mean() <= max(2 * (other - wanted).abs().mean(), 0.05)


def test_as_published_is_not_tidy(tmp_path: Path) -> None:
    """What the loop does beside the paper makes a difference, so that the equalities above mean something."""
    case = Case("DWA, CIFAR", tmp_path)
    published, tidy = (case.loop("x", torch.float64, Parts(), tidy=tidy) for tidy in (False, True))
    assert error(published.losses, tidy.losses) > 1e-4


def test_the_configuration_is_what_the_namespace_says(tmp_path: Path) -> None:
    found = Case("DWA, CIFAR", tmp_path).asked().config
    expected = SynthesisConfig(
        iterations=4,
        batch_size=6,
        learning_rate=0.02,
        lambda_var=0.11,
        rho=0.1,
        steps=3,
        milestone=0.0,
        precision="fp32",
        device="cpu",
    )
    assert found == expected

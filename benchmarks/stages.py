"""What surrounds the iterations: the ascent by itself, and whole batches from image files to image files."""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import machine
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dwa_fast import distill
from dwa_fast.data.folders import image_folder
from dwa_fast.data.pixels import denormalise, normalise
from dwa_fast.engine.ascent import Ascent
from dwa_fast.engine.teacher import prepare
from dwa_fast.reference.loop import apply_view
from dwa_fast.seeding import generator


def ascents(problem: harness.Problem, peers: dict[str, harness.Peer], rounds: int) -> dict[str, list[float]]:
    """Seconds of all K steps of the ascent, for every peer that has one of its own, taken in turns.

    Those that capture their steps, and all on a GPU, do it once for nothing before.
    """
    steps: dict[str, Callable[[], None]] = {}
    for key, peer in peers.items():
        if isinstance(peer, harness.Published):
            steps[key] = lambda peer=peer: published_ascent(peer)  # type: ignore[misc]
        elif peer.execution.backend != "compiled":  # its ascent is the eager one
            steps[key] = _our_ascent(problem, peer)
    harness.warm_up({key: step for key, step in steps.items() if problem.device.type == "cuda" or key.startswith("fused/")})
    return harness.in_turns({key: functools.partial(machine.timed, step, problem.device) for key, step in steps.items()}, rounds)


def published_ascent(peer: harness.Published) -> None:
    """K steps as released: eager, one norm over all weights, the hooks at work; then the weights as they were."""
    problem = peer.problem
    config, parameters = problem.config, list(peer.model.parameters())
    before = [p.detach().clone() for p in parameters]
    seen = apply_view(problem.images.to(peer.dtype), problem.schedule, 0)
    for _ in range(config.steps):
        peer.model.zero_grad()
        F.cross_entropy(peer.model(seen), problem.labels).backward()
        with torch.no_grad():
            reached = [p for p in parameters if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in reached if p.grad is not None]).norm()
            for p in reached:
                p.add_(p.grad * (config.rho / config.steps / (norm + 1e-12)))
    with torch.no_grad():
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
    peer.model.zero_grad()


def _our_ascent(problem: harness.Problem, peer: harness.Ours) -> Callable[[], None]:
    network, _ = prepare(problem.teacher, problem.images, peer.execution)
    ascent = Ascent(network, problem.config, peer.execution)
    images = problem.images.to(peer.execution.dtype, memory_format=peer.execution.memory_format)

    def step() -> None:
        with peer.execution.arithmetic():
            ascent.adjust(images, problem.labels, generator(harness.SEED, "ascent", 0))

    return step


class FirstClasses(nn.Module):
    """A classifier of fewer classes, so that one batch holds all of them."""

    def __init__(self, teacher: nn.Module, classes: int) -> None:
        super().__init__()
        self.teacher, self.classes = teacher, classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the first classes."""
        logits: Tensor = self.teacher(images)[:, : self.classes]
        return logits


def whole_batches(problem: harness.Problem, precision: str, iterations: int) -> dict[str, Any]:
    """Seconds of a whole batch by wall clock, from image files to image files, as `distill` does it and as the published loop does.

    Ours is the second of two batches, so that what happens once for a whole set (`setup_seconds`) is not in it.
    """
    count = len(problem.images)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        _write_images(root / "real", problem, per_class=2)
        data = image_folder(root / "real", problem.workload.size, problem.recipe.data.channels)
        config = replace(problem.config, iterations=iterations, batch_size=count, backend="fused", precision=precision)  # type: ignore[arg-type]
        moments: dict[int, float] = {}

        def note(done: int, total: int) -> None:
            moments.setdefault(done, time.perf_counter())

        start = time.perf_counter()
        recipe = replace(problem.recipe, synthesis=config)
        distill(FirstClasses(problem.teacher, count).eval(), data, recipe, ipc=2, output=root / "ours", progress=note)
        end = time.perf_counter()
        both = end - moments[0]
        second = end - moments[iterations]
        peer = harness.Published(problem)
        start_published = time.perf_counter()
        images = normalise(data.load(list(range(0, 2 * count, 2))), problem.recipe.data).to(problem.device)
        peer.problem = replace(problem, images=images)
        published_ascent(peer)
        peer.reset()
        peer.advance(iterations)
        pixels = denormalise(peer.images.detach(), problem.recipe.data)
        _save(pixels, root / "published", 0)
        published = time.perf_counter() - start_published
    return {
        "precision": precision,
        "iterations": iterations,
        "seconds": second,
        "setup_seconds": moments[0] - start + max(0.0, both - 2 * second),  # the first batch also captures its steps
        "published_seconds": published,
    }


def whole_sets(
    problem: harness.Problem, iterations: int, batch: dict[str, Any], best: dict[str, Any], published: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Hours that the recipe's whole set takes, extrapolated from one iteration and from what surrounds the iterations of a batch."""

    def hours(row: dict[str, Any], whole: float, once: float, batches: int) -> float:
        iteration = row["milliseconds"] / 1e3
        around = max(0.0, whole - batch["iterations"] * iteration)
        return (once + batches * (around + iterations * iteration)) / 3600

    sets = []
    for ipc in (10, 50):
        batches = ipc * math.ceil(problem.workload.classes / len(problem.images))
        sets.append(
            {
                "ipc": ipc,
                "batches": batches,
                "iterations": iterations,
                "precision": best["precision"],
                "hours": hours(best, batch["seconds"], batch["setup_seconds"], batches),
                "published_hours": hours(published, batch["published_seconds"], 0.0, batches) if published else None,
            }
        )
    return sets


def _write_images(folder: Path, problem: harness.Problem, per_class: int) -> None:
    pixels = denormalise(problem.images, problem.recipe.data)
    for index in range(per_class):
        _save(pixels, folder, index)


def _save(
    pixels: Tensor,  # [B, C, H, W] in [0, 1]
    folder: Path,
    index: int,
) -> None:
    for label, image in enumerate((pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()):
        (folder / f"{label:05d}").mkdir(parents=True, exist_ok=True)
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(folder / f"{label:05d}" / f"{index:03d}.png")

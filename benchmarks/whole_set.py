"""What a whole set costs beside its bare loop: image files are read and decoded, results compressed, written and checked.

python benchmarks/whole_set.py --workload cifar100-convnet128 --json benchmark-output/whole_set.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import harness
import machine
import torch
from PIL import Image
from torch import Tensor, nn

from dwa_fast import distill
from dwa_fast.config import InitialConfig
from dwa_fast.data.folders import image_folder
from dwa_fast.data.images import FileSet, ImageSet
from dwa_fast.data.initial import initial_images
from dwa_fast.data.pixels import denormalise, to_levels
from dwa_fast.engine.backend import resolve_device
from dwa_fast.engine.synthesis import Batch, Synthesizer
from dwa_fast.recipes import Recipe
from dwa_fast.sets.distill import batch_specs


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where the files do not hold what the bare loop computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(harness.WORKLOADS), default="cifar100-convnet128")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--precision", default="auto", help="fp32, bf16, …; auto: what the device is best at")
    parser.add_argument("--classes", type=int, default=20, help="of the set")
    parser.add_argument("--ipc", type=int, default=4, help="images per class")
    parser.add_argument("--batch-size", type=int, default=20, help="images of a batch")
    parser.add_argument("--iterations", type=int, default=100, help="of each batch; a published set takes ten times as many and more")
    parser.add_argument("--in-flight", type=int, default=1, help="batches at once, on a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each way, taken in turns")
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    workload = replace(harness.WORKLOADS[options.workload], classes=options.classes)
    problem = harness.make_problem(workload, device, options.batch_size, options.iterations)
    config = replace(problem.config, backend="fused", precision=options.precision, concurrent_batches=options.in_flight)
    recipe = replace(problem.recipe, synthesis=config)
    with tempfile.TemporaryDirectory() as name:
        data = image_files(Path(name) / "data", workload, recipe, options.ipc)
        batches = in_memory(data, recipe, options.ipc)
        refined = bare(problem.teacher, batches, recipe)
        distill(problem.teacher, data, recipe, ipc=options.ipc, output=Path(name) / "set", seed=harness.SEED)
        same = holds(Path(name) / "set", refined, recipe, options.classes, options.ipc)
        jobs = {
            "bare loop": lambda: machine.timed(lambda: bare(problem.teacher, batches, recipe), device),
            "whole set": lambda: machine.timed(lambda: whole(problem.teacher, data, recipe, options.ipc, Path(name)), device),
        }
        samples = harness.in_turns(jobs, options.rounds)
    shares = [loop / set_ for loop, set_ in zip(samples["bare loop"], samples["whole set"], strict=True)]
    share, low, high = harness.quantiles(shares)
    images = options.ipc * options.classes
    for way, taken in samples.items():
        print(f"{way}: {harness.quantiles(taken)[0]:.2f} s for {images} images of {options.iterations} iterations")
    print(f"throughput of the whole set against the bare loop: {100 * share:.1f} % ({100 * low:.1f} … {100 * high:.1f})")
    print("the files hold what the bare loop computed" if same else "the files hold something else than the bare loop computed")
    if options.json:
        content = {**machine.facts(device, sys.argv), "samples": samples, "shares": shares, "share": share, "same images": same}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0 if same else 1


def image_files(folder: Path, workload: harness.Workload, recipe: Recipe, ipc: int) -> FileSet:
    """JPEG files twice as large as the images of the set, as many as it starts from."""
    source = torch.Generator().manual_seed(harness.SEED)
    for label in range(workload.classes):
        for index in range(ipc):
            coarse = torch.rand(1, recipe.data.channels, 8, 8, generator=source)
            pixels = torch.nn.functional.interpolate(coarse, size=(2 * workload.size,) * 2, mode="bilinear")[0]
            path = folder / f"{label:04d}" / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            levels = (pixels * 255).to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(levels if recipe.data.channels == 3 else levels[:, :, 0]).save(path, quality=95)
    return image_folder(folder, workload.size, recipe.data.channels)


def in_memory(data: ImageSet, recipe: Recipe, ipc: int) -> list[Batch]:
    """The batches of the set with their initial images."""
    start = initial_images(data, recipe, InitialConfig(), ipc=ipc, seed=harness.SEED)
    specs = batch_specs(len(data.class_names), ipc, recipe.synthesis.batch_size)
    return [Batch(spec.number, start.load(spec.labels, spec.index), torch.tensor(spec.labels)) for spec in specs]


def bare(teacher: nn.Module, batches: Sequence[Batch], recipe: Recipe) -> list[Tensor]:
    """The engine alone: a teacher made ready, and every batch refined; nothing is read or written."""
    run = Synthesizer(teacher, batches[0].images, recipe.synthesis, recipe.data)
    refined, count = [], recipe.synthesis.concurrent_batches
    for first in range(0, len(batches), count):
        group = batches[first : first + count]
        refined += [images for images, _ in run.run(group, seed=harness.SEED)]
    return refined


def whole(teacher: nn.Module, data: ImageSet, recipe: Recipe, ipc: int, folder: Path) -> None:
    """What the command does, from a teacher in memory to a complete folder."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        distill(teacher, data, recipe, ipc=ipc, output=Path(name), seed=harness.SEED)


def holds(folder: Path, refined: Sequence[Tensor], recipe: Recipe, classes: int, ipc: int) -> bool:
    """Whether the files hold these images, pixel for pixel."""
    written = image_folder(folder, refined[0].shape[-1], recipe.data.channels)
    images = torch.cat([denormalise(each, recipe.data) for each in refined])
    order = [spec.index + ipc * label for spec in batch_specs(classes, ipc, recipe.synthesis.batch_size) for label in spec.labels]
    return bool((to_levels(images) == written.load(order)).all())


if __name__ == "__main__":
    sys.exit(main())

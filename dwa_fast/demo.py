"""The whole method on scikit-learn's digits: teacher, distilled sets, students, a table and a picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwa_fast import pictures
from dwa_fast._version import __version__
from dwa_fast.backend import resolve
from dwa_fast.checkpoint import TeacherInfo, load_teacher, save_teacher
from dwa_fast.config import StorageConfig, check_integer
from dwa_fast.datasets import ImageSet, image_folder, load, normalise
from dwa_fast.distill import distill
from dwa_fast.diversity import class_diversity
from dwa_fast.errors import InputError
from dwa_fast.files import checksum, output_folder, write_json
from dwa_fast.initial import sample
from dwa_fast.recipes import full_recipe
from dwa_fast.squeeze import squeeze
from dwa_fast.storage import ImageStore, WorkItem, to_levels
from dwa_fast.training import top1
from dwa_fast.validate import validate

METHODS = {"real": "random real images", "sre2l": "SRe2L", "real-start": "real start", "random-step": "random step", "dwa": "DWA"}

Track = Callable[[str], Callable[[int, int], None]]  # starts a progress bar of that title; what it gives moves the bar


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo does."""

    ipc: tuple[int, ...] = (1, 5)  # Images per class of the sets that are made.
    methods: tuple[str, ...] = tuple(METHODS)  # Sets: real (plain real images), sre2l, real-start, random-step, dwa.
    students: int = 5  # Students trained on each set, each from a seed of its own.
    iterations: int | None = None  # Adam steps per batch; None: what the digits recipe says.
    epochs: int | None = None  # Epochs of each student; None: what the digits recipe says.
    seed: int = 0  # All random draws derive from it.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …

    def __post_init__(self) -> None:
        for ipc in self.ipc:
            check_integer("ipc", ipc, 1)
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise InputError(f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")
        if not self.ipc or not self.methods:
            raise InputError("the demo needs at least one ipc and one method")
        check_integer("students", self.students, 1)
        check_integer("seed", self.seed, 0)


def run_demo(output: Path, config: DemoConfig, track: Track) -> dict[str, Any]:
    """Run the pipeline into a folder: teacher.pt, one set per method and ipc, contact-sheet.png, report.json.

    What an earlier run with the same settings left is used again. The report is returned and written.
    """
    output_folder(output)
    recipe = full_recipe("digits")
    device = resolve("auto", "auto", config.device).device
    train, test = (load(recipe.data, None, split, channels=1) for split in ("train", "test"))
    started = time.perf_counter()
    teacher, accuracy = _teacher(output / "teacher.pt", train, test, device, config.seed, track)
    teacher_seconds = time.perf_counter() - started
    rows = [_row(output, method, ipc, teacher, train, test, device, config, track) for ipc in config.ipc for method in config.methods]
    content = {
        "dwa_fast": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "config": asdict(config),
        "teacher": {"architecture": recipe.architecture, "accuracy": accuracy, "test_images": len(test.labels), "seconds": teacher_seconds},
        "sets": rows,
    }
    write_json(output / "report.json", content)
    _contact_sheet(output, config, train)
    return content


def set_folder(method: str, ipc: int) -> str:
    """Name of the folder of one set."""
    return f"{method}-ipc{ipc}"


def _teacher(path: Path, train: ImageSet, test: ImageSet, device: torch.device, seed: int, track: Track) -> tuple[nn.Module, float]:
    recipe = full_recipe("digits")
    if not path.exists():
        module = squeeze(
            train, recipe.architecture, recipe.squeeze, size=recipe.data.size, device=device, seed=seed, progress=track("teacher")
        )
        accuracy = top1(module, test, recipe.squeeze, device)
        info = TeacherInfo(architecture=recipe.architecture, classes=10, channels=1, size=recipe.data.size, accuracy=accuracy)
        save_teacher(path, module, info)
    module, info = load_teacher(path)
    module = module.to(device)
    return module, info.accuracy if info.accuracy is not None else top1(module, test, recipe.squeeze, device)


def _row(
    output: Path,
    method: str,
    ipc: int,
    teacher: nn.Module,
    train: ImageSet,
    test: ImageSet,
    device: torch.device,
    config: DemoConfig,
    track: Track,
) -> dict[str, Any]:
    """Make one set, measure it with students, and describe it."""
    recipe = full_recipe("digits")
    folder, title = output / set_folder(method, ipc), f"{METHODS[method]}, ipc {ipc}"
    started = time.perf_counter()
    if method == "real":
        _copy_real(folder, train, ipc, config.seed)
    else:
        synthesis = replace(full_recipe("digits", method=method).synthesis, device=config.device)
        if config.iterations is not None:
            synthesis = replace(synthesis, iterations=config.iterations)
        origin = {"recipe": "digits", "method": method, "teacher": checksum(output / "teacher.pt")}
        distill(teacher, train, synthesis, ipc=ipc, output=folder, seed=config.seed, origin=origin, progress=track(title))
    synthesis_seconds = time.perf_counter() - started
    validation = replace(recipe.validation, students=config.students, epochs=config.epochs or recipe.validation.epochs)
    distilled = image_folder(folder, recipe.data.size, 1, per_class=ipc)
    started = time.perf_counter()
    result = validate(
        distilled,
        test,
        teacher,
        recipe.architecture,
        validation,
        size=recipe.data.size,
        device=device,
        seed=config.seed,
        progress=track(f"students of {title}"),
    )
    images = normalise(distilled.load(range(len(distilled.labels))), validation).to(device)
    diversity = class_diversity(teacher, images, distilled.labels.to(device)) if ipc > 1 else {}
    return {
        "method": method,
        "title": METHODS[method],
        "ipc": ipc,
        "accuracy_mean": result.mean,
        "accuracy_std": result.std,
        "accuracies": result.accuracies,
        "seeds": result.seeds,
        "diversity": statistics.fmean(diversity.values()) if diversity else None,
        "diversity_per_class": list(diversity.values()),
        "seconds": synthesis_seconds,
        "student_seconds": time.perf_counter() - started,
        "folder": folder.name,
    }


def _copy_real(folder: Path, train: ImageSet, ipc: int, seed: int) -> None:
    """The plain baseline: the very images that the other sets start from."""
    classes = list(range(len(train.class_names)))
    settings = {"recipe": "digits", "method": "real", "seed": seed}
    store = ImageStore(folder, settings, train.class_names, StorageConfig(losses_every=0))
    members = [sample(train, label, ipc, seed=seed) for label in classes]
    items = [WorkItem(index, index, classes) for index in range(ipc)]
    for item in items:
        store.write(item, to_levels(train.load([chosen[item.index] for chosen in members])))
    store.finish(items)


def _contact_sheet(output: Path, config: DemoConfig, train: ImageSet) -> None:
    ipc = max(config.ipc)
    size = full_recipe("digits").data.size
    sets = {METHODS[method]: image_folder(output / set_folder(method, ipc), size, 1, per_class=ipc) for method in _shown(config.methods)}
    panels = {f"{title}, ipc {ipc}": images.load(range(len(images.labels))) for title, images in sets.items()}
    pictures.contact_sheet(output / "contact-sheet.png", panels, train.class_names)


def _shown(methods: Sequence[str]) -> list[str]:
    """Real, SRe2L and DWA where they were made, else everything that was."""
    return [method for method in ("real", "sre2l", "dwa") if method in methods] or list(methods)


def table(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows of the report, as text."""
    rows: list[tuple[str, ...]] = [("set", "ipc", "top-1 %", "± std", "diversity D^c", "synthesis s")]
    for row in content["sets"]:
        diversity = "–" if row["diversity"] is None else f"{row['diversity']:.0f}"
        rows.append(
            (row["title"], str(row["ipc"]), f"{row['accuracy_mean']:.1f}", f"{row['accuracy_std']:.1f}", diversity, f"{row['seconds']:.1f}")
        )
    return rows

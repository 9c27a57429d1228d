"""Sets and cells: what an experiment computes once and keeps, under names that depend on everything that the result depends on."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwa_fast.config import DataConfig, InitialConfig, Progress, StorageConfig, SynthesisConfig, ValidationConfig
from dwa_fast.data.datasets import ImageSet, denormalise, image_folder, load, to_levels
from dwa_fast.data.distilled import open_distilled
from dwa_fast.data.initial import initial_images
from dwa_fast.data.manifest import read_manifest
from dwa_fast.data.pairing import KnownClasses
from dwa_fast.data.set_layout import is_set
from dwa_fast.engine.backend import resolve, resolve_device
from dwa_fast.io.files import checksum, output_folder, write_json
from dwa_fast.models.architectures import build
from dwa_fast.models.checkpoint import load_teacher
from dwa_fast.recipes import METHODS, full_recipe
from dwa_fast.sets.distill import distill, work_list
from dwa_fast.sets.store import ImageStore
from dwa_fast.threads import torch_threads
from dwa_fast.training.validate import validate

REAL = "real"
_COMPUTING = {"backend", "concurrent_batches", "device", "precision"}  # how a set is computed, not what it is
_NOT_OF_A_STUDENT = ("students", "memory_limit")  # settings of the validation on which no student's accuracy depends
_REAL_BATCH = 100  # classes whose real images are copied at a time
_SLUG_LENGTH = 80


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all cells of a study share: plain values, which other processes can be given."""

    output: Path  # holds sets and cells, of any number of studies
    recipe: str  # its name
    data: DataConfig
    folder: Path | None  # of the real images
    train_checksum: str  # of the real images that sets are made from, as image_digest
    test_checksum: str  # of the held-out ones
    teacher: Path
    teacher_checksum: str  # as checkpoint.teacher_checksum
    architecture: str  # of the teacher
    weights_key: str | None = None  # which weights of the checkpoint, as load_teacher
    outputs: tuple[int, ...] | None = None  # of the teacher, that are the classes; None: all, in their order
    teacher_classes: int | None = None  # its outputs in all; None: as many as there are classes
    synthesis: SynthesisConfig  # DWA's settings, from which those of every set are derived; its device is that of the students too
    validation: ValidationConfig
    initial: InitialConfig = field(default_factory=InitialConfig)
    threads: int = 1  # CPU threads that a set or a cell is computed with, on which the last bits depend where the device is a CPU


@dataclass(frozen=True)
class Made:
    """A set that the experiment makes itself."""

    synthesis: SynthesisConfig | None  # None: plain real images, the very ones that the other sets start from
    seed: int


@dataclass(frozen=True)
class Found:
    """A set that was made elsewhere: class folders of images."""

    folder: Path
    seed: int  # of its students


@dataclass(frozen=True)
class Cell:
    """Students of one architecture on the first `ipc` images per class of one set."""

    source: Made | Found
    ipc: int
    student: str


class _Material:
    """What sets and students are made with, read when it is first asked for."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    @functools.cached_property
    def train(self) -> ImageSet:
        return load(self._setup.data, self._setup.folder, "train", channels=self._setup.synthesis.channels)

    @functools.cached_property
    def test(self) -> ImageSet:
        return load(self._setup.data, self._setup.folder, "test", channels=self._setup.synthesis.channels)

    @functools.cached_property
    def teacher(self) -> nn.Module:
        setup = self._setup
        module, _ = load_teacher(
            setup.teacher,
            architecture=setup.architecture,
            classes=setup.teacher_classes or len(self.test.class_names),
            channels=setup.synthesis.channels,
            size=setup.data.size,
            weights_key=setup.weights_key,
        )
        return module if setup.outputs is None else KnownClasses(module, setup.outputs).eval()


@functools.lru_cache(maxsize=1)
def material(setup: Setup) -> _Material:
    """Real images and teacher, read once in each process."""
    return _Material(setup)


def nearest_method(recipe: str, synthesis: SynthesisConfig) -> tuple[str, dict[str, Any]]:
    """The method of the recipe that these settings are nearest to, and the settings in which they differ from it."""
    own = _meaning(synthesis)

    def changes(method: str) -> dict[str, Any]:
        published = _meaning(full_recipe(recipe, method=method).synthesis)
        return {name: value for name, value in own.items() if value != published[name]}

    name = min(METHODS, key=lambda method: len(changes(method)))
    return name, changes(name)


def set_folder(setup: Setup, source: Made | Found) -> Path:
    """Where a set lies: one that is made here under its method, its other settings, its seed, and a checksum of all that it depends on."""
    if isinstance(source, Found):
        return source.folder
    return setup.output / "sets" / f"{_slug(setup, source)}-{_digest(_set_settings(setup, source))}"


def set_is_there(setup: Setup, source: Made | Found, ipc: int) -> bool:
    """Whether a set is complete up to that many images per class, as far as its manifest says."""
    if isinstance(source, Found):
        return True
    folder = set_folder(setup, source)
    if not is_set(folder):
        return False
    manifest = read_manifest(folder)
    return bool(manifest["complete"]) and len(manifest["images"]) >= ipc * len(manifest["class_names"])


def make_set(setup: Setup, source: Made, ipc: int, progress: Progress | None = None) -> None:
    """Make a set of `ipc` images per class, or go on with it; a larger set begins with the images of a smaller one.

    Raises:
        InputError: as `distill`.
    """
    folder = output_folder(set_folder(setup, source))
    stock = material(setup)
    if source.synthesis is None:
        _copy_real(setup, source, ipc, folder)
        return
    initial = setup.initial if source.synthesis.sees_images else None
    provenance = {"recipe": setup.recipe, "method": nearest_method(setup.recipe, source.synthesis)[0], "teacher": setup.teacher_checksum}
    provenance |= _outputs(setup)
    distill(
        stock.teacher,
        stock.train,
        source.synthesis,
        ipc=ipc,
        output=folder,
        initial=initial,
        seed=source.seed,
        provenance=provenance,
        threads=setup.threads,
        progress=progress,
        try_teacher=False,  # it was tried before all sets
    )


def _copy_real(setup: Setup, source: Made, ipc: int, folder: Path) -> None:
    data, config = material(setup).train, replace(setup.synthesis, initial="real")
    start = initial_images(data, config, setup.initial, ipc=ipc, seed=source.seed)
    settings = {"recipe": setup.recipe, "method": REAL, "seed": source.seed, "image_shape": list(data.image_shape), **start.settings}
    items = work_list(len(data.class_names), ipc, _REAL_BATCH)
    store = ImageStore(folder, settings, data.class_names, StorageConfig(losses_every=0))
    start.skipped.update(store.skipped)
    missing = store.unfinished(items)
    if missing:
        store.begin()
    for item in missing:
        store.write(item, to_levels(denormalise(start.load(item.labels, item.index), config)), skipped=dict(start.skipped))
    store.finish(items)


def cell_folder(setup: Setup, cell: Cell) -> Path:
    """Where the result of a cell lies, and the state of its students while it is computed. The number of students changes nothing here."""
    slug = "found" if isinstance(cell.source, Found) else _slug(setup, cell.source)
    return setup.output / "cells" / f"{slug}-ipc{cell.ipc}-{cell.student}-{_digest(_cell_settings(setup, cell))}"


def measure(setup: Setup, cell: Cell, progress: Progress | None = None) -> None:
    """Train the students of a cell, whose set is there, and keep their top-1.

    Raises:
        InputError: the set has other classes than the held-out images, or too few images.
    """
    stock, channels = material(setup), setup.synthesis.channels
    folder, names = set_folder(setup, cell.source), stock.test.class_names
    distilled, _ = open_distilled(folder, setup.data.size, channels, names, per_class=cell.ipc)
    device = resolve_device(setup.synthesis.device)
    started = time.perf_counter()
    with torch_threads(setup.threads if device.type == "cpu" else None):
        result = validate(
            distilled,
            stock.test,
            stock.teacher,
            cell.student,
            setup.validation,
            size=setup.data.size,
            device=device,
            seed=cell.source.seed,
            progress=progress,
            resume_dir=cell_folder(setup, cell),
        )
    content = {"settings": _cell_settings(setup, cell), "accuracies": result.accuracies, "seeds": result.seeds}
    write_json(_result_file(setup, cell), {**content, "seconds": time.perf_counter() - started})


def accuracies(setup: Setup, cell: Cell) -> list[float] | None:
    """Top-1 of as many students as the set-up asks for, percent; None where fewer have been measured."""
    file = _result_file(setup, cell)
    try:
        found = json.loads(file.read_bytes())["accuracies"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(found, list) or not all(isinstance(each, float) and 0 <= each <= 100 for each in found):
        return None
    whole = len(found) >= setup.validation.students
    return found[: setup.validation.students] if whole else None


def _result_file(setup: Setup, cell: Cell) -> Path:
    return cell_folder(setup, cell) / "result.json"


def _set_settings(setup: Setup, source: Made) -> dict[str, Any]:
    """All that a set depends on."""
    base = {"recipe": setup.recipe, "images": setup.train_checksum, "size": setup.data.size, "seed": source.seed}
    if source.synthesis is None:
        return {**base, "method": REAL, "initial": _initial_settings(setup)}
    config = source.synthesis
    with torch.device("meta"):  # no values: only the kinds of its layers count
        layers = build(setup.architecture, classes=2, channels=config.channels, size=setup.data.size)
    computed = resolve(config.backend, config.precision, config.device, layers).describe()
    threads = setup.threads if computed["device"] == "cpu" else None
    initial = _initial_settings(setup) if config.sees_images else {}
    base |= {**computed, "teacher": setup.teacher_checksum, **_outputs(setup)}
    return {**base, "threads": threads, "initial": initial, "synthesis": _meaning(config)}


def _cell_settings(setup: Setup, cell: Cell) -> dict[str, Any]:
    """All that the accuracy of a student depends on."""
    device = resolve_device(setup.synthesis.device).type
    trained = {name: value for name, value in asdict(setup.validation).items() if name not in _NOT_OF_A_STUDENT}
    return {
        "set": _contents(cell.source.folder, cell.ipc) if isinstance(cell.source, Found) else _set_settings(setup, cell.source),
        "ipc": cell.ipc,
        "student": cell.student,
        "seed": cell.source.seed,
        "teacher": setup.teacher_checksum,
        **_outputs(setup),
        "held_out": setup.test_checksum,
        "recipe": setup.recipe,
        "size": setup.data.size,
        "device": device,
        "threads": setup.threads if device == "cpu" else None,
        "validation": trained,
    }


def _outputs(setup: Setup) -> dict[str, Any]:
    """Which outputs of the teacher are used, for settings; nothing where it is all of them, as ever."""
    return {} if setup.outputs is None else {"teacher_outputs": list(setup.outputs)}


@functools.cache
def _contents(folder: Path, ipc: int) -> str:
    """Checksum of the first images of each class of a set that was made elsewhere."""
    found = image_folder(folder, 1, per_class=ipc, by_number=True)
    lines = (f"{name} {checksum(found.folder / name)}" for name in found.files)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _initial_settings(setup: Setup) -> dict[str, Any]:
    tensors = setup.initial.initial_tensors
    return {"order": setup.initial.initial_order, "tensors": checksum(tensors / "tensor_0.pt") if tensors else None}


def _meaning(synthesis: SynthesisConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(synthesis).items() if name not in _COMPUTING}


def _slug(setup: Setup, source: Made) -> str:
    """Method, differing settings and seed, in characters that every file system takes."""
    name, changes = (REAL, {}) if source.synthesis is None else nearest_method(setup.recipe, source.synthesis)
    text = "-".join([name, *(f"{key}{value}" for key, value in changes.items())])
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', text)[:_SLUG_LENGTH]}-seed{source.seed}"


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]

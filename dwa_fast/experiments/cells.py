"""Content-addressed cache of sets and accuracies: a folder's name hashes every setting that affects the result."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from dwa_fast.config import EXECUTION_SETTINGS, InitialConfig, Progress, StorageConfig, SynthesisConfig
from dwa_fast.data.chosen import PATCH_SETTINGS
from dwa_fast.data.datasets import load
from dwa_fast.data.distilled import open_distilled
from dwa_fast.data.folders import image_folder
from dwa_fast.data.images import ImageSet
from dwa_fast.data.initial import initial_images
from dwa_fast.data.manifest import read_manifest
from dwa_fast.data.pairing import teachers_in_settings
from dwa_fast.data.pixels import denormalise, to_levels
from dwa_fast.data.set_layout import is_set
from dwa_fast.data.tensor_files import tensors_checksum
from dwa_fast.engine.backend import resolve, resolve_device
from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum, output_folder, read_json, write_json
from dwa_fast.models.architectures import build_on_meta
from dwa_fast.models.checkpoint import load_teacher
from dwa_fast.models.wrappers import KnownClasses
from dwa_fast.recipes import METHODS, SEVERAL_TEACHERS, Recipe, recipe
from dwa_fast.sets.distill import batch_specs, distill
from dwa_fast.sets.store import ImageStore, versions
from dwa_fast.threads import torch_threads
from dwa_fast.training.fit import label_precision, resolve_precision
from dwa_fast.training.validate import NO_EFFECT, validate

REAL = "real"
_REAL_BATCH = 100  # classes whose real images are copied at a time
_SLUG_LENGTH = 80


@dataclass(frozen=True, kw_only=True)
class StudyTeacher:
    """A teacher of a study, as plain values that can be pickled."""

    file: Path
    checksum: str  # as checkpoint.teacher_checksum
    architecture: str
    accuracy: float | None = None  # top-1, percent, if its checkpoint says so
    classes: int | None = None  # number of its outputs; None: that of the data
    outputs: tuple[int, ...] | None = None  # those that are the classes of the data; None: all, in their order


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings that all cells of a study share, as plain values that can be pickled."""

    output: Path  # holds the sets and cells of any number of studies
    recipe: Recipe  # with the first teacher's architecture and DWA's synthesis, from which every set's is derived; students use its device
    folder: Path | None  # of the real images
    train_checksum: str  # of the real images that sets are made from, as image_digest
    test_checksum: str  # of the held-out ones
    teachers: tuple[StudyTeacher, ...]  # all give the soft labels; methods of one teacher take the first
    weights_key: str | None = None  # which weights of the checkpoints, as load_teacher
    initial: InitialConfig = field(default_factory=InitialConfig)
    threads: int = 1  # CPU threads of each set or cell; on a CPU the last bits depend on it


@dataclass(frozen=True)
class DistilledSource:
    """A set that the experiment makes."""

    synthesis: SynthesisConfig | None  # None: plain real images, the same that the other sets start from
    seed: int
    all_teachers: bool = False  # refined with all teachers of the study, else with the first


@dataclass(frozen=True)
class ExternalSet:
    """A set that was made elsewhere: class folders of images."""

    folder: Path
    seed: int  # of its students


@dataclass(frozen=True)
class Cell:
    """Students of one architecture on the first `ipc` images per class of one set."""

    source: DistilledSource | ExternalSet
    ipc: int
    student: str


class SharedInputs:
    """Real images and teachers, loaded on first use."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    @functools.cached_property
    def train(self) -> ImageSet:
        return load(self._setup.recipe.data, self._setup.folder, "train")

    @functools.cached_property
    def test(self) -> ImageSet:
        return load(self._setup.recipe.data, self._setup.folder, "test")

    @functools.cached_property
    def teachers(self) -> list[nn.Module]:
        return [self._load(teacher) for teacher in self._setup.teachers]

    def _load(self, teacher: StudyTeacher) -> nn.Module:
        module, _ = load_teacher(
            teacher.file,
            architecture=teacher.architecture,
            classes=teacher.classes or len(self.test.class_names),
            channels=self._setup.recipe.data.channels,
            size=self._setup.recipe.data.size,
            weights_key=self._setup.weights_key,
        )
        return module if teacher.outputs is None else KnownClasses(module, teacher.outputs).eval()


@functools.lru_cache(maxsize=1)
def inputs(setup: Setup) -> SharedInputs:
    """Real images and teachers, loaded once in each process."""
    return SharedInputs(setup)


def nearest_method(setup: Setup, synthesis: SynthesisConfig, all_teachers: bool) -> tuple[str, dict[str, Any]]:
    """The method of the recipe with the fewest settings that differ from these, and those settings.

    Args:
        all_teachers: as in `DistilledSource`; it is one of the methods for several teachers, or one of the others.
    """
    data = setup.recipe.data
    own = {"mean": data.mean, "std": data.std, **asdict(synthesis)}

    def changes(method: str) -> dict[str, Any]:
        made = recipe(setup.recipe.name, method=method, size=data.size)
        published = {"mean": made.data.mean, "std": made.data.std, **asdict(made.synthesis)}
        return {name: value for name, value in own.items() if name not in EXECUTION_SETTINGS and value != published[name]}

    name = min((method for method in METHODS if (method in SEVERAL_TEACHERS) is all_teachers), key=lambda method: len(changes(method)))
    return name, changes(name)


def set_folder(setup: Setup, source: DistilledSource | ExternalSet) -> Path:
    """Folder of a set; for one that is made here, named by method, changed settings, seed and a hash of everything that affects it."""
    if isinstance(source, ExternalSet):
        return source.folder
    return setup.output / "sets" / f"{_slug(setup, source)}-{_digest(_set_settings(setup, source))}"


def set_is_complete(setup: Setup, source: DistilledSource | ExternalSet, ipc: int) -> bool:
    """Whether the manifest of a set lists that many images per class."""
    if isinstance(source, ExternalSet):
        return True
    folder = set_folder(setup, source)
    if not is_set(folder):
        return False
    manifest = read_manifest(folder)
    return bool(manifest["complete"]) and len(manifest["images"]) >= ipc * len(manifest["class_names"])


def make_set(setup: Setup, source: DistilledSource, ipc: int, progress: Progress | None = None) -> None:
    """Make a set of `ipc` images per class, or resume it; the first images of a larger set are those of a smaller one.

    The time that it takes is kept for `seconds_per_image`.

    Raises:
        InputError: as `distill`.
    """
    folder = output_folder(set_folder(setup, source))
    shared = inputs(setup)
    if source.synthesis is None:
        _copy_real(setup, source, ipc, folder)
        return
    initial = setup.initial if source.synthesis.sees_images else InitialConfig(skip_bad_images=setup.initial.skip_bad_images)
    used = len(_teachers_of(setup, source))
    method, _ = nearest_method(setup, source.synthesis, source.all_teachers)
    provenance = {"recipe": setup.recipe.name, "method": method, **_teacher_settings(setup.teachers[:used])}
    teachers, train = shared.teachers[:used], shared.train  # loaded when they are first asked for, which is no part of the time
    started = time.perf_counter()
    made = distill(
        teachers,
        train,
        replace(setup.recipe, synthesis=source.synthesis),
        ipc=ipc,
        output=folder,
        initial=initial,
        seed=source.seed,
        provenance=provenance,
        teacher_info=[{"architecture": each.architecture, "accuracy": each.accuracy} for each in setup.teachers[:used]],
        threads=setup.threads,
        progress=progress,
        try_teacher=False,  # already checked, once for all sets
    )
    if made:
        before = _time(setup, source)
        seconds, images = time.perf_counter() - started + before[0], made + before[1]
        output_folder(_time_file(setup, source).parent)
        write_json(_time_file(setup, source), {"seconds": seconds, "images": images})


def seconds_per_image(setup: Setup, source: DistilledSource | ExternalSet) -> float | None:
    """Mean time of an image of a set, over the calls of `make_set` that completed it; None where none has been measured."""
    if isinstance(source, ExternalSet):
        return None
    seconds, images = _time(setup, source)
    return seconds / images if images else None


def _time(setup: Setup, source: DistilledSource) -> tuple[float, int]:
    """Seconds, and the images that were made in them."""
    try:
        return read_json(_time_file(setup, source), lambda found: (float(found["seconds"]), int(found["images"])))
    except InputError:
        return 0.0, 0


def _time_file(setup: Setup, source: DistilledSource) -> Path:
    return setup.output / "times" / f"{set_folder(setup, source).name}.json"


def _copy_real(setup: Setup, source: DistilledSource, ipc: int, folder: Path) -> None:
    data, normalisation = inputs(setup).train, setup.recipe.data
    real = replace(setup.recipe, synthesis=replace(setup.recipe.synthesis, initial="real"))
    start = initial_images(data, real, setup.initial, ipc=ipc, seed=source.seed)
    settings = {"recipe": setup.recipe.name, "method": REAL, "seed": source.seed, "image_shape": list(data.image_shape), **start.settings}
    items = batch_specs(len(data.class_names), ipc, _REAL_BATCH)
    store = ImageStore(folder, settings, data.class_names, StorageConfig(losses_every=0))
    start.skipped.update(store.skipped)
    missing = store.unfinished(items)
    if missing:
        store.begin()
    for item in missing:
        levels = to_levels(denormalise(start.load(item.images), normalisation))
        store.write(item, levels, skipped=dict(start.skipped))
    store.finish(items)


def cell_folder(setup: Setup, cell: Cell) -> Path:
    """Folder of the result of a cell and of the state of its students during training. It does not depend on the number of students."""
    slug = "found" if isinstance(cell.source, ExternalSet) else _slug(setup, cell.source)
    return setup.output / "cells" / f"{slug}-ipc{cell.ipc}-{cell.student}-{_digest(_cell_settings(setup, cell))}"


def measure(setup: Setup, cell: Cell, progress: Progress | None = None) -> None:
    """Train the students of a cell, whose set is complete, and write their top-1.

    Raises:
        InputError: the set has other classes than the held-out images, or too few images.
    """
    shared, data = inputs(setup), setup.recipe.data
    folder, names = set_folder(setup, cell.source), shared.test.class_names
    distilled, _ = open_distilled(folder, data.size, data.channels, names, per_class=cell.ipc)
    device = resolve_device(setup.recipe.synthesis.device)
    started = time.perf_counter()
    with torch_threads(setup.threads if device.type == "cpu" else None):
        result = validate(
            distilled,
            shared.test,
            shared.teachers,
            cell.student,
            setup.recipe,
            device=device,
            seed=cell.source.seed,
            progress=progress,
            resume_dir=cell_folder(setup, cell),
        )
    content = {"settings": _cell_settings(setup, cell), "versions": versions(), "accuracies": result.accuracies, "seeds": result.seeds}
    write_json(_result_file(setup, cell), {**content, "seconds": time.perf_counter() - started})


def accuracies(setup: Setup, cell: Cell) -> list[float] | None:
    """Top-1 of `validation.students` students, percent; None where fewer have been trained."""
    try:
        found = read_json(_result_file(setup, cell), lambda content: content["accuracies"])
    except InputError:
        return None
    if not isinstance(found, list) or not all(isinstance(each, float) and 0 <= each <= 100 for each in found):
        return None
    whole = len(found) >= setup.recipe.validation.students
    return found[: setup.recipe.validation.students] if whole else None


def other_versions(setup: Setup, cell: Cell) -> str | None:
    """The versions that a finished cell was computed with, where these are not the present ones and it knows them."""
    try:
        found = read_json(_result_file(setup, cell), lambda content: dict(content["versions"]))
    except InputError:
        return None
    now = versions()
    changed = [f"{name} {value}" for name, value in found.items() if now.get(name) != value]
    return ", ".join(changed) or None


def _result_file(setup: Setup, cell: Cell) -> Path:
    return cell_folder(setup, cell) / "result.json"


def _set_settings(setup: Setup, source: DistilledSource) -> dict[str, Any]:
    """Every setting that affects a set."""
    base = {"recipe": setup.recipe.name, "images": setup.train_checksum, "size": setup.recipe.data.size, "seed": source.seed}
    if source.synthesis is None:
        return {**base, "method": REAL, "initial": _initial_settings(setup)}
    config = source.synthesis
    teachers = _teachers_of(setup, source)
    layers = [
        build_on_meta(each.architecture, classes=2, channels=setup.recipe.data.channels, size=setup.recipe.data.size) for each in teachers
    ]
    computed = resolve(config.backend, config.precision, config.device, *layers).describe()
    threads = setup.threads if computed["device"] == "cpu" else None
    initial = _initial_settings(setup, patches=config.initial == "patches") if config.sees_images else {}
    base |= {**computed, **_teacher_settings(teachers)}
    return {**base, "threads": threads, "initial": initial, "synthesis": _result_settings(replace(setup.recipe, synthesis=config))}


def _cell_settings(setup: Setup, cell: Cell) -> dict[str, Any]:
    """Every setting that affects the accuracy of a student."""
    device = resolve_device(setup.recipe.synthesis.device)
    config = setup.recipe.validation
    labels = label_precision(resolve_precision(config.precision, device)) if config.labels == "soft" else {}
    trained = {name: value for name, value in setup.recipe.settings("validation").items() if name not in NO_EFFECT}
    return {
        "set": _contents(cell.source.folder, cell.ipc) if isinstance(cell.source, ExternalSet) else _set_settings(setup, cell.source),
        "ipc": cell.ipc,
        "student": cell.student,
        "seed": cell.source.seed,
        **_teacher_settings(setup.teachers),
        "held_out": setup.test_checksum,
        "recipe": setup.recipe.name,
        "size": setup.recipe.data.size,
        "device": device.type,
        "threads": setup.threads if device.type == "cpu" else None,
        "validation": {**trained, **labels},
    }


def _teachers_of(setup: Setup, source: DistilledSource) -> tuple[StudyTeacher, ...]:
    """The teachers that a set is made with."""
    return setup.teachers if source.all_teachers else setup.teachers[:1]


def _teacher_settings(teachers: Sequence[StudyTeacher]) -> dict[str, Any]:
    return teachers_in_settings([each.checksum for each in teachers], [each.outputs for each in teachers])


@functools.cache
def _contents(folder: Path, ipc: int) -> str:
    """Checksum of the first images of each class of a set that was made elsewhere."""
    found = image_folder(folder, 1, per_class=ipc, by_number=True)
    lines = (f"{name} {checksum(found.folder / name)}" for name in found.files)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


_tensors = functools.cache(tensors_checksum)  # they are many, and the names of all sets have it


def _initial_settings(setup: Setup, patches: bool = False) -> dict[str, Any]:
    tensors = setup.initial.initial_tensors
    settings = {"order": setup.initial.initial_order, "tensors": _tensors(tensors) if tensors else None}
    return settings | ({name: getattr(setup.initial, name) for name in PATCH_SETTINGS} if patches else {})


def _result_settings(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in recipe.settings("synthesis").items() if name not in EXECUTION_SETTINGS}


def _slug(setup: Setup, source: DistilledSource) -> str:
    """Method, differing settings and seed, in characters that every file system takes."""
    name, changes = (REAL, {}) if source.synthesis is None else nearest_method(setup, source.synthesis, source.all_teachers)
    text = "-".join([name, *(f"{key}{value}" for key, value in changes.items())])
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', text)[:_SLUG_LENGTH]}-seed{source.seed}"


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]

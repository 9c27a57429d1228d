"""The paper's first tables on real images, on a GPU, in one command: every cell is a row of accuracy.jsonl as soon as it is measured.

python benchmarks/gpu_accuracy.py --cifar10 DIR --tiny DIR    `make gpu-accuracy CIFAR10=DIR TINY=DIR` builds first, then runs this
python benchmarks/gpu_accuracy.py --dry-run                   such steps on a CPU, with digits, in seconds

CIFAR-10 as class folders below train/ and test/, Tiny-ImageNet or a part of it as it comes; images of 32 pixels. Teachers, sets and
students lie in a folder beside the rows, and what is finished there is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_speed import facts_of
from proof import Rows, Step, add_options, chosen, exit_status, read_rows, run_steps
from rich.console import Console
from rich.table import Table

from dwa_fast.data.datasets import load
from dwa_fast.data.digest import image_digest
from dwa_fast.errors import InputError
from dwa_fast.experiments.cells import Setup, StudyTeacher
from dwa_fast.experiments.grid import run_grid
from dwa_fast.experiments.studies import cross
from dwa_fast.io.files import output_folder
from dwa_fast.models.checkpoint import TeacherInfo, load_teacher, save_teacher, teacher_checksum
from dwa_fast.recipes import Recipe, recipe
from dwa_fast.training.fit import top1
from dwa_fast.training.squeeze import squeeze, training_settings
from dwa_fast.training.state import FinishedTeacher

BUDGET = 520.0  # seconds after the build, which leaves 80 of 600 for that


@dataclass(frozen=True)
class Images:
    """A data set, its teachers and the cells that are measured on it."""

    name: str
    recipe: Mapping[str, Any]  # arguments of recipe()
    teachers: Mapping[str, Mapping[str, Any]]  # settings of squeeze, by name
    methods: tuple[str, ...]
    students: tuple[str, ...]
    ipc: tuple[int, ...]  # in the order of their worth
    seeds: Mapping[int, int]  # sets of each method, by ipc
    first_ipc_alone: tuple[str, ...] = ()  # teachers from which no cells of another ipc are made


@dataclass(frozen=True)
class Plan:
    """What is measured, where, and for how long."""

    device: str
    images: tuple[Images, ...]
    folders: Mapping[str, Path] = field(default_factory=dict)  # of the real images, by name
    patience: float = 1.0  # factor of the steps' limits


_STUDENTS = {"students": 1}  # one for each set: sets are what is compared
_METHODS = ("real", "dwa", "sre2l", "real-start", "random-step", "cda", "rded")
FULL = (
    Images(
        name="cifar10",
        recipe={"name": "cifar10", "preset": "rd3", "fast": True, "validation": _STUDENTS},
        teachers={"short": {"schedule": "fast", "epochs": 4}, "long": {"schedule": "fast", "epochs": 40}},
        methods=_METHODS,
        students=("resnet18-cifar",),
        ipc=(10, 1, 50),
        seeds={10: 3, 1: 3, 50: 1},
        first_ipc_alone=("long",),
    ),
    Images(
        name="tiny",
        recipe={"name": "tiny", "size": 32, "fast": True, "validation": _STUDENTS},
        teachers={"short": {"schedule": "fast", "epochs": 4, "augmentation": "pad-crop"}},
        methods=("real", "dwa", "real-start", "random-step"),
        students=("convnet128", "small-resnet", "mobilenet-v2-cifar"),
        ipc=(10,),
        seeds={10: 3},
    ),
)
TINY = (
    Images(
        name="digits",
        recipe={"name": "digits", "iterations": 2, "validation": {**_STUDENTS, "epochs": 1}},
        teachers={"short": {"epochs": 1}},
        methods=("real", "dwa"),
        students=("small-resnet",),
        ipc=(1,),
        seeds={1: 2},
    ),
)


def steps(plan: Plan, output: Path) -> list[Step]:
    """One data set after the other; of each, what is worth most comes first."""
    found = [Step("facts", functools.partial(facts_of, torch.device(plan.device)), 15)]
    for images in plan.images:
        for teacher in images.teachers:
            place = plan, images, teacher, output
            found.append(Step(f"{images.name} teacher {teacher}", functools.partial(train_teacher, *place), 90))
            ipcs = images.ipc[:1] if teacher in images.first_ipc_alone else images.ipc
            found += [Step(f"{images.name} {teacher} ipc {ipc}", functools.partial(cells, *place, ipc), 240) for ipc in ipcs]
    return [Step(step.name, step.work, plan.patience * step.limit) for step in found]


def settings(plan: Plan, images: Images, teacher: str) -> Recipe:
    """Everything from the teacher to the students."""
    return recipe(**images.recipe, squeeze=dict(images.teachers[teacher]), device=plan.device)


def train_teacher(plan: Plan, images: Images, teacher: str, output: Path, rows: Rows) -> None:
    """Train a teacher and test it, unless it is there with these settings."""
    own, file, device = settings(plan, images, teacher), teacher_file(images, teacher, output), torch.device(plan.device)
    train, test = (load(own.data, plan.folders.get(images.name), split) for split in ("train", "test"))
    finished, training = FinishedTeacher(file), training_settings(train, own, device, seed=0)
    with contextlib.suppress(InputError):  # there is none, or one of other settings
        finished.compare(training)
        return
    start = time.perf_counter()
    module = squeeze(train, own, device=device)
    seconds = time.perf_counter() - start
    accuracy = top1(module, test, own.data, device)
    info = TeacherInfo(
        architecture=own.architecture,
        classes=len(train.class_names),
        channels=own.data.channels,
        size=own.data.size,
        accuracy=accuracy,
        class_names=train.class_names,
        mean=own.data.mean,
        std=own.data.std,
    )
    output_folder(file.parent)
    save_teacher(file, module, info)
    finished.write(training)
    epochs = own.squeeze.epochs
    rows.add("teacher", data=images.name, teacher=teacher, architecture=own.architecture, epochs=epochs, top1=accuracy, seconds=seconds)


def teacher_file(images: Images, teacher: str, output: Path) -> Path:
    """Checkpoint of a teacher."""
    return output / f"{images.name}-{teacher}.pt"


def cells(plan: Plan, images: Images, teacher: str, output: Path, ipc: int, rows: Rows) -> None:
    """Sets and students of every method, each a row as soon as all of its seeds are there."""
    own, file, folder = settings(plan, images, teacher), teacher_file(images, teacher, output), plan.folders.get(images.name)
    _, info = load_teacher(file)
    setup = Setup(
        output=output / images.name,
        recipe=own,
        folder=folder,
        train_checksum=image_digest(load(own.data, folder, "train")),
        test_checksum=image_digest(load(own.data, folder, "test")),
        teachers=(StudyTeacher(file=file, checksum=teacher_checksum(file), architecture=info.architecture, accuracy=info.accuracy),),
    )
    for method in images.methods:
        start = time.perf_counter()
        study = {"methods": (method,), "sets": {}, "ipc": (ipc,), "students": images.students, "seeds": range(images.seeds[ipc])}
        record = cross(functools.partial(run_grid, setup, jobs=1), setup, **study)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        for cell in record.data["cells"]:
            shown = {name: cell[name] for name in ("method", "student", "ipc", "mean", "std", "accuracies", "sets")}
            rows.add("cell", data=images.name, teacher=teacher, seconds_per_image=cell.get("seconds_per_image"), wall=seconds, **shown)


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every cell, the last measurement of each."""
    table = Table("data", "teacher", "ipc", "student", "set", "top-1 %", "seconds per image", title="accuracy")
    last = {tuple(row[name] for name in ("data", "teacher", "ipc", "student", "method")): row for row in rows if row["row"] == "cell"}
    for place, row in last.items():
        seconds = row["seconds_per_image"]
        top1 = f"{row['mean']:.1f}" + (f" ± {row['std']:.1f}" if row["sets"] > 1 else "")
        table.add_row(*map(str, place), top1, "–" if seconds is None else f"{seconds:.2g}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps and print the table; 1 where a step did not end well, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for images in FULL:
        parser.add_argument(f"--{images.name}", type=Path, metavar="DIR", help="its real images; without them its steps are left out")
    add_options(parser, "accuracy.jsonl", BUDGET)
    options = parser.parse_args(arguments)
    folders = {images.name: getattr(options, images.name) for images in FULL if getattr(options, images.name)}
    if not folders and not options.dry_run:
        parser.error("no real images: pass " + " or ".join(f"--{images.name} DIR" for images in FULL))
    for folder in folders.values():
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder; a folder of real images is wanted")
    plan = Plan("cuda", tuple(images for images in FULL if images.name in folders), folders)
    plan = Plan("cpu", TINY, patience=20.0) if options.dry_run else plan
    rows = Rows(options.output / "accuracy.jsonl")
    planned = chosen(steps(plan, options.output / "accuracy"), options.only, parser)
    unfinished = run_steps(planned, rows, options.budget)
    Console().print(table_of(read_rows(rows.path)))
    return exit_status(rows, unfinished)


if __name__ == "__main__":
    sys.exit(main())

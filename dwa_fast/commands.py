"""The commands, one dataclass each: its fields are the flags, the comments behind them the help, `run` what it does."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import tyro

from dwa_fast import backend, ops, workers
from dwa_fast._version import __version__
from dwa_fast.checkpoint import TeacherInfo, load_teacher, save_teacher
from dwa_fast.config import DataConfig, InitialConfig, SqueezeConfig, StorageConfig, SynthesisConfig, ValidationConfig, check_integer
from dwa_fast.console import Console
from dwa_fast.datasets import ImageSet, Split, image_folder, load
from dwa_fast.demo import DemoConfig, run_demo, table
from dwa_fast.distill import distill
from dwa_fast.errors import InputError
from dwa_fast.files import checksum, output_folder, write_json
from dwa_fast.losses import Rows
from dwa_fast.recipes import full_recipe
from dwa_fast.squeeze import squeeze
from dwa_fast.storage import read_manifest
from dwa_fast.teacher import prepare
from dwa_fast.training import top1
from dwa_fast.validate import validate
from dwa_fast.verify import problems


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which real images a command reads."""

    recipe: str  # Settings of a data set: digits, cifar10, cifar100, tiny, imagenet, folder (your own), or one with -released.
    data: Path | None = None  # Folder of the real images; digits need none.
    download: bool = False  # Fetch CIFAR into that folder if it is not there.
    size: int  # Height and width of the images, pixels.

    def load(self, split: Split, channels: int) -> ImageSet:
        """The images of a split, as the recipe says."""
        return load(self.data_config, self.data, split, channels=channels, download=self.download)

    @property
    def data_config(self) -> DataConfig:
        """The recipe's, at the size asked for."""
        config = full_recipe(self.recipe).data
        return DataConfig(layout=config.layout, size=self.size, classes=config.classes)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole method on scikit-learn's digits: teacher, distilled sets, students, a table and a picture. Minutes on a CPU."""

    output: Path  # Folder for teacher.pt, the sets, contact-sheet.png and report.json.
    config: tyro.conf.OmitArgPrefixes[DemoConfig]

    def run(self, console: Console) -> None:
        """Run, and print the table."""
        with console.bars() as track:
            content = run_demo(self.output, self.config, track)
        teacher = content["teacher"]
        console.say(f"teacher: {teacher['accuracy']:.1f} % top-1 on {teacher['test_images']} held-out digits")
        console.table(f"students of the distilled digits, {self.config.students} of each", table(content))
        console.say(f"images, contact-sheet.png and report.json are in {self.output}")


@dataclass(frozen=True, kw_only=True)
class Squeeze(Data):
    """Train a teacher on the real images."""

    output: Path  # Checkpoint to write, such as teacher.pt.
    architecture: str  # resnet18, resnet34, resnet50, resnet101, the same with -cifar, convnet128, small-resnet.
    overwrite: bool = False  # Replace a checkpoint that is already there.
    seed: int = 0  # All random draws derive from it.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    config: tyro.conf.OmitArgPrefixes[SqueezeConfig]

    def run(self, console: Console) -> None:
        """Train, test where there are held-out images, and write the checkpoint."""
        if self.output.exists() and not self.overwrite:
            raise InputError(f"{self.output} exists; choose another name, or pass --overwrite")
        output_folder(self.output.parent)
        device = backend.resolve_device(self.device)
        train = self.load("train", self.config.channels)
        with console.bars() as track:
            module = squeeze(
                train, self.architecture, self.config, size=self.size, device=device, seed=self.seed, progress=track("teacher")
            )
        try:
            accuracy = top1(module, self.load("test", self.config.channels), self.config, device)
        except InputError as error:
            accuracy = None
            console.say(f"not tested: {error}")
        info = TeacherInfo(
            architecture=self.architecture,
            classes=len(train.class_names),
            channels=self.config.channels,
            size=self.size,
            accuracy=accuracy,
        )
        save_teacher(self.output, module, info)
        console.say(f"{self.output}: {self.architecture}" + ("" if accuracy is None else f", {accuracy:.2f} % top-1 on held-out images"))


@dataclass(frozen=True, kw_only=True)
class Synthesize(Data):
    """Distil a data set into a few images per class. The same command goes on where it stopped."""

    teacher: Path  # Checkpoint of the teacher.
    output: Path  # Folder for the images and their manifest.
    method: str = "dwa"  # dwa, sre2l, cda, real-start, random-step, coupled.
    ipc: int = 10  # Images per class, at least 1.
    seed: int = 0  # All random draws derive from it.
    architecture: str | None = None  # What the checkpoint holds, where it does not say it itself; default: as the recipe says.
    initial: tyro.conf.OmitArgPrefixes[InitialConfig] = field(default_factory=InitialConfig)
    threads: int | None = None  # CPU threads to compute with; the last bits depend on it. Default: as the set was begun, or all.
    shard: str | None = None  # i/n: make only part i of n, 1 ≤ i ≤ n; the last part to finish completes the set.
    config: tyro.conf.OmitArgPrefixes[SynthesisConfig]
    form: tyro.conf.OmitArgPrefixes[StorageConfig] = field(default_factory=StorageConfig)

    def run(self, console: Console) -> None:
        """Distil into the folder."""
        backend.resolve(self.config.backend, self.config.precision, self.config.device)
        check_integer("ipc", self.ipc, 1)
        train = self.load("train", self.config.channels)
        module, _ = read_teacher(self, self.teacher, self.architecture, len(train.class_names), self.config.channels)
        origin = {"recipe": self.recipe, "method": self.method, "teacher": checksum(self.teacher)}
        if workers.launched() and self.shard:
            raise InputError("--shard is for processes that know nothing of each other; those of torchrun share the work by themselves")
        team = workers.elastic() if workers.launched() else workers.Shard.parse(self.shard or "1/1")
        config = replace(self.config, device=workers.own_device(self.config.device))
        with console.bars(shown=workers.rank() == 0) as track:
            bar = track(f"{self.method}, ipc {self.ipc}")
            made = distill(
                module,
                train,
                config,
                ipc=self.ipc,
                output=self.output,
                initial=self.initial,
                seed=self.seed,
                origin=origin,
                form=self.form,
                threads=self.threads,
                workers=team,
                progress=bar,
                observer=lambda item, rows: bar.note(_shown(rows)),
            )
        console.say(f"{self.output}: {self._made(made, self.ipc * len(train.class_names))}")

    def _made(self, made: int, total: int) -> str:
        if workers.launched():
            return f"{total} images, {made} of them made now by worker {workers.rank()}"
        if not read_manifest(self.output)["complete"]:
            return f"{made} images of shard {self.shard} made now; complete with the other shards"
        return f"{total} images" + (f", {made} of them made now" if made < total else "")


def _shown(rows: Rows) -> str:
    """The last losses of a batch, for a progress bar."""
    return f"ce {rows[-1][1]:.3g}, mean {rows[-1][2]:.3g}, var {rows[-1][3]:.3g}" if rows else ""


@dataclass(frozen=True, kw_only=True)
class Validate(Data):
    """Train students on a distilled set and test them on the held-out real images."""

    teacher: Path  # Checkpoint of the teacher, which gives the soft labels.
    images: Path  # The distilled set: class folders of images.
    ipc: int | None = None  # Take the first images of each class only; default: all.
    student: str  # Architecture of the students, as for squeeze --architecture.
    seed: int = 0  # All random draws derive from it.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    architecture: str | None = None  # What the checkpoint holds, where it does not say it itself; default: as the recipe says.
    output: Path | None = None  # Also write the result there, as JSON.
    config: tyro.conf.OmitArgPrefixes[ValidationConfig]

    def run(self, console: Console) -> None:
        """Train and test the students."""
        if self.output:
            output_folder(self.output.parent)
        device = backend.resolve_device(self.device)
        distilled = image_folder(self.images, self.size, self.config.channels, per_class=self.ipc)
        test = self.load("test", self.config.channels)
        if len(distilled.class_names) != len(test.class_names):
            raise InputError(f"{self.images} has {len(distilled.class_names)} classes, the held-out images have {len(test.class_names)}")
        module, _ = read_teacher(self, self.teacher, self.architecture, len(test.class_names), self.config.channels)
        with console.bars() as track:
            result = validate(
                distilled,
                test,
                module,
                self.student,
                self.config,
                size=self.size,
                device=device,
                seed=self.seed,
                progress=track(f"{self.config.students} students"),
            )
        console.say(f"{self.student}: {result.mean:.2f} ± {result.std:.2f} % top-1, {len(result.accuracies)} students")
        if self.output:
            summary = {"accuracy_mean": result.mean, "accuracy_std": result.std, **asdict(result)}
            write_json(self.output, {"dwa_fast": __version__, "images": str(self.images), "student": self.student, **summary})


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a distilled set against its manifest: that it is complete, and every file there, unchanged, and no other."""

    images: tyro.conf.Positional[Path]  # The distilled set: a folder with a manifest.json.

    def run(self, console: Console) -> None:
        """Print a line per problem; raises InputError where there is one."""
        count = 0
        for problem in problems(self.images):
            console.say(problem)
            count += 1
        if count:
            raise InputError(
                f"{self.images}: {count} problem{'s' if count > 1 else ''}; the command that made the set makes it whole again"
            )
        console.say(f"{self.images}: complete, {len(read_manifest(self.images)['images'])} images, every file as it was written")


@dataclass(frozen=True, kw_only=True)
class Info:
    """Say what was built, what this machine has, which back-end would run, and why the others cannot."""

    teacher: Path | None = None  # Also describe this checkpoint.
    architecture: str | None = None  # What the checkpoint holds, where it does not say it itself.
    json: bool = False  # Print JSON instead of text.

    def run(self, console: Console) -> None:
        """Print it."""
        content = machine()
        if self.teacher:
            module, info = load_teacher(self.teacher, architecture=self.architecture)
            content["teacher"] = {**asdict(info), **_fused_layers(module, info)}
        if self.json:
            print(json.dumps(content, indent=2))
        else:
            console.tree("dwa-fast", content)


def _fused_layers(module: torch.nn.Module, info: TeacherInfo) -> dict[str, Any]:
    """What the fused back-end makes of each BatchNorm layer of a teacher."""
    execution = backend.resolve("auto", "auto", "cpu")
    network, _ = prepare(module, torch.zeros(2, info.channels, info.size, info.size), execution)
    return {"traced": network.traced, "fused": {name: layer.extra_repr() for name, layer in network.layers.items()}}


def machine() -> dict[str, Any]:
    """What `info` prints."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cause = ops.cause()
    return {
        "versions": {
            "dwa_fast": __version__,
            "torch": torch.__version__,
            "torchvision": metadata.version("torchvision"),
            "python": platform.python_version(),
        },
        "extension": {"not usable": cause} if cause else ops.built_with(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector instructions": torch.backends.cpu.get_cpu_capability(),
            "CUDA devices": devices or "none",
        },
        "back-ends": backend.describe(backend.resolve_device("auto")),
        "auto": backend.resolve("auto", "auto", "auto").describe(),
    }


def read_teacher(data: Data, path: Path, architecture: str | None, classes: int, channels: int) -> tuple[torch.nn.Module, TeacherInfo]:
    """The teacher of a command; a checkpoint that does not say what it holds is taken for the recipe's architecture."""
    try:
        return load_teacher(path, architecture=architecture, classes=classes, channels=channels, size=data.size)
    except InputError as error:
        if architecture is not None or "--architecture" not in str(error):
            raise
    return load_teacher(path, architecture=full_recipe(data.recipe).architecture, classes=classes, channels=channels, size=data.size)


def commands(recipe_name: str | None, method: str) -> Mapping[str, Any]:
    """Every command with its defaults; those of a data set are the recipe's."""
    recipe = full_recipe(recipe_name or "digits", method=method)
    given: Any = recipe.name if recipe_name else tyro.MISSING
    data = {"recipe": given, "size": recipe.data.size}
    missing: Any = tyro.MISSING
    return {
        "demo": Demo(output=missing, config=DemoConfig()),
        "squeeze": Squeeze(**data, output=missing, architecture=recipe.architecture, config=recipe.squeeze),
        "synthesize": Synthesize(**data, teacher=missing, output=missing, method=method, config=recipe.synthesis),
        "validate": Validate(**data, teacher=missing, images=missing, student=recipe.architecture, config=recipe.validation),
        "verify": Verify(images=missing),
        "info": Info(),
    }

"""The command that makes a distilled set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from dwa_fast.commands.console import Console
from dwa_fast.commands.data import Method, TeacherData, counted
from dwa_fast.config import InitialConfig, NonNegativeInt, PositiveInt, StorageConfig, SynthesisConfig
from dwa_fast.data.manifest import read_manifest
from dwa_fast.data.pairing import PairedTeacher, teachers_in_settings
from dwa_fast.data.set_layout import refuse_images, set_folder
from dwa_fast.engine import backend
from dwa_fast.errors import InputError
from dwa_fast.recipes import SEVERAL_TEACHERS
from dwa_fast.sets import workers
from dwa_fast.sets.distill import distill
from dwa_fast.sets.loss_log import Rows


@dataclass(frozen=True, kw_only=True)
class Synthesize(TeacherData):
    """Distil a data set into a few images per class. Run the same command again to resume."""

    teacher: tuple[Path, ...]  # Checkpoint of the teacher, or of several teachers, which take turns in this order.
    output: Path  # Folder for the images and their manifest.
    method: Method = "dwa"
    fast: bool = False  # A quarter of the method's iterations.
    ipc: PositiveInt = 10  # Images per class.
    seed: NonNegativeInt = 0  # Seed of all random numbers.
    architecture: tuple[str, ...] = ()  # Network in each checkpoint, if the files do not name them; default: the recipe's.
    initial: tyro.conf.OmitArgPrefixes[InitialConfig] = field(default_factory=InitialConfig)
    threads: PositiveInt | None = None  # CPU threads; the last bits depend on them. Default: as when the set was started, or all.
    shard: str | None = None  # i/n: make only part i of n, 1 ≤ i ≤ n; the last part to finish completes the set.
    config: tyro.conf.OmitArgPrefixes[SynthesisConfig]
    storage: tyro.conf.OmitArgPrefixes[StorageConfig] = field(default_factory=StorageConfig)

    def run(self, console: Console) -> None:
        """Distil into the folder."""
        backend.resolve(self.config.backend, self.config.precision, self.config.device)
        if set_folder(self.output) == self.output:  # else the output is `images` of a set, which stands for the set
            refuse_images(self.output)
        train = self.load("train")
        if workers.rank() == 0:
            console.print(f"real images: {counted(train)}")
        teachers = self._teachers(train.class_names)
        used = teachers_in_settings([each.checksum for each in teachers], [each.outputs for each in teachers])
        if workers.launched() and self.shard:
            raise InputError("--shard is for processes that do not communicate; torchrun divides the batches among its workers itself")
        divided = workers.torchrun_worker() if workers.launched() else workers.Shard.parse(self.shard or "1/1")
        recipe = self.full_recipe(synthesis=replace(self.config, device=workers.own_device(self.config.device)))
        with console.bars(shown=workers.rank() == 0) as track:
            looking = recipe.synthesis.matches_class or recipe.synthesis.initial in ("patches", "median")
            measuring = track("statistics of classes" if recipe.synthesis.matches_class else "initial images") if looking else None
            bar = track(f"{self.method}, ipc {self.ipc}")
            made = distill(
                [teacher.module for teacher in teachers],
                train,
                recipe,
                ipc=self.ipc,
                output=self.output,
                initial=self.initial,
                seed=self.seed,
                provenance={"recipe": self.recipe, "method": self.method, **used},
                teacher_info=[{"architecture": each.info.architecture, "accuracy": each.info.accuracy} for each in teachers],
                storage=self.storage,
                threads=self.threads,
                workers=divided,
                progress=bar,
                measuring=measuring,
                observer=lambda batch, rows: bar.note(_shown(rows)),
            )
        console.print(f"{self.output}: {self._made(made, self.ipc * len(train.class_names))}")

    def _teachers(self, class_names: Sequence[str]) -> list[PairedTeacher]:
        """The teachers in order."""
        count = len(self.teacher)
        if not count or (self.method in SEVERAL_TEACHERS and count == 1):
            wanted = "at least one checkpoint" if not count else f"the checkpoints of several teachers for method {self.method}"
            raise InputError(f"--teacher must name {wanted}, got {count}")
        return self.open_all(self.teacher, self.architecture, class_names)

    def _made(self, made: int, total: int) -> str:
        if not read_manifest(self.output)["complete"]:
            kind, number = ("worker", workers.rank()) if workers.launched() else ("shard", self.shard)
            return f"{made} images of {kind} {number} made now; complete with the other {kind}s"
        return f"{total} images" + (f", {made} of them made now" if made < total else "")


def _shown(rows: Rows) -> str:
    """The last losses of a batch, for a progress bar."""
    return f"ce {rows[-1][1]:.3g}, mean {rows[-1][2]:.3g}, var {rows[-1][3]:.3g}" if rows else ""

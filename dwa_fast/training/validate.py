"""Validate: train students on the distilled images and measure them on the held-out real ones."""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.config import Progress, TrainingPrecision, ValidationConfig, check_integer, plain
from dwa_fast.data.digest import image_digest
from dwa_fast.data.images import ImageSet, check_image_set, check_shape
from dwa_fast.data.loader import BatchSampler, ImageCache, RandomSampler, TrainingBatch, TrainingLoader, batch_size_of, batch_sizes, parts
from dwa_fast.engine.backend import own_defaults, resolve_device
from dwa_fast.engine.training_form import training_form
from dwa_fast.errors import InputError
from dwa_fast.io.settings import refuse_change
from dwa_fast.processes import Running, Task, processes
from dwa_fast.recipes import Recipe, check_recipe
from dwa_fast.seeding import derive
from dwa_fast.threads import THREADS, torch_threads
from dwa_fast.training.fit import (
    TEACHER_SETTINGS,
    SoftLabelFn,
    as_teachers,
    check_batches,
    check_label_teacher,
    check_set,
    fit,
    label_precision,
    new_network,
    predict,
    remedy,
    resolve_precision,
    teacher_labels,
    teacher_settings,
    top1,
    with_batch_size,
)
from dwa_fast.training.fkd_folder import FkdFolder, is_fkd
from dwa_fast.training.fkd_store import FKD_FILES, FkdStore, fkd_index
from dwa_fast.training.label_store import PLAN_SETTINGS, LabelStore, view_settings
from dwa_fast.training.state import FinishedStudents, TrainingState

log = logging.getLogger("dwa_fast")

NO_EFFECT = ("students", "memory_limit")  # settings that do not affect a student's accuracy


@dataclass(frozen=True)
class ValidationResult:
    """Top-1 accuracies of several students, percent."""

    accuracies: list[float]
    seeds: list[int]
    tests: list[dict[int, float]] = field(default_factory=list)  # of each student: accuracies by finished epochs, before the last one

    @property
    def mean(self) -> float:
        """Mean over students."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Sample standard deviation over students; 0 for one student."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@own_defaults()
def validate(
    distilled: ImageSet,
    test: ImageSet,
    teacher: nn.Module | Sequence[nn.Module] | None,
    student: str,
    recipe: Recipe,
    *,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    resume_dir: str | Path | None = None,
    soft_labels: str | Path | None = None,
    test_every: int = 0,
    tested: Callable[[int, int, float], object] | None = None,
    jobs: int = 1,
) -> ValidationResult:
    """Train `recipe.validation.students` students and test each.

    Soft labels are the teacher's probabilities for the augmented batch that the student gets, computed during training or read from disk.

    Args:
        distilled: training images. test: held-out real images.
        teacher: gives the soft labels, or several whose mean does; copied, never changed. Not needed for stored labels or hard labels.
        student: a name of `architectures.ARCHITECTURES`.
        recipe: size, mean, std and settings of the training.
        progress: called with the finished steps and the total, over all students.
        resume_dir: folder for the accuracies of finished students and the checkpoint of the running one. The same call resumes from it and
            gives the same bits; a call with more students trains the missing ones.
        soft_labels: folder that `relabel` wrote, or one of FKD files of any program. All students then get the same batches and differ in
            their initial weights; of a pool of batches (LPLD) each draws its own.
        test_every: also test a student after every so many epochs, which changes nothing else; 0: only in the end.
        tested: called with the student's number, its finished epochs and the accuracy of each such test, where jobs is 1.
        device: "auto", "cpu", "cuda", "cuda:1", …; default: the recipe's.
        jobs: students that are trained at the same time, each in a process of its own, which takes some seconds to start; on a CPU with its
            share of PyTorch's threads, on which the last bits depend.
    Raises:
        TypeError: an argument is of the wrong type.
        InputError: the folder holds students of other settings, an image cannot be read, a set is empty or has a label that is not the
            number of a class, the sets have the same classes in another order, the stored labels are of another set, augmentation or
            teacher, the teacher gives no finite logits of these classes, a batch of one image is too small for the student, or a training
            diverges. Finished students stay in the folder.
    """
    seed, jobs, test_every = plain(seed), plain(jobs), plain(test_every)
    check_image_set(distilled, "distilled")
    check_image_set(test, "test")
    check_recipe(recipe)
    for images in (distilled, test):
        check_shape(images, recipe.data)
    check_set(distilled, "distilled images")
    for name, value, at_least in (("seed", seed, 0), ("jobs", jobs, 1), ("test_every", test_every, 0)):
        check_integer(name, value, at_least)
    if not isinstance(student, str):
        raise TypeError(f"student must be the name of an architecture, such as 'resnet18', got {type(student).__name__}")
    recipe, device, teachers = (
        with_batch_size(recipe, distilled),
        resolve_device(str(device or recipe.synthesis.device)),
        as_teachers(teacher),
    )
    config = recipe.validation
    check_set(test, "held-out images")
    if len(distilled.class_names) != len(test.class_names):
        raise InputError(f"distilled images have {len(distilled.class_names)} classes, the held-out images {len(test.class_names)}")
    _compare_names(distilled.class_names, test.class_names)
    trainer = _StudentTrainer(distilled, test, teachers, _stored(soft_labels, recipe, distilled, teachers), student, recipe, device)
    for each_teacher in trainer.live_teachers:
        check_label_teacher(each_teacher, distilled, recipe, device)
    check_batches(lambda: trainer.network(seed), distilled, trainer.sizes, device, "student")
    jobs = min(jobs, config.students)
    threads = max(1, torch.get_num_threads() // jobs) if device.type == "cpu" else None
    folder = None
    if resume_dir:
        own = {"student": student, "size": recipe.data.size, "seed": seed, "device": device.type, THREADS: threads}
        folder = FinishedStudents(Path(resume_dir), {**trainer.settings, **own, "held_out": image_digest(test)})
    finished, tests = (folder.accuracies, folder.tests) if folder else ({}, {})
    seeds = [derive(seed, "student", index) for index in range(config.students)]
    missing = [index for index in range(config.students) if index not in finished]
    tasks = []
    for index in missing:
        tell = functools.partial(tested, index) if tested and jobs == 1 else None
        state = folder.state(index) if folder else None
        train = functools.partial(trainer.train, seeds[index], state, test_every, threads, tell)
        tasks.append(Task(f"student {index + 1}" if jobs > 1 else "", train))

    steps = trainer.steps  # of one student

    def report(running: Running) -> None:
        if progress:
            progress(len(finished) * steps + sum(done for done, total in running.values() if total == steps), config.students * steps)

    with processes(max(1, min(jobs, len(tasks)))) as run:
        for place, (accuracy, early) in run(tasks, report):
            index = missing[place]
            if folder:
                folder.add(index, accuracy, early)
            else:
                finished[index], tests[index] = accuracy, early
    if jobs > 1:
        report({})
    return ValidationResult([finished[i] for i in range(config.students)], seeds, [tests.get(i, {}) for i in range(config.students)])


def _compare_names(own: Sequence[str], wanted: Sequence[str]) -> None:
    """Warn where the classes have other names.

    Raises:
        InputError: they are the same in another order.
    """
    number = next((number for number, names in enumerate(zip(own, wanted, strict=True)) if names[0] != names[1]), None)
    if number is None:
        return
    difference = f"class {number} of the distilled images is {own[number]!r}, that of the held-out images is {wanted[number]!r}"
    if sorted(own) == sorted(wanted):
        raise InputError(f"{difference}: the classes are the same in another order; expected one order, by which labels are numbers")
    log.warning("%s; classes are taken to be the same by their numbers", difference)


def _stored(folder: str | Path | None, recipe: Recipe, distilled: ImageSet, teachers: Sequence[nn.Module]) -> LabelStore | FkdFolder | None:
    """Open the stored soft labels; None if the labels come from the teacher or are hard.

    Raises:
        InputError: labels are missing, or are of other images, another augmentation or another teacher; or there is neither a teacher nor a
            folder for soft labels.
    """
    config = recipe.validation
    if folder is None:
        if not teachers and config.labels == "soft":
            raise InputError("soft labels come from a teacher or from the disk; name a teacher, or the folder that dwa-fast relabel wrote")
        return None
    if config.labels == "hard":
        raise InputError("stored soft labels are not used by students with hard labels; leave one of the two out")
    folder = Path(folder)
    if is_fkd(folder):
        if teachers:
            log.info("%s does not say whose soft labels it holds: the teacher is not used", folder)
        return FkdFolder(folder, distilled, config)
    store = fkd_index(folder) or LabelStore(folder)
    wanted = {**view_settings(recipe), "images": image_digest(distilled), "classes": len(distilled.class_names)}
    compared = {*PLAN_SETTINGS, "images", "classes"}
    if teachers:
        wanted |= teacher_settings(teachers, config)
        compared |= {*TEACHER_SETTINGS}
    own = {name: value for name, value in store.settings.items() if name in compared}
    refuse_change(folder, "soft labels", own, wanted, "relabel with these settings, or validate with those")
    if not store.complete:
        raise InputError(f"{folder} is incomplete; the dwa-fast relabel command that wrote it resumes it")
    if isinstance(store, FkdStore):
        return FkdFolder(folder / FKD_FILES, distilled, config)
    if store.epochs < config.epochs:
        level = logging.INFO if config.epochs % store.epochs == 0 else logging.WARNING  # a pool holds so many times fewer
        log.log(
            level,
            "%s holds soft labels of %d epochs, and the training has %d: all are used again, in random order",
            folder,
            store.epochs,
            config.epochs,
        )
    return store


@dataclass(frozen=True)
class _StudentTrainer:
    """Trains and tests students on the same images, one at a time; other processes may do so with a copy of it."""

    distilled: ImageSet
    test: ImageSet
    teachers: Sequence[nn.Module]
    labels: LabelStore | FkdFolder | None
    student: str
    recipe: Recipe
    device: torch.device

    @property
    def config(self) -> ValidationConfig:
        """The settings of the training."""
        return self.recipe.validation

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the accuracies depend on besides the student and the test images."""
        settings = {name: value for name, value in self.recipe.settings("validation").items() if name not in NO_EFFECT}
        settings |= {"images": image_digest(self.distilled), "precision": self._precision}
        if self.labels:
            return {**settings, "soft_labels": self.labels.identity}
        if not self.live_teachers:
            return settings
        return {**settings, **teacher_settings(self.live_teachers, self.config), **label_precision(self._precision)}

    @property
    def live_teachers(self) -> Sequence[nn.Module]:
        """The teachers, if they compute soft labels during training."""
        return self.teachers if self.labels is None and self.config.labels == "soft" else []

    @cached_property
    def _images(self) -> ImageCache:
        return ImageCache(self.distilled, self.device, self.config.memory_limit)

    @property
    def _precision(self) -> TrainingPrecision:
        return resolve_precision(self.config.precision, self.device)

    @property
    def sizes(self) -> Sequence[int]:
        """Images of the batches of an epoch."""
        if isinstance(self.labels, FkdFolder):
            return self.labels.sizes
        count = len(self.distilled.labels)
        return batch_sizes(count, batch_size_of(self.config, count, len(self.distilled.class_names)))

    def _sampler(self, seed: int) -> BatchSampler:
        if self.labels is None:
            return RandomSampler(self.distilled, self.config, seed=seed)
        return self.labels.sampler(self.config, len(self.distilled.labels), len(self.distilled.class_names), seed=seed)

    def _soft_labels(self) -> SoftLabelFn:
        if self.live_teachers:
            return teacher_labels(self.live_teachers, self.config, self.distilled.image_shape, self.device)

        def read(batch: TrainingBatch) -> Tensor:
            assert batch.logits is not None
            return batch.logits.float()

        return read

    @property
    def steps(self) -> int:
        """Steps of the training of a student."""
        return self.config.epochs * self._sampler(0).steps

    def network(self, seed: int) -> nn.Module:
        """A student that has not been trained."""
        data = self.recipe.data
        shape = {"classes": len(self.test.class_names), "channels": data.channels, "size": data.size}
        return new_network(self.student, **shape, seed=seed, device=self.device)

    def train(
        self,
        seed: int,
        state: TrainingState | None,
        test_every: int,
        threads: int | None,
        tested: Callable[[int, float], object] | None,
        progress: Progress,
    ) -> tuple[float, dict[int, float]]:
        """Train a student with that many CPU threads: its accuracy, and those on the way by finished epochs."""
        student, tests = self.network(seed), state.tests if state else {}

        def test(epochs: int) -> None:
            tests[epochs] = top1(student, self.test, self.recipe.data, self.device)
            if tested:
                tested(epochs, tests[epochs])

        with torch_threads(threads):
            self._fit(student, seed, state, progress, test, test_every)
            return top1(student, self.test, self.recipe.data, self.device), tests

    def _fit(
        self,
        student: nn.Module,
        seed: int,
        state: TrainingState | None,
        progress: Progress,
        test: Callable[[int], object],
        test_every: int,
    ) -> None:
        config, soft_labels = self.config, None if self.config.labels == "hard" else self._soft_labels()
        forward = training_form(student.train(), self.distilled.image_shape, self.device)

        finite = torch.ones((), dtype=torch.bool, device=self.device)  # whether all soft labels so far are finite

        def losses(batch: TrainingBatch) -> Iterator[Tensor]:
            count, teacher_logits = len(batch.images), None
            for rows in parts(count, config.accumulation):
                logits = predict(forward, batch.images[rows], self._precision)
                if soft_labels is None:
                    value = hard_loss(logits, batch, rows)
                else:
                    if teacher_logits is None:
                        teacher_logits = soft_labels(batch)
                        finite.logical_and_(teacher_logits.isfinite().all())
                    value = soft_loss(logits, teacher_logits[rows], config)
                    if config.hard_weight:
                        value = value + config.hard_weight * F.cross_entropy(logits, batch.labels[rows])
                yield value if len(logits) == count else value * (len(logits) / count)

        def advice() -> str:
            return remedy(config, self._precision) if finite else "the teacher's logits for its images are not finite"

        fit(
            student,
            optimiser_of(student, config),
            TrainingLoader(self._images, self._sampler(seed), self.recipe.data, config.padding),
            losses,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            stretch=config.cosine_stretch,
            weight_ema=config.weight_ema,
            warmup_epochs=config.warmup_epochs,
            seed=seed,
            remedy=advice,
            state=state,
            progress=progress,
            test=test,
            test_every=test_every,
        )


def optimiser_of(student: nn.Module, config: ValidationConfig, fused: bool | None = True) -> torch.optim.Optimizer:
    """AdamW or SGD as the settings say; `fused` as in PyTorch."""
    decayed = [p for p in student.parameters() if config.decay_vectors or p.dim() > 1]
    kept = [p for p in student.parameters() if not config.decay_vectors and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=fused)
    captured = bool(fused) and any(p.is_cuda for p in student.parameters())
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused, capturable=captured)


def soft_loss(
    logits: Tensor,  # [B, classes], the student's
    teacher_logits: Tensor,  # [B, classes], the teacher's
    config: ValidationConfig,
) -> Tensor:
    """KL(teacher ‖ student) of the probabilities at `temperature`, mean over the batch; × temperature² if `scale_loss`.

    For loss mse the mean squared difference of the logits (G-VBSM, EDC).
    """
    if config.loss == "mse":
        return F.mse_loss(logits, teacher_logits)
    target = F.log_softmax(teacher_logits / config.temperature, 1)
    loss = F.kl_div(F.log_softmax(logits / config.temperature, 1), target, reduction="batchmean", log_target=True)
    return loss * config.temperature**2 if config.scale_loss else loss


def hard_loss(
    logits: Tensor,  # [B, classes]
    batch: TrainingBatch,
    rows: slice = slice(None),  # of the batch, that the logits are for
) -> Tensor:
    """Cross-entropy; for mixed images share·CE(own label) + (1 − share)·CE(partner's label)."""
    own = F.cross_entropy(logits, batch.labels[rows])
    if batch.partner_labels is None or batch.shares is None:
        return own
    share, of_partner = batch.shares
    mixed: Tensor = share * own + of_partner * F.cross_entropy(logits, batch.partner_labels[rows])
    return mixed

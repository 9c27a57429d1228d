"""Validate: train students on the distilled images and measure them on the held-out real ones."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.config import TrainingPrecision, ValidationConfig
from dwa_fast.data.datasets import ImageSet
from dwa_fast.data.loader import Draws, Lesson, Lessons, Pixels, RandomDraws
from dwa_fast.errors import InputError
from dwa_fast.io.settings import refuse_change
from dwa_fast.seeding import derive
from dwa_fast.threads import THREADS, computing, threads_of
from dwa_fast.training.fit import (
    Progress,
    Teach,
    check_batches,
    check_set,
    check_teaching,
    fit,
    fresh,
    predict,
    remedy,
    resolve_precision,
    teaching,
    top1,
)
from dwa_fast.training.label_store import LabelStore, StoredDraws, view_settings
from dwa_fast.training.state import KeptStudents, TrainingState, image_digest, weight_digest

NOT_OF_A_STUDENT = ("students", "memory_limit")  # settings on which no student's accuracy depends


@dataclass(frozen=True)
class ValidationResult:
    """Top-1 of several students, percent."""

    accuracies: list[float]  # one per student
    seeds: list[int]  # of the students

    @property
    def mean(self) -> float:
        """Mean over students."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Standard deviation of the sample over students; 0 for one student."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def validate(
    distilled: ImageSet,
    test: ImageSet,
    teacher: nn.Module | None,
    student: str,
    config: ValidationConfig,
    *,
    size: int,
    device: str | torch.device,
    seed: int = 0,
    progress: Progress | None = None,
    keep: str | Path | None = None,
    soft_labels: str | Path | None = None,
) -> ValidationResult:
    """Train `config.students` students and test each.

    Soft labels are the teacher's probabilities for exactly the view that the student sees, computed as training goes or read from disk.

    Args:
        distilled: images to learn from. test: held-out real images.
        teacher: gives the soft labels; it is copied, never changed. Not needed where they are on disk, nor for hard ones.
        student: a name of `architectures.ARCHITECTURES`.
        size: height and width of the images, pixels.
        progress: called with the steps done and the steps in all, over all students.
        keep: folder for the accuracies of finished students and the state of the running one. The same call goes on from there, to the
            same bits, with the CPU threads of the first one; one with more students trains those that are missing.
        soft_labels: folder that `relabel` wrote. All students then see its views and mixes; they differ in their first weights.
    Raises:
        InputError: the folder holds students of other settings, an image cannot be read, a set has no images or a label that is not the
            number of a class, the stored labels are not those of this set, these views and this teacher, the teacher gives no finite
            logits of these classes, a batch of one image is too small for the student, or a training diverges. Finished students are kept.
    """
    device = torch.device(device)
    check_set(distilled, "distilled images")
    check_set(test, "held-out images")
    if len(distilled.class_names) != len(test.class_names):
        raise InputError(f"distilled images have {len(distilled.class_names)} classes, the held-out images {len(test.class_names)}")
    course = _Course(distilled, teacher, _stored(soft_labels, config, distilled, teacher), config, device)
    if course.live_teacher is not None:
        check_teaching(course.live_teacher, distilled, config, device)

    def make(own_seed: int) -> nn.Module:
        return fresh(student, classes=len(test.class_names), channels=config.channels, size=size, seed=own_seed, device=device)

    check_batches(lambda: make(seed), distilled, config.batch_size, device, "student")
    kept = None
    if keep:
        own = {"student": student, "size": size, "seed": seed, "device": device.type, THREADS: threads_of(device)}
        kept = KeptStudents(Path(keep), {**course.settings, **own, "held_out": image_digest(test)})
    finished = kept.accuracies if kept else {}
    seeds = [derive(seed, "student", index) for index in range(config.students)]
    with computing(kept.threads if kept else None):
        for index, each in enumerate(seeds):
            if index in finished:
                continue
            model = make(each)
            course.train(model, each, kept.state(index) if kept else None, _share(progress, index, config.students))
            finished[index] = top1(model, test, config, device)
            if kept:
                kept.add(index, finished[index])
    return ValidationResult([finished[index] for index in range(config.students)], seeds)


def _share(progress: Progress | None, index: int, students: int) -> Progress | None:
    """The progress of one student among several."""
    return (lambda done, total: progress(index * total + done, students * total)) if progress else None


def _stored(folder: str | Path | None, config: ValidationConfig, distilled: ImageSet, teacher: nn.Module | None) -> LabelStore | None:
    """The soft labels on disk, if students are to learn from those.

    Raises:
        InputError: they are not all there, or are those of other images, views or another teacher; or nothing tells the students anything.
    """
    if folder is None:
        if teacher is None and config.labels == "soft":
            raise InputError("soft labels come from a teacher or from the disk; name a teacher, or the folder that dwa-fast relabel wrote")
        return None
    if config.labels == "hard":
        raise InputError("stored soft labels are not used by students with hard labels; leave one of the two out")
    folder = Path(folder)
    store = LabelStore(folder)
    wanted = {**view_settings(config), "images": image_digest(distilled), "classes": len(distilled.class_names)}
    if teacher is not None:
        wanted |= {"teacher": weight_digest(teacher), "teacher_mode": config.teacher_mode}
    own = {name: value for name, value in store.settings.items() if name in wanted}
    refuse_change(folder, "soft labels", own, wanted, "relabel with these settings, or validate with those")
    if not store.complete:
        raise InputError(f"{folder} does not hold all of its soft labels yet; the command that began it goes on with it")
    return store


@dataclass(frozen=True)
class _Course:
    """What every student goes through."""

    distilled: ImageSet
    teacher: nn.Module | None
    labels: LabelStore | None
    config: ValidationConfig
    device: torch.device

    @property
    def settings(self) -> dict[str, Any]:
        """What the outcome depends on, beside the student and the test."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in NOT_OF_A_STUDENT}
        settings |= {"images": image_digest(self.distilled), "precision": self._precision}
        if self.labels:
            return {**settings, "soft_labels": self.labels.identity}
        if self.live_teacher is not None:
            return {**settings, "teacher": weight_digest(self.live_teacher)}
        return settings

    @property
    def live_teacher(self) -> nn.Module | None:
        """The teacher, where it gives soft labels as training goes."""
        return self.teacher if self.labels is None and self.config.labels == "soft" else None

    @cached_property
    def _pixels(self) -> Pixels:
        return Pixels(self.distilled, self.device, self.config.memory_limit)

    @property
    def _precision(self) -> TrainingPrecision:
        return resolve_precision(self.config.precision, self.device)

    def _draws(self, seed: int) -> Draws:
        if self.labels is None:
            return RandomDraws(self.distilled, self.config, seed=seed)
        return StoredDraws(self.labels, self.config, len(self.distilled.labels), len(self.distilled.class_names), seed=seed)

    def _teach(self) -> Teach:
        if self.live_teacher is not None:
            return teaching(self.live_teacher, self.config.teacher_mode, self.device)

        def read(lesson: Lesson) -> Tensor:
            assert lesson.draw.logits is not None
            return lesson.draw.logits.to(self.device).float()

        return read

    def train(self, student: nn.Module, seed: int, state: TrainingState | None, progress: Progress | None) -> None:
        """Train one student."""
        config, teach = self.config, None if self.config.labels == "hard" else self._teach()

        sound = torch.ones((), dtype=torch.bool, device=self.device)  # whether all soft labels so far are finite

        def loss(lesson: Lesson) -> Tensor:
            logits = predict(student, lesson.images, self._precision)
            if teach is None:
                return hard_loss(logits, lesson)
            told = teach(lesson)
            sound.logical_and_(told.isfinite().all())
            return soft_loss(logits, told, config)

        def advice() -> str:
            return remedy(config, self._precision) if sound else "the teacher's logits for its images are not finite"

        fit(
            student,
            _optimizer(student, config),
            Lessons(self._pixels, self._draws(seed), config),
            loss,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            warmup_epochs=config.warmup_epochs,
            seed=seed,
            remedy=advice,
            state=state,
            progress=progress,
        )


def _optimizer(student: nn.Module, config: ValidationConfig) -> torch.optim.Optimizer:
    decayed = [p for p in student.parameters() if config.decay_vectors or p.dim() > 1]
    kept = [p for p in student.parameters() if not config.decay_vectors and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def soft_loss(
    logits: Tensor,  # [B, classes], the student's
    told: Tensor,  # [B, classes], the teacher's
    config: ValidationConfig,
) -> Tensor:
    """Divergence of the student's tempered probabilities from the teacher's, mean over the batch; × temperature² on request."""
    target = F.log_softmax(told / config.temperature, 1)
    loss = F.kl_div(F.log_softmax(logits / config.temperature, 1), target, reduction="batchmean", log_target=True)
    return loss * config.temperature**2 if config.scale_loss else loss


def hard_loss(
    logits: Tensor,  # [B, classes]
    lesson: Lesson,
) -> Tensor:
    """Cross-entropy; of mixed images, with both classes by their shares."""
    own = F.cross_entropy(logits, lesson.labels)
    mix = lesson.draw.mix
    if mix.partner is None:
        return own
    other = F.cross_entropy(logits, lesson.labels[mix.partner.to(logits.device)])
    return mix.share * own + (1 - mix.share) * other

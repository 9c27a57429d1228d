"""The command that measures the diversity of distilled sets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from dwa_fast.commands.console import Console
from dwa_fast.commands.data import compare_normalisation, naming_bad_images, on_its_threads, try_teacher
from dwa_fast.commands.finish import finish
from dwa_fast.commands.sets import DistilledSets, study_folder, teacher_settings
from dwa_fast.config import NonNegativeInt, PositiveInt
from dwa_fast.data.digest import image_digest
from dwa_fast.data.images import ImageSet
from dwa_fast.data.subsets import by_class
from dwa_fast.engine import backend
from dwa_fast.evaluation.diversity import REAL, Analysis, DiversityConfig, SetAnalysis, analyse_sets, smallest_class
from dwa_fast.recipes import recipe
from dwa_fast.report.contact_sheet import write_contact_sheet
from dwa_fast.report.records import Chart, Picture, Record, Scatter, Series, Table, command_line, environment

_BARS = 20  # most classes that are shown as bars with their names; more become curves
_COLUMNS = 10  # most images of a class in the contact sheet
_PAIRS = 5  # images of a class that are shown with their neighbours
_PERCENT = range(0, 101, 5)  # of the images, in the chart of distances
_REAL_POINTS = "real images"  # in the t-SNE, more than the sample that the sets are compared with
_NEAR = 0.05  # share of real images whose neighbours are called near


@dataclass(frozen=True, kw_only=True)
class Diversity(DistilledSets):
    """Measure how diverse distilled sets are, and how close to real images: D^c, nearest real images, t-SNE, contact sheets.

    The charts have the classes in the order of the first set.
    """

    teacher: Path  # Checkpoint of the teacher, whose features are compared.
    output: Path  # Folder for record.json, the charts and the pictures.
    seed: NonNegativeInt = 0  # Seed of all random numbers.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    threads: PositiveInt | None = None  # CPU threads; the last bits of the results depend on them. Default: all.
    architecture: str | None = None  # Network in the checkpoint, if the file does not name it; default: the recipe's.
    config: tyro.conf.OmitArgPrefixes[DiversityConfig]

    @on_its_threads
    def run(self, console: Console) -> None:
        """Analyse the sets, and write the record."""
        started = time.perf_counter()
        normalisation, device = self.normalisation, backend.resolve_device(self.device)
        train = self.real(console, "train")
        sets = self.open_sets(console, train.class_names)
        smallest_class(sets)  # before the teacher is loaded and the images are read
        teacher = self.open_teacher(self.teacher, self.architecture, train.class_names)
        for images in sets.values():
            compare_normalisation(images.folder, normalisation, teacher)
        try_teacher(teacher, train, normalisation, device)
        usual = recipe(self.recipe).data
        settings = {
            "recipe": self.recipe,
            "size": self.size,
            "images": image_digest(train),
            **({} if (normalisation.mean, normalisation.std) == (usual.mean, usual.std) else asdict(normalisation)),
            "seed": self.seed,
            **asdict(self.config),
            "teacher": teacher_settings(teacher),
            "sets": {name: {"images": len(images.labels), "checksum": image_digest(images)} for name, images in sets.items()},
        }
        study_folder(self.output, settings)
        with naming_bad_images(), console.bars() as track:
            analysis = analyse_sets(
                teacher.module, sets, train, self.config, normalisation, device=device, seed=self.seed, progress=track("images analysed")
            )
        facts: dict[str, Any] = {"settings": settings, "environment": environment(device), "command": command_line()}
        pictures = draw_pictures(analysis, self.output)
        finish(console, self.output, as_record(analysis, self.config, pictures, seconds=time.perf_counter() - started, **facts))


def as_record(analysis: Analysis, config: DiversityConfig, pictures: Sequence[Picture], **facts: Any) -> Record:
    """Tables, charts and the t-SNE of an analysis."""
    where = "the teacher's features" if config.space == "features" else "pixels"
    usual = _median(analysis.sets[REAL].nearest_distances)
    parts = [
        f"{name} {_mean(own.ratios)} and {_relative(_median(own.nearest_distances), usual)}"
        for name, own in analysis.sets.items()
        if name != REAL
    ]
    return Record(
        kind="diversity",
        title="Diversity of distilled sets, and their nearest real images",
        summary="Diversity D^c, and median distance to the nearest real image, as ratios to those of random real images: "
        + "; ".join(parts)
        + ".",
        tables=[_diversity_table(analysis), _neighbour_table(analysis, where)],
        charts=[_diversity_chart(analysis), _neighbour_chart(analysis, where)],
        scatters=[
            Scatter(
                title="t-SNE of the teacher's logits",
                groups={_REAL_POINTS if name == REAL else name: own.points.tolist() for name, own in analysis.sets.items()},
                note=f"{len(analysis.shown)} classes, at most {config.tsne_images} images of each in every set",
            )
        ],
        pictures=pictures,
        data={name: _raw(own) for name, own in analysis.sets.items()},
        **facts,
    )


def _median(distances: Tensor) -> float:
    """The mean of both middle values of an even number, unlike `Tensor.median`."""
    return float(distances.double().quantile(0.5))


def _diversity_table(analysis: Analysis) -> Table:
    rows = []
    for name, own in analysis.sets.items():
        known = [value for value in own.ratios if value is not None]
        ends = [f"{end(known):.2f}" if known else "–" for end in (min, max)]
        rows.append([name, str(len(own.images.labels)), _mean_std(own.ratios), *ends, _mean_std(own.feature_ratios)])
    return Table(
        title="Diversity D^c of a class, as a ratio to random real images",
        columns=["set", "images", "last convolution", "least", "greatest", "last features"],
        rows=rows,
        note="Mean ± standard deviation over classes. 1 is the mean over all draws of as many real images of the class; the row of random "
        "real images is one such draw. Last features: the input of the teacher's last linear layer.",
    )


def _diversity_chart(analysis: Analysis) -> Chart:
    first = next(own for name, own in analysis.sets.items() if name != REAL)
    values = [float("inf") if value is None else value for value in first.ratios]
    order = sorted(range(len(values)), key=values.__getitem__)
    few = len(order) <= _BARS
    return Chart(
        title="Diversity of each class",
        x_label="class" if few else "class, in the order of the first set",
        y_label="D^c; 1: random real images",
        x=[analysis.real.class_names[label] for label in order] if few else list(range(1, len(order) + 1)),
        series=[Series(name=name, values=[own.ratios[label] for label in order]) for name, own in analysis.sets.items()],
    )


def _neighbour_table(analysis: Analysis, where: str) -> Table:
    real = analysis.sets[REAL].nearest_distances
    near = float(real.quantile(_NEAR))
    rows = []
    for name, own in analysis.sets.items():
        distances, count = own.nearest_distances, len(own.nearest)
        rows.append(
            [
                name,
                f"{_median(distances):.3g}",
                _relative(_median(distances), _median(real)),
                f"{float(distances.min()):.3g}",
                f"{100 * float((distances < near).double().mean()):.1f}",
                f"{100 * float((analysis.real.labels[own.nearest] == own.images.labels).double().mean()):.1f}",
                f"{100 * len(own.nearest.unique()) / count:.0f}",
            ]
        )
    return Table(
        title=f"Distance to the nearest real image, in {where}",
        columns=["set", "median", "/ real", "least", "near %", "same class %", "different %"],
        rows=rows,
        note=f"Random real images: to the nearest other one. Near: nearer than the nearest {100 * _NEAR:.0f} % of random real images are "
        "to another, so that much more means memorised images. Same class: the neighbour is of the image's own class. Different: different "
        "neighbours, in percent of the images.",
    )


def _neighbour_chart(analysis: Analysis, where: str) -> Chart:
    return Chart(
        title="Distance to the nearest real image",
        x_label="images at most as far, %",
        y_label=f"distance in {where}",
        x=list(_PERCENT),
        series=[Series(name=name, values=_quantiles(own.nearest_distances)) for name, own in analysis.sets.items()],
    )


def _raw(own: SetAnalysis) -> dict[str, Any]:
    return {
        "diversity": own.distances,
        "diversity_ratios": own.ratios,
        "feature_diversity_ratios": own.feature_ratios,
        "nearest_distance_quantiles": _quantiles(own.nearest_distances),
    }


def draw_pictures(analysis: Analysis, folder: Path) -> list[Picture]:
    """A contact sheet with a panel per set, and for each set its images that are nearest to real ones, beside these."""
    names = [analysis.real.class_names[label] for label in analysis.shown]
    members = {name: by_class(own.images) for name, own in analysis.sets.items()}
    columns = min(_COLUMNS, *(len(own[label]) for own in members.values() for label in analysis.shown))
    panels = {
        name: _pixels(own.images, torch.cat([members[name][label][:columns] for label in analysis.shown]))
        for name, own in analysis.sets.items()
    }
    write_contact_sheet(folder / "contact-sheet.png", panels, names)
    pictures = [Picture(title=f"The first {columns} images of {len(names)} classes", file="contact-sheet.png")]
    for number, (name, own) in enumerate(analysis.sets.items()):
        rows = [members[name][label] for label in analysis.shown]
        nearest = torch.cat([row[own.nearest_distances[row].argsort(stable=True)[: min(_PAIRS, columns)]] for row in rows])
        file = f"neighbours-{number}.png"
        both = {name: _pixels(own.images, nearest), "nearest real images": _pixels(analysis.real, own.nearest[nearest])}
        write_contact_sheet(folder / file, both, names)
        pictures.append(Picture(title=f"{name}: its images that are nearest to real ones, and these", file=file))
    return pictures


def _pixels(images: ImageSet, indices: Tensor) -> Tensor:
    return images.load(indices.tolist())


def _quantiles(distances: Tensor) -> list[float]:
    return [float(value) for value in distances.quantile(torch.tensor([part / 100 for part in _PERCENT], dtype=distances.dtype))]


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2f}" if known else "–"


def _mean_std(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{statistics.fmean(known):.2f}" + (f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else "")


def _relative(value: float, usual: float) -> str:
    """A ratio as text; – where the real images are all copies of each other."""
    return f"{value / usual:.2f}" if usual > 0 else "–"

"""Statistics of each class at every BatchNorm layer of a teacher, which LPLD matches (arXiv 2410.15919)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dwa_fast.config import Progress
from dwa_fast.data.images import ImageSet, check_image_set
from dwa_fast.data.pixels import normalise
from dwa_fast.data.subsets import by_class
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.capture import TRACING
from dwa_fast.errors import InputError
from dwa_fast.io.decode import BadImageError
from dwa_fast.models.batchnorm import MomentsHook, batchnorm_layers
from dwa_fast.models.wrappers import copied, listed
from dwa_fast.recipes import Recipe, check_recipe
from dwa_fast.reference.ops import Operators

ClassStatistics = Mapping[str, Tensor]  # by name of the BatchNorm layer: mean and biased variance of its input, [2, classes, C]

_BATCH = 100  # images that pass through the teacher at once


def class_statistics(
    teacher: nn.Module | Sequence[nn.Module],
    data: ImageSet,
    recipe: Recipe,
    *,
    classes: Sequence[int] | None = None,
    logits: str | int | None = None,
    skipped: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> list[ClassStatistics]:
    """Mean and variance, over all images of a class and all positions, of the input of every BatchNorm layer that runs.

        m_kc = Σ y_c / n,   v_kc = Σ (y_c − m_kc)² / n       over the n positions of channel c in the images of class k

    The teachers' copies are in eval mode and compute in fp32 (fp64 where the recipe asks for that precision), sums are added up in fp64.

    Args:
        teacher: one or several classifiers; they are copied, never changed.
        data: the real images, such as `load_data(recipe.data, folder, "train")`.
        recipe: its `data` normalise the images, its `synthesis.device` computes.
        classes: numbers of those to measure; the rows of others are NaN. None: all.
        logits: which of several outputs of a teacher are the logits, as for `synthesize`.
        skipped: names of images that are left out, with the cause; images that cannot be decoded join them. None: these are an error.
        progress: called with the images that have been measured, and all.
    Returns:
        for each teacher, [2, classes, C] for each layer by its name: means and variances, on the CPU.
    Raises:
        InputError: a class has no image, an image cannot be decoded, a layer runs more than once, or activations are not finite.
    """
    check_image_set(data)
    check_recipe(recipe)
    execution = resolve("reference", "fp64" if recipe.synthesis.precision == "fp64" else "fp32", recipe.synthesis.device)
    meters = [_Meter(copied(each, execution.device, execution.master_dtype), len(data.class_names)) for each in listed(teacher, logits)]
    members = by_class(data)
    chosen = list(range(len(members))) if classes is None else list(classes)
    if wrong := [label for label in chosen if not 0 <= label < len(members)]:
        raise InputError(f"classes must lie in 0 … {len(members) - 1}, got {wrong[0]}")
    total, done = sum(len(members[label]) for label in chosen), 0
    if progress:
        progress(0, total)
    for label in chosen:
        seen = 0
        for indices in members[label].split(_BATCH):
            pixels = _decoded(data, indices.tolist(), skipped)
            if len(pixels):
                images = normalise(pixels, recipe.data).to(execution.device, execution.master_dtype)
                with TRACING, execution.arithmetic(), torch.no_grad():
                    for meter in meters:
                        meter.see(images, label)
            seen, done = seen + len(pixels), done + len(indices)
            if progress:
                progress(done, total)
        if not seen:
            raise InputError(f"class {data.class_names[label]!r} has no image that can be decoded, to take its statistics from")
    return [meter.result(chosen) for meter in meters]


class _Meter:
    """Adds up the moments of a teacher's layers, class by class."""

    def __init__(self, module: nn.Module, classes: int) -> None:
        self._module, self._classes = module, classes
        self._hooks = {name: MomentsHook(layer, Operators("reference")) for name, layer in batchnorm_layers(module).items()}
        self._sums: dict[str, Tensor] = {}  # [3, classes, C] float64: n, Σ(y − m), Σ(y − m)²

    def see(self, images: Tensor, label: int) -> None:
        """Add some images of a class, normalised."""
        self._module(images)
        for name, hook in self._hooks.items():
            if len(hook.sums) > 1:
                raise InputError(f"BatchNorm layer {name!r} runs {len(hook.sums)} times in a forward pass; each layer may run once")
            for moments in hook.sums:
                if name not in self._sums:
                    self._sums[name] = torch.zeros(3, self._classes, moments.shape[1], dtype=torch.float64)
                self._sums[name][0, label] += hook.count
                self._sums[name][1:, label] += moments.double().cpu()
            hook.sums.clear()

    def result(self, labels: Sequence[int]) -> ClassStatistics:
        """Means and variances of these classes; NaN for the others."""
        found = {}
        for name, (counts, first, second) in self._sums.items():
            shift = first / counts
            running_mean = self._hooks[name].running_mean
            variances = (second / counts - shift.square()).clamp_min(0)
            found[name] = torch.stack([running_mean.cpu() + shift, variances]).to(running_mean.dtype)
            if not found[name][:, labels].isfinite().all():
                raise InputError(f"activations of the teacher overflow at BatchNorm layer {name!r} for some of the real images")
        return found


def _decoded(data: ImageSet, indices: Sequence[int], skipped: dict[str, str] | None) -> Tensor:
    """Those images, [n, C, S, S] uint8, without those that are skipped."""
    known = skipped or {}
    wanted = [index for index in indices if data.name(index) not in known]
    try:
        return data.load(wanted) if wanted else torch.empty(0)
    except BadImageError as error:
        if skipped is None:
            raise InputError(f"{error}; statistics of classes are taken from all images, with --skip-bad-images from all others") from error
    return torch.cat([*_one_by_one(data, wanted, skipped)] or [torch.empty(0)])


def _one_by_one(data: ImageSet, indices: Sequence[int], skipped: dict[str, str]) -> Iterator[Tensor]:
    """The images that can be decoded, [1, C, S, S] each; the others join those that are skipped."""
    for index in indices:
        try:
            yield data.load([index])
        except BadImageError as error:
            skipped[data.name(index)] = error.cause


def aims(statistics: Sequence[ClassStatistics], labels: Sequence[int]) -> list[dict[str, Tensor]]:
    """What each teacher matches in a batch of one class: [2, C] for each layer by its name, means and variances.

    Raises:
        InputError: the batch holds several classes.
    """
    found = sorted(set(labels))
    if len(found) > 1:
        more = ", …" if len(found) > 2 else ""
        raise InputError(
            f"statistics 'class' need batches of one class, got one of classes {found[0]}, {found[1]}{more}; order the images by class, "
            "and set batch_size to the images of each"
        )
    return [{name: each[:, found[0]] for name, each in own.items()} for own in statistics]


def check_statistics(
    statistics: Sequence[ClassStatistics],
    sizes: Sequence[Mapping[str, int]],  # of each teacher: the channels of each layer that is matched
    labels: Tensor,  # classes that are needed
    classes: int,
) -> None:
    """Raise InputError unless these are statistics of those teachers."""
    given = [type(own).__name__ for own in statistics] if isinstance(statistics, (list, tuple)) else type(statistics).__name__
    if isinstance(given, str) or len(given) != len(sizes) or not all(isinstance(own, Mapping) for own in statistics):
        got = given if isinstance(given, str) else f"[{', '.join(given)}]"
        raise InputError(f"class_statistics must be a list of one mapping for each of {len(sizes)} teachers, got {got}")
    needed = labels.unique().cpu()
    for own, channels in zip(statistics, sizes, strict=True):
        for name, count in channels.items():
            each, wanted = own.get(name), (2, classes, count)
            if not isinstance(each, Tensor):
                raise InputError(f"class_statistics lack BatchNorm layer {name!r}; they are those of another teacher")
            if tuple(each.shape) != wanted:
                raise InputError(f"class_statistics of BatchNorm layer {name!r} must be {list(wanted)}, got shape {tuple(each.shape)}")
            some = each[:, needed]
            if not some.isfinite().all() or (some[1] < 0).any():
                raise InputError(f"class_statistics of BatchNorm layer {name!r} are not finite, or hold negative variances")

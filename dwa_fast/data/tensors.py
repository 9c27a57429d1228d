"""Distilled sets in the format of DC, DSA, DM, MTT, DATM, IDC and their descendants: tensors of normalised images and labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwa_fast.config import Normalisation
from dwa_fast.data.pixels import denormalise
from dwa_fast.errors import InputError
from dwa_fast.io.torch_files import read_archive, write_archive

IMAGES_FILE, LABELS_FILE = "images_best.pt", "labels_best.pt"  # MTT's names
_WHAT = "file of tensors"
_ROUNDING = 0.5 / 255  # tolerance outside [0, 1] within which a pixel still rounds to a valid level


def write_tensors(
    folder: Path,
    images: Tensor,  # [N, C, H, W] float32, normalised
    labels: Tensor,  # [N] int64
) -> None:
    """Write MTT's pair of files: images_best.pt and labels_best.pt."""
    write_archive(folder / IMAGES_FILE, images)
    write_archive(folder / LABELS_FILE, labels)


def read_tensors(paths: Sequence[Path], experiment: int | None = None) -> tuple[Tensor, Tensor, int | None]:
    """Images and labels of a distilled set, in any of the formats of this family.

    Two files hold one tensor each (MTT, DATM; given images_X.pt alone, labels_X.pt is read too), or one file holds [images, labels]
    (IDC), or a dictionary whose 'data' is a list of such pairs, one for each experiment (DC, DSA, DM).

    Args:
        experiment: which pair of several, from 0.
    Returns:
        images [N, C, H, W] float32, normalised; labels [N] int64; number of classes if the labels were soft (the argmax is returned), else
        None.
    Raises:
        InputError: a file cannot be read safely, has another content, or has several experiments and none was chosen.
    """
    if len(paths) == 1 and paths[0].name.startswith("images") and (beside := _labels_beside(paths[0])).is_file():
        paths = [paths[0], beside]
    if len(paths) > 2:
        raise InputError(f"a set of tensors is one file, or one of images and one of labels; got {len(paths)}")
    content = [read_archive(path, _WHAT) for path in paths]
    if len(content) == 2:
        pair = content
    elif isinstance(content[0], dict) and isinstance(content[0].get("data"), list):
        pair = _experiment(paths[0], content[0]["data"], experiment)
    else:
        pair = content[0]
    if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
        raise InputError(
            f"{_WHAT} {paths[0]} holds {_described(content[0])}; expected images and labels: two files of a tensor each, "
            "a list of both, or a dictionary with such lists under 'data'"
        )
    return _checked(paths[0], pair[0].detach(), pair[1].detach())


def as_pixels(
    images: Tensor,  # [N, C, H, W], normalised
    normalisation: Normalisation,
    *,
    clip: bool = False,
) -> tuple[Tensor, str]:
    """Undo the normalisation.

    Args:
        clip: clamp values outside [0, 1], which methods that never clamp their images produce.
    Returns:
        pixels [N, C, H, W] in [0, 1], and a message on the clamped values; empty if there were none.
    Raises:
        InputError: the images have another number of channels, lie in [0, 1] already, or lie outside it after denormalising without `clip`.
    """
    if images.shape[1] != normalisation.channels:
        raise InputError(f"the images have {images.shape[1]} colour channels, but mean and std have values for {normalisation.channels}")
    low, high = images.aminmax()
    identity = set(normalisation.mean) == {0} and set(normalisation.std) == {1}
    if not identity and low >= 0 and high <= 1:
        plain = " ".join("0" * normalisation.channels), " ".join("1" * normalisation.channels)
        raise InputError(
            f"the values lie between {low:.3g} and {high:.3g}, as pixels do that are not normalised; "
            f"if that is what they are, pass --mean {plain[0]} --std {plain[1]}"
        )
    pixels = denormalise(images, normalisation)
    outside = (pixels < -_ROUNDING) | (pixels > 1 + _ROUNDING)
    if not outside.any():
        return pixels.clamp(0, 1), ""
    share = 100 * float(outside.double().mean())
    found = f"{share:.3g} % of the values lie outside of [0, 1] without the normalisation, from {pixels.min():.3g} to {pixels.max():.3g}"
    if not clip:
        raise InputError(
            f"{found}; mean and std are others than those that the images were made with, they are whitened (ZCA), or their method never "
            "clamped them: then --clip cuts them"
        )
    return pixels.clamp(0, 1), f"{found}, and were cut"


def _labels_beside(path: Path) -> Path:
    return path.with_name("labels" + path.name.removeprefix("images"))


def _experiment(path: Path, pairs: list[Any], experiment: int | None) -> Any:
    if experiment is None and len(pairs) != 1:
        raise InputError(f"{_WHAT} {path} holds {len(pairs)} experiments; choose one with --experiment, from 0")
    number = experiment or 0
    if number >= len(pairs):
        raise InputError(f"{_WHAT} {path} holds {len(pairs)} experiments, got --experiment {number}; they are counted from 0")
    return pairs[number]


def _checked(path: Path, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int | None]:
    place = f"{_WHAT} {path}"
    for part in (images, labels):
        if part.is_nested or part.layout != torch.strided or part.device.type != "cpu":
            raise InputError(f"{place} holds no plain tensors with values")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3] or images.numel() == 0:
        raise InputError(f"{place} holds images of shape {tuple(images.shape)}; expected [N, C, S, S] with 1 or 3 channels")
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        kind = "NaN or infinite values" if images.is_floating_point() else str(images.dtype)
        raise InputError(f"{place} holds images of {kind}; expected finite floating point, normalised")
    soft = labels.shape[1] if labels.dim() == 2 and labels.numel() else None
    if soft and not bool(labels.isfinite().all()):
        raise InputError(f"{place} holds soft labels that are not finite")
    if soft:
        labels = labels.argmax(1)
    if labels.dim() != 1 or len(labels) != len(images):
        raise InputError(f"{place}: {len(images)} images, but labels of shape {tuple(labels.shape)}; expected one for each")
    numbers = labels.to(torch.int64)
    if labels.dtype == torch.bool or labels.is_complex() or not torch.equal(numbers.to(labels.dtype), labels) or int(numbers.min()) < 0:
        raise InputError(f"{place} holds labels that are no numbers of classes, from 0")
    return images.float(), numbers, soft


def _described(content: Any) -> str:
    if isinstance(content, Tensor):
        return f"a tensor of shape {tuple(content.shape)} and no labels"
    if isinstance(content, dict):
        return f"a dictionary with the keys {', '.join(repr(key) for key in list(content)[:5])}"
    if isinstance(content, (list, tuple)):
        return f"a {type(content).__name__} of {len(content)}"
    return type(content).__name__

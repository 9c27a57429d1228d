"""Soft labels in SRe2L's FKD format: `epoch_0/batch_0.tar` and so on, each a list of the crops, flips, mix and logits of one batch.

The files do not name the images. SRe2L's reader takes them in the order of a RandomSampler whose generator is seeded once with 42, over
torchvision's ImageFolder; LPLD's in that of a JSON file; G-VBSM's files hold a list of their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from dwa_fast.config import ValidationConfig
from dwa_fast.data.augment import Mix, Views
from dwa_fast.data.images import FileSet, ImageSet
from dwa_fast.data.loader import BatchPlan
from dwa_fast.errors import InputError

FIRST_EPOCH = "epoch_0"
IMAGE_ORDER = "sampler_indices_epoch.json"  # of LPLD: {"0": [17, 3, …], …}, the images of the batches of each epoch, one after the other
_SEED = 42  # hard-coded in SRe2L's reader
_PLAIN, _WITH_INDICES = 6, 7  # elements of SRe2L's and of G-VBSM's files
_WHOLE = 0.01  # pixels that the edge of a crop may lie beside a whole one: it is stored as float32


def check_fkd_settings(config: ValidationConfig) -> None:
    """Check that the views of a training are of the kind that FKD files hold.

    Raises:
        InputError: they are not.
    """
    for name, value in (("augmentation", "resized-crop"), ("shuffle_cells", 1), ("rand_augment", 0)):
        if getattr(config, name) != value:
            flag = f"--{name.replace('_', '-')} {value}"
            raise InputError(f"FKD files hold resized crops, flips and mixes alone, got {name} {getattr(config, name)!r}; pass {flag}")


def folder_order(data: ImageSet) -> list[int]:
    """The images of a set in the order of torchvision's ImageFolder, in which programs of SRe2L's family number them.

    Images in memory come class after class.

    Raises:
        InputError: the folder holds other images than the set, since some were left out.
    """
    if not isinstance(data, FileSet):
        return data.labels.argsort(stable=True).tolist()
    from torchvision.datasets import ImageFolder  # imported late: torchvision loads Triton, which importing dwa_fast must not

    prefix = os.path.join(data.folder, "")
    try:
        found = [path.removeprefix(prefix) for path, _ in ImageFolder(str(data.folder)).samples]
    except OSError as error:
        raise InputError(f"torchvision's ImageFolder, which orders the images of FKD files, cannot read {data.folder}: {error}") from error
    places = {name: place for place, name in enumerate(data.files)}
    if places.keys() != set(found):
        raise InputError(
            f"FKD files are for all images of a folder, got {len(places)} of the {len(found)} in {data.folder}; "
            "dwa-fast export --to folders --ipc copies the first images of each class into a folder of their own"
        )
    return [places[name] for name in found]


class ImageOrder:
    """The order of the images in each epoch, as their numbers in ImageFolder: what PyTorch's own RandomSampler gives."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._restart()

    def _restart(self) -> None:
        self._sampler = RandomSampler(range(self._count), generator=torch.Generator().manual_seed(_SEED))
        self._drawn, self._last = -1, list[int]()

    def epoch(self, number: int) -> list[int]:
        """The order of an epoch, counted from 0. An earlier one than the last begins anew."""
        if number < self._drawn:
            self._restart()
        while self._drawn < number:
            self._last = list(self._sampler)  # to the end, where it draws another permutation that no one sees
            self._drawn += 1
        return self._last


def to_record(
    plan: BatchPlan,
    side: int,  # height and width of the images
    numbers: Tensor | None = None,  # [B] int64: of the images, in the order of ImageFolder
) -> list[Any]:
    """The content of an FKD file: plain types, so that `torch.load(weights_only=True)` reads it, which refuses SRe2L's NumPy integers."""
    views, mix = plan.views, plan.mix
    assert views.boxes is not None
    assert plan.logits is not None
    top, bottom, left, right = mix.box or (0, 0, 0, 0)
    mixed = [mix.partner, mix.share, [top, left, bottom, right] if mix.box else None] if mix.partner is not None else [None] * 3
    record = [(views.boxes.double() / side).float(), views.flipped, *mixed, plan.logits]
    return record if numbers is None else [*record, numbers]


def from_record(
    content: Any,
    side: int,
    classes: int,
) -> tuple[Views, Mix, Tensor, Tensor | None]:
    """Views, mix, logits and, where an FKD file has them, the numbers of the images, from its content.

    Raises:
        ValueError: it is none, with what is wrong as a clause, such as "holds logits that are not finite".
    """
    if not isinstance(content, list) or len(content) not in (_PLAIN, _WITH_INDICES):
        found = f"{len(content)} elements" if isinstance(content, list) else f"a {type(content).__name__}"
        raise ValueError(f"holds {found}, expected a list of {_PLAIN} as SRe2L writes it, or of {_WITH_INDICES} as G-VBSM does")
    crops, flipped, partner, share, box, logits = content[:_PLAIN]
    count = len(flipped) if _is_tensor(flipped, torch.bool, (None,)) else -1
    for name, value, dtypes, shape in (
        ("flips", flipped, torch.bool, (None,)),
        ("crops", crops, torch.float32, (count, 4)),
        ("logits", logits, (torch.float16, torch.float32), (count, None)),
        ("partners", partner, torch.int64, (count,)),
        ("image numbers", (content[_PLAIN:] or [None])[0], torch.int64, (count,)),
    ):
        if not (_is_tensor(value, dtypes, shape) or (value is None and name in ("partners", "image numbers"))):
            raise ValueError(f"holds {name} of a wrong type or shape")
    if logits.shape[1] != classes:
        raise ValueError(f"holds logits of {logits.shape[1]} classes, the set has {classes}")
    if not bool(logits.isfinite().all()):
        raise ValueError("holds logits that are not finite")
    views = Views(boxes=_whole_boxes(crops, side), flipped=flipped)
    return views, _mix(partner, share, box, count, side), logits, (content[_PLAIN:] or [None])[0]


def _is_tensor(value: Any, dtypes: torch.dtype | tuple[torch.dtype, ...], shape: Sequence[int | None]) -> bool:
    """Whether this is an ordinary tensor of one of the types and of a shape, in which None is any number."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and value.dtype in (dtypes if isinstance(dtypes, tuple) else (dtypes,))
        and value.dim() == len(shape)
        and all(wanted is None or own == wanted for own, wanted in zip(value.shape, shape, strict=True))
    )


def _whole_boxes(crops: Tensor, side: int) -> Tensor:
    """Crops in pixels, which were whole before they were divided by the side: [B, 4] int16."""
    pixels = crops.double() * side
    whole = pixels.round()
    top, left, height, width = whole.unbind(1)
    if not bool(((whole >= 0).all(1) & (height > 0) & (width > 0) & (top + height <= side) & (left + width <= side)).all()):
        raise ValueError(f"holds crops outside the image of {side} × {side} pixels")
    if not bool(((pixels - whole).abs() <= _WHOLE).all()):
        raise ValueError(f"holds crops that are no whole pixels of {side} × {side}; its labels are for images of another size")
    return whole.to(torch.int16)


def _mix(partner: Tensor | None, share: Any, box: Any, count: int, side: int) -> Mix:
    if partner is None:
        if share is not None or box is not None:
            raise ValueError("holds a mix without partners")
        return Mix()
    if not bool(((partner >= 0) & (partner < count)).all()):
        raise ValueError(f"holds partners outside the batch of {count}")
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"holds a mix of share {share!r}, expected 0 to 1")
    if box is None:
        return Mix(partner, float(share))
    if not (isinstance(box, (list, tuple)) and len(box) == 4 and all(isinstance(edge, int) for edge in box)):
        raise ValueError("holds a CutMix box that is not four integers")
    top, left, bottom, right = box
    if not (0 <= top <= bottom <= side and 0 <= left <= right <= side):
        raise ValueError(f"holds the CutMix box {list(box)} outside the image of {side} × {side} pixels")
    return Mix(partner, float(share), (top, bottom, left, right))

"""A contact sheet of a set that grows while the set is made."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dwa_fast.io.files import atomic_write
from dwa_fast.io.pictures import mosaic
from dwa_fast.sets.store import BatchSpec, ImageStore

PREVIEW = "preview.png"
_CLASSES, _IMAGES = 10, 10  # at most: the first ones
_MISSING = 128  # grey
_SIDE = 64  # pixels on the sheet, to which smaller images are enlarged by a whole number


class Preview:
    """preview.png beside the images of a set: a row per class, a column per image, enlarged if small; grey where there is none yet."""

    def __init__(self, store: ImageStore, shape: tuple[int, int, int], ipc: int) -> None:
        """Nothing is drawn yet; `shape` is that of an image, [C, H, W]."""
        self._store = store
        self._rows, self._columns = min(len(store.class_names), _CLASSES), min(ipc, _IMAGES)
        self._shape = shape

    def shows(self, batch: BatchSpec) -> bool:
        """Whether an image of this batch is on the sheet."""
        return any(label < self._rows and index < self._columns for label, index in batch.images)

    def draw(self) -> None:
        """Write the sheet with every image that is in the folder by now, whoever made it."""
        tiles = [self._tile(*divmod(place, self._columns)) for place in range(self._rows * self._columns)]
        sheet = mosaic(torch.stack(tiles), self._columns, max(1, _SIDE // max(self._shape[1:])))
        with atomic_write(self._store.folder / PREVIEW) as target:
            Image.fromarray(sheet.numpy()).save(target, format="PNG")

    def _tile(self, label: int, index: int) -> Tensor:
        """An image as [C, H, W] uint8."""
        try:
            content = io.BytesIO((self._store.root / self._store.name(label, index)).read_bytes())
            with Image.open(content, formats=("PNG", "JPEG")) as image:
                pixels = torch.from_numpy(np.array(image))
            return pixels.view(self._shape[1], self._shape[2], self._shape[0]).permute(2, 0, 1)
        except Exception:  # not there yet, or damaged, in one of the dozen ways that Pillow knows, and still to be made again
            return torch.full(self._shape, _MISSING, dtype=torch.uint8)

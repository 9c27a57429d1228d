"""Checksum of a set of images."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from dwa_fast.data.images import FileSet, ImageSet
from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum

_MOST_BYTES = 2**24  # pixels that are hashed; in larger sets evenly spaced images stand for all


def image_digest(data: ImageSet) -> str:
    """SHA-256 of the labels, class names, image names and images of a set; of a large set, evenly spaced images.

    Files are hashed as they are, even if they cannot be decoded.

    Raises:
        InputError: a file cannot be read.
    """
    count = len(data.labels)
    hashed = max(1, min(count, _MOST_BYTES // math.prod(data.image_shape)))
    names = [data.name(index) for index in range(count)]
    header: list[Any] = [names, data.labels.tolist(), data.class_names, data.image_shape]
    if isinstance(data, FileSet) and data.resize not in (None, data.size):
        header.append(data.resize)
    total = hashlib.sha256(json.dumps(header).encode())
    for part in torch.linspace(0, count - 1, hashed).round().to(torch.int64).split(256):
        total.update(_content(data, part.tolist()))
    return total.hexdigest()


def _content(data: ImageSet, indices: Sequence[int]) -> bytes:
    if not isinstance(data, FileSet):
        return data.load(indices).numpy().tobytes()
    sums = []
    for index in indices:
        path = data.folder / data.files[index]
        try:
            sums.append(checksum(path))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return "".join(sums).encode()

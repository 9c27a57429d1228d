"""Decodes image files as square uint8 pixels, as torchvision's loader does."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dwa_fast.errors import InputError

T = TypeVar("T")

_THREADS = 8

# The formats behind torchvision's IMG_EXTENSIONS, and GIF, which hides behind them. Pillow knows more; its EPS reader starts Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_TIFF_BITS = 258  # the tag BitsPerSample
_DAMAGE = (None, errno.EINVAL, errno.EOVERFLOW)  # errno of OSErrors that mean a damaged file: Pillow's own, and invalid offsets
_NARROWEST = 100  # largest aspect ratio; beyond it the resized image would be huge and its centre a sliver


class Readers:
    """Threads that decode images. A forked process, which has none of its parent's threads, gets its own."""

    def __init__(self) -> None:
        self._start()
        os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="reader")

    def map(self, function: Callable[..., T], *values: Iterable[Any]) -> Iterator[T]:
        """As `Executor.map`; the calls must not wait for one another."""
        return self._pool.map(function, *values)


READERS = Readers()  # the only pool that decodes images


class BadImageError(InputError):
    """A file that is not a complete image and may be skipped. A file that cannot be opened raises a plain InputError instead."""

    def __init__(self, file: Path, cause: str) -> None:
        super().__init__(f"{file} is no image that can be read: {cause}")
        self.cause = cause


def decode(file: Path, size: int, channels: int, *, resize: int | None = None, keep_aspect: bool = True) -> Tensor:
    """One image file as [C, size, size] uint8: the shorter side resized to `resize` (default: `size`), then a centre crop.

    With `keep_aspect=False` the whole image is resized to `size` × `size` instead, as DWA's released script does.

    Colours are as in torchvision's default loader: CMYK converted by Pillow, no EXIF rotation, no colour profile, the first frame of an
    animation. Two differences, where that loader gives garbage: transparent pixels are blended with white, and 16-bit grey is scaled to
    8 bits.

    Raises:
        BadImageError: the file is not an image, damaged, too large, or has an unknown range of values.
        InputError: the file cannot be opened or read.
    """
    picture = _read(file, channels)
    shorter = resize or size
    if picture.size != (size, size) or shorter != size:
        from torchvision.transforms.v2 import functional  # imported late: torchvision loads Triton, which importing dwa_fast must not

        picture = functional.resize(picture, [shorter] if keep_aspect else [size, size], antialias=True)
        picture = functional.center_crop(picture, [size, size])
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return pixels.view(size, size, channels).permute(2, 0, 1)


def check_image(file: Path, channels: int) -> None:
    """Raise what `decode` would raise for this file, but faster: a JPEG is read completely and decoded at an eighth of its size."""
    _read(file, channels, smallest=True)


def _read(file: Path, channels: int, *, smallest: bool = False) -> Image.Image:
    """Open an image in grey or RGB; `smallest`: at the smallest size that the format gives for free."""
    try:
        with open(file, "rb") as stream, Image.open(stream, formats=_FORMATS) as image:
            if max(image.size) > _NARROWEST * min(image.size):
                raise ValueError(f"it has {image.width} × {image.height} pixels, too narrow for a square")
            if smallest:
                image.draft(None, (1, 1))
            return _eight_bits(image).convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError as error:
        empty = file.stat().st_size == 0
        raise BadImageError(file, "it is empty" if empty else f"it is in none of the formats {', '.join(_FORMATS)}") from error
    except MemoryError as error:
        raise InputError(f"{file} does not fit into memory") from error
    except Exception as error:  # Pillow raises many types for damaged files
        if isinstance(error, OSError) and error.errno not in _DAMAGE:  # from the system: the file may be intact
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
        message = str(error).strip()
        raise BadImageError(file, message.splitlines()[0] if message else "it is damaged") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image in a mode that Pillow converts correctly to grey or RGB: no transparency, at most 8 bits per channel.

    Raises:
        ValueError: 32-bit pixels, whose range is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, (16,))[0]
        levels = np.asarray(image).astype(np.float32) * (255 / (2**bits - 1))
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}), and their range is not known")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    return image

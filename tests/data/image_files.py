"""What the tests of data sets and of folders share: small image files in class folders."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dwa_fast.config import DataConfig

FOLDER = DataConfig(layout="folder", size=8)


def write_image(path: Path, colour: int | tuple[int, ...] = (255, 0, 51), size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)


def classes(folder: Path, *names: str) -> None:
    """A class folder each, with an image whose level says which."""
    for number, name in enumerate(names):
        write_image(folder / name / "0.png", (20 * number, 0, 0))

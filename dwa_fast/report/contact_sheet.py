"""Contact sheets: the first images of the classes of several sets, side by side."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from dwa_fast.errors import escape_control_chars
from dwa_fast.io.files import atomic_write
from dwa_fast.io.pictures import GAP, mosaic

_NAME_LENGTH = 24  # longest class name, in characters
_PANEL_INCHES = 3.2
_LETTERS_PER_INCH = 9  # of a title, at most


def write_contact_sheet(
    path: Path,
    panels: Mapping[str, Tensor],  # title → [classes × columns, C, H, W] uint8, class after class
    class_names: Sequence[str],
) -> None:
    """Write a PNG with a panel per set, side by side, and a row per class."""
    from matplotlib.figure import Figure

    sheets = {title: mosaic(images, len(images) // len(class_names)) for title, images in panels.items()}
    height, width = next(iter(sheets.values())).shape[:2]
    figure = Figure(figsize=(_PANEL_INCHES * len(sheets), _PANEL_INCHES * height / width + 0.5), layout="constrained")
    for number, (axis, (title, sheet)) in enumerate(zip(figure.subplots(1, len(sheets), squeeze=False)[0], sheets.items(), strict=True)):
        axis.imshow(sheet.numpy(), interpolation="nearest")
        axis.set_title(textwrap.fill(title, int(_LETTERS_PER_INCH * _PANEL_INCHES)), parse_math=False)
        axis.set_xticks([])
        step = (height + GAP) / len(class_names)
        axis.set_yticks([step * (row + 0.5) - GAP / 2 for row in range(len(class_names))] if number == 0 else [])
        if number == 0:
            axis.set_yticklabels([_short(name) for name in class_names], parse_math=False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    with atomic_write(path) as target, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box in a label is fine
        figure.savefig(target, format="png", dpi=150)


def _short(name: str) -> str:
    """A class name as a label: control characters escaped, long names cut."""
    name = escape_control_chars(name)
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"

"""A distilled set on disk: one PNG per image in class folders, and a manifest that says how they came to be."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dwa_fast._version import __version__
from dwa_fast.errors import InputError
from dwa_fast.files import checksum, output_folder, replacing, write_json

MANIFEST = "manifest.json"
_FORMAT = 1


def image_name(label: int, index: int, classes: int) -> str:
    """Path of one image inside a set, as the published code names it; class numbers get more digits beyond a thousand classes."""
    digits = max(3, len(str(classes - 1)))
    return f"new{label:0{digits}d}/class{label:0{digits}d}_id{index:03d}.png"


class ImageStore:
    """Writes a set and knows which of its images are there. The manifest names an image only once its file is whole."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], class_names: Sequence[str]) -> None:
        """Open a folder, or go on with the set in it.

        Args:
            settings: everything that the images depend on; JSON values.
        Raises:
            InputError: the folder cannot be written, or holds a set of other settings.
        """
        self.folder = output_folder(folder)
        self.class_names = list(class_names)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.checksums: dict[str, str] = {}
        self.skipped: dict[str, str] = {}  # real images that could not be used, and why
        self.complete = False
        if (folder / MANIFEST).exists():
            self._resume(read_manifest(folder))
        self._write_manifest()

    def has(self, label: int, index: int) -> bool:
        """Whether that image is there, whole."""
        name = image_name(label, index, len(self.class_names))
        return name in self.checksums and (self.folder / name).is_file() and checksum(self.folder / name) == self.checksums[name]

    def write(
        self,
        pixels: Tensor,  # [n, C, H, W] in [0, 1]
        labels: Sequence[int],
        index: int,
    ) -> None:
        """Write image `index` of each of these classes, then the manifest."""
        levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        for image, label in zip(levels, labels, strict=True):
            name = image_name(label, index, len(self.class_names))
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as target:
                _picture(image).save(target, format="PNG")
            self.checksums[name] = checksum(path)
        self._write_manifest()

    def finish(self) -> None:
        """Say in the manifest that the set is complete."""
        self.complete = True
        self._write_manifest()

    def _resume(self, manifest: Mapping[str, Any]) -> None:
        before = manifest["settings"]
        changed = [key for key in sorted({*before, *self.settings}) if before.get(key) != self.settings.get(key)]
        if changed:
            shown = "; ".join(f"{key} was {before.get(key)!r}, is {self.settings.get(key)!r}" for key in changed)
            raise InputError(f"{self.folder} holds a set made with other settings ({shown}); choose another folder")
        self.checksums = dict(manifest["images"])
        self.skipped = dict(manifest.get("skipped", {}))

    def _write_manifest(self) -> None:
        content = {
            "format": _FORMAT,
            "complete": self.complete,
            "versions": {
                "dwa_fast": __version__,
                "torch": torch.__version__,
                "torchvision": metadata.version("torchvision"),
                "python": platform.python_version(),
            },
            "settings": self.settings,
            "class_names": self.class_names,
            "skipped": dict(sorted(self.skipped.items())),
            "images": dict(sorted(self.checksums.items())),
        }
        write_json(self.folder / MANIFEST, content)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a set.

    Raises:
        InputError: it is not there or not ours.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {MANIFEST}; it is not a set written by dwa-fast") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or not isinstance(content.get("images"), dict):
        raise InputError(f"{path} is no manifest of format {_FORMAT}")
    return content


def _picture(
    levels: Tensor,  # [C, H, W] uint8
) -> Image.Image:
    array = levels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)

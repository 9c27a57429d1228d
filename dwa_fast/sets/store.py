"""A distilled set on disk: images in class folders below `images/`; beside it their losses and a manifest of settings and checksums."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dwa_fast._version import __version__
from dwa_fast.config import StorageConfig
from dwa_fast.data.manifest import content_check, image_name, read_manifest
from dwa_fast.data.set_layout import FORMAT, IMAGES, MANIFEST, NOTE, NOTE_TEXT, is_set, set_folder
from dwa_fast.errors import InputError
from dwa_fast.io.files import atomic_write, checksum, is_left_over, output_folder, read_json, sync_folder, write_json
from dwa_fast.io.settings import difference
from dwa_fast.sets import loss_log as log_file

BATCH_FILES = ".batch-*.json"  # one per finished batch, until the manifest includes it
_THREADS = 8  # that compress, write or check the images of a set

log = logging.getLogger("dwa_fast")


@dataclass(frozen=True)
class BatchSpec:
    """One batch: an image for each label. Those of a class are image `index`, `index` + 1, … of it."""

    number: int  # picks the random streams
    index: int
    labels: list[int]

    @property
    def images(self) -> list[tuple[int, int]]:
        """Label and index of each image."""
        return [(label, self.index + self.labels[:place].count(label)) for place, label in enumerate(self.labels)]


class ImageStore:
    """Writes a set batch by batch and finds the batches that are missing.

    Each finished batch has an entry in a small file of its own, until `finish` moves all entries into the manifest. Several processes may
    write one set: a batch has the same bytes whoever writes it, and any process that finds every batch there may complete the set.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        class_names: Sequence[str],
        storage: StorageConfig | None = None,
        teachers: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Start a set, or resume the one in the folder.

        Args:
            folder: of the set, or its `images/`.
            settings: everything else that the images depend on; JSON values.
            storage: how images and losses are written.
            teachers: architecture and accuracy of each, for readers of the manifest; its settings have their checksums.
        Raises:
            InputError: the folder cannot be written, or holds a set of other settings.
        """
        self.folder = output_folder(set_folder(folder))
        self.class_names = list(class_names)
        self.storage = storage or StorageConfig()
        self.settings: dict[str, Any] = json.loads(json.dumps({**self.storage.describe(), **settings}))
        self._teachers = list(map(dict, teachers))
        self.complete = False
        self._images: dict[str, str] = {}  # name → checksum
        self._losses: dict[int, str] = {}  # number of the batch → its lines
        self.skipped: dict[str, str] = {}  # real images that could not be used, and why
        self._whole: set[int] = set()  # batches that this process has written, or found whole
        self._versions = [versions()]  # those that the set was started with, then others that it was resumed with
        if not is_set(self.folder):
            self._write_manifest()
        self._read()  # also what was just written: at the same moment, another process may have started a set of other settings

    @property
    def root(self) -> Path:
        """Folder of the class folders."""
        return self.folder / IMAGES

    def unfinished(self, batches: Iterable[BatchSpec]) -> list[BatchSpec]:
        """Those batches whose losses or any of whose images are missing or damaged."""
        unknown = [batch for batch in batches if batch.number not in self._whole]
        with ThreadPoolExecutor(_THREADS) as pool:
            whole = pool.map(self._is_whole, unknown)
            self._whole |= {batch.number for batch, good in zip(unknown, whole, strict=True) if good}
        return [batch for batch in unknown if batch.number not in self._whole]

    def without_losses(self, batches: Iterable[BatchSpec]) -> list[BatchSpec]:
        """Those batches whose images are all there, and whose losses alone are missing or damaged."""
        return [batch for batch in batches if self._has_images(batch) and not self._has_losses(batch)]

    def begin(self) -> None:
        """Mark the set as incomplete in its manifest, and remove temporary files of processes that died."""
        self._tidy()
        if versions() not in self._versions:
            log.warning("%s was started with %s; the remaining images may differ in their last bits", self.folder, self._versions[0])
            self._versions.append(versions())
        elif not self.complete:
            return
        self.complete = False
        self._write_manifest()

    def write(
        self,
        batch: BatchSpec,
        levels: Tensor | Sequence[bytes],  # [n, C, H, W] uint8 on the CPU, in the order of batch.labels; or files, of the set's format
        losses: Tensor | None = None,  # [T, 3] on the CPU
        skipped: Mapping[str, str] | None = None,  # real images that could not be used so far, and why
    ) -> log_file.Rows:
        """Write a batch; when this returns, its images and its entry are on the disk.

        Returns:
            the losses that were kept.
        Raises:
            InputError: the disk is full, the folder is read-only, or the like; the message names the file.
        """
        names = [self.name(label, index) for label, index in batch.images]
        self._make_folders([self.root, *{(self.root / name).parent for name in names}])
        with ThreadPoolExecutor(_THREADS) as pool:
            sums = list(pool.map(self._write_image, names, levels))
        rows = [] if losses is None else log_file.subsample(losses, self.storage.losses_every)
        self.skipped |= skipped or {}
        entry = {
            "batch": batch.number,
            "images": dict(zip(names, sums, strict=True)),
            "losses": log_file.to_jsonl(batch.number, rows),
            "skipped": self.skipped,
        }
        write_json(self.folder / BATCH_FILES.replace("*", f"{batch.number:06d}"), {**entry, "check": self._check(entry)})
        self._include(entry)
        self._whole.add(batch.number)
        return rows

    def finish(self, batches: Iterable[BatchSpec]) -> list[BatchSpec]:
        """Complete the set if all these batches are there, whoever wrote them.

        Returns:
            the batches that are not.
        """
        self._read()
        missing = self.unfinished(batches)
        if missing:
            return missing
        if not self.complete:
            if self._losses:
                with atomic_write(self.folder / log_file.LOSSES) as target:
                    target.write_text(log_file.concat(self._losses.items()), encoding="utf-8")
            self.complete = True
            self._write_manifest()
        for path in self.folder.glob(BATCH_FILES):
            path.unlink(missing_ok=True)
        self._tidy()
        return []

    def _tidy(self) -> None:
        for path in [*self.folder.glob(".*.part"), *self.root.glob("new*/.*.part")]:
            if is_left_over(path):
                path.unlink(missing_ok=True)

    def name(self, label: int, index: int) -> str:
        """Path of an image, below the folder of the class folders."""
        return image_name(label, index, len(self.class_names), "jpg" if self.storage.image_format == "jpeg" else "png")

    def _is_whole(self, batch: BatchSpec) -> bool:
        return self._has_losses(batch) and self._has_images(batch)

    def _has_losses(self, batch: BatchSpec) -> bool:
        return batch.number in self._losses or self.storage.losses_every == 0

    def _has_images(self, batch: BatchSpec) -> bool:
        names = [self.name(label, index) for label, index in batch.images]
        return all(name in self._images and _has_checksum(self.root / name, self._images[name]) for name in names)

    def _make_folders(self, folders: Iterable[Path]) -> None:
        for folder in folders:
            try:
                if not folder.is_dir():
                    folder.mkdir(exist_ok=True)
                    sync_folder(folder.parent)
            except OSError as error:
                raise InputError(f"cannot write {folder}: {error.strerror}") from error

    def _write_image(
        self,
        name: str,
        levels: Tensor | bytes,  # [C, H, W] uint8, or the file
    ) -> str:
        """Write one image and return its checksum."""
        content = levels if isinstance(levels, bytes) else self._encoded(levels)
        with atomic_write(self.root / name, self.folder) as target:  # other programs must not find it half written
            target.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def _encoded(
        self,
        levels: Tensor,  # [C, H, W] uint8
    ) -> bytes:
        buffer = io.BytesIO()
        if self.storage.image_format == "jpeg":
            _picture(levels).save(buffer, format="JPEG", quality=self.storage.jpeg_quality, subsampling=0)
        else:
            _picture(levels).save(buffer, format="PNG")
        return buffer.getvalue()

    def _read(self) -> None:
        """Load the state from the disk: entries first, since they are deleted once the manifest includes them."""
        entries = list(self._entries())
        manifest = read_manifest(self.folder)
        before = manifest["settings"] | {"class_names": manifest["class_names"]}
        now = self.settings | {"class_names": self.class_names}
        if changed := difference(before, now):
            raise InputError(f"{self.folder} holds a set made with other settings ({changed}); choose another folder")
        self._teachers = self._teachers or manifest.get("teachers", [])
        self.complete = manifest["complete"]
        self._versions = [manifest["versions"], *manifest["continued_with"]]
        texts = log_file.read_losses(self.folder)
        wanted = {int(number): digest for number, digest in manifest["losses"].items()}
        good = {number: texts[number] for number in wanted.keys() & texts.keys() if log_file.digest(texts[number]) == wanted[number]}
        self._losses = good | self._losses
        self._images = manifest["images"] | self._images
        self.skipped = manifest["skipped"] | self.skipped
        for entry in entries:
            self._include(entry)

    def _entries(self) -> Iterator[dict[str, Any]]:
        """Every undamaged entry of a batch with these settings; a batch without one is made again."""
        for path in sorted(self.folder.glob(BATCH_FILES)):
            try:
                entry = read_json(path, dict[str, Any])
                good = entry.pop("check") == self._check(entry)
            except (InputError, KeyError):  # damaged; or another process has just completed the set
                continue
            if good:
                yield entry

    def _include(self, entry: Mapping[str, Any]) -> None:
        self._images |= entry["images"]
        self.skipped |= entry["skipped"]
        if entry["losses"]:
            self._losses[entry["batch"]] = entry["losses"]

    def _check(self, entry: Mapping[str, Any]) -> str:
        """Checksum of an entry and of all settings: entries of another set are not used for this one."""
        return content_check([self.settings, self.class_names, entry])

    def _write_note(self) -> None:
        """Make other programs stop if they are given the folder of the set instead of `images/`."""
        note = self.folder / NOTE
        if not note.is_file():
            self._make_folders([note.parent])
            with atomic_write(note, self.folder) as target:
                target.write_text(NOTE_TEXT, encoding="utf-8")

    def _write_manifest(self) -> None:
        self._write_note()
        first, *others = self._versions
        content = {
            "format": FORMAT,
            "complete": self.complete,
            "versions": first,
            "continued_with": others,
            "settings": self.settings,
            **({"teachers": self._teachers} if self._teachers else {}),
            "class_names": self.class_names,
            "skipped": dict(sorted(self.skipped.items())),
            "images": dict(sorted(self._images.items())),
            "losses": {str(number): log_file.digest(text) for number, text in sorted(self._losses.items())},
        }
        write_json(self.folder / MANIFEST, content)


def versions() -> dict[str, str]:
    """Versions of everything that the bits of a set depend on."""
    return {
        "dwa_fast": __version__,
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "python": platform.python_version(),
    }


def _has_checksum(path: Path, wanted: str) -> bool:
    try:
        return checksum(path) == wanted
    except OSError:
        return False


def _picture(
    levels: Tensor,  # [C, H, W] uint8
) -> Image.Image:
    array = levels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)

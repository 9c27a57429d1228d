"""A distilled set on disk: images in class folders below `images/`; beside it the losses, and a manifest that says how they came to be."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
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
from dwa_fast.data.manifest import content_check, holds_images, holds_text, image_name, read_manifest
from dwa_fast.data.set_layout import FORMAT, MANIFEST, NOTE, NOTE_TEXT, is_set, prefix, set_folder
from dwa_fast.errors import InputError
from dwa_fast.io.files import atomic_write, checksum, is_left_over, output_folder, sync_folder, write_json
from dwa_fast.io.settings import difference
from dwa_fast.sets import loss_log as log_file
from dwa_fast.sets.journal import Journal, read_journals, remove_journals

_THREADS = 8  # that compress, write or check the images of a set

log = logging.getLogger("dwa_fast")


@dataclass(frozen=True)
class WorkItem:
    """One batch: image `index` of each of these classes."""

    number: int  # picks the random streams
    index: int
    labels: list[int]


class ImageStore:
    """Writes a set batch by batch, and knows which batches are there.

    What is finished stands in a journal until the set is complete, then in the manifest. Several processes may write one set: what
    they write is the same, whoever writes it, and the last of them to finish writes the manifest.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], class_names: Sequence[str], form: StorageConfig | None = None) -> None:
        """Open a folder, or go on with the set in it.

        Args:
            folder: of the set, or its `images/`.
            settings: everything else that the images depend on; JSON values.
            form: how images and losses are written.
        Raises:
            InputError: the folder cannot be written, or holds a set of other settings.
        """
        self.folder = output_folder(set_folder(folder))
        self.class_names = list(class_names)
        self.form = form or StorageConfig()
        self.settings: dict[str, Any] = json.loads(json.dumps({**self.form.describe(), **settings}))
        self.complete = False
        self._images: dict[str, str] = {}  # name → checksum
        self._losses: dict[int, str] = {}  # number of the batch → its lines
        self.skipped: dict[str, str] = {}  # real images that could not be used, and why
        self._whole: set[int] = set()  # batches that this process has written, or found whole
        self._versions = [versions()]  # those that the set was begun with, then others that it was continued with
        self._digest = content_check([self.settings, self.class_names])
        self._journal = Journal(self.folder, self._digest)
        self._format = FORMAT  # a set that is there keeps its own
        if not is_set(self.folder):
            self._write_manifest()
        self._read()  # also what was just written: at the same moment, another process may have begun a set of other settings

    @property
    def root(self) -> Path:
        """Folder of the class folders."""
        return self.folder / prefix({"format": self._format})

    def unfinished(self, items: Iterable[WorkItem]) -> list[WorkItem]:
        """Those batches of which an image or the losses are not there, whole."""
        asked = [item for item in items if item.number not in self._whole]
        with ThreadPoolExecutor(_THREADS) as pool:
            whole = pool.map(self._is_whole, asked)
            self._whole |= {item.number for item, good in zip(asked, whole, strict=True) if good}
        return [item for item in asked if item.number not in self._whole]

    def begin(self) -> None:
        """Say in the manifest that the set is being worked on, and remove what dead processes have left."""
        self._tidy()
        if versions() not in self._versions:
            log.warning("%s was begun with %s; what is still to be made may differ in its last bits", self.folder, self._versions[0])
            self._versions.append(versions())
        elif not self.complete:
            return
        self.complete = False
        self._write_manifest()

    def write(
        self,
        item: WorkItem,
        levels: Tensor | Sequence[bytes],  # [n, C, H, W] uint8 on the CPU, in the order of item.labels; or files, of the set's format
        losses: Tensor | None = None,  # [T, 3] on the CPU
        skipped: Mapping[str, str] | None = None,  # real images that could not be used so far, and why
    ) -> log_file.Rows:
        """Write a batch; when this returns, it is on the disk and in the journal.

        Returns:
            the losses that were recorded.
        Raises:
            InputError: the disk is full, the folder is read-only, or the like; the sentence names the file.
        """
        names = [self.name(label, item.index) for label in item.labels]
        self._make_folders([self.root, *{(self.root / name).parent for name in names}])
        with ThreadPoolExecutor(_THREADS) as pool:
            sums = list(pool.map(self._write_image, names, levels))
        rows = [] if losses is None else log_file.recorded(losses, self.form.losses_every)
        images = dict(zip(names, sums, strict=True))
        self.skipped |= skipped or {}
        self._journal.append({"item": item.number, "images": images, "losses": rows, "skipped": self.skipped})
        self._images |= images
        if rows:
            self._losses[item.number] = log_file.as_text(item.number, rows)
        self._whole.add(item.number)
        return rows

    def finish(self, items: Iterable[WorkItem]) -> list[WorkItem]:
        """Complete the set if all these batches are there, whoever wrote them.

        Returns:
            the batches that are not.
        """
        self._read()
        left = self.unfinished(items)
        if left:
            return left
        if not self.complete:
            if self._losses:
                with atomic_write(self.folder / log_file.LOSSES) as target:
                    target.write_text(log_file.joined(self._losses.items()), encoding="utf-8")
            self.complete = True
            self._write_manifest()
        self._journal.close()
        remove_journals(self.folder)
        self._tidy()
        return []

    def close(self) -> None:
        """Close the journal; the set can be opened again. Where others have completed it meanwhile, the journal goes."""
        if self._journal.close() and read_manifest(self.folder)["complete"]:
            self._journal.path.unlink(missing_ok=True)

    def _tidy(self) -> None:
        for path in [*self.folder.glob(".*.part"), *self.root.glob("new*/.*.part")]:
            if is_left_over(path):
                path.unlink(missing_ok=True)

    def name(self, label: int, index: int) -> str:
        """Path of an image, below the folder of the class folders."""
        return image_name(label, index, len(self.class_names), "jpg" if self.form.image_format == "jpeg" else "png")

    def _is_whole(self, item: WorkItem) -> bool:
        names = [self.name(label, item.index) for label in item.labels]
        logged = item.number in self._losses or self.form.losses_every == 0
        return logged and all(name in self._images and _has_checksum(self.root / name, self._images[name]) for name in names)

    def _make_folders(self, folders: Iterable[Path]) -> None:
        for folder in folders:
            if folder.is_symlink():
                raise InputError(f"{folder} is a symbolic link; a set is written into folders of its own")
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
        with atomic_write(self.root / name, self.folder) as target:  # half written, it is nothing for other programs to find
            target.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def _encoded(
        self,
        levels: Tensor,  # [C, H, W] uint8
    ) -> bytes:
        buffer = io.BytesIO()
        if self.form.image_format == "jpeg":
            _picture(levels).save(buffer, format="JPEG", quality=self.form.jpeg_quality, subsampling=0)
        else:
            _picture(levels).save(buffer, format="PNG")
        return buffer.getvalue()

    def _read(self) -> None:
        """Take over what the disk says: journals first, since they go when the manifest holds what they say."""
        entries = list(filter(_is_entry, read_journals(self.folder, self._digest)))
        manifest = read_manifest(self.folder)
        self._format = manifest["format"]
        before = manifest["settings"] | {"class_names": manifest["class_names"]}
        now = self.settings | {"class_names": self.class_names}
        if changed := difference(before, now):
            raise InputError(f"{self.folder} holds a set made with other settings ({changed}); choose another folder")
        self.complete = manifest["complete"]
        self._versions = [manifest["versions"], *manifest["continued_with"]]
        texts = log_file.read_losses(self.folder)
        wanted = {int(number): digest for number, digest in manifest["losses"].items()}
        good = {number: texts[number] for number in wanted.keys() & texts.keys() if log_file.digest(texts[number]) == wanted[number]}
        self._losses = good | self._losses
        self._images = manifest["images"] | self._images
        self.skipped = manifest["skipped"] | self.skipped
        for entry in entries:
            self._images |= entry["images"]
            self.skipped |= entry["skipped"]
            if entry["losses"]:
                self._losses[entry["item"]] = log_file.as_text(entry["item"], entry["losses"])

    def _write_note(self) -> None:
        """What makes a program stop that is given the folder of the set in place of that of the images."""
        note = self.folder / NOTE
        if self._format == FORMAT and not note.is_file():
            self._make_folders([note.parent])
            with atomic_write(note, self.folder) as target:
                target.write_text(NOTE_TEXT, encoding="utf-8")

    def _write_manifest(self) -> None:
        self._write_note()
        first, *others = self._versions
        content = {
            "format": self._format,
            "complete": self.complete,
            "versions": first,
            "continued_with": others,
            "settings": self.settings,
            "class_names": self.class_names,
            "skipped": dict(sorted(self.skipped.items())),
            "images": dict(sorted(self._images.items())),
            "losses": {str(number): log_file.digest(text) for number, text in sorted(self._losses.items())},
        }
        write_json(self.folder / MANIFEST, {**content, "check": content_check(content)})


def versions() -> dict[str, str]:
    """Of everything that the bits depend on."""
    return {
        "dwa_fast": __version__,
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "python": platform.python_version(),
    }


def _is_entry(entry: dict[str, Any]) -> bool:
    """Whether an entry of a journal is what `ImageStore.write` puts there."""
    rows = entry.get("losses")
    return (
        entry.keys() == {"item", "images", "losses", "skipped"}
        and type(entry["item"]) is int
        and holds_images(entry["images"])
        and holds_text(entry["skipped"])
        and isinstance(rows, list)
        and all(isinstance(row, list) and [type(value) for value in row] == [int, float, float, float] for row in rows)
    )


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

"""Checks a set against its manifest, file by file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from dwa_fast.data.manifest import IMAGE_NAME, read_manifest
from dwa_fast.data.set_layout import IMAGES, MANIFEST, NOTE, set_folder
from dwa_fast.errors import InputError
from dwa_fast.io.files import checksum, is_left_over, is_temporary, walk_files
from dwa_fast.sets.loss_log import LOSSES, digest, read_losses
from dwa_fast.sets.preview import PREVIEW
from dwa_fast.sets.store import BATCH_FILES
from dwa_fast.training.fkd_store import fkd_index
from dwa_fast.training.label_index import INDEX
from dwa_fast.training.label_store import LabelStore

_EVENTS = "events.out.tfevents.*"  # TensorBoard's
_RESULTS = ("record.json", "students.json")  # a folder with one of them, wherever it lies, is the output of a command that took the set
_THREADS = 8  # that read files


def problems(folder: Path) -> Iterator[str]:
    """What is wrong with a set, one message each; nothing where it is complete and every file as it was written.

    Raises:
        InputError: the folder holds no manifest, or a damaged one.
    """
    yield from damage(folder)
    yield from additions(folder)


def damage(folder: Path) -> Iterator[str]:
    """What the command that made a set makes again: images and losses that are missing or have changed.

    Raises:
        InputError: as `problems`.
    """
    folder = set_folder(folder)
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        yield "the set is not complete; run the command that started it again to resume"
    images = {f"{IMAGES}/{name}": wanted for name, wanted in manifest["images"].items()}
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from filter(None, pool.map(lambda name: _image_problem(folder, name, images[name], manifest["settings"]), images))
    yield from _loss_problems(folder, manifest["losses"])


def additions(folder: Path) -> Iterator[str]:
    """What is wrong beside that: with soft labels in the folder of a set, and files that do not belong to it.

    Raises:
        InputError: as `problems`.
    """
    folder = set_folder(folder)
    manifest = read_manifest(folder)
    known = {MANIFEST, LOSSES, PREVIEW, NOTE, *(f"{IMAGES}/{name}" for name in manifest["images"])}
    apart: set[Path] = set()
    for place in _label_folders(folder):
        try:
            store = fkd_index(place) or LabelStore(place)
        except InputError as error:
            yield str(error)
            apart |= {place} - {folder}
            continue
        known |= {(place / file).relative_to(folder).as_posix() for file in store.files}
        where = "" if place == folder else f"{place.name}: "
        for epoch in store.missing:
            yield f"{where}the soft labels of epoch {epoch} are missing or have changed; the relabel command makes them again"
    yield from _extras(folder, manifest, known, apart)


def _image_problem(folder: Path, name: str, wanted: str, settings: Mapping[str, Any]) -> str | None:
    path = folder / name
    try:
        if checksum(path) == wanted:
            return None
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:  # no other: Pillow's EPS reader starts Ghostscript
            image.load()
            size = [len(image.getbands()), image.height, image.width]
    except Exception:  # Pillow raises a dozen kinds for damaged files
        return f"{name} has changed and is no whole image any more"
    shape = settings.get("image_shape", size)
    return f"{name} has changed" + (f" and has shape {size}, not {shape}" if size != shape else "")


def _loss_problems(folder: Path, wanted: Mapping[str, str]) -> Iterator[str]:
    if wanted and not (folder / LOSSES).is_file():
        yield f"{LOSSES} is missing"
        return
    texts = read_losses(folder)
    for number, text_digest in wanted.items():
        if int(number) not in texts:
            yield f"{LOSSES} has no lines of batch {number}"
        elif digest(texts[int(number)]) != text_digest:
            yield f"{LOSSES}: the lines of batch {number} have changed"
    extra = sorted(texts.keys() - set(map(int, wanted)))
    if extra:
        yield f"{LOSSES} has lines of batch {extra[0]}, which the manifest does not name; remove them"


def _label_folders(folder: Path) -> list[Path]:
    """The folders of soft labels: that of the set, or some beside `images/`."""
    places = [path.parent for path in sorted([*folder.glob(INDEX), *folder.glob(f"*/{INDEX}")])]
    return [place for place in places if place != folder / IMAGES]


def _extras(folder: Path, manifest: Mapping[str, Any], known: set[str], apart: Set[Path]) -> Iterator[str]:
    """Files that do not belong to the set, those in the folders `apart` and in folders of results left out.

    An incomplete set may have images and entries that its manifest does not include yet.
    """
    start = os.path.join(folder, "")
    found: list[tuple[Path, str]] = []
    for entry in walk_files(start):
        path, name = Path(entry.path), entry.path[len(start) :]
        unfinished = not manifest["complete"] and (path.match(BATCH_FILES) or IMAGE_NAME.fullmatch(name.removeprefix(f"{IMAGES}/")))
        if is_left_over(path):
            found.append((path, f"{name} is left over from a process that died; the command that made the set removes it"))
        elif name not in known and not unfinished and not is_temporary(path) and not path.match(_EVENTS):
            found.append((path, f"{name} does not belong to the set; remove it, or move it elsewhere"))
    results = {path.parent for path, _ in found if path.name in _RESULTS and folder / IMAGES not in path.parents}
    apart |= results - {folder}
    yield from (message for path, message in found if apart.isdisjoint(path.parents))

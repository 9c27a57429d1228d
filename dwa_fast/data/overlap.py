"""Warns of held-out images that are the training images themselves: accuracies on them say nothing of new images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dwa_fast.data.digest import image_digest
from dwa_fast.data.images import FileSet, ImageSet
from dwa_fast.io.files import checksum

log = logging.getLogger("dwa_fast")

_COMPARED = 1000  # files whose content is compared, at most


def warn_of_shared_images(train: ImageSet, test: ImageSet) -> None:
    """Warn where held-out files have names and contents of training files.

    Files that cannot be read are not compared.
    """
    if not isinstance(train, FileSet) or not isinstance(test, FileSet) or train.folder == test.folder:
        return
    names = sorted({*train.files} & {*test.files})
    some = names[:: max(1, -(-len(names) // _COMPARED))]
    shared = [name for name in some if _same(train, test, name)]
    if shared:
        log.warning(
            "%s: %d of %d held-out images that were compared are training images too, such as %s; "
            "accuracies on them say nothing of new images",
            *(test.folder, len(shared), len(some) if len(some) < len(names) else len(test.files), shared[0]),
        )


def warn_if_made_from(settings: Mapping[str, Any], test: ImageSet) -> None:
    """Warn where a set with these settings was made from the held-out images."""
    digest = settings.get("real_images_digest")
    if digest is not None and digest == image_digest(replace(test, resize=None) if isinstance(test, FileSet) else test):
        log.warning("the distilled set was made from these very held-out images; accuracies on them say nothing of new images")


def warn_if_seen(settings: Mapping[str, Any], key: str, what: str, train: ImageSet, share: float) -> None:
    """Warn where something was made from other real images than those that are left when a share of them is held out.

    Args:
        settings: that it was made with; `key`: where they have the checksum of the real images.
        what: it is, for the reader.
        train: what is left of the training images.
    """
    digest = settings.get(key)
    if digest is not None and digest != image_digest(train):
        log.warning(
            "%s was not made from the training images that are left where a share of %g is held out, and may have seen the held-out ones; "
            "accuracies on them say nothing of new images. Give --held-out-share %g where it is made too",
            *(what, share, share),
        )


def _same(train: FileSet, test: FileSet, name: str) -> bool:
    try:
        return checksum(train.folder / name) == checksum(test.folder / name)
    except OSError:
        return False

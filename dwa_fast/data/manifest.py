"""The manifest of a distilled set: all settings its images depend on, and a checksum of each of its files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwa_fast.data.set_layout import FORMAT, MANIFEST, set_folder
from dwa_fast.errors import InputError
from dwa_fast.io.files import read_json

IMAGE_NAME = re.compile(r"new\d{3,}/class\d{3,}_id\d{3,}\.(png|jpg)")


def image_name(label: int, index: int, classes: int, suffix: str = "png") -> str:
    """Path of an image relative to the folder of class folders, named as in the published code.

    Numbers have at least three digits, and class numbers as many as the last class needs. Image numbers do not depend on the number of
    images, so a set can grow: image 1000 is id1000.
    """
    digits = max(3, len(str(classes - 1)))
    return f"new{label:0{digits}d}/class{label:0{digits}d}_id{index:03d}.{suffix}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a set, given its folder or its `images/`; every part is there and of its type, and every image lies in the set.

    Raises:
        InputError: there is no manifest, or it is damaged or of another program.
    """
    path = set_folder(folder) / MANIFEST
    missing = f"{folder} holds no {MANIFEST}; it is not a set written by dwa-fast" if os.path.exists(folder) else f"{folder} does not exist"
    content = read_json(path, lambda content: content, advice="remove it to make the whole set again", missing=missing)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no manifest of format {FORMAT}, which this version of dwa-fast reads")
    if not _is_manifest(content):
        raise InputError(f"{path} is damaged: a part of it is missing or of the wrong type; remove it to make the whole set again")
    return content


def set_teachers(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """Architectures of the teachers that made a set, for the record of a result; empty where its manifest does not have them."""
    names = [each["architecture"] for each in manifest.get("teachers", [])]
    return {"set_teachers": names} if names else {}


def _is_manifest(content: dict[str, Any]) -> bool:
    """Whether all fields exist and have the right types."""
    lists = all(isinstance(content.get(key), list) for key in ("continued_with", "class_names"))
    maps = all(isinstance(content.get(key), dict) for key in ("versions", "settings", "skipped", "images", "losses"))
    return (
        lists
        and maps
        and isinstance(content.get("complete"), bool)
        and isinstance(content.get("teachers", []), list)
        and all(map(_is_teacher, content.get("teachers", [])))
        and all(isinstance(name, str) for name in content["class_names"])
        and all(map(_maps_to_text, (content["versions"], *content["continued_with"], *map(content.get, ("skipped", "images", "losses")))))
        and all(map(str.isdecimal, content["losses"]))
        and all(map(IMAGE_NAME.fullmatch, content["images"]))  # no name leads out of the set
    )


def _is_teacher(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("architecture"), str)
        and isinstance(value.get("accuracy"), (float, int, type(None)))
    )


def _maps_to_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def content_check(content: Any) -> str:
    """Checksum of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Labelled images in Parquet files in Hugging Face's layout: a column of encoded images and a column of class numbers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dwa_fast.errors import InputError
from dwa_fast.io.files import atomic_write

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "class_id", "labels")
_GROUP = 100  # images per row group, the unit that readers load
_METADATA = b"huggingface"  # metadata key of the features
_MOST_CLASSES = 1_000_000

Row = tuple[bytes, str, int]  # encoded image, its file's name, its class


@dataclass(frozen=True)
class ParquetImages:
    """The content of Parquet files."""

    images: Sequence[Any]  # the image column, by row
    labels: list[int]
    class_names: list[str] | None  # None if the files do not name them

    def content(self, row: int) -> bytes:
        """The encoded image of a row.

        Raises:
            InputError: the row has none.
        """
        value = self.images[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes) or not content:
            raise InputError(f"row {row} holds no encoded image; paths of files elsewhere are not followed")
        return content


def write_parquet(path: Path, rows: Iterable[Row], class_names: Sequence[str], *, label_column: str = "label") -> int:
    """Write one Parquet file atomically. `datasets.load_dataset("parquet", data_files=…)` reads it with its class names.

    Args:
        rows: consumed in order, a hundred at a time.
    Returns:
        the number of rows.
    Raises:
        InputError: pyarrow is not installed, or the file cannot be written.
    """
    arrow, parquet = _pyarrow()
    features = {"image": {"_type": "Image"}, label_column: {"names": list(class_names), "_type": "ClassLabel"}}
    fields = [
        arrow.field("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])),
        arrow.field(label_column, arrow.int64()),
    ]
    schema = arrow.schema(fields, metadata={_METADATA: json.dumps({"info": {"features": features}})})
    remaining, count = iter(rows), 0
    with atomic_write(path) as target, parquet.ParquetWriter(target, schema) as writer:
        while group := list(islice(remaining, _GROUP)):
            images = [{"bytes": content, "path": name} for content, name, _ in group]
            writer.write_table(arrow.table({"image": images, label_column: [label for _, _, label in group]}, schema=schema))
            count += len(group)
    return count


def read_parquet(paths: Sequence[Path], *, image_column: str | None = None, label_column: str | None = None) -> ParquetImages:
    """Read the files of one data set into memory; the images stay encoded.

    Args:
        image_column: default: image or img, whichever exists. label_column: default: label, class_id or labels.
    Raises:
        InputError: pyarrow is not installed, a file cannot be read, has no such columns, or others than the first one.
    """
    arrow, parquet = _pyarrow()
    images: list[Any] = []
    labels: list[Any] = []
    names: list[str] | None = None
    for number, path in enumerate(paths):
        with _readable(path):
            schema = parquet.read_schema(path)
        if number == 0:
            image_column = _column(path, schema.names, image_column, IMAGE_COLUMNS, "--image-column")
            label_column = _column(path, schema.names, label_column, LABEL_COLUMNS, "--label-column")
            names = _class_names(schema.metadata, label_column)
        assert image_column
        assert label_column
        missing = {image_column, label_column} - set(schema.names)
        if missing or _class_names(schema.metadata, label_column) != names:
            raise InputError(f"{path} has other columns or classes than {paths[0]}; name the files of one data set")
        _check_types(path, arrow, schema, image_column, label_column)
        with _readable(path):
            table = parquet.read_table(path, columns=[image_column, label_column])
        images += table.column(image_column)
        labels += table.column(label_column).to_pylist()
    return _checked(images, labels, names, str(label_column))


def _checked(images: list[Any], labels: list[Any], names: list[str] | None, column: str) -> ParquetImages:
    """Labels as class numbers; text labels become classes in sorted order."""
    if not labels:
        raise InputError("the files hold no rows")
    if all(isinstance(label, str) for label in labels):
        names = sorted(set(labels))
        numbers = {name: number for number, name in enumerate(names)}
        return ParquetImages(images, [numbers[label] for label in labels], names)
    limit = len(names) if names is not None else _MOST_CLASSES
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < limit:
            wanted = f"one of the {limit} classes, by its number from 0" if names is not None else "a number of at least 0"
            raise InputError(f"column {column!r} of row {row} holds {label!r}; expected {wanted}")
    return ParquetImages(images, labels, names)


def _column(path: Path, found: Sequence[str], requested: str | None, known: Sequence[str], flag: str) -> str:
    """The requested column, or the only one of the known names."""
    candidates = [name for name in ((requested,) if requested else known) if name in found]
    if len(candidates) == 1:
        return candidates[0]
    wanted = requested or " or ".join(known)
    which = f"several columns that could be meant ({', '.join(candidates)})" if candidates else f"no column {wanted}"
    raise InputError(f"{path} has {which}; it has {', '.join(found)}; name one with {flag}")


def _check_types(path: Path, arrow: Any, schema: Any, image_column: str, label_column: str) -> None:
    image, label = schema.field(image_column).type, schema.field(label_column).type
    is_struct = arrow.types.is_struct(image) and image.get_field_index("bytes") >= 0
    if not (is_struct or arrow.types.is_binary(image) or arrow.types.is_large_binary(image)):
        raise InputError(f"column {image_column!r} of {path} holds {image}; expected encoded images, alone or as field 'bytes' of a struct")
    if not (arrow.types.is_integer(label) or arrow.types.is_string(label)):
        raise InputError(f"column {label_column!r} of {path} holds {label}; expected numbers or names of classes")


def _class_names(metadata: Any, column: str) -> list[str] | None:
    """Class names from Hugging Face's ClassLabel feature; None if there is none."""
    try:
        names = json.loads(metadata[_METADATA])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    good = isinstance(names, list) and names and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return names if good else None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into one InputError."""
    if not path.is_file():
        raise InputError(f"{path} is no file" if path.exists() else f"{path} does not exist")
    try:
        yield
    except Exception as error:  # pyarrow raises a dozen kinds for damaged files
        raise InputError(f"{path} is no Parquet file that can be read: {str(error).splitlines()[0] if str(error) else error!r}") from error


def _pyarrow() -> tuple[Any, Any]:
    """Import pyarrow and pyarrow.parquet, which are optional."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InputError("Parquet files need the package pyarrow: pip install 'dwa-fast[parquet]'") from error

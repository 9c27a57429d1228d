"""One page about any number of runs and distilled sets, as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dwa_fast.errors import InputError
from dwa_fast.io.files import atomic_write, output_folder
from dwa_fast.report.contents import gather
from dwa_fast.report.document import Document
from dwa_fast.report.markdown import as_markdown
from dwa_fast.report.page import as_page

_MARK = "written by dwa-fast report"
_HEAD = 200  # bytes at the beginning of a file in which the mark stands


def write_report(folders: Sequence[Path], output: Path, title: str, *, most_sets: int = 24) -> Document:
    """Write what lies below some folders as one HTML page, and as Markdown beside it with its pictures in NAME-files.

    The same records and sets give the same bytes.

    Args:
        output: the page, NAME.html.
        most_sets: kinds of distilled sets that are shown, at most; sets that differ in their seed alone are one kind.
    Raises:
        InputError: there is nothing to show, a folder cannot be read, or a file cannot be written or is no report that could be replaced.
    """
    if output.suffix != ".html":
        raise InputError(f"the report is an HTML page, NAME.html; got {str(output)!r}")
    text, pictures = output.with_suffix(".md"), output.with_name(f"{output.stem}-files")
    for path in (output, text):
        _check_replaceable(path)
    if pictures.is_symlink():
        raise InputError(f"{pictures} is a symbolic link; pictures are written into a folder beside the report")
    document = gather(folders, title, most_sets)
    output_folder(output.parent)
    markdown, images = as_markdown(document, _MARK, pictures.name)
    if images:
        output_folder(pictures)
    contents = {output: as_page(document, _MARK).encode(), text: markdown.encode()}
    for path, content in {**contents, **{pictures / name: image for name, image in images.items()}}.items():
        with atomic_write(path) as target:
            target.write_bytes(content)
    return document


def _check_replaceable(path: Path) -> None:
    """Raise InputError where another file would be lost, such as a README.md beside a README.html."""
    try:
        with open(path, "rb") as file:
            ours = _MARK.encode() in file.read(_HEAD)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if not ours:
        raise InputError(f"{path} is no report of dwa-fast, and would be lost; choose another --output")

"""One page about any number of runs and distilled sets, as HTML and as Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dwa_fast.errors import InputError, escape_control_chars
from dwa_fast.io.files import atomic_write, output_folder
from dwa_fast.report.contents import Contents, Section, held_out_note, presets_note, run_section, told_apart
from dwa_fast.report.search import search
from dwa_fast.report.sets import kinds, set_section

_MARK = "written by dwa-fast report"
_HEAD = 200  # bytes at the beginning of a file that hold the mark
_TEMPLATES = Path(__file__).parent / "templates"
_ACTIVE = re.compile(r"([\\`*_\[\]<>|~#])")  # characters with a meaning in Markdown or HTML


def write_report(folders: Sequence[Path], output: Path, title: str, *, most_sets: int = 24) -> Contents:
    """Write all records and distilled sets below some folders as one HTML page, and as Markdown beside it with its pictures in NAME-files.

    The same records and sets give the same bytes. Pictures that the replaced Markdown shows and the new one does not are removed.

    Args:
        output: the page, NAME.html.
        most_sets: kinds of distilled sets that are shown, at most; sets that differ in their seed alone are one kind.
    Raises:
        InputError: there is nothing to show, a folder cannot be read, or a file cannot be written or is not a report that may be replaced.
    """
    if output.suffix != ".html":
        raise InputError(f"the report is an HTML page, NAME.html; got {str(output)!r}")
    text, pictures = output.with_suffix(".md"), output.with_name(f"{output.stem}-files")
    for path in (output, text):
        _check_replaceable(path)
    if pictures.is_symlink():
        raise InputError(f"{pictures} is a symbolic link; pictures are written into a folder beside the report")
    contents = _gather(folders, title, most_sets)
    before = _shown_pictures(text, pictures)
    output_folder(output.parent)
    sections = [*contents.runs, *contents.sets]
    files = {pictures / f"{each.anchor}-{number}.png": image.png for each in sections for number, image in enumerate(each.images, 1)}
    if files:
        output_folder(pictures)
    files[output] = _render("report.html", _html_text, report=contents).encode()
    files[text] = _render("report.md", _markdown_text, report=contents, folder=Markup(quote(pictures.name))).encode()
    for path, content in files.items():
        with atomic_write(path) as target:
            target.write_bytes(content)
    for path in before - files.keys():
        path.unlink(missing_ok=True)
    return contents


def _shown_pictures(text: Path, pictures: Path) -> set[Path]:
    """The pictures that a Markdown report shows, which it wrote; whatever else lies in their folder is not ours."""
    if not text.exists():
        return set()
    names = re.findall(r"^!\[.*\]\(.*/((?:run|set)-\d+-\d+\.png)\)$", text.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return {pictures / name for name in names}


def _gather(folders: Sequence[Path], title: str, most_sets: int) -> Contents:
    found = search(folders)
    left_out, runs = list(found.left_out), list[Section]()
    for number, run in enumerate(found.records, 1):
        try:
            runs.append(run_section(f"run-{number}", run))
        except InputError as error:
            left_out.append(f"{run.name}: {error}")
        except RecursionError:
            left_out.append(f"{run.name} is nested too deeply")
    alike = kinds(found.sets)
    if not runs and not alike:
        reason = f" ({left_out[0]})" if left_out else ""
        raise InputError(f"no record and no distilled set that can be shown lies below {', '.join(map(str, folders))}{reason}")
    sets = [set_section(f"set-{number}", each) for number, each in enumerate(alike[:most_sets], 1)]
    note = f"Shown: {most_sets} of {len(alike)} kinds of sets; --sets {len(alike)} shows all." if len(alike) > most_sets else ""
    return Contents(
        title,
        told_apart(runs),
        told_apart(sets),
        " ".join(filter(None, (presets_note(found.records), held_out_note(found.records)))),
        note,
        left_out,
    )


def _render(template: str, text: Callable[[Any], Any], **values: Any) -> str:
    """Fill a template. `text` makes every value plain text of the format, and autoescaping makes it safe in HTML."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=template.endswith(".html"),
        finalize=text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(data_url=_data_url, code_block=_code_block)
    return environment.get_template(template).render(mark=Markup(_MARK), **values)


def _html_text(value: Any) -> Any:
    return value if isinstance(value, Markup) else escape_control_chars(str(value))


def _markdown_text(value: Any) -> str:
    return value if isinstance(value, Markup) else _ACTIVE.sub(r"\\\1", escape_control_chars(str(value)).replace("&", "&amp;"))


def _data_url(png: bytes) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(png).decode())


def _code_block(command: str) -> Markup:
    """A fenced block whose fence is longer than any run of backticks in the command."""
    text = escape_control_chars(command)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}sh\n{text}\n{fence}")


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

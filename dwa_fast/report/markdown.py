"""A report as Markdown, with its pictures as files in a folder beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from dwa_fast.errors import escape_control_chars
from dwa_fast.report.document import Block, Command, Document, Drawing, Facts, Image, Paragraph
from dwa_fast.report.records import Table

_ACTIVE = re.compile(r"([\\`*_\[\]<>|~#])")  # what Markdown or HTML would read as more than text


def as_markdown(document: Document, mark: str, folder: str) -> tuple[str, dict[str, bytes]]:
    """The text, and the pictures that it shows: name in the folder → content. `mark` stands in a comment at the beginning."""
    pictures: dict[str, bytes] = {}
    lines = [f"<!-- {mark} -->", f"# {_text(document.title)}", ""]
    sections = [*document.runs, *document.sets]
    lines += [*(f"- [{_text(each.title)}](#{each.anchor})" for each in sections), ""]
    for section in sections:
        lines += [f'<a id="{section.anchor}"></a>', "", f"## {_text(section.title)}", "", _text(section.line), ""]
        for number, block in enumerate(section.blocks, 1):
            if isinstance(block, (Drawing, Image)):
                name = f"{section.anchor}-{number}.png"
                pictures[name] = block.png
                lines += _picture(block, f"{quote(folder)}/{name}")
            else:
                lines += _block(block)
            lines.append("")
    lines += [_text(document.sets_note), ""] if document.sets_note else []
    if document.left_out:
        lines += ["## Left out", "", *(f"- {_text(each)}" for each in document.left_out), ""]
    return "\n".join(lines), pictures


def _picture(block: Drawing | Image, target: str) -> Iterable[str]:
    yield f"![{_text(block.title)}]({target})"
    caption = f"Rows: {', '.join(block.rows)}." if isinstance(block, Image) and block.rows else ""
    if isinstance(block, Image):
        yield from ["", _text(f"{block.title}. {caption}".strip())]


def _block(block: Block) -> Iterable[str]:
    if isinstance(block, Paragraph):
        yield _text(block.text)
    elif isinstance(block, Command):
        text = escape_control_chars(block.text)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        yield from [f"{fence}sh", text, fence]
    elif isinstance(block, Table):
        yield from [f"**{_text(block.title)}**", "", *_grid(block.columns, block.rows)]
        if block.note:
            yield from ["", _text(block.note)]
    elif isinstance(block, Facts):
        yield f"<details><summary>{escape(escape_control_chars(block.title))}</summary>"
        for name, rows in block.groups:
            yield from ["", *([f"**{_text(name)}**", ""] if name else []), *_grid(["setting", "value"], rows)]
        yield from ["", "</details>"]


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(map(_text, columns))} |"
    yield f"|---|{'---:|' * (len(columns) - 1)}" if columns[0] != "setting" else "|---|---|"
    for row in rows:
        yield f"| {' | '.join(map(_text, row))} |"


def _text(value: Any) -> str:
    """Text of any origin, as text and nothing else, on one line."""
    return _ACTIVE.sub(r"\\\1", escape_control_chars(str(value)).replace("&", "&amp;"))

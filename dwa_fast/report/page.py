"""A report as one HTML page that needs nothing else: no script, no file beside it, no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

from dwa_fast.errors import escape_control_chars
from dwa_fast.report.document import Block, Command, Document, Drawing, Facts, Image, Paragraph, Section
from dwa_fast.report.records import Table
from dwa_fast.report.style import STYLE

# Were anything of a record taken for more than text, a browser would still load and run nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def as_page(document: Document, mark: str) -> str:
    """The page; `mark` stands in a comment at its beginning."""
    title = _text(document.title)
    return "\n".join(
        [
            "<!doctype html>",
            f"<!-- {mark} -->",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            '<div class="layout">',
            f"<header><h1>{title}</h1></header>",
            *_contents(document),
            "<main>",
            *(line for section in document.runs for line in _section(section)),
            *_sets(document),
            *_left_out(document.left_out),
            "</main>",
            "</div>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _contents(document: Document) -> list[str]:
    lines = ['<nav aria-label="Contents">']
    for title, sections in (("Runs", document.runs), ("Distilled sets", document.sets)):
        if sections:
            entries = [f'<li><a href="#{each.anchor}">{_text(each.title)}</a></li>' for each in sections]
            lines += [f"<h2>{title}</h2>", "<ul>", *entries, "</ul>"]
    return [*lines, "</nav>"]


def _sets(document: Document) -> list[str]:
    if not document.sets and not document.sets_note:
        return []
    note = [f"<p>{_text(document.sets_note)}</p>"] if document.sets_note else []
    sections = (line for each in document.sets for line in _section(each, level=3))
    return ["<h2>Distilled sets</h2>", *note, '<div class="sets">', *sections, "</div>"]


def _left_out(sentences: Sequence[str]) -> list[str]:
    if not sentences:
        return []
    return [
        '<section id="left-out">',
        "<h2>Left out</h2>",
        "<ul>",
        *(f"<li>{_text(each)}</li>" for each in sentences),
        "</ul>",
        "</section>",
    ]


def _section(section: Section, *, level: int = 2) -> Iterable[str]:
    heading = f"{section.anchor}-title"
    yield f'<section id="{section.anchor}" aria-labelledby="{heading}">'
    yield f'<h{level} id="{heading}">{_text(section.title)}</h{level}>'
    yield f'<p class="line">{_text(section.line)}</p>'
    for side_by_side, blocks in groupby(section.blocks, key=lambda block: isinstance(block, (Drawing, Image))):
        if side_by_side:
            yield '<div class="figures">'
        for block in blocks:
            yield from _block(block)
        if side_by_side:
            yield "</div>"
    yield "</section>"


def _block(block: Block) -> Iterable[str]:
    if isinstance(block, Paragraph):
        yield f"<p>{_text(block.text)}</p>"
    elif isinstance(block, Command):
        yield f'<pre tabindex="0"><code>{_text(block.text)}</code></pre>'
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Facts):
        yield from _facts(block)
    elif isinstance(block, Drawing):
        svg = block.svg.replace("<svg ", f'<svg role="img" aria-label="{_text(block.title)}" ', 1)
        note = f" {_text(block.note)}." if block.note else ""
        yield f"<figure>{svg}<figcaption><strong>{_text(block.title)}</strong>{note}</figcaption></figure>"
    else:
        yield from _image(block)


def _table(table: Table) -> Iterable[str]:
    title = _text(table.title)
    yield f'<figure class="table"><figcaption><strong>{title}</strong></figcaption>'
    yield f'<div class="scroll" role="region" aria-label="{title}" tabindex="0"><table>'
    yield "<thead><tr>" + "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns) + "</tr></thead>"
    yield "<tbody>"
    for row in table.rows:
        cells = [_text(cell) for cell in row]
        yield (
            "<tr>" + "".join([f'<th scope="row">{cell}</th>' for cell in cells[:1]] + [f"<td>{cell}</td>" for cell in cells[1:]]) + "</tr>"
        )
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{_text(table.note)}</p>'
    yield "</figure>"


def _facts(facts: Facts) -> Iterable[str]:
    yield f"<details><summary>{_text(facts.title)}</summary>"
    for name, rows in facts.groups:
        if name:
            yield f"<details><summary>{_text(name)}</summary>"
        yield "<dl>" + "".join(f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in rows) + "</dl>"
        if name:
            yield "</details>"
    yield "</details>"


def _image(image: Image) -> Iterable[str]:
    source = f"data:image/png;base64,{base64.b64encode(image.png).decode()}"
    shown = f'<img src="{source}" alt="{_text(image.title)}" width="{image.width}" height="{image.height}">'
    if image.rows:
        names = "".join(f"<li>{_text(name)}</li>" for name in image.rows)
        shown = f'<div class="sheet"><ul aria-label="classes, by row">{names}</ul>{shown}</div>'
    yield f"<figure>{shown}<figcaption>{_text(image.title)}</figcaption></figure>"


def _text(value: Any) -> str:
    """Text of any origin, as text and nothing else, on one line; fit for an attribute too."""
    return escape(escape_control_chars(str(value)))

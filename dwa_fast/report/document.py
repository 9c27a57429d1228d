"""A report in blocks of plain values, before it is HTML or Markdown; all text in it is of any origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dwa_fast.report.records import Table


@dataclass(frozen=True)
class Paragraph:
    """A few sentences."""

    text: str


@dataclass(frozen=True)
class Command:
    """What to type."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and values in groups, folded away."""

    title: str
    groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]  # name of the group, "" for none; its names and values


@dataclass(frozen=True)
class Drawing:
    """A figure of a record."""

    title: str
    svg: str  # an element that takes the colour of the text around it
    png: bytes  # on white, with its title
    note: str = ""


@dataclass(frozen=True)
class Image:
    """Pixels."""

    title: str
    png: bytes
    width: int
    height: int
    rows: Sequence[str] = ()  # names of the rows of a contact sheet, from the top


Block = Paragraph | Command | Facts | Table | Drawing | Image


@dataclass(frozen=True)
class Section:
    """A run, or a set."""

    anchor: str  # unique; letters, digits and hyphens
    title: str
    line: str  # what it is, in a few words
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    runs: Sequence[Section]
    sets: Sequence[Section]
    sets_note: str  # what is not shown of them
    left_out: Sequence[str]  # a sentence each

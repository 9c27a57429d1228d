"""The exception for bad input, and text made safe for error messages."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The message is one line: what was given and what is needed. The command line prints it without a traceback."""


def escape_control_chars(text: str) -> str:
    """Escape control, bidirectional, invisible and undecodable characters, so that text stays on one line of a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error message, or the name of the error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""The one exception that stands for bad input, and names of any origin made fit for a sentence."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used, in one sentence: what it got and what it wants.

    The command line prints the sentence without a traceback.
    """


def escape_control_chars(text: str) -> str:
    """Text on one line that changes nothing but the line: what a terminal would obey or a file name can hide is written as its code.

    Control characters (colours, cursor, newline), directions of writing, invisible ones, and bytes of a name that are no text.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What an error of other code says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

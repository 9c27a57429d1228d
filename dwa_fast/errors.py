"""The one exception that stands for bad input."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used, in one sentence: what it got and what it wants.

    The command line prints the sentence without a traceback.
    """

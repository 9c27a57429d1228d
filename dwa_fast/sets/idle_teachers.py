"""Warns of teachers that are given and never used."""

from __future__ import annotations

import logging

from dwa_fast.config import SynthesisConfig
from dwa_fast.engine.turns import make_turns

log = logging.getLogger("dwa_fast")


def warn_of_idle_teachers(config: SynthesisConfig, teachers: int, turns: int, of: str) -> None:
    """Log a warning where some of the teachers are in none of the turns that are taken.

    Args:
        teachers: how many there are.
        turns: how many are taken, where the teachers take turns by index.
        of: what takes them, for the message, such as "ipc 1".
    """
    if config.iterations == 0:
        return
    if config.teacher_turns == "iteration":
        turns, of = config.iterations, f"a refinement of {config.iterations} iterations"
    every = make_turns(config, teachers)
    used = {place for turn in every[:turns] for place, _ in turn}
    if len(used) < teachers:
        log.warning("only the first %d of %d teachers are used: %s takes %d of their %d turns", len(used), teachers, of, turns, len(every))

"""Which teachers an iteration has, and with what weights."""

from __future__ import annotations

import logging
import math
from itertools import combinations

from dwa_fast.config import SynthesisConfig
from dwa_fast.errors import InputError

log = logging.getLogger("dwa_fast")

Turn = tuple[tuple[int, float], ...]  # place in the list of teachers and weight ω of each teacher of an iteration

ALONE: Turn = ((0, 1.0),)
_SOFTNESS = 5.0  # temperature of the softmax of the priors, as published


def make_turns(config: SynthesisConfig, count: int) -> list[Turn]:
    """The turns of `count` teachers: all ways to choose `teachers_together` of them, in lexicographic order.

    The weights of those that are together are ω = softmax(prior / 5) (CV-DD, arXiv 2501.07575), or equal without priors.

    Raises:
        InputError: there are fewer teachers, or more or fewer priors.
    """
    together, priors = config.teachers_together, config.teacher_priors or (0.0,) * count
    if together > count:
        raise InputError(f"teachers_together must be at most the number of teachers, {count}, got {together}")
    if len(priors) != count:
        raise InputError(f"teacher_priors must be one number for each of {count} teachers, got {len(priors)}")
    turns = []
    for places in combinations(range(count), together):
        largest = max(priors[place] for place in places)
        powers = [math.exp((priors[place] - largest) / _SOFTNESS) for place in places]
        turns.append(tuple((place, power / sum(powers)) for place, power in zip(places, powers, strict=True)))
    return turns


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

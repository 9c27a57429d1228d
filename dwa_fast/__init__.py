"""dwa_fast: fast, reproducible dataset distillation with directed weight adjustment (DWA) over SRe2L.

from dwa_fast import synthesize, recipe
result = synthesize(teacher, images, labels, recipe("cifar100"), seed=0)
"""

from __future__ import annotations

from dwa_fast._version import __version__
from dwa_fast.config import InitialConfig, SynthesisConfig
from dwa_fast.distill import distill
from dwa_fast.errors import InputError
from dwa_fast.recipes import recipe
from dwa_fast.synthesis import SynthesisResult, synthesize

__all__ = ["InitialConfig", "InputError", "SynthesisConfig", "SynthesisResult", "__version__", "distill", "recipe", "synthesize"]

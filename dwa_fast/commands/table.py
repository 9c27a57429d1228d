"""The commands, one dataclass each: its fields are the flags, the comments behind them the help, `run` what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import tyro

from dwa_fast import recipes
from dwa_fast.commands.demo import Demo
from dwa_fast.commands.diversity import Diversity
from dwa_fast.commands.exchange import Export, Import
from dwa_fast.commands.experiments import Ablate, Compare, Cross
from dwa_fast.commands.incremental import Incremental
from dwa_fast.commands.info import Info
from dwa_fast.commands.relabel import Relabel
from dwa_fast.commands.report import Report
from dwa_fast.commands.squeeze import Squeeze
from dwa_fast.commands.synthesize import Synthesize
from dwa_fast.commands.validate import Validate
from dwa_fast.commands.verify import Verify
from dwa_fast.config import Normalisation, Schedule
from dwa_fast.evaluation.diversity import DiversityConfig
from dwa_fast.experiments.demo import DemoConfig


def commands(
    recipe: str | None = None,
    method: str = "dwa",
    schedule: Schedule | None = None,
    preset: str = "paper",
    fast: bool = False,
    size: int | None = None,
) -> Mapping[str, Any]:
    """Every command with its defaults, in the order of the workflow; defaults of a data set are the recipe's."""
    own = {} if size is None else {"size": size}
    chosen = recipes.recipe(recipe or "digits", method=method, schedule=schedule, preset=preset, fast=fast, **own)
    missing: Any = tyro.MISSING
    data: dict[str, Any] = {"recipe": chosen.name if recipe else missing, "size": chosen.data.size, "test_crop": chosen.data.test_crop}
    data["normalisation"] = Normalisation(mean=chosen.data.mean, std=chosen.data.std)
    students: dict[str, Any] = {"preset": preset, "config": chosen.validation}
    study = {
        **data,
        "teacher": missing,
        "output": missing,
        "preset": preset,
        "fast": fast,
        "synthesis": chosen.synthesis,
        "validation": chosen.validation,
    }
    sets = {**data, "teacher": missing, "sets": missing, "output": missing}
    return {
        "info": Info(),
        "demo": Demo(output=missing, config=DemoConfig()),
        "squeeze": Squeeze(**data, output=missing, architecture=chosen.architecture, config=chosen.squeeze),
        "synthesize": Synthesize(**data, teacher=missing, output=missing, method=method, fast=fast, config=chosen.synthesis),
        "verify": Verify(images=missing),
        "relabel": Relabel(**data, teacher=missing, images=missing, output=missing, **students),
        "validate": Validate(**data, images=missing, student=chosen.architecture, **students),
        "compare": Compare(**study, student=chosen.architecture),
        "ablate": Ablate(**study, student=chosen.architecture, study=missing),
        "cross": Cross(**study, student=missing),
        "diversity": Diversity(**sets, config=DiversityConfig()),
        "incremental": Incremental(**sets, student=chosen.architecture, preset=preset, config=replace(chosen.validation, students=1)),
        "report": Report(folders=missing),
        "export": Export(images=missing, to=missing, output=missing),
        "import": Import(files=missing, output=missing),
    }

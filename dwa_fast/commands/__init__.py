"""The commands, one dataclass each: its fields are the flags, the comments behind them the help, `run` what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import tyro

from dwa_fast.commands.demo import Demo
from dwa_fast.commands.diversity import Diversity
from dwa_fast.commands.exchange import Export, Import
from dwa_fast.commands.experiments import Ablate, Compare, Cross
from dwa_fast.commands.incremental import Incremental
from dwa_fast.commands.inspect import Info, Verify
from dwa_fast.commands.pipeline import Squeeze, Synthesize
from dwa_fast.commands.relabel import Relabel
from dwa_fast.commands.report import Report
from dwa_fast.commands.students import Validate
from dwa_fast.evaluation.diversity import DiversityConfig
from dwa_fast.experiments.demo import DemoConfig
from dwa_fast.recipes import full_recipe


def commands(recipe_name: str | None, method: str) -> Mapping[str, Any]:
    """Every command with its defaults; those of a data set are the recipe's."""
    recipe = full_recipe(recipe_name or "digits", method=method)
    given: Any = recipe.name if recipe_name else tyro.MISSING
    data = {"recipe": given, "size": recipe.data.size, "test_crop": recipe.data.test_crop}
    missing: Any = tyro.MISSING
    study = {**data, "teacher": missing, "output": missing, "synthesis": recipe.synthesis, "config": recipe.validation}
    return {
        "demo": Demo(output=missing, config=DemoConfig()),
        "squeeze": Squeeze(**data, output=missing, architecture=recipe.architecture, config=recipe.squeeze),
        "synthesize": Synthesize(**data, teacher=missing, output=missing, method=method, config=recipe.synthesis),
        "relabel": Relabel(**data, teacher=missing, images=missing, output=missing, config=recipe.validation),
        "validate": Validate(**data, images=missing, student=recipe.architecture, config=recipe.validation),
        "compare": Compare(**study, student=recipe.architecture),
        "ablate": Ablate(**study, student=recipe.architecture, study=missing),
        "cross": Cross(**study, student=missing),
        "diversity": Diversity(**data, teacher=missing, sets=missing, output=missing, config=DiversityConfig()),
        "incremental": Incremental(
            **data,
            teacher=missing,
            sets=missing,
            output=missing,
            student=recipe.architecture,
            config=replace(recipe.validation, students=1),
        ),
        "export": Export(images=missing, to=missing, output=missing),
        "import": Import(files=missing, output=missing),
        "report": Report(folders=missing),
        "verify": Verify(images=missing),
        "info": Info(),
    }

"""dwa_fast: fast, reproducible dataset distillation with directed weight adjustment (DWA) over SRe2L.

from dwa_fast import load_teacher, recipe, synthesize
teacher, _ = load_teacher("teacher.pt")
result = synthesize(teacher, images, labels, recipe("cifar100"), seed=0)
result.save("distilled")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dwa_fast._version import __version__

if TYPE_CHECKING:
    from dwa_fast.config import DataConfig, FkdConfig, InitialConfig, SqueezeConfig, StorageConfig, SynthesisConfig, ValidationConfig
    from dwa_fast.data.datasets import digits
    from dwa_fast.data.datasets import load as load_data
    from dwa_fast.data.distilled import open_distilled
    from dwa_fast.data.folders import image_folder
    from dwa_fast.data.images import FileSet, MemorySet
    from dwa_fast.data.pixels import denormalise, normalise
    from dwa_fast.engine.class_statistics import ClassStatistics, class_statistics
    from dwa_fast.errors import InputError
    from dwa_fast.models.checkpoint import TeacherInfo, load_teacher, save_teacher
    from dwa_fast.recipes import Recipe, recipe
    from dwa_fast.sets.distill import distill
    from dwa_fast.sets.synthesize import SynthesisResult, synthesize
    from dwa_fast.training.label_index import LabelIndex
    from dwa_fast.training.relabel import relabel
    from dwa_fast.training.squeeze import squeeze
    from dwa_fast.training.validate import ValidationResult, validate

__all__ = [
    "ClassStatistics",
    "DataConfig",
    "FileSet",
    "FkdConfig",
    "InitialConfig",
    "InputError",
    "LabelIndex",
    "MemorySet",
    "Recipe",
    "SqueezeConfig",
    "StorageConfig",
    "SynthesisConfig",
    "SynthesisResult",
    "TeacherInfo",
    "ValidationConfig",
    "ValidationResult",
    "__version__",
    "class_statistics",
    "denormalise",
    "digits",
    "distill",
    "image_folder",
    "load_data",
    "load_teacher",
    "normalise",
    "open_distilled",
    "recipe",
    "relabel",
    "save_teacher",
    "squeeze",
    "synthesize",
    "validate",
]

_PLACES = {
    "ClassStatistics": "engine.class_statistics",
    "DataConfig": "config",
    "FileSet": "data.images",
    "FkdConfig": "config",
    "InitialConfig": "config",
    "InputError": "errors",
    "LabelIndex": "training.label_index",
    "MemorySet": "data.images",
    "Recipe": "recipes",
    "SqueezeConfig": "config",
    "StorageConfig": "config",
    "SynthesisConfig": "config",
    "SynthesisResult": "sets.synthesize",
    "TeacherInfo": "models.checkpoint",
    "ValidationConfig": "config",
    "ValidationResult": "training.validate",
    "class_statistics": "engine.class_statistics",
    "denormalise": "data.pixels",
    "digits": "data.datasets",
    "distill": "sets.distill",
    "image_folder": "data.folders",
    "load_data": "data.datasets",
    "load_teacher": "models.checkpoint",
    "normalise": "data.pixels",
    "open_distilled": "data.distilled",
    "recipe": "recipes",
    "relabel": "training.relabel",
    "save_teacher": "models.checkpoint",
    "squeeze": "training.squeeze",
    "synthesize": "sets.synthesize",
    "validate": "training.validate",
}


if not TYPE_CHECKING:  # to a type checker a misspelled name is none

    def __getattr__(name: str) -> Any:
        """Import what is asked for: PyTorch takes more than a second, which a command that has not begun would have to wait for."""
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"dwa_fast.{_PLACES[name]}")
        return globals().setdefault(name, getattr(module, "load" if name == "load_data" else name))


def __dir__() -> list[str]:
    """What is exported."""
    return __all__

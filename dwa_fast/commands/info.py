"""The command that says what was built and what runs here."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dwa_fast import ops
from dwa_fast.commands.console import Console
from dwa_fast.data.class_names import shown
from dwa_fast.engine import backend
from dwa_fast.engine.teacher import prepare
from dwa_fast.errors import InputError
from dwa_fast.models.checkpoint import TeacherInfo, load_teacher
from dwa_fast.sets.store import versions


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print what was built, what this machine has, which back-end would run, and why the others cannot."""

    teacher: Path | None = None  # Also describe this checkpoint.
    architecture: str | None = None  # Network in the checkpoint, if the file does not name it.
    weights_key: str | None = None  # Key of the weights, if the checkpoint holds several, such as state_dict_ema.
    json: bool = False  # Print JSON instead of text.

    def run(self, console: Console) -> None:
        """Print it."""
        if not self.teacher and (self.architecture or self.weights_key):
            raise InputError("--architecture and --weights-key say how to read a checkpoint; name it with --teacher")
        content = machine()
        if self.teacher:
            module, info = load_teacher(self.teacher, architecture=self.architecture, weights_key=self.weights_key)
            content["teacher"] = {**asdict(info), **_fused_layers(module, info)}
        if self.json:
            print(json.dumps(content, indent=2))
        else:
            if self.teacher and info.class_names:
                content["teacher"]["class_names"] = shown(info.class_names)
            if self.teacher and info.accuracy is not None:
                content["teacher"]["accuracy"] = f"{info.accuracy:.2f} %"
            console.tree("dwa-fast", content)


def _fused_layers(module: torch.nn.Module, info: TeacherInfo) -> dict[str, Any]:
    """What the fused back-end makes of each BatchNorm layer of a teacher."""
    execution = backend.resolve("auto", "auto", "cpu")
    network, _ = prepare(module, torch.zeros(2, info.channels, info.size, info.size), execution)
    return {"traced": network.traced, "fused": {name: layer.extra_repr() for name, layer in network.layers.items()}}


def machine() -> dict[str, Any]:
    """What `info` prints."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cause = ops.cause()
    return {
        "versions": versions(),
        "extension": {"not usable": cause} if cause else ops.built_with(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector instructions": torch.backends.cpu.get_cpu_capability(),
            "bf16 instructions": backend.bf16_instructions() or "none",
            "CUDA devices": devices or "none",
        },
        "back-ends": backend.describe(backend.resolve_device("auto")),
        "auto": backend.resolve("auto", "auto", "auto").describe(),
    }

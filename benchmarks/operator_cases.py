"""What `bench_operators.py` measures: every operator of `operator_calls.py` on inputs of the shapes that ResNets really have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import harness
import torch
from operator_calls import DTYPES, OPERATORS, Inputs, Operator
from operator_subjects import Images, Layer, Network, Subject, Weights

NETWORKS = tuple((depth, name) for depth in (18, 50) for name in ("cifar100-resnet18", "tiny-resnet18", "imagenet-resnet18"))
_ODD = 37  # channels


@dataclass(frozen=True, repr=False)
class Case:
    """An operator on one input; its implementations are compared with each other."""

    operator: Operator
    subject: Subject
    precision: str

    def __repr__(self) -> str:
        return f"{self.operator.name}: {self.subject}, {self.precision}"

    def inputs(self, device: torch.device) -> Inputs:
        """The same numbers every time."""
        torch.manual_seed(harness.SEED)
        return self.operator.inputs(self.subject, DTYPES[self.precision], device)


def cases(device: torch.device, all_shapes: bool, networks: Sequence[tuple[int, str]] = NETWORKS) -> dict[Case, list[str]]:
    """Every case, and the networks that it occurs in; without `all_shapes` the first network and the largest input of each other one.

    Args:
        networks: depth of a ResNet, and the workload that has its images.
    """
    used = [Network(harness.WORKLOADS[name], depth, device) for depth, name in networks]
    found: dict[Case, list[str]] = {}
    for operator in OPERATORS:
        for network in used:
            suited = operator.subjects(network)
            for subject in suited if all_shapes or network is used[0] else suited[:1]:
                for precision in operator.precisions:
                    found.setdefault(Case(operator, subject, precision), []).append(network.name)
    return found


def shrunk(case: Case, elements: int) -> list[Case]:
    """The same operator on inputs of about that many elements.

    Features have as many channels as before, but at most 64; then `_ODD` of them and an odd side, so that pixels begin at any multiple of
    2 bytes and the last row of a kernel's tiles is not full. Our convolutions take no such number of channels.
    """
    subject = case.subject
    if isinstance(subject, Layer):
        channels = min(subject.shape[1], 64)
        side = max(3, math.isqrt(elements // channels // 3))
        shapes = [(3, channels, side, side)]
        if not case.operator.function.startswith("conv"):
            shapes.append((3, _ODD, side // 2 * 2 + 1, side // 2 * 2 + 1))
        return [replace(case, subject=replace(subject, shape=shape)) for shape in shapes]
    if isinstance(subject, Images):
        return [replace(case, subject=replace(subject, shape=(3, 3, *(max(8, math.isqrt(elements // 9)),) * 2)))]
    return [replace(case, subject=replace(subject, count=elements + 1)) if isinstance(subject, Weights) else case]

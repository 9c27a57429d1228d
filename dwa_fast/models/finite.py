"""Refuses weights, statistics and logits that are NaN or infinite, by name: without this, an argmax over NaN is class 0 and no error."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dwa_fast.errors import InputError

_NAMED = 3  # how many tensors an error names


def check_finite_weights(module: nn.Module, owner: str = "teacher") -> None:
    """Check all parameters and running statistics; other buffers may hold infinities, as masks do.

    Args:
        owner: what the module is called in the message.
    Raises:
        InputError: some are NaN or infinite, or a running variance is negative; the message names the tensors and their layers.
    """
    faults = list(_faults(module))
    if faults:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise InputError(
            f"weights or running statistics of the {owner} are not finite: {', '.join(faults[:_NAMED])}{more}; train it again, "
            "or take another checkpoint"
        )


def has_finite_weights(module: nn.Module) -> bool:
    """Whether all parameters and running statistics are finite; waits for the device once."""
    real = (torch.view_as_real(value) if value.is_complex() else value for _, value in _floating(module) if value.numel())
    extremes = [torch.stack(value.aminmax()).double() for value in real]  # NaN where one value is; a single pass
    return not extremes or bool(torch.cat(extremes).isfinite().all())


def check_logits(
    logits: object,
    owner: str,
    classes: int | None = None,
) -> Tensor:  # [N, classes]
    """The logits, checked.

    Args:
        owner: whose they are, in the message. classes: how many there should be; None: any number.
    Raises:
        InputError: they are not [N, classes], or NaN or infinite.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"{owner} must give [N, classes] logits, got {got}")
    if classes is not None and logits.shape[1] != classes:
        raise InputError(f"{owner} gives logits of {logits.shape[1]} classes, the data have {classes}")
    finite = logits.isfinite().all(1)
    if not finite.all():
        raise InputError(f"{owner} gives logits that are not finite for {int((~finite).sum())} of {len(logits)} images")
    return logits


def refuse_probabilities(logits: Tensor, owner: str) -> None:
    """Check that outputs [N, classes] may be logits.

    Raises:
        InputError: there is one output per image, whose cross-entropy is always 0, or every row is one of probabilities, of which a softmax
            would be taken once more.
    """
    if logits.shape[1] < 2:
        raise InputError(f"{owner} gives one output per image; expected the logits of at least 2 classes")
    rows = logits.detach().double()
    if bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all()):
        raise InputError(f"{owner} gives probabilities, which are not negative and add up to 1; expected logits: leave out its softmax")


def _floating(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and running statistics with their names."""
    statistics = ((name, value) for name, value in module.named_buffers() if name.rpartition(".")[2] in ("running_mean", "running_var"))
    for name, value in (*module.named_parameters(), *statistics):
        if value.is_floating_point() or value.is_complex():
            yield name, value.detach()


def _faults(module: nn.Module) -> Iterator[str]:
    """For each tensor with invalid values: its name, its layer, and how many of each kind."""
    for name, value in _floating(module):
        layer, _, tensor = name.rpartition(".")
        negative = (value < 0) if tensor == "running_var" else torch.zeros((), dtype=torch.bool)
        kinds = {"NaN": value.isnan(), "infinite": value.isinf(), "negative": negative & value.isfinite()}
        counts = {kind: int(each.sum()) for kind, each in kinds.items()}
        if any(counts.values()):
            what = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
            yield f"{tensor}{f' of layer {layer!r}' if layer else ''} ({what} of {value.numel()})"

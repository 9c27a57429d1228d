"""The weights of a network in a checkpoint of any program: found by the parameter names of the network, under any keys and prefixes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dwa_fast.errors import InputError
from dwa_fast.io.pickles import StandIn
from dwa_fast.models.architectures import ARCHITECTURES, TIMM, build_on_meta

log = logging.getLogger("dwa_fast")

# Keys of the weights being trained; others (an average, the best epoch, a student) are taken only if there are no such.
_USUAL = {"model", "model_state", "model_state_dict", "module", "net", "network", "params", "state_dict", "weights"}
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # modules that hand on what is given to another
_COUNTERS = {"n_averaged", "num_batches_tracked", "total_ops", "total_params"}  # that averaging, BatchNorm and thop leave beside weights
_LOSS = re.compile(r"(train_|val_|test_)?(loss|criterion|metric|accuracy)")  # modules that no logits go through
_DEEPEST, _MOST_DICTS = 4, 10_000  # keys above a state dict; dicts that are searched at each depth
_NAMED = 3  # how many names of a long list an error quotes
_SHOWN = 8  # keys of a checkpoint that an error quotes
_HINTS = {  # by the end of a name
    "_mask": "; its weights are pruned: torch.nn.utils.prune.remove makes plain ones",
    ".original0": "; its weights are parametrised: torch.nn.utils.parametrize.remove_parametrizations makes plain ones",
    ".original": "; its weights are parametrised: torch.nn.utils.parametrize.remove_parametrizations makes plain ones",
    "weight_g": "; its weights are normalised: torch.nn.utils.remove_weight_norm makes plain ones",
    "weight_u": "; its weights are normalised: torch.nn.utils.remove_spectral_norm makes plain ones",
}
_SIZES = (8, 16, 28, 32, 64, 96, 128, 224)  # pixels, tried when searching for a network that fits


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Weights with all parameter names of the network."""

    key: str  # keys and prefix with dots between them, as weights_key names it; "" for a bare state dict
    weights: dict[str, Tensor]  # by the network's own names
    prefix: str  # of the names in that state dict
    unknown: dict[str, Tensor]  # what else lies behind the prefix
    beside: dict[str, Tensor]  # what lies in the same state dict without the prefix

    @property
    def is_usual(self) -> bool:
        return set(self.key.split(".")) <= _USUAL | {""}


def find_weights(
    path: Path,
    content: Any,
    architecture: str,
    *,
    classes: int | None,
    channels: int,
    size: int,
    weights_key: str | None = None,
) -> tuple[dict[str, Tensor], int]:
    """The weights of an architecture, by its own names and of its shapes, and its number of classes.

    A dict of tensors at any key is taken that has every parameter name of the network, behind one prefix. Where several have, the
    one at a usual key (state_dict, model, …) is, and the log names the others; where that does not decide, `weights_key` must.

    Args:
        path: of the checkpoint, for the messages.
        content: what the checkpoint holds.
        classes: of the network; None: as many as the weights have.
        weights_key: which weights, where the choice should be another: the key, with dots for keys within keys and for a prefix.
    Raises:
        InputError: nothing there fits, or too much.
    """
    expected = _on_paper(architecture, classes=classes or 2, channels=channels, size=size)
    fitting = list(_candidates(content, expected))
    found = [each for each in fitting if weights_key in (None, each.key)]
    found = found or [each for each in fitting if each.key.startswith(f"{weights_key}.")]
    if fitting and not found:
        names = ", ".join(repr(each.key) for each in fitting)
        raise InputError(f"checkpoint {path} holds no weights under {weights_key!r} that fit a {architecture}; it holds such under {names}")
    if not found:
        raise InputError(_nothing_fits(path, content, architecture, expected, weights_key, channels=channels, size=size))
    for each in found:
        _check_values(path, each.weights, expected)
    best = _choose(path, found)
    if best.unknown:
        advice = _advice(path, architecture, {**best.weights, **best.unknown}, channels=channels, size=size)
        raise InputError(f"checkpoint {path} does not fit a {architecture}: weights {_listed({'unknown': [*best.unknown]})}{advice}")
    classes = classes or _classes(path, architecture, best.weights, channels, size)
    _check_shapes(path, architecture, best.weights, classes=classes, channels=channels, size=size)
    _say_beside(path, best, channels)
    return best.weights, classes


def _on_paper(architecture: str, *, classes: int, channels: int, size: int) -> Mapping[str, Tensor]:
    """Names and shapes of a network's weights, without memory for them."""
    return MappingProxyType(build_on_meta(architecture, classes=classes, channels=channels, size=size).state_dict())


def _candidates(content: Any, expected: Mapping[str, Tensor]) -> Iterator[_Found]:
    required = _required(expected)
    for keys, tensors in _state_dicts(content):
        plain = _unwrapped(tensors, expected)
        whole = [f"{prefix}." if prefix else "" for prefix, count in _prefixes(plain, required).items() if count == len(required)]
        for start in whole:
            copies = tuple(other for other in whole if other.startswith(start) and other != start)  # of the network, within its own names
            behind = {name.removeprefix(start): value for name, value in plain.items() if name.startswith(start)}
            others = [name for name in behind if name not in expected and not _is_counter(name) and not f"{start}{name}".startswith(copies)]
            losses = {name: behind[name] for name in others if _LOSS.match(name)}
            outside = {name: value for name, value in plain.items() if not name.startswith(tuple(whole)) and not _is_counter(name)}
            yield _Found(
                key=".".join(filter(None, [*keys, start.rstrip(".")])),
                weights={name: value for name, value in behind.items() if name in expected},
                prefix=start.rstrip("."),
                unknown={name: behind[name] for name in others if name not in losses},
                beside={**outside, **losses},
            )


def _state_dicts(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dict that holds tensors, with the keys that lead to it; the outermost first."""
    level: list[tuple[tuple[str, ...], Any]] = [((), content)]
    for _ in range(_DEEPEST + 1):
        below: list[tuple[tuple[str, ...], Any]] = []
        for keys, value in level[:_MOST_DICTS]:
            tensors = {str(name): each for name, each in value.items() if isinstance(each, Tensor)}
            if tensors:
                yield keys, tensors
            below += [((*keys, str(name)), each) for name, each in value.items() if isinstance(each, dict)]
        level = below


def _unwrapped(tensors: Mapping[str, Tensor], expected: Iterable[str]) -> Mapping[str, Tensor]:
    """The same without the names of wrappers (DataParallel, torch.compile, …), wherever in a name they stand."""
    dropped = _WRAPPERS - {part for name in expected for part in name.split(".")}
    plain = {".".join(part for part in name.split(".") if part not in dropped): value for name, value in tensors.items()}
    return plain if len(plain) == len(tensors) else tensors


def _prefixes(names: Iterable[str], required: set[str]) -> Counter[str]:
    """How many of the required names stand behind each prefix."""
    counts: Counter[str] = Counter()
    longest = max((name.count(".") + 1 for name in required), default=0)
    for name in names:
        parts = name.split(".")
        cuts = range(max(0, len(parts) - longest), len(parts))
        counts.update(".".join(parts[:cut]) for cut in cuts if ".".join(parts[cut:]) in required)
    return counts


def _required(expected: Iterable[str]) -> set[str]:
    """The names that every network of that architecture has."""
    return {name for name in expected if not _is_counter(name)}


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def _choose(path: Path, found: list[_Found]) -> _Found:
    """The only one; else the only one at a usual key, which is logged."""
    different: list[_Found] = []
    for each in found:
        if not any(_equal(each.weights, other.weights) for other in different):
            different.append(each)
    usual = [each for each in different if each.is_usual]
    if len(different) == 1:
        return different[0]
    names = ", ".join(repr(each.key) for each in different)
    if len(usual) != 1:
        raise InputError(f"checkpoint {path} holds several weights that fit, under {names}; choose one with --weights-key")
    log.warning(
        "checkpoint %s holds several weights that fit, under %s; %r is taken, --weights-key takes another", path, names, usual[0].key
    )
    return usual[0]


def _equal(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    pairs = ((value, others.get(name)) for name, value in weights.items())
    return all(other is not None and value.shape == other.shape and torch.equal(value, other) for value, other in pairs)


def _classes(path: Path, architecture: str, weights: Mapping[str, Tensor], channels: int, size: int) -> int:
    """Number of classes of these weights: the rows of the tensors that depend on it."""
    two, three = (_on_paper(architecture, classes=classes, channels=channels, size=size) for classes in (2, 3))
    rows = {weights[name].shape[:1].numel() for name in two if two[name].shape != three[name].shape}
    if len(rows) != 1 or 0 in rows:
        raise InputError(f"checkpoint {path} has no layer to read the number of classes from; name it with the data")
    return rows.pop()


def _check_values(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise InputError for a weight whose values are missing or of an unsupported type."""
    for name, value in weights.items():
        shape = tuple(value.shape)
        if value.layout is not torch.strided or value.is_quantized or type(value) not in (Tensor, torch.nn.Parameter):
            raise InputError(
                f"checkpoint {path} holds {name} as a {type(value).__name__} of layout {value.layout}; expected a plain tensor"
            )
        if value.device.type != "cpu" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"checkpoint {path} says that {name} has shape {shape}, but does not hold as many values")
        if name in expected and expected[name].is_floating_point() and not value.is_floating_point():
            raise InputError(f"checkpoint {path} holds {name} as {value.dtype}; expected floating-point values")


def _misfit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first weight of another shape."""
    return next((name for name, value in weights.items() if value.shape != expected[name].shape), None)


def _check_shapes(path: Path, architecture: str, weights: Mapping[str, Tensor], **shape: int) -> None:
    expected = _on_paper(architecture, **shape)
    name = _misfit(weights, expected)
    if name is not None:
        raise InputError(
            f"checkpoint {path} does not fit a {architecture} with {shape['classes']} classes: {name} has shape "
            f"{tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}{_advice(path, architecture, weights, **shape)}"
        )


def _advice(path: Path, architecture: str, weights: Mapping[str, Tensor], *, channels: int, size: int, classes: int | None = None) -> str:
    """Which architecture, number of classes, channels or size the weights do fit."""
    of_channels = next((value.shape[1] for value in weights.values() if value.dim() == 4), channels)  # of the first convolution
    sizes = [size] if architecture.startswith(TIMM) else [size, *_SIZES]
    for name, of_size in [*((architecture, each) for each in sizes), *((name, size) for name in ARCHITECTURES)]:
        try:
            names = _on_paper(name, classes=2, channels=of_channels, size=of_size)
            if not _required(names) <= weights.keys() <= names.keys():
                continue
            rows = _classes(path, name, weights, of_channels, of_size)
            expected = _on_paper(name, classes=rows, channels=of_channels, size=of_size)
        except (InputError, KeyError):  # no network for this size, or without a name that it wants
            continue
        if _misfit(weights, expected) is None:
            facts = [f"{rows} classes"] if rows != classes or name != architecture else []
            facts += [f"{of_channels} channels"] if of_channels != channels else []
            facts += [f"size {of_size}"] if of_size != size else []
            return f"; all of it fits a {name} with {', '.join(facts)}" + (f": --architecture {name}" if name != architecture else "")
    return ""


def _nothing_fits(
    path: Path, content: Any, architecture: str, expected: Mapping[str, Tensor], weights_key: str | None, *, channels: int, size: int
) -> str:
    """The missing names in the closest state dict; if there is none, the contents of the file."""
    required = _required(expected)
    nearest: dict[str, Tensor] = {}
    whole: Mapping[str, Tensor] = {}  # the state dict that this is a part of: another network may hold such a part
    most = (0, 0)
    for keys, tensors in _state_dicts(content):
        if weights_key is None or f"{'.'.join(keys)}.".startswith(f"{weights_key}."):
            plain = _unwrapped(tensors, expected)
            prefix, count = next(iter(_prefixes(plain, required).most_common(1)), ("", 0))
            behind = {
                name.removeprefix(f"{prefix}."): value for name, value in plain.items() if not prefix or name.startswith(f"{prefix}.")
            }
            if (count, len(behind)) > most:
                nearest, whole, most = behind, plain, (count, len(behind))
    objects = any(isinstance(value, StandIn) for value in content.values())
    if not most[0] and (objects or all(value.dim() < 2 for value in nearest.values())):
        under = "" if weights_key is None else f" under {weights_key!r}"
        return f"checkpoint {path} holds no weights{under}; expected a state dict, bare or at a key; it holds {_contents(content)}"
    _check_values(path, nearest, {})
    missing = [name for name in expected if name in required - nearest.keys()]
    unknown = [name for name in nearest if name not in expected and not _is_counter(name)]
    way_out = next((hint for ending, hint in _HINTS.items() if any(name.endswith(ending) for name in unknown)), "")
    for part in (nearest, whole):
        way_out = way_out or _advice(path, architecture, part, channels=channels, size=size)
    return f"checkpoint {path} does not fit a {architecture}: weights {_listed({'missing': missing, 'unknown': unknown})}{way_out}"


def _listed(names: Mapping[str, list[str]]) -> str:
    """'3 missing (a, b, c…) and 1 unknown (d…)'."""
    return " and ".join(f"{len(each)} {what} ({', '.join(each[:_NAMED])}…)" for what, each in names.items() if each)


def _contents(content: Mapping[Any, Any]) -> str:
    """The contents of a checkpoint: its keys, and the type of each value."""
    kinds = [f"{key!r} ({_kind(value)})" for key, value in content.items()]
    return ", ".join(kinds[:_SHOWN]) + (", …" if len(kinds) > _SHOWN else "") if kinds else "nothing"


def _kind(value: Any) -> str:
    if isinstance(value, StandIn):
        return f"an object of class {value.class_name}, whose code is not run: save its state_dict()"
    return type(value).__name__.lower()


def _say_beside(path: Path, found: _Found, channels: int) -> None:
    """Log the entries beside the weights that are not loaded.

    Raises:
        InputError: the network is one layer of a sequence, and other layers have weights too.
    """
    place = found.prefix.rpartition(".")[2]
    normalising = {name: value for name, value in found.beside.items() if _normalises(name, value, channels)}
    others = [name for name in found.beside if name not in normalising]
    if place.isdigit() and others:
        raise InputError(
            f"checkpoint {path} holds a sequence of layers, of which the network is number {place}; "
            f"others have weights too ({', '.join(others[:_NAMED])}…), and would be missing"
        )
    if normalising:
        values = ", ".join(f"{name} {[round(each, 4) for each in value.flatten().tolist()]}" for name, value in normalising.items())
        log.warning(
            "checkpoint %s holds a network behind a layer that normalises its images (%s); the network alone is taken, "
            "which is right where --mean and --std are these values",
            path,
            values,
        )
    elif place.isdigit() and int(place):
        log.warning(
            "checkpoint %s holds a network as number %s of a sequence of layers; the network alone is taken: "
            "what normalises the images before it must be given by --mean and --std",
            path,
            place,
        )
    if others:
        log.warning(
            "checkpoint %s also holds %s, which the network has no place for and which are left out",
            path,
            ", ".join(others[:_NAMED]) + (f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""),
        )


def _normalises(name: str, value: Tensor, channels: int) -> bool:
    """Whether that is a mean or standard deviation of the colours."""
    last = name.rpartition(".")[2]
    return value.is_floating_point() and value.numel() in (1, channels) and ("mean" in last or "std" in last) and "running" not in last

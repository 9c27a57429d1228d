"""Rules for tyro: the help of a number ends with its range, and a value that is out of range is an InputError. Flags that are meant."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from dwa_fast.config import SHORT_NAMES, check_fields, range_of
from dwa_fast.errors import InputError

_SUGGESTED = 3  # flags at most that a message suggests


class RefusedError(Exception):
    """Carries an InputError out of tyro, which turns every ValueError into a usage message of its own."""


def settings_registry() -> ConstructorRegistry:
    """tyro's rule for dataclasses, with ranges in the help and all fields checked."""
    registry, inside = ConstructorRegistry(), list[StructTypeInfo]()  # inside: types that tyro's own rule is applied to

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not is_dataclass(info.type) or info in inside:
            return None
        inside.append(info)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            inside.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        return replace(spec, instantiate=_checked(spec.instantiate), fields=tuple(map(_with_range, spec.fields)))

    return registry


def _with_range(field: StructFieldSpec) -> StructFieldSpec:
    allowed, text = range_of(field.type), field.helptext
    if allowed is None:
        return field
    return replace(field, helptext=lambda: f"{(text() if callable(text) else text) or ''} {str(allowed).capitalize()}.".strip())


def _checked(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)  # its docstring heads the group of flags
    def checked(**values: Any) -> Any:
        try:
            settings = make(**values)
            check_fields(settings)
        except InputError as error:
            raise RefusedError(error) from None
        return settings

    return checked


def flags_of(command: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """The flags of a command, given it with its defaults, and whether each takes several values; without the --no-… of switches."""
    for field in fields(command):
        name, value, kind = prefix + field.name.replace("_", "-"), getattr(command, field.name), str(field.type)
        if is_dataclass(value):
            yield from flags_of(value, prefix if "OmitArgPrefixes" in kind else f"{name}.")
        elif "Positional" not in kind:
            yield f"--{name}", "tuple[" in kind


def flags_meant(typed: str, flags: Sequence[str]) -> list[str]:
    """Those that an unknown flag may stand for: an abbreviation, a beginning, a name with another prefix or none, or a misspelling."""
    word = typed.lstrip("-").rpartition(".")[2]
    word = SHORT_NAMES.get(word, word).replace("_", "-")
    names = [flag.lstrip("-").rpartition(".")[2] for flag in flags]
    near = {word} & {*names} or {name for name in names if name.startswith(word)} or {*difflib.get_close_matches(word, names, 1)}
    return [flag for flag, name in zip(flags, names, strict=True) if name in near][:_SUGGESTED]

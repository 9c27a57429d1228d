"""What tyro is told about settings: their ranges belong to the help, and a refused value is an InputError."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from dwa_fast.config import check_fields, range_of
from dwa_fast.errors import InputError


class RefusedError(Exception):
    """Carries an InputError out of tyro, which would turn the error itself, a ValueError, into a usage message."""

    def __init__(self, error: InputError) -> None:
        super().__init__(str(error))
        self.error = error


def settings_registry() -> ConstructorRegistry:
    """Tyro's own rule for dataclasses, with the range of a number at the end of its help and every field checked."""
    registry, inside = ConstructorRegistry(), list[StructTypeInfo]()

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
    sentence = f"{allowed}."[0].upper() + f"{allowed}."[1:]
    return replace(field, helptext=lambda: " ".join(filter(None, [text() if callable(text) else text, sentence])))


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

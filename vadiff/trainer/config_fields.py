"""Fields of a training config: help texts, bounds, and values from YAML, TOML and flags converted to their types."""

import contextlib
import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._validation import did_you_mean

_BOUNDS: dict[str, Callable[[float, float], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def setting(default: Any, text: str, **bounds: Any) -> Any:
    """Config field with help text and constraints: `choices`, `at_least`, `above`, `below`, `at_most`."""
    return dataclasses.field(default=default, metadata={"help": text, **bounds})


def typed(name: str, value: Any, kind: Any) -> Any:
    """Convert `value` to its field's type: YAML and TOML have no tuples, and YAML reads 1e-4 as text."""
    if isinstance(kind, types.UnionType):
        if value is None and types.NoneType in typing.get_args(kind):
            return None
        *others, kind = alternatives(kind)
        for other in others:
            with contextlib.suppress(ValueError):
                return typed(name, value, other)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin is tuple:
            if isinstance(value, str) or not isinstance(value, (tuple, list)):
                raise TypeError
            variable = arguments[-1] is Ellipsis
            if not variable and len(value) != len(arguments):
                raise TypeError
            return tuple(typed(name, item, arguments[0]) for item in value)
        if origin is dict:
            return {str(key): typed(name, item, float) for key, item in dict(value).items()}
        if kind is bool or isinstance(value, bool):
            if kind is not bool or not isinstance(value, bool):
                raise TypeError
            return value
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise TypeError
        if kind is str and not isinstance(value, (str, Path)):
            raise TypeError
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}, expected {_type_name(kind)}") from None


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types that a field takes, None left out, in the order in which they are tried."""
    if not isinstance(kind, types.UnionType):
        return (kind,)
    return tuple(option for option in typing.get_args(kind) if option is not types.NoneType)


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if typing.get_origin(kind) is tuple:
        arguments = typing.get_args(kind)
        number = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"a list of {number}numbers"
    return names.get(kind, "a mapping of names to numbers")


def check(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ValueError unless `value` is among the choices and within the bounds; None always passes."""
    allowed = field.metadata.get("choices")
    if allowed is not None and value not in allowed:
        advice = did_you_mean(value, allowed)
        raise ValueError(f"{field.name} is {value!r}, expected one of {', '.join(allowed)}{advice}")
    bounds = [(key, field.metadata[key]) for key in _BOUNDS if key in field.metadata]
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, (int, float)):
            continue
        if math.isnan(number) or not all(_BOUNDS[key](number, bound) for key, bound in bounds):
            expected = " and ".join(f"{key.replace('_', ' ')} {bound}" for key, bound in bounds)
            raise ValueError(f"{field.name} is {number}, expected {expected or 'a number'}")

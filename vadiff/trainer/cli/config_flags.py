"""The fields of a training config as options, with the fields' help texts, in groups."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import click

from ..config import TrainConfig
from ..config_fields import alternatives
from ..config_schema import FIELD_GROUPS
from ..presets import PRESETS
from .parameters import (
    NUMBER,
    PAIR,
    TEXT,
    WHOLE_NUMBER,
    Choice,
    Decorator,
    Listed,
    Options,
    flag,
    group,
    option,
    together,
)

_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_KINDS: dict[Any, tuple[click.ParamType[Any], str]] = {
    int: (WHOLE_NUMBER, "N"), float: (NUMBER, "X"), str: (TEXT, "TEXT"),
}  # fmt: skip
_METAVARS = {  # of fields that are more than any text
    "data": "PATH", "table": "RUN", "optimal_loss": "CSV", "profile": "RUN|CSV", "shift": "X|RULE",
    "reference": "N|all", "device": "DEVICE", "transfer": "RUN",
}  # fmt: skip


def config_flags() -> Decorator[Any]:
    """An option for every field; one that is not given is None in the parsed options."""
    hints = typing.get_type_hints(TrainConfig)
    return together(
        *(
            group(title, *(_option(_FIELDS[name], alternatives(hints[name])[-1]) for name in names))
            for title, names in FIELD_GROUPS.items()
        )
    )


def given_fields(options: Options) -> dict[str, Any]:
    """The fields for which an option was given."""
    given = {name: getattr(options, name) for name in _FIELDS if getattr(options, name) is not None}
    for name in ("weighting_options", "levels_options"):
        if name in given:
            given[name] = dict(given[name])
    return given


def _option(field: dataclasses.Field[Any], kind: Any) -> Decorator[Any]:
    name, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
    default = _default_of(field.name)
    if kind is bool:
        return flag(f"{name}/--no-{name[2:]}", text, default=None, shown_default=default)
    if field.metadata.get("choices") is not None:
        return option(name, Choice(field.metadata["choices"]), None, text, shown_default=default)
    if typing.get_origin(kind) is tuple:
        first, *others = typing.get_args(kind)
        item, metavar = _KINDS[first]
        size = None if Ellipsis in others else 1 + len(others)
        return option(name, Listed(item, size), metavar, text, shown_default=default)
    if typing.get_origin(kind) is dict:
        return option(name, Listed(PAIR), "NAME=NUMBER", text, shown_default=default)
    value, metavar = _KINDS[kind]
    return option(name, value, _METAVARS.get(field.name, metavar), text, shown_default=default)


def _default_of(name: str) -> Callable[[click.Context], Any]:
    """The field's value in the preset of the command line, if it names one, else in `digits`."""

    def default(context: click.Context) -> Any:
        return getattr(PRESETS[context.params.get("preset") or "digits"], name)

    return default

"""The fields of a training config as flags, with the help texts that stand beside the fields."""

import argparse
import dataclasses
import types
import typing
from typing import Any

from ..config import TrainConfig, choices


def add_config_flags(parser: argparse._ArgumentGroup) -> None:
    """A flag for every field; those not given are left out of the parsed options."""
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind = _without_none(hints[field.name])
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"].replace("%", "%%")
        settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        allowed = choices(field)
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif allowed is not None:
            settings["choices"] = allowed
        elif typing.get_origin(kind) is tuple:
            settings |= {"nargs": "*", "type": typing.get_args(kind)[0], "metavar": "N"}
        elif typing.get_origin(kind) is dict:
            settings |= {"nargs": "*", "type": _option, "metavar": "NAME=NUMBER"}
        else:
            settings |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
        parser.add_argument(flag, **settings)


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields for which a flag was given."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    for name in ("weighting_options", "levels_options"):
        if name in given:
            given[name] = dict(given[name])
    return given


def _option(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=NUMBER")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number after {name}=") from None


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        return next(option for option in typing.get_args(kind) if option is not types.NoneType)
    return kind

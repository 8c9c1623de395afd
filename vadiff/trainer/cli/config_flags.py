"""The fields of a training config as flags, with the fields' help texts."""

import argparse
import dataclasses
import typing
from typing import Any

from ..config import TrainConfig
from ..config_fields import alternatives


def add_config_flags(parser: argparse._ArgumentGroup) -> None:
    """Add a flag for every field; flags that are not given are absent from the parsed options."""
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind = alternatives(hints[field.name])[-1]
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"].replace("%", "%%")
        keywords: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        allowed = field.metadata.get("choices")
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif allowed is not None:
            keywords |= {"choices": allowed, "type": _name}
        elif typing.get_origin(kind) is tuple:
            keywords |= {"nargs": "*", "type": typing.get_args(kind)[0], "metavar": "N"}
        elif typing.get_origin(kind) is dict:
            keywords |= {"nargs": "*", "type": _option, "metavar": "NAME=NUMBER"}
        else:
            keywords |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
        parser.add_argument(flag, **keywords)


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields for which a flag was given."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    for name in ("weighting_options", "levels_options"):
        if name in given:
            given[name] = dict(given[name])
    return given


def _name(text: str) -> str:
    """A name with hyphens in place of underscores is the same name."""
    return text.replace("-", "_")


def _option(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=NUMBER")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number after {name}=") from None

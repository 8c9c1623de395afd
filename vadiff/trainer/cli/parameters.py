"""Arguments and options of the commands, made with click and cloup: types of values, lists, and usage errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

import click
import cloup
from click.core import ParameterSource
from cloup.constraints import Constraint, ConstraintViolated

from ..._validation import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]
Options = SimpleNamespace  # the values of a command's arguments and options, by name
NONE = "none"  # an empty list on the command line
_LONGEST_CHOICES = 30  # characters of the choices that stand in place of a metavar


def usage_error(message: str) -> NoReturn:
    """End the command with status 2: `message` in one line, then where to look."""
    raise click.UsageError(message, ctx=click.get_current_context(silent=True))


class Value(click.ParamType[Any]):
    """A value that a function makes from text; its ValueError says what it got and what was expected."""

    def __init__(self, name: str, convert: Callable[[str], Any]) -> None:
        self.name = name
        self._convert = convert

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):  # a default
            return value
        try:
            return self._convert(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Choice(click.Choice[str]):
    """One of several names; hyphens may stand for underscores."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        for name in (value, value.replace("-", "_")):
            if name in self.choices:
                return str(name)
        close = did_you_mean(value, self.choices)  # before the others: they may be many
        self.fail(f"{value!r}{f'{close} Expected' if close else ', expected'} {', '.join(self.choices)}", param, ctx)


class Listed(click.ParamType[Any]):
    """Values of one type with commas between them, `size` of them; without a size `none` is the empty list."""

    def __init__(self, item: click.ParamType[Any], size: int | None = None) -> None:
        self.name = "list"
        self.item = item
        self.size = size

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if value == NONE and self.size is None:
            return []
        if not value and self.size is None:
            self.fail(f"'' is empty, expected values with commas between them, or {NONE}", param, ctx)
        values = [self.item.convert(part.strip(), param, ctx) for part in value.split(",")]
        if self.size not in (None, len(values)):
            self.fail(f"{value!r}, expected {self.size} values with commas between them", param, ctx)
        return values

    def takes(self, text: str) -> bool:
        """Whether the text is one value of the list."""
        try:
            self.item.convert(text, None, None)
        except click.BadParameter:
            return False
        return True


def _number(kind: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{text!r}, expected {expected}") from None

    return convert


def _pair(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    if not (name and equals):
        raise ValueError(f"{text!r}, expected NAME=NUMBER")
    return name.replace("-", "_"), _number(float, f"a number after {name}=")(number)


def _filled(text: str) -> str:
    """Text that is not empty, as an option with an unset variable of the shell is: --out "$UNSET"."""
    if not text:
        raise ValueError("'' is empty, expected a value")
    return text


class _FilledPath(click.Path):
    """A path that is not empty: an empty one would be the folder that the command runs in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("'' is empty, expected a path", param, ctx)
        return super().convert(value, param, ctx)


TEXT = Value("TEXT", _filled)
PATH = _FilledPath(path_type=Path)
WHOLE_NUMBER = Value("N", _number(int, "a whole number"))
NUMBER = Value("X", _number(float, "a number"))
PAIR = Value("NAME=NUMBER", _pair)


class Option(cloup.Option):
    """An option whose help says how to write a list, and whose default may be shown without being given."""

    shown_default: Callable[[click.Context], Any] | None = None

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        default = self.default if self.shown_default is None else self.shown_default(ctx)
        if isinstance(default, bool):
            default = ("on" if default else "off") if self.secondary_opts else None
        if isinstance(default, (str, float, list, tuple, Mapping)):
            extra["default"] = _written(default)
        elif self.shown_default is not None and default is not None:
            extra["default"] = str(default)
        return extra


def _written(value: Any) -> str:
    """A default as it would be written on the command line."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number:g}" for name, number in value.items()) or NONE
    if isinstance(value, (list, tuple)):
        return ",".join(map(_written, value)) or NONE
    return f"{value:g}" if isinstance(value, float) else str(value)


def option(
    flag: str, kind: click.ParamType[Any], metavar: str | None, help: str, *, default: Any = None,
    name: str | None = None, required: bool = False, is_eager: bool = False,
    shown_default: Callable[[click.Context], Any] | None = None,
) -> Decorator[Any]:  # fmt: skip
    """Option with a value.

    Args:
        flag: as --gap-images.
        kind: of the value.
        metavar: of the value in help texts; None for a name that is chosen, whose choices stand there.
        help: its text.
        default: shown in the help; None: the help's text says what happens without it.
        name: of the value in the options, if it is not the flag's.
        required: whether the command needs it.
        is_eager: read before the other options and before --help.
        shown_default: default that is shown in place of `default`.
    """
    names = kind.item if isinstance(kind, Listed) else kind
    if isinstance(names, Choice):
        listed = ", ".join(names.choices)
        if metavar is None and (isinstance(kind, Listed) or len(listed) > _LONGEST_CHOICES):
            metavar, help = "NAME", f"{help}. One of: {listed}"
    if isinstance(kind, Listed):
        metavar = ",".join([str(metavar)] * kind.size) if kind.size else f"{metavar},..."
        help = f"{help}; with commas" if kind.size else f"{help}; a list with commas, {NONE} if empty"

    given: dict[str, Any] = {} if default is None else {"default": default}  # to click None is a value too

    def decorate(function: F) -> F:
        decorated: F = cloup.option(
            *filter(None, (flag, name)), cls=Option, type=kind, metavar=metavar, help=help,
            required=required, is_eager=is_eager, **given,
        )(function)  # fmt: skip
        decorated.__click_params__[-1].shown_default = shown_default  # type: ignore[attr-defined]
        return decorated

    return decorate


def flag(
    name: str, help: str, *, default: Any = False, shown_default: Callable[[click.Context], Any] | None = None
) -> Decorator[Any]:
    """Option without a value; with `--x/--no-x` as name and None as default one that may be given either way."""

    def decorate(function: F) -> F:
        decorated: F = cloup.option(name, cls=Option, is_flag=True, default=default, help=help)(function)
        decorated.__click_params__[-1].shown_default = shown_default  # type: ignore[attr-defined]
        return decorated

    return decorate


def argument(name: str, metavar: str, help: str, *, required: bool = True, several: bool = False) -> Decorator[Any]:
    """A path without a flag; `several` of them are a tuple."""
    return cloup.argument(name, type=PATH, metavar=metavar, help=help, required=required, nargs=-1 if several else 1)


def group(title: str, *options: Decorator[Any], help: str | None = None) -> Decorator[Any]:
    """Options under a heading of the help."""
    return cloup.option_group(title, *options, help=help)


def together(*decorators: Decorator[Any]) -> Decorator[Any]:
    """Several decorators as one; the help shows them in this order."""

    def decorate(function: F) -> F:
        for each in reversed(decorators):
            each(function)
        return function

    return decorate


def not_together(*names: str) -> Decorator[Any]:
    """Refuse a command line that gives more than one of these options."""
    return cloup.constraint(_AtMostOne(), names)


class _AtMostOne(Constraint):
    """Unlike cloup's `mutually_exclusive` it does not count defaults as given."""

    def help(self, ctx: click.Context) -> str:
        return "at most one"

    def check_values(self, params: Sequence[click.Parameter], ctx: click.Context) -> None:
        given = [name_of(param) for param in params if is_given(param, ctx)]
        if len(given) > 1:
            raise ConstraintViolated(
                f"argument {given[1]}: not allowed with argument {given[0]}", ctx=ctx, constraint=self, params=params
            )


def is_given(param: click.Parameter, ctx: click.Context) -> bool:
    """Whether the command line gives the argument or option."""
    return param.name is not None and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE


def name_of(param: click.Parameter) -> str:
    """An option's flag, or an argument's metavar."""
    if isinstance(param, click.Option):
        return param.opts[0]
    return (param.metavar or str(param.name)).removeprefix("[").removesuffix("]...")

"""Commands on cloup: errors in one line, nothing abbreviated, examples at the end of the help."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import cloup
from cloup import HelpFormatter

from ..._validation import did_you_mean
from .parameters import NONE, Decorator, Listed, Options, name_of

_HYPHEN = "\N{NON-BREAKING HYPHEN}"


class _Formatter(HelpFormatter):
    """Breaks lines at spaces only, so that flags stay whole."""

    def write_text(self, text: str, style: Any = str) -> None:
        super().write_text(text.replace("-", _HYPHEN), style)

    def write_dl(self, rows: Any, *arguments: Any, **keywords: Any) -> None:
        whole = [(term, (text() if callable(text) else text).replace("-", _HYPHEN)) for term, text in rows]
        super().write_dl(whole, *arguments, **keywords)

    def getvalue(self) -> str:
        return super().getvalue().replace(_HYPHEN, "-")


class _Context(cloup.Context):
    formatter_class = _Formatter


_SETTINGS = {
    "show_default": True,
    "allow_extra_args": True,  # `Command` refuses them itself, with advice
    "formatter_settings": HelpFormatter.settings(max_width=100, col1_max_width=28),
}


class Command(cloup.Command):
    """A command whose callback takes all values as one object. Invoking it returns its context, for `call`."""

    context_class = _Context

    def __init__(
        self, *arguments: Any, examples: Sequence[str] = (), tables: Mapping[str, Mapping[str, str]] | None = None,
        **keywords: Any,
    ) -> None:  # fmt: skip
        super().__init__(*arguments, **keywords)
        self.examples = tuple(examples)
        self.tables = tables or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # of shell completion
            return super().parse_args(ctx, args)
        written = tuple(args)
        self._check_written(ctx, written)
        extra = super().parse_args(ctx, args)
        if extra:
            _refuse_spaces(ctx, self._lists_with_spaces(ctx, written))
            raise click.UsageError(f"{extra[0]!r} is one argument too many", ctx)
        return extra

    def _check_written(self, ctx: click.Context, args: Sequence[str]) -> None:
        """Refuse unknown options, options without their value, and values where there is none.

        Click's parser takes the next option for a missing value, and reads -steps letter by letter.
        """
        spaced = self._lists_with_spaces(ctx, args)
        # An argument may stand after a list, a negative number may not.
        _refuse_spaces(ctx, [each for each in spaced if not self.arguments or each[2][0].startswith("-")])
        known = self._options(ctx)
        for flag, value, _ in _walk(args, known):
            option = known.get(flag)
            if option is None:
                raise click.UsageError(f"no such option: {flag}{did_you_mean('--' + flag.lstrip('-'), known)}", ctx)
            if option.is_flag and value is not None:
                raise click.UsageError(f"argument {flag}: takes no value, got {value!r}", ctx)
            if not option.is_flag and (value is None or value.partition("=")[0] in known):
                got = "nothing" if value is None else f"the option {value}"
                empty = f" ({NONE}: an empty list)" if isinstance(option.type, Listed) else ""
                raise click.UsageError(f"argument {flag}: expected a value{empty}, got {got}", ctx)

    def _lists_with_spaces(self, ctx: click.Context, args: Sequence[str]) -> list[tuple[str, str, list[str]]]:
        """Lists written with spaces between their values: flag, first value, the others."""
        found, known = [], self._options(ctx)
        for flag, value, rest in _walk(args, known):
            option = known.get(flag)
            if option is None or value is None or not isinstance(option.type, Listed):
                continue
            others = []
            for word in rest:
                if word in known or Path(word).exists() or not option.type.takes(word):
                    break
                others.append(word)
            if others:
                found.append((flag, value, others))
        return found

    def _options(self, ctx: click.Context) -> dict[str, click.Option]:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        return {flag: option for option in options for flag in (*option.opts, *option.secondary_opts)}

    def invoke(self, ctx: click.Context) -> click.Context:
        return ctx

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in self.tables.items():
            with formatter.section(title):
                formatter.write_dl(list(rows.items()))
        if self.examples:
            formatter.write_paragraph()
            formatter.write_heading("Examples")
            formatter.write("".join(f"  {example}\n" for example in self.examples))


class Group(cloup.Group):
    """A group of commands, which asks for one of them."""

    context_class = _Context

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            raise click.UsageError(f"expected a command, got none: {', '.join(self.commands)}", ctx)
        return super().parse_args(ctx, args)


def _walk(args: Sequence[str], known: Mapping[str, click.Option]) -> Iterator[tuple[str, str | None, Sequence[str]]]:
    """Each option, its value (None: it has none) and what stands after them."""
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return
        if len(word) < 2 or word[0] != "-":
            continue
        flag, equals, text = word.partition("=")
        value = text if equals else None
        if not equals and flag in known and not known[flag].is_flag and rest:
            value = rest.pop(0)
        yield flag, value, rest


def _refuse_spaces(ctx: click.Context, lists: Sequence[tuple[str, str, list[str]]]) -> None:
    for flag, value, others in lists:
        with_spaces, with_commas = " ".join([value, *others]), ",".join([value, *others])
        raise click.UsageError(
            f"argument {flag}: {with_spaces!r}, expected commas between the values: {flag} {with_commas}", ctx
        )


def command(
    name: str, help: str, description: str, examples: Sequence[str] = (),
    tables: Mapping[str, Mapping[str, str]] | None = None,
) -> Callable[[Any], Command]:  # fmt: skip
    """Decorator that makes a command of a function of `Options`.

    Args:
        name: of the command.
        help: one line for the list of commands.
        description: the help's first paragraph.
        examples: command lines at the end of the help, each with a comment.
        tables: by their titles, names and what they mean, before the examples.
    """
    made: Callable[[Any], Command] = cloup.command(
        name, cls=Command, short_help=help, help=description, examples=examples, tables=tables,
        context_settings=_SETTINGS,
    )  # fmt: skip
    return made


def sections(name: str, description: str, commands: Mapping[str, Sequence[click.Command]], *params: Decorator[Any],
             short_help: str | None = None) -> Group:  # fmt: skip
    """A group of commands in sections, by their titles."""

    def nothing() -> None: ...

    for param in params:
        param(nothing)
    made: Group = cloup.group(
        name, cls=Group, help=description, short_help=short_help,
        sections=[cloup.Section(title, list(of_title)) for title, of_title in commands.items()],
        context_settings={"formatter_settings": _SETTINGS["formatter_settings"]},
    )(nothing)  # fmt: skip
    return made


def parse(group: Group, arguments: Sequence[str] | None) -> click.Context:
    """The context of the command that a command line names, with all values.

    Raises:
        SystemExit: with status 2 for invalid arguments, with 0 for --help and --version.
    """
    try:
        context = group.main(arguments, prog_name=group.name, standalone_mode=False)
    except click.UsageError as error:
        refuse(error)
    if not isinstance(context, click.Context):  # the status of --help or --version
        raise SystemExit(context)
    return context


def options_of(context: click.Context) -> Options:
    """The values of a command line."""
    return Options(**context.params)


def call(context: click.Context) -> None:
    """Run the command of a context.

    Raises:
        SystemExit: with status 2 if it finds an invalid argument.
    """
    assert context.command.callback is not None
    try:
        with context.scope(cleanup=False):
            context.command.callback(options_of(context))
    except click.UsageError as error:
        refuse(error)


def refuse(error: click.UsageError) -> NoReturn:
    """Print the error in one line and where to look, and end with status 2."""
    path = error.ctx.command_path if error.ctx else "vadiff"
    print(f"{path}: error: {_message(error)}\nSee `{path} --help`.", file=sys.stderr)
    raise SystemExit(2)


def _message(error: click.UsageError) -> str:
    if isinstance(error, click.NoSuchCommand):
        known = error.ctx.command.commands if error.ctx and isinstance(error.ctx.command, click.Group) else ()
        advice = did_you_mean(error.command_name, known) or f", expected one of {', '.join(known)}"
        return f"no such command: {error.command_name}{advice}"
    if isinstance(error, click.NoSuchOption):
        return f"no such option: {error.option_name}{did_you_mean(error.option_name, error.possibilities or ())}"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"argument {name_of(error.param)}: required"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"argument {name_of(error.param)}: {error.message}"
    return error.format_message()

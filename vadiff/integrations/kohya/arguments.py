"""Options of the criterion beside a script's own, and the criterion that they describe."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

from ...loss import DiffusionLoss
from ...weighting import AdaptiveWeighting, Weighting, available, from_name, takes_prediction_type

_DEFAULT = "variance_aware"
_OF_THE_CRITERION = ("weighting", "weighting_args", "bins", "log_snr_range", "half_life")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options `--vadiff_...` to the parser of a script, for a trainer with `AdaptiveLoss`.

    They may also stand in the script's `--config_file`, as `vadiff_weighting = "loss_level"`.

    Returns:
        The parser.
    """
    group = parser.add_argument_group("vadiff", "weights and statistics per noise level")
    names = [name for name in available() if name != "learned"]
    group.add_argument(
        "--vadiff_weighting", choices=names, metavar="NAME", help=f"{', '.join(names)}; default {_DEFAULT}"
    )
    group.add_argument(
        "--vadiff_weighting_args",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"options of the weighting, for {_DEFAULT}: {', '.join(_options_of(from_name(_DEFAULT)))}",
    )
    group.add_argument("--vadiff_bins", type=int, metavar="N", help="bins of log-SNR; default: 0.5 wide")
    group.add_argument(
        "--vadiff_log_snr_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="ends of the bins in ln(alpha^2/sigma^2); default: those of the noise schedule",
    )
    group.add_argument(
        "--vadiff_half_life", type=float, metavar="N", help="samples per bin after which one counts half; default 256"
    )
    group.add_argument(
        "--vadiff_log_every", type=int, metavar="N", help="steps between records of the statistics; default 100"
    )
    group.add_argument(
        "--vadiff_refresh_snr",
        action="store_true",
        help="with --zero_terminal_snr: --min_snr_gamma and similar flags use the changed schedule's SNR",
    )
    group.add_argument(
        "--vadiff_fresh_statistics",
        action="store_true",
        help="--resume a state that was saved without vadiff, or with other bins: the statistics start empty",
    )
    return parser


def option(args: Any, name: str) -> Any:
    """The value of `--vadiff_NAME`; None where the option was not given or the parser does not have it."""
    return getattr(args, f"vadiff_{name}", None)


def given(args: Any) -> list[str]:
    """The options of the criterion that were given, as typed."""
    return [f"--vadiff_{name}" for name in _OF_THE_CRITERION if option(args, name) is not None]


def criterion_for(args: Any, process: Any, loss_form: str) -> DiffusionLoss:
    """The criterion that the options describe, by default `for_process(..., fine_tuning=True)`.

    Args:
        args: the script's.
        process: the trainer's, as for `DiffusionLoss.for_process`.
        loss_form: form of the loss, one of `vadiff.process.PREDICTION_TYPES`.

    Raises:
        ValueError: an option that is out of bounds or that the weighting does not have; the message names it.
    """
    name = option(args, "weighting") or _DEFAULT
    overrides: dict[str, Any] = {
        key: value for key in ("bins", "half_life") if (value := option(args, key)) is not None
    }
    ends = option(args, "log_snr_range")
    if ends is not None:
        overrides["log_snr_range"] = tuple(ends)
    pairs = option(args, "weighting_args")
    fixed = None
    if pairs and takes_prediction_type(name):  # before `for_process`, which looks at the weights
        fixed = _with_options(from_name(name, prediction_type=loss_form), name, pairs, loss_form)
    criterion = DiffusionLoss.for_process(
        process, prediction_type=loss_form, fine_tuning=True, weighting=fixed or name, **overrides
    )
    if pairs and fixed is None:
        criterion.weighting = _with_options(criterion.weighting, name, pairs, loss_form)
    return criterion


def _with_options(weighting: Weighting, name: str, pairs: list[str], loss_form: str) -> Weighting:
    """The weighting with options given as KEY=VALUE; the others of an adaptive one stay as they are."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = str(pair).partition("=")
        try:
            options[key.strip()] = float(text)
        except ValueError:
            raise ValueError(
                f"--vadiff_weighting_args has {pair!r}, expected KEY=NUMBER"
                + ("" if equals else f" such as strength=0.5, with {', '.join(_options_of(weighting))}")
            ) from None
    known = _options_of(weighting)
    for key in options:
        if key not in known:
            raise ValueError(
                f"--vadiff_weighting_args has {key!r}, which {name} does not have, expected "
                f"{' or '.join(known) if known else 'none: it has no options'}"
            )
    if isinstance(weighting, AdaptiveWeighting):
        return dataclasses.replace(weighting, **options)
    form = {"prediction_type": loss_form} if takes_prediction_type(name) else {}
    return from_name(name, **form, **options)


def _options_of(weighting: Weighting) -> list[str]:
    """Names of the numbers that make a weighting of this class."""
    parameters = inspect.signature(type(weighting)).parameters
    return [name for name in parameters if name != "prediction_type"]

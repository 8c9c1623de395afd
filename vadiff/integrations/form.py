"""Checks that a criterion's weights and target suit the loss that a trainer computes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import weighting as weightings
from ..loss import DiffusionLoss
from ..targets import PosteriorMean


def criterion_in_form(
    criterion: DiffusionLoss | str,
    prediction_type: str,
    *,
    sigma_data: float = 0.5,
    loss_is_given: bool = False,
    target: PosteriorMean | None = None,
    options: Mapping[str, Any] | None = None,
    optimised: str | None = None,
) -> DiffusionLoss:
    """Make or check the criterion of a trainer whose base loss has the form of one prediction type.

    Args:
        criterion: a criterion, or the name of a weighting for one that is made here.
        prediction_type: form of the base loss, one of `vadiff.process.PREDICTION_TYPES`. A weighting given by name,
            here or to `DiffusionLoss`, is made for it.
        sigma_data: standard deviation of the data, the trainer's.
        loss_is_given: the trainer computes the loss per sample itself, the criterion only weights it.
        target: assigned to `criterion.target`; None leaves the criterion's own.
        options: arguments of `DiffusionLoss` and of the named weighting, for a criterion made here: numbers, names and
            lists, as in JSON.
        optimised: what the trainer's optimizer is given, if not the criterion: a learned weighting is then refused by
            name, and left to those who make the criterion themselves.

    Returns:
        The criterion.

    Raises:
        TypeError: neither a criterion nor a name; a target of another kind; an unknown option, or options beside a
            criterion.
        ValueError: an unknown name, or a criterion whose fixed weighting is written for another loss.
    """
    options = {} if options is None else options
    if isinstance(criterion, str):
        if optimised is not None and criterion == "learned":
            raise ValueError(
                f"criterion is 'learned', whose parameters nothing would train: the optimizer is given {optimised}. "
                "Use 'loss_level', to which it converges; or make criterion = vadiff.DiffusionLoss('learned') and give "
                "criterion.parameters() to the optimizer as well"
            )
        criterion = _made(criterion, prediction_type, sigma_data, options)
    elif options:
        raise TypeError(
            f"{', '.join(options)} given beside a criterion that is no name, expected none: they are arguments of "
            "vadiff.DiffusionLoss or of its weighting"
        )
    if not isinstance(criterion, DiffusionLoss):
        raise TypeError(
            f"criterion is a {type(criterion).__name__}, expected a vadiff.DiffusionLoss or the name of a weighting "
            f"({', '.join(weightings.available())})"
        )
    if isinstance(criterion.weighting, weightings.UnknownForm):
        criterion.weighting = criterion.weighting.in_form(prediction_type, sigma_data)
    weighting = criterion.weighting
    if isinstance(weighting, weightings.SNRWeighting):
        name = type(weighting).__name__
        if weighting.prediction_type != prediction_type:
            raise ValueError(
                f"criterion has {name}(prediction_type={weighting.prediction_type!r}), expected {prediction_type!r}: "
                f"the form of the loss here. Use {name}(prediction_type={prediction_type!r})."
            )
        if prediction_type == "edm" and weighting.sigma_data != sigma_data:
            raise ValueError(
                f"criterion has {name}(sigma_data={weighting.sigma_data:g}), expected {sigma_data:g}: the trainer's"
            )
    if loss_is_given and criterion.loss != "mse":
        raise ValueError(
            f"criterion has loss={criterion.loss!r}, expected 'mse': the trainer computes the loss per sample itself"
        )
    if target is not None:
        if not isinstance(target, PosteriorMean):
            raise TypeError(f"target is a {type(target).__name__}, expected a vadiff.targets.PosteriorMean")
        criterion.target = target
    return criterion


def _made(name: str, prediction_type: str, sigma_data: float, options: Mapping[str, Any]) -> DiffusionLoss:
    """A criterion with the weighting of this name; `options` are its own and its weighting's."""
    of_criterion = set(inspect.signature(DiffusionLoss).parameters) - {"weighting"}
    given = {key: value for key, value in options.items() if key in of_criterion}
    of_weighting = {key: value for key, value in options.items() if key not in of_criterion}
    if not of_weighting:
        return DiffusionLoss(name, **given)
    known = list(inspect.signature(weightings.class_of(name)).parameters)
    for key in of_weighting:
        if key not in known:
            raise TypeError(
                f"{key!r} is given, which {name} does not have, expected {' or '.join(known) or 'no option'}. "
                f"Options of the criterion are {', '.join(sorted(of_criterion))}"
            )
    if weightings.takes_prediction_type(name):
        of_weighting = {"prediction_type": prediction_type, "sigma_data": sigma_data, **of_weighting}
    return DiffusionLoss(weightings.from_name(name, **of_weighting), **given)


def require_form(
    criterion: nn.Module, prediction_type: str, *, sigma_data: float = 0.5, loss_is_given: bool = False
) -> None:
    """`criterion_in_form` for a criterion that is called as given, possibly wrapped for several processes.

    Raises as `criterion_in_form`; also TypeError for a name, which would be a new criterion at every call.
    """
    inner = getattr(criterion, "module", criterion)
    if not isinstance(inner, DiffusionLoss):
        raise TypeError(f"criterion is a {type(criterion).__name__}, expected a vadiff.DiffusionLoss")
    criterion_in_form(inner, prediction_type, sigma_data=sigma_data, loss_is_given=loss_is_given)


def moved_beside(criterion: DiffusionLoss, tensor: Tensor) -> DiffusionLoss:
    """Move the criterion to the tensor's device: trainers that expect a plain function as loss never do."""
    if criterion.statistics.state.device != tensor.device:
        criterion.to(tensor.device)
    return criterion


def training_target(criterion: DiffusionLoss) -> PosteriorMean | None:
    """What to regress on in place of the data in this mode: in eval mode losses are against the data, hence None."""
    target = criterion.target
    if not criterion.training or target is None:
        return None
    if not isinstance(target, PosteriorMean):
        raise ValueError(
            f"the criterion's target is {target.description}, as read from a copy or a snapshot, without references: "
            "make the loss anew with target=PosteriorMean(...), and load its state_dict"
        )
    return target

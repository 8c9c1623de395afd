"""Loss weights per noise level: fixed functions of log-SNR, tables that adapt to the statistics, a learned head."""

import functools
from typing import Any

from .._validation import require_known
from .adaptive import AdaptiveWeighting, LossLevel, VarianceAware
from .base import Weighting
from .batch import Cauchy, Gaussian, LossZScore
from .fixed import (
    EDM,
    P2,
    SNR,
    Constant,
    ConstantX0,
    CosMap,
    Debiased,
    FixedWeighting,
    InverseSNR,
    MinSNR,
    MonotonicEDM,
    SigmaSqrt,
    Sigmoid,
    SNRWeighting,
    SoftMinSNR,
    TruncatedSNR,
)
from .learned import LearnedUncertainty
from .optimal import GapWeighting, InverseOptimalLoss
from .table import WeightTable
from .unknown_form import UnknownForm

__all__ = [
    "EDM",
    "P2",
    "SNR",
    "AdaptiveWeighting",
    "Cauchy",
    "Constant",
    "ConstantX0",
    "CosMap",
    "Debiased",
    "FixedWeighting",
    "GapWeighting",
    "Gaussian",
    "InverseOptimalLoss",
    "InverseSNR",
    "LearnedUncertainty",
    "LossLevel",
    "LossZScore",
    "MinSNR",
    "MonotonicEDM",
    "SNRWeighting",
    "SigmaSqrt",
    "Sigmoid",
    "SoftMinSNR",
    "TruncatedSNR",
    "UnknownForm",
    "VarianceAware",
    "WeightTable",
    "Weighting",
    "available",
    "from_name",
    "takes_prediction_type",
]

_BY_NAME: dict[str, type[Weighting]] = {
    "cauchy": Cauchy,
    "constant": Constant,
    "constant_x0": ConstantX0,
    "cosmap": CosMap,
    "debiased": Debiased,
    "edm": EDM,
    "gaussian": Gaussian,
    "inv_snr": InverseSNR,
    "learned": LearnedUncertainty,
    "loss_level": LossLevel,
    "loss_zscore": LossZScore,
    "min_snr": MinSNR,
    "monotonic_edm": MonotonicEDM,
    "p2": P2,
    "sigma_sqrt": SigmaSqrt,
    "sigmoid": Sigmoid,
    "snr": SNR,
    "soft_min_snr": SoftMinSNR,
    "truncated_snr": TruncatedSNR,
    "variance_aware": VarianceAware,
}


def available() -> tuple[str, ...]:
    """Names that `DiffusionLoss(weighting=...)` accepts in place of an object, sorted.

    `InverseOptimalLoss` and `GapWeighting` need a data set's optimal loss and have no name.
    """
    return tuple(sorted(_BY_NAME))


def takes_prediction_type(name: str) -> bool:
    """Whether the weighting of this name depends on the form of the loss (see `SNRWeighting`).

    Raises:
        ValueError: an unknown name.
    """
    return issubclass(class_of(name), SNRWeighting)


def from_name(weighting: str | Weighting, **options: Any) -> Weighting:
    """Make the weighting of a name with the options of its class; a weighting object is returned unchanged.

    "soft_min_snr" with a `sigma_data` but without a `gamma` has gamma = 1/sigma_data**2, k-diffusion's.

    Raises:
        ValueError: an unknown name, or an option out of bounds.
        TypeError: neither a name nor a weighting, or an option that the class does not take.
    """
    if isinstance(weighting, Weighting):
        if options:
            raise TypeError(f"options {', '.join(options)} are given with a weighting object, expected none")
        return weighting
    if not isinstance(weighting, str):
        raise TypeError(
            f"weighting is a {type(weighting).__name__}, expected a name ({', '.join(available())}) "
            f"or an object from vadiff.weighting"
        )
    if weighting == "soft_min_snr" and "sigma_data" in options:
        made = SoftMinSNR(**options)  # checks sigma_data
        options.setdefault("gamma", 1.0 / made.sigma_data**2)
    return class_of(weighting)(**options)


def for_criterion(weighting: str | Weighting) -> Weighting:
    """The weighting of a `DiffusionLoss`; as `UnknownForm` if its name does not say the form of the loss it is for.

    Raises as `from_name`.
    """
    if isinstance(weighting, str) and takes_prediction_type(weighting):
        return UnknownForm(weighting, functools.partial(from_name, weighting))
    return from_name(weighting)


def class_of(name: str) -> type[Weighting]:
    """The class of a name.

    Raises:
        ValueError: an unknown name.
    """
    require_known("weighting", name, available())
    return _BY_NAME[name]

"""How much each noise level counts: fixed functions of log-SNR, and tables that adapt to the statistics."""

from .adaptive import AdaptiveWeighting, LossLevel, VarianceAware
from .fixed import Cauchy, Constant, FixedWeighting, MinSNR
from .table import WeightTable

__all__ = [
    "AdaptiveWeighting",
    "Cauchy",
    "Constant",
    "FixedWeighting",
    "LossLevel",
    "MinSNR",
    "VarianceAware",
    "WeightTable",
    "available",
    "from_name",
]

Weighting = AdaptiveWeighting | FixedWeighting

_BY_NAME: dict[str, type[AdaptiveWeighting] | type[FixedWeighting]] = {
    "cauchy": Cauchy,
    "constant": Constant,
    "loss_level": LossLevel,
    "min_snr": MinSNR,
    "variance_aware": VarianceAware,
}


def available() -> tuple[str, ...]:
    """Names that `DiffusionLoss(weighting=...)` accepts in place of an object, sorted."""
    return tuple(sorted(_BY_NAME))


def from_name(weighting: str | Weighting) -> Weighting:
    """The weighting a name stands for, with its defaults; an object is returned as it is.

    Raises:
        ValueError: no such name.
        TypeError: neither a name nor a weighting.
    """
    if isinstance(weighting, (AdaptiveWeighting, FixedWeighting)):
        return weighting
    if not isinstance(weighting, str):
        raise TypeError(
            f"weighting is a {type(weighting).__name__}, expected a name ({', '.join(available())}) "
            f"or an object from vadiff.weighting"
        )
    if weighting not in _BY_NAME:
        raise ValueError(f"weighting is {weighting!r}, expected one of {', '.join(available())}")
    return _BY_NAME[weighting]()

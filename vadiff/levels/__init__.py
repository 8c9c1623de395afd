"""Samplers of the noise levels to train on: inverse-CDF, fixed and adaptive, with their densities.

sampler = vadiff.levels.LogNormal(p_mean=-1.2, p_std=1.2)
levels = sampler(vadiff.levels.uniforms(64, generator, stratified=True))
levels.log_snr, levels.sigma, levels.sample_weight
"""

from typing import Any

from .._validation import require_known
from .adaptive import AdaptiveLevels, LossSpread, SecondMoment
from .epoch import EpochUniforms
from .fixed import Cauchy, CosMap, Laplace, LogitNormal, LogNormal, LogUniform, Mode, UniformTime, UniformTimesteps
from .gap import GapLevels
from .information import Information
from .k_diffusion import CosineInterpolated, SplitLogNormal
from .mixture import Mixture
from .noise_share import Beta, LogLogistic
from .sampler import LevelSampler, NoiseLevels, uniforms
from .shift import SHIFT_RULES, Shift, shift_alpha
from .suggestion import Suggestion, information_density, suggest
from .table import Table

__all__ = [
    "SHIFT_RULES",
    "AdaptiveLevels",
    "Beta",
    "Cauchy",
    "CosMap",
    "CosineInterpolated",
    "EpochUniforms",
    "GapLevels",
    "Information",
    "Laplace",
    "LevelSampler",
    "LogLogistic",
    "LogNormal",
    "LogUniform",
    "LogitNormal",
    "LossSpread",
    "Mixture",
    "Mode",
    "NoiseLevels",
    "SecondMoment",
    "Shift",
    "SplitLogNormal",
    "Suggestion",
    "Table",
    "UniformTime",
    "UniformTimesteps",
    "available",
    "from_name",
    "information_density",
    "shift_alpha",
    "suggest",
    "uniforms",
]

_BY_NAME: dict[str, type[LevelSampler]] = {
    "beta": Beta,
    "cauchy": Cauchy,
    "cosine_interpolated": CosineInterpolated,
    "cosmap": CosMap,
    "information": Information,
    "laplace": Laplace,
    "log_logistic": LogLogistic,
    "log_normal": LogNormal,
    "log_uniform": LogUniform,
    "logit_normal": LogitNormal,
    "loss_spread": LossSpread,
    "mode": Mode,
    "second_moment": SecondMoment,
    "split_log_normal": SplitLogNormal,
    "table": Table,
    "uniform_time": UniformTime,
}


def available() -> tuple[str, ...]:
    """Names that `from_name` accepts, sorted."""
    return tuple(sorted(_BY_NAME))


def from_name(name: str, **options: Any) -> LevelSampler:
    """Make the sampler of a name with the options of its class.

    Raises:
        ValueError: an unknown name, or an option out of bounds.
        TypeError: an option that the class does not take.

    Example:
        >>> from_name("log_normal", p_mean=-0.4, p_std=1.0)
        LogNormal(p_mean=-0.4, p_std=1)
    """
    return class_of(name)(**options)


def class_of(name: str) -> type[LevelSampler]:
    """The class of a name.

    Raises:
        ValueError: an unknown name.
    """
    require_known("levels", name, available())
    return _BY_NAME[name]

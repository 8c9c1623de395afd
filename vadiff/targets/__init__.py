"""What a network is regressed on: the posterior mean of the data in place of the sample that was drawn."""

from .posterior_mean import PosteriorMean
from .recorded import Recorded

__all__ = ["PosteriorMean", "Recorded"]

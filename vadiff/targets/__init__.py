"""What a network is regressed on: the posterior mean of the data in place of the sample that was drawn."""

from .posterior_mean import PosteriorMean

__all__ = ["PosteriorMean"]

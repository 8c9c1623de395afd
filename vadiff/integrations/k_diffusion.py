"""k-diffusion: weights and statistics for `k_diffusion.layers.Denoiser`.

Its loss is the squared error of the raw network output F ("edm" among the prediction types), so weights made for it are
those of the F loss, and with ``weighting="karras"`` (a weight of 1) the F loss is the base loss in the bins.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import MissingExtraError, import_extra
from ..log_snr import from_sigma
from ..loss import DiffusionLoss
from ..weighting import Constant, FixedWeighting, LossZScore, SNRWeighting
from .form import criterion_in_form, moved_beside

__all__ = ["SigmaWeighting", "WeightedDenoiser", "import_k_diffusion"]

_NOT_FOR_TRAINING = ("augmentation", "config", "evaluation")  # need scikit-image, jsonmerge, clip and clean-fid


class SigmaWeighting(nn.Module):
    """A criterion's weight as a function of sigma, for `Denoiser`'s ``weighting``; records nothing.

    For fixed weights, or for those that another run's statistics ended with; for weights that adapt use
    `WeightedDenoiser`. `Denoiser`'s constructor refuses callables up to version 0.1.1.post1: there, set the attribute,
    ``denoiser.weighting = SigmaWeighting("min_snr")``.

    Args:
        criterion: a `vadiff.DiffusionLoss`, or the name of a fixed weighting.
        sigma_data: the denoiser's; k-diffusion's default is 1.

    Raises:
        ValueError, TypeError: no criterion or name, or fixed weights for another loss than F's; the name of a weighting
            that adapts, or one that depends on more than sigma.
    """

    def __init__(self, criterion: DiffusionLoss | str, sigma_data: float = 1.0) -> None:
        super().__init__()
        self.criterion = criterion_in_form(criterion, "edm", sigma_data=sigma_data, loss_is_given=True)
        weighting = self.criterion.weighting
        if isinstance(criterion, str) and not isinstance(weighting, FixedWeighting):
            raise ValueError(
                f"criterion is {criterion!r}, which has no statistics to weigh by, and none are recorded here: "
                "expected a fixed weighting, or a trained criterion. Use WeightedDenoiser for weights that adapt."
            )
        if isinstance(weighting, LossZScore) or (isinstance(weighting, FixedWeighting) and not weighting.pointwise):
            raise ValueError(f"criterion has {weighting}, which depends on more than sigma. Use WeightedDenoiser.")

    def forward(self, sigma: Tensor) -> Tensor:
        """Weights of the F loss at noise levels sigma [B]; [B], dtype of sigma."""
        log_snr = from_sigma(sigma)
        return moved_beside(self.criterion, log_snr).weight_at(log_snr).to(sigma.dtype)


class WeightedDenoiser(nn.Module):
    """A `Denoiser` whose `loss` is weighted by a criterion and recorded in its statistics.

    It goes where the denoiser went. The denoiser's own loss is computed by its own code, whatever its `scales`, and is
    the base loss, its `weighting` included. k-diffusion's train.py saves the inner network only: save
    ``criterion.state_dict()`` beside it.

    Args:
        denoiser: a `Denoiser` or `SimpleLossDenoiser`; its `weighting` "karras" if the criterion has fixed weights.
        criterion: a `vadiff.DiffusionLoss`, or the name of a weighting for one with the default settings; "constant" is
            the denoiser's own loss.

    Raises:
        TypeError: the denoiser has no `loss`, or learns a weight of its own (`DenoiserWithVariance`).
        ValueError: the criterion's fixed weights are for another loss, or would come on top of the denoiser's.
    """

    def __init__(self, denoiser: Any, criterion: DiffusionLoss | str = "variance_aware") -> None:
        super().__init__()
        if not callable(getattr(denoiser, "loss", None)) or not hasattr(denoiser, "sigma_data"):
            raise TypeError(f"denoiser is a {type(denoiser).__name__}, expected a k_diffusion.layers.Denoiser")
        classes = {base.__name__ for base in type(denoiser).__mro__}
        form = "epsilon" if "SimpleLossDenoiser" in classes else "edm"
        sigma_data = float(denoiser.sigma_data)
        criterion = criterion_in_form(criterion, form, sigma_data=sigma_data, loss_is_given=True)
        if "DenoiserWithVariance" in classes and not isinstance(criterion.weighting, Constant):
            raise TypeError(
                "denoiser is a DenoiserWithVariance, which learns a weight and would undo the criterion's: use a "
                "Denoiser (config: has_variance false), or criterion='constant' for statistics alone"
            )
        if isinstance(criterion.weighting, SNRWeighting) and form == "edm" and not _is_one(denoiser.weighting):
            raise ValueError(
                "denoiser has a weighting of its own, on top of which "
                f"{type(criterion.weighting).__name__} would come: make it with weighting='karras', or use "
                "criterion='constant'"
            )
        self.denoiser = denoiser
        self.criterion = criterion

    @property
    def inner_model(self) -> Any:
        """The network that the denoiser wraps."""
        return self.denoiser.inner_model

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoiser's D(input; sigma)."""
        denoised: Tensor = self.denoiser(input, sigma, **kwargs)
        return denoised

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoiser's loss, weighted and recorded.

        Args:
            input: clean samples, [B, ...].
            noise: eps ~ N(0, 1), of the same shape.
            sigma: noise levels, [B].
            kwargs: passed on to the network.

        Returns:
            [B]; take its mean.

        Raises:
            ValueError: sigma is not one number per sample.
        """
        log_snr = from_sigma(sigma)
        losses: Tensor = self.denoiser.loss(input, noise, sigma, **kwargs)
        return moved_beside(self.criterion, losses).reweight(losses, log_snr)


def import_k_diffusion() -> ModuleType:
    """``import k_diffusion``, also where what its FID evaluation, config files and augmentation need is missing.

    Version 0.1.1.post1 imports all of that at once; of it, `clip` wants a pkg_resources that setuptools no longer has.
    Where the import fails, those three modules are left out; using them says so.

    Raises:
        vadiff.extras.MissingExtraError: k-diffusion is not installed, or what its layers need is not.
    """
    try:
        return import_extra("k_diffusion", "integrations")
    except MissingExtraError as error:
        trouble = error
    for name in [name for name in sys.modules if name.partition(".")[0] == "k_diffusion"]:
        del sys.modules[name]
    for name in _NOT_FOR_TRAINING:
        sys.modules[f"k_diffusion.{name}"] = _LeftOut(f"k_diffusion.{name}", trouble)
    try:
        return import_extra("k_diffusion", "integrations")
    except MissingExtraError as error:
        for name in _NOT_FOR_TRAINING:
            del sys.modules[f"k_diffusion.{name}"]
        raise MissingExtraError(f"{error}, and pip install --no-deps dctorch k-diffusion") from error


class _LeftOut(ModuleType):
    """Stands where a module did not import."""

    def __init__(self, name: str, trouble: ImportError) -> None:
        super().__init__(name)
        self._trouble = trouble

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__} was left out: {self._trouble}") from self._trouble


def _is_one(weighting: Any) -> bool:
    """Whether a denoiser's own weighting is 1 at noise levels far apart."""
    return bool((weighting(torch.tensor([0.01, 1.0, 50.0])) == 1).all())

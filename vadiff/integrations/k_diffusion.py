"""k-diffusion: weights and statistics for `k_diffusion.layers.Denoiser`.

Its loss is the squared error of the raw network output F ("edm" among the prediction types), so fixed weights
must be written for the F loss, and with ``weighting="karras"`` (a weight of 1) the F loss is the recorded base loss.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
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

_NOT_FOR_LAYERS = ("augmentation", "config", "evaluation")  # need scikit-image, jsonmerge, clip and clean-fid


class SigmaWeighting(nn.Module):
    """A criterion's weight as a function of sigma, for `Denoiser`'s ``weighting``; records nothing.

    For fixed weights, or for the final weights of another run; for weights that adapt use
    `WeightedDenoiser`. `Denoiser`'s constructor refuses callables up to version 0.1.1.post1: there, set the attribute,
    ``denoiser.weighting = SigmaWeighting("min_snr")``.

    Args:
        criterion: a `vadiff.DiffusionLoss`, or the name of a fixed weighting.
        sigma_data: the denoiser's; k-diffusion's default is 1.

    Raises:
        ValueError, TypeError: not a criterion or a name; fixed weights for another loss than F's; the name of a
            weighting that adapts; a weighting that depends on more than sigma.
    """

    def __init__(self, criterion: DiffusionLoss | str, sigma_data: float = 1.0) -> None:
        super().__init__()
        self.criterion = criterion_in_form(criterion, "edm", sigma_data=sigma_data, loss_is_given=True)
        weighting = self.criterion.weighting
        if isinstance(criterion, str) and not isinstance(weighting, FixedWeighting):
            raise ValueError(
                f"criterion is {criterion!r}, which needs statistics, and none are recorded here: "
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

    It replaces the denoiser. The base loss is the denoiser's own `loss`, computed by its own code with its `scales` and
    its `weighting`. `parameters` and `buffers` are the denoiser's, with its names, because train.py compares them with
    those of its average and clips the norm of their gradient; `state_dict` contains the criterion. train.py saves the
    inner network only: save ``criterion.state_dict()`` beside it.

    Args:
        denoiser: a `Denoiser` or `SimpleLossDenoiser`; its `weighting` must be "karras" for fixed weights.
        criterion: a `vadiff.DiffusionLoss`, or the name of a weighting for one with the default settings; "constant" is
            the denoiser's own loss. One with "learned" has to be made by you, and its ``criterion.parameters()`` given
            to the optimizer.
        options: of the named weighting and of `vadiff.DiffusionLoss`, such as ``strength=0.5, bins=64``.

    Raises:
        TypeError: the denoiser has no `loss`, or learns a weight of its own (`DenoiserWithVariance`).
        ValueError: the criterion's fixed weights are for another loss, or would multiply the denoiser's.
    """

    def __init__(self, denoiser: Any, criterion: DiffusionLoss | str = "variance_aware", **options: Any) -> None:
        super().__init__()
        if not callable(getattr(denoiser, "loss", None)) or not hasattr(denoiser, "sigma_data"):
            raise TypeError(f"denoiser is a {type(denoiser).__name__}, expected a k_diffusion.layers.Denoiser")
        classes = {base.__name__ for base in type(denoiser).__mro__}
        form = "epsilon" if "SimpleLossDenoiser" in classes else "edm"
        sigma_data = float(denoiser.sigma_data)
        criterion = criterion_in_form(
            criterion, form, sigma_data=sigma_data, loss_is_given=True, options=options,
            optimised="the parameters of the inner network",
        )  # fmt: skip
        if "DenoiserWithVariance" in classes and not isinstance(criterion.weighting, Constant):
            raise TypeError(
                "denoiser is a DenoiserWithVariance, which learns a weight and would undo the criterion's: use a "
                "Denoiser (config: has_variance false), or criterion='constant' for statistics alone"
            )
        if isinstance(criterion.weighting, SNRWeighting) and form == "edm" and not _is_one(denoiser.weighting):
            raise ValueError(
                "denoiser has a weighting of its own, which "
                f"{type(criterion.weighting).__name__} would multiply: make it with weighting='karras', or use "
                "criterion='constant'"
            )
        self.denoiser = denoiser
        self.criterion = criterion

    @property
    def inner_model(self) -> Any:
        """The network that the denoiser wraps."""
        return self.denoiser.inner_model

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the denoiser, with its names; a learned weighting's are ``criterion.parameters()``."""
        yield from self.denoiser.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Those of the denoiser, with its names; the criterion's are ``criterion.buffers()``."""
        yield from self.denoiser.named_buffers(*args, **kwargs)

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
    """``import k_diffusion`` whole, as train.py needs it, or at least its layers, models and samplers.

    Its evaluation imports the package `clip` (clip-anytorch), which takes `packaging` from a pkg_resources that only
    old versions of setuptools have: `clip` is imported with a stand-in for that module. If another dependency of
    k_diffusion.evaluation, config or augmentation is missing, placeholders replace the three modules and raise when
    they are used.

    Raises:
        vadiff.extras.MissingExtraError: k-diffusion or a dependency of its layers is not installed.
    """
    with contextlib.suppress(ImportError), _packaging_in_pkg_resources():
        importlib.import_module("clip")
    try:
        return import_extra("k_diffusion", "integrations")
    except MissingExtraError as error:
        cause = error
    for name in [name for name in sys.modules if name.partition(".")[0] == "k_diffusion"]:
        del sys.modules[name]
    for name in _NOT_FOR_LAYERS:
        sys.modules[f"k_diffusion.{name}"] = _Missing(f"k_diffusion.{name}", cause)
    try:
        return import_extra("k_diffusion", "integrations")
    except MissingExtraError as error:
        for name in _NOT_FOR_LAYERS:
            del sys.modules[f"k_diffusion.{name}"]
        raise MissingExtraError(f"{error}, and pip install --no-deps dctorch k-diffusion") from error


@contextlib.contextmanager
def _packaging_in_pkg_resources() -> Iterator[None]:
    """Let ``from pkg_resources import packaging`` find the package of that name."""
    stand_in, before = ModuleType("pkg_resources"), sys.modules.get("pkg_resources")
    importlib.import_module("packaging.version")
    stand_in.__dict__["packaging"] = sys.modules["packaging"]
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]
        if before is not None:
            sys.modules["pkg_resources"] = before


class _Missing(ModuleType):
    """Placeholder for a module that could not be imported."""

    def __init__(self, name: str, cause: ImportError) -> None:
        super().__init__(name)
        self._cause = cause

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self.__name__} could not be imported: {self._cause.__cause__ or self._cause}. train.py needs it: "
            "pip install jsonmerge scikit-image clean-fid clip-anytorch kornia"
        ) from self._cause


def _is_one(weighting: Any) -> bool:
    """Whether a denoiser's own weighting is 1 at noise levels far apart."""
    return bool((weighting(torch.tensor([0.01, 1.0, 50.0])) == 1).all())

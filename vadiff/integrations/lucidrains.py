"""lucidrains' denoising-diffusion-pytorch: weights and statistics for its diffusions, through their own arguments.

`GaussianDiffusion`, `GaussianDiffusion1D` and `ElucidatedDiffusion` take the noise levels of a call (``times=``,
``sigma=``) and return losses per sample with ``loss_reduction="none"``; no other part of them is used.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from ..log_snr import from_alphas_cumprod, from_sigma
from ..loss import DiffusionLoss
from ..process import loss_ratio
from ..targets import PosteriorMean
from ..weighting import SNRWeighting
from .form import criterion_in_form, moved_beside, training_target

__all__ = ["attach", "log_snr"]

_FORMS = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


def attach(
    diffusion: Any,
    criterion: DiffusionLoss | str = "variance_aware",
    *,
    target: PosteriorMean | None = None,
    **options: Any,
) -> Any:
    """Weight and record the losses of every ``diffusion(images)`` from now on.

    Works with the library's `Trainer`: the criterion becomes ``diffusion.criterion``, is saved and loaded with the
    model, and copied with it. The objective's own weights (`loss_weight`) stay and are part of the base loss. For
    GaussianDiffusion they turn every objective into the epsilon loss, so fixed weights must be written for
    "epsilon", whatever the network predicts; for ElucidatedDiffusion they must be written for "edm".

    A loop that calls `p_losses` itself needs no attaching:
    ``criterion.reweight(diffusion.p_losses(x, t, loss_reduction="none"), log_snr(diffusion, t)).mean()``.

    Args:
        diffusion: an object of one of the three classes.
        criterion: a `vadiff.DiffusionLoss`, or the name of a weighting for one with the default settings; "constant" is
            the diffusion's own loss.
        target: regress on the posterior mean in place of the data, in training mode; becomes `criterion.target`. Its
            references are ``diffusion.normalize(images)``. For GaussianDiffusion and GaussianDiffusion1D.
        options: of the named weighting and of `vadiff.DiffusionLoss`, such as ``strength=0.5, fresh_statistics=True``.

    Returns:
        The diffusion.

    Raises:
        TypeError: not such a diffusion, or of a version without the arguments.
        ValueError: a criterion is attached already; fixed weights for another loss, or on top of the diffusion's own
            Min-SNR weights; the diffusion's `loss_weight` is not finite (a schedule that ends at zero SNR); a target
            for ElucidatedDiffusion, whose noise cannot be given, or with offset or immiscible noise.
    """
    level = _level_name(diffusion)
    if hasattr(diffusion, "criterion"):
        raise ValueError("diffusion has a criterion already: weights would multiply. Load its state, or use a new one.")
    form = "edm" if level == "sigma" else "epsilon"
    sigma_data = float(diffusion.sigma_data) if level == "sigma" else 0.5
    criterion = criterion_in_form(
        criterion, form, sigma_data=sigma_data, loss_is_given=True, target=target, options=options
    )
    if criterion.target is not None:
        _check_noise(diffusion, level)
    if level == "times":
        _check_loss_weight(diffusion, criterion)
    device = next(diffusion.parameters()).device
    diffusion.criterion = criterion.to(device)
    diffusion.register_forward_pre_hook(_ask_for_losses, with_kwargs=True)
    diffusion.register_forward_hook(_weigh, with_kwargs=True)
    return diffusion


def log_snr(diffusion: Any, levels: Tensor) -> Tensor:
    """Log-SNR of a diffusion's noise levels, from its current schedule.

    Args:
        diffusion: a GaussianDiffusion, GaussianDiffusion1D or ElucidatedDiffusion.
        levels: times [B] integers, or for ElucidatedDiffusion sigma [B].

    Returns:
        [B] float32.

    Raises:
        TypeError: not such a diffusion, or levels of the wrong kind.
        ValueError: levels of another shape.
    """
    if _level_name(diffusion) == "sigma":
        return from_sigma(levels)
    table: Tensor = diffusion.alphas_cumprod
    return from_alphas_cumprod(table, levels)


class _MeanWanted(str):
    """The string "none" as `loss_reduction`; its type tells the forward hook that the caller wants the mean."""


def _ask_for_losses(
    diffusion: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: draw noise levels with the diffusion's own method, and request losses per sample."""
    name = _level_name(diffusion)
    levels = kwargs.get(name)
    if levels is None:
        samples = (args[0] if args else kwargs["img" if name == "times" else "images"]).shape[0]
        levels = diffusion.random_times(samples) if name == "times" else diffusion.noise_distribution(samples)
    if kwargs.get("return_reduced_loss") is False:  # GaussianDiffusion1D
        raise ValueError(
            "return_reduced_loss=False gives a loss per element, without the diffusion's own weights; expected "
            "loss_reduction='none' for one per sample"
        )
    per_sample = kwargs.get("loss_reduction") == "none"
    given = {**kwargs, name: levels, "loss_reduction": "none" if per_sample else _MeanWanted("none")}
    target = training_target(diffusion.criterion)
    return (args, given) if target is None else _with_target(diffusion, target, args, given)


def _with_target(
    diffusion: Any, target: PosteriorMean, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the posterior means of images and noise in their place: x_t made from them is the same."""
    if given.get("model_forward_kwargs"):
        raise ValueError(
            "model_forward_kwargs is given with a target, expected none: what the network is told of a sample changes "
            "its posterior"
        )
    _check_noise(diffusion, _level_name(diffusion))  # the target may have been assigned later
    images = args[0] if args else given.pop("img")
    clean = diffusion.normalize(images)
    noise = given.get("noise")
    noise = torch.randn_like(clean) if noise is None else noise
    alpha_bar = diffusion.alphas_cumprod[given["times"]]
    moved_beside(diffusion.criterion, images)
    x0_hat, given["noise"] = target.pair(clean, noise, alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt())
    changed = torch.where(x0_hat == clean, images, diffusion.unnormalize(x0_hat))  # the others stay bit by bit
    return (changed, *args[1:]), given


def _weigh(diffusion: Any, args: tuple[Any, ...], kwargs: dict[str, Any], losses: Tensor) -> Tensor:
    """Forward hook: apply the criterion, and take the mean if the caller wants it."""
    levels = log_snr(diffusion, kwargs[_level_name(diffusion)])
    losses = moved_beside(diffusion.criterion, losses).reweight(losses, levels)
    return losses.mean() if isinstance(kwargs["loss_reduction"], _MeanWanted) else losses


def _level_name(diffusion: Any) -> str:
    """Name of the noise-level argument of a diffusion's forward: "times" or "sigma"."""
    kind: Any = type(diffusion)
    arguments = _arguments_of(kind)
    if "loss_reduction" in arguments:
        if "times" in arguments and hasattr(diffusion, "random_times") and hasattr(diffusion, "alphas_cumprod"):
            return "times"
        if "sigma" in arguments and hasattr(diffusion, "noise_distribution") and hasattr(diffusion, "sigma_data"):
            return "sigma"
    raise TypeError(
        f"diffusion is a {type(diffusion).__name__} whose forward takes {', '.join(arguments)}; expected a "
        "GaussianDiffusion, GaussianDiffusion1D or ElucidatedDiffusion of denoising-diffusion-pytorch 2.3.4 or later, "
        "with times= or sigma= and loss_reduction="
    )


def _check_noise(diffusion: Any, level: str) -> None:
    """Check that the noise of a diffusion can be given."""
    if level == "sigma":
        raise ValueError(
            "target is given for ElucidatedDiffusion, expected None: its noise cannot be given. Train D with "
            "vadiff.integrations.edm.EDMLoss(target=...), where net is "
            "lambda x, sigma, labels: diffusion.preconditioned_network_forward(x, sigma.flatten())"
        )
    if getattr(diffusion, "offset_noise_strength", 0.0) > 0.0:
        raise ValueError(
            f"diffusion has offset_noise_strength={diffusion.offset_noise_strength:g} with a target, expected 0: the "
            "posterior is that of independent noise"
        )
    if getattr(diffusion, "immiscible", False):
        raise ValueError(
            "diffusion has immiscible=True with a target, expected False: noise that is chosen by the images does not "
            "have their posterior"
        )


@functools.cache
def _arguments_of(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)


def _check_loss_weight(diffusion: Any, criterion: DiffusionLoss) -> None:
    """Check that a GaussianDiffusion's own weights are finite and, under fixed weights, make the epsilon loss."""
    weight = diffusion.loss_weight.double()
    if not bool(weight.isfinite().all()):
        raise ValueError(
            f"diffusion.loss_weight is not finite at {int((~weight.isfinite()).sum())} timesteps: the schedule reaches "
            f"zero SNR, where {diffusion.objective} has no weight. Use objective='pred_v'."
        )
    if not isinstance(criterion.weighting, SNRWeighting):
        return
    times = torch.arange(len(weight), device=weight.device)
    levels = from_alphas_cumprod(diffusion.alphas_cumprod.double(), times)
    ratio = loss_ratio("epsilon", levels) / loss_ratio(_FORMS[diffusion.objective], levels)
    # At the lowest noise 1 - alphas_cumprod, from which both are computed, has three digits.
    if not torch.allclose(weight, ratio, rtol=1e-2, atol=1e-12):
        raise ValueError(
            f"diffusion has a loss_weight of its own (min_snr_loss_weight=True?), which "
            f"{type(criterion.weighting).__name__} would multiply: make it with min_snr_loss_weight=False, or use "
            "criterion='constant'"
        )

"""DiffusionLoss: the drop-in criterion."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import autograd, backends, eager, live, settings
from ._validation import check_coefficients, check_elements, check_per_sample, check_prediction, is_number
from .reference import Bins, Coefficient, TableRule, log_weight_at
from .statistics import LogSNRStatistics
from .weighting import (
    AdaptiveWeighting,
    Constant,
    FixedWeighting,
    LearnedUncertainty,
    LossZScore,
    Weighting,
    from_name,
)

REDUCTIONS = ("mean", "none")
LOSSES = ("mse", "huber")


class DiffusionLoss(nn.Module):
    """Noise-level-aware denoising loss, to put in place of `F.mse_loss(prediction, target)`.

    The loss is ``mean_i w(lambda_i) * u_i * v_i * ell_i`` with ``ell_i`` the mean over sample i's elements of the
    squared (or Huber) residual ``r = a*prediction + b*target + c*noise``, u the base weight, v the sample weight and w
    the weighting. In training mode with grad enabled, each call also folds the base losses ``g_i = u_i * ell_i`` into
    running statistics per log-SNR bin. The weights of a batch come from the statistics before it, so the gradient is
    that of a fixed-weight loss. On a CUDA device, the recording calls of one criterion belong on one stream: two that
    overlap mix up its statistics, until `statistics.reset()`.

    Args:
        weighting: a name from `vadiff.weighting.available()`, or an object from `vadiff.weighting`.
        bins: number K of log-SNR bins, 2 to 1024.
        log_snr_range: (low, high) of the bins, natural log of alpha**2/sigma**2; values outside fall in the end bins.
        half_life: samples per bin, on average, after which a sample counts half; `float("inf")` is plain Welford.
        loss: "mse", or "huber" (`torch.nn.functional.huber_loss`'s definition).
        huber_delta: where Huber's function turns from quadratic to linear.
        backend: "auto", "native", "triton" or "reference"; see `vadiff.backends`.
        sync: merge the statistics of all ranks of the default process group, when one is initialised. Every rank
            must then call the criterion equally often.

    Attributes:
        statistics: `LogSNRStatistics`, per-bin count, mean, variance, mass, relative_std (float64 [K]) and skipped.
        base_loss: mean of v*g over the last batch, detached, with `weighting.LearnedUncertainty`, whose loss has more
            in it; else None.

    Raises:
        ValueError, TypeError: an argument out of bounds; the message names it.

    Example:
        >>> criterion = vadiff.DiffusionLoss("variance_aware")
        >>> clean, sigma = torch.randn(8, 3, 32, 32), torch.rand(8) + 0.1
        >>> denoised = (clean + 0.1 * torch.randn_like(clean)).requires_grad_()  # what a network returned
        >>> criterion(denoised, clean, vadiff.log_snr.from_sigma(sigma)).backward()
        >>> criterion.statistics.count.sum()
        tensor(8., dtype=torch.float64)
    """

    _last: Any = None  # ell of the last call: a tensor, or what `eager.step` left behind

    def __init__(
        self,
        weighting: str | Weighting = "variance_aware",
        bins: int = 128,
        log_snr_range: tuple[float, float] = (-16.0, 16.0),
        half_life: float = 256.0,
        loss: str = "mse",
        huber_delta: float = 1.0,
        backend: str = "auto",
        sync: bool = True,
    ) -> None:
        super().__init__()
        self.weighting = from_name(weighting)
        self.statistics = LogSNRStatistics(bins, log_snr_range, half_life)
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}, expected one of {', '.join(LOSSES)}")
        if not is_number(huber_delta) or not torch.finfo(torch.float32).tiny <= huber_delta < math.inf:
            raise ValueError(f"huber_delta is {huber_delta!r}, expected a positive finite number")
        backends.check_name(backend)
        self.loss = loss
        self.huber_delta = float(huber_delta)
        self.backend = backend
        self.sync = bool(sync)
        self.base_loss: Tensor | None = None

    @classmethod
    def for_process(
        cls, process: Any, *, prediction_type: str | None = None, fine_tuning: bool = False, **overrides: Any
    ) -> DiffusionLoss:
        """A criterion with range, bins and weighting that suit a noise process.

        The bins are 0.25 wide in log-SNR and cover what the process has: sigma from 0.002 to 80 for EDM, t from 0.001
        to 0.999 for what is continuous, the finite part of a scheduler's table. Fine-tuning sees fewer samples: bins of
        0.5. There, too, the weights of a variance-preserving process go half the way (strength 0.5): its losses
        spread over orders of magnitude, and the network was trained on their own balance. Where the loss compares
        images ("sample", EDM's schedulers of diffusers among them), weights are not clipped: from the lowest noise to
        the highest such losses differ by more than clip².

        Args:
            process: "edm", "flow", "stable_diffusion", "vp_cosine" or "vp_linear"; an object from `vadiff.process`; or
                a scheduler of diffusers (or one with such tables), of which the prediction type is taken too.
            prediction_type: what the loss is written in, where the process does not say; one of
                `vadiff.process.PREDICTION_TYPES`. A weighting given by a name that depends on it ("min_snr", ...) gets
                it.
            fine_tuning: whether a trained network is trained further, as a LoRA is.
            overrides: any argument of `DiffusionLoss`, which then is as given.

        Raises:
            ValueError: no such process; a weighting that depends on the prediction type, where none is known, or one
                that is made for another; or as `DiffusionLoss`.
            TypeError: the process is none of these, or as `DiffusionLoss`.

        Example:
            >>> criterion = vadiff.DiffusionLoss.for_process("stable_diffusion", fine_tuning=True)
            >>> criterion.weighting, criterion.statistics.bins
            (VarianceAware(strength=0.5, smoothing=0.5, clip=10.0, prior=32.0), Bins(size=26, low=-5.5, high=7.5))
        """
        return cls(**settings.settings_for(process, prediction_type, fine_tuning, **overrides))

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        log_snr: Tensor,
        *,
        noise: Tensor | None = None,
        coefficients: tuple[Coefficient, Coefficient, Coefficient] | None = None,
        base_weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss of one batch.

        Args:
            prediction: what the network returned, [B, ...], float32, bfloat16, float16 or float64.
            target: of the same shape: the ready-made target, or clean data x0 where `coefficients` say so. No gradient.
            log_snr: natural log of alpha**2/sigma**2 per sample, [B]; +-inf is legal.
            noise: eps [B, ...], where the residual has a term in it. No gradient.
            coefficients: (a, b, c) of the residual, each a number or [B]; by default (1, -1, 0), prediction - target.
                See `vadiff.process.coefficients`.
            base_weight: u [B], the part of the objective that depends on the noise level (EDM's lambda(sigma), ...); it
                enters the bins. Differentiable.
            sample_weight: v [B], what is not part of the objective (1/p of a level sampler, mask share); it does not.
            reduction: "mean" over the batch, or "none".

        Returns:
            The loss, a float32 scalar, or [B] for "none" (float64 for a float64 prediction). It and its gradient are
            NaN where a sample has a NaN log-SNR or a non-finite loss or weight; such samples are not recorded, but
            counted in `statistics.skipped`. Samples with u*v = 0 are left out.

        Raises:
            ValueError, TypeError: a bad argument; the message names it.
            RuntimeError: called from inside a backward pass (activation checkpointing around the criterion).
        """
        if reduction == "mean" and self._records() and not is_dynamo_compiling():
            loss = eager.step(self, prediction, target, log_snr, noise, coefficients, base_weight, sample_weight)
            if loss is not None:
                return loss
        check_prediction("prediction", prediction)
        check_elements("target", target, prediction)
        if noise is not None:
            check_elements("noise", noise, prediction)
        a, b, c = check_coefficients(coefficients, noise, prediction)
        log_snr = check_per_sample("log_snr", log_snr, prediction, torch.float32)
        if base_weight is not None:
            base_weight = check_per_sample("base_weight", base_weight, prediction, differentiable=True)
        if sample_weight is not None:
            sample_weight = check_per_sample("sample_weight", sample_weight, prediction)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
        statistics = self._statistics_beside(prediction, "prediction")
        x0, eps = (  # a tensor with a plain 0 in front is not read
            None if not isinstance(coefficient, Tensor) and coefficient == 0.0 else tensor
            for coefficient, tensor in ((b, target), (c, noise))
        )
        by_losses = isinstance(self.weighting, LossZScore)  # known only afterwards: `reweight` records and weighs
        mean, weight = reduction == "mean", None if by_losses else self._fixed_weight(log_snr, prediction)
        loss, ell = autograd.diffusion_loss(
            prediction, x0, eps, a, b, c, log_snr, base_weight, None if by_losses else sample_weight,
            weight, *statistics, self.huber_delta if self.loss == "huber" else 0.0,
            mean and not by_losses, self._records() and not by_losses, self.sync, self.backend,
        )  # fmt: skip
        if by_losses:
            if base_weight is not None:  # u*v = 0 leaves a sample out; `reweight` knows v only
                one = torch.ones_like(ell) if sample_weight is None else sample_weight
                sample_weight = one.masked_fill(base_weight == 0, 0.0)
            loss = self.reweight(loss, log_snr, sample_weight)
            loss = loss.mean() if mean else loss
        elif isinstance(self.weighting, LearnedUncertainty):
            term = self._uncertainty_term(ell, log_snr, base_weight, sample_weight)
            loss = loss + (term.mean() if mean else term)
        self._keep(ell)
        return loss

    def reweight(self, loss_per_sample: Tensor, log_snr: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Record and weight a per-sample base loss computed elsewhere (masked, multi-term, of any kind).

        Args:
            loss_per_sample: g [B], the trainer's own objective per sample.
            log_snr: [B], as in `forward`.
            sample_weight: v [B], as in `forward`.

        Returns:
            w*v*g [B], differentiable by `loss_per_sample`; the weights are constants. Take its mean. With
            `weighting.LearnedUncertainty`, v*(g/e**u + u), differentiable by the head as well.

        Raises:
            ValueError, TypeError: a bad argument; the message names it.
        """
        check_prediction("loss_per_sample", loss_per_sample)
        loss_per_sample = check_per_sample("loss_per_sample", loss_per_sample, loss_per_sample, differentiable=True)
        log_snr = check_per_sample("log_snr", log_snr, loss_per_sample, torch.float32)
        if sample_weight is not None:
            sample_weight = check_per_sample("sample_weight", sample_weight, loss_per_sample)
        statistics = self._statistics_beside(loss_per_sample, "loss_per_sample")
        self._keep(loss_per_sample.detach())
        if isinstance(self.weighting, LossZScore):
            weights = self.weighting.weights_of(loss_per_sample, sample_weight, self.sync and self._records())
            weight: Tensor | None = weights.to(loss_per_sample.dtype)
        else:
            weight = self._fixed_weight(log_snr, loss_per_sample)
        loss = autograd.reweight(
            loss_per_sample, log_snr, sample_weight, weight, *statistics,
            self._records(), self.sync, self.backend,
        )  # fmt: skip
        if isinstance(self.weighting, LearnedUncertainty):
            loss = loss + self._uncertainty_term(loss_per_sample.detach(), log_snr, None, sample_weight)
        return loss

    @property
    def per_sample_loss(self) -> Tensor | None:
        """ell [B] of the last call, float32 (float64 for a float64 prediction), detached; None before the first."""
        if not (self._last is None or isinstance(self._last, Tensor)):
            object.__setattr__(self, "_last", eager.tensor_of(self._last))
        return self._last

    @per_sample_loss.setter
    def per_sample_loss(self, ell: Tensor | None) -> None:
        self._last = ell

    @property
    def bin_centers(self) -> Tensor:
        """Log-SNR in the middle of each bin. [K] float32."""
        bins = self.statistics.bins
        centers = bins.low + (torch.arange(bins.size, dtype=torch.float64) + 0.5) * bins.width
        return centers.float().to(self.statistics.state.device)

    @property
    def weights(self) -> Tensor:
        """The weight w at the bin centres; NaN where it depends on more than log-SNR. [K] float32."""
        if isinstance(self.weighting, AdaptiveWeighting):
            return self.statistics.log_weights.view(torch.float32).exp()
        return self.weight_at(self.bin_centers)

    def weight_at(self, log_snr: Tensor) -> Tensor:
        """The weight w a sample at each log-SNR [B] would get now. [B] float32, NaN for NaN.

        NaN, too, with a weighting that looks at the rest of the batch, or at its losses.

        Raises:
            ValueError, TypeError: log_snr is not [B] floats on the criterion's device.
        """
        check_prediction("log_snr", log_snr)
        log_snr = check_per_sample("log_snr", log_snr, log_snr, torch.float32)
        self._statistics_beside(log_snr, "log_snr")
        if isinstance(self.weighting, AdaptiveWeighting):
            return log_weight_at(self.statistics.log_weights, log_snr, self.statistics.bins).exp()
        if isinstance(self.weighting, LearnedUncertainty):
            return (-self.weighting(log_snr)).exp().detach()
        if isinstance(self.weighting, LossZScore) or not self.weighting.pointwise:
            return torch.full_like(log_snr, math.nan)
        return check_per_sample("weighting(log_snr)", self.weighting(log_snr), log_snr)

    def extra_repr(self) -> str:
        loss = f"huber, huber_delta={self.huber_delta:g}" if self.loss == "huber" else self.loss
        return f"weighting={self.weighting}, loss={loss}, backend={self.backend}, sync={self.sync}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "base_loss": None}  # a copy starts without the last batch

    def _records(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _fixed_weight(self, log_snr: Tensor, prediction: Tensor) -> Tensor | None:
        """w [B] in the arithmetic of the prediction; None where it is 1 or comes from the table."""
        weighting = self.weighting
        if isinstance(weighting, (AdaptiveWeighting, Constant, LossZScore)):
            return None
        if isinstance(weighting, FixedWeighting):  # evaluation may be one rank's alone, and then nobody answers
            weight = weighting.for_batch(log_snr, sync=self.sync and self._records())
        else:
            weight = (-weighting(log_snr)).exp().detach()
        return check_per_sample("weighting(log_snr)", weight, prediction)

    def _uncertainty_term(
        self, ell: Tensor, log_snr: Tensor, base_weight: Tensor | None, sample_weight: Tensor | None
    ) -> Tensor:
        """v*h(log_snr) [B], h the learned ln of the base loss g, with the gradient of v*(g/e**h + h) by h.

        The term g/e**h is in the loss already, with the gradient by the prediction.
        """
        one = torch.ones_like(ell)
        u = one if base_weight is None else base_weight.detach()
        v = one if sample_weight is None else sample_weight
        left_out = u * v == 0
        g = (u * ell).masked_fill(left_out, 0.0)
        self.base_loss = (v * g).mean()
        assert isinstance(self.weighting, LearnedUncertainty)
        h = self.weighting(log_snr).to(ell.dtype)
        scaled = g * (-h).exp()
        return (v * (h + scaled - scaled.detach())).masked_fill(left_out, 0.0)

    def _statistics_beside(self, tensor: Tensor, name: str) -> tuple[Tensor, Tensor, Bins, float, TableRule]:
        """What the operators take of the statistics, after making sure that they are on the tensor's device."""
        statistics = self.statistics
        state, log_weights = statistics.state, statistics.log_weights
        if state.device != tensor.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but the criterion is on {state.device}. "
                f"Use criterion.to({str(tensor.device)!r})."
            )
        statistics.check_buffers(state, log_weights)
        rule = self.weighting.rule if isinstance(self.weighting, AdaptiveWeighting) else eager.NO_TABLE
        return state, log_weights, statistics.bins, statistics.half_life, rule

    def _keep(self, ell: Tensor) -> None:
        if torch.compiler.is_compiling():
            self._last = ell
        else:
            object.__setattr__(self, "_last", ell)  # a module's own takes microseconds

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw base loss (mean ± standard deviation) and weight against log-SNR; empty bins are left out.

        Args:
            ax: matplotlib axes, onto which the weight comes with an axis of its own on the right; a pair of axes, the
                first for the loss; or None for a new pyplot figure with two panels.

        Returns:
            The axes of the loss and those of the weight; `axes.figure.savefig(path)` writes the picture.

        Raises:
            MissingExtraError: matplotlib is not installed; the message says how to get it.
            TypeError: ax is something else.
        """
        return live.plot(self, ax)

    def summary(self, bands: int = live.BANDS) -> str:
        """A table as text, one line per band of log-SNR in which samples were seen.

        Share of the samples, mean, standard deviation and std/mean of the base loss, mean weight; what was skipped.

        Args:
            bands: into how many intervals `log_snr_range` is divided.

        Raises:
            ValueError: bands is no positive integer.

        Example:
            >>> print(vadiff.DiffusionLoss("constant").summary())
            Constant(): base loss by noise level, 0 samples after forgetting
            no samples recorded yet: they are in training mode, with grad enabled
        """
        return live.summary(self, bands)

    def log_to(self, writer: Any, step: int, prefix: str = "vadiff", bands: int = live.BANDS) -> None:
        """Hand the statistics to an experiment tracker. Waits for the GPU once; call it every hundred steps or so.

        The scalars are `<prefix>/<what>/log_snr_<low>_to_<high>` for every band with samples, <what> being `base_loss`,
        `std`, `relative_std`, `weight` and `share`, and `<prefix>/skipped`. A SummaryWriter also gets the picture of
        `plot`, where matplotlib is installed, and a histogram of the log-SNR seen.

        Args:
            writer: a torch or tensorboardX SummaryWriter; anything with `.log(values, step=...)` (Weights & Biases,
                `accelerate.Accelerator`) or `.log_metrics(values, step=...)` (Lightning's loggers, MLflow, Comet); or a
                function of (values, step). Under several processes, call it in one of them.
            step: optimiser steps so far.
            prefix: what the names begin with.
            bands: into how many intervals `log_snr_range` is divided.

        Raises:
            TypeError: the writer is none of these, or step is no integer; nothing is written then.
            ValueError: bands is no positive integer.
        """
        live.log_to(self, writer, step, prefix, bands)

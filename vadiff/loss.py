"""DiffusionLoss: the drop-in criterion."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ._validation import check_per_sample, check_prediction, is_number
from .ops import autograd, backends
from .ops.problem import ELL, Coefficient, Inputs, Problem, compute_dtype, make_inputs, make_loss_inputs
from .process_defaults import arguments_for
from .statistics import LogSNRStatistics
from .summary import BANDS, log_to, plot, summary
from .weighting import Weighting, from_name

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
        backend: "auto", "native", "triton" or "reference"; see "Backends" in the documentation.
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

    weighting: Any  # a Weighting; a name may be assigned
    base_loss: Tensor | None
    _last: Tensor | None = None  # per-sample results of the last call, rows as of `ops.problem.Step`
    _problem: tuple[tuple[Any, ...], Problem] | None = None  # what it was made of, and the Problem

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
        self.loss = loss
        self.huber_delta = huber_delta
        self.backend = backend
        self.sync = sync

    def __setattr__(self, name: str, value: Any) -> None:
        """What a call is made of may be reassigned; it is checked here and takes effect at the next call."""
        if name == "weighting":
            value = from_name(value)
            self._modules.pop(name, None)  # a learned one is a module, others are not: torch allows no change of kind
            self.__dict__.pop(name, None)
            self.__dict__["base_loss"] = None  # a learned one may have left it
        elif name == "huber_delta":
            if not is_number(value) or not torch.finfo(torch.float32).tiny <= value < math.inf:
                raise ValueError(f"huber_delta is {value!r}, expected a positive finite number")
            value = float(value)
        elif name == "loss" and value not in LOSSES:
            raise ValueError(f"loss is {value!r}, expected one of {', '.join(LOSSES)}")
        elif name == "sync":
            value = bool(value)
        elif name == "backend":
            backends.check_name(value)
        super().__setattr__(name, value)

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
        return cls(**arguments_for(process, prediction_type, fine_tuning, **overrides))

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
            The loss, a float32 scalar, or [B] for "none" (float64 for a float64 prediction). Non-finite values show in
            the loss and in the gradient as with `F.mse_loss`; a NaN log-SNR makes the weight NaN. Samples with a NaN
            log-SNR or a non-finite loss or weight are not recorded, but counted in `statistics.skipped`. Samples with
            u = 0 or v = 0 are masked: no loss, no gradient, not recorded, whatever their values are.

        Raises:
            ValueError, TypeError: a bad argument; the message names it.
            RuntimeError: called from inside a backward pass (activation checkpointing around the criterion).
        """
        inputs = make_inputs(
            prediction, target, log_snr, noise, coefficients, base_weight, sample_weight, reduction
        )  # fmt: skip
        weighting: Weighting = self.weighting
        if weighting.needs_losses:
            return self._weighted_by_losses(inputs)
        problem = self._current_problem()
        statistics: Any = self._modules["statistics"]  # as an attribute it takes 0.3 µs
        state = statistics.checked_state("prediction", prediction)
        records = self.training and torch.is_grad_enabled()
        weight = weighting.for_batch(inputs.log_snr, sync=problem.sync and records)
        if weight is not None:
            inputs = inputs._replace(weight=self._checked_weight(weight, prediction))
        loss, per_sample = autograd.diffusion_loss(problem, inputs, state, update=records)
        extra = weighting.extra_term(per_sample[ELL], inputs) if weighting.has_parameters else None
        if extra is not None:
            term, self.base_loss = extra
            loss = loss + (term.mean() if inputs.mean else term)
        self._keep(per_sample)
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
        inputs = make_loss_inputs(loss_per_sample, log_snr, sample_weight)
        weighting, loss = self.weighting, inputs.prediction
        problem, state = self._current_problem(), self.statistics.checked_state("loss_per_sample", loss)
        records = self.training and torch.is_grad_enabled()
        sync = problem.sync and records  # no collective in eval mode: one rank may evaluate alone
        if weighting.needs_losses:
            weight: Tensor | None = weighting.weights_of_losses(loss, inputs.sample_weight, sync)
        else:
            weight = weighting.for_batch(inputs.log_snr, sync=sync)
        if weight is not None:
            inputs = inputs._replace(weight=self._checked_weight(weight, loss))
        weighted = autograd.reweight(problem, inputs, state, update=records)
        extra = weighting.extra_term(loss.detach(), inputs)
        if extra is not None:
            term, self.base_loss = extra
            weighted = weighted + term
        self._keep(loss.detach().clone()[None])
        return weighted

    def _weighted_by_losses(self, inputs: Inputs) -> Tensor:
        """The loss under a weighting that needs the losses of the batch: they are computed first, then reweighted."""
        problem, state = self._current_problem(), self.statistics.checked_state("prediction", inputs.prediction)
        u, v = inputs.base_weight, inputs.sample_weight
        losses, per_sample = autograd.diffusion_loss(
            problem, inputs._replace(sample_weight=None, mean=False), state, update=False
        )
        if u is not None:  # reweight knows of v only, and u = 0 masks as well
            v = (torch.ones_like(u) if v is None else v).masked_fill(u == 0, 0.0)
        loss = self.reweight(losses, inputs.log_snr, v)
        self._keep(per_sample)
        return loss.mean() if inputs.mean else loss

    @property
    def per_sample_loss(self) -> Tensor | None:
        """A copy of ell [B] of the last call, float32 (float64 for a float64 prediction), detached; None before it."""
        return None if self._last is None else self._last[ELL].clone()

    @property
    def bin_centers(self) -> Tensor:
        """Log-SNR in the middle of each bin. [K] float32."""
        bins = self.statistics.bins
        centers = bins.low + (torch.arange(bins.size, dtype=torch.float64) + 0.5) * bins.width
        return centers.float().to(self.statistics.state.device)

    @property
    def weights(self) -> Tensor:
        """The weight w at the bin centres; NaN where it depends on more than log-SNR. [K] float32."""
        if self.weighting.rule.statistic:
            return self.statistics.log_weights.view(torch.float32).exp()
        return self.weight_at(self.bin_centers)

    def weight_at(self, log_snr: Tensor) -> Tensor:
        """The weight w a sample at each log-SNR [B] would get now. [B] float32, NaN for NaN.

        NaN, too, with a weighting that looks at the rest of the batch, or at its losses.

        Raises:
            ValueError, TypeError: log_snr is not [B] floats on the criterion's device.
        """
        check_prediction("log_snr", log_snr)
        log_snr = check_per_sample("log_snr", log_snr, log_snr.shape[0], log_snr.device, torch.float32)
        state = self.statistics.checked_state("log_snr", log_snr)
        weight = self.weighting.weight_at(log_snr, state.log_weights, self.statistics.bins)
        return self._checked_weight(weight, log_snr)

    def extra_repr(self) -> str:
        loss = f"huber, huber_delta={self.huber_delta:g}" if self.loss == "huber" else self.loss
        return f"weighting={self.weighting}, loss={loss}, backend={self.backend}, sync={self.sync}"

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_last": None,
            "_problem": None,
            "base_loss": None,
        }  # a copy starts without the last batch

    def _current_problem(self) -> Problem:
        """The Problem of the next call; made anew when an attribute that it reads was changed."""
        statistics: Any = self._modules["statistics"]  # as an attribute it takes 0.3 µs
        rule = self.weighting.rule
        read = (
            rule,
            statistics.bins,
            statistics.half_life,
            self.loss,
            self.huber_delta,
            self.sync,
            self.backend,
        )
        if self._problem is not None and self._problem[0] == read:
            return self._problem[1]
        problem = Problem(
            bins=statistics.bins,
            half_life=float(statistics.half_life),
            rule=rule,
            huber_delta=self.huber_delta if self.loss == "huber" else 0.0,
            sync=self.sync,
            backend=self.backend,
        )
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_problem", (read, problem))
        return problem

    def _checked_weight(self, weight: Tensor, prediction: Tensor) -> Tensor:
        dtype = compute_dtype(prediction)
        return check_per_sample("weighting(log_snr)", weight, prediction.shape[0], prediction.device, dtype)

    def _keep(self, per_sample: Tensor) -> None:
        if torch.compiler.is_compiling():
            self._last = per_sample
        else:
            object.__setattr__(self, "_last", per_sample)  # `nn.Module.__setattr__` costs 2 µs

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
        return plot(self, ax)

    def summary(self, bands: int = BANDS) -> str:
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
        return summary(self, bands)

    def log_to(self, writer: Any, step: int, prefix: str = "vadiff", bands: int = BANDS) -> None:
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
        log_to(self, writer, step, prefix, bands)

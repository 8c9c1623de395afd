"""DiffusionLoss: a drop-in replacement for `F.mse_loss` that weights and records every noise level."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import diagnosis
from . import summary as live
from ._validation import check_per_sample, check_prediction, is_number, require_known
from .ops import autograd, backends
from .ops.plan import Plans, with_weight
from .ops.problem import ELL, Coefficient, Inputs, Problem, State, compute_dtype, make_loss_inputs
from .process_defaults import arguments_for
from .regression_target import RegressionTarget, check_change, check_target, problem_with_state, target_of
from .statistics import LogSNRStatistics
from .watch import Watch, warn_of
from .weighting import Weighting, for_criterion

LOSSES = ("mse", "huber")


class DiffusionLoss(nn.Module):
    """Noise-level-aware denoising loss that replaces `F.mse_loss(prediction, target)`.

    The loss is ``mean_i w(lambda_i) * u_i * v_i * ell_i`` with ``ell_i`` the mean over sample i's elements of the
    squared (or Huber) residual ``r = a*prediction + b*target + c*noise``, u the base weight, v the sample weight and w
    the weighting. In training mode with grad enabled, each call also folds the base losses ``g_i = u_i * ell_i`` into
    running statistics per log-SNR bin. The weights of a batch come from the statistics before it, so the gradient is
    that of a fixed-weight loss. On a CUDA device, make all recording calls of one criterion on one stream: overlapping
    calls corrupt its statistics until `statistics.reset()`.

    Args:
        weighting: a name from `vadiff.weighting.available()`, or an object from `vadiff.weighting`. A name that depends
            on the form of the loss ("min_snr", ...) is for calls with `coefficients`, integrations and `for_process`.
        bins: number K of log-SNR bins, 2 to 1024.
        log_snr_range: (low, high) of the bins, natural log of alpha**2/sigma**2; values outside fall in the end bins.
        half_life: mean number of samples per bin after which a sample counts half; `float("inf")` is plain Welford.
        loss: "mse", or "huber" (`torch.nn.functional.huber_loss`'s definition).
        huber_delta: |r| at which Huber's function turns from quadratic to linear.
        backend: "auto", "native", "triton" or "reference"; see "Backends" in the documentation.
        sync: merge the statistics of all ranks of the default process group, when one is initialised. Every rank
            must then call the criterion equally often.
        fresh_statistics: start with empty statistics, and a warning, where a loaded state has none (a run begun without
            vadiff) or has them for other bins. A state whose statistics fit is loaded: the switch may stay on.

    Attributes:
        statistics: `LogSNRStatistics`, per-bin count, mean, variance, mass, relative_std (float64 [K]) and skipped.
        target: what the calls regress on, a `vadiff.targets.PosteriorMean`; None, the default, is the data. No call
            reads it: it is for what reads the statistics, and its state is part of the criterion's. It cannot change
            while the statistics hold losses.
        base_loss: mean of v*g over the last batch, detached, with `weighting.LearnedUncertainty`, whose loss also
            contains u; else None.

    Raises:
        ValueError, TypeError: an argument out of bounds; the message names it.

    Example:
        >>> criterion = vadiff.DiffusionLoss("variance_aware")
        >>> clean, sigma = torch.randn(8, 3, 32, 32), torch.rand(8) + 0.1
        >>> denoised = (clean + 0.1 * torch.randn_like(clean)).requires_grad_()  # from a network
        >>> criterion(denoised, clean, vadiff.log_snr.from_sigma(sigma)).backward()
        >>> criterion.statistics.count.sum()
        tensor(8., dtype=torch.float64)
    """

    weighting: Any  # a Weighting; a name may be assigned
    base_loss: Tensor | None
    target: RegressionTarget | None
    fresh_statistics: bool = False  # that of criteria pickled before there was the switch
    _last: Tensor | None = None  # per-sample results of the last call, rows as of `ops.problem.Step`
    _last_log_snr: Tensor | None = None  # [B] of the last call
    _watch: Watch = Watch()  # that of all criteria pickled before there was one; others have their own
    _plans: Plans = Plans()  # likewise
    _problem: Problem | None = None  # of the last call; None after an attribute was set

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
        fresh_statistics: bool = False,
    ) -> None:
        super().__init__()
        self.weighting = for_criterion(weighting)
        self.statistics = LogSNRStatistics(bins, log_snr_range, half_life)
        self.loss = loss
        self.huber_delta = huber_delta
        self.backend = backend
        self.sync = sync
        self.fresh_statistics = bool(fresh_statistics)
        self.target = None
        self._watch = Watch()
        self._plans = Plans()

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a new weighting, huber_delta, loss, backend or target; it takes effect at the next call."""
        if name == "weighting":
            value = for_criterion(value)
            if "statistics" in self._modules and value.rule != self.weighting.rule:
                self.statistics.remake_table(value.rule)
            self._modules.pop(name, None)  # torch refuses to replace a module (a learned weighting) by another object
            self.__dict__.pop(name, None)
            self.__dict__["base_loss"] = None  # a learned one may have left it
        elif name == "huber_delta":
            if not is_number(value) or not torch.finfo(torch.float32).tiny <= value < math.inf:
                raise ValueError(f"huber_delta is {value!r}, expected a positive finite number")
            value = float(value)
        elif name == "loss":
            require_known("loss", value, LOSSES)
            check_target(target_of(self), value)
        elif name == "target":
            check_target(value, self.loss)
            check_change(self, value)
        elif name == "sync":
            value = bool(value)
        elif name == "backend":
            require_known("backend", value, backends.BACKENDS)
        if name in ("loss", "huber_delta", "sync", "backend"):
            self.__dict__["_problem"] = None
        super().__setattr__(name, value)

    @classmethod
    def for_process(
        cls, process: Any, *, prediction_type: str | None = None, fine_tuning: bool = False, **overrides: Any
    ) -> DiffusionLoss:
        """A criterion with range, bins and weighting that suit a noise process.

        The bins are 0.25 wide in log-SNR and cover the process: sigma from 0.002 to 80 for EDM, t from 0.001 to 0.999
        for other continuous processes, the finite part of a scheduler's table. Fine-tuning sees fewer samples, so its
        bins are 0.5 wide. Fine-tuning on a variance-preserving process uses strength 0.5, because its losses span
        orders of magnitude and the network was trained on their unweighted balance. For an x0 loss ("sample", which
        includes diffusers' EDM schedulers) weights are not clipped: between the lowest and the highest noise such
        losses differ by more than clip².

        Args:
            process: "edm", "flow", "stable_diffusion", "vp_cosine" or "vp_linear"; an object from `vadiff.process`; or
                a diffusers scheduler (or one with the same tables), which also gives the prediction type.
            prediction_type: form of the loss, if the process does not determine it; one of
                `vadiff.process.PREDICTION_TYPES`. Passed to a named weighting that depends on it ("min_snr", ...).
            fine_tuning: whether a trained network is fine-tuned, for example with a LoRA.
            overrides: arguments of `DiffusionLoss` that replace the chosen ones.

        Raises:
            ValueError: an unknown process; a weighting that depends on the prediction type when none is known, or that
                is made for another one; or as `DiffusionLoss`.
            TypeError: `process` is none of these; or as `DiffusionLoss`.

        Warns:
            DiffusionLossWarning: a fixed weighting is 0 at the last timestep of a process with zero terminal SNR.

        Example:
            >>> criterion = vadiff.DiffusionLoss.for_process("stable_diffusion", fine_tuning=True)
            >>> criterion.weighting, criterion.statistics.bins
            (VarianceAware(strength=0.5, smoothing=0.5, clip=10.0, prior=32.0),
             Bins(size=26, low=-5.5, high=7.5))
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
            target: same shape: the regression target or, with `coefficients`, clean data x0. No gradient.
            log_snr: natural log of alpha**2/sigma**2 per sample, [B]; +-inf is legal.
            noise: eps [B, ...], if the residual has a noise term. No gradient.
            coefficients: (a, b, c) of the residual, each a number or [B]; by default (1, -1, 0), prediction - target.
                See `vadiff.process.coefficients`.
            base_weight: u [B], the objective's own weight of the noise level (EDM's lambda(sigma), ...); part of the
                recorded base loss. Differentiable.
            sample_weight: v [B], a factor outside the objective and the recorded loss (1/p of a sampler, mask share).
            reduction: "mean" over the batch, or "none".

        Returns:
            The loss, a float32 scalar, or [B] for "none" (float64 for a float64 prediction). Non-finite values
            propagate to the loss and the gradient as in `F.mse_loss`; a NaN log-SNR makes the weight NaN. Samples with
            a NaN log-SNR or a non-finite loss or weight are skipped: not recorded, counted in `statistics.skipped`.
            Samples with u = 0 or v = 0 are masked: no loss, no gradient, not recorded, whatever their values are.

        Raises:
            ValueError, TypeError: a bad argument; the message names it.
                Also for a weighting by name whose formula depends on the form of the loss, without `coefficients`.
            RuntimeError: called from inside a backward pass (activation checkpointing around the criterion).
        """
        statistics: Any = self._modules["statistics"]  # as an attribute it takes 0.3 µs
        problem, state = self._current_problem(statistics), statistics.as_state()
        inputs = self._plans.inputs(
            problem, state, prediction, target, log_snr, noise, coefficients, base_weight, sample_weight, reduction
        )
        weighting: Weighting = self.weighting
        if coefficients is not None:
            weighting = weighting.for_call(self, coefficients)
        if weighting.needs_losses:
            return self._weighted_by_losses(problem, inputs, state)
        records = self.training and torch.is_grad_enabled()
        weight = weighting.for_batch(inputs.log_snr, sync=problem.sync and records)
        if weight is not None:
            inputs = with_weight(inputs, self._checked_weight(weight, prediction))
        loss, per_sample = autograd.diffusion_loss(problem, inputs, state, update=records)
        extra = weighting.extra_term(per_sample[ELL], inputs) if weighting.has_parameters else None
        if extra is not None:
            term, self.base_loss = extra
            loss = loss + (term.mean() if inputs.mean else term)
        self._keep(per_sample, inputs, records)
        return loss

    def reweight(self, loss_per_sample: Tensor, log_snr: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Record and weight a per-sample base loss computed elsewhere (masked, multi-term, of any kind).

        Args:
            loss_per_sample: g [B], the trainer's own objective per sample.
            log_snr: [B], as in `forward`.
            sample_weight: v [B], as in `forward`.

        Returns:
            w*v*g [B], differentiable with respect to `loss_per_sample`, with constant weights; take the mean. With
            `weighting.LearnedUncertainty`, v*(g/e**u + u), also differentiable with respect to the head.

        Raises:
            ValueError, TypeError: a bad argument; the message names it.
        """
        inputs = make_loss_inputs(loss_per_sample, log_snr, sample_weight)
        weighting, loss = self.weighting, inputs.prediction
        statistics = self.statistics
        problem, state = self._current_problem(statistics), statistics.checked_state("loss_per_sample", loss)
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
        self._keep(loss.detach().clone()[None], inputs, records)
        return weighted

    def _weighted_by_losses(self, problem: Problem, inputs: Inputs, state: State) -> Tensor:
        """Loss of a weighting that depends on the losses of the batch: compute them, then `reweight` them."""
        u, v = inputs.base_weight, inputs.sample_weight
        unweighted = inputs._replace(sample_weight=None, mean=False)
        losses, per_sample = autograd.diffusion_loss(problem, unweighted, state, update=False)
        if u is not None:  # `reweight` takes no u: samples with u = 0 are masked through v
            v = (torch.ones_like(u) if v is None else v).masked_fill(u == 0, 0.0)
        loss = self.reweight(losses, inputs.log_snr, v)
        self._keep(per_sample, inputs, False)  # `reweight` has counted this call
        return loss.mean() if inputs.mean else loss

    @property
    def per_sample_loss(self) -> Tensor | None:
        """Detached copy of the last ell [B], float32 (float64 for a float64 prediction); None before the first call."""
        return None if self._last is None else self._last[ELL].clone()

    @property
    def level_free_loss(self) -> Tensor:
        """Mean base loss since this was last read, free of which noise levels were drawn. Detached float32 scalar.

        Each training call adds its mean of v*g, corrected by what the levels of its batch cost more or less than the
        average, by the bins' running means before the call (`ops.level_free` has the formula). The curve
        falls when the model improves, not when easier levels are drawn; a spike or a NaN shows. Until there are 32
        samples per bin on average it is the plain mean of v*g. Reading copies nothing to the host, starts a new mean,
        and repeats the last value if no call came since. NaN before the first training call. With `sync`, calls of all
        ranks are in it; each rank keeps its own reading, so read it on all ranks at the same steps, or in one.
        """
        return self.statistics.read_level_free_loss()

    @property
    def bin_centers(self) -> Tensor:
        """Log-SNR in the middle of each bin. [K] float32."""
        return self.statistics.bins.centers(self.statistics.state.device)

    @property
    def weights(self) -> Tensor:
        """The weight w at the bin centres; NaN if it depends on more than log-SNR. [K] float32."""
        if self.weighting.rule.statistic:
            return self.statistics.log_weights.view(torch.float32).exp()
        return self.weight_at(self.bin_centers)

    def weight_at(self, log_snr: Tensor) -> Tensor:
        """The weight w a sample at each log-SNR [B] would get now. [B] float32, NaN for NaN.

        Also NaN for a weighting that depends on the other samples or the losses of the batch.

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

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        problem = problem_with_state(self, state_dict, prefix)
        if problem is not None:
            errors.append(problem)
        if self.fresh_statistics:
            self._start_afresh_without_statistics_in(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _start_afresh_without_statistics_in(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Empty the statistics, and let the state say so, where it has none or none that fit."""
        problem = self.statistics.problem_with_state(state_dict, f"{prefix}statistics.")
        if problem is None:
            return
        warn_of(f"the statistics start afresh: {problem}")
        missing = f"{prefix}statistics.state" not in state_dict
        self.statistics.reset()
        state_dict.update(self.statistics.state_dict(prefix=f"{prefix}statistics."))
        if missing:  # then a learned head is missing too
            for name, value in self.state_dict(prefix=prefix).items():
                state_dict.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(("_last", "_last_log_snr", "_problem", "base_loss"))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "target" not in self._modules:  # pickled before there were targets
            self.__dict__.setdefault("target", None)

    def _current_problem(self, statistics: LogSNRStatistics) -> Problem:
        """The Problem of the next call, cached until an attribute that it depends on is reassigned."""
        rule, bins, half_life = self.weighting.rule, statistics.bins, statistics.half_life
        known = self._problem
        if known is not None and known.rule == rule and known.bins == bins and known.half_life == half_life:
            return known
        delta = self.huber_delta if self.loss == "huber" else 0.0
        problem = Problem(bins, float(half_life), rule, delta, sync=self.sync, backend=self.backend)
        if not is_compiling():
            self.__dict__["_problem"] = problem
        return problem

    def _checked_weight(self, weight: Tensor, like: Tensor) -> Tensor:
        return check_per_sample("weighting(log_snr)", weight, len(like), like.device, compute_dtype(like))

    def _keep(self, per_sample: Tensor, inputs: Inputs, records: bool) -> None:
        if inputs.plan is None and is_compiling():
            self._last, self._last_log_snr = per_sample, inputs.log_snr
            return
        attributes = self.__dict__  # `nn.Module.__setattr__` costs 2 µs
        attributes["_last"], attributes["_last_log_snr"] = per_sample, inputs.log_snr
        if records:
            watch = self._watch
            watch.left -= 1
            if watch.left == 0:
                watch.look(self)

    def copy_last_call(self) -> None:
        """Copy what the last call left, which lies in the memory of a CUDA graph if it was captured.

        Needed where the graph is destroyed and the criterion is kept.
        """
        if self._last is not None and self._last_log_snr is not None:
            self._last, self._last_log_snr = self._last.clone(), self._last_log_snr.clone()
        if self.base_loss is not None:
            self.base_loss = self.base_loss.clone()

    plot = live.plot  # methods documented there
    summary = live.summary
    log_to = live.log_to
    _repr_html_ = live.as_html
    diagnose = diagnosis.diagnose

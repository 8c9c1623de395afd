"""Posterior-mean targets: what is regressed on is the mean of all clean samples that explain a noisy one."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._ranks import number_of_ranks
from .._validation import is_number, require_count
from ..errors import DiffusionLossWarning
from .posterior import Augment, Draws, Posterior, References, keys_of, posterior
from .references import Bank, DataSet, first_of_each
from .removed import RemovedError

_CLEAN = 60.0  # log-SNR from which no target is random, and 1/sigma² overflows some day
_ENOUGH_TO_WARN, _LEAST_FOUND = 64, 0.9  # samples, and their share, to look for wrong references


class PosteriorMean(nn.Module):
    """x0_hat = E[x0 | x_t] over references that hold the sample's own x0, in place of x0.

    At high noise many clean samples explain the same noisy one. A squared loss has the same minimiser when it regresses
    on their mean in place of the one that was drawn, and its gradient has less variance, as the targets of a batch are
    less random (arXiv 2302.00670; unbiased with the own x0 among the references: arXiv 2506.03719). With M references

        x0_hat = sum_j softmax_j(-|x_t - alpha·x_j|²/(2 sigma²))·x_j

    The references of a call are the batch and, without the images of the batch, a data set, a random part of it, or the
    batches before; each image counts once. They have to come from the same distribution as the batch: the same
    augmentation, and classes drawn as often. What the targets take out of the loss is the posterior variance J*_M,
    which is estimated on the way: `removed_error`. Assign the object to `criterion.target`, so that whatever computes
    x0 errors from the criterion's statistics adds it back.

    Draws at noise levels where J*_M is known to be below `threshold` of the data's variance keep their own target, bit
    by bit. On a CPU they cost no work. In eval mode nothing is estimated, and a bank stays as it is. No call
    synchronises with a GPU, and the module can be compiled and captured in a CUDA graph after one call outside of it.

    Args:
        reference: [N, ...] the training samples, floats as the network sees them, or bytes, which are pixels of
            [-1, 1]. Kept as it is, not copied, and not saved with the state.
        subset: how many of them at a time, at random, the batch included: at least four times the batch. None: all.
        bank: in place of a reference, the size of a bank of recent batches: at least three times the batch. Until
            there are three batches in it, draws keep their own target.
        labels: [N] int64 classes of the reference; then references are of the same class, and each call needs labels.
        unlabelled: the label of samples from which the network withholds the class (label dropout): their references
            are all classes.
        augment: applied to the chosen part of the reference at each call, [m, ...] floats → the same shape; needs a
            subset (which may be all N) and `index` in each call. For augmentation that the network is not told of.
        threshold: share of the data's variance.
        chunk: references at a time; memory is a few arrays of [B, chunk] and [chunk, ...], beside a chosen subset, a
            copy as it is stored. None: as many as have 2**24 elements, at most 4,096.
        gather: whether the ranks of the default process group put their batches together as references; else each rank
            has its own.
        sync: whether `removed_error` and the threshold are of the draws of all ranks. Every rank must then call it
            equally often, as the criterion.

    Raises:
        ValueError, TypeError: an argument out of bounds; the message names it.

    Example:
        >>> images = torch.randn(1500, 4, 8, 8)  # the training samples
        >>> targets = vadiff.targets.PosteriorMean(images, subset=1024)
        >>> criterion = vadiff.DiffusionLoss.for_process("flow", weighting="constant")
        >>> criterion.target = targets
        >>> x0, noise, t = images[:8], torch.randn(8, 4, 8, 8), torch.rand(8)
        >>> x0_hat, noise_hat = targets.pair(x0, noise, alpha=1 - t, sigma=t, index=torch.arange(8))
        >>> loss = criterion(model_pred, noise_hat - x0_hat, vadiff.log_snr.from_flow_time(t))
    """

    def __init__(
        self,
        reference: Tensor | None = None,
        *,
        subset: int | None = None,
        bank: int | None = None,
        labels: Tensor | None = None,
        unlabelled: int | None = None,
        augment: Augment | None = None,
        threshold: float = 0.01,
        chunk: int | None = None,
        gather: bool = False,
        sync: bool = True,
    ) -> None:
        super().__init__()
        if not is_number(threshold) or not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold is {threshold!r}, expected a number from 0 to below 1")
        if chunk is not None:
            require_count("chunk", chunk, 1)
        if (reference is None) == (bank is None):
            raise ValueError(
                f"reference is {'None' if reference is None else 'given'} and bank is {bank!r}, expected one of them: "
                "a tensor of the training samples, or the size of a bank of recent batches"
            )
        self.source: DataSet | Bank
        if bank is not None:
            for name, value in (("subset", subset), ("labels", labels), ("augment", augment)):
                if value is not None:
                    raise ValueError(f"{name} is given with a bank, expected None: a bank has what the calls give it")
            require_count("bank", bank, 2)
            self.source = Bank(bank)
        else:
            assert reference is not None
            _check_reference(reference, subset, labels, augment)
            self.source = DataSet(reference.detach(), subset, labels, augment)
        self.unlabelled, self.chunk, self.gather = unlabelled, chunk, bool(gather)
        self.removed = RemovedError(float(threshold), bool(sync))
        self.register_buffer("found", torch.zeros(2, dtype=torch.int64), persistent=False)
        self._warned = False
        if reference is not None:
            self.to(reference.device)

    found: Tensor  # int64 [2]: samples of batches without `index` that are in the reference, and all of these

    @torch.no_grad()
    def forward(
        self,
        x0: Tensor,
        noisy: Tensor,
        alpha: Tensor | float,
        sigma: Tensor | float,
        *,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The targets of a batch.

        Args:
            x0: clean samples [B, ...], as the network sees them (augmented), float32, bfloat16, float16 or float64.
            noisy: x_t = alpha·x0 + sigma·eps, same shape.
            alpha, sigma: [B], or a number; sigma finite. Scaled together, as in EDM's alpha = 1, they give the same.
            index: [B] int64 rows of x0 in the reference (any numbers of the samples, for a bank). Without it, samples
                of equal bits count as one: right for data without duplicates.
            labels: [B] int64 classes, if the reference has labels; for a bank, if references are to be of the same
                class.
            generator: of the random subset.

        Returns:
            x0_hat, of the shape, dtype and device of x0; without gradient.

        Raises:
            ValueError, TypeError: a bad argument; the message names it.
        """
        alpha, sigma = self._check(x0, noisy, alpha, sigma, index, labels)
        dtype = torch.float64 if x0.dtype is torch.float64 else torch.float32
        each = (-1, *[1] * (x0.dim() - 1))
        keys = keys_of(x0) if index is None else index.to(x0.device)
        finite = x0.isfinite().flatten(1).all(1)  # others are no references, and keep their own target
        values = torch.where(finite.view(each), x0, 0.0).to(dtype)
        batch = self._together(References(values, keys, labels, finite))
        batch = batch._replace(valid=batch.valid & first_of_each(batch.keys))
        log_snr = 2.0 * (alpha.double().log() - sigma.double().log())
        active = finite & (sigma > 0) & sigma.isfinite() & (log_snr < _CLEAN) & ~self.removed.keeps_own(log_snr)
        ready = self.source.ready(batch)
        if ready is not None:
            active &= ready
        safe = torch.where(active, sigma, 1.0)
        draws = Draws(
            x0.flatten(1).to(dtype), noisy.flatten(1).to(dtype), alpha, safe, keys, labels, self.unlabelled
        )  # fmt: skip
        found = self._posterior(draws, batch, None if index is not None else x0.dtype, active, generator)
        x0_hat = torch.where(active.view(each), found.mean.view_as(x0).to(x0.dtype), x0)
        if self.training:
            self.removed.record(log_snr, found.variance, active)
            self._keep(batch)  # last: it overwrites references
        return x0_hat

    def _keep(self, batch: References) -> None:
        """Put the batch into a bank. Levels are judged once it is full: J*_M grows with M."""
        before = self.source.full()
        self.source.keep(batch)
        full, variance = self.source.full(), self.source.data_variance()
        if before is not None and full is not None:
            self.removed.forget_where(full & ~before)
            variance = torch.where(full, variance, 0.0)
        self.removed.set_variance(variance)

    def _posterior(
        self,
        draws: Draws,
        batch: References,
        given: torch.dtype | None,
        active: Tensor,
        generator: torch.Generator | None,
    ) -> Posterior:
        """The posterior of all draws or, on a CPU, of the active ones."""
        skips = self._skips(draws.x0)
        if skips and not bool(active.any()):
            return Posterior(torch.zeros_like(draws.x0), torch.zeros_like(draws.sigma))
        others = self.source.references(batch, given, generator)
        if given is not None and isinstance(self.source, DataSet):
            self._look(others, batch)
        sets = [others, batch]
        return self._of_rows(draws, sets, active) if skips else posterior(draws, sets, self.chunk)

    def _look(self, others: References, batch: References) -> None:
        """Count the samples of all references that were found in batches without `index`."""
        if self.training and self.source.subset is None:
            found = torch.stack([(~others.valid).sum(), batch.valid.sum()])
            self.found += found
            if self._skips(batch.values) and not self._warned and int(self.found[1]) >= _ENOUGH_TO_WARN:
                self._warned = True
                if self.missing:
                    warnings.warn(self.missing, DiffusionLossWarning, stacklevel=4)

    @property
    def missing(self) -> str:
        """What is wrong if the batches are not found in the reference; "" if they are. Synchronises with a GPU."""
        found, seen = self.found.tolist()
        if seen < _ENOUGH_TO_WARN or found >= _LEAST_FOUND * seen:
            return ""
        return (
            f"only {found / seen:.0%} of the batches' samples are in the reference bit by bit, so that own samples may "
            "count twice: pass index=, the rows of the batch in the reference"
        )

    def _skips(self, x0: Tensor) -> bool:
        """Whether work is done for the active draws only, whose number the host then has to read."""
        return x0.device.type == "cpu" and not torch.compiler.is_compiling()

    def _of_rows(self, draws: Draws, sets: list[References], active: Tensor) -> Posterior:
        """The posterior of the active draws; for the others a mean and a variance that are not read."""
        rows = active.nonzero().squeeze(1)
        if len(rows) == len(active):
            return posterior(draws, sets, self.chunk)
        mean, variance = torch.zeros_like(draws.x0), torch.zeros_like(draws.sigma)
        if len(rows):
            chosen: list[Any] = [value[rows] if isinstance(value, Tensor) else value for value in draws]
            found = posterior(Draws(*chosen), sets, self.chunk)
            mean[rows], variance[rows] = found
        return Posterior(mean, variance)

    def pair(
        self,
        x0: Tensor,
        noise: Tensor,
        alpha: Tensor | float,
        sigma: Tensor | float,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Targets of x0 and of the noise, (x0_hat, noise_hat), with x_t = alpha·x0_hat + sigma·noise_hat.

        noise_hat = (x_t - alpha·x0_hat)/sigma = noise + alpha/sigma·(x0 - x0_hat). The target of v is alpha·noise_hat -
        sigma·x0_hat, that of a flow noise_hat - x0_hat.

        Args:
            x0, alpha, sigma: as for `forward`.
            noise: eps of x_t, [B, ...].
            options: index, labels, generator of `forward`.

        Raises:
            ValueError, TypeError: as `forward`.
        """
        if not isinstance(noise, Tensor) or noise.shape != x0.shape:
            raise ValueError(f"noise is {_shape(noise)}, expected {tuple(x0.shape)}: the shape of x0")
        shape = (-1, *[1] * (x0.dim() - 1))
        a, s = (_per_sample(name, value, x0).view(shape) for name, value in (("alpha", alpha), ("sigma", sigma)))
        x0, noise = x0.detach(), noise.detach()
        x0_hat = self(x0, a * x0 + s * noise, alpha, sigma, **options)
        ratio = torch.where(s > 0, a / s, 0.0).nan_to_num(posinf=0.0)
        return x0_hat, noise + (ratio * (x0 - x0_hat)).to(noise.dtype)

    @torch.no_grad()
    def removed_error(self, log_snr: Tensor) -> Tensor:
        """J*_M: what the targets take out of the mean squared error of x0, per element, at each log-SNR.

        Add it to an error against these targets to get the error against x0. 0 before the first call and where draws
        keep their own target. Runs on the device, without synchronising. [N] → [N] float64.
        """
        return self.removed.at(log_snr)

    def _together(self, batch: References) -> References:
        """The batch, or with `gather` those of all ranks."""
        if not self.gather or number_of_ranks() == 1:
            return batch
        gathered: list[Any] = []
        for values in (batch.values, batch.keys, batch.labels, batch.valid):
            if values is not None:
                out = [torch.empty_like(values.contiguous()) for _ in range(dist.get_world_size())]
                dist.all_gather(out, values.contiguous())
                values = torch.cat(out)
            gathered.append(values)
        return References(*gathered)

    def _check(
        self, x0: Tensor, noisy: Tensor, alpha: Any, sigma: Any, index: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """alpha and sigma as [B] tensors of the arithmetic's dtype."""
        if not isinstance(x0, Tensor) or not x0.is_floating_point() or x0.dim() < 2 or x0.numel() == 0:
            raise ValueError(f"x0 is {_shape(x0)}, expected floats [B, ...] as the network sees them")
        if not isinstance(noisy, Tensor) or noisy.shape != x0.shape or noisy.device != x0.device:
            raise ValueError(f"noisy is {_shape(noisy)}, expected {tuple(x0.shape)} on {x0.device}, as x0")
        has_labels = isinstance(self.source, DataSet) and self.source.labels is not None
        if isinstance(self.source, DataSet):
            samples = self.source.samples
            if samples.shape[1:] != x0.shape[1:] or samples.device != x0.device:
                raise ValueError(
                    f"x0 is {_shape(x0)} on {x0.device}, expected [B, {', '.join(map(str, samples.shape[1:]))}] on "
                    f"{samples.device}: as the reference"
                )
            if self.source.augment is not None and index is None:
                raise ValueError("index is None with augment, expected rows of the reference: augmented images differ")
            if has_labels != (labels is not None):
                raise ValueError(
                    f"labels is {'given' if labels is not None else 'None'}, but the reference has "
                    f"{'labels' if has_labels else 'none'}: give both, or neither"
                )
        for name, value in (("index", index), ("labels", labels)):
            if value is not None and (value.shape != x0.shape[:1] or value.dtype is not torch.int64):
                raise ValueError(f"{name} is {_shape(value)} {value.dtype}, expected int64 ({len(x0)},)")
        return _per_sample("alpha", alpha, x0), _per_sample("sigma", sigma, x0)

    def extra_repr(self) -> str:
        return f"threshold={self.removed.threshold:g}" + (", gather=True" if self.gather else "")

    @property
    def description(self) -> str:
        """In words, for logs and summaries."""
        missing = self.missing
        return f"posterior mean over {self.source.extra_repr()}" + (f" ({missing})" if missing else "")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        if isinstance(self.source, Bank):
            self.source.load(state_dict, f"{prefix}source.", self.removed.sums.device, errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def _per_sample(name: str, value: Any, x0: Tensor) -> Tensor:
    dtype = torch.float64 if x0.dtype is torch.float64 else torch.float32
    if is_number(value) and math.isfinite(value):
        return torch.full((len(x0),), float(value), dtype=dtype, device=x0.device)
    if not isinstance(value, Tensor) or value.numel() != len(x0) or not value.is_floating_point():
        raise ValueError(f"{name} is {_shape(value)}, expected floats ({len(x0)},): one per sample, or a number")
    return value.detach().flatten().to(x0.device, dtype)


def _check_reference(reference: Tensor, subset: int | None, labels: Tensor | None, augment: Augment | None) -> None:
    if not isinstance(reference, Tensor) or not (reference.is_floating_point() or reference.dtype is torch.uint8):
        got = reference.dtype if isinstance(reference, Tensor) else type(reference).__name__
        raise TypeError(f"reference is {got}, expected a tensor of floats, or of bytes (pixels)")
    if reference.dim() < 2 or len(reference) < 2 or reference[0].numel() == 0:
        raise ValueError(f"reference has shape {tuple(reference.shape)}, expected (N, ...) with at least two samples")
    if subset is not None:
        require_count("subset", subset, 2)
        if subset > len(reference):
            raise ValueError(f"subset is {subset}, expected at most {len(reference)}: the size of the reference")
    if augment is not None and subset is None:
        raise ValueError(f"subset is None with augment, expected a number: subset={len(reference)} for all samples")
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype is not torch.int64 or labels.shape != reference.shape[:1]:
        raise ValueError(
            f"labels is {_shape(labels)}, expected int64 ({len(reference)},), one class per sample. Texts and other "
            "conditions are different for each sample, so that no two share a posterior: posterior-mean targets do not "
            "work with them"
        )


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"

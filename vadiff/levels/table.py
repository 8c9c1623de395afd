"""A level distribution tilted by a factor per log-SNR bin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.reference import bin_index
from ..statistics import checked_bins
from .fixed import EVERYWHERE, LogUniform
from .sampler import LevelSampler, NoiseLevels, checked_uniforms

_OPEN = 2.0**-54  # distance of u from 0 and 1, where an unbounded base has infinite log-SNR


class Table(LevelSampler):
    """p(log_snr) ∝ base(log_snr) · factor of its bin: piecewise constant where the base is uniform.

    With factors w at the bin centres, sampling replaces the weighting w: levels drawn from this table have the same
    expected gradient, up to a constant, as levels drawn from the base and weighted by w. With `corrected`, the
    sample weight is base/p, so that the objective is exactly that of the base: E[sample_weight · loss] over p equals
    E[loss] over the base.

    Args:
        factors: [K] numbers ≥ 0, one per bin, not all 0; none 0 where `corrected`. Only their ratios matter.
        log_snr_range: (low, high) of the K equal-width bins; levels outside belong to the end bins.
        base: the distribution to tilt; None is uniform over `log_snr_range`.
        corrected: return base/p as sample weight.

    Raises:
        ValueError: an argument out of bounds.
        TypeError: base is not a `LevelSampler`.
        RuntimeError: from `load_state_dict`, when the saved bins, range or base differ from these; nothing is loaded
            then.
    """

    # Bits of float64 in integers: `module.half()` casts every float buffer.
    ratio: Tensor  # int64 [K]: p/base per bin
    masses: Tensor  # int64 [K]: base's probability of each bin
    edges: Tensor  # int64 [K]: base's u at the less noisy edge of each bin

    def __init__(
        self,
        factors: Tensor | Sequence[float],
        log_snr_range: tuple[float, float] = (-16.0, 16.0),
        base: LevelSampler | None = None,
        corrected: bool = False,
    ) -> None:
        super().__init__()
        factors = torch.as_tensor(factors, dtype=torch.float64).detach().cpu()
        if factors.dim() != 1:
            raise ValueError(f"factors has shape {tuple(factors.shape)}, expected (K,): one number per bin")
        self.bins = checked_bins(len(factors), log_snr_range)
        if not bool((factors.isfinite() & (factors >= 0)).all()):
            raise ValueError("factors has a negative or non-finite number, expected numbers of at least 0")
        if corrected and bool((factors == 0).any()):
            raise ValueError("factors has a 0, expected positive numbers: levels never drawn cannot be corrected for")
        if base is None:
            base = LogUniform(math.exp(-0.5 * self.bins.high), math.exp(-0.5 * self.bins.low))
        if not isinstance(base, LevelSampler):
            raise TypeError(f"base is a {type(base).__name__}, expected an object from vadiff.levels, or None")
        self.base = base
        self.corrected = bool(corrected)
        limits = torch.linspace(self.bins.low, self.bins.high, self.bins.size + 1, dtype=torch.float64)
        limits[0], limits[-1] = base.log_snr_range  # levels outside belong to the end bins
        at_limits = base.cdf(limits)  # [K + 1], falls
        at_limits[0], at_limits[-1] = 1.0, 0.0
        for name, value in (
            ("ratio", torch.ones(self.bins.size, dtype=torch.float64)),
            ("masses", at_limits[:-1] - at_limits[1:]),
            ("edges", at_limits[1:]),
        ):
            self.register_buffer(name, value.contiguous().view(torch.int64), persistent=name != "masses")
        if not float((factors * self._numbers(self.masses)).sum()) > 0:
            raise ValueError(f"factors is 0 wherever {base} has noise levels, expected a positive number in one bin")
        self._set(factors)
        self._restrict(EVERYWHERE)  # the base has its own range
        self.log_snr_range = base.log_snr_range

    @staticmethod
    def _numbers(bits: Tensor) -> Tensor:
        return bits.view(torch.float64)

    def _set(self, factors: Tensor) -> None:
        """Set the factors [K] in place, without synchronising."""
        masses = self._numbers(self.masses)
        self._numbers(self.ratio).copy_(factors / (factors * masses).sum())

    def forward(self, u: Tensor) -> NoiseLevels:
        u = checked_uniforms(u)
        ratio, masses, edges = (self._numbers(bits) for bits in (self.ratio, self.masses, self.edges))
        if u.device != ratio.device:
            raise ValueError(
                f"u is on {u.device}, expected {ratio.device}: the sampler's. Use u.to({str(ratio.device)!r})."
            )
        # Noise grows with u and falls with the bin index: start from the last bin.
        drawn = (ratio * masses).flip(0)
        filled = drawn.cumsum(0)
        filled = filled / filled[-1]  # the last entry is exactly 1, above every u
        place = torch.searchsorted(filled, u, right=True).clamp(max=self.bins.size - 1)
        part = (1.0 - (filled[place] - u) / drawn[place]).clamp(0.0, 1.0)  # position inside the bin
        bin_of = self.bins.size - 1 - place
        at = (edges[bin_of] + part * masses[bin_of]).clamp(_OPEN, 1.0 - 2 * _OPEN)
        levels = self.base._levels(at).float()
        return NoiseLevels(levels, (1.0 / ratio[bin_of]).float() if self.corrected else None)

    def _quantile(self, u: Tensor) -> Tensor:
        return self(u).log_snr.double()

    def _cdf(self, log_snr: Tensor) -> Tensor:
        ratio, masses, edges = (self._numbers(bits) for bits in (self.ratio, self.masses, self.edges))
        drawn = ratio * masses
        less_noise = drawn.flip(0).cumsum(0).flip(0) - drawn  # [K]: of the bins above
        bin_of = bin_index(log_snr.float(), self.bins)
        return less_noise[bin_of] + ratio[bin_of] * (self.base.cdf(log_snr) - edges[bin_of])

    def _log_density(self, log_snr: Tensor) -> Tensor:
        ratio = self._numbers(self.ratio)
        return self.base.log_density(log_snr) + ratio[bin_index(log_snr.float(), self.bins)].log()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        reason = self._mismatch(state_dict, prefix)
        if reason is not None:
            error_msgs.append(prefix + reason)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _mismatch(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why a saved state belongs to another sampler, beginning with the buffer's name; None if it can be loaded."""
        edges = state_dict.get(prefix + "edges")
        if not isinstance(edges, Tensor):
            return None
        if edges.dtype != torch.int64 or edges.shape != self.edges.shape:
            return (
                f"edges is {edges.dtype} of shape {tuple(edges.shape)}, expected int64 of shape "
                f"({self.bins.size},): make the sampler with the bins that were saved"
            )
        difference = self._numbers(edges.cpu()) - self._numbers(self.edges.cpu())
        if not bool((difference.abs() < 1e-9).all()):
            return (
                f"edges belongs to another base or log_snr_range than {self.base} and "
                f"({self.bins.low:g}, {self.bins.high:g}): make the sampler with those that were saved"
            )
        return None

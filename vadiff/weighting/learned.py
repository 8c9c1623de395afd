"""EDM2's learned uncertainty: a small head that predicts ln of the base loss at each noise level."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops.problem import Bins, Inputs
from .base import Weighting

_WIDEST = 40.0  # log-SNR beyond which the head sees no difference; it has to see a number at +-inf


class LearnedUncertainty(nn.Module, Weighting):
    """The loss is mean_i v_i·(g_i/e**u_i + u_i) with u_i = u(log_snr_i) learned: EDM2 (arXiv 2312.02696, eqs. 20, 21).

    At the optimum e**u is the mean base loss g at that noise level (eq. 25), so that w = e**-u is what
    `weighting.LossLevel` takes from the statistics, up to its constant: that one keeps the expected loss where it was,
    this one brings it to 1. The value of the loss has u in it and may be negative; `DiffusionLoss.base_loss` is the
    mean of v·g beside it. The statistics hold g, as always.

    u is a linear map of `channels` random Fourier features of c_noise = ln(sigma)/4 (EDM2's 128), without its forced
    weight norm. It is trained by the loss itself: give `criterion.parameters()` to the optimizer together with the
    network's, and on several ranks wrap the criterion in `DistributedDataParallel`, so that its gradient is averaged.

    Args:
        channels: number of Fourier features.
        init: "zeros" starts neutral, with w = 1; "random" as in the paper, where u has unit variance and the first
            weights differ by a factor of some 30.
        seed: of the features, and of a random start.

    Raises:
        ValueError: an argument out of bounds.
    """

    has_parameters: ClassVar[bool] = True

    frequencies: Tensor  # [channels]
    phases: Tensor  # [channels]

    def __init__(self, channels: int = 128, init: str = "zeros", seed: int = 0) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels is {channels!r}, expected a positive integer")
        if init not in ("zeros", "random"):
            raise ValueError(f"init is {init!r}, expected 'zeros' or 'random'")
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", 2.0 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2.0 * math.pi * torch.rand(channels, generator=generator))
        start = torch.randn(channels, generator=generator)
        self.weight = nn.Parameter(start / start.square().mean().sqrt() if init == "random" else torch.zeros(channels))

    def forward(self, log_snr: Tensor) -> Tensor:
        """u at each log-SNR, [B] float32; differentiable by the parameters. NaN for NaN."""
        c_noise = log_snr.float().clamp(-_WIDEST, _WIDEST) / -8.0  # ln(sigma)/4, sigma that of a VE process
        features = math.sqrt(2.0) * (c_noise[:, None] * self.frequencies.float() + self.phases.float()).cos()  # [B, C]
        # Not a matrix product: autocast would take that in bfloat16.
        return (features * self.weight.float()).sum(1) / math.sqrt(len(self.weight))

    def for_batch(self, log_snr: Tensor, sync: bool) -> Tensor:
        return (-self(log_snr)).exp().detach()

    def weight_at(self, log_snr: Tensor, log_weights: Tensor, bins: Bins) -> Tensor:
        return self.for_batch(log_snr, sync=False)

    def extra_term(self, ell: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """v·u(log_snr) [B] with the gradient of v·(g/e**u + u) by the parameters, and the mean of v·g.

        The term g/e**u is in the weighted loss already, with the gradient by the prediction.
        """
        one = torch.ones_like(ell)
        base_weight = one if inputs.base_weight is None else inputs.base_weight.detach()
        v = one if inputs.sample_weight is None else inputs.sample_weight
        masked = (base_weight == 0) | (v == 0)
        g = (base_weight * ell).masked_fill(masked, 0.0)
        u = self(inputs.log_snr.masked_fill(masked, 0.0)).to(ell.dtype)  # a NaN would reach every parameter
        scaled = g * (-u).exp()
        term = v * (u + scaled - scaled.detach())
        return term.masked_fill(masked, 0.0), (v * g).masked_fill(masked, 0.0).mean()

    def extra_repr(self) -> str:
        return f"channels={len(self.weight)}"

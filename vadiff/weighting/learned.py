"""EDM2's learned uncertainty: a small head that predicts ln of the base loss at each noise level."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._validation import require_count
from ..ops.problem import Bins, Inputs
from .base import Weighting

_WIDEST = 40.0  # log-SNR is clamped to +-this: the features of +-inf would be NaN


class LearnedUncertainty(nn.Module, Weighting):
    """The loss is mean_i v_i·(g_i/e**u_i + u_i) with u_i = u(log_snr_i) learned: EDM2 (arXiv 2312.02696, eqs. 20, 21).

    At the optimum e**u is the mean base loss g at that noise level (eq. 25), so that w = e**-u is the weight of
    `weighting.LossLevel` up to a constant: `LossLevel` preserves the expected loss, the learned weight brings it to 1.
    The loss includes u and may be negative; `DiffusionLoss.base_loss` is the mean of v·g without u. The statistics
    record g.

    u is a linear map of `channels` random Fourier features of c_noise = ln(sigma)/4 (128 in EDM2), without EDM2's
    forced weight normalisation. u is trained by the loss itself: give `criterion.parameters()` to the optimizer with
    the network's, and on several ranks wrap the criterion in `DistributedDataParallel` to average its gradient.

    Args:
        channels: number of Fourier features.
        init: "zeros" starts with w = 1; "random" as in the paper, where u has unit variance and the first weights
            differ by a factor of some 30.
        seed: of the random features and of init "random".

    Raises:
        ValueError: an argument out of bounds.
    """

    has_parameters: ClassVar[bool] = True

    frequencies: Tensor  # [channels]
    phases: Tensor  # [channels]

    def __init__(self, channels: int = 128, init: str = "zeros", seed: int = 0) -> None:
        super().__init__()
        require_count("channels", channels, 1)
        if init not in ("zeros", "random"):
            raise ValueError(f"init is {init!r}, expected 'zeros' or 'random'")
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", 2.0 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2.0 * math.pi * torch.rand(channels, generator=generator))
        start = torch.randn(channels, generator=generator)
        self.weight = nn.Parameter(start / start.square().mean().sqrt() if init == "random" else torch.zeros(channels))

    def forward(self, log_snr: Tensor) -> Tensor:
        """u at each log-SNR, [B] float32; differentiable with respect to the parameters. NaN for NaN."""
        c_noise = log_snr.float().clamp(-_WIDEST, _WIDEST) / -8.0  # ln(sigma)/4, alpha = 1
        features = math.sqrt(2.0) * (c_noise[:, None] * self.frequencies.float() + self.phases.float()).cos()  # [B, C]
        # Not a matrix product, which autocast would compute in bfloat16.
        return (features * self.weight.float()).sum(1) / math.sqrt(len(self.weight))

    def for_batch(self, log_snr: Tensor, sync: bool) -> Tensor:
        return (-self(log_snr)).exp().detach()

    def weight_at(self, log_snr: Tensor, log_weights: Tensor, bins: Bins) -> Tensor:
        return self.for_batch(log_snr, sync=False)

    def extra_term(self, ell: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """v·u(log_snr) [B], whose gradient with respect to the parameters is that of v·(g/e**u + u); the mean of v·g.

        The weighted loss already contains v·g/e**u, with its gradient with respect to the prediction.
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

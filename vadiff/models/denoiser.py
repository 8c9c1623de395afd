"""A denoiser D(x; sigma) from a network that predicts EDM's F or a flow's velocity."""

import torch
from torch import Tensor, nn

from ..process import EDMPreconditioning, edm_preconditioning

PROCESSES = ("edm", "flow")


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip·x + c_out·F(c_in·x, c_noise), with F the raw network and x = x0 + sigma·eps.

    `edm`: EDM's preconditioning (arXiv 2206.00364, eq. 7 and table 1). `flow`: F is the velocity eps - x0 on the
    straight path x_t = (1-t)·x0 + t·eps. With t = sigma/(1+sigma), x_t = x/(1+sigma), and x0 = x_t - t·F: the same
    form with c_skip = c_in = 1/(1+sigma) and c_out = -t. A flow network is thus sampled, evaluated and compared at
    the same noise levels as an EDM one.

    Args:
        network: F; called with c_in·x, [B, C, H, W], and c_noise = ln(sigma)/4, [B], and if `labels` is not 0 with
            labels, [B] int64, where the value `labels` means "none given"; returns [B, C, H, W].
        sigma_data: standard deviation of the data.
        labels: number of classes, 0 for an unconditional network.
        image_shape: (C, H, W) of the images, used for sampling.
        process: "edm" or "flow".

    Raises:
        ValueError: an unknown process.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float,
        *,
        labels: int = 0,
        image_shape: tuple[int, int, int] | None = None,
        process: str = "edm",
    ) -> None:
        super().__init__()
        if process not in PROCESSES:
            raise ValueError(f"process is {process!r}, expected one of {', '.join(PROCESSES)}")
        self.network = network
        self.sigma_data = sigma_data
        self.labels = labels
        self.image_shape = image_shape
        self.process = process

    def network_output(
        self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None, *, network: nn.Module | None = None
    ) -> Tensor:
        """F: the network's output for `noisy` = x0 + sigma·eps, [B, C, H, W], at levels `sigma`, [B].

        Args:
            labels: [B] int64; None means none given. Not read by a network without classes.
            network: called in place of F: a compiled F, or F in a distributed wrapper.
        """
        scale = self._preconditioning(sigma)
        network = self.network if network is None else network
        arguments: tuple[Tensor, ...] = (scale.c_in.view(-1, 1, 1, 1) * noisy, scale.c_noise)
        if self.labels:
            arguments += (torch.full_like(sigma, self.labels, dtype=torch.int64) if labels is None else labels,)
        output: Tensor = network(*arguments)
        return output

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """D: the estimate of x0 given `noisy`, [B, C, H, W], at noise levels `sigma`, [B], for classes `labels`."""
        scale = self._preconditioning(sigma)
        output = self.network_output(noisy, sigma, labels)
        return scale.c_skip.view(-1, 1, 1, 1) * noisy + scale.c_out.view(-1, 1, 1, 1) * output

    def _preconditioning(self, sigma: Tensor) -> EDMPreconditioning:
        scale = edm_preconditioning(sigma, self.sigma_data)
        if self.process == "flow":
            shrink = 1.0 / (1.0 + sigma)
            return scale._replace(c_skip=shrink, c_out=-sigma * shrink, c_in=shrink)
        return scale

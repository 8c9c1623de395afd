"""EDM's preconditioned denoiser around any network."""

from torch import Tensor, nn

from ..process import edm_preconditioning


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip·x + c_out·F(c_in·x, c_noise), with F the raw network.

    Source: EDM (arXiv 2206.00364), eq. 7 and table 1.

    Args:
        network: F; called with c_in·x, [B, C, H, W], and c_noise = ln(sigma)/4, [B]; returns [B, C, H, W].
        sigma_data: standard deviation of the data.
    """

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data

    def network_output(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """F: what the network says about `noisy` = x0 + sigma·eps, [B, C, H, W], at levels `sigma`, [B]."""
        scale = edm_preconditioning(sigma, self.sigma_data)
        output: Tensor = self.network(scale.c_in.view(-1, 1, 1, 1) * noisy, scale.c_noise)
        return output

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """D: the estimate of x0 given `noisy`, [B, C, H, W], at noise levels `sigma`, [B]."""
        scale = edm_preconditioning(sigma, self.sigma_data)
        output = self.network_output(noisy, sigma)
        return scale.c_skip.view(-1, 1, 1, 1) * noisy + scale.c_out.view(-1, 1, 1, 1) * output

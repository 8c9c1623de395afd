"""A denoiser D(x; sigma) from a network that predicts EDM's F, a flow's velocity, eps, v or x0."""

import torch
from torch import Tensor, nn

from ..process import EDMPreconditioning
from .parameterisation import Parameterisation, parameterisation


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip·x + c_out·F(c_in·x, c_noise), with F the raw network and x = x0 + sigma·eps.

    Args:
        network: F; called with c_in·x, [B, C, H, W], and c_noise, [B] (ln(sigma)/4; with a variance-preserving process
            the timestep / 100), and if `labels` is not 0 with labels, [B] int64, where the value `labels` means "none
            given"; returns [B, C, H, W].
        sigma_data: standard deviation of the data.
        labels: number of classes, 0 for an unconditional network.
        image_shape: (C, H, W) of the images, used for sampling.
        augmented: whether F is told, after the labels (or None), how an image was augmented, [B, 9], see
            `vadiff.augmentation`; None for images as they are, as in sampling.
        process: "edm" or "flow", or what F predicts of another process, see `vadiff.models.parameterisation`.

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
        process: str | Parameterisation = "edm",
        augmented: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data
        self.labels = labels
        self.image_shape = image_shape
        self.augmented = augmented
        self.form: Parameterisation = (
            parameterisation(process, sigma_data=sigma_data) if isinstance(process, str) else process
        )

    @property
    def prediction(self) -> str:
        """What F stands for: one of `vadiff.process.PREDICTION_TYPES`."""
        return self.form.prediction

    def training_output(
        self, x0: Tensor, eps: Tensor, sigma: Tensor, labels: Tensor | None = None,
        augmentation: Tensor | None = None, *, network: nn.Module | None = None,
    ) -> Tensor:  # fmt: skip
        """F: the network's output for x0 + sigma·eps, [B, C, H, W], at levels `sigma`, [B], which may be infinite.

        Args:
            labels: [B] int64; None means none given. Not read by a network without classes.
            augmentation: [B, 9], how the images were augmented; None: not at all. Not read by a network that is not
                told.
            network: called in place of F: a compiled F, or F in a distributed wrapper.
        """
        noisy = self.form.network_input(x0, eps, sigma)
        scale = self.form.preconditioning(sigma)
        return self._call(network or self.network, noisy, scale, sigma, labels, augmentation)

    def network_output(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """F: the network's output for `noisy` = x0 + sigma·eps, [B, C, H, W], at levels `sigma`, [B]."""
        scale = self.form.preconditioning(sigma)
        return self._call(self.network, scale.c_in.view(-1, 1, 1, 1) * noisy, scale, sigma, labels)

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """D: the estimate of x0 given `noisy`, [B, C, H, W], at noise levels `sigma`, [B], for classes `labels`."""
        scale = self.form.preconditioning(sigma)
        output = self._call(self.network, scale.c_in.view(-1, 1, 1, 1) * noisy, scale, sigma, labels)
        return scale.c_skip.view(-1, 1, 1, 1) * noisy + scale.c_out.view(-1, 1, 1, 1) * output

    def _call(
        self, network: nn.Module, scaled: Tensor, scale: EDMPreconditioning, sigma: Tensor, labels: Tensor | None,
        augmentation: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if self.labels and labels is None:
            labels = torch.full_like(sigma, self.labels, dtype=torch.int64)
        arguments: tuple[Tensor | None, ...] = (scaled, scale.c_noise)
        if self.labels or self.augmented:
            arguments += (labels if self.labels else None,)
        if self.augmented:
            arguments += (augmentation,)
        output: Tensor = network(*arguments)
        return output

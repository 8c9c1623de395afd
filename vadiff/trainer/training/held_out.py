"""EDM's loss on images never trained on, one noise level at a time, with the same noise for every run.

It is a `vadiff.validation.LevelValidation` of every level of each image, with noise from one stream per draw.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...models import Denoiser
from ...process import loss_ratio
from ...validation import LevelLosses, LevelValidation, Records, mean_log_ratio
from ..config import TrainConfig
from ..data import Images, with_labels
from ..data.fixed_noise import fixed_noise
from ..progress import progress_bar

_SEEDS_APART = 0x9E3779B1  # between draws; odd, as torch's CPU generator reads the low 32 bits of a seed only
LOG_SNR_LEVELS = (-4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0)


class HeldOutLoss(NamedTuple):
    """EDM's loss λ(σ)·mean((D - x0)²) per noise level and image, averaged over draws of noise."""

    log_snr: Tensor  # [L] float32
    per_image: Tensor  # [L, N] float32, on the CPU
    sigma_data: float  # of EDM's weight λ(σ) = 1/σ² + 1/sigma_data²
    noise: str = "noise of a vadiff run"  # how it was drawn
    images: str = ""  # which images, see `name_of`

    @property
    def mean(self) -> Tensor:
        """Mean over images, [L]."""
        return self.per_image.mean(1)

    @property
    def level_mean(self) -> float:
        """One number for all noise levels: the geometric mean of the x0 losses, see `level_mean`."""
        return float(level_mean(self.mean, self.log_snr, sigma_data=self.sigma_data))

    @property
    def by_level(self) -> LevelLosses:
        """Mean and standard error over images, as the validation of any other loop has them."""
        levels, images = self.per_image.shape
        records = Records(
            sample=torch.arange(images).repeat_interleave(levels),
            level=torch.arange(levels).repeat(images),
            loss=self.per_image.T.reshape(-1).double(),
        )
        draws = f"every level of each sample, {self.noise}, sigma_data {self.sigma_data:g}"
        return LevelLosses.of(self.log_snr, records, draws, self.images)

    def with_sigma_data(self, sigma_data: float) -> "HeldOutLoss":
        """The same loss with λ(σ) of another sigma_data, to compare with a run that has it."""
        mine, wanted = (loss_ratio("edm", self.log_snr, sigma_data=value) for value in (self.sigma_data, sigma_data))
        return self._replace(per_image=self.per_image * (wanted / mine)[:, None], sigma_data=sigma_data)

    def ratio_to(self, other: "HeldOutLoss") -> tuple[Tensor, Tensor]:
        """Ratio of this mean loss to `other`'s, and its standard error, [L] float64 each.

        Both must have the same images and noise: the error is that of the paired difference.
        """
        return self.by_level.ratio_to(other.by_level)


def level_mean(loss: Tensor, log_snr: Tensor, *, sigma_data: float) -> Tensor:
    """Geometric mean over noise levels of the x0 loss, exp(mean of ln(loss / λ(σ))).

    The mean that every report, table and comparison of runs uses: each level counts alike, whatever its scale, and the
    ratio of two means is the exponential of `vadiff.validation.mean_log_ratio`, the same in every form of the loss.

    Args:
        loss: EDM's loss λ(σ)·mean((D - x0)²) per noise level, [..., L].
        log_snr: the levels, [L].
        sigma_data: of λ(σ) = 1/σ² + 1/sigma_data².

    Returns:
        [...] float64; NaN where a level has no positive loss.
    """
    return mean_log_ratio(loss, loss_ratio("edm", log_snr.double(), sigma_data=sigma_data)).exp()


def held_out_log_snr(config: TrainConfig) -> Tensor:
    """The levels at which a run's held-out loss is measured, evenly spaced in ln sigma, descending. [L] float64."""
    low, high = (math.log(sigma) for sigma in config.held_out_range())
    return -2.0 * torch.linspace(low, high, config.held_out_levels, dtype=torch.float64)


def held_out_loss_of_run(
    config: TrainConfig, images: Images, denoiser: Denoiser, *, limit: int | None = None, progress: bool = False
) -> HeldOutLoss:
    """The loss on the held-out images, at the levels and with the draws of a config.

    Args:
        config: of the run.
        images: its data set.
        denoiser: see `held_out_loss`.
        limit: maximum number of images; `config.held_out_images` by default.
        progress: show a progress bar.
    """
    number = config.held_out_images if limit is None else limit
    stored, labels = with_labels(images.held_out, images.held_out_labels, slice(number))
    found = held_out_loss(
        denoiser,
        images.encoding.inputs(stored),
        labels,
        log_snr_levels=held_out_log_snr(config).tolist(),
        draws=config.held_out_draws,
        progress=progress,
    )
    return found._replace(images=name_of(stored))


def name_of(stored: Tensor) -> str:
    """Stored images [N, C, H, W] as text, equal for equal ones only: number, shape, and a hash."""
    digest = hashlib.blake2b(stored.contiguous().numpy().tobytes(), digest_size=6).hexdigest()
    what = "pixels" if stored.dtype == torch.uint8 else "latents"
    return f"{len(stored):,} images of shape {'x'.join(map(str, stored.shape[1:]))}, with {what} of hash {digest}"


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    log_snr_levels: Sequence[float] = LOG_SNR_LEVELS,
    draws: int = 2,
    seed: int = 0,
    batch_size: int = 500,
    progress: bool = False,
) -> HeldOutLoss:
    """EDM's loss of a denoiser with `draws` fixed noise samples per image and level.

    A flow denoiser is measured in the same way, by its estimate of x0. The noise depends only on the seed, the index of
    an image and the draw, not on the number of images; it is the same for every level.

    Args:
        denoiser: its mode is not changed; call `.eval()` first if it has dropout.
        images: x0 [N, C, H, W] float32, as the network sees images: pixels in [-1, 1], or standardised latents.
        labels: [N] int64, for a class-conditional denoiser; None means none given.
        log_snr_levels: the L levels.
        draws: noise samples per image and level.
        seed: of the noise.
        batch_size: images at a time.
        progress: show a progress bar.
    """
    device = next(denoiser.parameters()).device
    levels = torch.tensor(log_snr_levels)
    weights = loss_ratio("edm", levels, sigma_data=denoiser.sigma_data).tolist()
    per_image = torch.zeros(len(levels), len(images))
    total = draws * len(images) * len(levels)
    with progress_bar(total, "held-out loss", "image", shown=progress) as bar:
        for draw in range(draws):
            noise_of = functools.partial(_rows, fixed_noise(images.shape, seed + draw * _SEEDS_APART))
            validation = LevelValidation(log_snr_levels, every_level=True, noise=noise_of, sync=False)
            for rows in torch.arange(len(images)).split(batch_size):
                clean = images[rows].to(device)
                classes = labels[rows].to(device) if labels is not None and denoiser.labels else None
                for place in range(validation.turns):
                    log_snr, noise = validation.draw(rows * validation.turns + place, clean.shape, device)
                    sigma = torch.full((len(clean),), math.exp(-0.5 * log_snr_levels[place]), device=device)
                    error = denoiser(clean + sigma[0] * noise, sigma, classes) - clean
                    loss = error.square().flatten(1).mean(1) * (weights[place] / draws)
                    validation.add(rows * validation.turns + place, log_snr, loss)
                    bar.update(len(clean))
            records = validation.result().records
            assert records is not None  # only a result from a file has none
            per_image[records.level, records.sample] += records.loss.float()
    return HeldOutLoss(levels, per_image, denoiser.sigma_data, f"noise of a vadiff run, seed {seed}, draws {draws}")


def _rows(noise: Tensor, samples: Tensor, shape: torch.Size) -> Tensor:
    return noise[samples]

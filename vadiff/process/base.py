"""What a noise process is."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..ops.problem import compute_dtype


class NoiseProcess(ABC):
    """x_t = alpha(t)·x0 + sigma(t)·eps with eps ~ N(0, 1).

    Every method takes one value per sample, [B] of any floating dtype, computes in float64 and returns [B] float32
    (float64 for float64 input).

    Attributes:
        t_range: first and last time.
    """

    t_range: tuple[float, float] = (0.0, 1.0)

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data, [B]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise, [B]."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """λ = ln(alpha² / sigma²), [B]; ±inf at the ends of the process."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """The time t at which the process has this λ, [B]: the inverse of `log_snr`."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha·x0 + sigma·eps.

        Args:
            x0: [B, ...] clean samples.
            eps: noise of the same shape.
            t: [B] times of the process (for EDM the noise level sigma).

        Returns:
            The noisy samples, shape and dtype of `x0`.

        Raises:
            ValueError: `eps` or `t` has the wrong shape.
        """
        if eps.shape != x0.shape:
            raise ValueError(f"eps has shape {tuple(eps.shape)}, expected {tuple(x0.shape)}: the shape of x0.")
        if t.shape != x0.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}, expected {tuple(x0.shape[:1])}: one value per sample.")
        per_sample = (-1,) + (1,) * (x0.dim() - 1)
        return (self.alpha(t).view(per_sample) * x0 + self.sigma(t).view(per_sample) * eps).to(x0.dtype)


def match(value: Tensor, t: Tensor) -> Tensor:
    """float64 for float64 times, else float32."""
    return value.to(compute_dtype(t))


def require_direction(data_at: int) -> None:
    """Raise ValueError unless a flow's data are at time 0 or 1."""
    if data_at not in (0, 1):
        raise ValueError(f"data_at is {data_at!r}, expected 0 (data at t = 0) or 1 (data at t = 1).")

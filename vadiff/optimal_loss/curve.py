"""The lowest loss that any network can have, as a curve over noise levels."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..files import replacing
from ..process import EDM, NoiseProcess, loss_ratio

# Below this share of the total variance J* is float32 rounding; interpolation in logs needs a positive number.
_LEAST = 1e-9

_COLUMNS = ("sigma", "loss", "stderr", "draws", "elements", "total_variance", "samples", "estimator", "classes")


class ConvertedLoss(NamedTuple):
    """J* in the form of a prediction type, at the times of a process."""

    time: Tensor  # [T] float64
    loss: Tensor  # [T] float64, sum over elements
    stderr: Tensor  # [T] float64


def checked_sigmas(sigmas: Tensor | Sequence[float]) -> Tensor:
    """Noise levels as [T] float64; raises ValueError unless there are some, all positive and finite."""
    values = torch.as_tensor(sigmas, dtype=torch.float64)
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"sigmas has shape {tuple(values.shape)}, expected (T,): one or more noise levels")
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(
            f"sigmas is {values.tolist()}, with a value that is not positive and finite: expected levels > 0"
        )
    return values


@dataclass(frozen=True, eq=False)
class OptimalLoss:
    """J*(sigma) = E tr Cov[x0 | x0 + sigma·eps]: the x0 loss of the ideal denoiser of a data set.

    Source: Xu et al., Diagnosing and Improving Diffusion Models by Estimating the Optimal Loss Value
    (arXiv 2506.13763), theorem 1. It depends on the data only. The J* of a process with alpha and sigma is that
    at sigma/alpha.

    Attributes:
        sigma: [T] float64, noise levels of a variance-exploding process.
        loss: [T] float64, J*: squared error summed over elements, as in the paper. Divide by `elements` to compare with
            a mean over elements.
        stderr: [T] float64, its standard error.
        draws: [T] int64, noisy samples drawn per level.
        elements: D, number of elements of one sample.
        total_variance: trace of the data's covariance (within classes if class-conditional): limit of J* at high noise.
        samples: N, size of the data set.
        estimator: "full", "snis", "dol", "cdol" or "cdol_paper".
        classes: number of classes of a class-conditional denoiser; 0 for an unconditional one.
    """

    sigma: Tensor
    loss: Tensor
    stderr: Tensor
    draws: Tensor
    elements: int
    total_variance: float
    samples: int
    estimator: str = "full"
    classes: int = 0
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def log_loss_at(self, log_snr: Tensor) -> Tensor:
        """ln(J*/D), the optimal mean over elements, at each log-SNR; shape of `log_snr`, float64, NaN for NaN.

        Linear in ln(J*) over ln(sigma); flat above the highest level, falling as sigma**2 below the lowest.

        Raises:
            ValueError: the curve has fewer than two levels, or a repeated one.
        """
        log_sigma, log_loss = self._table(log_snr.device)
        at = -0.5 * log_snr.double()
        inside = at.clamp(log_sigma[0], log_sigma[-1])
        right = torch.searchsorted(log_sigma, inside.nan_to_num(nan=0.0)).clamp(1, len(log_sigma) - 1)
        left = right - 1
        slope = (log_loss[right] - log_loss[left]) / (log_sigma[right] - log_sigma[left])
        return log_loss[left] + slope * (inside - log_sigma[left]) + 2.0 * (at - log_sigma[0]).clamp(max=0.0)

    def sigma_star(self, share: float = 1e-3) -> float:
        """The largest sigma at which J* is below this share of the total variance.

        Raises:
            ValueError: J* is above it at every level, or below it at every level.
        """
        bound = share * self.total_variance
        sigma, order = self.sigma.sort()
        loss = self.loss[order].clamp(min=_LEAST * self.total_variance)
        below = (loss < bound).nonzero().flatten()
        if len(below) == 0 or int(below[-1]) == len(sigma) - 1:
            where = "nowhere" if len(below) == 0 else "still at the highest level"
            raise ValueError(
                f"J* is below {share:g} of the total variance {where}, expected a crossing: estimate it at levels "
                f"{'below' if len(below) == 0 else 'above'} sigma = {float(sigma[0 if len(below) == 0 else -1]):g} too"
            )
        last = int(below[-1])
        (x0, x1), (y0, y1) = sigma[last : last + 2].log().tolist(), loss[last : last + 2].log().tolist()
        return math.exp(x0 + (x1 - x0) * (math.log(bound) - y0) / (y1 - y0))

    def convert(
        self, prediction_type: str, process: NoiseProcess | None = None, *, sigma_data: float = 0.5
    ) -> ConvertedLoss:
        """J* of another prediction type and process: k·J* of x0 at the time where sigma/alpha is this sigma.

        k is that of `vadiff.process.loss_ratio`; for v = alpha·eps - sigma·x0 it is (alpha² + sigma²)²/sigma², also if
        the process is not variance preserving.

        Args:
            prediction_type: one of `vadiff.process.PREDICTION_TYPES`; "edm" is the raw network output F.
            process: None is `vadiff.process.EDM`.
            sigma_data: standard deviation of the data, for "edm".

        Raises:
            ValueError: an unknown prediction type.
        """
        process = EDM() if process is None else process
        log_snr = -2.0 * self.sigma.log()
        time = process.time(log_snr)
        k = loss_ratio(prediction_type, log_snr, sigma_data=sigma_data)
        if prediction_type == "v_prediction":  # loss_ratio assumes alpha² + sigma² = 1
            k = k * (process.alpha(time).square() + process.sigma(time).square())
        return ConvertedLoss(time, k * self.loss, k * self.stderr)

    def as_rows(self) -> list[tuple[object, ...]]:
        """Rows of the CSV file, one per level: sigma, loss, stderr, draws, and the attributes of the whole curve."""
        whole = (self.elements, self.total_variance, self.samples, self.estimator, self.classes)
        columns = (self.sigma.tolist(), self.loss.tolist(), self.stderr.tolist(), self.draws.tolist())
        return [(*row, *whole) for row in zip(*columns, strict=True)]

    def save(self, path: str | Path) -> None:
        """Write the curve as CSV, one line per level. Replaces the file in one step."""
        with replacing(Path(path)) as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(self.as_rows())

    @classmethod
    def load(cls, path: str | Path) -> OptimalLoss:
        """Read a curve written by `save`.

        Raises:
            ValueError: the file is not such a curve.
        """
        with Path(path).open(newline="") as file:
            rows = list(csv.DictReader(file))
        try:
            first = rows[0]
            sigma, loss, stderr = (
                torch.tensor([float(row[name]) for row in rows], dtype=torch.float64) for name in _COLUMNS[:3]
            )
            return cls(
                sigma=sigma,
                loss=loss,
                stderr=stderr,
                draws=torch.tensor([int(row["draws"]) for row in rows]),
                elements=int(first["elements"]),
                total_variance=float(first["total_variance"]),
                samples=int(first["samples"]),
                estimator=first["estimator"],
                classes=int(first.get("classes", 0)),  # without this column: unconditional
            )
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not an optimal-loss curve, expected CSV with the columns {', '.join(_COLUMNS)}: "
                "write it with `vadiff optimal-loss`"
            ) from error

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """ln(sigma), rising, and ln(J*/D), each [T] float64, copied to a device once."""
        if device not in self._tables:
            if len(self.sigma) < 2:
                raise ValueError(f"the curve has {len(self.sigma)} noise level, expected at least 2 to interpolate")
            sigma, order = self.sigma.sort()
            if bool((sigma.diff() == 0).any()):
                raise ValueError("the curve has a repeated noise level, expected distinct ones to interpolate between")
            loss = self.loss[order].clamp(min=_LEAST * self.total_variance) / self.elements
            self._tables[device] = (sigma.log().to(device), loss.log().to(device))
        return self._tables[device]

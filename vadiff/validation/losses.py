"""The result of a validation: loss per noise level, and its mean log-ratio to a reference."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import import_extra
from ..files import replacing
from ..optimal_loss import ModelGap, OptimalLoss
from ..process import loss_ratio
from ..summary import LOG_SNR, log_values

_COLUMNS = ("log_snr", "sigma", "loss", "stderr", "samples", "non_finite", "draws", "data")
_SAME_LEVEL = 1e-3  # nats


def mean_log_ratio(loss: Tensor, reference: Tensor) -> Tensor:
    """Mean over noise levels of ln(loss / reference): every level counts alike, whatever its scale.

    It is the same in every form of the loss (x0, ε, v, weighted or not), as the factor between two forms depends on the
    level only and cancels.

    Args:
        loss, reference: [..., L], one value per level.

    Returns:
        [...] float64; NaN where a level has no positive loss.
    """
    return (loss.double() / reference.double()).log().mean(-1)


@dataclass(frozen=True, eq=False)
class Records:
    """The loss of each sample of a validation; [R] each, ordered by index."""

    sample: Tensor  # int64
    level: Tensor  # int64, place in `LevelLosses.log_snr`
    loss: Tensor  # float64


@dataclass(frozen=True, eq=False)
class LevelLosses:
    """Mean loss of held-out samples at each noise level; what `LevelValidation.result` returns.

    A non-finite loss of a sample carries into the mean of its level, as it does with `F.mse_loss`, and is counted.

    Attributes:
        log_snr: [L] float64, the levels.
        loss: [L] float64, mean over the level's samples, in the form and with the weights that the loop gave.
        stderr: [L] float64, standard error of `loss` over samples; NaN for a single sample.
        samples: [L] int64, number of samples at each level.
        non_finite: [L] int64, how many of them had a non-finite loss.
        draws: how levels and noise were drawn, as text.
        data: which samples were measured, as text: number, shape, and a hash of what tells them apart. Only results
            with the same `draws`, `data` and `samples` are compared.
        records: the loss of each sample, None if read from a file.
        reference: the result that `mean_log_ratio` and the table compare with by default.
    """

    log_snr: Tensor
    loss: Tensor
    stderr: Tensor
    samples: Tensor
    non_finite: Tensor
    draws: str
    data: str = ""
    records: Records | None = None
    reference: LevelLosses | None = None

    @classmethod
    def of(cls, log_snr: Tensor, records: Records, draws: str, data: str = "") -> LevelLosses:
        """Means and standard errors of the samples' losses.

        Args:
            log_snr: [L], the levels.
            records: with at least one sample at each level.
            draws, data: see `LevelLosses`.

        Raises:
            ValueError: a level without samples.
        """
        size = len(log_snr)
        count = torch.bincount(records.level, minlength=size)
        if bool((count == 0).any()):
            missing = ", ".join(f"{level:.4g}" for level in log_snr[count == 0].tolist())
            raise ValueError(
                f"{len(records.level):,} losses were added, but none at log-SNR {missing}: go through the whole "
                "held-out set, use fewer levels, or every_level=True"
            )

        def total(values: Tensor) -> Tensor:  # [R] → [L]
            return torch.zeros(size, dtype=torch.float64).index_add_(0, records.level, values)

        mean = total(records.loss) / count
        squares = total((records.loss - mean[records.level]).square())
        return cls(
            log_snr=log_snr.double(),
            loss=mean,
            stderr=(squares / (count - 1).double() / count).sqrt(),  # 0/0 for a single sample
            samples=count,
            non_finite=total((~records.loss.isfinite()).double()).long(),
            draws=draws,
            data=data,
            records=records,
        )

    def compared_with(self, reference: LevelLosses | None) -> LevelLosses:
        """The same result with another reference.

        Raises:
            ValueError: a reference at other levels, with other samples or other noise.
        """
        if reference is not None:
            self._check_paired(reference)
        return replace(self, reference=reference)

    def mean_log_ratio(self, reference: LevelLosses | None = None) -> float:
        """The validation's one number: mean over levels of ln(loss / reference's loss), below 0 if lower.

        Args:
            reference: another result with the same levels, samples and noise; None is `self.reference`.

        Raises:
            ValueError: no reference, or one at other levels, with other samples or other noise.
        """
        return float(mean_log_ratio(self.loss, self._other(reference).loss))

    def ratio_to(self, reference: LevelLosses | None = None) -> tuple[Tensor, Tensor]:
        """Ratio of the mean losses and its standard error per level, [L] float64 each.

        The error is that of the paired difference a - ratio·b over samples, far smaller than `stderr`, as both saw the
        same samples and noise; NaN if either was read from a file, which has no losses of samples.

        Args and errors as for `mean_log_ratio`.
        """
        other = self._other(reference)
        ratio = self.loss / other.loss
        if self.records is None or other.records is None:
            return ratio, torch.full_like(ratio, math.nan)
        level = self.records.level
        difference = self.records.loss - ratio[level] * other.records.loss  # mean 0 at each level
        squares = torch.zeros_like(ratio).index_add_(0, level, difference.square())
        return ratio, (squares / (self.samples - 1).double() / self.samples).sqrt() / other.loss

    def mean_log_ratio_stderr(self, reference: LevelLosses | None = None) -> float:
        """Standard error of `mean_log_ratio` over samples, of paired differences; NaN where `ratio_to` has NaN.

        Args and errors as for `mean_log_ratio`.
        """
        other = self._other(reference)
        if self.records is None or other.records is None:
            return math.nan
        level = self.records.level
        difference = self.records.loss - (self.loss / other.loss)[level] * other.records.loss
        # What each loss adds to the mean over levels of ln(mean), to first order; a sample's levels are dependent.
        influence = difference / (self.loss * self.samples * len(self.loss))[level]
        samples, place = self.records.sample.unique(return_inverse=True)
        total = torch.zeros(len(samples), dtype=torch.float64).index_add_(0, place, influence)
        return math.sqrt(float(total.square().sum()) * len(samples) / (len(samples) - 1 or math.nan))

    def training_gap(self, optimal: OptimalLoss, prediction_type: str, *, sigma_data: float = 0.5) -> ModelGap:
        """Loss minus the lowest loss of any network, J*, in x0 form: **for training images only**.

        J* bounds the loss on the images it was estimated from. A held-out image may cost less or more, and the
        difference says nothing about the network. Validate on training images to have a gap.

        Args:
            optimal: J* of the data set of which the validated samples are a part.
            prediction_type: form of the losses, one of `vadiff.process.PREDICTION_TYPES`; they have no other weight.
            sigma_data: standard deviation of the data ("edm" only).

        Raises:
            ValueError: an unknown prediction type; a curve with fewer than two levels.
        """
        k = loss_ratio(prediction_type, self.log_snr, sigma_data=sigma_data)
        best = optimal.log_loss_at(self.log_snr).exp()
        sigma = (-0.5 * self.log_snr).exp()
        nearest = (sigma.log()[:, None] - optimal.sigma.log()).abs().argmin(1)
        stderr = ((self.stderr / k).square() + (optimal.stderr[nearest] / optimal.elements).square()).sqrt()
        return ModelGap(sigma, self.loss / k, best, self.loss / k - best, stderr)

    def __str__(self) -> str:
        """A text table, one line per level, without a trailing newline."""
        compared = self.reference is not None
        lines = [f"loss by noise level ({self.draws})"]
        lines.append(f"{'log-SNR':>8} {'sigma':>9} {'samples':>8} {'loss':>11}   {'std. error':>10}")
        ratio, error = self.ratio_to() if compared else (self.loss, self.stderr)
        if compared:
            lines[-1] += f" {'ratio to reference':>20}"
        for row, values in enumerate(self.as_rows()):
            line = f"{values['log_snr']:8.2f} {values['sigma']:9.4g} {values['samples']:8,} {values['loss']:11.5g}"
            line += f" ± {values['stderr']:<10.3g}"
            if compared:
                line += f"{ratio[row]:12.4f}" + ("" if error[row].isnan() else f" ± {error[row]:.4f}")
            lines.append(line.rstrip())
        if compared:
            change, uncertain = self.mean_log_ratio(), self.mean_log_ratio_stderr()
            error_text = "" if math.isnan(uncertain) else f" ± {uncertain:.4f}"
            lines.append(
                f"mean over levels of ln(loss / reference): {change:+.4f}{error_text} ({math.expm1(change):+.2%})"
            )
        if bool(self.non_finite.any()):
            where = ", ".join(f"{level:.4g}" for level in self.log_snr[self.non_finite > 0].tolist())
            lines.append(f"non-finite losses: {int(self.non_finite.sum()):,}, at log-SNR {where}")
        return "\n".join(lines)

    def as_rows(self) -> list[dict[str, Any]]:
        """One dict per level: log_snr, sigma (σ/α), loss, stderr, samples, non_finite, draws, data."""
        sigma = (-0.5 * self.log_snr).exp()
        columns = (self.log_snr, sigma, self.loss, self.stderr, self.samples, self.non_finite)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [dict(zip(_COLUMNS, (*row, self.draws, self.data), strict=True)) for row in rows]

    def save(self, path: str | Path) -> None:
        """Write the levels as CSV, a line each, which `load` reads. Replaces the file in one step."""
        with replacing(Path(path)) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(self.as_rows())

    @classmethod
    def load(cls, path: str | Path) -> LevelLosses:
        """Read what `save` wrote, as a reference: without the losses of samples.

        Raises:
            OSError: there is no such file.
            ValueError: it is not such a file.
        """
        try:
            with Path(path).open(newline="") as file:
                rows = list(csv.DictReader(file))
            log_snr, loss, stderr = (
                torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
                for name in ("log_snr", "loss", "stderr")
            )
            samples, non_finite = (torch.tensor([int(row[name]) for row in rows]) for name in ("samples", "non_finite"))
            return cls(log_snr, loss, stderr, samples, non_finite, rows[0]["draws"], rows[0]["data"])
        except (IndexError, KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(
                f"{path} is not the result of a validation, expected CSV with the columns {', '.join(_COLUMNS)}: "
                "remove it, or give a file that LevelLosses.save wrote"
            ) from error

    def plot(self, ax: Any = None) -> Any:
        """Draw loss ± 2 standard errors over log-SNR, and the reference's loss if there is one.

        Args:
            ax: matplotlib axes; None makes a figure.

        Returns:
            The axes; `axes.figure.savefig(path)` writes them.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        if ax is None:
            ax = import_extra("matplotlib.figure", "report").Figure(figsize=(6.4, 4.1), layout="constrained").subplots()
        order = self.log_snr.argsort()
        level, loss, stderr = (values[order] for values in (self.log_snr, self.loss, self.stderr))
        ax.errorbar(level, loss, 2 * stderr.nan_to_num(0.0), color="#0072B2", marker="o", markersize=4, label="loss")
        if self.reference is not None:
            ax.plot(level, self.reference.loss[order], color="#7b8794", linestyle="--", label="reference")
            ax.legend(frameon=False)
        if bool((loss > 0).all()):
            ax.set_yscale("log")
        ax.set_xlabel(LOG_SNR)
        ax.set_ylabel("loss ± 2 standard errors")
        ax.grid(alpha=0.3)
        return ax

    def log_to(self, writer: Any, step: int, prefix: str = "vadiff/validation") -> None:
        """Log the numbers to an experiment tracker: one per level, the mean log-ratio, the non-finite losses.

        Args:
            writer: as for `DiffusionLoss.log_to`.
            step: optimiser steps so far.
            prefix: of the names, `<prefix>/loss/log_snr_<level>`, `<prefix>/mean_log_ratio`, `<prefix>/non_finite`.

        Raises:
            TypeError: not a tracker, or a step that is not an integer.
        """
        log_values(writer, dict(self._scalars(prefix)), step)

    def _scalars(self, prefix: str) -> Iterator[tuple[str, float]]:
        for level, loss in zip(self.log_snr.tolist(), self.loss.tolist(), strict=True):
            yield f"{prefix}/loss/log_snr_{level:.4g}", loss
        if self.reference is not None:
            yield f"{prefix}/mean_log_ratio", self.mean_log_ratio()
        yield f"{prefix}/non_finite", float(self.non_finite.sum())

    def _other(self, reference: LevelLosses | None) -> LevelLosses:
        other = self.reference if reference is None else reference
        if other is None:
            raise ValueError(
                "reference is None, expected a result to compare with: give it, or reference= to LevelValidation"
            )
        if not isinstance(other, LevelLosses):
            raise TypeError(
                f"reference is a {type(other).__name__}, expected a LevelLosses; LevelLosses.load(path) reads a file"
            )
        self._check_paired(other)
        return other

    def _check_paired(self, other: LevelLosses) -> None:
        _check_drawn_alike(other, self.log_snr, self.draws)
        if other.data != self.data:
            raise ValueError(
                f"the reference was measured on {other.data or 'unknown samples'}, expected "
                f"{self.data or 'unknown samples'}: the same held-out set"
            )
        both = self.records is not None and other.records is not None
        same = torch.equal(self.records.sample, other.records.sample) if both else True  # type: ignore[union-attr]
        if not same or not torch.equal(other.samples, self.samples):
            raise ValueError(
                f"the reference has {int(other.samples.sum()):,} losses, expected {int(self.samples.sum()):,} of the "
                "same samples: the same held-out set"
            )


def check_reference(reference: LevelLosses, log_snr: Tensor, draws: str) -> None:
    """Check that results with these levels and draws can be compared with a reference.

    Raises:
        ValueError: other levels or draws, or a loss of the reference that is not positive and finite.
    """
    _check_drawn_alike(reference, log_snr, draws)
    bad = ~((reference.loss > 0) & reference.loss.isfinite())
    if bool(bad.any()):
        place = int(bad.nonzero()[0])
        raise ValueError(
            f"the loss at log-SNR {reference.log_snr[place]:.4g} is {reference.loss[place]:.4g}, expected positive, "
            "finite losses of a reference: the logarithm of a ratio to them is taken"
        )


def _check_drawn_alike(reference: LevelLosses, log_snr: Tensor, draws: str) -> None:
    if len(reference.log_snr) != len(log_snr) or not torch.allclose(
        reference.log_snr, log_snr, rtol=0.0, atol=_SAME_LEVEL
    ):
        raise ValueError(
            f"the reference has log-SNR {_text(reference.log_snr)}, expected {_text(log_snr)}: the same levels"
        )
    if reference.draws != draws:
        raise ValueError(f"the reference was drawn with {reference.draws}, expected {draws}: the same noise")


def _text(log_snr: Tensor) -> str:
    return ", ".join(f"{level:.4g}" for level in log_snr.tolist())

"""What a criterion's statistics say about a training: figures of its balance over noise levels, and a verdict in words.

The base loss g = u·ell is what the statistics hold, whatever the weighting is, so that a criterion with constant
weighting can be diagnosed as well as an adaptive one.

The verdict is about balance alone. It compares the mean base loss of the noise levels, highest ÷ lowest, with two
thresholds, `LEAVE_BELOW` and `TRY_FROM`. It knows nothing of where the noise levels are drawn, of the learning rate, or
of the quality of samples; docs/diagnosis.md says how often it was right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .bands import Bands, Criterion, band_of_bins, bands_of
from .ops.problem import TableRule
from .ops.reference import moments_of, weight_table
from .process import loss_ratio
from .watch import problem_of
from .weighting import LossLevel, VarianceAware, Weighting

LEAVE_BELOW = 5.0
TRY_FROM = 12.0
TOO_MUCH = 1000.0
"""Highest ÷ lowest mean base loss: below the first, weights by the loss have nothing to gain; from the second they are
worth a trial; from the third the objective itself is to be looked at, since weights beyond clip² = 100 are clipped. The
first two were fixed on the digits experiment, seeds 0 to 4 (benchmarks/experiments/diagnosis.py); the third was not
measured."""

FEWEST = 64.0
RELATIVE_ERROR = 0.2
"""A band of log-SNR counts if it has this many samples, and its mean a standard error below this share of it."""

_COVERED = 0.8  # least share of the samples in such bands
_STARVED = 0.1  # of an even share over the bands that have samples
_ASK_LATER = " The statistics still hold the first steps, which look balanced whatever comes: ask again later."
_TRIAL = "criterion.weighting = vadiff.weighting.LossLevel(strength=0.5)"


class LossCurve(Protocol):
    """The attribute of a `vadiff.optimal_loss.OptimalLoss` that is read here."""

    def log_loss_at(self, log_snr: Tensor) -> Tensor: ...


class Spread(NamedTuple):
    """How much the base loss differs between the bands whose mean is known."""

    known: Tensor  # [N] bool
    mean_ratio: float  # highest ÷ lowest mean; NaN if fewer than two bands are known or a mean is not positive
    std_ratio: float  # the same of the standard deviation
    weighted_ratio: float  # the same of weight × mean; NaN also if the weight is unknown
    highest: int  # band with the highest mean; -1 if none is known
    lowest: int

    @property
    def enough(self) -> bool:
        return bool(self.known.any())


class Verdict(NamedTuple):
    """The outcome of a diagnosis."""

    finding: str  # "leave", "try", "unclear", "objective", "levels", "skipped", "few", "one level" or "no ratio"
    text: str


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Figures of a criterion's base loss over noise levels, and a verdict.

    `str()` gives all of them as text. Bands are intervals of log-SNR, as in `DiffusionLoss.summary`.

    Attributes:
        weighting: the criterion's weighting, as text.
        bands: samples, mean, std and weight of each band.
        spread: which bands are known well enough, and highest ÷ lowest mean, std and weighted mean among them.
        variance_aware: lowest and highest weight that `weighting.VarianceAware()` would use; (1, 1) without samples.
        loss_level: the same of `weighting.LossLevel()`.
        starved: (low, high) log-SNR where bands between the first and the last with samples have less than a tenth of
            an even share each.
        below, above: share of the samples with log-SNR below and above the range of the bins.
        end_bins: share of the samples in the first and the last bin, which also hold those outside the range.
        skipped: samples with a NaN log-SNR or a non-finite loss or weight, since the statistics were last reset.
        gap: mean base loss minus the optimal loss J* of each band, [N] float64, NaN where a band is empty; None without
            a curve.
        finding: the verdict in one word: "leave", "try", "unclear", "objective" (the loss differs by more than weights
            should mend), "levels" (the log-SNR looks wrong), "skipped", "few" (too few samples), "one level" or
            "no ratio" (a mean loss is not positive).
        verdict: the verdict in words, with the line of code to change.
    """

    weighting: str
    bands: Bands
    spread: Spread
    variance_aware: tuple[float, float]
    loss_level: tuple[float, float]
    starved: tuple[tuple[float, float], ...]
    below: float
    above: float
    end_bins: float
    skipped: int
    gap: Tensor | None
    finding: str
    verdict: str

    def __str__(self) -> str:
        samples = self.bands.samples.sum().item()
        lines = [f"{self.weighting}: diagnosis from {samples:,.0f} samples after forgetting"]
        if samples > 0:
            continued = "\n" + " " * 36
            lines += [f"  {name:<34}{value.replace(chr(10), continued)}" for name, value in self._rows()]
        return "\n".join([*lines, f"verdict: {self.verdict}"])

    def _rows(self) -> list[tuple[str, str]]:
        spread, bands = self.spread, self.bands
        where = ""
        if math.isfinite(spread.mean_ratio):
            where = f"   highest at log-SNR {_span(bands, spread.highest)}, lowest at {_span(bands, spread.lowest)}"
        rows = [
            ("mean loss, highest ÷ lowest", _figure(spread.mean_ratio) + where),
            ("std, highest ÷ lowest", _figure(spread.std_ratio)),
            ("weight × mean, highest ÷ lowest", _figure(spread.weighted_ratio)),
            ("weights of variance_aware", _range(self.variance_aware)),
            ("weights of loss_level", _range(self.loss_level)),
            ("bands with a known mean", f"{int(spread.known.sum())} of {int((bands.samples > 0).sum())} with samples"),
            ("samples per band", _shares(bands)),
            ("starved levels, log-SNR", ", ".join(f"{low:.4g} to {high:.4g}" for low, high in self.starved) or "none"),
            ("outside the range of the bins", f"{self.below:.1%} below, {self.above:.1%} above"),
            ("in the first and the last bin", f"{self.end_bins:.1%}"),
            ("skipped samples", f"{self.skipped:,}"),
        ]
        if self.gap is not None:
            rows.append(("gap to the optimal loss", _gap_text(bands, self.gap)))
        return rows


def diagnose(
    criterion: Criterion,
    optimal: LossCurve | None = None,
    prediction_type: str | None = None,
    sigma_data: float = 0.5,
) -> Diagnosis:
    """Figures of a criterion's base loss over noise levels, and a verdict; see `Diagnosis`.

    Copies the statistics to the host, which synchronises with the GPU.

    Args:
        criterion: of any weighting, trained or not.
        optimal: the optimal loss J* of the training images, from `vadiff.optimal_loss`.
        prediction_type: form of the base loss, one of `vadiff.process.PREDICTION_TYPES`, with which J*, an x0 loss, is
            converted: "edm" for EDM's objective, λ(σ)·(D - x0)². Needed with `optimal`.
        sigma_data: standard deviation of the data, for "edm".

    Raises:
        ValueError: `optimal` without a prediction type, with an unknown one, or for another loss than "mse".

    Example:
        >>> vadiff.DiffusionLoss("constant").diagnose().finding
        'few'
    """
    statistics = criterion.statistics
    bands = bands_of(criterion)
    outside = statistics.outside.cpu()
    moments = moments_of(statistics.state.cpu(), statistics.bins)
    count, skipped = moments[0], int(statistics.skipped)
    spread = spread_of(bands)
    name, problem = type(criterion.weighting).__name__, problem_of(criterion)
    verdict = verdict_of(bands, name, balances(criterion.weighting), skipped, problem)
    total = max(count.sum().item(), 1e-300)
    later = verdict.finding in ("leave", "unclear") and _holds_first_steps(total, criterion)
    return Diagnosis(
        weighting=str(criterion.weighting),
        bands=bands,
        spread=spread,
        variance_aware=_weights(moments, criterion, VarianceAware().rule),
        loss_level=_weights(moments, criterion, LossLevel().rule),
        starved=starved_bands(bands),
        below=outside[0].item() / total,
        above=outside[1].item() / total,
        end_bins=(count[0] + count[-1]).item() / total,
        skipped=skipped,
        gap=None if optimal is None else _gap(criterion, bands, optimal, prediction_type, sigma_data),
        finding=verdict.finding,
        verdict=verdict.text + (_ASK_LATER if later else ""),
    )


def _holds_first_steps(samples: float, criterion: Criterion) -> bool:
    """Whether the statistics were not yet forgotten for two half-lives: a quarter or more of them is of the start."""
    statistics = criterion.statistics
    most = statistics.half_life * statistics.bins.size / math.log(2.0)  # the effective count of an endless training
    return samples < 0.75 * most


def spread_of(bands: Bands) -> Spread:
    """Highest ÷ lowest over the bands with enough samples, see `FEWEST` and `RELATIVE_ERROR`.

    Nearly empty bands are left out: the highest and the lowest of many noisy means would be noise.
    """
    error = bands.std / bands.samples.sqrt()
    known = (bands.samples >= FEWEST) & (error <= RELATIVE_ERROR * bands.mean.abs())
    if bands.samples[known].sum() < _COVERED * bands.samples.sum():
        known = torch.zeros_like(known)
    mean = bands.mean[known]
    place = known.nonzero().flatten()
    return Spread(
        known,
        mean_ratio=_ratio(mean),
        std_ratio=_ratio(bands.std[known]),
        weighted_ratio=_ratio((bands.weight * bands.mean)[known]),
        highest=int(place[mean.argmax()]) if len(place) else -1,
        lowest=int(place[mean.argmin()]) if len(place) else -1,
    )


def verdict_of(bands: Bands, weighting: str, balanced: bool, skipped: int = 0, problem: str | None = None) -> Verdict:
    """The verdict on the statistics of a criterion.

    Args:
        bands: of its statistics.
        weighting: its name at the start of a sentence.
        balanced: whether it is one that follows the loss, see `balances`.
        skipped: samples that were not recorded.
        problem: what is wrong with the noise levels, if anything.
    """
    spread, samples = spread_of(bands), bands.samples.sum().item()
    if skipped > samples:  # of the whole training, where `samples` is what was not forgotten
        return Verdict(
            "skipped",
            f"{skipped:,} samples were skipped, more than the statistics hold, for a NaN log-SNR or a non-finite loss "
            "or weight: find their cause first.",
        )
    if problem is not None:
        return Verdict("levels", f"your log-SNR looks wrong: {problem}")
    if not spread.enough:
        return Verdict(
            "few",
            f"too few samples for a verdict: the bands with at least {FEWEST:.0f} samples and a mean known to "
            f"{RELATIVE_ERROR:.0%} hold less than {_COVERED:.0%} of them. Train for some hundred steps and ask again.",
        )
    if int(spread.known.sum()) == 1:
        return Verdict(
            "one level",
            f"all noise levels with enough samples lie in log-SNR {_span(bands, spread.highest)}: there is nothing to "
            "balance. If you train on more levels than that, choose bins and log_snr_range to fit them.",
        )
    if not math.isfinite(spread.mean_ratio):
        return Verdict(
            "no ratio",
            "the mean loss of a noise level is not positive: levels cannot be compared by ratios, and loss_level has "
            "no weight for it.",
        )
    return _by_ratio(bands, spread, weighting, balanced)


def _by_ratio(bands: Bands, spread: Spread, weighting: str, balanced: bool) -> Verdict:
    """The verdict where highest ÷ lowest mean is known."""
    ratio = _figure(spread.mean_ratio)
    if spread.mean_ratio < LEAVE_BELOW:
        line = 'weighting="constant" should do as well' if balanced else "leave it"
        return Verdict(
            "leave",
            f"the mean loss differs only {ratio}-fold over noise levels so far: nothing to gain by balance, {line}.",
        )
    where = (
        f"the mean loss differs {ratio}-fold over noise levels, highest at log-SNR {_span(bands, spread.highest)}, "
        f"lowest at {_span(bands, spread.lowest)}"
    )
    if spread.mean_ratio >= TOO_MUCH:
        return Verdict(
            "objective",
            f"{where}. That is more than weights should mend: look at base_weight and the prediction type first. "
            f"{_trial(balanced, weighting, spread)}",
        )
    if spread.mean_ratio >= TRY_FROM:
        return Verdict("try", f"{where}. {_trial(balanced, weighting, spread)}")
    return Verdict("unclear", f"{where}: whether balance gains is open. {_trial(balanced, weighting, spread)}")


def _trial(balanced: bool, weighting: str, spread: Spread) -> str:
    if balanced:
        weighted = "" if math.isnan(spread.weighted_ratio) else f" brings that to {_figure(spread.weighted_ratio)}-fold"
        return f'{weighting}{weighted or " weights that"}; compare its held-out loss with that of weighting="constant".'
    return f"Try {_TRIAL} beside what you have, and compare their held-out losses."


def balances(weighting: Weighting) -> bool:
    """Whether a weighting follows the loss of each noise level."""
    return bool(weighting.rule.statistic and weighting.rule.strength > 0) or weighting.has_parameters


def starved_bands(bands: Bands) -> tuple[tuple[float, float], ...]:
    """(low, high) of each run of bands with far less than an even share, between the outermost bands with samples."""
    seen = (bands.samples > 0).nonzero().flatten().tolist()
    if not seen:
        return ()
    bound = _STARVED * bands.samples.sum().item() / len(seen)
    edges, samples = bands.edges.tolist(), bands.samples.tolist()
    found: list[tuple[float, float]] = []
    for i in range(seen[0], seen[-1] + 1):
        if samples[i] < bound:
            low = found.pop()[0] if found and found[-1][1] == edges[i] else edges[i]
            found.append((low, edges[i + 1]))
    return tuple(found)


def _weights(moments: Tensor, criterion: Criterion, rule: TableRule) -> tuple[float, float]:
    """Lowest and highest weight of an adaptive table from these moments, over the bins with samples."""
    table = weight_table(moments, criterion.statistics.bins, rule).exp()
    seen = table[moments[0] >= 1.0]
    return (seen.min().item(), seen.max().item()) if len(seen) else (1.0, 1.0)


def _gap(
    criterion: Criterion, bands: Bands, optimal: LossCurve, prediction_type: str | None, sigma_data: float
) -> Tensor:
    """Mean base loss minus J* of each band, J* averaged over the samples at the centres of their bins. [N] float64."""
    if criterion.loss != "mse":
        raise ValueError(f"loss is {criterion.loss!r}, expected 'mse': the optimal loss is a squared error")
    if prediction_type is None:
        raise ValueError(
            "prediction_type is None, expected the form of the loss, such as 'epsilon': the optimal loss is one of x0, "
            "and is converted to that form"
        )
    centers = criterion.bin_centers.cpu().double()
    best = loss_ratio(prediction_type, centers, sigma_data=sigma_data) * optimal.log_loss_at(centers).exp()  # [K]
    count = moments_of(criterion.statistics.state.cpu(), criterion.statistics.bins)[0]
    band = band_of_bins(len(centers), len(bands.samples))
    total = torch.zeros_like(bands.samples).index_add_(0, band, count * best)
    return bands.mean - total / bands.samples


def _ratio(values: Tensor) -> float:
    """Highest ÷ lowest of two or more positive values, else NaN."""
    if len(values) < 2 or not bool((values > 0).all()):
        return math.nan
    return (values.max() / values.min()).item()


def _figure(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "unknown"
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _range(weights: tuple[float, float]) -> str:
    return f"{weights[0]:.3g} to {weights[1]:.3g}"


def _span(bands: Bands, band: int) -> str:
    low, high = bands.edges[band : band + 2].tolist()
    return f"{low:.4g} to {high:.4g}"


def _shares(bands: Bands) -> str:
    """Four bands to a line."""
    seen = [f"{_span(bands, i)}: {bands.share[i]:.1%}" for i, n in enumerate(bands.samples.tolist()) if n > 0]
    return ",\n".join(", ".join(seen[i : i + 4]) for i in range(0, len(seen), 4))


def _gap_text(bands: Bands, gap: Tensor) -> str:
    loss = (bands.samples * bands.mean).nansum()
    reducible = (bands.samples * gap).nansum() / loss
    widest = int(gap.nan_to_num(nan=-math.inf).argmax())
    return f"{reducible:.1%} of the loss can be reduced on the training images; widest at {_span(bands, widest)}"

"""What a criterion's statistics say about a training: figures of its balance over noise levels, and a verdict in words.

The base loss g = u·ell is what the statistics hold, whatever the weighting is, so that a criterion with constant
weighting can be diagnosed as well as an adaptive one.

The verdict is about balance alone. It compares the mean loss of the noise levels, highest ÷ lowest, with two
thresholds, `LEAVE_BELOW` and `TRY_FROM`: the base loss where the weighting follows the loss, else the loss that is
trained on, weight × base loss. It knows nothing of where the noise levels are drawn, of the learning rate, or of the
quality of samples; docs/diagnosis.md says how often it was right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .bands import (
    COVERED,
    FEWEST,
    LEAST_SHARE,
    RELATIVE_ERROR,
    Bands,
    Criterion,
    Spread,
    band_of_bins,
    bands_of,
    known_bands,
    ratio,
    share_within,
    spread_of,
    starved_bands,
)
from .ops.problem import TableRule
from .ops.reference import moments_of, weight_table
from .process import loss_ratio
from .regression_target import removed_error, target_of
from .watch import problem_of
from .weighting import Constant, LossLevel, VarianceAware, Weighting

LEAVE_BELOW = 5.0
TRY_FROM = 12.0
TOO_MUCH = 1000.0
"""Highest ÷ lowest mean loss: below the first, weights by the loss have nothing to gain; from the second they are
worth a trial; from the third the objective itself is to be looked at, since weights beyond clip² = 100 are clipped. The
first two were fixed on the digits experiment, seeds 0 to 4 (benchmarks/experiments/diagnosis.py); the third was not
measured."""

_LOSS_COVERED = 0.8  # least share of the loss in bands that count, to find it balanced
_TRIAL = "criterion.weighting = vadiff.weighting.LossLevel(strength=0.5)"
_AGAINST_MEANS = (
    'Keep weighting="constant": a weighting that follows the loss would raise the levels from which the targets take '
    "most. For a verdict diagnose a training without such targets."
)


class LossCurve(Protocol):
    """The attribute of a `vadiff.optimal_loss.OptimalLoss` that is read here."""

    def log_loss_at(self, log_snr: Tensor) -> Tensor: ...


class Verdict(NamedTuple):
    """The outcome of a diagnosis."""

    finding: str  # in one word, see `Diagnosis`
    text: str


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Figures of a criterion's base loss over noise levels, and a verdict.

    `str()` gives all of them as text. Bands are intervals of log-SNR, as in `DiffusionLoss.summary`.

    Attributes:
        weighting: the criterion's weighting, as text.
        bands: samples, mean, std and weight of each band.
        spread: which bands count, and highest ÷ lowest mean, std and weight × mean among them.
        variance_aware: lowest and highest weight that `weighting.VarianceAware()` would use; (1, 1) without samples.
        loss_level: the same of `weighting.LossLevel()`.
        starved: (low, high) log-SNR of bands with samples, but less than a tenth of an even share each.
        below, above: share of the samples with log-SNR below and above the range of the bins.
        end_bins: share of the samples in the first and the last bin, which also hold those outside the range.
        skipped: samples with a NaN log-SNR or a non-finite loss or weight, since the statistics were last reset.
        gap: mean base loss minus the optimal loss J* of each band, [N] float64, NaN where a band is empty; None without
            a curve.
        finding: the verdict in one word: "leave", "try", "unclear", "objective" (the loss differs by more than weights
            should mend), "target" (posterior-mean targets make the loss differ), "levels" (the log-SNR looks wrong),
            "skipped", "few" (too few samples, or too few where the loss is), "one level" or "no ratio" (a mean loss is
            not positive).
        verdict: the verdict in words, with the line of code to change.
        target: what the losses are errors against, in words; None is the data.
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
    target: str | None = None

    def __str__(self) -> str:
        samples = self.bands.samples.sum().item()
        lines = [f"{self.weighting}: diagnosis from {samples:,.0f} samples after forgetting"]
        if samples > 0:
            continued = "\n" + " " * 36
            lines += [f"  {name:<34}{value.replace(chr(10), continued)}" for name, value in self._rows()]
        if self.target is not None:
            lines.append(f"target: {self.target}; the losses are errors against it")
        return "\n".join([*lines, f"verdict: {self.verdict}"])

    def _rows(self) -> list[tuple[str, str]]:
        spread, bands = self.spread, self.bands
        where = ""
        if math.isfinite(spread.mean_ratio):
            where = f"   {_where(bands, spread.known, bands.mean)}"
        rows = [
            ("mean loss, highest ÷ lowest", _figure(spread.mean_ratio) + where),
            ("std, highest ÷ lowest", _figure(spread.std_ratio)),
            ("weight × mean, highest ÷ lowest", _figure(spread.weighted_ratio)),
            ("weights of variance_aware", _range(self.variance_aware)),
            ("weights of loss_level", _range(self.loss_level)),
            ("bands that count", self._counted()),
            ("samples per band", _shares(bands)),
            ("starved levels, log-SNR", ", ".join(f"{low:.4g} to {high:.4g}" for low, high in self.starved) or "none"),
            ("outside the range of the bins", f"{self.below:.1%} below, {self.above:.1%} above"),
            ("in the first and the last bin", f"{self.end_bins:.1%}"),
            ("skipped samples", f"{self.skipped:,}"),
        ]
        if self.gap is not None:
            rows.append(("gap to the optimal loss", _gap_text(bands, self.gap)))
        return rows

    def _counted(self) -> str:
        bands, known = self.bands, self.spread.known
        samples, loss = share_within(bands, known), share_within(bands, known, bands.mean)
        number = f"{int(known.sum())} of {int((bands.samples > 0).sum())} with samples"
        return f"{number}; they hold {samples:.1%} of the samples, {loss:.1%} of the loss"


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
    removed = removed_error(criterion, criterion.bin_centers).cpu()[count >= FEWEST]
    verdict = verdict_of(
        bands, criterion.weighting, skipped, problem_of(criterion), against_means=bool((removed > 0).any())
    )
    total = max(count.sum().item(), 1e-300)
    target = target_of(criterion)
    so_far = _so_far(total, criterion) if verdict.finding in ("leave", "unclear") else ""
    return Diagnosis(
        weighting=str(criterion.weighting),
        bands=bands,
        spread=spread_of(bands),
        variance_aware=_weights(moments, criterion, VarianceAware().rule),
        loss_level=_weights(moments, criterion, LossLevel().rule),
        starved=starved_bands(bands),
        below=outside[0].item() / total,
        above=outside[1].item() / total,
        end_bins=(count[0] + count[-1]).item() / total,
        skipped=skipped,
        gap=None if optimal is None else _gap(criterion, bands, optimal, prediction_type, sigma_data),
        finding=verdict.finding,
        verdict=verdict.text + so_far,
        target=None if target is None else target.description,
    )


def _so_far(samples: float, criterion: Criterion) -> str:
    """What the verdict lacks while the statistics hold the start of the training, where the ratio still changes."""
    statistics = criterion.statistics
    if math.isinf(statistics.half_life):
        return (
            " The statistics forget nothing (half_life is infinite) and hold the start of the training too: "
            "criterion.statistics.reset() makes them those of the model from now on."
        )
    forgotten = statistics.half_life * statistics.bins.size  # samples after which one counts half
    if samples >= 0.75 * forgotten / math.log(2.0):  # two half-lives: a quarter is of the start
        return ""
    return (
        " The statistics still hold the first steps, and the ratio may still change: ask again after "
        f"{2 * forgotten:,.0f} samples."
    )


def verdict_of(
    bands: Bands, weighting: Weighting, skipped: int = 0, problem: str | None = None, *, against_means: bool = False
) -> Verdict:
    """The verdict on the statistics of a criterion.

    Args:
        bands: of its statistics.
        weighting: its weighting.
        skipped: samples that were not recorded.
        problem: what is wrong with the noise levels, if anything.
        against_means: whether posterior-mean targets have taken a part out of the loss at some levels. The loss may
            then be small there because of them, and its ratio over levels says nothing of balance unless it is small.
    """
    samples, known = bands.samples.sum().item(), known_bands(bands)
    if skipped > samples:  # of the whole training, where `samples` is what was not forgotten
        return Verdict(
            "skipped",
            f"{skipped:,} samples were skipped, more than the statistics hold, for a NaN log-SNR or a non-finite loss "
            "or weight: find their cause first.",
        )
    if problem is not None:
        return Verdict("levels", f"your log-SNR looks wrong: {problem}")
    loss, name = _judged(bands, known, weighting)
    if not share_within(bands, known) >= COVERED:  # NaN without samples
        return Verdict(
            "few",
            f"too few samples for a verdict: the bands with at least {FEWEST:.0f} samples, {LEAST_SHARE:.0%} of all "
            f"and a mean known to {RELATIVE_ERROR:.0%} hold less than {COVERED:.0%} of them. Train for some hundred "
            "steps and ask again.",
        )
    spread = ratio(bands, known, loss)
    if not spread >= TRY_FROM and share_within(bands, known, loss) < _LOSS_COVERED:  # the others could only add to it
        return Verdict("few", _loss_elsewhere(bands, known, loss))
    if int(known.sum()) == 1:
        return Verdict(
            "one level",
            f"all noise levels with enough samples lie in log-SNR {_span(bands, int(known.int().argmax()))}: there is "
            "nothing to balance. If you train on more levels than that, choose bins and log_snr_range to fit them.",
        )
    if not math.isfinite(spread):
        return Verdict(
            "no ratio",
            "the mean loss of a noise level is not positive: levels cannot be compared by ratios, and loss_level has "
            "no weight for it.",
        )
    where = f"{name} differs {_figure(spread)}-fold over noise levels, {_where(bands, known, loss)}"
    if against_means and spread >= LEAVE_BELOW:
        return Verdict(
            "target",
            f"{where}, but these are errors against posterior means, which take a part out of the loss that grows with "
            f"the noise: their ratio says nothing of balance. {_AGAINST_MEANS}",
        )
    return _by_ratio(spread, name, where, weighting, bands, known)


def _judged(bands: Bands, known: Tensor, weighting: Weighting) -> tuple[Tensor, str]:
    """The loss [N] whose ratio is judged, and its name at the start of a sentence."""
    if isinstance(weighting, Constant) or balances(weighting) or _unknown_weights(bands, known):
        return bands.mean, "the mean loss"
    return bands.weight * bands.mean, f"the mean loss times the weight of {type(weighting).__name__}"


def _unknown_weights(bands: Bands, known: Tensor) -> bool:
    return bool(bands.weight[known].isnan().any())


def _loss_elsewhere(bands: Bands, known: Tensor, loss: Tensor) -> str:
    rest = (bands.samples * loss).abs().nan_to_num().masked_fill(known, 0.0)
    most = int(rest.argmax())
    return (
        f"{1 - share_within(bands, known, loss):.0%} of the loss lies in bands of log-SNR with less than "
        f"{LEAST_SHARE:.0%} of the samples or a mean that is not known to {RELATIVE_ERROR:.0%}, most of it at "
        f"{_span(bands, most)} with {bands.share[most]:.1%} of the samples: no verdict. Train on and ask again; if it "
        "stays so, look at the samples there."
    )


def _by_ratio(spread: float, name: str, where: str, weighting: Weighting, bands: Bands, known: Tensor) -> Verdict:
    """The verdict where the ratio of what is judged is known."""
    follows, kind = balances(weighting), type(weighting).__name__
    compare = 'compare its held-out loss with that of weighting="constant".'
    if not follows and _unknown_weights(bands, known):
        return Verdict("unclear", f"{where}, before the weights of {kind}, which depend on the batch: {compare}")
    if spread < LEAVE_BELOW:
        line = 'weighting="constant" should do as well' if follows else "leave it"
        return Verdict(
            "leave",
            f"{name} differs only {_figure(spread)}-fold over noise levels so far: nothing to gain by balance, {line}.",
        )
    if follows:
        brought = ratio(bands, known, bands.weight * bands.mean)
        line = (
            f"{kind} {'weights that' if math.isnan(brought) else f'brings that to {_figure(brought)}-fold'}; {compare}"
        )
    else:
        line = f"Try {_TRIAL}: it replaces {kind} by weights of 1/√(mean loss). Compare the held-out losses."
    if spread >= TOO_MUCH:
        what = "base_weight" if isinstance(weighting, Constant) or follows else f"{kind}, base_weight"
        mend = f"That is more than weights should mend: look at {what} and the prediction type first."
        return Verdict("objective", f"{where}. {mend} {line}")
    if spread >= TRY_FROM:
        return Verdict("try", f"{where}. {line}")
    return Verdict("unclear", f"{where}: whether balancing helps is unclear. {line}")


def balances(weighting: Weighting) -> bool:
    """Whether a weighting follows the loss of each noise level."""
    return bool(weighting.rule.statistic and weighting.rule.strength > 0) or weighting.has_parameters


def _weights(moments: Tensor, criterion: Criterion, rule: TableRule) -> tuple[float, float]:
    """Lowest and highest weight of an adaptive table from these moments, over the bins with samples."""
    table = weight_table(moments, criterion.statistics.bins, rule).exp()
    seen = table[moments[0] >= 1.0]
    return (seen.min().item(), seen.max().item()) if len(seen) else (1.0, 1.0)


def _gap(
    criterion: Criterion, bands: Bands, optimal: LossCurve, prediction_type: str | None, sigma_data: float
) -> Tensor:
    """Mean base loss minus J* of each band, J* averaged over the samples at the centres of their bins. [N] float64.

    What a posterior-mean target takes out of the loss is taken from J* too.
    """
    if criterion.loss != "mse":
        raise ValueError(f"loss is {criterion.loss!r}, expected 'mse': the optimal loss is a squared error")
    if prediction_type is None:
        raise ValueError(
            "prediction_type is None, expected the form of the loss, such as 'epsilon': the optimal loss is one of x0, "
            "and is converted to that form"
        )
    centers = criterion.bin_centers.cpu().double()
    removed = removed_error(criterion, criterion.bin_centers).cpu()
    best = loss_ratio(prediction_type, centers, sigma_data=sigma_data) * (
        optimal.log_loss_at(centers).exp() - removed
    )  # [K]
    count = moments_of(criterion.statistics.state.cpu(), criterion.statistics.bins)[0]
    band = band_of_bins(len(centers), len(bands.samples))
    total = torch.zeros_like(bands.samples).index_add_(0, band, count * best)
    return bands.mean - total / bands.samples


def _figure(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "unknown"
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _range(weights: tuple[float, float]) -> str:
    return f"{weights[0]:.3g} to {weights[1]:.3g}"


def _where(bands: Bands, known: Tensor, values: Tensor) -> str:
    """The known bands with the highest and the lowest value."""
    highest = int(values.masked_fill(~known, -math.inf).argmax())
    lowest = int(values.masked_fill(~known, math.inf).argmin())
    return f"highest at log-SNR {_span(bands, highest)}, lowest at {_span(bands, lowest)}"


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

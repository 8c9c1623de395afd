"""criterion.diagnose(): figures of the balance over noise levels, and the verdict, on statistics that are known."""

from __future__ import annotations

import html
import math
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import vadiff
from vadiff import diagnosis
from vadiff.extras import MissingExtraError
from vadiff.optimal_loss import OptimalLoss
from vadiff.process import loss_ratio

FORMLESS = ("cauchy", "constant", "gaussian", "learned", "loss_level", "loss_zscore", "variance_aware")
LOW, HIGH = -6.0, 6.0  # log-SNR of the samples: six bands of 2, whose centres are 10 apart


def stream(ratio: float, samples: int = 6000) -> tuple[Tensor, Tensor]:
    """Losses and log-SNR [N], evenly spread: the bands' mean loss differs `ratio`-fold, std/mean is .3 in each."""
    log_snr = torch.linspace(LOW, HIGH - 1e-3, samples)
    band = ((log_snr - LOW) / 2).floor()  # 0 to 5
    mean = ratio ** (band / 5)
    return mean * (1 + 0.3 * torch.tensor([-1.0, 1.0]).repeat(samples // 2)), log_snr


def fed(ratio: float, weighting: Any = "constant", samples: int = 6000, **options: Any) -> vadiff.DiffusionLoss:
    """A criterion that has recorded such a stream, in batches over all levels; it forgets nothing unless told to."""
    criterion = vadiff.DiffusionLoss(weighting, **{"half_life": math.inf, **options})
    losses, log_snr = stream(ratio, samples)
    order = torch.randperm(samples)
    for part in order.split(1000):
        criterion.reweight(losses[part], log_snr[part])
    return criterion


@pytest.mark.parametrize("ratio", [1.0, 3.0, 50.0, 10_000.0])
def test_ratios_are_those_of_the_bands(ratio: float) -> None:
    spread = fed(ratio).diagnose().spread
    assert spread.mean_ratio == pytest.approx(ratio, rel=1e-3)
    assert spread.std_ratio == pytest.approx(ratio, rel=1e-3)
    assert spread.weighted_ratio == pytest.approx(ratio, rel=1e-3)  # of constant weighting
    assert int(spread.known.sum()) == 6


@pytest.mark.parametrize(
    ("ratio", "finding", "words"),
    [
        (1.0, "leave", "nothing to gain by balance, leave it"),
        (3.0, "leave", "differs only 3.0-fold"),
        (8.0, "unclear", "whether balancing helps is unclear"),
        (50.0, "try", "differs 50-fold over noise levels, highest at log-SNR 4 to 6, lowest at -6 to -4. Try"),
        (10_000.0, "objective", "look at base_weight and the prediction type first"),
    ],
)
def test_verdict_follows_the_ratio_of_the_means(ratio: float, finding: str, words: str) -> None:
    found = fed(ratio).diagnose()
    assert found.finding == finding
    assert words in found.verdict


def test_the_line_to_change_can_be_run() -> None:
    criterion = fed(50.0)
    verdict = criterion.diagnose().verdict
    line = verdict.partition("Try ")[2].partition(": it replaces Constant")[0]
    exec(line, {"criterion": criterion, "vadiff": vadiff})
    assert criterion.weighting == vadiff.weighting.LossLevel(strength=0.5)


@pytest.mark.parametrize("weighting", ["constant", "learned", "loss_level", "variance_aware"])
def test_weighting_that_follows_the_loss_gets_the_verdict_of_its_base_loss(weighting: str) -> None:
    balanced, uneven = (fed(ratio, weighting).diagnose() for ratio in (2.0, 50.0))
    assert (balanced.finding, uneven.finding) == ("leave", "try")
    assert "nothing to gain" in balanced.verdict
    assert uneven.verdict in str(uneven)


@pytest.mark.parametrize("weighting", vadiff.weighting.available())
def test_every_weighting_has_a_verdict(weighting: str) -> None:
    form = {} if weighting in FORMLESS else {"prediction_type": "epsilon"}
    found = fed(2.0, vadiff.weighting.from_name(weighting, **form)).diagnose()
    assert found.finding in ("leave", "try", "unclear", "objective")


class Steep(vadiff.weighting.FixedWeighting):
    """A weight of 50^(-(band - 5/2)/5) at the centre of each of the six bands."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-math.log(50.0) * log_snr / 10)


def test_fixed_weighting_is_judged_by_what_it_makes_of_the_loss() -> None:
    balanced, uneven = (fed(ratio, Steep()).diagnose() for ratio in (50.0, 1.0))
    assert balanced.spread.mean_ratio == pytest.approx(50.0, rel=1e-3)
    assert balanced.finding == "leave"
    assert "the mean loss times the weight of Steep differs only 1.0-fold" in balanced.verdict
    assert uneven.finding == "try"
    assert "times the weight of Steep differs 50-fold over noise levels, highest at log-SNR -6 to -4" in uneven.verdict
    assert "LossLevel(strength=0.5): it replaces Steep by weights of" in uneven.verdict


@pytest.mark.parametrize("weighting", ["gaussian", "loss_zscore"])
def test_weights_that_depend_on_the_batch_are_not_judged(weighting: str) -> None:
    for mean_ratio in (1.0, 50.0):
        found = fed(mean_ratio, weighting).diagnose()
        assert found.finding == "unclear"
        assert "which depend on the batch: compare its held-out loss" in found.verdict


def test_adaptive_weighting_is_told_to_be_compared_with_constant() -> None:
    uneven, even = (fed(ratio, "variance_aware").diagnose() for ratio in (50.0, 2.0))
    brought = f"VarianceAware brings that to {uneven.spread.weighted_ratio:.1f}-fold"
    assert f'{brought}; compare its held-out loss with that of weighting="constant"' in uneven.verdict
    assert 'weighting="constant" should do as well' in even.verdict
    assert uneven.spread.weighted_ratio < 1.5


def test_balanced_start_of_a_training_is_told_when_to_ask_again() -> None:
    young, old = fed(2.0, half_life=1e6), fed(2.0, half_life=16.0)
    assert (young.diagnose().finding, old.diagnose().finding) == ("leave", "leave")
    assert young.diagnose().verdict.endswith("ask again after 256,000,000 samples.")
    assert "ask again" not in old.diagnose().verdict


def test_statistics_that_forget_nothing_are_told_to_hold_the_start() -> None:
    assert "half_life is infinite" in fed(2.0).diagnose().verdict
    assert "half_life" not in fed(50.0).diagnose().verdict


def test_weighting_whose_form_is_not_known_yet_can_be_diagnosed() -> None:
    found = vadiff.DiffusionLoss("min_snr").diagnose()
    assert found.finding == "few"
    assert math.isnan(found.spread.weighted_ratio)


@pytest.mark.parametrize("weighting", ["loss_zscore", "gaussian"])
def test_ratio_of_weighted_losses_is_unknown_where_the_weight_is(weighting: str) -> None:
    assert math.isnan(fed(50.0, weighting).diagnose().spread.weighted_ratio)


def test_weights_are_those_of_the_adaptive_weightings_on_the_same_samples() -> None:
    found = fed(50.0).diagnose()
    for weighting, (low, high) in (("variance_aware", found.variance_aware), ("loss_level", found.loss_level)):
        criterion = fed(50.0, weighting)
        weights = criterion.weights[criterion.statistics.count > 0]
        assert (low, high) == pytest.approx((weights.min().item(), weights.max().item()), rel=1e-4)


@pytest.mark.parametrize("samples", [0, 100])
def test_few_samples_give_no_verdict(samples: int) -> None:
    criterion = fed(50.0, samples=samples) if samples else vadiff.DiffusionLoss("constant")
    found = criterion.diagnose()
    assert found.finding == "few"
    assert "too few samples for a verdict" in str(found)


def test_loss_that_lies_in_an_unknown_band_gives_no_verdict_and_is_named() -> None:
    """85 % of the samples have a loss of 1; 15 % at -5 hold nearly all of the loss, with a heavy tail."""
    generator = torch.Generator().manual_seed(0)
    criterion = vadiff.DiffusionLoss("constant")
    for _ in range(60):
        rare = torch.rand(64, generator=generator) < 0.15
        tail = 20 * torch.exp(2.5 * torch.randn(64, generator=generator))
        log_snr = torch.where(rare, -5.0, 4 * torch.rand(64, generator=generator))
        criterion.reweight(torch.where(rare, tail, 1.0), log_snr)
    found = criterion.diagnose()
    assert found.finding == "few"
    assert re.match(r"9\d% of the loss lies in bands .* most of it at -6 to -4 with 1\d\.\d% of the", found.verdict)


def test_loss_in_unknown_bands_does_not_hide_that_the_known_ones_differ() -> None:
    criterion = fed(50.0)
    losses = torch.zeros(100)
    losses[0] = 1e6
    criterion.reweight(losses, torch.full((100,), 9.0))
    assert criterion.diagnose().finding == "try"


@pytest.mark.parametrize("steps", [300, 3000])
def test_verdict_does_not_hang_on_a_band_with_few_of_the_samples(steps: int) -> None:
    """0.3 % of the samples have 30 times the loss of the others."""
    generator = torch.Generator().manual_seed(0)
    criterion = vadiff.DiffusionLoss("constant")
    rare = torch.rand(64 * steps, generator=generator) < 0.003
    log_snr = torch.where(rare, -5.0, 4 * torch.rand(64 * steps, generator=generator))
    for losses, levels in zip(torch.where(rare, 30.0, 1.0).split(640), log_snr.split(640), strict=True):
        criterion.reweight(losses, levels)
    assert criterion.diagnose().finding == "leave"


def test_noise_of_a_nearly_empty_band_makes_no_figure() -> None:
    criterion = fed(2.0)
    criterion.reweight(torch.tensor([1000.0, 0.001]), torch.tensor([9.0, -9.0]))
    assert criterion.diagnose().spread.mean_ratio == pytest.approx(2.0, rel=1e-3)


def test_a_mean_that_rests_on_rare_samples_is_not_known() -> None:
    criterion = fed(2.0)
    losses = torch.zeros(100)
    losses[0] = 1000.0  # std/mean is 10, the mean known to 100 %
    criterion.reweight(losses, torch.full((100,), 9.0))
    assert criterion.diagnose().spread.mean_ratio == pytest.approx(2.0, rel=1e-3)


def test_samples_of_one_level_are_nothing_to_balance() -> None:
    criterion = vadiff.DiffusionLoss("constant")
    criterion.reweight(torch.rand(1000) + 1, torch.full((1000,), 0.5))
    assert criterion.diagnose().finding == "one level"


def test_negative_mean_losses_have_no_ratio() -> None:
    criterion = fed(1.0)
    criterion.reweight(-1.0 - torch.rand(1000), torch.full((1000,), 7.0))
    assert criterion.diagnose().finding == "no ratio"


def test_more_skipped_samples_than_recorded_ones_come_first() -> None:
    criterion = fed(50.0)
    criterion.reweight(torch.full((6000,), math.nan), torch.zeros(6000))
    found = criterion.diagnose()
    assert found.finding == "try"  # as many as were recorded are told, and do not hide the rest
    assert re.search(r"skipped samples +6,000$", str(found), re.MULTILINE)
    criterion.reweight(torch.tensor([math.nan]), torch.zeros(1))
    found = criterion.diagnose()
    assert (found.finding, found.skipped) == ("skipped", 6001)
    assert found.verdict.startswith("6,001 samples were skipped")


def test_wrong_noise_levels_are_the_verdict_whatever_the_ratio_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "problem_of", lambda criterion: "all of it is timesteps. Convert them.")
    found = fed(50.0).diagnose()
    assert found.finding == "levels"
    assert found.verdict == "your log-SNR looks wrong: all of it is timesteps. Convert them."


def test_timesteps_in_place_of_log_snr_are_told() -> None:
    criterion = vadiff.DiffusionLoss("constant")
    timesteps = torch.randint(0, 1000, (1000,)).float()
    criterion.reweight(torch.rand(1000) + 1, timesteps)
    found = criterion.diagnose()
    assert found.finding == "levels"
    assert "looks like timesteps" in found.verdict
    assert found.above > 0.9


def test_starved_levels_are_those_with_few_samples() -> None:
    criterion = fed(2.0)
    criterion.reweight(torch.ones(3), torch.tensor([-13.0, 7.0, 9.0]))
    found = criterion.diagnose()
    assert found.starved == ((-14.0, -12.0), (6.0, 10.0))  # from -12 to -6 nobody trains
    assert "-14 to -12, 6 to 10" in str(found)
    assert fed(2.0).diagnose().starved == ()


def test_end_bins_are_counted_with_what_lies_outside_the_range() -> None:
    found = fed(2.0, log_snr_range=(-4.0, 4.0)).diagnose()
    assert found.below == pytest.approx(1 / 6, abs=1e-3)
    assert found.above == pytest.approx(1 / 6, abs=1e-3)
    assert found.end_bins == pytest.approx(1 / 3, abs=0.02)
    assert "16.7% below, 16.7% above" in str(found)


def test_gap_is_the_mean_loss_above_the_optimal_loss_in_the_form_of_the_loss() -> None:
    sigma = torch.logspace(-2, 2, 30, dtype=torch.float64)
    variance = 1.0 / (1.0 + sigma.square().reciprocal())  # of unit Gaussian data, J*/D = σ²/(1 + σ²)
    curve = OptimalLoss(sigma, 10 * variance, torch.zeros(30), torch.ones(30), 10, 10.0, 100)
    criterion = vadiff.DiffusionLoss("constant", half_life=math.inf)
    log_snr = torch.linspace(LOW, HIGH - 1e-3, 6000)
    best = loss_ratio("epsilon", log_snr.double()) / (1 + log_snr.double().exp())
    criterion.reweight((2.0 * best).float(), log_snr)
    found = criterion.diagnose(curve, "epsilon")
    assert found.gap is not None
    seen = found.bands.samples > 0
    torch.testing.assert_close(found.gap[seen], found.bands.mean[seen] / 2, rtol=0.02, atol=0)
    assert "gap to the optimal loss           50" in str(found)
    assert found.gap[~seen].isnan().all()


def test_gap_needs_the_form_of_a_squared_error() -> None:
    curve = OptimalLoss(torch.tensor([0.1, 1.0]), torch.ones(2), torch.zeros(2), torch.ones(2), 1, 1.0, 1)
    with pytest.raises(ValueError, match=r"prediction_type is None, expected the form of the loss"):
        fed(2.0).diagnose(curve)
    with pytest.raises(ValueError, match=r"loss is 'huber', expected 'mse'"):
        fed(2.0, loss="huber").diagnose(curve, "epsilon")


def test_looking_changes_nothing() -> None:
    criterion = fed(50.0)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    criterion.diagnose()
    criterion._repr_html_()
    assert all(torch.equal(before[name], value) for name, value in criterion.state_dict().items())


def test_summary_ends_with_the_verdict() -> None:
    criterion = fed(50.0)
    assert criterion.summary(bands=3).splitlines()[-1] == f"verdict: {criterion.diagnose().verdict}"


class _Hostile(vadiff.weighting.VarianceAware):
    def __repr__(self) -> str:
        return "<script>alert(1)</script>"


def test_notebook_gets_the_summary_and_a_picture_with_names_as_text() -> None:
    pytest.importorskip("matplotlib")
    criterion = fed(50.0, _Hostile())
    page = criterion._repr_html_()
    assert "<script>" not in page
    assert html.escape(criterion.summary()) in page
    assert 'src="data:image/png;base64,iVBOR' in page


def test_notebook_without_matplotlib_gets_the_table_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    criterion = fed(50.0)
    with pytest.raises(MissingExtraError):
        vadiff.summary._figure(criterion)
    page = criterion._repr_html_()
    assert "verdict: " in page
    assert "<img" not in page

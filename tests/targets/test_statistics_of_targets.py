"""Statistics of a criterion whose calls regress on posterior means: x0 errors and gaps are those against the data."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from graph_stand_in import Watch
from torch import Tensor

import vadiff
from vadiff import levels
from vadiff.information import Profile
from vadiff.log_snr import from_sigma
from vadiff.optimal_loss import estimate
from vadiff.process import loss_ratio
from vadiff.targets import PosteriorMean, Recorded

SPREAD = 0.5
ELEMENTS = 4
DATA = SPREAD * torch.randn(4096, ELEMENTS, generator=torch.Generator().manual_seed(0))


def trained(target: bool, calls: int = 150, shrink: float = 1.1) -> vadiff.DiffusionLoss:
    """Statistics of a denoiser that shrinks to the data's mean, but by a factor too little, on Gaussian data."""
    criterion = vadiff.DiffusionLoss("constant", bins=32, log_snr_range=(-8.0, 8.0))
    targets = PosteriorMean(DATA, threshold=0.0) if target else None
    criterion.target = targets
    generator = torch.Generator().manual_seed(1)
    for _ in range(calls):
        rows = torch.randperm(len(DATA), generator=generator)[:64]
        sigma = torch.exp(1.5 * torch.randn(64, generator=generator) - 0.5).clamp(0.03, 40)
        x0, eps = DATA[rows], torch.randn(64, ELEMENTS, generator=generator)
        noisy = x0 + sigma[:, None] * eps
        best = SPREAD**2 / (SPREAD**2 + sigma.square())
        denoised = (shrink * best[:, None] * noisy).requires_grad_()
        aim = x0 if targets is None else targets(x0, noisy, 1.0, sigma, index=rows)
        criterion(denoised, aim, from_sigma(sigma))
    return criterion


@pytest.fixture(scope="module")
def both() -> tuple[vadiff.DiffusionLoss, vadiff.DiffusionLoss]:
    return trained(False), trained(True)


def test_the_losses_differ_by_what_the_targets_take_out(both):
    plain, posterior = both
    level = from_sigma(torch.tensor([2.0]))
    place = int((level + 8.0) / 0.5)
    assert posterior.statistics.mean[place] < 0.3 * plain.statistics.mean[place]
    expected = SPREAD**2 * 4.0 / (SPREAD**2 + 4.0)
    assert float(posterior.target.removed_error(level)) == pytest.approx(expected, rel=0.05)


def test_profiles_are_those_of_the_error_against_the_data(both):
    plain, posterior = (Profile.of_criterion(criterion, "sample") for criterion in both)
    sigma = torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0])
    expected = plain.error_at(from_sigma(sigma))
    torch.testing.assert_close(posterior.error_at(from_sigma(sigma)), expected, rtol=0.08, atol=0)


def recorded(error: Callable[[Tensor], Tensor], share: float) -> Recorded:
    """Targets that have taken this share of an x0 error out of it at each log-SNR."""
    target, log_snr = Recorded("posterior mean"), torch.linspace(-12, 12, 40_000)
    target.removed.record(log_snr, share * error(log_snr), torch.ones(len(log_snr), dtype=torch.bool))
    return target


@pytest.mark.parametrize("form", ["epsilon", "sample", "v_prediction", "flow", "edm"])
def test_the_error_is_added_in_the_form_of_the_loss(form):
    """Gaussian data in closed form: the best network's loss is what the targets have not taken out."""

    def best(log_snr: Tensor) -> Tensor:
        return 1.0 / (SPREAD**-2 + log_snr.exp())

    def base_weight(log_snr: Tensor) -> Tensor:
        return (0.3 * log_snr).exp()

    found = []
    for share in (0.0, 0.9):
        criterion = vadiff.DiffusionLoss("constant", bins=80, log_snr_range=(-10.0, 10.0))
        criterion.target = recorded(best, share)
        log_snr = criterion.bin_centers.repeat(16)
        loss = (1.0 - share) * best(log_snr) * loss_ratio(form, log_snr) * base_weight(log_snr)
        criterion.reweight(loss, log_snr)
        found.append(Profile.of_criterion(criterion, form, base_weight=base_weight).x0_error)
    torch.testing.assert_close(found[1], found[0], rtol=0.04, atol=0)  # what is removed is smoothed over levels


def test_information_levels_go_where_they_would_with_plain_targets(both):
    found = []
    for criterion in both:
        sampler = levels.Information(
            levels.LogNormal(0.0, 1.5), bins=32, log_snr_range=(-8.0, 8.0), prediction_type="sample", gate=False
        )
        for _ in range(3):
            sampler.update(criterion, None)
        u = (torch.arange(2048, dtype=torch.float64) + 0.5) / 2048
        found.append(sampler(u).sigma.log())
    plain, posterior = found
    assert sampler.moved > 0.05
    assert float((plain - posterior).abs().mean()) < 0.05


def test_the_gap_is_that_against_the_data(both):
    optimal = estimate(DATA[:1500], torch.logspace(-1.5, 1.5, 12).tolist(), draws=512)
    plain, posterior = (criterion.diagnose(optimal, "sample").gap.nan_to_num() for criterion in both)
    known = both[0].diagnose().bands.share > 0.03
    torch.testing.assert_close(posterior[known], plain[known], rtol=0, atol=0.012)


@pytest.mark.parametrize("weighting", ["constant", "loss_level"])
def test_a_loss_that_the_targets_made_small_is_no_lack_of_balance(both, weighting):
    plain, posterior = both
    finding = plain.diagnose().finding
    posterior = copy.deepcopy(posterior)
    posterior.weighting = weighting
    found = posterior.diagnose()
    assert found.finding == "target"
    assert found.finding != finding
    assert "errors against posterior means" in found.verdict
    assert "LossLevel(" not in found.verdict


def test_targets_that_take_nothing_out_leave_the_verdict_as_it_is():
    """At noise that hides nothing of the data, draws keep their own target."""
    criterion = vadiff.DiffusionLoss("constant", half_life=math.inf)
    criterion.target = PosteriorMean(DATA)
    generator = torch.Generator().manual_seed(0)
    for x0 in DATA[:3000].split(500):
        log_snr = 7 * torch.rand(len(x0), generator=generator) + 9
        sigma = (-0.5 * log_snr).exp()
        criterion.target(x0, x0 + sigma[:, None], 1.0, sigma)
        criterion.reweight((-log_snr).exp(), log_snr)
    assert float(criterion.target.removed_error(torch.tensor([12.0]))) == 0.0
    assert criterion.diagnose().finding in ("try", "objective")


def test_gap_levels_get_the_gap_against_the_data(both):
    """With the posterior mean as network the loss is nothing, and the gap not negative as J* would make it."""
    optimal = estimate(DATA[:1500], torch.logspace(-1.5, 1.5, 12).tolist(), draws=512)
    criterion = copy.deepcopy(both[1])
    sigma = torch.full((512,), 2.0)
    rows = torch.arange(512)
    x0 = DATA[rows]
    noisy = x0 + 2.0 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    aim = criterion.target(x0, noisy, 1.0, sigma, index=rows)
    denoised = (aim + 0.3).requires_grad_()
    criterion(denoised, aim, from_sigma(sigma))
    sampler = levels.GapLevels(optimal, bins=32, log_snr_range=(-8.0, 8.0))
    sampler.update(criterion, from_sigma(sigma))
    place = int((from_sigma(torch.tensor([2.0])) + 8.0) / 0.5)
    assert float(sampler._recorder.statistics.mean[place]) == pytest.approx(0.09, abs=0.02)


def levels_that_read_errors() -> list[levels.AdaptiveLevels]:
    options = {"bins": 32, "log_snr_range": (-8.0, 8.0)}
    optimal = estimate(DATA[:200], torch.logspace(-1.5, 1.5, 6).tolist(), draws=64)
    return [levels.Information(levels.LogNormal(0.0, 1.5), **options), levels.GapLevels(optimal, **options)]


def test_levels_wait_for_the_device_no_more_than_with_plain_targets(both):
    """On a CPU some arguments are checked; on a GPU such checks are left out."""
    log_snr = from_sigma(torch.full((64,), 2.0))  # as many as the last call had
    waits: list[list[str]] = []
    for criterion in both:
        waits.append([])
        for sampler in levels_that_read_errors():
            with Watch(waits[-1].append):
                sampler.update(criterion, log_snr)
    assert waits[0] == waits[1]


def test_levels_are_updated_in_one_compiled_piece(both):
    criterion = copy.deepcopy(both[1])
    sampler = levels_that_read_errors()[0]
    expected = copy.deepcopy(sampler)
    expected.update(copy.deepcopy(criterion))

    def step() -> Tensor:
        sampler.update(criterion)
        return sampler.ratio.view(torch.float64)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), expected.ratio.view(torch.float64))


def test_summary_and_logs_say_the_target(both, tmp_path):
    plain, posterior = both
    words = "posterior mean over 4,096 references"
    assert words not in plain.summary()
    assert words in posterior.summary()
    assert "PosteriorMean" in repr(posterior)
    seen: dict[str, float] = {}
    posterior.log_to(lambda values, step: seen.update(values), 1)
    removed = [value for name, value in seen.items() if name.startswith("vadiff/removed_x0_error/log_snr_")]
    assert len(removed) > 3
    assert max(removed) == pytest.approx(SPREAD**2, rel=0.1)
    file = vadiff.MetricsFile(tmp_path / "log.jsonl")
    posterior.log_to(file, 1)
    assert words in (tmp_path / "log.jsonl").read_text()


def test_huber_is_refused_with_the_reason():
    targets = PosteriorMean(DATA)
    with pytest.raises(
        ValueError, match="loss is 'huber' with a posterior-mean target, expected 'mse': only the squared"
    ):
        vadiff.DiffusionLoss("constant", loss="huber").target = targets
    criterion = vadiff.DiffusionLoss("constant")
    criterion.target = targets
    with pytest.raises(ValueError, match="loss is 'huber' with a posterior-mean target"):
        criterion.loss = "huber"
    assert criterion.loss == "mse"
    criterion.target = None
    criterion.loss = "huber"
    with pytest.raises(TypeError, match=r"target is a Tensor, expected a vadiff\.targets\.PosteriorMean"):
        criterion.target = DATA  # type: ignore[assignment]


def test_statistics_are_not_read_as_errors_against_another_target(both):
    plain, posterior = (copy.deepcopy(criterion) for criterion in both)
    with pytest.raises(ValueError, match=r"target is a PosteriorMean, but the statistics hold errors against the data"):
        plain.target = PosteriorMean(DATA)
    words = "target is a NoneType, but the statistics hold errors against the posterior mean over 4,096 references"
    with pytest.raises(ValueError, match=words):
        posterior.target = None
    assert plain.target is None
    posterior.target = posterior.target  # no change
    for criterion, target in ((plain, PosteriorMean(DATA)), (posterior, None)):
        criterion.statistics.reset()
        criterion.target = target


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_another_target_is_refused(both, strict):
    plain, posterior = both
    fresh = vadiff.DiffusionLoss("constant", bins=32, log_snr_range=(-8.0, 8.0))
    with pytest.raises(RuntimeError, match=r"errors against posterior means, but the criterion has no target: assign"):
        fresh.load_state_dict(posterior.state_dict(), strict=strict)
    fresh = vadiff.DiffusionLoss("constant", bins=32, log_snr_range=(-8.0, 8.0))
    fresh.target = PosteriorMean(DATA)
    wrapped = torch.nn.ModuleDict({"criterion": fresh})
    state = torch.nn.ModuleDict({"criterion": plain}).state_dict()
    with pytest.raises(RuntimeError, match="errors against the data, but the criterion's target is the posterior mean"):
        wrapped.load_state_dict(state, strict=strict)
    wrapped.load_state_dict(torch.nn.ModuleDict({"criterion": posterior}).state_dict(), strict=strict)


def test_a_target_that_is_no_module_is_refused():
    """Its state would not travel with the criterion's."""

    class Loose:
        description = "loose"

        def removed_error(self, log_snr: Tensor) -> Tensor:
            return log_snr.double()

    with pytest.raises(TypeError, match="target is a Loose, expected"):
        vadiff.DiffusionLoss("constant").target = Loose()


def test_the_state_travels_with_the_criterion(both):
    posterior = both[1]
    level = from_sigma(torch.tensor([2.0]))
    expected = posterior.target.removed_error(level)
    other = vadiff.DiffusionLoss("constant", bins=32, log_snr_range=(-8.0, 8.0))
    other.target = PosteriorMean(DATA)
    other.load_state_dict(posterior.state_dict())
    for criterion in (other, copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        assert torch.equal(criterion.target.removed_error(level), expected)


@pytest.mark.parametrize("reference", [{"reference": DATA}, {"bank": 256}])
def test_a_stand_in_reads_the_state_without_the_references(reference):
    criterion = vadiff.DiffusionLoss("constant")
    criterion.target = PosteriorMean(**reference)
    for x0 in DATA[:320].split(64):
        for sigma in (0.01, 2.0):
            criterion.target(x0, x0 + sigma, 1.0, sigma)
    other = vadiff.DiffusionLoss("constant")
    other.target = Recorded(criterion.target.description)
    other.load_state_dict(criterion.state_dict())
    at = from_sigma(torch.tensor([0.01, 2.0]))
    expected: Tensor = criterion.target.removed_error(at)
    assert torch.equal(other.target.removed_error(at), expected)
    assert math.isclose(float(expected[0]), 0.0)
    assert expected[1] > 0.01
    assert criterion.target.description in other.summary()

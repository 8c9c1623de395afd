"""The level-free loss: its formula on every backend, and that it estimates the loss without bias whatever is drawn."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import ranks
import torch

import vadiff
from vadiff import levels

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BINS, LOW, HIGH = 16, -8.0, 8.0


@dataclass
class Specification:
    """The definition in plain loops: one call after the other, no call into vadiff."""

    half_life: float
    n: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    mean: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    mass: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    shares: np.ndarray | None = None
    level_weight: np.ndarray = field(default_factory=lambda: np.ones(BINS))
    since_shares: int = 0
    scale: tuple[float, float] = (0.0, 0.0)  # decayed sums whose ratio is c
    recent: tuple[float, float] = (0.0, 0.0)  # decayed sums whose ratio is the last calls' mean loss
    masses: tuple[float, float] = (0.0, 0.0)  # decayed sums of v, and of the sampler's v
    outside: np.ndarray = field(default_factory=lambda: np.zeros(2))

    def call(self, log_snr: np.ndarray, u: np.ndarray, v: np.ndarray, ell: np.ndarray) -> float:
        log_snr, u, v, ell = (x.astype(np.float64) for x in (log_snr, u, v, ell))
        samples = range(len(ell))
        masked = [u[i] == 0 or v[i] == 0 for i in samples]
        finite = [all(map(math.isfinite, (ell[i], u[i], v[i]))) and not math.isnan(log_snr[i]) for i in samples]
        entered = [i for i in samples if finite[i] and not masked[i]]
        total = sum(v[i] * u[i] * ell[i] for i in samples if not masked[i])
        inside = np.clip(log_snr, LOW, HIGH - 1e-6)  # end bins take what lies outside
        place = {i: math.floor((inside[i] - LOW) / (HIGH - LOW) * BINS) for i in entered}
        known, count = self.mass.sum() > 0, self.n.sum()
        average = (self.mass * self.mean).sum() / self.mass.sum() if known else 0.0
        mean = np.where(self.n > 0, self.mean, average)
        drawn = sum(v[i] * mean[place[i]] for i in entered)
        level_free = total
        if count > min(32, self.half_life) * BINS and self.half_life >= 8:
            expected = (self.mass * mean).sum() / count
            if self.shares is not None and self.since_shares < self.half_life * BINS:
                factor = self.masses[0] / self.masses[1] if self.masses[1] else 1.0
                expected = factor * (self.shares * self.level_weight * mean).sum()
            scale = min(max(self.scale[0] / self.scale[1], 0.0), 2.0) if self.scale[1] else 1.0
            if self.recent[1] * scale * abs(expected) <= 3 * self.recent[0]:
                level_free += scale * (len(entered) * expected - drawn)
        skipped = len(entered) + sum(masked) < len(ell)
        if count > 0 and not skipped and abs(total) <= 10 * abs(drawn):
            self.scale = (0.9 * self.scale[0] + total * drawn, 0.9 * self.scale[1] + drawn**2)
            self.recent = (0.9 * self.recent[0] + abs(total), 0.9 * self.recent[1] + len(entered))
        if self.shares is not None:
            sampled = sum(self.level_weight[place[i]] for i in entered)
            self.masses = (0.9 * self.masses[0] + sum(v[i] for i in entered), 0.9 * self.masses[1] + sampled)
            self.since_shares += len(entered)
        rho = 2.0 ** (-len(entered) / (self.half_life * BINS))
        self.n, self.mass = self.n * rho, self.mass * rho
        self.outside = self.outside * rho
        for i in entered:
            k = place[i]
            self.n[k] += 1
            self.mass[k] += v[i]
            self.mean[k] += (u[i] * ell[i] - self.mean[k]) / self.n[k]
            self.outside += (log_snr[i] < LOW, log_snr[i] >= HIGH)
        return level_free / len(ell)


def calls(seed: int, number: int, samples: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches with weights, masks, levels outside the range; some samples without a log-SNR."""
    rng = np.random.default_rng(seed)
    for call in range(number):
        log_snr = rng.normal(0.0, 4.0, samples)
        u, v = rng.uniform(0.5, 2.0, (2, samples))
        u[rng.random(samples) < 0.1] = 0.0
        v[rng.random(samples) < 0.1] = 0.0
        log_snr[0] = (math.inf, -math.inf, math.nan, 0.0)[call % 4]
        values = {
            "log_snr": log_snr,
            "u": u,
            "v": v,
            "difference": np.exp(-0.1 * log_snr + rng.normal(0, 0.5, samples)),
        }
        values["difference"][~np.isfinite(log_snr)] = 1.0
        yield {name: value.astype(np.float32) for name, value in values.items()}


def run_call(criterion: torch.nn.Module, device: torch.device, log_snr, u, v, difference) -> None:
    prediction, log_snr, u, v = (torch.as_tensor(x, device=device) for x in (difference, log_snr, u, v))
    prediction = prediction[:, None].expand(-1, 2).contiguous()
    criterion(prediction, torch.zeros_like(prediction), log_snr, base_weight=u, sample_weight=v)


@pytest.mark.parametrize("half_life", [math.inf, 8.0, 4.0])
@pytest.mark.parametrize("given_shares", [False, True])
def test_every_call_follows_the_definition(make_criterion, device, interpreted, half_life, given_shares):
    """With a half-life of 8 the shares are followed for one call, with 4 the plain mean is taken."""
    criterion, expected = make_criterion(half_life=half_life), Specification(half_life)
    if given_shares:
        expected.shares = np.linspace(0.0, 2.0, BINS) / BINS
        expected.level_weight = np.linspace(0.5, 1.5, BINS)
        given = (torch.as_tensor(x, device=device) for x in (expected.shares, expected.level_weight))
        criterion.statistics.use_level_shares(*given)
    corrected = 0
    number = 24  # without forgetting, the first six are plain means
    if interpreted:
        number = 8 if half_life == math.inf else 4
    for call in calls(0, number, samples=128):
        run_call(criterion, device, **call)
        ell = call["difference"].astype(np.float64) ** 2
        level_free = expected.call(call["log_snr"], call["u"], call["v"], ell)
        assert float(criterion.level_free_loss) == pytest.approx(level_free, rel=2e-6)
        raw = np.where(call["u"] * call["v"] > 0, call["u"] * call["v"] * ell, 0.0).mean()
        corrected += abs(level_free / raw - 1) > 1e-3
    assert corrected or half_life < 8
    np.testing.assert_allclose(criterion.statistics.outside.cpu(), expected.outside, rtol=1e-6)


def test_large_batches_and_reweight_follow_it_too(make_criterion, device, interpreted, monkeypatch):
    """Above 2,048 samples the batch is taken in tiles, which several blocks or programs share."""
    if interpreted:
        monkeypatch.setattr("vadiff.triton_kernels.TILE", 128)
    criterion, expected = make_criterion(), Specification(256.0)
    for call in calls(1, 4, samples=300 if interpreted else 5000):
        ell = call["difference"] ** 2
        loss, log_snr, v = (torch.as_tensor(x, device=device) for x in (ell, call["log_snr"], call["v"]))
        criterion.reweight(loss, log_snr, v)
        level_free = expected.call(call["log_snr"], np.ones_like(ell), call["v"], ell)
        assert float(criterion.level_free_loss) == pytest.approx(level_free, rel=2e-6)


def test_a_non_finite_loss_shows_until_it_is_read_and_spoils_nothing_after(make_criterion, device):
    criterion, twin = make_criterion(), make_criterion()
    for call in calls(2, 5, samples=128):
        run_call(criterion, device, **call)
        run_call(twin, device, **call)
    call = next(calls(3, 1, samples=8))
    run_call(criterion, device, **{**call, "difference": np.full(8, np.inf, np.float32)})
    assert not criterion.level_free_loss.isfinite()
    twin.level_free_loss  # noqa: B018  reading starts a new mean
    run_call(criterion, device, **call)
    run_call(twin, device, **call)
    torch.testing.assert_close(criterion.level_free_loss, twin.level_free_loss, rtol=0, atol=0)


def test_reading_gives_the_mean_by_samples_since_the_last_read_and_repeats_it(make_criterion, device):
    criterion, each = make_criterion("constant"), make_criterion("constant")
    assert criterion.level_free_loss.isnan()
    total = samples = 0.0
    for number, size in enumerate((128, 256, 64, 32)):
        call = next(calls(number, 1, samples=size))
        run_call(criterion, device, **call)
        run_call(each, device, **call)
        total, samples = total + size * float(each.level_free_loss), samples + size
    read = criterion.level_free_loss
    assert read.shape == ()
    assert read.dtype == torch.float32
    assert not read.requires_grad
    assert float(read) == pytest.approx(total / samples, rel=1e-6)
    assert float(criterion.level_free_loss) == float(read)
    criterion.eval()
    run_call(criterion, device, **call)
    assert float(criterion.level_free_loss) == float(read)
    criterion.statistics.reset()
    assert criterion.level_free_loss.isnan()


def test_copies_and_state_dict_carry_it(make_criterion, device):
    criterion, fresh = make_criterion(), make_criterion()
    *before, after = calls(4, 6, samples=128)
    for call in before:
        run_call(criterion, device, **call)
    copied = copy.deepcopy(criterion)
    fresh.load_state_dict(criterion.state_dict())
    for each in (criterion, copied, fresh):
        run_call(each, device, **after)
    assert float(criterion.level_free_loss) == float(copied.level_free_loss) == float(fresh.level_free_loss)


# Unbiased: against the true loss of streams with known means


def mean_loss(log_snr: torch.Tensor) -> torch.Tensor:
    """Losses that differ 50-fold over the levels drawn below."""
    return torch.exp(-0.5 * log_snr.clamp(-4, 4))


class Stream:
    """Levels from p, losses m(λ)·f(t)·noise of mean 1, and what they cost."""

    def __init__(self, seed: int, weighting: str = "constant", **options: object) -> None:
        self.criterion = vadiff.DiffusionLoss(weighting, bins=32, log_snr_range=(-8.0, 8.0), **options)
        self.generator = torch.Generator().manual_seed(seed)
        self.ratios: list[float] = []
        self.raw: list[float] = []

    def uniform(self, samples: int) -> torch.Tensor:
        return torch.rand(samples, generator=self.generator, dtype=torch.float64)

    def call(self, log_snr: torch.Tensor, truth: float, factor: float = 1.0, v: torch.Tensor | None = None) -> None:
        """One call on losses of mean factor·m(λ). truth: their expectation over the levels, times v."""
        noise = (0.5 + self.uniform(len(log_snr))).float()  # of mean 1
        loss = factor * mean_loss(log_snr) * noise
        self.criterion.reweight(loss, log_snr, v)
        self.ratios.append(float(self.criterion.level_free_loss) / truth)
        self.raw.append(float((loss if v is None else loss * v).mean()) / truth)


def assert_unbiased(stream: Callable[[int], Stream], skip: int, quieter: float) -> None:
    """Over eight streams the mean is the truth within its standard error, and varies less than the raw mean.

    Within a stream the calls are correlated: the running shares err in one direction for some half-lives."""
    streams = [stream(seed) for seed in range(8)]
    means = np.array([np.mean(each.ratios[skip:]) for each in streams])
    error = means.std(ddof=1) / math.sqrt(len(means))
    assert abs(means.mean() - 1) < 3 * error
    assert error < 0.01
    noise = np.mean([np.std(each.ratios[skip:]) for each in streams])
    assert noise < quieter * np.mean([np.std(each.raw[skip:]) for each in streams])


def log_uniform(u: torch.Tensor) -> torch.Tensor:
    return (8 * u - 4).float()  # in (-4, 4)


TRUTH = float(mean_loss(torch.linspace(-4, 4, 8001)[:-1] + 5e-4).double().mean())  # of levels from log_uniform


def test_unbiased_while_the_loss_falls():
    def falling(seed: int) -> Stream:
        stream = Stream(seed)
        for call in range(800):
            factor = 0.2 + 0.8 * math.exp(-call / 200)
            stream.call(log_uniform(stream.uniform(16)), TRUTH * factor, factor)
        return stream

    assert_unbiased(falling, skip=100, quieter=0.5)


def test_unbiased_when_the_loss_jumps():
    """After a jump the bins lag for a while: the level-free loss is as high as the loss at once."""

    @functools.cache
    def jumping(seed: int) -> Stream:
        stream = Stream(seed)
        for call in range(440):
            factor = 5.0 if call >= 400 else 1.0
            stream.call(log_uniform(stream.uniform(32)), TRUTH * factor, factor)
        return stream

    assert_unbiased(jumping, skip=100, quieter=0.8)
    assert_unbiased(jumping, skip=400, quieter=0.8)


def test_a_spike_of_one_call_shows():
    spikes = []
    for seed in range(40):
        stream = Stream(seed)
        for call in range(120):
            factor = 5.0 if call == 110 else 1.0
            stream.call(log_uniform(stream.uniform(64)), TRUTH * factor, factor)
        spikes.append(stream.ratios[110])
    assert np.mean(spikes) == pytest.approx(1.0, abs=4 * np.std(spikes) / math.sqrt(40))


def test_unbiased_with_skewed_levels_and_importance_correction():
    """Three quarters of the draws in the lower quarter of the levels, v = base/p."""

    def skewed(seed: int) -> Stream:
        stream = Stream(seed)
        for _ in range(600):
            low = stream.uniform(32) < 0.75
            log_snr = log_uniform(torch.where(low, 0.25 * stream.uniform(32), 0.25 + 0.75 * stream.uniform(32)))
            stream.call(log_snr, TRUTH, v=torch.where(low, 0.25 / 0.75, 0.75 / 0.25).float())
        return stream

    assert_unbiased(skewed, skip=100, quieter=0.8)


@pytest.mark.parametrize("corrected", [True, False])
def test_unbiased_from_the_first_call_after_adaptive_levels_change(corrected):
    """The sampler tells the criterion its shares: the running ones lag by some half-lives."""
    grid = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000

    def adaptive(seed: int) -> Stream:
        stream, truth = Stream(seed), TRUTH
        base = levels.LogUniform(math.exp(-2.0), math.exp(2.0))  # log-SNR in (-4, 4)
        sampler = levels.SecondMoment(base, 32, (-8.0, 8.0), corrected=corrected)
        for call in range(300):
            drawn = sampler(stream.uniform(32))
            stream.call(drawn.log_snr, truth, v=drawn.sample_weight)
            if call in (150, 200):
                sampler.update(stream.criterion)
                everywhere = sampler(grid)
                v = torch.ones(1) if everywhere.sample_weight is None else everywhere.sample_weight
                truth = float((mean_loss(everywhere.log_snr) * v).double().mean())
        assert abs(truth / TRUTH - 1) < 2e-3 if corrected else truth > 1.5 * TRUTH
        return stream

    assert_unbiased(adaptive, skip=151, quieter=1.0)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("kind", [levels.SecondMoment, levels.LossSpread])
def test_unbiased_under_adaptive_levels_with_sample_weights_of_ones_own(kind, random):
    """Mask shares or weights of data sets: the sampler knows its own factor of v only."""
    grid = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000

    def weighted(seed: int) -> Stream:
        stream, truth = Stream(seed), TRUTH
        sampler = kind(levels.LogUniform(math.exp(-2.0), math.exp(2.0)), 32, (-8.0, 8.0))
        for call in range(400):
            drawn = sampler(stream.uniform(32))
            own = (0.5 * stream.uniform(32)).float() if random else torch.full((32,), 0.25)  # of mean 1/4
            own = own if drawn.sample_weight is None else own * drawn.sample_weight
            stream.call(drawn.log_snr, truth / 4, v=own)
            if call in (150, 200):
                sampler.update(stream.criterion)
                everywhere = sampler(grid)
                v = torch.ones(1) if everywhere.sample_weight is None else everywhere.sample_weight
                truth = float((mean_loss(everywhere.log_snr) * v).double().mean())
        return stream

    assert_unbiased(weighted, skip=160, quieter=1.0)


def test_shares_of_a_sampler_that_is_no_longer_updated_are_followed_for_a_half_life_only():
    """Levels of another distribution than the shares say: a bias that ends."""

    def abandoned(seed: int) -> Stream:
        stream = Stream(seed, half_life=64.0)
        shares = torch.zeros(32, dtype=torch.float64)
        shares[10] = 1.0  # a level that costs twice the average
        stream.criterion.statistics.use_level_shares(shares)
        for _ in range(600):
            stream.call(log_uniform(stream.uniform(16)), TRUTH)
        return stream

    assert np.mean(abandoned(0).ratios[70:120]) > 1.5
    assert_unbiased(abandoned, skip=130, quieter=0.8)


def test_reset_forgets_the_shares_too():
    criterion = vadiff.DiffusionLoss("constant")
    fresh = criterion.statistics.state.clone()
    criterion.statistics.use_level_shares(torch.full((128,), 1 / 128))
    criterion.statistics.reset()
    assert torch.equal(criterion.statistics.state, fresh)


@pytest.mark.parametrize("size", [1e3, 1e5, 1e8])
def test_after_a_spike_it_is_as_good_as_the_plain_mean(size):
    """The spike stays in the mean of its bin for a half-life, and so would be in every correction."""
    errors = []
    for seed in range(8):
        stream = Stream(seed)
        for call in range(300):
            log_snr = log_uniform(stream.uniform(16))
            loss = mean_loss(log_snr) * (0.5 + stream.uniform(16)).float()
            if call == 199:
                loss[0] *= size
            stream.criterion.reweight(loss, log_snr)
            level_free = float(stream.criterion.level_free_loss)
            if call == 199:
                assert level_free > 0.9 * float(loss.mean()) - 2 * TRUTH
            elif call > 199:
                stream.ratios.append(level_free / TRUTH)
        errors.append(np.mean(stream.ratios[20:]) - 1)
    assert np.abs(errors).max() < 0.2


def test_losses_around_zero_are_not_made_noisier():
    def around_zero(seed: int) -> tuple[float, float]:
        stream = Stream(seed)
        for _ in range(800):
            log_snr = log_uniform(stream.uniform(16))
            loss = mean_loss(log_snr) * (0.5 + stream.uniform(16)).float() - TRUTH
            stream.criterion.reweight(loss, log_snr)
            stream.ratios.append(float(stream.criterion.level_free_loss))
            stream.raw.append(float(loss.mean()))
        return float(np.std(stream.ratios[100:])), float(np.std(stream.raw[100:]))

    noise = np.mean([around_zero(seed) for seed in range(4)], axis=0)
    assert noise[0] < noise[1]


def test_shares_that_are_none_are_refused():
    statistics = vadiff.DiffusionLoss(bins=4).statistics
    with pytest.raises(TypeError, match=r"shares is a list, expected a tensor of shape \(4,\)"):
        statistics.use_level_shares([0.25] * 4)
    with pytest.raises(ValueError, match=r"shares has shape \(3,\), expected \(4,\)"):
        statistics.use_level_shares(torch.ones(3) / 3)
    with pytest.raises(ValueError, match="shares has a negative or non-finite number"):
        statistics.use_level_shares(torch.tensor([math.nan, 0.5, 0.25, 0.25]))
    with pytest.raises(ValueError, match="shares has sum 4, expected 1"):
        statistics.use_level_shares(torch.ones(4))
    with pytest.raises(ValueError, match="sample_weight has a negative or non-finite number"):
        statistics.use_level_shares(torch.full((4,), 0.25), torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    assert float(statistics.state[4 * 4 + 14 :].sum()) == 0


def test_unbiased_with_batches_of_many_sizes_read_together():
    """Gradient accumulation with a small last batch: the mean is over the samples."""

    def uneven(seed: int) -> Stream:
        stream = Stream(seed)
        for call in range(1200):
            stream.call(log_uniform(stream.uniform(4 if call % 3 else 32)), TRUTH)
        return stream

    assert_unbiased(uneven, skip=200, quieter=0.6)


def test_unbiased_with_masked_samples_and_without_some_levels():
    """A third is masked, and a tenth has no log-SNR: its loss counts, uncorrected."""

    def masked(seed: int) -> Stream:
        stream = Stream(seed)
        for _ in range(600):
            log_snr, v = log_uniform(stream.uniform(32)), (stream.uniform(32) > 1 / 3).float()
            known = torch.where(stream.uniform(32) < 0.1, math.nan, log_snr)
            loss = mean_loss(log_snr) * (0.5 + stream.uniform(32)).float()
            stream.criterion.reweight(loss, known, v)
            stream.ratios.append(float(stream.criterion.level_free_loss) / (TRUTH * 2 / 3))
            stream.raw.append(float((loss * v).mean()) / (TRUTH * 2 / 3))
        return stream

    assert_unbiased(masked, skip=100, quieter=0.9)


def _train_on_two_ranks(rank: int, folder: str) -> None:
    ranks.join_two_ranks(rank, folder)
    criterion = vadiff.DiffusionLoss(bins=BINS, log_snr_range=(LOW, HIGH))
    for call in calls(6, 12, samples=128):
        mine = {name: value[rank * 64 : (rank + 1) * 64] for name, value in call.items()}
        run_call(criterion, torch.device("cpu"), **mine)
    if rank == 1:  # no other rank has to read
        torch.save(criterion.level_free_loss, f"{folder}/level_free")
    ranks.leave_two_ranks()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_give_what_one_gives_on_the_whole_batch(tmp_path):
    ranks.run_two_ranks(_train_on_two_ranks, str(tmp_path))
    criterion = vadiff.DiffusionLoss(bins=BINS, log_snr_range=(LOW, HIGH))
    for call in calls(6, 12, samples=128):
        run_call(criterion, torch.device("cpu"), **call)
    assert float(torch.load(tmp_path / "level_free")) == pytest.approx(float(criterion.level_free_loss), rel=1e-6)


def test_it_moves_under_compile_with_the_same_numbers():
    torch._dynamo.reset()
    eager = vadiff.DiffusionLoss(bins=BINS, log_snr_range=(LOW, HIGH))
    compiled: Callable[..., torch.Tensor]
    traced = copy.deepcopy(eager)
    compiled = torch.compile(lambda *x: traced(*x), fullgraph=True, backend="eager")
    for call in calls(7, 5, samples=128):
        prediction, log_snr = (torch.as_tensor(call[name]) for name in ("difference", "log_snr"))
        eager(prediction, torch.zeros_like(prediction), log_snr)
        compiled(prediction, torch.zeros_like(prediction), log_snr)
    torch.testing.assert_close(traced.level_free_loss, eager.level_free_loss, rtol=0, atol=0)

"""EDM2's learned uncertainty: its objective, whom gradients reach, where it converges, ranks and the compiler."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from ranks import join_two_ranks, leave_two_ranks, run_two_ranks
from torch import Tensor

import vadiff
from vadiff.weighting import LearnedUncertainty, LossLevel

INF, NAN = math.inf, math.nan


def criterion_with(head: LearnedUncertainty | None = None, **options: object) -> vadiff.DiffusionLoss:
    return vadiff.DiffusionLoss(head or LearnedUncertainty(16, "random"), bins=16, backend="reference", **options)


def batch(size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prediction": torch.randn(size, 6, generator=generator),
        "target": torch.randn(size, 6, generator=generator),
        "log_snr": 3 * torch.randn(size, generator=generator),
        "base_weight": torch.rand(size, generator=generator) + 0.5,
        "sample_weight": torch.rand(size, generator=generator) + 0.5,
    }


def objective(head: LearnedUncertainty, values: dict[str, Tensor]) -> Tensor:
    """v·(u·ell/e**h + h) per sample, in plain autograd."""
    ell = (values["prediction"] - values["target"]).square().mean(1)
    h = head(values["log_snr"])
    return values["sample_weight"] * (values["base_weight"] * ell / h.exp() + h)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_all_gradients_are_those_of_the_objective(reduction):
    values = batch()
    values["prediction"].requires_grad_()
    values["base_weight"].requires_grad_()
    criterion = criterion_with()
    head = copy.deepcopy(criterion.weighting)
    loss = criterion(*(values[name] for name in ("prediction", "target", "log_snr")), **{
        name: values[name] for name in ("base_weight", "sample_weight")
    }, reduction=reduction)  # fmt: skip
    expected = objective(head, values)
    expected = expected.mean() if reduction == "mean" else expected
    torch.testing.assert_close(loss, expected)
    upstream = torch.rand(loss.shape)
    inputs = [values["prediction"], values["base_weight"]]
    got = torch.autograd.grad(loss, [*inputs, criterion.weighting.weight], upstream)
    wanted = torch.autograd.grad(expected, [*inputs, head.weight], upstream)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_reweight_has_the_same_objective():
    values = batch()
    criterion = criterion_with()
    base = (values["base_weight"] * (values["prediction"] - values["target"]).square().mean(1)).requires_grad_()
    loss = criterion.reweight(base, values["log_snr"], values["sample_weight"])
    expected = objective(criterion.weighting, values)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss.sum(), criterion.weighting.weight, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), criterion.weighting.weight)[0])
    (by_base,) = torch.autograd.grad(loss.sum(), base)
    torch.testing.assert_close(by_base, values["sample_weight"] * criterion.weight_at(values["log_snr"]))


def test_learned_weighting_starts_at_one_by_default():
    assert LearnedUncertainty()(torch.linspace(-16, 16, 9)).eq(0).all()
    assert criterion_with(LearnedUncertainty()).weights.eq(1).all()
    spread = LearnedUncertainty(init="random")(torch.linspace(-9, 12, 200))
    assert 0.3 < spread.std() < 2.0


def test_base_loss_beside_a_negative_loss_and_statistics_are_unweighted():
    values = batch()
    target, log_snr, base_weight = values["target"], values["log_snr"], 1e-6 * values["base_weight"]
    criterion, plain = criterion_with(), vadiff.DiffusionLoss("constant", bins=16, backend="reference")
    with torch.no_grad():
        criterion.weighting.weight.mul_(-criterion.weighting(log_snr).mean().sign())
    prediction = values["prediction"].requires_grad_()
    loss = criterion(prediction, target, log_snr, base_weight=base_weight).detach()
    unweighted = plain(prediction, target, log_snr, base_weight=base_weight).detach()
    assert loss < 0 < unweighted
    assert criterion.base_loss is not None
    assert not criterion.base_loss.requires_grad
    torch.testing.assert_close(criterion.base_loss, unweighted)
    assert torch.equal(criterion.statistics.state, plain.statistics.state)
    assert plain.base_loss is None


def test_its_parameters_are_the_criterions():
    criterion = criterion_with()
    assert [name for name, _ in criterion.named_parameters()] == ["weighting.weight"]
    other = criterion_with(LearnedUncertainty(16, seed=3))
    other.load_state_dict(criterion.state_dict())
    at = torch.linspace(-8, 8, 9)
    assert torch.equal(other.weight_at(at), criterion.weight_at(at))


def test_infinite_log_snr_has_a_weight_and_masked_samples_teach_nothing():
    criterion = criterion_with()
    log_snr = torch.tensor([-INF, INF, 0.0])
    loss = criterion(
        torch.tensor([[1.0], [2.0], [NAN]]), torch.zeros(3, 1), log_snr, sample_weight=torch.tensor([1.0, 1, 0])
    )
    loss.backward()
    assert loss.isfinite()
    got = criterion.weighting.weight.grad
    criterion.weighting.weight.grad = None
    h = criterion.weighting(log_snr[:2])
    ((torch.tensor([1.0, 4.0]) / h.exp() + h).sum() / 3).backward()
    torch.testing.assert_close(got, criterion.weighting.weight.grad)


def test_a_nan_prediction_makes_loss_and_gradients_nan():
    criterion = criterion_with()
    prediction = torch.tensor([[1.0], [NAN]], requires_grad=True)
    loss = criterion(prediction, torch.zeros(2, 1), torch.zeros(2))
    loss.backward()
    assert loss.isnan()
    assert criterion.weighting.weight.grad.isnan().any()
    assert int(criterion.statistics.skipped) == 1


def test_learned_weighting_converges_to_loss_level():
    """Losses spread over four orders of magnitude of levels: e**-u and the closed form agree up to one constant."""
    bins = {"bins": 32, "log_snr_range": (-6.0, 6.0), "half_life": INF, "backend": "reference"}
    learned = vadiff.DiffusionLoss(LearnedUncertainty(64), **bins)
    level = vadiff.DiffusionLoss(LossLevel(smoothing=0.0, clip=INF, prior=1e-3), **bins)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 800)
    generator = torch.Generator().manual_seed(0)
    for _ in range(800):
        log_snr = 12 * torch.rand(512, generator=generator) - 6
        losses = torch.exp(-0.7 * log_snr) * torch.rand(512, generator=generator).add(0.5)
        optimizer.zero_grad()
        learned.reweight(losses, log_snr).mean().backward()
        optimizer.step()
        decay.step()
        level.reweight(losses, log_snr)
    ratio = (learned.weights / level.weights).log()
    assert level.weights.max() / level.weights.min() > 2000
    assert (ratio - ratio.mean()).abs().max() < 0.15
    at = torch.linspace(-5.8, 5.8, 30)
    assert (learned.weight_at(at).log() - 0.7 * at).abs().max() < 0.15  # 1/mean loss itself


def test_learned_weighting_compiles_without_a_graph_break():
    values = batch()
    criterion = criterion_with()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(prediction: Tensor) -> Tensor:
        return criterion(prediction, values["target"], values["log_snr"])

    prediction = values["prediction"].requires_grad_()
    loss = step(prediction)
    loss.backward()
    compiled = criterion.weighting.weight.grad.clone()
    criterion.weighting.weight.grad = None
    eager = criterion(prediction, values["target"], values["log_snr"])
    eager.backward()
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(compiled, criterion.weighting.weight.grad)


def test_learned_weighting_stays_float32_under_autocast():
    head, at = LearnedUncertainty(init="random"), torch.linspace(-9, 12, 50)
    plain = head(at)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = head(at)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


def rank_main(rank: int, folder: str) -> None:
    join_two_ranks(rank, folder)
    wrapped = torch.nn.parallel.DistributedDataParallel(criterion_with())
    for seed in range(3):  # more than one step: DDP complains of parameters it did not see
        values = {name: value[4 * rank : 4 * rank + 4] for name, value in batch(seed=seed).items()}
        values["prediction"].requires_grad_()
        wrapped.zero_grad()
        wrapped(values.pop("prediction"), values.pop("target"), values.pop("log_snr"), **values).backward()
    criterion = wrapped.module
    torch.save((criterion.weighting.weight.grad, criterion.statistics.state), f"{folder}/{rank}.pt")
    leave_two_ranks()


def test_ddp_averages_its_gradient_and_keeps_the_statistics_equal(tmp_path):
    run_two_ranks(rank_main, str(tmp_path))
    (first, state), (second, other_state) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert torch.equal(state, other_state)
    criterion = criterion_with()
    values = batch(seed=2)
    objective(criterion.weighting, values).mean().backward()
    torch.testing.assert_close(first, criterion.weighting.weight.grad)


@pytest.mark.parametrize(
    ("options", "message"), [({"channels": 0}, "channels is 0"), ({"init": "ones"}, "init is 'ones'")]
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LearnedUncertainty(**options)

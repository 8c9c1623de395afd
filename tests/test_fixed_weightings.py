"""Fixed weightings and those of a batch: formulas in float64, one objective in every form, outside oracles, limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ranks import join_two_ranks, leave_two_ranks, run_two_ranks
from torch import Tensor

import vadiff
from vadiff import process, weighting
from vadiff.integrations.k_diffusion import import_k_diffusion
from vadiff.optimal_loss import OptimalLoss
from vadiff.weighting import Cauchy, Gaussian, InverseOptimalLoss, LossZScore, SNRWeighting

INF, NAN = math.inf, math.nan
SIGMA_DATA = 0.6
FORMS = process.PREDICTION_TYPES
K: dict[str, Callable[[float], float]] = {  # of the table in the literature, S the SNR
    "epsilon": lambda s: s,
    "sample": lambda s: 1.0,
    "v_prediction": lambda s: 1.0 + s,
    "flow": lambda s: (1.0 + math.sqrt(s)) ** 2,
    "edm": lambda s: s + 1.0 / SIGMA_DATA**2,
}


def optimal_loss() -> OptimalLoss:
    """J*/D = sigma/10 between 0.1 and 10."""
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    return OptimalLoss(sigma, 0.4 * sigma, 0 * sigma, torch.ones(3).long(), 4, total_variance=8.0, samples=100)


def monotonic_edm(s: float) -> float:
    """The running maximum from the low-noise side, on a grid."""
    x = np.linspace(-12.0, 30.0, 420_001)
    h = np.exp(-0.5 * ((x - 2.4) / 2.4) ** 2) * (1.0 + np.exp(-x) / SIGMA_DATA**2)
    highest = np.maximum.accumulate(h[::-1])[::-1] / h.max()
    return s * float(np.interp(math.log(s), x, highest))


def flow_share(s: float) -> float:
    return 1.0 / (1.0 + math.sqrt(s))


# name → (class and options, weight of the x0 loss as a function of S)
X0_WEIGHTS: dict[str, tuple[Callable[..., SNRWeighting], Callable[[float], float]]] = {
    "constant_x0": (weighting.ConstantX0, lambda s: 1.0),
    "snr": (weighting.SNR, lambda s: s),
    "min_snr": (weighting.MinSNR, lambda s: min(s, 5.0)),
    "inv_snr": (weighting.InverseSNR, lambda s: 1.0 / s),
    "soft_min_snr": (weighting.SoftMinSNR, lambda s: 4.0 * s / (s + 4.0)),
    "truncated_snr": (weighting.TruncatedSNR, lambda s: max(s, 1.0)),
    "edm": (weighting.EDM, lambda s: s + 1.0 / SIGMA_DATA**2),
    "p2": (weighting.P2, lambda s: s / (1.0 + s)),
    "debiased": (weighting.Debiased, lambda s: s / math.sqrt(s)),
    "sigmoid": (weighting.Sigmoid, lambda s: s / (1.0 + s * math.exp(-2.0))),
    "monotonic_edm": (weighting.MonotonicEDM, monotonic_edm),
    "sigma_sqrt": (weighting.SigmaSqrt, lambda s: flow_share(s) ** -2),
    "cosmap": (weighting.CosMap, lambda s: 2 / math.pi / (1 - 2 * flow_share(s) + 2 * flow_share(s) ** 2)),
    # with options
    "inverse optimal loss": (lambda **o: InverseOptimalLoss(optimal_loss(), **o), lambda s: 10.0 * math.sqrt(s)),
    "p2, k 2, gamma 0.5": (lambda **o: weighting.P2(2.0, 0.5, **o), lambda s: s / math.sqrt(2.0 + s)),
    "p2, gamma 0": (lambda **o: weighting.P2(gamma=0.0, **o), lambda s: s),
    "inverse optimal loss, cap 5": (
        lambda **o: InverseOptimalLoss(optimal_loss(), 5.0, **o),
        lambda s: min(10.0 * math.sqrt(s), 5.0),
    ),
    "sigmoid, bias -1": (lambda **o: weighting.Sigmoid(-1.0, **o), lambda s: s / (1.0 + s * math.e)),
    "sigma_sqrt on flow": (
        lambda **o: weighting.SigmaSqrt("flow", **o),
        lambda s: (1.0 + math.sqrt(s)) ** 2 / flow_share(s) ** 2,
    ),
}


@pytest.fixture(params=list(X0_WEIGHTS))
def family(request: pytest.FixtureRequest) -> tuple[Callable[..., SNRWeighting], Callable[[float], float]]:
    return X0_WEIGHTS[request.param]


@pytest.mark.parametrize("form", FORMS)
def test_weight_is_the_formula_divided_by_k(family, form):
    make, formula = family
    log_snr = torch.tensor([-4.5, -2.0, -0.3, 0.0, 0.7, 1.61, 2.0, 4.5], dtype=torch.float64)
    got = make(prediction_type=form, sigma_data=SIGMA_DATA)(log_snr)
    assert got.dtype == torch.float32
    expected = [formula(math.exp(x)) / K[form](math.exp(x)) for x in log_snr.tolist()]
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=2e-6)


def test_every_form_of_one_objective_has_the_same_gradient_by_the_denoised_image(family):
    """Residuals of eps, v, F, flow and x0 are multiples of D - x0; weighted, their gradients by D agree."""
    make, _ = family
    torch.manual_seed(0)
    log_snr = torch.tensor([-3.0, -1.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    sigma_ve = (-0.5 * log_snr).exp()
    x0, eps = torch.randn(2, 5, 6, dtype=torch.float64)
    error = torch.randn(5, 6, dtype=torch.float64)
    gradients = {}
    for form in FORMS:
        denoised = (x0 + error).requires_grad_()
        # alpha, sigma of the process each form lives on, and what the network must have said for this D
        if form in ("sample", "epsilon", "v_prediction"):
            alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        elif form == "flow":
            alpha, sigma = 1.0 / (1.0 + sigma_ve), sigma_ve / (1.0 + sigma_ve)
        else:
            alpha, sigma = torch.ones(5), sigma_ve
        alpha, sigma = alpha[:, None], sigma[:, None]
        noisy = alpha * x0 + sigma * eps
        eps_hat = (noisy - alpha * denoised) / sigma
        if form == "edm":
            c = process.edm_preconditioning(sigma_ve, SIGMA_DATA)
            output = (denoised - c.c_skip[:, None] * noisy) / c.c_out[:, None]
            target = (x0 - c.c_skip[:, None] * noisy) / c.c_out[:, None]
        else:
            output = {
                "sample": denoised,
                "epsilon": eps_hat,
                "v_prediction": alpha * eps_hat - sigma * denoised,
                "flow": eps_hat - denoised,
            }[form]
            target = {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[form]
        criterion = vadiff.DiffusionLoss(make(prediction_type=form, sigma_data=SIGMA_DATA), backend="reference")
        loss = criterion(output, target.detach(), log_snr)
        (gradients[form],) = torch.autograd.grad(loss, denoised)
    for form in FORMS:
        torch.testing.assert_close(gradients[form], gradients["sample"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_finite_up_to_the_ends_and_nan_for_nan(family, form):
    make, _ = family
    log_snr = torch.tensor([-INF, -3e38, -500.0, 500.0, 3e38, INF, NAN])
    got = make(prediction_type=form)(log_snr)
    assert ((got[:-1] >= 0) & (got[:-1] <= 1.001e6)).all()
    assert got[-1].isnan()
    assert got[0] == got[1] == got[2]
    assert got[3] == got[4] == got[5]


@pytest.mark.parametrize(
    ("make", "form", "at_zero", "at_infinity"),
    [
        (weighting.MinSNR, "epsilon", 1.0, 0.0),
        (weighting.MinSNR, "v_prediction", 0.0, 0.0),
        (weighting.MinSNR, "sample", 0.0, 5.0),
        (weighting.SoftMinSNR, "epsilon", 1.0, 0.0),
        (weighting.SNR, "v_prediction", 0.0, 1.0),
        (weighting.SNR, "sample", 0.0, 1e6),
        (weighting.TruncatedSNR, "epsilon", 1e6, 1.0),
        (weighting.TruncatedSNR, "v_prediction", 1.0, 1.0),
        (weighting.EDM, "edm", 1.0, 1.0),
        (weighting.P2, "epsilon", 1.0, 0.0),
        (weighting.Sigmoid, "epsilon", 1.0, 0.0),
        (weighting.SigmaSqrt, "flow", 1.0, 1.0),
        (weighting.ConstantX0, "epsilon", 1e6, 0.0),
    ],
)
def test_limits_at_zero_and_infinite_snr(make, form, at_zero, at_infinity):
    got = make(prediction_type=form)(torch.tensor([-INF, INF])).tolist()
    assert got == pytest.approx([at_zero, at_infinity], rel=1e-6, abs=1e-30)


def test_max_weight_caps_and_nothing_else_does():
    log_snr = torch.tensor([0.0, 10.0, 13.0, 14.0])
    expected = [1.0, math.exp(10), math.exp(13), 1e6]
    assert weighting.SNR("sample")(log_snr).tolist() == pytest.approx(expected, rel=1e-6)
    assert weighting.SNR("sample", max_weight=7.0)(log_snr).tolist() == pytest.approx([1.0, 7.0, 7.0, 7.0])


@pytest.mark.parametrize("form", FORMS)
def test_cap_of_the_inverse_optimal_loss_bounds_the_objective_alike_in_every_form(form):
    """A bound of the converted weight would bite at high noise in epsilon form only."""
    log_snr = torch.tensor([-9.0, -6.0, 9.0, 12.0], dtype=torch.float64)
    weights = InverseOptimalLoss(optimal_loss(), cap=50.0, prediction_type=form)(log_snr).double()
    of_x0 = weights * process.loss_ratio(form, log_snr)
    torch.testing.assert_close(of_x0, torch.tensor([1.0, 1.0, 50.0, 50.0]).double(), rtol=1e-5, atol=0)


# outside oracles


@pytest.mark.parametrize("form", ["epsilon", "v_prediction"])
def test_min_snr_is_that_of_diffusers_training_scripts(form):
    """base = min(compute_snr, gamma)/compute_snr for eps, min/(snr + 1) for v, as in its text-to-image script."""
    training_utils = pytest.importorskip("diffusers.training_utils")
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    timesteps = torch.arange(1000)
    snr = training_utils.compute_snr(scheduler, timesteps)
    theirs = torch.stack([snr, torch.full_like(snr, 5.0)]).min(0)[0] / (snr if form == "epsilon" else snr + 1)
    log_snr = vadiff.log_snr.from_alphas_cumprod(scheduler.alphas_cumprod, timesteps)
    torch.testing.assert_close(weighting.MinSNR(5.0, form)(log_snr), theirs, rtol=1e-3, atol=0)
    middle = slice(50, None)  # at t = 0 diffusers takes 1 - alphas_cumprod = 0.00085 in float32
    ours = weighting.MinSNR(5.0, form)(log_snr)
    torch.testing.assert_close(ours[middle], theirs[middle], rtol=2e-5, atol=0)


@pytest.mark.parametrize(("scheme", "make"), [("sigma_sqrt", weighting.SigmaSqrt), ("cosmap", weighting.CosMap)])
def test_sd3_weights_are_those_of_diffusers(scheme, make):
    training_utils = pytest.importorskip("diffusers.training_utils")
    t = torch.linspace(0.01, 0.99, 50)
    theirs = training_utils.compute_loss_weighting_for_sd3(scheme, sigmas=t)
    log_snr = vadiff.log_snr.from_flow_time(t)
    torch.testing.assert_close(make("sample", "sample")(log_snr), theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(make("flow", "flow")(log_snr), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.2])
def test_soft_min_snr_is_that_of_k_diffusion(sigma_data):
    """It multiplies the error of the raw output F, which its preconditioning makes (D - x0)/c_out."""
    try:
        layers = import_k_diffusion().layers
    except vadiff.extras.MissingExtraError as error:
        pytest.skip(str(error))
    denoiser = layers.Denoiser(torch.nn.Identity(), sigma_data=sigma_data, weighting="soft-min-snr")
    sigma = torch.logspace(-3, 2, 30, dtype=torch.float64)
    ours = weighting.SoftMinSNR(sigma_data**-2, "edm", sigma_data)(vadiff.log_snr.from_sigma(sigma))
    torch.testing.assert_close(ours.double(), denoiser.weighting(sigma), rtol=1e-6, atol=0)


# the seed paper's


LOG_SNR = torch.tensor([-3.0, 0.0, 1.0, 4.0, INF])


def test_cauchy_and_gaussian_follow_their_formulas_around_a_given_centre():
    distance = (LOG_SNR.double() - 2.4) ** 2
    torch.testing.assert_close(Cauchy(0.1, 2.4)(LOG_SNR).double(), 1 / (1 + 0.1 * distance), rtol=1e-6, atol=0)
    torch.testing.assert_close(Gaussian(0.1, 2.4)(LOG_SNR).double(), (-0.1 * distance).exp(), rtol=1e-6, atol=1e-40)


@pytest.mark.parametrize("make", [Cauchy, Gaussian])
def test_without_a_centre_it_is_the_batch_mean_of_finite_log_snr(make):
    torch.testing.assert_close(make(0.05, None)(LOG_SNR), make(0.05, 0.5)(LOG_SNR))
    criterion = vadiff.DiffusionLoss(make(0.05, None), backend="reference")
    torch.testing.assert_close(criterion.reweight(torch.ones(5), LOG_SNR), make(0.05, 0.5)(LOG_SNR))
    assert criterion.weights.isnan().all()


def test_cauchy_is_what_the_papers_code_runs():
    """lambda = log(sigma_data²/sigma²), mu its batch mean, w = 1/(1 + alpha(lambda - mu)²)."""
    sigma = torch.randn(64).mul(1.2).sub(1.2).exp()
    snr = torch.log(0.5**2 / sigma**2)
    theirs = 1.0 / (1.0 + 0.05 * (snr - snr.mean()) ** 2)
    torch.testing.assert_close(Cauchy(0.05, None)(vadiff.log_snr.from_sigma(sigma)), theirs, rtol=1e-4, atol=1e-6)


def test_loss_zscore_is_one_plus_alpha_z_of_the_base_loss():
    torch.manual_seed(1)
    criterion = vadiff.DiffusionLoss(LossZScore(0.3), backend="reference")
    losses = torch.rand(16, requires_grad=True)
    weighted = criterion.reweight(losses, torch.zeros(16))
    z = (losses - losses.mean()) / losses.std(correction=0)
    torch.testing.assert_close(weighted, ((1 + 0.3 * z) * losses).detach())
    (gradient,) = torch.autograd.grad(weighted.sum(), losses)
    torch.testing.assert_close(gradient, (1 + 0.3 * z).detach())  # the weights are constants
    assert criterion.weights.isnan().all()


def test_loss_zscore_through_forward_is_that_through_reweight():
    torch.manual_seed(1)
    prediction = torch.randn(8, 5, requires_grad=True)
    target, log_snr, u = torch.randn(8, 5), torch.randn(8), torch.rand(8)
    v = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 1.0, 3.0])
    one, other = (vadiff.DiffusionLoss("loss_zscore", backend="reference") for _ in range(2))
    loss = one(prediction, target, log_snr, base_weight=u, sample_weight=v)
    (gradient,) = torch.autograd.grad(loss, prediction)
    base = u * (prediction - target).square().mean(1)
    expected = other.reweight(base, log_snr, v).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, prediction)[0])
    assert torch.equal(one.statistics.state, other.statistics.state)
    torch.testing.assert_close(one.per_sample_loss, (prediction - target).square().mean(1).detach())


def test_masked_samples_do_not_enter_the_z_score():
    kept = vadiff.DiffusionLoss(LossZScore(0.3), backend="reference")
    expected = kept.reweight(torch.tensor([1.0, 3.0]), torch.zeros(2))
    criterion = vadiff.DiffusionLoss(LossZScore(0.3), backend="reference")
    u, v = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    prediction = torch.tensor([[1.0], [math.sqrt(3.0)], [9.0], [NAN]])
    loss = criterion(prediction, torch.zeros(4, 1), torch.zeros(4), base_weight=u, sample_weight=v, reduction="none")
    torch.testing.assert_close(loss, torch.cat([expected, torch.zeros(2)]))
    assert criterion.statistics.count.sum() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_losses_have_z_score_weight_one(dtype):
    """In float64 the mean of eleven times 0.1 is not 0.1."""
    losses = torch.full((11,), 0.1, dtype=dtype)
    criterion = vadiff.DiffusionLoss("loss_zscore", backend="reference")
    assert torch.equal(criterion.reweight(losses, torch.zeros(11)), losses)


@pytest.mark.parametrize("make", [Cauchy, Gaussian])
@pytest.mark.parametrize("center", [None, 1.0])
def test_alpha_zero_weighs_nothing_at_any_log_snr(make, center):
    got = make(0.0, center)(torch.tensor([-INF, 0.0, INF, NAN]))
    assert got[:3].eq(1.0).all()
    assert got[3].isnan()


OF_THE_BATCH = {"cauchy": Cauchy(center=None), "gaussian": Gaussian(), "loss_zscore": LossZScore()}


def global_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, generator=generator), torch.randn(12, generator=generator)


def rank_main(rank: int, folder: str) -> None:
    join_two_ranks(rank, folder)
    losses, log_snr = (x[:5] if rank == 0 else x[5:] for x in global_batch())
    results = {}
    for name, weighting_of_batch in OF_THE_BATCH.items():
        criterion = vadiff.DiffusionLoss(weighting_of_batch, backend="reference")
        results[name] = criterion.reweight(losses, log_snr)
        if rank == 0:  # alone: nobody else is asked
            criterion.eval().reweight(losses, log_snr)
    torch.save(results, f"{folder}/{rank}.pt")
    leave_two_ranks()


def test_batch_means_are_those_of_all_ranks(tmp_path):
    run_two_ranks(rank_main, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    losses, log_snr = global_batch()
    for name in first:
        expected = vadiff.DiffusionLoss(OF_THE_BATCH[name], backend="reference").reweight(losses, log_snr)
        torch.testing.assert_close(torch.cat([first[name], second[name]]), expected)


# names and errors


def test_every_name_makes_its_class_with_options():
    for name in weighting.available():
        options = {"prediction_type": "flow"} if weighting.takes_prediction_type(name) else {}
        made = weighting.from_name(name, **options)
        assert getattr(made, "prediction_type", "flow") == "flow"
        assert vadiff.DiffusionLoss(made, bins=4).weights.shape == (4,)
    assert {name for name in X0_WEIGHTS if name in weighting.available()} == {
        name for name in weighting.available() if weighting.takes_prediction_type(name)
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighting.SoftMinSNR(0.0), "gamma is 0.0"),
        (lambda: weighting.P2(k=-1.0), "k is -1.0"),
        (lambda: weighting.P2(gamma=-1.0), "gamma is -1.0"),
        (lambda: InverseOptimalLoss(optimal_loss(), cap=0.0), "cap is 0.0"),
        (lambda: weighting.WeightTable((1.0, "a")), "weights is .1.0, 'a'."),
        (lambda: weighting.WeightTable((1.0, 2.0), (3.0, -3.0)), "log_snr_range is .3.0, -3.0."),
        (lambda: weighting.Sigmoid(INF), "bias is inf"),
        (lambda: weighting.MonotonicEDM(p_std=0.0), "p_std is 0.0"),
        (lambda: weighting.MonotonicEDM(p_mean=NAN), "p_mean is nan"),
        (lambda: weighting.EDM(sigma_data=0.0), "sigma_data is 0.0"),
        (lambda: weighting.SNR(max_weight=INF), "max_weight is inf"),
        (lambda: weighting.SNR("eps"), "prediction_type is 'eps'.*epsilon"),
        (lambda: weighting.CosMap(form="x0"), "form is 'x0'.*sample"),
        (lambda: Cauchy(-0.1), "alpha is -0.1"),
        (lambda: Gaussian(center=INF), "center is inf"),
        (lambda: LossZScore(NAN), "alpha is nan"),
        (lambda: weighting.from_name("min-snr"), "weighting is 'min-snr'.*min_snr"),
        (lambda: weighting.takes_prediction_type("snr5"), "weighting is 'snr5'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [weighting.Constant, weighting.MinSNR, Cauchy, Gaussian, lambda: weighting.WeightTable((1.0, 2.0))],
)
def test_timesteps_are_no_log_snr(make):
    with pytest.raises(TypeError, match=r"log_snr has dtype torch.int64.*timesteps"):
        make()(torch.tensor([0, 500, 999]))


def test_another_object_is_no_optimal_loss():
    with pytest.raises(TypeError, match="optimal is a str, expected a vadiff"):
        InverseOptimalLoss("optimal_loss.csv")


def test_options_beside_an_object_are_refused():
    with pytest.raises(TypeError, match="options gamma are given"):
        weighting.from_name(weighting.MinSNR(), gamma=1.0)

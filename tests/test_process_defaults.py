"""DiffusionLoss.for_process: range, bins and weighting that suit a process, and what it refuses."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from typing import Any

import diffusers
import pytest
import torch

import vadiff
from vadiff import process, process_defaults, weighting
from vadiff.errors import DiffusionLossWarning
from vadiff.integrations.diffusers import scheduler_loss
from vadiff.schedulers import log_snr_of

for_process = vadiff.DiffusionLoss.for_process
CUT = torch.tensor([0.001, 0.999], dtype=torch.float64)
ENDS = {
    "edm": process.EDM().log_snr(torch.tensor([0.002, 80.0], dtype=torch.float64)),
    "flow": process.Flow().log_snr(CUT),
    "stable_diffusion": torch.tensor([7.0694, -5.3640]),
    "vp_cosine": process.VPCosine().log_snr(CUT),
    "vp_linear": process.VPLinear().log_snr(CUT),
}


def limits(criterion: vadiff.DiffusionLoss) -> tuple[float, float]:
    return criterion.statistics.bins.low, criterion.statistics.bins.high


@pytest.mark.parametrize("fine_tuning", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_bins_cover_the_process_and_little_else(name: str, fine_tuning: bool) -> None:
    assert name in process_defaults.available()
    assert len(ENDS) == len(process_defaults.available())
    criterion = for_process(name, fine_tuning=fine_tuning)
    low, high = limits(criterion)
    width = 0.5 if fine_tuning else 0.25
    assert low <= ENDS[name].min() < low + width
    assert high - width < ENDS[name].max() <= high
    assert criterion.statistics.bins.width == pytest.approx(width)


@pytest.mark.parametrize(
    ("noise_process", "name"),
    [
        (process.EDM(), "edm"),
        (process.Flow(), "flow"),
        (process.Flow(data_at=1), "flow"),
        (process.VPCosine(), "vp_cosine"),
        (process.VPLinear(), "vp_linear"),
        (diffusers.EDMEulerScheduler(), "edm"),
        (
            diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            "stable_diffusion",
        ),
    ],
)
def test_a_process_and_a_scheduler_are_as_good_as_the_name(noise_process: Any, name: str) -> None:
    assert limits(for_process(noise_process)) == limits(for_process(name))


def test_a_discrete_process_is_as_good_as_the_scheduler_with_its_table() -> None:
    scheduler = diffusers.DDPMScheduler()
    assert limits(for_process(process.DiscreteVP.linear())) == limits(for_process(scheduler))


def test_a_process_may_be_none_of_those_with_a_name() -> None:
    assert limits(for_process(process.VPLinear(beta_max=5.0)))[0] > limits(for_process("vp_linear"))[0]
    cosine = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True)
    low, high = limits(for_process(cosine))
    log_snr = log_snr_of(cosine, torch.arange(999))
    assert low <= log_snr.min() < low + 0.25
    assert high - 0.25 < log_snr.max() <= high


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_weighting_that_leaves_the_terminal_step_untrained_is_told(prediction_type: str) -> None:
    """Min-SNR's weight of v, min(S, 5)/(S + 1), and of x0, min(S, 5), is 0 at zero SNR; the paper's code gives 1."""
    zero = process.DiscreteVP.linear().with_zero_terminal_snr()
    options: dict[str, Any] = {"prediction_type": prediction_type}
    for described in (zero, diffusers.DDPMScheduler(rescale_betas_zero_snr=True)):
        with pytest.warns(DiffusionLossWarning, match=r"not trained.*terminal=1\.0\) gives it the weight 1") as said:
            for_process(described, weighting="min_snr", **options)
        assert said[0].filename == __file__
    with pytest.warns(DiffusionLossWarning, match="SoftMinSNR for .* is 0 at zero SNR"):
        for_process(zero, weighting="soft_min_snr", **options)
    for terminal in (0.0, 1.0):
        trained = weighting.MinSNR(terminal=terminal, **options)
        assert for_process(zero, weighting=trained, **options).weighting == trained
    for other in ("constant", "constant_x0", "edm", "truncated_snr"):
        for_process(zero, weighting=other, **options)
    for_process(zero, weighting="min_snr", prediction_type="epsilon")
    for_process("vp_linear", weighting="min_snr", **options)


@pytest.mark.parametrize(
    ("described", "prediction_type", "strength"),
    [
        ("stable_diffusion", None, 0.5),
        ("stable_diffusion", "epsilon", 0.5),
        ("stable_diffusion", "v_prediction", 0.5),
        (diffusers.DDPMScheduler(), None, 0.5),
        (diffusers.FlowMatchEulerDiscreteScheduler(), None, 1.0),
        ("flow", None, 1.0),
        ("edm", None, 1.0),
        ("vp_cosine", "edm", 1.0),
    ],
)
def test_fine_tuning_in_a_variance_preserving_form_goes_half_the_way(
    described: Any, prediction_type: str | None, strength: float
) -> None:
    tuned = for_process(described, prediction_type=prediction_type, fine_tuning=True)
    assert tuned.weighting == weighting.VarianceAware(strength=strength)
    assert for_process(described, prediction_type=prediction_type).weighting == weighting.VarianceAware()


@pytest.mark.parametrize(
    ("described", "prediction_type"),
    [(diffusers.EDMEulerScheduler(), None), (diffusers.DDPMScheduler(), "sample"), ("vp_cosine", "sample")],
)
def test_weights_of_a_loss_between_images_are_not_clipped(described: Any, prediction_type: str | None) -> None:
    criterion = for_process(described, prediction_type=prediction_type)
    assert criterion.weighting == weighting.VarianceAware(clip=math.inf)
    tuned = for_process(described, prediction_type=prediction_type, fine_tuning=True)
    assert tuned.weighting == weighting.VarianceAware(strength=0.5, clip=math.inf)


def test_edm_s_schedulers_are_balanced_from_the_lowest_noise_to_the_highest() -> None:
    scheduler: Any = diffusers.EDMEulerScheduler()
    criterion = for_process(scheduler, log_snr_range=(-10.0, 14.0), bins=12)
    generator = torch.Generator().manual_seed(0)
    log_snr = log_snr_of(scheduler, scheduler.timesteps[torch.randint(1000, (4096,), generator=generator)])
    best = 1 / (log_snr.double().exp() + 4)  # of a Gaussian of standard deviation 0.5
    loss = (best * (1 + 0.3 * torch.randn(4096, generator=generator).clamp(-3, 3))).float().requires_grad_()
    criterion.reweight(loss, log_snr)
    seen = criterion.statistics.count > 100
    std = criterion.statistics.variance.sqrt()[seen]
    weighted = criterion.weights[seen] * std
    assert std.max() / std.min() > 1e3  # clip² is 100
    assert weighted.max() / weighted.min() < 10


@pytest.mark.parametrize(
    ("described", "prediction_type", "form"),
    [
        (diffusers.DDPMScheduler(prediction_type="v_prediction"), None, "v_prediction"),
        (diffusers.DDPMScheduler(prediction_type="v_prediction"), "sample", "sample"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), None, "flow"),
        (diffusers.EDMEulerScheduler(), None, "sample"),
        ("edm", None, "edm"),
        ("vp_cosine", "epsilon", "epsilon"),
    ],
)
def test_a_weighting_by_name_is_told_what_the_loss_is_written_in(
    described: Any, prediction_type: str | None, form: str
) -> None:
    criterion = for_process(described, prediction_type=prediction_type, weighting="min_snr")
    assert criterion.weighting == weighting.MinSNR(prediction_type=form)
    assert for_process(described, weighting="constant").weighting == weighting.Constant()


def test_a_weighting_by_name_gets_the_scheduler_s_sigma_data() -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_data=1.0)
    expected = weighting.EDM(prediction_type="sample", sigma_data=1.0)
    assert for_process(scheduler, weighting="edm").weighting == expected


def test_everything_may_be_overridden() -> None:
    criterion = for_process("flow", bins=10, log_snr_range=(-5.0, 5.0), half_life=7.0, loss="huber", huber_delta=0.1)
    assert criterion.statistics.bins.size == 10
    assert limits(criterion) == (-5.0, 5.0)
    assert (criterion.statistics.half_life, criterion.loss, criterion.huber_delta) == (7.0, "huber", 0.1)
    for given in (weighting.LossLevel(strength=0.3), weighting.MinSNR(gamma=1.0, prediction_type="flow")):
        assert for_process("flow", weighting=given).weighting == given
    for described in ("flow", "stable_diffusion"):
        given = weighting.MinSNR(prediction_type="v_prediction")
        assert for_process(described, prediction_type="v_prediction", weighting=given).weighting == given
    assert for_process("flow", log_snr_range=(-2.0, 2.0)).statistics.bins.size == 16


@pytest.mark.parametrize(
    ("described", "options", "error", "message"),
    [
        ("sd", {}, ValueError, "process is 'sd', expected one of edm, flow, stable_diffusion, vp_cosine, vp_linear"),
        (3, {}, TypeError, "process is a int, expected a name"),
        ("edm", {"prediction_type": "eps"}, ValueError, "prediction_type is 'eps', expected one of epsilon"),
        ("vp_cosine", {"weighting": "min_snr"}, ValueError, "prediction_type is None: expected one of epsilon"),
        (
            diffusers.DDPMScheduler(prediction_type="v_prediction"),
            {"weighting": weighting.MinSNR(gamma=1.0)},
            ValueError,
            r"Use MinSNR\(prediction_type='v_prediction'\)",
        ),
        ("edm", {"weighting": "minsnr"}, ValueError, "weighting is 'minsnr', expected one of"),
        ("edm", {"bin": 3}, TypeError, "bin"),
        ("edm", {"log_snr_range": 3}, ValueError, "log_snr_range is 3, expected two numbers"),
        ("edm", {"log_snr_range": (5.0, -5.0)}, ValueError, "expected finite low < high"),
    ],
)
def test_what_does_not_fit_is_named(
    described: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        for_process(described, **options)


# Weightings by name whose formula depends on the form of the loss

SNR_NAMES = [name for name in vadiff.weighting.available() if vadiff.weighting.takes_prediction_type(name)]
LEVELS = torch.tensor([-3.0, 0.0, 2.0, 6.0])


@pytest.mark.parametrize("name", SNR_NAMES)
def test_a_name_whose_form_nothing_says_is_refused_with_the_line_to_write(name: str) -> None:
    criterion = vadiff.DiffusionLoss(name)
    prediction, target = torch.ones(4, 3, requires_grad=True), torch.zeros(4, 3)
    line = re.escape(f'from_name({name!r}, prediction_type="epsilon")')
    with pytest.raises(ValueError, match=f"weighting is {name!r}.*{line}.*coefficients="):
        criterion(prediction, target, LEVELS)
    with pytest.raises(ValueError, match=f"weighting is {name!r}"):
        criterion.reweight(torch.ones(4), LEVELS)
    assert criterion.weights.isnan().all()
    assert name in repr(criterion)
    assert criterion.statistics.count.sum() == 0
    copy.deepcopy(pickle.loads(pickle.dumps(criterion))).summary()


@pytest.mark.parametrize("form", vadiff.process.PREDICTION_TYPES)
def test_coefficients_say_the_form(form: str) -> None:
    """EDM's residual is the error of x0, "sample"."""
    criterion = vadiff.DiffusionLoss("min_snr")
    sigma = (-0.5 * LEVELS).exp() if form == "edm" else (-LEVELS).sigmoid().sqrt()
    alpha = 1.0 if form == "edm" else LEVELS.sigmoid().sqrt()
    prediction, x0, noise = torch.randn(3, 4, 5)
    prediction.requires_grad_()
    abc = vadiff.process.coefficients(form, alpha, sigma)
    expected = vadiff.weighting.MinSNR(prediction_type="sample" if form == "edm" else form)
    losses = [
        made(prediction, x0, LEVELS, noise=noise, coefficients=abc)
        for made in (criterion, vadiff.DiffusionLoss(expected))
    ]
    assert torch.equal(*losses)
    assert criterion.weighting == expected


def test_coefficients_say_the_form_in_compiled_code_too() -> None:
    criterion = vadiff.DiffusionLoss("min_snr")
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    prediction, x0, noise = torch.randn(3, 4, 5)
    found = compiled(prediction, x0, LEVELS, noise=noise, coefficients=(1.0, 0.0, -1.0))
    expected = vadiff.DiffusionLoss(vadiff.weighting.MinSNR(prediction_type="epsilon"))(prediction, noise, LEVELS)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", vadiff.process.PREDICTION_TYPES)
def test_a_compiled_step_leaves_the_form_for_the_reads(form: str) -> None:
    """With coefficients that are computed inside, and no second compilation."""
    criterion = vadiff.DiffusionLoss("min_snr")
    compilations = []

    def backend(module, inputs):
        compilations.append(module)
        return module.forward

    @functools.partial(torch.compile, fullgraph=True, backend=backend)
    def step(prediction, x0, noise, log_snr):
        sigma = (-0.5 * log_snr).exp() if form == "edm" else (-log_snr).sigmoid().sqrt()
        abc = vadiff.process.coefficients(form, 1.0 if form == "edm" else log_snr.sigmoid().sqrt(), sigma)
        return criterion(prediction, x0, log_snr, noise=noise, coefficients=abc)

    prediction, x0, noise = torch.randn(3, 4, 5)
    for _ in range(3):
        step(prediction.requires_grad_(), x0, noise, LEVELS)
    expected = vadiff.DiffusionLoss(vadiff.weighting.MinSNR(prediction_type="sample" if form == "edm" else form))
    assert torch.equal(criterion.weights, expected.weights)
    assert "MinSNR" in criterion.summary()
    assert len(compilations) <= 2  # the first call creates `_last`


def test_coefficients_as_arguments_of_a_compiled_step_say_the_form_too() -> None:
    criterion = vadiff.DiffusionLoss("min_snr")
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    prediction, x0, noise = torch.randn(3, 4, 5)
    abc = vadiff.process.coefficients("v_prediction", LEVELS.sigmoid().sqrt(), (-LEVELS).sigmoid().sqrt())
    compiled(prediction.requires_grad_(), x0, LEVELS, noise=noise, coefficients=abc)
    assert criterion.weighting.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "abc",
    [
        (1.0, 0.3, -0.1),
        (1.0, torch.ones(4), -torch.ones(4)),  # a flow's, as numbers
        (1.0, (-LEVELS).sigmoid().sqrt(), -LEVELS.sigmoid().sqrt()),
        (torch.ones(4), torch.zeros(4), torch.ones(4)),
    ],
    ids=["none", "flow", "v", "tensors"],
)
def test_coefficients_that_do_not_show_the_form_are_refused(abc) -> None:
    prediction, x0, noise = torch.randn(3, 4, 5)
    with pytest.raises(ValueError, match=r"weighting is 'min_snr'.*coefficients=vadiff\.process\.coefficients"):
        vadiff.DiffusionLoss("min_snr")(prediction, x0, LEVELS, noise=noise, coefficients=abc)


@pytest.mark.parametrize(("b", "c", "form"), [(0.0, -1.0, "epsilon"), (-1.0, 0.0, "sample"), (1.0, -1.0, "flow")])
def test_a_factor_of_the_prediction_does_not_change_the_form(b: float, c: float, form: str) -> None:
    for a in (1.0, torch.ones(4), torch.full((4,), 0.5), -2.0):
        assert vadiff.process.form_of((a, b, c)) == form


def test_a_call_in_another_form_is_refused() -> None:
    criterion = vadiff.DiffusionLoss("min_snr")
    prediction, x0, noise = torch.randn(3, 4, 5)
    criterion(prediction.requires_grad_(), x0, LEVELS, noise=noise, coefficients=(1.0, 0.0, -1.0))
    with pytest.raises(ValueError, match=r"in the form 'epsilon', and this one is in the form 'flow'"):
        criterion(prediction, x0, LEVELS, noise=noise, coefficients=(1.0, 1.0, -1.0))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(criterion)))
    assert torch.equal(copied.weights, criterion.weights)


def test_a_weighting_of_unknown_form_has_no_parameters_and_changes_no_levels() -> None:
    criterion = vadiff.DiffusionLoss("min_snr", bins=8)
    with pytest.raises(AttributeError, match=r"'gamma': the weighting is 'min_snr' of a form not known yet"):
        criterion.weighting.gamma  # noqa: B018
    with pytest.raises(ValueError, match="weighting is 'min_snr'"):
        vadiff.levels.SecondMoment(bins=8).update(criterion)
    prediction, x0, noise = torch.randn(3, 4, 5)
    criterion(prediction.requires_grad_(), x0, LEVELS, noise=noise, coefficients=(1.0, 0.0, -1.0))
    assert criterion.weighting.gamma == 5.0
    vadiff.levels.SecondMoment(bins=8).update(criterion)


@pytest.mark.parametrize("name", ["edm", "monotonic_edm", "soft_min_snr"])
def test_a_name_that_contains_the_std_of_the_data_does_not_guess_it_from_edm_s_coefficients(name: str) -> None:
    abc = vadiff.process.coefficients("edm", 1.0, (-0.5 * LEVELS).exp(), sigma_data=1.0)
    prediction, x0, noise = torch.randn(3, 4, 5)
    with pytest.raises(ValueError, match=r"standard deviation of the data.*sigma_data=\.\.\."):
        vadiff.DiffusionLoss(name)(prediction, x0, LEVELS, noise=noise, coefficients=abc)


def test_soft_min_snr_by_name_follows_the_scheduler_of_an_integration() -> None:
    scheduler: Any = diffusers.EDMEulerScheduler(sigma_data=1.0)
    criterion = vadiff.DiffusionLoss("soft_min_snr")
    prediction, x0, noise = torch.randn(3, 4, 5)
    scheduler_loss(criterion, scheduler, prediction.requires_grad_(), x0, noise, scheduler.timesteps[:4])
    assert criterion.weighting == vadiff.DiffusionLoss.for_process(scheduler, weighting="soft_min_snr").weighting
    assert criterion.weighting.gamma == 1.0


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.2])
def test_soft_min_snr_by_name_follows_the_std_of_the_data(sigma_data: float) -> None:
    named = vadiff.weighting.from_name("soft_min_snr", prediction_type="edm", sigma_data=sigma_data)
    assert named == vadiff.weighting.SoftMinSNR(1.0 / sigma_data**2, "edm", sigma_data)
    given = vadiff.weighting.from_name("soft_min_snr", prediction_type="edm", sigma_data=sigma_data, gamma=3.0)
    assert given == vadiff.weighting.SoftMinSNR(3.0, "edm", sigma_data)
    scheduler = diffusers.EDMEulerScheduler(sigma_data=sigma_data)
    criterion = vadiff.DiffusionLoss.for_process(scheduler, weighting="soft_min_snr")
    assert criterion.weighting == vadiff.weighting.SoftMinSNR(1.0 / sigma_data**2, "sample", sigma_data)

"""Processes and predictions of the trainer: losses by the formula, denoisers, timesteps, zero terminal SNR."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vadiff
from vadiff import levels, weighting
from vadiff.errors import DiffusionLossWarning
from vadiff.log_snr import from_sigma
from vadiff.models import PREDICTIONS, Denoiser, parameterisation
from vadiff.models.parameterisation import VP, vp_process
from vadiff.process import DiscreteVP, VPCosine, VPLinear, VPScaledLinear, edm_preconditioning, loss_ratio
from vadiff.trainer.training.assembly import build_criterion, build_levels, training_criterion
from vadiff.trainer.training.held_out import held_out_log_snr
from vadiff.trainer.training.objective import objective_of
from vadiff.training import TrainConfig, train

PAIRS = [(process, prediction) for process, predictions in PREDICTIONS.items() for prediction in predictions]
SIGMA_DATA = 0.75
TINY = TrainConfig(
    model="edm2", steps=3, batch_size=8, channels=(8, 16), log_every=1, held_out_images=10, held_out_levels=2,
    tensorboard=False, device="cpu", weighting="constant",
)  # fmt: skip


class Network(nn.Module):
    """Some function of its inputs that is the same in float32 and float64."""

    def forward(self, scaled: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return (scaled + 0.1 * c_noise.view(-1, 1, 1, 1)).sin()


def target_of(prediction: str, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """What the output is regressed on, by definition. float64."""
    if prediction == "edm":  # F of a perfect denoiser
        scale = edm_preconditioning(sigma, SIGMA_DATA)
        return (x0 - scale.c_skip.view(-1, 1, 1, 1) * (x0 + sigma.view(-1, 1, 1, 1) * eps)) / scale.c_out.view(
            -1, 1, 1, 1
        )
    alpha, noise = 1.0 / (1.0 + sigma**2).sqrt(), sigma / (1.0 + sigma**2).sqrt()
    v = alpha.view(-1, 1, 1, 1) * eps - noise.view(-1, 1, 1, 1) * x0
    return {"epsilon": eps, "sample": x0, "v_prediction": v, "flow": eps - x0}[prediction]


@pytest.mark.parametrize(("process", "prediction"), PAIRS)
def test_loss_and_denoiser_are_those_of_the_definition(process: str, prediction: str) -> None:
    """The loss is the mean squared error of the prediction in float64, and D is x0 where the prediction is perfect."""
    config = dataclasses.replace(TINY, process=process, prediction=prediction, sigma_data=SIGMA_DATA)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 1, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.3, 1.0, 2.0, 9.0, 40.0], dtype=torch.float64)
    denoiser = Denoiser(Network(), SIGMA_DATA, process=config.form())
    output = denoiser.training_output(x0, eps, sigma)
    noisy = x0 + sigma.view(-1, 1, 1, 1) * eps
    torch.testing.assert_close(output, denoiser.network_output(noisy, sigma), rtol=1e-9, atol=1e-9)

    target = target_of(prediction, x0, eps, sigma)
    expected = (output - target).square().mean()
    criterion = build_criterion(config)
    loss = objective_of(config)(criterion, output, x0, eps, sigma, SIGMA_DATA, None)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    # The same with a float32 network's output, as in training.
    single = objective_of(config)(criterion, output.float(), x0.float(), eps.float(), sigma.float(), SIGMA_DATA, None)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=0.0)

    scale = denoiser.form.preconditioning(sigma)
    perfect = scale.c_skip.view(-1, 1, 1, 1) * noisy + scale.c_out.view(-1, 1, 1, 1) * target
    torch.testing.assert_close(perfect, x0, rtol=1e-9, atol=1e-9)
    # k: the error of the output is k times that of x0.
    k = loss_ratio(denoiser.prediction, from_sigma(sigma), sigma_data=SIGMA_DATA)
    own = (output - target).square().flatten(1).mean(1)
    of_x0 = (denoiser(noisy, sigma) - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(own, k * of_x0, rtol=1e-8, atol=0.0)


VP_LOSS = {"process": "vp_linear", "timesteps": 0, "levels_options": {"t_min": 1e-5}}
VE_LOSS = {
    "process": "edm", "levels": "log_uniform", "levels_options": {"sigma_min": 0.02, "sigma_max": 100.0},
    "weighting": "snr",
}  # fmt: skip
IDDPM_LOSS = {"process": "vp_cosine", "timesteps": 1000}


def sigmas_of_table_1(name: str, u: Tensor) -> Tensor:
    """Noise levels of EDM's table 1 for its three earlier methods, at uniform numbers u, rising in u. float64."""
    if name == "VP":  # t ~ U(1e-5, 1), beta_d = 19.9, beta_min = 0.1
        t = 1e-5 + (1.0 - 1e-5) * u
        return torch.expm1(0.5 * 19.9 * t**2 + 0.1 * t).sqrt()
    if name == "VE":  # ln sigma ~ U(ln 0.02, ln 100)
        return (math.log(0.02) + u * math.log(100.0 / 0.02)).exp()
    count, c1, c2 = 1000, 0.001, 0.008  # sigma = u_j, j ~ U{0, M - 1}
    alpha_bar = [math.sin(0.5 * math.pi * j / (count * (c2 + 1.0))) ** 2 for j in range(count + 1)]
    found = [0.0]  # u_M, u_(M-1), ...
    for j in range(count, 0, -1):
        found.append(math.sqrt((found[-1] ** 2 + 1.0) / max(alpha_bar[j - 1] / alpha_bar[j], c1) - 1.0))
    return torch.tensor(found[1:], dtype=torch.float64)[(u * count).long()]


@pytest.mark.parametrize(("name", "fields"), [("VP", VP_LOSS), ("VE", VE_LOSS), ("iDDPM", IDDPM_LOSS)])
def test_losses_of_vp_ve_and_iddpm_are_those_of_edms_table_1(name: str, fields: dict[str, Any]) -> None:
    """lambda(sigma)·|D - x0|², lambda = 1/sigma² in all three, and their levels; arXiv 2206.00364, table 1."""
    config = dataclasses.replace(TINY, sigma_data=0.5, **fields).resolved()
    u = levels.uniforms(64, torch.Generator().manual_seed(0))
    sigma = sigmas_of_table_1(name, u)
    drawn = build_levels(config)(u).sigma
    torch.testing.assert_close(drawn.double(), sigma, rtol=1e-5, atol=0.0)
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 64, 1, 4, 4, generator=generator, dtype=torch.float64)
    denoiser = Denoiser(Network(), 0.5, process=config.form())
    output = denoiser.training_output(x0, eps, sigma)
    error = (denoiser(x0 + sigma.view(-1, 1, 1, 1) * eps, sigma) - x0).square().flatten(1).mean(1)
    loss = objective_of(config)(build_criterion(config), output, x0, eps, sigma, 0.5, None)
    torch.testing.assert_close(loss, (error / sigma**2).mean(), rtol=1e-6, atol=0.0)
    if name != "VE":  # its network here has EDM's preconditioning
        scale = denoiser.form.preconditioning(sigma)
        torch.testing.assert_close(scale.c_in, 1.0 / (sigma**2 + 1.0).sqrt())
        assert (scale.c_skip == 1.0).all()
        torch.testing.assert_close(scale.c_out, -sigma)


@pytest.mark.parametrize("process", list(VP))
def test_discrete_timesteps_and_continuous_time_agree(process: str) -> None:
    """A thousand steps are close to the limit: log-SNR, levels drawn, and what the network is told."""
    table, limit = vp_process(process, 1000), vp_process(process)
    assert isinstance(table, DiscreteVP)
    at = torch.tensor([9.0, 99.0, 499.0, 899.0], dtype=torch.float64)
    torch.testing.assert_close(table.log_snr(at), limit.log_snr((at + 1.0) / 1000.0), rtol=0.0, atol=0.06)
    u = levels.uniforms(4000, torch.Generator().manual_seed(0), stratified=True)
    discrete = levels.UniformTimesteps(table)(u).log_snr.sort().values
    continuous = levels.UniformTime(limit)(u).log_snr.sort().values
    middle = slice(200, 3800)
    torch.testing.assert_close(discrete[middle], continuous[middle], rtol=0.0, atol=0.15)
    forms = [parameterisation(process, timesteps=timesteps) for timesteps in (1000, None)]
    sigma = torch.tensor([0.1, 1.0, 5.0])
    told = [form.preconditioning(sigma).c_noise for form in forms]
    torch.testing.assert_close(told[0], told[1], rtol=0.0, atol=0.02)


@pytest.mark.parametrize("make", [VPLinear, VPCosine, VPScaledLinear])
def test_time_inverts_log_snr(make: type[Any]) -> None:
    times = torch.linspace(1e-4, 1.0 - 1e-4, 101, dtype=torch.float64)
    torch.testing.assert_close(make().time(make().log_snr(times)), times, rtol=1e-9, atol=1e-12)


def test_tables_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="compared with diffusers' schedulers: pip install diffusers")
    kinds = {
        "linear": (DiscreteVP.linear(), {}),
        "scaled_linear": (DiscreteVP.scaled_linear(), {"beta_start": 0.00085, "beta_end": 0.012}),
        "squaredcos_cap_v2": (DiscreteVP.cosine(), {}),
    }
    for schedule, (ours, options) in kinds.items():
        scheduler = diffusers.DDPMScheduler(1000, beta_schedule=schedule, **options)
        torch.testing.assert_close(ours.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
        rescaled = diffusers.DDPMScheduler(1000, beta_schedule=schedule, rescale_betas_zero_snr=True, **options)
        ours = ours.with_zero_terminal_snr()
        assert ours.alphas_cumprod[-1] == 0.0
        torch.testing.assert_close(ours.alphas_cumprod[:-1].float(), rescaled.alphas_cumprod[:-1], rtol=1e-3, atol=1e-7)


def test_every_timestep_is_drawn_equally_often_and_read_back() -> None:
    for process in (DiscreteVP.linear(50), DiscreteVP.cosine(50).with_zero_terminal_snr()):
        u = levels.uniforms(500, torch.Generator().manual_seed(0), stratified=True)
        log_snr = levels.UniformTimesteps(process)(u).log_snr
        assert process.timestep(log_snr).bincount(minlength=50).tolist() == [10] * 50
        every = torch.arange(50, dtype=torch.float64)
        assert torch.equal(process.timestep(process.log_snr(every)), every.long())
        torch.testing.assert_close(process.time(process.log_snr(every)), every, rtol=0.0, atol=1e-9)


def test_adaptive_levels_start_from_uniform_timesteps() -> None:
    config = dataclasses.replace(TINY, process="vp_linear", levels="second_moment")
    sampler = build_levels(config)
    u = levels.uniforms(2000, torch.Generator().manual_seed(0), stratified=True)
    process = vp_process("vp_linear", 1000)
    assert isinstance(process, DiscreteVP)
    counts = process.timestep(sampler(u).log_snr).bincount(minlength=1000)
    assert counts.max() <= 4
    assert counts.sum() == 2000


def test_training_says_that_a_weighting_leaves_the_terminal_step_untrained() -> None:
    config = dataclasses.replace(TINY, process="vp_linear", prediction="v_prediction", zero_terminal_snr=True)
    with pytest.warns(DiffusionLossWarning, match="SoftMinSNR for 'v_prediction' is 0 at zero SNR.*not trained"):
        training_criterion(dataclasses.replace(config, weighting="soft_min_snr"), None, None)
    for weighting_name in ("min_snr", "constant", "variance_aware"):  # min_snr is 1 there in the trainer
        training_criterion(dataclasses.replace(config, weighting=weighting_name), None, None)


def test_a_network_is_told_no_time_beyond_the_last_one() -> None:
    for timesteps, last in ((1000, 9.99), (None, 9.99)):
        for process in VP:
            form = parameterisation(process, timesteps=timesteps)
            told = form.preconditioning(torch.tensor([1.0, 1e6], dtype=torch.float64)).c_noise
            assert told[1].item() == pytest.approx(last, abs=1e-3 if process == "vp_cosine" else 1e-9)
            assert told[0] < told[1]


def test_held_out_levels_are_those_that_the_process_has() -> None:
    """Stable Diffusion's betas have sigma 0.029 to 14.6; every other process has all of 0.02 to 20."""
    for process in ("edm", "flow", "vp_linear", "vp_cosine"):
        config = dataclasses.replace(TINY, process=process)
        assert config.held_out_range() == config.held_out_sigma == (0.02, 20.0)
    config = dataclasses.replace(TINY, process="vp_scaled_linear", held_out_levels=5)
    sigmas = (-0.5 * held_out_log_snr(config)).exp()
    assert sigmas[[0, -1]].tolist() == pytest.approx([0.029167, 14.6146], rel=1e-4)
    times = vp_process("vp_scaled_linear", 1000).time(held_out_log_snr(config))
    assert times[[0, -1]].tolist() == pytest.approx([0.0, 999.0], abs=1e-6)
    assert dataclasses.replace(config, timesteps=0).held_out_range()[0] == 0.02
    with pytest.raises(
        ValueError, match=r"held_out_sigma is \(15.0, 20.0\), expected a range that overlaps with 0.029"
    ):
        dataclasses.replace(config, held_out_sigma=(15.0, 20.0))


def test_options_of_uniform_levels_are_shares_of_the_timesteps() -> None:
    config = dataclasses.replace(TINY, process="vp_linear", timesteps=40, levels_options={"t_min": 0.25, "t_max": 0.75})
    sampler = build_levels(config)
    u = levels.uniforms(400, torch.Generator().manual_seed(0), stratified=True)
    process = DiscreteVP.linear(40)
    counts = process.timestep(sampler(u).log_snr).bincount(minlength=40)
    assert counts.tolist() == [0] * 10 + [20] * 20 + [0] * 10
    at = process.log_snr(torch.tensor([5.0, 19.5, 35.0], dtype=torch.float64))
    assert sampler.cdf(at).tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert sampler.log_density(at).isfinite().tolist() == [False, True, False]
    for options, message in (
        ({"t_max": 500.0}, "t_max is 500.0, expected at most 1"),
        ({"shift": 2.0}, "levels_options"),
    ):
        with pytest.raises(ValueError, match=message):
            build_levels(dataclasses.replace(config, levels_options=options))
    with pytest.raises(ValueError, match="expected one in continuous time: for timesteps use UniformTimesteps"):
        levels.UniformTime(process)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("terminal", [None, 0.0, 0.5])
def test_the_terminal_step_gets_the_gradient_that_is_stated(prediction: str, terminal: float | None) -> None:
    """At zero SNR x_t is eps: v is -x0. Min-SNR gives the step the weight 1, as its paper's code does, unless told."""
    config = dataclasses.replace(TINY, process="vp_linear", prediction=prediction, zero_terminal_snr=True)
    sampler = build_levels(config)
    assert sampler(torch.tensor([1.0 - 1e-9], dtype=torch.float64)).sigma.item() == math.inf
    x0, eps = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([math.inf, 1.0, math.inf])
    denoiser = Denoiser(Network(), SIGMA_DATA, process=config.form())
    torch.testing.assert_close(denoiser.form.network_input(x0, eps, sigma)[[0, 2]], eps[[0, 2]])
    assert bool(denoiser.training_output(x0, eps, sigma).isfinite().all())

    options = {} if terminal is None else {"terminal": terminal}
    weighted = dataclasses.replace(config, weighting="min_snr", weighting_options=options)
    output = torch.randn(3, 1, 4, 4, requires_grad=True)
    loss = objective_of(weighted)(build_criterion(weighted), output, x0, eps, sigma, SIGMA_DATA, None)
    (gradient,) = torch.autograd.grad(loss, output)
    target = -x0 if prediction == "v_prediction" else x0
    expected = (1.0 if terminal is None else terminal) * 2.0 * (output - target) / output.numel()
    torch.testing.assert_close(gradient[[0, 2]], expected[[0, 2]].detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("prediction", "options"),
    [
        ("epsilon", {}),
        ("epsilon", {"timesteps": 0}),
        ("epsilon", {"levels": "second_moment", "levels_every": 1, "weighting": "variance_aware"}),
        ("v_prediction", {"zero_terminal_snr": True}),
        ("v_prediction", {"levels": "gap", "weighting": "gap"}),
        ("sample", {"zero_terminal_snr": True, "timesteps": 50, "levels": "second_moment", "levels_every": 1}),
        ("sample", {"levels": "log_normal"}),
    ],
    ids=str,
)
def test_runs_of_vp_processes_train_and_are_opened(prediction: str, options: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, process="vp_cosine", prediction=prediction, **options)
    trained = train(config, out=tmp_path, progress=False)
    assert all(math.isfinite(line["loss"]) for line in trained.metrics)
    opened = vadiff.training.open_run(tmp_path)
    assert opened.config.levels == options.get("levels", "uniform_time")
    noisy, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0])
    with torch.no_grad():
        torch.testing.assert_close(opened.denoiser()(noisy, sigma), trained.denoiser(noisy, sigma))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": "vp_linear", "prediction": "flow"}, "prediction is 'flow', expected epsilon or v_prediction or"),
        ({"process": "edm", "prediction": "epsilon"}, "prediction is 'epsilon', expected edm"),
        ({"process": "flow", "zero_terminal_snr": True}, "zero_terminal_snr is true"),
        ({"process": "vp_linear", "timesteps": 0, "zero_terminal_snr": True, "prediction": "sample"}, "zero_terminal"),
        ({"process": "vp_linear", "zero_terminal_snr": True}, "prediction is epsilon, expected v_prediction or sample"),
        ({"process": "vp_linear", "timesteps": 1}, "timesteps is 1"),
        ({"process": "edm", "timesteps": 50}, "timesteps is 50, expected 1000, the default: edm has no timesteps"),
        ({"process": "flow", "timesteps": 0}, "timesteps is 0, expected 1000, the default: flow has no timesteps"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


def test_tables_that_are_no_process_are_refused() -> None:
    for table in (torch.tensor([0.9]), torch.tensor([0.5, 0.6]), torch.tensor([1.0, 0.5]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            DiscreteVP(table)
    with pytest.raises(TypeError, match="process is VPLinear"):
        levels.UniformTimesteps(VPLinear())
    with pytest.raises(ValueError, match="terminal is -1"):
        weighting.MinSNR(terminal=-1.0)

"""vadiff.sampling: the solvers, their noise levels, labels, guidance, clipping, several devices."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from vadiff.models import PREDICTIONS, Denoiser, parameterisation
from vadiff.models.parameterisation import VP, VPForm, sigma_range
from vadiff.process import DiscreteVP
from vadiff.sampling import (
    Churn,
    ddpm,
    dpmpp_2m,
    draw,
    euler,
    flow_levels,
    heun,
    network_calls,
    noise_levels,
    steps_for_calls,
)
from vadiff.sampling.generation import default_generation, solve, with_options
from vadiff.sampling.solvers import SOLVERS

SIGMA_DATA = 0.5
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def gaussian_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The best denoiser there is for data ~ N(0, SIGMA_DATA²)."""
    shrink = SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2)
    return x * shrink.view(-1, *[1] * (x.dim() - 1))


def exact_samples(seeds: range, shape: tuple[int, ...]) -> Tensor:
    """Where the exact flow of `gaussian_denoiser` takes each seed's noise: it keeps x / √(σ² + SIGMA_DATA²)."""
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return 80.0 * noise * SIGMA_DATA / math.sqrt(80.0**2 + SIGMA_DATA**2)


@pytest.mark.parametrize("solver", [heun, dpmpp_2m])
def test_samples_follow_the_exact_flow_of_gaussian_data(solver: Callable[..., Tensor]) -> None:
    samples = solver(gaussian_denoiser, (2, 3), range(50), levels=noise_levels(steps=64))
    assert torch.allclose(samples, exact_samples(range(50), (2, 3)), rtol=0.01)


@pytest.mark.parametrize(("solver", "order"), [(heun, 2), (euler, 1), (dpmpp_2m, 2)])
def test_error_falls_with_the_order_of_the_solver(solver: Callable[..., Tensor], order: int) -> None:
    exact = exact_samples(range(10), (4,))
    errors = [
        (solver(gaussian_denoiser, (4,), range(10), levels=noise_levels(steps)) - exact).abs().max().item()
        for steps in (64, 128)
    ]
    assert errors[0] / errors[1] == pytest.approx(2.0**order, rel=0.25)


@every_solver
def test_samples_have_the_mean_and_spread_of_gaussian_data(solver: Callable[..., Tensor]) -> None:
    mean = torch.tensor([0.3, -0.7]).repeat(2000)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return mean + gaussian_denoiser(x - mean, sigma)

    samples = solver(denoise, (4000,), range(4), levels=noise_levels(steps=512)).view(-1, 2)
    error = SIGMA_DATA / math.sqrt(len(samples))  # of the mean, one standard deviation
    assert (samples.mean(0) - mean[:2]).abs().max() < 3 * error
    assert samples.std(0).tolist() == pytest.approx([SIGMA_DATA, SIGMA_DATA], rel=0.03)
    assert abs(torch.corrcoef(samples.T)[0, 1].item()) < 3 / math.sqrt(len(samples))


class IdealNetwork(torch.nn.Module):
    """The best eps, v or x0, made of x_t and the time alone that the network is told.

    The data are rows of 16 pixels: 0.1 + one number ~ N(0, 1) for the whole row + 0.3·N(0, 1) for each pixel.
    """

    def __init__(self, form: VPForm) -> None:
        super().__init__()
        self.form = form

    def forward(self, x_t: Tensor, c_noise: Tensor) -> Tensor:
        process, timestep = self.form.process, 100.0 * c_noise.double()
        time = timestep if isinstance(process, DiscreteVP) else (timestep + 1.0) / 1000.0
        alpha, noise = (part(time).view(-1, 1, 1, 1) for part in (process.alpha, process.sigma))
        x = x_t.double()
        level, own = self.level_and_own(x - alpha * 0.1)
        x0 = 0.1 + sum(
            alpha * variance / (alpha**2 * variance + noise**2) * part
            for variance, part in ((16.0 + 0.09, level), (0.09, own))
        )
        eps = (x - alpha * x0) / noise
        return {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - noise * x0}[self.form.prediction].float()

    @staticmethod
    def level_and_own(x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of each row, and the differences from it."""
        level = x.mean(-1, keepdim=True)
        return level, x - level


@every_solver
@pytest.mark.parametrize("timesteps", [1000, None])
@pytest.mark.parametrize("process", VP)
def test_ideal_networks_of_vp_processes_are_sampled_with_the_moments_of_the_data(
    process: str, timesteps: int | None, solver: Callable[..., Tensor]
) -> None:
    """From the default noise levels of a run: every one is a time that the process has."""
    name = solver.__name__
    steps = {"heun": 32, "dpmpp_2m": 32, "euler": 96, "ddpm": 192}[name]
    samples = {}
    for prediction in PREDICTIONS[process]:
        form = parameterisation(process, prediction, timesteps=timesteps)
        assert isinstance(form, VPForm)
        generation = with_options(default_generation(process, name, sigmas=sigma_range(form)), steps=steps)
        denoiser = Denoiser(IdealNetwork(form), 0.5, image_shape=(1, 128, 16), process=form)
        samples[prediction] = solve(denoiser, range(16), generation, torch.device("cpu"))
        level, own = IdealNetwork.level_and_own(samples[prediction])
        assert level.mean().item() == pytest.approx(0.1, abs=0.07)
        # 0.96, and a lower mean, from sigma 14.6, where x_t still has some signal, which noise alone lacks.
        assert level.std().item() == pytest.approx((1.0 + 0.09 / 16) ** 0.5, rel=0.06)
        assert own.std().item() == pytest.approx(0.3 * (15 / 16) ** 0.5, rel=0.04)
    for drawn in samples.values():
        torch.testing.assert_close(drawn, samples["epsilon"], rtol=0.0, atol=0.02)


def test_ancestral_sampling_forgets_the_noise_that_it_began_with() -> None:
    samples = ddpm(gaussian_denoiser, (4000,), range(2), levels=noise_levels(steps=64))
    start = euler(gaussian_denoiser, (4000,), range(2), levels=noise_levels(steps=64))
    assert abs(torch.corrcoef(torch.stack([samples.flatten(), start.flatten()]))[0, 1].item()) < 0.1


@every_solver
def test_network_is_called_as_often_as_is_said(solver: Callable[..., Tensor]) -> None:
    name = solver.__name__
    seen: list[float] = []

    def record(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma[0].item())
        return gaussian_denoiser(x, sigma)

    solver(record, (1,), [0], levels=noise_levels(steps_for_calls(name, 15)))
    assert len(seen) == network_calls(name, steps_for_calls(name, 15)) == 15
    assert network_calls(name, steps_for_calls(name, 50)) in (49, 50)


@every_solver
def test_a_step_of_constant_estimates_ends_on_the_straight_line_to_them(solver: Callable[..., Tensor]) -> None:
    samples = solver(lambda x, sigma: torch.full_like(x, 0.25), (3,), [1, 2])
    assert torch.allclose(samples, torch.full((2, 3), 0.25), atol=1e-6)


@every_solver
def test_clipping_keeps_every_estimate_in_the_range_of_images(solver: Callable[..., Tensor]) -> None:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return 3.0 * x.sign()

    seen = solver(denoise, (8,), range(4), clip=True)
    assert torch.equal(seen.abs(), torch.ones(4, 8))
    assert solver(denoise, (8,), range(4)).abs().max() > 2.0


def test_euler_is_the_method_of_flow_matching_on_its_evenly_spaced_times() -> None:
    times = torch.linspace(1000.0 / 1001.0, 0.0, 21, dtype=torch.float64)
    x = times[0] * torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in range(5)])
    for time, following in itertools.pairwise(times):  # dx_t/dt = (x_t - D) / t, x_t = (1 - t)·x
        sigma = time / (1.0 - time)
        x0 = gaussian_denoiser((x / (1.0 - time)).float(), sigma.float().expand(5)).double()
        x = x + (following - time) * (x - x0) / time
    samples = euler(gaussian_denoiser, (6,), range(5), levels=flow_levels(20))
    assert torch.allclose(samples, x.float(), rtol=1e-5, atol=1e-6)


def test_network_is_called_twice_per_step_of_heun_but_once_in_the_last() -> None:
    seen: list[float] = []

    def record(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == sigma.dtype == torch.float32
        assert sigma.shape == (2,)
        seen.append(sigma[0].item())
        return gaussian_denoiser(x, sigma)

    heun(record, (1,), [0, 1], levels=torch.tensor([2.0, 1.0, 0.5, 0.0]))
    assert seen == [2.0, 1.0, 1.0, 0.5, 0.5]


def test_no_gradient_is_recorded() -> None:
    scale = torch.ones((), requires_grad=True)
    assert not heun(lambda x, sigma: scale * x, (1,), [0]).requires_grad


def test_no_seeds_give_no_samples() -> None:
    assert heun(gaussian_denoiser, (1, 8, 8), []).shape == (0, 1, 8, 8)


def test_noise_levels_are_the_papers() -> None:
    levels = noise_levels(steps=5, sigma_min=0.01, sigma_max=10.0, rho=7.0)
    roots = [10.0 ** (1 / 7) + i / 4 * (0.01 ** (1 / 7) - 10.0 ** (1 / 7)) for i in range(5)]
    assert levels.tolist() == pytest.approx([root**7 for root in roots] + [0.0])


def test_noise_levels_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="sigma_min is 2 and sigma_max 1, expected 0 < sigma_min < sigma_max"):
        noise_levels(sigma_min=2, sigma_max=1)
    with pytest.raises(ValueError, match="steps is 1, expected at least 2"):
        noise_levels(steps=1)


def test_stochastic_sampler_keeps_the_distribution_of_the_data() -> None:
    samples = heun(gaussian_denoiser, (4000,), range(4), levels=noise_levels(steps=256), churn=Churn(60.0))
    assert samples.std().item() == pytest.approx(SIGMA_DATA, rel=0.02)
    plain = heun(gaussian_denoiser, (4000,), range(4), levels=noise_levels(steps=64))
    assert torch.corrcoef(torch.stack([samples.flatten(), plain.flatten()]))[0, 1] < 0.5  # the start is forgotten


def test_churn_raises_sigma_between_its_limits_and_never_by_more_than_root_two() -> None:
    churn = Churn(10.0, sigma_min=0.1, sigma_max=50.0)
    assert churn.raised(1.0, steps=40) == pytest.approx(1.25)
    assert churn.raised(1.0, steps=2) == pytest.approx(math.sqrt(2.0))
    assert [churn.raised(sigma, 40) for sigma in (0.05, 60.0)] == [0.05, 60.0]


def test_one_step_with_churn_is_the_papers_algorithm() -> None:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x

    stream = torch.Generator().manual_seed(7)
    start, new = (torch.randn(3, generator=stream).double() for _ in range(2))
    sample = heun(denoise, (3,), [7], levels=torch.tensor([2.0, 0.0]), churn=Churn(0.2, noise=1.5))
    raised = 2.0 * 1.2
    x = 2.0 * start + math.sqrt(raised**2 - 2.0**2) * 1.5 * new
    assert torch.allclose(sample[0], (x + (0.0 - raised) * (x - 0.5 * x) / raised).float())


@pytest.mark.parametrize("sampler", [*SOLVERS.values(), functools.partial(heun, churn=Churn(20.0))])
def test_sample_of_a_seed_depends_on_nothing_but_seed_and_label(sampler: Callable[..., Tensor]) -> None:
    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = 0.0 if labels is None else labels.view(-1, 1, 1).float() / 10
        return gaussian_denoiser(x, sigma) + shift

    seeds, labels = [3, 1, 4, 1, 5], torch.tensor([0, 1, 2, 3, 4])
    together = sampler(denoise, (2, 3), seeds, labels=labels, guidance=2.0)
    in_pairs = sampler(denoise, (2, 3), seeds, labels=labels, guidance=2.0, batch_size=2)
    alone = sampler(denoise, (2, 3), [4], labels=torch.tensor([2]), guidance=2.0)
    assert torch.equal(together, in_pairs)
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together[1], together[3])  # same seed, another class


def test_guidance_extrapolates_from_the_unconditional_to_the_conditional_denoiser() -> None:
    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.full_like(x, 1.0 if labels is None else 2.0)

    def last(guidance: float) -> float:
        return heun(denoise, (1,), [0], labels=torch.tensor([1]), guidance=guidance).item()

    assert last(1.0) == pytest.approx(2.0)
    assert last(0.0) == pytest.approx(1.0)
    assert last(3.0) == pytest.approx(1.0 + 3.0 * (2.0 - 1.0))


def test_guidance_in_an_interval_is_at_its_noise_levels_only_and_calls_the_guide_there_alone() -> None:
    """Source: arXiv 2404.07724, eq. 6: w in (low, high], 1 elsewhere."""
    asked: list[float] = []

    def guide(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma[0].item())
        return 0.5 * x

    levels = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])
    found = euler(lambda x, sigma: 0.8 * x, (1,), [3], levels=levels, guide=guide, guidance=3.0, guided_sigma=(1, 4))
    assert asked == [4.0, 2.0]
    x = 8.0 * torch.randn(1, generator=torch.Generator().manual_seed(3)).double().item()
    for sigma, following in itertools.pairwise(levels.tolist()):
        x0 = (0.5 + 3.0 * (0.8 - 0.5)) * x if 1.0 < sigma <= 4.0 else 0.8 * x
        x = x0 + following / sigma * (x - x0)
    assert found.item() == pytest.approx(x, rel=1e-6)


def test_guide_takes_the_place_of_the_unconditional_denoiser_and_gets_the_labels() -> None:
    def denoise(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return torch.full_like(x, 2.0) + labels[:, None]

    def guide(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return torch.full_like(x, 1.5) + labels[:, None]

    sample = heun(denoise, (1,), [0], labels=torch.tensor([4]), guide=guide, guidance=3.0)
    assert sample.item() == pytest.approx(5.5 + 3.0 * (6.0 - 5.5))


@every_solver
def test_guide_that_is_the_denoiser_itself_changes_nothing(solver: Callable[..., Tensor]) -> None:
    plain = solver(gaussian_denoiser, (5,), range(3))
    guided = solver(gaussian_denoiser, (5,), range(3), guide=gaussian_denoiser, guidance=2.5)
    assert torch.equal(plain, guided)
    weaker = solver(gaussian_denoiser, (5,), range(3), guide=lambda x, sigma: 0.9 * x, guidance=2.5)
    assert not torch.allclose(plain, weaker, rtol=0.1)


def test_flow_levels_are_at_evenly_spaced_times_from_the_highest_level_to_zero() -> None:
    levels = flow_levels(4, sigma_max=4.0)
    assert (levels / (1.0 + levels)).tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert levels[0] == pytest.approx(4.0)


def test_several_devices_give_the_images_of_one() -> None:
    def sample(device: torch.device, seeds: Sequence[int]) -> Tensor:
        return heun(gaussian_denoiser, (2,), seeds, device=device)

    def drawn(devices: int, batch_size: int) -> Tensor:
        batches = dict(draw(sample, range(5, 18), [torch.device("cpu")] * devices, batch_size))
        return torch.cat([batches[start] for start in sorted(batches)])

    assert torch.equal(drawn(1, 100), drawn(3, 2))
    assert drawn(2, 4).shape == (13, 2)


def test_failure_on_one_device_is_raised_and_ends_the_others() -> None:
    begun: list[int] = []

    def sample(device: torch.device, seeds: Sequence[int]) -> Tensor:
        begun.append(seeds[0])
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(draw(sample, range(1000), [torch.device("cpu")], batch_size=1))
    assert begun == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Churn(-1.0), "churn amount is -1.0, expected 0 or a positive number"),
        (lambda: Churn(1.0, 2.0, 1.0), "churn sigma_min is 2.0 and sigma_max 1.0, expected"),
        (lambda: noise_levels(rho=0.0), "rho is 0.0, expected a positive number"),
        (lambda: flow_levels(0), "steps is 0, expected at least 1"),
        (lambda: flow_levels(5, math.inf), "sigma_max is inf, expected a positive number"),
        (lambda: steps_for_calls("heun", 0), "calls is 0, expected at least 1"),
        (
            lambda: euler(gaussian_denoiser, (1,), [0], levels=torch.tensor([1.0, 2.0, 0.0])),
            r"levels is \[1.0, 2.0, 0.0\], expected finite noise levels \[N \+ 1\] that fall and end in 0",
        ),
        (lambda: ddpm(gaussian_denoiser, (1,), [0], levels=torch.tensor([2.0, 1.0])), r"levels is \[2.0, 1.0\]"),
        (
            lambda: heun(gaussian_denoiser, (1,), [0], labels=torch.zeros(2)),
            r"labels has shape \(2,\), expected \(1,\)",
        ),
        (lambda: heun(gaussian_denoiser, (1,), [0], guidance=2.0), "guidance is 2.0 without labels"),
        (
            lambda: heun(gaussian_denoiser, (1,), [0], guided_sigma=(2.0, 1.0)),
            r"guided_sigma is \(2.0, 1.0\), expected a lower and a higher noise level",
        ),
        (lambda: list(draw(lambda device, seeds: torch.zeros(1), [0], [torch.device("cpu")], 0)), "batch_size is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

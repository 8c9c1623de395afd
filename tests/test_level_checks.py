"""vadiff.level_checks: what is no log-SNR is named, and what is a schedule in use is left alone."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import vadiff
from vadiff import levels, log_snr
from vadiff.errors import DiffusionLossWarning
from vadiff.integrations import flow_matching
from vadiff.level_checks import problem_with_levels
from vadiff.ops.problem import Bins
from vadiff.process import DiscreteVP
from vadiff.schedulers import log_snr_of

Draw = Callable[[int, torch.Generator], Tensor]  # number of samples → log-SNR

DEFAULT = Bins(128, -16.0, 16.0)
RANGES = {"default": DEFAULT, "edm": Bins(86, -9.0, 12.5), "flow": Bins(112, -14.0, 14.0), "tuned": Bins(56, -14, 14)}
LINEAR, SD, COSINE = DiscreteVP.linear(), DiscreteVP.scaled_linear(), DiscreteVP.cosine()


def normal(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g)


def uniform(n: int, g: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=g)


def steps(n: int, g: torch.Generator, first: int = 0, last: int = 999) -> Tensor:
    return torch.randint(first, last + 1, (n,), generator=g)


def edm(mean: float = -1.2, std: float = 1.2) -> Draw:
    return lambda n, g: -2.0 * (mean + std * normal(n, g))


def sigmas(n: int, g: torch.Generator) -> Tensor:
    return (-1.2 + 1.2 * normal(n, g)).exp()


def log_uniform(low: float, high: float) -> Draw:
    return lambda n, g: -2.0 * uniform(n, g, math.log(low), math.log(high))


def flow(shift: float = 1.0, low: float = 0.0, high: float = 1.0, data_at: int = 0) -> Draw:
    def draw(n: int, g: torch.Generator) -> Tensor:
        t = uniform(n, g, low, high)
        t = shift * t / (1.0 + (shift - 1.0) * t)
        return log_snr.from_flow_time(t, data_at)

    return draw


def logit_normal(mean: float, std: float, shift: float = 1.0) -> Draw:
    return lambda n, g: -2.0 * (mean + std * normal(n, g) + math.log(shift))


def table(process: DiscreteVP, first: int = 0, last: int = 999) -> Draw:
    return lambda n, g: process.log_snr(steps(n, g, first, last).double()).float()


def drawn_by(sampler: levels.LevelSampler) -> Draw:
    return lambda n, g: sampler(uniform(n, g)).log_snr


def kohya_flow() -> Draw:
    """sd-scripts' whole timesteps of a flow, which stand for the middle of a step."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return lambda n, g: log_snr_of(scheduler, steps(n, g).float() + 0.5)


def scheduled(name: str, timesteps: int | None = None, **options: Any) -> Draw:
    """A scheduler's levels; with `timesteps` after `set_timesteps`, before which some take none."""
    scheduler = getattr(diffusers, name)(**options)
    if timesteps is not None:
        scheduler.set_timesteps(timesteps)

    def draw(n: int, g: torch.Generator) -> Tensor:
        times = getattr(scheduler, "timesteps", None)
        if times is None or isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
            return log_snr_of(scheduler, steps(n, g))
        times = torch.as_tensor(times)
        return log_snr_of(scheduler, times[torch.randint(0, len(times), (n,), generator=g)].float())

    return draw


def one_of(*values: float) -> Draw:
    return lambda n, g: torch.tensor(values)[torch.randint(0, len(values), (n,), generator=g)]


def v_of(draw: Draw, share: float, value: float) -> Draw:
    """Some samples at another value."""
    return lambda n, g: torch.where(uniform(n, g) < share, value, draw(n, g))


RIGHT: dict[str, Draw] = {
    "EDM": edm(),
    "EDM2": edm(-0.4, 1.0),
    "EDM, latent": edm(1.0, 1.6),
    "EDM, wide": edm(-1.2, 2.0),
    "Karras' sigmas, log-uniform": log_uniform(0.002, 80.0),
    "VE, sigma up to 1348": log_uniform(0.01, 1348.0),
    "clean images only, sigma .002 to .3": log_uniform(0.002, 0.3),
    "clean images only, sigma .002 to .1": log_uniform(0.002, 0.1),
    "sigma below 1": log_uniform(0.002, 1.0),
    "sigma .65 to .95": log_uniform(0.65, 0.95),
    "noise only, sigma 10 to 80": log_uniform(10.0, 80.0),
    "flow": flow(),
    "flow, data at 1": flow(data_at=1),
    "flow, shift 3": flow(3.0),
    "flow, shift 8": flow(8.0),
    "flow, low noise half": flow(low=0.0, high=0.5),
    "flow, high noise half": flow(low=0.5, high=1.0),
    "flow, a tenth": flow(low=0.4, high=0.5),
    "flow, nearly clean": flow(low=0.0, high=0.1),
    "SD3": logit_normal(0.0, 1.0, 3.0),
    "Flux, shift 8": logit_normal(0.0, 1.0, 8.0),
    "logit-normal, low noise": logit_normal(-1.0, 0.5, 0.25),
    "linear": table(LINEAR),
    "linear, t below 300": table(LINEAR, 0, 299),
    "linear, t below 40": table(LINEAR, 0, 39),
    "linear, t above 700": table(LINEAR, 700, 999),
    "Stable Diffusion": table(SD),
    "Stable Diffusion, t below 20": table(SD, 0, 19),
    "cosine": table(COSINE),
    "cosine, t below 500": table(COSINE, 0, 499),
    "zero terminal SNR": table(SD.with_zero_terminal_snr()),
    "a tenth at zero SNR": v_of(table(LINEAR), 0.1, -math.inf),
    "a tenth clean": v_of(edm(), 0.1, math.inf),
    "all at zero SNR": one_of(-math.inf),
    "one level": one_of(0.5),
    "one level at lambda 0": one_of(0.0),
    "one level at sigma .002": one_of(12.43),
    "four levels": one_of(-8.76, -3.0, 0.4, 2.4),
    "four levels, none of much noise": one_of(0.1, 1.0, 4.0, 11.0),
    "whole levels": one_of(*map(float, range(-10, 11))),
    "whole levels, none of much noise": one_of(*map(float, range(13))),
    "laplace": drawn_by(levels.Laplace()),
    "cauchy": drawn_by(levels.Cauchy()),
    "cosmap": drawn_by(levels.CosMap()),
    "mode": drawn_by(levels.Mode()),
    "logit-normal sampler": drawn_by(levels.LogitNormal()),
    "log-normal sampler": drawn_by(levels.LogNormal()),
    "log-uniform sampler": drawn_by(levels.LogUniform()),
    "timesteps sampler": drawn_by(levels.UniformTimesteps(SD)),
    "time sampler": drawn_by(levels.UniformTime(vadiff.process.VPCosine())),
    "DDPMScheduler": scheduled("DDPMScheduler"),
    "DDPMScheduler, zero SNR": scheduled("DDPMScheduler", rescale_betas_zero_snr=True),
    "EulerDiscreteScheduler": scheduled("EulerDiscreteScheduler"),
    "EDMEulerScheduler": scheduled("EDMEulerScheduler"),
    "CMStochasticIterativeScheduler": scheduled("CMStochasticIterativeScheduler"),
    "FlowMatchEulerDiscreteScheduler": scheduled("FlowMatchEulerDiscreteScheduler", shift=3.0),
    **{
        f"{name}, {options}": scheduled(name, **options)
        for name in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler")
        for options in (
            {"beta_schedule": "linear"},
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            {"beta_schedule": "squaredcos_cap_v2"},
        )
    },
    **{name: scheduled(name) for name in ("HeunDiscreteScheduler", "EDMDPMSolverMultistepScheduler")},
    **{
        name: scheduled(name, timesteps=1000)
        for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler")
    },
    "FlowMatchEulerDiscreteScheduler, no shift": scheduled("FlowMatchEulerDiscreteScheduler"),
    "FlowMatchHeunDiscreteScheduler": scheduled("FlowMatchHeunDiscreteScheduler"),
    # What integrations compute from the levels that their trainers draw.
    "torchcfm": lambda n, g: flow_matching.log_snr(uniform(n, g)),
    "torchcfm, sigma .1": lambda n, g: flow_matching.log_snr(uniform(n, g), sigma=0.1),
    "k-diffusion, log-normal": lambda n, g: log_snr.from_sigma(sigmas(n, g)),
    "k-diffusion, cosine-interpolated": lambda n, g: log_snr.from_sigma(
        (uniform(n, g, 0.003, 0.997) * math.pi / 2).tan()
    ),
    "kohya, Flux": kohya_flow(),
}


def of_times(process: DiscreteVP, formula: Callable[[Tensor], Tensor]) -> Draw:
    """A function of ᾱ at uniform timesteps."""
    return lambda n, g: formula(process.alphas_cumprod[steps(n, g)]).float()


def alphas(process: DiscreteVP) -> Tensor:
    before = torch.cat([torch.ones(1, dtype=torch.float64), process.alphas_cumprod[:-1]])
    return process.alphas_cumprod / before


def rows_of(process: DiscreteVP) -> dict[str, tuple[Draw, str]]:
    def snr(alpha_bar: Tensor) -> Tensor:
        return alpha_bar / (1.0 - alpha_bar)

    return {
        "SNR": (of_times(process, snr), "SNR"),
        "alpha bar": (of_times(process, lambda a: a), r"in \[0, 1\].*ᾱ"),
        "sigma of VP": (of_times(process, lambda a: (1.0 - a).sqrt()), r"in \[0, 1\].*sigma"),
        "alphas, not their product": (
            lambda n, g: alphas(process).logit()[steps(n, g)].float(),
            "alphas take the place",
        ),
        "betas": (lambda n, g: -alphas(process).logit()[steps(n, g)].float(), "betas take the place"),
        "from_sigma of VP's": (of_times(process, lambda a: -(1.0 - a).log()), "from_sigma is given sqrt"),
    }


WRONG: dict[str, tuple[Draw, str]] = {
    "timesteps": (lambda n, g: steps(n, g).float(), "looks like timesteps: whole numbers"),
    "times of a flow in thousandths": (lambda n, g: 1000 * uniform(n, g), "like timesteps or SNR"),
    "sigma": (sigmas, "like sigma or SNR"),
    "sigma, log-uniform": (lambda n, g: log_uniform(0.002, 80.0)(n, g).mul(-0.5).exp(), "like sigma or SNR"),
    "EDM's SNR": (lambda n, g: edm()(n, g).exp(), "SNR"),
    "time": (uniform, r"in \[0, 1\].*times, t/T.*from_flow_time"),
    "t/T": (lambda n, g: steps(n, g).float() / 1000, r"in \[0, 1\].*times, t/T"),
    "timesteps as sigma": (lambda n, g: -2.0 * steps(n, g, 1).float().log(), "from_sigma was probably given timesteps"),
    "times for timesteps of a flow": (
        lambda n, g: log_snr.from_flow_time(uniform(n, g) / 1000), "times from 0 to 1 were taken for timesteps",
    ),
    "sign of linear reversed": (lambda n, g: -table(LINEAR)(n, g), "DDPM's linear schedule with its sign reversed"),
    "sign of SD reversed": (lambda n, g: -table(SD)(n, g), "Stable Diffusion's schedule with its sign reversed"),
    **{f"{name}, linear": row for name, row in rows_of(LINEAR).items()},
    **{f"{name}, SD": row for name, row in rows_of(SD).items()},
    **{f"{name}, cosine": row for name, row in rows_of(COSINE).items()},
}  # fmt: skip


def judged(draw: Draw, bins: Bins, calls: int, batch: int, seed: int = 0) -> str | None:
    """What is said of so many calls with so many samples each, as a criterion counts them."""
    values = draw(calls * batch, torch.Generator().manual_seed(seed)).float()
    index = ((values - bins.low) * bins.inv_width).floor().clamp(0, bins.size - 1).long()
    outside = torch.tensor([(values < bins.low).sum(), (values >= bins.high).sum()], dtype=torch.float64)
    return problem_with_levels(torch.bincount(index, minlength=bins.size).double(), bins, outside, values[-batch:])


@pytest.mark.parametrize("name", RIGHT)
def test_a_schedule_in_use_is_left_alone(name: str) -> None:
    for bins in RANGES.values():
        for calls, batch in ((200, 1), (200, 4), (200, 64), (60, 512)):
            for seed in range(3):
                assert judged(RIGHT[name], bins, calls, batch, seed) is None, (bins, batch, seed)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_log_snr_is_named(name: str) -> None:
    draw, cause = WRONG[name]
    for seed in range(5):
        problem = judged(draw, DEFAULT, 200, 32, seed)
        assert problem is not None
        assert re.search(cause, problem), problem
        assert problem.endswith(".")


def said(criterion: vadiff.DiffusionLoss, draw: Draw, calls: int, batch: int, seed: int) -> list[str]:
    """The warnings of a criterion in so many training calls."""
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(batch, 1, requires_grad=True), torch.zeros(batch, 1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(calls):
            criterion(prediction, target, draw(batch, generator).float())
    return [str(warning.message) for warning in found if warning.category is DiffusionLossWarning]


PROCESS_OF = {"flow": "flow", "EDM": "edm", "sigma": "edm", "linear": "vp_linear", "cosine": "vp_cosine", "SD": SD}


@pytest.mark.parametrize("batch", [2, 64])
@pytest.mark.parametrize("name", WRONG)
def test_a_criterion_names_what_is_no_log_snr(name: str, batch: int) -> None:
    draw, cause = WRONG[name]
    process = next((process for word, process in PROCESS_OF.items() if word in name), "stable_diffusion")
    for criterion in (vadiff.DiffusionLoss("constant"), vadiff.DiffusionLoss.for_process(process)):
        found = said(criterion, draw, 2000 if batch < 64 else 1000, batch, seed=0)
        assert len(found) == 1
        # From few samples the sigma of a VP process is told from log-SNR, but not from other sigmas.
        few = "|for the sigma of a variance-preserving process" if "from_sigma of VP's" in name else ""
        assert re.search(f"{cause}|log_snr_range{few}", found[0]), found[0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("process", [None, "flow"])
@pytest.mark.parametrize(("batch", "calls"), [(1, 8000), (2, 2000), (4, 1000), (64, 200)])
def test_logit_normal_times_in_place_of_log_snr_are_named(
    shift: float, process: str | None, batch: int, calls: int
) -> None:
    """SD3's times, shifted or not: few of them are near 0 or near 1."""

    def times(n: int, g: torch.Generator) -> Tensor:
        return (normal(n, g) + math.log(shift)).sigmoid()

    for seed in range(2):
        criterion = vadiff.DiffusionLoss.for_process(process) if process else vadiff.DiffusionLoss()
        (problem,) = said(criterion, times, calls, batch, seed)
        assert "all values of log_snr lie in [0, 1]" in problem


@pytest.mark.parametrize("name", ["timesteps", "sigma", "time", "SNR, linear", "times for timesteps of a flow"])
def test_single_samples_are_enough_in_the_long_run(name: str) -> None:
    draw, cause = WRONG[name]
    found = [judged(draw, DEFAULT, calls, 1, seed) for seed in range(25) for calls in (1600, 3200)]
    assert sum(problem is not None for problem in found) >= 5, found  # a read every 100 steps is soon right
    assert all(problem is None or re.search(cause, problem) for problem in found)


def test_the_range_of_another_process_is_named_as_such() -> None:
    problem = judged(log_uniform(0.002, 0.01), Bins(26, -5.5, 7.5), 200, 8)
    assert problem is not None
    assert "100% of the samples have a log-SNR above log_snr_range (-5.5, 7.5)" in problem
    assert "for_process" in problem


def test_few_samples_prove_nothing() -> None:
    assert judged(WRONG["timesteps"][0], DEFAULT, 9, 16) is None
    empty = torch.zeros(128, dtype=torch.float64)
    assert problem_with_levels(empty, DEFAULT, torch.zeros(2, dtype=torch.float64), None) is None


@pytest.mark.parametrize(
    "bins", [Bins(40, 2.0, 12.0), Bins(40, -12.0, -2.0), Bins(2, -16.0, 16.0), Bins(3, 0.3, 0.9), Bins(1024, -16, 16)]
)
def test_any_bins_can_be_judged_and_coarse_ones_say_no_more(bins: Bins) -> None:
    for draw, _ in WRONG.values():
        judged(draw, bins, 200, 32)
    for name, draw in RIGHT.items():
        problem = judged(draw, bins, 200, 32)
        assert problem is None or "log_snr_range" in problem, name

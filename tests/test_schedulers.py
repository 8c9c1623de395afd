"""Log-SNR of a batch from diffusers' own schedulers, against the noise that they themselves mix in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vadiff.log_snr import from_flow_time
from vadiff.schedulers import (
    coefficients_of,
    log_snr_of,
    log_snr_range_of,
    loss_form_of,
    prediction_type_of,
    sigma_of,
    timesteps_of,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddpm, v, zero terminal SNR": (
        "DDPMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
    "ddpm, cosine": ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300}),
    "ddim": ("DDIMScheduler", SD),
    "pndm": ("PNDMScheduler", SD),
    "cogvideox": ("CogVideoXDDIMScheduler", {"rescale_betas_zero_snr": True}),
    "euler": ("EulerDiscreteScheduler", SD),
    "euler, continuous": (
        "EulerDiscreteScheduler",
        {**SD, "timestep_type": "continuous", "prediction_type": "v_prediction"},
    ),
    "edm": ("EDMEulerScheduler", {}),
    "edm, exponential": ("EDMEulerScheduler", {"sigma_schedule": "exponential", "sigma_max": 120.0}),
    "edm, dpm": ("EDMDPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    "consistency": ("CMStochasticIterativeScheduler", {}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow, shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow, dynamic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
}
ULP = 2.0**-23


def scheduler(name: str) -> Any:
    cls, options = SCHEDULERS[name]
    return getattr(diffusers, cls)(**options)


def trained_on(scheduler: Any) -> Tensor:
    """Timesteps over the whole range, as a training script has them."""
    if hasattr(scheduler, "get_velocity") and not hasattr(scheduler, "sigmas"):
        return torch.tensor([0, 1, 100, 250, 299])
    times = scheduler.timesteps
    if times is None:
        return torch.tensor([0, 500, 999])
    return torch.as_tensor(times)[[0, 1, len(times) // 2, -2, -1]]


def mixed(scheduler: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma [B] float64, from the scheduler's own noising of ones and zeros."""
    one, zero = torch.ones(len(timesteps), 1, dtype=torch.float64), torch.zeros(len(timesteps), 1, dtype=torch.float64)
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(one, timesteps, zero)[:, 0], scheduler.scale_noise(zero, timesteps, one)[:, 0]
    return scheduler.add_noise(one, zero, timesteps)[:, 0], scheduler.add_noise(zero, one, timesteps)[:, 0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_log_snr_is_that_of_the_noise_which_the_scheduler_mixes_in(name: str) -> None:
    """Float32 tables: what ln makes of half an ulp of ᾱ, 1 - ᾱ, sigma or ln(sigma)/4 stays below 16 of λ's."""
    found = scheduler(name)
    timesteps = trained_on(found)
    alpha, sigma = mixed(found, timesteps)
    expected = 2.0 * (alpha.log() - sigma.log())
    log_snr = log_snr_of(found, timesteps)
    assert log_snr.dtype == torch.float32
    assert log_snr.shape == timesteps.shape
    finite = expected.isfinite()
    torch.testing.assert_close(log_snr[finite].double(), expected[finite], rtol=16 * ULP, atol=16 * ULP)
    assert torch.equal(log_snr[~finite].double(), expected[~finite])


@pytest.mark.parametrize("name", ["ddpm, v, zero terminal SNR", "euler", "edm", "edm, dpm", "flow, shifted", "flow"])
def test_sigma_is_what_the_scheduler_calls_so(name: str) -> None:
    found = scheduler(name)
    timesteps = trained_on(found)
    expected = mixed(found, timesteps)[1].float()
    torch.testing.assert_close(sigma_of(found, timesteps), expected, rtol=16 * ULP, atol=0)


def test_zero_terminal_snr_and_pure_noise_are_minus_infinity() -> None:
    assert log_snr_of(scheduler("ddpm, v, zero terminal SNR"), torch.tensor([999])).item() == -torch.inf
    assert log_snr_of(scheduler("flow, shifted"), torch.tensor([1000.0])).item() == -torch.inf


def test_whole_float_timesteps_are_as_good_as_integers() -> None:
    found = scheduler("ddpm, v, zero terminal SNR")
    timesteps = torch.arange(1000)
    assert torch.equal(log_snr_of(found, timesteps.float()), log_snr_of(found, timesteps))


@pytest.mark.parametrize("name", ["ddpm", "ddpm, v, zero terminal SNR", "euler", "edm", "flow", "flow, shifted"])
def test_nearest_timesteps_are_the_inverse_of_log_snr(name: str) -> None:
    found = scheduler(name)
    timesteps = trained_on(found)
    log_snr = log_snr_of(found, timesteps)
    finite = log_snr.isfinite()
    back = timesteps_of(found, log_snr[finite])
    assert torch.equal(log_snr_of(found, back), log_snr[finite])
    assert torch.equal(back.to(timesteps), timesteps[finite])
    for nats in (-1e-3, 1e-3):
        assert torch.equal(timesteps_of(found, log_snr[finite] + nats), back)


@pytest.mark.parametrize(
    ("log_snr", "error", "message"),
    [
        (torch.tensor([3]), TypeError, "expected a floating-point tensor"),
        (torch.tensor([[3.0]]), ValueError, r"log_snr has shape \(1, 1\), expected \(B,\)"),
        (torch.tensor([0.0, 12.0]), ValueError, "log_snr runs from 0 to 12, expected -10.1. to 9.21: the noise levels"),
        (torch.tensor([torch.nan]), ValueError, "log_snr runs from nan to nan"),
    ],
)
def test_log_snr_that_no_timestep_has_is_named(log_snr: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        timesteps_of(scheduler("ddpm"), log_snr)


@pytest.mark.parametrize("timesteps", [None, torch.tensor([])])
def test_scheduler_without_a_table_of_timesteps_is_named(timesteps: Tensor | None) -> None:
    """diffusers' MiniMaxH3Scheduler and PiflowScheduler make theirs for sampling only."""
    bare = SimpleNamespace(timesteps=timesteps, scale_noise=None, config=SimpleNamespace(num_train_timesteps=1000))
    for read in (lambda: timesteps_of(bare, torch.zeros(2)), lambda: log_snr_range_of(bare)):
        with pytest.raises(ValueError, match=r"SimpleNamespace has no timesteps of training: use a scheduler"):
            read()


def test_between_two_timesteps_log_snr_is_interpolated() -> None:
    found = scheduler("ddpm")
    ends = log_snr_of(found, torch.tensor([10, 11]))
    between = log_snr_of(found, torch.tensor([10.25]))
    assert between.item() == pytest.approx((0.75 * ends[0] + 0.25 * ends[1]).item(), rel=1e-6)


@pytest.mark.parametrize("shift", [1.0, 7.0])
def test_a_flow_scheduler_without_scale_noise_is_not_taken_for_edm_s(shift: float) -> None:
    """HunyuanVideo's and musubi-tuner's have tables and `step` only."""
    t = torch.linspace(1, 0, 1001)
    t = shift * t / (1 + (shift - 1) * t)
    bare = SimpleNamespace(sigmas=t, timesteps=1000 * t[:-1], config=SimpleNamespace(num_train_timesteps=1000))
    timesteps = bare.timesteps[[0, 1, 500, 999]]
    expected = from_flow_time(t[[0, 1, 500, 999]])
    torch.testing.assert_close(log_snr_of(bare, timesteps), expected, rtol=1e-4, atol=1e-4)
    assert prediction_type_of(bare) == "flow"


def test_a_flow_trainer_that_counts_from_one_ends_at_pure_noise() -> None:
    found = log_snr_of(scheduler("flow"), torch.tensor([1.0, 1000.0, 1000.5, 1001.0]))
    assert found[0] > 13
    assert found[1:].tolist() == [-torch.inf] * 3


def test_edm_noise_levels_need_not_be_in_the_table() -> None:
    sigma = torch.tensor([1e-3, 0.0137, 0.7, 33.3, 150.0], dtype=torch.float64)
    found = scheduler("edm")
    log_snr = log_snr_of(found, found.precondition_noise(sigma))
    torch.testing.assert_close(log_snr.double(), -2.0 * sigma.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["new table", "in place", "new timesteps", "new shift"])
def test_a_schedule_changed_later_is_a_schedule_changed(change: str) -> None:
    found = scheduler({"new timesteps": "edm", "new shift": "flow"}.get(change, "ddpm"))
    timesteps = torch.as_tensor(found.timesteps)[:3]
    before = log_snr_of(found, timesteps)
    if change == "new table":
        found.alphas_cumprod = scheduler("ddpm, v, zero terminal SNR").alphas_cumprod
    elif change == "in place":
        found.alphas_cumprod[-3:] *= 0.5
    elif change == "new timesteps":
        found.set_timesteps(7)
        timesteps = found.timesteps[3:6]
    else:
        found.set_shift(5.0)
        found.set_timesteps(10)
        timesteps = found.timesteps[4:7]
    alpha, sigma = mixed(found, timesteps)
    after = log_snr_of(found, timesteps)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.double(), 2.0 * (alpha.log() - sigma.log()), rtol=16 * ULP, atol=16 * ULP)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_nothing_looks_at_values_that_are_not_on_the_cpu(name: str) -> None:
    """A meta tensor has no values: asking for one raises, as it would make the host wait for a GPU."""
    found = scheduler(name)

    class Copies(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            to_meta = function is Tensor.to and torch.device("meta") in args and args[0].device.type == "cpu"
            assert not to_meta or (kwargs or {}).get("non_blocking"), "a copy to the device that the host waits for"
            return function(*args, **(kwargs or {}))

    timesteps = trained_on(found).to("meta")
    with Copies():
        log_snr = log_snr_of(found, timesteps)
    assert log_snr.device.type == "meta"
    assert log_snr.shape == timesteps.shape


def test_off_the_cpu_a_timestep_out_of_range_makes_its_sample_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vadiff.schedulers.may_read", lambda values: False)  # as values on a GPU are
    assert log_snr_of(scheduler("euler"), torch.tensor([5.0, 1000.0, -1.0, torch.nan])).isnan().tolist() == [
        False, True, True, True,
    ]  # fmt: skip
    assert log_snr_of(scheduler("edm"), torch.tensor([0.0, 500.0])).isnan().tolist() == [False, True]
    assert log_snr_of(scheduler("flow"), torch.tensor([1000.0, 1002.0])).isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "timesteps", "error", "message"),
    [
        ("ddpm", torch.tensor([1000]), IndexError, "expected 0 to 999"),
        ("euler", torch.tensor([999.5]), IndexError, "expected 0 to 999"),
        ("edm", torch.tensor([500.0]), ValueError, r"from_sigma\(sigmas\)"),
        ("edm", torch.tensor([3]), TypeError, r"scheduler.timesteps\[indices\]"),
        ("flow", torch.tensor([3]), TypeError, r"scheduler.timesteps\[indices\]"),
        ("flow", torch.tensor([1002.0]), ValueError, "expected 0 to 1000"),
        ("ddpm", torch.tensor(3), ValueError, r"timesteps.expand\(batch_size\)"),
        ("ddpm", torch.tensor([[3], [4]]), ValueError, r"timesteps.flatten\(\)"),
        ("ddpm", 3, TypeError, "timesteps is a int"),
    ],
)
def test_timesteps_that_do_not_fit_are_an_error_that_says_what_would(
    name: str, timesteps: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        log_snr_of(scheduler(name), timesteps)


def test_a_scheduler_whose_add_noise_reads_its_table_backwards_is_refused() -> None:
    """DPM-Solver's before set_timesteps: the noise of timestep 0 is that of 999."""
    backwards: Any = diffusers.DPMSolverMultistepScheduler(**SD)
    assert backwards.add_noise(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0])).item() > 0.9
    with pytest.raises(ValueError, match=r"DDPMScheduler.from_config\(scheduler.config\)"):
        log_snr_of(backwards, torch.tensor([0]))
    forwards: Any = diffusers.DDPMScheduler.from_config(backwards.config)
    assert log_snr_of(forwards, torch.tensor([0])).item() == pytest.approx(7.069, abs=1e-3)
    assert log_snr_range_of(backwards) == log_snr_range_of(forwards)
    backwards.set_timesteps(1000)
    assert log_snr_of(backwards, torch.tensor([0])).item() == pytest.approx(7.069, abs=1e-3)


@pytest.mark.parametrize(
    ("stranger", "error", "message"),
    [
        (object(), TypeError, "scheduler is a object"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), ValueError, "from_flow_time"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), ValueError, "from_flow_time"),
    ],
)
def test_what_is_no_scheduler_for_training_is_refused(stranger: Any, error: type[Exception], message: str) -> None:
    for question in (lambda: log_snr_of(stranger, torch.tensor([1.0])), lambda: prediction_type_of(stranger)):
        with pytest.raises(error, match=message):
            question()


def test_prediction_types_are_the_scheduler_s() -> None:
    assert prediction_type_of(scheduler("ddpm")) == "epsilon"
    assert prediction_type_of(diffusers.DDPMScheduler(prediction_type="sample")) == "sample"
    assert prediction_type_of(scheduler("ddpm, v, zero terminal SNR")) == "v_prediction"
    assert prediction_type_of(scheduler("flow")) == "flow"
    assert prediction_type_of(scheduler("edm")) == prediction_type_of(scheduler("edm, dpm")) == "edm"
    assert loss_form_of(scheduler("edm")) == "sample"
    with pytest.raises(ValueError, match="prediction_type 'trigflow', expected 'epsilon'"):
        prediction_type_of(
            SimpleNamespace(alphas_cumprod=torch.ones(3), config=SimpleNamespace(prediction_type="trigflow"))
        )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_coefficients_are_those_of_the_scheduler_s_own_preconditioning(kind: str) -> None:
    """Its v_prediction has a negative c_out."""
    found: Any = diffusers.EDMEulerScheduler(prediction_type=kind, sigma_data=0.7)
    timesteps = found.timesteps[[3, 500, 990]]
    output, clean, noise = torch.randn(3, 3, 4, dtype=torch.float64)
    sigma = sigma_of(found, timesteps).double()[:, None]
    denoised = found.precondition_outputs(clean + sigma * noise, output, sigma)
    a, b, c = (torch.as_tensor(value)[:, None] for value in coefficients_of(found, timesteps))
    torch.testing.assert_close(a * output + b * clean + c * noise, denoised - clean, rtol=1e-5, atol=1e-5)


def test_range_is_that_of_the_finite_part_of_the_table() -> None:
    low, high = log_snr_range_of(scheduler("ddpm, v, zero terminal SNR"))
    assert -25 < low < -15
    assert high == pytest.approx(9.21, abs=0.01)
    assert log_snr_range_of(scheduler("edm")) == pytest.approx((-8.764, 12.429), abs=1e-3)
    assert log_snr_range_of(scheduler("pndm")) == pytest.approx((-5.364, 7.069), abs=1e-3)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "flow", "flow, shifted"])
def test_times_from_0_to_1_are_no_timesteps(name: str) -> None:
    found = scheduler(name)
    with pytest.raises(ValueError, match=r"expected 0 to (999|1000): these look like times from 0 to 1"):
        log_snr_of(found, torch.tensor([0.1, 0.9, 0.35, 0.7]))


def test_a_few_timesteps_below_1_may_be_drawn_by_chance() -> None:
    for name in ("ddpm", "flow"):
        found = scheduler(name)
        assert log_snr_of(found, torch.tensor([0.3])).isfinite()
        assert log_snr_of(found, torch.tensor([0.3, 0.9])).isfinite().all()
        assert log_snr_of(found, torch.tensor([0.3, 0.9, 0.2, 1.2])).isfinite().all()
        assert log_snr_of(found, torch.full((4,), 0.5)).isfinite().all()
    assert log_snr_of(scheduler("edm"), torch.tensor([0.1, 0.9, 0.35, 0.7])).isfinite().all()


def test_a_diffusion_with_a_numpy_table_is_a_scheduler() -> None:
    diffusion = SimpleNamespace(alphas_cumprod=scheduler("ddpm").alphas_cumprod.double().numpy())
    timesteps = torch.tensor([0, 500, 999])
    expected = log_snr_of(scheduler("ddpm"), timesteps)
    assert torch.equal(log_snr_of(diffusion, timesteps), expected)
    assert torch.equal(log_snr_of(diffusion, timesteps.numpy()), expected)
    assert log_snr_range_of(diffusion) == pytest.approx((expected[2].item(), expected[0].item()))

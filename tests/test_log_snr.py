"""vadiff.log_snr: what trainers have at hand → log-SNR."""

import math

import numpy as np
import pytest
import torch

from vadiff.log_snr import from_alphas_cumprod, from_flow_time, from_sigma


@pytest.fixture
def ddpm_table() -> torch.Tensor:
    """[1000] float32: DDPM's linear betas, as diffusers keeps them."""
    return torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000), dim=0)


def test_sigma_gives_minus_two_log_sigma() -> None:
    sigma = np.array([0.002, 0.5, 1.0, 80.0])
    assert from_sigma(torch.tensor(sigma)).numpy() == pytest.approx(-2 * np.log(sigma), rel=1e-15)


def test_alphas_cumprod_gives_the_logit_of_the_entry(ddpm_table: torch.Tensor) -> None:
    timesteps = torch.tensor([0, 1, 500, 999])
    alpha_bar = ddpm_table[timesteps].double().numpy()
    expected = np.log(alpha_bar / (1 - alpha_bar))
    assert from_alphas_cumprod(ddpm_table, timesteps).numpy() == pytest.approx(expected, rel=1e-6)


def test_log_snr_near_clean_data_keeps_float32_accuracy() -> None:
    t = torch.tensor([1e-7, 1e-4, 0.4999999, 0.5000001, 1 - 2**-24])
    exact = 2 * (np.log1p(-t.double().numpy()) - np.log(t.double().numpy()))
    assert from_flow_time(t).numpy() == pytest.approx(exact, rel=1e-6)


def test_flow_time_directions_mirror_each_other() -> None:
    t = torch.linspace(0, 1, 17, dtype=torch.float64)
    assert torch.allclose(from_flow_time(t, data_at=0), from_flow_time(1 - t, data_at=1), rtol=1e-13)


def test_ends_of_every_process_give_infinities_and_no_nan() -> None:
    inf = math.inf
    assert from_sigma(torch.tensor([0.0, inf])).tolist() == [inf, -inf]
    assert from_flow_time(torch.tensor([0.0, 1.0])).tolist() == [inf, -inf]
    assert from_flow_time(torch.tensor([0.0, 1.0]), data_at=1).tolist() == [-inf, inf]
    assert from_alphas_cumprod(torch.tensor([1.0, 0.0]), torch.tensor([0, 1])).tolist() == [inf, -inf]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_is_float32_unless_float64_came_in(dtype: torch.dtype) -> None:
    value = torch.tensor([0.5, 0.25], dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert from_sigma(value).dtype == expected
    assert from_flow_time(value).dtype == expected
    assert from_alphas_cumprod(value, torch.tensor([0, 1])).dtype == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_indexes_the_table(dtype: torch.dtype) -> None:
    table = torch.tensor([0.9, 0.5, 0.1])
    log_snr = from_alphas_cumprod(table, torch.tensor([2, 0, 2], dtype=dtype))
    assert log_snr.tolist() == pytest.approx([-math.log(9), math.log(9), -math.log(9)], rel=1e-6)


def test_float_timesteps_are_refused(ddpm_table: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"timesteps has dtype torch.float32, expected integers.*timesteps.long\(\)"):
        from_alphas_cumprod(ddpm_table, torch.tensor([1.0]))


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_timestep_out_of_range_is_refused(ddpm_table: torch.Tensor, timestep: int) -> None:
    with pytest.raises(IndexError, match=rf"{timestep}.*expected 0 to 999: alphas_cumprod has 1000 entries"):
        from_alphas_cumprod(ddpm_table, torch.tensor([timestep]))


def test_values_per_pixel_instead_of_per_sample_are_refused(ddpm_table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"sigma has shape \(2, 1, 1, 1\), expected \(B,\).*sigma.flatten\(\)"):
        from_sigma(torch.ones(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"t has shape \(\)"):
        from_flow_time(torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"timesteps has shape \(2, 1\)"):
        from_alphas_cumprod(ddpm_table, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"alphas_cumprod has shape \(2, 500\), expected \(T,\)"):
        from_alphas_cumprod(ddpm_table.view(2, 500), torch.tensor([0]))


def test_values_outside_the_process_are_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match=r"t runs from 1 to 999, .*\[0, 1\]: divide by num_train_timesteps"):
        from_flow_time(torch.tensor([1.0, 999.0]))
    with pytest.raises(ValueError, match="sigma runs from -1 to 1"):
        from_sigma(torch.tensor([-1.0, 1.0]))
    with pytest.raises(TypeError, match=r"sigma has dtype torch\.int64"):
        from_sigma(torch.tensor([1]))
    with pytest.raises(ValueError, match="data_at is 2, expected 0"):
        from_flow_time(torch.tensor([0.5]), data_at=2)


def test_nan_passes_through_for_the_criterion_to_count() -> None:
    assert from_sigma(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]
    assert from_flow_time(torch.tensor([math.nan])).isnan().all()


def test_empty_batch_gives_an_empty_tensor() -> None:
    assert from_sigma(torch.empty(0)).shape == (0,)
    assert from_alphas_cumprod(torch.tensor([0.5]), torch.empty(0, dtype=torch.int64)).shape == (0,)

"""vadiff.log_snr: what trainers have at hand → log-SNR."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vadiff import schedule_checks
from vadiff.errors import DiffusionLossWarning
from vadiff.log_snr import from_alpha_sigma, from_alphas_cumprod, from_flow_time, from_sigma
from vadiff.process import DiscreteVP, Flow, VPCosine


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


SCHEDULES = {"linear": DiscreteVP.linear(), "SD": DiscreteVP.scaled_linear(), "cosine": DiscreteVP.cosine()}


@pytest.mark.parametrize("process", [Flow(), Flow(data_at=1), VPCosine()], ids=repr)
def test_alpha_and_sigma_of_any_process_give_its_log_snr(process: Flow | VPCosine) -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    found = from_alpha_sigma(process.alpha(t), process.sigma(t))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, process.log_snr(t), rtol=1e-12, atol=1e-12)
    assert from_alpha_sigma(process.alpha(t).float(), process.sigma(t).float()).dtype == torch.float32


def test_alpha_and_sigma_that_belong_to_no_process_are_refused() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"alpha has shape \(2,\).*sigma \(3,\)"):
        from_alpha_sigma(one, torch.ones(3))
    with pytest.raises(ValueError, match="sigma runs from -1 to -1"):
        from_alpha_sigma(one, -one)
    with pytest.raises(ValueError, match="both 0 for a sample"):
        from_alpha_sigma(0 * one, 0 * one)
    with pytest.raises(TypeError, match=r"alpha has dtype torch\.int64"):
        from_alpha_sigma(one.long(), one)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_whole_schedules_are_taken_in_any_precision(name: str, dtype: torch.dtype) -> None:
    for process in (SCHEDULES[name], SCHEDULES[name].with_zero_terminal_snr()):
        assert len(from_alphas_cumprod(process.alphas_cumprod.to(dtype), torch.tensor([0, 500, 999]))) == 3


@pytest.mark.parametrize("steps", [2, 20, 50, 100])
def test_short_schedules_of_tutorials_are_taken(steps: int) -> None:
    """DDPM's betas over few steps: much of the data is left at the end."""
    table = (1.0 - torch.linspace(1e-4, 0.02, steps)).cumprod(0)
    assert from_alphas_cumprod(table, torch.tensor([0, steps - 1])).isfinite().all()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("made_of", "cause"),
    [
        (lambda bar, alphas: 1.0 - alphas, "these rise, like betas"),
        (lambda bar, alphas: 1.0 - bar, "these rise, like betas or 1 - ᾱ"),
        (lambda bar, alphas: bar.flip(0), "these rise.*reversed order"),
        (lambda bar, alphas: alphas, "look like alphas, 1 - beta of each step"),
        (lambda bar, alphas: bar.sqrt(), "the square root of a common schedule's ᾱ"),
        (lambda bar, alphas: bar / (1.0 - bar), r"expected ᾱ in \[0, 1\]"),
        (lambda bar, alphas: torch.arange(1000.0), r"expected ᾱ in \[0, 1\]"),
    ],
    ids=["betas", "1 - abar", "reversed", "alphas", "sqrt abar", "SNR", "timesteps"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_table_that_is_no_alphas_cumprod_is_refused_and_named(name: str, made_of, cause: str, dtype) -> None:
    alpha_bar = SCHEDULES[name].alphas_cumprod
    alphas = alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    with pytest.raises(ValueError, match=cause):
        from_alphas_cumprod(made_of(alpha_bar, alphas).to(dtype), torch.tensor([1, 2]))


def test_numpy_schedules_times_and_sigmas_are_taken() -> None:
    """OpenAI's GaussianDiffusion and its descendants have float64 NumPy tables."""
    table = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    table.flags.writeable = False
    timesteps = np.array([0, 500, 999])
    expected = from_alphas_cumprod(torch.tensor(table), torch.tensor(timesteps))
    assert torch.equal(from_alphas_cumprod(table, torch.tensor(timesteps)), expected)
    assert torch.equal(from_alphas_cumprod(table, timesteps), expected)
    assert from_sigma(np.array([0.5, 2.0])).tolist() == from_sigma(torch.tensor([0.5, 2.0]).double()).tolist()
    assert from_flow_time(np.array([0.5], dtype=np.float32)).dtype == torch.float32
    with pytest.raises(TypeError, match=r"sigma is a list, expected a torch\.Tensor or a NumPy array"):
        from_sigma([0.5])


def test_timesteps_in_place_of_sigma_are_refused_with_the_line_to_write() -> None:
    line = r"vadiff\.log_snr\.from_alphas_cumprod\(scheduler\.alphas_cumprod, timesteps\)"
    with pytest.raises(ValueError, match=rf"whole numbers from 3 to 950.*timesteps\. Use {line}"):
        from_sigma(torch.tensor([3.0, 950.0, 211.0, 512.0]))
    with pytest.raises(TypeError, match=rf"sigma has dtype torch\.int64.*If these are timesteps, use {line}"):
        from_sigma(torch.tensor([3, 950]))
    assert from_sigma(torch.tensor([1.0, 10.0, 100.0])).isfinite().all()  # too few to tell
    assert from_sigma(torch.full((8,), 100.0)).isfinite().all()
    assert from_sigma(torch.arange(1.0, 81.0)).isfinite().all()
    assert from_sigma(torch.tensor([5.0, 25.0, 50.0, 75.0, 100.0])).isfinite().all()  # denoising of 8-bit images


# Tables of schedules


def spaced(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """50 of 1,000 timesteps, as diffusers' timestep_spacing takes them."""
    every = torch.linspace(0, 999, 50).round().long()
    return {"leading": table[::20], "leading + 1": table[1::20], "trailing": table[19::20], "linspace": table[every]}


def with_one(table: torch.Tensor) -> torch.Tensor:
    return torch.cat([table.new_ones(1), table])


KANDINSKY = DiscreteVP.linear(1000, 0.00085, 0.012)


def alphas_of(process: DiscreteVP) -> torch.Tensor:
    table = with_one(process.alphas_cumprod)
    return table[1:] / table[:-1]


@pytest.mark.parametrize("process", [*SCHEDULES.values(), KANDINSKY], ids=[*SCHEDULES, "Kandinsky"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_parts_and_spacings_of_schedules_are_taken(process: DiscreteVP, dtype: torch.dtype) -> None:
    whole, zero = process.alphas_cumprod, process.with_zero_terminal_snr().alphas_cumprod
    tables = [
        whole[:50],
        whole[:200],
        whole[500:],
        with_one(whole),
        zero,
        *spaced(whole).values(),
        *spaced(zero).values(),
    ]
    for table in tables:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not from_alphas_cumprod(table.to(dtype), torch.tensor([0, 1, len(table) - 1])).isnan().any()


@pytest.mark.parametrize("process", [*SCHEDULES.values(), KANDINSKY], ids=[*SCHEDULES, "Kandinsky"])
def test_square_roots_of_schedules_are_refused_in_every_usual_form(process: DiscreteVP) -> None:
    whole, zero = process.alphas_cumprod, process.with_zero_terminal_snr().alphas_cumprod
    for table in (whole, zero, with_one(whole), *spaced(whole).values(), *spaced(zero).values()):
        for dtype in (torch.float64, torch.float32):
            with pytest.raises(ValueError, match="the square root of a common schedule's ᾱ"):
                from_alphas_cumprod(table.sqrt().to(dtype), torch.tensor([1, 2]))


@pytest.mark.parametrize("steps", [20, 50, 100, 1000])
@pytest.mark.parametrize("schedule", [DiscreteVP.linear, DiscreteVP.scaled_linear, DiscreteVP.cosine])
def test_alphas_of_few_steps_are_refused(schedule: Callable[[int], DiscreteVP], steps: int) -> None:
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(ValueError, match="look like alphas, 1 - beta of each step"):
            from_alphas_cumprod(alphas_of(schedule(steps)).to(dtype), torch.tensor([1, 2]))


def test_constant_betas_and_their_alphas_are_refused_and_their_product_is_taken() -> None:
    betas = torch.full((1000,), 0.01)
    for table in (betas, 1.0 - betas):
        with pytest.raises(ValueError, match="all the same, like alphas or betas of a schedule with constant betas"):
            from_alphas_cumprod(table, torch.tensor([1, 2]))
    assert from_alphas_cumprod((1.0 - betas).cumprod(0), torch.tensor([999])) < 0


def test_a_table_that_may_be_alphas_or_a_part_of_a_schedule_is_taken_with_a_warning() -> None:
    alphas = 1.0 - torch.linspace(0.002, 0.004, 300)
    with pytest.warns(DiffusionLossWarning, match="may be alphas") as found:
        from_alphas_cumprod(alphas, torch.tensor([1, 2]))
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_alphas_cumprod(alphas, torch.tensor([1, 2]))


def test_a_table_is_read_once_and_again_when_it_was_written(ddpm_table: torch.Tensor, monkeypatch) -> None:
    read: list[torch.Tensor] = []
    monkeypatch.setattr(schedule_checks, "_require_schedule", read.append)
    table = ddpm_table * 0.999
    for _ in range(3):
        from_alphas_cumprod(table, torch.tensor([1]))
        from_alphas_cumprod(ddpm_table.clone() * 0.998, torch.tensor([1]))
    assert len(read) == 2
    table.mul_(0.5)
    from_alphas_cumprod(table, torch.tensor([1]))
    assert len(read) == 3


def test_a_table_on_a_gpu_is_read_once_and_not_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a tensor there."""
    read: list[object] = []
    capturing = True
    monkeypatch.setattr(schedule_checks, "_require_schedule", read.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    class OnGPU(torch.Tensor):
        device = torch.device("cuda")

    table = torch.linspace(0.99, 0.01, 1000).as_subclass(OnGPU)
    schedule_checks.check_schedule(table)
    assert not read
    capturing = False
    for _ in range(3):
        schedule_checks.check_schedule(table)
        schedule_checks.check_schedule(table[:])  # another tensor of the same memory, as .to(device) may give
    assert len(read) == 1


# Kinds of arrays


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_timesteps_are_taken(ddpm_table: torch.Tensor, dtype: torch.dtype) -> None:
    expected = from_alphas_cumprod(ddpm_table, torch.tensor([0, 999]))
    assert torch.equal(from_alphas_cumprod(ddpm_table, torch.tensor([0, 999]).to(dtype)), expected)


def test_arrays_of_a_kind_that_torch_does_not_have_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"sigma is a NumPy array of dtype object.*astype"):
        from_sigma(np.array([0.5, None], dtype=object))
    with pytest.raises(TypeError, match=r"t is a NumPy array of dtype (float128|longdouble)"):
        from_flow_time(np.array([0.5], dtype=np.longdouble))


@pytest.mark.parametrize("value", [np.array(0.5), np.float32(0.5), np.float64(0.5)], ids=repr)
def test_a_single_number_is_not_taken_for_a_batch(value: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"sigma has shape \(\), expected \(B,\)"):
        from_sigma(value)


def test_strided_arrays_are_taken() -> None:
    assert from_sigma(np.array([1.0, 2.0, 4.0])[::-1]).tolist() == from_sigma(np.array([4.0, 2.0, 1.0])).tolist()

"""What is special about the native CPU kernels: threads, instruction sets, conversions, large gradients, loading."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator

import pytest
import torch
from conftest import usable, vadiff_native
from torch import Tensor

import vadiff
from vadiff import backends

SHAPES = {"many small": (300, 3, 40, 41), "few large": (3, 4, 300, 301), "one": (1, 200_003), "tiny": (2, 5)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def built() -> None:
    usable("native")


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def instruction_sets() -> tuple[str, ...]:
    try:
        return vadiff_native()._native.cpu_instruction_sets()
    except ImportError:
        return ()


@pytest.fixture(params=instruction_sets())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    module = vadiff_native()._native
    best = module.cpu_selected()
    module.cpu_select(request.param)
    yield request.param
    module.cpu_select(best)


def step(backend: str, shape: tuple[int, ...], dtype: torch.dtype, loss: str = "mse") -> list[Tensor]:
    """Two steps; everything that comes out of them."""
    generator = torch.Generator().manual_seed(1)
    criterion = vadiff.DiffusionLoss(bins=16, backend=backend, loss=loss)
    found = []
    for reduction in ("mean", "none"):
        prediction, target, noise = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        prediction.requires_grad_()
        log_snr = 4 * torch.randn(shape[0], generator=generator)
        a, b, c = (torch.rand(shape[0], generator=generator) for _ in range(3))
        out = criterion(prediction, target, log_snr, noise=noise, coefficients=(a, b, c), reduction=reduction)
        upstream = torch.rand(out.shape, generator=generator).to(out.dtype)
        found += [out.detach(), *torch.autograd.grad(out, prediction, upstream), criterion.per_sample_loss]
    statistics = criterion.statistics
    return [*found, statistics.count, statistics.mean.nan_to_num(), statistics.variance.nan_to_num(), criterion.weights]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_two_and_four_threads_give_the_same_bits(shape, dtype, threads):
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(step("native", shape, dtype))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 3, 37), (2, 5000), (5, 4096)], ids=str)
def test_every_instruction_set_agrees_with_the_reference(instructions, shape, dtype, loss):
    # the table is float32 whatever the tensors are
    tolerance = {torch.float64: 2e-7, torch.float32: 3e-6}.get(dtype, torch.finfo(dtype).eps)
    for mine, truth in zip(step("native", shape, dtype, loss), step("reference", shape, dtype, loss), strict=True):
        torch.testing.assert_close(mine, truth, rtol=tolerance, atol=0.1 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.1, -3e-6, 7e5])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(instructions, dtype, factor):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    out = torch.empty_like(every)
    saved = torch.zeros(3)
    vadiff_native().scale_gradient(every, torch.tensor(factor), saved, out)
    torch.testing.assert_close(out, (every.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[~out.isnan()], (every.float() * factor).signbit()[~out.isnan()])


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_larger_than_the_caches_is_the_same(instructions, dtype, offset):
    elements = 40 * 2**20 // dtype.itemsize + 17  # streamed past the caches
    buffers = [torch.randn(elements + offset).to(dtype)[offset:].view(1, -1) for _ in range(2)]
    prediction, target = buffers[0].requires_grad_(), buffers[1]
    loss = vadiff.DiffusionLoss("constant", backend="native")(prediction, target, torch.zeros(1))
    (gradient,) = torch.autograd.grad(loss, prediction)
    difference = prediction.detach().float() - target.float()
    torch.testing.assert_close(loss.double(), difference.double().square().mean(), rtol=1e-6, atol=0)
    expected = (2.0 / elements * difference).to(dtype)
    torch.testing.assert_close(gradient, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_other_python_threads_run_while_a_kernel_does(threads):
    """A second call, started while the first runs, ends before it: the interpreter was free."""
    large = torch.randn(1, 60 * 2**20), torch.randn(1, 60 * 2**20), torch.zeros(1)
    small = torch.randn(1, 10), torch.randn(1, 10), torch.zeros(1)
    order: list[str] = []
    started = threading.Event()

    def run(name: str, batch: tuple[Tensor, Tensor, Tensor], times: int) -> None:
        criterion = vadiff.DiffusionLoss(backend="native")
        started.set() if name == "large" else started.wait()
        with torch.no_grad():
            for _ in range(times):
                criterion(*batch)
        order.append(name)

    both = [threading.Thread(target=run, args=args) for args in (("large", large, 20), ("small", small, 5))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert order == ["small", "large"]


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        vadiff_native()._native.cpu_select("mmx")


def test_auto_takes_the_native_kernels_for_cpu_tensors(monkeypatch):
    monkeypatch.delenv("VADIFF_BACKEND", raising=False)
    for dtype in DTYPES:
        assert backends.select("auto", torch.zeros(1, dtype=dtype)) is vadiff_native()
    assert backends.select("auto", torch.zeros(1, device="meta")).__name__ == "vadiff.reference"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The compiled module does not load; what was tried."""
    tried = []

    def refuse(name: str) -> None:
        tried.append(name)
        raise ImportError("libmissing.so.1: cannot open shared object file", name="something")

    monkeypatch.setattr(backends.importlib, "import_module", refuse)
    backends._load_native.cache_clear()
    backends._load_triton.cache_clear()
    yield tried
    backends._load_native.cache_clear()
    backends._load_triton.cache_clear()


def test_a_failed_load_is_remembered_and_told_where_asked_by_name(broken):
    batch = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"libmissing\.so\.1.*pip install --force-reinstall") as caught:
            vadiff.DiffusionLoss(backend="native")(*batch)
        assert isinstance(caught.value.__cause__, ImportError)
    vadiff.DiffusionLoss(backend="auto")(*batch)  # falls back
    assert broken == ["vadiff.native"]
    works, why = vadiff.backend_report()["native"]
    assert not works
    assert "libmissing.so.1" in why


def test_without_the_module_the_error_says_what_the_build_left_out(monkeypatch, tmp_path):
    note = tmp_path / "_native_build.txt"
    note.write_text("No C++ compiler was found.")
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(
        ModuleNotFoundError("No module named 'vadiff._native'", name="vadiff._native")
    ))  # fmt: skip
    backends._load_native.cache_clear()
    with pytest.raises(RuntimeError, match=r"backend 'native' .* not built\. No C\+\+ compiler was found"):
        vadiff.DiffusionLoss(backend="native")(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
    backends._load_native.cache_clear()

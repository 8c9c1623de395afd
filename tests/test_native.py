"""What is special about the native CPU kernels: threads, instruction sets, conversions, large gradients, loading."""

from __future__ import annotations

import importlib.machinery
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import usable, vadiff_native
from torch import Tensor

import vadiff
from vadiff.ops import backends
from vadiff.ops.reference import moments_of, weight_table

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
    module.cpu_select(request.param)
    yield request.param
    module.cpu_select(instruction_sets()[0])


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


@pytest.mark.parametrize("bins", [2, 3, 7, 128, 1024])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 20.0])  # the last reaches from end to end
def test_every_instruction_set_smooths_the_table_as_the_reference_does(instructions, bins, smoothing):
    generator = torch.Generator().manual_seed(3)
    criterion = vadiff.DiffusionLoss(vadiff.weighting.VarianceAware(smoothing=smoothing), bins=bins, backend="native")
    for _ in range(3):
        log_snr = 6 * torch.randn(200, generator=generator)  # many of 1,024 bins stay empty
        criterion.reweight(torch.rand(200, generator=generator) * (0.3 * log_snr).exp(), log_snr)
    statistics = criterion.statistics
    expected = weight_table(moments_of(statistics.state, statistics.bins), statistics.bins, criterion.weighting.rule)
    assert expected.std() > 0.01
    torch.testing.assert_close(statistics.log_weights.view(torch.float32), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.1, -3e-6, 7e5])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(instructions, dtype, factor):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    out = every.clone()
    vadiff_native().scale(out, torch.tensor(factor))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_gradients_have_the_same_bits_on_one_two_and_four_threads(dtype, threads):
    elements = 36 * 2**20 // dtype.itemsize // 3 + 5  # more than 32 MiB go past the caches whatever the machine
    prediction, target = (torch.randn(3, elements).to(dtype) for _ in range(2))
    prediction.requires_grad_()
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        criterion = vadiff.DiffusionLoss("constant", backend="native")
        loss = criterion(prediction, target, torch.zeros(3), reduction="none")
        found.append([loss.detach(), *torch.autograd.grad(loss, prediction, torch.tensor([0.5, 2.0, 3.0]))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.fixture
def no_forced_switches() -> Iterator[None]:
    """A Python thread goes on until it lets go of the interpreter by itself."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("kernel", ["step", "scale"])
def test_other_python_threads_run_while_a_kernel_does(kernel, monkeypatch, no_forced_switches):
    """Nothing but the kernel lets go of the interpreter; it is called until the other thread was fast enough."""
    run = getattr(vadiff_native()._native, kernel)
    wanted = threading.Lock()
    moved: list[bool] = []

    def other() -> None:
        with wanted:
            moved.append(True)

    def watched(call: int) -> None:
        wanted.release()
        for _ in range(200):
            run(call)
            if moved:
                break
        during.append(bool(moved))

    during: list[bool] = []
    wanted.acquire()
    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    monkeypatch.setattr(vadiff_native()._native, kernel, watched)
    prediction = torch.randn(1, 2**22, requires_grad=True)
    criterion = vadiff.DiffusionLoss(backend="native")
    loss = criterion(prediction, torch.randn(1, 2**22), torch.zeros(1))
    torch.autograd.grad(loss, prediction, torch.tensor(2.0))
    thread.join(timeout=60)
    assert during == [True]


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        vadiff_native()._native.cpu_select("mmx")


def test_auto_takes_the_native_kernels_for_cpu_tensors(monkeypatch):
    monkeypatch.delenv("VADIFF_BACKEND", raising=False)
    for dtype in DTYPES:
        assert backends.select("auto", torch.zeros(1, dtype=dtype)) is vadiff_native()
    assert backends.select("auto", torch.zeros(1, device="meta")).__name__ == "vadiff.ops.reference"


def forget_what_loaded() -> None:
    for remembered in (backends.load_native, backends._load_triton, backends._chosen):
        remembered.cache_clear()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The compiled module does not load; what was tried."""
    tried = []

    def refuse(name: str) -> None:
        tried.append(name)
        raise ImportError("libmissing.so.1: cannot open shared object file", name="something")

    monkeypatch.setattr(backends.importlib, "import_module", refuse)
    forget_what_loaded()
    yield tried
    forget_what_loaded()


def test_a_failed_load_is_remembered_and_told_where_asked_by_name(broken):
    batch = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"libmissing\.so\.1.*pip install --force-reinstall") as caught:
            vadiff.DiffusionLoss(backend="native")(*batch)
        assert isinstance(caught.value.__cause__, ImportError)
    vadiff.DiffusionLoss(backend="auto")(*batch)  # falls back
    assert broken == ["vadiff._native"]
    works, why = vadiff.backend_report()["native"]
    assert not works
    assert "libmissing.so.1" in why


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """vadiff's folder, without the compiled module; it and what needs it are imported anew."""
    usable("native")  # loads it
    monkeypatch.setattr(vadiff, "__path__", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])  # not the editable install's
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops" / "backends.py"))
    for package, name in ((vadiff, "_native"), (vadiff.ops, "native")):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}")
        monkeypatch.delattr(package, name)
    forget_what_loaded()
    yield tmp_path
    forget_what_loaded()


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        ("No C++ compiler was found. Install one.", "not built. No C++ compiler was found. Install one."),
        ("", "not built. Build them, with a C++ compiler and in the folder of vadiff's source: pip install"),
        (None, "not built. Build them, with a C++ compiler and in the folder of vadiff's source: pip install"),
    ],
    ids=["note", "empty note", "no note"],
)
def test_without_the_module_the_error_says_what_the_build_left_out_or_how_to_build(hidden, note, expected):
    if note is not None:
        (hidden / "_native_build.txt").write_text(note)
    with pytest.raises(RuntimeError, match=r"backend 'native' .*" + re.escape(expected)):
        vadiff.DiffusionLoss(backend="native")(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize("interface", [None, 0])
def test_a_module_compiled_from_other_sources_is_not_used(hidden, monkeypatch, interface):
    stale = ModuleType("vadiff._native")
    stale.__file__ = "stale.so"
    if interface is not None:
        monkeypatch.setattr(stale, "INTERFACE", interface, raising=False)
    monkeypatch.setitem(sys.modules, "vadiff._native", stale)
    monkeypatch.setattr(vadiff, "_native", stale, raising=False)
    assert backends.select("auto", torch.zeros(1)).__name__ == "vadiff.ops.reference"
    number = "not numbered" if interface is None else interface
    with pytest.raises(RuntimeError, match=rf"stale\.so was compiled from .* is {number}, expected \d+\).*pip install"):
        backends.select("native", torch.zeros(1))


def test_a_missing_module_skips_tests_only_where_no_compiler_is(hidden, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(pytest.fail.Exception, match="not built"):
        usable("native")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="not built"):
        usable("native")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("freed", ["prediction", "target", "log_snr", "base_weight"])
def test_a_tensor_whose_storage_was_freed_is_refused(freed, training):
    """As sharded training frees what it has gathered; to read it would end the process."""
    criterion = vadiff.DiffusionLoss(backend="native").train(training)
    tensors = {
        "prediction": torch.randn(4, 8, requires_grad=True) * 1.0,
        "target": torch.randn(4, 8),
        "log_snr": torch.zeros(4),
        "base_weight": torch.ones(4),
    }
    tensors[freed].untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=f"{freed} .* has no memory, expected a tensor whose storage was not freed"):
        criterion(**tensors)
    assert criterion.statistics.count.sum() == 0

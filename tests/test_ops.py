"""The operators as torch.library sees them: schemas, fake kernels, dispatch."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vadiff
from vadiff.ops import backends

SAMPLES = 6
BINS = 8
LAYOUTS = ["contiguous", "channels_last", "transposed"]


def problem(backend: str) -> dict[str, Any]:
    return {
        "low": -8.0, "high": 8.0, "half_life": 256.0, "statistic": "std", "strength": 1.0, "smoothing": 0.5,
        "clip": 10.0, "prior": 32.0, "huber_delta": 0.0, "sync": True, "backend": backend,
    }  # fmt: skip


def state(device: torch.device) -> dict[str, Tensor]:
    return {
        "state": torch.zeros(6 * BINS + 14, dtype=torch.int64, device=device),
        "log_weights": torch.zeros(BINS, dtype=torch.int32, device=device),
    }


def residual(device: torch.device, layout: str, dtype: torch.dtype, noise: bool) -> dict[str, Any]:
    shape = (SAMPLES, 4, 5, 3)
    prediction, target, eps = (torch.randn(shape, device=device) for _ in range(3))
    if layout == "channels_last":
        prediction = prediction.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        prediction = prediction.transpose(1, 2).contiguous().transpose(1, 2)
    each = torch.rand(SAMPLES, device=device) if noise else None
    return {
        "prediction": prediction.to(dtype), "target": target, "noise": eps if noise else None,
        "a_each": each, "b_each": each, "c_each": each, "a": 1.0, "b": -1.0, "c": 0.0,
    }  # fmt: skip


def levels(device: torch.device, base_weight: bool = True) -> dict[str, Any]:
    u = torch.rand(SAMPLES, device=device) + 0.5
    log_snr = torch.linspace(-4, 4, SAMPLES, device=device)
    return {"log_snr": log_snr, "base_weight": u if base_weight else None, "sample_weight": None, "weight": None}


def check(operator: Any, call: dict[str, Any]) -> None:
    """opcheck with what stands in `call`, in the operator's order."""
    names = [argument.name for argument in operator._schema.arguments]
    assert call.keys() == set(names)
    torch.library.opcheck(operator, tuple(call[name] for name in names))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [True, False])
def test_the_loss_operator_passes_opcheck(
    backend: str, device: torch.device, layout: str, dtype: torch.dtype, mean: bool
):
    call = {**residual(device, layout, dtype, noise=mean), **levels(device), "mean": mean}
    call.update(**state(device), **problem(backend), gradient=mean, update=True)
    check(torch.ops.vadiff.diffusion_loss.default, call)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backward_operator_passes_opcheck(backend: str, device: torch.device, layout: str) -> None:
    call = residual(device, layout, torch.float16, noise=True)
    call.update(
        per_sample=torch.rand(4, SAMPLES, device=device), upstream=torch.ones((), device=device).expand(SAMPLES)
    )
    check(torch.ops.vadiff.diffusion_loss_backward.default, {**call, "huber_delta": 0.5, "backend": backend})


def test_the_scaling_operator_passes_opcheck(backend: str, device: torch.device) -> None:
    gradient, scalar = torch.randn(SAMPLES, 7, device=device), torch.full((), 3.0, device=device)
    torch.library.opcheck(torch.ops.vadiff.scale_gradient_.default, (gradient, scalar, backend))


def test_the_reweight_operator_passes_opcheck(backend: str, device: torch.device) -> None:
    loss = torch.rand(SAMPLES, device=device)
    residual = {"target": None, "noise": None, "a": 1.0, "b": 0.0, "c": 0.0}
    call = {"prediction": loss, **residual, **dict.fromkeys(("a_each", "b_each", "c_each")), "mean": False}
    call.update(**levels(device, base_weight=False), **state(device), **problem(backend), update=True)
    check(torch.ops.vadiff.reweight.default, call)


def test_the_argument_wins_over_the_environment_variable_and_it_over_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    tensor = torch.zeros(2, device="cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("VADIFF_BACKEND", "triton")
    assert backends.select("auto", tensor).__name__ == "vadiff.triton_kernels"
    assert backends.select("reference", tensor).__name__ == "vadiff.ops.reference"
    monkeypatch.setenv("VADIFF_BACKEND", "reference")
    assert backends.select("auto", tensor).__name__ == "vadiff.ops.reference"
    assert backends.select("triton", tensor).__name__ == "vadiff.triton_kernels"
    monkeypatch.setenv("VADIFF_BACKEND", "fast")
    with pytest.raises(ValueError, match="VADIFF_BACKEND is 'fast', expected one of auto, reference, native, triton"):
        vadiff.DiffusionLoss()(tensor, tensor, tensor)


def test_an_explicit_backend_that_cannot_run_says_why_and_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VADIFF_BACKEND", raising=False)
    double = torch.zeros(2, 3, dtype=torch.float64)
    log_snr = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run this call: .* float64"):
        vadiff.DiffusionLoss(backend="triton")(double, double, log_snr)
    assert vadiff.DiffusionLoss()(double, double, log_snr) == 0
    backends._chosen.cache_clear()
    monkeypatch.setattr(
        backends, "_load_triton", lambda: backends.Obstacle("the Triton kernels did not load (gone). Install: ...")
    )
    with pytest.raises(RuntimeError, match="did not load"):
        vadiff.DiffusionLoss(backend="triton")(double.float(), double.float(), log_snr)
    assert backends.backend_report()["triton"][0] is False
    backends._chosen.cache_clear()


@pytest.mark.parametrize(
    ("architectures", "triton_loads", "dtype", "expected"),
    [
        ("sm_80+sm_90", True, torch.float32, "native"),
        ("sm_100", True, torch.float32, "triton"),  # built for newer cards only
        ("", True, torch.float32, "triton"),
        (None, True, torch.bfloat16, "triton"),
        (None, True, torch.float64, "reference"),
        (None, False, torch.float32, "reference"),
    ],
)
def test_auto_takes_native_for_cuda_tensors_where_it_is_built_for_the_card_else_triton(
    architectures: str | None,
    triton_loads: bool,
    dtype: torch.dtype,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    missing = backends.Obstacle("gone")
    native = missing if architectures is None else SimpleNamespace(CUDA_ARCHITECTURES=architectures)
    triton = SimpleNamespace(INTERPRETED=False) if triton_loads else missing
    monkeypatch.setattr(backends, "load_native", lambda: native)
    monkeypatch.setattr(backends, "_load_triton", lambda: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    backends._chosen.cache_clear()
    with caplog.at_level("DEBUG", logger="vadiff"):
        for _ in range(2):
            found = backends._chosen("auto", device, dtype)
    backends._chosen.cache_clear()
    assert found is {"native": native, "triton": triton, "reference": backends.reference}[expected]
    if dtype == torch.float32:
        assert backends.automatic(device) == expected
    order = ["native", "triton", "reference"]
    assert [record.args[0] for record in caplog.records] == order[: order.index(expected)]  # each said once


def test_importing_vadiff_brings_in_torch_and_numpy_only_and_changes_nothing() -> None:
    import subprocess
    import sys

    program = """
import os, sys
import torch, numpy
before, environment = set(sys.modules), dict(os.environ)
import vadiff
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new <= {"vadiff", "torch", "numpy"}, new
lazy = ("vadiff.triton_kernels", "vadiff.ops.native", "vadiff._native", "vadiff.trainer")
assert not {name for name in sys.modules if name.startswith(lazy)}
assert dict(os.environ) == environment
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 3), True), ((12, 0), True)],
)
def test_native_kernels_run_on_the_architectures_they_were_built_for(capability: tuple[int, int], runs: bool) -> None:
    obstacle = backends._architecture_obstacle("sm_80+sm_90+sm_100", capability)
    assert (obstacle is None) == runs
    assert runs or "VADIFF_CUDA_ARCHITECTURES=75" in str(obstacle)


def negated(x: torch.Tensor) -> torch.Tensor:
    """-x as a view that says so instead of doing it."""
    lazy: torch.Tensor = torch.complex(torch.zeros_like(x), x).conj().imag
    assert lazy.is_neg()
    return lazy


def test_lazily_negated_tensors_are_taken_for_what_they_are(backend: str, device: torch.device) -> None:
    prediction, target = torch.randn(1, 3, 8, device=device).requires_grad_(), torch.randn(1, 3, 8, device=device)
    log_snr = torch.randn(1, device=device)
    criterion = vadiff.DiffusionLoss(backend=backend).to(device).eval()
    expected = criterion(prediction, -target, -log_snr)
    (gradient,) = torch.autograd.grad(expected, prediction, torch.tensor(-2.0, device=device))
    found = criterion(prediction, negated(target), negated(log_snr))
    upstream = negated(torch.full((1,), 2.0, device=device)).view(())
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, prediction, upstream)[0], gradient)


def test_a_traced_criterion_computes_what_an_eager_one_does(backend: str, device: torch.device) -> None:
    batch = [torch.randn(3, 4, device=device), torch.randn(3, 4, device=device), torch.randn(3, device=device)]
    criterion = vadiff.DiffusionLoss(backend=backend).to(device).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and remarks on Python numbers
        traced = torch.jit.trace(lambda p, t, s: criterion(p, t, s), batch, check_trace=False)
    fresh = [torch.randn_like(x) for x in batch]
    torch.testing.assert_close(traced(*fresh), criterion(*fresh))


def test_a_subclass_sees_the_operators_whichever_argument_it_is(backend: str, device: torch.device) -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    criterion = vadiff.DiffusionLoss(backend=backend).to(device).eval()
    batch = {
        "prediction": torch.randn(3, 4, device=device),
        "target": torch.randn(3, 4, device=device),
        "log_snr": torch.randn(3, device=device),
        "base_weight": torch.rand(3, device=device),
        "sample_weight": torch.rand(3, device=device),
    }
    expected = criterion(**batch)
    for name, tensor in batch.items():
        found = criterion(**{**batch, name: two_tensor(tensor, tensor.clone())})
        assert isinstance(found, two_tensor)
        assert torch.equal(found.a, expected)

"""The operators as torch.library sees them: schemas, fake kernels, dispatch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import vadiff
from vadiff import backends

SAMPLES = 6
STATE = (torch.zeros(4 * 8 + 2, dtype=torch.int64), torch.zeros(8, dtype=torch.int32), -8.0, 8.0, 256.0)
RULE = ("std", 1.0, 0.5, 10.0, 32.0)


def state(device: torch.device) -> tuple[Any, ...]:
    return tuple(x.to(device, copy=True) if isinstance(x, Tensor) else x for x in STATE)


def residual_arguments(device: torch.device, layout: str, dtype: torch.dtype, noise: bool) -> tuple[Any, ...]:
    shape = (SAMPLES, 4, 5, 3)
    output, target, eps = (torch.randn(shape, device=device) for _ in range(3))
    if layout == "channels_last":
        output = output.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        output = output.transpose(1, 2).contiguous().transpose(1, 2)
    each = torch.rand(SAMPLES, device=device) if noise else None
    return output.to(dtype), target, eps if noise else None, each, each, each, 1.0, -1.0, 0.0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [True, False])
def test_the_loss_operator_passes_opcheck(
    backend: str, device: torch.device, layout: str, dtype: torch.dtype, mean: bool
):
    log_snr = torch.linspace(-4, 4, SAMPLES, device=device)
    u = torch.rand(SAMPLES, device=device) + 0.5
    arguments = (
        *residual_arguments(device, layout, dtype, noise=mean), log_snr, u, None, None, *state(device), *RULE,
        0.0, mean, mean, True, True, backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.vadiff.diffusion_loss.default, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_the_backward_operator_passes_opcheck(backend: str, device: torch.device, layout: str) -> None:
    upstream = torch.ones((), device=device).expand(SAMPLES)
    saved = torch.rand(2 * SAMPLES + 1, device=device)
    arguments = (upstream, saved, *residual_arguments(device, layout, torch.float16, noise=True), 0.5, backend)
    torch.library.opcheck(torch.ops.vadiff.diffusion_loss_backward.default, arguments)


def test_the_scaling_operators_pass_opcheck(backend: str, device: torch.device) -> None:
    gradient, scalar = torch.randn(SAMPLES, 7, device=device), torch.full((), 3.0, device=device)
    saved = torch.rand(2 * SAMPLES + 1, device=device)
    for operator in (torch.ops.vadiff.scale_gradient.default, torch.ops.vadiff.scale_gradient_.default):
        torch.library.opcheck(operator, (gradient, scalar, saved, backend))


def test_the_reweight_operator_passes_opcheck(backend: str, device: torch.device) -> None:
    loss, log_snr = torch.rand(SAMPLES, device=device), torch.linspace(-4, 4, SAMPLES, device=device)
    arguments = (loss, log_snr, loss + 1, None, *state(device), *RULE, True, True, backend)
    torch.library.opcheck(torch.ops.vadiff.reweight.default, arguments)


def test_the_argument_wins_over_the_environment_variable_and_it_over_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    tensor = torch.zeros(2, device="cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("VADIFF_BACKEND", "triton")
    assert backends.select("auto", tensor).__name__ == "vadiff.triton_kernels"
    assert backends.select("reference", tensor).__name__ == "vadiff.reference"
    monkeypatch.setenv("VADIFF_BACKEND", "reference")
    assert backends.select("auto", tensor).__name__ == "vadiff.reference"
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
    monkeypatch.setattr(
        backends, "_load_triton", lambda: backends.Obstacle("the Triton kernels did not load (gone). Install: ...")
    )
    with pytest.raises(RuntimeError, match="did not load"):
        vadiff.DiffusionLoss(backend="triton")(double.float(), double.float(), log_snr)
    assert backends.backend_report()["triton"][0] is False


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
lazy = ("vadiff.triton_kernels", "vadiff.native", "vadiff._native", "vadiff.training")
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

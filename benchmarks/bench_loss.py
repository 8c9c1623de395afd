"""Forward and backward of one loss call, statistics included, beside what it replaces.

    make bench

Providers: `F.mse_loss` (no statistics, no weights), a hand-written eager version of the whole contract, and each
backend that can run here. Every provider is checked against float64 in the same run and is not timed if it is wrong.
Buffers rotate, so that caches do not flatter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hand_written import HandWrittenLoss
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import vadiff

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {"cifar-128": (128, 3, 32, 32), "cifar-512": (512, 3, 32, 32), "latent-64": (64, 4, 64, 64)}
PROVIDERS = ["mse_loss", "hand_written", *(name for name, (usable, _) in vadiff.backend_report().items() if usable)]
ROTATED_BYTES = 512 * 2**20  # buffers in rotation: more than any last-level cache

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def provider(name: str) -> Loss:
    if name == "mse_loss":
        return lambda prediction, target, log_snr: F.mse_loss(prediction, target)
    if name == "hand_written":
        return HandWrittenLoss().to(DEVICE)
    return vadiff.DiffusionLoss(backend=name).to(DEVICE)


def batches(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Enough (prediction, target, log_snr) to fill ROTATED_BYTES, four at least."""
    size = torch.Size(shape).numel() * dtype.itemsize
    torch.manual_seed(0)
    return [
        (
            torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(),
            torch.randn(shape, device=DEVICE, dtype=dtype),
            4 * torch.randn(shape[0], device=DEVICE),
        )
        for _ in range(max(4, ROTATED_BYTES // (3 * size)))
    ]


def check(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The second loss and gradient (the first has w = 1) against the reference in float64."""
    loss, truth = provider(name), provider("mse_loss" if name == "mse_loss" else "reference")
    for prediction, target, log_snr in batches(shape, dtype)[:2]:
        double = prediction.detach().double().requires_grad_()
        found, expected = loss(prediction, target, log_snr), truth(double, target.double(), log_snr)
        torch.testing.assert_close(found.double(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=0)
        (mine,), (right,) = torch.autograd.grad(found, prediction), torch.autograd.grad(expected, double)
        error = (mine.double() - right).norm() / right.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"{name} is wrong by {error:.1e}: not timed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PROVIDERS)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, case: str, dtype: torch.dtype) -> None:
    check(name, CASES[case], dtype)
    loss, rotation = provider(name), itertools.cycle(batches(CASES[case], dtype))
    upstream = torch.ones((), device=DEVICE)

    def run() -> None:
        prediction, target, log_snr = next(rotation)
        torch.autograd.grad(
            loss(prediction, target, log_snr), prediction, upstream.to(dtype) if name == "mse_loss" else upstream
        )
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case} {dtype}"
    benchmark.extra_info["device"] = (
        torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    )
    benchmark.pedantic(run, rounds=60, warmup_rounds=10)
